"""A chat template that does not end, or eats memory, or fails, costs seconds and one sentence."""

from __future__ import annotations

import json

import pytest

from neuronmlp_plugin.calibration import aside as aside_module
from neuronmlp_plugin.calibration import template as template_module
from neuronmlp_plugin.calibration.documents import documents_of
from neuronmlp_plugin.calibration.template import ChatTemplate
from neuronmlp_plugin.compressor.exhibits import _rendered
from neuronmlp_plugin.errors import CalibrationError
from tests.letters import write_tokenizer
from tests.tiny_models import write_dense

CHAT = [{"role": "user", "content": "hello"}]
LOOP = "{% for a in range(99999) %}{% for b in range(99999) %}{% endfor %}{% endfor %}"


@pytest.fixture(scope="module")
def tokenizer(tmp_path_factory):
    from transformers import AutoTokenizer

    folder = write_dense(tmp_path_factory.mktemp("dense"), "llama")
    write_tokenizer(folder)
    return AutoTokenizer.from_pretrained(folder)


@pytest.mark.parametrize(
    ("template", "message"),
    [
        (LOOP, "did not end in 1 s"),
        ("{{ 10 ** (10 ** 9) }}", "did not end in 1 s"),
        ("{{ 'a' * 10 ** 11 }}", "MemoryError"),
        ("{{ 'a' * 10000 }}", "a text of 10,000 characters"),
        ("{{ 1 // 0 }}", "division"),
        ("{{ messages.nothing.at.all }}", "has no attribute 'nothing'"),
    ],
)
def test_what_a_template_may_cost_is_bounded(tokenizer, monkeypatch, template, message):
    monkeypatch.setattr(aside_module, "LIMIT_S", 1.0)
    monkeypatch.setattr(template_module, "MOST_CHARACTERS", 9999)
    monkeypatch.setattr(tokenizer, "chat_template", template)
    with pytest.raises(CalibrationError, match=message):
        ChatTemplate(tokenizer).render(CHAT)
    assert _rendered(tokenizer) is None


def test_after_a_chat_that_fails_the_next_one_is_rendered(tokenizer, monkeypatch):
    monkeypatch.setattr(aside_module, "LIMIT_S", 1.0)
    wait = "{% if messages[0].content == 'loop' %}" + LOOP + "{% endif %}"
    monkeypatch.setattr(tokenizer, "chat_template", wait + "<{{ messages[0].content }}>")
    chats = ChatTemplate(tokenizer)
    with pytest.raises(CalibrationError):
        chats.render([{"role": "user", "content": "loop"}])
    assert chats.render(CHAT) == "<hello>" == chats.render(CHAT)
    process = chats.aside.process
    del chats
    process.join(10)
    assert process.exitcode == 0  # it ends with the object


def test_a_text_of_chats_names_the_line(tokenizer, monkeypatch, tmp_path):
    monkeypatch.setattr(aside_module, "LIMIT_S", 1.0)
    monkeypatch.setattr(tokenizer, "chat_template", LOOP)
    path = tmp_path / "chats.jsonl"
    path.write_text(json.dumps({"text": "first"}) + "\n" + json.dumps({"messages": CHAT}) + "\n")
    found = documents_of(path, tokenizer)
    assert next(found) == "first"
    with pytest.raises(CalibrationError, match=r"chats\.jsonl:2: .* did not end in 1 s"):
        next(found)
