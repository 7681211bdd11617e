"""The exceptions that neuronmlp raises on purpose.

    NeuronMLPError
    |- UsageError              an option, or a combination of options, that cannot work
    |- UnsupportedModelError   an architecture, or a feature of one, that we do not know
    |- CheckpointError         a file or tensor that is missing, misnamed, misshapen or damaged
    |- FormatVersionError      a checkpoint block of another format version
    |- NonFiniteError          NaN or Inf in weights, statistics or logits
    |- CalibrationError        text that is unreadable, or too little of it
    `- OutputError             an output folder that exists, or a disk that is full

Each message is one sentence: the file or tensor, what was expected, what was found, and what to do. The
command line prints it and exits with code 2.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator

LONGEST = 3000  # characters of a message


class NeuronMLPError(Exception):
    """Base of every error that is the user's to mend; one line, whatever a file has put into it, and no
    longer than a screen.
    """

    def __init__(self, message: str) -> None:
        super().__init__(printable(message[:LONGEST]).replace("\n", "?"))


class UsageError(NeuronMLPError):
    """An option, or a combination of options, that cannot work."""


class UnsupportedModelError(NeuronMLPError):
    """An architecture, or a feature of one, that the plugin does not know."""


class CheckpointError(NeuronMLPError):
    """A checkpoint whose files, names or shapes contradict each other or its config."""


class FormatVersionError(CheckpointError):
    """A checkpoint block written for another version of the format."""


class NonFiniteError(NeuronMLPError):
    """NaN or Inf where only finite numbers can lead to a result."""


class CalibrationError(NeuronMLPError):
    """Calibration or evaluation text that is unreadable or too short."""


class OutputError(NeuronMLPError):
    """An output that cannot be written: it exists already, or there is no room."""


@contextlib.contextmanager
def told_as(kind: type[NeuronMLPError], expected: str, advice: str) -> Iterator[None]:
    """Turn whatever another library raises over somebody's file into "{expected}, found: {reason};
    {advice}.": they raise what their values lead to. Libraries in Rust panic with an exception that is none
    of Python's own kinds.
    """
    try:
        yield
    except NeuronMLPError:
        raise
    except BaseException as error:
        if not isinstance(error, Exception) and type(error).__name__ != "PanicException":
            raise
        raise kind(f"{expected}, found: {reason_of(error)}; {advice}.") from error


def printable(text: str) -> str:
    """Text from a file without what a terminal would obey: control characters become question marks."""
    return "".join(c if c.isprintable() or c in "\n\t" else "?" for c in text)


def shown(value: object) -> str:
    """A value out of a file, for the middle of a sentence: as Python writes it, and no longer than a line."""
    if isinstance(value, int) and abs(value) > 10**18:  # Python itself refuses to write out the longest
        return "a whole number of more than 18 digits"
    text = repr(value)
    return text if len(text) <= 80 else f"{text[:77]}..."


def reason_of(error: BaseException) -> str:
    """The first line of what another library said (the first two, where one ends in a colon), for the middle
    of a sentence of ours, which names the file itself: of an OSError its words alone.
    """
    if isinstance(error, OSError) and error.strerror:
        return error.strerror
    first, _, rest = str(error).strip().partition("\n")
    if first.endswith(":"):
        first += " " + rest.strip().partition("\n")[0]
    return (first or type(error).__name__)[:300].rstrip(".")
