"""What a decode benchmark adds up; the timing itself is run by the slow test, which asserts no time."""

from __future__ import annotations

import contextlib
import csv
import importlib.util
import math

import pytest

from neuronmlp_plugin.bench.engines import Answer
from neuronmlp_plugin.bench.rows import Row, append_rows
from neuronmlp_plugin.bench.serve import Decode, bytes_per_step, measure_decode
from neuronmlp_plugin.checkpoint.reader import Checkpoint
from neuronmlp_plugin.models.factors import SCALE
from tests.tiny_models import INT8_LAYERS, write_dense, write_mixed


def test_a_step_reads_everything_but_a_table_it_only_looks_up(tmp_path):
    for family, tied in (("llama", True), ("qwen2", False)):
        folder = write_dense(tmp_path / family, family)
        total = sum(t.numel() for _, t in Checkpoint(folder).tensors())
        read = total - (0 if tied else 128 * 128)
        assert [bytes_per_step(folder, dtype) for dtype in ("float32", "bfloat16", "auto")] == [
            4 * read,
            2 * read,
            2 * read,
        ]


def test_a_step_reads_int8_as_it_is_stored(tmp_path):
    base = write_dense(tmp_path / "dense", "llama")
    checkpoint = Checkpoint(write_mixed(tmp_path / "int8", base, layers=INT8_LAYERS))
    scales = checkpoint.block.expected_scales()
    total = sum(t.numel() for _, t in checkpoint.tensors())
    int8 = sum(checkpoint.tensor(name.removesuffix(SCALE)).numel() for name in scales)
    expected = 4 * (total - int8) + int8 + 4 * sum(rows for (rows,) in scales.values())
    assert bytes_per_step(tmp_path / "int8", "float32") == expected


@pytest.mark.parametrize(("speedup", "ideal", "share"), [(1.1, 1.2, 0.5), (0.9, 1.2, -0.5), (1.2, 1.2, 1.0)])
def test_share_of_the_ideal_gain(speedup, ideal, share):
    assert Decode("m", 1, 10.0, speedup, ideal).share_of_ideal == pytest.approx(share)


def test_no_gain_to_have_has_no_share():
    assert math.isnan(Decode("m", 1, 10.0, 1.0, 1.0).share_of_ideal)


def test_rows_append_under_one_header(tmp_path):
    path = tmp_path / "rows.csv"
    for value in (1.0, 2.0):
        append_rows(path, [Row("case", "speedup", "ratio", value, "measured")])
    with path.open() as file:
        rows = list(csv.DictReader(file))
    assert [row["value"] for row in rows] == ["1.0", "2.0"]
    assert {row["origin"] for row in rows} == {"measured"} and rows[0]["date"].startswith("20")


@pytest.mark.vllm
@pytest.mark.slow
@pytest.mark.skipif(
    importlib.util.find_spec("vllm") is None, reason="vLLM is not installed (see README, extra [cpu])"
)
def test_models_are_timed_side_by_side(tmp_path, monkeypatch):
    monkeypatch.setenv("OMP_NUM_THREADS", "1")
    base = write_dense(tmp_path / "dense", "llama")
    folders = {"dense": base, "mixed": write_mixed(tmp_path / "mixed", base)}
    ticks = []
    results = measure_decode(folders, [1, 2], new_tokens=4, rounds=2, dtype="float32", tick=ticks.append)
    assert [(r.model, r.batch) for r in results] == [("dense", 1), ("mixed", 1), ("dense", 2), ("mixed", 2)]
    assert sum(ticks) == 8 and results[0].speedup == 1.0 and results[1].ideal > 1.0


def test_speed_ups_are_over_the_first_model_within_a_round(tmp_path, monkeypatch):
    seconds = {"dense": 2.0, "mixed": 1.0}
    engines = {
        name: lambda job, taken=taken: Answer(taken if job.new > 1 else 0.0, 1)
        for name, taken in seconds.items()
    }
    monkeypatch.setattr("neuronmlp_plugin.bench.serve.engines", lambda *_: contextlib.nullcontext(engines))
    base = write_dense(tmp_path / "dense", "llama")
    folders = {"dense": base, "mixed": write_mixed(tmp_path / "mixed", base)}
    found = measure_decode(folders, [2], new_tokens=5, rounds=3, dtype="float32", tick=lambda _: None)
    assert [(row.speedup, row.tokens_per_second) for row in found] == [(1.0, 4.0), (2.0, 8.0)]
