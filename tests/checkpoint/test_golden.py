"""The committed folders of format version 1 are read as they were meant, and written again byte for byte."""

from __future__ import annotations

import json

import pytest
import torch
from safetensors.torch import load_file

from neuronmlp_plugin.checkpoint.reader import Checkpoint
from neuronmlp_plugin.checkpoint.writer import write_layer, write_rest
from tests.checkpoint.golden import FOLDERS, GOLDEN, LOGITS, PROMPT, logits_of


def test_every_golden_folder_is_there():
    assert sorted(path.name for path in GOLDEN.iterdir()) == sorted(FOLDERS)


@pytest.mark.parametrize("name", FOLDERS)
def test_a_golden_folder_is_read_as_it_was_meant(name):
    block = Checkpoint(GOLDEN / name).block
    assert block.layers == FOLDERS[name]
    expected = torch.tensor(json.loads((GOLDEN / name / LOGITS).read_text()))
    assert expected.shape == (len(PROMPT), 12) and float(expected.std()) > 1.0
    torch.testing.assert_close(torch.tensor(logits_of(GOLDEN / name)), expected, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("name", FOLDERS)
def test_a_golden_folder_is_written_again_byte_for_byte(name, tmp_path):
    base = Checkpoint(GOLDEN / name)
    raw = {n: t for path in base.folder.glob("*.safetensors") for n, t in load_file(path).items()}
    for index in range(len(base.block.layers)):
        mine = f"model.layers.{index}.mlp."
        write_layer(tmp_path, base, index, {n: t for n, t in raw.items() if n.startswith(mine)})
    write_rest(tmp_path, base, base.block)
    written = {path.name: path.read_bytes() for path in tmp_path.iterdir()}
    golden = {path.name: path.read_bytes() for path in base.folder.iterdir() if path.name != LOGITS}
    assert written == golden
