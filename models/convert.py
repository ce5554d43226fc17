"""GGUF to safetensors, once: reading GGUF takes many seconds at every start, safetensors well under one."""

from __future__ import annotations

import json
from pathlib import Path

from ..errors import UnsupportedModel


def convert_gguf(source: Path, target: Path) -> None:
    """Write the model of the GGUF file `source` as an unquantised float32 transformers folder.

    float32, because the dequantised values (scale x integer + minimum) do not fit bfloat16 exactly.
    Raises UnsupportedModel where transformers cannot read the file.
    """
    import torch
    from transformers import AutoModelForCausalLM, AutoTokenizer

    where = {"pretrained_model_name_or_path": str(source.parent), "gguf_file": source.name}
    try:
        quantised = AutoModelForCausalLM.from_pretrained(**where, dtype=torch.float32)
        tokenizer = AutoTokenizer.from_pretrained(**where)
    except (ValueError, KeyError, NotImplementedError) as error:
        raise UnsupportedModel(
            f"{source.name} cannot be read: {error}", hint="Use a safetensors folder instead."
        ) from error
    # The loaded object refuses save_pretrained because it remembers its quantisation; a fresh one of its class does not.
    config = quantised.config
    del config.quantization_config
    model = type(quantised)(config)
    model.load_state_dict(quantised.state_dict())
    model.save_pretrained(target)
    tokenizer.save_pretrained(target)
    _restore_pre_tokenizer(source, target / "tokenizer.json")


def _restore_pre_tokenizer(source: Path, tokenizer_file: Path) -> None:
    """Put back what GGUF keeps as a mere name: SmolLM splits digits one by one before its byte-level step."""
    from gguf import GGUFReader

    field = GGUFReader(source).get_field("tokenizer.ggml.pre")
    if field is None or field.contents() != "smollm":
        return
    tokenizer = json.loads(tokenizer_file.read_text("utf-8"))
    byte_level = {"type": "ByteLevel", "add_prefix_space": False, "trim_offsets": True, "use_regex": True}
    digits = {"type": "Digits", "individual_digits": True}
    tokenizer["pre_tokenizer"] = {"type": "Sequence", "pretokenizers": [digits, byte_level]}
    tokenizer_file.write_text(json.dumps(tokenizer, ensure_ascii=False), "utf-8")
