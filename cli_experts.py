"""The commands about experts that exist: what is live, what was, what changed, and how one comes in or goes out."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from .cli_shared import AsJson, open_home, reporting

experts = typer.Typer(
    help="List, compare, check, add, import, export, retire and remove experts; go back to earlier versions.",
    no_args_is_help=True,
)
Name = Annotated[str, typer.Argument(help="Name of the expert.")]


@experts.command("list")
def list_experts(as_json: AsJson = False) -> None:
    """Who is live, and what for."""
    from .console import show_cards

    with open_home() as home:
        show_cards(home.cards(home.release()), as_json=as_json)


@experts.command("show")
def show_expert(name: str, as_json: AsJson = False) -> None:
    """One expert's card: what it is and what was measured."""
    from .console import show_card

    with open_home() as home:
        show_card(home.registry.resolve(name, home.release()), as_json=as_json)


@experts.command("add")
def add_expert(
    name: Annotated[str, typer.Argument(help="Name of the domain and its expert.")],
    docs: Annotated[list[Path] | None, typer.Option(help="Documents or folders to answer from; repeatable.")] = None,
    description: Annotated[str, typer.Option(help="What the domain is about, in a sentence.")] = "",
    examples: Annotated[list[Path] | None, typer.Option(help="Prompts of the domain: JSON lines, or text.")] = None,
    adapter: Annotated[
        Path | None, typer.Option(help="A PEFT folder (LoRA) to answer with, unmeasured; `import` measures it.")
    ] = None,
    refit: Annotated[bool, typer.Option(help="Refit the router's head where the domain is new to it.")] = True,
) -> None:
    """Make a domain live at once: an index over its documents and a router class, on the base model or a given adapter."""
    from .training.domain import NewDomain, read_prompts
    from .training.register import register
    from .training.routing.fit_router import refit as refit_head

    prompts = read_prompts(examples or [])
    domain = NewDomain(name, description, tuple(docs or ()), prompts)
    with open_home() as home:
        before = home.release().router
        with reporting() as progress:
            card = register(home, domain, adapter=adapter, progress=progress, notes=_note)
        typer.echo(f"{card.version} is live.")
        if refit and home.release().router != before:  # the domain was new to the router
            with reporting() as progress:
                progress("refitting the router", 0, 0)
                release = refit_head(home)
            typer.echo(f"The router's head was refitted: release {release.id}.")


@experts.command("remove")
def remove_expert(name: Name) -> None:
    """Take an expert out of service with what came with it: its domain's documents, and the router class if you added it.

    Its prompts fit no domain then. To keep class and documents for its return, use `retire`. Earlier releases keep all of it.
    """
    from .training.register import unregister

    with open_home() as home:
        release = unregister(home, name)
    back = f"`collegium releases rollback {release.parent}` brings it back"
    typer.echo(f"{name} is no longer live (release {release.id}); {back}.")


@experts.command("retire")
def retire_expert(name: Name) -> None:
    """Take an expert out of service and keep all else: the router still knows its domain, and the fallback answers there.

    The domain's documents stay, too. `rollback` brings the expert back; `remove` takes domain and documents away with it.
    """
    from .training.versions import retire

    with open_home() as home:
        release = retire(home, name)
    typer.echo(f"{name} is retired (release {release.id}); `collegium experts rollback {name}` brings it back.")


@experts.command("rollback")
def rollback_expert(
    name: Name,
    version: Annotated[
        str, typer.Argument(help="Such as law@3f2a91; by default the version that was live before.")
    ] = "",
) -> None:
    """Make an earlier version of one expert live again; all others, the router and documents stay as they are.

    Without a version, done twice it is undone. `collegium releases rollback` takes everything back to an earlier release.
    """
    from .training.versions import rollback

    with open_home() as home:
        before = home.release().aliases.get(name)
        card, release = rollback(home, name, version)
    instead = f"instead of {before}" if before else "again"
    typer.echo(f"{card.version} is live {instead} (release {release.id}).")


@experts.command("verify")
def verify_experts(
    names: Annotated[list[str] | None, typer.Argument(help="Experts; without any, all that is live.")] = None,
    as_json: AsJson = False,
) -> None:
    """Check the live experts, indexes and router: hashes, tensors against the models, and answers against what was recorded.

    Exit status 1 and a sentence for each that is not what was registered.
    """
    from .console_experts import show_checked
    from .training.verify import verify

    with open_home() as home, reporting() as progress:
        checked = verify(home, names or [], progress)
    show_checked(checked, as_json=as_json)
    if wrong := [one for one in checked if one.problem]:
        for one in wrong:
            _note(f"{one.name}: {one.problem}")
        raise typer.Exit(1)


@experts.command("diff")
def diff_experts(
    one: Annotated[
        str, typer.Argument(metavar="A", help="An expert's name, which means its live version, or a version.")
    ],
    other: Annotated[
        str, typer.Argument(metavar="B", help="What to compare with it, in the same way; base is the base model.")
    ],
    as_json: AsJson = False,
) -> None:
    """What differs between two versions: cards, scores, and what their adapters add to each linear of the model."""
    from .console_experts import show_difference
    from .experts.differences import base_norms, difference

    with open_home() as home:
        release = home.release()
        cards = home.registry.resolve(one, release), home.registry.resolve(other, release)
        with reporting() as progress:
            base = home.models.get(home.settings.base_model, progress)
            found = difference(*cards, home.artifacts, base_norms(base))
    show_difference(found, as_json=as_json)


@experts.command("export")
def export_one(
    name: Name,
    folder: Annotated[Path, typer.Argument(help="Folder to write; an earlier export there is replaced.")],
    gguf: Annotated[bool, typer.Option("--gguf", help="Write the adapter for llama.cpp too.")] = False,
) -> None:
    """Write an expert's adapter as a PEFT folder with a model card, for other programs, for the hub, or to import it again."""
    from .experts.portable import check_exportable, export_expert

    with open_home() as home, reporting() as progress:
        card = home.registry.resolve(name, home.release())
        base = home.models.get(home.settings.base_model, progress)
        check_exportable(card, base)
        export_expert(card, folder, home.artifacts, base, gguf=gguf)
    typer.echo(f"Wrote {card.version} to {folder}.")


@experts.command("import")
def import_one(
    source: Annotated[str, typer.Argument(help="A PEFT folder (LoRA, safetensors), or hf:org/name.")],
    name: Annotated[str, typer.Option(help="Name of the expert.")],
    domain: Annotated[str, typer.Option(help="Domain that it answers for; by default its name.")] = "",
    test: Annotated[
        list[Path] | None, typer.Option(help="Rows to measure with, with prompt and answer; repeatable.")
    ] = None,
    test_limit: Annotated[int, typer.Option(min=1, help="Rows of each test file, at most.")] = 100,
    description: Annotated[str, typer.Option(help="What it knows, in a sentence.")] = "",
    licence: Annotated[str, typer.Option(help="Licence, for the card.")] = "",
    force: Annotated[
        bool, typer.Option("--force", help="Register it even if it is not better, or not measured.")
    ] = False,
) -> None:
    """Take in an adapter that was made elsewhere: check it, measure it as one trained here, register what is better."""
    from .console import show_card
    from .training.importing import Import, import_expert

    plan = Import(source, name, domain, tuple(test or ()), test_limit, description, licence, force)
    with open_home() as home, reporting() as progress:
        card = import_expert(plan, home, progress)
    show_card(card)
    typer.echo(f"{card.version} is live.")


def _note(sentence: str) -> None:
    typer.echo(sentence, err=True)
