"""A digest of everything that decides what a kernel computes, for the key of a compiled artifact."""

from __future__ import annotations

import hashlib
import pathlib

from nki_kernels.plan_file import chosen_file

ROOT = pathlib.Path(__file__).parent
# Packing and plans are part of it: an artifact compiled for another layout would read the weights wrongly.
PROGRAM = (
    "arrival.py",
    "backend.py",
    "casts.py",
    "effort.py",
    "layout.py",
    "packing.py",
    "placement.py",
    "plan_file.py",
    "planner.py",
    "request.py",
    "ring.py",
    "targets.py",
    "tile_plan.py",
    "tiling.py",
    "waits.py",
    "kernels/*.py",
)


def source_digest() -> str:
    """SHA-256, in hex, of the sources of kernels, layout, packing and planner, by name and content, and of
    the user's own plans.
    """
    digest = hashlib.sha256()
    for path in sorted(path for pattern in PROGRAM for path in ROOT.glob(pattern)):
        digest.update(path.relative_to(ROOT).as_posix().encode() + b"\0" + path.read_bytes() + b"\0")
    own = chosen_file()
    if own is not None:
        digest.update(own.read_bytes())
    return digest.hexdigest()
