"""A fallback can never pass for a kernel run: decisions, their record, and what /metrics shows."""

from __future__ import annotations

import collections
import json

import pytest
import torch

from neuronmlp_plugin.checkpoint.files import read_config
from neuronmlp_plugin.errors import UsageError
from neuronmlp_plugin.models.factors import DENSE, MLPLayer, ProjectionSpec
from neuronmlp_plugin.serving.trainium import dispatch, trial
from neuronmlp_plugin.serving.trainium.config import ArtifactError, low_rank_config
from neuronmlp_plugin.serving.trainium.dispatch import (
    DECODE,
    PREFILL,
    Decision,
    DispatchRecord,
    decide,
    kernels_unavailable,
    layer_decisions,
    settle,
)
from neuronmlp_plugin.serving.trainium.kernel_path import declined
from neuronmlp_plugin.serving.trainium.metrics import FOLDER_VARIABLE, DispatchCollector, publish
from neuronmlp_plugin.serving.trainium.neuron_options import Options
from nki_kernels.frontend.verdict import Verdict
from nki_kernels.kernels.sharded import last_factor
from tests.serving.trainium.stand_ins import InferenceConfig, load_values
from tests.tiny_models import MIXED_LAYERS, write_dense, write_mixed

KERNEL, FALLBACK = Decision("kernel", "planned"), Decision("torch", "too large")


def test_kernels_run_where_they_are_available_and_planned():
    assert decide(Options(), None, None, 0) == {PREFILL: KERNEL, DECODE: KERNEL}


@pytest.mark.parametrize(("unavailable", "why"), [("no nki", "no nki"), (None, "too large")])
def test_a_fallback_carries_its_reason(unavailable, why):
    decisions = decide(Options(), unavailable, "too large", 0)
    assert set(decisions.values()) == {Decision("torch", why)}


def test_a_required_kernel_is_not_replaced():
    with pytest.raises(UsageError, match=r"layer 7: expected a kernel .* found none: too large"):
        decide(Options(kernels="require"), None, "too large", 7)


def test_off_and_one_phase_alone():
    assert set(decide(Options(kernels="off"), None, None, 0).values()) == {Decision("torch", "kernels: off")}
    decisions = decide(Options(kernels="decode"), None, None, 0)
    assert decisions == {PREFILL: Decision("torch", "kernels: decode"), DECODE: KERNEL}


@pytest.mark.parametrize(
    ("on_cpu", "nki", "words"),
    [
        (True, "0.2.0", "on_cpu"),
        (False, None, "found none"),
        (False, "0.1.0", "found 0.1.0"),
    ],
)
def test_why_no_kernel_can_run(on_cpu, nki, words):
    assert words in kernels_unavailable(on_cpu, nki)


def test_nothing_stands_against_a_kernel_on_the_reference_stack():
    assert kernels_unavailable(False, "0.2.0") is None


@pytest.fixture
def on_a_device(tmp_path, monkeypatch):
    """Function (options, nki version, **neuron) -> the settled config of a low-rank model, as if with `nki`;
    the trial's verdict is `dispatch.refusal`'s.
    """

    def settled(options, nki="0.2.0", **neuron):
        monkeypatch.setattr(dispatch, "installed_nki", lambda: nki)
        if not (tmp_path / "mixed").exists():
            write_mixed(tmp_path / "mixed", write_dense(tmp_path / "dense", "llama"))
        values = {**read_config(tmp_path / "mixed"), "_name_or_path": str(tmp_path / "mixed")}
        neuron = {"torch_dtype": "float32", "neuronmlp": options, **neuron}
        base = low_rank_config(InferenceConfig)
        config = base(base.get_neuron_config_cls()(**neuron), load_config=load_values(values))
        settle(config)
        return config

    return settled


def paths(config):
    return {(phase, d.path, d.reason) for layer in layer_decisions(config) for phase, d in layer.items()}


def test_what_the_vendor_refuses_is_served_by_torch_with_its_words(on_a_device, monkeypatch, caplog):
    why = "expecting simple variable"
    monkeypatch.setattr(dispatch, "refusal", lambda *_: why)
    config = on_a_device({"kernels": "auto"})
    assert paths(config) == {(phase, "torch", why) for phase in (PREFILL, DECODE)}
    assert why in caplog.text
    again = type(config).from_json_string(config.to_json_string())
    assert paths(again) == paths(config)  # the artifact holds the verdict: no second trial decides otherwise
    assert config.neuron_config.attn_kernel_enabled is None  # and NxDI's own kernels may stay
    with pytest.raises(UsageError, match=f"kernels: require.*{why}"):
        on_a_device({"kernels": "require"})


def test_each_kernel_is_tried_once_with_the_arguments_of_a_launch(on_a_device, monkeypatch):
    tried = []
    monkeypatch.setattr(trial, "trace", lambda kernel, *arguments: tried.append((kernel.__name__, arguments)))
    config = on_a_device({"kernels": "auto"}, batch_size=3)
    assert {path for _, path, _ in paths(config)} == {"kernel"}
    forms = {tuple(spec.form for spec in layer.values()) for layer in MIXED_LAYERS}
    sizes = collections.Counter((name, arguments[0].shape[0]) for name, arguments in tried)
    assert sizes == {("svd_mlp", 128): len(forms), ("svd_mlp", 3): len(forms)}
    tried.clear()
    on_a_device({"kernels": "decode"}, batch_size=3, tp_degree=2)
    assert {name for name, _ in tried} == {"first_factors", "second_factors", last_factor.__name__}
    tried.clear()
    on_a_device({"kernels": "off"})
    on_a_device({"kernels": "auto"}, nki="0.1.0")
    assert not tried


def test_a_refusal_of_the_trace_becomes_one_line(on_a_device, monkeypatch):
    def trace(kernel, *arguments):
        raise SyntaxError("expecting simple variable\n  at svd_mlp.py:12")

    monkeypatch.setattr(trial, "trace", trace)
    ((_, path, reason),) = {("", p, r) for _, p, r in paths(on_a_device({}))}
    assert path == "torch" and reason.endswith("for 128 tokens: expecting simple variable")


def test_one_nki_language_a_graph(on_a_device, monkeypatch, caplog):
    """NxDI 0.8 takes its own flash kernel from 4096 tokens on, or where `attn_kernel_enabled` says so."""
    monkeypatch.setattr(dispatch, "refusal", lambda *_: None)
    assert on_a_device({}).neuron_config.attn_kernel_enabled is False
    assert "flash" not in caplog.text
    assert on_a_device({}, max_context_length=4096).neuron_config.attn_kernel_enabled is False
    assert "would take its flash kernel" in caplog.text
    with pytest.raises(UsageError, match=r'attn_kernel_enabled off .* set it to false, or "neuronmlp"'):
        on_a_device({}, attn_kernel_enabled=True)
    assert on_a_device({"kernels": "off"}, attn_kernel_enabled=True).neuron_config.attn_kernel_enabled
    assert on_a_device({}, nki="0.3.0", attn_kernel_enabled=True).neuron_config.attn_kernel_enabled


def test_the_planner_declines_in_words():
    assert declined(MLPLayer(1024, 2048, DENSE, DENSE, DENSE), 1, torch.bfloat16) is None
    assert "SBUF" in declined(MLPLayer(128, 1 << 17, DENSE, DENSE, DENSE), 1, torch.bfloat16)


def traced_record() -> DispatchRecord:
    record = DispatchRecord()
    for layer in range(3):
        record.add(layer, PREFILL, 128, FALLBACK if layer == 1 else KERNEL)
        record.add(layer, PREFILL, 256, FALLBACK if layer == 1 else KERNEL)
        record.add(layer, DECODE, 4, KERNEL)
    return record


def test_runs_are_counted_by_the_bucket_that_holds_them():
    record = traced_record()
    for tokens in (100, 128, 129):
        record.ran(PREFILL, tokens)
    record.ran(DECODE, 3)
    assert record.runs == {(PREFILL, KERNEL): 6, (PREFILL, FALLBACK): 3, (DECODE, KERNEL): 3}


def test_the_log_line_names_every_path():
    line = traced_record().summary()
    assert line == (
        "neuronmlp: decode: 3 layers by kernel (planned); prefill: 2 layers by kernel (planned); prefill: 1 "
        "layers by torch (too large)"
    )


def test_news_is_told_once_and_again_for_a_phase_that_is_new():
    record = DispatchRecord()
    assert record.news() == "neuronmlp: no layer was traced" and record.news() is None
    record.add(0, PREFILL, 128, KERNEL)
    assert record.news() == record.summary() and record.news() is None
    record.add(0, PREFILL, 256, KERNEL)
    assert record.news() is None
    record.add(0, DECODE, 1, FALLBACK)
    assert record.news() == record.summary() and record.news() is None


def test_an_artifact_brings_its_record_and_is_refused_without(tmp_path):
    record, again = traced_record(), DispatchRecord()
    record.save(str(tmp_path / "record.json"))
    again.restore(str(tmp_path / "record.json"))
    assert again.traced == record.traced
    (tmp_path / "other.json").write_text('{"layers": []}')
    for name, found in (("absent.json", "found none"), ("other.json", "found another file")):
        with pytest.raises(ArtifactError, match=f"{found}; compile the model again"):
            again.restore(str(tmp_path / name))


def test_two_model_processes_make_one_sample(tmp_path, monkeypatch):
    monkeypatch.setenv(FOLDER_VARIABLE, str(tmp_path))
    for process in (1, 2):
        (tmp_path / f"{process}.json").write_text(
            json.dumps({"layers": [[DECODE, "kernel", "planned", "int8", 16]], "runs": []})
        )
    layers, _ = DispatchCollector().collect()
    assert [sample.value for sample in layers.samples] == [32]


def test_serving_outlives_a_lost_metrics_folder(tmp_path, monkeypatch, caplog):
    monkeypatch.setenv(FOLDER_VARIABLE, str(tmp_path / "gone"))
    publish(traced_record().totals())
    publish(traced_record().totals())
    (warning,) = caplog.messages
    assert "gone" in warning and "/metrics no longer follows" in warning


def test_metrics_cross_processes(tmp_path, monkeypatch):
    monkeypatch.setenv(FOLDER_VARIABLE, str(tmp_path))
    record = traced_record()
    record.ran(DECODE, 4)
    publish(record.totals())
    layers, runs = DispatchCollector().collect()
    assert layers.name == "neuronmlp_mlp_layers" and runs.name == "neuronmlp_mlp_runs"
    assert {tuple(s.labels.values()): s.value for s in layers.samples} == {
        (PREFILL, "kernel", "planned", "floating point"): 2,
        (PREFILL, "torch", "too large", "floating point"): 1,
        (DECODE, "kernel", "planned", "floating point"): 3,
    }
    assert {tuple(s.labels.values()): s.value for s in runs.samples} == {
        (DECODE, "kernel", "planned", "floating point"): 3
    }


def test_the_trial_speaks_with_the_voice_of_who_read_the_kernel(monkeypatch):
    asked = []

    def verdict(kernel, arguments, platform):
        asked.append((kernel.__name__, platform))
        return Verdict("nki 0.2.0 (trn1)", ("SyntaxError: expecting simple variable",))

    compact = ProjectionSpec("compact", 64)
    monkeypatch.setattr(trial, "verdict", verdict)
    why = trial.refusal(MLPLayer(256, 512, compact, compact, compact), 1, torch.bfloat16, 4)
    assert why == (
        "a kernel was refused for 4 tokens: nki 0.2.0 (trn1): SyntaxError: expecting simple variable"
    )
    assert asked == [("svd_mlp", "trn1")]
