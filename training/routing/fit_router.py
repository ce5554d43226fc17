"""Fit the router anew and make it live; refit its head on what a home has stored."""

from __future__ import annotations

import tempfile
from pathlib import Path

from ...experts.home import Home, base_card
from ...models.load import limit_threads
from ...router.artifact import RouterArtifact
from ...router.build import build_router, described, read_pair
from ...schema import Release
from ..domain import open_encoders, store_router
from ..recipes import Progress
from ..register import one_at_a_time
from .tune_encoder import Tuning, tune_encoder


def fit(
    home: Home, training: Path, held_out: Path, progress: Progress, tuning: Tuning | None = None
) -> tuple[Release, dict[str, float]]:
    """Publish a router fitted on `training`; returns the release and its accuracy on the sources of `held_out`.

    With `tuning` the encoder is tuned first; without, it is used as it is. In a home without a release it publishes the first
    one, with the base model as its only expert.
    """
    train, dev = read_pair(training, held_out)
    model = home.models.get(home.settings.encoder, progress)
    encoders = open_encoders(home, model)
    base = base_card(home.models.get(home.settings.base_model, progress).identity)
    provenance = described(training, held_out)
    with tempfile.TemporaryDirectory() as folder:
        adapter = None
        if tuning:
            limit_threads(home.settings.threads)
            adapter = Path(folder)
            provenance["tuning"] = tune_encoder(model, train, adapter, tuning, progress)
        artifact = build_router(train, dev, encoders, adapter, progress, provenance)
        version, note = store_router(home, artifact), f"fit the router on {training.name}"
    with one_at_a_time(home):
        release = home.registry.publish(cards=[base], aliases={"base": base.version}, router=version, note=note)
    return release, artifact.provenance["accuracy"]


def refit(home: Home) -> Release:
    """Publish the live router with its head fitted anew on all stored prompts.

    A domain that was added gets its own weights at once and leaves the others' as they were; this lets all of them settle.
    """
    with one_at_a_time(home):
        artifact = RouterArtifact.load(home.artifacts.verify(home.release().router))
        return home.registry.publish(router=store_router(home, artifact.refitted()), note="refit the router's head")
