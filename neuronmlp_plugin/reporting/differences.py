"""Where two texts differ, word by word."""

from __future__ import annotations

import difflib
import re

Parts = list[tuple[str, bool]]  # pieces of a text in order, and whether the other text lacks them
_LEAST_RUN = 2  # a lone "the" that both texts happen to have is no agreement


def word_differences(left: str, right: str) -> tuple[Parts, Parts]:
    """Both texts in pieces that, joined, give them back; True marks words that the other text has not at that
    place.
    """
    a, b = _words(left), _words(right)
    matcher = difflib.SequenceMatcher(
        None, [word.strip() for word in a], [word.strip() for word in b], autojunk=False
    )
    same = [
        block
        for block in matcher.get_matching_blocks()
        if block.size >= _LEAST_RUN or block.a == block.b == 0
    ]
    return _marked(a, [(block.a, block.size) for block in same]), _marked(
        b, [(block.b, block.size) for block in same]
    )


def common_words(left: str, right: str) -> int:
    """How many words both texts begin with."""
    pairs = list(zip(left.split(), right.split(), strict=False))
    return next((i for i, (a, b) in enumerate(pairs) if a != b), len(pairs))


def _words(text: str) -> list[str]:
    """Words with the space before them; trailing space is a piece of its own."""
    return re.findall(r"\s*\S+|\s+$", text)


def _marked(words: list[str], same: list[tuple[int, int]]) -> Parts:
    """Pieces of `words` given the runs (start, length) that are the same; the space before a difference is
    not part of it.
    """
    parts: Parts = []
    end = 0
    for start, length in [*same, (len(words), 0)]:
        different = "".join(words[end:start])
        bare = different.lstrip()
        parts += [
            (different[: len(different) - len(bare)], False),
            (bare, True),
            ("".join(words[start : start + length]), False),
        ]
        end = start + length
    return [(text, differs) for text, differs in parts if text]
