"""Read a folder of safetensors, dense or factored, and refuse everything that FORMAT.md refuses."""

from __future__ import annotations

import json
import pathlib
from collections.abc import Iterator
from typing import Any

import torch
from safetensors import SafetensorError, safe_open

from neuronmlp_plugin.checkpoint.schema import QUANT_METHOD, FormatBlock, parse_block
from neuronmlp_plugin.errors import CheckpointError, NonFiniteError
from neuronmlp_plugin.models.families import check_supported

# In a folder of its own: engines load every *.safetensors file that lies beside config.json.
FACTOR_FILE = pathlib.Path("neuronmlp", "factors.safetensors")
_DTYPES = (torch.bfloat16, torch.float16, torch.float32)


class Checkpoint:
    """An opened model folder: its config, its block (None for a dense model) and its tensors by name.

    Opening reads only headers. Raises CheckpointError, FormatVersionError or UnsupportedModelError.
    """

    def __init__(self, folder: str | pathlib.Path) -> None:
        self.folder = pathlib.Path(folder)
        self.config = read_config(self.folder)
        check_supported(self.config, str(self.folder / "config.json"))
        block = self.config.get("quantization_config")
        self.block = self._parse(block) if block is not None else None
        self._files = _index_tensors(_weight_files(self.folder))
        if self.block is not None:
            check_names(self.block.expected_tensors(), self.shapes(), str(self.folder))

    def _parse(self, block: dict[str, Any]) -> FormatBlock:
        where = str(self.folder / "config.json")
        if block.get("quant_method") != QUANT_METHOD:
            raise CheckpointError(
                f"{where}: expected no quantization_config, or quant_method {QUANT_METHOD!r}, found "
                f"{block.get('quant_method')!r}; compress the unquantised model."
            )
        return parse_block(block, self.config, where)

    def names(self) -> list[str]:
        return sorted(self._files)

    def shapes(self) -> dict[str, tuple[int, ...]]:
        """Name -> shape of every tensor."""
        return {name: shape for name, (_, shape) in self._files.items()}

    def tensor(self, name: str) -> torch.Tensor:
        """One tensor, on the CPU, finite and in a floating dtype."""
        if name not in self._files:
            raise CheckpointError(f"{self.folder}: expected a tensor {name}, found none; the folder is incomplete.")
        path = self._files[name][0]
        with open_safetensors(path) as handle:
            return checked_tensor(handle.get_tensor(name), name, path)

    def tensors(self) -> Iterator[tuple[str, torch.Tensor]]:
        for name in self.names():
            yield name, self.tensor(name)


class FactorFile:
    """An opened factor file (FORMAT.md): its block and its MLP tensors, to be laid over `config`'s dense model."""

    def __init__(self, path: str | pathlib.Path, config: dict[str, Any]) -> None:
        self.path = pathlib.Path(path)
        if not self.path.is_file():
            raise CheckpointError(f"{self.path}: expected a factor file, found none; write one with `neuronmlp compress --factors-only`.")
        with open_safetensors(self.path) as handle:
            text = (handle.metadata() or {}).get(QUANT_METHOD)
        if text is None:
            raise CheckpointError(f"{self.path}: expected `{QUANT_METHOD}` metadata in the safetensors header, found none.")
        self.block = parse_block(_parse_json(text, self.path), config, str(self.path))
        expected = self.block.expected_tensors(only_changed=True)
        check_names(expected, header_shapes(self.path), str(self.path))
        self.prefixes = sorted({name.partition(".mlp.")[0] + ".mlp." for name in expected})

    def tensor(self, name: str) -> torch.Tensor:
        with open_safetensors(self.path) as handle:
            return checked_tensor(handle.get_tensor(name), name, self.path)


def read_config(folder: pathlib.Path) -> dict[str, Any]:
    """`config.json` of a local folder, as a dict."""
    path = folder / "config.json"
    if not path.is_file():
        raise CheckpointError(f"{path}: expected a Hugging Face config, found no such file; name a local model folder.")
    config = _parse_json(path.read_text(encoding="utf-8"), path)
    if not isinstance(config, dict):
        raise CheckpointError(f"{path}: expected a JSON object, found {type(config).__name__}.")
    return config


def open_safetensors(path: pathlib.Path) -> Any:
    """`safe_open`, with a truncated or foreign file refused in words."""
    try:
        return safe_open(path, framework="pt")
    except (SafetensorError, OSError) as error:
        raise CheckpointError(f"{path}: expected a whole safetensors file, found: {error}; copy or download it again.") from error


def checked_tensor(tensor: torch.Tensor, name: str, path: pathlib.Path) -> torch.Tensor:
    """Refuse integers and quantised types (CheckpointError), NaN and Inf (NonFiniteError)."""
    if tensor.dtype not in _DTYPES:
        raise CheckpointError(f"{path}: {name}: expected bf16, fp16 or fp32, found {tensor.dtype}.")
    if tensor.numel() and not all(bool(torch.isfinite(end)) for end in tensor.aminmax()):  # isfinite of the whole would copy it
        bad = int((~torch.isfinite(tensor)).sum())
        raise NonFiniteError(f"{path}: {name}: expected finite weights, found {bad} of {tensor.numel()} NaN or Inf; the file is damaged.")
    return tensor


def check_names(expected: dict[str, tuple[int, int]], found: dict[str, tuple[int, ...]], source: str) -> None:
    """Every factor there, with its shape, and no MLP tensor beside them (a misnamed one would load as random weights)."""
    for name, size in expected.items():
        if name not in found:
            raise CheckpointError(f"{source}: expected a tensor {name} {list(size)}, found none; the folder contradicts its config.")
        if found[name] != size:
            raise CheckpointError(f"{source}: {name}: expected shape {list(size)} (from its form and rank), found {list(found[name])}.")
    for name in found:
        if ".mlp." in name and name not in expected:
            raise CheckpointError(f"{source}: expected no tensor {name} (no form in the config has it), found one.")


def _parse_json(text: str, path: pathlib.Path) -> Any:
    try:
        return json.loads(text)
    except json.JSONDecodeError as error:
        raise CheckpointError(f"{path}: expected JSON, found: {error}.") from error


def header_shapes(path: pathlib.Path) -> dict[str, tuple[int, ...]]:
    """Name -> shape of every tensor of one file, from its header."""
    with open_safetensors(path) as handle:
        return {name: tuple(handle.get_slice(name).get_shape()) for name in handle.keys()}


def _index_tensors(files: list[pathlib.Path]) -> dict[str, tuple[pathlib.Path, tuple[int, ...]]]:
    index: dict[str, tuple[pathlib.Path, tuple[int, ...]]] = {}
    for path in files:
        for name, shape in header_shapes(path).items():
            if name in index:
                raise CheckpointError(f"{path}: expected {name} once, found it in {index[name][0].name} too; remove the stale file.")
            index[name] = (path, shape)
    return index


def _weight_files(folder: pathlib.Path) -> list[pathlib.Path]:
    """The folder's weight files: those its index names, else all safetensors."""
    index = folder / "model.safetensors.index.json"
    if index.is_file():
        names = sorted(set(_parse_json(index.read_text(encoding="utf-8"), index)["weight_map"].values()))
        files = [folder / name for name in names]
    else:
        files = sorted(folder.glob("*.safetensors"))
    missing = [path.name for path in files if not path.is_file()]
    if missing or not files:
        what = ", ".join(missing) or "*.safetensors"
        raise CheckpointError(f"{folder}: expected {what}, found no such file (pickled *.bin weights are never read).")
    return files
