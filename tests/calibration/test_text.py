from __future__ import annotations

import json

import pytest
import torch

from neuronmlp_plugin.calibration.text import (
    bos_prefix,
    read_documents,
    spread,
    token_windows,
    windows_digest,
)
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


def test_too_little_text_for_one_window_is_refused(tmp_path):
    with pytest.raises(
        CalibrationError, match="text: expected at least 99 tokens, which fill one window, found 2"
    ):
        token_windows(["ab"], tokenizer(tmp_path), 100)


def test_text_jsonl_and_chat_are_read(tmp_path):
    tok = tokenizer(tmp_path)
    (tmp_path / "a.txt").write_text("one\ntwo")
    assert read_documents(tmp_path / "a.txt", tok) == ["one\ntwo"]
    lines = [{"text": "x"}, {"messages": [{"role": "user", "content": "y"}]}]
    (tmp_path / "b.jsonl").write_text("\n".join(map(json.dumps, lines)) + "\n\n")
    assert read_documents(tmp_path / "b.jsonl", tok) == ["x", "user:y;"]


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ("{", "b.jsonl:1: expected one JSON object"),
        ('{"body": "x"}', "expected a `text` string or a `messages` list"),
        ("3", "found 3"),
    ],
)
def test_a_bad_line_is_named(tmp_path, content, message):
    (tmp_path / "b.jsonl").write_text(content)
    with pytest.raises(CalibrationError, match=message):
        read_documents(tmp_path / "b.jsonl", tokenizer(tmp_path))


@pytest.mark.parametrize(("name", "content"), [("a.txt", "one"), ("b.jsonl", '{"text": "one"}')])
def test_a_byte_order_mark_is_no_text(tmp_path, name, content):
    (tmp_path / name).write_text(content, encoding="utf-8-sig")
    assert read_documents(tmp_path / name, tokenizer(tmp_path)) == ["one"]


def test_lines_end_at_newlines_alone(tmp_path):
    texts = ["one\u2028two", "a\x85b", "c\x0bd\x1ce"]
    (tmp_path / "b.jsonl").write_text(
        "\r\n".join(json.dumps({"text": text}, ensure_ascii=False) for text in texts), newline=""
    )
    assert read_documents(tmp_path / "b.jsonl", tokenizer(tmp_path)) == texts


def test_a_chat_that_the_template_refuses_is_named(tmp_path):
    tok = tokenizer(tmp_path)
    tok.chat_template = "{{ raise_exception('roles must alternate') }}"
    (tmp_path / "b.jsonl").write_text(json.dumps({"messages": [{"role": "user", "content": "y"}]}))
    with pytest.raises(CalibrationError, match=r"b\.jsonl:1: expected messages .*roles must alternate"):
        read_documents(tmp_path / "b.jsonl", tok)


def test_unreadable_files_are_named(tmp_path):
    (tmp_path / "latin.txt").write_bytes(b"caf\xe9")
    for name in ("latin.txt", "absent.txt"):
        with pytest.raises(CalibrationError, match=name):
            read_documents(tmp_path / name, None)


def test_a_chat_needs_a_template(tmp_path):
    tok = tokenizer(tmp_path)
    tok.chat_template = None
    (tmp_path / "b.jsonl").write_text('{"messages": []}')
    with pytest.raises(CalibrationError, match="chat template"):
        read_documents(tmp_path / "b.jsonl", tok)


def test_spread_takes_from_all_over_the_text():
    assert spread(torch.arange(10)[:, None], 4)[:, 0].tolist() == [0, 3, 6, 9]
    assert len(spread(torch.arange(3)[:, None], 9)) == 3


def test_the_digest_names_the_tokens():
    a = torch.arange(8).reshape(2, 4)
    assert windows_digest(a) == windows_digest(a.clone()) != windows_digest(a + 1)
