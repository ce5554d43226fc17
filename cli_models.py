"""The commands that make models of models: `shrink`."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Annotated

import typer

from .cli_shared import AsJson, load_settings, open_home, reporting

Text = Annotated[
    list[Path],
    typer.Option(help="What to learn from: JSON lines with prompt and answer, or .txt and .md files; repeatable."),
]


def shrink(
    text: Text,
    layers: Annotated[int, typer.Option(min=1, help="Layers to keep.")],
    model: Annotated[
        str | None,
        typer.Argument(help="Named as base_model, which must be it too where the result is used; by default that one."),
    ] = None,
    test: Annotated[list[Path] | None, typer.Option(help="Text to measure with; else some is held out.")] = None,
    limit: Annotated[int | None, typer.Option(min=1, help="Rows of each JSON lines file, at most.")] = None,
    steps: Annotated[int, typer.Option(min=1, help="Steps of distillation; one takes eight texts.")] = 600,
    rank: Annotated[int, typer.Option(min=1, help="Rank of the healing adapter.")] = 32,
    max_tokens: Annotated[int, typer.Option(min=2, help="Longest text; longer ones are cut.")] = 256,
    seed: Annotated[int, typer.Option(help="Of everything that is drawn.")] = 17,
    as_json: AsJson = False,
) -> None:
    """Make the small model of a pair: leave layers out and heal the cut with text. Run again, it goes on where it was."""
    from .training.proxies.distil import Distilling
    from .training.proxies.shrink import Shrinking
    from .training.proxies.shrink import shrink as make

    settings = load_settings()
    distilling = Distilling(steps=steps, rank=rank, max_tokens=max_tokens, seed=seed)
    plan = Shrinking(model or settings.base_model, layers, tuple(text), tuple(test or ()), limit, distilling)
    with open_home(settings) as home, reporting() as progress:
        name, measured = make(plan, home, progress)
    if as_json:
        typer.echo(json.dumps({"name": name, **measured}))
        return
    typer.echo(f"Kept the layers {', '.join(map(str, measured['layers']))}.")
    typer.echo(f"Learned from {measured['tokens']:,} tokens in {measured['seconds']:.0f} seconds.")
    typer.echo("Nats a token on held-out text:")
    typer.echo(f"  divergence from the whole model  {measured['cut_kl']:.2f} cut, {measured['healed_kl']:.2f} healed")
    whole, cut, healed = (measured[f"{which}_nll"] for which in ("base", "cut", "healed"))
    typer.echo(f"  negative log-likelihood          {cut:.2f} cut, {healed:.2f} healed, {whole:.2f} of the whole model")
    typer.echo(name)
