"""From a folder to a torch model: the plain reading of a checkpoint, against which every serving path is
judged.
"""

from __future__ import annotations

import pathlib
from collections.abc import Callable
from typing import Any

import torch
from torch import nn

from neuronmlp_plugin.checkpoint.reader import Checkpoint, FactorFile, older_rope
from neuronmlp_plugin.checkpoint.schema import FormatBlock
from neuronmlp_plugin.errors import CheckpointError, told_as
from neuronmlp_plugin.models.definition import build_linear
from neuronmlp_plugin.models.factors import Matrix


def load_model(
    folder: str | pathlib.Path,
    *,
    dtype: torch.dtype = torch.float32,
    factors: str | pathlib.Path | None = None,
) -> Any:
    """The Hugging Face model of a dense or factored folder, in eval mode on the CPU; never runs remote code.

    `factors`: a factor file to lay over a dense folder. Raises the errors of `Checkpoint` and `FactorFile`.
    """
    checkpoint, overlay = open_folder(folder, factors)
    model = build_skeleton(checkpoint)
    block = overlay.block if overlay is not None else checkpoint.block
    if block is not None:
        swap_projections(model, block)
    state = {name: tensor.to(dtype) for name, tensor in checkpoint.tensors() if not _replaced(name, overlay)}
    if overlay is not None:
        state.update(
            {
                name: overlay.tensor(name).to(dtype)
                for name in overlay.block.expected_tensors(only_changed=True)
            }
        )
    load_exactly(model, state, str(checkpoint.folder))
    return model.eval()


def open_folder(
    folder: str | pathlib.Path, factors: str | pathlib.Path | None = None
) -> tuple[Checkpoint, FactorFile | None]:
    """A folder and the factor file over it, if one is named. Raises the errors of `Checkpoint` and
    `FactorFile`.
    """
    checkpoint = Checkpoint(folder)
    overlay = FactorFile(factors, checkpoint.config) if factors is not None else None
    if overlay is not None and checkpoint.block is not None:
        raise CheckpointError(
            f"{checkpoint.folder}: expected a dense folder under a factor file, found a factored one; drop "
            "the file."
        )
    return checkpoint, overlay


def build_skeleton(checkpoint: Checkpoint) -> Any:
    """The architecture on the meta device, with real rotary tables: modules to load weights into."""
    expected = f"{checkpoint.folder / 'config.json'}: expected a config that transformers builds a model from"
    with told_as(CheckpointError, expected, "mend it, or download it again"):
        return _skeleton(checkpoint)


def _skeleton(checkpoint: Checkpoint) -> Any:
    import transformers
    from transformers import AutoConfig, AutoModelForCausalLM

    config = AutoConfig.from_pretrained(checkpoint.folder, trust_remote_code=False)
    if transformers.__version__.startswith("4."):
        for name, value in older_rope(checkpoint.config).items():
            setattr(config, name, value)
    if getattr(config, "quantization_config", None) is not None:
        del config.quantization_config
    config.tie_word_embeddings = bool(checkpoint.config.get("tie_word_embeddings"))
    # None of them changes a result: a padding row is only left out of gradients, and some configs name one
    # that the embedding does not have; a stored attention implementation may not be installed here; and what
    # else a model is to return is not what is read of it.
    config.pad_token_id = None
    config.return_dict, config.output_attentions, config.output_hidden_states = True, False, False
    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(config, attn_implementation="sdpa")
    # Rotary tables are computed, not stored: on the meta device they would stay empty.
    model.model.rotary_emb = type(model.model.rotary_emb)(config=config)
    return model


def swap_projections(
    model: Any, block: FormatBlock, build: Callable[[Matrix], nn.Module] = build_linear
) -> None:
    """Replace each projection by the (meta) module that `build` makes for its matrix; in any model of
    transformers, with a head or without.
    """
    for layer, stored in zip(model.base_model.layers, block.layers, strict=True):
        for name, matrix in stored.matrices.items():
            with torch.device("meta"):
                setattr(layer.mlp, name, build(matrix))


def load_exactly(model: Any, state: dict[str, torch.Tensor], source: str) -> None:
    """Assign every tensor to its parameter and refuse leftovers on either side; a tied head may be absent."""
    expected = f"{source}: expected tensors of the shapes that the config gives"
    with told_as(CheckpointError, expected, "the folder contradicts its config"):
        missing, unexpected = model.load_state_dict(state, strict=False, assign=True)
    tied = bool(getattr(model.config, "tie_word_embeddings", False))
    absent = [name for name in missing if not (tied and name == "lm_head.weight")]
    # Old exports store rotary tables; they are recomputed, so an extra one is harmless.
    extra = [name for name in unexpected if not name.endswith("rotary_emb.inv_freq")]
    if absent or extra:
        raise CheckpointError(
            f"{source}: expected the tensors of {type(model).__name__}, found missing {absent[:3]} and "
            f"unknown {extra[:3]}."
        )
    if tied:
        model.tie_weights()


def _replaced(name: str, overlay: FactorFile | None) -> bool:
    return overlay is not None and name.startswith(tuple(overlay.prefixes))
