"""A conversation stays with who answers it until it clearly turns elsewhere."""

from __future__ import annotations

from ...schema import Decision
from ..policy import Live, Policy, Scores


def sticky(decide: Policy, scores: Scores, live: Live, before: Decision | None) -> Decision:
    """What `decide` says, unless the conversation stays with the domain of the turn before.

    It leaves only where the new turn fits a known domain and the one before is not in its prediction set, that is, is no longer
    possible at the router's stated coverage. So a turn that fits nothing by itself ("And why?") stays, too. `before` is what this
    function said of the user's turn before, None for the first; fold it over the turns, with one `live`, and nothing need be
    remembered between requests.
    """
    now = decide(scores, live)
    if before is None or before.domain not in scores.probabilities:
        return now
    leaves = scores.known and before.domain not in scores.prediction_set
    if leaves or now.domain == before.domain:
        return now
    return scores.decide(before.domain, before.candidates, "sticky")
