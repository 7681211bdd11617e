"""Models as the measured kinds of `neuronmlp bench` take them: NAME=FOLDER."""

from __future__ import annotations

import pathlib
from collections.abc import Sequence

from neuronmlp_plugin.errors import UsageError


def named_folders(kind: str, models: Sequence[str]) -> dict[str, pathlib.Path]:
    """Name -> folder, in the order given; raises UsageError for a model without a name, or two of one."""
    pairs = [model.partition("=") for model in models]
    if any(not sep for _, sep, _ in pairs) or len({name for name, _, _ in pairs}) < len(pairs):
        raise UsageError(
            f"bench {kind}: expected models as NAME=FOLDER with different names, found {' '.join(models)}."
        )
    return {name: pathlib.Path(folder) for name, _, folder in pairs}
