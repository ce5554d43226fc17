"""What the reference implementation makes of an adapter on a few tokens: the canary that its card carries.

transformers and PEFT compute it, in float32, and not the engine: so an option of LoRA that the engine misreads shows too.
"""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any

from ..errors import InvalidRequest
from ..models.cache import CachedModel
from ..models.chat import ChatEncoder
from ..models.load import load_lm, load_tokenizer
from ..schema import Canary, Message
from .engine.canary import MOST_TOKENS
from .engine.weights import Weights

if TYPE_CHECKING:
    import torch

PROBE = "Summarise: a short story, a long table, two formulas and an open question."
DIGITS = 4


def make_canary(adapter: Path, base: CachedModel) -> Canary:
    """Probe the adapter in a PEFT folder: after each token of a prompt, the likeliest token and the one that it changes most.

    Raises InvalidRequest where what it makes of the base model are no numbers.
    """
    import torch

    tokens = ChatEncoder(load_tokenizer(base)).encode([Message("user", PROBE)])[-MOST_TOKENS:]
    with torch.no_grad():
        tuned, plain = _run(adapter, base, tokens)
        likeliest = tuned.argmax(1, keepdim=True)
        changed = (tuned - plain).abs().scatter(1, likeliest, -1.0).argmax(1, keepdim=True)
        ids = torch.cat([likeliest, changed], 1)
        tuned, plain = tuned.gather(1, ids), plain.gather(1, ids)
    if not torch.isfinite(tuned - plain).all():
        raise InvalidRequest(
            f"With the adapter {adapter}, the model gives no finite numbers.", hint="Train it again, at a lower rate."
        )
    return Canary(tuple(tokens), tuple(ids.flatten().tolist()), _rounded(tuned), _rounded(plain))


def _run(adapter: Path, base: CachedModel, tokens: list[int]) -> tuple[torch.Tensor, torch.Tensor]:
    """Log-probabilities [T, vocab] with the adapter and without."""
    import torch
    from peft import PeftModel

    with Weights(base.folder) as weights:  # as they are stored, they stay on the disk: no second copy of a large model
        stored = weights["model.layers.0.self_attn.q_proj.weight"].dtype
    model: Any = PeftModel.from_pretrained(load_lm(base, device=torch.device("cpu"), dtype=stored), str(adapter))
    _widen_in_use(model.eval())
    ids = torch.tensor([tokens])
    tuned = model(ids).logits[0].log_softmax(1)
    with model.disable_adapter():
        return tuned, model(ids).logits[0].log_softmax(1)


def _widen_in_use(model: torch.nn.Module) -> None:
    """Have each part compute in float32, its weights widened for as long as it does."""

    def widen(part: torch.nn.Module, _: Any) -> None:
        stored[part] = [weight.data for weight in part.parameters(recurse=False)]
        part.float()

    def restore(part: torch.nn.Module, *_: Any) -> None:
        for weight, data in zip(part.parameters(recurse=False), stored.pop(part), strict=True):
            weight.data = data

    stored: dict[torch.nn.Module, list[torch.Tensor]] = {}
    for part in model.modules():
        if list(part.parameters(recurse=False)):
            part.register_forward_pre_hook(widen)
            part.register_forward_hook(restore)


def _rounded(logprobs: torch.Tensor) -> tuple[float, ...]:
    return tuple(round(one, DIGITS) for one in logprobs.flatten().tolist())
