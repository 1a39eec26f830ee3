"""Caches: what they are keyed by, and what happens when they cannot be read or written."""

import hashlib
import json
import os
import stat
import time
import warnings
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import ClassVar

import pytest
import torch
from tokenizers import normalizers

from decoding import StylePrior
from decoding.cache import Key, cache_dir, kept, kept_file, kept_folder
from decoding.gguf import is_whole
from decoding.models import DEFAULT_MODEL, model_fingerprint, resolve_model
from decoding.style.background import model_frequencies, sample
from decoding.style.registered import REMOTE_STYLES, Remote, registered_documents
from decoding.style.training import name_and_file
from decoding.tokens import encoding_fingerprint, tokenize
from ngram import NGramModel
from ngram.storage import umask
from tests.conftest import make_model, make_tokenizer


@dataclass(frozen=True)
class _Key(Key):
    folder: ClassVar[str] = "tests"
    suffix: ClassVar[str] = ".json"
    what: str
    number: int = 0


def value_of(key, makes):
    return kept(key, lambda: makes.append(key) or {"made": len(makes)}, json.loads, lambda v: json.dumps(v).encode())


@pytest.fixture
def unwritable(tmp_path, monkeypatch):
    """A cache folder below a file: nobody can write there, not even root."""
    (tmp_path / "file").write_text("")
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "file" / "cache"))


@pytest.fixture
def few_openings(monkeypatch):
    monkeypatch.setattr("decoding.style.background.openings", lambda: ("the captain", "rain"))
    monkeypatch.setattr("decoding.style.background._TOKENS_PER_OPENING", 8)


def test_a_value_is_made_once_for_each_key():
    makes = []
    keys = (_Key("a"), _Key("a"), _Key("b"), _Key("a", 1), _Key("b"))
    assert [value_of(key, makes)["made"] for key in keys] == [1, 1, 2, 3, 2]


@pytest.mark.parametrize("content", [b"", b"{", b"\xff\xfe", b"[1, 2"])
def test_a_damaged_file_means_again(content):
    makes = []
    value_of(_Key("a"), makes)
    _Key("a").path.write_bytes(content)
    assert value_of(_Key("a"), makes) == {"made": 2}
    assert json.loads(_Key("a").path.read_bytes()) == {"made": 2}


def test_what_cannot_be_written_is_used_all_the_same_and_said_once(unwritable):
    makes = []
    with pytest.warns(UserWarning, match="nothing can be kept in .*XDG_CACHE_HOME"):
        assert value_of(_Key("a"), makes) == {"made": 1}
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert value_of(_Key("a"), makes) == {"made": 2}


def test_a_file_for_others_is_made_elsewhere_then(unwritable):
    def make(path):
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text("whole")

    path = cache_dir() / "kind" / "file.txt"
    with pytest.warns(UserWarning, match="nothing can be kept"):
        found = kept_file(path, make, lambda path: path.is_file())
    assert found != path and found.read_text() == "whole"


def test_of_two_that_want_a_folder_one_makes_it_and_the_other_waits():
    makes = []

    def make(folder):
        makes.append(folder)
        (folder / "first").write_text("")
        time.sleep(0.2)
        (folder / "last").write_text("")

    path = cache_dir() / "kind" / "folder"
    path.mkdir(parents=True)
    (path / "first").write_text("of a folder that is not whole")
    with ThreadPoolExecutor(2) as both:
        found = list(both.map(lambda _: kept_folder(path, make, lambda path: (path / "last").exists()), range(2)))
    assert found == [path, path] and len(makes) == 1
    assert sorted(each.name for each in path.parent.iterdir() if each.is_dir()) == ["folder"]
    assert [(path / name).read_text() for name in ("first", "last")] == ["", ""]
    assert stat.S_IMODE(path.stat().st_mode) == 0o777 & ~umask()


@pytest.mark.skipif(os.name != "posix", reason="file modes are POSIX's")
def test_files_are_as_readable_as_the_umask_says():
    before = os.umask(0o022)
    try:
        value_of(_Key("a"), [])
    finally:
        os.umask(before)
    assert stat.S_IMODE(_Key("a").path.stat().st_mode) == 0o644


def test_styles_work_without_a_cache(unwritable, tokenizer, model, style_file, few_openings):
    with pytest.warns(UserWarning, match="nothing can be kept"):
        prior = StylePrior(style_file, λ=0.5, mode="ratio", tokenizer=tokenizer, model=model)
        _, file = name_and_file(str(style_file), tokenizer, order=3, smoothing="kneser-ney")
    assert prior.log_ratio.shape == (len(tokenizer),)
    assert NGramModel.load(file).order == 3


def test_a_damaged_prior_is_trained_again(tokenizer, style_file):
    _, file = name_and_file(str(style_file), tokenizer, order=3, smoothing="kneser-ney")
    whole = Path(file).read_bytes()
    Path(file).write_bytes(whole[:-40])
    assert name_and_file(str(style_file), tokenizer, order=3, smoothing="kneser-ney")[1] == file
    assert Path(file).read_bytes() == whole


@pytest.mark.parametrize("damage", [lambda content: content[:-20], lambda content: b"", lambda content: b"x" * 200])
def test_damaged_tokens_and_frequencies_are_made_again(tokenizer, model, few_openings, damage):
    documents = ("the captain said", "night")
    first, frequencies = tokenize(documents, tokenizer), model_frequencies(model, tokenizer)
    files = list(cache_dir().rglob("*.safetensors"))
    assert len(files) == 2
    for file in files:
        file.write_bytes(damage(file.read_bytes()))
    assert [ids.tolist() for ids in tokenize(documents, tokenizer)] == [ids.tolist() for ids in first]
    assert torch.equal(model_frequencies(model, tokenizer), frequencies)


def test_damaged_trials_are_made_again(tokenizer, model, few_openings, monkeypatch, tmp_path):
    monkeypatch.setattr("decoding.style.strength._TOKENS", 4)
    path = tmp_path / "long.txt"
    path.write_text("the captain said that his ship had never seen such a storm and the sea was black with rain " * 80)
    chosen = StylePrior(path, λ="auto", tokenizer=tokenizer, model=model).lambda_
    (trials,) = cache_dir().glob("strengths/*.json")
    trials.write_bytes(trials.read_bytes()[:-30])
    assert StylePrior(path, λ="auto", tokenizer=tokenizer, model=model).lambda_ == chosen
    assert len(json.loads(trials.read_bytes())) == 11


def test_trials_belong_to_the_row_that_they_were_made_with(tokenizer, model, few_openings, monkeypatch, tmp_path):
    monkeypatch.setattr("decoding.style.strength._TOKENS", 4)
    path = tmp_path / "long.txt"
    path.write_text("the captain said that his ship had never seen such a storm and the sea was black with rain " * 80)
    for row in (torch.linspace(-2, 2, len(tokenizer)), torch.linspace(2, -2, len(tokenizer))):
        prior = StylePrior(path, λ="auto", mode="ratio", log_ratio=row, tokenizer=tokenizer, model=model)
        assert 0 <= prior.lambda_ <= 1 and torch.equal(prior.log_ratio, row)
    assert len(list(cache_dir().glob("strengths/*.json"))) == 2


def test_a_registered_text_is_verified_when_it_is_read(monkeypatch):
    text = b"the sea was calm"
    monkeypatch.setattr("decoding.style.registered._download", lambda *_: text)
    monkeypatch.setitem(REMOTE_STYLES, "verse", Remote("https://text.example/x", hashlib.sha256(text).hexdigest()))
    assert registered_documents("verse") == [text.decode()]
    (cache_dir() / "corpora" / "verse.txt").write_text("the sea was changed")
    assert registered_documents("verse") == [text.decode()]


def test_tokenizers_that_read_alike_and_those_that_do_not():
    def fingerprint(change=lambda tokenizer: None):
        tokenizer = make_tokenizer()
        change(tokenizer)
        return encoding_fingerprint(tokenizer)

    def lower(tokenizer):
        tokenizer.backend_tokenizer.normalizer = normalizers.Lowercase()

    assert fingerprint() == fingerprint()
    assert fingerprint(lambda tokenizer: tokenizer(["a", "a b"], padding=True, truncation=True, max_length=9)) == (
        fingerprint()
    )
    changes = (lower, lambda tokenizer: setattr(tokenizer, "eos_token", "<pad>"))
    assert len({fingerprint(), *map(fingerprint, changes)}) == 3


def test_token_ids_of_another_normalizer_are_not_taken():
    plain, lower = make_tokenizer(), make_tokenizer()
    lower.backend_tokenizer.normalizer = normalizers.Lowercase()
    assert tokenize(("The captain",), plain)[0].tolist() != tokenize(("The captain",), lower)[0].tolist()


def test_frequencies_belong_to_the_whole_distribution_and_to_evaluation_mode(tokenizer, few_openings):
    plain, picky = (make_model(len(tokenizer), attention_dropout=0.5) for _ in range(2))
    picky.generation_config.update(min_p=0.9, repetition_penalty=3.0, top_k=1, temperature=0.1, num_beams=2)
    picky.train()
    prompts = ["the captain", "rain"]
    torch.manual_seed(0)
    wanted = sample(plain, tokenizer, prompts, 6, [])
    torch.manual_seed(0)
    assert torch.equal(sample(picky, tokenizer, prompts, 6, []), wanted)
    assert picky.training and not plain.training


def test_a_model_with_another_adapter_is_another_model(tokenizer):
    peft = pytest.importorskip("peft")
    config = peft.LoraConfig(r=2, target_modules=["q_proj"], init_lora_weights=False)
    model = peft.get_peft_model(make_model(len(tokenizer)), config, adapter_name="first")
    model.add_adapter("second", config)
    found = {"first": model_fingerprint(model)}
    model.set_adapter("second")
    found["second"] = model_fingerprint(model)
    with model.disable_adapter():
        found["none"] = model_fingerprint(model)
    assert len(set(found.values())) == 3
    model.set_adapter("first")
    assert model_fingerprint(model) == found["first"]


@pytest.mark.real
def test_a_damaged_default_model_is_not_taken_for_whole(real_model, tmp_path):
    folder = tmp_path / "copy"
    folder.mkdir()
    source = Path(resolve_model(DEFAULT_MODEL))
    for file in source.iterdir():
        content = file.read_bytes()
        (folder / file.name).write_bytes(content[:-1000] if file.name == "model.safetensors" else content)
    assert is_whole(source) and not is_whole(folder)
