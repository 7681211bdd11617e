"""What is fed: for each kind of input a folder in which one file at a time is wrong, and what a user does
with it.
"""

from __future__ import annotations

import contextlib
import dataclasses
import io
import json
import pathlib
import random
import shutil
from collections.abc import Callable

import torch
from safetensors.torch import load_file

from neuronmlp_plugin.calibration.documents import documents_of
from neuronmlp_plugin.calibration.text import load_tokenizer, token_windows
from neuronmlp_plugin.checkpoint.digests import RECORD, check_record
from neuronmlp_plugin.checkpoint.loader import load_model
from neuronmlp_plugin.checkpoint.reader import FACTOR_FILE, Checkpoint
from neuronmlp_plugin.checkpoint.writer import write_factor_file
from neuronmlp_plugin.cli import main
from neuronmlp_plugin.reporting.folder import read_report, write_card, write_page
from neuronmlp_plugin.serving.trainium import dispatch
from tests.checkpoint.golden import GOLDEN, write_base
from tests.fuzz.mutators import changed_bytes, changed_json, changed_safetensors
from tests.letters import CHAT_TEMPLATE, write_tokenizer
from tests.reporting.reports import full_report

Change = Callable[[random.Random, bytes], bytes]
CHAT = {"messages": [{"role": "user", "content": "hello"}, {"role": "assistant", "content": "there"}]}
PIECES = (
    "{% for m in messages %}", "{% endfor %}", "{{ m['role'] }}", "{{ m.content | tojson }}", "{{ messages[9].content }}",
    "{% if m.role == 'user' %}", "{% endif %}", "{{ raise_exception('no') }}", "{{ 1 // 0 }}", "{{ x.__class__ }}",
    "{% set ns = namespace(a=1) %}", "{{ ns.a }}", "{{ ''.join(messages) }}", "{{ strftime_now('%Y') }}", "{%- macro f() %}",
    "{%- endmacro %}", "{{ f() }}", "{{ 'a' * 1000 }}", "{% generation %}", "{% include 'x' %}", "{{ messages | length / 0 }}", "text",
)  # fmt: skip


@dataclasses.dataclass(frozen=True)
class Target:
    """`files` of the prepared folder are changed, each by `change`; then `use` is called with the folder.
    Where that is dear, only a `share` of the inputs is fed.
    """

    prepare: Callable[[pathlib.Path], None]
    files: tuple[str, ...]
    change: Change
    use: Callable[[pathlib.Path], object]
    share: float = 1.0


def _json_change(rng: random.Random, raw: bytes) -> bytes:
    return changed_json(rng, json.loads(raw))


def _template_change(rng: random.Random, _: bytes) -> bytes:
    pieces = [rng.choice(PIECES) for _ in range(rng.randrange(1, 8))]
    loop = [PIECES[0], *pieces, PIECES[1]]
    return "".join(rng.choice((pieces, loop))).encode()


def _text_change(rng: random.Random, raw: bytes) -> bytes:
    """One line of a calibration file, or its bytes."""
    lines = raw.split(b"\n")
    at = rng.randrange(len(lines))
    with contextlib.suppress(ValueError):
        if rng.random() < 0.7:
            lines[at] = changed_json(rng, json.loads(lines[at]))
            return b"\n".join(lines)
    return changed_bytes(rng, raw)


def _golden(folder: pathlib.Path) -> None:
    shutil.copytree(GOLDEN / "mixed", folder / "model", ignore=shutil.ignore_patterns("logits.json"))
    shutil.copytree(GOLDEN / "int8", folder / "int8", ignore=shutil.ignore_patterns("logits.json"))
    shutil.copytree(GOLDEN / "groups2", folder / "groups2", ignore=shutil.ignore_patterns("logits.json"))


def _sharded(folder: pathlib.Path) -> None:
    write_base(folder / "model")
    names = load_file(folder / "model" / "model.safetensors")
    (folder / "model" / "model.safetensors").rename(folder / "model" / "a.safetensors")
    index = {"metadata": {"total_size": 1}, "weight_map": dict.fromkeys(names, "a.safetensors")}
    (folder / "model" / "model.safetensors.index.json").write_text(json.dumps(index))


def _with_tokenizer(folder: pathlib.Path) -> None:
    write_base(folder / "model")
    write_tokenizer(folder / "model")
    (folder / "model" / "special_tokens_map.json").write_text(
        '{"bos_token": "<s>", "eos_token": {"content": "</s>"}}'
    )
    (folder / "model" / "chat_template.jinja").write_text(CHAT_TEMPLATE)
    lines = [
        {"text": "abc" * 30},
        CHAT,
        {"conversations": [{"from": "human", "value": "hi"}, {"from": "gpt", "value": "yo"}]},
    ]
    text = "\n".join(json.dumps(line) for line in lines)
    for name, content in (
        ("a.jsonl", text),
        ("a.json", json.dumps(lines)),
        ("a.csv", 'id,text\n1,abc\n2,"d\ne"\n'),
        ("a.txt", "abc\n" * 99),
    ):
        (folder / name).write_text(content)


def _with_report(folder: pathlib.Path) -> None:
    report = full_report()
    report.block["layers"], report.spectra["layers"] = (
        part["layers"][:2] for part in (report.block, report.spectra)
    )
    report = dataclasses.replace(report, matrices=report.matrices[:6])
    (folder / "neuronmlp_report.json").write_text(json.dumps(report.to_json()))


def _with_factors(folder: pathlib.Path) -> None:
    _golden(folder)
    block = Checkpoint(folder / "model").block
    assert block is not None
    tensors = {
        n: t
        for path in (folder / "model").glob("*.safetensors")
        for n, t in load_file(path).items()
        if ".mlp." in n
    }
    write_base(folder / "dense")
    (folder / "dense" / FACTOR_FILE).parent.mkdir()
    write_factor_file(folder / "dense" / FACTOR_FILE, block, tensors)


@torch.no_grad()
def _run(model: torch.nn.Module) -> object:
    return model(torch.tensor([[1, 2, 3]])).logits


def _load(name: str) -> Callable[[pathlib.Path], object]:
    return lambda folder: _run(load_model(folder / name))


def _inspect(folder: pathlib.Path) -> object:
    """Through the command line, whose exit codes and words are all that a user sees."""
    with contextlib.redirect_stdout(io.StringIO()), contextlib.redirect_stderr(io.StringIO()) as said:
        code = main(["inspect", str(folder / "model")])
    assert code in (0, 2), code
    assert code == 0 or said.getvalue().count("\n") == 1, said.getvalue()
    return _load("model")(folder)


def _tokenize(folder: pathlib.Path) -> object:
    tokenizer = load_tokenizer(folder / "model")
    return token_windows(["abc def" * 9], tokenizer, 16)


def _render(folder: pathlib.Path) -> object:
    return list(documents_of(folder / "a.jsonl", load_tokenizer(folder / "model")))


def _read_texts(folder: pathlib.Path) -> object:
    if not _TOKENIZERS:
        _TOKENIZERS.append(load_tokenizer(folder / "model"))
    return [
        list(documents_of(folder / name, _TOKENIZERS[0])) for name in ("a.jsonl", "a.json", "a.csv", "a.txt")
    ]


_TOKENIZERS: list[object] = []


def _report(folder: pathlib.Path) -> object:
    report = read_report(folder)
    page, _ = write_page(folder, report), write_card(folder, report)
    assert "<script>alert" not in page.read_text(encoding="utf-8")
    return page


def _with_dispatch(folder: pathlib.Path) -> None:
    record = dispatch.DispatchRecord()
    for layer, phase, tokens in ((0, "prefill", 128), (0, "decode", 1), (1, "decode", 1)):
        record.add(layer, phase, tokens, dispatch.Decision("kernels", "every layer", "int8"))
    record.save(str(folder / dispatch.FILE))


def _restore(folder: pathlib.Path) -> object:
    record = dispatch.DispatchRecord()
    record.restore(str(folder / dispatch.FILE))
    record.ran("decode", 1)
    return record.news(), json.dumps(record.totals())


SHARD = "neuronmlp-00001-of-00003.safetensors"
TARGETS = {
    "config": Target(_golden, ("model/config.json",), _json_change, _inspect),
    "config-int8": Target(_golden, ("int8/config.json",), _json_change, _load("int8")),
    "config-groups": Target(_golden, ("groups2/config.json",), _json_change, _load("groups2")),
    "safetensors": Target(_golden, (f"model/{SHARD}",), changed_safetensors, _load("model")),
    "safetensors-int8": Target(_golden, (f"int8/{SHARD}",), changed_safetensors, _load("int8")),
    "index": Target(_sharded, ("model/model.safetensors.index.json",), _json_change, _load("model")),
    "tokenizer": Target(
        _with_tokenizer,
        tuple(f"model/{name}.json" for name in ("tokenizer", "tokenizer_config", "special_tokens_map")),
        _json_change,
        _tokenize,
    ),
    "template": Target(_with_tokenizer, ("model/chat_template.jinja",), _template_change, _render),
    "texts": Target(_with_tokenizer, ("a.jsonl", "a.json", "a.csv", "a.txt"), _text_change, _read_texts),
    "report": Target(_with_report, ("neuronmlp_report.json",), _json_change, _report, 0.02),
    "factors": Target(
        _with_factors,
        (f"dense/{FACTOR_FILE}",),
        changed_safetensors,
        lambda folder: _run(load_model(folder / "dense", factors=folder / "dense" / FACTOR_FILE)),
    ),
    "digests": Target(
        _golden, (f"model/{RECORD}",), _json_change, lambda folder: check_record(folder / "model")
    ),
    "dispatch": Target(_with_dispatch, (dispatch.FILE,), _json_change, _restore),
}
