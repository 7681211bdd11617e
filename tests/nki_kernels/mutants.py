"""Deliberate mistakes in correct kernels, by hand and by rule, and the machinery that puts one in place and
takes it out again.
"""

from __future__ import annotations

import ast
import contextlib
import copy
import dataclasses
import importlib
import inspect
import types
from collections.abc import Iterator
from unittest import mock

PACKAGE = "nki_kernels.kernels."


@dataclasses.dataclass(frozen=True)
class Mutant:
    """One change to the source of `module`, told in words."""

    module: str
    told: str
    source: str = dataclasses.field(repr=False)

    def __str__(self) -> str:
        return f"{self.module}: {self.told}"


# (module, what the mistake is, right text, wrong text)
BY_HAND = (
    ("matmul", "dropped accumulate", "accumulate=not first", "accumulate=False"),
    ("matmul", "accumulate from the start", "accumulate=not first", "accumulate=True"),
    (
        "matmul",
        "swapped operands",
        "nisa.nc_matmul(dst, stationary, moving, accumulate",
        "nisa.nc_matmul(dst, moving, stationary, accumulate",
    ),
    (
        "products",
        "row tile off by one",
        "source[first:end, k, start : start + width]",
        "source[first:end, max(0, k - 1), start : start + width]",
    ),
    (
        "products",
        "stale token offset",
        "source[first:end, k, start : start + width]",
        "source[first:end, k, 0:width]",
    ),
    (
        "products",
        "last row tile read whole",
        "weights, moving = block[first:end, at : at + cols]",
        "weights, moving = block[:, at : at + cols]",
    ),
    (
        "products",
        "one row too few",
        "rows, kind = blocks[i]",
        "rows, kind = blocks[i]; rows = max(1, rows - 1)",
    ),
    ("products", "last block left out", "range(len(blocks))", "range(max(1, len(blocks) - 1))"),
    (
        "products",
        "first test of natural sums on the wrong index",
        "block[first:end, at : at + cols], i == 0",
        "block[first:end, at : at + cols], j == 0",
    ),
    (
        "products",
        "natural token offset",
        "source[first:end, k, start : start + size]",
        "source[first:end, k, 0:size]",
    ),
    (
        "products",
        "pivots read from the wrong row tile",
        "k, _first, rows, _kind = matrix.blocks(n)[0]",
        "k, _first, rows, _kind = matrix.blocks(0)[0]",
    ),
    (
        "products",
        "result column tile off by one",
        "there = dst[0:cols, n, start",
        "there = dst[0:cols, max(0, n - 1), start",
    ),
    ("workspace", "next block starts late", "self.position += cols", "self.position += cols + 1"),
    ("workspace", "a stale slot is trusted", "if self.held[slot] != chunk", "if self.held[slot] < 0"),
    (
        "workspace",
        "chunk read short",
        "self.bounds[chunk + 1] - start",
        "self.bounds[chunk + 1] - start - 1",
    ),
    (
        "workspace",
        "chunk read from one column further",
        "src=self.packed[:, start : start + size]",
        "src=self.packed[:, max(0, start - 1) : max(0, start - 1) + size]",
    ),
    (
        "workspace",
        "the shared block of another row tile",
        "self.shared[owner][k]\n",
        "self.shared[owner][0]\n",
    ),
    (
        "workspace",
        "the shared block of another matrix",
        "position = self.shared[owner]",
        "position = self.shared[0]",
    ),
    ("products", "int8: product not scaled", "scale=work.scales.of(matrix, n, cols)", "scale=1.0"),
    (
        "products",
        "int8: pivots of the tile before",
        "matrix.added_tile(n)",
        "max(0, matrix.added_tile(n) - 1)",
    ),
    ("products", "int8: pivots forgotten", "if added > 0", "if False"),
    ("stages", "int8: scale of up forgotten", "op0=nl.multiply,\n", "op0=nl.maximum,\n"),
    ("stages", "int8: scales of other columns", "n * matrix.tile_cols, j)", "0, j)"),
    (
        "workspace",
        "int8: half of a chunk cast",
        "dst=dst[:, middle:cols], src=src[:, middle:cols]",
        "dst=dst[:, middle : middle + 1], src=src[:, middle : middle + 1]",
    ),
    (
        "workspace",
        "int8: scale of the next tile",
        "matrix.scale_at + n : matrix.scale_at + n + 1",
        "matrix.scale_at + n + 1 : matrix.scale_at + n + 2",
    ),
    ("products", "z kept once", "if matrix.is_kept_twice(n)", "if False"),
    (
        "products",
        "shared block read as its first half",
        "block_of(work, kind, 2, k, cols)\n",
        "block_of(work, kind, 2, k, cols); first = 0\n",
    ),
    ("workspace", "no rewind", "self.position = position", "self.position = max(self.position, position)"),
    ("workspace", "mean without the division", "scale=1.0 / hidden", "scale=1.0"),
    ("workspace", "norm without eps", "bias=self.eps[0:tokens, :],", "bias=self.zero[0:tokens, :],"),
    (
        "workspace",
        "norm of the previous row",
        "total = self.sums[turn % 2]\n",
        "total = self.sums[turn % 2]; row = row if turn == 0 else scratch\n",
    ),
    (
        "load",
        "norm weight of the wrong channels",
        "weight[0:rows, first + j : first + j + 1]",
        "weight[0:rows, first : first + 1]",
    ),
    ("load", "norm weight forgotten", "if len(norms) == 0", "if True"),
    ("load", "raw tile instead of the normalised one", "row = rows[2]\n", "pass\n"),
    (
        "load",
        "token tile at the wrong place",
        "transpose_row(work, dst, row, start, size, work.norms)",
        "transpose_row(work, dst, row, 0, size, work.norms)",
    ),
    (
        "load",
        "block loaded from the first token",
        "src[first_token + start : first_token + start + size, :]",
        "src[start : start + size, :]",
    ),
    ("load", "ragged features dropped", "if left > 0:", "if False:"),
    ("load", "transposes into one place", "matmul(bank[:, j, :], row", "matmul(bank[:, 0, :], row"),
    (
        "load",
        "transpose reads its neighbour",
        "col = (first + j) * PMAX",
        "col = first * PMAX",
    ),
    ("stages", "pivots of up for those of gate", "op=nl.silu, data=gate[j]", "op=nl.silu, data=up[j]"),
    ("stages", "no activation of pivots", "op=nl.silu, data=gate[j]", "op=nl.copy, data=gate[j]"),
    ("stages", "gate and up swapped", "activated, gate[j], nl.silu", "activated, up[j], nl.silu"),
    ("stages", "no activation", "activated, gate[j], nl.silu", "activated, gate[j], nl.copy"),
    ("stages", "sum instead of product", "data2=up[j], op=nl.multiply", "data2=up[j], op=nl.add"),
    ("stages", "up from the z of gate", "up_source = work.up_z if", "up_source = work.gate_z if"),
    (
        "stages",
        "h tile off by one",
        "there = work.h[0:cols, n, start",
        "there = work.h[0:cols, max(0, n - 1), start",
    ),
    (
        "stages",
        "residual added to nothing",
        "if work.plan.with_residual:\n            copy_rows(stage, residual",
        "if False:\n            copy_rows(stage, residual",
    ),
    (
        "stages",
        "residual overwritten",
        "            elif work.plan.with_residual:\n                nisa.tensor_tensor",
        "            elif False:\n                nisa.tensor_tensor",
    ),
    ("stages", "staged at the wrong columns", "n * matrix.tile_cols - first_col, tiles)", "0, tiles)"),
    ("stages", "second token group not rewound", "work.stream.seek(mark)", "pass"),
    ("stages", "groups into one row", "stage[0:size, first + j, at", "stage[0:size, j, at"),
    (
        "stages",
        "rows stored at the first block",
        "hbm[first_token + start : first_token + start + size, first_col",
        "hbm[start : start + size, first_col",
    ),
    (
        "svd_mlp",
        "all rows of x^T as the first came",
        "work.h, src, rows[i], 0, tokens",
        "work.h, src, rows[0], 0, tokens",
    ),
    (
        "svd_mlp",
        "blocks of the first column tile for all",
        "((tiles[0] + j) * matrix.row_tiles() + k)",
        "k",
    ),
    (
        "svd_mlp",
        "sums begun anew with every row tile",
        "block, k == rows[0],",
        "block, True,",
    ),
    ("svd_mlp", "last rows not in z", "elif last:", "elif False:"),
    (
        "svd_mlp",
        "sums of the last rows alone",
        "data1=banks[j], data2=so_far",
        "data1=banks[j], data2=banks[j]",
    ),
    (
        "svd_mlp",
        "early tiles twice",
        "transposed_product(work, matrix, work.plan.early_tiles,",
        "transposed_product(work, matrix, 0,",
    ),
    ("workspace", "z of up over z of gate", "self.tiles(at.up_z,", "self.tiles(at.gate_z,"),
    ("workspace", "h over x", "self.tiles(at.h, ", "self.tiles(at.x, "),
    ("workspace", "raw rows over x", "address = self.plan.at.rows +", "address = self.plan.at.x +"),
    (
        "workspace",
        "two sums in one bank",
        "self.turn = (bank + 1) % PSUM_BANKS",
        "self.turn = (bank + 1) % 2",
    ),
    (
        "workspace",
        "a quarter of the identity",
        "size, col = self.plan.identity_size,",
        "size, col = self.plan.identity_size // 4 + 1,",
    ),
    ("load", "natural z of one core for all", "first = r * work.plan.tokens +", "first ="),
    (
        "load",
        "natural z piece of the wrong channels",
        "work.identity[0:end, partition:end]",
        "work.identity[0:end, 0:cols]",
    ),
    ("load", "shares of two cores swapped", "at = r * stride + base", "at = (1 - r) * stride + base"),
    (
        "load",
        "shares of two projections mixed",
        "base, slots, stride = share",
        "base, slots, stride = 0, share[1], share[2]",
    ),
    ("load", "gathered rows across a tile edge", "min(end - row, PMAX - partition)", "min(end - row, PMAX)"),
    (
        "load",
        "every block stored at the first token",
        "dst=dst[row : row + rows, first_token : first_token + tokens],",
        "dst=dst[row : row + rows, 0:tokens],",
    ),
    (
        "load",
        "every block of transposed input is the first",
        "src=src[k * PMAX : k * PMAX + rows, first_token : first_token + tokens],",
        "src=src[k * PMAX : k * PMAX + rows, 0:tokens],",
    ),
    ("workspace", "weights not rewound for the second block", "self.stream.seek(0)", "pass"),
    (
        "svd_mlp",
        "second block of x is the first",
        "load_input(work, work.x, x, first_token, tokens)",
        "load_input(work, work.x, x, 0, tokens)",
    ),
)
MODULES = ("products", "load", "stages", "svd_mlp", "sharded", "workspace", "matmul")
# Module -> what is changed by rule, where a module has entry kernels that the judges do not run in whole.
JUDGED = {"svd_mlp": {"svd_mlp", "product_on_arrival", "early_banks", "keep_early"}}
# Changes by rule that no run can tell from the original -> why they are no mistakes.
TURNS = (
    "two turns are there to overlap one tile's use with the next one's making; in program order one will do"
)
GATE_FIRST = "the scales of gate come before those of up, which never begin at 0"
FIRST_OF_ALL = "the int8 identity is cast before anything else is on chip: it may lie anywhere"
NO_OWNER = "any negative number is no owner"
EARLY = "when things come, and not what comes: tests of schedules hold it"
ALIKE = "a first factor without pivots has the same blocks in every column tile"
NO_SLOTS = "without slots the loop over a share's rows does nothing"
EQUIVALENT: dict[str, str] = {
    "Lt -> LtE in `self.bounds[self.chunk + 1] < position` of `while self.bounds[self.chunk + 1] < position:`": "take() does it",
    "+ 1 in `0` of `self.seek(0)`": "every block of tokens begins with a seek of its own",
    "+ 1 in `1` of `self.held.append(-1)`": "any negative number is no chunk",
    "+ 1 in `2` of `row = rows[i % 2]`": "z in rows has at most two tiles of tokens; where x has more, it is caught",
    "+ 1 in `0` of `positions.append(0)`": "a place is set before it is read",
    "+ 1 in `1` of `if self.plan.is_int8 and len(self.slots) > 1 and (self.chunk + 2 < len(self.bounds)):`": EARLY,
    "+ 1 in `0` of `if middle > 0:`": "a multiple of 128",
    "+ 1 in `1` of `add_transposed(work, block, k == rows[0], banks[j], work.h, widths, -1)`": NO_OWNER,
    "+ 1 in `1` of `sums = transposed_tile(work, matrix, n, source, widths, -1)`": NO_OWNER,
    "Add -> Sub in `plan.at.raw + i * plan.raw_bytes` of `raw = nl.ndarray((packed.shape[0], "
    "plan.ring_cols), dtype=packed.dtype, "
    "buffer=nl.sbuf, name=f'raw{i}', address=(0, plan.at.raw + i * plan.raw_bytes))`": "over small tiles, in turn with them",
    "+ 1 in `1` of `groups = pieces(whole, max(1, MOVING_COLS // size))`": "size is at most 128, so the maximum is never the 1",
    "FloorDiv -> Mult in `MOVING_COLS // size` of `groups = pieces(whole, max(1, MOVING_COLS // size))`": "more banks at once, if free",
    "Add -> Sub in `n * len(widths) + j` of `activated = work.activated[(n * len(widths) + j) % 2][0:cols, 0:width]`": TURNS,
    "Mult -> Add in `n * len(widths)` of `activated = work.activated[(n * len(widths) + j) % 2][0:cols, 0:width]`": TURNS,
    "Mod -> FloorDiv in `turn % 2` of `scaled = work.scales.scaled[turn % 2][0:size, 0:cols]`": TURNS,
    "Mult -> Add in `i * MOVING_COLS` of `address = plan.at.scaled + i * MOVING_COLS * 4`": TURNS,
    "+ 1 in `4` of `address = plan.at.scaled + i * MOVING_COLS * 4`": TURNS,
    "Mult -> Add in `(1 + i) * PMAX` of `diagonal = tensor_at(at.small + (1 + i) * PMAX * 4, (PMAX, PMAX), nl.float32)`": TURNS,
    "+ 1 in `1` of `diagonal = tensor_at(at.small + (1 + i) * PMAX * 4, (PMAX, PMAX), nl.float32)`": TURNS,
    "+ 1 in `4` of `diagonal = tensor_at(at.small + (1 + i) * PMAX * 4, (PMAX, PMAX), nl.float32)`": TURNS,
    "+ 1 in `1` of `last = self.plan.at.raw + (self.plan.raw_slots - 1) * self.plan.raw_bytes`": FIRST_OF_ALL,
    "Add -> Sub in `plan.at.scaled + i * MOVING_COLS * 4` of `address = plan.at.scaled + i * MOVING_COLS * 4`": TURNS,
    "Mult -> Add in `i * MOVING_COLS * 4` of `address = plan.at.scaled + i * MOVING_COLS * 4`": TURNS,
    "Lt -> LtE in `up_matrix.scale_at < 0` of `if up_matrix.scale_at < 0 or is_source_itself(up_matrix, n):`": GATE_FIRST,
    "+ 1 in `0` of `if up_matrix.scale_at < 0 or is_source_itself(up_matrix, n):`": GATE_FIRST,
    "Add -> Sub in `self.plan.at.raw + (self.plan.raw_slots - 1) * self.plan.raw_bytes` of "
    "`last = self.plan.at.raw + (self.plan.raw_slots - 1) * self.plan.raw_bytes`": FIRST_OF_ALL,
    "Mult -> Add in `(self.plan.raw_slots - 1) * self.plan.raw_bytes` of "
    "`last = self.plan.at.raw + (self.plan.raw_slots - 1) * self.plan.raw_bytes`": FIRST_OF_ALL,
    "Sub -> Add in `self.plan.raw_slots - 1` of `last = self.plan.at.raw + (self.plan.raw_slots - 1) * self.plan.raw_bytes`": FIRST_OF_ALL,
    "Mod -> FloorDiv in `n % 2` of `stage = turns[n % 2]`": TURNS,
    "+ 1 in `0` of `self.turn = 0`": TURNS,
    "Add -> Sub in `bank + 1` of `self.turn = (bank + 1) % PSUM_BANKS`": TURNS,
    "+ 1 in `1` of `self.turn = (bank + 1) % PSUM_BANKS`": TURNS,
    "+ 1 in `2` of `for i in range(2):`": "a third turn that nobody takes",
    "+ 1 in `3` of `for i in range(3 if self.plan.with_norm else 2):`": "a row that nobody takes",
    "+ 1 in `2` of `for i in range(3 if self.plan.with_norm else 2):`": "a row that nobody takes",
    "Mod -> FloorDiv in `i % 2` of `row = rows[i % 2]`": TURNS,
    "+ 1 in `0` of `if left > 0:`": "a rest of one feature: no case has it",
    "Gt -> GtE in `left > 0` of `if left > 0:`": "a rest of no feature moves nothing",
    "Gt -> GtE in `work.plan.block_tokens > PMAX` of `if work.plan.block_tokens > PMAX:`": EARLY,
    "+ 1 in `0` of `chunk = 0`": EARLY,
    "+ 1 in `1` of `chunk += 1`": EARLY,
    "+ 1 in `0` of `self.first_col = 0`": "set before it is read",
    "+ 1 in `0` of `group = work.plan.early_group if i == 0 else 1`": EARLY,
    "+ 1 in `1` of `group = work.plan.early_group if i == 0 else 1`": EARLY,
    "Eq -> NotEq in `i == 0` of `group = work.plan.early_group if i == 0 else 1`": EARLY,
    "Add -> Sub in `n * matrix.row_tiles() + rows[i][0]` of "
    "`work.stream.ask((n * matrix.row_tiles() + rows[i][0]) * PMAX)`": EARLY,
    "Mult -> Add in `(n * matrix.row_tiles() + rows[i][0]) * PMAX` of "
    "`work.stream.ask((n * matrix.row_tiles() + rows[i][0]) * PMAX)`": EARLY,
    "Add -> Sub in `tiles[0] + j` of `blocks.append(matrix.blocks(tiles[0] + j))`": ALIKE,
    "+ 1 in `0` of `blocks.append(matrix.blocks(tiles[0] + j))`": ALIKE,
    "Gt -> GtE in `gate_slots > 0` of `if gate_slots > 0:`": NO_SLOTS,
    "Gt -> GtE in `up_slots > 0` of `if up_slots > 0:`": NO_SLOTS,
    "Gt -> GtE in `plan.gate_z_tiles > 0` of `if plan.gate_z_tiles > 0:`": NO_SLOTS,
    "Gt -> GtE in `plan.up_z_tiles > 0` of `if plan.up_z_tiles > 0:`": NO_SLOTS,
}


def source_of(module: str) -> str:
    return inspect.getsource(importlib.import_module(PACKAGE + module))


def by_hand() -> Iterator[Mutant]:
    """The mistakes above; a text that is no longer in the source is an error of the list."""
    for module, told, right, wrong in BY_HAND:
        source = source_of(module)
        assert right in source, f"{module}: {right!r} is not in the source any more"
        yield Mutant(module, told, source.replace(right, wrong, 1))


SWAPS = {ast.Add: ast.Sub, ast.Sub: ast.Add, ast.Mult: ast.Add, ast.FloorDiv: ast.Mult, ast.Mod: ast.FloorDiv}
COMPARE = {
    ast.Eq: ast.NotEq,
    ast.NotEq: ast.Eq,
    ast.Lt: ast.LtE,
    ast.Gt: ast.GtE,
    ast.GtE: ast.Gt,
    ast.LtE: ast.Lt,
}


def by_rule(module: str) -> Iterator[Mutant]:
    """Every arithmetic and comparison operator exchanged and every integer raised by one, one at a time."""
    tree = ast.parse(source_of(module))
    statements = {
        id(inner): ast.unparse(outer).splitlines()[0]
        for outer in ast.walk(tree)
        if isinstance(outer, ast.stmt)
        for inner in ast.walk(outer)
    }
    judged = {
        id(node)
        for part in tree.body
        if module not in JUDGED or getattr(part, "name", "") in JUDGED[module]
        for node in ast.walk(part)
    }
    places = [node for node in ast.walk(tree) if _mutations(node)]
    for number, place in enumerate(places):
        if id(place) not in judged:
            continue
        for told, change in _mutations(place):
            copied = copy.deepcopy(tree)
            change([node for node in ast.walk(copied) if _mutations(node)][number])
            where = f"`{ast.unparse(place)}` of `{statements[id(place)]}`"
            yield Mutant(module, f"{told} in {where}", ast.unparse(copied))


def _mutations(node: ast.AST) -> list:
    if isinstance(node, ast.BinOp) and type(node.op) in SWAPS:
        return [
            (
                f"{type(node.op).__name__} -> {SWAPS[type(node.op)].__name__}",
                lambda n: setattr(n, "op", SWAPS[type(n.op)]()),
            )
        ]
    if isinstance(node, ast.Compare) and type(node.ops[0]) in COMPARE:
        return [
            (
                f"{type(node.ops[0]).__name__} -> {COMPARE[type(node.ops[0])].__name__}",
                lambda n: setattr(n, "ops", [COMPARE[type(n.ops[0])]()]),
            )
        ]
    if isinstance(node, ast.Constant) and type(node.value) is int:
        return [("+ 1", lambda n: setattr(n, "value", n.value + 1))]
    return []


@contextlib.contextmanager
def in_place(mutant: Mutant) -> Iterator[None]:
    """Give every function of the module the mutant's code, so that whoever imported it runs the mistake too.

    Its text is in no file, so the front end does not read it; what a run shows of the language is still held.
    """
    module = importlib.import_module(PACKAGE + mutant.module)
    namespace = dict(vars(module))
    exec(compile(mutant.source, f"<{mutant}>", "exec"), namespace)
    swapped = []
    for owner, wrong_owner in [(vars(module), namespace), *_classes(module, namespace)]:
        for name, function in list(owner.items()):
            if isinstance(function, types.FunctionType) and function.__module__ == module.__name__:
                swapped.append((function, function.__code__))
                function.__code__ = wrong_owner[name].__code__
    try:
        with mock.patch("nki_kernels.simulator.simulation.accept"):
            yield
    finally:
        for function, code in reversed(swapped):  # `down` is `xuv`: its second code is the mutant's
            function.__code__ = code


def _classes(module: types.ModuleType, namespace: dict) -> list:
    own = [
        name
        for name, value in vars(module).items()
        if isinstance(value, type) and value.__module__ == module.__name__
    ]
    return [(vars(getattr(module, name)), vars(namespace[name])) for name in own]
