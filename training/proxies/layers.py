"""Choose the layers of a model that it can do without.

The one whose removal costs the least likelihood of some texts is removed, and again, until so many are left (Song et al.,
*SLEB: Streamlining LLMs through Redundancy Verification and Elimination of Transformer Blocks*, 2024).
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

from ...errors import InvalidRequest
from ...experts.engine.shape import read_shape
from ...models.cache import CachedModel
from ..recipes import Progress
from .distil import Tokens

if TYPE_CHECKING:
    from torch import Tensor


def check_layers(wanted: int, model: CachedModel) -> None:
    """Raises InvalidRequest where a model cannot be shrunk to so many layers, UnsupportedModel where it is of another kind."""
    there = read_shape(model.folder).layers
    if not 1 <= wanted < there:
        raise InvalidRequest(
            f"{model.name} has {there} layers and cannot be shrunk to {wanted}.", hint=f"Take 1 to {there - 1}."
        )


def choose_layers(model: Any, wanted: int, texts: Sequence[Tokens], progress: Progress) -> list[int]:
    """The layers of a PreTrainedModel to keep, in order. The model is whole again afterwards."""
    import torch

    decoder = model.get_decoder()
    layers, depth = decoder.layers, model.config.num_hidden_layers
    kept, done = list(range(depth)), 0
    of = sum(range(wanted + 1, depth + 1))
    try:
        while len(kept) > wanted:
            decoder.layers = torch.nn.ModuleList([layers[at] for at in kept])
            states = [_states(decoder, text) for text in texts]
            losses = []
            for place in range(len(kept)):
                # What lies before the layer computes what it did.
                decoder.layers = torch.nn.ModuleList([layers[at] for at in kept[place + 1 :]])
                losses.append(
                    sum(_loss(model, text, before[place]) for text, before in zip(texts, states, strict=True))
                )
                done += 1
                progress("choosing layers", done, of)
            del kept[losses.index(min(losses))]
    finally:
        decoder.layers = layers
    return kept


def _states(decoder: Any, text: Tokens) -> tuple[Tensor, ...]:
    """What goes into each layer, and out of the last, of one text."""
    import torch

    with torch.inference_mode():
        ids = torch.tensor([text], device=decoder.device)
        states: tuple[Tensor, ...] = decoder(ids, use_cache=False, output_hidden_states=True).hidden_states
    return states


def _loss(model: Any, text: Tokens, state: Tensor) -> float:
    """The negative log-likelihood of a text whose state is given, summed over its tokens."""
    import torch

    with torch.inference_mode():
        logits = model(inputs_embeds=state, use_cache=False).logits[0, :-1].float()
        return float(
            torch.nn.functional.cross_entropy(logits, torch.tensor(text[1:]).to(logits.device), reduction="sum")
        )
