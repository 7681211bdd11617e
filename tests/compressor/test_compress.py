"""The whole pipeline on tiny models: what it promises about bytes, resumption, refusals and leaving nothing
half-written.
"""

from __future__ import annotations

import json
import pathlib
import shutil

import numpy as np
import pytest
import torch
from rich.console import Console
from safetensors.torch import load_file, save_file

from neuronmlp_plugin.calibration.layer_stream import LayerStream
from neuronmlp_plugin.calibration.statistics import hooked
from neuronmlp_plugin.checkpoint.loader import load_model
from neuronmlp_plugin.checkpoint.reader import FACTOR_FILE, Checkpoint
from neuronmlp_plugin.compressor import analyse as analyse_module
from neuronmlp_plugin.compressor import marginal as marginal_module
from neuronmlp_plugin.compressor import offers as offers_module
from neuronmlp_plugin.compressor import pipeline as run_module
from neuronmlp_plugin.compressor.int8_folder import quantize_folder
from neuronmlp_plugin.compressor.job import ProgressBars
from neuronmlp_plugin.compressor.pipeline import compress
from neuronmlp_plugin.compressor.plan import make_plan
from neuronmlp_plugin.compressor.settings import Settings
from neuronmlp_plugin.errors import CheckpointError, NeuronMLPError, NonFiniteError, OutputError, UsageError
from neuronmlp_plugin.reporting import folder as folder_module
from neuronmlp_plugin.reporting.run_report import Report
from tests.letters import write_text, write_tokenizer
from tests.tiny_models import FAMILIES, write_dense

QUIET = ProgressBars(Console(quiet=True), quiet=True)


@pytest.fixture
def home(tmp_path):
    """A dense llama with a tokenizer, and text for it."""
    write_tokenizer(write_dense(tmp_path / "dense", "llama"))
    write_text(tmp_path / "text.jsonl", 3000)
    return tmp_path


def settings_for(home: pathlib.Path, **changes) -> Settings:
    known = {
        "model": home / "dense",
        "out": home / "out",
        "text": home / "text.jsonl",
        "remove": 0.2,
        "rank_multiple": 1,
        "window": 32,
        "tokens": 1024,
        "metric_tokens": 256,
        "judge_tokens": 128,
        "samples": 3,
    }
    return Settings(**{**known, **changes})


def files(folder: pathlib.Path) -> dict[str, bytes]:
    return {
        str(path.relative_to(folder)): path.read_bytes()
        for path in sorted(folder.rglob("*"))
        if path.is_file()
    }


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("form", ["compact", "uv"])
def test_every_family_compresses_to_its_budget(tmp_path, family, form):
    write_tokenizer(write_dense(tmp_path / "dense", family))
    write_text(tmp_path / "text.jsonl", 3000)
    report = compress(make_plan(settings_for(tmp_path, form=form, channels="keep")), QUIET)
    checkpoint = Checkpoint(tmp_path / "out")
    assert checkpoint.block.removed_ratio == pytest.approx(0.2, abs=0.005)
    stored = sum(row["parameters"] for row in report.matrices)
    assert stored == sum(t.numel() for n, t in checkpoint.tensors() if ".mlp." in n)
    assert report.quality.num_tokens == 4 * 31
    assert {path.name for path in (tmp_path / "out").iterdir()} >= {
        "neuronmlp_report.json",
        "neuronmlp_report.html",
        "README.md",
    }
    assert not list(tmp_path.glob("*.partial"))


def test_predicted_errors_hold_on_the_calibrated_rows(home):
    """Judged on the very rows that were calibrated, achieved must equal predicted: the whole chain of forms
    and orders is right.
    """
    plan = make_plan(settings_for(home))
    plan = type(plan)(**{**plan.__dict__, "judge": plan.calibration})
    analyse_module.SAMPLE_ROWS, kept = 10**9, analyse_module.SAMPLE_ROWS
    try:
        report = compress(plan, QUIET)
    finally:
        analyse_module.SAMPLE_ROWS = kept
    rows = [row for row in report.matrices if row["rank"] is not None]
    assert len(rows) > 4
    for row in rows:
        assert row["achieved_error"] == pytest.approx(row["predicted_error"], rel=0.03), row


def test_two_sided_global_beats_the_published_method_at_equal_bytes(home):
    ours = compress(make_plan(settings_for(home, form="uv", channels="keep")), QUIET)
    theirs = compress(
        make_plan(settings_for(home, form="uv", method="whitened", allocation="uniform", out=home / "w")),
        QUIET,
    )
    assert theirs.removed_ratio == pytest.approx(ours.removed_ratio, abs=0.01)
    assert ours.quality.kl_divergence < 0.8 * theirs.quality.kl_divergence


def test_plain_svd_needs_no_text(home):
    report = compress(make_plan(settings_for(home, text=None, method="plain", allocation="uniform")), QUIET)
    assert report.quality is None
    assert all(row["achieved_error"] is None for row in report.matrices)


def test_rank_multiple_aligns_the_ranks(home):
    report = compress(
        make_plan(settings_for(home, method="whitened", allocation="uniform", form="uv", rank_multiple=8)),
        QUIET,
    )
    assert all(row["rank"] % 8 == 0 for row in report.matrices)


def test_bf16_factors_are_written_as_bf16(home):
    compress(make_plan(settings_for(home, dtype="bfloat16")), QUIET)
    stored = Checkpoint(home / "out")
    kinds = {name: tensor.dtype for name, tensor in stored.tensors() if ".mlp." in name}
    assert {kinds[n] for n in kinds if n.endswith(("u.weight", "v.weight", "c.weight"))} == {torch.bfloat16}


def test_dense_matrices_stay_as_they_were(home):
    """In a layer of its own or beside factors: another dtype is for the factors."""
    compress(
        make_plan(settings_for(home, dtype="bfloat16", form="uv", remove=0.05, groups=1, channels="keep")),
        QUIET,
    )
    stored, base = Checkpoint(home / "out"), Checkpoint(home / "dense")
    dense = [
        f"model.layers.{i}.mlp.{n}.weight"
        for i, layer in enumerate(stored.block.layers)
        for n, s in layer.items()
        if s.rank is None
    ]
    assert 0 < len(dense) < 9 and all(torch.equal(stored.tensor(name), base.tensor(name)) for name in dense)


def test_a_rerun_gives_the_same_bytes(home):
    compress(make_plan(settings_for(home)), QUIET)
    first = files(home / "out")
    shutil.rmtree(home / "out")
    compress(make_plan(settings_for(home)), QUIET)
    assert files(home / "out") == first


@pytest.mark.parametrize(("module", "function", "call"), [
    (marginal_module, "_layer_gains", 3),
    (analyse_module, "layer_moments", 2),
    (analyse_module, "run_in_place", 2),
    (analyse_module, "loss_gradient", 1),
    (analyse_module, "layer_metrics", 1),
    (analyse_module, "layer_metrics", 3),
    (offers_module, "deal", 2),
    (run_module, "factor_layer", 3),
    (run_module, "build_layer", 3),
    (run_module, "write_rest", 1),
    (run_module, "Judge", 1),
    (run_module, "sample_texts", 1),
    (folder_module, "write_page", 1),
])  # fmt: skip
def test_an_interrupted_run_resumes_to_the_same_bytes(home, monkeypatch, module, function, call):
    known = {"allocation": "measured"} if module is marginal_module else {}
    compress(make_plan(settings_for(home, out=home / "whole", **known)), QUIET)
    real, calls = getattr(module, function), []

    def interrupted(*args, **kwargs):
        calls.append(function)
        if len(calls) == call:
            raise KeyboardInterrupt
        return real(*args, **kwargs)

    monkeypatch.setattr(module, function, interrupted)
    with pytest.raises(KeyboardInterrupt):
        compress(make_plan(settings_for(home, **known)), QUIET)
    assert not (home / "out").exists() and (home / "out.partial").is_dir()
    compress(make_plan(settings_for(home, **known)), QUIET)
    assert files(home / "out") == files(home / "whole")


def interrupt_at(home, monkeypatch, function):
    monkeypatch.setattr(run_module, function, lambda *_: (_ for _ in ()).throw(KeyboardInterrupt))
    with pytest.raises(KeyboardInterrupt):
        compress(make_plan(settings_for(home)), QUIET)
    monkeypatch.undo()


@pytest.mark.parametrize("name", ["result/neuronmlp-00002-of-00004.safetensors", "built-00001.json"])
def test_a_layer_that_was_damaged_since_is_built_again(home, monkeypatch, name):
    compress(make_plan(settings_for(home, out=home / "whole")), QUIET)
    interrupt_at(home, monkeypatch, "write_rest")
    path = home / "out.partial" / name
    path.write_bytes(path.read_bytes()[:-64] + bytes(64))
    compress(make_plan(settings_for(home)), QUIET)
    assert files(home / "out") == files(home / "whole")


def test_an_analysis_that_was_damaged_since_is_refused(home, monkeypatch):
    interrupt_at(home, monkeypatch, "factor_layer")
    path = home / "out.partial" / "analysis" / "layer-00001.safetensors"
    path.write_bytes(path.read_bytes()[:-64] + bytes(64))
    with pytest.raises(CheckpointError, match=r"layer-00001\.safetensors: expected what the run wrote there"):
        compress(make_plan(settings_for(home)), QUIET)


def test_sample_texts_are_no_reason_to_begin_anew(home, monkeypatch):
    monkeypatch.setattr(run_module, "sample_texts", lambda *args: (_ for _ in ()).throw(KeyboardInterrupt))
    with pytest.raises(KeyboardInterrupt):
        compress(make_plan(settings_for(home)), QUIET)
    assert compress(make_plan(settings_for(home, samples=0)), QUIET).samples is None


def test_the_text_that_judges_is_not_calibrated_on(home):
    plan = make_plan(settings_for(home, tokens=10**9, judge_tokens=10**9))
    judged, used = ({tuple(window) for window in part.tolist()} for part in (plan.judge, plan.calibration))
    assert len(judged) > 8 and len(used) > 8 and not judged & used


@pytest.mark.parametrize(
    "changes",
    [{"method": "whitened", "allocation": "uniform"}, {"metric_tokens": 128}, {"seed": 1}, {"window": 16}],
    ids=str,
)
def test_an_analysis_is_of_its_statistics_alone(home, changes):
    known = make_plan(settings_for(home)).analysis_fingerprint()
    assert make_plan(settings_for(home, **changes)).analysis_fingerprint() != known
    assert (
        make_plan(settings_for(home, remove=0.4, form="uv", dtype="bfloat16")).analysis_fingerprint() == known
    )


def test_the_same_files_by_other_paths_are_the_same_run(home, monkeypatch):
    (home / "link").symlink_to(home / "dense")
    monkeypatch.chdir(home)
    text = pathlib.Path("text.jsonl")
    known = make_plan(settings_for(home))
    for model in (pathlib.Path("dense"), home / "link", pathlib.Path("link") / ".." / "dense"):
        other = make_plan(settings_for(home, model=model, text=text))
        assert other.fingerprint() == known.fingerprint()
        assert other.analysis_fingerprint() == known.analysis_fingerprint()


def test_finished_layers_are_not_done_again(home, monkeypatch):
    done = []
    real = run_module.factor_layer
    monkeypatch.setattr(run_module, "factor_layer", lambda *args: (done.append(1), real(*args))[1])
    monkeypatch.setattr(run_module, "build_layer", lambda *args: (_ for _ in ()).throw(KeyboardInterrupt))
    with pytest.raises(KeyboardInterrupt):
        compress(make_plan(settings_for(home)), QUIET)
    monkeypatch.undo()
    monkeypatch.setattr(run_module, "factor_layer", lambda *args: (done.append(1), real(*args))[1])
    real_deal = offers_module.deal

    def deal(rows, groups, ranks, *start):
        return real_deal(rows, groups, ranks, *start) if start else pytest.fail("dealt again")

    monkeypatch.setattr(offers_module, "deal", deal)  # offers deal from nothing, factors go on from there
    compress(make_plan(settings_for(home)), QUIET)
    assert len(done) == 3  # layers, once each


def test_the_backward_pass_goes_on_where_it_stopped(home, monkeypatch):
    """Stopped in the second layer from the top: neither the forward pass nor the top layer is done again."""
    done, real = [], analyse_module.layer_metrics

    def interrupted(*args):
        if done:
            raise KeyboardInterrupt
        done.append(1)
        return real(*args)

    monkeypatch.setattr(analyse_module, "layer_metrics", interrupted)
    with pytest.raises(KeyboardInterrupt):
        compress(make_plan(settings_for(home)), QUIET)
    monkeypatch.setattr(analyse_module, "layer_metrics", lambda *args: (done.append(1), real(*args))[1])
    monkeypatch.setattr(analyse_module, "forward_pass", lambda *_: pytest.fail("forward again"))
    compress(make_plan(settings_for(home)), QUIET)
    assert len(done) == 3


def test_hidden_states_that_are_gone_are_made_again(home, monkeypatch):
    """As where a run goes on with another number of processes: what each kept for itself has another name."""
    compress(make_plan(settings_for(home, out=home / "whole")), QUIET)
    real, calls = analyse_module.layer_moments, []

    def interrupted(*args):
        calls.append(1)
        if len(calls) == 3:
            raise KeyboardInterrupt
        return real(*args)

    monkeypatch.setattr(analyse_module, "layer_moments", interrupted)
    with pytest.raises(KeyboardInterrupt):
        compress(make_plan(settings_for(home)), QUIET)
    monkeypatch.undo()
    (kept,) = (home / "out.partial" / "analysis").glob("hidden-*")
    kept.unlink()
    compress(make_plan(settings_for(home)), QUIET)
    assert files(home / "out") == files(home / "whole")


def test_an_analysis_serves_other_sizes(home, monkeypatch):
    compress(make_plan(settings_for(home, analysis=home / "an", out=home / "a")), QUIET)
    monkeypatch.setattr(analyse_module, "layer_moments", lambda *_: pytest.fail("analysed again"))
    report = compress(make_plan(settings_for(home, analysis=home / "an", remove=0.4, form="uv")), QUIET)
    assert report.block["removed_ratio"] == pytest.approx(0.4, abs=0.005)


def test_another_runs_leftovers_are_refused(home, monkeypatch):
    monkeypatch.setattr(run_module, "build_layer", lambda *args: (_ for _ in ()).throw(KeyboardInterrupt))
    with pytest.raises(KeyboardInterrupt):
        compress(make_plan(settings_for(home)), QUIET)
    with pytest.raises(OutputError, match=r"out\.partial: expected what a run of these same settings left"):
        compress(make_plan(settings_for(home, remove=0.3)), QUIET)


def test_changed_weights_are_noticed_between_runs(home):
    compress(make_plan(settings_for(home, analysis=home / "an", out=home / "a")), QUIET)
    weights = home / "dense" / "model.safetensors"
    tensors = load_file(weights)
    tensors["model.layers.0.mlp.up_proj.weight"] += 1
    save_file(tensors, weights)
    with pytest.raises(OutputError, match="an: expected"):
        compress(make_plan(settings_for(home, analysis=home / "an")), QUIET)
    assert not (home / "out.partial").exists()


def test_a_full_disk_is_told_and_leaves_nothing(home, monkeypatch):
    def full(*_args, **_kwargs):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("neuronmlp_plugin.checkpoint.writer.save_file", full)
    with pytest.raises(OutputError, match="expected room to write, found a full disk"):
        compress(make_plan(settings_for(home)), QUIET)
    assert not (home / "out").exists()


def test_what_an_earlier_run_left_needs_no_room_again(home, monkeypatch):
    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr(run_module, "write_rest", lambda *_: (_ for _ in ()).throw(KeyboardInterrupt))
        compress(make_plan(settings_for(home)), QUIET)
    left = sum(path.stat().st_size for path in (home / "out.partial").rglob("*") if path.is_file())
    free = make_plan(settings_for(home)).disk_bytes - left
    assert free > 0
    monkeypatch.setattr("shutil.disk_usage", lambda _: type("Usage", (), {"free": free})())
    compress(make_plan(settings_for(home)), QUIET)
    with pytest.raises(OutputError, match="GiB of free disk"):
        make_plan(settings_for(home, out=home / "other"))


def test_an_analysis_among_other_files_is_refused(home):
    before = files(home / "dense")
    with pytest.raises(OutputError, match="dense: expected an empty folder, or what a run"):
        compress(make_plan(settings_for(home, analysis=home / "dense")), QUIET)
    assert files(home / "dense") == before and not list(home.glob("out*"))


@pytest.mark.parametrize("groups", [1, 2, 4])
@pytest.mark.parametrize("allocation", ["global", "measured"])
def test_groups_and_fewer_channels_are_stored_as_they_are_said(home, groups, allocation):
    report = compress(make_plan(settings_for(home, groups=groups, allocation=allocation, remove=0.4)), QUIET)
    block = Checkpoint(home / "out").block
    assert block.groups == groups and 0.4 <= block.removed_ratio < 0.43
    assert any(layer.channels < 192 for layer in block.layers)
    assert all(layer.channels % (16 * groups) == 0 for layer in block.layers)
    assert groups in report.full_speed_tensor_parallel
    assert report.quality.kl_divergence < 1.0


def test_auto_takes_the_groups_whose_slices_are_nearest_to_square(home):
    plans = [
        make_plan(settings_for(home, **changes)) for changes in ({}, {"tp": 4}, {"tp": 3}, {"groups": 1})
    ]
    assert [plan.groups for plan in plans] == [2, 4, 3, 1]  # 192 x 128: 96 is nearer to 128 than 192
    assert ("groups", "4: full speed at tensor parallel size 1, 2, 4; channels may be removed") in plans[
        1
    ].rows()
    assert make_plan(settings_for(home, method="whitened", allocation="uniform")).groups == 1


def test_uniformly_narrow_is_an_ordinary_folder(home):
    from transformers import AutoModelForCausalLM

    report = compress(make_plan(settings_for(home, form="narrow", allocation="uniform", remove=0.25)), QUIET)
    config = json.loads((home / "out" / "config.json").read_text())
    assert config["intermediate_size"] == 144 and "quantization_config" not in config and report.ordinary
    model, ids = AutoModelForCausalLM.from_pretrained(home / "out"), torch.randint(3, 128, (2, 9))
    with torch.no_grad():
        torch.testing.assert_close(model(ids).logits, load_model(home / "out")(ids).logits)


def test_choosing_channels_by_their_loss_beats_leverage_and_choosing_by_layer_beats_uniform(home):
    known = {"form": "narrow", "remove": 0.25}
    leverage = {**known, "method": "modegpt", "allocation": "uniform"}
    ways = [known, {**known, "allocation": "uniform"}, leverage]
    kls = [
        compress(make_plan(settings_for(home, out=home / str(i), **way)), QUIET).quality.kl_divergence
        for i, way in enumerate(ways)
    ]
    assert kls == sorted(kls) and kls[0] < 0.7 * kls[1]


def test_numbers_that_the_dtype_does_not_hold_are_refused(home):
    weights = home / "dense" / "model.safetensors"
    tensors = load_file(weights)
    tensors["model.layers.1.mlp.up_proj.weight"] *= 1e12
    save_file(tensors, weights)
    with pytest.raises(NonFiniteError, match=r"layers\.1\.mlp\..*expected finite values in float16"):
        compress(
            make_plan(settings_for(home, text=None, method="plain", allocation="uniform", dtype="float16")),
            QUIET,
        )
    assert not (home / "out").exists()


@pytest.mark.parametrize("place", ["out", "out/analysis", "out.partial/analysis"])
def test_an_analysis_inside_the_output_is_refused(home, place):
    with pytest.raises(UsageError, match=r"--analysis .*expected a folder outside --out"):
        make_plan(settings_for(home, analysis=home / place))


def test_too_little_disk_is_refused_before_anything_is_done(home, monkeypatch):
    monkeypatch.setattr("shutil.disk_usage", lambda _: type("Usage", (), {"free": 10})())
    with pytest.raises(OutputError, match="GiB of free disk"):
        make_plan(settings_for(home))


def test_factor_file_gives_the_same_model_as_the_folder(home):
    folder = compress(make_plan(settings_for(home)), QUIET)
    file = compress(make_plan(settings_for(home, out=home / "dense", factors_only=True)), QUIET)
    assert file.quality == folder.quality and file.quality.kl_divergence > 0
    ids = torch.randint(3, 128, (2, 9))
    with torch.no_grad():
        overlay = load_model(home / "dense", factors=home / "dense" / FACTOR_FILE)(ids).logits
        torch.testing.assert_close(overlay, load_model(home / "out")(ids).logits)
        assert not torch.allclose(overlay, load_model(home / "dense")(ids).logits, atol=1e-2)


def test_weak_pivots_fall_back_to_uv_at_no_more_bytes(home, monkeypatch):
    monkeypatch.setattr("neuronmlp_plugin.compressor.build.ROUNDING_LIMIT", 0.0)
    report = compress(make_plan(settings_for(home, dtype="bfloat16")), QUIET)
    assert {row["form"] for row in report.matrices} <= {"uv", "dense"}
    assert report.notes and "pivots too weak" in report.notes[0]
    assert report.block["removed_ratio"] >= 0.2


def test_damaged_weights_are_refused_by_name(home):
    weights = home / "dense" / "model.safetensors"
    tensors = load_file(weights)
    tensors["model.layers.1.mlp.up_proj.weight"][3, 3] = float("nan")
    save_file(tensors, weights)
    with pytest.raises(NonFiniteError, match=r"layers\.1\.mlp\.up_proj"):
        compress(make_plan(settings_for(home)), QUIET)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"remove": 1.2}, "--remove: expected a share between 0 and 1"),
        ({"form": "tucker"}, "--form: expected one of"),
        ({"text": None}, "--text: expected calibration text"),
        ({"method": "whitened"}, "expected --allocation uniform"),
        ({"groups": 5}, "--groups 5: expected a divisor of the 192 intermediate channels"),
        ({"groups": 0}, "--groups: expected a positive number"),
        ({"groups": 3, "tp": 2}, "--groups 3: .* a multiple of --tp 2"),
        ({"tp": 5}, "--tp 5: expected a divisor of the 192 .*, found 5; nearest: 4 and 6."),
        ({"tp": 384}, "--tp 384: expected a divisor of the 192 .*, found 384; nearest: 192."),
        ({"form": "narrow", "channels": "keep"}, "narrow: expected --channels remove"),
        ({"form": "narrow", "remove": 0.8}, "expected at most 0.67"),
        ({"form": "narrow", "remove": 0.8, "allocation": "uniform"}, "expected at most 0.67 of the channels"),
        ({"method": "modegpt", "allocation": "uniform"}, "modegpt: expected --form narrow"),
        (
            {"method": "whitened", "allocation": "uniform", "form": "narrow"},
            "whitened: expected --form compact",
        ),
        ({"method": "whitened", "allocation": "measured"}, "expected --allocation uniform, found measured"),
        (
            {"remove": None, "target": "kl<0.1", "allocation": "measured"},
            "measured: expected --remove or --faster, found --target",
        ),
        ({"window": 0}, "--window: expected a positive number"),
        ({"metric_tokens": -1}, "--metric-tokens: expected a number of tokens, or 0"),
        ({"judge_tokens": -5}, "--judge-tokens: expected a number of tokens, or 0"),
        ({"seed": 2**63}, "--seed: expected a number from 0"),
        ({"samples": -1}, "--samples: expected a number of tokens, or 0"),
        ({"tokens": 256}, "expected at least 384 calibration tokens .*found 256"),
        ({"remove": 0.9}, "expected at most"),
        (
            {"method": "whitened", "allocation": "uniform", "form": "uv", "rank_multiple": 128},
            "--rank-multiple 128: .*choose a smaller",
        ),
    ],
)
def test_settings_that_cannot_work_are_refused(home, changes, message):
    with pytest.raises(NeuronMLPError, match=message):
        make_plan(settings_for(home, **changes))
    assert not list(home.glob("out*"))


def test_a_multiple_too_coarse_for_the_budget_is_refused(home):
    with pytest.raises(NeuronMLPError, match=r"smaller (multiple|--rank-multiple)"):
        compress(make_plan(settings_for(home, rank_multiple=64, channels="keep")), QUIET)
    assert not (home / "out").exists()


def test_a_factored_model_is_not_compressed_again(home):
    compress(make_plan(settings_for(home)), QUIET)
    with pytest.raises(NeuronMLPError, match="compress the original"):
        make_plan(settings_for(home, model=home / "out", out=home / "again"))


def test_the_report_is_json_with_every_matrix(home):
    compress(make_plan(settings_for(home, groups=1, channels="keep")), QUIET)
    report = Report.of(json.loads((home / "out" / "neuronmlp_report.json").read_text()))
    assert [(row["layer"], row["projection"]) for row in report.matrices][:4] == [
        (0, "gate_proj"),
        (0, "up_proj"),
        (0, "down_proj"),
        (1, "gate_proj"),
    ]
    for row in report.matrices:
        known = report.spectra["layers"][row["layer"]][row["projection"]]
        lost = np.interp(row["rank"], report.spectra["ranks"], known) if row["rank"] is not None else 0.0
        assert lost == pytest.approx(row["predicted_error"] ** 2, rel=0.05), row
    losses = [point["predicted_loss"] for point in report.loss_by_size]
    assert losses == sorted(losses) and len(losses) >= 5


@pytest.mark.parametrize(
    "options",
    [
        {"allocation": "measured", "groups": 1},
        {"form": "uv", "groups": 1},
        {"method": "whitened", "allocation": "uniform"},
    ],
    ids=str,
)
def test_a_matrix_of_zeros_is_no_obstacle(home, options):
    weights = home / "dense" / "model.safetensors"
    tensors = load_file(weights)
    tensors["model.layers.1.mlp.gate_proj.weight"].zero_()
    save_file(tensors, weights)
    report = compress(make_plan(settings_for(home, **options)), QUIET)
    json.dumps(report.to_json(), allow_nan=False)
    quantize_folder(home / "out", home / "int8", QUIET)
    ids = torch.randint(3, 128, (2, 9))
    with torch.no_grad():
        assert all(
            bool(torch.isfinite(load_model(home / name)(ids).logits).all()) for name in ("out", "int8")
        )


def test_rows_are_sampled_evenly_whatever_the_batches(home, monkeypatch):
    plan = make_plan(settings_for(home))
    stream = LayerStream(plan.base)
    hidden = stream.embed(plan.calibration)
    seen = []
    monkeypatch.setattr(analyse_module, "SAMPLE_ROWS", 50)
    layer = stream.load(0)
    with hooked(
        [
            layer.mlp.gate_proj.register_forward_pre_hook(
                lambda _, args: seen.append(args[0].reshape(-1, args[0].shape[-1]))
            )
        ]
    ):
        rows = analyse_module._sample_inputs(stream, layer, hidden)["gate_up.sample"]
    everything = torch.cat(seen)
    assert len(seen) > 1 and torch.equal(rows, everything[:: len(everything) // 50][:50])


def test_a_matrix_of_lower_rank_than_its_share_is_no_obstacle(home):
    weights = home / "dense" / "model.safetensors"
    tensors = load_file(weights)
    name = "model.layers.1.mlp.gate_proj.weight"
    left, right = torch.linalg.qr(tensors[name].T).Q[:, :20], tensors[name][:, :20]
    tensors[name] = (right @ left.T).contiguous()
    save_file(tensors, weights)
    compress(make_plan(settings_for(home, method="whitened", allocation="uniform")), QUIET)
    ids = torch.randint(3, 128, (2, 9))
    with torch.no_grad():
        assert bool(torch.isfinite(load_model(home / "out")(ids).logits).all())
