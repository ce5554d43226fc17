"""Questions with good answers, the nearest of which are shown to a black box.

In-context examples in place of tuning: IKE (Zheng et al. 2023, "Can We Edit Factual Knowledge by In-Context Learning?"), URIAL
(Lin et al. 2023, "The Unlocking Spell on Base LLMs"). Near is by the cosine of TF-IDF weights of words.
"""

from __future__ import annotations

import json
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Self

from ...errors import ArtifactCorrupt

FILE = "demonstrations.jsonl"


@dataclass(frozen=True, slots=True)
class Demonstrations:
    """`rows` are (prompt, answer); `weights` and `matrix` are scikit-learn's."""

    rows: Sequence[tuple[str, str]]
    weights: Any
    matrix: Any

    @classmethod
    def load(cls, folder: Path) -> Self:
        """Read what `store` wrote. Raises ArtifactCorrupt."""
        from sklearn.feature_extraction.text import TfidfVectorizer

        try:
            lines = (folder / FILE).read_text("utf-8").splitlines()
            rows = [(str(row["prompt"]), str(row["answer"])) for row in map(json.loads, lines)]
            weights = TfidfVectorizer(sublinear_tf=True)
            return cls(rows, weights, weights.fit_transform([prompt for prompt, _ in rows]))
        except (OSError, ValueError, LookupError, TypeError) as error:
            raise ArtifactCorrupt(
                f"{folder} holds no demonstrations: {error}.", hint="Register the expert again."
            ) from None

    def nearest(self, text: str, count: int) -> list[tuple[str, str]]:
        """At most `count` rows that share words with `text`, the nearest last: what stands nearest to a question weighs most."""
        from sklearn.metrics.pairwise import linear_kernel

        near = linear_kernel(self.weights.transform([text]), self.matrix)[0]
        best = near.argsort(kind="stable")[-count:] if count else []
        return [self.rows[at] for at in best if near[at] > 0]


def store(rows: Iterable[tuple[str, str]], folder: Path) -> None:
    """Write rows of (prompt, answer) into a folder, for the artifact store."""
    lines = [json.dumps({"prompt": prompt, "answer": answer}, ensure_ascii=False) for prompt, answer in rows]
    (folder / FILE).write_text("".join(f"{line}\n" for line in lines), "utf-8")
