"""The simulated kinds of `neuronmlp bench`: what they print, write and promise. Small cases; the whole tables
are in docs/cost_model.md.
"""

import argparse
import csv
import json

import pytest

from neuronmlp_plugin.bench import kernel_cases, tune
from neuronmlp_plugin.cli import main
from nki_kernels import tuned
from nki_kernels.backend import HAS_NKI
from nki_kernels.cost import calibration
from nki_kernels.cost.baselines import tutorial
from nki_kernels.cost.constants import CALIBRATED
from nki_kernels.cost.estimate import Estimate
from nki_kernels.plan import Plan
from nki_kernels.planner import Choice, build_plan
from nki_kernels.targets import TRN1

pytestmark = pytest.mark.skipif(
    HAS_NKI, reason="the cost model listens to our simulator; set NKI_KERNELS_BACKEND=simulator"
)


def rows_of(path):
    with path.open(encoding="utf-8", newline="") as file:
        return list(csv.DictReader(file))


@pytest.fixture
def published(monkeypatch):
    """One small promise, and one row without a kernel."""
    promise = calibration.Published(
        "small", "a test", 100.0, "fitted", 0.15, lambda c: tutorial("tiled", 128, 128, 512, constants=c)
    )
    silent = calibration.Published("closed", "a test", 7.0, "no kernel")
    rows = [promise, silent]
    monkeypatch.setattr(calibration, "published_rows", lambda: rows)
    return rows


def test_calibrate_fails_where_a_promise_is_broken(published, capsys, tmp_path):
    assert main(["bench", "calibrate", "--csv", str(tmp_path / "rows.csv")]) == 1
    assert "15% BROKEN" in capsys.readouterr().out
    published[0] = calibration.Published("small", "a test", 4.9, "fitted", 0.15, lambda c: Estimate(5.0))
    assert main(["bench", "calibrate"]) == 0
    out = capsys.readouterr().out
    assert "simulated_us" in out and "+2.0%" in out and "BROKEN" not in out and "closed" in out
    (row,) = rows_of(tmp_path / "rows.csv")
    assert (row["origin"], row["unit"], row["target"]) == ("simulated", "us", "constants calibrated")


def test_only_the_calibrated_set_makes_promises(published, capsys):
    assert main(["bench", "calibrate", "--constants", "documented"]) == 0
    assert "constants: documented" in capsys.readouterr().out


@pytest.fixture
def small_cases(monkeypatch):
    monkeypatch.setattr(kernel_cases, "MLP_MODELS", ("Llama-3.2-1B",))
    monkeypatch.setattr(kernel_cases, "DECODE_TOKENS", (1, 64))


def test_kernels_writes_table_rows_pictures_and_a_timeline(small_cases, capsys, tmp_path):
    rows, trace = tmp_path / "rows.csv", tmp_path / "trace.json"
    assert (
        main(
            [
                "bench",
                "kernels",
                "decode",
                "--csv",
                str(rows),
                "--plots",
                str(tmp_path / "plots"),
                "--trace",
                str(trace),
            ]
        )
        == 0
    )
    out = capsys.readouterr().out.splitlines()
    assert out[0].startswith("simulated, one core of trn1") and len(out) == 4
    written = rows_of(rows)
    assert {row["origin"] for row in written} == {"simulated"} and {row["metric"] for row in written} == {
        "simulated_us",
        "hbm_bytes",
    }
    assert len(written) == 2 * 6 and all(
        float(row["value"]) > 0 and row["date"] and row["versions"] for row in written
    )
    assert sorted(path.name for path in (tmp_path / "plots").iterdir()) == [
        "latency.png",
        "roofline.png",
        "waterfall.png",
    ]
    assert "simulated: Llama-3.2-1B T=64" in json.dumps(json.loads(trace.read_text())["traceEvents"][0])


def test_decode_reaches_its_bound_and_beats_dense(small_cases):
    """Counted, not timed: within 1.10 of the weight traffic at the set's rate, never slower than two launches
    or dense.
    """
    for result in kernel_cases.cases("decode", TRN1, CALIBRATED):
        assert result.over_bound < 1.10 and result.winner == "fused"
        assert result.best.estimate.counters.hbm_bytes == result.best.estimate.counters.hbm_unique_bytes


def test_tune_writes_choices_and_adds_to_them(capsys, tmp_path):
    out = tmp_path / "table.json"
    command = ["bench", "tune", "Llama-3.2-1B", "--form", "uv", "--tp", "1", "--out", str(out), "--tokens"]
    assert main([*command, "1"]) == 0 and main([*command, "1", "16"]) == 0
    table = json.loads(out.read_text())
    assert "simulated" in table["about"] and [name.split()[0] for name in sorted(table["choices"])] == [
        "T1",
        "T16",
    ]
    assert all(Choice(**fields).block_tokens in (1, 16) for fields in table["choices"].values())
    assert capsys.readouterr().out.count("plans scheduled") == 2  # the second run searched only what was new


def test_the_shipped_table_is_what_tune_asks_for_by_default_and_every_choice_of_it_makes_a_plan():
    parser = argparse.ArgumentParser()
    tune.add_arguments(parser)
    args = parser.parse_args(["--out", "unused.json"])
    requests = {
        tuned.key(request): request for model in args.models for _, request in tune._requests(args, model)
    }
    table = tuned.table("trn1")
    assert requests.keys() == table.keys()
    for name, fields in table.items():
        assert isinstance(build_plan(requests[name], Choice(**fields)), Plan), name


def test_layers_prints_the_bound_beside_the_gain(capsys):
    assert main(["bench", "layers", "Llama-3.2-1B", "--tp", "1", "--batch", "1", "--prompt", "128"]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert lines[0].startswith("simulated") and "Amdahl" in lines[1]
    assert len(lines) == 4  # the prefill and one batch of decode
    for line in lines[2:]:
        dense, low, speedup, _, amdahl = _numbers(line)
        assert speedup == pytest.approx(dense / low, abs=1e-3) and 1 < speedup < amdahl


def _numbers(line):
    """dense, low-rank, speed-up, share, Amdahl of a printed line."""
    words = line[40:].split()
    return [float(word.rstrip("%")) for word in words[:5]]


def test_unknown_names_are_refused_in_words(capsys):
    with pytest.raises(SystemExit):
        main(["bench", "kernels", "prefil"])
    assert "expected one of chain, prefill, decode, found 'prefil'" in capsys.readouterr().err


@pytest.mark.parametrize(
    "options",
    [["--tp", "0"], ["--prompt", "-5"], ["--batch", "0"], ["--remove", "2"], ["--remove", "-1"]],
    ids=str,
)
def test_sizes_that_mean_nothing_are_refused(options, capsys):
    with pytest.raises(SystemExit) as stop:
        main(["bench", "layers", "Llama-3.2-1B", f"{options[0]}={options[1]}"])
    assert stop.value.code == 2 and f"{options[0]}: expected" in capsys.readouterr().err
