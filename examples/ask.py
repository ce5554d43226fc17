"""Ask the experts in this process: python examples/ask.py "What is a tort?"."""

from __future__ import annotations

import sys

from collegium import Collegium


def main(prompt: str) -> None:
    """Print who would answer, the answer as it comes, and what it rests on."""
    with Collegium.open() as collegium:
        decision = collegium.route(prompt)
        print(f"{decision.expert} ({decision.reason}, confidence {decision.confidence:.2f})\n")

        answer = collegium.stream(prompt)
        for delta in answer:
            print(delta.text, end="", flush=True)

        reply = answer.reply
        print(f"\n\n{reply.expert_version}, {reply.usage.completion_tokens} tokens")
        for passage in reply.citations:
            print(f"from {passage.document}, characters {passage.span[0]} to {passage.span[1]}")


if __name__ == "__main__":
    main(" ".join(sys.argv[1:]) or "What is a tort?")
