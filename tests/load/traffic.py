"""Requests of every kind, sent by the openai client many at once, and what became of each.

Whatever a greedy request is mixed with, its answer is the one that the same request got alone.
"""

from __future__ import annotations

import asyncio
import collections
import json
import random
from collections.abc import Awaitable, Callable, Iterable
from typing import Any

import httpx
from openai import APIConnectionError, APIStatusError, AsyncOpenAI

PROMPTS = (
    "Once upon a time there was a little",
    "The capital of France is",
    "Water boils at a temperature of",
    "In 1969 the first human beings",
    "The three primary colours are",
    "A list of the planets, from the sun outwards:",
    "To bake bread you need flour,",
    "The opposite of cold is",
    # Longer than a block of vLLM's cache, with a beginning that they share.
    "The mill stood by the river, and the miller's daughter counted sacks of flour. " * 3 + "She counted",
    "The mill stood by the river, and the miller's daughter counted sacks of flour. " * 9 + "At last she",
)
TOO_LONG = "word " * 5000
BAD_VALUES: tuple[dict[str, Any], ...] = (
    {"temperature": -1.0},
    {"n": 0},
    {"max_tokens": -5},
    {"top_p": 7.0},
    {"logprobs": 10**6},
    {"prompt": [10**9]},
    {"model": "another"},
)
BAD_BODIES = (b"{", b'{"model": ', b"[]", b"\0", b'{"prompt": NaN}', b"[" * 5000)
BAD_UTF8 = (b"\xff\xfe", b"\xc3", b"\xed\xa0\x80", b"\xf8\x88\x80\x80\x80")
# kind -> how it should end, and how often it is sent
KINDS = {
    "completion": ("right", 5),
    "chat": ("right", 3),
    "stream": ("right", 4),
    "logprobs": ("right", 3),
    "n of 3": ("right", 2),
    "disconnect": ("left", 2),
    "too long": ("refused", 1),
    "malformed": ("refused", 1),
    "bad UTF-8": ("refused", 1),
    "bad values": ("refused", 1),
}
Outcomes = collections.Counter[tuple[str, str]]


class Traffic:
    """Requests to one server. `outcomes` counts them by (kind, outcome); `told` has a line for each that did
    not end as its kind should; `tokens` counts those of right answers.
    """

    def __init__(self, url: str, prompts: int = len(PROMPTS), new_tokens: int = 24) -> None:
        self.client = AsyncOpenAI(base_url=url, api_key="none", max_retries=0, timeout=900)
        self.url, self.prompts, self.new_tokens = url, PROMPTS[:prompts], new_tokens
        self.model = ""
        self.alone: dict[tuple[bool, str], tuple[str, int]] = {}
        self.outcomes: Outcomes = collections.Counter()
        self.told: list[str] = []
        self.tokens = 0

    async def learn(self) -> dict[tuple[bool, str], tuple[str, int]]:
        """Of every prompt, as (chat?, prompt), the greedy text and its number of tokens; one request at a
        time.
        """
        self.model = (await self.client.models.list()).data[0].id
        for prompt in self.prompts:
            for chat in (False, True):
                answer = await self._ask(prompt, chat)
                self.alone[chat, prompt] = (_texts(answer)[0], answer.usage.completion_tokens)
        return dict(self.alone)

    async def flood(self, keys: Iterable[str], at_once: int) -> None:
        """One request for each key, which alone decides what it is; so many at once."""
        gate = asyncio.Semaphore(at_once)

        async def one(key: str) -> None:
            async with gate:
                await self._one(random.Random(key), key)

        await asyncio.gather(*map(one, keys))

    async def _one(self, rng: random.Random, key: str) -> None:
        (kind,) = rng.choices(list(KINDS), [often for _, often in KINDS.values()])
        prompt, detail = rng.choice(self.prompts), ""
        sends: dict[str, Callable[[random.Random, str], Awaitable[str]]] = {
            "stream": self._stream,
            "disconnect": self._disconnect,
            "too long": lambda *_: self._create(prompt=TOO_LONG),
            "malformed": lambda *_: self._post(rng.choice(BAD_BODIES)),
            "bad UTF-8": self._bad_utf8,
            "bad values": lambda *_: self._create(**{"prompt": prompt, **rng.choice(BAD_VALUES)}),
        }
        try:
            outcome = await (sends[kind](rng, prompt) if kind in sends else self._compare(kind, prompt))
        except APIStatusError as error:
            outcome, detail = _of_status(error.status_code), str(error)
        except (APIConnectionError, httpx.HTTPError) as error:
            outcome, detail = "lost", repr(error)
        self.outcomes[kind, outcome] += 1
        if outcome != KINDS[kind][0]:
            self.told.append(f"{key}, {kind}: {outcome} {detail} {prompt[-30:]!r}")

    async def _ask(self, prompt: str, chat: bool, **more: Any) -> Any:
        given = {"model": self.model, "max_tokens": self.new_tokens, "temperature": 0.0, **more}
        if chat:
            messages: Any = [{"role": "user", "content": prompt}]
            return await self.client.chat.completions.create(messages=messages, **given)
        return await self.client.completions.create(prompt=prompt, **given)

    async def _compare(self, kind: str, prompt: str) -> str:
        """`n of 3` draws from the best token alone, since vLLM refuses n > 1 with temperature 0."""
        more: dict[str, Any] = {}
        if kind == "n of 3":
            more = {"n": 3, "temperature": 1.0, "extra_body": {"top_k": 1}}
        elif kind == "logprobs":
            more = {"logprobs": 3}
        answer = await self._ask(prompt, kind == "chat", **more)
        wanted = self.alone[kind == "chat", prompt]
        if kind == "logprobs":
            found = answer.choices[0].logprobs
            if len(found.token_logprobs) != wanted[1] or not all(p <= 0 for p in found.token_logprobs):
                return "wrong"
        return self._judge(_texts(answer), [wanted] * (3 if kind == "n of 3" else 1))

    async def _stream(self, rng: random.Random, prompt: str) -> str:
        chat, parts = rng.random() < 0.5, []
        async for chunk in await self._ask(prompt, chat, stream=True):
            parts += [(c.delta.content if chat else c.text) or "" for c in chunk.choices]
        return self._judge(["".join(parts)], [self.alone[chat, prompt]])

    def _judge(self, texts: list[str], wanted: list[tuple[str, int]]) -> str:
        if texts != [text for text, _ in wanted]:
            self.told.append(f"expected {wanted[0][0]!r}, found {texts}")
            return "wrong"
        self.tokens += sum(tokens for _, tokens in wanted)
        return "right"

    async def _disconnect(self, rng: random.Random, prompt: str) -> str:
        """Hang up before the first word, or after one to four."""
        words = rng.randrange(5)
        stream = await self._ask(prompt, True, stream=True, max_tokens=200)
        async with stream:
            while words > 0:
                await anext(stream, None)
                words -= 1
        return "left"

    async def _create(self, **given: Any) -> str:
        await self._ask(given.pop("prompt"), False, **given)
        return "accepted"

    async def _bad_utf8(self, rng: random.Random, prompt: str) -> str:
        body = json.dumps({"model": self.model, "prompt": prompt + "HERE", "max_tokens": 4}).encode()
        return await self._post(body.replace(b"HERE", rng.choice(BAD_UTF8)))

    async def _post(self, body: bytes) -> str:
        async with httpx.AsyncClient(timeout=900) as client:
            headers = {"Content-Type": "application/json"}
            answer = await client.post(f"{self.url}/completions", content=body, headers=headers)
        return _of_status(answer.status_code)


def _of_status(status: int) -> str:
    return "accepted" if status < 400 else "refused" if status < 500 else "failed"


def _texts(answer: Any) -> list[str]:
    return [c.message.content if hasattr(c, "message") else c.text for c in answer.choices]
