"""Where the tensors of a launch lie in SBUF: bytes of each partition, as addresses of a plan.

x | h | output | rows          h over x unless a second product starts from x; output over h where the z
gate_z, up_z / down_z          of down stands between; rows over output if the plan shares them
activated, identity, small tiles
ring

The int8 scales of natural output, spread over the partitions, lie with the small tiles or, if they are spread
piece by piece, behind rows.
"""

from __future__ import annotations

import dataclasses
from typing import Any

from nki_kernels.casts import natural_cols
from nki_kernels.request import Request, z_is_natural
from nki_kernels.targets import PMAX
from nki_kernels.tile_plan import Addresses, Plan
from nki_kernels.tiling import MOVING_COLS, tile_count

# int8 chunks on their way: one being cast, one there, one arriving; in decode also those that arrive before
# the engines are done with x.
RAW_SLOTS, DECODE_RAW_SLOTS = 3, 8
ALIGN_BYTES = 256  # so that no two tensors share a line


@dataclasses.dataclass(frozen=True)
class Room:
    """What decides the sizes: the request, and the tile sizes chosen for it. H 256 and I 512 in fp16, 128
    tokens: x has 2 tiles of 256 bytes a partition, h 4 behind it, and output comes behind h.

    >>> import numpy as np
    >>> from nki_kernels.layout import DENSE, mlp_layout
    >>> request = Request(mlp_layout(256, 512, DENSE, DENSE, DENSE), 128, np.dtype(np.float16))
    >>> at = place(Room(request, 128, 128, out_cols=512, ring_cols=512, shares_rows=False))["at"]
    >>> at.x, at.h, at.output
    (0, 512, 1536)
    """

    request: Request
    block_tokens: int
    moving_tokens: int
    out_cols: int  # of natural output, staged at a time
    ring_cols: int
    shares_rows: bool
    spreads_pieces: bool = False
    early_tiles: int = 0

    def row_tiles(self, count: int) -> int:
        """Bytes of `count` row tiles of a block of tokens."""
        return aligned(count * self.block_tokens * self.request.dtype.itemsize)


def aligned(size_bytes: int) -> int:
    """The next multiple of ALIGN_BYTES."""
    return tile_count(size_bytes, ALIGN_BYTES) * ALIGN_BYTES


def sum_bytes(block_tokens: int) -> int:
    """Bytes of a column tile's sums of a block of tokens, in fp32."""
    return block_tokens * 4


def raw_slots(block_tokens: int) -> int:
    """How many int8 chunks can be on their way."""
    return DECODE_RAW_SLOTS if block_tokens <= PMAX else RAW_SLOTS


def place(room: Room) -> dict[str, Any]:
    """Fields of a Plan: `at`, and the bytes from one turn to the next of tensors that come in turns."""
    layout, itemsize = room.request.layout, room.request.dtype.itemsize
    turn_bytes = aligned(room.block_tokens * itemsize)
    row_bytes = aligned(_input_row_cols(room.request) * itemsize)
    wide = _wide(room, row_bytes)
    z = wide.pop("end")
    gate_bytes, up_bytes, down_bytes = (
        room.row_tiles(layout.z_tiles(name)) for name in ("gate", "up", "down")
    )
    # Down's z lies over gate's and up's, which h has replaced by then.
    z_rows = z + max(gate_bytes + up_bytes, down_bytes)
    z_row_bytes = aligned(_z_row_cols(room.request) * itemsize)
    activated = z_rows + 2 * z_row_bytes
    activated_bytes = aligned(room.moving_tokens * 4) if layout.gate_second is not None else 0
    small = _small(room, activated + 2 * activated_bytes)
    after = _int8(room, small.pop("end"))
    raw_bytes = after.pop("raw_bytes")
    z_addresses = {"gate_z": z, "up_z": z + gate_bytes, "down_z": z, "z_rows": z_rows}
    at = Addresses(**{**wide, **z_addresses, "activated": activated, **small, **after})
    return {
        "at": at,
        "slot_bytes": aligned(room.ring_cols * itemsize),
        "row_bytes": row_bytes,
        "turn_bytes": turn_bytes,
        "z_row_bytes": z_row_bytes,
        "activated_bytes": activated_bytes,
        "align_bytes": ALIGN_BYTES,
        "raw_bytes": raw_bytes,
    }


def _small(room: Room, start: int) -> dict[str, int]:
    """Addresses of the small tiles, from `start` on, and where the last of them ends; those of the norm take
    room only where the launch has one.
    """
    zero = start + aligned(PMAX * room.request.dtype.itemsize)
    norm_weight = zero + ALIGN_BYTES
    norm_eps = norm_weight + aligned(tile_count(room.request.layout.hidden) * 4)
    norm_sums = norm_eps + ALIGN_BYTES
    end = norm_sums + 2 * ALIGN_BYTES if room.request.norm_eps is not None else norm_weight
    addresses = {"identity": start, "zero": zero, "norm_weight": norm_weight}
    return {**addresses, "norm_eps": norm_eps, "norm_sums": norm_sums, "end": end}


def _int8(room: Room, start: int) -> dict[str, int]:
    """Addresses of what int8 weights need, from `start` on, and of the ring behind; `start` for all where
    they are not int8.
    """
    layout = room.request.layout
    if not layout.is_int8:
        return {
            **dict.fromkeys(("scales", "spread", "small", "scaled", "raw", "ring"), start),
            "raw_bytes": 0,
        }
    spread = _spread(room, start + aligned(layout.scale_cols * 4), in_pieces=False)
    scaled = spread.pop("end")
    raw = scaled + (2 * MOVING_COLS * 4 if room.request.residual else 0)
    # The int8 identity, 128 columns, comes through one of them, too.
    raw_bytes = aligned(max(room.ring_cols, PMAX))
    ring = raw + raw_slots(room.block_tokens) * raw_bytes
    return {
        "scales": start,
        **spread,
        "scaled": scaled,
        "raw": raw,
        "ring": ring,
        "raw_bytes": raw_bytes,
    }


def _spread(room: Room, start: int, in_pieces: bool) -> dict[str, int]:
    """Addresses, from `start` on, of the spread int8 scales of natural output and of what it takes to spread
    them, and where that ends; none where the plan spreads them the other way.
    """
    natural = natural_cols(room.request.layout)
    if not room.request.layout.is_int8 or not natural:
        return {"spread": start, "small": start, "end": start}
    if in_pieces != room.spreads_pieces:
        return {"end": start}
    small = start + aligned((room.out_cols if in_pieces else natural) * 4)
    # Five of `[128, 128]` fp32: the ones, and four diagonals (`workspace.Scales.spread_rows`).
    return {"spread": start, "small": small, "end": small + 5 * PMAX * 4}


def _wide(room: Room, row_bytes: int) -> dict[str, int]:
    """Addresses of x, h, output and rows, and where the last of them ends."""
    layout = room.request.layout
    x_end = room.row_tiles(tile_count(layout.hidden))
    # A dense gate or up reads x while h is written; else x is used up once there is z.
    h = x_end if layout.x_outlives_firsts else 0
    h_end = h + room.row_tiles(layout.h_tiles)
    # Output may lie over h where h is dead by the time that results are staged, and never over x, which the
    # next block's rows are on their way to.
    output = x_end if layout.hidden and layout.down_first is not None else max(x_end, h_end)
    early_bytes = aligned(room.early_tiles * sum_bytes(room.block_tokens))
    output_end = output + max(output_bytes(room), early_bytes)
    rows = output if room.shares_rows else output_end
    rows_end = rows + row_bytes * (2 if room.request.norm_eps is None else 3)
    spread = _spread(room, max(output_end, rows_end), in_pieces=True)
    end = max(h_end, spread.pop("end"))
    return {"x": 0, "h": h, "output": output, "rows": rows, **spread, "end": end}


def _input_row_cols(request: Request) -> int:
    """Columns of a raw row of natural input; none where input comes transposed."""
    layout = request.layout
    if request.transposed_input or (layout.external_z and not layout.hidden):
        return 0
    return layout.hidden or layout.intermediate


def _z_row_cols(request: Request) -> int:
    """Columns of the widest natural z that crosses a collective on its way from or to this launch."""
    layout = request.layout
    if not z_is_natural(request.tokens, request.dtype):
        return 0
    crossing = [layout.matrix(f"{name}_second") for name in layout.external_z]
    given = [matrix.rows for matrix in crossing if matrix is not None]
    pairs = (
        (layout.gate_first, layout.gate_second),
        (layout.up_first, layout.up_second),
        (layout.down_first, layout.down_second),
    )
    made = [first.cols for first, second in pairs if first is not None and second is None]
    return max(given + made, default=0)


def output_bytes(room: Room) -> int:
    """Bytes of staged natural output, or of two turns of a transposed column tile."""
    last = room.request.layout.down_second
    if last is None:
        return 0
    if last.tile_cols != MOVING_COLS:
        return 2 * room.row_tiles(1)
    return aligned(tile_count(room.block_tokens) * room.out_cols * room.request.dtype.itemsize)


def largest(plan: Plan) -> list[tuple[str, int]]:
    """(what, bytes per partition) of what takes most of SBUF, largest first, for a refusal."""
    at = plan.at
    parts = {
        "x, h and rows": at.gate_z,
        "z": at.activated - at.gate_z,
        "ring": plan.ring_slots * plan.slot_bytes,
    }
    return sorted(parts.items(), key=lambda item: -item[1])
