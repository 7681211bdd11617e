"""What a user may say of us in `override_neuron_config`, and the record of it that enters the key of a
compiled artifact.
"""

from __future__ import annotations

import dataclasses
from typing import Any

from neuronmlp_plugin.errors import UsageError

KEY = "neuronmlp"
KERNELS = ("auto", "off", "require", "prefill", "decode")


@dataclasses.dataclass(frozen=True)
class Options:
    """`--additional-config '{"override_neuron_config": {"neuronmlp": {...}}}'`, every field of it optional.

    kernels: `auto` uses the NKI kernels where they apply, `off` never does, `require` refuses to compile a
    layer without them; `prefill`
        and `decode` use them in that phase alone, and keep two copies of the weights, since the other phase
        needs another layout.
    factors: a factor file (FORMAT.md) to lay over a dense model; a factored folder needs none.
    """

    kernels: str = "auto"
    factors: str | None = None

    def to_json(self) -> dict[str, Any]:
        return dataclasses.asdict(self)


def parse_options(given: Any) -> Options:
    """Check the user's words; raises UsageError."""
    names = [field.name for field in dataclasses.fields(Options)]
    if not isinstance(given, dict) or not set(given) <= set(names):
        raise UsageError(
            f"override_neuron_config.{KEY}: expected an object with keys of {', '.join(names)}, found {given!r}."
        )
    options = Options(**given)
    if options.kernels not in KERNELS:
        raise UsageError(
            f"override_neuron_config.{KEY}.kernels: expected one of {', '.join(KERNELS)}, found {options.kernels!r}."
        )
    return options
