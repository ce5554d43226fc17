"""The commands about routing: `router` fits and shows it, `decisions` shows and replays what it decided."""

from __future__ import annotations

import json
from datetime import UTC, datetime
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from .cli_shared import AsJson, load_settings, open_home, reporting

if TYPE_CHECKING:
    from .experts.home import Home
    from .router.artifact import RouterArtifact

router = typer.Typer(help="Fit, refit and show the router.", no_args_is_help=True)
decisions = typer.Typer(help="What the router decided: list, replay.", no_args_is_help=True)

Since = Annotated[datetime | None, typer.Option(help="Only from this moment on, in UTC.")]


@router.command("fit")
def fit_router(
    training: Annotated[Path, typer.Option("--train", help="JSON lines with text, domain and source.")],
    held_out: Annotated[Path, typer.Option("--dev", help="The same, from sources that the training file lacks.")],
    tune: Annotated[bool, typer.Option(help="Tune the encoder first, or take it as it is.")] = True,
    steps: Annotated[int, typer.Option(min=1, help="Steps of tuning.")] = 600,
    rank: Annotated[int, typer.Option(min=1, help="Rank of the encoder's adapter.")] = 32,
    learning_rate: Annotated[float, typer.Option(min=0, help="Of the adapter, at its highest.")] = 5e-4,
    backbone: Annotated[
        str | None,
        typer.Option(help="Another BERT-like encoder: hf:org/name, pypi:package==version/path, or a folder."),
    ] = None,
) -> None:
    """Fit the router anew and publish it. Domains that were added by hand have to be added again."""
    from .training.routing.fit_router import fit
    from .training.routing.tune_encoder import Tuning

    tuning = Tuning(steps=steps, rank=rank, learning_rate=learning_rate) if tune else None
    settings = load_settings()
    encoder = settings.encoder if backbone is None else _from_anywhere(backbone)
    with open_home(settings.model_copy(update={"encoder": encoder})) as home, reporting() as progress:
        release, accuracy = fit(home, training, held_out, progress, tuning)
    typer.echo(json.dumps(accuracy, indent=1))
    typer.echo(f"Release {release.id} is live.")
    if encoder != settings.encoder:
        typer.echo(f"Nothing can open its router until you set encoder = {json.dumps(encoder)} in collegium.toml.")
        if release.indexes:
            typer.echo(
                f"Then add the documents of {', '.join(sorted(release.indexes))} again: no index is searched else."
            )


def _from_anywhere(model: str) -> str:
    """A model's name that means the same in every folder. Raises InvalidRequest for what is no name."""
    from .models.names import parse_name

    parsed = parse_name(model)
    return parsed.location if parsed.source == "folder" else model


@router.command("refit")
def refit_router() -> None:
    """Fit the head anew on all stored prompts, those of added domains among them, and publish it."""
    from .training.routing.fit_router import refit

    with open_home() as home, reporting() as progress:
        progress("refitting the router", 0, 0)
        release = refit(home)
    typer.echo(f"The router's head was refitted: release {release.id}.")


@router.command("show")
def show(as_json: AsJson = False) -> None:
    """What the live router knows, from which prompts, and what was measured of it."""
    from .console_router import show_router

    with open_home() as home:
        version, artifact = load_router(home)
    show_router(artifact, version, as_json=as_json)


@decisions.command("list")
def list_decisions(
    last: Annotated[int, typer.Option(min=1, help="How many, at most.")] = 20,
    domain: Annotated[str | None, typer.Option(help="Only those of one domain.")] = None,
    since: Since = None,
    as_json: AsJson = False,
) -> None:
    """What was decided, newest first. With --json, one JSON object a line."""
    from .console_decisions import show_decisions
    from .experts.decisions import latest

    with open_home() as home:
        show_decisions(latest(home.registry, last, domain=domain, since=_utc(since)), as_json=as_json)


@decisions.command("replay")
def replay_decisions(
    router: Annotated[
        str | None, typer.Option(help="A release, or the beginning of a router's version; else the live router.")
    ] = None,
    last: Annotated[int, typer.Option(min=1, help="How many decisions, at most.")] = 1000,
    since: Since = None,
    as_json: AsJson = False,
) -> None:
    """Show what would have been decided by another router, or by the live one, on the embeddings in the log."""
    from .console_decisions import show_replay
    from .experts.decisions import latest
    from .router.replay import replay

    with open_home() as home:
        version, artifact = load_router(home, router)
        past = latest(home.registry, last, since=_utc(since))
    result = replay(past, artifact.encoder, lambda embeddings: artifact.scores(embeddings, version))
    show_replay(result, router=version, as_json=as_json)


def load_router(home: Home, name: str | None = None) -> tuple[str, RouterArtifact]:
    """The router that a release's id or the beginning of a version means, else the live one, after its short version.

    Raises InvalidRequest or ArtifactCorrupt.
    """
    from .router.artifact import RouterArtifact

    found = home.release().router if name is None else home.registry.router(name)
    return found[:12], RouterArtifact.load(home.artifacts.verify(found))


def _utc(moment: datetime | None) -> datetime | None:
    return moment and moment.replace(tzinfo=UTC)
