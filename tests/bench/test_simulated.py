"""The simulated kinds of `neuronmlp bench`: what they print, write and promise. Small cases; the whole tables
are in docs/cost_model.md.
"""

import argparse
import csv
import json
import pathlib

import pytest

from neuronmlp_plugin.bench import calibrate, docs, kernel_cases, kernels, pages
from neuronmlp_plugin.cli import main
from nki_kernels.backend import HAS_NKI
from nki_kernels.cost import calibration
from nki_kernels.cost.baselines import tutorial
from nki_kernels.cost.constants import CALIBRATED
from nki_kernels.cost.estimate import Estimate
from nki_kernels.planner import Choice
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
    assert "simulated" in out and "+2.0%" in out and "BROKEN" not in out and "closed" in out
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
    command = ["bench", "tune", "Llama-3.2-1B", "--form", "dense", "--tp", "1", "--out", str(out), "--tokens"]
    assert main([*command, "1"]) == 0 and main([*command, "1", "16"]) == 0
    table = json.loads(out.read_text())
    assert "simulated" in table["about"] and [name.split()[0] for name in sorted(table["choices"])] == [
        "T1",
        "T16",
    ]
    assert all(Choice(**fields).block_tokens in (1, 16) for fields in table["choices"].values())
    assert capsys.readouterr().out.count("plans scheduled") == 2  # the second run searched only what was new


def test_tune_takes_the_rank_of_the_form_it_tunes(capsys, tmp_path):
    out = tmp_path / "plans.json"
    options = ["--remove", "0.2", "--tp", "1", "--tokens", "1", "--out", str(out)]
    assert main(["bench", "tune", "Llama-3.2-1B", "--form", "groups compact", *options]) == 0
    assert {
        name.split("gate_first=2048x")[1].split("/")[0] for name in json.loads(out.read_text())["choices"]
    } == {"1536", "1664"}


def test_layers_prints_every_form_beside_the_bound(capsys):
    assert main(["bench", "layers", "Llama-3.2-1B", "--tp", "1", "8", "--batch", "1", "--prompt", "128"]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert lines[0].startswith("simulated") and "collectives ring" in lines[0] and "Amdahl" in lines[1]
    assert len(lines) == 2 + 2 * 2  # two core counts, the prefill and one batch of decode
    for line in lines[2:]:
        dense, *gains = (0.0 if word == "-" else float(word) for word in line[31:].split()[:5])
        best = float(line[101:109])
        assert dense > 0 and best in gains and best >= max(gains[:3]) - 0.05


@pytest.mark.parametrize(
    ("options", "said"),
    [
        (["--tp", "3"], "--tp 3: expected a divisor of the 8192 channels of Llama-3.2-1B, found 3"),
        (["--tp", "64"], "--tp 64: expected a divisor of the 32 heads"),
        (
            ["--remove", "0.9999"],
            "--remove 0.9999: Llama-3.2-1B on 1 cores: expected a rank or channels of at least 128",
        ),
    ],
)
@pytest.mark.parametrize(
    "command", [["layers"], ["tune", "--form", "groups uv", "--out", "unused.json"]], ids=lambda c: c[0]
)
def test_what_the_model_cannot_be_cut_into_is_refused_in_words(command, options, said, capsys):
    assert main(["bench", *command, "Llama-3.2-1B", *options]) == 2
    assert said.split(":")[0] in capsys.readouterr().err


def test_docs_fills_the_page_and_nothing_before_all_is_made(
    published, small_cases, monkeypatch, capsys, tmp_path
):
    """One case of each kind; the page's own words stay, and what stood between the markers goes."""
    monkeypatch.setattr(kernel_cases, "CHAIN_TOKENS", (128,))
    monkeypatch.setattr(kernel_cases, "PREFILL_TOKENS", (512,))
    monkeypatch.setattr(docs, "make", small_make)
    published[0] = calibration.Published("small", "a test", 4.9, "fitted", 0.15, lambda c: Estimate(5.0))
    page = tmp_path / "cost_model.md"
    page.write_text("Words.\n\n<!-- bench docs: calibration -->\nold\n<!-- end -->\n\nMore.\n")
    (tmp_path / "simulated.csv").write_text("old rows\n")
    assert main(["bench", "docs", "--folder", str(tmp_path)]) == 2  # the page lacks a block
    assert "expected the blocks calibration, kernels, found calibration" in capsys.readouterr().err
    assert "old rows" in (tmp_path / "simulated.csv").read_text()
    page.write_text(page.read_text() + "<!-- bench docs: kernels -->\n<!-- end -->\n")
    assert main(["bench", "docs", "--folder", str(tmp_path)]) == 0
    text = page.read_text()
    assert "old" not in text and text.startswith("Words.") and "More." in text and "AWS twice" in text
    assert {row["origin"] for row in rows_of(tmp_path / "simulated.csv")} == {"simulated"}
    assert (tmp_path / "images" / "roofline.png").stat().st_size > 10_000


def small_make(made):
    """Two of the blocks."""
    made.add(calibrate.csv_rows(calibrate.report(CALIBRATED, made.block("calibration")), CALIBRATED))
    parser = argparse.ArgumentParser()
    kernels.add_arguments(parser)
    return kernels.report(parser.parse_args(["chain", "decode"]), made.block("kernels"))


def test_the_page_has_the_blocks_that_are_made():
    made = docs.Made()
    names = pages.block_names(pathlib.Path("docs/cost_model.md"))
    assert sorted(names) == sorted(docs.BLOCKS) and not made.blocks
    assert len(names) == len(set(names))


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
