"""`neuronmlp quantize`: a whole folder, rounded and nothing else, or none."""

from __future__ import annotations

import json

import pytest
import torch
from safetensors.torch import load_file, save_file

from neuronmlp_plugin.calibration.text import held_out_windows
from neuronmlp_plugin.checkpoint.loader import load_model
from neuronmlp_plugin.checkpoint.reader import Checkpoint
from neuronmlp_plugin.cli import main
from neuronmlp_plugin.compressor.int8_folder import Statistics, round_matrix
from neuronmlp_plugin.models.definition import bind, dequantize, factors_of, quantize
from neuronmlp_plugin.models.factors import PROJECTIONS, Matrix, ProjectionSpec
from neuronmlp_plugin.reporting.folder import CARD_FILE, PAGE_FILE, read_report
from tests.letters import write_text, write_tokenizer
from tests.tiny_models import MIXED_LAYERS, grouped_layers, write_dense, write_mixed


@pytest.fixture
def home(tmp_path):
    write_tokenizer(write_dense(tmp_path / "dense", "qwen3"))
    write_mixed(tmp_path / "mixed", tmp_path / "dense")
    return tmp_path


@pytest.mark.parametrize("source", ["dense", "mixed"])
def test_all_mlp_matrices_are_rounded_and_nothing_else_changes(home, source):
    assert main(["quantize", str(home / source), "--out", str(home / "out"), "--quiet"]) == 0
    before, after = Checkpoint(home / source), Checkpoint(home / "out")
    assert before.names() == after.names()
    for name in before.names():
        weight, rounded = before.tensor(name), after.tensor(name)
        if name.endswith("_proj.weight") and ".mlp." in name:
            assert torch.equal(rounded, dequantize(*quantize(weight)))
        elif ".mlp." in name:  # a factor, rounded for the sake of its product
            assert not torch.equal(rounded, weight) and float((rounded - weight).norm() / weight.norm()) < 0.1
        else:
            assert torch.equal(rounded, weight)
    specs = [layer[name] for layer in after.block.layers for name in PROJECTIONS]
    assert all(spec.is_int8 for spec in specs)
    if source == "mixed":
        assert [(s.form, s.rank) for s in specs] == [
            (layer[n].form, layer[n].rank) for layer in MIXED_LAYERS for n in PROJECTIONS
        ]
    assert (home / "out" / "tokenizer.json").read_bytes() == (home / "dense" / "tokenizer.json").read_bytes()
    assert not list(home.glob("*.partial"))


LOW_RANK = [
    Matrix(projection, ProjectionSpec(form, 60 // groups), 128, 192, groups)
    for projection in ("gate_proj", "down_proj")
    for form in ("compact", "uv")
    for groups in (1, 4)
]


def product_of(stored, tensors):
    """`[in, out]` of a matrix from its tensors by suffix, int8 or not."""
    return bind(stored, factors_of(stored, tensors))(torch.eye(stored.in_out[0]))


def drawn(stored, seed=0):
    torch.manual_seed(seed)
    return {suffix: torch.randn(size) for suffix, size in stored.tensor_shapes().items()}


def apart(tensors):
    """Each tensor rounded for itself."""
    return {name: dequantize(*quantize(tensor)) for name, tensor in tensors.items()}


@pytest.mark.parametrize("stored", LOW_RANK, ids=lambda m: f"{m.projection}-{m.spec.form}-{m.groups}")
def test_factors_rounded_together_move_their_matrix_less_than_each_for_itself(stored):
    weights = drawn(stored)
    exact = product_of(stored, weights)
    together = product_of(stored, round_matrix(stored, weights, Statistics()))
    gain = 0.8 if stored.spec.form == "compact" and stored.groups == 1 else 0.95
    assert float((together - exact).norm()) < gain * float(
        (product_of(stored, apart(weights)) - exact).norm()
    )


DENSE_ONES = [Matrix(p, ProjectionSpec("dense"), 128, 192, 1) for p in ("gate_proj", "down_proj")]


@pytest.mark.parametrize(
    "stored", LOW_RANK + DENSE_ONES, ids=lambda m: f"{m.projection}-{m.spec.form}-{m.groups}"
)
def test_known_inputs_move_the_outputs_less_still(stored):
    """Inputs that are much alike, as hidden states are, and outputs of which some matter more."""
    weights, n_in = drawn(stored), stored.in_out[0]
    x = torch.randn(2000, n_in) @ torch.diag(torch.logspace(0, -1.5, n_in)) @ torch.randn(n_in, n_in)
    worth = torch.logspace(0, -2, stored.in_out[1]).double()
    known = Statistics((x.T @ x).double() / len(x), None if stored.is_down else worth)
    exact = x @ product_of(stored, weights)

    def loss(tensors):
        return float(((x @ product_of(stored, tensors) - exact).square() * worth).mean())

    blind, seen = (loss(round_matrix(stored, weights, given)) for given in (Statistics(), known))
    assert seen < 0.6 * blind < 0.6 * 1.1 * loss(apart(weights))


def test_the_rounded_model_is_close_and_half_as_large(home, capsys):
    main(["quantize", str(home / "dense"), "--out", str(home / "out")])
    assert main(["inspect", str(home / "out"), "--json"]) == 0
    sizes = json.loads(capsys.readouterr().out.partition("\n")[2])
    assert sizes["format_version"] == 1 and sizes["removed_ratio"] == 0.0
    assert sizes["bytes_ratio"] == pytest.approx(0.5 + 2 * (2 / 128 + 1 / 192) / 3, abs=1e-6)
    ids = torch.randint(3, 128, (2, 11))
    with torch.no_grad():
        exact, rounded = (load_model(home / name)(ids).logits for name in ("dense", "out"))
    assert 0 < float((exact - rounded).norm() / exact.norm()) < 0.1
    assert main(["inspect", str(home / "out")]) == 0
    assert "dense int8" in capsys.readouterr().out


def logits(folder, ids):
    with torch.no_grad():
        return load_model(folder)(ids).logits


@pytest.mark.parametrize("source", ["dense", "mixed", "grouped"])
def test_a_text_makes_the_rounded_model_closer(home, source):
    """Judged on tokens of the text's kind; of all forms, groups and narrow layers."""
    write_mixed(home / "grouped", home / "dense", layers=grouped_layers(4))
    text = write_text(home / "text.jsonl", 24000)
    out = {name: str(home / f"{source}-{name}") for name in ("blind", "seen")}
    assert main(["quantize", str(home / source), "--out", out["blind"], "--quiet"]) == 0
    seen = ["--text", str(text), "--tokens", "8192", "--quiet"]
    assert main(["quantize", str(home / source), "--out", out["seen"], *seen]) == 0
    ids = held_out_windows(home / "dense", text, 512, 64)
    exact = logits(home / source, ids)
    blind, seen = (float((logits(folder, ids) - exact).norm()) for folder in out.values())
    assert seen < 0.95 * blind
    blind, seen = (Checkpoint(folder) for folder in out.values())
    assert blind.shapes() == seen.shapes() and blind.block.layers == seen.block.layers


def test_a_report_goes_with_the_rounded_weights(home):
    text = write_text(home / "text.jsonl", 24000)
    shared = ["--text", str(text), "--quiet"]
    sizes = [
        "--remove",
        "0.2",
        "--rank-multiple",
        "1",
        "--window",
        "32",
        "--tokens",
        "1024",
        "--metric-tokens",
        "256",
        "--samples",
        "4",
    ]
    main(["compress", str(home / "dense"), "--out", str(home / "c"), *sizes, *shared])
    assert main(["quantize", str(home / "c"), "--out", str(home / "unjudged"), "--quiet"]) == 0
    assert (
        main(
            [
                "quantize",
                str(home / "c"),
                "--out",
                str(home / "judged"),
                "--dense",
                str(home / "dense"),
                *shared,
            ]
        )
        == 0
    )
    before, unjudged, judged = (read_report(home / name) for name in ("c", "unjudged", "judged"))
    assert (
        unjudged.quality is None
        and unjudged.samples is None
        and "not measured" in (home / "unjudged" / PAGE_FILE).read_text()
    )
    # Windows of 1,024 tokens, but of no more than the 256 positions that the model has.
    assert judged.quality.kl_divergence > 0.0 and judged.quality.num_tokens == 11 * 255
    assert judged.block == Checkpoint(home / "judged").block.to_json() != before.block
    assert judged.bytes_ratio < 0.6 * before.bytes_ratio
    card, page = (home / "judged" / CARD_FILE).read_text(), (home / "judged" / PAGE_FILE).read_text()
    assert "compact int8" in card and "tokens of text.jsonl" in card and "sample texts" not in card
    assert (
        "tokens of text.jsonl" in page
        and "since rounding to int8" in (home / "unjudged" / PAGE_FILE).read_text()
    )


def test_a_text_that_cannot_be_read_or_judged_on_is_refused_before_the_work(home, capsys):
    judge = ["--dense", str(home / "dense"), "--quiet", "--out", str(home / "out")]
    write_text(home / "text.jsonl", 24000)
    assert main(["quantize", str(home / "dense"), *judge, "--text", str(home / "text.jsonl")]) == 2
    assert "--dense: expected a folder with a report" in capsys.readouterr().err
    (home / "mixed" / "neuronmlp_report.json").write_text("{}")
    assert main(["quantize", str(home / "mixed"), *judge, "--text", str(home / "absent.txt")]) == 2
    printed = capsys.readouterr()
    assert "absent.txt: expected a readable" in printed.err and printed.err.count("\n") == 1
    write_text(home / "short.jsonl", 1500)
    assert main(["quantize", str(home / "mixed"), *judge, "--text", str(home / "short.jsonl")]) == 2
    assert "short.jsonl: expected at least 2,048 tokens, so that some can judge" in capsys.readouterr().err
    assert not (home / "out").exists()


def test_what_cannot_be_quantised_is_refused(home, capsys):
    main(["quantize", str(home / "dense"), "--out", str(home / "out")])
    for source, target, message in (
        ("out", "again", "found int8"),
        ("dense", "out", "does not exist yet"),
        ("none", "new", "found no such path"),
    ):
        assert main(["quantize", str(home / source), "--out", str(home / target)]) == 2
        assert message in capsys.readouterr().err
    assert (
        main(["quantize", str(home / "dense"), "--out", str(home / "new"), "--dense", str(home / "dense")])
        == 2
    )
    assert "--dense: expected --text to judge on" in capsys.readouterr().err


def test_an_interrupted_run_leaves_nothing(home, capsys):
    weights = load_file(home / "dense" / "model.safetensors")
    weights["model.layers.2.mlp.down_proj.weight"][0, 0] = float("nan")
    save_file(weights, home / "dense" / "model.safetensors")
    assert main(["quantize", str(home / "dense"), "--out", str(home / "out")]) == 2
    assert "expected finite weights" in capsys.readouterr().err
    assert {path.name for path in home.iterdir()} == {"dense", "mixed"}
