"""The command line. Heavy imports are inside the commands, so that `--help` answers at once."""

from __future__ import annotations

import os
import sys
import warnings
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from .cli_experts import experts
from .cli_jobs import jobs
from .cli_models import shrink
from .cli_recipes import recipes
from .cli_router import decisions, router
from .cli_shared import AsJson, given, load_settings, open_home, reporting
from .cli_training import proxy, train

if TYPE_CHECKING:
    from .models.fetch import Progress
    from .runtime import Collegium
    from .settings import Settings

app = typer.Typer(
    name="collegium",
    help="Many domain experts behind one endpoint: a router picks who answers each prompt.",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
)
releases = typer.Typer(help="List releases, go back to one, write one to a folder.", no_args_is_help=True)
app.add_typer(experts, name="experts")
app.add_typer(router, name="router")
app.add_typer(decisions, name="decisions")
app.add_typer(releases, name="releases")
app.add_typer(jobs, name="jobs")
app.add_typer(recipes, name="recipes")


def main() -> None:
    """Run a command; what goes wrong is a sentence on standard error and exit status 1."""
    from .errors import CollegiumError

    if not sys.warnoptions:  # what libraries tell developers of each other is not for the user of a command
        warnings.simplefilter("ignore")
    # Bars of our own tell what is loading; those of libraries would stand between them and the answer.
    os.environ.setdefault("TQDM_DISABLE", "1")
    try:
        app()
    except CollegiumError as error:
        sys.stderr.write(f"collegium: {error}\n")
        sys.exit(1)
    except BrokenPipeError:  # whoever read the output has seen enough
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        sys.exit(141)
    except KeyboardInterrupt:
        sys.stderr.write("\ncollegium: stopped\n")
        sys.exit(130)


def _version(wanted: bool) -> None:
    if wanted:
        from importlib.metadata import version

        typer.echo(f"collegium {version('collegium')}")
        raise typer.Exit


@app.callback()
def options(
    home: Annotated[Path | None, typer.Option(help="Folder for models, experts and the registry.")] = None,
    quiet: Annotated[bool, typer.Option("--quiet", "-q", help="No progress bars.")] = False,
    version: Annotated[bool, typer.Option("--version", callback=_version, is_eager=True, help="Show it.")] = False,
) -> None:
    """Settings that hold for every command; the environment (COLLEGIUM_HOME ...) and collegium.toml set them too."""
    given.update({"home": home}, quiet=quiet)


@app.command()
def chat(
    prompt: Annotated[str | None, typer.Argument(help="What to ask; without it, a conversation begins.")] = None,
    expert: Annotated[str | None, typer.Option(help="Who answers, instead of the router's choice.")] = None,
    max_tokens: Annotated[int | None, typer.Option(min=1, help="Longest answer, in tokens.")] = None,
    temperature: Annotated[float | None, typer.Option(min=0, max=2, help="0 is greedy.")] = None,
    go_on: Annotated[bool, typer.Option("--continue", help="Go on talking afterwards, on a terminal.")] = False,
    alpha: Annotated[
        float | None, typer.Option(min=0, help="How strongly an expert that steers another model does so.")
    ] = None,
    no_retrieval: Annotated[bool, typer.Option("--no-retrieval", help="Do not look anything up.")] = False,
    as_json: AsJson = False,
) -> None:
    """Ask the experts: a streamed answer, then who gave it and why."""
    from .console import converse, show_answer

    settings = load_settings(max_tokens=max_tokens, temperature=temperature)
    ask: dict[str, Any] = {"expert": expert, "retrieve": not no_retrieval, "alpha": alpha}
    with reporting() as progress:
        collegium = _open(settings, progress)
    with collegium:
        talking = sys.stdin.isatty() and not as_json and (prompt is None or go_on)
        if talking:
            converse(collegium, ask, first=prompt)
        else:
            text = _standard_input() if prompt is None else prompt
            show_answer(collegium.stream(text, **ask), as_json=as_json)


@app.command()
def route(
    prompts: Annotated[
        list[str] | None, typer.Argument(help="Prompts; without any, one a line on standard input.")
    ] = None,
    explain: Annotated[
        bool, typer.Option("--explain", help="Say why, with the stored prompts that lie nearest.")
    ] = False,
    as_json: AsJson = False,
) -> None:
    """Show who would answer, without asking. With --json, one JSON object a line."""
    from .console import show_decision
    from .console_router import show_explanation

    with reporting() as progress:
        collegium = _open(load_settings(), progress)
    with collegium:
        texts = prompts or [line for line in _standard_input().splitlines() if line.strip()]
        routed = zip(texts, collegium.route(list(texts)) if texts else [], strict=True)
        for text, decision in routed:
            if explain:
                show_explanation(collegium.explain(text), decision, prompt=text, as_json=as_json)
            else:
                show_decision(decision, prompt=text, as_json=as_json)


@app.command()
def serve(
    host: Annotated[str | None, typer.Option(help="Address to listen on.")] = None,
    port: Annotated[int | None, typer.Option(help="Port to listen on.")] = None,
) -> None:
    """Serve the OpenAI-compatible endpoint."""
    from .schema import Proxy, Remote
    from .service import run

    settings = load_settings(host=host, port=port)
    with open_home(settings) as home, reporting() as progress:  # the first time, show that models are being fetched
        cards = home.cards(home.release()).values()
        steered = [name for card in cards if isinstance(card.spec, Proxy | Remote) for name in card.spec.identities]
        for model in (settings.encoder, settings.base_model, *steered):
            home.models.get(model, progress)
    run(settings)


app.command()(train)
app.command()(proxy)
app.command()(shrink)


@releases.command("list")
def list_releases() -> None:
    """Every release, newest first; the live one is marked."""
    with open_home() as home:
        live = home.release().id
        for release in home.registry.releases():
            mark = "*" if release.id == live else " "
            typer.echo(f"{mark} {release.id:>4}  {release.created[:19]}  {release.note}")


@releases.command("rollback")
def rollback(release_id: int) -> None:
    """Make an earlier release live again."""
    with open_home() as home:
        home.registry.rollback(release_id)
    typer.echo(f"Release {release_id} is live.")


@releases.command("export")
def export(folder: Annotated[Path, typer.Argument(help="Folder to write; replaced if it exists.")]) -> None:
    """Write the live release with its cards and artifacts as a plain folder."""
    from .experts.bundle import export_release

    with open_home() as home:
        export_release(folder, home.registry, home.artifacts, home.release())
    typer.echo(f"Wrote {folder}.")


def _open(settings: Settings, progress: Progress) -> Collegium:
    from .runtime import Collegium

    return Collegium.open(settings, progress=progress)


def _standard_input() -> str:
    from .errors import InvalidRequest

    try:
        return sys.stdin.read()
    except UnicodeDecodeError as error:
        raise InvalidRequest(f"Standard input is not UTF-8 text: {error}.", hint="Convert it first.") from None
