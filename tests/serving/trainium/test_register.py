"""Registration: cheap, idempotent, silent without NxDI, and complete as soon as someone imports NxDI's
table.
"""

from __future__ import annotations

import subprocess
import sys
import textwrap


def run(code: str, path: str = "") -> str:
    done = subprocess.run(
        [sys.executable, "-c", textwrap.dedent(code)],
        capture_output=True,
        text=True,
        check=False,
        env={"PYTHONPATH": f".:{path}"},
    )
    assert done.returncode == 0, done.stderr
    return done.stdout.strip()


def test_without_nxdi_nothing_is_imported_set_or_said():
    code = """
        import os, sys
        from neuronmlp_plugin.serving import trainium
        import importlib.util
        importlib.util.find_spec = lambda name: None
        finders = list(sys.meta_path)
        trainium.register()
        print([m for m in ("torch", "vllm", "nki", "nki_kernels") if m in sys.modules], sys.meta_path == finders,
              "NEURONMLP_METRICS_DIR" in os.environ)
    """
    assert run(code) == "[] True False"


def test_the_action_runs_once_the_module_is_imported_by_someone(tmp_path):
    (tmp_path / "table.py").write_text("TYPES = {}\n")
    code = """
        import sys
        from neuronmlp_plugin.serving.trainium import run_after_import
        seen = []
        for _ in range(2):
            run_after_import("table", lambda module: seen.append(sorted(vars(module).keys() & {"TYPES"})))
        before = list(seen), "table" in sys.modules
        import table
        run_after_import("table", lambda module: seen.append("now"))
        print(before, seen)
    """
    assert run(code, str(tmp_path)) == "([], False) [['TYPES'], 'now']"
