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
