"""Tiny folders of format version 1, committed as they were written once (`golden/`): what a later reader must
still read, and a later writer still write.

    python -m tests.checkpoint.golden      # writes those that are not there; a changed format needs a new version
"""

from __future__ import annotations

import json
import pathlib

import torch
from safetensors.torch import save_file

from neuronmlp_plugin.checkpoint.loader import load_model
from neuronmlp_plugin.checkpoint.reader import Checkpoint
from neuronmlp_plugin.checkpoint.schema import FormatBlock, mlp_name
from neuronmlp_plugin.checkpoint.writer import write_layer, write_rest
from neuronmlp_plugin.models.definition import build_linear, quantize
from neuronmlp_plugin.models.factors import DENSE, INT8, MLPLayer, MLPShape, ProjectionSpec
from neuronmlp_plugin.models.families import shapes_outside_mlps

GOLDEN = pathlib.Path(__file__).parent / "golden"
LOGITS = "logits.json"  # of PROMPT, beside each folder's own files
PROMPT = [3, 1, 4, 1, 5, 9, 2, 6]
SHAPE = MLPShape(hidden_size=8, intermediate_size=16, num_layers=2)
CONFIG = {
    "architectures": ["LlamaForCausalLM"],
    "model_type": "llama",
    "hidden_size": 8,
    "intermediate_size": 16,
    "num_hidden_layers": 2,
    "num_attention_heads": 1,
    "num_key_value_heads": 1,
    "head_dim": 8,
    "vocab_size": 12,
    "max_position_embeddings": 32,
    "rms_norm_eps": 1e-6,
    "hidden_act": "silu",
    "tie_word_embeddings": True,
    "rope_parameters": {"rope_theta": 10000.0, "rope_type": "default"},
    "dtype": "bfloat16",
    "bos_token_id": 1,
    "eos_token_id": 2,
}


def _layer(*specs: ProjectionSpec, channels: int = 16, groups: int = 1) -> MLPLayer:
    return MLPLayer(SHAPE.hidden_size, channels, *specs, groups=groups)


UV, COMPACT, ROUNDED = (
    ProjectionSpec("uv", 3),
    ProjectionSpec("compact", 4),
    ProjectionSpec("dense", None, INT8),
)
FOLDERS = {
    "mixed": (_layer(COMPACT, UV, DENSE), _layer(DENSE, COMPACT, COMPACT)),
    "int8": (_layer(ProjectionSpec("compact", 4, INT8), UV, ROUNDED), _layer(ROUNDED, ROUNDED, ROUNDED)),
    "groups2": (_layer(COMPACT, UV, UV, groups=2), _layer(DENSE, COMPACT, COMPACT, groups=2)),
    "narrow": (_layer(DENSE, DENSE, DENSE, channels=8), _layer(UV, COMPACT, DENSE, channels=12)),
}


def write_base(folder: pathlib.Path) -> Checkpoint:
    """The dense model under all of them."""
    folder.mkdir()
    torch.manual_seed(0)
    tensors = {name: torch.randn(shape) for name, shape in shapes_outside_mlps(CONFIG, 2).items()}
    for index in range(SHAPE.num_layers):
        for projection, matrix in _layer(DENSE, DENSE, DENSE).matrices.items():
            n_in, n_out = matrix.in_out
            tensors[f"{mlp_name(index)}.{projection}.weight"] = torch.randn(n_out, n_in)
    save_file({name: tensor.bfloat16() for name, tensor in tensors.items()}, folder / "model.safetensors")
    (folder / "config.json").write_text(json.dumps(CONFIG))
    return Checkpoint(folder)


def write_golden(folder: pathlib.Path, base: Checkpoint, layers: tuple[MLPLayer, ...]) -> None:
    folder.mkdir(parents=True)
    torch.manual_seed(1)
    for index, layer in enumerate(layers):
        tensors = {}
        for projection, matrix in layer.matrices.items():
            weights = [torch.randn_like(w) for w in build_linear(matrix).state_dict().values()]
            names = matrix.tensor_shapes()
            for suffix, weight in zip(names, weights, strict=True):
                stored = quantize(weight) if matrix.spec.is_int8 else (weight.bfloat16(),)
                for end, tensor in zip(("", "_scale"), stored, strict=False):
                    tensors[f"{mlp_name(index)}.{projection}.{suffix}{end}"] = tensor
        write_layer(folder, base, index, tensors)
    write_rest(folder, base, FormatBlock(layers, SHAPE, {"made_by": "tests/checkpoint/golden.py"}, "golden"))
    (folder / LOGITS).write_text(json.dumps([[round(x, 5) for x in row] for row in logits_of(folder)]) + "\n")


@torch.no_grad()
def logits_of(folder: pathlib.Path) -> list[list[float]]:
    return load_model(folder)(torch.tensor([PROMPT])).logits[0].tolist()


def main() -> None:
    import tempfile

    with tempfile.TemporaryDirectory() as scratch:
        base = write_base(pathlib.Path(scratch, "base"))
        for name, layers in FOLDERS.items():
            if not (GOLDEN / name).exists():
                write_golden(GOLDEN / name, base, layers)


if __name__ == "__main__":
    main()
