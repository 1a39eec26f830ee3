"""What a `Policy` saves opens anywhere, and nothing else does."""

import gzip
import json
import shutil

import pytest
import torch

from chunkllm import CalibrationConfig, ChunkCalibration, ChunkSelection
from chunkllm.models import model_shape
from decoding import DecodingError, FixedTemperature, NGramModel, Policy, StylePrior
from tests.conftest import TEXT
from tests.decoding.policy.conftest import SMALL


def lines():
    return "\n".join(json.dumps({"text": line, "other": 1}) for line in [TEXT, "rain came as night came on"])


def folder_of_texts(at):
    for name, text in (("one.txt", TEXT), ("more/two.txt", "rain " * 20), ("notes.md", "no"), (".three.txt", "no")):
        (at / name).parent.mkdir(parents=True, exist_ok=True)
        (at / name).write_text(text)
    (at / "more" / "packed.txt.gz").write_bytes(gzip.compress(b"wind took every word away " * 9))
    return at


def prior_at(path, tokenizer):
    NGramModel.train(tokenizer(TEXT)["input_ids"], len(tokenizer), pad_vocab=True).save(path)
    return path


def saved_style(at, tokenizer):
    row = torch.linspace(-2, 2, len(tokenizer))
    prior_at(at.with_suffix(".safetensors"), tokenizer)
    model = NGramModel.load(at.with_suffix(".safetensors"))
    StylePrior(model, λ=0.9, mode="ratio", log_ratio=row, max_js=0.2, tokenizer=tokenizer).save_pretrained(at)
    return at


def written(path, text):
    path.write_text(text)
    return path


def packed(path, text):
    path.write_bytes(gzip.compress(text.encode()))
    return path


# How each kind of style is made in a folder, and what the file then calls it.
STYLES = {
    "text": (lambda at, _: written(at / "my text.txt", TEXT), "./style/my text.txt"),
    "named": (lambda at, _: f"mine={written(at / 'my.txt', TEXT)}", "./style/my.txt"),
    "marks": (lambda at, _: written(at / "a=b#1.txt", TEXT), "./style/a=b#1.txt"),
    "gzip": (lambda at, _: packed(at / "my.txt.gz", TEXT), "./style/my.txt.gz"),
    "field": (lambda at, _: f"{written(at / 'my.jsonl', lines())}#text", "./style/my.jsonl#text"),
    "marked field": (lambda at, _: f"{written(at / 'a=b.jsonl', lines())}#text", "./style/a=b.jsonl#text"),
    "folder": (lambda at, _: folder_of_texts(at / "essays"), "./style/essays"),
    "prior": (lambda at, tokenizer: prior_at(at / "my.safetensors", tokenizer), "./style/my.safetensors"),
    "prior's folder": (
        lambda at, tokenizer: prior_at(at / "mine" / "prior.safetensors", tokenizer).parent,
        "./style/prior.safetensors",
    ),
    "style": (lambda at, tokenizer: saved_style(at / "my-style", tokenizer), "./style/my-style"),
}


@pytest.mark.filterwarnings("ignore:of folder")
@pytest.mark.parametrize("kind", STYLES)
def test_styles_travel(kind, tmp_path, thinking, write, monkeypatch):
    here, there = tmp_path / "here=1", tmp_path / "there=2"
    here.mkdir()
    make, name = STYLES[kind]
    policy = Policy(make(here, thinking), λ=0.8, temperature=1.2)
    wanted = write(policy)
    assert wanted != write(Policy(temperature=1.2))
    policy.save_pretrained(here / "my-policy")
    text = (here / "my-policy" / "policy.json").read_text()
    assert json.loads(text) == {"format": 1, "style": name, "lambda": 0.8, "temperature": 1.2}
    assert str(tmp_path) not in text
    shutil.move(here / "my-policy", there / "moved")
    shutil.rmtree(here)
    assert write(Policy.from_pretrained(there / "moved")) == wanted
    monkeypatch.chdir(there)
    again = Policy.from_pretrained("moved")
    assert write(again) == wanted
    again.save_pretrained("moved")  # onto itself
    assert write(Policy.from_pretrained("moved")) == wanted
    assert not [path for path in there.rglob("*") if path.name.startswith((".", "notes"))]


def test_a_ratio_travels(tmp_path, style_file, write, monkeypatch):
    monkeypatch.setattr("decoding.style.background.openings", lambda: ("the captain", "rain fell"))
    monkeypatch.setattr("decoding.style.background._TOKENS_PER_OPENING", 4)
    policy = Policy(style_file, mode="ratio", λ=0.8, max_js=0.3, temperature=1.2)
    wanted = write(policy)
    assert wanted == write(processors=[StylePrior(style_file, mode="ratio", λ=0.8, max_js=0.3), FixedTemperature(1.2)])
    policy.save_pretrained(tmp_path / "my-policy")
    style_file.unlink()
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "elsewhere"))
    assert write(Policy.from_pretrained(tmp_path / "my-policy")) == wanted


def test_all_parts_travel(parts, tmp_path, write, encoder_folder, adapters_folder, selector_folder, style_file):
    policy = Policy(**parts["all"][0])
    wanted = write(policy)
    policy.save_pretrained(tmp_path / "my-policy")
    config = (tmp_path / "my-policy" / "policy.json").read_text()
    assert json.loads(config) == {
        "format": 1,
        "style": "./style/style.txt",
        "lambda": 0.7,
        "temperature": "auto",
        "think_temperature": 1.5,
        "selector": "./selector",
        "chunks": SMALL | {"adapters": "./adapters"},
    }
    assert sorted(path.name for path in (tmp_path / "my-policy").iterdir()) == [
        "adapters",
        "policy.json",
        "selector",
        "style",
    ]
    moved = shutil.move(tmp_path / "my-policy", tmp_path / "moved")
    for gone in (adapters_folder, selector_folder):
        shutil.rmtree(gone)
    style_file.unlink()
    assert write(Policy.from_pretrained(moved)) == wanted
    Policy.from_pretrained(moved).save_pretrained(moved)  # onto itself
    assert (moved / "policy.json").read_text() == config
    assert write(Policy.from_pretrained(moved)) == wanted


def test_a_calibration_travels_as_adapters_do(tmp_path, write, thinker):
    shape = model_shape(thinker)
    sensitivity = tuple(0.1 * (i + 1) ** 4 for i in range(len(shape.full_layers)))
    calibration = ChunkCalibration(CalibrationConfig(shape, sensitivity))
    calibration.save_pretrained(tmp_path / "my-calibration")
    policy = Policy(chunks=SMALL | {"adapters": tmp_path / "my-calibration"})
    wanted = write(policy)
    assert wanted == write(processors=[ChunkSelection(calibration, **SMALL)])
    policy.save_pretrained(tmp_path / "my-policy")
    shutil.rmtree(tmp_path / "my-calibration")
    assert [path.name for path in (tmp_path / "my-policy" / "adapters").iterdir()] == ["config.json"]
    assert write(Policy.from_pretrained(tmp_path / "my-policy")) == wanted


@pytest.mark.parametrize(
    "fields",
    [
        {},
        {"style": "king-james", "lambda_": "auto", "mode": "ratio", "max_js": 0.05, "steer_stop": True},
        {"temperature": 0.7},
        {"temperature": "auto"},
        {"temperature": 0.7, "think_temperature": 1.0},
        {"chunks": True},
        {"chunks": 512},
        {"chunks": {"retention": 0.5, "vote": True, "adapters": "default"}},
    ],
)
def test_names_stay_names(fields, tmp_path):
    policy = Policy(**fields)
    policy.save_pretrained(tmp_path)
    assert [path.name for path in tmp_path.iterdir()] == ["policy.json"]
    held = json.loads((tmp_path / "policy.json").read_text())
    assert held == {"format": 1} | {name.rstrip("_"): value for name, value in fields.items()}
    assert Policy.from_pretrained(tmp_path) == policy


def test_a_style_that_is_registered_nowhere(tmp_path):
    damaged(tmp_path, {"style": "captains-log"})
    with pytest.raises(DecodingError, match=r"policy.json cannot be used: style .* not 'captains-log': install the"):
        Policy.from_pretrained(tmp_path)


def test_another_policy_in_a_folder_is_replaced(parts, tmp_path, write):
    Policy(**parts["all"][0]).save_pretrained(tmp_path / "my-policy")
    other = Policy(written(tmp_path / "other.txt", "rain " * 50), λ=0.8)
    other.save_pretrained(tmp_path / "my-policy")
    assert sorted(path.name for path in (tmp_path / "my-policy").rglob("*")) == ["other.txt", "policy.json", "style"]
    assert write(Policy.from_pretrained(tmp_path / "my-policy")) == write(other)


def test_what_others_put_there_is_left_alone(style_file, tmp_path):
    theirs = tmp_path / "mine" / "style"
    theirs.mkdir(parents=True)
    written(theirs / "dress.txt", "black")
    with pytest.raises(DecodingError, match="has something called style that no policy put there: save to another"):
        Policy(style_file).save_pretrained(tmp_path / "mine")
    assert [path.name for path in (tmp_path / "mine").rglob("*")] == ["style", "dress.txt"]


def test_copies_do_not_join_a_styles_texts(tmp_path):
    policy = Policy(folder_of_texts(tmp_path / "essays"))
    for name in ("essays", "essays/mine", "other/../essays"):
        with pytest.raises(DecodingError, match="is among the style's own texts"):
            policy.save_pretrained(tmp_path / name)
    policy.save_pretrained(tmp_path / "essays-policy")


def test_a_folder_by_another_name(tmp_path, monkeypatch):
    folder_of_texts(tmp_path / "essays")
    monkeypatch.chdir(tmp_path / "essays" / "more")
    Policy("..").save_pretrained(tmp_path / "mine")
    assert json.loads((tmp_path / "mine" / "policy.json").read_text())["style"] == "./style/essays"
    assert (tmp_path / "mine" / "style" / "essays" / "more" / "two.txt").exists()


def test_what_cannot_be_saved_is_one_error(style_file, tmp_path):
    policy = Policy(style_file)
    with pytest.raises(DecodingError, match="the policy cannot be saved to"):
        policy.save_pretrained(written(tmp_path / "file", ""))
    style_file.unlink()
    with pytest.raises(DecodingError, match=r"the policy cannot be saved to .*style.txt"):
        policy.save_pretrained(tmp_path / "folder")
    assert list((tmp_path / "folder").iterdir()) == []


def damaged(folder, changes):
    folder.mkdir(exist_ok=True)
    text = changes if isinstance(changes, str) else json.dumps({"format": 1} | changes)
    return written(folder / "policy.json", text)


@pytest.mark.parametrize(
    ("changes", "says"),
    [
        ("{", "Expecting property name"),
        ("[1]", "it holds no object of fields"),
        ("[" * 100_000, "recursion"),
        ({"format": "1"}, "format must be 1, not '1'"),
        ({"format": True}, "format must be 1, not True"),
        ({"format": 0}, "format must be 1, not 0"),
        ({"tempo": 3, "beat": 1}, "tempo, beat is no field of a policy"),
        ({"lambda_": 0.5}, "lambda_ is no field"),
        ({"style": 3}, "style must be a registered name"),
        ({"style": "king-james", "lambda": 3}, r"lambda: λ must lie in \[0, 1\]"),
        ('{"format": 1, "style": "king-james", "lambda": NaN}', "lambda: λ must be a finite number"),
        ({"style": "king-james", "mode": ["ratio"]}, r"mode: unknown mode \['ratio'\]"),
        ({"style": "king-james", "max_js": "little"}, "max_js must be a number"),
        ({"lambda": 0.5}, "lambda without a style"),
        ({"temperature": -1}, "temperature must be a positive number"),
        ({"temperature": "Auto"}, "temperature must be"),
        ({"think_temperature": 1}, "think_temperature without the answer's"),
        ({"temperature": "auto", "selector": "/somewhere"}, "selector must be ./selector"),
        ({"temperature": "auto", "selector": "./style"}, "selector must be ./selector"),
        ({"chunks": "many"}, "chunks must be True"),
        ({"chunks": {"budget": 1.5}}, "chunks: budget of chunks must be a whole number"),
        ({"chunks": {"budget": 512, "adapters": "../adapters"}}, "adapters of chunks must be ./adapters"),
    ],
)
def test_a_damaged_file_is_one_error_with_file_and_field(changes, says, tmp_path):
    path = damaged(tmp_path, changes)
    with pytest.raises(DecodingError, match=f"is damaged: .*{says}.*: take a whole copy of its folder, or") as caught:
        Policy.from_pretrained(tmp_path)
    assert str(caught.value).startswith(str(path)) and "\n" not in str(caught.value)


def test_null_is_left_out(tmp_path):
    damaged(tmp_path, {"style": None, "lambda": None, "chunks": None})
    assert Policy.from_pretrained(tmp_path) == Policy()


def test_a_newer_format_wants_an_upgrade(tmp_path):
    damaged(tmp_path, {"format": 2, "tempo": 3})
    with pytest.raises(DecodingError, match="has format 2, which a newer version made: upgrade decoding-middleware"):
        Policy.from_pretrained(tmp_path)


@pytest.mark.parametrize(
    "style",
    [
        "secret.txt",
        "{}/secret.txt",
        "./secret.txt",
        "./style/../../secret.txt",
        "./style/..",
        "./style/",
        "./style/none.txt",
    ]
    + ["../secret.txt", "sub/secret.txt", "me/local", "./style/../../secret.jsonl#text", "./style/x\\..\\y.txt"],
)
def test_a_file_leads_to_its_own_folder_alone(style, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    for name in ("secret.txt", "sub/secret.txt", "me/local/one.txt", "my-policy/style/fine.txt", "secret.jsonl"):
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        written(tmp_path / name, TEXT)
    damaged(tmp_path / "my-policy", {"style": style.format(tmp_path)})
    with pytest.raises(DecodingError, match=r"policy.json (is damaged|cannot be used): style"):
        Policy.from_pretrained("my-policy")


def test_parts_that_are_missing_or_damaged(parts, tmp_path):
    Policy(**parts["all"][0]).save_pretrained(tmp_path / "whole")

    def without(path, cut=False):
        folder = shutil.copytree(tmp_path / "whole", tmp_path / f"without-{path.replace('/', '-')}-{cut}")
        if cut:
            (folder / path).write_bytes((folder / path).read_bytes()[:-100])
        elif (folder / path).is_dir():
            shutil.rmtree(folder / path)
        else:
            (folder / path).unlink()
        with pytest.raises(DecodingError) as caught:
            Policy.from_pretrained(folder)
        assert str(folder) in str(caught.value) and "\n" not in str(caught.value)
        return str(caught.value)

    assert "there is no folder style" in without("style")
    assert "no selector of the policy at" in without("selector")
    assert "there is no folder adapters" in without("adapters")
    assert "style names './style/style.txt', which is not in its folder" in without("style/style.txt")
    assert "there is no policy.json" in without("policy.json")
    assert "temperature_selector.safetensors is damaged" in without("selector/temperature_selector.safetensors", True)
    assert "the adapters at" in without("adapters/model.safetensors", True)


def test_nothing_there():
    with pytest.raises(DecodingError, match="no policy at nobody/nothing, neither a folder nor on the hub"):
        Policy.from_pretrained("nobody/nothing")


def test_to_the_hub_and_back(hub, parts, write, style_file, adapters_folder, selector_folder):
    policy = Policy(**parts["all"][0])
    assert policy.push_to_hub("me/storm", private=True, token="mine") == "https://hub.example/me/storm"
    assert hub.calls == [("token", "mine"), ("private", True)]
    wanted = write(policy)
    style_file.unlink()
    for gone in (adapters_folder, selector_folder):
        shutil.rmtree(gone)
    hub.calls.clear()
    opened = Policy.from_pretrained("me/storm", revision="main", token="mine")
    assert write(opened) == wanted
    assert all(each == {"revision": "main", "token": "mine"} for each in hub.calls) and len(hub.calls) == 4


def test_hub_ids_stay_hub_ids(hub, parts, tmp_path, thinking, write, selector, adapters_folder):
    saved = StylePrior(saved_style(tmp_path / "my-style", thinking), tokenizer=thinking)
    saved.push_to_hub("me/my-style")
    selector.push_to_hub("me/my-selector")
    shutil.copytree(adapters_folder, hub.store / "me" / "my-adapters")
    fields = {"style": "me/my-style", "temperature": "auto", "selector": "me/my-selector"}
    policy = Policy(**fields, chunks={"adapters": "me/my-adapters", **SMALL})
    policy.save_pretrained(tmp_path / "my-policy")
    assert [path.name for path in (tmp_path / "my-policy").iterdir()] == ["policy.json"]
    held = json.loads((tmp_path / "my-policy" / "policy.json").read_text())
    assert held == {"format": 1, **fields, "chunks": {"adapters": "me/my-adapters", **SMALL}}
    assert write(Policy.from_pretrained(tmp_path / "my-policy")) == write(policy)
    assert policy.parts()[0].lambda_ == 0.9, "the saved style's own"
