"""An encoder as an ONNX graph in int8, held against the model that it was made from."""

from __future__ import annotations

import logging
import warnings
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from ..errors import UnsupportedModel
from .cache import CachedModel
from .encoder import Floats, Ints, pooled
from .onnx import OnnxForward
from .windows import Windows

if TYPE_CHECKING:
    from torch import Tensor, nn

log = logging.getLogger(__name__)

OPSET = 17
HOW = {"per_channel": True, "reduce_range": True}
"""Of all-MiniLM-L6-v2, one scale a matrix instead of one a column costs 0.015 to 0.03 of the mean cosine. Seven bits instead of
eight cost 0.001, and keep embeddings the same on every processor: with eight, the 16-bit sums of x86 without VNNI overflow."""
PROBE = "What does the court say about a contract that one side never signed? My doctor wrote x = 2 and went home.\n"
PROBE_TOKENS = (3, 5, 12, 31, 64, 126)
"""Lengths on which a graph is held against the model."""
SAME = 1e-3
"""How far the traced graph may be from the model; where it is further, tracing has taken something for constant."""
CLOSE = 0.95
"""Mean cosine that int8 must keep to the model."""
HARMLESS = (
    r"You are using the legacy TorchScript-based ONNX export",
    r"The feature will be removed",
    r"Exporting aten::index operator",
    r"Constant folding - ",
    r"To copy construct from a tensor",  # DeBERTa
)
FAILURES = (RuntimeError, TypeError, ValueError, LookupError, AttributeError, AssertionError)
"""Not every model's code can be traced, nor every graph quantised, and where one cannot it fails as it likes."""


def export_int8(model: CachedModel, adapter: Path | None, folder: Path) -> Path:
    """Write the encoder, its adapter merged, into `folder`: one row of ids [1, t] to a vector [1, dimension].

    Raises UnsupportedModel where it cannot be exported, or the result is not close to the model; ArtifactCorrupt where the
    adapter does not fit.
    """
    encoder = pooled(model, adapter, attention="eager")
    ids = Windows(model.folder, max(PROBE_TOKENS))(PROBE * 10)[0]
    probes = [np.array([ids[:tokens]], np.int64) for tokens in PROBE_TOKENS if tokens <= len(ids)]
    expected = _expected(encoder, probes)
    traced, made = folder / "traced.onnx", folder / "int8.onnx"
    _trace(encoder, probes[0], traced, model.name)
    error = float(np.abs(_run(traced, probes) - expected).max())
    if not error <= SAME:  # it may be no number
        raise _refused(model.name, f"its graph is {error:.2g} from it")
    _quantise(traced, made, model.name)
    cosine = float((_run(made, probes) * expected).sum(axis=1).mean())
    if not cosine >= CLOSE:
        raise _refused(model.name, f"its embeddings have a mean cosine of {cosine:.3f} to those in float32")
    log.info("%s in int8 has a mean cosine of %.4f to float32", model.name, cosine)
    return made


def _expected(encoder: nn.Module, probes: Sequence[Ints]) -> Floats:
    import torch

    with torch.inference_mode():
        rows = [torch.from_numpy(ids) for ids in probes]
        return np.vstack([encoder(ids, torch.ones_like(ids)).numpy() for ids in rows])


def _run(path: Path, probes: Sequence[Ints]) -> Floats:
    forward = OnnxForward(path, threads=1)
    return np.vstack([forward(ids, np.ones_like(ids)) for ids in probes])


def _trace(encoder: nn.Module, example: Ints, path: Path, name: str) -> None:
    """By torch's tracer: its newer exporter needs one more package, and longer."""
    import torch

    class OneRow(torch.nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.encoder = encoder

        def forward(self, ids: Tensor) -> Any:
            return self.encoder(ids, torch.ones_like(ids))

    names: dict[str, Any] = {"input_names": ["ids"], "output_names": ["embedding"], "dynamic_axes": {"ids": {1: "t"}}}
    try:
        with warnings.catch_warnings():
            # What some of these warn of, the comparison with the model finds.
            warnings.simplefilter("ignore", torch.jit.TracerWarning)  # type: ignore[attr-defined]
            for message in HARMLESS:
                warnings.filterwarnings("ignore", message)
            inputs = (torch.from_numpy(example),)
            torch.onnx.export(OneRow().eval(), inputs, str(path), opset_version=OPSET, dynamo=False, **names)
    except FAILURES as error:
        raise _failed(name, error) from error


def _quantise(source: Path, target: Path, name: str) -> None:
    """Weights to int8, activations where they come along (Jacob et al., 2018, in ONNX Runtime's dynamic form)."""
    from onnx.checker import ValidationError
    from onnx.shape_inference import InferenceError
    from onnxruntime.quantization import QuantType, quantize_dynamic
    from onnxruntime.quantization.shape_inference import quant_pre_process

    inferred = source.with_name("inferred.onnx")
    try:
        with _silent_root():
            quant_pre_process(source, inferred, skip_optimization=True, skip_symbolic_shape=True)
            quantize_dynamic(inferred, target, weight_type=QuantType.QInt8, **HOW)
    except (*FAILURES, ValidationError, InferenceError) as error:
        raise _failed(name, error) from error


@contextmanager
def _silent_root() -> Iterator[None]:
    """The quantiser reports every tensor to the root logger, by functions that give it a handler where it has none."""
    root, handler = logging.getLogger(), logging.NullHandler()
    nothing: Callable[[logging.LogRecord], bool] = lambda record: False  # noqa: E731
    root.addFilter(nothing)  # what comes from other loggers does not pass it
    root.addHandler(handler)
    try:
        yield
    finally:
        root.removeHandler(handler)
        root.removeFilter(nothing)


def _failed(name: str, error: Exception) -> UnsupportedModel:
    return _refused(name, str(error).strip().partition("\n")[0] or type(error).__name__)


def _refused(name: str, why: str) -> UnsupportedModel:
    return UnsupportedModel(f"{name} cannot run in int8: {why.rstrip('.')}.", hint="Set encoder_precision to float32.")
