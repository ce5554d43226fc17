"""Whether an expert is as sure as it is right."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING

import numpy as np
import numpy.typing as npt

from ...schema import Score

if TYPE_CHECKING:
    from .evaluate import Results

Doubles = npt.NDArray[np.float64]

CLOSED = "closed_answers"
"""The pseudo-task of calibration: all rows with choices together."""
BINS = 10
SAMPLES = 1000


def chances(means: Sequence[float]) -> Doubles:
    """What a model gives each choice: the softmax of the choices' mean log-probabilities a token."""
    scores = np.exp(np.asarray(means, np.float64) - max(means))
    shares: Doubles = scores / scores.sum()
    return shares


def brier(shares: Doubles, truth: Sequence[bool]) -> float:
    """The squared distance between the shares and the truth: 1 for the right choice, 0 for the others (Brier, 1950)."""
    return float(((shares - np.asarray(truth, np.float64)) ** 2).sum())


def calibration_error(confidence: Sequence[float] | Doubles, correct: Sequence[float] | Doubles) -> float:
    """ECE: sum over the bins of |bin| / n * |mean confidence - accuracy|, in `BINS` bins of as many answers each.

    Bins of equal width are mostly empty where a model is sure of everything (Nguyen and O'Connor, 2015). With few answers the
    error is overrated, for everybody alike: it is there to be compared.
    """
    sure, right = np.asarray(confidence, np.float64)[None], np.asarray(correct, np.float64)[None]
    return float(_errors(sure, right)[0])


def calibration_scores(results: Mapping[str, Results]) -> list[Score]:
    """For the card: ECE and Brier score of "candidate", "base" and perhaps "live"; none where no row has choices."""
    answers = {who: _closed(one) for who, one in results.items()}
    rows = answers["candidate"].shape[1]
    if not rows:
        return []
    drawn = np.random.default_rng(0).integers(0, rows, (SAMPLES, rows))
    sure, right, distance = answers["candidate"]
    samples = {"ece": _errors(sure[drawn], right[drawn]), "brier": distance[drawn].mean(axis=1)}
    means = {
        who: {"ece": calibration_error(one[0], one[1]), "brier": float(one[2].mean())} for who, one in answers.items()
    }

    def score(metric: str) -> Score:
        low, high = (round(float(one), 4) for one in np.quantile(samples[metric], (0.025, 0.975)))
        value, base, *live = (round(means[who][metric], 4) for who in ("candidate", "base", "live") if who in means)
        return Score(CLOSED, metric, value, low, high, base, rows, {"live": live[0]} if live else {})

    return [score("brier"), score("ece")]


def _closed(results: Results) -> Doubles:
    """[3, n] of all rows with choices: how sure the answerer was, whether it was right, and the Brier score."""
    tasks = sorted(task for task, metric in results if metric == "confidence")
    metrics = ("confidence", "accuracy", "brier")
    return np.array([[value for task in tasks for value in results[task, metric]] for metric in metrics], np.float64)


def _errors(sure: Doubles, right: Doubles) -> Doubles:
    """Of each row of [samples, n]."""
    order = np.argsort(sure, axis=1, kind="stable")
    gaps = np.take_along_axis(sure - right, order, 1)
    bins = np.array_split(gaps, min(BINS, gaps.shape[1]), axis=1)
    errors: Doubles = np.sum([abs(one.sum(axis=1)) for one in bins], axis=0) / gaps.shape[1]
    return errors
