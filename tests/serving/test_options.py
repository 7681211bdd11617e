from __future__ import annotations

import pathlib

import pytest

from neuronmlp_plugin.errors import UsageError
from neuronmlp_plugin.serving.options import Options, parse_options


@pytest.mark.parametrize("config", [None, {}, {"other": 1}, {"neuronmlp": {}}])
def test_nothing_said_means_the_defaults(config):
    assert parse_options(config) == Options(factors=None, fast_path=True)


def test_everything_can_be_said():
    given = {"factors": "a/b.safetensors", "fast_path": False, "verify": True}
    assert parse_options({"neuronmlp": given}) == Options(pathlib.Path("a/b.safetensors"), False, True)


@pytest.mark.parametrize(
    ("given", "message"),
    [
        ({"rank": 3}, r"expected an object with the keys factors, fast_path, verify, found \['rank'\]"),
        (["gather"], "expected an object"),
        ({"tp_scheme": "reduce"}, r"found \['tp_scheme'\]"),
        ({"fast_path": "no"}, "expected true or false, found 'no'"),
        ({"verify": 1}, r"verify: expected true or false, found 1"),
    ],
)
def test_what_means_nothing_is_refused(given, message):
    with pytest.raises(UsageError, match=message):
        parse_options({"neuronmlp": given})
