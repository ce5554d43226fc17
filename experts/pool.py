"""Models beside the base model: opened when an expert first needs them, and from then on in the same engine."""

from __future__ import annotations

import threading
import time
from dataclasses import dataclass
from typing import TYPE_CHECKING

from ..errors import ArtifactCorrupt, CollegiumError, ModelUnavailable, UnsupportedModel
from ..models.cache import CachedModel, ModelCache
from ..models.chat import ChatEncoder
from ..schema import ARTIFACT
from ..settings import Settings
from .artifacts import ArtifactStore
from .engine.engine import Engine
from .engine.request import BASE
from .shrunk import open_shrunk

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerFast


AGAIN = 60.0
"""Seconds before a model that could not be had is tried again: each try may take as long, and keeps those who ask waiting."""


@dataclass(frozen=True, slots=True)
class LocalModel:
    """A model of the engine by its name there, what it is, and how conversations are put to it."""

    name: str
    identity: str
    chat: ChatEncoder


class ModelPool:
    """The models of one engine. Any thread may use it."""

    def __init__(
        self,
        engine: Engine,
        base: CachedModel,
        tokenizer: PreTrainedTokenizerFast,
        cache: ModelCache,
        artifacts: ArtifactStore,
        settings: Settings,
    ) -> None:
        self._engine, self._base, self._tokenizer = engine, base, tokenizer
        self._cache, self._artifacts, self._settings = cache, artifacts, settings
        self._opened = {BASE: LocalModel(BASE, base.identity, ChatEncoder(tokenizer))}
        self._missing: dict[str, tuple[float, ModelUnavailable]] = {}  # since when, and why
        self._lock = threading.Lock()

    def open(self, name: str, identity: str = "") -> LocalModel:
        """The model that a card calls so: `base`, a model's name, or `artifact:` and the content hash of a shrunk one.

        Raises ArtifactCorrupt where it is not the one of `identity`, UnsupportedModel where it has another vocabulary than the
        base model, and what fetching and loading raise.
        """
        if name not in self._opened:  # those that are open wait for no download
            with self._lock:
                if name not in self._opened:
                    self._opened[name] = self._try(name, identity)
        _check_identity(name, self._opened[name].identity, identity)
        return self._opened[name]

    def cached(self, name: str, identity: str = "") -> CachedModel:
        """The folder of such a model, fetched or made where it is not there yet. Raises what `open` raises of that."""
        if name == BASE:
            return self._base
        if name.startswith(ARTIFACT):
            return open_shrunk(name.removeprefix(ARTIFACT), self._base, self._artifacts, self._cache)
        model = self._cache.get(name)
        _check_identity(name, model.identity, identity)
        return model

    def _try(self, name: str, identity: str) -> LocalModel:
        since, why = self._missing.get(name, (0.0, None))
        if why and time.monotonic() < since + AGAIN:
            raise type(why)(why.message, hint=why.hint)
        try:
            return self._load(name, identity)
        except ModelUnavailable as error:
            self._missing[name] = time.monotonic(), error
            raise

    def _load(self, name: str, identity: str) -> LocalModel:
        from ..models.load import load_tokenizer
        from .engine.load import open_decoder

        model = self.cached(name, identity)
        tokenizer = load_tokenizer(model)
        check_vocabulary(name, tokenizer, self._tokenizer)
        decoder = open_decoder(model, self._settings)
        try:
            self._engine.add(name, decoder)
        except CollegiumError:  # it was closed meanwhile
            decoder.close()
            raise
        return LocalModel(name, model.identity, ChatEncoder(tokenizer))


def _check_identity(name: str, found: str, measured: str) -> None:
    if measured not in ("", found):
        raise ArtifactCorrupt(
            f"{name} is {found} here, and was {measured} where the expert was measured.",
            hint="Name the model that it was, or register the expert again.",
        )


def check_vocabulary(name: str, tokenizer: PreTrainedTokenizerFast, base: PreTrainedTokenizerFast) -> None:
    """Raises UnsupportedModel where two models would not mean the same by a token."""
    if tokenizer.get_vocab() != base.get_vocab() or tokenizer.eos_token_id != base.eos_token_id:
        raise UnsupportedModel(
            f"{name} has {len(tokenizer)} tokens of its own, the base model has {len(base)} others: "
            "what they expect next cannot be added up.",
            hint="Take models of one family; or serve the large one and reach it in the mode text, which exchanges words.",
        )
