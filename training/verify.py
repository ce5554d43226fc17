"""Whether what is live is what was registered: files, tensors, and what they compute."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING

from ..errors import ArtifactCorrupt, CollegiumError
from ..experts.engine.canary import check_canary
from ..experts.engine.load import open_decoder
from ..experts.engine.lora import LoraWeights, read_lora
from ..experts.engine.request import BASE
from ..experts.home import Home
from ..experts.shrunk import open_shrunk
from ..models.cache import CachedModel
from ..models.encoder import Encoder, encoder_identity
from ..retrieval import Index
from ..router.artifact import RouterArtifact
from ..schema import ARTIFACT, Card, Lora, Proxy, Remote
from .watch import Progress

if TYPE_CHECKING:
    from ..experts.engine.batch import Decoder

PROBED = 4
"""Passages of an index that are embedded again."""
ALIKE = 0.99
"""Cosine of a stored vector and the passage's embedding here from which they are the same."""
UNIT = 1e-3
"""How far from 1 the length of a stored vector may be."""
SMALL = {"kv_cache_mb": 64, "adapter_slots": 1, "max_rows": 1}  # settings of a model that computes canaries alone


@dataclass(frozen=True, slots=True)
class Check:
    """One thing that was checked: `card`, `files`, `tensors` or `canary`. `problem` says what is wrong, if anything is."""

    what: str
    problem: str = ""


@dataclass(frozen=True, slots=True)
class Checked:
    """An expert's version, an index or the router, and what was checked of it, up to the first that is wrong."""

    name: str
    kind: str
    checks: tuple[Check, ...]

    @property
    def problem(self) -> str:
        """What is wrong with it, empty where nothing is."""
        return next((check.problem for check in self.checks if check.problem), "")


Step = tuple[str, Callable[[], object]]


def verify(home: Home, names: Sequence[str], progress: Progress) -> tuple[Checked, ...]:
    """Check these experts and their domains' indexes; without names all that is live, and the router.

    An expert's canary is computed again in float32 where the setting precision is auto, else in that precision, and held against
    its card as a server does when it loads the expert. Raises UnknownExpert, and what loading the models raises.
    """
    release = home.release()
    cards = {name: home.registry.resolve(name, release) for name in names or sorted(release.aliases)}
    domains = sorted({card.domain for card in cards.values()} & set(release.indexes) if names else release.indexes)
    base = home.models.get(home.settings.base_model, progress)
    found: list[Checked] = []
    with _Models(home, base) as models:
        subjects = len(cards) + len(domains)
        for name, card in sorted(cards.items(), key=lambda one: (_small(one[1]), one[0])):  # a model is loaded once
            progress("verifying", len(found), subjects)
            version = release.aliases.get(name, card.version)
            found.append(Checked(version, card.spec.kind, _tried(_expert(home, version, card, models))))
        encoder = home.models.get(home.settings.encoder, progress)
        for domain in domains:
            progress("verifying", len(found), subjects)
            index = f"{domain}/{release.indexes[domain][:12]}"
            found.append(Checked(index, "index", _tried(_index(home, release.indexes[domain], encoder))))
        if not names:
            found.append(Checked(release.router[:12], "router", _tried(_router(home, release.router, encoder))))
    return tuple(found)


def _tried(steps: Iterator[Step]) -> tuple[Check, ...]:
    """After the first that fails the others are left out: they rest on it."""
    checks: list[Check] = []
    for what, step in steps:
        try:
            step()
        except CollegiumError as error:
            return (*checks, Check(what, str(error)))
        checks.append(Check(what))
    return tuple(checks)


def _expert(home: Home, version: str, card: Card, models: _Models) -> Iterator[Step]:
    yield "card", partial(_card, version, card, models.base.identity)
    if card.spec.artifacts:
        yield "files", partial(_each, home.artifacts.verify, card.spec.artifacts)
    if isinstance(card.spec, Lora | Proxy | Remote):
        adapter = card.spec.adapter
        yield "tensors", partial(_tensors, home.artifacts.path(adapter), adapter, models, card)
        if card.evidence.canary:
            yield "canary", partial(_canary, home.artifacts.path(adapter), adapter, models, card)


def _each(check: Callable[[str], object], versions: Sequence[str]) -> None:
    for version in versions:
        check(version)


def _card(version: str, card: Card, base: str) -> None:
    if card.version != version:  # it is the hash of what stands on the card
        raise ArtifactCorrupt(
            f"The card of {version} was changed: what stands on it is {card.version}.",
            hint="Roll back to another version, or register it again.",
        )
    if card.base != base:
        raise ArtifactCorrupt(
            f"{card.version} was measured on the base model {card.base}, this is {base}.",
            hint="Train it again on this base, or set base_model back.",
        )


def _tensors(folder: Path, version: str, models: _Models, card: Card) -> LoraWeights:
    from ..experts.engine.shape import read_shape

    weights = read_lora(folder, version[:12])  # every number is finite, every A has its B
    weights.check(read_shape(models.cached(card).folder))
    return weights


def _canary(folder: Path, version: str, models: _Models, card: Card) -> None:
    assert card.evidence.canary
    decoder = models.decoder(card)
    decoder.load(1, read_lora(folder, version[:12]))
    check_canary(card.evidence.canary, decoder, 1, version)


def _index(home: Home, version: str, model: CachedModel) -> Iterator[Step]:
    yield "files", partial(home.artifacts.verify, version)
    yield "tensors", partial(_vectors, home.artifacts.path(version), version, model)
    yield "canary", partial(_passages, home.artifacts.path(version), version, model)


def _vectors(folder: Path, version: str, model: CachedModel) -> None:
    import numpy as np

    index = Index.load(folder, version)
    if index.encoder_id != encoder_identity(model, None):
        raise ArtifactCorrupt(
            f"The index {version[:12]} was made with the encoder {index.encoder_id}.", hint="Add its documents again."
        )
    lengths = np.linalg.norm(index.flat.reconstruct_n(0, len(index)), axis=1)
    if not (np.abs(lengths - 1) <= UNIT).all():
        raise ArtifactCorrupt(f"The index {version[:12]} has vectors that are none.", hint="Add its documents again.")


def _passages(folder: Path, version: str, model: CachedModel) -> None:
    import numpy as np

    index = Index.load(folder, version)
    places = np.unique(np.linspace(0, len(index) - 1, PROBED).astype(int))
    again = Encoder(model).encode([index.passages[at].text for at in places])
    stored = np.stack([index.flat.reconstruct(int(at)) for at in places])
    least = float((again * stored).sum(axis=1).min())
    if not least >= ALIKE:
        raise ArtifactCorrupt(
            f"A vector of the index {version[:12]} has a cosine of {least:.2f} to its own passage.",
            hint="Add its documents again.",
        )


def _router(home: Home, version: str, model: CachedModel) -> Iterator[Step]:
    yield "files", partial(home.artifacts.verify, version)
    yield "tensors", partial(_head, home.artifacts.path(version), version, model)


def _head(folder: Path, version: str, model: CachedModel) -> None:
    import numpy as np

    artifact = RouterArtifact.load(folder)
    if artifact.encoder != (here := encoder_identity(model, artifact.adapter)):
        raise ArtifactCorrupt(
            f"The router was fitted on the encoder {artifact.encoder}, this is {here}.",
            hint="Set `encoder` back, or fit the router again.",
        )
    if artifact.rows.embeddings.shape[1] != artifact.head.weights.shape[1]:
        raise ArtifactCorrupt(f"Rows and weights of the router {version[:12]} do not fit.", hint="Fit it again.")
    for name, numbers in (("weights", artifact.head.weights), ("rows", artifact.rows.embeddings)):
        if not np.isfinite(numbers).all():
            raise ArtifactCorrupt(f"The {name} of the router {version[:12]} are not finite.", hint="Fit it again.")


def _small(card: Card) -> str:
    """The model whose adapter it is."""
    return card.spec.small if isinstance(card.spec, Proxy | Remote) else BASE


@dataclass(slots=True)
class _Models:
    """The models that adapters are held against; one decoder is in memory at a time."""

    home: Home
    base: CachedModel
    _open: tuple[str, Decoder] | None = None
    _stack: ExitStack = field(default_factory=ExitStack)

    def __enter__(self) -> _Models:
        return self

    def __exit__(self, *exc: object) -> None:
        self._stack.close()

    def cached(self, card: Card) -> CachedModel:
        """The model of the card's adapter. Raises ArtifactCorrupt where it is another one than was measured."""
        name = _small(card)
        if name == BASE:
            return self.base
        if name.startswith(ARTIFACT):
            return open_shrunk(name.removeprefix(ARTIFACT), self.base, self.home.artifacts, self.home.models)
        assert isinstance(card.spec, Proxy | Remote)
        model = self.home.models.get(name)
        if card.spec.identities.get(name, model.identity) != model.identity:
            raise ArtifactCorrupt(f"{name} is {model.identity} here, and was {card.spec.identities[name]}.")
        return model

    def decoder(self, card: Card) -> Decoder:
        """The model in memory, with one slot for an adapter."""
        name, settings = _small(card), self.home.settings
        precision = "float32" if settings.precision == "auto" else settings.precision
        if self._open is None or self._open[0] != name:
            self._stack.close()
            decoder = open_decoder(self.cached(card), settings.model_copy(update=SMALL | {"precision": precision}))
            self._stack.callback(decoder.close)
            self._open = name, decoder
        return self._open[1]
