"""What `bench serve` adds up, keeps and goes on from; engines are stand-ins, and no time is asserted."""

from __future__ import annotations

import contextlib
import math

import pytest

from neuronmlp_plugin.bench.engines import Answer, EngineSettings
from neuronmlp_plugin.bench.serve import (
    Cell,
    ideal_of,
    measure_parts,
    measure_serving,
    prompt_flops,
    write_w8a8,
)
from neuronmlp_plugin.checkpoint.reader import Checkpoint
from tests.tiny_models import write_dense, write_mixed

SETTINGS = EngineSettings("float32", 2, 64)
CELLS = (Cell("first", 16), Cell("decode", 2))


@pytest.fixture
def folders(tmp_path):
    base = write_dense(tmp_path / "dense", "llama")
    return {"dense": base, "mixed": write_mixed(tmp_path / "mixed", base)}


@pytest.fixture
def asked(monkeypatch):
    """Jobs that the engines were given; the second model takes half the time of the first."""
    jobs = []

    def engine(name):
        def answer(job):
            jobs.append((name, job))
            tokens = job.prompt + 10 * job.new
            return Answer(tokens * (1.0 if name == "dense" else 0.5), 2**30)

        return answer

    def engines(models, _settings):
        return contextlib.nullcontext({name: engine(name) for name in models})

    monkeypatch.setattr("neuronmlp_plugin.bench.serve.engines", engines)
    return jobs


def measure(folders, log, rounds):
    options = {"cells": CELLS, "new_tokens": 5, "rounds": rounds, "log": log, "tick": lambda _: None}
    return measure_serving(folders, SETTINGS, **options)


def test_ratios_are_over_the_first_model(folders, asked):
    found = measure(folders, None, 2)
    assert [(row.model, str(row.cell)) for row in found] == [
        ("dense", "first token, 16"),
        ("mixed", "first token, 16"),
        ("dense", "decode, batch 2"),
        ("mixed", "decode, batch 2"),
    ]
    assert [row.speedup for row in found] == [1.0, 2.0, 1.0, 2.0]
    assert [row.seconds for row in found] == [26.0, 13.0, 10.0, 5.0]  # decode: a token after the first


def test_a_run_goes_on_where_it_was_ended(folders, asked, tmp_path):
    log = tmp_path / "rounds.jsonl"
    measure(folders, log, 1)
    lines = log.read_text().splitlines()
    log.write_text("\n".join(lines[:-1]) + "\n")
    asked.clear()
    measure(folders, log, 1)
    assert log.read_text().splitlines() == lines
    assert [job.new for name, job in asked if name == "dense" and job.new == 5] == []  # its rounds were there
    asked.clear()
    measure(folders, log, 1)
    assert not asked


def test_the_ideal_of_a_prompt_is_its_arithmetic(folders):
    checkpoint = Checkpoint(folders["dense"])
    config, shapes = checkpoint.config, checkpoint.shapes()
    linear = sum(
        math.prod(s) for n, s in shapes.items() if len(s) == 2 and "embed" not in n and "lm_head" not in n
    )
    head = config["vocab_size"] * config["hidden_size"]
    width = config["num_attention_heads"] * config.get(
        "head_dim", config["hidden_size"] // config["num_attention_heads"]
    )
    attention = config["num_hidden_layers"] * width * 10 * 10
    assert prompt_flops(folders["dense"], 10) == 2 * (10 * linear + head + attention)
    assert ideal_of(Cell("first", 10), folders["dense"], folders["mixed"], "float32") > 1


def test_a_rival_in_int8_has_the_dense_models_names_and_a_scale_for_each_row(folders, tmp_path):
    from safetensors.torch import load_file

    out = write_w8a8(folders["dense"], tmp_path / "w8a8")
    tensors = load_file(out / "model.safetensors")
    dense = dict(Checkpoint(folders["dense"]).tensors())
    assert set(dense) <= set(tensors)
    name = "model.layers.0.mlp.down_proj.weight"
    back = tensors[name].float() * tensors[name + "_scale"].float()
    assert (back - dense[name]).abs().max() <= 0.01 * dense[name].abs().max()
    assert math.isnan(ideal_of(Cell("decode", 1), folders["dense"], out, "bfloat16"))


def test_parts_of_decoding_are_of_one_token_after_the_first(folders, monkeypatch):
    def engine(job):
        assert job.parts
        return Answer(0.0, 0, {"MLP": 3.0 + 2.0 * job.new, "head": float(job.prompt)})

    monkeypatch.setattr(
        "neuronmlp_plugin.bench.serve.engines", lambda *_: contextlib.nullcontext({"dense": engine})
    )
    found = measure_parts(
        {"dense": folders["dense"]}, SETTINGS, cells=CELLS, new_tokens=5, rounds=2, tick=lambda _: None
    )
    assert found["dense", "first token, 16"] == {"MLP": 5.0, "head": 16.0}
    assert found["dense", "decode, batch 2"] == {"MLP": 2.0, "head": 0.0}
