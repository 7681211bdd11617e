"""The OpenAI client against `vllm serve DIR`: a completion, a chat, and a chat that streams.

vllm serve build/demo/compact-0.10 --dtype float32 --enforce-eager &
python examples/openai_client.py --url http://127.0.0.1:8000/v1 --wait 120
"""

from __future__ import annotations

import argparse
import sys
import time

from openai import APIConnectionError, OpenAI


def first_model(client: OpenAI, seconds: float) -> str:
    """The served model's name, waiting up to `seconds` for the server to come up."""
    deadline = time.monotonic() + seconds
    while True:
        try:
            return client.models.list().data[0].id
        except APIConnectionError:
            if time.monotonic() > deadline:
                sys.exit(
                    f"{client.base_url}: expected a server within {seconds:.0f} s, found none; is `vllm "
                    "serve` running?"
                )
            time.sleep(1.0)


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--url", default="http://127.0.0.1:8000/v1")
    parser.add_argument("--wait", type=float, default=0.0, help="seconds to wait for the server")
    args = parser.parse_args()
    client = OpenAI(base_url=args.url, api_key="none", max_retries=0)
    model = first_model(client, args.wait)

    text = "Once upon a time there was a little"
    completion = client.completions.create(model=model, prompt=text, max_tokens=24, temperature=0.0)
    print(f"completion  {text}|{completion.choices[0].text}")

    question = [{"role": "user", "content": "What is the capital of France?"}]
    chat = client.chat.completions.create(model=model, messages=question, max_tokens=24, temperature=0.0)
    print(f"chat        {chat.choices[0].message.content}")

    print("streaming   ", end="")
    for chunk in client.chat.completions.create(
        model=model, messages=question, max_tokens=24, temperature=0.0, stream=True
    ):
        if chunk.choices:
            print(chunk.choices[0].delta.content or "", end="", flush=True)
    print()


if __name__ == "__main__":
    main()
