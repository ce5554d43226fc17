"""The tensors of a checkpoint folder by name. Nothing is read before it is asked for."""

from __future__ import annotations

import json
from contextlib import ExitStack
from pathlib import Path
from typing import TYPE_CHECKING, Any, Self

from ...errors import UnsupportedModel

if TYPE_CHECKING:
    import torch

SINGLE, INDEX = "model.safetensors", "model.safetensors.index.json"
ATTENTION = ("q_proj", "k_proj", "v_proj", "o_proj")
EMBEDDING, HEAD = "model.embed_tokens.weight", "lm_head.weight"


class Weights:
    """`weights["model.layers.0.mlp.up_proj.weight"]`: a view of the file on disk, in the file's own type.

    Views stay valid after `close`. Raises UnsupportedModel where the folder holds no safetensors checkpoint.
    """

    def __init__(self, folder: Path) -> None:
        from safetensors import SafetensorError, safe_open

        self._folder = folder
        self._stack = ExitStack()
        self._files: dict[str, Any] = {}
        for name in _files(folder):
            try:
                file: Any = self._stack.enter_context(safe_open(folder / name, "pt"))
            except (OSError, SafetensorError) as error:
                self.close()
                raise UnsupportedModel(
                    f"{folder / name} cannot be read: {error}.", hint="Fetch the model again."
                ) from None
            self._files |= dict.fromkeys(file.keys(), file)

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *error: object) -> None:
        self.close()

    def close(self) -> None:
        """Close the files."""
        self._stack.close()

    def __contains__(self, name: str) -> bool:
        return name in self._files

    def __getitem__(self, name: str) -> torch.Tensor:
        """Raises UnsupportedModel where there is none."""
        if name not in self._files:
            raise UnsupportedModel(f"{self._folder} has no tensor {name}.", hint="The folder must hold a whole model.")
        tensor: torch.Tensor = self._files[name].get_tensor(name)
        return tensor

    def linear(self, layer: int, *names: str) -> tuple[torch.Tensor, torch.Tensor | None]:
        """[out, in] of linears of a layer ("q_proj", ...) on top of each other, and their bias [out] where one has any."""
        import torch

        part = "self_attn" if names[0] in ATTENTION else "mlp"
        paths = [f"model.layers.{layer}.{part}.{name}" for name in names]
        weights = [self[f"{path}.weight"] for path in paths]
        if not any(f"{path}.bias" in self for path in paths):
            return torch.cat(weights), None
        biases = [
            self[f"{path}.bias"] if f"{path}.bias" in self else weight.new_zeros(len(weight))
            for path, weight in zip(paths, weights, strict=True)
        ]
        return torch.cat(weights), torch.cat(biases)

    def embedding(self, *, tied: bool) -> torch.Tensor:
        """[vocab, hidden]."""
        return self[HEAD if tied and EMBEDDING not in self else EMBEDDING]

    def head(self, *, tied: bool) -> torch.Tensor:
        """[vocab, hidden]; the embedding where the two are tied and the checkpoint does not hold a head that differs.

        transformers decides so too: what the checkpoint holds counts for more than its configuration.
        """
        import torch

        embedding = self.embedding(tied=tied)
        if tied and (HEAD not in self or torch.equal(embedding, self[HEAD])):
            return embedding
        return self[HEAD]


def _files(folder: Path) -> list[str]:
    if (folder / SINGLE).is_file():
        return [SINGLE]
    try:
        names = sorted(set(json.loads((folder / INDEX).read_text("utf-8"))["weight_map"].values()))
    except FileNotFoundError:
        raise UnsupportedModel(f"{folder} has no {SINGLE}.", hint="Name a folder with safetensors weights.") from None
    except (OSError, ValueError, LookupError, TypeError, AttributeError) as error:
        raise UnsupportedModel(f"{folder / INDEX} cannot be read: {error}.", hint="Fetch the model again.") from None
    for name in names:
        if not isinstance(name, str) or Path(name).name != name:
            raise UnsupportedModel(f"{folder / INDEX} names {name}.", hint="Shards must lie in the folder itself.")
    return names
