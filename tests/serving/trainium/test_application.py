"""What the application logs of the dispatch record, and when; with a stand-in for NxDI's class."""

from __future__ import annotations

import types

import pytest
import torch

from neuronmlp_plugin.serving.trainium import application as application_module
from neuronmlp_plugin.serving.trainium.application import LowRankApplication
from neuronmlp_plugin.serving.trainium.config import KEY
from neuronmlp_plugin.serving.trainium.dispatch import DECODE, FILE, PREFILL, Decision, DispatchRecord
from neuronmlp_plugin.serving.trainium.metrics import FOLDER_VARIABLE, records

TORCH, KERNEL = Decision("torch", "on_cpu"), Decision("kernel", "planned")


class Base:
    """On a CPU, layers of NxDI's model put themselves on record in each forward; a compiled artifact does
    not.
    """

    def __init__(self, model_path, config=None):
        self.config, self.neuron_config = config, config.neuron_config

    def to_cpu(self):
        pass

    def load(self, folder):
        pass

    def forward(self, input_ids, position_ids=None):
        if self.neuron_config.on_cpu and hasattr(self.config, KEY):
            phase = PREFILL if input_ids.shape[1] > 1 else DECODE
            application_module.RECORD.add(0, phase, input_ids.numel(), TORCH)
        return input_ids


class Application(LowRankApplication, Base):
    def __init__(self, on_cpu, low_rank=True):
        neuron_config = types.SimpleNamespace(on_cpu=on_cpu)
        config = types.SimpleNamespace(neuron_config=neuron_config, **({KEY: {}} if low_rank else {}))
        Base.__init__(self, "folder", config)  # as NxDI does for a compiled artifact: nothing to settle


PROMPT, TOKEN = torch.zeros(1, 7, dtype=torch.int64), torch.zeros(1, 1, dtype=torch.int64)


@pytest.fixture
def logged(monkeypatch):
    monkeypatch.setattr(application_module, "RECORD", DispatchRecord())
    lines = []
    monkeypatch.setattr(application_module.logger, "info", lines.append)
    return lines


def test_on_a_cpu_each_phase_is_logged_once_it_has_run(logged, tmp_path):
    application = Application(on_cpu=True)
    application.load(str(tmp_path))
    assert logged == []
    for input_ids in (PROMPT, PROMPT, TOKEN, TOKEN, PROMPT):
        application.forward(input_ids)
    prefill, decode = "prefill: 1 layers by torch (on_cpu)", "decode: 1 layers by torch (on_cpu)"
    assert logged == [f"neuronmlp: {prefill}", f"neuronmlp: {decode}; {prefill}"]


def test_on_a_device_the_artifacts_record_is_logged_once_at_load(logged, tmp_path):
    compiled = DispatchRecord()
    compiled.add(0, PREFILL, 128, KERNEL)
    compiled.add(0, DECODE, 1, KERNEL)
    compiled.save(str(tmp_path / FILE))
    application = Application(on_cpu=False)
    application.load(str(tmp_path))
    for input_ids in (PROMPT, TOKEN):
        application.forward(input_ids)
    assert logged == [
        "neuronmlp: decode: 1 layers by kernel (planned); prefill: 1 layers by kernel (planned)"
    ]


def test_metrics_follow_an_artifact_from_its_load_on(logged, tmp_path, monkeypatch):
    compiled = DispatchRecord()
    for phase, tokens in ((PREFILL, 128), (DECODE, 1)):
        compiled.add(0, phase, tokens, KERNEL)
    compiled.save(str(tmp_path / FILE))
    (folder := tmp_path / "metrics").mkdir()
    monkeypatch.setenv(FOLDER_VARIABLE, str(folder))
    application = Application(on_cpu=False)
    application.load(str(tmp_path))
    assert records() == [compiled.totals()]
    application.forward(TOKEN, position_ids=torch.zeros(1, 1))  # a prompt of one token
    application.forward(TOKEN, position_ids=torch.ones(1, 1))
    assert sorted(records()[0]["runs"]) == [
        [DECODE, "kernel", "planned", "floating point", 1],
        [PREFILL, "kernel", "planned", "floating point", 1],
    ]


def test_of_another_model_nothing_is_logged(logged, tmp_path):
    application = Application(on_cpu=True, low_rank=False)
    application.load(str(tmp_path))
    application.forward(input_ids=PROMPT)
    assert logged == []
