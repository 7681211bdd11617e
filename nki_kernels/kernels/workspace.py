"""What a launch holds on chip: every tensor at the address that the plan gives it, PSUM bank by bank, and the
packed weights as a stream through a ring of SBUF slots.
"""

from __future__ import annotations

from typing import Any

from nki_kernels.backend import nisa, nl
from nki_kernels.kernels.matmul import matmul
from nki_kernels.targets import PMAX, PSUM_BANK_BYTES, PSUM_BANKS
from nki_kernels.tile_plan import Plan
from nki_kernels.tiling import MOVING_COLS, Matrix, pieces, tile_count

Tensor = Any  # an NKI tensor, or the simulator's


class WeightStream(nl.NKIObject):
    """Hands out the stored blocks of `packed` `[128, C]` in order, reading a chunk when its first block is
    asked for.

    A chunk always goes to the same slot of the ring. One that is still there is not read again: that is how a
    ring that holds everything reads the weights once for all token blocks, and how a second token group
    reuses what the first has read.
    """

    def __init__(self, packed: Tensor, plan: Plan, dtype: Any, zero: Tensor) -> None:
        self.packed = packed
        self.zero = zero
        self.plan = plan
        self.bounds = plan.chunk_bounds
        # Where the blocks lie that the next column tile shares: a list over row tiles for gate, up and down.
        products = plan.products
        self.shared = []
        for matrix in (products.gate_second, products.up_second, products.down_second):
            positions = []
            if matrix != None:  # noqa: E711
                for _k in range(matrix.row_tiles()):
                    positions.append(0)
            self.shared.append(positions)
        self.slots = []
        self.held = []
        for i in range(plan.ring_slots):
            slot = nl.ndarray(
                (packed.shape[0], plan.ring_cols),
                dtype=dtype,
                buffer=nl.sbuf,
                name=f"ring{i}",
                address=(0, plan.at.ring + i * plan.slot_bytes),
            )
            self.slots.append(slot)
            # Which chunk a slot holds; -1: none yet.
            self.held.append(-1)
        self.raw = []
        for i in range(plan.raw_slots):
            raw = nl.ndarray(
                (packed.shape[0], plan.ring_cols),
                dtype=packed.dtype,
                buffer=nl.sbuf,
                name=f"raw{i}",
                address=(0, plan.at.raw + i * plan.raw_bytes),
            )
            self.raw.append(raw)
        self.seek(0)

    def seek(self, position: int) -> None:
        """Continue at packed column `position`, a block's first."""
        self.position = position
        self.chunk = 0
        # A position on a bound stays in the chunk before it: `take` goes on to the next.
        while self.bounds[self.chunk + 1] < position:
            self.chunk += 1

    def ask(self, position: int) -> None:
        """Have the chunk that begins at packed column `position` in its slot, ahead of its use."""
        chunk = 0
        while self.bounds[chunk] < position:
            chunk += 1
        self.load(chunk)

    def take(self, cols: int) -> tuple:
        """The next block of `cols` columns: (slot, first column), to be sliced where it is used."""
        if self.position >= self.bounds[self.chunk + 1]:
            self.chunk += 1
        self.load(self.chunk)
        # An engine works in order: what the next chunk needs cast must not wait behind this one's results.
        if self.plan.is_int8 and len(self.slots) > 1 and self.chunk + 2 < len(self.bounds):
            self.load(self.chunk + 1)
        at = self.position - self.bounds[self.chunk]
        self.position += cols
        return self.slots[self.chunk % len(self.slots)], at

    def take_stored(self, cols: int, owner: int, k: int) -> tuple:
        """As `take`, and remember the place for the column tile that shares the block; owner: 0 gate, 1 up, 2
        down.
        """
        self.shared[owner][k] = self.position
        return self.take(cols)

    def take_shared(self, owner: int, k: int) -> tuple:
        """The block that was taken for row tile `k` of the column tile before."""
        position = self.shared[owner][k]
        # What is shared was handed out already, so it lies in this chunk or an earlier one.
        chunk = self.chunk
        while self.bounds[chunk] > position:
            chunk -= 1
        self.load(chunk)
        return self.slots[chunk % len(self.slots)], position - self.bounds[chunk]

    def load(self, chunk: int) -> None:
        """Have a chunk in its slot."""
        slot = chunk % len(self.slots)
        if self.held[slot] != chunk:
            start = self.bounds[chunk]
            size = self.bounds[chunk + 1] - start
            there = self.slots[slot]
            if self.plan.is_int8:
                there = self.raw[chunk % len(self.raw)]
            nisa.dma_copy(
                dst=there[:, 0:size],
                src=self.packed[:, start : start + size],
                dge_mode=nisa.dge_mode.none,
            )
            if self.plan.is_int8:
                self.cast(chunk, self.slots[slot], there, size)
            self.held[slot] = chunk

    def cast(self, chunk: int, dst: Tensor, src: Tensor, cols: int) -> None:
        """int8 to the type of the products, shared by ScalarE and VectorE so that neither is late."""
        share = self.plan.scalar_share
        if chunk >= self.plan.natural_chunk:
            share = self.plan.natural_share
        # In whole blocks of 128 columns: share / 128 of them.
        middle = cols // PMAX * share // PMAX * PMAX
        if middle > 0:
            nisa.activation(dst=dst[:, 0:middle], op=nl.copy, data=src[:, 0:middle], bias=self.zero)
        if middle < cols:
            nisa.tensor_copy(dst=dst[:, middle:cols], src=src[:, middle:cols])


def tensor_at(address: int, shape: tuple, dtype: Any) -> Tensor:
    """A fresh SBUF tensor from byte `address` of every partition on."""
    return nl.ndarray(shape, dtype=dtype, buffer=nl.sbuf, address=(0, address))


class Banks(nl.NKIObject):
    """PSUM, bank after bank in turn: while one product fills its banks, the engines empty those of the
    last.
    """

    def __init__(self) -> None:
        self.turn = 0

    def tile(self, shape: tuple) -> Tensor:
        """A fresh fp32 tile in the next bank; what was there must have been used."""
        bank = self.turn
        self.turn = (bank + 1) % PSUM_BANKS
        return nl.ndarray(shape, dtype=nl.float32, buffer=nl.psum, address=(0, bank * PSUM_BANK_BYTES))


class Norm(nl.NKIObject):
    """RMSNorm: its weight as packed by `pack_norm`, and the small tiles that it needs."""

    def __init__(self, plan: Plan, packed_weight: Tensor, zero: Tensor) -> None:
        self.zero = zero
        self.weight = tensor_at(plan.at.norm_weight, packed_weight.shape, nl.float32)
        nisa.dma_copy(dst=self.weight, src=packed_weight, dge_mode=nisa.dge_mode.none)
        self.eps = tensor_at(plan.at.norm_eps, (PMAX, 1), nl.float32)
        nisa.memset(self.eps, plan.norm_eps)
        self.sums = []
        for i in range(2):
            self.sums.append(tensor_at(plan.at.norm_sums + i * plan.align_bytes, (PMAX, 1), nl.float32))

    def normalise(self, row: Tensor, scratch: Tensor, tokens: int, turn: int) -> None:
        """scratch = row / sqrt(mean(row^2) + eps) of the first `tokens` partitions; the weight is applied
        after the transpose.
        """
        hidden = row.shape[1]
        total = self.sums[turn % 2]
        # Only the sum of the squares is wanted; they themselves go where the result will overwrite them.
        nisa.activation(
            dst=scratch[0:tokens, :],
            op=nl.square,
            data=row[0:tokens, :],
            bias=self.zero[0:tokens, :],
            reduce_op=nl.add,
            reduce_res=total[0:tokens, :],
            reduce_cmd=nisa.reduce_cmd.reset_reduce,
        )
        # op(data scale + bias) in one instruction: 1 / sqrt(sum / H + eps).
        nisa.activation(
            dst=total[0:tokens, :],
            op=nl.rsqrt,
            data=total[0:tokens, :],
            bias=self.eps[0:tokens, :],
            scale=1.0 / hidden,
        )
        # Rounded to the type of x here, before the weight, as Hugging Face's norms are
        # (`reference.rms_norm`).
        nisa.tensor_scalar(
            dst=scratch[0:tokens, :], data=row[0:tokens, :], op0=nl.multiply, operand0=total[0:tokens, :]
        )


class Scales(nl.NKIObject):
    """Scales of int8 weights: by partition for transposed products, spread over all for natural ones."""

    def __init__(self, plan: Plan, packed: Tensor) -> None:
        self.packed = packed  # None where the weights are not int8, and so are the others then
        self.columns = packed
        self.spread = packed
        self.ones = packed
        self.first_col = 0  # of the columns whose scales are spread
        self.is_loaded = False
        self.scaled = []
        if not plan.is_int8:
            return
        self.columns = tensor_at(plan.at.scales, packed.shape, nl.float32)
        if plan.with_residual:
            for i in range(2):
                address = plan.at.scaled + i * MOVING_COLS * 4
                self.scaled.append(tensor_at(address, (PMAX, MOVING_COLS), nl.float32))

    def load(self, work: Workspace) -> None:
        """Once, behind the first activations and before the first weights: what is needed first comes first,
        and the engines have nothing to cast yet.
        """
        if not work.plan.is_int8 or self.is_loaded:
            return
        self.is_loaded = True
        nisa.dma_copy(dst=self.columns, src=self.packed, dge_mode=nisa.dge_mode.none)
        if not work.plan.natural_output:
            return
        if work.plan.block_tokens > PMAX:
            # The first weights are there before all rows of a block are: their casts need not wait.
            work.stream.load(0)
        if not work.plan.spreads_pieces:
            self.spread_rows(work, 0, work.plan.products.down_second.cols)

    def spread_rows(self, work: Workspace, first_col: int, cols: int) -> None:
        """The scales of natural output columns [first_col, + cols) on every partition: ones^T diag(scales),
        whose sums have one term each.
        """
        self.first_col = first_col
        matrix = work.plan.products.down_second
        at = work.plan.at
        if first_col == 0:
            # Not for every piece: VectorE would come to it behind the last piece's results, and TensorE wait.
            self.ones = tensor_at(at.small, (PMAX, PMAX), nl.float32)
            nisa.memset(self.ones, 1.0)
        self.spread = tensor_at(at.spread, (PMAX, cols), nl.float32)
        banks = pieces(cols, MOVING_COLS)
        for b in range(len(banks)):
            first, count = banks[b]
            bank = work.banks.tile((PMAX, count))
            for i in range(tile_count(count, PMAX)):
                col, width = i * PMAX, min(PMAX, count - i * PMAX)
                # Behind the ones, four of them: as many tiles of 128 as a bank of 512 columns has.
                diagonal = tensor_at(at.small + (1 + i) * PMAX * 4, (PMAX, PMAX), nl.float32)
                nisa.activation(
                    dst=diagonal[0:width, 0:width],
                    op=nl.copy,
                    data=work.identity[0:width, 0:width],
                    bias=work.zero[0:width, :],
                    scale=self.of(matrix, (first_col + first) // PMAX + i, width),
                )
                matmul(bank[:, col : col + width], self.ones[0:width, :], diagonal[0:width, 0:width], True)
            nisa.tensor_copy(dst=self.spread[:, first : first + count], src=bank)

    def of(self, matrix: Matrix, n: int, cols: int) -> Tensor:
        """`[cols, 1]`: the scales of the matrix's n-th 128 columns."""
        return self.columns[0:cols, matrix.scale_at + n : matrix.scale_at + n + 1]


class Workspace(nl.NKIObject):
    """What lives as long as the launch (ring, identity, small tiles), and the tensors of one block of tokens.

    x, h and the z are `[128, row tiles, block_tokens]`. Those that the launch does not use are None.
    """

    def __init__(self, plan: Plan, weights: Tensor, norm_weight: Tensor, scales: Tensor, dtype: Any) -> None:
        check_given("norm_weight", norm_weight, plan.with_norm)
        check_given("scales", scales, plan.is_int8)
        self.plan = plan
        self.dtype = dtype
        self.banks = Banks()
        # The vendor's library passes activation a bias always: without one there was trouble at run time.
        self.zero = tensor_at(plan.at.zero, (PMAX, 1), nl.float32)
        nisa.memset(self.zero, 0.0)
        self.load_identity(weights)
        self.stream = WeightStream(weights, plan, dtype, self.zero)
        self.scales = Scales(plan, scales)
        self.activated = []
        if plan.runs_gated:
            for i in range(2):
                address = plan.at.activated + i * plan.activated_bytes
                self.activated.append(tensor_at(address, (PMAX, plan.moving_tokens), nl.float32))
        self.norms = []
        if plan.with_norm:
            self.norms.append(Norm(plan, norm_weight, self.zero))

    def load_identity(self, weights: Tensor) -> None:
        """As much of it as the launch reads; it lies behind the weights, in their type."""
        size, col = self.plan.identity_size, self.plan.identity_col
        self.identity = tensor_at(self.plan.at.identity, (PMAX, PMAX), self.dtype)
        there = self.identity
        if self.plan.is_int8:
            # On its way through the raw slot that chunks come to last.
            last = self.plan.at.raw + (self.plan.raw_slots - 1) * self.plan.raw_bytes
            there = tensor_at(last, (PMAX, PMAX), weights.dtype)
        nisa.dma_copy(
            dst=there[0:size, 0:size],
            src=weights[0:size, col : col + size],
            dge_mode=nisa.dge_mode.none,
        )
        if self.plan.is_int8:
            nisa.tensor_copy(dst=self.identity[0:size, 0:size], src=there[0:size, 0:size])

    def open_block(self) -> None:
        """Fresh tensors for a block of tokens. Several share bytes; each is used up before another is
        written.
        """
        at = self.plan.at
        self.x = self.tiles(at.x, self.plan.x_tiles)
        self.h = self.tiles(at.h, self.plan.h_tiles)
        self.gate_z = self.tiles(at.gate_z, self.plan.gate_z_tiles)
        self.up_z = self.tiles(at.up_z, self.plan.up_z_tiles)
        self.down_z = self.tiles(at.down_z, self.plan.down_z_tiles)
        # Every block of tokens meets all weights, from the first on.
        self.stream.seek(0)

    def tiles(self, address: int, count: int) -> Tensor:
        """`[128, count, block_tokens]`, or None for a count of 0."""
        if count == 0:
            return None
        return tensor_at(address, (PMAX, count, self.plan.block_tokens), self.dtype)

    def input_rows(self, features: int) -> list:
        """Two or, with a norm, three tensors `[128, features]`: natural input on its way to the transpose."""
        rows = []
        for i in range(3 if self.plan.with_norm else 2):
            address = self.plan.at.rows + i * self.plan.row_bytes
            rows.append(tensor_at(address, (PMAX, features), self.dtype))
        return rows

    def z_rows(self, channels: int) -> list:
        """Two tensors `[128, channels]`: natural z on its way between a collective and the transpose."""
        rows = []
        for i in range(2):
            rows.append(
                tensor_at(self.plan.at.z_rows + i * self.plan.z_row_bytes, (PMAX, channels), self.dtype)
            )
        return rows

    def output_rows(self, token_tiles: int) -> Tensor:
        """`[128, token tiles, out_cols]`: natural results on their way out."""
        return tensor_at(self.plan.at.output, (PMAX, token_tiles, self.plan.out_cols), self.dtype)

    def early_sums(self) -> Tensor:
        """`[128, early tiles, block_tokens]` fp32: sums over the rows of x^T that have come."""
        plan = self.plan
        return tensor_at(plan.at.output, (PMAX, plan.early_tiles, plan.block_tokens), nl.float32)

    def output_turns(self) -> list:
        """Two tensors `[128, block_tokens]`: the turns of a transposed column tile on its way out."""
        turns = []
        for i in range(2):
            address = self.plan.at.output + i * self.plan.turn_bytes
            turns.append(tensor_at(address, (PMAX, self.plan.block_tokens), self.dtype))
        return turns


def check_given(name: str, operand: Tensor, wanted: bool) -> None:
    """Refuse an operand that the plan does not use, and a plan whose operand is missing."""
    # Compilers before NKI 0.7 know no `is`.
    given = operand != None  # noqa: E711
    assert given == wanted, (
        f"{name}: expected {wanted} by the plan, found {given}; plan and operands must agree"
    )
