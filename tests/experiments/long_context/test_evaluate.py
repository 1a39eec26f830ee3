import json

import numpy as np
import pytest
import torch
from click.testing import CliRunner

from chunkllm import CalibrationConfig, ChunkAdapters, ChunkCalibration, ChunkSelection
from decoding.cli import cli
from decoding.errors import DecodingError
from experiments.long_context import bench as chunk_bench
from experiments.long_context import passkeys, reading
from experiments.long_context.asked import EvalOptions, TextCell, chosen_methods
from experiments.long_context.baselines import FULL, METHODS, QuestScorer
from experiments.long_context.evaluate import slices
from experiments.long_context.passkeys import passkey_prompt
from tests.chunkllm.conftest import VOCAB, tiny_model
from tests.conftest import WORDS, make_model, make_tokenizer

OPTIONS = EvalOptions(
    retentions=(0.5,), context=240, scored=40, passkey_lengths=(120,), passkey_depths=2, passkey_keys=1
)


@pytest.fixture(scope="module")
def speller():
    """A tokenizer that knows the passkey template's words, and digits one by one are unknown."""
    filler = passkeys.TASK + passkeys.FILLER + passkeys.KEY + passkeys.QUESTION
    return make_tokenizer([*WORDS, *filler.split()])


@pytest.fixture(scope="module")
def long_model(speller):
    return make_model(len(speller), rope_parameters={"rope_type": "default", "rope_theta": 10_000.0})


@pytest.fixture
def text_file(tmp_path, speller):
    rng = np.random.default_rng(0)
    path = tmp_path / "held_out.txt"
    path.write_text(" ".join(rng.choice(WORDS, 1200)))
    return path


@pytest.fixture
def folders(tmp_path, long_model, speller):
    long_model.save_pretrained(tmp_path / "model")
    speller.save_pretrained(tmp_path / "model")
    adapters = ChunkAdapters.for_model(long_model, width=2, sensitivity=(0.01, 0.02))
    adapters.save_pretrained(tmp_path / "adapters")
    return tmp_path


def evaluate(folders, text_file, *more):
    shape = ["--context", "240", "--scored", "80", "--pieces", "2", "--passkey-lengths", "120", "--passkey-depths", "2"]
    where = ["--model", str(folders / "model"), "--adapters", str(folders / "adapters"), "--out", str(folders / "out")]
    return CliRunner().invoke(cli, ["chunk", "eval", str(text_file), *where, *shape, "--retention", "0.5", *more])


@pytest.mark.slow
def test_from_the_command_line_and_resumed(folders, text_file):
    done = evaluate(folders, text_file, "--passkey-keys", "1")
    assert done.exit_code == 0, done.output
    out = folders / "out"
    assert {"results.md", "results.json", "quality.png", "recall.png", "passkey.png"} <= {p.name for p in out.iterdir()}
    held = json.loads((out / "texts.json").read_text())
    assert held["scored"] == 80 and [len(ids) for ids in held["ids"]] == [240, 240]
    results = json.loads((out / "results.json").read_text())
    rows = {row["method"]: row for row in results["text"]}
    assert set(rows) == set(METHODS)
    assert rows[FULL]["ratio"] == 1 and rows[FULL]["kv_retention"] == 1 and rows[FULL]["agreement"] == 1
    assert rows[FULL]["divergence"] == 0 < min(row["divergence"] for name, row in rows.items() if name != FULL)
    assert results["short"]["kv_retention"] == 1
    for name, row in rows.items():
        if name != FULL:
            assert row["kv_retention"] == pytest.approx(0.5, abs=0.05), name
            assert 0 < row["recall"] < 1 and len(row["recall_by_layer"]) == 2
    (out / "cells" / f"{TextCell('pooled', 0.5).key}.json").unlink()
    again = evaluate(folders, text_file, "--passkey-keys", "1", "--resume")
    assert again.exit_code == 0 and json.loads((out / "results.json").read_text())["text"] == results["text"]


@pytest.mark.parametrize(
    "bad, says",
    [
        (["--method", "magic"], "no method 'magic'"),
        (["--retention", "0,0.5"], "retentions must lie in"),
        (["--context", "4000"], "the model has 256 positions"),
        (["--pieces", "99"], "pieces of 240 tokens, not 99"),
        (["--scored", "239"], "longer than --scored"),
    ],
)
def test_bad_input_is_one_line(folders, text_file, bad, says):
    done = evaluate(folders, text_file, *bad)
    assert done.exit_code == 2 and says in done.output
    assert not (folders / "out").exists()


def test_what_is_scored_is_what_the_model_says_token_by_token(long_model, speller):
    ids = torch.randint(3, len(speller), (2, 100))
    with torch.inference_mode():
        logits = long_model(ids).logits[:, 59:-1].log_softmax(-1)
        prompts, full = reading.read(long_model, ids[:, :60], ids[:, 60:])
    torch.testing.assert_close(full, logits, rtol=0, atol=2e-4)
    with torch.inference_mode(), ChunkSelection(retention=1.0).attach(long_model) as chunks:
        scored = reading.score_texts(long_model, chunks, prompts, ids[:, 60:], full)
    expected = -logits.gather(-1, ids[:, 60:, None])[..., 0]
    torch.testing.assert_close(torch.tensor(scored["nll"]), expected, rtol=0, atol=2e-4)
    assert torch.tensor(scored["divergence"]).abs().max() < 1e-4
    assert all(all(row) for row in scored["agree"])


def test_a_model_with_sliding_layers_goes_on_where_the_prompt_ended():
    """Its windows hold less than the prompt, whose positions go on all the same."""
    model = tiny_model("gemma3_text")
    ids = torch.randint(3, VOCAB, (2, 100), generator=torch.Generator().manual_seed(0))
    with torch.inference_mode():
        logits = model(ids).logits[:, 59:-1].log_softmax(-1)
        prompts, full = reading.read(model, ids[:, :60], ids[:, 60:])
        with ChunkSelection(retention=1.0).attach(model) as chunks:
            scored = reading.score_texts(model, chunks, prompts, ids[:, 60:], full)
    torch.testing.assert_close(full, logits, rtol=0, atol=2e-4)
    expected = -logits.gather(-1, ids[:, 60:, None])[..., 0]
    torch.testing.assert_close(torch.tensor(scored["nll"]), expected, rtol=0, atol=2e-4)


def test_methods_that_need_what_adapters_do_not_tell_are_left_out(long_model):
    plain = ChunkAdapters.for_model(long_model, width=2)
    told = ChunkAdapters.for_model(long_model, width=2, sensitivity=(0.01, 0.02))
    assert set(chosen_methods((), told)) == set(METHODS) - {FULL}
    without_layers = set(chosen_methods((), plain))
    assert set(METHODS) - {FULL} - without_layers == {name for name in METHODS if name.endswith("by layer")}
    assert not any("adapter" in name for name in chosen_methods((), None))
    calibration = ChunkCalibration(CalibrationConfig(told.config.shape, told.config.sensitivity))
    by_calibration = set(chosen_methods((), calibration))
    assert by_calibration == {name for name in METHODS if name != FULL and not name.startswith("adapter")}
    with pytest.raises(DecodingError, match="no method 'adapter, by layer'"):
        chosen_methods(("adapter, by layer",), plain)


def test_quest_bounds_every_key_of_its_page():
    torch.manual_seed(0)
    keys, queries = torch.randn(1, 2, 32, 8), torch.randn(1, 4, 1, 8)
    scorer = QuestScorer(scaling=0.5)
    chunk_of = (torch.arange(32) // 16)[None]
    features = scorer.summarise(0, keys, chunk_of, torch.tensor([[15, 31]]))
    bounds = scorer.query_features(0, queries).view(1, 2, 2, -1) @ features.transpose(-1, -2)
    products = 0.5 * queries.view(1, 2, 2, 8) @ keys.transpose(-1, -2)
    assert (products.view(1, 2, 2, 2, 16).amax(-1) <= bounds + 1e-5).all()


def test_the_key_stands_where_it_should(speller):
    first, last = (passkey_prompt(speller, 200, depth, "12345") for depth in (0, 1))
    for prompt in (first, last):
        assert len(speller(prompt)["input_ids"]) <= 200 and prompt.count("12345") == 2
    assert first.index("12345") < 250 and last.index("12345") > len(last) - 150


def test_pieces_are_spread():
    documents = [np.arange(100), np.arange(100, 150)]
    assert [piece[0] for piece in slices(documents, 10, 5)] == [0, 30, 60, 90, 120]


@pytest.mark.slow
def test_bench_measures_all_paths(monkeypatch, tmp_path):
    tiny = {
        "hidden_size": 32,
        "intermediate_size": 32,
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "vocab_size": 64,
    }
    monkeypatch.setitem(chunk_bench.SHAPES, "smollm2-135m", tiny)
    out, picture = tmp_path / "bench.json", tmp_path / "bench.png"
    arguments = ["bench", "long-context", "--contexts", "2500,3000", "--rounds", "1"]
    done = CliRunner().invoke(cli, [*arguments, "--json", str(out), "--picture", str(picture)])
    assert done.exit_code == 0, done.output
    figures = {figure["what"]: figure for figure in json.loads(out.read_text())["figures"]}
    assert len(figures) == 4 + 1 + 1 + 1 and picture.stat().st_size > 1000
    assert not any("not measured" in figure["shown"] for figure in figures.values())
    refused = CliRunner().invoke(cli, ["bench", "long-context", "--contexts", "1000"])
    assert refused.exit_code == 2 and "longer than the 2048 tokens" in refused.output
