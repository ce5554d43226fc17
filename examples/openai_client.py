"""Ask a running `collegium serve` with the openai client: python examples/openai_client.py "What is a tort?"."""

from __future__ import annotations

import sys

from openai import OpenAI

URL = "http://127.0.0.1:8000/v1"


def main(prompt: str, url: str = URL) -> None:
    """Print the live models, a whole answer with its decision, and a streamed answer of one expert."""
    client = OpenAI(base_url=url, api_key="none")
    print("models:", ", ".join(model.id for model in client.models.list()))

    # `auto` leaves the choice to the router; `collegium` has what OpenAI's fields do not.
    completion = client.chat.completions.create(model="auto", messages=[{"role": "user", "content": prompt}])
    extra = (completion.model_extra or {})["collegium"]
    print(f"{completion.model} ({extra['decision']['reason']}): {completion.choices[0].message.content}\n")

    # An expert by name, streamed, without retrieval.
    stream = client.chat.completions.create(
        model="base",
        messages=[{"role": "user", "content": prompt}],
        stream=True,
        extra_body={"collegium": {"retrieve": False}},
    )
    for chunk in stream:
        print(chunk.choices[0].delta.content or "", end="", flush=True)
    print()


if __name__ == "__main__":
    main(" ".join(sys.argv[1:]) or "What is a tort?")
