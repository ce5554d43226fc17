"""What int8 costs: the shipped experts in int8 and in float32, on the same test rows, through the engine that serves them.

    python benchmarks/precision.py [--quick] [--json FILE]

Every row goes through its domain's adapter. Compared are the likelihood of the right answer (`nll`, nats a token), the
likeliest of the choices (`accuracy`) and the greedy answer as text (`exact_match`). A difference is int8 less float32; its
95 % interval is a paired bootstrap over rows. `same` is the share of rows with the same choice, or the same greedy answer.
"""

from __future__ import annotations

import json
import time
from collections import defaultdict
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from data import TASKS, need, parser

from collegium.experts.engine.engine import Engine
from collegium.experts.engine.load import load_decoder
from collegium.experts.engine.request import Request, Row
from collegium.experts.engine.slots import Adapter
from collegium.experts.home import Home
from collegium.models.chat import ChatEncoder
from collegium.models.load import Precision, limit_threads, load_tokenizer
from collegium.schema import Lora, Message, Sampling
from collegium.settings import Settings
from collegium.training.measuring.evaluate import ANSWER_TOKENS, interval, same_text
from collegium.training.rows.examples import Example, read_examples
from collegium.training.rows.wording import ask, close_labels, wording_of

QUICK_ROWS, ROWS = 15, 120
PROMPT_TOKENS, LIKELIHOOD_TOKENS, MOST_CHOICES = 700, 128, 20
"""Rows with a longer prompt are left out, longer answers cut, rows with more choices scored by their greedy answer alone."""
TOGETHER = 32
"""Rows that are asked together, so that their prompts stay in the cache."""
LIMITS = {"nll": 0.02, "accuracy": 0.02, "exact_match": 0.02}
"""What int8 may change over all rows, interval included."""
RowScores = Mapping[str, tuple[float, ...]]
"""By metric: its value in int8 and in float32, and whether both do the same."""


@dataclass(frozen=True, slots=True)
class Question:
    """A row as it is asked; `answers` are the tokens of the right answer and of the other choices."""

    task: str
    row: Example
    prompt: list[int]
    adapter: Adapter
    answers: list[tuple[int, ...]]


@dataclass(frozen=True, slots=True)
class Heard:
    """What an expert makes of a question: the mean log-probability a token of each answer, and an answer of its own."""

    likelihoods: list[float]
    greedy: tuple[int, ...]


def main() -> None:
    options = parser(__doc__ or "")
    options.add_argument("--rows", type=int, help=f"rows a task; default {ROWS}, with --quick {QUICK_ROWS}")
    options.add_argument("--choices", type=int, default=MOST_CHOICES, help="0: greedy answers and likelihoods alone")
    chosen = options.parse_args()
    data = need(chosen.data / "experts")
    with Home(Settings.load()) as home:
        rows = chosen.rows or (QUICK_ROWS if chosen.quick else ROWS)
        figures = measure(home, data, rows, chosen.choices)
    show(figures)
    if chosen.json:
        chosen.json.write_text(json.dumps(figures, indent=1), "utf-8")


def measure(home: Home, data: Path, limit: int, choices: int) -> dict[str, Any]:
    """Figures for each task and over all."""
    chat = ChatEncoder(load_tokenizer(home.models.get(home.settings.base_model)))
    questions, too_long = read_questions(home, chat, data, limit, choices)
    int8, int8_speed = hear_all(home, "int8", questions)
    plain, plain_speed = hear_all(home, "float32", questions)
    tasks: dict[str, list[RowScores]] = defaultdict(list)
    for question, *heard in zip(questions, int8, plain, strict=True):
        tasks[question.task].append(compare(chat, question, *heard))
    tasks["all"] = [row for rows in tasks.values() for row in rows]
    speed = {"int8": int8_speed, "float32": plain_speed}
    return {"too_long": too_long, "speed": speed, "tasks": {task: summary(rows) for task, rows in tasks.items()}}


def read_questions(home: Home, chat: ChatEncoder, data: Path, limit: int, choices: int) -> tuple[list[Question], int]:
    """The rows of all tasks, and how many were too long."""
    adapters = {
        card.domain: Adapter(card.spec.adapter, home.artifacts.verify(card.spec.adapter), card.evidence.canary)
        for card in home.cards(home.release()).values()
        if isinstance(card.spec, Lora)
    }
    questions: list[Question] = []
    for domain, task in [(domain, task) for domain, names in TASKS.items() for task in names if domain in adapters]:
        rows = read_examples([data / domain / f"{task}.test.jsonl.gz"], limit=limit)
        for row in close_labels(rows, read_examples([data / domain / f"{task}.train.jsonl.gz"])):
            texts = dict.fromkeys((row.answer, *(row.choices if len(row.choices) <= choices else ())))
            answers = [tuple(chat.text(text)[:LIKELIHOOD_TOKENS]) for text in texts]
            prompt = chat.encode([Message("user", ask(row))])
            questions.append(Question(f"{domain}/{task}", row, prompt, adapters[domain], answers))
    fitting = [question for question in questions if len(question.prompt) <= PROMPT_TOKENS]
    return fitting, len(questions) - len(fitting)


def hear_all(home: Home, precision: Precision, questions: Sequence[Question]) -> tuple[list[Heard], dict[str, float]]:
    """What the experts in `precision` make of the questions, and how fast."""
    model, threads = home.models.get(home.settings.base_model), home.settings.threads
    limit_threads(threads)
    slots, cpu = len(TASKS), torch.device("cpu")
    decoder = load_decoder(model, precision=precision, device=cpu, threads=threads, adapter_slots=slots)
    engine = Engine(decoder, load_tokenizer(model), max_queue=TOGETHER * (MOST_CHOICES + 1))
    heard, start = list[Heard](), time.perf_counter()
    for first in range(0, len(questions), TOGETHER):
        heard += hear(engine, questions[first : first + TOGETHER])
        print(f"{precision}: {len(heard)} of {len(questions)} rows, {time.perf_counter() - start:.0f} s", flush=True)
    seconds, stats = time.perf_counter() - start, engine.stats()
    engine.close()
    read = stats.prompt_tokens - stats.reused_tokens
    wrote = sum(len(one.greedy) for one in heard) + sum(len(answer) for one in questions for answer in one.answers)
    return heard, {"seconds": round(seconds, 1), "read": read, "wrote": wrote, "a_second": (read + wrote) // seconds}


def hear(engine: Engine, questions: Sequence[Question]) -> list[Heard]:
    """The right answers come first: once a prompt has been read, all else that is asked about it finds it in the cache."""
    requests = [requests_of(question) for question in questions]
    right = list(answer(engine, [one[0] for one in requests]))
    rest = answer(engine, [request for one in requests for request in one[1:]])
    heard = []
    for question, (_, likelihood) in zip(questions, right, strict=True):
        greedy = next(rest)[0]
        heard.append(Heard([likelihood, *(next(rest)[1] for _ in question.answers[1:])], greedy))
    return heard


def requests_of(question: Question) -> list[Request]:
    """The right answer, for its likelihood; a greedy answer; the other choices."""
    rows = (Row(question.prompt, question.adapter),)
    right, *wrong = (Request(rows, forced=tokens) for tokens in question.answers)
    return [right, Request(rows, sampling=Sampling(max_tokens=ANSWER_TOKENS)), *wrong]


def answer(engine: Engine, requests: Sequence[Request]) -> Iterator[tuple[tuple[int, ...], float]]:
    """Tokens of each answer, and their mean log-probability where they were given."""
    for generation in [engine.submit(request) for request in requests]:
        deltas = list(generation)
        tokens = tuple(token for delta in deltas for token in delta.token_ids)
        yield tokens, sum(one for delta in deltas for one in delta.logprobs or ()) / max(len(tokens), 1)


def compare(chat: ChatEncoder, question: Question, *heard: Heard) -> RowScores:
    """Each metric of the row."""
    same = float(heard[0].greedy == heard[1].greedy)
    metrics: dict[str, tuple[float, ...]] = {"nll": (*(-one.likelihoods[0] for one in heard), same)}
    if len(question.answers) > 1:
        chosen = [int(np.argmax(one.likelihoods)) for one in heard]
        metrics["accuracy"] = (*(float(one == 0) for one in chosen), float(chosen[0] == chosen[1]))
    if wording_of(row := question.row).metric != "likelihood" and len(question.answers[0]) <= ANSWER_TOKENS:
        matches = (same_text(chat.decode(one.greedy), row.answer, case=wording_of(row).case) for one in heard)
        metrics["exact_match"] = (*map(float, matches), same)
    return metrics


def summary(rows: Sequence[RowScores]) -> dict[str, dict[str, float]]:
    """By metric: means, their difference with its interval, and the share of rows that do the same."""
    figures = {}
    for metric in LIMITS:
        if values := [row[metric] for row in rows if metric in row]:
            int8, plain, same = np.array(values, np.float64).T
            low, high = interval(int8 - plain, np.random.default_rng(0))
            means = {"int8": int8, "float32": plain, "difference": int8 - plain, "same": same}
            rounded = {name: round(float(column.mean()), 4) for name, column in means.items()}
            figures[metric] = {"rows": len(values), **rounded, "low": low, "high": high}
    return figures


def show(figures: Mapping[str, Any]) -> None:
    """Print the table."""
    print(f"\n{'task':<22}{'metric':<13}rows    int8 float32 difference  95 % interval      same")
    for task, metrics in figures["tasks"].items():
        for metric, one in metrics.items():
            means = f"{one['int8']:>8.4f}{one['float32']:>8.4f}{one['difference']:>+11.4f}"
            spread = f"[{one['low']:+.4f}, {one['high']:+.4f}]"
            print(f"{task:<22}{metric:<13}{one['rows']:>4}{means}  {spread}{one['same']:>7.3f}")
    print(f"\n{figures['too_long']} rows were left out: their prompts have more than {PROMPT_TOKENS} tokens.")
    for precision, speed in figures["speed"].items():
        print(f"{precision:<8}{speed['a_second']:>6.0f} tokens a second, {speed['seconds']:.0f} s")
    for metric, one in figures["tasks"]["all"].items():
        limit = LIMITS[metric]
        verdict = "within" if max(-one["low"], one["high"]) <= limit else "NOT within"
        print(f"{metric}: {verdict} +-{limit} over all, interval included")


if __name__ == "__main__":
    main()
