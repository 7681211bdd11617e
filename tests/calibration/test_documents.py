from __future__ import annotations

import gzip
import json

import pytest

from neuronmlp_plugin.calibration.documents import BLOCK
from neuronmlp_plugin.calibration.text import read_documents
from neuronmlp_plugin.errors import CalibrationError
from tests.calibration.test_text import tokenizer


def read(path, tok=None):
    return read_documents(path, tok)


def test_text_jsonl_and_chat_are_read(tmp_path):
    tok = tokenizer(tmp_path)
    (tmp_path / "a.txt").write_text("one\ntwo")
    assert read(tmp_path / "a.txt", tok) == ["one\ntwo"]
    lines = [{"text": "x"}, {"messages": [{"role": "user", "content": "y"}]}]
    (tmp_path / "b.jsonl").write_text("\n".join(map(json.dumps, lines)) + "\n\n")
    assert read(tmp_path / "b.jsonl", tok) == ["x", "user:y;"]


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
        read(tmp_path / "b.jsonl", tokenizer(tmp_path))


@pytest.mark.parametrize(("name", "content"), [("a.txt", "one"), ("b.jsonl", '{"text": "one"}')])
def test_a_byte_order_mark_is_no_text(tmp_path, name, content):
    (tmp_path / name).write_text(content, encoding="utf-8-sig")
    assert read(tmp_path / name, tokenizer(tmp_path)) == ["one"]


def test_lines_end_at_newlines_alone(tmp_path):
    texts = ["one\u2028two", "a\x85b", "c\x0bd\x1ce"]
    (tmp_path / "b.jsonl").write_text(
        "\r\n".join(json.dumps({"text": text}, ensure_ascii=False) for text in texts), newline=""
    )
    assert read(tmp_path / "b.jsonl", tokenizer(tmp_path)) == texts


@pytest.mark.parametrize(("bos", "text"), [(True, "y"), (False, "<s>y")])
def test_a_chat_does_not_bring_the_beginning_that_the_tokenizer_puts(tmp_path, bos, text):
    tok = tokenizer(tmp_path, bos=bos)
    tok.chat_template = "{{ bos_token }}{{ messages[0].content }}"
    (tmp_path / "b.jsonl").write_text(json.dumps({"messages": [{"role": "user", "content": "y"}]}))
    assert read(tmp_path / "b.jsonl", tok) == [text]


def test_a_chat_that_the_template_refuses_is_named(tmp_path):
    tok = tokenizer(tmp_path)
    tok.chat_template = "{{ raise_exception('roles must alternate') }}"
    (tmp_path / "b.jsonl").write_text(json.dumps({"messages": [{"role": "user", "content": "y"}]}))
    with pytest.raises(CalibrationError, match=r"b\.jsonl:1: expected messages .*roles must alternate"):
        read(tmp_path / "b.jsonl", tok)


def test_unreadable_files_are_named(tmp_path):
    (tmp_path / "latin.txt").write_bytes(b"caf\xe9")
    for name in ("latin.txt", "absent.txt"):
        with pytest.raises(CalibrationError, match=name):
            read(tmp_path / name, None)


def test_a_chat_needs_a_template(tmp_path):
    tok = tokenizer(tmp_path)
    tok.chat_template = None
    (tmp_path / "b.jsonl").write_text('{"messages": []}')
    with pytest.raises(CalibrationError, match="chat template"):
        read(tmp_path / "b.jsonl", tok)


CHAT = [{"role": "user", "content": "y"}]


@pytest.mark.parametrize(
    ("name", "content"),
    [
        ("a.ndjson", '{"text": "x"}\n'),
        ("a.JSONL", '{"text": "x"}\n'),
        ("a.jsonlines", '{"text": "x"}\n'),
        ("a.json", '[{"text": "x"}]'),
        ("a.csv", 'id,text\n0,"x"\n'),
        ("a.tsv", "text\tid\nx\t0\n"),
        ("a.md", "x"),
        ("a", "x"),
    ],
)
def test_files_by_their_endings(tmp_path, name, content):
    (tmp_path / name).write_text(content)
    assert read(tmp_path / name) == ["x"]


def test_a_cell_may_be_longer_than_the_csv_library_allows_by_itself(tmp_path):
    (tmp_path / "a.csv").write_text("text\n" + "x" * 200_000 + "\n")
    assert [len(text) for text in read(tmp_path / "a.csv")] == [200_000]


@pytest.mark.parametrize(
    "chat",
    [
        {"messages": CHAT},
        {"messages": [{"role": "user", "content": [{"type": "text", "text": "y"}]}]},
        {"conversations": [{"from": "human", "value": "y"}]},
        {"messages": [{"from": "human", "value": "y"}]},
    ],
)
def test_chats_of_every_shape_are_the_same_text(tmp_path, chat):
    (tmp_path / "a.jsonl").write_text(json.dumps(chat))
    assert read(tmp_path / "a.jsonl", tokenizer(tmp_path)) == ["user:y;"]


@pytest.mark.parametrize(
    ("entry", "message"),
    [
        ({"messages": ["hi"]}, "each message to be an object with role and content, found 'hi'"),
        ({"messages": [{"role": "user"}]}, "content NoneType"),
        ({"messages": [{"role": 3, "content": "y"}]}, "role '3'"),
        ({"messages": [{"role": "user", "content": [{"type": "image"}]}]}, "of type text, found image"),
        ({"text": None}, "found {'text': 'NoneType'}"),
        ({"text": 5}, "found {'text': 'int'}"),
    ],
)
def test_what_is_no_document_is_refused_by_its_line(tmp_path, entry, message):
    (tmp_path / "a.jsonl").write_text(json.dumps({"text": "x"}) + "\n" + json.dumps(entry))
    with pytest.raises(CalibrationError) as caught:
        read(tmp_path / "a.jsonl", tokenizer(tmp_path))
    assert "a.jsonl:2: " in str(caught.value) and message in str(caught.value)


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("a.csv", "id,body\n0,x\n", "expected a column `text` in the first line, found \\['id', 'body'\\]"),
        ("a.json", '[{"text": "x"}', "expected a JSON list of objects, found: Expecting value"),
        ("a.json", '[{"text": "x"}, {"t', "expected a JSON list of objects, found: Unterminated string"),
        ("a.json", '{\n"text": "x"}', "a.json:1: expected a JSON list of objects, or one object a line"),
        ("a.txt", '{"text": "x"}\n', "a.txt: expected plain text, .* found JSON objects; name it .jsonl"),
        ("a", '{"text": "x"}\n', "a: expected plain text"),
        ("a.txt", "x\0y\0", "a.txt: expected UTF-8 text, found zero bytes"),
        ("a.jsonl.zst", "\x28\xb5\x2f\xfd", "found a file of zstd; unpack"),
        ("a.txt", "PAR1\x15", "found a file of parquet"),
        ("a.jsonl", "\xff\xfe{\0", "found a file of UTF-16"),
        ("a.txt.gz", "\x1f\x8b\x08", "a.txt.gz: expected UTF-8 text, found: Compressed file ended"),
        ("a.parquet", "PAR1", "a.parquet: expected"),
    ],
)
def test_a_damaged_or_foreign_file_is_named(tmp_path, name, content, message):
    (tmp_path / name).write_bytes(content.encode("latin-1"))
    with pytest.raises(CalibrationError, match=message):
        read(tmp_path / name)


def test_parquet_and_saved_datasets_are_read_by_their_libraries(tmp_path):
    datasets = pytest.importorskip("datasets")
    rows = datasets.Dataset.from_dict({"text": ["x", "y"], "id": [0, 1]})
    rows.to_parquet(tmp_path / "a.parquet")
    rows.save_to_disk(tmp_path / "folder")
    datasets.DatasetDict({"train": rows}).save_to_disk(tmp_path / "split")
    for name in ("a.parquet", "folder", "split"):
        assert read(tmp_path / name) == ["x", "y"]


def test_a_folder_that_is_no_dataset_is_refused(tmp_path):
    with pytest.raises(
        CalibrationError, match=r"expected (the package datasets|a folder that `datasets` saved)"
    ):
        read(tmp_path)


@pytest.mark.parametrize(
    "template", ["{{ 1 / 0 }}", "{{ messages.x.y.z }}", "{% for i in range(10 ** 9) %}{% endfor %}"]
)
def test_a_template_that_fails_is_named_whatever_it_raises(tmp_path, template):
    tok = tokenizer(tmp_path)
    tok.chat_template = template
    (tmp_path / "b.jsonl").write_text(json.dumps({"messages": CHAT}))
    with pytest.raises(CalibrationError, match="expected messages that the model's chat template takes"):
        read(tmp_path / "b.jsonl", tok)


def test_a_long_text_comes_in_blocks_and_whole(tmp_path):
    text = "".join(f"line {number}\n" for number in range(200_000))
    (tmp_path / "a.txt").write_text(text)
    blocks = read(tmp_path / "a.txt")
    assert len(blocks) == 3 and "".join(blocks) == text and all(b.endswith("\n") for b in blocks)


@pytest.mark.parametrize("name", ["a.txt", "a.jsonl", "a.json"])
def test_a_text_of_one_line_comes_in_parts(tmp_path, name):
    text = "x" * (2 * BLOCK + 5)
    content = {
        "a.txt": text,
        "a.jsonl": json.dumps({"text": text}),
        "a.json": json.dumps([{"text": text}] * 2),
    }
    (tmp_path / name).write_text(content[name])
    parts = read(tmp_path / name)
    assert max(map(len, parts)) == BLOCK and "".join(parts) == text * (2 if name == "a.json" else 1)


@pytest.mark.parametrize("ending", ["txt", "jsonl", "csv"])
def test_what_gzip_packed_is_unpacked(tmp_path, ending):
    content = {"txt": "x", "jsonl": '{"text": "x"}', "csv": "text\nx\n"}[ending]
    (tmp_path / f"a.{ending}.gz").write_bytes(gzip.compress(content.encode()))
    assert read(tmp_path / f"a.{ending}.gz") == ["x"]


def test_half_a_surrogate_pair_becomes_a_question_mark(tmp_path):
    (tmp_path / "a.jsonl").write_text('{"text": "a\\ud83d b \\ud83d\\ude00"}')
    assert read(tmp_path / "a.jsonl") == ["a? b \N{GRINNING FACE}"]
