"""Text files as people have them, in; documents out, one at a time, so that no file has to fit in memory.

| file | documents |
|---|---|
| `.txt`, `.md` and every unknown ending | the whole text (in blocks of about a million characters) |
| `.jsonl`, `.ndjson` | one a line: `{"text": ...}`, `{"messages": [...]}` or `{"conversations": [...]}` |
| `.json` | the same, one object a line or one list of objects |
| `.csv`, `.tsv` | the column `text` |
| `.parquet` | the column `text`, `messages` or `conversations` (needs pyarrow) |
| a folder | a dataset that `datasets` saved there with `save_to_disk` (needs datasets) |

Endings are compared without case. A chat is rendered with the tokenizer's own template.
"""

from __future__ import annotations

import csv
import io
import json
import os
import pathlib
from collections.abc import Iterator
from typing import Any

from neuronmlp_plugin.calibration.template import ChatTemplate
from neuronmlp_plugin.errors import CalibrationError, reason_of

BLOCK = 1 << 20  # characters of plain text that are one document
CHATS = ("messages", "conversations")
# ShareGPT's names for who speaks, and the usual ones.
ROLES = {"human": "user", "gpt": "assistant", "chatgpt": "assistant", "bing": "assistant"}


def documents_of(path: str | pathlib.Path, tokenizer: Any) -> Iterator[str]:
    """The documents of a file or folder, in its order. `tokenizer` renders chats.

    Raises CalibrationError, at the document that cannot be read, with the file and the line or row.
    """
    path = pathlib.Path(path)
    ending = path.suffix.lower()
    if os.path.isdir(path):
        entries = _dataset_rows(path)
    elif ending == ".parquet":
        entries = _parquet_rows(path)
    elif ending in (".csv", ".tsv"):
        entries = _table_rows(path, "\t" if ending == ".tsv" else ",")
    elif ending in (".jsonl", ".ndjson", ".json"):
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
        # Lines end at newlines alone: JSON strings may hold U+2028 and its like as they are.
        return open(path, encoding="utf-8-sig", newline="\n")
    except OSError as error:
        raise CalibrationError(
            f"{path}: expected a readable text file, found: {reason_of(error)}; check the path."
        ) from error


def _lines(path: pathlib.Path) -> Iterator[str]:
    with _opened(path) as file:
        try:
            yield from file
        except (UnicodeDecodeError, OSError) as error:
            raise CalibrationError(
                f"{path}: expected UTF-8 text, found: {error}; convert the file, for example with iconv."
            ) from error


def _blocks(path: pathlib.Path) -> Iterator[str]:
    """A plain text, cut at line ends where it is long."""
    parts: list[str] = []
    size = 0
    for line in _lines(path):
        parts.append(line)
        size += len(line)
        if size >= BLOCK:
            yield "".join(parts)
            parts, size = [], 0
    if parts:
        yield "".join(parts)


Entries = Iterator[tuple[str, Any]]  # where it stands, and what stands there


def _json_entries(path: pathlib.Path, may_be_list: bool) -> Entries:
    if may_be_list and _begins_a_list(path):
        try:
            values = json.loads("".join(_lines(path)))
        except (ValueError, RecursionError) as error:
            raise CalibrationError(f"{path}: expected a JSON list of objects, found: {error}.") from error
        yield from ((f"{path}: entry {number}", value) for number, value in enumerate(values, start=1))
        return
    for number, line in enumerate(_lines(path), start=1):
        if line.strip():
            where = f"{path}:{number}"
            try:
                yield where, json.loads(line)
            except (ValueError, RecursionError) as error:
                raise CalibrationError(
                    f"{where}: expected one JSON object a line, found: {error}."
                ) from error


def _begins_a_list(path: pathlib.Path) -> bool:
    return next((line.lstrip() for line in _lines(path) if line.strip()), "").startswith("[")


def _table_rows(path: pathlib.Path, delimiter: str) -> Entries:
    csv.field_size_limit(1 << 30)  # a document is longer than the 128 KiB that the library allows by itself
    rows = csv.DictReader(_lines(path), delimiter=delimiter)
    try:
        if "text" not in (rows.fieldnames or ()):
            raise CalibrationError(
                f"{path}: expected a column `text` in the first line, found {list(rows.fieldnames or ())}; "
                "rename the column that holds the text."
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
            f"{path}: expected a folder that `datasets` saved with save_to_disk, found: {reason_of(error)}."
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
    """The chat through the model's template, without the BOS that every window begins with anyway."""
    try:
        text = template.render(messages)
    except CalibrationError as error:
        raise CalibrationError(
            f"{where}: expected messages that the model's chat template takes, found: {error}."
        ) from error
    bos = getattr(template.tokenizer, "bos_token", None)
    return text.removeprefix(bos) if bos else text
