from __future__ import annotations

import pytest
import torch

from neuronmlp_plugin.calibration.text import bos_prefix, read_windows, spread, token_windows, windows_digest
from neuronmlp_plugin.errors import CalibrationError
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
