"""A tokenizer's chat template, which is a program that came with the model."""

from __future__ import annotations

import functools
from typing import Any

from neuronmlp_plugin.calibration.aside import Aside, AsideError
from neuronmlp_plugin.errors import CalibrationError

MOST_CHARACTERS = 1 << 26


class ChatTemplate:
    """Renders chats, in a process that ends with this object."""

    def __init__(self, tokenizer: Any) -> None:
        self.tokenizer = tokenizer
        self.aside = Aside(functools.partial(_rendered, tokenizer))

    @functools.cached_property
    def put_before(self) -> str:
        """The BOS that the tokenizer itself puts before a text; empty where it puts none."""
        bos = [self.tokenizer.bos_token_id]
        return str(self.tokenizer.bos_token) if bos_prefix(self.tokenizer)[:1] == bos else ""

    def render(self, messages: list[dict[str, Any]], **options: Any) -> str:
        """The text of a chat; `options` are those of `apply_chat_template`. Raises CalibrationError, whose
        message says only what was found: the caller knows where the chat stands.
        """
        try:
            return str(self.aside(messages, options))
        except AsideError as error:
            raise CalibrationError(str(error)) from error


def _rendered(tokenizer: Any, messages: list[dict[str, Any]], options: dict[str, Any]) -> str:
    text = str(tokenizer.apply_chat_template(messages, tokenize=False, **options))
    if len(text) > MOST_CHARACTERS:
        raise ValueError(f"a text of {len(text):,} characters")
    return text


def bos_prefix(tokenizer: Any) -> list[int]:
    """The special tokens that the tokenizer itself puts in front of a text (often one BOS, or nothing)."""
    # By looking, not by `bos_token`: many tokenizers have one that they never put there.
    with_special = tokenizer("a")["input_ids"]
    plain = tokenizer("a", add_special_tokens=False)["input_ids"]
    for start in range(len(with_special) - len(plain) + 1):
        if with_special[start : start + len(plain)] == plain:
            return list(with_special[:start])
    return []
