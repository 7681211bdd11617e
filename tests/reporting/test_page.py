"""The page from the JSON: it says what the numbers say, keeps strange text as text, asks no one for anything."""

from __future__ import annotations

import copy
import html.parser
import json
import os
import re
import subprocess
import sys
from dataclasses import replace

import pytest

from neuronmlp_plugin.errors import CheckpointError
from neuronmlp_plugin.reporting import figures, view
from neuronmlp_plugin.reporting.folder import read_report, render_page, write_card, write_page
from neuronmlp_plugin.reporting.run_report import Report
from tests.conftest import ROOT
from tests.reporting.reports import IMAGE, SCRIPT, full_report, plain_report


class Parsed(html.parser.HTMLParser):
    """Tags with attributes, and the text outside the style sheet."""

    def __init__(self, page: str) -> None:
        super().__init__()
        self.tags: list[tuple[str, dict[str, str | None]]] = []
        self.text = ""
        self.feed(page)

    def handle_starttag(self, tag, attrs):
        self.tags.append((tag, dict(attrs)))

    def handle_data(self, data):
        self.text += data if self.tags and self.tags[-1][0] != "style" else ""

    def values(self, attribute):
        return [attributes[attribute] for _, attributes in self.tags if attribute in attributes]


@pytest.fixture(scope="module")
def page():
    return render_page(full_report())


def test_strange_text_stays_text(page):
    parsed = Parsed(page)
    assert not {"script", "img", "iframe", "object"} & {tag for tag, _ in parsed.tags}
    assert parsed.text.count(SCRIPT) >= 4  # title and heading, prompt, generation, provenance
    assert parsed.text.count(IMAGE) >= 3  # generation, note, provenance
    assert not [name for _, attributes in parsed.tags for name in attributes if name.startswith("on")]


def test_nothing_is_asked_of_anyone(page):
    parsed = Parsed(page)
    for attribute in ("src", "href", "xlink:href", "srcset", "data", "action"):
        assert all(value.startswith(("#", "data:,")) for value in parsed.values(attribute))
    assert not re.search(r"@import|url\((?!#)", page)
    assert "default-src 'none'; img-src data:; style-src 'unsafe-inline'" in parsed.values("content")


def test_names_inside_the_page_are_unique_and_links_lead_somewhere(page):
    parsed = Parsed(page)
    ids = parsed.values("id")
    assert len(ids) == len(set(ids))
    assert {
        value[1:] for value in (*parsed.values("href"), *parsed.values("xlink:href")) if value[0] == "#"
    } <= set(ids)
    assert set(re.findall(r"url\(#(\w+)\)", page)) <= set(ids)


def test_every_process_makes_the_same_bytes(page):
    program = (
        "import sys; from tests.reporting.reports import full_report; from neuronmlp_plugin.reporting.folder "
        "import render_page;"
    )
    program += "sys.stdout.buffer.write(render_page(full_report()).encode())"
    done = subprocess.run(
        [sys.executable, "-c", program],
        capture_output=True,
        cwd=ROOT,
        check=True,
        env={**os.environ, "PYTHONHASHSEED": "7"},
    )
    assert done.stdout.decode() == page


def test_the_headline_says_what_was_removed_and_what_it_cost(page):
    values = [tile.value for tile in view.headline(full_report())]
    assert values == ["20.0%", "x 1.3600", "0.3240", "70.0%"]
    assert all(value in Parsed(page).text for value in values)
    assert "8,184 tokens" in Parsed(page).text


def test_refinement_is_told_where_there_was_one(page):
    assert view.refinement_rows(full_report().refinement)[1] == [
        "Perplexity over dense",
        "x 1.3600",
        "x 1.1800",
    ]
    assert "block reconstruction" in page and "Loss during refinement" in page
    assert 'id="refinement"' not in render_page(plain_report())


def test_a_refinement_that_measured_nothing_still_shows():
    page = render_page(replace(plain_report(), refinement={"method": "distillation"}))
    assert "distillation" in page and "Loss during refinement" not in page


def test_matrices_say_how_they_are_stored():
    rows = view.matrix_rows(full_report())
    assert rows[1] == ["0", "up_proj", "dense", "884,736", "–", "–", "–", "–", "–"]
    assert rows[3][:5] == ["1", "gate_proj", "compact", "852,992", "544"]
    assert len(rows[0]) == len(view.MATRIX_COLUMNS)
    assert rows[4][2] == "compact int8"
    assert view.forms(full_report()) == "69 compact, 2 dense, 1 compact int8"


@pytest.mark.parametrize(
    ("settings", "said"),
    [
        ({}, "for the least predicted loss: what the cuts do to the outputs of the matrices, weighted by"),
        ({"allocation": "uniform", "method": "whitened"}, "whatever its predicted loss: what the cuts do to the outputs of the matrices."),
        ({"allocation": "measured"}, "predicted loss, corrected by what each proved to be worth: what the cuts do to the outputs"),
        ({"allocation": "later"}, "chosen by allocation later"),
    ],
)  # fmt: skip
def test_the_page_says_how_the_ranks_were_really_chosen(settings, said):
    report = plain_report()
    report.block["provenance"] |= settings
    assert said in view.choice(report)


def test_what_every_run_knows_makes_a_page():
    page = render_page(plain_report())
    assert "<h1>tiny</h1>" in page
    assert 'id="samples"' not in page and 'id="spectra"' not in page
    assert page.count("<svg") == 4


def test_a_report_that_was_not_judged_says_so():
    report = replace(plain_report(), quality=None)
    for row in report.matrices:
        row["achieved_error"] = None
    page = render_page(report)
    assert "not measured" in page and 'id="errors"' not in page


def test_a_model_with_every_matrix_dense_has_a_page():
    report = plain_report()
    for row in report.matrices:
        row |= {"form": "dense", "rank": None, "predicted_error": 0.0, "achieved_error": 0.0}
    assert render_page(report).count("<svg") == 1


@pytest.mark.parametrize(
    "key", ["notes", "quality", "loss_by_size", "spectra", "samples", "base", "versions", "refinement"]
)
def test_no_optional_key_is_needed(key):
    report = Report.of({name: value for name, value in full_report().to_json().items() if name != key})
    assert "</html>" in render_page(report)


def test_matrices_that_lose_nothing_can_be_drawn():
    report = full_report()
    for row in report.matrices:
        row |= {"predicted_error": 0.0, "achieved_error": 0.0, "predicted_loss": 0.0}
    report.spectra["layers"] = [{name: [0.0] * 64 for name in layer} for layer in report.spectra["layers"]]
    assert render_page(report).count("<svg") == 8


def test_a_name_that_is_no_unicode_can_be_written(tmp_path):
    report = replace(full_report(), base={"name": "model\udcff"})
    assert "<h1>model?</h1>" in write_page(tmp_path, report).read_text(encoding="utf-8")
    assert "model" in write_card(tmp_path, report).read_text(encoding="utf-8")


def test_what_was_asked_for_is_said():
    target = {"asked": "kl<0.05", "probes": [{}, {}]}
    assert "Asked for kl&lt;0.05: the largest removal" in render_page(replace(full_report(), target=target))
    decode = {"asked": 1.15, "simulated_speedup": 1.1512}
    page = render_page(replace(full_report(), decode=decode, weight_bytes=98.7e6, bytes_ratio=0.62))
    assert "1.15 times faster" in page and "× 1.151 (simulated" in page
    assert "62.0%" in page and "98.7 MB as served" in page


@pytest.mark.parametrize(
    "damage",
    [
        {"block": 3},
        {"matrices": [{}]},
        {"quality": {"num_tokens": 3}},
        {"loss_by_size": [{"removed_ratio": 10**400, "predicted_loss": 1.0}] * 2},
    ],
    ids=["block", "matrices", "quality", "an integer that no float holds"],
)
def test_a_damaged_report_is_refused_by_its_file(tmp_path, damage):
    (tmp_path / "neuronmlp_report.json").write_text(json.dumps(full_report().to_json() | damage))
    with pytest.raises(CheckpointError, match=r"neuronmlp_report\.json: expected a whole report"):
        write_page(tmp_path, read_report(tmp_path))
    assert len(list(tmp_path.iterdir())) == 1


def test_plots_draw_the_numbers_of_the_report():
    report = full_report()
    gate = [row for row in report.matrices if row["projection"] == "gate_proj"]
    line = figures.rank_plot(report).figure.axes[0].lines[0]
    assert list(line.get_ydata()) == [row["rank"] for row in gate]
    assert list(figures.error_plot(report).figure.axes[0].lines[0].get_ydata()) == [
        row["achieved_error"] for row in gate
    ]
    points = figures.agreement_plot(report).figure.axes[0].collections[0].get_offsets()
    assert points.tolist() == [[row["predicted_error"], row["achieved_error"]] for row in gate]
    (x, y), *_ = figures.loss_plot(report).figure.axes[0].collections[0].get_offsets().tolist()
    assert (x, y) == (0.2, pytest.approx(sum(row["predicted_loss"] for row in report.matrices)))


def test_words_under_a_plot_follow_its_numbers():
    report = full_report()
    low = copy.deepcopy(report)
    low.matrices[9] |= {"rank": 7, "achieved_error": 0.9}
    assert "Lowest rank 7 (gate_proj of layer 3)" in figures.rank_plot(low).alt
    assert "2 matrices stayed dense" in figures.rank_plot(low).alt
    assert "0.900, of gate_proj of layer 3" in figures.error_plot(low).alt
    assert "median 1.10" in figures.agreement_plot(report).alt
