"""What the timeline must obey, whatever the kernel, and the effects of buffers, ports and queues in
isolation.
"""

import itertools

import pytest

from nki_kernels.backend import nisa, nl
from nki_kernels.cost.constants import DMA_START_NS, DOCUMENTED
from nki_kernels.cost.estimate import RESOURCES, critical_path, price, schedule
from nki_kernels.cost.launches import launch_of
from nki_kernels.cost.pipe import Pipe
from nki_kernels.cost.schedule import Scheduler
from nki_kernels.layout import Projection
from nki_kernels.planner import plan_mlp
from nki_kernels.simulator import simulate
from nki_kernels.simulator.trace import DMA, SCALAR, TENSOR, VECTOR, Instruction
from nki_kernels.targets import TRN1, TRN2
from tests.nki_kernels.cost.programs import BF16, array, copies, fresh_tiles, matmuls, slots_of, tile

FORMS = (Projection.whole("compact", 96), Projection.whole("uv", 140), Projection.whole("compact", 70))


@pytest.fixture(scope="module")
def run():
    """Events and slots of a whole MLP, every form and every stage in it."""
    plan = plan_mlp(256, 640, FORMS, 300, BF16, norm_eps=1e-5)
    kernel, arguments = launch_of(plan, BF16)
    scheduler, events = Scheduler(TRN1, DOCUMENTED), []
    simulate(kernel, listeners=(scheduler, events.append), dry=True)(*arguments)
    return [event for event in events if isinstance(event, Instruction)], scheduler.slots


def test_engines_issue_in_order_and_one_at_a_time(run):
    _, slots = run
    for engine in (TENSOR, VECTOR, SCALAR):
        mine = [slot for slot in slots if slot.engine == engine]
        assert mine and all(a.end_ns <= b.start_ns + 1e-6 for a, b in itertools.pairwise(mine))


def test_nobody_reads_before_it_is_written_or_overwrites_before_it_is_read(run):
    """All pairs of conflicting instructions, by the trace's own rule and not by the scheduler's cells."""
    events, slots = run
    for later, event in enumerate(events):
        for earlier in range(max(0, later - 60), later):
            before = events[earlier]
            reads_result = any(r.overlaps(w) for r in event.reads for w in before.writes)
            overwrites = any(w.overlaps(r) for w in event.writes for r in before.reads)
            if reads_result or overwrites:
                assert slots[later].start_ns >= slots[earlier].end_ns - 1e-6, (before, event)


def test_the_critical_path_accounts_for_every_nanosecond(run):
    _, slots = run
    steps = critical_path(slots)
    assert sum(ns for _, _, ns in steps) == pytest.approx(max(slot.end_ns for slot in slots))
    assert [number for number, _, _ in steps] == sorted(number for number, _, _ in steps)


def test_exposed_times_sum_to_the_latency_and_no_resource_works_longer():
    found = price(matmuls, (array(128, 128), array(128, 512), 400))
    assert sum(getattr(found.exposed, name) for name in (*RESOURCES, "waiting")) == pytest.approx(
        found.simulated_us
    )
    assert found.busiest_us <= found.simulated_us and found.bound == "tensor"
    assert found.exposed.tensor == pytest.approx(found.busy.tensor) == pytest.approx(400 * 576 / 2.8 / 1000)


def test_a_small_launch_is_as_long_as_its_chain():
    """Start, load, matmuls, result, eviction, result, start, store: worked out by hand."""
    slots = slots_of(matmuls, array(128, 128), array(128, 512))
    loads = DMA_START_NS + (128 + 512) * 256 / 272
    expected = loads + 4 * 576 / 2.8 + 200 / 1.4 + 512 / 1.4 + 200 / 1.4 + DMA_START_NS + 512 * 256 / 272
    assert slots[-1].end_ns == pytest.approx(expected)


def test_more_buffers_hide_latency_until_the_queue_is_full():
    latencies = [slots_of(copies, array(1024, 512), buffers)[-1].end_ns for buffers in (1, 2, 4, 8)]
    assert latencies[0] > 1.7 * latencies[1] > 1.7 * latencies[2] and latencies[2] >= latencies[3]
    assert latencies[3] >= 16 * 512 * 256 / 272  # all bytes at the peak rate


def test_fresh_tiles_overlap_as_far_as_sbuf_has_room():
    few = slots_of(fresh_tiles, array(1024, 512))
    starts = [slot.start_ns for slot in few if slot.engine == DMA][0::2]
    assert max(starts) == min(starts)  # 8 KiB of tiles: all loads are ready at once
    many = slots_of(fresh_tiles, array(128 * 400, 512), 400)
    last_load = [slot.ready_ns for slot in many if slot.engine == DMA][0::2][-1]
    assert last_load > 0  # 400 KiB are not: late tiles wait for early stores


def two_evictions(_src):
    """One eviction on ScalarE and one on VectorE, from two banks."""
    out = nl.ndarray((128, 512), dtype=nl.float32, buffer=nl.shared_hbm)
    a, b = tile(nl.psum, nl.float32), tile(nl.psum, nl.float32)
    nisa.activation(dst=tile(), op=nl.copy, data=a)
    nisa.tensor_copy(dst=tile(), src=b)
    return out


@pytest.mark.parametrize(("target", "together"), [(TRN1, False), (TRN2, True)])
def test_scalar_and_vector_take_turns_at_psum_on_gen2_only(target, together):
    first, second = schedule(two_evictions, (array(1, 1),), target)[0].slots
    assert (first.start_ns == second.start_ns) == together
    assert together or second.start_ns == first.end_ns


def test_work_on_sbuf_alone_needs_no_psum_port():
    def kernel(_src):
        out = nl.ndarray((128, 512), dtype=nl.float32, buffer=nl.shared_hbm)
        nisa.activation(dst=tile(), op=nl.copy, data=tile(nl.psum, nl.float32))
        nisa.tensor_copy(dst=tile(), src=tile())
        return out

    first, second = slots_of(kernel, array(1, 1))
    assert first.start_ns == second.start_ns == 0


def test_a_psum_bank_is_given_away_only_when_it_was_read():
    def kernel(a, b):
        out = nl.ndarray((128, 512), dtype=nl.float32, buffer=nl.shared_hbm)
        left, right = tile(cols=128), tile()
        nisa.dma_copy(dst=left, src=a)
        nisa.dma_copy(dst=right, src=b)
        for _ in range(
            30
        ):  # VectorE needs 2.5 times as long as TensorE; every ninth sum gets the first one's bank
            total = tile(nl.psum, nl.float32)
            nisa.nc_matmul(total, left, right, accumulate=False)
            nisa.tensor_copy(dst=tile(), src=total)
        return out

    slots = slots_of(kernel, array(128, 128), array(128, 512))
    products = [slot for slot in slots if slot.engine == TENSOR]
    copied = [slot for slot in slots if slot.engine == VECTOR]
    assert products[7].start_ns == products[6].end_ns
    assert (
        all(products[i + 8].start_ns >= copied[i].end_ns for i in range(22))
        and products[29].start_ns == copied[21].end_ns
    )


def test_writes_to_other_partitions_do_not_wait():
    def kernel(src):
        out = nl.ndarray((128, 512), dtype=nl.float32, buffer=nl.shared_hbm)
        held = tile()
        for first in range(0, 128, 32):
            nisa.dma_copy(dst=held[first : first + 32, :], src=src[first : first + 32, :])
        nisa.tensor_copy(dst=tile(), src=held)
        return out

    *loads, copy = slots_of(kernel, array(128, 512))
    assert {slot.start_ns for slot in loads} == {DMA_START_NS} and copy.start_ns == max(
        slot.end_ns for slot in loads
    )


def test_the_pipe_serves_callers_in_turn_and_lets_others_into_the_gaps():
    pipe = Pipe()
    assert pipe.reserve(0, 10) == 10
    assert pipe.reserve(50, 10) == 60  # leaves 10 ... 50 idle
    assert pipe.reserve(5, 30) == 40  # in the gap
    assert pipe.reserve(0, 20) == 70  # 40 ... 50 of the gap, the rest behind
    assert pipe.busy_ns == 70


def test_a_transfer_that_fits_a_gap_ends_in_it_whatever_its_times_round_to():
    pipe = Pipe()
    pipe.reserve(1000.0, 50.0)
    assert (33.3 + 0.3) - 33.3 != 0.3
    assert pipe.reserve(33.3, 0.3) == 33.3 + 0.3


def test_what_is_spilled_to_hbm_is_read_back_only_when_it_is_there():
    def kernel(src):
        home = nl.ndarray((128, 512), dtype=src.dtype, buffer=nl.private_hbm)
        out = nl.ndarray((128, 512), dtype=src.dtype, buffer=nl.shared_hbm)
        held, again = tile(), tile()
        nisa.dma_copy(dst=held, src=src)
        nisa.dma_copy(dst=home, src=held)
        nisa.dma_copy(dst=again, src=home)
        nisa.dma_copy(dst=out, src=again)
        return out

    slots = slots_of(kernel, array(128, 512))
    assert all(
        later.start_ns == earlier.end_ns + DMA_START_NS for earlier, later in itertools.pairwise(slots)
    )
