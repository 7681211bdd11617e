"""The model card: front matter that Hugging Face reads, the base's license, and nothing that a name can
break.
"""

from __future__ import annotations

import os
import pathlib
from dataclasses import replace

import pytest
from huggingface_hub import metadata_load

from neuronmlp_plugin.reporting.folder import base_facts, render_card
from neuronmlp_plugin.reporting.run_report import Report
from tests.reporting.reports import SCRIPT, full_report, plain_report


def front_matter(tmp_path: pathlib.Path, report: Report) -> dict:
    path = tmp_path / "README.md"
    path.write_text(render_card(report), encoding="utf-8")
    return metadata_load(path)


def test_front_matter_says_what_it_is_made_of(tmp_path):
    found = front_matter(tmp_path, full_report())
    assert found["base_model"] == SCRIPT and found["license"] == "apache-2.0"
    assert found["library_name"] == "neuronmlp" and {"neuronmlp", "low-rank"} <= set(found["tags"])


def test_no_license_is_made_up(tmp_path):
    assert "license" not in front_matter(tmp_path, plain_report())


def test_a_name_cannot_become_markup():
    body = render_card(replace(full_report(), base={"name": "a `b` [c](d) <script> | *e*"})).split("---\n")[2]
    assert "# a \\`b\\` \\[c\\]\\(d\\) \\<script\\> \\| \\*e\\*," in body
    assert "<script>" not in body


def test_the_card_links_the_page_and_gives_the_numbers():
    card = render_card(full_report())
    assert "(neuronmlp_report.html)" in card
    assert (
        "x 1.3600" in card and "98,304 tokens" in card and "Refined afterwards: block reconstruction" in card
    )
    assert "vllm serve DIR" in card


def test_a_factor_file_is_served_beside_its_model():
    report = full_report()
    report.block["provenance"]["factors_only"] = True
    assert "vllm serve MODEL --quantization neuronmlp" in render_card(report)


@pytest.mark.parametrize(
    ("readme", "expected"),
    [
        ("---\nlicense: other\nlicense_name: llama3.1\ntags: [x]\n---\n# Base", {"license": "other", "license_name": "llama3.1"}),
        ("# Base without front matter", {}),
        ("---\nlicense: [unclosed\n---\n", {}),
        ("---\n- a list\n---\n", {}),
        (None, {}),
    ],
    ids=["stated", "no front matter", "broken", "a list", "no card"],
)  # fmt: skip
def test_the_license_is_the_one_that_the_base_states(tmp_path, readme, expected):
    (tmp_path / "config.json").write_text("{}")
    if readme is not None:
        (tmp_path / "README.md").write_text(readme)
    assert base_facts(tmp_path) == {"name": tmp_path.name, "license": expected}


def test_a_folder_of_the_hub_cache_is_called_by_its_repository(tmp_path):
    folder = tmp_path / "models--owner--some-model" / "snapshots" / "0123abcd"
    assert base_facts(folder)["name"] == "owner/some-model"


def test_an_ordinary_folder_is_told_to_need_nothing_of_ours():
    report = replace(full_report(), ordinary=True)
    for row in report.matrices:
        row |= {"form": "dense", "rank": None, "channels": 1152}
    card = render_card(report)
    assert "any engine loads it" in card and "keep 1152 of their channels" in card
    assert "vllm serve" not in card and "low-rank factors" not in card


@pytest.mark.parametrize(
    "card", ["---\nlicense: " + "[" * 50_000 + "\n---\n", "---\nlicense: !!timestamp x\n---\n", "x" * 10**6]
)
def test_a_card_of_the_base_that_is_none_states_nothing_and_ends_nothing(tmp_path, card):
    (tmp_path / "config.json").write_text("{}")
    (tmp_path / "README.md").write_text(card)
    assert base_facts(tmp_path)["license"] == {}
    (tmp_path / "README.md").unlink()
    os.mkfifo(tmp_path / "README.md")
    assert base_facts(tmp_path)["license"] == {}
