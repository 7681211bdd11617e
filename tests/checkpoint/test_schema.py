"""Every contradiction that FORMAT.md refuses, in words."""

from __future__ import annotations

import copy
import dataclasses

import pytest

from neuronmlp_plugin.checkpoint.schema import FormatBlock, parse_block
from neuronmlp_plugin.errors import CheckpointError, FormatVersionError
from neuronmlp_plugin.models.factors import DENSE, MLPLayer
from tests.tiny_models import MIXED_LAYERS, SHAPE, grouped_layers

CONFIG = {"hidden_size": 128, "intermediate_size": 192, "num_hidden_layers": 3}
BLOCK = FormatBlock(MIXED_LAYERS, SHAPE, {"text": "x"}, "neuronmlp tests").to_json()
GROUPED = FormatBlock(grouped_layers(4), SHAPE).to_json()


def test_a_block_survives_its_own_json():
    parsed = parse_block(BLOCK, CONFIG, "config.json")
    assert parsed.to_json() == BLOCK
    assert parsed.layers == MIXED_LAYERS


def test_the_ratio_counts_every_form():
    dense, uv, compact = 128 * 192, 21 * 320, 37 * (320 - 37)
    expected = compact + uv + dense + dense + 32 * 288 + 45 * 275 + 30 * 320 + dense + 33 * 320
    assert BLOCK["removed_ratio"] == pytest.approx(1 - expected / (9 * dense), abs=1e-6)


def test_groups_and_kept_channels_survive_too():
    parsed = parse_block(GROUPED, CONFIG, "config.json")
    assert (parsed.layers, parsed.to_json()) == (grouped_layers(4), GROUPED)
    assert (GROUPED["groups"], GROUPED["format_version"]) == (4, 1)
    assert [layer.get("intermediate_size") for layer in GROUPED["layers"]] == [None, 128, 64]
    assert parsed.full_speed_sizes == [1, 2, 4]


def test_the_ratio_counts_groups_and_removed_channels():
    """Against the base model's I: a group of R has R (H + k/g) numbers, R^2 fewer where it is compact."""
    first = 4 * (11 * (128 + 48 - 11) + 9 * (128 + 48) + 13 * (128 + 48 - 13))
    second = 128 * 128 + 4 * (7 * (128 + 32 - 7) + 9 * (128 + 32))
    expected = 1 - (first + second + 3 * 128 * 64) / (9 * 128 * 192)
    assert GROUPED["removed_ratio"] == pytest.approx(expected, abs=1e-6)


@pytest.mark.parametrize(
    ("sizes", "ordinary"), [((64, 64, 64), 64), ((64, 64, 128), None), ((192, 192, 192), None)]
)
def test_a_folder_needs_no_block_where_all_is_dense_and_equally_narrow(sizes, ordinary):
    layers = tuple(MLPLayer(128, size, DENSE, DENSE, DENSE) for size in sizes)
    assert FormatBlock(layers, SHAPE).ordinary_size == ordinary
    rounded = layers[0].with_specs({"up_proj": dataclasses.replace(DENSE, dtype="int8")})
    assert FormatBlock((rounded, *layers[1:]), SHAPE).ordinary_size is None


def edited(path: list, value, block=BLOCK):
    block = copy.deepcopy(block)
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


@pytest.mark.parametrize(
    ("path", "value", "message"),
    [
        (["groups"], None, "expected `groups` from 1 to the 192 channels, found None"),
        (["groups"], 0, "expected `groups` .*found 0"),
        (["groups"], True, "expected `groups` .*found True"),
        (["groups"], 5, r"layers\[0\]: expected intermediate_size .*that 5 groups divide, found 192"),
        (
            ["groups"],
            16,
            r"layers\[0\]\.down_proj: expected a rank from 1 to 11 for compact of 128 x 192 in 16 groups, "
            r"found 13",
        ),
        (["layers", 1, "intermediate_size"], 200, r"layers\[1\]: expected intermediate_size from 1 to 192"),
        (["layers", 1, "intermediate_size"], 126, "that 4 groups divide, found 126"),
        (["layers", 1, "intermediate_size"], "128", "found '128'"),
        (["layers", 1, "intermediate_size"], 120, "removed_ratio"),
        (
            ["layers", 1, "up_proj", "rank"],
            32,
            "expected a rank from 1 to 31 for compact of 128 x 128 in 4 groups, found 32",
        ),
        (["layers", 1, "down_proj", "rank"], 33, "expected a rank from 1 to 32 for uv"),
        (["layers", 1, "channels"], 128, "expected exactly gate_proj, up_proj, down_proj"),
    ],
)
def test_contradictions_of_groups_and_channels_are_refused(path, value, message):
    with pytest.raises(CheckpointError, match=message):
        parse_block(edited(path, value, GROUPED), CONFIG, "config.json")


@pytest.mark.parametrize("version", [0, 2, "1", None])
def test_another_version_is_refused_and_named(version):
    with pytest.raises(FormatVersionError, match=f"expected neuronmlp format_version 1, found {version!r}"):
        parse_block(edited(["format_version"], version), CONFIG, "config.json")


@pytest.mark.parametrize("key", list(CONFIG))
def test_a_config_without_sizes_is_refused(key):
    with pytest.raises(CheckpointError, match=f"whole number `{key}`"):
        parse_block(BLOCK, {**CONFIG, key: None}, "config.json")
