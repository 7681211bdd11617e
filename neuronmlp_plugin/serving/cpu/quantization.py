"""The quantization config through which vLLM finds our MLPs: one path for every architecture, no model class
of ours.
"""

from __future__ import annotations

import pathlib
from typing import Any

import torch
from vllm.config import get_current_vllm_config
from vllm.distributed import get_tensor_model_parallel_rank, get_tensor_model_parallel_world_size
from vllm.logger import init_logger
from vllm.model_executor.layers.linear import LinearBase, UnquantizedLinearMethod
from vllm.model_executor.layers.quantization import register_quantization_config
from vllm.model_executor.layers.quantization.base_config import QuantizationConfig, QuantizeMethodBase
from vllm.model_executor.layers.vocab_parallel_embedding import VocabParallelEmbedding
from vllm.platforms import current_platform

from neuronmlp_plugin.checkpoint.digests import verified
from neuronmlp_plugin.checkpoint.files import read_config
from neuronmlp_plugin.checkpoint.reader import FACTOR_FILE, Checkpoint, FactorFile, check_all_read
from neuronmlp_plugin.checkpoint.schema import QUANT_METHOD, FormatBlock, parse_block
from neuronmlp_plugin.errors import CheckpointError, UsageError
from neuronmlp_plugin.serving.cpu.finite import CheckedEmbedding, watch_logits, watch_parents
from neuronmlp_plugin.serving.cpu.linear_method import LowRankDownMethod, LowRankGateUpMethod, fuses
from neuronmlp_plugin.serving.options import KEY, Options, parse_options

logger = init_logger("vllm.neuronmlp")
_METHODS = {"gate_up_proj": LowRankGateUpMethod, "down_proj": LowRankDownMethod}


@register_quantization_config(QUANT_METHOD)
class NeuronMLPConfig(QuantizationConfig):
    """`block`: the JSON block of a factored checkpoint, or None for a dense model with a factor file.

    vLLM builds it before it knows the folder or the options, copies it and sends it to its workers: it holds
    plain data, and reads the files when the first layer is built.
    """

    def __init__(self, block: dict[str, Any] | None = None) -> None:
        super().__init__()
        self.block = block
        self.opened: tuple[FormatBlock, FactorFile | None, Options] | None = None

    def get_name(self) -> Any:  # vLLM's own type lists only the names that it ships
        return QUANT_METHOD

    def get_supported_act_dtypes(self) -> list[torch.dtype]:
        return [torch.bfloat16, torch.float16, torch.float32]

    @classmethod
    def get_min_capability(cls) -> int:
        return 0

    @staticmethod
    def get_config_filenames() -> list[str]:
        return []

    @classmethod
    def from_config(cls, config: dict[str, Any]) -> NeuronMLPConfig:
        # `--hf-overrides '{"quantization_config": {"quant_method": "neuronmlp"}}'` on a dense model has no
        # layers: a factor file has.
        return cls(config if "layers" in config else None)

    def maybe_update_config(self, model_name: str, *args: Any, **kwargs: Any) -> None:
        """Called by vLLM in its first process: the place where a bad folder is refused soonest."""
        if self.block is not None and pathlib.Path(model_name).is_dir():
            Checkpoint(model_name)

    def get_quant_method(self, layer: torch.nn.Module, prefix: str) -> QuantizeMethodBase | None:
        watch_parents()
        if isinstance(layer, VocabParallelEmbedding):
            return CheckedEmbedding()
        if not isinstance(layer, LinearBase):
            return None
        block, overlay, options = self._open()
        parent, _, name = prefix.rpartition(".")
        # None of either: attention's layers, and whatever else is no MLP of the block.
        stored, method = block.mlp(parent), _METHODS.get(name)
        if stored is None or method is None:
            return UnquantizedLinearMethod()
        # A layer as the base model has it is vLLM's own, unless a chain runs it, which saves a call or two.
        if stored.is_base(block.shape) and (overlay is not None or not self._chains(options)):
            return UnquantizedLinearMethod()
        made = method(parent, stored, options, overlay)
        made.draws = get_current_vllm_config().load_config.load_format == "dummy"
        return made

    @staticmethod
    def _chains(options: Options) -> bool:
        """Whether dense layers run as chains here."""
        device = torch.device(current_platform.device_type)
        dtype: Any = get_current_vllm_config().model_config.dtype
        return fuses(options, False, device, dtype)

    def _open(self) -> tuple[FormatBlock, FactorFile | None, Options]:
        if self.opened is None:
            self.opened = self._read()
            watch_logits(get_current_vllm_config())
            block, overlay, options = self.opened
            forms = [spec.form for layer in block.layers for spec in layer.values()]
            counts = ", ".join(f"{forms.count(form)} {form}" for form in sorted(set(forms)))
            int8 = sum(spec.is_int8 for layer in block.layers for spec in layer.values())
            counts += f", {int8} of them int8" if int8 else ""
            source = overlay.path if overlay else "the checkpoint"
            logger.info(
                "neuronmlp: %.1f%% of the MLP parameters removed by %s; %s; %s",
                100 * block.removed_ratio,
                source,
                counts,
                _path(options, block),
            )
        return self.opened

    def _read(self) -> tuple[FormatBlock, FactorFile | None, Options]:
        vllm_config = get_current_vllm_config()
        if vllm_config.lora_config is not None:
            raise UsageError(
                "--enable-lora: expected no adapters over low-rank MLPs, whose channels may stand in another "
                "order, found it on; merge the adapter into the dense model and compress that."
            )
        options = parse_options(vllm_config.additional_config)
        folder = pathlib.Path(vllm_config.model_config.model)
        if options.verify:
            _verify(folder, options)
        if self.block is not None:
            if options.factors is not None:
                raise CheckpointError(
                    f"{folder}: expected a dense model under the factor file {options.factors}, found a "
                    "factored one; drop `factors`."
                )
            # The file itself, where there is one: transformers' config has defaults in the place of what is
            # missing.
            config = read_config(folder) if folder.is_dir() else vllm_config.model_config.hf_config.to_dict()
            return parse_block(self.block, config, f"{folder}/config.json"), None, options
        if folder.is_dir():
            check_all_read(Checkpoint(folder))
        overlay = FactorFile(options.factors or folder / FACTOR_FILE, read_config(folder))
        return overlay.block, overlay, options

    def __getstate__(self) -> dict[str, Any]:
        return {**self.__dict__, "opened": None}


def _verify(folder: pathlib.Path, options: Options) -> None:
    """Compare all files with their records, in one process of them all. Raises CheckpointError,
    UsageError.
    """
    if get_tensor_model_parallel_rank():
        return
    if not folder.is_dir():
        raise UsageError(
            f"{KEY}.verify: expected a local folder, found {folder}; download it and name its path."
        )
    beside = (options.factors or folder / FACTOR_FILE).parent
    for place, said in verified((folder, *([beside] if beside.is_dir() else []))):
        logger.info("neuronmlp: %s: %s", place, said)


def _path(options: Options, block: FormatBlock) -> str:
    """How the products will run, in words."""
    dtype: Any = get_current_vllm_config().model_config.dtype
    tp = get_tensor_model_parallel_world_size()
    shared = any(layer.gathers(tp) for layer in block.layers)
    ranks = (
        "" if tp == 1 else f", {tp} ranks " + ("share one group's factors" if shared else "own whole groups")
    )
    if fuses(options, shared, torch.device(current_platform.device_type), dtype):
        return f"fused products{', int8 weights read as they are' if block.has_int8 else ''}{ranks}"
    expanded = (
        f", int8 weights expanded to {dtype} at load, at its memory and speed" if block.has_int8 else ""
    )
    if not options.fast_path:
        return f"plain torch products (fast_path is off){expanded}{ranks}"
    how = "products one by one, prepacked by vLLM" if current_platform.is_cpu() else "plain torch products"
    return how + expanded + ranks
