"""What the linear layers of one decode step cost on this processor with what torch and others offer, in milliseconds.

    python benchmarks/linears.py [--rows 1,8,64] [--rounds 10] [--only NAME,...] [--json FILE]

The shapes are the default base model's: 30 layers of four linears (q, k and v as one; gate and up as one) and the head. Every
linear has memory of its own, so that a step reads all weights from memory, as decoding does. "per row" contestants give each
row its own activation scale, so that requests of one batch do not change each other's answers; their time includes that
quantisation. The others are yardsticks. Bursts during which other processes took the cores are left out.
"""

from __future__ import annotations

import argparse
import importlib.util
import json
import os
import statistics
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional

Linear = Callable[[Tensor], Tensor]
"""float32 [rows, in] -> float [rows, out]"""
LAYERS = 30
LAYER = ((960, 576), (576, 576), (3072, 576), (576, 1536))
HEAD = (49152, 576)
QUIET = 0.15
"""Bursts during which other processes had a larger share of a core are left out."""


@dataclass(frozen=True, slots=True)
class Contestant:
    """`pack` makes a linear of a float32 weight [out, in]; `bits` a weight are read a step."""

    name: str
    pack: Callable[[Tensor], Linear]
    bits: int
    per_row: bool
    needs: str = "torch"


def per_channel(weight: Tensor) -> tuple[Tensor, Tensor]:
    """int8 weights [out, in], and their scales [out]: symmetric, one a row of the weight."""
    scales = weight.abs().amax(dim=1) / 127
    return (weight / scales[:, None]).round().to(torch.int8), scales


def per_row(x: Tensor) -> tuple[Tensor, Tensor]:
    """int8 activations [rows, in], and their scales [rows, 1]."""
    scales = x.abs().amax(dim=1, keepdim=True).div_(127)
    return (x / scales).round_().to(torch.int8), scales


def float32(weight: Tensor) -> Linear:
    """Weights of float32 as it is."""
    return lambda x: functional.linear(x, weight)


def bfloat16(weight: Tensor) -> Linear:
    """Weights of bfloat16 as torch has it."""
    narrow = weight.bfloat16()
    return lambda x: functional.linear(x.bfloat16(), narrow)


def bfloat16_packed(weight: Tensor) -> Linear:
    """Weights of bfloat16 with weights in the layout that oneDNN likes."""
    packed = torch.ops.mkldnn._reorder_linear_weight(weight.bfloat16())
    return lambda x: torch.ops.mkldnn._linear_pointwise(x.bfloat16(), packed, None, "none", [], "")


def dynamic(engine: str) -> Callable[[Tensor], Linear]:
    """Torch's own dynamic int8: one scale a batch."""

    def pack(weight: Tensor) -> Linear:
        torch.backends.quantized.engine = engine
        packed = torch.ops.quantized.linear_prepack(quantised(weight), None)
        return lambda x: torch.ops.quantized.linear_dynamic(x, packed, False)

    return pack


def static_on_scaled_rows(engine: str) -> Callable[[Tensor], Linear]:
    """Torch's static int8 with a fixed scale of 1, on rows divided by their own scale: per row in effect."""

    def pack(weight: Tensor) -> Linear:
        torch.backends.quantized.engine = engine
        packed = torch.ops.quantized.linear_prepack(quantised(weight), None)

        def linear(x: Tensor) -> Tensor:
            scales = x.abs().amax(dim=1, keepdim=True).div_(127)
            out: Tensor = torch.ops.quantized.linear_with_input_q_dq_qweight_dq_output_fp32(
                x / scales, 1.0, 128, packed
            )
            return out.mul_(scales)

        return linear

    return pack


def quantised(weight: Tensor) -> Tensor:
    """The weight as a quantised tensor, one scale a channel."""
    scales = per_channel(weight)[1].double()
    return torch.quantize_per_channel(weight, scales, torch.zeros(len(scales), dtype=torch.int64), 0, torch.qint8)


def onednn(weight: Tensor) -> Linear:
    """The int8 matmul of oneDNN with the weights' scales fused, rows quantised by hand to uint8 around 128.

    With int8 rows oneDNN has only its reference implementation on processors without AMX: 200 to 3,000 times slower.
    """
    multiply = onednn_matmul(weight)

    def linear(x: Tensor) -> Tensor:
        scales = x.abs().amax(dim=1, keepdim=True).div_(127)
        return multiply((x / scales).round_().add_(128).to(torch.uint8)).mul_(scales)

    return linear


def onednn_kernel(weight: Tensor) -> Linear:
    """The same without scaling rows: what the matmul takes by itself."""
    multiply = onednn_matmul(weight)
    return lambda x: multiply(x.to(torch.uint8))


def onednn_matmul(weight: Tensor) -> Linear:
    """The matmul of uint8 rows around 128."""
    values, scales = per_channel(weight)
    packed = torch.ops.onednn.qlinear_prepack(values, None)
    zeros = torch.zeros(len(scales), dtype=torch.int32)
    return lambda rows: torch.ops.onednn.qlinear_pointwise(
        rows, 1.0, 128, packed, scales, zeros, None, 1.0, 0, torch.float32, "none", [], ""
    )


def int_mm(weight: Tensor) -> Linear:
    """Weights of int8 times int8 to int32, and scales by hand."""
    values, scales = per_channel(weight)
    across = values.t()

    def linear(x: Tensor) -> Tensor:
        rows, mine = per_row(x)
        return torch._int_mm(rows, across).to(torch.float32).mul_(scales).mul_(mine)

    return linear


def int8_weight(dtype: torch.dtype) -> Callable[[Tensor], Linear]:
    """int8 weights only: the activations stay `dtype`, so no row disturbs another."""

    def pack(weight: Tensor) -> Linear:
        values, scales = per_channel(weight)
        narrow = scales.to(dtype)
        return lambda x: torch.ops.aten._weight_int8pack_mm(x.to(dtype), values, narrow)

    return pack


def torchao(weight: Tensor) -> Linear:
    """Torchao, eager: per-row activation scales, `_int_mm` inside."""
    from torchao.quantization import Int8DynamicActivationInt8WeightConfig, quantize_

    module = torch.nn.Linear(weight.shape[1], weight.shape[0], bias=False)
    module.weight = torch.nn.Parameter(weight, requires_grad=False)
    quantize_(module, Int8DynamicActivationInt8WeightConfig())
    return module


CONTESTANTS = (
    Contestant("float32 F.linear", float32, 32, True),
    Contestant("bfloat16 F.linear", bfloat16, 16, True),
    Contestant("bfloat16 mkldnn prepacked", bfloat16_packed, 16, True),
    Contestant("linear_dynamic fbgemm", dynamic("fbgemm"), 8, False),
    Contestant("linear_dynamic onednn", dynamic("onednn"), 8, False),
    Contestant("fbgemm static on scaled rows", static_on_scaled_rows("fbgemm"), 8, True),
    Contestant("onednn qlinear_pointwise", onednn, 8, True),
    Contestant("onednn qlinear_pointwise, kernel alone", onednn_kernel, 8, False),
    Contestant("_int_mm", int_mm, 8, True),
    Contestant("_weight_int8pack_mm bfloat16", int8_weight(torch.bfloat16), 8, True),
    Contestant("_weight_int8pack_mm float32", int8_weight(torch.float32), 8, True),
    Contestant("torchao Int8DynamicActivationInt8Weight, eager", torchao, 8, True, "torchao"),
)


class Step:
    """All linears of one decode step, each with its own weights."""

    def __init__(self, contestant: Contestant) -> None:
        shapes = LAYER * LAYERS + (HEAD,)
        self.linears = [(contestant.pack(torch.randn(out, into) * 0.05), into) for out, into in shapes]

    def milliseconds(self, inputs: Mapping[int, Tensor]) -> float:
        """One step."""
        start = time.perf_counter()
        for linear, into in self.linears:
            linear(inputs[into])
        return 1000 * (time.perf_counter() - start)

    def burst(self, inputs: Mapping[int, Tensor]) -> tuple[float, list[float]]:
        """Steps for a tenth of a second: the share of a core that other processes had meanwhile, and milliseconds each."""
        start, others = time.perf_counter(), others_seconds()
        taken = [self.milliseconds(inputs)]
        while time.perf_counter() - start < 0.1:
            taken.append(self.milliseconds(inputs))
        return (others_seconds() - others) / (time.perf_counter() - start), taken[1:] or taken


def others_seconds() -> float:
    """Seconds of processor time that all other processes have had: torch's threads wait for a core that is taken."""
    fields = [int(field) for field in Path("/proc/stat").read_text("ascii").split("\n", 1)[0].split()[1:]]
    return (sum(fields[:3]) + sum(fields[5:8])) / os.sysconf("SC_CLK_TCK") - time.process_time()


def gigabytes(bits: int) -> float:
    """Weights that a step reads."""
    return bits / 8 * (LAYERS * sum(out * into for out, into in LAYER) + HEAD[0] * HEAD[1]) / 1e9


def deviation(contestant: Contestant) -> float:
    """Relative error of one linear against float32: a contestant that is far off computes something else."""
    generator = torch.Generator().manual_seed(0)
    weight, x = torch.randn(*LAYER[0], generator=generator), torch.randn(8, 576, generator=generator)
    exact = functional.linear(x, weight)
    return float((contestant.pack(weight)(x).float() - exact).norm() / exact.norm())


def measure(chosen: Sequence[Contestant], rows: Sequence[int], rounds: int, patience: float) -> dict[str, Any]:
    """Name -> rows -> {min, median} milliseconds, of bursts that had the processor to themselves where there were any."""
    figures: dict[str, Any] = {}
    for contestant in chosen:
        step = Step(contestant)
        figures[contestant.name] = {"bits": contestant.bits, "per_row": contestant.per_row}
        for count in rows:
            inputs = {into: torch.randn(count, into) for into in (576, 1536)}
            bursts, quiet, start = [step.burst(inputs)], 0, time.perf_counter()
            while quiet < rounds and time.perf_counter() - start < patience:
                bursts.append(step.burst(inputs))
                quiet = sum(share < QUIET for share, _ in bursts)
            kept = [ms for share, taken in bursts if share < QUIET or not quiet for ms in taken]
            figures[contestant.name][str(count)] = {
                "min_ms": round(min(kept), 2),
                "median_ms": round(statistics.median(kept), 2),
                "gb_per_s": round(gigabytes(contestant.bits) / min(kept) * 1000, 1),
                "quiet_bursts": quiet,
            }
        print(contestant.name, figures[contestant.name], flush=True)
    return figures


def show(figures: Mapping[str, Any], rows: Sequence[int]) -> None:
    """Print a table."""
    print("\n| linears | per row | " + " | ".join(f"M={count}: min / median ms (GB/s)" for count in rows) + " |")
    print("|---|---|" + "---|" * len(rows))
    for name, figure in figures.items():
        cells = [figure[str(count)] for count in rows]
        line = " | ".join(f"{cell['min_ms']} / {cell['median_ms']} ({cell['gb_per_s']})" for cell in cells)
        print(f"| {name} | {'yes' if figure['per_row'] else 'no'} | {line} |")


def main() -> None:
    options = argparse.ArgumentParser(description=__doc__)
    options.add_argument("--rows", default="1,8,64")
    options.add_argument("--rounds", type=int, default=10)
    options.add_argument("--patience", type=float, default=60, help="seconds to wait for quiet bursts")
    options.add_argument("--only", default="", help="parts of names, separated by commas")
    options.add_argument("--json", type=Path)
    chosen = options.parse_args()
    torch.set_num_threads(len(os.sched_getaffinity(0)))
    rows = [int(count) for count in chosen.rows.split(",")]
    wanted = [one for one in CONTESTANTS if any(part in one.name for part in chosen.only.split(","))]
    present = []
    with torch.inference_mode():
        for contestant in wanted:
            if importlib.util.find_spec(contestant.needs) is None:
                print(f"{contestant.name}: skipped, {contestant.needs} is not installed")
                continue
            try:
                print(f"{contestant.name}: relative error {deviation(contestant):.4f}", flush=True)
            except (RuntimeError, AttributeError, NotImplementedError) as error:
                print(f"{contestant.name}: does not run here ({str(error).splitlines()[0]})")
                continue
            present.append(contestant)
        figures = measure(present, rows, chosen.rounds, chosen.patience)
    show(figures, rows)
    if chosen.json:
        chosen.json.write_text(json.dumps(figures, indent=1), "utf-8")


if __name__ == "__main__":
    main()
