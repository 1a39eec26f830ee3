"""A policy's folder decodes by ``model.generate(custom_generate=…)``, also where this package is not installed."""

import ast
import importlib.util
import json
import os
import subprocess
import sys
import tomllib
from importlib.metadata import PackageNotFoundError
from pathlib import Path
from types import ModuleType

import pytest
import torch

import decoding.policy
from decoding import Policy
from decoding.tokens import continuations
from tests.decoding.policy.conftest import LONG, SMALL

SOURCE = Path(decoding.policy.__file__).with_name("custom_generate.py")
OURS = ("decoding", "ngram", "chunkllm", "experiments")
CODE = """
import importlib.util, json, sys
sys.path.insert(0, sys.argv[1])
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

assert not any(importlib.util.find_spec(name) for name in ("decoding", "ngram", "chunkllm"))
model, tokenizer = (kind.from_pretrained(sys.argv[2]) for kind in (AutoModelForCausalLM, AutoTokenizer))
inputs = tokenizer(json.loads(sys.argv[3]), return_tensors="pt", padding=True, return_token_type_ids=False)
texts = []
for folder in (None, *sys.argv[4:]):
    torch.manual_seed(0)
    custom = {} if folder is None else {"custom_generate": folder, "trust_remote_code": True, "tokenizer": tokenizer}
    ids = model.generate(**inputs, max_new_tokens=24, eos_token_id=None, **custom)
    new = ids[:, inputs["input_ids"].shape[1] :]
    texts.append([text.split() for text in tokenizer.batch_decode(new, skip_special_tokens=True)])
print(json.dumps([texts, sys.modules["decoding"].__file__]))
"""


@pytest.fixture
def strangers(tmp_path):
    """All that is installed here, but for this project."""
    folder = tmp_path / "site-packages"
    folder.mkdir()
    for installed in (Path(path) for path in sys.path if path.endswith("-packages") and Path(path).is_dir()):
        for each in installed.iterdir():
            is_ours = each.name in OURS or each.name.startswith(("decoding_middleware", "__editable__"))
            if not is_ours and not (folder / each.name).exists():
                (folder / each.name).symlink_to(each)
    return folder


@pytest.fixture
def alone():
    spec = importlib.util.spec_from_file_location("generate_alone", SOURCE)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.mark.slow
def test_without_an_installation(tmp_path, strangers, thinker, thinking, parts, write):
    policies = [Policy(), Policy(**parts["guards"][0]), Policy(**parts["all"][0])]
    wanted = [write(None, do_sample=False), *(write(policy) for policy in policies)]
    assert wanted[0] == wanted[1] and len({str(texts) for texts in wanted}) == 3
    for number, policy in enumerate(policies):
        policy.save_pretrained(tmp_path / f"policy-{number}", custom_generate=True)
    thinker.save_pretrained(tmp_path / "model")
    thinking.save_pretrained(tmp_path / "model")
    folders = [str(tmp_path / name) for name in ("model", "policy-0", "policy-1", "policy-2")]
    folders.insert(1, json.dumps(LONG))
    environment = {"PATH": os.environ["PATH"], "HF_HUB_OFFLINE": "1", "HF_HOME": str(tmp_path / "hf")}
    environment |= {"XDG_CACHE_HOME": str(tmp_path / "cache"), "OMP_NUM_THREADS": "1"}
    command = [sys.executable, "-S", "-c", CODE, str(strangers), *folders]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, cwd=tmp_path, check=False)
    assert done.returncode == 0, done.stderr
    texts, ran = json.loads(done.stdout)
    assert texts == [[text.split() for text in batch] for batch in wanted]  # a token is a word
    assert Path(ran) == tmp_path / "policy-0" / "custom_generate" / "packages" / "decoding" / "__init__.py"


@pytest.fixture
def called(alone, thinker, thinking):
    """What the file's function writes, called as transformers calls it."""

    def generate(custom_generate, **options):
        torch.manual_seed(0)
        inputs = thinking(LONG, return_tensors="pt", padding=True, return_token_type_ids=False)
        options = {"tokenizer": thinking, "max_new_tokens": 24, "eos_token_id": None, "streamer": None} | options
        ids = alone.generate(model=thinker, **inputs, **options)
        return continuations(ids, inputs["input_ids"].shape[1], thinking)

    return generate


def test_of_the_hub_and_with_an_installation(tmp_path, parts, write, called, monkeypatch):
    policy = Policy(**parts["λ"][0])
    policy.save_pretrained(tmp_path / "saved", custom_generate=True)
    asked = []

    def download(repo_id, allow_patterns, **hub):
        asked.append((repo_id, hub))
        return str(tmp_path / "saved")

    monkeypatch.setattr("huggingface_hub.snapshot_download", download)
    assert called("me/storm", revision="v1", token="mine") == write(policy) != write()
    assert asked == [("me/storm", {"revision": "v1", "token": "mine"})]


def test_a_policy_that_was_saved_anew_is_opened_anew(tmp_path, parts, write, called):
    for strength in (0.2, 0.9):
        policy = Policy(**parts["style"][0], λ=strength)
        policy.save_pretrained(tmp_path / "saved", custom_generate=True)
        os.utime(tmp_path / "saved" / "policy.json", (strength, strength))
        assert called(str(tmp_path / "saved")) == write(policy)


def test_what_cannot_be(tmp_path, called, alone, thinker, thinking, monkeypatch):
    Policy(temperature=0.5).save_pretrained(tmp_path, custom_generate=True)
    with pytest.raises(ValueError, match="needs the model's tokenizer: model.generate"):
        called(str(tmp_path), tokenizer=None)
    with pytest.raises(ValueError, match="call this as model.generate"):
        alone.generate(model=thinker, tokenizer=thinking)
    with pytest.raises(ValueError, match="do_sample=False and a processor that sets the temperature"):
        called(str(tmp_path), do_sample=False)

    def nothing(name):
        raise PackageNotFoundError(name)

    monkeypatch.setattr(alone, "version", nothing)
    monkeypatch.delitem(sys.modules, "decoding.generation")
    monkeypatch.setitem(sys.modules, "decoding", ModuleType("decoding"))
    with pytest.raises(ImportError, match="another project's, leave it out of the environment"):
        called(str(tmp_path))


def test_what_is_carried_goes_when_the_policy_is_saved_without(tmp_path, parts):
    policy = Policy(**parts["chunks"][0])
    policy.save_pretrained(tmp_path / "saved", custom_generate=True)
    assert {path.name for path in (tmp_path / "saved").iterdir()} == {"policy.json", "custom_generate"}
    assert Policy.from_pretrained(tmp_path / "saved") == policy
    policy.save_pretrained(tmp_path / "saved")
    assert [path.name for path in (tmp_path / "saved").iterdir()] == ["policy.json"]
    assert policy.chunks == SMALL


def test_requirements_are_what_the_carried_packages_import(tmp_path):
    """And are the project's own floors."""
    Policy().save_pretrained(tmp_path, custom_generate=True)
    lines = (tmp_path / "custom_generate" / "requirements.txt").read_text().splitlines()[1:]
    project = tomllib.loads((SOURCE.parents[2] / "pyproject.toml").read_text(encoding="utf-8"))["project"]
    assert set(lines) < set(project["dependencies"])
    imported = set()
    for path in (tmp_path / "custom_generate").rglob("*.py"):
        for node in ast.parse(path.read_text(encoding="utf-8")).body:
            if isinstance(node, ast.Import):
                imported |= {each.name.partition(".")[0] for each in node.names}
            if isinstance(node, ast.ImportFrom):
                imported.add(node.module.partition(".")[0])
    imported.discard("triton")  # which is imported where there is one, and a card for it
    named = {line.partition(">=")[0].lower().replace("-", "_") for line in lines}
    assert imported - set(sys.stdlib_module_names) - set(OURS) == named - {"jinja2"}  # which transformers asks for
