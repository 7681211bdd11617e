"""`import neuronmlp_plugin.hf`: transformers then loads factored folders as it loads any other model.

    import neuronmlp_plugin.hf
    model = AutoModelForCausalLM.from_pretrained(DIR)  # device_map, dtype, generate, Trainer, PEFT as usual

A folder's weights are found through INDEX_FILE, which transformers looks at only when the quantizer below
says so. Without this import a folder of factors has no weights that transformers finds, and it stops with an
error: an index under the usual name would make it fill the MLPs with random numbers and a warning.
"""

from __future__ import annotations

import pathlib
from typing import Any

import torch
import torch.nn.functional as F
from torch import nn
from transformers.quantizers import register_quantization_config, register_quantizer
from transformers.quantizers.auto import AUTO_QUANTIZER_MAPPING
from transformers.quantizers.base import HfQuantizer
from transformers.utils.quantization_config import QuantizationConfigMixin

from neuronmlp_plugin.checkpoint.loader import swap_projections
from neuronmlp_plugin.checkpoint.reader import Checkpoint
from neuronmlp_plugin.checkpoint.schema import INDEX_FILE, QUANT_METHOD, parse_block
from neuronmlp_plugin.errors import CheckpointError
from neuronmlp_plugin.models.definition import StoredLinear, block_product, build_linear
from neuronmlp_plugin.models.factors import PROJECTIONS, Matrix


class Int8BlockLinear(nn.Module):
    """A factor or a dense matrix that stays int8: `weight [out, in]` int8 and `weight_scale [out]` fp32.

    y = (x q^T) scale, with q in the dtype of x for the product; in `blocks` as `block_product` has them.
    """

    def __init__(self, rows: int, columns: int, blocks: int = 1) -> None:
        nn.Module.__init__(self)
        self.blocks, self.bias = blocks, None
        self.in_features, self.out_features = columns, rows
        self.weight = nn.Parameter(torch.empty(rows, columns, dtype=torch.int8), requires_grad=False)
        self.weight_scale = nn.Parameter(torch.empty(rows, dtype=torch.float32), requires_grad=False)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return block_product(x, self.weight.to(x.dtype), self.blocks) * self.weight_scale.to(x.dtype)


class Int8Linear(Int8BlockLinear, nn.Linear):  # type: ignore[misc]
    """Of one block, which PEFT puts adapters beside as beside any linear layer; it cannot merge them."""


class NeuronMLPConfig(QuantizationConfigMixin):
    """The block of FORMAT.md; every key of it is an attribute, so that it is written as it was read."""

    def __init__(self, **block: Any) -> None:
        self.__dict__.update(block)
        self.quant_method: Any = QUANT_METHOD  # transformers lists its own methods in an enumeration


class NeuronMLPQuantizer(HfQuantizer):
    """Builds the MLPs that the block describes before the weights are loaded into them."""

    requires_calibration = True  # a model is compressed by `neuronmlp compress`, never while it is loaded
    folder: pathlib.Path | None = None

    def update_attn_implementation(self, config: Any) -> Any:
        """The hook that sees the model's config before files are looked for: it names the index."""
        self.folder = pathlib.Path(config._name_or_path)
        # Of the hub, or of a subfolder, transformers looks for the files only after this; a config that was
        # made by hand has no name.
        if config._name_or_path and (self.folder / "config.json").is_file():
            Checkpoint(self.folder)  # names, shapes and completeness: transformers would only warn
        config.transformers_weights = INDEX_FILE
        return config

    def _process_model_before_weight_loading(self, model: Any, **kwargs: Any) -> None:
        source = f"{self.folder}: config.json"
        block = parse_block(self.quantization_config.to_dict(), model.config.to_dict(), source)
        swap_projections(model, block, _stored_module)

    def _process_model_after_weight_loading(self, model: Any, **kwargs: Any) -> Any:
        del model.config.transformers_weights  # it is for loading alone
        unread = [name for name, tensor in model.named_parameters() if tensor.is_meta and ".mlp." in name]
        if unread and not getattr(model, "hf_device_map", None):  # what is offloaded stays meta
            raise CheckpointError(
                f"{self.folder}: expected a tensor {unread[0]}, found none; the folder is incomplete, copy "
                "it again."
            )
        return model

    def _dequantize(self, model: Any, dtype: torch.dtype | None = None) -> Any:
        """Ordinary matrices `[out, in]` in the place of factors. Channels that were removed come back as
        zeros, so that what `save_pretrained` then writes is an ordinary folder of the config's size.
        """
        for layer in model.base_model.layers:
            for name in PROJECTIONS:
                made = _dense(getattr(layer.mlp, name), dtype or model.dtype)
                setattr(layer.mlp, name, _padded(made, name, model.config.intermediate_size))
        return model

    def is_serializable(self, *_: Any, **__: Any) -> bool:
        """False: transformers would write `model.safetensors`, from which it fills MLPs with random
        numbers.
        """
        return False

    @property
    def is_trainable(self) -> bool:
        """True: adapters, and factors in floating point themselves, are trained like any linear layer."""
        return True


def _stored_module(matrix: Matrix) -> nn.Module:
    """As `build_linear`, but what is int8 stays int8."""
    if not matrix.spec.is_int8:
        return build_linear(matrix)
    if not matrix.spec.is_low_rank:
        return Int8Linear(*matrix.tensor_shapes()["weight"])
    module = StoredLinear(matrix)
    for suffix, blocks in zip(matrix.suffixes, matrix.blocks, strict=True):
        size = matrix.tensor_shapes()[suffix]
        child = Int8Linear(*size) if blocks == 1 else Int8BlockLinear(*size, blocks)
        setattr(module, suffix.removesuffix(".weight"), child)
    return module


@torch.no_grad()
def _dense(module: Any, dtype: torch.dtype) -> nn.Linear:
    """The matrix that a module multiplies by, column by column: its answer to the unit vectors."""
    if type(module) is nn.Linear:
        return module
    features = module.matrix.in_out[0] if isinstance(module, StoredLinear) else module.weight.shape[1]
    weight = next(module.parameters())
    unit = torch.eye(features, dtype=torch.float32, device=weight.device)
    dense = nn.Linear(features, 1, bias=False, device="meta")
    made = module.float()(unit).T
    dense.weight = nn.Parameter(made.to(dtype).contiguous(), requires_grad=False)
    dense.out_features = made.shape[0]
    return dense


@torch.no_grad()
def _padded(linear: nn.Linear, name: str, channels: int) -> nn.Linear:
    """As many channels as the config says: silu(0) 0 is 0, and adds nothing to down's output."""
    rows, columns = linear.weight.shape
    wanted = (rows, channels) if name == "down_proj" else (channels, columns)
    if wanted != (rows, columns):
        added = (0, wanted[1] - columns, 0, wanted[0] - rows)
        linear.weight = nn.Parameter(F.pad(linear.weight, added), requires_grad=False)
        linear.out_features, linear.in_features = wanted
    return linear


def register() -> None:
    """Make the classes above known to transformers; done once, by the import."""
    if QUANT_METHOD not in AUTO_QUANTIZER_MAPPING:
        register_quantization_config(QUANT_METHOD)(NeuronMLPConfig)
        register_quantizer(QUANT_METHOD)(NeuronMLPQuantizer)


register()
__all__ = ["Int8BlockLinear", "Int8Linear", "NeuronMLPConfig", "NeuronMLPQuantizer", "register"]
