"""Tiny random encoders of several kinds, with tokenizers as theirs are, and adapters whose B is not zero."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from collegium.models.cache import CachedModel
from collegium.models.encoder import Floats

if TYPE_CHECKING:
    from tokenizers import Tokenizer

KINDS = {
    "Bert": ("[CLS]", "[SEP]", "[PAD]"),
    "Roberta": ("<s>", "</s>", "<pad>"),
    "DebertaV2": ("[CLS]", "[SEP]", "[PAD]"),
    "ModernBert": ("[CLS]", "[SEP]", "[PAD]"),
    "DistilBert": ("[CLS]", "[SEP]", "[PAD]"),
}
"""With what stands before a text, after it, and in place of one."""
POSITIONS = 140
WORDS = ["a", "court", "fever", "prime", "python", "the", "of", "what", "is", "."]


def tiny_encoder_of(kind: str, folder: Path) -> CachedModel:
    """Save a random encoder of two layers, whose vectors differ from text to text."""
    import torch
    import transformers

    tokenizer = _tokenizer(kind)
    padding = tokenizer.token_to_id(KINDS[kind][2])
    sizes: dict[str, Any] = {"vocab_size": tokenizer.get_vocab_size(), "initializer_range": 0.3}
    sizes |= {"max_position_embeddings": POSITIONS, "pad_token_id": padding}
    sizes |= (
        {"dim": 32, "hidden_dim": 48, "n_layers": 2, "n_heads": 2}
        if kind == "DistilBert"
        else {"hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2, "num_attention_heads": 2}
    )
    if kind == "DebertaV2":
        sizes |= {"relative_attention": True, "position_buckets": 16, "pos_att_type": ["p2c", "c2p"]}
        sizes |= {"share_att_key": True, "norm_rel_ebd": "layer_norm"}
    if kind == "ModernBert":
        first, last = (tokenizer.token_to_id(token) for token in KINDS[kind][:2])
        sizes |= {"local_attention": 16, "cls_token_id": first, "bos_token_id": first}
        sizes |= {"sep_token_id": last, "eos_token_id": last}
    torch.manual_seed(0)
    model_type: Any = getattr(transformers, f"{kind}Model")
    model_type(model_type.config_class(**sizes)).save_pretrained(folder)
    _save_tokenizer(kind, tokenizer, folder)
    return CachedModel(kind, folder, f"{kind}Model", f"{kind}Model:tiny")


def _tokenizer(kind: str) -> Tokenizer:
    from tokenizers import Tokenizer, models, normalizers, pre_tokenizers, processors

    first, last, padding = KINDS[kind]
    special = [first, padding, last, "<unk>"]
    if kind in ("Roberta", "ModernBert"):
        tokens = [*special, *sorted(pre_tokenizers.ByteLevel.alphabet()), "th", "the"]
        tokenizer = Tokenizer(models.BPE({one: at for at, one in enumerate(tokens)}, [("t", "h"), ("th", "e")]))
        tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    elif kind == "DebertaV2":
        pieces = [*special, "▁", *(f"▁{word}" for word in WORDS), *"abcdefghijklmnopqrstuvwxyz."]
        tokenizer = Tokenizer(models.Unigram([(piece, -1.0 - at / 100) for at, piece in enumerate(pieces)], 3, False))
        tokenizer.pre_tokenizer = pre_tokenizers.Metaspace()
    else:
        tokens = [*special, *WORDS, *"bcdefghijklmnopqrstuvwxyz", *(f"##{one}" for one in "abcdefghijklmnopqrstuvwxyz")]
        tokenizer = Tokenizer(models.WordPiece({one: at for at, one in enumerate(tokens)}, unk_token="<unk>"))
        tokenizer.normalizer = normalizers.BertNormalizer(lowercase=True)
        tokenizer.pre_tokenizer = pre_tokenizers.BertPreTokenizer()
    ids = [(token, tokenizer.token_to_id(token)) for token in (first, last)]
    pair = f"{first} $A {last} $B {last}"
    tokenizer.post_processor = processors.TemplateProcessing(f"{first} $A {last}", pair, ids)
    tokenizer.add_special_tokens(special)
    # As in the file of the default encoder: a trap for who reads it without transformers.
    tokenizer.enable_truncation(12)
    tokenizer.enable_padding(length=12, pad_id=special.index(padding), pad_token=padding)
    return tokenizer


def _save_tokenizer(kind: str, tokenizer: Tokenizer, folder: Path) -> None:
    first, last, padding = KINDS[kind]
    tokenizer.save(str(folder / "tokenizer.json"))
    about = {"cls_token": first, "sep_token": last, "pad_token": padding, "unk_token": "<unk>"}
    about |= {"tokenizer_class": "PreTrainedTokenizerFast"}
    (folder / "tokenizer_config.json").write_text(json.dumps(about), "utf-8")


def tiny_encoder_lora(folder: Path, model: CachedModel, *, seed: int = 1) -> Path:
    """Save a random adapter of all linears."""
    import torch
    from peft import LoraConfig, get_peft_model
    from transformers import AutoModel

    torch.manual_seed(seed)
    tuned: Any = get_peft_model(AutoModel.from_pretrained(model.folder), LoraConfig(r=4, target_modules="all-linear"))
    with torch.no_grad():
        for name, weight in tuned.named_parameters():
            if "lora_" in name:
                torch.nn.init.normal_(weight, std=0.3)
    tuned.save_pretrained(str(folder))
    return folder


def tokens_by_transformers(model: CachedModel, texts: Sequence[str], limit: int) -> list[list[int]]:
    """Token ids of texts that are cut at `limit`, special ones included."""
    from transformers import AutoTokenizer

    tokenizer: Any = AutoTokenizer.from_pretrained(model.folder)
    return [list(tokenizer(text, truncation=True, max_length=limit)["input_ids"]) for text in texts]


def embeddings_by_transformers(
    model: CachedModel, texts: Sequence[str], limit: int, adapter: Path | None = None
) -> Floats:
    """Mean-pooled vectors of length one [len(texts), dimension], by transformers and PEFT, one text at a time."""
    import torch
    from peft import PeftModel
    from transformers import AutoModel

    encoder: Any = AutoModel.from_pretrained(model.folder, dtype=torch.float32).eval()
    if adapter:
        encoder = PeftModel.from_pretrained(encoder, str(adapter)).eval()
    vectors = []
    with torch.inference_mode():
        for ids in tokens_by_transformers(model, texts, limit):
            found = encoder(input_ids=torch.tensor([ids])).last_hidden_state[0].mean(0)
            vectors.append((found / found.norm()).numpy())
    return np.stack(vectors)
