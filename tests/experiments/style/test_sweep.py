import json
import math
import re
from dataclasses import replace
from importlib.metadata import version

import numpy as np
import pytest
import torch

from decoding import DecodingError, StylePrior
from experiments.lab.pictures import plt, png
from experiments.lab.prompts import read_prompts
from experiments.lab.runs import RunFolder
from experiments.lab.tables import markdown
from experiments.style import paper as style_paper
from experiments.style.cells import SweepCell, SweepOptions, load_styles
from experiments.style.engines import prior_of
from experiments.style.report import _draw, table, write_report
from experiments.style.sweep import Sweep, points_of, report

PROMPTS = ("the captain said", "night came", "the sea was black with")


@pytest.fixture
def make_sweep(model, tokenizer, style_file, tmp_path):
    other = tmp_path / "other.txt"
    other.write_text("men heard the wind and the rain " * 9)
    styles = load_styles([str(style_file), str(other)], tokenizer)

    def make(resume=False, out=tmp_path / "run", **changes):
        options = SweepOptions(
            **{"prompts": PROMPTS, "lambdas": (0.0, 0.5, 1.0), "seeds": (0, 1), "max_new_tokens": 8, "batch_size": 2}
            | changes
        )
        return Sweep(model, tokenizer, "tiny", styles, options, out, resume)

    return make


def measures(text):
    return {key: value for key, value in text.items() if key != "tokens"}


def test_a_cell_measures_what_the_unsteered_model_says(make_sweep, model, tokenizer):
    """Against a fresh run of the model over each finished text, padding and all."""
    sweep = make_sweep()
    cells = sweep.steering_cells()
    sweep.run(cells)
    steered = sweep.records[SweepCell("style", 1.0, 1.0, 1)]
    prior = sweep.styles["style"].prior
    for prompt, text in zip(PROMPTS, steered["texts"], strict=True):
        assert len(text["tokens"]) == 8
        assert tokenizer.eos_token_id not in text["tokens"]
        ids = torch.tensor([tokenizer(prompt)["input_ids"] + text["tokens"]])
        with torch.no_grad():
            logits = model(ids).logits[0, -9:-1].clone()
        logits[:, tokenizer.eos_token_id] = -torch.inf
        log_p = logits.log_softmax(-1)
        drawn = log_p.gather(1, ids[0, -8:, None])[:, 0]
        assert text["base_nll"] == pytest.approx(-float(drawn.mean()), rel=1e-4)
        rows = [prior.log_probs(ids[:, at - 2 : at])[0] for at in range(ids.shape[1] - 8, ids.shape[1])]
        style_nll = -np.mean([float(row[token]) for row, token in zip(rows, text["tokens"], strict=True)])
        assert text["by_style"]["style"]["style_nll"] == pytest.approx(style_nll, rel=1e-4)
        assert 0 <= text["js"] <= math.log(2)
    unsteered = sweep.records[SweepCell(None, 0.0, 1.0, 1)]
    for text in unsteered["texts"]:
        assert text["js"] == pytest.approx(0, abs=1e-6)
        assert text["shift"] == [0.0] * 8
        assert text["overlap_unsteered"] == 1
        assert set(text["by_style"]) == {"style", "other"}


def test_an_interrupted_run_goes_on_without_repeating_or_losing_a_cell(make_sweep, tmp_path, monkeypatch):
    whole = make_sweep(out=tmp_path / "whole")
    whole.run(whole.steering_cells())

    generated = []
    original = Sweep._measured

    def counted(self, cell):
        if len(generated) == 4:
            raise KeyboardInterrupt
        generated.append(cell)
        return original(self, cell)

    monkeypatch.setattr(Sweep, "_measured", counted)
    first = make_sweep()
    with pytest.raises(KeyboardInterrupt):
        first.run(first.steering_cells())
    monkeypatch.setattr(Sweep, "_measured", original)
    on_disk = {path.name: path.read_bytes() for path in (first.folder.path / "cells").iterdir()}
    assert len(on_disk) == 4

    with pytest.raises(DecodingError, match="--resume"):
        make_sweep()
    second = make_sweep(resume=True)
    again = []
    monkeypatch.setattr(Sweep, "_measured", lambda self, cell: again.append(cell) or original(self, cell))
    second.run(second.steering_cells())
    assert set(again) == set(second.steering_cells()) - set(generated)
    assert all((first.folder.path / "cells" / name).read_bytes() == content for name, content in on_disk.items())
    for cell in whole.steering_cells():
        texts = [[measures(t) for t in run.records[cell]["texts"]] for run in (whole, second)]
        assert texts[0] == texts[1]
        assert whole.records[cell]["texts"] == second.records[cell]["texts"]


def test_a_run_is_not_resumed_under_other_settings(make_sweep):
    make_sweep()
    with pytest.raises(DecodingError, match="another max_new_tokens \\(8, not 9\\)"):
        make_sweep(resume=True, max_new_tokens=9)
    make_sweep(resume=True, lambdas=(0.0, 0.25), seeds=(5,))  # more cells of the same run


def test_a_run_resumed_elsewhere_names_both_places(make_sweep, monkeypatch):
    first = make_sweep()
    monkeypatch.setattr("torch.get_num_threads", lambda: 99)
    for _ in range(2):
        again = make_sweep(resume=True)
        assert [e["threads"] for e in again.folder.settings["environments"]] == [
            first.folder.settings["environments"][0]["threads"],
            99,
        ]


@pytest.mark.slow
def test_the_report_holds_every_cell_and_draws_from_disk(make_sweep):
    sweep = make_sweep()
    sweep.run(sweep.steering_cells())
    rows = report(sweep, points_of(sweep))
    folder = sweep.folder.path
    assert [(row["style"], row["lambda"]) for row in rows] == [(s, x) for s in ("style", "other") for x in (0, 0.5, 1)]
    for row in rows:
        for key in ("style_ppl", "base_ppl", "js", "entropy", "copied_run", "distinct_2"):
            assert row[f"{key}_low"] <= row[key] <= row[f"{key}_high"]
    nll = [
        np.mean([t["by_style"]["style"]["style_nll"] for t in sweep.records[SweepCell("style", 1.0, 1.0, s)]["texts"]])
        for s in (0, 1)
    ]
    assert rows[2]["style_ppl"] == pytest.approx(math.exp(np.mean(nll)))
    assert rows[0]["style_ppl"] > rows[2]["style_ppl"]
    content = json.loads((folder / "results.json").read_text())
    assert content["rows"] == json.loads(json.dumps(rows))
    assert {"model", "prompts", "styles"} <= content["settings"].keys()
    assert content["settings"]["environments"][0]["versions"]["torch"] == version("torch")
    assert content["settings"]["styles"]["style"]["corpus_sha256"]
    assert len((folder / "results.csv").read_text().splitlines()) == 7
    assert {path.stem for path in (folder / "plots").iterdir()} >= {"style_ppl", "base_ppl", "js", "speed"}
    assert (folder / "texts.png").read_bytes().startswith(b"\x89PNG")
    page = (folder / "report.html").read_text()
    assert "http://" not in page and "https://" not in page  # self-contained
    assert "<!--" not in page
    assert page.count("</script>") == 3

    before = (folder / "results.csv").read_bytes()
    again = make_sweep(resume=True)
    again.run(again.steering_cells())
    report(again, points_of(again))
    assert (folder / "results.csv").read_bytes() == before


def test_names_and_texts_that_mean_something_to_others_stand_as_they_are(make_sweep, tmp_path):
    """To HTML and Jinja2, to matplotlib's mathematics, and to its legends."""
    nasty = "</script><!--<script> & {{ 7 * 7 }} \u2028 日本"
    names = {"style": "Ba$$in_a.txt", "other": "_notes|x"}
    sweep = make_sweep()
    sweep.run(sweep.steering_cells())
    settings = sweep.folder.settings | {"prompts": [nasty] * len(sweep.options.prompts), "model": "<b>Ba$$in_</b>"}
    points = [replace(point, style=names[point.style]) for point in points_of(sweep)]
    for text in (text for point in points for record in point.records for text in record["texts"]):
        text["by_style"] = dict.fromkeys(names.values(), next(iter(text["by_style"].values())))
    folder = tmp_path / "report"
    write_report(folder, settings, points, lambda ids: nasty * (len(ids) - 1))
    page = (folder / "report.html").read_text(encoding="utf-8")
    assert page.count("<script") == 3 and page.count("</script>") == 3 and "<!--" not in page
    assert "<b>Ba" not in page and "&lt;b&gt;Ba$$in_" in page and "mode paper" in page
    data = json.loads(re.search(r'id="data">(.*?)</script>', page, re.DOTALL)[1])
    assert data["prompts"][0] == nasty and list(data["texts"]) == list(names.values())
    assert next(iter(data["texts"]["_notes|x"].values()))[0][0][0] == nasty
    figure, axis = plt.subplots()
    _draw(axis, [point.row() for point in points], "js", "JS")
    assert [text.get_text() for text in axis.legend().get_texts()] == [r"Ba\$\$in_a.txt", " _notes|x"]
    assert png(figure).startswith(b"\x89PNG")


def test_a_saved_prior_is_a_style_without_corpus_measures(make_sweep, model, tokenizer, tmp_path):
    sweep = make_sweep()
    sweep.styles["style"].prior.save(tmp_path / "storm.safetensors")
    styles = load_styles([str(tmp_path / "storm.safetensors")], tokenizer)
    options = SweepOptions(prompts=PROMPTS[:1], lambdas=(0.0, 0.5), max_new_tokens=4)
    alone = Sweep(model, tokenizer, "tiny", styles, options, tmp_path / "alone", False)
    alone.run(alone.steering_cells())
    rows = report(alone, points_of(alone))
    assert rows[0]["overlap_corpus"] is None and rows[0]["copied_run"] is None
    assert rows[0]["base_ppl_low"] is None  # one prompt has no interval
    assert "overlap, corpus" not in markdown(table(rows))


def test_a_saved_style_is_swept_as_it_was_saved(make_sweep, model, tokenizer, style_file, tmp_path):
    row = torch.linspace(-1, 1, len(tokenizer))
    saved = StylePrior(style_file, λ=0.5, mode="ratio", log_ratio=row, max_js=0.1, tokenizer=tokenizer)
    saved.save_pretrained(tmp_path / "mine")
    styles = load_styles([str(tmp_path / "mine"), f"text={style_file}"], tokenizer)
    options = SweepOptions(prompts=PROMPTS[:2], lambdas=(0.0, 0.5), max_new_tokens=6)
    sweep = Sweep(model, tokenizer, "tiny", styles, options, tmp_path / "run", False)
    sweep.run(sweep.steering_cells())
    as_saved, as_text = (sweep.records[SweepCell(name, 0.5, 1.0, 0)]["texts"] for name in ("style", "text"))
    assert as_saved != as_text
    assert max(text["js"] for text in as_saved) <= 0.1 * 1.001
    ids = torch.tensor([[3, 4]])
    scores = torch.randn(1, len(tokenizer))
    assert torch.equal(prior_of(styles[0], options, λ=0.5)(ids, scores), saved(ids, scores))
    settings = sweep.folder.settings["styles"]["style"]["settings"]
    assert settings["mode"] == "ratio" and settings["max_js"] == 0.1
    report(sweep, points_of(sweep))
    assert "mode paper, style as saved: mode ratio" in (tmp_path / "run" / "report.html").read_text()
    (asked,) = load_styles([str(tmp_path / "mine")], tokenizer, asked={"mode": "paper"})
    assert prior_of(asked, options).mode == "paper" and asked.settings.max_js == 0.1


def test_styles_of_one_name_are_refused(tokenizer, style_file):
    with pytest.raises(DecodingError, match="NAME=SPEC"):
        load_styles([str(style_file), str(style_file)], tokenizer)


def test_prompts_files(tmp_path):
    path = tmp_path / "prompts.txt"
    path.write_text("one\ntwo\n")
    assert read_prompts(path) == ("one", "two")
    path.write_text("one\n\ntwo\n")
    with pytest.raises(DecodingError, match="line 2 is empty"):
        read_prompts(path)


def test_folders_that_cannot_be_written(tmp_path):
    file = tmp_path / "file"
    file.write_text("x")
    for path in (file, file / "below", tmp_path):
        with pytest.raises(DecodingError, match="--out"):
            RunFolder(path, {}, resume=False)
    assert file.read_text() == "x"


def test_the_matching_temperature_is_interpolated():
    entropies = {0.5: 1.0, 1.0: 3.0}
    assert style_paper.matching_temperature(entropies, 2.0) == 0.75
    assert style_paper.matching_temperature(entropies, 9.0) == 1.0


def test_the_papers_experiment_sets_every_point_beside_one_of_its_entropy(make_sweep, monkeypatch):
    monkeypatch.setattr(style_paper, "TEMPERATURES", (0.25, 0.5, 0.75))
    points = style_paper.run(make_sweep())
    steered = {(p.style, p.lambda_): p.row() for p in points if p.kind == "steered" and p.lambda_ > 0}
    matched = {(p.style, p.lambda_): p.row() for p in points if p.kind == "entropy-matched"}
    assert steered.keys() == matched.keys()
    for key, row in matched.items():
        assert row["temperature"] <= 1
        assert row["entropy"] == pytest.approx(steered[key]["entropy"], abs=0.5)
