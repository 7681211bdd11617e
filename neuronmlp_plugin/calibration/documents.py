"""Text files as people have them, in; documents out, one at a time, so that no file has to fit in memory.

| file | documents |
|---|---|
| `.txt`, `.md` and every unknown ending | the whole text |
| `.jsonl`, `.ndjson`, `.jl` | one a line: an object with `text`, `messages` or `conversations` |
| `.json` | the same, one object a line or one list of objects |
| `.csv`, `.tsv` | the column `text` |
| `.parquet` | the column `text`, `messages` or `conversations` (needs pyarrow) |
| a folder | a dataset that `datasets` saved there with `save_to_disk` (needs datasets) |

Endings are compared without case, and `.gz` may follow them. A chat is rendered with the tokenizer's own
template. A document of more than a million characters comes in parts.
"""

from __future__ import annotations

import csv
import gzip
import io
import json
import os
import pathlib
import re
import zlib
from collections.abc import Callable, Iterator
from typing import Any

from neuronmlp_plugin.calibration.template import ChatTemplate
from neuronmlp_plugin.errors import CalibrationError, reason_of

BLOCK = 1 << 20  # characters: tokenizers take a hundred bytes for each of a text that they see at once
LONGEST_ENTRY = 1 << 26  # characters of one object in a JSON list
JSON_LINES = (".jsonl", ".ndjson", ".jl", ".jsonlines")
# What files that are no text begin with, whatever they are called.
_KINDS = {
    b"\x28\xb5\x2f\xfd": "zstd",
    b"BZh91AY": "bzip2",
    b"\xfd7zXZ": "xz",
    b"PK\3\4": "zip",
    b"PAR1": "parquet",
    b"%PDF": "PDF",
    b"\xff\xfe": "UTF-16",
    b"\xfe\xff": "UTF-16",
}
CHATS = ("messages", "conversations")
# ShareGPT's names for who speaks, and the usual ones.
ROLES = {"human": "user", "gpt": "assistant", "chatgpt": "assistant", "bing": "assistant"}


def documents_of(path: str | pathlib.Path, tokenizer: Any) -> Iterator[str]:
    """The documents of a file or folder, in its order. `tokenizer` renders chats.

    Raises CalibrationError, at the document that cannot be read, with the file and the line or row.
    """
    path = pathlib.Path(path)
    for document in _documents(path, tokenizer):
        # Half of a surrogate pair, which JSON can hold and no tokenizer takes, becomes a question mark.
        text = document.encode(errors="replace").decode()
        yield from (text[start : start + BLOCK] for start in range(0, len(text), BLOCK))


def _documents(path: pathlib.Path, tokenizer: Any) -> Iterator[str]:
    ending = pathlib.PurePath(path.name.lower().removesuffix(".gz")).suffix
    if os.path.isdir(path):
        entries = _dataset_rows(path)
    elif ending == ".parquet":
        entries = _parquet_rows(path)
    elif ending in (".csv", ".tsv"):
        entries = _table_rows(path, "\t" if ending == ".tsv" else ",")
    elif ending in (*JSON_LINES, ".json"):
        entries = _json_entries(path, may_be_list=ending == ".json")
    else:
        yield from _blocks(path)
        return
    template = ChatTemplate(tokenizer)
    for where, entry in entries:
        yield _document(entry, where, template)


def _opened(path: pathlib.Path) -> io.TextIOWrapper:
    """The file as UTF-8 text; some editors begin it with a mark of its byte order, which is no text."""
    try:
        file = io.BufferedReader(io.FileIO(path))
        beginning = file.peek(8)  # not read: a pipe gives everything once
    except OSError as error:
        raise CalibrationError(
            f"{path}: expected a readable text file, found: {reason_of(error)}; check the path."
        ) from error
    kind = next((kind for start, kind in _KINDS.items() if beginning.startswith(start)), None)
    if kind is not None:
        raise CalibrationError(
            f"{path}: expected UTF-8 text, found a file of {kind}; unpack or convert it, or name it by its "
            "own ending."
        )
    packed = beginning.startswith(b"\x1f\x8b")
    # Lines end at newlines alone: JSON strings may hold U+2028 and its like as they are.
    return io.TextIOWrapper(gzip.GzipFile(fileobj=file) if packed else file, "utf-8-sig", newline="\n")


def _parts(path: pathlib.Path, read: Callable[..., str], size: int = -1) -> Iterator[str]:
    """What `read`, a method of text files, gives again and again, until there is no more."""
    with _opened(path) as file:
        try:
            while part := read(file, size):
                if "\0" in part:
                    raise CalibrationError(
                        f"{path}: expected UTF-8 text, found zero bytes, as of a binary file or of UTF-16; "
                        "convert it, for example with iconv."
                    )
                yield part
        except (UnicodeDecodeError, OSError, EOFError, zlib.error) as error:
            raise CalibrationError(
                f"{path}: expected UTF-8 text, found: {error}; convert the file, for example with iconv."
            ) from error


def _lines(path: pathlib.Path) -> Iterator[str]:
    return _parts(path, io.TextIOWrapper.readline)


def _blocks(path: pathlib.Path) -> Iterator[str]:
    """A plain text, cut at line ends where it is long."""
    block: list[str] = []
    size = 0
    for number, line in enumerate(_parts(path, io.TextIOWrapper.readline, BLOCK)):  # it may be all one line
        if number == 0:
            _check_plain(line, path)
        if size + len(line) > BLOCK:
            yield "".join(block)
            block, size = [], 0
        block.append(line)
        size += len(line)
    yield "".join(block)


def _check_plain(line: str, path: pathlib.Path) -> None:
    """CalibrationError where the first line of a text is a JSON object: braces and keys are not the text."""
    try:
        is_object = line.startswith("{") and isinstance(json.loads(line), dict)
    except (ValueError, RecursionError):
        return
    if is_object:
        raise CalibrationError(
            f"{path}: expected plain text, as its ending says, found JSON objects; name it .jsonl."
        )


Entries = Iterator[tuple[str, Any]]  # where it stands, and what stands there


def _json_entries(path: pathlib.Path, may_be_list: bool) -> Entries:
    if may_be_list and _begins_a_list(path):
        yield from ((f"{path}: entry {n}", value) for n, value in enumerate(_listed(path), start=1))
        return
    expected = "a JSON list of objects, or one object a line" if may_be_list else "one JSON object a line"
    for number, line in enumerate(_lines(path), start=1):
        if line.strip():
            where = f"{path}:{number}"
            try:
                yield where, json.loads(line)
            except (ValueError, RecursionError) as error:
                raise CalibrationError(f"{where}: expected {expected}, found: {error}.") from error


def _listed(path: pathlib.Path) -> Iterator[Any]:
    """The entries of a JSON list, one at a time: all together would take several times the file's size."""
    decode, between = json.JSONDecoder().raw_decode, re.compile(r"[\s,]*")
    text, at, found = "", 0, "no end"
    for part in _parts(path, io.TextIOWrapper.read, BLOCK):
        text = text[at:] + part if text else part.lstrip()[1:]
        at = 0
        if len(text) > LONGEST_ENTRY:
            found = f"an entry of more than {LONGEST_ENTRY:,} characters"
            break
        while True:
            at = between.match(text, at).end()  # type: ignore[union-attr]
            if text[at : at + 1] == "]":
                return
            try:
                value, at = decode(text, at)
            except (ValueError, RecursionError) as error:
                # Unless the entry goes on in the next part. What follows the colon are places in this one.
                found = str(error).partition(":")[0]
                break
            yield value
    raise CalibrationError(f"{path}: expected a JSON list of objects, found: {found}.")


def _begins_a_list(path: pathlib.Path) -> bool:
    beginnings = _parts(path, io.TextIOWrapper.readline, 80)  # all of a list may be one line
    return next((part.lstrip() for part in beginnings if part.strip()), "").startswith("[")


def _table_rows(path: pathlib.Path, delimiter: str) -> Entries:
    csv.field_size_limit(1 << 30)  # a document is longer than the 128 KiB that the library allows by itself
    rows = csv.DictReader(_lines(path), delimiter=delimiter)
    try:
        if "text" not in (rows.fieldnames or ()):
            raise CalibrationError(
                f"{path}: expected a column `text` in the first line, found "
                f"{str(list(rows.fieldnames or ()))[:200]}; rename the column that holds the text."
            )
        for row in rows:
            yield f"{path}:{rows.line_num}", {"text": row["text"]}
    except csv.Error as error:
        raise CalibrationError(
            f"{path}:{rows.line_num}: expected a row of a table, found: {error}."
        ) from error


def _parquet_rows(path: pathlib.Path) -> Entries:
    try:
        from pyarrow import parquet
    except ImportError as error:
        raise CalibrationError(
            f"{path}: expected pyarrow to read a parquet file, found none; pip install pyarrow."
        ) from error
    try:
        file = parquet.ParquetFile(path)
        columns = _columns(file.schema_arrow.names, str(path))
        number = 0
        for batch in file.iter_batches(batch_size=256, columns=columns):
            for row in batch.to_pylist():
                number += 1
                yield f"{path}: row {number}", row
    except (OSError, ValueError) as error:  # pyarrow's own errors are ValueErrors
        raise CalibrationError(
            f"{path}: expected a whole parquet file, found: {reason_of(error)}."
        ) from error


def _dataset_rows(path: pathlib.Path) -> Entries:
    try:
        import datasets
    except ImportError as error:
        raise CalibrationError(
            f"{path}: expected the package datasets to read a folder of text, found none; "
            "pip install datasets, or name a file."
        ) from error
    try:
        found = datasets.load_from_disk(str(path))
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise CalibrationError(
            f"{path}: expected a folder that `datasets` saved with save_to_disk, found: {reason_of(error)}; "
            "save it so, or name a file."
        ) from error
    if isinstance(found, datasets.DatasetDict):
        name = "train" if "train" in found else next(iter(found))
        found = found[name]
    columns = _columns(found.column_names, str(path))
    for number, row in enumerate(found.select_columns(columns), start=1):
        yield f"{path}: row {number}", row


def _columns(names: list[str], source: str) -> list[str]:
    columns = [name for name in ("text", *CHATS) if name in names][:1]
    if not columns:
        raise CalibrationError(
            f"{source}: expected a column text, {' or '.join(CHATS)}, found {sorted(names)}; rename one."
        )
    return columns


def _document(entry: Any, where: str, template: ChatTemplate) -> str:
    if isinstance(entry, dict) and isinstance(entry.get("text"), str):
        return entry["text"]
    chat = (
        next((entry[key] for key in CHATS if isinstance(entry.get(key), list)), None)
        if isinstance(entry, dict)
        else None
    )
    if chat is not None:
        if not getattr(template.tokenizer, "chat_template", None):
            raise CalibrationError(
                f"{where}: expected a tokenizer with a chat template for a chat, found none; use `text` "
                "lines."
            )
        return _rendered([_message(message, where) for message in chat], where, template)
    found = {key: type(value).__name__ for key, value in entry.items()} if isinstance(entry, dict) else entry
    raise CalibrationError(
        f"{where}: expected a `text` string or a `messages` list, found {str(found)[:200]}; "
        "put the text under one of these names."
    )


def _message(message: Any, where: str) -> dict[str, Any]:
    """A message as chat templates take it, from `{role, content}` or ShareGPT's `{from, value}`."""
    if not isinstance(message, dict):
        raise CalibrationError(
            f"{where}: expected each message to be an object with role and content, found "
            f"{str(message)[:80]!r}."
        )
    if "from" in message and "value" in message and "role" not in message:
        speaker = message["from"]
        message = {"role": ROLES.get(str(speaker), speaker), "content": message["value"]}
    role, content = message.get("role"), message.get("content")
    if isinstance(content, list):
        content = _joined(content, where)
    calls = message.get("tool_calls")
    if not isinstance(role, str) or not (isinstance(content, str) or (content is None and calls)):
        raise CalibrationError(
            f"{where}: expected each message to have a role and a content, both strings, found "
            f"role {str(role)[:40]!r} and content {type(content).__name__}."
        )
    return {**message, "role": role, "content": content or ""}


def _joined(parts: list[Any], where: str) -> str:
    """The text of content in parts; a picture or a sound cannot be calibrated on."""
    texts = [
        part["text"]
        for part in parts
        if isinstance(part, dict) and part.get("type", "text") == "text" and isinstance(part.get("text"), str)
    ]
    if len(texts) < len(parts):
        kinds = sorted(
            {str(part.get("type")) if isinstance(part, dict) else type(part).__name__ for part in parts}
        )
        raise CalibrationError(
            f"{where}: expected content parts of type text, found {', '.join(kinds)[:80]}; leave others out."
        )
    return "".join(texts)


def _rendered(messages: list[dict[str, Any]], where: str, template: ChatTemplate) -> str:
    """The chat through the model's template, without the BOS that the tokenizer puts before every window."""
    try:
        text = template.render(messages)
    except CalibrationError as error:
        raise CalibrationError(
            f"{where}: expected messages that the model's chat template takes, found: {error}."
        ) from error
    return text.removeprefix(template.put_before)
