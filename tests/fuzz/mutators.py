"""Inputs gone wrong: JSON whose values are others, bytes that are others, both from a seeded generator."""

from __future__ import annotations

import copy
import json
import random
from typing import Any

STRANGE: tuple[Any, ...] = (
    None, True, False, 0, 1, -1, 2, 3, 7, 255, -(2**31), 2**31, 2**63, 10**30, 10**400, 0.5, -0.0, 1e-300, 1e300,
    "", "x", "a\0b", "\x1b[31m", "[bold]x[/bold]", "<script>alert(1)</script>", "../../etc/passwd", "/etc/passwd", "é\ud800",
    "x" * 5000, "{{ 1 // 0 }}", "compact", "uv", "dense", "int8", "bfloat16", "llama", "LlamaForCausalLM",
    [], [[]], [None], [1, 2], ["x"], {}, {"x": {}}, {"form": "uv", "rank": 1}, {"role": "user", "content": "x"},
)  # fmt: skip
LITERALS = (
    "NaN",
    "Infinity",
    "-Infinity",
    "1e999",
    "9" * 5000,
    "[" * 3000 + "]" * 3000,
    '"\\ud800"',
    "{",
    "",
)
_PLACE = "\uf8ffplace\uf8ff"


def paths(value: Any, here: tuple[Any, ...] = ()) -> list[tuple[Any, ...]]:
    """Of every value inside `value`, the keys that lead to it."""
    items: list[tuple[Any, Any]] = []
    if isinstance(value, dict):
        items = list(value.items())
    elif isinstance(value, list):
        items = list(enumerate(value))
    return [here, *(path for key, child in items for path in paths(child, (*here, key)))]


def changed_json(rng: random.Random, value: Any) -> bytes:
    """The text of `value` with one to three changes."""
    value, literals = copy.deepcopy(value), []
    for _ in range(rng.choice((1, 1, 1, 2, 3))):
        path = rng.choice(paths(value))
        if not path:
            if rng.random() < 0.05:
                return json.dumps(rng.choice(STRANGE)).encode()
            path = rng.choice(paths(value)[1:] or [()])
        value = _changed(rng, value, path, literals)
    text = json.dumps(value)
    for literal in literals:
        text = text.replace(json.dumps(_PLACE), literal, 1)
    raw = text.encode()
    return changed_bytes(rng, raw) if rng.random() < 0.1 else raw


def _changed(rng: random.Random, value: Any, path: tuple[Any, ...], literals: list[str]) -> Any:
    if not path:
        return rng.choice(STRANGE)
    parent = value
    for key in path[:-1]:
        parent = parent[key]
    key, kind = path[-1], rng.random()
    if kind < 0.15:
        del parent[key]
    elif kind < 0.25 and isinstance(parent, dict):
        parent[
            rng.choice(("", "x", "a\0b", "__class__", "rank", "dtype", str(key) + "x", str(key).upper()))
        ] = parent.pop(key)
    elif kind < 0.35:
        literals.append(rng.choice(LITERALS))
        parent[key] = _PLACE
    elif kind < 0.5 and isinstance(parent[key], int | float):
        parent[key] = parent[key] * rng.choice((-1, 0, 2, 10, 1000)) + rng.choice((-1, 0, 1, 0.5))
    elif kind < 0.6:
        parent[key] = [parent[key]] * rng.choice((0, 1, 2, 300))
    else:
        parent[key] = copy.deepcopy(rng.choice(STRANGE))
    return value


def changed_bytes(rng: random.Random, raw: bytes) -> bytes:
    """Flipped, cut, repeated, zeroed or inserted bytes, one to four times."""
    data = bytearray(raw)
    for _ in range(rng.choice((1, 1, 2, 4))):
        at = rng.randrange(len(data) + 1)
        length = rng.choice((1, 2, 8, 64, 1000))
        kind = rng.randrange(6)
        if kind == 0 and at < len(data):
            data[at] ^= 1 << rng.randrange(8)
        elif kind == 1:
            del data[at:]
        elif kind == 2:
            del data[at : at + length]
        elif kind == 3:
            data[at:at] = data[at : at + length]
        elif kind == 4:
            data[at : at + length] = bytes(len(data[at : at + length]))
        else:
            data[at:at] = rng.choice(
                (
                    b"\xff",
                    b"\0",
                    b"\xef\xbb\xbf",
                    b'"',
                    b"}",
                    b"{",
                    b",",
                    b"\n",
                    b"{{",
                    b"%}",
                    rng.randbytes(length),
                )
            )
    return bytes(data)


def changed_safetensors(rng: random.Random, raw: bytes) -> bytes:
    """A safetensors file with another header, another length of it, or other bytes anywhere."""
    size = int.from_bytes(raw[:8], "little")
    header, body = json.loads(raw[8 : 8 + size]), raw[8 + size :]
    kind = rng.random()
    if kind < 0.6:
        text = changed_json(rng, header)
        return len(text).to_bytes(8, "little") + text + body
    if kind < 0.7:
        length = rng.choice((0, 1, size - 1, size + 1, size * 2, 2**31, 2**40, 2**63, 2**64 - 1))
        return length.to_bytes(8, "little") + raw[8:]
    if kind < 0.8:
        return raw[: 8 + size] + changed_bytes(rng, body)
    return changed_bytes(rng, raw)
