"""lm-eval's figures under a policy: those of its own ``hf`` where everything is off, and by brute force where not."""

import json
import sys
import tomllib
from importlib.metadata import EntryPoint
from pathlib import Path

import click
import pytest
import torch
from click.testing import CliRunner

from decoding import DecodingError, NGramModel, Policy, generate
from decoding.cli import cli
from tests.conftest import TEXT, WORDS
from tests.decoding.temperature.test_processors import FixedSelector
from tests.ngram.reference import Reference

lm_eval = pytest.importorskip("lm_eval", reason="lm-eval is not installed")
from lm_eval.api.instance import Instance  # noqa: E402
from lm_eval.models.huggingface import HFLM  # noqa: E402
from lm_eval.tasks import TaskManager  # noqa: E402

from decoding.evaluation.harness import DecodingLM  # noqa: E402

ROOT = Path(__file__).parents[2]
PAIRS = [
    ("the captain said that", " his ship"),
    ("the captain said that", " rain"),
    ("the captain said that", " sea"),
    ("wind took every word", " away as night came on"),
    ("", " storm and the sea"),
    ("rain <think> he told men", " to bring </think> down sails"),
    (" ".join(WORDS[:30]), " none of them"),
]
QUESTIONS = [
    {"question": "the captain said that", "choices": ["his ship", "the sea was black"], "label": 0},
    {"question": "wind took every word", "choices": ["away as", "ship"], "label": 0},
    {"question": "rain he told men to bring", "choices": ["down sails", "storm and the sea was"], "label": 1},
]
TASK = """
task: {name}
dataset_path: json
dataset_kwargs: {{data_files: {{validation: {folder}/questions.jsonl}}, cache_dir: {folder}/cache}}
validation_split: validation
doc_to_text: question
"""
CHOICE = "output_type: multiple_choice\ndoc_to_target: label\ndoc_to_choice: choices\nmetric_list: [{metric: acc}]"
WRITING = """output_type: generate_until
doc_to_target: "{{choices[label]}}"
generation_kwargs: {until: ["night"], max_gen_toks: 12, do_sample: false}
metric_list: [{metric: exact_match}]"""


@pytest.fixture
def prior(tmp_path, thinking):
    """A saved prior, and the same by formulas."""
    tokens = thinking(TEXT)["input_ids"]
    NGramModel.train(tokens, len(thinking), pad_vocab=True).save(tmp_path / "mine.safetensors")
    return str(tmp_path / "mine.safetensors"), Reference([tokens], len(thinking), 3, "kneser-ney", pad=True)


@pytest.fixture
def selector(monkeypatch):
    found = FixedSelector({"the": 0.5, "wind": 2.0, "rain": 0.8})
    monkeypatch.setattr("decoding.policy.policy.open_selector", lambda name: found)


@pytest.fixture
def opened(thinker, thinking):
    def open_model(kind=DecodingLM, **options):
        return kind(pretrained=thinker, tokenizer=thinking, **({"batch_size": 4} | options))

    return open_model


def asked(kind, *arguments):
    return [Instance(kind, {}, each, number) for number, each in enumerate(arguments)]


def steered(reference, strength, stop=1):
    """Adds λ Σ ⅓ log p_k over the orders whose context matches; the end of a text keeps its odds."""

    def step(history, scores):
        contexts = [history[len(history) - k :] for k in range(3) if len(history) >= k]
        matching = [context for context in contexts if reference.matches(context)]
        after = scores.clone()
        for context in matching:
            after += strength / 3 * torch.tensor(reference.log_row(context, len(scores)))
        others = torch.arange(len(scores)) != stop
        after[stop] = scores[stop] + after[others].max() - scores[others].max()
        return after

    return step


def by_force(model, context, continuation, *steps):
    """Token by token, each with a pass of its own: the log-likelihood, and whether it is what greedy search writes."""
    total, is_greedy, read = 0.0, True, list(context)
    for token in continuation:
        with torch.no_grad():
            scores = model(torch.tensor([read])).logits[0, -1]
        for step in steps:
            scores = step(read, scores)
        total += scores.log_softmax(-1)[token].item()
        is_greedy &= scores.argmax().item() == token
        read.append(token)
    return total, is_greedy


def expected(thinker, thinking, steps_of, longest=255):
    found = []
    for context, continuation in PAIRS:
        whole = thinking(context + continuation)["input_ids"]
        begin = thinking(context)["input_ids"]
        rest = whole[len(begin) :]
        begin = begin or [thinking.eos_token_id]
        read = (begin + rest)[-longest - 1 :]
        found.append(by_force(thinker, read[: -len(rest)], rest, *steps_of(begin)))
    return found


def close(found, wanted):
    assert [greedy for _, greedy in found] == [greedy for _, greedy in wanted]
    assert [value for value, _ in found] == pytest.approx([value for value, _ in wanted], abs=1e-3)


@pytest.mark.parametrize("size", [1, 3, "auto"])
def test_a_style_is_added_at_each_position(opened, thinker, thinking, prior, size):
    model = opened(style=prior[0], batch_size=size, max_batch_size=4, **{"lambda": 0.8})
    found = model.loglikelihood(asked("loglikelihood", *PAIRS))
    wanted = expected(thinker, thinking, lambda context: [steered(prior[1], 0.8)])
    close(found, wanted)
    plain = opened(HFLM).loglikelihood(asked("loglikelihood", *PAIRS))
    assert sum(abs(a - b) for (a, _), (b, _) in zip(found, plain, strict=True)) > 1


def test_in_a_short_window(opened, thinker, thinking, prior):
    model = opened(style=prior[0], max_length=6, **{"lambda": 0.8})
    found = model.loglikelihood(asked("loglikelihood", *PAIRS))
    close(found, expected(thinker, thinking, lambda context: [steered(prior[1], 0.8)], longest=6))


def test_then_a_temperature_divides(opened, thinker, thinking, prior):
    model = opened(style=prior[0], temperature=0.7, **{"lambda": 0.8})
    found = model.loglikelihood(asked("loglikelihood", *PAIRS))
    steps = [steered(prior[1], 0.8), lambda history, scores: scores / 0.7]
    close(found, expected(thinker, thinking, lambda context: steps))


@pytest.mark.parametrize("think", [None, 1.5])
def test_a_temperature_is_chosen_by_the_context(opened, thinker, thinking, selector, think):
    """And within thinking it is thinking's."""
    begin, end = thinking.convert_tokens_to_ids(["<think>", "</think>"])

    def temperature(context):
        chosen = {"the": 0.5, "wind": 2.0, "rain": 0.8}.get(thinking.decode(context[:1]), 1.25)

        def step(history, scores):
            thinks = [token for token in history if token in (begin, end)][-1:] == [begin]
            return scores / (think if think and thinks else chosen)

        return [step]

    model = opened(temperature="auto", **({} if think is None else {"think_temperature": think}))
    found = model.loglikelihood(asked("loglikelihood", *PAIRS))
    close(found, expected(thinker, thinking, temperature))


def test_equal_tokens_with_their_context_elsewhere(opened, thinking, selector):
    """The same text, parted at two places: lm-eval would read it once."""
    pairs = [("", " wind took every"), ("wind took", " every"), ("wind took every", " word")]
    together = opened(temperature="auto").loglikelihood(asked("loglikelihood", *pairs))
    alone = [opened(temperature="auto").loglikelihood(asked("loglikelihood", pair))[0] for pair in pairs]
    assert [value for value, _ in together] == pytest.approx([value for value, _ in alone], abs=1e-4)


def test_whole_texts(opened, thinker, thinking, prior):
    text = " ".join(WORDS[:20])
    model = opened(style=prior[0], **{"lambda": 0.8})
    (found,) = model.loglikelihood_rolling(asked("loglikelihood_rolling", (text,)))
    wanted = by_force(thinker, [1], thinking(text)["input_ids"], steered(prior[1], 0.8))[0]
    assert found == pytest.approx(wanted, abs=1e-3)


@pytest.mark.parametrize("fields", [{}, {"lambda": 0.0}, {"chunks": 69}])
def test_what_is_off_is_lm_evals_own_bit_for_bit(opened, prior, fields):
    fields = fields | ({"style": prior[0]} if "lambda" in fields else {})
    options = {"until": ["night"], "max_gen_toks": 12}
    written = asked("generate_until", *[(context, options) for context, _ in PAIRS if context])
    whole = asked("loglikelihood_rolling", (TEXT,), ("rain",))

    def everything(model):
        pairs = model.loglikelihood(asked("loglikelihood", *PAIRS))
        return pairs, model.loglikelihood_rolling(whole), model.generate_until(written)

    assert everything(opened(**fields)) == everything(opened(HFLM))


def test_generations_are_those_of_generate(opened, thinker, thinking, prior, selector):
    policy = Policy(prior[0], λ=0.8, temperature="auto", chunks={"budget": 16, "sinks": 2, "local": 4, "max_chunk": 6})
    contexts = ["the captain said that his ship " * 6, "wind took every word away as " * 5]
    options = {"until": [], "max_gen_toks": 12, "do_sample": True}
    torch.manual_seed(0)
    found = opened(policy=policy).generate_until(asked("generate_until", *[(each, options) for each in contexts]))
    torch.manual_seed(0)
    assert found == [
        text.strip() for text in generate(thinker, contexts, tokenizer=thinking, policy=policy, max_new_tokens=12)
    ]


def test_greedy_texts_have_no_temperature(opened, caplog):
    requests = asked("generate_until", ("the captain", {"until": [], "max_gen_toks": 8, "do_sample": False}))
    assert opened(temperature=0.5).generate_until(requests) == opened(HFLM).generate_until(requests)
    assert "does nothing without do_sample=true" in caplog.text


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"policy": "mine", "lambda": 0.5, "mode": "ratio"}, "policy=mine, and lambda, mode beside it"),
        ({"lambda": 0.5}, "lambda without a style"),
        ({"temperature": -1}, "temperature must be a positive number"),
        ({"temperature": 1.0, "tp_plan": "auto"}, "tp_plan splits a model"),
        ({"temperature": 1.0, "backend": "seq2seq"}, "needs a causal language model, not seq2seq"),
        ({"policy": "nobody/nothing"}, "no policy at nobody/nothing"),
    ],
)
def test_refusals(opened, options, message):
    with pytest.raises(DecodingError, match=message):
        opened(**options)


def test_a_tasks_temperature_beside_the_policys(opened):
    options = {"until": [], "max_gen_toks": 8, "do_sample": True, "temperature": 0.6}
    with pytest.raises(DecodingError, match=r"temperature=0.6 of the task, and the policy's"):
        opened(temperature=0.5).generate_until(asked("generate_until", ("the captain", options)))


@pytest.fixture
def tasks(tmp_path, thinker, thinking):
    """Two tasks with data of their own, in a folder with the model."""
    folder = tmp_path / "tasks"
    folder.mkdir()
    (folder / "questions.jsonl").write_text("\n".join(json.dumps(each) for each in QUESTIONS))
    for name, kind in (("choice", CHOICE), ("writing", WRITING)):
        (folder / f"{name}.yaml").write_text(TASK.format(name=name, folder=folder) + kind)
    thinker.save_pretrained(folder / "model")
    thinking.save_pretrained(folder / "model")
    return folder


@pytest.mark.slow
def test_tasks(tasks, thinker, thinking, prior):
    manager = TaskManager(include_path=str(tasks), include_defaults=False)

    def evaluated(model, **arguments):
        arguments = {"pretrained": str(tasks / "model"), **arguments}
        options = {"task_manager": manager, "batch_size": 2, "device": "cpu", "bootstrap_iters": 0}
        return lm_eval.simple_evaluate(model, arguments, ["choice", "writing"], **options)

    def answers(results):
        return {name: [each["resps"] for each in samples] for name, samples in results["samples"].items()}

    plain, off = evaluated("hf"), evaluated("decoding")
    assert answers(off) == answers(plain) and off["results"] == plain["results"]
    Policy(prior[0], λ=0.8).save_pretrained(tasks / "policy")
    on = evaluated("decoding", policy=str(tasks / "policy"))
    assert on["config"]["policy"]["lambda"] == 0.8
    for sample in on["samples"]["choice"]:
        pairs = [[thinking(text)["input_ids"] for text in each] for each in sample["arguments"]]
        wanted = [by_force(thinker, *pair, steered(prior[1], 0.8)) for pair in pairs]
        close([answer for (answer,) in sample["resps"]], wanted)
    questions = [each["question"] for each in QUESTIONS]
    options = {"tokenizer": thinking, "max_new_tokens": 12, "do_sample": False}
    texts = generate(thinker, questions, policy=Policy(prior[0], λ=0.8), **options)
    written = [text.strip() for ((text,),) in answers(on)["writing"]]
    assert written == [text.partition("night")[0].strip() for text in texts]


def entry_point():
    project = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]
    ((name, value),) = project["entry-points"]["lm_eval.models"].items()
    return EntryPoint(name, value, "lm_eval.models")


def test_lm_eval_finds_it():
    assert entry_point().load() is lm_eval.api.registry.get_model(entry_point().name) is DecodingLM


def test_the_command_hands_its_options_on(monkeypatch):
    monkeypatch.setattr(sys, "argv", ["decoding"])
    monkeypatch.setattr("lm_eval.__main__.cli_evaluate", lambda: click.echo(" ".join(sys.argv)))
    options = ["run", "--model", "decoding", "--model_args", "pretrained=me/model,style=king-james", "--help"]
    done = CliRunner().invoke(cli, ["lm-eval", *options])
    assert done.exit_code == 0 and done.output.split() == ["lm-eval", *options]


def test_the_command_says_what_is_wrong_in_one_line(monkeypatch, thinker, thinking):
    monkeypatch.setattr(sys, "argv", ["decoding"])
    monkeypatch.setattr("lm_eval.__main__.cli_evaluate", lambda: DecodingLM(thinker, tokenizer=thinking, mode="ratio"))
    done = CliRunner().invoke(cli, ["lm-eval"])
    assert done.exit_code == 2 and done.output == "Error: mode without a style: name one in style\n"
    monkeypatch.setitem(sys.modules, "lm_eval.__main__", None)
    done = CliRunner().invoke(cli, ["lm-eval"])
    assert done.exit_code == 2 and 'Error: this needs lm-eval: pip install "lm-eval>=0.4.13" accelerate' in done.output
