"""What a user may say about serving, through vLLM's own flags: `--additional-config '{"neuronmlp":
{...}}'`.
"""

from __future__ import annotations

import dataclasses
import pathlib
from typing import Any

from neuronmlp_plugin.errors import UsageError

KEY = "neuronmlp"


@dataclasses.dataclass(frozen=True)
class Options:
    """`factors`: a factor file to lay over a dense model. `fast_path`: prepacked products or fused kernels;
    false runs plain torch, to compare with. `verify`: all files against their recorded digests first.
    """

    factors: pathlib.Path | None = None
    fast_path: bool = True
    verify: bool = False

    def __post_init__(self) -> None:
        for name in ("fast_path", "verify"):
            value = getattr(self, name)
            if not isinstance(value, bool):
                raise UsageError(f"{KEY}.{name}: expected true or false, found {value!r}.")


def parse_options(additional_config: Any) -> Options:
    """Options out of vLLM's `additional_config`; raises UsageError for a key or value that means nothing
    here.
    """
    given = additional_config.get(KEY, {}) if isinstance(additional_config, dict) else {}
    known = [field.name for field in dataclasses.fields(Options)]
    if not isinstance(given, dict) or not set(given) <= set(known):
        found = sorted(set(given) - set(known)) if isinstance(given, dict) else given
        raise UsageError(
            f"--additional-config {KEY}: expected an object with the keys {', '.join(known)}, found "
            f"{found!r}."
        )
    factors = given.get("factors")
    if not isinstance(factors, (str, type(None))):
        raise UsageError(f"{KEY}.factors: expected the path of a factor file, found {factors!r}.")
    return Options(**{**given, "factors": pathlib.Path(factors) if factors else None})
