"""Which C compiler makes the fused products; without vLLM, so that `neuronmlp doctor` can ask too."""

from __future__ import annotations

import os
import shutil


def find_compiler() -> str | None:
    """Path of the compiler that CC names, or of cc or gcc; None where there is none."""
    return shutil.which(os.environ.get("CC", "cc")) or shutil.which("gcc")
