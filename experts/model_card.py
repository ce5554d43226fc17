"""An expert's README as a hub of models reads it: YAML front matter, then what was measured and how it came to be."""

from __future__ import annotations

from collections.abc import Iterable, Sequence

from ..schema import Card, Score, card_to_dict

LICENCES = frozenset(
    {
        "apache-2.0",
        "mit",
        "cc0-1.0",
        "cc-by-4.0",
        "cc-by-sa-4.0",
        "cc-by-3.0",
        "cc-by-sa-3.0",
        "cc-by-nc-4.0",
        "openrail",
    }
) | {"bsd-2-clause", "bsd-3-clause", "gpl-3.0", "odc-by", "odbl", "unlicense", "llama2", "llama3", "gemma"}
"""Those that hubs know by these names and that cards are likely to have."""
ALIASES = {"cc0": "cc0-1.0", "apache-2": "apache-2.0", "cc-by": "cc-by-4.0"}


def model_card(card: Card, base: str, *, gguf: str | None) -> str:
    """The page of a LoRA expert on the model that hubs call `base`; `gguf` is the name of the file beside it, if there is one."""
    evidence = card.evidence
    sections = [
        f"---\n{_front_matter(card, base)}\n---\n\n# {card.name}",
        _text(evidence.description) or f"An expert for {card.domain or card.name}.",
        f"A LoRA adapter (`{card.version}`) for {base}, made and measured with Collegium.",
        "## What was measured",
        _scores(evidence.scores) if evidence.scores else "Nothing was measured.",
        _gate(card),
        "## How it was made",
        _table(("option", "value"), [(name, str(value)) for name, value in evidence.recipe.items()]),
        *(["Data, by SHA-256 of the files:", _data(card)] if evidence.data else []),
        *([f"System prompt: {_text(card.system)}"] if card.system else []),
        "## How to use it",
        _usage(card, base, gguf),
    ]
    return "\n\n".join(section for section in sections if section) + "\n"


def _front_matter(card: Card, base: str) -> str:
    from huggingface_hub import ModelCardData

    known = _licence(card.evidence.licence)
    return ModelCardData(
        base_model=base,
        license=known,
        license_name=card.evidence.licence if known == "other" else None,
        library_name="peft",
        pipeline_tag="text-generation",
        tags=list(dict.fromkeys(["lora", "collegium", *([card.domain] if card.domain else [])])),
        base_model_relation="adapter",
    ).to_yaml()


def _licence(text: str) -> str:
    """The hub's name of a licence: `other` for one that it does not know, `unknown` where nothing is said."""
    name = "-".join(text.lower().split())
    name = ALIASES.get(name, name)
    return name if name in LICENCES else "other" if name else "unknown"


def _scores(scores: Sequence[Score]) -> str:
    others = list(dict.fromkeys(who for score in scores for who in score.beside))
    rows = [
        (
            score.task,
            score.metric,
            f"{score.value:.3f}",
            f"{score.low:.3f} to {score.high:.3f}",
            f"{score.base:.3f}",
            *(f"{score.beside[who]:.3f}" if who in score.beside else "" for who in others),
            str(score.rows),
        )
        for score in scores
    ]
    table = _table(("task", "metric", "expert", "95 % interval", "base", *others, "rows"), rows)
    return f"{table}\n\nOf `nll` less is better, of the others more. `base` is the base model on the same rows."


def _gate(card: Card) -> str:
    forced = " It was registered all the same." if card.evidence.forced else ""
    return f"Gate: {_text(card.evidence.gate)}.{forced}" if card.evidence.gate else ""


def _data(card: Card) -> str:
    return _table(("file", "SHA-256"), [(name, f"`{sha256}`") for name, sha256 in card.evidence.data.items()])


def _usage(card: Card, base: str, gguf: str | None) -> str:
    python = (
        "```python\nfrom peft import PeftModel\nfrom transformers import AutoModelForCausalLM\n\n"
        f'model = PeftModel.from_pretrained(AutoModelForCausalLM.from_pretrained("{base}"), "this-folder")\n```'
    )
    again = f"With Collegium: `collegium experts import this-folder --name {card.name}"
    domain = f" --domain {card.domain}" if card.domain not in ("", card.name) else ""
    with_it = f"{again}{domain} --test rows.jsonl`, which measures it anew."
    cpp = f"With llama.cpp and a GGUF of the base model: `llama-cli -m base.gguf --lora {gguf}`." if gguf else ""
    trained = f"It was measured on the base model with the identity `{card_to_dict(card)['base']}`."
    return "\n\n".join(part for part in (python, with_it, cpp, trained) if part)


def _table(columns: Sequence[str], rows: Iterable[Sequence[str]]) -> str:
    found = list(rows)
    lines = [columns, ["---"] * len(columns), *found]
    return "\n".join(f"| {' | '.join(_cell(cell) for cell in line)} |" for line in lines) if found else ""


def _cell(text: str) -> str:
    return _text(text).replace("|", "\\|")


def _text(text: str) -> str:
    return " ".join(text.split())
