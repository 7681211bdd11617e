"""A tokenizer of 128 words, and text made of them: enough for a tiny model to be calibrated on, with no download."""

from __future__ import annotations

import json
import pathlib
import random

VOCABULARY = ["<unk>", "<s>", "</s>", *(f"w{i}" for i in range(125))]
CHAT_TEMPLATE = "{% for m in messages %}{{ m['role'] }} {{ m['content'] }} {% endfor %}"


def write_tokenizer(folder: pathlib.Path, *, bos: bool = True) -> None:
    """Save it into a model folder, as transformers would; with `bos` it begins every text with <s>."""
    from tokenizers import Tokenizer, models, pre_tokenizers, processors
    from transformers import PreTrainedTokenizerFast

    tokenizer = Tokenizer(models.WordLevel({word: i for i, word in enumerate(VOCABULARY)}, unk_token="<unk>"))
    tokenizer.pre_tokenizer = pre_tokenizers.Whitespace()
    if bos:
        tokenizer.post_processor = processors.TemplateProcessing(single="<s> $A", special_tokens=[("<s>", 1)])
    fast = PreTrainedTokenizerFast(tokenizer_object=tokenizer, unk_token="<unk>", bos_token="<s>", eos_token="</s>")
    fast.chat_template = CHAT_TEMPLATE
    fast.save_pretrained(folder)


def write_text(path: pathlib.Path, words: int, *, seed: int = 0) -> pathlib.Path:
    """A .jsonl of documents whose words follow each other in a skewed way, so that statistics are not white."""
    rng = random.Random(seed)
    lines, word = [], 0
    for _ in range(words // 100):
        document = []
        for _ in range(100):
            word = (word * 3 + rng.choice([0, 0, 1, 1, 2, 7])) % 125
            document.append(f"w{word}")
        lines.append(json.dumps({"text": " ".join(document)}))
    path.write_text("\n".join(lines))
    return path
