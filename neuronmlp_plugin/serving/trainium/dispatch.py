"""Kernels or torch, for each layer and phase: the decision, the trial launch before it, and the record of
what was compiled and how often it ran, so that a fallback cannot pass for a kernel run.
"""

from __future__ import annotations

import collections
import dataclasses
import functools
import importlib.metadata
import json
import logging
from collections.abc import Iterator, Mapping
from typing import Any

import torch

from neuronmlp_plugin.errors import UsageError
from neuronmlp_plugin.models.factors import MLPLayer
from neuronmlp_plugin.serving.trainium.config import ArtifactError, block_of, options_of, source_of
from neuronmlp_plugin.serving.trainium.kernel_path import declined
from neuronmlp_plugin.serving.trainium.neuron_options import KEY, Options
from neuronmlp_plugin.serving.trainium.sharding import FLOATING, Reading, kernel_reading, torch_reading
from neuronmlp_plugin.serving.trainium.trial import refusal
from nki_kernels.backend import HAS_NKI

logger = logging.getLogger("vllm.neuronmlp")  # a child of the logger that vLLM sets up
OLDEST_NKI = (0, 2)
# NxDI's own kernels are of the older NKI language (`neuronxcc.nki`, Beta 1) as long as it goes with an nki
# before this one: 0.8 (SDK 2.28) imports neuronxcc.nki throughout, 0.9 (SDK 2.29, nki 0.3) nki and nkilib.
FIRST_NKI_OF_NXDI = (0, 3)
# NeuronConfig switches of those kernels, beside `attn_kernel_enabled`; NxDI 0.8, models/config.py.
_BETA_1_SWITCHES = (
    "attn_kernel_enabled",
    "qkv_kernel_enabled",
    "qkv_nki_kernel_enabled",
    "out_proj_kernel_enabled",
    "attn_tkg_nki_kernel_enabled",
    "attn_tkg_builtin_kernel_enabled",
    "attn_block_tkg_nki_kernel_enabled",
    "attn_block_cte_nki_kernel_enabled",
    "strided_context_parallel_kernel_enabled",
    "kv_cache_update_with_kernel",
)
TRIAL_TOKENS = 512  # of the trial's prefill: a larger one is more of the same blocks
FLASH_FROM = 4096  # context length from which NxDI takes its flash kernel where nobody said no


PREFILL, DECODE = "prefill", "decode"
PHASES = (PREFILL, DECODE)


@dataclasses.dataclass(frozen=True)
class Decision:
    """`kernel` or `torch`, one sentence saying why, and how the weights are read (sharding.py)."""

    path: str
    reason: str
    weights: str = FLOATING


_NO_INT8 = {"kernel": Reading(), "torch": Reading()}


def decide(
    options: Options,
    unavailable: str | None,
    declined: str | None,
    layer: int,
    readings: Mapping[str, Reading] = _NO_INT8,
) -> dict[str, Decision]:
    """Phase -> decision for one layer.

    `unavailable`: why no kernel can run here at all; `declined`: why the planner has no plan for this layer;
    `readings`: how each path would read its weights. Raises UsageError where the user requires kernels and
    there are none, or none that read int8 as it is.
    """
    why_not = unavailable or declined
    if options.kernels == "require" and why_not:
        raise UsageError(
            f"layer {layer}: expected a kernel (kernels: require), found none: {why_not}; use kernels: auto "
            "to fall back."
        )
    if options.kernels == "require" and readings["kernel"].why:
        raise UsageError(
            f"layer {layer}: expected int8 weights that the kernels read as they are (kernels: require), "
            f"found {readings['kernel'].why}; use kernels: auto to have them expanded at load."
        )
    decisions = {}
    for phase in PHASES:
        # `prefill` and `decode` name the one phase that has kernels
        if options.kernels in ("off", *(other for other in PHASES if other != phase)):
            path, reason = "torch", f"kernels: {options.kernels}"
        else:
            path, reason = ("torch", why_not) if why_not else ("kernel", "planned")
        reading = readings[path]
        expanded = f"; int8 expanded: {reading.why}" if reading.why else ""
        decisions[phase] = Decision(path, reason + expanded, reading.weights)
    return decisions


def settle(config: Any) -> None:
    """What must be known before NxDI copies the config of a model that it is about to compile: whether the
    vendor takes the kernels, and that no kernel of the older language shares a graph with them.

    Writes into the config's record, which travels with the artifact. Raises UsageError where kernels are
    required and refused, and where a switch of NxDI's asks for the older language beside them.
    """
    record = getattr(config, KEY)
    record["refused"] = None
    if all(decision.path == "torch" for layer in layer_decisions(config) for decision in layer.values()):
        return
    why = _refused(config)
    if why:
        record["refused"] = why
        layer_decisions(config)  # raises where kernels are required
        logger.warning("neuronmlp: MLPs run by torch operations: %s", why)
    else:
        _one_language(config)


def _refused(config: Any) -> str | None:
    """What the vendor says of one launch of each kernel, for each combination of forms and planned phase."""
    block, neuron, norm_eps = block_of(config), config.neuron_config, None
    assert block is not None
    if getattr(neuron, "mlp_kernel_enabled", False):  # NxDI leaves the norm to the MLP
        norm_eps = config.rms_norm_eps
    tokens = {DECODE: neuron.batch_size, PREFILL: min(neuron.max_context_length, TRIAL_TOKENS)}
    tried = set()
    for stored, decisions in zip(block.layers, layer_decisions(config), strict=True):
        forms = tuple((spec.form, spec.dtype) for spec in stored.values())
        for phase, decision in decisions.items():
            if decision.path == "kernel" and (forms, phase) not in tried:
                tried.add((forms, phase))
                why = refusal(stored, neuron.tp_degree, neuron.torch_dtype, tokens[phase], norm_eps)
                if why:
                    return why
    return None


def _one_language(config: Any) -> None:
    """Two NKI languages in one graph are no supported scenario: NxDI's own kernels stay off beside ours."""
    nki, neuron = installed_nki(), config.neuron_config
    if nki is None or _release(nki) >= FIRST_NKI_OF_NXDI:
        return
    for name in _BETA_1_SWITCHES:
        if getattr(neuron, name, None):
            raise UsageError(
                f"{source_of(config)}: expected {name} off beside the kernels of nki {nki}, found it on: NxD "
                "Inference's own kernel is of the older NKI language and a graph takes one; set it to false, "
                f'or "{KEY}": {{"kernels": "off"}}.'
            )
    if getattr(neuron, "attn_kernel_enabled", None) is None:
        neuron.attn_kernel_enabled = False
        if neuron.max_context_length >= FLASH_FROM:
            logger.warning(
                "neuronmlp: attn_kernel_enabled is set to false: NxD Inference would take its flash kernel, "
                "of the older "
                'NKI language, from %d tokens on; to keep it, set "%s": {"kernels": "off"}',
                FLASH_FROM,
                KEY,
            )


def layer_decisions(config: Any) -> list[dict[str, Decision]]:
    """Phase -> decision of every layer of a model with our block. Raises UsageError where kernels are
    required and cannot run.
    """
    block, neuron, options = block_of(config), config.neuron_config, options_of(config)
    assert block is not None
    unavailable = kernels_unavailable(neuron.on_cpu, installed_nki())
    unavailable = unavailable or getattr(config, KEY).get("refused")
    decisions = []
    for index, stored in enumerate(block.layers):
        why = (
            None
            if unavailable or options.kernels == "off"
            else _declined(stored, neuron.tp_degree, neuron.torch_dtype)
        )
        readings = {
            "kernel": kernel_reading(stored, neuron.tp_degree),
            "torch": torch_reading(stored, neuron.tp_degree, neuron.torch_dtype),
        }
        decisions.append(decide(options, unavailable, why, index, readings))
    return decisions


def installed_nki() -> str | None:
    """Version of the vendor's `nki`, or None."""
    try:
        return importlib.metadata.version("nki") if HAS_NKI else None
    except importlib.metadata.PackageNotFoundError:
        return None


def _release(version: str) -> tuple[int, ...]:
    return tuple(map(int, version.split(".")[:2]))


def kernels_unavailable(on_cpu: bool, nki: str | None) -> str | None:
    """Why no kernel can run at all, or None."""
    if on_cpu:
        return "NxDI runs on the CPU (on_cpu)"
    if nki is None or _release(nki) < OLDEST_NKI:
        return f"the kernels need nki 0.2 (Neuron SDK 2.28) or later, found {nki or 'none'}"
    return None


@functools.cache
def _declined(stored: MLPLayer, tp: int, dtype: torch.dtype) -> str | None:
    return declined(stored, tp, dtype)


class DispatchRecord:
    """What was traced (layer, phase, tokens -> decision) and how often a layer ran by each path."""

    def __init__(self) -> None:
        self.traced: dict[tuple[int, str, int], Decision] = {}
        self.runs: collections.Counter[tuple[str, Decision]] = collections.Counter()
        self.told: set[str] | None = None

    def add(self, layer: int, phase: str, tokens: int, decision: Decision) -> None:
        """A layer was traced (or, on a CPU, run) for so many tokens."""
        self.traced[layer, phase, tokens] = decision

    def ran(self, phase: str, tokens: int) -> None:
        """One forward of the model; NxDI pads it to the smallest traced token count that holds it."""
        sizes = {size for _, traced_phase, size in self.traced if traced_phase == phase}
        padded = min((size for size in sizes if size >= tokens), default=max(sizes, default=0))
        for (_, traced_phase, size), decision in self.traced.items():
            if traced_phase == phase and size == padded:
                self.runs[phase, decision] += 1

    def layers(self) -> Iterator[tuple[str, Decision, int]]:
        """(phase, decision, number of layers) of all that was traced."""
        counted = {(layer, phase, decision) for (layer, phase, _), decision in self.traced.items()}
        totals = collections.Counter((phase, decision) for _, phase, decision in counted)
        for (phase, decision), n in sorted(
            totals.items(), key=lambda item: (item[0][0], dataclasses.astuple(item[0][1]))
        ):
            yield phase, decision, n

    def summary(self) -> str:
        """One line per phase, path and kind of weights."""
        lines = [
            f"{phase}: {n} layers by {decision.path}"
            f"{'' if decision.weights == FLOATING else ', ' + decision.weights} ({decision.reason})"
            for phase, decision, n in self.layers()
        ]
        return "neuronmlp: " + ("; ".join(lines) or "no layer was traced")

    def news(self) -> str | None:
        """The summary, at the first call and whenever another phase was traced since; else None."""
        phases = {phase for _, phase, _ in self.traced}
        if self.told is not None and phases <= self.told:
            return None
        self.told = phases
        return self.summary()

    def totals(self) -> dict[str, list[list[Any]]]:
        """Counts by [phase, path, reason, weights], as JSON for other processes: how many layers, and how
        many runs of one layer.
        """
        return {
            "layers": [[phase, *dataclasses.astuple(decision), n] for phase, decision, n in self.layers()],
            "runs": [
                [phase, *dataclasses.astuple(decision), n] for (phase, decision), n in self.runs.items()
            ],
        }

    def save(self, path: str) -> None:
        """Write what was traced beside a compiled artifact."""
        with open(path, "w", encoding="utf-8") as handle:
            json.dump(
                [[*key, *dataclasses.astuple(decision)] for key, decision in self.traced.items()], handle
            )

    def restore(self, path: str) -> None:
        """Read it back where nothing is traced, because the artifact is loaded.

        An artifact without the file was not compiled by us and says nothing of its kernels: raises
        ArtifactError.
        """
        try:
            with open(path, encoding="utf-8") as handle:
                entries = json.load(handle)
            if not isinstance(entries, list):
                raise ValueError("expected a list")
            for entry in entries:
                if [type(part) for part in entry] != [int, str, int, str, str, str]:
                    raise ValueError("expected [layer, phase, tokens, path, reason, weights]")
                layer, phase, tokens, *decision = entry
                self.add(layer, phase, tokens, Decision(*decision))
        except (FileNotFoundError, ValueError, TypeError, RecursionError) as error:
            found = "none" if isinstance(error, FileNotFoundError) else "another file"
            raise ArtifactError(
                f"{path}: expected the record of which kernels the artifact holds, found {found}; "
                "compile the model again into an empty folder."
            ) from error


RECORD = DispatchRecord()
FILE = "neuronmlp_dispatch.json"
