"""The sheet of benchmarks/router.py: what was measured as Markdown, JSON and pictures."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from router_peers_child import FEW, STEPS

HEAD = """# What the router was measured at

Written by `benchmarks/router.py`; [router.md](../router.md) says what the numbers mean and how the router works.

All accuracies on held-out sources are development figures: the router learned from none of their prompts, but the number of
steps, the augmentation, the neighbours' vote and the views of the open set were compared on them, and temperature, prediction
sets and threshold are set on them. So expect less of prompts of other authors.
"""
FITS = """The shipped encoder was tuned for 600 steps. What was fitted anew for this sheet are other routers: each tuned row of
"What each step gave" and each router without a domain took 100 steps, CLINC150 and BANKING77 1,000{share}.
"""
PEERS = f"""Accuracy on the held-out sources. `random` and `tfidf` have no encoder; the others begin with the same published one
as Collegium's router does. They learned in this benchmark from at most 300 prompts of each source, this project's own among them
but not its prompts of no domain; SetFit from {FEW} of these a domain, for {STEPS} steps, so this is what it reaches in that time
and not what it can reach. Collegium is the shipped router, which was fitted before: its encoder was tuned on all rows, and its
head on 150 of each source with balanced weights, prompts of no domain among them. `semantic-router sum-20` is the best of five
settings, chosen on these same prompts; the router's own steps were compared on them, too.
"""
ROWS = {"setfit": f"setfit ({FEW} a domain, {STEPS} steps)"}
"""What a peer's row says beside its name."""
SUMMARY = {
    "dev_mean": "accuracy, mean over held-out sources (a development figure)",
    "ece": "expected calibration error, calibrated on the other half of each source",
    "ece_unseen_source": "expected calibration error, calibrated on the other sources",
    "brier": "Brier score over all domains, calibrated on the other half of each source",
    "set_coverage": "prompts whose right domain is in the prediction set (stated: 95 %), calibrated likewise",
    "set_size": "domains in a prediction set, mean, calibrated likewise",
    "refused_as_unknown": "held-out prompts refused as unknown (stated: 5 %, set on these prompts)",
    "lodo_auroc": "AUROC of known against unknown, each domain left out in turn, mean",
    "lodo_recall_at_5": "unknown prompts refused, at 5 % false rejects",
    "clinc_in": "CLINC150, accuracy over 150 intents",
    "clinc_in_after_rejection": "CLINC150, the same where a refused prompt is an error",
    "clinc_oos_val_recall": "CLINC150, out-of-scope prompts refused (oos_val)",
    "banking77": "BANKING77, accuracy over 77 intents",
    "int8_drop": "accuracy that float32 embeddings of the prompts gain on the router whose stored prompts are int8 embeddings: "
    "a mismatch, not a float32 router's accuracy",
    "typo_drop": "accuracy lost to two typos in every prompt, of the kind that training used",
    "p50_ms_short": "ms for a prompt of 15 tokens, median",
    "p95_ms_short": "the same, 95th percentile",
    "p50_ms_mistyped": "ms for such a prompt with two words mistyped, which is read twice, median",
    "p50_ms_500": "ms for a prompt of 500 tokens, median",
    "ms_in_a_batch": "ms a prompt, 200 prompts of 15 tokens in one call",
    "p50_ms_repeated": "ms for a prompt that was asked before",
    "speedup_vs_st": "times faster than sentence-transformers encodes the short prompt: int8 with routing "
    "against float32 encoding alone",
    "add_domain_s": "seconds to add a domain from 200 examples",
    "add_domain_accuracy": "accuracy on an added domain's held-out source, mean",
    "add_domain_cost": "what that costs the other domains, mean",
    "described_accuracy": "the same from one sentence of description",
    "described_cost": "what that costs the others",
}


def write_sheet(figures: Mapping[str, Any], folder: Path) -> None:
    """Write figures.json, README.md and the pictures into `folder`. What was not measured is left out."""
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "figures.json").write_text(json.dumps(figures, indent=1) + "\n", "utf-8")
    parts = [HEAD, *_made(figures), _summary(figures)]
    if "reliability" in figures:
        _reliability(figures["reliability"], folder / "reliability.svg")
        parts.append("## Calibration\n\n![Reliability](reliability.svg)\n")
    if figures.get("peers") and (ours := _live(figures)):
        others = {ROWS.get(name, name): one for name, one in figures["peers"].items()}
        _bars(
            {"Collegium": ours["mean"], **{name: one["mean"] for name, one in others.items() if "mean" in one}}, folder
        )
        parts.append(f"## Beside other routers\n\n{PEERS}")
        parts.append("![Mean accuracy](peers.svg)\n\n" + _table({"**Collegium**": ours, **others}, list(ours)))
    if "steps" in figures:
        steps = _steps(figures)
        parts.append(
            "## What each step gave\n\n" + _table(steps, list(dict.fromkeys(n for one in steps.values() for n in one)))
        )
    if figures.get("lodo"):
        parts.append("## Each domain unknown in turn\n\n" + _unknown(figures["lodo"]))
    (folder / "README.md").write_text("\n".join(parts), "utf-8")


def _made(figures: Mapping[str, Any]) -> list[str]:
    """On what, by which commands, and for how many steps."""
    out = []
    if "cores" in figures:
        out.append(f"The machine had {figures['cores']} cores.\n")
    sections: dict[str, list[str]] = {}
    for section, command in sorted(figures.get("command", {}).items()):
        sections.setdefault(command, []).append(section)
    if sections:
        out.append("\n".join(f"- {', '.join(names)}: `{command}`" for command, names in sections.items()) + "\n")
    if figures.keys() & {"lodo", "steps", "clinc_in", "banking77"}:
        share = figures.get("share", 1)
        out.append(FITS.format(share="" if share == 1 else f", all of them times {share}"))
    return out


def _summary(figures: Mapping[str, Any]) -> str:
    lines = ["| | figure | |", "|---|---|---|"]
    lines += [
        f"| `{name}` | {_short(figures[name])} | {meaning} |" for name, meaning in SUMMARY.items() if name in figures
    ]
    return "\n".join(lines) + "\n"


def _live(figures: Mapping[str, Any]) -> dict[str, float]:
    """The live router by held-out source, and the mean; empty where it was not measured."""
    return {**figures["dev"], "mean": figures["dev_mean"]} if {"dev", "dev_mean"} <= figures.keys() else {}


def _steps(figures: Mapping[str, Any]) -> dict[str, Mapping[str, float]]:
    """The steps that were fitted for it, and the live router."""
    return {**figures["steps"], **({"the live router": _live(figures)} if _live(figures) else {})}


def _table(rows: Mapping[str, Mapping[str, float]], columns: Sequence[str]) -> str:
    lines = [f"| | {' | '.join(columns)} |", "|---" * (len(columns) + 1) + "|"]
    lines += [f"| {name} | {' | '.join(_short(row.get(column)) for column in columns)} |" for name, row in rows.items()]
    return "\n".join(lines) + "\n"


def _unknown(lodo: Mapping[str, Any]) -> str:
    heading = "| unknown | AUROC | refused at 5 % | added: accuracy | cost to others | described: accuracy | cost |"
    lines = [heading, "|---" * 7 + "|"]
    for domain, one in sorted(lodo.items()):
        learned = [
            one.get(how, {}).get(what) for how in ("added", "described") for what in ("accuracy", "cost_to_others")
        ]
        found = (one.get("auroc"), one.get("recall_at_5"), *learned)
        lines.append(f"| {domain} | {' | '.join(_short(value) for value in found)} |")
    return "\n".join(lines) + "\n"


def _short(value: float | None) -> str:
    if value is None:
        return ""
    return f"{value:.3f}" if abs(value) < 10 else f"{value:.1f}"


def _reliability(bins: Sequence[Mapping[str, float]], path: Path) -> None:
    axes, save = _figure(path, 4.2, 4.2)
    axes.plot([0, 1], [0, 1], color="#999", linewidth=1)
    sizes = [20 + 600 * one["share"] for one in bins]
    axes.scatter([one["confidence"] for one in bins], [one["accuracy"] for one in bins], s=sizes, alpha=0.7)
    axes.set(xlabel="probability of the likeliest domain", ylabel="share that is right", xlim=(0, 1.03), ylim=(0, 1.03))
    axes.set_title("The larger a dot, the more prompts", fontsize=9)
    save()


def _bars(means: Mapping[str, float], folder: Path) -> None:
    axes, save = _figure(folder / "peers.svg", 6.4, 0.5 + 0.35 * len(means))
    names = sorted(means, key=lambda name: means[name])
    bars = axes.barh(
        names, [means[name] for name in names], color=["#1f77b4" if n == "Collegium" else "#bbb" for n in names]
    )
    axes.bar_label(bars, fmt="%.3f", padding=3, fontsize=8)
    axes.set(xlim=(0, 1.08), xlabel="accuracy, mean over held-out sources")
    save()


def _figure(path: Path, width: float, height: float) -> Any:
    import matplotlib as mpl

    mpl.use("svg")
    mpl.rcParams["svg.hashsalt"] = "collegium"  # the same figures give the same file
    from matplotlib import pyplot

    figure, axes = pyplot.subplots(figsize=(width, height), layout="constrained")
    for side in ("top", "right"):
        axes.spines[side].set_visible(False)

    def save() -> None:
        figure.savefig(path, metadata={"Date": None})
        pyplot.close(figure)

    return axes, save
