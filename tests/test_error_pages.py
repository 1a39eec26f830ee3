"""The pages in docs/errors: what they call wrong raises the sentence they give, and what they call right does not."""

import ast
import re
import shutil
import traceback
from dataclasses import replace
from pathlib import Path
from typing import NamedTuple

import numpy as np
import pytest
from click.testing import CliRunner
from transformers import GPT2Config, GPT2LMHeadModel

import chunkllm
import decoding
import ngram
from decoding.cli import cli
from tests.conftest import TEXT, WORDS, make_model, make_tokenizer

ROOT = Path(__file__).parents[1]
FOLDER = ROOT / "docs" / "errors"
FENCED = re.compile(r"```python\n(.*?)\n```", re.DOTALL)
ARPA = "\\data\\\nngram 1=3\n\n\\1-grams:\n-1\t<unk>\n{}\n\n\\end\\\n"


def public_errors():
    """By the name of its page, each exception that a package exports."""
    exported = {getattr(package, name) for package in (decoding, ngram, chunkllm) for name in package.__all__}
    errors = [each for each in exported if isinstance(each, type) and issubclass(each, BaseException)]
    return {f"{re.sub(r'(?<=[a-z])(?=[A-Z])', '-', error.__name__).lower()}.md": error for error in errors}


ERRORS = public_errors()
PAGES = sorted(path.name for path in FOLDER.glob("*.md") if path.name != "README.md")


class Section(NamedTuple):
    symptom: str
    cause: str
    wrong: str
    right: str


_WHOLE = re.compile(
    r"\*\*Symptom\*\*\n\n```text\n(?P<symptom>.+?)\n```\n\n"
    r"\*\*Cause\*\*\n\n(?P<cause>(?:(?!```|\*\*).)+?)\n\n"
    r"\*\*Wrong\*\*\n\n```python\n(?P<wrong>(?:(?!```).)+?)\n```\n\n"
    r"\*\*Right\*\*\n\n```python\n(?P<right>(?:(?!```).)+?)\n```",
    re.DOTALL,
)


def section_of(text):
    found = _WHOLE.fullmatch(text.strip())
    assert found, "a section has Symptom, Cause, Wrong and Right, in this order and nothing else"
    return Section(**found.groupdict())


def split(page):
    """What stands before the first heading, and the sections' texts by heading."""
    begin, *sections = re.split(r"^## ", (FOLDER / page).read_text(encoding="utf-8"), flags=re.MULTILINE)
    return begin, [tuple(each.split("\n", 1)) for each in sections]


SECTIONS = [
    pytest.param(page, text, id=f"{page.removesuffix('.md')}: {heading}")
    for page in PAGES
    for heading, text in split(page)[1]
]


def test_each_public_error_has_a_page_and_names_it():
    assert sorted(ERRORS) == PAGES
    for page, error in ERRORS.items():
        assert f"docs/errors/{page}" in error.__doc__
        assert issubclass(error, ValueError)
        assert split(page)[1]


@pytest.mark.parametrize("page", ["README.md", *PAGES])
def test_pages_are_readable(page):
    text = (FOLDER / page).read_text(encoding="utf-8")
    begin, sections = split(page)
    title = "Errors" if page == "README.md" else ERRORS[page].__name__
    assert begin.startswith(f"# {title}\n")
    assert max(map(len, text.splitlines())) <= 120
    assert len({heading for heading, _ in sections}) == len(sections)
    for link in re.findall(r"\]\(([^)\s]+)\)", text):
        assert (FOLDER / link).exists(), link


def test_the_readme_leads_to_all_pages():
    text = (FOLDER / "README.md").read_text(encoding="utf-8")
    for page, error in ERRORS.items():
        assert f"[`{error.__name__}`]({page})" in text


PARTS = ("**Symptom**\n\n```text\nno\n```", "**Cause**\n\nIt is.", "**Wrong**\n\n```python\na\n```")
WHOLE = (*PARTS, "**Right**\n\n```python\nb\n```")


@pytest.mark.parametrize("missing", range(4))
def test_a_section_without_a_part_is_refused(missing):
    assert section_of("\n\n".join(WHOLE)) == ("no", "It is.", "a", "b")
    for rest in (WHOLE[:missing] + WHOLE[missing + 1 :], (*WHOLE, WHOLE[missing])):
        with pytest.raises(AssertionError, match="a section has"):
            section_of("\n\n".join(rest))


@pytest.fixture(scope="module")
def things(tmp_path_factory):
    """A folder with the files that the snippets name."""
    folder = tmp_path_factory.mktemp("things")
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("XDG_CACHE_HOME", str(tmp_path_factory.mktemp("cache")))
        patch.chdir(folder)
        Path("my.txt").write_text(TEXT * 6, encoding="utf-8")
        Path("short.txt").write_text("the", encoding="utf-8")
        Path("my.jsonl").write_text('{"id": 1, "text": "the captain said that his ship"}\n', encoding="utf-8")
        for page in ("my.html", "page.txt"):
            Path(page).write_text(f"<!doctype html><p>{TEXT}", encoding="utf-8")
        Path("latin-1.txt").write_text(f"{TEXT} café", encoding="latin-1")
        Path("utf-16.txt").write_text(TEXT, encoding="utf-16-le")
        prior = decoding.StylePrior("my.txt", λ=0.1).bind(named(make_tokenizer(), "tiny"))
        prior.model.save("my.safetensors")
        prior.save_pretrained("half-copied-style")
        shutil.copy("my.safetensors", "cut-off.safetensors")
        for path in (Path("half-copied-style/prior.safetensors"), Path("cut-off.safetensors")):
            path.write_bytes(path.read_bytes()[:-100])
        shutil.copytree(ROOT / "tests" / "saved_by_0_1_0" / "selector", "whole-selector")
        heads = Path(shutil.copytree("whole-selector", "half-copied-selector"), "temperature_selector.safetensors")
        heads.write_bytes(heads.read_bytes()[:-100])
        settings = Path(shutil.copytree("whole-selector", "newer-selector"), "temperature_selector.json")
        settings.write_text('{"format": 99}', encoding="utf-8")
        np.savetxt("ids.txt", np.arange(200) % 40, fmt="%d")
        Path("ids.arpa").write_text(ARPA.format("-0.3\t0\n-0.4\t1"))
        Path("words.arpa").write_text(ARPA.format("-0.3\tthe\n-0.4\tcaptain"))
        Path("no-logarithms.arpa").write_text(ARPA.format("0.5\t0\n0.4\t1"))
        chunkllm.ChunkAdapters.for_model(make_model(len(make_tokenizer()))).save_pretrained("my-adapters")
        shape = chunkllm.ChunkAdapters.from_pretrained("my-adapters").config.shape
        for folder_name, each in (
            ("my-calibration", shape),
            ("calibration-of-another", replace(shape, hidden_size=16)),
        ):
            config = chunkllm.CalibrationConfig(each, (1e-3,) * len(each.full_layers))
            chunkllm.ChunkCalibration(config).save_pretrained(folder_name)
    return folder


def named(tokenizer, name):
    tokenizer.name_or_path = name
    return tokenizer


@pytest.fixture
def at_hand(things, tmp_path, monkeypatch):
    """What the snippets take for granted: their own, since they may change it."""
    folder = shutil.copytree(things, tmp_path / "things")
    monkeypatch.chdir(folder)
    monkeypatch.setenv("DECODING_KERNELS", "auto")
    monkeypatch.setattr("decoding.style.background.openings", lambda: ("the captain", "rain fell"))
    tokenizer = named(make_tokenizer(), "tiny")
    gpt2 = GPT2Config(n_embd=16, n_layer=1, n_head=2, vocab_size=50, bos_token_id=1, eos_token_id=1)
    return {
        "model": make_model(len(tokenizer)),
        "tokenizer": tokenizer,
        "other_tokenizer": named(make_tokenizer([*(f"word{i}" for i in range(100)), *WORDS]), "other"),
        "gpt2": GPT2LMHeadModel(gpt2),
        "text": TEXT,
    }


def run(code, names, where):
    exec(compile(code, where, "exec"), names)  # noqa: S102  # our own pages


def set_up(page, names):
    for code in FENCED.findall(split(page)[0]):
        run(code, names, page)


def pattern(symptom):
    """What a message must match: the symptom, with anything for each "…", and a line's end for a space."""
    parts = " ".join(symptom.split()).split("…")
    assert sum(map(len, parts)) >= 20, "too little of the sentence is there to know it by"
    return ".+".join(map(re.escape, parts))


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize(("page", "text"), SECTIONS)
def test_what_is_wrong_raises(page, text, at_hand):
    section = section_of(text)
    set_up(page, at_hand)
    with pytest.raises(ValueError) as caught:
        run(section.wrong, at_hand, "wrong")
    assert type(caught.value) is ERRORS[page]
    assert re.fullmatch(pattern(section.symptom), str(caught.value)), str(caught.value)
    (line,) = (frame.lineno for frame in traceback.extract_tb(caught.value.__traceback__) if frame.filename == "wrong")
    assert line >= ast.parse(section.wrong).body[-1].lineno, "a line before the last one raised"


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize(("page", "text"), SECTIONS)
def test_what_is_right_does_not_raise(page, text, at_hand):
    section = section_of(text)
    assert section.right != section.wrong
    set_up(page, at_hand)
    run(section.right, at_hand, "right")


@pytest.mark.parametrize("options", [{"style": "my.txt", "lambda_": 1.5}, {"style": "king-jams"}])
def test_commands_show_the_same_sentence(options, at_hand):
    with pytest.raises(decoding.DecodingError) as caught:
        decoding.StylePrior(**options)
    given = [word for name, value in options.items() for word in (f"--{name.strip('_')}", str(value))]
    shown = CliRunner().invoke(cli, ["generate", "The captain said", *given])
    assert (shown.exit_code, shown.output) == (2, f"Error: {caught.value}\n")
