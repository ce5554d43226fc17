"""Whether an adapter does here what it did where it was measured.

A card carries what the reference implementation made of a probe prompt, with the adapter and without. The first time that a
process loads the adapter both are computed again: a file that was damaged before it was hashed, an option of LoRA that was
misread or a model that is not the one it names would answer nonsense fluently.
"""

from __future__ import annotations

import numpy as np

from ...errors import ArtifactCorrupt
from ...schema import Canary
from .batch import PAGE, Batch, Decoder, Floats
from .combine import log_sum_exp

CANARY_PAGES = 4
"""Pages of the cache that are kept for it, the last ones."""
MOST_TOKENS = CANARY_PAGES * PAGE
NOISE = {"float32": 0.02, "bfloat16": 0.3, "int8": 0.6}
"""Mean absolute difference of the base model's log-probabilities that each precision may show."""
SHARE = {"float32": 0.005, "bfloat16": 0.08, "int8": 0.1}
"""With an adapter, the difference may be greater by this share of what the adapter changes."""
ROUNDING = 0.001


def check_canary(canary: Canary, decoder: Decoder, slot: int, version: str) -> None:
    """Raises ArtifactCorrupt where the adapter in `slot`, or the base model, does not behave as the adapter's card says."""
    _check_form(canary, decoder.shape.vocab, version)
    expected, base = np.array(canary.logprobs, np.float32), np.array(canary.base, np.float32)
    noise = _difference(_logprobs(canary, decoder, 0), base)
    if not noise <= NOISE[decoder.precision]:
        raise ArtifactCorrupt(
            f"The base model is off by {noise:.2f} from what it was where the adapter {version[:12]} was measured.",
            hint="Take the model that it was trained on, or another precision.",
        )
    allowed = noise + SHARE[decoder.precision] * _difference(expected, base) + ROUNDING
    off = _difference(_logprobs(canary, decoder, slot), expected)
    if not off <= allowed:
        raise ArtifactCorrupt(
            f"The adapter {version[:12]} is off by {off:.2f} from what its card says of it; {allowed:.2f} may be.",
            hint="It does not answer here as it was measured: register it again from its source.",
        )


def _check_form(canary: Canary, vocab: int, version: str) -> None:
    """What is not checked here would be read beside the model's memory."""
    each = len(canary.ids) // max(len(canary.tokens), 1)
    fits = 0 < len(canary.tokens) <= MOST_TOKENS and each > 0
    fits &= {len(canary.ids), len(canary.logprobs), len(canary.base)} == {each * len(canary.tokens)}
    if not (fits and all(0 <= token < vocab for token in (*canary.tokens, *canary.ids))):
        raise ArtifactCorrupt(
            f"The canary of the adapter {version[:12]} does not fit the model.",
            hint="Register it again from its source.",
        )


def _logprobs(canary: Canary, decoder: Decoder, slot: int) -> Floats:
    """Of the canary's ids, with the adapter in `slot`."""
    count = len(canary.tokens)
    logits = decoder.forward(
        Batch(
            tokens=np.array(canary.tokens, np.int32),
            positions=np.arange(count, dtype=np.int32),
            sequence=np.zeros(count, np.int32),
            pages=np.arange(decoder.pages - CANARY_PAGES, decoder.pages, dtype=np.int32)[None],
            slots=np.array([slot], np.int32),
            wanted=np.arange(count, dtype=np.int32),
        )
    )
    ids = np.array(canary.ids).reshape(count, -1)
    found: Floats = np.concatenate([row[one] - log_sum_exp(row) for row, one in zip(logits, ids, strict=True)])
    return found


def _difference(one: Floats, other: Floats) -> float:
    return float(np.abs(one - other).mean())
