"""Documents in, equal windows of tokens out."""

from __future__ import annotations

import array
import functools
import hashlib
import pathlib
from collections.abc import Iterable, Iterator, Mapping
from typing import Any

import torch

from neuronmlp_plugin.calibration.aside import Aside
from neuronmlp_plugin.calibration.documents import documents_of
from neuronmlp_plugin.calibration.template import bos_prefix
from neuronmlp_plugin.checkpoint.files import read_object
from neuronmlp_plugin.errors import CalibrationError, CheckpointError, UsageError, shown, told_as

_VOCABULARIES = ("tokenizer.json", "tokenizer.model", "vocab.json")


def load_tokenizer(folder: pathlib.Path) -> Any:
    """The folder's own tokenizer; remote code is never run. Raises CheckpointError where there is none."""
    from transformers import AutoConfig

    # Without any of them transformers would make an empty tokenizer.
    if not any((pathlib.Path(folder) / name).is_file() for name in _VOCABULARIES):
        raise CheckpointError(
            f"{folder}: expected a tokenizer ({' or '.join(_VOCABULARIES)}), found none; copy the model's "
            "own."
        )
    _check_vocabulary(pathlib.Path(folder))
    config = pathlib.Path(folder, "config.json")
    if config.is_file():  # which transformers reads for a tokenizer too
        with told_as(CheckpointError, f"{config}: expected a config that transformers reads", "mend it"):
            AutoConfig.from_pretrained(folder, trust_remote_code=False)
    expected = f"{folder}: expected a tokenizer that transformers reads and that reads a text"
    with told_as(CheckpointError, expected, "copy its files again"):
        Aside(_try)(folder)  # its rules may take all time and memory that there is
        return _tokenizer(folder)


def _try(folder: pathlib.Path) -> None:
    _tokenizer(folder)


def _tokenizer(folder: pathlib.Path) -> Any:
    from transformers import AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(folder, trust_remote_code=False)
    if not isinstance(bos_prefix(tokenizer), list) or not isinstance(tokenizer.bos_token, str | None):
        raise TypeError("a beginning of texts that is none")
    return tokenizer


LONGEST_VOCABULARY = 32 << 20  # bytes of a file of a tokenizer: three times Llama 3's
MOST_TOKENS = 1 << 22  # tables are as long as the highest id, and one of 2^31 ends the process without a word


def _check_vocabulary(folder: pathlib.Path) -> None:
    """Refuse ids that no model has, wherever the tokenizer's files say one, before anything is made of
    them.
    """
    for name in ("tokenizer.json", "vocab.json", "added_tokens.json", "tokenizer_config.json"):
        path = folder / name
        for found in _ids(name, read_object(path, LONGEST_VOCABULARY)) if path.is_file() else ():
            if isinstance(found, int | float) and not 0 <= found < MOST_TOKENS:
                raise CheckpointError(
                    f"{path}: expected token ids below {MOST_TOKENS:,}, found {shown(found)}; copy the file "
                    "again."
                )


def _ids(name: str, values: dict[str, Any]) -> Iterator[Any]:
    model, added, decoder = (values.get(key) for key in ("model", "added_tokens", "added_tokens_decoder"))
    for table in (
        model.get("vocab") if isinstance(model, dict) else None,
        values if "_config" not in name else None,
    ):
        yield from table.values() if isinstance(table, dict) else ()
    yield from (
        (entry.get("id") for entry in added if isinstance(entry, dict)) if isinstance(added, list) else ()
    )
    # 12 digits are far above MOST_TOKENS already, and Python refuses to read thousands.
    yield from (int(key[:12]) for key in decoder if key.isdecimal()) if isinstance(decoder, dict) else ()


def read_documents(path: str | pathlib.Path, tokenizer: Any) -> list[str]:
    """All documents of a file or folder at once (`documents.documents_of`)."""
    return list(documents_of(path, tokenizer))


# A text is read up to this many times the tokens that a run uses: enough to choose from, and a gigabyte of it
# costs no more than a megabyte.
READ_AHEAD = 64


def token_windows(
    documents: Iterable[str], tokenizer: Any, length: int, source: str = "text", limit: int | None = None
) -> torch.Tensor:
    """`[windows, length]` token ids: the documents end to end, cut into windows that each begin as the
    tokenizer begins a text (BOS).

    Reading stops after `limit` tokens; the tail that fills no window is dropped. Raises CalibrationError
    where not even one window is filled, and UsageError where a window has no room for two tokens of text;
    `source` names the text there.
    """
    prefix = bos_prefix(tokenizer)
    _check_length(length, len(prefix))
    ids = array.array("i")  # a list of Python's integers would take eight times the memory
    read = Aside(functools.partial(_read, tokenizer))
    for document in documents:
        with told_as(CheckpointError, f"{source}: expected text that the tokenizer reads", "mend its files"):
            found = read(document, characters=len(document))
        # A text, or a chat's template, may bring the beginning that every window gets anyway.
        ids.extend(found[len(prefix) :] if prefix and list(found[: len(prefix)]) == prefix else found)
        if limit is not None and len(ids) >= limit:
            break
    step = length - len(prefix)
    if len(ids) < step:
        raise CalibrationError(
            f"{source}: expected at least {step:,} tokens, which fill one window, found {len(ids):,}; give "
            "more text."
        )
    body = torch.tensor(ids[: len(ids) // step * step], dtype=torch.long).view(-1, step)
    return torch.cat((torch.tensor(prefix, dtype=torch.long).expand(len(body), -1), body), 1)


def _read(tokenizer: Any, document: str) -> array.array[int]:
    # Special tokens begin a window, not a document: none is to stand in the middle.
    return array.array("i", tokenizer(document, add_special_tokens=False)["input_ids"])


def read_windows(
    path: str | pathlib.Path, tokenizer: Any, length: int, tokens: int, vocabulary: int | None = None
) -> torch.Tensor:
    """`token_windows` of a file, read up to READ_AHEAD times the `tokens` that are wanted.

    `vocabulary`: rows of the model's embedding; CalibrationError where the text has a token beyond them.
    """
    limit = READ_AHEAD * max(tokens, length)
    windows = token_windows(documents_of(path, tokenizer), tokenizer, length, str(path), limit)
    highest = int(windows.max())
    if vocabulary is not None and highest >= vocabulary:
        raise CalibrationError(
            f"{path}: expected token ids below {vocabulary:,}, the rows of the model's embedding, found "
            f"{highest:,} "
            f"({tokenizer.convert_ids_to_tokens(highest)!r}); use the model's own tokenizer or resize the "
            "embedding."
        )
    return windows


def _check_length(length: int, prefix: int) -> None:
    if length < prefix + 2:
        raise UsageError(
            f"--window: expected at least {prefix + 2} tokens, found {length}; 256 to 1024 are usual."
        )


def within_positions(length: int, config: Mapping[str, Any]) -> int:
    """`length`, or the positions that the model of `config` knows, where they are fewer: what it makes of
    others is not what it is used for.
    """
    most = config.get("max_position_embeddings")
    return min(length, most) if isinstance(most, int) else length


def check_positions(length: int, config: Mapping[str, Any]) -> None:
    """UsageError for windows of more positions than the model of `config` knows."""
    most = within_positions(length, config)
    if length > most:
        raise UsageError(
            f"--window: expected at most the model's max_position_embeddings, {most}, found {length}; lower "
            "it."
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
    model: pathlib.Path, text: pathlib.Path, tokens: int, length: int = 1024, vocabulary: int | None = None
) -> torch.Tensor:
    """`[windows, length]`: about `tokens` of a text file, evenly spread, as the tokenizer in the folder
    `model` cuts it.
    """
    tokenizer = load_tokenizer(model)
    return spread(read_windows(text, tokenizer, length, tokens, vocabulary), tokens // length)


def windows_digest(windows: torch.Tensor) -> str:
    """A short name for exactly these tokens."""
    return hashlib.sha256(windows.numpy().tobytes()).hexdigest()[:16]
