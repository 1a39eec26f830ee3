"""Styles that were measured with a model: kept, found without it, and measured anew where anything changed."""

import json
import os
import shutil
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from decoding import DecodingError, StylePrior
from decoding.cache import cache_dir
from decoding.models import files_fingerprint, load_model, load_tokenizer
from decoding.style.measured import measured_elsewhere
from tests.conftest import WORDS, make_tokenizer

RATIO = {"lambda_": 0.4, "mode": "ratio"}


@pytest.fixture
def own_folder(model_folder, tmp_path):
    """A model of this test's."""
    return shutil.copytree(model_folder, tmp_path / "own")


def wanted(style, folder):
    """The row as it is measured here."""
    tokenizer = load_tokenizer(str(folder))
    return StylePrior(style, **RATIO, tokenizer=tokenizer, model=load_model(str(folder))).log_ratio


def test_what_was_measured_is_found_without_the_model(own_folder, style_file, measuring, monkeypatch):
    first = measured_elsewhere(str(style_file), RATIO, str(own_folder))
    assert torch.equal(StylePrior.from_pretrained(first).log_ratio, wanted(style_file, own_folder))
    for name in ("load_model", "load_tokenizer"):
        monkeypatch.setattr(f"decoding.style.measured.{name}", None)
    assert measured_elsewhere(str(style_file), RATIO, str(own_folder)) == first
    assert measuring == ["spawn"]


def new_text(style, folder):
    style.write_text("rain and storm and rain and black night " * 30)


def new_weights(style, folder):
    """Others of the same size, with the time of the old ones."""
    file = folder / "model.safetensors"
    before = file.stat()
    other = {name: weight.flip(0) for name, weight in load_file(file).items()}
    save_file(other, file, {"format": "pt"})
    os.utime(file, ns=(before.st_atime_ns, before.st_mtime_ns))
    assert (file.stat().st_size, file.stat().st_mtime_ns) == (before.st_size, before.st_mtime_ns)


def new_tokenizer(style, folder):
    make_tokenizer(WORDS[::-1]).save_pretrained(folder)


@pytest.mark.parametrize("large", [4096, 1 << 26])
@pytest.mark.parametrize("change", [new_text, new_weights, new_tokenizer])
def test_what_changed_is_measured_anew(own_folder, style_file, measuring, monkeypatch, change, large):
    monkeypatch.setattr("decoding.models._LARGE", large)
    first = measured_elsewhere(str(style_file), RATIO, str(own_folder))
    change(style_file, own_folder)
    second = measured_elsewhere(str(style_file), RATIO, str(own_folder))
    before, after = (StylePrior.from_pretrained(folder).log_ratio for folder in (first, second))
    assert torch.equal(after, wanted(style_file, own_folder)) and not torch.equal(after, before)
    assert len(measuring) == 2


def test_parameters_names_and_configurations_are_told_apart(own_folder, style_file, measuring):
    def measured(style=str(style_file), **changes):
        return measured_elsewhere(style, RATIO | changes, str(own_folder))

    guarded = measured(max_js=0.1)
    assert StylePrior.from_pretrained(guarded).guards.max_js == 0.1
    named = measured(f"gales={style_file}")
    assert StylePrior.from_pretrained(named).model.metadata["style"] == "gales"
    folders = {measured(), guarded, named, measured(lambda_=0.5)}
    config = own_folder / "generation_config.json"
    config.write_text(json.dumps(json.loads(config.read_bytes()) | {"eos_token_id": [1, 5]}))
    assert len({*folders, measured()}) == len(measuring) == 5


@pytest.mark.parametrize("file", ["prior.safetensors", "ratio.safetensors", "style_prior.json"])
def test_a_folder_that_does_not_open_is_made_again(own_folder, style_file, measuring, file):
    folder = Path(measured_elsewhere(str(style_file), RATIO, str(own_folder)))
    row = StylePrior.from_pretrained(folder).log_ratio.clone()  # files are mapped into memory
    (folder / file).write_bytes((folder / file).read_bytes()[:-30])
    assert measured_elsewhere(str(style_file), RATIO, str(own_folder)) == str(folder)
    assert torch.equal(StylePrior.from_pretrained(folder).log_ratio, row)
    assert len(measuring) == 2


def test_without_a_cache_a_style_is_measured_once_and_stays(own_folder, style_file, measuring, tmp_path, monkeypatch):
    (tmp_path / "file").write_text("")
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "file" / "cache"))
    with pytest.warns(UserWarning, match="nothing can be kept"):
        folders = {measured_elsewhere(str(style_file), RATIO, str(own_folder)) for _ in range(2)}
    assert len(folders) == len(measuring) == 1
    assert torch.equal(StylePrior.from_pretrained(*folders).log_ratio, wanted(style_file, own_folder))


def test_what_cannot_be_measured_leaves_nothing_behind(own_folder, style_file, measuring):
    with pytest.raises(DecodingError, match="holds a tenth"):
        measured_elsewhere(str(style_file), {"lambda_": "auto"}, str(own_folder))
    assert [path for path in cache_dir().glob("measured/*") if path.is_dir()] == []


def test_a_model_of_the_hub_is_its_commit(tmp_path, monkeypatch):
    def fingerprint(name, commit):
        found = str(tmp_path / "snapshots" / commit / "config.json")
        monkeypatch.setattr("decoding.hub.hf_hub_download", lambda *_, **__: found)
        return files_fingerprint(name)

    asked = [("sea/ship", "a"), ("sea/ship", "b"), ("sea/boat", "a"), ("sea/ship", "a")]
    found = [fingerprint(*each) for each in asked]
    assert len(set(found)) == 3 and found[0] == found[-1]


def test_there_is_no_fingerprint_without_a_model(tmp_path):
    with pytest.raises(DecodingError, match="no model folder"):
        files_fingerprint(str(tmp_path / "nowhere"))
    with pytest.raises(DecodingError, match="no model at sea/nowhere"):
        files_fingerprint("sea/nowhere")


@pytest.mark.slow
def test_a_process_of_its_own_measures(model_folder, style_file, monkeypatch):
    folder = measured_elsewhere(str(style_file), {"lambda_": 0.3}, str(model_folder))
    assert StylePrior.from_pretrained(folder).lambda_ == 0.3
    monkeypatch.setattr("decoding.style.measured.ProcessPoolExecutor", None)
    assert measured_elsewhere(str(style_file), {"lambda_": 0.3}, str(model_folder)) == folder
