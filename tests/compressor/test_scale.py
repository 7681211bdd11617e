"""Models that fit in memory once at most: bytes are counted, no second is asserted."""

from __future__ import annotations

import dataclasses
import pathlib
import sys

import pytest
import torch
from safetensors.torch import load_file, save_file

from neuronmlp_plugin.checkpoint.writer import save_tensors
from neuronmlp_plugin.compressor.footprint import Footprint
from neuronmlp_plugin.compressor.pipeline import compress
from neuronmlp_plugin.compressor.plan import make_plan
from neuronmlp_plugin.compressor.settings import Settings
from neuronmlp_plugin.errors import UsageError
from neuronmlp_plugin.models.factors import MLPShape
from tests.compressor.memory import LiveTensors, forget_peak, own_memory_bytes, peak_rss_bytes
from tests.compressor.shards import LLAMA_8B, VOCABULARY, write_sharded
from tests.compressor.test_compress import QUIET
from tests.conftest import ROOT
from tests.letters import write_text

GB = 10**9
# Parameters of one layer of Llama-3.1-8B: the MLP, four attention matrices (keys and values a quarter), two
# norms.
LAYER_8B = 3 * 4096 * 14336 + 4096 * 4096 * 5 // 2 + 2 * 4096


def small_peak(home: pathlib.Path, layers: int, **changes) -> int:
    """Bytes of the live tensors at the peak of a whole compression of a narrow model."""
    home.mkdir()
    write_sharded(home / "dense", MLPShape(512, 640, layers), vocabulary=128)
    text = write_text(home / "text.jsonl", 3000)
    sizes = {"window": 64, "tokens": 1280, "metric_tokens": 512, "judge_tokens": 128}
    plan = make_plan(Settings(home / "dense", home / "out", text, 0.2, **sizes, **changes))
    with LiveTensors() as live:
        compress(plan, QUIET)
    return live.peak


def test_nothing_grows_with_the_number_of_layers(tmp_path):
    few, many = (small_peak(tmp_path / str(layers), layers, allocation="measured") for layers in (2, 4))
    assert few > 512 * 640 * 8  # something was counted
    assert many - few < 3 * 512 * 640 * 4 / 10  # a tenth of one layer: what layers keep differs a little


def test_what_lies_in_files_is_written_without_a_copy(tmp_path):
    """The factor file is put together from one file a layer, mapped: 13 GB at 8B."""
    size = 200 * 2**20
    save_file({"x": torch.ones(size // 4)}, tmp_path / "layer.safetensors")
    forget_peak()
    anonymous, resident = own_memory_bytes("RssAnon"), own_memory_bytes("VmRSS")
    save_tensors(tmp_path / "whole.safetensors", load_file(tmp_path / "layer.safetensors"))
    assert own_memory_bytes("RssAnon") - anonymous < size // 10
    assert own_memory_bytes("VmHWM") - resident < size * 1.2  # the mapped pages, once


def test_llama_8b_is_planned_as_scale_md_says_far_below_16_gb():
    tokens = {
        "calibration_tokens": 98304,
        "metric_tokens": 16384,
        "measured_tokens": 8192,
        "judge_tokens": 8192,
        "removes_channels": True,
    }
    full = Footprint(LLAMA_8B, LAYER_8B, VOCABULARY, window=1024, **tokens)
    found = {name: round(size / GB, 1) for name, size in full.stages().items()}
    assert found == {
        "backward pass": 4.7,
        "statistics": 5.6,
        "channels and ranks": 9.1,
        "measured gains": 5.4,
        "pivots": 6.1,
        "quality": 5.2,
    }


def test_a_machine_that_is_too_small_is_refused(tmp_path, monkeypatch):
    write_sharded(tmp_path / "dense", MLPShape(512, 640, 1), vocabulary=128)
    monkeypatch.setattr("neuronmlp_plugin.compressor.plan.available_bytes", lambda: 2**28)
    with pytest.raises(UsageError, match=r"dense: expected a machine with .* GiB of memory, found 0\.2 GiB"):
        make_plan(
            Settings(tmp_path / "dense", tmp_path / "out", None, 0.2, method="plain", allocation="uniform")
        )


def check_peak(home: pathlib.Path, shape: MLPShape, bound: int, sizes: dict[str, int]) -> None:
    """Compress through the command line; the peak is below `bound`, and the plan knew it to a quarter."""
    model = write_sharded(home / "dense", shape)
    text = write_text(home / "text.jsonl", int(1.3 * sum(sizes.values())))
    plan = make_plan(Settings(model, home / "out", text, 0.2, allocation="measured", **sizes))
    options = [f"--{name.replace('_', '-')}={value}" for name, value in sizes.items()]
    run = [
        sys.executable,
        "-m",
        "neuronmlp_plugin.cli",
        "compress",
        model,
        "--out",
        home / "out",
        "--text",
        text,
        "--remove=0.2",
        *options,
    ]
    peak = peak_rss_bytes([str(word) for word in run], cwd=ROOT)
    print(f"H {shape.hidden_size}: peak {peak / GB:.2f} GB, planned {plan.memory_bytes / GB:.2f} GB")
    assert (home / "out" / "config.json").is_file()
    assert peak < bound
    assert plan.memory_bytes == pytest.approx(peak, rel=0.25)


@pytest.mark.large
def test_a_quarter_of_8b_takes_a_quarter_of_the_memory(tmp_path):
    shape = dataclasses.replace(LLAMA_8B, hidden_size=1024, intermediate_size=3584, num_layers=1)
    check_peak(
        tmp_path, shape, 4 * GB, {"tokens": 7168, "metric_tokens": 1024, "judge_tokens": 1024, "samples": 2}
    )


@pytest.mark.large
@pytest.mark.timeout(10000)
def test_two_layers_of_8b_stay_below_16_gb(tmp_path):
    """The fewest tokens that the plan allows (twice I); their number adds 16 KB each, which the plan
    counts.
    """
    shape = dataclasses.replace(LLAMA_8B, num_layers=2)
    check_peak(
        tmp_path, shape, 16 * GB, {"tokens": 28672, "metric_tokens": 4096, "judge_tokens": 2048, "samples": 2}
    )
