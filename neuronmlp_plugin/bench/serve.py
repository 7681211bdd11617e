"""What a user of a CPU waits for: time to first token and decoding, of several models in turns, against the
first; and decode throughput, against the bytes that each reads a step.

Each model has an engine in a process of its own. A round asks every model for every cell once, in an order
that rotates; a ratio is taken within a round, so that whatever else the machine does hits both sides, and
what is reported is the median over rounds. Rounds are kept in a file as they are measured, so that a run can
go on where it was ended.

Beside a compressed folder stands what its user would serve instead: the dense model in int8, weights and
activations (compressed-tensors, vLLM's own), or the Q8_0 of llama.cpp, both made from the same dense folder.
"""

from __future__ import annotations

import dataclasses
import json
import math
import pathlib
import shutil
import statistics
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from safetensors.torch import save_file

from neuronmlp_plugin.bench.engines import Answer, Engine, EngineSettings, Job, engines
from neuronmlp_plugin.checkpoint.reader import Checkpoint
from neuronmlp_plugin.errors import CheckpointError, UsageError
from neuronmlp_plugin.models.definition import quantize

PROMPT_TOKENS, WARM_TOKENS = 32, 8


@dataclasses.dataclass(frozen=True)
class Decode:
    """`tokens_per_second` and `speedup` over the first model are medians over rounds.

    `ideal`: the speed-up if decoding cost nothing but reading weights, i.e. the ratio of the bytes that a
    step reads.
    """

    model: str
    batch: int
    tokens_per_second: float
    speedup: float
    ideal: float

    @property
    def share_of_ideal(self) -> float:
        return share_of(self.speedup, self.ideal)


def share_of(speedup: float, ideal: float) -> float:
    """How much of the possible gain was achieved; NaN where there is none to have."""
    return (speedup - 1.0) / (ideal - 1.0) if ideal > 1.0 else float("nan")


def in_turn(names: list[str], turn: int) -> list[str]:
    """The names in the order of a round: each round begins with another one."""
    first = turn % len(names)
    return names[first:] + names[:first]


def bytes_per_step(folder: pathlib.Path, dtype: str) -> int:
    """Bytes of weights that one decode step reads: all but an embedding table of which it only looks up rows.

    Floating point counts in the engine's `dtype` (vLLM makes every "auto" 16 bits wide), int8 as it is, with
    fp32 scales.
    """
    checkpoint = Checkpoint(folder)
    tied, width = (
        bool(checkpoint.config.get("tie_word_embeddings")),
        4 if dtype in ("float32", "float") else 2,
    )
    # A tied table is the head as well, which reads all of it.
    read = {
        name: kind
        for name, kind in checkpoint.dtypes().items()
        if tied or name != "model.embed_tokens.weight"
    }
    shapes = checkpoint.shapes()
    scales = checkpoint.block.expected_scales() if checkpoint.block is not None else {}
    weights = sum(math.prod(shapes[name]) * (1 if kind == "I8" else width) for name, kind in read.items())
    return weights + 4 * sum(rows for (rows,) in scales.values())


def measure_decode(
    folders: dict[str, pathlib.Path],
    batches: Sequence[int],
    *,
    new_tokens: int,
    rounds: int,
    dtype: str,
    tick: Callable[[int], None],
) -> list[Decode]:
    """Time every model at every batch size; the first one is what the others are compared with."""
    sizes = {name: bytes_per_step(folder, dtype) for name, folder in folders.items()}
    names = list(folders)
    times: dict[tuple[str, int], list[float]] = {(name, batch): [] for name in names for batch in batches}
    settings = EngineSettings(dtype, max(batches), PROMPT_TOKENS + max(WARM_TOKENS, new_tokens))
    with engines(folders, settings) as ask:

        def seconds(name: str, batch: int, tokens: int) -> float:
            """All but the first token."""
            whole = ask[name](Job(batch, PROMPT_TOKENS, tokens)).seconds
            return whole - ask[name](Job(batch, PROMPT_TOKENS, 1)).seconds

        for name in names:
            for batch in batches:  # warm up: packing, caches, first-shape costs
                seconds(name, batch, WARM_TOKENS)
        for turn in range(rounds):
            for batch in batches:
                for name in in_turn(names, turn):
                    times[name, batch].append(seconds(name, batch, new_tokens))
                    tick(1)
    results = []
    for batch in batches:
        for name in names:
            mine, first = times[name, batch], times[names[0], batch]
            speedup = statistics.median(a / b for a, b in zip(first, mine, strict=True))
            rate = batch * (new_tokens - 1) / statistics.median(mine)
            results.append(Decode(name, batch, rate, speedup, sizes[names[0]] / sizes[name]))
    return results


@dataclasses.dataclass(frozen=True)
class Cell:
    """`kind` "first": `size` tokens of prompt until the first token; "decode": `size` sequences, every token
    after the first.
    """

    kind: str
    size: int

    def __str__(self) -> str:
        return f"first token, {self.size}" if self.kind == "first" else f"decode, batch {self.size}"


@dataclasses.dataclass(frozen=True)
class Served:
    """Medians over rounds. `speedup` over the first model; `ideal`: the ratio of the bytes that a step reads,
    or of the products' arithmetic before a first token; NaN where it is unknown.
    """

    model: str
    cell: Cell
    seconds: float
    speedup: float
    ideal: float
    peak_bytes: int

    @property
    def share_of_ideal(self) -> float:
        return share_of(self.speedup, self.ideal)


CELLS = (Cell("first", 128), Cell("first", 1024), Cell("decode", 1), Cell("decode", 8), Cell("decode", 32))
Times = dict[tuple[str, str, int], tuple[float, int]]  # model, cell, round -> seconds, peak bytes


def prompt_flops(folder: pathlib.Path, tokens: int) -> float:
    """Multiplications and additions of a prompt: every matrix once a token, the head once, and the scores and
    sums of causal attention.
    """
    checkpoint = Checkpoint(folder)
    config, shapes = checkpoint.config, checkpoint.shapes()
    table = "model.embed_tokens.weight"
    matrices = {name: shape for name, shape in shapes.items() if len(shape) == 2 and name != "lm_head.weight"}
    linear = sum(rows * columns for name, (rows, columns) in matrices.items() if name != table)
    head_dim = config.get("head_dim") or config["hidden_size"] // config["num_attention_heads"]
    attention = config["num_hidden_layers"] * config["num_attention_heads"] * head_dim * tokens * tokens
    return 2.0 * (linear * tokens + matrices[table][0] * matrices[table][1] + attention)


def ideal_of(cell: Cell, first: pathlib.Path, other: pathlib.Path, dtype: str) -> float:
    try:
        if cell.kind == "first":
            return prompt_flops(first, cell.size) / prompt_flops(other, cell.size)
        return bytes_per_step(first, dtype) / bytes_per_step(other, dtype)
    except (CheckpointError, KeyError):  # a rival's format
        return float("nan")


class Log:
    """Measured rounds in a file of lines, each of which says what it is of; without a path, in memory."""

    def __init__(self, path: pathlib.Path | None, settings: EngineSettings) -> None:
        self.path, self.settings = path, json.dumps(dataclasses.asdict(settings), sort_keys=True)
        self.times: Times = {}
        for line in path.read_text(encoding="utf-8").splitlines() if path and path.is_file() else []:
            row = json.loads(line)
            if row["settings"] == self.settings:
                self.times[row["model"], row["cell"], row["round"]] = (row["seconds"], row["peak_bytes"])

    def add(self, model: str, cell: Cell, turn: int, seconds: float, peak_bytes: int) -> None:
        self.times[model, str(cell), turn] = (seconds, peak_bytes)
        if self.path:
            row = {"settings": self.settings, "model": model, "cell": str(cell), "round": turn}
            with self.path.open("a", encoding="utf-8") as file:
                file.write(json.dumps({**row, "seconds": seconds, "peak_bytes": peak_bytes}) + "\n")


def measure_serving(
    models: Mapping[str, pathlib.Path],
    settings: EngineSettings,
    *,
    cells: Sequence[Cell],
    new_tokens: int,
    rounds: int,
    log: pathlib.Path | None,
    tick: Callable[[int], None],
) -> list[Served]:
    """Time every model in every cell; the first one is what the others are compared with."""
    kept, names = Log(log, settings), list(models)
    missing = [
        (turn, cell, name)
        for turn in range(rounds)
        for cell in cells
        for name in in_turn(names, turn)
        if (name, str(cell), turn) not in kept.times
    ]
    if missing:
        with engines(models, settings) as ask:
            for name in names:  # warm up: packing, caches, first-shape costs
                for cell in cells:
                    _ask(ask[name], cell, 3)
            for turn, cell, name in missing:
                answer = _ask(ask[name], cell, new_tokens)
                kept.add(name, cell, turn, answer.seconds, answer.peak_bytes)
                tick(1)
    return [
        _summary(kept.times, cell, name, models, rounds, settings.dtype) for cell in cells for name in names
    ]


def _ask(engine: Engine, cell: Cell, new_tokens: int, *, parts: bool = False) -> Answer:
    """Seconds to the first token, or for each token after it; by part, too, if `parts`."""
    if cell.kind == "first":
        return engine(Job(1, cell.size, 1, parts))
    first, whole = (engine(Job(cell.size, PROMPT_TOKENS, new, parts)) for new in (1, new_tokens))
    later = new_tokens - 1
    return Answer(
        (whole.seconds - first.seconds) / later,
        whole.peak_bytes,
        {part: (seconds - first.parts[part]) / later for part, seconds in whole.parts.items()},
    )


def _summary(
    times: Times, cell: Cell, name: str, models: Mapping[str, pathlib.Path], rounds: int, dtype: str
) -> Served:
    first = next(iter(models))
    pairs = [(times[first, str(cell), turn], times[name, str(cell), turn]) for turn in range(rounds)]
    speedup = statistics.median(a[0] / b[0] for a, b in pairs)
    ideal = ideal_of(cell, models[first], models[name], dtype)
    peak = max(b[1] for _, b in pairs)
    return Served(name, cell, statistics.median(b[0] for _, b in pairs), speedup, ideal, peak)


def measure_parts(
    models: Mapping[str, pathlib.Path],
    settings: EngineSettings,
    *,
    cells: Sequence[Cell],
    new_tokens: int,
    rounds: int,
    tick: Callable[[int], None],
) -> dict[tuple[str, str], dict[str, float]]:
    """(model, cell) -> seconds by part, the median over rounds of each: of a prompt with its first token, or
    of each token after it.
    """
    found: dict[tuple[str, str], list[Mapping[str, float]]] = {}
    with engines(models, settings) as ask:
        for turn in range(rounds + 1):  # the first one warms up
            for cell in cells:
                for name in in_turn(list(models), turn):
                    answer = _ask(ask[name], cell, new_tokens, parts=True)
                    found.setdefault((name, str(cell)), []).append(answer.parts)
                    tick(1)
    return {
        key: {part: statistics.median(each[part] for each in turns[1:]) for part in turns[0]}
        for key, turns in found.items()
    }


_PROJECTIONS = ("q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj")
_W8A8 = {
    "quant_method": "compressed-tensors",
    "format": "int-quantized",
    "quantization_status": "compressed",
    "ignore": ["lm_head"],
    "config_groups": {
        "group_0": {
            "targets": ["Linear"],
            "weights": {"num_bits": 8, "type": "int", "symmetric": True, "strategy": "channel"},
            "input_activations": {
                "num_bits": 8,
                "type": "int",
                "symmetric": True,
                "strategy": "token",
                "dynamic": True,
            },
        }
    },
}


def write_w8a8(dense: pathlib.Path, out: pathlib.Path) -> pathlib.Path:
    """A compressed-tensors folder: int8 weights with a scale for each channel, activations rounded as they
    come.
    """
    checkpoint, tensors = Checkpoint(dense), {}
    for name, tensor in checkpoint.tensors():
        if name.split(".")[-2] in _PROJECTIONS and name.endswith(".weight"):
            q, scale = quantize(tensor)
            tensors[name], tensors[name + "_scale"] = q, scale[:, None].to(torch.bfloat16)
        else:
            tensors[name] = tensor.to(torch.bfloat16)
    out.mkdir(parents=True)
    save_file(tensors, out / "model.safetensors", metadata={"format": "pt"})
    config = {**checkpoint.config, "quantization_config": _W8A8, "dtype": "bfloat16"}
    (out / "config.json").write_text(json.dumps(config, indent=2), encoding="utf-8")
    for path in dense.glob("tokenizer*.json"):
        shutil.copy(path, out)
    return out


def write_q8_0(dense: pathlib.Path, out: pathlib.Path) -> pathlib.Path:
    """A .gguf file of a Llama without its vocabulary, which a benchmark does not need. Raises UsageError for
    another architecture, or without the package `gguf`.
    """
    try:
        import gguf  # type: ignore[import-not-found]
    except ModuleNotFoundError as error:
        raise UsageError("--gguf: expected the package gguf, found none; pip install gguf.") from error
    checkpoint = Checkpoint(dense)
    config = checkpoint.config
    if config["model_type"] != "llama":
        raise UsageError(
            f"{dense}: expected a Llama for llama.cpp, found model_type {config['model_type']!r}."
        )
    out.parent.mkdir(parents=True, exist_ok=True)
    writer = gguf.GGUFWriter(out, "llama")
    _describe(writer, config)
    names = gguf.get_tensor_name_map(gguf.MODEL_ARCH.LLAMA, config["num_hidden_layers"])
    for name, tensor in checkpoint.tensors():
        values = tensor.float()
        for projection, heads in (("q_proj", "num_attention_heads"), ("k_proj", "num_key_value_heads")):
            if projection in name:  # llama.cpp rotates neighbours, Hugging Face halves
                parts = values.reshape(config[heads], 2, -1, values.shape[1])
                values = parts.transpose(1, 2).reshape(values.shape)
        data, kind = values.contiguous().numpy(), gguf.GGMLQuantizationType.F32
        if data.ndim == 2:
            kind = gguf.GGMLQuantizationType.Q8_0
            data = gguf.quants.quantize(data, kind)
        told = names.get_name(name, try_suffixes=(".weight",))
        assert told is not None, f"{name}: llama.cpp has no such tensor"
        writer.add_tensor(told, data, raw_dtype=kind)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return out


def _describe(writer: Any, config: dict[str, Any]) -> None:
    writer.add_context_length(config["max_position_embeddings"])
    writer.add_embedding_length(config["hidden_size"])
    writer.add_block_count(config["num_hidden_layers"])
    writer.add_feed_forward_length(config["intermediate_size"])
    writer.add_head_count(config["num_attention_heads"])
    writer.add_head_count_kv(config["num_key_value_heads"])
    writer.add_layer_norm_rms_eps(config["rms_norm_eps"])
    rope = config.get("rope_parameters") or {}
    writer.add_rope_freq_base(float(rope.get("rope_theta") or config.get("rope_theta") or 10000.0))
    writer.add_rope_dimension_count(
        config.get("head_dim") or config["hidden_size"] // config["num_attention_heads"]
    )
    writer.add_vocab_size(config["vocab_size"])
    writer.add_tokenizer_model("no_vocab")
