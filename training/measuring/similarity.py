"""How near an answer that was given is to the one that was wanted: in meaning, and letter by letter."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from difflib import SequenceMatcher

from ...retrieval import Encode

Similar = Callable[[Sequence[str], Sequence[str]], list[Mapping[str, float]]]
"""The answers that were given and, as many, those that were wanted -> the metrics of each pair."""


def sem_scores(answers: Sequence[str], references: Sequence[str], encode: Encode) -> list[float]:
    """The cosine of the embeddings of answer and reference, from -1 to 1; 0 for an answer without a word.

    *SemScore: Automated Evaluation of Instruction-Tuned LLMs based on Semantic Textual Similarity* takes the encoder
    all-mpnet-base-v2; here it is the home's own. Figures of different encoders do not compare.
    """
    if not answers:
        return []
    given, wanted = encode([answer or " " for answer in answers]), encode(list(references))
    cosines = (given * wanted).sum(axis=1)
    return [float(cosine) if answer.strip() else 0.0 for answer, cosine in zip(answers, cosines, strict=True)]


def gestalt(answer: str, reference: str) -> float:
    """2 M / T, with M the characters in common blocks and T those of both texts (Ratcliff and Obershelp, 1983); from 0 to 1.

    *JMedLoRA:Medical Domain Adaptation on Japanese Large Language Models using Instruction-tuning* scores answers so.
    """
    # Not autojunk: of a text of more than 200 characters it would leave out all letters that are frequent.
    return SequenceMatcher(None, answer, reference, autojunk=False).ratio()


def similar_by(encode: Encode) -> Similar:
    """Both measures, with this encoder."""

    def similar(answers: Sequence[str], references: Sequence[str]) -> list[Mapping[str, float]]:
        pairs = zip(answers, references, sem_scores(answers, references, encode), strict=True)
        return [{"semscore": meaning, "gestalt": gestalt(answer, wanted)} for answer, wanted, meaning in pairs]

    return similar
