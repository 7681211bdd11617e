"""Marked words joined give the texts back, and only what the other text lacks is marked."""

from __future__ import annotations

import hypothesis
import pytest
from hypothesis import strategies

from neuronmlp_plugin.reporting.view import common_words, word_differences

WORDS = strategies.lists(strategies.sampled_from(["a", "b", "c", " ", "\n", " d"]), max_size=14).map("".join)


@hypothesis.given(WORDS, WORDS)
def test_pieces_joined_are_the_texts(left, right):
    for text, parts in zip((left, right), word_differences(left, right), strict=True):
        assert "".join(piece for piece, _ in parts) == text


@pytest.mark.parametrize(
    ("left", "right", "marked"),
    [
        ("one two three", "one two three", ([], [])),
        ("one two three four", "one two 3 four", (["three four"], ["3 four"])),  # a lone common word is noise
        ("one two three four five", "one two 3 four five", (["three"], ["3"])),
        ("the cat", "the dog", (["cat"], ["dog"])),
        ("all different", "", (["all different"], [])),
    ],
)
def test_only_what_the_other_lacks_is_marked(left, right, marked):
    assert (
        tuple([piece for piece, differs in parts if differs] for parts in word_differences(left, right))
        == marked
    )


@pytest.mark.parametrize(
    ("left", "right", "count"), [("a b c", "a b d", 2), ("a b", "a b c", 2), ("x", "y", 0), ("", "", 0)]
)
def test_common_beginning(left, right, count):
    assert common_words(left, right) == count
