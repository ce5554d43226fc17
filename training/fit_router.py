"""Fit the router anew and make it live."""

from __future__ import annotations

from pathlib import Path

from ..experts.home import Home, base_card
from ..models.encoder import Encoder
from ..router.build import build_router
from ..schema import Release
from .recipes import Progress
from .register import one_at_a_time, store_router


def fit(home: Home, training: Path, held_out: Path, progress: Progress) -> tuple[Release, dict[str, float]]:
    """Publish a router fitted on `training`; returns the release and its accuracy on the sources of `held_out`.

    In a home without a release it publishes the first one, with the base model as its only expert.
    """
    encoder = Encoder(home.models.get(home.settings.encoder, progress))
    base = base_card(home.models.get(home.settings.base_model, progress).identity)
    artifact = build_router(training, held_out, encoder, progress)
    version, note = store_router(home, artifact), f"fit the router on {training.name}"
    with one_at_a_time(home):
        release = home.registry.publish(cards=[base], aliases={"base": base.version}, router=version, note=note)
    return release, artifact.provenance["accuracy"]
