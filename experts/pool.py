"""Models beside the base model: opened when an expert first needs them, and from then on in the same engine."""

from __future__ import annotations

import threading
from dataclasses import dataclass
from typing import TYPE_CHECKING

from ..errors import ArtifactCorrupt, UnsupportedModel
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


@dataclass(frozen=True, slots=True)
class LocalModel:
    """A model of the engine by its name there, and how conversations are put to it."""

    name: str
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
        self._opened = {BASE: LocalModel(BASE, ChatEncoder(tokenizer))}
        self._lock = threading.Lock()

    def open(self, name: str, identity: str = "") -> LocalModel:
        """The model that a card calls so: `base`, a model's name, or `artifact:` and the content hash of a shrunk one.

        Raises ArtifactCorrupt where it is not the one of `identity`, UnsupportedModel where it has another vocabulary than the
        base model, and what fetching and loading raise.
        """
        with self._lock:
            if name not in self._opened:
                self._opened[name] = self._load(name, identity)
            return self._opened[name]

    def cached(self, name: str, identity: str = "") -> CachedModel:
        """The folder of such a model, fetched or made where it is not there yet. Raises what `open` raises of that."""
        if name == BASE:
            return self._base
        if name.startswith(ARTIFACT):
            return open_shrunk(name.removeprefix(ARTIFACT), self._base, self._artifacts, self._cache)
        model = self._cache.get(name)
        if identity not in ("", model.identity):
            raise ArtifactCorrupt(
                f"{name} is {model.identity} here, and was {identity} where the expert was measured.",
                hint="Name the model that it was, or register the expert again.",
            )
        return model

    def _load(self, name: str, identity: str) -> LocalModel:
        from ..models.load import load_tokenizer
        from .engine.load import open_decoder

        model = self.cached(name, identity)
        tokenizer = load_tokenizer(model)
        check_vocabulary(name, tokenizer, self._tokenizer)
        self._engine.add(name, open_decoder(model, self._settings))
        return LocalModel(name, ChatEncoder(tokenizer))


def check_vocabulary(name: str, tokenizer: PreTrainedTokenizerFast, base: PreTrainedTokenizerFast) -> None:
    """Raises UnsupportedModel where two models would not mean the same by a token."""
    if tokenizer.get_vocab() != base.get_vocab() or tokenizer.eos_token_id != base.eos_token_id:
        raise UnsupportedModel(
            f"{name} has {len(tokenizer)} tokens of its own, the base model has {len(base)} others: "
            "what they expect next cannot be added up.",
            hint="Take models of one family; or serve the large one and reach it in the mode text, which exchanges words.",
        )
