"""An adapter that was trained, as a PEFT folder."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from ...experts.adapters import CONFIG, WEIGHTS


def save_adapter(model: Any, folder: Path) -> None:
    """Write the adapter of a PeftModel in bfloat16: half of the bytes, and what it is served in.

    The same weights make the same bytes: nothing in them is of the machine or the process that made them.
    """
    import torch

    for name, parameter in model.named_parameters():
        if "lora_" in name:
            parameter.data = parameter.data.to(torch.bfloat16)
    model.save_pretrained(folder)
    for path in folder.iterdir():
        if path.name not in (CONFIG, WEIGHTS):
            path.unlink()  # PEFT's empty model card
    config = json.loads((folder / CONFIG).read_text("utf-8"))
    portable = {**config, "base_model_name_or_path": None, "target_modules": sorted(config["target_modules"])}
    (folder / CONFIG).write_text(json.dumps(dict(sorted(portable.items())), indent=1), "utf-8")
