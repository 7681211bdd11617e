"""What a user of a CPU waits for: time to first token and decoding, of several models in turns, against the
first.

Each model has an engine in a process of its own. A round asks every model for every cell once, in an order
that rotates; a ratio is taken within a round, so that whatever else the machine does hits both sides, and
what is reported is the median over rounds. Rounds are kept in a file as they are measured, so that a run can
go on where it was ended.
"""

from __future__ import annotations

import dataclasses
import json
import pathlib
import statistics
from collections.abc import Callable, Mapping, Sequence

from neuronmlp_plugin.bench.decode import bytes_per_step
from neuronmlp_plugin.bench.engines import Engine, EngineSettings, Job, engines
from neuronmlp_plugin.checkpoint.reader import Checkpoint
from neuronmlp_plugin.errors import CheckpointError


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
        return (self.speedup - 1.0) / (self.ideal - 1.0) if self.ideal > 1.0 else float("nan")


DECODE_PROMPT = 32
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
        for name in names[turn % len(names) :] + names[: turn % len(names)]
        if (name, str(cell), turn) not in kept.times
    ]
    if missing:
        with engines(models, settings) as ask:
            for name in names:  # warm up: packing, caches, first-shape costs
                for cell in cells:
                    _seconds(ask[name], cell, 3)
            for turn, cell, name in missing:
                kept.add(name, cell, turn, *_seconds(ask[name], cell, new_tokens))
                tick(1)
    return [
        _summary(kept.times, cell, name, models, rounds, settings.dtype) for cell in cells for name in names
    ]


def _seconds(engine: Engine, cell: Cell, new_tokens: int) -> tuple[float, int]:
    """Seconds to the first token, or for each token after it."""
    if cell.kind == "first":
        answer = engine(Job(1, cell.size, 1))
        return answer.seconds, answer.peak_bytes
    first = engine(Job(cell.size, DECODE_PROMPT, 1))
    whole = engine(Job(cell.size, DECODE_PROMPT, new_tokens))
    return (whole.seconds - first.seconds) / (new_tokens - 1), whole.peak_bytes


def _summary(
    times: Times, cell: Cell, name: str, models: Mapping[str, pathlib.Path], rounds: int, dtype: str
) -> Served:
    first = next(iter(models))
    pairs = [(times[first, str(cell), turn], times[name, str(cell), turn]) for turn in range(rounds)]
    speedup = statistics.median(a[0] / b[0] for a, b in pairs)
    ideal = ideal_of(cell, models[first], models[name], dtype)
    peak = max(b[1] for _, b in pairs)
    return Served(name, cell, statistics.median(b[0] for _, b in pairs), speedup, ideal, peak)
