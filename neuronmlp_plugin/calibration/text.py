"""Text files in, equal windows of tokens out."""

from __future__ import annotations

import hashlib
import json
import pathlib
from typing import Any

import torch

from neuronmlp_plugin.errors import CalibrationError, CheckpointError, UsageError

_VOCABULARIES = ("tokenizer.json", "tokenizer.model", "vocab.json")


def load_tokenizer(folder: pathlib.Path) -> Any:
    """The folder's own tokenizer; remote code is never run. Raises CheckpointError where there is none."""
    from transformers import AutoTokenizer

    if not any(
        (pathlib.Path(folder) / name).is_file() for name in _VOCABULARIES
    ):  # transformers would make an empty tokenizer
        raise CheckpointError(
            f"{folder}: expected a tokenizer ({' or '.join(_VOCABULARIES)}), found none; copy the model's own."
        )
    try:
        return AutoTokenizer.from_pretrained(folder, trust_remote_code=False)
    except (OSError, ValueError, KeyError) as error:
        reason = str(error).strip().partition("\n")[0]
        raise CheckpointError(
            f"{folder}: expected a tokenizer that transformers reads, found: {reason}; copy its files again."
        ) from error


def read_documents(path: str | pathlib.Path, tokenizer: Any) -> list[str]:
    """Documents of a `.txt` file (one), or of a `.jsonl` file (one a line: `{"text": ...}` or `{"messages":
    [...]}`).

    A chat is rendered with the tokenizer's own template. Raises CalibrationError for an unreadable file or
    line.
    """
    path = pathlib.Path(path)
    try:
        content = path.read_text(
            encoding="utf-8-sig"
        )  # some editors begin a file with a mark of its byte order
    except (OSError, UnicodeDecodeError) as error:
        raise CalibrationError(
            f"{path}: expected a readable UTF-8 text or jsonl file, found: {error}."
        ) from error
    if path.suffix not in (".jsonl", ".json"):
        return [content]
    numbered = enumerate(
        content.split("\n"), start=1
    )  # not splitlines: JSON strings may hold U+2028 and its like as they are
    return [_document(line, f"{path}:{number}", tokenizer) for number, line in numbered if line.strip()]


def _document(line: str, where: str, tokenizer: Any) -> str:
    try:
        entry = json.loads(line)
    except json.JSONDecodeError as error:
        raise CalibrationError(f"{where}: expected one JSON object a line, found: {error}.") from error
    if isinstance(entry, dict) and isinstance(entry.get("text"), str):
        return entry["text"]
    if isinstance(entry, dict) and isinstance(entry.get("messages"), list):
        if not getattr(tokenizer, "chat_template", None):
            raise CalibrationError(
                f"{where}: expected a tokenizer with a chat template for `messages`, found none; use `text` lines."
            )
        return _chat(entry["messages"], where, tokenizer)
    raise CalibrationError(
        f"{where}: expected a `text` string or a `messages` list, found {sorted(entry) if isinstance(entry, dict) else entry!r}."
    )


def _chat(messages: list[Any], where: str, tokenizer: Any) -> str:
    from jinja2 import TemplateError

    try:
        return str(tokenizer.apply_chat_template(messages, tokenize=False))
    except (
        TemplateError,
        ValueError,
        TypeError,
        KeyError,
    ) as error:  # a system message, say, or roles that do not alternate
        raise CalibrationError(
            f"{where}: expected messages that the model's chat template takes, found: {error}."
        ) from error


def token_windows(documents: list[str], tokenizer: Any, length: int, source: str = "text") -> torch.Tensor:
    """`[windows, length]` token ids: the documents end to end, cut into windows that each begin as the
    tokenizer begins a text (BOS).

    The tail that fills no window is dropped. Raises CalibrationError where not even one window is filled, and
    UsageError where a window has no room for two tokens of text; `source` names the text there.
    """
    prefix = bos_prefix(tokenizer)
    _check_length(length, len(prefix))
    ids: list[int] = []
    for document in documents:
        ids += tokenizer(document, add_special_tokens=False)["input_ids"]
    step = length - len(prefix)
    windows = [prefix + ids[start : start + step] for start in range(0, len(ids) - step + 1, step)]
    if not windows:
        raise CalibrationError(
            f"{source}: expected at least {step:,} tokens, which fill one window, found {len(ids):,}; give more text."
        )
    return torch.tensor(windows, dtype=torch.long)


def _check_length(length: int, prefix: int) -> None:
    if length < prefix + 2:
        raise UsageError(
            f"--window: expected at least {prefix + 2} tokens, found {length}; 256 to 1024 are usual."
        )


def hold_out(windows: torch.Tensor, tokens: int) -> tuple[torch.Tensor, torch.Tensor]:
    """`(pool, judge)`: at most `tokens`, and an eighth, of the windows `[n, S]` are kept from the end of the
    text to judge on.
    """
    judged = min(tokens // windows.shape[1], len(windows) // 8)
    return windows[: len(windows) - judged], windows[len(windows) - judged :]


def rewindow(windows: torch.Tensor, length: int, prefix: int) -> torch.Tensor:
    """The same text `[n, S]` in windows of another length; the first `prefix` tokens of each window (BOS)
    open the new ones too.
    """
    _check_length(length, prefix)
    body = windows[:, prefix:].flatten()
    step = length - prefix
    body = body[: len(body) // step * step].view(-1, step)
    return torch.cat((windows[:1, :prefix].expand(len(body), -1), body), 1)


def spread(windows: torch.Tensor, count: int) -> torch.Tensor:
    """At most `count` of the windows (at least one), evenly spread over the text."""
    count = min(max(1, count), len(windows))
    return windows[torch.linspace(0, len(windows) - 1, count).round().long()]


def held_out_windows(
    model: pathlib.Path, text: pathlib.Path, tokens: int, length: int = 1024
) -> torch.Tensor:
    """`[windows, length]`: about `tokens` of a text file, evenly spread, as the tokenizer in the folder
    `model` cuts it.
    """
    tokenizer = load_tokenizer(model)
    return spread(
        token_windows(read_documents(text, tokenizer), tokenizer, length, str(text)), tokens // length
    )


def bos_prefix(tokenizer: Any) -> list[int]:
    """The special tokens that the tokenizer itself puts in front of a text (often one BOS, or nothing)."""
    with_special = tokenizer("a")["input_ids"]
    plain = tokenizer("a", add_special_tokens=False)["input_ids"]
    for start in range(len(with_special) - len(plain) + 1):
        if with_special[start : start + len(plain)] == plain:
            return list(with_special[:start])
    return []


def windows_digest(windows: torch.Tensor) -> str:
    """A short name for exactly these tokens."""
    return hashlib.sha256(windows.numpy().tobytes()).hexdigest()[:16]
