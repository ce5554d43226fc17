"""What clients send over HTTP, in OpenAI's shapes; pydantic checks it."""

from __future__ import annotations

from dataclasses import replace
from typing import Annotated, Any, Literal

from pydantic import AfterValidator, BaseModel, BeforeValidator, ConfigDict, Discriminator, Field, Tag

from ..errors import InvalidRequest
from ..schema import Message, Sampling
from ..settings import Settings
from .wire import AUTO

DRAWN = (
    *("temperature", "top_p", "top_k", "min_p"),
    *("presence_penalty", "frequency_penalty", "repetition_penalty"),
)
"""Fields of a request that say how tokens are drawn, named like those of `Sampling`."""


class TextPart(BaseModel):
    """A piece of a message."""

    type: Literal["text"]
    text: str


def _joined(content: Any) -> Any:
    if not isinstance(content, list):
        return content
    texts = []
    for number, part in enumerate(content):
        kind = part.get("type") if isinstance(part, dict) else type(part).__name__
        if kind != "text" or not isinstance(part.get("text"), str):
            raise ValueError(f"part {number} is of the type {str(kind)[:40]!r}, only text is understood")
        texts.append(part["text"])
    return "".join(texts)


def _listed(stop: Any) -> Any:
    return [stop] if isinstance(stop, str) else stop or []


def _refused(value: Any) -> Any:
    if value and value != {"type": "text"}:
        raise ValueError("is not supported")
    return value


Text = Annotated[str, BeforeValidator(_joined, json_schema_input_type=str | list[TextPart])]
Unsupported = Annotated[Any, AfterValidator(_refused)]


class ChatMessage(BaseModel):
    """One turn. `developer` is read as `system`; there are no tools, so there is no `tool`."""

    role: Literal["system", "developer", "user", "assistant"]
    content: Text

    def message(self) -> Message:
        """The turn as the runtime takes it."""
        return Message("system" if self.role == "developer" else self.role, self.content)


class StreamOptions(BaseModel):
    """OpenAI's `stream_options`."""

    include_usage: bool | None = None


class Options(BaseModel):
    """What Collegium understands beyond OpenAI's fields; with the openai client, `extra_body={"collegium": {...}}`.

    `conversation_id` is not supported yet.
    """

    model_config = ConfigDict(extra="forbid")

    expert: str | None = Field(default=None, description="Who answers, instead of the router's choice.")
    domains: list[str] | None = Field(
        default=None, min_length=1, description="The only domains that the router weighs."
    )
    alpha: float | None = Field(
        default=None,
        ge=0,
        le=100,
        allow_inf_nan=False,
        description="How strongly an expert that steers another model does so; for other experts it changes nothing.",
    )
    retrieve: bool = Field(default=True, description="Whether the prompt is answered with the domain's documents.")


class ChatRequest(BaseModel):
    """OpenAI's chat completion request. Fields that are not named here are accepted and change nothing."""

    model: str = Field(default=AUTO, description="`auto`, an expert's name, or a version such as `law@3f2a91c07be4`.")
    messages: list[ChatMessage]
    stream: bool | None = False
    stream_options: StreamOptions | None = None
    max_tokens: int | None = Field(default=None, ge=1)
    max_completion_tokens: int | None = Field(default=None, ge=1)
    temperature: float | None = Field(default=None, ge=0, le=2, allow_inf_nan=False)
    top_p: float | None = Field(default=None, gt=0, le=1, allow_inf_nan=False)
    presence_penalty: float | None = Field(default=None, ge=-2, le=2, allow_inf_nan=False)
    frequency_penalty: float | None = Field(default=None, ge=-2, le=2, allow_inf_nan=False)
    # As vLLM has them: with the openai client, in `extra_body`.
    top_k: int | None = Field(default=None, ge=0, le=2**31 - 1)
    min_p: float | None = Field(default=None, ge=0, le=1, allow_inf_nan=False)
    repetition_penalty: float | None = Field(default=None, gt=0, le=2, allow_inf_nan=False)
    seed: int | None = Field(default=None, ge=-(2**63), le=2**63 - 1)
    stop: Annotated[list[str], BeforeValidator(_listed, json_schema_input_type=str | list[str] | None)] = []
    n: Literal[1] | None = 1
    # These change what an answer means, so they are not accepted in silence.
    tools: Unsupported = None
    functions: Unsupported = None
    response_format: Unsupported = None
    logprobs: Unsupported = None
    collegium: Options | None = None

    @property
    def options(self) -> Options:
        """The `collegium` field, or its defaults."""
        return self.collegium or Options()

    @property
    def prompt(self) -> list[Message]:
        """The conversation as the runtime takes it."""
        return [message.message() for message in self.messages]

    @property
    def expert(self) -> str | None:
        """Who was asked for by name; None leaves it to the router. Raises InvalidRequest where two were."""
        names = {name for name in (self.model, self.options.expert) if name not in (AUTO, None)}
        if len(names) > 1:
            raise InvalidRequest(
                f"model is {self.model!r}, collegium.expert is {self.options.expert!r}.", hint="Name one of them."
            )
        return next(iter(names), None)

    @property
    def include_usage(self) -> bool:
        """Whether a stream ends with a chunk that counts tokens."""
        return bool(self.stream_options and self.stream_options.include_usage)

    def sampling(self, settings: Settings) -> Sampling:
        """How tokens are drawn: what the request says, else what the settings say."""
        asked: dict[str, Any] = {name: getattr(self, name) for name in DRAWN}
        asked["max_tokens"] = self.max_completion_tokens or self.max_tokens
        said = {name: value for name, value in asked.items() if value is not None}
        return replace(settings.sampling, **said, stop=tuple(self.stop))


def _form(value: Any) -> str | None:
    if isinstance(value, list):
        return "messages" if any(isinstance(one, dict) for one in value) else "texts"
    return "text"


class RouteRequest(BaseModel):
    """What to decide on: a text, a list of texts (one decision each), or one conversation as a list of messages."""

    input: Annotated[
        Annotated[str, Tag("text")]
        | Annotated[list[str], Field(min_length=1, max_length=1000), Tag("texts")]
        | Annotated[list[ChatMessage], Tag("messages")],
        Discriminator(_form),
    ]

    @property
    def prompt(self) -> str | list[str] | list[Message]:
        """The input as the runtime takes it."""
        if isinstance(self.input, str):
            return self.input
        return [one if isinstance(one, str) else one.message() for one in self.input]  # type: ignore[return-value]
