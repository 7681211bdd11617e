"""Every contradiction that FORMAT.md refuses, in words."""

from __future__ import annotations

import copy

import pytest

from neuronmlp_plugin.checkpoint.schema import FormatBlock, parse_block
from neuronmlp_plugin.errors import CheckpointError, FormatVersionError
from tests.tiny_models import MIXED_LAYERS, SHAPE

CONFIG = {"hidden_size": 128, "intermediate_size": 192, "num_hidden_layers": 3}
BLOCK = FormatBlock(MIXED_LAYERS, SHAPE, {"text": "x"}, "neuronmlp tests").to_json()


def test_a_block_survives_its_own_json():
    parsed = parse_block(BLOCK, CONFIG, "config.json")
    assert parsed.to_json() == BLOCK
    assert parsed.layers == MIXED_LAYERS


def test_the_ratio_counts_every_form():
    dense, uv, compact = 128 * 192, 21 * 320, 37 * (320 - 37)
    expected = compact + uv + dense + dense + 32 * 288 + 45 * 275 + 30 * 320 + dense + 33 * 320
    assert BLOCK["removed_ratio"] == pytest.approx(1 - expected / (9 * dense), abs=1e-6)


def edited(path: list, value):
    block = copy.deepcopy(BLOCK)
    target = block
    for key in path[:-1]:
        target = target[key]
    target[path[-1]] = value
    return block


@pytest.mark.parametrize(
    ("path", "value", "message"),
    [
        (["removed_ratio"], 0.9, "removed_ratio"),
        (["removed_ratio"], None, "removed_ratio"),
        (["layers"], BLOCK["layers"][:2], "expected `layers` with 3 entries"),
        (
            ["layers", 0],
            {"gate_proj": {"form": "dense"}},
            r"layers\[0\]: expected exactly gate_proj, up_proj, down_proj",
        ),
        (["layers", 1, "up_proj", "form"], "tucker", "expected a form of dense, uv, compact, found 'tucker'"),
        (["layers", 1, "gate_proj"], {"form": "dense", "rank": 3}, "expected no rank for a dense matrix"),
        (
            ["layers", 1, "up_proj", "rank"],
            128,
            "expected a rank from 1 to 127 for compact of 192 x 128, found 128",
        ),
        (["layers", 0, "up_proj", "rank"], 129, "expected a rank from 1 to 128 for uv"),
        (["layers", 0, "up_proj", "rank"], 0, "found 0"),
        (["layers", 0, "up_proj", "rank"], True, "found True"),
        (["layers", 0, "up_proj", "rank"], "21", "found '21'"),
    ],
)
def test_contradictions_are_refused(path, value, message):
    with pytest.raises(CheckpointError, match=message):
        parse_block(edited(path, value), CONFIG, "config.json")


@pytest.mark.parametrize("version", [0, 2, "1", None])
def test_another_version_is_refused_and_named(version):
    with pytest.raises(FormatVersionError, match=f"expected neuronmlp format_version 1, found {version!r}"):
        parse_block(edited(["format_version"], version), CONFIG, "config.json")


@pytest.mark.parametrize("key", list(CONFIG))
def test_a_config_without_sizes_is_refused(key):
    with pytest.raises(CheckpointError, match=f"positive integer `{key}`"):
        parse_block(BLOCK, {**CONFIG, key: None}, "config.json")
