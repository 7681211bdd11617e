"""Counters are exact, add up, and tell traffic from unique bytes."""

from nki_kernels.cost.counters import Counters, EngineCount
from nki_kernels.cost.estimate import schedule
from nki_kernels.kernels.plain_matmul import matmul_hoisted, matmul_tiled
from tests.nki_kernels.cost.programs import array, matmuls


def counters_of(kernel, *arguments):
    return schedule(kernel, arguments)[1]


def test_a_small_kernel_is_counted_to_the_byte_and_cycle():
    found = counters_of(matmuls, array(128, 128), array(128, 512))
    assert found == Counters(
        tensor=EngineCount(4, 4 * 576), scalar=EngineCount(1, 512), flops=4 * 2 * 128 * 128 * 512, flops_issued=4 * 2 * 128 * 128 * 576,
        dma_transfers=3, dma_descriptors=3 * 128, dma_bytes=(128 + 512 + 512) * 256, hbm_read_bytes=(128 + 512) * 256,
        hbm_write_bytes=512 * 256, hbm_unique_bytes=(128 + 512 + 512) * 256,
    )  # fmt: skip
    assert found.row_bytes == (256 + 1024 + 1024) / 3


def test_published_traffic_of_the_tutorial_is_met_exactly():
    """Tiled reads both tiles for every matmul, hoisted the stationary ones once; here at an eighth of the
    size in each dimension.
    """
    m, k, n = 512, 1024, 1024
    tiles = m // 128 * (n // 512) * (k // 128)
    for kernel, reads in (
        (matmul_tiled, tiles * (128 + 512) * 256),
        (matmul_hoisted, m * k * 2 + tiles * 512 * 256),
    ):
        found = counters_of(kernel, array(k, m), array(k, n))
        assert found.hbm_read_bytes == reads
        assert found.hbm_write_bytes == m * n * 2
        assert found.hbm_unique_bytes == (k * m + k * n + m * n) * 2
        assert found.flops == 2 * m * k * n
        assert found.flops_issued * 512 == found.flops * (512 + 64)  # turnarounds of matmuls of 512 columns


def test_small_tiles_issue_more_than_they_use():
    found = counters_of(matmuls, array(128, 128), array(128, 512), 1) + counters_of(
        matmuls, array(128, 128), array(128, 512), 2
    )
    assert found.tensor == EngineCount(3, 3 * 576)
    assert (found - found).tensor == EngineCount(0, 0) and (found * 2).dma_bytes == 2 * found.dma_bytes
