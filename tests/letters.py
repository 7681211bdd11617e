"""A tokenizer whose tokens are single letters, and text made of them: a tiny model can be calibrated on it
with no download.
"""

from __future__ import annotations

import json
import pathlib
import random

LETTERS = [chr(code) for code in range(33, 127)]
VOCABULARY = ["<unk>", "<s>", "</s>", *LETTERS]
CHAT_TEMPLATE = "{% for m in messages %}{{ m['role'] }}:{{ m['content'] }};{% endfor %}"


def token_id(letter: str) -> int:
    return VOCABULARY.index(letter)


def write_tokenizer(folder: pathlib.Path, *, bos: bool = True) -> None:
    """Save it into a model folder, as transformers would; with `bos` it begins every text with <s>.

    It is a byte-level BPE without merges, since transformers 5 insists on that kind for the Qwen families.
    """
    from tokenizers import Tokenizer, models, pre_tokenizers, processors
    from transformers import PreTrainedTokenizerFast

    tokenizer = Tokenizer(models.BPE({token: i for i, token in enumerate(VOCABULARY)}, [], unk_token="<unk>"))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    if bos:
        tokenizer.post_processor = processors.TemplateProcessing(single="<s> $A", special_tokens=[("<s>", 1)])
    fast = PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, unk_token="<unk>", bos_token="<s>", eos_token="</s>"
    )
    fast.chat_template = CHAT_TEMPLATE
    fast.save_pretrained(folder)


def write_text(path: pathlib.Path, length: int, *, seed: int = 0) -> pathlib.Path:
    """A .jsonl of documents whose letters follow each other in a skewed way, so that statistics are not
    white.
    """
    rng = random.Random(seed)
    lines, place = [], 0
    for _ in range(length // 100):
        document = ""
        for _ in range(100):
            place = (place * 3 + rng.choice([0, 0, 1, 1, 2, 7])) % len(LETTERS)
            document += LETTERS[place]
        lines.append(json.dumps({"text": document}))
    path.write_text("\n".join(lines))
    return path
