"""What tests share: tiny random models, a release to seed homes with, and homes. All offline, made once a session."""

from __future__ import annotations

import json
import os
import zipfile
from collections.abc import Callable, Iterator, Mapping
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import hypothesis
import numpy as np
import pytest

from collegium.settings import Settings

if TYPE_CHECKING:
    from tokenizers import Tokenizer
    from torch import Tensor

    from collegium import runtime

os.environ.setdefault("OMP_NUM_THREADS", "1")  # before torch is imported: tiny models are slower on more
hypothesis.settings.register_profile("tests", deadline=None)  # the first example pays for imports
hypothesis.settings.load_profile("tests")

REAL_HOME = os.environ.get("COLLEGIUM_HOME")  # before it is hidden from the tests
TEMPLATE = (
    "{% for message in messages %}<|im_start|>{{ message['role'] }}\n{{ message['content'] }}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)
SPECIAL = ["<|endoftext|>", "<|im_start|>", "<|im_end|>"]
WORDS: dict[str, list[str]] = {
    "law": ["court", "contract", "judge", "lawsuit", "statute", "plaintiff", "tort", "liable"],
    "code": ["python", "function", "compiler", "loop", "bug", "variable", "recursion", "class"],
    "health": ["doctor", "fever", "vaccine", "symptom", "diabetes", "pain", "blood", "medicine"],
    "math": ["integral", "theorem", "prime", "matrix", "equation", "triangle", "algebra", "sum"],
}
SENTENCES = ["what is a {0} and a {1}", "explain the {0}", "how does a {0} differ from a {1}", "is my {1} a {0} or {2}"]
TYPICAL, SPREAD = (1.7, 0.985, 0.95), (0.4, 0.03, 0.12)  # what the tiny router's open-set test takes for familiar
FREE_WORDS = ["banana", "river", "guitar", "violin", "mountain", "kitchen", "soup", "recipe"]


def pytest_configure(config: pytest.Config) -> None:
    # PEFT asks transformers by a name that transformers 5.23 calls old; neither is ours to change.
    config.addinivalue_line("filterwarnings", "ignore:`is_gradient_checkpointing` is deprecated:FutureWarning")


@pytest.fixture(scope="session", autouse=True)
def _environment(tmp_path_factory: pytest.TempPathFactory) -> Iterator[None]:
    """No test reads the developer's own settings or home, and none reaches a network."""
    with pytest.MonkeyPatch.context() as patch:
        for name in [name for name in os.environ if name.startswith("COLLEGIUM_")]:
            patch.delenv(name)
        patch.setenv("COLLEGIUM_HOME", str(tmp_path_factory.mktemp("nobody")))
        patch.setenv("HF_HUB_OFFLINE", "1")
        patch.setenv("PIP_DISABLE_PIP_VERSION_CHECK", "1")
        yield


@pytest.fixture(scope="session")
def prompts() -> Mapping[str, str]:
    """A prompt for each domain of the tiny router, and one (`unknown`) that fits none."""
    return {
        "law": "explain the contract of the plaintiff",
        "code": "explain the python compiler bug",
        "health": "explain the fever and the vaccine",
        "math": "explain the prime theorem",
        "unknown": "a river, a mountain, a guitar and a violin",
    }


@pytest.fixture(scope="session")
def between() -> str:
    """A prompt that may be of `law`, which is likelier, or of `code`."""
    return "how does a tort tort differ from a function"


@pytest.fixture(scope="session")
def tiny_base(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A random Llama of two layers with a byte-level tokenizer; its greedy answers are printable ASCII."""
    import torch
    from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

    tokenizer = PreTrainedTokenizerFast(  # type: ignore[no-untyped-call]
        tokenizer_object=_byte_level_bpe(),
        eos_token="<|im_end|>",
        bos_token="<|im_start|>",
        pad_token="<|im_end|>",
        unk_token="<|endoftext|>",
    )
    tokenizer.chat_template = TEMPLATE
    config = LlamaConfig(
        vocab_size=len(tokenizer),
        hidden_size=32,
        intermediate_size=64,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        max_position_embeddings=512,
        initializer_range=0.3,
        bos_token_id=tokenizer.bos_token_id,
        eos_token_id=tokenizer.eos_token_id,
        pad_token_id=tokenizer.pad_token_id,
    )
    torch.set_num_threads(1)
    torch.manual_seed(0)
    model = LlamaForCausalLM(config)
    plain = torch.tensor([_is_plain(str(tokenizer.decode([token]))) for token in range(len(tokenizer))])
    plain[tokenizer.all_special_ids] = False
    with torch.no_grad():
        model.lm_head.weight[~plain] = 0.0
    folder = tmp_path_factory.mktemp("tiny-base")
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return folder


def _is_plain(text: str) -> bool:
    return text.isascii() and text.isprintable()


def _byte_level_bpe() -> Tokenizer:
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers

    merges = [("t", "h"), ("th", "e"), ("i", "n"), ("Ġ", "the"), ("e", "r"), ("a", "n"), ("Ġ", "a"), ("o", "r")]
    tokens = [*SPECIAL, *sorted(pre_tokenizers.ByteLevel.alphabet()), *("".join(pair) for pair in merges)]
    tokenizer = Tokenizer(models.BPE({token: number for number, token in enumerate(tokens)}, merges))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    tokenizer.add_special_tokens(SPECIAL)
    return tokenizer


@pytest.fixture(scope="session")
def tiny_encoder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A random BERT with the files of sentence-transformers, whose words of one domain lie near each other."""
    import torch
    from transformers import BertConfig, BertModel

    folder = tmp_path_factory.mktemp("tiny-encoder")
    vocabulary = _write_word_pieces(folder)
    torch.set_num_threads(1)
    torch.manual_seed(0)
    model = BertModel(
        BertConfig(
            vocab_size=len(vocabulary),
            hidden_size=32,
            intermediate_size=64,
            num_hidden_layers=2,
            num_attention_heads=2,
            max_position_embeddings=128,
        )
    )
    with torch.no_grad():
        _place_words(model.embeddings.word_embeddings.weight, vocabulary)
    model.save_pretrained(folder)
    _write_sentence_transformers_files(folder)
    return folder


def _write_word_pieces(folder: Path) -> dict[str, int]:
    from tokenizers import Tokenizer, models, normalizers, pre_tokenizers, processors
    from transformers import PreTrainedTokenizerFast

    characters = [chr(code) for code in range(33, 127) if not chr(code).isupper()]
    common = {word for sentence in SENTENCES for word in sentence.split() if word.isalpha()}
    words = sorted({*common, *FREE_WORDS, *(word for words in WORDS.values() for word in words)} - set(characters))
    tokens = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", *characters, *(f"##{one}" for one in characters), *words]
    vocabulary = {token: number for number, token in enumerate(tokens)}
    tokenizer = Tokenizer(models.WordPiece(vocabulary, unk_token="[UNK]"))
    tokenizer.normalizer = normalizers.BertNormalizer(lowercase=True)
    tokenizer.pre_tokenizer = pre_tokenizers.BertPreTokenizer()
    tokenizer.post_processor = processors.TemplateProcessing(
        single="[CLS] $A [SEP]", pair="[CLS] $A [SEP] $B:1 [SEP]:1", special_tokens=[("[CLS]", 2), ("[SEP]", 3)]
    )
    named = {
        "pad_token": "[PAD]",
        "unk_token": "[UNK]",
        "cls_token": "[CLS]",
        "sep_token": "[SEP]",
        "mask_token": "[MASK]",
    }
    fast = PreTrainedTokenizerFast(tokenizer_object=tokenizer, model_max_length=128, **named)  # type: ignore[no-untyped-call]
    fast.save_pretrained(folder)
    return vocabulary


def _place_words(weight: Tensor, vocabulary: Mapping[str, int]) -> None:
    """As training would: common words in one place, those of a domain in another, the free ones anywhere."""
    import torch

    domain_of = {word: domain for domain, words in WORDS.items() for word in words}
    places = {domain: torch.randn(weight.shape[1]) for domain in ("", *WORDS)}
    for word, row in vocabulary.items():
        near = 0.0 if word in FREE_WORDS else places[domain_of.get(word, "")]
        weight[row] = near + 0.5 * torch.randn(weight.shape[1])


def _write_sentence_transformers_files(folder: Path) -> None:
    kinds = {"": "Transformer", "1_Pooling": "Pooling", "2_Normalize": "Normalize"}
    modules = [
        {"idx": number, "name": str(number), "path": path, "type": f"sentence_transformers.models.{kind}"}
        for number, (path, kind) in enumerate(kinds.items())
    ]
    pooling = {"word_embedding_dimension": 32, "pooling_mode_mean_tokens": True, "pooling_mode_cls_token": False}
    files: dict[str, Any] = {
        "modules.json": modules,
        "sentence_bert_config.json": {"max_seq_length": 64, "do_lower_case": False},
        "1_Pooling/config.json": pooling,
    }
    for name, body in files.items():
        (folder / name).parent.mkdir(exist_ok=True)
        (folder / name).write_text(json.dumps(body), "utf-8")
    (folder / "2_Normalize").mkdir()


@pytest.fixture(scope="session")
def adapters(tiny_base: Path, tmp_path_factory: pytest.TempPathFactory) -> Mapping[str, Path]:
    """PEFT folders for `law` and `code` on the tiny base; neither answers like it, nor like the other."""
    import torch
    from peft import LoraConfig, get_peft_model
    from transformers import AutoModelForCausalLM

    folders = {}
    for seed, name in enumerate(("law", "code"), start=1):
        torch.manual_seed(seed)
        config = LoraConfig(r=4, lora_alpha=8, target_modules="all-linear", task_type="CAUSAL_LM")
        model = get_peft_model(AutoModelForCausalLM.from_pretrained(tiny_base), config)
        with torch.no_grad():
            for key, weight in model.named_parameters():
                if "lora_B" in key:
                    torch.nn.init.normal_(weight, std=0.5)
        folders[name] = tmp_path_factory.mktemp("adapters") / name
        model.save_pretrained(str(folders[name]))
    return folders


@pytest.fixture(scope="session")
def tiny_bundle(
    tiny_base: Path, tiny_encoder: Path, adapters: Mapping[str, Path], tmp_path_factory: pytest.TempPathFactory
) -> Path:
    """An exported release: router for four domains, `base`, and LoRA experts for `law` and `code`."""
    from collegium.experts.artifacts import ArtifactStore
    from collegium.experts.bundle import export_release
    from collegium.experts.home import base_card
    from collegium.experts.registry import Registry
    from collegium.models.cache import ModelCache
    from collegium.schema import Card, Evidence, Lora

    root = tmp_path_factory.mktemp("bundle")
    store = ArtifactStore(root / "artifacts")
    base = ModelCache(root / "models").get(str(tiny_base)).identity
    _fit_router(tiny_encoder, root)
    about = {name: Evidence(description=f"Questions about {name}.", licence="Apache-2.0") for name in adapters}
    cards = [
        base_card(base),
        *(
            Card(name, name, Lora(store.put(folder), 4), base, evidence=about[name])
            for name, folder in adapters.items()
        ),
    ]
    registry = Registry.open(f"sqlite:///{root / 'registry.db'}")
    aliases = {card.name: card.version for card in cards}
    release = registry.publish(cards=cards, aliases=aliases, router=store.put(root / "router"), note="tiny")
    export_release(root / "shipped", registry, store, release)
    registry.close()
    return root / "shipped"


def _fit_router(encoder_folder: Path, root: Path) -> None:
    from collegium.models.cache import ModelCache
    from collegium.router.artifact import RouterArtifact
    from collegium.router.encoder import Encoders
    from collegium.router.fit import fit_head
    from collegium.router.openset import OpenSet
    from collegium.router.rows import Rows

    made_up = [
        (domain, shape.format(words[at], words[(at + step) % len(words)], words[(at + step + 1) % len(words)]))
        for domain, words in WORDS.items()
        for shape in SENTENCES
        for at in range(len(words))
        for step in range(1, 5)
    ]
    encoders = Encoders(ModelCache(root / "models").get(str(encoder_folder)), precision="float32", device="cpu")
    domains = tuple(domain for domain, _ in made_up)
    sources = tuple(f"made-up:{domain}" for domain in domains)
    ids = tuple(f"row-{number}" for number in range(len(made_up)))
    embeddings = encoders.get(None).encode([text for _, text in made_up])
    rows = Rows(embeddings, domains, sources, ids, (None,) * len(made_up))
    # Not calibrated: rows that are told apart perfectly would make it certain of everything.
    head = replace(fit_head(rows), coverage=0.9, least=0.1)
    views = np.random.default_rng(0).normal(TYPICAL, SPREAD, size=(1000, 3)).astype(np.float32)
    open_set = OpenSet.fit(views, np.ones(len(views), np.float32))
    artifact = RouterArtifact(head, open_set, rows, 0.05, encoders.identity(None), None, {"data": "made up"})
    (root / "router").mkdir()
    artifact.save(root / "router")


@pytest.fixture(scope="session")
def seed(tiny_bundle: Path) -> Iterator[None]:
    """Homes that are opened from now on are seeded with the tiny release."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("collegium.experts.home.SHIPPED", tiny_bundle)
        yield


@pytest.fixture(scope="session")
def make_settings(tiny_base: Path, tiny_encoder: Path, seed: None) -> Callable[..., Settings]:
    """A function from a folder (and settings that differ) to the settings of a seeded home in it.

    They stand in its collegium.toml too, for tests that start a process or the command line with COLLEGIUM_HOME.
    """
    from collegium.experts.home import Home

    def make(home: Path, **changes: Any) -> Settings:
        common = {"base_model": str(tiny_base), "encoder": str(tiny_encoder), "max_tokens": 16, "threads": 1}
        common |= {"encoder_precision": "float32"}  # no export, and nothing in the user's cache folder
        values = common | {"device": "cpu", "max_prompt_tokens": 400, "repetition_penalty": 1.0} | changes
        home.mkdir(parents=True, exist_ok=True)
        (home / "collegium.toml").write_text("".join(f"{key} = {json.dumps(one)}\n" for key, one in values.items()))
        settings = Settings.load({}, home=home)
        Home(settings).close()
        return settings

    return make


@pytest.fixture(scope="session")
def tiny_settings(make_settings: Callable[..., Settings], tmp_path_factory: pytest.TempPathFactory) -> Settings:
    """A home that tests only read."""
    return make_settings(tmp_path_factory.mktemp("home"))


@pytest.fixture
def fresh_settings(make_settings: Callable[..., Settings], tmp_path: Path) -> Settings:
    """A seeded home of the test's own, to publish in."""
    return make_settings(tmp_path / "home")


@pytest.fixture(scope="session")
def collegium(tiny_settings: Settings) -> Iterator[runtime.Collegium]:
    """An open Collegium on the tiny models, for tests that publish nothing."""
    from collegium.runtime import Collegium

    with Collegium.open(tiny_settings) as opened:
        yield opened


@pytest.fixture
def make_wheel(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Callable[[str, Mapping[str, bytes]], Path]:
    """A function from a package's name and its files to a wheel, version 1.0, that pip finds; it finds nothing else."""
    links = tmp_path / "links"
    links.mkdir()
    monkeypatch.setenv("PIP_NO_INDEX", "1")
    monkeypatch.setenv("PIP_FIND_LINKS", str(links))

    def make(package: str, files: Mapping[str, bytes]) -> Path:
        module = package.replace("-", "_")
        wheel = links / f"{module}-1.0-py3-none-any.whl"
        about = f"{module}-1.0.dist-info"
        with zipfile.ZipFile(wheel, "w") as archive:
            for name, data in files.items():
                archive.writestr(name, data)
            archive.writestr(f"{about}/METADATA", f"Metadata-Version: 2.1\nName: {package}\nVersion: 1.0\n")
            archive.writestr(f"{about}/WHEEL", "Wheel-Version: 1.0\nRoot-Is-Purelib: true\nTag: py3-none-any\n")
            archive.writestr(f"{about}/RECORD", "")
        return wheel

    return make


@pytest.fixture
def real_home(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A home of the test's own with the developer's real models (fetched if needed), seeded with what is shipped."""
    import collegium

    assert collegium.__file__
    monkeypatch.setattr("collegium.experts.home.SHIPPED", Path(collegium.__file__).parent / "shipped")
    models = Settings.load({"COLLEGIUM_HOME": REAL_HOME} if REAL_HOME else {}).home / "models"
    models.mkdir(parents=True, exist_ok=True)
    home = tmp_path / "real-home"
    home.mkdir()
    (home / "models").symlink_to(models)
    return home
