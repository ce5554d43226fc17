"""Tune a BERT-like encoder for routing: a LoRA adapter under which prompts of one domain lie together.

The loss is cross-entropy of a linear classifier on the normalised embedding, and beside it the supervised contrastive loss
(Khosla et al., *Supervised Contrastive Learning*, 2020; SetFit, Tunstall et al., 2022, tunes sentence encoders with pairs for
the same end):

    L = -log softmax(s (W x + b))_y + c * mean over p in P(i) of -log( exp(x_i x_p / t) / sum over j != i of exp(x_i x_j / t) )

The classifier is thrown away: the router fits its own head on the embeddings of the tuned encoder.
"""

from __future__ import annotations

import random
from collections import defaultdict
from collections.abc import Callable, Iterator, Sequence
from contextlib import nullcontext
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ...errors import InvalidRequest
from ...models.cache import CachedModel
from ...models.encoder import pools_cls
from ...models.windows import Windows
from ...router.build import LabelledPrompt
from ..recipes import Progress
from .augment import augment

if TYPE_CHECKING:
    from torch import Tensor

SCALE = 16.0
"""s: normalised embeddings are short, and a softmax over their products with weights would stay flat without it."""
TEMPERATURE = 0.1
"""t of the contrastive loss."""
WARM_UP, LAST = 0.1, 0.02
"""The learning rate rises over this share of the steps, then falls to this share of itself."""
REACH = 8
"""The windows of a long prompt lie within this many times `Tuning.tokens` from its beginning."""
CHUNKS = 4
"""Parts of a batch, by length, that go through the encoder one after the other, so that padding costs little."""


@dataclass(frozen=True, slots=True)
class Tuning:
    """How an encoder is tuned. `tokens` is the longest window of a prompt that it sees; longer ones are cut anywhere."""

    steps: int = 600
    batch: int = 64
    tokens: int = 64
    rank: int = 32
    learning_rate: float = 5e-4
    contrast: float = 0.3
    augmented: float = 0.9
    seed: int = 0


def tune_encoder(
    model: CachedModel, rows: Sequence[LabelledPrompt], folder: Path, tuning: Tuning, progress: Progress
) -> dict[str, Any]:
    """Write a PEFT folder trained on `rows`; returns the options and the mean loss of the last tenth of the steps.

    Every domain is drawn as often, and within it every source. Raises InvalidRequest where there are fewer than two labels:
    the background is one as well, so a single domain is told apart from it. Raises UnsupportedModel as `Windows` does.
    """
    import torch
    from peft import LoraConfig, get_peft_model
    from transformers import AutoModel

    labels = sorted({row.domain for row in rows})
    if len(labels) < 2:  # noqa: PLR2004
        raise InvalidRequest("An encoder is tuned to tell domains apart, and there is only one.")
    torch.manual_seed(tuning.seed)
    cut = Windows(model.folder, tuning.tokens)
    adapter = LoraConfig(r=tuning.rank, lora_alpha=2 * tuning.rank, target_modules="all-linear")
    encoder: Any = get_peft_model(AutoModel.from_pretrained(model.folder, dtype=torch.float32), adapter).train()
    classifier = torch.nn.Linear(encoder.config.hidden_size, len(labels))
    torch.nn.init.normal_(classifier.weight, std=0.05)
    learned = [parameter for parameter in encoder.parameters() if parameter.requires_grad]
    optimiser = torch.optim.AdamW(
        [{"params": learned, "lr": tuning.learning_rate}, {"params": classifier.parameters(), "lr": 3e-3}]
    )
    schedule = torch.optim.lr_scheduler.LambdaLR(optimiser, _schedule(tuning.steps))
    first_only = pools_cls(model.folder)
    losses = []
    rng = random.Random(tuning.seed)
    for step, batch in enumerate(_batches(rows, tuning, rng)):
        wanted = torch.tensor([labels.index(row.domain) for row, _ in batch])
        windows = [_window(cut, text, REACH * tuning.tokens, rng) for _, text in batch]
        vectors = _embed(encoder, windows, first_only=first_only)
        loss = torch.nn.functional.cross_entropy(SCALE * classifier(vectors), wanted)
        loss = loss + tuning.contrast * contrastive(vectors, wanted)
        optimiser.zero_grad()
        loss.backward()  # type: ignore[no-untyped-call]
        torch.nn.utils.clip_grad_norm_(learned, 1.0)
        optimiser.step()
        schedule.step()
        losses.append(loss.item())
        progress("tuning the encoder", step + 1, tuning.steps)
    encoder.save_pretrained(folder)
    last = losses[-max(1, len(losses) // 10) :]
    return {**asdict(tuning), "loss": round(sum(last) / len(last), 4)}


def contrastive(vectors: Tensor, labels: Tensor) -> Tensor:
    """The supervised contrastive loss of normalised `vectors` [n, d] under `labels` [n]; 0 where no label occurs twice."""
    import torch

    oneself = torch.eye(len(labels), dtype=torch.bool)
    alike = (labels[:, None] == labels[None]) & ~oneself
    chances = (vectors @ vectors.T / TEMPERATURE).masked_fill(oneself, -1e9).log_softmax(dim=1)
    paired = alike.any(dim=1)
    if not paired.any():
        return vectors.sum() * 0
    each = (chances * alike).sum(dim=1)[paired] / alike.sum(dim=1)[paired]
    return -each.mean()


def _batches(
    rows: Sequence[LabelledPrompt], tuning: Tuning, rng: random.Random
) -> Iterator[list[tuple[LabelledPrompt, str]]]:
    """Batches of rows with the text as it is sent this time: at most half as many labels as rows, so that each has a pair."""
    groups: dict[str, dict[str, list[LabelledPrompt]]] = defaultdict(lambda: defaultdict(list))
    for row in rows:
        groups[row.domain][row.source].append(row)
    deck: list[str] = []
    for _ in range(tuning.steps):
        at_once = min(len(groups), tuning.batch // 2)
        while len(deck) < at_once:
            deck += rng.sample(sorted(groups), len(groups))
        labels, deck = deck[:at_once], deck[at_once:]
        drawn = [rng.choice(list(groups[labels[i % at_once]].values())) for i in range(tuning.batch)]
        picked = [rng.choice(source) for source in drawn]
        yield [(row, augment(row.text, rng) if rng.random() < tuning.augmented else row.text) for row in picked]


def _window(cut: Windows, text: str, reach: int, rng: random.Random) -> list[int]:
    """Token ids of a window of the text: its beginning, or, of half of the long texts, any other place."""
    ids = cut.tokens(text)[:reach]
    start = rng.choice((0, rng.randrange(len(ids) - cut.room + 1))) if len(ids) > cut.room else 0
    return cut.framed(ids[start : start + cut.room])


def _embed(encoder: Any, windows: Sequence[Sequence[int]], *, first_only: bool) -> Tensor:
    """Normalised embeddings [n, d], in the order of the windows, pooled as `models/encoder.py` does."""
    import torch

    order = sorted(range(len(windows)), key=lambda i: len(windows[i]))
    size = -(-len(order) // CHUNKS)
    parts = [
        _embed_chunk(encoder, [windows[i] for i in order[at : at + size]], first_only)
        for at in range(0, len(order), size)
    ]
    place = torch.tensor(order).argsort()
    return torch.cat(parts)[place]


def _embed_chunk(encoder: Any, windows: Sequence[Sequence[int]], first_only: bool) -> Tensor:
    import torch

    longest = max(map(len, windows))
    padding = encoder.config.pad_token_id or 0
    ids = torch.tensor([[*window, *[padding] * (longest - len(window))] for window in windows])
    mask = (torch.arange(longest)[None] < torch.tensor([len(window) for window in windows])[:, None]).long()
    with _bfloat16():
        states = encoder(input_ids=ids, attention_mask=mask).last_hidden_state.float()
    kept = mask.unsqueeze(-1)
    pooled = states[:, 0] if first_only else (states * kept).sum(1) / kept.sum(1)
    return torch.nn.functional.normalize(pooled, dim=1)


def _bfloat16() -> Any:
    """Where the processor multiplies bfloat16 natively, that is twice as fast and the same in the end."""
    import torch

    from ...models.load import pick_dtype

    dtype = pick_dtype("auto", torch.device("cpu"))
    return torch.autocast("cpu", dtype) if dtype is torch.bfloat16 else nullcontext()


def _schedule(steps: int) -> Callable[[int], float]:
    rising = max(1, round(WARM_UP * steps))
    return lambda step: min(1.0, (step + 1) / rising) * max(LAST, 1 - step / steps)
