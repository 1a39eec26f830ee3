"""The styles that an engine loads, and what they add."""

from pathlib import Path

import pytest
import torch

from decoding import DecodingError, StylePrior
from decoding.vllm.declaration import DeclaredStyle
from decoding.vllm.requests import read_request
from decoding.vllm.styles import Chosen, load_styles, stops_table
from tests.conftest import WORDS, make_tokenizer
from tests.serving.conftest import assert_same_distribution, sampling


def rows_of(*rows):
    return [[Chosen(*each) for each in row] for row in rows]


def test_rows_become_layers(styles):
    first, last = styles.layers(rows_of([(2, 0.5)], [], [(2, 0.25), (1, 0.125)]))
    assert first.prior == 2 and first.holds is None
    assert first.strength.tolist() == [0, 0, 0.25]
    assert last.prior.tolist() == [2, 0, 1]
    assert last.strength.tolist() == [0.5, 0, 0.125]
    (mixed,) = styles.layers(rows_of([(2, 0.5)], [], [(1, 0.25)]))
    assert mixed.prior.tolist() == [2, 0, 1]
    assert styles.layers([[], []]) == []


def test_saved_settings_apply_and_a_request_may_leave_lambda_out(saved, tokenizer):
    styles = load_styles({name: DeclaredStyle(str(path)) for name, path in saved.items()}, tokenizer, 60, "cpu")
    request = read_request(sampling({"style": ["folder", "file"]}))
    assert styles.resolve(request) == [(1, 0.7, None), (0, 0.1, None)]
    request = read_request(sampling({"style": ["folder", "file"], "lambda": [0, 0.5]}))
    assert styles.resolve(request) == [(0, 0.5, None)]
    scores, history = torch.randn(2, 60), torch.tensor([[3, 4], [5, 6]])
    wanted = StylePrior.from_pretrained(saved["folder"])(history, scores)
    got = styles.add(scores.clone(), history, styles.layers(rows_of([(1, 0.7)], [(1, 0.7)])))
    assert_same_distribution(got, wanted)


@pytest.mark.skipif(not Path("/proc/self/maps").exists(), reason="looks at maps in /proc")
def test_one_large_style_stays_in_its_file(saved, tokenizer, monkeypatch):
    monkeypatch.setattr("decoding.style.files.MAPPED", 1)
    declared = {"mine": DeclaredStyle(str(saved["file"]))}
    styles = load_styles(declared, tokenizer, 60, "cpu")
    assert str(saved["file"]) in Path("/proc/self/maps").read_text()
    wanted = StylePrior(saved["file"], λ=0.5)
    scores, history = torch.randn(2, 60), torch.tensor([[3, 4], [5, 6]])
    got = styles.add(scores.clone(), history, styles.layers(rows_of([(0, 0.5)], [(0, 0.5)])))
    assert_same_distribution(got, wanted(history, scores))


@pytest.mark.skipif(not Path("/proc/self/maps").exists(), reason="looks at maps in /proc")
def test_large_styles_are_joined_once_into_a_file(saved, tokenizer, monkeypatch, tmp_path):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    declared = {name: DeclaredStyle(str(path)) for name, path in saved.items()}
    in_memory = load_styles(declared, tokenizer, 60, "cpu")
    assert not (tmp_path / "decoding-middleware" / "joined").exists()
    monkeypatch.setattr("decoding.style.files.MAPPED", 1)
    scores, history = torch.randn(2, 60), torch.tensor([[3, 4], [5, 6]])
    rows = rows_of([(0, 0.5), (1, 0.25)], [(1, 0.5)])
    wanted = in_memory.add(scores.clone(), history, in_memory.layers(rows))
    for _ in range(2):
        styles = load_styles(declared, tokenizer, 60, "cpu")
        assert torch.equal(styles.add(scores.clone(), history, styles.layers(rows)), wanted)
        (folder,) = (each for each in (tmp_path / "decoding-middleware" / "joined").iterdir() if each.is_dir())
        assert str(folder / "tables.safetensors") in Path("/proc/self/maps").read_text()
        monkeypatch.setattr("decoding.vllm.joined.join", None)  # not again
    monkeypatch.undo()
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    monkeypatch.setattr("decoding.style.files.MAPPED", 1)
    (folder / "tables.safetensors").write_bytes(b"cut off")
    styles = load_styles(declared, tokenizer, 60, "cpu")
    assert torch.equal(styles.add(scores.clone(), history, styles.layers(rows)), wanted)
    saved["file"].touch()
    load_styles(declared, tokenizer, 60, "cpu")
    assert len([each for each in folder.parent.iterdir() if each.is_dir()]) == 2


def test_priors_that_do_not_fit_the_model_are_refused(saved, tokenizer, tmp_path):
    declared = {"mine": DeclaredStyle(str(saved["file"]))}
    with pytest.raises(DecodingError, match="style 'mine'.*another model's"):
        load_styles(declared, None, 10, "cpu")
    with pytest.raises(DecodingError, match="style 'mine': the prior was trained with tokenizer"):
        load_styles(declared, make_tokenizer(WORDS[::-1]), 60, "cpu")
    (tmp_path / "spoilt.safetensors").write_bytes(b"spoilt")
    with pytest.raises(DecodingError, match="style 'x':.*not a whole n-gram model"):
        load_styles({"x": DeclaredStyle(str(tmp_path / "spoilt.safetensors"))}, tokenizer, 60, "cpu")


def test_an_engine_with_kernels_that_cannot_run_does_not_start(saved, tokenizer, monkeypatch):
    monkeypatch.setenv("DECODING_KERNELS", "cuda")
    with pytest.raises(DecodingError, match="DECODING_KERNELS must be one of"):
        load_styles({"mine": DeclaredStyle(str(saved["file"]))}, tokenizer, 60, "cpu")


def test_texts_and_saved_styles_are_styles(saved, tokenizer, style_file, tmp_path):
    declared = {"text": str(style_file), "saved": str(saved["folder"]), "file": str(saved["file"])}
    styles = load_styles({name: DeclaredStyle(spec) for name, spec in declared.items()}, tokenizer, 60, "cpu")
    scores, history = torch.randn(3, 60), torch.tensor([[3, 4], [5, 6], [3, 4]])
    rows = rows_of([(0, 0.5)], [(1, 0.5)], [(2, 0.5)])
    got = styles.add(scores.clone(), history, styles.layers(rows))
    for row, spec in enumerate(declared.values()):
        own = StylePrior(spec, λ=0.5, tokenizer=tokenizer)
        assert_same_distribution(got[row : row + 1], own(history[row : row + 1], scores[row : row + 1]))


@pytest.mark.parametrize("steer_stop", [False, True])
def test_ends_of_texts_are_left_alone(tokenizer, style_file, tmp_path, steer_stop):
    prior = StylePrior(style_file, λ=0.5, steer_stop=steer_stop, tokenizer=tokenizer)
    prior.save_pretrained(tmp_path / "one")
    styles = load_styles({"one": DeclaredStyle(str(tmp_path / "one"))}, tokenizer, 60, "cpu", stop_ids=[7])
    scores, history = torch.randn(2, 60), torch.tensor([[3, 4], [5, 6]])
    scores[:, 5] += 6  # a word of the text
    got = styles.add(scores.clone(), history, styles.layers(rows_of([(0, 1.0)], [])))
    assert torch.equal(got[1], scores[1])
    stops = [tokenizer.eos_token_id, 7]
    others = [i for i in range(60) if i not in stops]
    before, after = (each[0, stops] - each[0, others].max() for each in (scores, got))
    assert torch.allclose(before, after, atol=1e-4) is not steer_stop


def test_a_prior_with_an_id_more_than_the_model_scores(tokenizer, style_file, tmp_path):
    tokenizer = make_tokenizer()
    tokenizer.add_tokens(["<image>"], special_tokens=True)
    StylePrior(style_file, λ=0.5, tokenizer=tokenizer).save_pretrained(tmp_path / "one")
    width = len(tokenizer) - 1
    styles = load_styles({"one": DeclaredStyle(str(tmp_path / "one"))}, tokenizer, width, "cpu")
    scores, history = torch.randn(2, width), torch.tensor([[3, 4], [5, 6]])
    got = styles.add(scores.clone(), history, styles.layers(rows_of([(0, 0.5)], [(0, 0.5)])))
    assert_same_distribution(got, StylePrior(tmp_path / "one", tokenizer=tokenizer)(history, scores))


def test_a_requests_own_stops_are_left_alone(tokenizer, style_file, tmp_path):
    for name, steer_stop in (("left", False), ("steered", True)):
        prior = StylePrior(style_file, λ=1, steer_stop=steer_stop, tokenizer=tokenizer)
        prior.save_pretrained(tmp_path / name)
    declared = {name: DeclaredStyle(str(tmp_path / name)) for name in ("left", "steered")}
    styles = load_styles(declared, tokenizer, 60, "cpu")
    asks = [("left", [7, 9, 1]), ("left", None), ("steered", [7]), (None, [8]), ("left", [9])]
    requests = [read_request(sampling(name and {"style": name}, stop_token_ids=ids)) for name, ids in asks]
    rows = [styles.resolve(each) for each in requests]
    own = [styles.own_stops(row, each.stop_ids) for row, each in zip(rows, requests, strict=True)]
    assert own == [[7, 9], [], [], [], [9]]
    scores = torch.randn(5, 60)
    history = torch.tensor([[3, 4]] * 5)
    layers = styles.layers(rows)
    got = styles.add(scores.clone(), history, layers, stops_table(own))
    plain = styles.add(scores.clone(), history, layers)
    assert torch.equal(got[1:4], plain[1:4]) and torch.equal(got[3], scores[3])
    for row, ends in ((0, [1, 7, 9]), (4, [1, 9])):
        others = [i for i in range(60) if i not in ends]
        assert torch.equal(got[row, others], plain[row, others])
        own_ends = [end for end in ends if end != 1]
        before, after = (each[row, own_ends] - each[row, others].max() for each in (scores, got))
        torch.testing.assert_close(before, after)


def test_requests_say_whether_ends_are_steered(tokenizer, style_file):
    """Whatever the style does by itself, and for rows of both kinds in one batch."""
    spec = str(style_file)
    declared = {name: DeclaredStyle(spec, (("steer_stop", name == "s"), ("lambda", 1.0))) for name in ("s", "left")}
    for names in (["s"], ["left"], ["s", "left"]):
        styles = load_styles({name: declared[name] for name in names}, tokenizer, 60, "cpu", stop_ids=[7])
        asked = [(name, steers) for name in names for steers in (None, True, False)]
        said = [{} if steers is None else {"steer_stop": steers} for _, steers in asked]
        requests = [read_request(sampling({"style": name} | more)) for (name, _), more in zip(asked, said, strict=True)]
        scores, history = torch.randn(len(asked), 60), torch.tensor([[3, 4]] * len(asked))
        got = styles.add(scores.clone(), history, styles.layers([styles.resolve(each) for each in requests]))
        for row, (name, steers) in enumerate(asked):
            steer_stop = name == "s" if steers is None else steers
            own = StylePrior(spec, λ=1, steer_stop=steer_stop).bound(tokenizer, stop_ids=[7])
            assert_same_distribution(got[row : row + 1], own(history[row : row + 1], scores[row : row + 1]))
