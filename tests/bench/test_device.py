"""`bench tune --measure` without a device: its refusal, its arithmetic on a clock of ours, its inputs through
the simulator.
"""

from __future__ import annotations

import json
import types

import numpy as np
import pytest
import torch

from neuronmlp_plugin.bench import device
from neuronmlp_plugin.bench.device import LAUNCHES, ROUNDS, WARMUP, XlaCore, measure_us
from neuronmlp_plugin.cli import main
from neuronmlp_plugin.errors import UsageError
from neuronmlp_plugin.serving.trainium import dispatch
from nki_kernels.backend import HAS_NKI
from nki_kernels.cost.launches import launch_of
from nki_kernels.layout import Projection, mlp_layout
from nki_kernels.planner import plan_launch
from nki_kernels.request import gathered_projection, gathered_stages, stage_request
from tests.nki_kernels.cost.programs import BF16
from tests.serving.trainium.sharded import simulated

COMMAND = ["bench", "tune", "Llama-3.2-1B", "--form", "dense", "--tp", "1", "--tokens", "1"]


class FakeCore:
    """Recording takes 5 ms a launch, a run 700 us and `launch_us` a launch, the first of a size a minute, and
    every seventh hiccups.
    """

    def __init__(self, launch_us):
        self.launch_us, self.seconds, self.recorded, self.sizes = launch_us, 0.0, [], []

    def clock(self):
        return self.seconds

    def record(self, number):
        self.seconds += 5e-3
        self.recorded.append(number)

    def run(self):
        size = len(self.recorded)
        assert self.recorded == list(range(size))  # inputs of its own for every launch
        self.seconds += 60.0 if size not in self.sizes else (700.0 + size * self.launch_us) / 1e6
        self.sizes.append(size)
        self.seconds += 0.25 if len(self.sizes) % 7 == 0 else 0.0
        self.recorded = []


def test_the_time_is_a_launchs_own():
    core = FakeCore(launch_us=123.0)
    assert measure_us(core, core.clock) == pytest.approx(123.0)
    assert core.sizes == [1, LAUNCHES] * (WARMUP + ROUNDS)


def test_what_noise_hides_is_no_measurement():
    core = FakeCore(launch_us=-1.0)
    with pytest.raises(
        UsageError,
        match=r"expected 5 launches to take longer than one, found a launch of -1.0 us; measure while",
    ):
        measure_us(core, core.clock)


def fake_xla():
    """torch_xla over the CPU, where everything has run by the time that it is asked for."""
    model = types.SimpleNamespace(wait_device_ops=lambda: None)
    return types.SimpleNamespace(
        device=lambda: torch.device("cpu"), sync=lambda: None, core=types.SimpleNamespace(xla_model=model)
    )


def launches(tp):
    """Every stage of a small MLP."""
    whole = mlp_layout(192, 384, *(Projection.whole("uv", 96),) * 3)
    share = gathered_projection("uv", 96, tp)
    stages = {"whole": whole} if tp == 1 else gathered_stages(192, 384 // tp, (share, share, share))
    for layout in stages.values():
        plan = plan_launch(stage_request(layout, 3, BF16))
        yield launch_of(plan, np.dtype(BF16), tp)


@pytest.mark.skipif(HAS_NKI, reason="launches kernels in our simulator; set NKI_KERNELS_BACKEND=simulator")
@pytest.mark.parametrize("tp", [1, 2])
def test_inputs_are_what_the_kernels_take(tp):
    for kernel, arguments in launches(tp):
        launched = []

        def launch(*inputs, kernel=kernel, launched=launched):
            launched.append(inputs)
            return simulated(kernel, *inputs)

        core = XlaCore(fake_xla(), launch, arguments)
        core.record(1)
        first, second = (next(a for a in inputs if isinstance(a, torch.Tensor)) for inputs in launched)
        assert first.shape == second.shape and not torch.equal(first, second)
        core.run()
        assert core.outputs == []


@pytest.mark.parametrize("value", [0.0, float("nan")])
def test_a_kernel_that_returns_no_result_is_not_timed(value):
    with pytest.raises(UsageError, match=r"finite and not all zero, found \[.*neuronmlp doctor"):
        XlaCore(fake_xla(), lambda x: torch.full_like(x, value), (torch.ones(2, 2),))


@pytest.mark.skipif(HAS_NKI, reason="there may be a device")
def test_without_a_device_it_refuses_in_one_sentence(capsys, tmp_path):
    out = tmp_path / "table.json"
    assert main([*COMMAND, "--measure", "--out", str(out)]) == 2
    (line,) = capsys.readouterr().err.splitlines()
    assert (
        "expected a Neuron device" in line
        and "no torch_neuronx, no nki" in line
        and "leave out --measure to simulate" in line
    )
    assert not out.exists()


@pytest.fixture
def timed(monkeypatch):
    """A device that takes 40 us for the first plan and a microsecond less for each one after."""
    plans = []
    monkeypatch.setattr(device, "neuron_runtime", lambda: "xla")
    monkeypatch.setattr(dispatch, "installed_nki", lambda: "0.2.0")
    monkeypatch.setattr(
        device, "plan_us", lambda xla, dtype, tp, plan: plans.append(plan) or 41.0 - len(plans)
    )
    return plans


def test_a_measured_table_says_so_and_takes_no_simulated_choice(timed, capsys, tmp_path):
    out = tmp_path / "table.json"
    assert main([*COMMAND, "--measure", "--out", str(out)]) == 0
    printed, table = capsys.readouterr().out, json.loads(out.read_text())
    assert f"measured_us {41.0 - len(timed):.1f}, {len(timed)} of" in printed and "simulated" not in printed
    assert table["about"] == "measured on trn1 with nki 0.2.0; neuronmlp bench tune --measure"
    (choice,) = table["choices"].values()
    assert choice["ring_slots"] == timed[-1].ring_slots
    assert main([*COMMAND, "--out", str(out)]) == 2
    assert "expected a table 'simulated on trn1 with constants calibrated" in capsys.readouterr().err
    assert json.loads(out.read_text()) == table
