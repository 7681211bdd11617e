"""Types that the options of several commands have: argparse says what is wrong, with exit code 2."""

from __future__ import annotations

import argparse
import os
import pathlib


def path(text: str) -> pathlib.Path:
    """A path that the system can look for: no name in it is too long or has a NUL. A `~` at its beginning is
    the home folder: no shell expands that of `--out=~/small`.
    """
    text = os.path.expanduser(text)
    try:
        os.lstat(text or ".")
    except FileNotFoundError:
        pass
    except (OSError, ValueError) as error:
        if not isinstance(error, PermissionError | NotADirectoryError):
            what = getattr(error, "strerror", None) or str(error)
            raise argparse.ArgumentTypeError(f"expected a path, found {text[:80]!r}: {what}") from None
    return pathlib.Path(text)


def positive(text: str) -> int:
    """A whole number of at least 1."""
    if not text.isdecimal() or int(text) < 1:
        raise argparse.ArgumentTypeError(f"expected a positive whole number, found {text!r}")
    return int(text)


def share(text: str) -> float:
    """A number between 0 and 1, ends excluded."""
    try:
        value = float(text)
    except ValueError:
        value = 0.0
    if not 0.0 < value < 1.0:
        raise argparse.ArgumentTypeError(f"expected a share between 0 and 1, found {text!r}")
    return value
