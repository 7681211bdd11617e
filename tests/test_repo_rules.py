"""The house rules, as tests: modules import, arrows hold, budgets hold, public names are pinned, README
commands exist.
"""

from __future__ import annotations

import ast
import configparser
import importlib
import importlib.util
import pathlib
import re
import subprocess
import sys

import pytest

ROOT = pathlib.Path(__file__).parent.parent
PACKAGES = ("neuronmlp_plugin", "nki_kernels")
MODULES = sorted(path for package in PACKAGES for path in (ROOT / package).rglob("*.py"))
# Rooms of neuronmlp_plugin -> the rooms that they may import (docs/architecture.md). `errors` is a leaf that
# everyone may use.
ARROWS = {
    "hf": {"checkpoint", "models"},
    "cli": {"commands", "checkpoint"},
    "commands": {
        "refinement",
        "compressor",
        "reporting",
        "serving",
        "bench",
        "doctor",
        "calibration",
        "checkpoint",
        "models",
    },
    "refinement": {"compressor", "reporting", "calibration", "checkpoint", "models"},
    "compressor": {"calibration", "checkpoint", "models", "lowrank", "reporting", "nki_kernels"},
    "reporting": {"calibration", "checkpoint", "models"},
    "calibration": {"checkpoint", "models", "lowrank"},
    "checkpoint": {"models"},
    "models": set(),
    "lowrank": set(),
    "serving": {"checkpoint", "models", "nki_kernels"},
    "doctor": {"serving", "nki_kernels"},
    "bench": {"serving", "compressor", "checkpoint", "models", "nki_kernels"},
}
# Third-party packages that only these places may import.
CONFINED = {
    "vllm": ("neuronmlp_plugin/serving/", "neuronmlp_plugin/bench/engines.py"),
    "neuronx_distributed_inference": ("neuronmlp_plugin/serving/trainium/",),
    "neuronx_distributed": ("neuronmlp_plugin/serving/trainium/",),
    "nki": (
        "nki_kernels/backend.py",
        "nki_kernels/frontend/verdict.py",
        "neuronmlp_plugin/serving/trainium/",
    ),
    "torch_xla": ("neuronmlp_plugin/bench/device.py",),
    "torch_neuronx": ("neuronmlp_plugin/bench/device.py",),
}


def name_of(path: pathlib.Path) -> str:
    return str(path.relative_to(ROOT))


def module_of(path: pathlib.Path) -> str:
    return ".".join(path.relative_to(ROOT).with_suffix("").parts).removesuffix(".__init__")


def imports(path: pathlib.Path) -> set[str]:
    found = set()
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            assert node.module and not node.level, (
                f"{name_of(path)}:{node.lineno}: a relative import has no arrow"
            )
            found |= {f"{node.module}.{alias.name}" for alias in node.names}
    return found


def room(dotted: str) -> str | None:
    package, _, rest = dotted.partition(".")
    if package == "nki_kernels":
        return "nki_kernels"
    return rest.partition(".")[0] if package == "neuronmlp_plugin" else None


@pytest.mark.parametrize("path", MODULES, ids=name_of)
def test_arrows_go_one_way(path):
    own = room(module_of(path))
    for imported in imports(path):
        target = room(imported)
        if target in (None, own, "errors", "argument_types", "", "__version__"):
            continue
        if own == "nki_kernels":
            pytest.fail(f"{name_of(path)} imports {imported}: nki_kernels never imports neuronmlp_plugin")
        if own == "":
            assert target == "serving", f"the package root imports {imported}"
        else:
            assert target in ARROWS.get(own, set()), (
                f"{name_of(path)} imports {imported}: no arrow {own} -> {target}"
            )


@pytest.mark.parametrize("path", MODULES, ids=name_of)
def test_confined_packages_stay_in_their_rooms(path):
    for imported in imports(path):
        allowed = CONFINED.get(imported.partition(".")[0])
        assert allowed is None or name_of(path).startswith(allowed), f"{name_of(path)} imports {imported}"


@pytest.mark.parametrize("path", MODULES, ids=name_of)
def test_every_module_imports(path):
    """A module that needs vLLM or NxD Inference may stop at that, and at nothing else."""
    try:
        importlib.import_module(module_of(path))
    except ModuleNotFoundError as error:
        missing = (error.name or "").partition(".")[0]
        assert missing in (*CONFINED, "neuronxcc"), f"{name_of(path)} needs {error.name}"
        assert importlib.util.find_spec(missing) is None, (
            f"{name_of(path)}: {error}"
        )  # it is here, so that is a wrong name


def test_importing_the_package_is_cheap():
    program = (
        "import sys, neuronmlp_plugin; assert not {'torch', 'vllm', 'nki', 'numpy'} & set(sys.modules), "
        "sorted(sys.modules)"
    )
    subprocess.run([sys.executable, "-c", program], check=True)


def test_one_version_stands_in_the_package_the_citation_and_the_changelog():
    import neuronmlp_plugin

    newest = re.search(r"^## (\S+) \(", (ROOT / "CHANGELOG.md").read_text(), re.MULTILINE)
    cited = re.search(r"^version: (\S+)$", (ROOT / "CITATION.cff").read_text(), re.MULTILINE)
    assert newest and cited and newest[1] == cited[1] == neuronmlp_plugin.__version__


def test_public_names_are_pinned():
    import neuronmlp_plugin
    import nki_kernels
    from neuronmlp_plugin.cli import COMMANDS

    assert neuronmlp_plugin.__all__ == ["__version__", "register"]
    assert nki_kernels.__all__ == ["source_digest"]
    assert list(COMMANDS) == [
        "compress",
        "refine",
        "quantize",
        "inspect",
        "evaluate",
        "report",
        "convert",
        "bench",
        "doctor",
    ]


def test_a_wheel_has_every_data_file_and_both_entry_points():
    setup = configparser.ConfigParser()
    setup.read(ROOT / "setup.cfg")
    data = setup["options.package_data"]
    packed = {
        path
        for package in PACKAGES
        for pattern in data[package].split()
        for path in (ROOT / package).glob(pattern)
    }
    assert packed == {
        p
        for package in PACKAGES
        for p in (ROOT / package).rglob("*")
        if p.is_file() and p.suffix not in (".py", ".pyc")
    }
    points = setup["options.entry_points"]
    assert points["vllm.general_plugins"].strip() == "neuronmlp = neuronmlp_plugin:register"
    assert points["console_scripts"].strip() == "neuronmlp = neuronmlp_plugin.cli:main"


def functions(path: pathlib.Path):
    return [
        n
        for n in ast.walk(ast.parse(path.read_text(encoding="utf-8")))
        if isinstance(n, ast.FunctionDef | ast.AsyncFunctionDef)
    ]


@pytest.mark.parametrize("path", MODULES, ids=name_of)
def test_budgets_hold(path):
    lines = path.read_text(encoding="utf-8").splitlines()
    assert len(lines) <= 400, "a file has at most 400 lines"
    for number, line in enumerate(lines, 1):
        assert len(line) <= 110, f"{name_of(path)}:{number}: over 110 columns"
    for function in functions(path):
        length = (function.end_lineno or 0) - function.lineno + 1
        assert length <= 40, f"{name_of(path)}: {function.name} has {length} lines, at most 40"


def test_most_functions_are_short():
    lengths = sorted((f.end_lineno or 0) - f.lineno + 1 for path in MODULES for f in functions(path))
    assert lengths[len(lengths) // 2] <= 12, "the median function has at most 12 lines"
    assert lengths[len(lengths) * 9 // 10] <= 25, "nine functions in ten have at most 25 lines"


def test_files_are_few_full_and_of_different_names():
    lines = sum(len(path.read_text(encoding="utf-8").splitlines()) for path in MODULES)
    assert 1000 * len(MODULES) / lines <= 7.2, (
        "at most 7.2 files for 1000 lines: put what is read together together"
    )
    names = [path.name for path in MODULES if path.name != "__init__.py"]
    twice = {name for name in names if names.count(name) > 1}
    assert not twice, "a file has a name of its own"


@pytest.mark.parametrize("path", sorted((ROOT / "tests").rglob("*.py")), ids=name_of)
def test_test_files_stay_readable(path):
    assert len(path.read_text(encoding="utf-8").splitlines()) <= 600


def test_the_letters_of_the_format_are_known_in_few_places():
    """Everyone else speaks of first and second factors (models/factors.py); nki_kernels imports nothing of
    it.
    """
    known = {
        "neuronmlp_plugin/models/factors.py",
        "neuronmlp_plugin/compressor/build.py",
        "neuronmlp_plugin/checkpoint/conversion.py",
        "nki_kernels/packing.py",
        "nki_kernels/cases.py",
        "nki_kernels/reference.py",
    }
    naming = {
        name_of(path)
        for path in MODULES
        if re.search(r"[\"'][ucv]\.weight[\"']", path.read_text(encoding="utf-8"))
    }
    assert naming <= known


def test_no_bare_except_and_no_pickle():
    for path in MODULES:
        text = path.read_text(encoding="utf-8")
        assert not re.search(r"except\s*:", text), name_of(path)
        assert not re.search(r"torch\.load\(|pickle\.load|trust_remote_code=True", text), name_of(path)


def test_the_readme_is_read_in_a_minute():
    text = (ROOT / "README.md").read_text(encoding="utf-8")
    assert len(text.split()) <= 900, "the README has at most 900 words; the rest has a page in docs/"
    assert len(text.splitlines()) <= 110, "the README has at most 110 lines"


def readme_commands() -> list[str]:
    text = (ROOT / "README.md").read_text(encoding="utf-8")
    blocks = re.findall(r"^```bash\n(.*?)^```", text, flags=re.MULTILINE | re.DOTALL)
    joined = "\n".join(blocks).replace("\\\n", " ")
    return [
        line.partition("  #")[0].strip()
        for line in joined.splitlines()
        if line.strip() and not line.startswith("#")
    ]


def test_readme_commands_exist_and_parse():
    """Scripts and examples that the README names are there, and every `neuronmlp` line is understood by the
    real parser.
    """
    from neuronmlp_plugin.cli import build_parser

    commands = readme_commands()
    assert len(commands) > 8
    for line in commands:
        words = line.split()
        words = words[next(i for i, word in enumerate(words) if "=" not in word.partition("/")[0]) :]
        if words[0].startswith(("scripts/", "examples/")):
            assert (ROOT / words[0]).is_file(), line
        if words[0].endswith("python"):
            assert (ROOT / words[1]).is_file(), line
        if words[0].endswith("neuronmlp"):
            build_parser().parse_args(words[1:])


def test_no_registry_host_or_machine_path_is_named():
    files = subprocess.run(
        ["git", "ls-files"], cwd=ROOT, capture_output=True, text=True, check=True
    ).stdout.split()
    for name in files:
        path = ROOT / name
        if (
            name == "tests/test_repo_rules.py"
            or not path.is_file()
            or path.suffix in (".png", ".safetensors")
        ):
            continue
        text = path.read_text(encoding="utf-8", errors="ignore")
        for word in ("pypi.org", "download.pytorch.org", "/opt/wheels", "/work/", "repos.neuron"):
            assert word not in text, f"{name} names {word}"
