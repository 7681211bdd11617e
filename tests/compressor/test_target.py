"""A quality in place of a size: what is parsed, what is searched, and that a report never claims more than
the stored folder does.
"""

from __future__ import annotations

import json
from dataclasses import replace

import pytest

from neuronmlp_plugin.calibration.layer_stream import LayerStream
from neuronmlp_plugin.calibration.quality import Judge
from neuronmlp_plugin.checkpoint.reader import Checkpoint
from neuronmlp_plugin.compressor import pipeline as run_module
from neuronmlp_plugin.compressor.marginal import TruncatedStream
from neuronmlp_plugin.compressor.pipeline import compress
from neuronmlp_plugin.compressor.plan import make_plan
from neuronmlp_plugin.compressor.settings import Target, parse_target
from neuronmlp_plugin.compressor.target import Search, largest
from neuronmlp_plugin.errors import UsageError
from tests.compressor.test_compress import QUIET, files, home, settings_for  # noqa: F401 (home is a fixture)

TARGET = "kl<0.02"


def asked(home, **changes):  # noqa: F811
    return make_plan(settings_for(home, **{"remove": None, "target": TARGET, **changes}))


@pytest.mark.parametrize(
    ("text", "metric", "bound"),
    [
        ("ppl+2%", "perplexity_ratio", 1.02),
        ("kl < 0.05", "kl_divergence", 0.05),
        ("top1>95%", "top1_agreement", 0.95),
    ],
)
def test_targets_are_understood(text, metric, bound):
    target = parse_target(text)
    assert target.metric == metric and target.bound == pytest.approx(bound)


@pytest.mark.parametrize(
    "text",
    ["", "ppl", "ppl+0%", "ppl-2%", "ppl+2", "kl<0", "kl>0.1", "top1>100%", "top1>0%", "top1<95%", "ppl+2%%"],
)
def test_what_bounds_nothing_is_refused(text):
    with pytest.raises(UsageError, match="--target: expected"):
        parse_target(text)


def test_agreement_is_met_from_above_and_the_others_from_below():
    assert parse_target("top1>90%").met({"top1_agreement": 0.91}) and not parse_target("top1>90%").met(
        {"top1_agreement": 0.89}
    )
    assert parse_target("kl<0.1").met({"kl_divergence": 0.09}) and not parse_target("kl<0.1").met(
        {"kl_divergence": 0.11}
    )


@pytest.mark.parametrize("bound", range(0, 12))
def test_bisection_finds_the_last_that_meets_in_few_probes(bound):
    probed = []
    found = largest(range(1, 11), lambda size: probed.append(size) or size <= bound)
    assert found == (min(bound, 10) or None)
    assert len(probed) <= 4 and len(set(probed)) == len(probed)


def test_a_size_whose_stored_tensors_fail_gives_way_to_the_next_and_nothing_is_probed_twice(tmp_path):
    sizes, probed = [0.1, 0.2, 0.3, 0.4], []

    def measure(removed):
        probed.append(removed)
        return {"kl_divergence": removed}

    search = Search(tmp_path / "target.json", "kl<0.3", Target("kl_divergence", 0.3))
    assert search.candidate(sizes, measure) == 0.3
    search.record(0.3, {"kl_divergence": 0.31}, stored=True)
    again = Search(tmp_path / "target.json", "kl<0.3", Target("kl_divergence", 0.3))
    assert again.candidate(sizes, lambda _: pytest.fail("probed again")) == 0.2
    again.record(0.2, {"kl_divergence": 0.5}, stored=True)
    again.record(0.1, {"kl_divergence": 0.5}, stored=True)
    with pytest.raises(UsageError, match=r"kl<0\.3: expected a removal that meets it, found kl_divergence"):
        again.candidate(sizes, measure)


def test_the_largest_removal_that_meets_is_made_and_is_the_folders_own_quality(home):  # noqa: F811
    plan = asked(home)
    report = compress(plan, QUIET)
    probes = report.target["probes"]
    last = probes[-1] if probes[-1]["stored"] else next(p for p in probes if p["stored"])
    assert last["met"] and report.quality.kl_divergence == last["kl_divergence"] <= 0.02
    assert report.block["removed_ratio"] == pytest.approx(last["removed"], abs=0.006)
    beyond = [p for p in probes if not p["stored"] and p["removed"] > last["removed"]]
    assert beyond and not beyond[0]["met"] and beyond[0]["removed"] == pytest.approx(last["removed"] + 0.005)
    # Judged once more from the folder, as a user would.
    dense, made = (LayerStream(Checkpoint(home / name)) for name in ("dense", "out"))
    assert Judge(dense, plan.judge).compare(made).kl_divergence == pytest.approx(last["kl_divergence"])
    assert json.loads((home / "out" / "neuronmlp_report.json").read_text())["target"] == report.target


def test_a_probe_is_the_model_that_is_stored(home):  # noqa: F811
    probes = compress(asked(home), QUIET).target["probes"]
    stored = next(p for p in probes if p["stored"])
    truncated = next(p for p in probes if not p["stored"] and p["removed"] == stored["removed"])
    assert truncated["kl_divergence"] == pytest.approx(stored["kl_divergence"], rel=1e-3)


def test_stored_tensors_that_miss_are_not_reported_as_met(home, monkeypatch):  # noqa: F811
    """Rounding made worse on purpose: the first folder misses, the one that is kept is smaller a cut and
    meets.
    """
    first = compress(asked(home, out=home / "first"), QUIET)
    real, judged = run_module._judge, []

    def pessimist(run, bars):
        judged.append(1)
        quality, samples = real(run, bars)
        return replace(quality, kl_divergence=0.021) if len(judged) == 1 else quality, samples

    monkeypatch.setattr(run_module, "_judge", pessimist)
    report = compress(asked(home), QUIET)
    assert [p["met"] for p in report.target["probes"] if p["stored"]] == [True, False]
    assert report.quality.kl_divergence <= 0.02
    assert Checkpoint(home / "out").block.removed_ratio < first.removed_ratio


def test_an_interrupted_search_goes_on_to_the_same_bytes(home, monkeypatch):  # noqa: F811
    compress(asked(home, out=home / "whole"), QUIET)
    real, calls = TruncatedStream.head, []

    def interrupted(self, *args):
        calls.append(1)
        if len(calls) == 3:
            raise KeyboardInterrupt
        return real(self, *args)

    monkeypatch.setattr(TruncatedStream, "head", interrupted)
    with pytest.raises(KeyboardInterrupt):
        compress(asked(home), QUIET)
    kept = json.loads((home / "out.partial" / "target.json").read_text())
    assert len(kept["probes"]) == 2
    compress(asked(home), QUIET)
    assert files(home / "out") == files(home / "whole")


def test_an_unreachable_target_is_refused_and_leaves_nothing(home):  # noqa: F811
    with pytest.raises(UsageError, match="ask for less"):
        compress(asked(home, target="kl<0.0000001"), QUIET)
    assert not (home / "out").exists()


def test_a_form_that_can_take_nothing_away_says_so(home):  # noqa: F811
    with pytest.raises(UsageError, match="taken away at rank multiple 128"):
        compress(asked(home, rank_multiple=128, channels="keep", groups=1), QUIET)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"remove": 0.2, "target": TARGET}, "found --remove and --target"),
        ({"remove": None}, "found none; give exactly one"),
        ({"remove": None, "target": TARGET, "judge_tokens": 0}, "--target: expected text to judge on"),
        ({"remove": None, "faster": 0.9}, "--faster: expected a factor above 1"),
        (
            {"remove": None, "faster": 1.1, "method": "whitened", "allocation": "uniform"},
            "--faster: expected --allocation global",
        ),
    ],
)
def test_sizes_that_contradict_each_other_are_refused(home, changes, message):  # noqa: F811
    with pytest.raises(UsageError, match=message):
        settings_for(home, **changes)


def test_the_plan_says_what_will_happen(home):  # noqa: F811
    assert "as much as keeps kl<0.02" in dict(asked(home).rows())["take away"]
    assert (
        "1.1 times faster in decode, simulated"
        in dict(asked(home, target=None, faster=1.1).rows())["take away"]
    )
