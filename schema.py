"""The values that parts hand to each other. Frozen, plain, and free of behaviour that needs a model."""

from __future__ import annotations

import dataclasses
import hashlib
import json
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, Literal

Role = Literal["system", "user", "assistant"]
Reason = Literal["routed", "unknown_domain", "no_expert", "explicit", "sticky", "cheaper", "degraded"]
FinishReason = Literal["stop", "length", "cancelled", "error"]


@dataclass(frozen=True, slots=True)
class Message:
    """One turn of a conversation."""

    role: Role
    content: str


@dataclass(frozen=True, slots=True)
class Decision:
    """Who should answer, and why.

    `probabilities` are calibrated and sum to 1 over the domains that the router knows; `confidence` is the open-set score
    that was compared with `threshold`; `prediction_set` names the smallest set of domains that reaches the router's
    stated coverage. `candidates` are (expert name, weight), best first, weights summing to 1.
    """

    domain: str | None
    candidates: tuple[tuple[str, float], ...]
    probabilities: Mapping[str, float]
    prediction_set: tuple[str, ...]
    confidence: float
    reason: Reason
    threshold: float
    router_version: str

    @property
    def expert(self) -> str:
        """The name of the first candidate."""
        return self.candidates[0][0]


@dataclass(frozen=True, slots=True)
class Passage:
    """A quoted piece of a document: `text == document_text[span[0]:span[1]]`, in characters."""

    text: str
    document: str
    span: tuple[int, int]
    page: int | None
    score: float
    index_version: str


@dataclass(frozen=True, slots=True)
class Context:
    """What retrieval found for one prompt, and how many tokens it takes in the prompt."""

    passages: tuple[Passage, ...] = ()
    demonstrations: tuple[tuple[str, str], ...] = ()
    tokens: int = 0


@dataclass(frozen=True, slots=True)
class Sampling:
    """How tokens are drawn. Temperature 0 is greedy; `top_k` 0, `top_p` 1 and `min_p` 0 switch those filters off.

    `repetition_penalty` weighs what the prompt or the answer holds, `presence_penalty` and `frequency_penalty` what the
    answer does. `logprobs` n asks for the log-probability of each token and of the n likeliest; None asks for none. The
    answer does not end before `min_tokens`.
    """

    max_tokens: int = 256
    temperature: float = 0.0
    top_p: float = 1.0
    top_k: int = 0
    repetition_penalty: float = 1.0
    stop: tuple[str, ...] = ()
    min_p: float = 0.0
    presence_penalty: float = 0.0
    frequency_penalty: float = 0.0
    logprobs: int | None = None
    min_tokens: int = 0


@dataclass(frozen=True, slots=True)
class ExpertRequest:
    """One answer asked of one expert; `deadline` is in `time.monotonic()` seconds."""

    messages: tuple[Message, ...]
    expert: str
    context: Context = Context()
    sampling: Sampling = Sampling()
    seed: int | None = None
    alpha: float | None = None
    deadline: float | None = None
    request_id: str = ""


@dataclass(frozen=True, slots=True)
class Delta:
    """A piece of an answer. The last one of a stream carries `finish_reason`.

    `top_logprobs` are, for each of `token_ids`, the likeliest (id, log-probability), best first.
    """

    text: str
    token_ids: tuple[int, ...] = ()
    logprobs: tuple[float, ...] | None = None
    finish_reason: FinishReason | None = None
    top_logprobs: tuple[tuple[tuple[int, float], ...], ...] | None = None


@dataclass(frozen=True, slots=True)
class Usage:
    """Tokens read and written."""

    prompt_tokens: int = 0
    completion_tokens: int = 0


@dataclass(frozen=True, slots=True)
class Paid:
    """What an answer cost at a remote server: requests sent, tokens that they carried and brought back.

    Of `drafted` tokens, which were sent to be verified, `accepted` became part of the answer.
    """

    calls: int = 0
    prompt_tokens: int = 0
    completion_tokens: int = 0
    drafted: int = 0
    accepted: int = 0


@dataclass(frozen=True, slots=True)
class Reply:
    """A whole answer: who gave it, why, from what, and how long each step took (`timings`, seconds).

    `mode` is how it was given in the end; `paid` what a remote server was asked for it, None where none was.
    """

    text: str
    decision: Decision
    citations: tuple[Passage, ...]
    expert_version: str
    mode: str
    usage: Usage
    timings: Mapping[str, float]
    finish_reason: FinishReason
    paid: Paid | None = None


ARTIFACT = "artifact:"
"""What the name of a model begins with that lies in the artifact store; its content hash follows."""


@dataclass(frozen=True, slots=True)
class Base:
    """The base model as it is."""

    kind: Literal["base"] = "base"

    @property
    def artifacts(self) -> tuple[str, ...]:
        """The content hashes of what it needs: nothing."""
        return ()


@dataclass(frozen=True, slots=True)
class Lora:
    """The base model with a LoRA adapter: `adapter` is the content hash of a PEFT folder in the artifact store."""

    adapter: str
    rank: int
    kind: Literal["lora"] = "lora"

    @property
    def artifacts(self) -> tuple[str, ...]:
        """The content hashes of what it needs."""
        return (self.adapter,)


@dataclass(frozen=True, slots=True)
class Combination:
    """How what a small expert has learned changes what a large model says. docs/proxy.md has the formulas.

    `alpha` is the strength of `proxy` and `contrastive`, and the small expert's share in `mixture`; `comblm` mixes the small
    expert with a large model that is steered so first, and with the plain one where it is 0. Over the first `fade` tokens of an
    answer it goes in a straight line to `alpha_end`. `weights` are those that `comblm` was fitted with.
    """

    method: Literal["proxy", "mixture", "comblm", "contrastive"] = "proxy"
    alpha: float = 1.0
    alpha_end: float | None = None
    fade: int = 0
    weights: tuple[float, ...] = ()


@dataclass(frozen=True, slots=True)
class Proxy:
    """A large model of this process that stays as it is, steered by a small one with an adapter.

    `large` and `small` are `base`, the name of a model, or `artifact:` and the content hash of a shrunk model; `identities` are
    those of the models that are neither. `adapter` is the content hash of a PEFT folder for the small one.
    """

    adapter: str
    rank: int
    large: str = "base"
    small: str = "base"
    identities: Mapping[str, str] = field(default_factory=dict)
    combination: Combination = Combination()
    kind: Literal["proxy"] = "proxy"

    @property
    def artifacts(self) -> tuple[str, ...]:
        """The content hashes of what it needs."""
        return (self.adapter, *_hashes(self.large, self.small))


@dataclass(frozen=True, slots=True)
class Remote:
    """A model behind an OpenAI-compatible server at `url`, steered by a small one of this process with an adapter.

    `key_env` names the environment variable that holds the server's key. `small`, `identities` and `adapter` are as in `Proxy`.
    With the mode `text` only words are exchanged: the small expert writes what it knows into the prompt, beside the nearest of
    the `demonstrations`, the content hash of a folder of them. `auto` uses log-probabilities where the server gives them.
    """

    url: str
    model: str
    adapter: str
    rank: int
    key_env: str = ""
    small: str = "base"
    identities: Mapping[str, str] = field(default_factory=dict)
    combination: Combination = Combination()
    mode: Literal["auto", "text"] = "auto"
    demonstrations: str = ""
    kind: Literal["remote"] = "remote"

    @property
    def artifacts(self) -> tuple[str, ...]:
        """The content hashes of what it needs."""
        return (self.adapter, *_hashes(self.small), *([self.demonstrations] if self.demonstrations else []))


@dataclass(frozen=True, slots=True)
class Plugin:
    """A kind that a plug-in answers for: its own `options`, and the content hashes of the artifacts that it needs."""

    kind: str
    options: Mapping[str, Any] = field(default_factory=dict)
    artifacts: tuple[str, ...] = ()


Spec = Base | Lora | Proxy | Remote | Plugin


@dataclass(frozen=True, slots=True)
class Score:
    """One measured number: `value` and its 95 % interval, on `rows` rows, beside what the base model reached on them.

    `beside` has what others reached on the same rows: of a proxied expert the small expert alone, say.
    """

    task: str
    metric: str
    value: float
    low: float
    high: float
    base: float
    rows: int
    beside: Mapping[str, float] = field(default_factory=dict)


@dataclass(frozen=True, slots=True)
class Canary:
    """A probe: log-probabilities after each of `tokens`, by the reference implementation in float32.

    `ids` names as many tokens for each of them, one after the other; `logprobs` are the expert's, `base` the base model's.
    """

    tokens: tuple[int, ...]
    ids: tuple[int, ...]
    logprobs: tuple[float, ...]
    base: tuple[float, ...]


@dataclass(frozen=True, slots=True)
class Evidence:
    """What is known about an expert beyond what it is. It may grow without changing the expert's version.

    `capabilities` are those that its server was found to have.
    """

    description: str = ""
    scores: tuple[Score, ...] = ()
    gate: str = ""
    forced: bool = False
    recipe: Mapping[str, Any] = field(default_factory=dict)
    data: Mapping[str, str] = field(default_factory=dict)
    licence: str = ""
    created: str = ""
    canary: Canary | None = None
    capabilities: Mapping[str, Any] = field(default_factory=dict)


@dataclass(frozen=True, slots=True)
class Card:
    """An expert: what it is (`name`, `domain`, `spec`, `base`, `system`) and what was measured (`evidence`).

    `base` is the identity of the base model; `system` is its system prompt, None for the base model's own.
    """

    name: str
    domain: str
    spec: Spec
    base: str
    system: str | None = None
    evidence: Evidence = Evidence()

    @property
    def version(self) -> str:
        """`name@` and the first 12 hex digits of the hash of everything that decides how the expert answers."""
        identity = {k: v for k, v in card_to_dict(self).items() if k != "evidence"}
        return f"{self.name}@{digest(identity)[:12]}"


@dataclass(frozen=True, slots=True)
class Release:
    """One immutable state of the whole: which version each name means, which router and which indexes serve."""

    id: int
    aliases: Mapping[str, str]
    router: str
    indexes: Mapping[str, str]
    parent: int | None = None
    note: str = ""
    created: str = ""


Standing = Literal["queued", "running", "done", "refused", "failed", "cancelled"]


@dataclass(frozen=True, slots=True)
class JobState:
    """A long piece of work, and where it stands. `plan` is what its kind of work is told; `name` is the expert's.

    `step` of `of` steps of the `stage` are done, 0 of 0 where nobody counts; `eta` is the seconds that the stage still takes.
    `error` says why it is refused, failed or cancelled, and what to do. `attempts` counts the processes that began on it since
    it was queued, `worker` is the one at work, `cancel` says that its end was asked for. Dates are ISO 8601 in UTC.
    """

    id: str
    kind: str
    name: str
    plan: Mapping[str, Any] = field(default_factory=dict)
    state: Standing = "queued"
    stage: str = ""
    step: int = 0
    of: int = 0
    loss: float | None = None
    eta: float | None = None
    error: str | None = None
    report: Mapping[str, Any] = field(default_factory=dict)
    attempts: int = 0
    cancel: bool = False
    worker: int | None = None
    created: str = ""
    started: str | None = None
    ended: str | None = None

    @property
    def over(self) -> bool:
        """Whether nothing more happens to it by itself."""
        return self.state not in ("queued", "running")


def _hashes(*models: str) -> list[str]:
    return [model.removeprefix(ARTIFACT) for model in models if model.startswith(ARTIFACT)]


def digest(value: Any) -> str:
    """SHA-256 of the canonical JSON of `value`."""
    return hashlib.sha256(json.dumps(value, sort_keys=True, separators=(",", ":")).encode()).hexdigest()


def card_to_dict(card: Card) -> dict[str, Any]:
    """The card as JSON-ready values; `card_from_dict` reads it back."""
    return dataclasses.asdict(card)


def card_from_dict(data: Mapping[str, Any]) -> Card:
    """Read a card; raises KeyError or TypeError where a field is missing or unknown."""
    spec = dict(data["spec"])
    evidence = dict(data.get("evidence") or {})
    evidence["scores"] = tuple(Score(**score) for score in evidence.get("scores", ()))
    if canary := evidence.get("canary"):
        evidence["canary"] = Canary(**{name: tuple(values) for name, values in canary.items()})
    return Card(**{**data, "spec": _spec(spec), "evidence": Evidence(**evidence)})


def _spec(data: dict[str, Any]) -> Spec:
    if data["kind"] == "base":
        return Base()
    if data["kind"] == "lora":
        return Lora(**data)
    if data["kind"] in ("proxy", "remote"):
        combination = dict(data["combination"])
        combination["weights"] = tuple(combination["weights"])
        steered = {**data, "combination": Combination(**combination)}
        return Proxy(**steered) if data["kind"] == "proxy" else Remote(**steered)
    return Plugin(**{**data, "artifacts": tuple(data.get("artifacts", ()))})
