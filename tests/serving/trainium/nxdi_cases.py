"""What is run on the real NxD Inference, as data: shared by the process that runs it and by the tests that
judge it.
"""

from __future__ import annotations

import dataclasses
import itertools
from typing import Any

from tests.tiny_models import FAMILIES

PROMPT_LENGTHS = (11, 5, 8)
NEW_TOKENS = 6
SEQ_LEN = 32


@dataclasses.dataclass(frozen=True)
class Case:
    """One model folder served by NxDI in CPU mode; `neuronmlp` are the user's options, `neuron` further
    NeuronConfig fields, `mlp_dtypes` those of the MLP weights that NxDI must hold then (None: any).
    """

    name: str
    family: str
    folder: str
    tp: int
    batch: int
    neuronmlp: dict[str, Any] | None
    neuron: dict[str, Any] = dataclasses.field(default_factory=dict)
    mlp_dtypes: list[str] | None = None


def family_cases(folders: dict[str, str], tp: int) -> list[Case]:
    """Every family, batch 1 and 3, and (where there is more than one rank) sequence parallelism
    off and on.
    """
    cases = []
    grid = itertools.product(FAMILIES, (1, 3), (False, True)[: 1 if tp == 1 else 2])
    for family, batch, sequence_parallel in grid:
        name = f"{family}-tp{tp}-batch{batch}" + ("-sp" if sequence_parallel else "")
        neuron = {"sequence_parallel_enabled": sequence_parallel}
        cases.append(Case(name, family, folders[family], tp, batch, {}, neuron))
    return cases


def grouped_cases(folders: dict[str, str], tp: int) -> list[Case]:
    """Folders by name, which ends with their number of groups: those that tp ranks can serve."""
    served = {
        name: folder for name, folder in folders.items() if int(name.split("-")[-1]) in (1, *range(tp, 9, tp))
    }
    return [Case(f"{name}-tp{tp}", "llama", folder, tp, 2, {}) for name, folder in served.items()]
