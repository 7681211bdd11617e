"""How long one instruction keeps its engine busy: the documented formulas, at the engine's own clock.

The trace knows neither the value of a memset nor the second function of a scalar_tensor_tensor, so the half
pass of 16-bit zeros and the single pass of (bf16 - scalar) x bf16 are never granted.
"""

from __future__ import annotations

from nki_kernels.cost.constants import (
    DMA_PARTITIONS_PER_ENGINE,
    FP32_PASSES,
    GPSIMD_START_CYCLES,
    MIN_INTERVAL_CYCLES,
    Constants,
)
from nki_kernels.simulator.trace import GPSIMD, PSUM, SBUF, TENSOR, Access, Instruction
from nki_kernels.targets import PMAX, TURNAROUND_CYCLES, Target
from nki_kernels.tiling import tile_count

ONE_PASS_ALU = ("add", "multiply", "subtract")
HALF_PASS_REDUCE = ("add", "maximum")


def tensor_cycles(instruction: Instruction) -> int:
    """nc_matmul: a turnaround and a cycle per moving column, four in fp32; nc_transpose, where the data move:
    a turnaround and a cycle per partition. Back to back.
    """
    # nc_matmul reads its stationary operand, then the moving one; a transpose reads its data alone.
    moving = instruction.reads[-1]
    if instruction.op == "nc_transpose":
        return TURNAROUND_CYCLES + moving.shape[0]
    return TURNAROUND_CYCLES + moving.free_elements * (FP32_PASSES if moving.dtype == "float32" else 1)


def _all_bf16(instruction: Instruction) -> bool:
    return all(access.dtype == "bfloat16" for access in (*instruction.reads, *instruction.writes))


def _is_run(access: Access) -> bool:
    return access.row_bytes == access.free_elements * access.itemsize


def _two_input_passes(instruction: Instruction) -> int:
    """tensor_tensor: one pass with one operand in PSUM, or for bf16 sums and products of runs in SBUF;
    otherwise two.
    """
    if len({operand.space for operand in instruction.reads}) == 2:
        return 1
    in_sbuf = all(operand.space == SBUF for operand in instruction.reads)
    runs = all(map(_is_run, (*instruction.reads, *instruction.writes)))
    return 1 if in_sbuf and runs and _all_bf16(instruction) and instruction.function in ONE_PASS_ALU else 2


def elementwise_cycles(instruction: Instruction) -> int:
    """VectorE, ScalarE and GpSimdE: max(64, passes x elements per partition)."""
    if instruction.op == "activation_read_accumulator":
        return MIN_INTERVAL_CYCLES
    # A scale or a bias has one element a partition: the longest operand is what the engine goes through.
    largest = max(access.free_elements for access in (*instruction.reads, *instruction.writes))
    elements = float(largest)
    if instruction.op == "tensor_tensor":
        elements *= _two_input_passes(instruction)
    elif instruction.op == "scalar_tensor_tensor":
        elements *= 2
    elif (
        instruction.op == "tensor_reduce"
        and instruction.function in HALF_PASS_REDUCE
        and _all_bf16(instruction)
    ):
        elements /= 2
    start = GPSIMD_START_CYCLES if instruction.engine == GPSIMD else 0
    return start + max(MIN_INTERVAL_CYCLES, round(elements))


def engine_cycles(instruction: Instruction) -> int:
    """Cycles of a compute engine."""
    return tensor_cycles(instruction) if instruction.engine == TENSOR else elementwise_cycles(instruction)


def touches_psum(instruction: Instruction) -> bool:
    """Whether any operand is in PSUM."""
    return any(access.space == PSUM for access in (*instruction.reads, *instruction.writes))


def dma_engine_ns(instruction: Instruction, target: Target, constants: Constants) -> float:
    """Work of a transfer: ns of one DMA engine, summed over its descriptors."""
    peak = target.dma_achieved_gbps / target.dma_engines
    return instruction.descriptors * constants.descriptor_ns(instruction.descriptor_bytes, peak)


def dma_engines_used(instruction: Instruction, target: Target) -> int:
    """Engines that a transfer can use at once: one for every 8 partitions begun, all of them between two
    places in HBM.
    """
    on_chip = [access for access in (*instruction.reads, *instruction.writes) if access.space == SBUF]
    partitions = on_chip[0].shape[0] if on_chip else PMAX
    return min(target.dma_engines, tile_count(partitions, DMA_PARTITIONS_PER_ENGINE))
