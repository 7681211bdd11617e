"""The command line as a user meets it: help that costs nothing, bad input in one sentence and exit code 2."""

from __future__ import annotations

import dataclasses
import json
import pathlib
import subprocess
import sys

import pytest

from neuronmlp_plugin.cli import COMMANDS, build_parser, main
from neuronmlp_plugin.commands.compress import settings_of
from tests.letters import write_text, write_tokenizer
from tests.tiny_models import write_dense

TINY = [
    "--rank-multiple",
    "1",
    "--window",
    "32",
    "--tokens",
    "1024",
    "--metric-tokens",
    "256",
    "--judge-tokens",
    "128",
    "--samples",
    "3",
]


@pytest.fixture
def home(tmp_path):
    write_tokenizer(write_dense(tmp_path / "dense", "qwen3"))
    write_text(tmp_path / "text.jsonl", 3000)
    return tmp_path


def compress(home, *more, remove="0.2") -> int:
    size = ["--remove", remove] if remove else []
    return main(["compress", str(home / "dense"), "--text", str(home / "text.jsonl"), *size, *TINY, *more])


@pytest.mark.parametrize("command", [[], *([name] for name in COMMANDS)], ids=str)
def test_help_is_there_and_loads_nothing_heavy(command):
    program = f"import sys\nfrom neuronmlp_plugin.cli import main\ntry: main({[*command, '--help']!r})\n"
    program += "except SystemExit as stop: assert stop.code == 0\n"
    program += "assert not {'torch', 'vllm', 'transformers', 'nki'} & set(sys.modules), 'heavy import'"
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    assert done.stdout.startswith("usage: neuronmlp")


def test_dry_run_prints_the_plan_and_stops(home, capsys):
    assert compress(home, "--out", str(home / "out"), "--dry-run") == 0
    printed = capsys.readouterr().out
    assert "take away" in printed and "20.0%" in printed
    assert not list(home.glob("out*"))


def test_compress_inspect_and_evaluate(home, capsys):
    assert compress(home, "--out", str(home / "out"), "--keep", "0.8", remove=None) == 0
    assert "of the MLP parameters" in capsys.readouterr().out
    assert main(["inspect", str(home / "out")]) == 0
    shown = capsys.readouterr().out
    assert "compact" in shown and "form and rank (of each group) of a matrix" in shown
    assert "MB, 80." in shown or "MB, 79." in shown, shown
    assert main(["inspect", str(home / "out"), "--json"]) == 0
    assert json.loads(capsys.readouterr().out)["format_version"] == 1
    judge = [
        "--dense",
        str(home / "dense"),
        "--text",
        str(home / "text.jsonl"),
        "--window",
        "32",
        "--tokens",
        "256",
    ]
    assert main(["evaluate", str(home / "out"), *judge, "--json"]) == 0
    assert json.loads(capsys.readouterr().out)["num_tokens"] == 8 * 31
    assert main(["evaluate", str(home / "out"), *judge]) == 0
    assert "KL(dense || compressed)" in capsys.readouterr().out


def test_every_setting_can_be_said_and_arrives():
    said = {
        "remove": 0.3,
        "form": "uv",
        "method": "whitened",
        "allocation": "uniform",
        "rank_multiple": 8,
        "dtype": "bfloat16",
        "groups": 8,
        "tp": 4,
        "channels": "keep",
    }
    said |= {
        "window": 64,
        "tokens": 128,
        "metric_tokens": 32,
        "judge_tokens": 96,
        "samples": 7,
        "seed": 3,
        "analysis": pathlib.Path("an"),
    }
    words = [word for name, value in said.items() for word in (f"--{name.replace('_', '-')}", str(value))]
    args = build_parser().parse_args(
        ["compress", "M", "--out", "O", "--text", "t.txt", "--factors-only", *words]
    )
    paths = {"model": pathlib.Path("M"), "out": pathlib.Path("O"), "text": pathlib.Path("t.txt")}
    assert dataclasses.asdict(settings_of(args)) == {
        **said,
        **paths,
        "factors_only": True,
        "target": None,
        "faster": None,
    }


def test_evaluate_keeps_folders_and_numbers_together(home, capsys):
    assert compress(home, "--factors-only", "--quiet") == 0
    dense, judge = (
        str(home / "dense"),
        ["--text", str(home / "text.jsonl"), "--window", "32", "--tokens", "256", "--json", "--dense"],
    )
    capsys.readouterr()
    assert (
        main(
            [
                "evaluate",
                dense,
                *judge,
                dense,
                "--factors",
                str(home / "dense" / "neuronmlp" / "factors.safetensors"),
            ]
        )
        == 0
    )
    assert json.loads(capsys.readouterr().out)["kl_divergence"] > 0.001
    assert compress(home, "--out", str(home / "out"), "--quiet") == 0
    capsys.readouterr()
    assert main(["evaluate", dense, str(home / "out"), *judge, dense]) == 0
    same, other = json.loads(capsys.readouterr().out)
    assert same["kl_divergence"] == pytest.approx(0.0, abs=1e-9) and other["kl_divergence"] > 0.001


def test_report_makes_the_same_page_again(home, capsys):
    assert compress(home, "--out", str(home / "out"), "--quiet") == 0
    page, card = home / "out" / "neuronmlp_report.html", home / "out" / "README.md"
    made = page.read_bytes()
    page.unlink()
    card.write_text("my own words")
    assert main(["report", str(home / "out")]) == 0
    assert page.read_bytes() == made and card.read_text() == "my own words"
    assert main(["report", str(home / "out"), "--card"]) == 0
    assert "neuronmlp_report.html" in card.read_text()
    assert capsys.readouterr().out.splitlines()[-3:] == [str(page), str(page), str(card)]


@pytest.mark.parametrize(
    "content", [None, "not JSON", "[]", '{"block": {}}', '{"block": {"form": 1}, "matrices": []}']
)
def test_a_folder_without_a_report_is_refused(home, capsys, content):
    if content is not None:
        (home / "neuronmlp_report.json").write_text(content)
    refused(capsys, main(["report", str(home)]), "neuronmlp_report.json: expected", "report")
    assert not (home / "neuronmlp_report.html").exists()


def test_no_samples_where_none_are_wanted(home):
    assert compress(home, "--out", str(home / "out"), "--quiet", "--samples", "0") == 0
    assert json.loads((home / "out" / "neuronmlp_report.json").read_text())["samples"] is None
    assert 'id="samples"' not in (home / "out" / "neuronmlp_report.html").read_text()


def test_factors_only_goes_beside_the_model(home, capsys):
    assert compress(home, "--factors-only", "--quiet") == 0
    assert (home / "dense" / "neuronmlp" / "factors.safetensors").is_file()
    assert "--quantization neuronmlp" in (home / "dense" / "neuronmlp" / "README.md").read_text()
    assert main(["inspect", str(home / "dense")]) == 0
    assert compress(home, "--factors-only", "--quiet") == 2
    assert "expected a path that does not exist yet" in capsys.readouterr().err


def test_beside_factors_lies_the_tokenizer_that_transformers_4_can_read_too(home):
    settings = home / "dense" / "tokenizer_config.json"
    values = json.loads(settings.read_text()) | {"tokenizer_class": "TokenizersBackend"}
    settings.write_text(json.dumps(values))
    assert compress(home, "--factors-only", "--quiet") == 0
    beside = json.loads((home / "dense" / "neuronmlp" / "tokenizer_config.json").read_text())
    assert beside["tokenizer_class"] == "PreTrainedTokenizerFast"
    assert (home / "dense" / "neuronmlp" / "tokenizer.json").is_file()
    assert json.loads(settings.read_text()) == values  # the dense folder is left alone


def refused(capsys, code: int, *words: str) -> None:
    error = capsys.readouterr().err
    assert code == 2
    assert error.count("\n") == 1 and error.startswith("neuronmlp ")
    assert all(word in error for word in words), error


@pytest.mark.parametrize(
    "rest",
    [
        ["compress", "--remove", "2"],
        ["refine", "--dense", "D", "--text", "T", "--out", "O", "--stages", "none"],
        ["quantize", "--out", "O", "--dense", "D"],
        ["evaluate", "--dense", "D", "--text", "T"],
    ],
    ids=lambda rest: rest[0],
)
@pytest.mark.parametrize("kind", ["nothing there", "no model", "an unknown model"])
def test_a_wrong_model_is_said_before_anything_else(home, capsys, rest, kind):
    folder = home / "wrong"
    words = {"nothing there": "no such path", "no model": "config.json", "an unknown model": "architecture"}
    if kind != "nothing there":
        folder.mkdir()
    if kind == "an unknown model":
        (folder / "config.json").write_text('{"architectures": ["BertModel"]}')
    refused(capsys, main([rest[0], str(folder), *rest[1:]]), f"{folder}", words[kind])


def test_a_per_cent_is_told_how_it_is_written(home, capsys):
    out = ["--out", str(home / "out")]
    refused(capsys, compress(home, *out, remove="2"), "--remove", "for 2 % write 0.02")
    refused(capsys, compress(home, *out, "--keep", "80", remove=None), "--keep", "for 80 % write 0.8")
    refused(capsys, compress(home, *out, remove="-1"), "found -1.")
    with pytest.raises(SystemExit):
        compress(home, *out, remove="20%")
    assert "write 0.20 for 20 %" in capsys.readouterr().err


def test_an_existing_output_is_refused(home, capsys):
    (home / "out").mkdir()
    refused(capsys, compress(home, "--out", str(home / "out")), str(home / "out"), "does not exist yet")


def test_no_output_is_refused(home, capsys):
    refused(capsys, compress(home), "--out", "--factors-only")


def test_too_little_text_is_refused(home, capsys):
    write_text(home / "text.jsonl", 200)
    refused(capsys, compress(home, "--out", str(home / "out")), "text.jsonl", "calibration tokens")


def test_a_folder_that_is_no_model_is_refused(home, capsys):
    refused(capsys, main(["inspect", str(home)]), "config.json")


def test_a_dense_model_has_nothing_to_inspect(home, capsys):
    refused(capsys, main(["inspect", str(home / "dense")]), "found a dense model")


def test_what_is_factored_is_no_measure_of_others(home, capsys):
    assert compress(home, "--out", str(home / "out"), "--quiet") == 0
    judge = ["--dense", str(home / "out"), "--text", str(home / "text.jsonl")]
    for command in (
        ["evaluate", str(home / "out")],
        ["quantize", str(home / "out"), "--out", str(home / "int8")],
    ):
        refused(
            capsys,
            main([*command, *judge]),
            str(home / "out"),
            "expected the dense model, found a factored one",
        )
    assert not (home / "int8").exists()


def test_a_folder_without_a_tokenizer_is_refused(home, capsys):
    for path in (home / "dense").glob("tokenizer*"):
        path.unlink()
    refused(capsys, compress(home, "--out", str(home / "out")), str(home / "dense"), "expected a tokenizer")


def test_an_output_that_cannot_be_made_is_refused(home, capsys):
    refused(
        capsys,
        compress(home, "--out", str(home / "text.jsonl" / "out"), "--quiet"),
        "text.jsonl",
        "expected a place to write to",
    )


def test_quantize_leaves_the_unfinished_run_of_another_command_alone(home, capsys):
    (home / "out.partial").mkdir()
    (home / "out.partial" / "hours").touch()
    refused(
        capsys,
        main(["quantize", str(home / "dense"), "--out", str(home / "out")]),
        "out.partial",
        "expected no unfinished run",
    )
    assert (home / "out.partial" / "hours").exists()


@pytest.mark.parametrize("options", [["--window", "0"], ["--window", "1"], ["--tokens", "-5"]], ids=str)
def test_evaluate_refuses_windows_that_hold_nothing(home, capsys, options):
    folder = str(home / "dense")
    try:
        code = main(["evaluate", folder, "--dense", folder, "--text", str(home / "text.jsonl"), *options])
    except SystemExit as stop:
        code = stop.code
    assert code == 2
    assert f"{options[0]}: expected" in capsys.readouterr().err


def test_bench_wants_names(home, capsys):
    refused(capsys, main(["bench", "decode", str(home / "dense")]), "NAME=FOLDER")


def test_a_missing_extra_is_named(home, capsys, monkeypatch):
    monkeypatch.setitem(sys.modules, "torch", None)
    monkeypatch.delitem(sys.modules, "neuronmlp_plugin.checkpoint.reader", raising=False)
    refused(
        capsys, main(["inspect", str(home / "dense")]), "expected the package torch", "neuronmlp[compress]"
    )


def test_windows_beyond_the_models_positions_are_refused(home, capsys):
    text, out = ["--text", str(home / "text.jsonl"), "--window", "257"], str(home / "never")
    for command in (["compress", str(home / "dense"), "--remove", "0.2", "--out", out, *text],
                    ["evaluate", str(home / "dense"), "--dense", str(home / "dense"), *text]):  # fmt: skip
        assert main(command) == 2
        assert "--window: expected at most the model's max_position_embeddings, 256, found 257" in (
            capsys.readouterr().err
        )


def test_a_wrong_option_is_argparses_to_refuse(home):
    with pytest.raises(SystemExit) as stop:
        main(["compress", str(home / "dense"), "--remove", "0.2", "--keep", "0.8"])
    assert stop.value.code == 2


def test_an_interruption_is_one_line_that_says_whether_the_command_goes_on(home, monkeypatch, capsys):
    def interrupted(args):
        raise KeyboardInterrupt

    for command in ("compress", "quantize"):
        monkeypatch.setattr(f"neuronmlp_plugin.commands.{command}.run", interrupted)
    assert compress(home) == 130 and main(["quantize", str(home / "dense"), "--out", "out"]) == 130
    first, second = capsys.readouterr().err.splitlines()
    assert first == "neuronmlp compress: interrupted; the same command goes on from what is finished."
    assert second == "neuronmlp quantize: interrupted."


def test_a_reader_that_has_enough_ends_the_command_in_silence(tmp_path):
    program = f"{sys.executable} -m neuronmlp_plugin.cli doctor | true; exit ${{PIPESTATUS[0]}}"
    done = subprocess.run(["bash", "-c", program], capture_output=True, text=True, check=False)
    assert "Traceback" not in done.stderr and "BrokenPipe" not in done.stderr


@pytest.mark.parametrize(
    ("streams", "code", "words"),
    [
        (">&-", 0, ""),
        (">/dev/full", 2, "its output: expected to read or write, found: No space left on device"),
    ],
)
def test_an_output_that_takes_nothing_is_no_traceback(streams, code, words):
    program = f"{sys.executable} -m neuronmlp_plugin.cli doctor {streams}"
    done = subprocess.run(["bash", "-c", program], capture_output=True, text=True, check=False)
    assert done.returncode == code and "Traceback" not in done.stderr and words in done.stderr


def test_the_measure_is_the_model_that_a_folder_was_made_from(home, capsys):
    assert compress(home, "--out", str(home / "out"), "--quiet") == 0
    write_tokenizer(write_dense(home / "other", "qwen3", seed=7))
    config = home / "out" / "config.json"
    values = json.loads(config.read_text())
    del values["quantization_config"]["provenance"]["base_digest"]
    config.write_text(json.dumps(values))
    text, capture = ["--dense", str(home / "other"), "--text", str(home / "text.jsonl")], capsys.readouterr
    capture()
    new = ["--out", str(home / "new")]
    for command in (["refine", str(home / "out"), *new], ["quantize", str(home / "out"), *new]):
        refused(capsys, main([*command, *text]), "found another model.embed_tokens.weight")
    judge = ["--window", "32", "--tokens", "64", "--json"]
    assert main(["evaluate", str(home / "out"), *text, *judge]) == 0
    assert "the numbers are of two models" in capture().err


def test_what_a_terminal_would_obey_is_not_printed(tmp_path, capsys):
    assert main(["inspect", str(tmp_path / "a\x1b[31m\x07[bold]b")]) == 2
    said = capsys.readouterr().err
    assert "\x1b" not in said and "\x07" not in said and "[bold]b" in said
