"""The module over torch.distributed: two processes, gloo, against the plain MLP."""

from __future__ import annotations

import pathlib

import torch
import torch.multiprocessing

from neuronmlp_plugin.models.gather import ProcessGroup
from tests.models.layers import RANKS, SHAPE, mix_layer, plain_mlp, random_modules, stored_tensors
from tests.serving.trainium.sharded import rank_mlp

MIXES = (
    ("compact", "uv", "dense"),
    ("dense", "compact", "compact"),
    ("uv", "dense", "uv"),
    ("compact", "compact", "compact"),
)
TP, B, S = 2, 3, 4


def run_rank(rank: int, folder: str) -> None:
    torch.set_num_threads(1)
    torch.distributed.init_process_group(
        "gloo", init_method=f"file://{folder}/store", rank=rank, world_size=TP
    )
    torch.manual_seed(1)
    x = torch.randn(B, S, SHAPE.hidden_size)
    worst = 0.0
    with torch.no_grad():
        for mix in MIXES:
            for groups in (1, 4):
                layer = mix_layer(mix, ranks=dict.fromkeys(RANKS, 7), groups=groups)
                modules = random_modules(layer)
                tensors = stored_tensors(layer, modules)
                expected = plain_mlp(modules, x)
                whole, _ = rank_mlp(layer, tensors, ProcessGroup())(x)
                sequence = rank_mlp(layer, tensors, ProcessGroup(), sequence_parallel=True)
                part, _ = sequence(x.chunk(TP, dim=1)[rank])
                worst = max(
                    worst,
                    float((whole - expected).abs().max()),
                    float((part - expected.chunk(TP, dim=1)[rank]).abs().max()),
                )
    pathlib.Path(folder, f"rank{rank}").write_text(str(worst))
    torch.distributed.destroy_process_group()


def test_two_processes_give_the_plain_answer(tmp_path):
    torch.multiprocessing.spawn(run_rank, (str(tmp_path),), nprocs=TP)
    errors = [float((tmp_path / f"rank{rank}").read_text()) for rank in range(TP)]
    assert max(errors) < 1e-5, errors
