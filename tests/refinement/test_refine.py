"""Refinement on a tiny model: closer to the dense model on text it never saw, same shapes, and no harm where
it cannot help.
"""

from __future__ import annotations

import os
import pathlib
import shutil

import pytest
import torch

from neuronmlp_plugin.checkpoint.digests import check_record
from neuronmlp_plugin.checkpoint.loader import load_model
from neuronmlp_plugin.checkpoint.reader import Checkpoint
from neuronmlp_plugin.compressor.int8_folder import quantize_folder
from neuronmlp_plugin.compressor.pipeline import compress
from neuronmlp_plugin.compressor.plan import make_plan as make_compression
from neuronmlp_plugin.compressor.settings import Settings
from neuronmlp_plugin.errors import (
    CalibrationError,
    CheckpointError,
    NeuronMLPError,
    NonFiniteError,
    OutputError,
    UsageError,
)
from neuronmlp_plugin.models.factors import DENSE, MLPLayer
from neuronmlp_plugin.refinement import descent
from neuronmlp_plugin.refinement import refiner as refine_module
from neuronmlp_plugin.refinement.descent import chosen
from neuronmlp_plugin.refinement.objectives import visits
from neuronmlp_plugin.refinement.refine_settings import RefineSettings
from neuronmlp_plugin.refinement.refiner import make_plan, refine
from neuronmlp_plugin.reporting.folder import read_report
from tests.compressor.test_compress import QUIET, files
from tests.letters import write_text, write_tokenizer
from tests.tiny_models import grouped_layers, write_dense, write_mixed


@pytest.fixture(scope="module")
def home(tmp_path_factory) -> pathlib.Path:
    """dense/, compressed/ (uv) and pivoted/ (compact) of a tiny llama, and text for it."""
    home = tmp_path_factory.mktemp("refine")
    write_tokenizer(write_dense(home / "dense", "llama"))
    write_text(home / "text.jsonl", 24000)
    for name, form in (("compressed", "uv"), ("pivoted", "compact")):
        options = {
            "remove": 0.3,
            "form": form,
            "rank_multiple": 1,
            "window": 32,
            "tokens": 2048,
            "metric_tokens": 512,
            "judge_tokens": 128,
        }
        compress(
            make_compression(Settings(home / "dense", home / name, home / "text.jsonl", **options)), QUIET
        )
    return home


def settings_for(home: pathlib.Path, out: pathlib.Path, model: str = "pivoted", **changes) -> RefineSettings:
    known = {
        "text": home / "text.jsonl",
        "tokens": 16384,
        "window": 64,
        "batch": 4,
        "judge_tokens": 2048,
        "loss": "kl",
        "learning_rate": 1e-3,
        "arithmetic": "float32",
    }
    return RefineSettings(home / model, home / "dense", out=out, **{**known, **changes})


@pytest.mark.parametrize("model", ["compressed", "pivoted"])
def test_both_stages_bring_the_model_closer(home, tmp_path, model):
    report = refine(
        make_plan(settings_for(home, tmp_path / "out", model, stages=("blocks", "distill"))), QUIET
    )
    before, blocks, distilled = (entry["quality"]["kl_divergence"] for entry in report.refinement["tried"])
    assert blocks < before and distilled < 0.9 * before
    assert report.quality.kl_divergence == min(before, blocks, distilled)
    assert read_report(tmp_path / "out") == report
    source, refined = Checkpoint(home / model), Checkpoint(tmp_path / "out")
    assert refined.shapes() == source.shapes() and refined.block.layers == source.block.layers
    changed = {name for name in source.names() if not torch.equal(source.tensor(name), refined.tensor(name))}
    layers = [i for i, layer in enumerate(source.block.layers) if not layer.is_base(source.block.shape)]
    assert changed == {
        name for name in source.names() if name.startswith(tuple(f"model.layers.{i}.mlp." for i in layers))
    }
    assert not list(tmp_path.glob("*.partial*"))


@pytest.mark.parametrize(
    "changes",
    [
        {"loss": "mixed"},
        {"loss": "next-token"},
        {"adapter_rank": 4},
        {"adapter_rank": 4, "loss": "next-token"},
    ],
    ids=str,
)
def test_other_losses_and_adapters_reach_what_they_train_for(home, tmp_path, changes):
    report = refine(make_plan(settings_for(home, tmp_path / "out", **changes)), QUIET)
    before, after = (entry["quality"] for entry in report.refinement["tried"])
    what = "candidate_perplexity" if changes.get("loss") == "next-token" else "kl_divergence"
    assert after[what] < before[what]
    assert report.refinement["kept"] == "distill"


@pytest.mark.parametrize("stages", [("distill",), ("blocks", "distill")], ids=str)
def test_through_int8_it_gets_closer_than_rounding_does(home, tmp_path, stages):
    report = refine(make_plan(settings_for(home, tmp_path / "out", storage="int8", stages=stages)), QUIET)
    before, *after = (entry["quality"]["kl_divergence"] for entry in report.refinement["tried"])
    assert max(after) < before and report.refinement["kept"] in stages
    refined = Checkpoint(tmp_path / "out")
    assert all(spec.is_int8 for layer in refined.block.layers for spec in layer.values())
    assert report.bytes_ratio == refined.block.bytes_ratio < 0.6 * read_report(home / "pivoted").bytes_ratio
    ids = torch.randint(3, 60, (1, 40))
    assert bool(torch.isfinite(load_model(tmp_path / "out")(ids).logits).all())


def test_where_int8_training_does_harm_the_source_is_rounded(home, tmp_path):
    refine(make_plan(settings_for(home, tmp_path / "out", storage="int8", learning_rate=3.0)), QUIET)
    windows = make_plan(settings_for(home, tmp_path / "other")).windows
    quantize_folder(home / "pivoted", tmp_path / "rounded", QUIET, windows)
    refined, rounded = (Checkpoint(tmp_path / name) for name in ("out", "rounded"))
    assert refined.block.provenance["refinement"]["storage"] == "int8"
    assert all(torch.equal(refined.tensor(name), rounded.tensor(name)) for name in rounded.names())


def test_groups_and_narrow_layers_are_refined(home, tmp_path):
    layers = grouped_layers(4)
    write_mixed(tmp_path / "grouped", home / "dense", layers=layers)
    report = refine(
        make_plan(settings_for(home, tmp_path / "out", str(tmp_path / "grouped"), tokens=4096)), QUIET
    )
    before, after = (entry["quality"]["kl_divergence"] for entry in report.refinement["tried"])
    assert after < before
    source, refined = Checkpoint(tmp_path / "grouped"), Checkpoint(tmp_path / "out")
    assert refined.shapes() == source.shapes() and refined.block.layers == layers
    moved = {name for name in source.names() if not torch.equal(source.tensor(name), refined.tensor(name))}
    assert moved == {name for name in source.names() if ".mlp." in name}  # slim dense matrices among them


@pytest.mark.parametrize("storage", ["float", "int8"])
def test_an_ordinary_narrow_folder_is_refined(home, tmp_path, storage):
    narrow = MLPLayer(128, 96, DENSE, DENSE, DENSE)
    write_mixed(tmp_path / "narrow", home / "dense", layers=(narrow,) * 3)
    assert Checkpoint(tmp_path / "narrow").block is None
    plan = make_plan(
        settings_for(home, tmp_path / "out", str(tmp_path / "narrow"), tokens=4096, storage=storage)
    )
    refinement = refine(plan, QUIET).refinement
    assert refinement["kept"] == "distill"
    refined = Checkpoint(tmp_path / "out")
    assert refined.config["intermediate_size"] == 96 and (refined.block is None) == (storage == "float")


def test_a_short_text_is_gone_through_again_in_another_order():
    settings = RefineSettings(*map(pathlib.Path, "abcd"), tokens=100 * 64, window=64, batch=4)
    steps = visits(40, settings)
    assert [len(step) for step in steps] == [4] * 25
    seen = torch.cat(steps)
    rounds = seen[:40], seen[40:80], seen[80:]
    assert all(sorted(part.tolist()) == list(range(40)) for part in rounds[:2])
    assert not torch.equal(rounds[0], rounds[1]) and len(rounds[2].unique()) == 20


def test_the_share_of_the_text_follows_the_damage():
    shares = {
        loss: [RefineSettings(*map(pathlib.Path, "abcd"), loss=loss).text_share_for(d) for d in (0.03, 0.9)]
        for loss in ("mixed", "kl", "next-token")
    }
    assert shares == {"mixed": [0.03, 0.3], "kl": [0.0, 0.0], "next-token": [1.0, 1.0]}


def test_of_a_source_without_a_report_none_is_invented(home, tmp_path):
    (shutil.copytree(home / "pivoted", tmp_path / "source") / "neuronmlp_report.json").unlink()
    report = refine(
        make_plan(settings_for(home, tmp_path / "out", str(tmp_path / "source"), tokens=256)), QUIET
    )
    assert len(report.refinement["tried"]) == 2
    assert not list((tmp_path / "out").glob("neuronmlp_report*"))


def test_only_files_that_a_folder_is_loaded_from_reach_the_output(home, tmp_path):
    """A link would bring what its maker was never to see, and a pipe would be waited for."""
    source = shutil.copytree(home / "pivoted", tmp_path / "source")
    (tmp_path / "secret").write_text("secret")
    (source / "notes.txt").symlink_to(tmp_path / "secret")
    os.mkfifo(source / "pipe")
    settings = settings_for(
        home, tmp_path / "out", str(source), tokens=256, stages=("blocks",), learning_rate=9.0
    )
    refine(make_plan(settings), QUIET)
    made = {path.name for path in (tmp_path / "out").iterdir()}
    assert not made & {"notes.txt", "pipe"} and "tokenizer.json" in made
    check_record(tmp_path / "out")


def test_a_descent_that_diverges_is_told_by_its_rate(home, tmp_path):
    with pytest.raises(NonFiniteError, match=r"--learning-rate 1e\+30: expected a finite loss"):
        refine(make_plan(settings_for(home, tmp_path / "out", tokens=2048, learning_rate=1e30)), QUIET)
    assert not (tmp_path / "out.partial" / "descent.safetensors").exists()


def test_what_does_harm_is_not_kept(home, tmp_path):
    report = refine(
        make_plan(settings_for(home, tmp_path / "out", stages=("blocks", "distill"), learning_rate=3.0)),
        QUIET,
    )
    tried = report.refinement["tried"]
    assert report.refinement["kept"] == "before"
    assert tried[1]["quality"]["kl_divergence"] == pytest.approx(
        tried[0]["quality"]["kl_divergence"]
    )  # every layer kept its factors
    assert tried[2]["quality"]["kl_divergence"] > tried[0]["quality"]["kl_divergence"]
    source, refined = Checkpoint(home / "pivoted"), Checkpoint(tmp_path / "out")
    assert all(torch.equal(source.tensor(name), refined.tensor(name)) for name in source.names())


def test_a_rerun_gives_the_same_tensors(home, tmp_path):
    for name in ("a", "b"):
        refine(
            make_plan(
                settings_for(home, tmp_path / name, tokens=1024, stages=("blocks", "distill"), adapter_rank=2)
            ),
            QUIET,
        )
    a, b = Checkpoint(tmp_path / "a"), Checkpoint(tmp_path / "b")
    assert all(torch.equal(a.tensor(name), b.tensor(name)) for name in a.names())


@pytest.mark.parametrize(
    ("capabilities", "expected"),
    [
        ({"avx2": True, "avx512_bf16": False}, "float32"),
        ({"avx512_f": True, "avx512_bf16": True}, "bfloat16"),
        ({"amx_bf16": True}, "bfloat16"),
        ({"neon": True, "bf16": True}, "bfloat16"),
        ({}, "float32"),
    ],
    ids=str,
)
def test_products_are_bf16_only_where_the_processor_has_them(capabilities, expected):
    assert chosen("auto", capabilities) == expected
    assert chosen("bfloat16", {}) == "bfloat16" and chosen("float32", {"amx_bf16": True}) == "float32"


def test_the_report_says_which_arithmetic_was_taken(home, tmp_path):
    plan = make_plan(settings_for(home, tmp_path / "out", tokens=256, arithmetic="auto"))
    refine(plan, QUIET)
    taken = Checkpoint(tmp_path / "out").block.provenance["refinement"]["arithmetic"]
    assert taken == chosen("auto") and f"{taken} products" in dict(plan.rows())["trains on"]


@pytest.mark.parametrize("changes", [{}, {"adapter_rank": 2}, {"loss": "next-token"}], ids=str)
def test_an_interrupted_run_goes_on_to_the_same_bytes(home, tmp_path, monkeypatch, changes):
    monkeypatch.setattr(descent, "KEPT_EVERY", 4)
    known = {"tokens": 2560, "stages": ("blocks", "distill"), **changes}  # ten steps a stage
    refine(make_plan(settings_for(home, tmp_path / "whole", **known)), QUIET)
    real, seen = descent.scheduled, []

    def interrupted(index: int, total: int) -> float:
        seen.append(index)
        if len(seen) == 37:  # the seventh of distill, after three layers of blocks
            raise KeyboardInterrupt
        return real(index, total)

    monkeypatch.setattr(descent, "scheduled", interrupted)
    with pytest.raises(KeyboardInterrupt):
        refine(make_plan(settings_for(home, tmp_path / "out", **known)), QUIET)
    assert not (tmp_path / "out").exists()
    monkeypatch.setattr(
        "neuronmlp_plugin.refinement.refiner.teacher_states",
        lambda *_: pytest.fail("the dense model ran again"),
    )
    refine(make_plan(settings_for(home, tmp_path / "out", **known)), QUIET)
    assert seen[36:] == [6, *range(4, 10)]
    assert files(tmp_path / "out") == files(tmp_path / "whole")
    assert {path.name for path in tmp_path.iterdir()} == {"out", "whole"}


def test_another_runs_leftovers_are_refused(home, tmp_path, monkeypatch):
    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr(descent, "scheduled", lambda *_: (_ for _ in ()).throw(KeyboardInterrupt))
        refine(make_plan(settings_for(home, tmp_path / "out", tokens=256)), QUIET)
    with pytest.raises(OutputError, match=r"out\.partial: expected what a run of these same settings left"):
        refine(make_plan(settings_for(home, tmp_path / "out", tokens=512)), QUIET)


def test_the_text_that_judges_is_not_trained_on(home, tmp_path):
    plan = make_plan(settings_for(home, tmp_path / "out", tokens=10**9))
    text = "|".join("".join(map(chr, window[1:].tolist())) for window in plan.windows)
    judged = "".join(map(chr, plan.judge[0, 1:].tolist()))
    # No window of 63 could hold more, and none that was cut from this text could miss all of these.
    assert not any(judged[start : start + 20] in text for start in range(0, len(judged) - 20, 20))
    assert judged not in text and plan.windows[:, 0].unique().tolist() == [1]  # each window begins with BOS


@pytest.mark.parametrize(
    ("changes", "error", "words"),
    [
        ({"stages": ("blocks", "guess")}, UsageError, "--stages"),
        ({"loss": "mse"}, UsageError, "--loss"),
        ({"storage": "int4"}, UsageError, "--storage"),
        ({"adapter_rank": -1}, UsageError, "--adapter-rank"),
        ({"tokens": 0}, UsageError, "--tokens"),
        ({"learning_rate": float("nan")}, UsageError, "--learning-rate"),
        ({"learning_rate": float("inf")}, UsageError, "--learning-rate"),
        ({"seed": -1}, UsageError, "--seed"),
        ({"model": "dense"}, CheckpointError, "expected a folder that `compress` wrote, found a dense one"),
        ({"judge_tokens": 100}, UsageError, "--judge-tokens: expected at least one window of 1,024 tokens"),
        ({"window": 1}, UsageError, "--window: expected at least 3 tokens"),
    ],
    ids=lambda value: str(value) if isinstance(value, dict) else None,
)
def test_refusals(home, tmp_path, changes, error, words):
    with pytest.raises(error, match=words):
        make_plan(settings_for(home, tmp_path / "out", **changes))


def test_too_little_text_to_judge_on_is_refused(home, tmp_path):
    write_text(tmp_path / "short.jsonl", 3000)
    with pytest.raises(CalibrationError, match="so that some can judge"):
        make_plan(settings_for(home, tmp_path / "out", text=tmp_path / "short.jsonl"))


def test_an_output_inside_the_source_is_refused(home):
    with pytest.raises(UsageError, match="expected a folder outside"):
        make_plan(settings_for(home, home / "pivoted" / "refined"))


def test_int8_is_refused(home, tmp_path):
    quantize_folder(home / "pivoted", tmp_path / "int8", QUIET)
    with pytest.raises(CheckpointError, match="found int8; refine first"):
        make_plan(settings_for(home, tmp_path / "out", model=str(tmp_path / "int8")))


@pytest.mark.parametrize(("family", "seed"), [("mistral", 0), ("llama", 1)], ids=["family", "weights"])
def test_another_models_folder_is_refused(home, tmp_path, family, seed):
    write_tokenizer(write_dense(tmp_path / "dense", family, seed=seed))
    settings = settings_for(home, tmp_path / "out")
    with pytest.raises(CheckpointError, match="was made from"):
        make_plan(RefineSettings(**{**settings.__dict__, "dense": tmp_path / "dense"}))


def test_an_existing_output_is_refused_and_a_failed_run_leaves_no_output(home, tmp_path, monkeypatch):
    (tmp_path / "out").mkdir()
    with pytest.raises(OutputError):
        make_plan(settings_for(home, tmp_path / "out"))
    (tmp_path / "out").rmdir()
    plan = make_plan(settings_for(home, tmp_path / "out", tokens=256))

    def fail(*_: object) -> None:
        raise NeuronMLPError("no")

    monkeypatch.setattr("neuronmlp_plugin.refinement.refiner.write_rest", fail)
    with pytest.raises(NeuronMLPError):
        refine(plan, QUIET)
    assert [path.name for path in tmp_path.iterdir()] == ["out.partial"]  # to go on from


def test_a_stage_that_was_damaged_since_is_done_again(home, tmp_path, monkeypatch):
    whole, again = (settings_for(home, tmp_path / name, tokens=256) for name in ("whole", "again"))
    refine(make_plan(whole), QUIET)
    monkeypatch.setattr(refine_module, "write_report", lambda *_: (_ for _ in ()).throw(KeyboardInterrupt))
    with pytest.raises(KeyboardInterrupt):
        refine(make_plan(again), QUIET)
    monkeypatch.undo()
    for path in (tmp_path / "again.partial").glob("*/*-00002-of-*.safetensors"):
        path.write_bytes(path.read_bytes()[:-64] + bytes(64))
    refine(make_plan(again), QUIET)
    assert files(tmp_path / "again") == files(tmp_path / "whole")


def test_the_refined_folder_loads(home, tmp_path):
    refine(make_plan(settings_for(home, tmp_path / "out", tokens=256)), QUIET)
    with torch.no_grad():
        assert bool(torch.isfinite(load_model(tmp_path / "out")(torch.tensor([[1, 5, 9]])).logits).all())
