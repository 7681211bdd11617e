"""What kernels are given, which versions there are, who answers, and the command."""

import dataclasses
import enum
import os
import pathlib
import subprocess
import sys
import types

import numpy as np
import pytest

from nki_kernels import backend
from nki_kernels.backend import nl
from nki_kernels.frontend.__main__ import main
from nki_kernels.frontend.verdict import check, verdict
from nki_kernels.frontend.versions import VERSIONS, UnknownVersionError, version_of
from nki_kernels.simulator import Placeholder
from nki_kernels.simulator.signatures import SIGNATURES
from tests.nki_kernels.frontend import constants_apart, constants_here


def kernel(x, plan, scale=1.0):
    return x


class Colour(enum.Enum):
    RED = 1


@dataclasses.dataclass(frozen=True)
class Plan(nl.NKIObject):
    size: object


@dataclasses.dataclass(frozen=True)
class Plain:
    size: object


class Property(nl.NKIObject):
    def __init__(self, size):
        self.size = size

    @property
    def twice(self):
        return 2 * self.size


X = np.ones((2, 2), np.float32)
ACCEPTED = (None, True, 3, 2.5, "word", X, Placeholder((4, 4), np.float32), (1, (2,)), {"a": 1}, Colour.RED)


@pytest.mark.parametrize("value", [*ACCEPTED, Plan(4), Plan(Plan((1, 2))), [1]], ids=str)
def test_kinds_that_the_compiler_has_a_literal_for(value):
    assert check(kernel, (X, value)) == []
    assert check(kernel, (X, Plan(value))) == []


@pytest.mark.parametrize(
    ("value", "rule", "words"),
    [
        (np.int64(3), "argument kind", "plan.size is of type numpy.int64, which silently becomes None"),
        (np.float32(3), "argument kind", "numpy.float32"),
        (1j, "argument kind", "complex"),
        ({1, 2}, "argument kind", "set"),
        (b"1", "argument kind", "bytes"),
        (len, "argument kind", "builtin_function_or_method"),
        (np.dtype(np.float32), "numpy dtype", "numpy.float32"),
        (np.float32, "numpy dtype", "numpy.float32"),
        (2**31, "integer", "2147483648"),
        (Plain(3), "class base", "Plain"),
        (Property(3), "decorator", "property"),
    ],
    ids=lambda value: str(value).partition(" object at ")[0],  # an address differs from process to process
)
def test_kinds_that_are_lost_or_refused(value, rule, words):
    (found,) = check(kernel, (X, Plan(value)))
    assert found.rule == rule and words in found.message
    assert found.file == __file__ and found.line > 0


def test_lists_are_arguments_before_0_3_only():
    assert check(kernel, (X, [1]), target="0.2") == []
    (found,) = check(kernel, (X, [1]), target="0.3")
    assert found.rule == "argument list" and "plan" in found.message


def test_two_modules_may_not_give_a_constant_two_values():
    (found,) = check(constants_here.kernel, (X,))
    assert found.rule == "module constant" and found.warns
    assert {"SIZE"} == {word for word in found.message.split() if word.isupper()}
    assert check(constants_apart.kernel, (X,)) == []


def test_the_table_of_versions():
    assert list(VERSIONS) == ["0.2", "0.3", "0.4", "0.5", "0.6", "0.7"]
    assert {version.signatures for version in VERSIONS.values()} == SIGNATURES.keys()
    assert version_of("0.2.0") is VERSIONS["0.2"]
    assert check(kernel, (X, np.int64(3)), target="0.7") == []  # Python itself is traced
    with pytest.raises(
        UnknownVersionError, match=r"expected a version of nki, one of 0\.2, .*, found '1\.0'"
    ):
        check(kernel, target="1.0")


class FakeTrace:
    """What the vendor's package has, as far as `verdict` asks it."""

    def __init__(self, complaint=None):
        self.complaint, self.asked = complaint, []

    def trace(self, kernel, grid, platform_target):
        def specialize(*arguments):
            self.asked.append((kernel, grid, platform_target, arguments))
            if self.complaint:
                raise RuntimeError(self.complaint)

        return types.SimpleNamespace(specialize=specialize)


@pytest.fixture
def install(monkeypatch):
    def fake(nki, version="0.2.0"):
        monkeypatch.setitem(sys.modules, "nki", nki)
        monkeypatch.setattr(backend, "HAS_NKI", True)
        monkeypatch.setattr("importlib.metadata.version", lambda name: version)

    return fake


def test_without_nki_our_front_end_answers():
    assert not backend.HAS_NKI
    answer = verdict(kernel, (X, None))
    assert answer.who == "our front end of nki 0.2 (no nki here)" and answer.refusals == ()
    (sentence,) = verdict(kernel, (X, np.int64(1)), target="0.3").refusals
    assert "numpy.int64" in sentence


def test_the_vendors_compiler_answers_where_it_is_installed(install):
    nki = FakeTrace()
    install(nki)
    answer = verdict(kernel, (X, np.int64(1)))
    assert answer.who == "nki 0.2.0 (trn1)" and answer.refusals == ()
    assert nki.asked == [(kernel, None, "trn1", (X, 1))]
    install(FakeTrace("kernel.py:3: expecting simple variable"))
    assert verdict(kernel, ()).refusals == ("RuntimeError: kernel.py:3: expecting simple variable",)


def test_an_nki_without_trace_leaves_the_answer_to_us(install):
    install(types.SimpleNamespace(), "0.6.1")
    assert verdict(kernel, (X, None)).who == "our front end of nki 0.6 (nki 0.6.1 has no trace)"
    install(types.SimpleNamespace(), "9.9")
    assert verdict(kernel, (X, None)).who == "our front end of nki 0.2 (nki 9.9 has no trace)"


KERNELS = """
import nki
import nki.isa as nisa
import nki.language as nl
import numpy as np

@nki.jit
def good(x, size=1):
    return x

@nki.jit
def bad(x):
    for a, b in ((1, 2),):
        pass
    return x

@nki.jit
def views(x):
    out = nl.ndarray((128, 8), dtype=x.dtype, buffer=nl.shared_hbm)
    tile = nl.ndarray((128, 2, 8), dtype=x.dtype, buffer=nl.sbuf)
    nisa.dma_copy(dst=tile[:, 0, :][:, 0:4], src=x[:, 0:4])
    return out

@nki.jit
def copy(x):
    out = nl.ndarray((128, 8), dtype=x.dtype, buffer=nl.shared_hbm)
    nisa.dma_copy(dst=out, src=x)
    return out

@nki.jit
def wide(x):
    nl.ndarray((256, 8), dtype=x.dtype, buffer=nl.sbuf)
    return x

@nki.jit
def unknown(x):
    nisa.iota(x)
    return x

def arguments():
    return (np.zeros((2, 2)), np.int64(3))

def tensor():
    return (np.zeros((128, 8), np.float32),)

wrong = 3
"""


@pytest.fixture
def folder(tmp_path, monkeypatch):
    """Where the files of the command are; what it imports is forgotten again."""
    (tmp_path / "kernels.py").write_text(KERNELS)
    (tmp_path / "broken.py").write_text("def kernel(:\n")
    (tmp_path / "raises.py").write_text("raise ValueError('no')\n")
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "path", [str(tmp_path), *sys.path])
    monkeypatch.setattr(sys, "meta_path", list(sys.meta_path))
    monkeypatch.setattr(sys, "modules", dict(sys.modules))
    return tmp_path


@pytest.mark.parametrize(
    ("words", "code", "said"),
    [
        (["kernels.py:good"], 0, "kernels.py:good: accepted by our front end of nki 0.2 ("),
        (["kernels.py:bad"], 1, "kernels.py:13: refused in syntax [S]: expecting simple variable; loop over"),
        (["kernels.py:bad", "--target", "0.7"], 0, "accepted by our front end of nki 0.7"),
        (["kernels:good", "--arguments", "arguments"], 1, "size is of type numpy.int64, which silently"),
        (["kernels.py:copy", "--arguments", "tensor"], 0, "accepted by our front end of nki 0.2\n"),
        (
            ["kernels.py:views", "--arguments", "tensor"],
            1,
            "kernels.py:21: refused in evaluation [T]: index out of",
        ),
        (
            ["kernels.py:views"],
            0,
            "accepted by our front end of nki 0.2 (views, names and sizes: give --arguments)",
        ),
        (["kernels.py:wide", "--arguments", "tensor"], 1, "number of partitions 256 exceed"),
        (
            ["kernels.py:unknown", "--arguments", "tensor"],
            0,
            "(views, names and sizes: nki.isa.iota is not modelled)",
        ),
        (["kernels.py:good", "--arguments", "none"], 2, "expected arguments named 'none'"),
        (["kernels.py:good", "--arguments", "wrong"], 2, "expected a tuple of arguments, found int"),
        (["kernels.py:good", "--target", "1.0"], 2, "target: expected a version of nki, one of 0.2,"),
        (["kernels.py:none"], 2, "expected a kernel named 'none', found the functions good, bad, views"),
        (["broken.py:kernel"], 2, "broken.py:1: expected Python, found invalid syntax"),
        (["raises.py:kernel"], 2, "expected a file that can be imported, found ValueError: no"),
        (["missing.py:kernel"], 2, "missing.py: expected a Python file, found none"),
        (["kernels.py"], 2, "expected FILE:KERNEL"),
    ],
    ids=str,
)
def test_the_command(folder, capsys, words, code, said):
    assert main(words) == code
    out, err = capsys.readouterr()
    assert said in out + err
    if code == 2:
        assert out == "" and len(err.splitlines()) == 1


def test_the_command_as_it_is_typed(folder):
    program = [sys.executable, "-m", "nki_kernels.frontend", "kernels.py:bad"]
    environment = {**os.environ, "PYTHONPATH": str(pathlib.Path(__file__).parents[3])}
    done = subprocess.run(program, check=False, capture_output=True, text=True, env=environment)
    assert done.returncode == 1 and done.stderr == ""
    assert done.stdout.splitlines()[1:] == [
        "read 1 functions in 0 classes and outside",
        "kernels.py:bad: refused in one place by our front end of nki 0.2",
    ]
