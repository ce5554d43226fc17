"""The commands that make experts of examples: `train`, and `proxy` for a model which may not be changed."""

from __future__ import annotations

from enum import StrEnum
from pathlib import Path
from typing import Annotated

import typer

from .cli_jobs import finish, watch_job
from .cli_shared import open_home, parse_options

EXAMPLES = "Rows with prompt and answer: .jsonl, .jsonl.gz, .csv or .parquet (docs/examples.md); repeatable."
Files = Annotated[list[Path], typer.Option(help=EXAMPLES)]
Test = Annotated[list[Path] | None, typer.Option(help="Rows to measure with; else a tenth is held out.")]
General = Annotated[list[Path] | None, typer.Option(help="General chat to mix in, same form.")]
Recipe = Annotated[
    str, typer.Option(help="How to train: `collegium recipes list` lists them; by default what fits the data.")
]
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
    examples: Annotated[list[Path] | None, typer.Option(help=EXAMPLES)] = None,
    docs: Annotated[list[Path] | None, typer.Option(help="Documents or folders to answer from; repeatable.")] = None,
    domain: Annotated[str, typer.Option(help="Domain that it answers for; by default its name.")] = "",
    description: Description = "",
    test: Test = None,
    general: General = None,
    questions: Annotated[
        list[Path] | None, typer.Option(help="Prompts of the domain for the router: JSON lines, or text.")
    ] = None,
    recipe: Recipe = "",
    option: Options = None,
    limit: Limit = None,
    test_limit: TestLimit = 100,
    mine: Annotated[int, typer.Option(min=0, help="Question-answer pairs made of the documents, at most.")] = 200,
    licence: Licence = "",
    keep_suspects: Annotated[
        bool, typer.Option("--keep-suspects", help="Train on rows that look planted too.")
    ] = False,
    force: Force = False,
    detach: Annotated[bool, typer.Option("--detach", help="Do not wait: the job goes on by itself.")] = False,
) -> None:
    """Train an expert from examples or documents, measure it, and register it if it is better; the service goes on meanwhile."""
    from .console_training import show_outcome
    from .training.jobs.worker import submit
    from .training.pipeline import check
    from .training.plan import Plan

    plan = Plan(
        name=name,
        examples=tuple(examples or ()),
        test=tuple(test or ()),
        general=tuple(general or ()),
        domain=domain,
        description=description,
        recipe=recipe,
        options=parse_options(option or []),
        licence=licence,
        limit=limit,
        test_limit=test_limit,
        docs=tuple(docs or ()),
        questions=tuple(questions or ()),
        mine=mine,
        keep_suspects=keep_suspects,
        force=force,
    )
    with open_home() as home:
        check(plan, home)
        job = submit(home, "train", name, plan.to_dict())
        if detach:
            typer.echo(f"The job {job.id} is queued; `collegium jobs follow {job.id}` watches it.")
            return
        job = watch_job(home, job)
        show_outcome(job, home)
    finish(job)


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
    recipe: Recipe = "",
    option: Options = None,
    limit: Limit = None,
    test_limit: TestLimit = 100,
    licence: Licence = "",
    force: Force = False,
) -> None:
    """Steer a model that stays as it is with a small tuned one, measure both and all together, and register what is better."""
    from .console_training import show_outcome
    from .training.jobs.worker import submit
    from .training.plan import Plan
    from .training.proxies.proxy import ProxyPlan, Server, check

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
        force=force,
    )
    with open_home() as home:
        plan = ProxyPlan(training, small or home.settings.small_model, large, adapter, direct, method, server)
        check(plan, home)
        job = watch_job(home, submit(home, "proxy", name, plan.to_dict()))
        show_outcome(job, home)
    finish(job)
