from __future__ import annotations

import json

import pytest
import torch

from neuronmlp_plugin.calibration import aside
from neuronmlp_plugin.calibration.text import (
    bos_prefix,
    load_tokenizer,
    read_windows,
    spread,
    token_windows,
    windows_digest,
)
from neuronmlp_plugin.errors import CalibrationError, CheckpointError
from tests.letters import write_tokenizer


def tokenizer(folder, **kwargs):
    from transformers import AutoTokenizer

    write_tokenizer(folder, **kwargs)
    return AutoTokenizer.from_pretrained(folder)


def test_windows_begin_as_the_tokenizer_begins_a_text(tmp_path):
    tok = tokenizer(tmp_path)
    windows = token_windows(['!"#$%', "&'("], tok, 4)
    assert bos_prefix(tok) == [1]
    assert windows.tolist() == [[1, 3, 4, 5], [1, 6, 7, 8]]


def test_a_tokenizer_without_bos_gets_none(tmp_path):
    tok = tokenizer(tmp_path, bos=False)
    assert bos_prefix(tok) == []
    assert token_windows(['!"#$'], tok, 2).tolist() == [[3, 4], [5, 6]]


@pytest.mark.parametrize("bos", [True, False])
def test_a_text_that_brings_its_own_beginning_does_not_begin_twice(tmp_path, bos):
    """Chats rendered beforehand begin with BOS. Where the tokenizer puts none itself, it is part of the text:
    SmolLM2's is the mark before every message.
    """
    windows = token_windows(['<s>!"#', "<s>$%&"], tokenizer(tmp_path, bos=bos), 4)
    assert windows.flatten().tolist() == [1, 3, 4, 5, 1, 6, 7, 8]


def test_too_little_text_for_one_window_is_refused(tmp_path):
    with pytest.raises(
        CalibrationError, match="text: expected at least 99 tokens, which fill one window, found 2"
    ):
        token_windows(["ab"], tokenizer(tmp_path), 100)


def test_reading_stops_at_the_limit(tmp_path):
    taken = []

    def documents():
        for _ in range(1000):
            taken.append(1)
            yield "abcdefgh"

    windows = token_windows(documents(), tokenizer(tmp_path), 5, limit=40)
    assert windows.shape == (10, 5) and len(taken) == 5


def test_a_token_beyond_the_embedding_is_named(tmp_path):
    tok = tokenizer(tmp_path)
    tok.add_tokens(["<extra>"])
    (tmp_path / "a.txt").write_text("abc<extra>defgh")
    with pytest.raises(CalibrationError, match=r"a\.txt: expected token ids below .*'<extra>'"):
        read_windows(tmp_path / "a.txt", tok, 4, 8, vocabulary=len(tok) - 1)
    assert read_windows(tmp_path / "a.txt", tok, 4, 8, vocabulary=len(tok)).shape == (3, 4)


def test_spread_takes_from_all_over_the_text():
    assert spread(torch.arange(10)[:, None], 4)[:, 0].tolist() == [0, 3, 6, 9]
    assert len(spread(torch.arange(3)[:, None], 9)) == 3


def test_the_digest_names_the_tokens():
    a = torch.arange(8).reshape(2, 4)
    assert windows_digest(a) == windows_digest(a.clone()) != windows_digest(a + 1)


def with_rules(folder, **rules):
    """A model's folder whose tokenizer has these parts besides."""
    write_tokenizer(folder)
    path = folder / "tokenizer.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), **rules}))
    return folder


def replaced(pattern, content, kind="String"):
    return {"type": "Replace", "pattern": {kind: pattern}, "content": content}


def test_rules_that_write_without_end_are_refused(tmp_path, monkeypatch):
    monkeypatch.setattr(aside, "LIMIT_S", 1.0)
    rules = [replaced(".", "aaaaaaaaaa", "Regex")] * 11
    folder = with_rules(tmp_path, normalizer={"type": "Sequence", "normalizers": rules})
    with pytest.raises(CheckpointError, match=r"expected a tokenizer .* found: work that did not end in 1 s"):
        load_tokenizer(folder)


def test_rules_that_fail_at_one_text_alone_are_refused_there_and_in_silence(tmp_path, monkeypatch, capfd):
    monkeypatch.setattr(aside, "LIMIT_S", 1.0)
    rules = [replaced("A", "B" * 1000), *[replaced("B", "B" * 10)] * 8]
    tok = load_tokenizer(with_rules(tmp_path, normalizer={"type": "Sequence", "normalizers": rules}))
    with pytest.raises(
        CheckpointError, match="text: expected text that the tokenizer reads, found: work that"
    ):
        token_windows(["abcA"], tok, 4)
    backtracks = {
        "type": "Split",
        "pattern": {"Regex": r"^(([!-~])+)+\s$"},
        "behavior": "Isolated",
        "invert": False,
    }
    tok = load_tokenizer(with_rules(tmp_path, pre_tokenizer=backtracks))
    with pytest.raises(CheckpointError, match="expected text that the tokenizer reads, found"):
        token_windows(["a" * 99 + "("], tok, 4)
    assert capfd.readouterr().err == ""


def test_a_config_that_is_wrong_is_not_said_of_the_tokenizer(tmp_path):
    write_tokenizer(tmp_path)
    (tmp_path / "config.json").write_text('{"model_type": "llama", "eos_token_id": "x"}')
    with pytest.raises(CheckpointError, match=r"config\.json: expected a config that transformers reads"):
        load_tokenizer(tmp_path)
