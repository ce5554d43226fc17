"""The commands that make experts of examples: `train`, and `proxy` for a model which may not be changed."""

from __future__ import annotations

from enum import StrEnum
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from .cli_shared import open_home, parse_options, reporting

if TYPE_CHECKING:
    from .schema import Card

Files = Annotated[list[Path], typer.Option(help="JSON lines with prompt and answer (.jsonl, .jsonl.gz); repeatable.")]
Test = Annotated[list[Path] | None, typer.Option(help="Rows to measure with; else a tenth is held out.")]
General = Annotated[list[Path] | None, typer.Option(help="General chat to mix in, same form.")]
Recipe = Annotated[str, typer.Option(help="How to train.")]
Options = Annotated[list[str] | None, typer.Option(help="A recipe's option as NAME=VALUE; repeatable.")]
Limit = Annotated[int | None, typer.Option(min=1, help="Rows of each examples file, at most.")]
TestLimit = Annotated[int, typer.Option(min=1, help="Rows of each test file, at most.")]
Description = Annotated[str, typer.Option(help="What it knows, in a sentence.")]
Licence = Annotated[str, typer.Option(help="Licence of the data, for the card.")]
Force = Annotated[bool, typer.Option("--force", help="Register it even if it is not better.")]


class Mode(StrEnum):
    """How a server is reached."""

    auto = "auto"
    text = "text"


def train(
    name: Annotated[str, typer.Argument(help="Name of the expert.")],
    examples: Files,
    domain: Annotated[str, typer.Option(help="Domain that it answers for; by default its name.")] = "",
    description: Description = "",
    test: Test = None,
    general: General = None,
    recipe: Recipe = "lora-sft",
    option: Options = None,
    limit: Limit = None,
    test_limit: TestLimit = 100,
    licence: Licence = "",
    force: Force = False,
) -> None:
    """Train an expert, measure it against the base model, and register it if it is better."""
    from .console import show_card
    from .training.pipeline import Plan, train_expert

    plan = Plan(
        name=name,
        examples=tuple(examples),
        test=tuple(test or ()),
        general=tuple(general or ()),
        domain=domain or name,
        description=description,
        recipe=recipe,
        options=parse_options(option or []),
        licence=licence,
        limit=limit,
        test_limit=test_limit,
    )
    with open_home() as home, reporting() as progress:
        card, verdict = train_expert(plan, home, force=force, progress=progress)
    show_card(card)
    typer.echo(f"{card.version} is live. It is {verdict}.")


def proxy(
    name: Annotated[str, typer.Argument(help="Name of the expert.")],
    examples: Files,
    test: Test = None,
    general: General = None,
    large: Annotated[str, typer.Option(help="The model that is steered: base, or a model's name.")] = "base",
    remote: Annotated[
        str | None, typer.Option(help="Address of a server (OpenAI's API) that has the large model.")
    ] = None,
    remote_model: Annotated[str, typer.Option(help="What the server calls it.")] = "",
    key_env: Annotated[str, typer.Option(help="Environment variable with the server's key.")] = "",
    mode: Annotated[Mode, typer.Option(help="auto takes log-probabilities where the server gives them.")] = Mode.auto,
    small: Annotated[str | None, typer.Option(help="The small model; by default the setting small_model.")] = None,
    adapter: Annotated[
        Path | None,
        typer.Option(help="A PEFT folder for the small model, which has not seen the examples; else it is trained."),
    ] = None,
    direct: Annotated[
        Path | None, typer.Option(help="A PEFT folder for the large model to compare with; else the domain's live one.")
    ] = None,
    method: Annotated[
        str, typer.Option(help="How they are combined: best of those fitted, proxy, mixture, comblm or contrastive.")
    ] = "best",
    domain: Annotated[str, typer.Option(help="Domain that it answers for; without it, it is asked for by name.")] = "",
    description: Description = "",
    recipe: Recipe = "lora-sft",
    option: Options = None,
    limit: Limit = None,
    test_limit: TestLimit = 100,
    licence: Licence = "",
    force: Force = False,
) -> None:
    """Steer a model that stays as it is with a small tuned one, measure both and all together, and register what is better."""
    from .console import show_card
    from .training.pipeline import Plan
    from .training.proxy import ProxyPlan, Server, proxy_expert

    if bool(remote) != bool(remote_model):
        raise typer.BadParameter("--remote and --remote-model go together.")
    if not remote and (key_env or mode is Mode.text):
        raise typer.BadParameter("--key-env and --mode text are for a server: name it with --remote.")
    server = Server(remote, remote_model, key_env, mode.value) if remote else None
    training = Plan(
        name=name,
        examples=tuple(examples),
        test=tuple(test or ()),
        general=tuple(general or ()),
        domain=domain,
        description=description,
        recipe=recipe,
        options=parse_options(option or []),
        licence=licence,
        limit=limit,
        test_limit=test_limit,
    )
    shown: list[Card] = []
    with open_home() as home:
        plan = ProxyPlan(training, small or home.settings.small_model, large, adapter, direct, method, server)
        try:
            with reporting() as progress:
                card, verdicts = proxy_expert(plan, home, force=force, progress=progress, measured=shown.append)
        finally:  # what was measured is shown of one that is refused too
            for measured in shown:
                show_card(measured)
    typer.echo(f"{card.version} is live. It is {verdicts}.")
