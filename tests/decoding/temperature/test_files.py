"""Saved selectors: damaged ones are one error, and whole ones open wherever they are put."""

import json
import shutil

import pytest
import torch
from safetensors.torch import load_file, save_file
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import BertConfig, BertModel, PreTrainedTokenizerFast

from decoding import DecodingError, TemperatureSelector
from decoding.temperature.encoder import load_encoder
from decoding.temperature.files import CONFIG_FILE, ENCODER_FOLDER, HEADS_FILE
from decoding.temperature.heads import AbilityHead, CurveHead

PROMPTS = ["cause storm because", "write poem storm", "example : sea", "tell men", "translate german", "summarize him"]
REMEDY = "make it again with `decoding temperature train`"


def make_selector(encoder):
    vectors = encoder(PROMPTS).repeat(8, 1)
    generator = torch.Generator().manual_seed(0)
    whole = vectors[:, :32] + 0.01 * torch.randn(48, 32, generator=generator)
    own = AbilityHead.fit(whole, list(range(6)) * 8, 6)
    # A curve as version 0.1 made them, of 6 components.
    curve = CurveHead(
        torch.tensor([0.1, 0.7, 1.3]),
        torch.tensor([0]),
        torch.zeros(32),
        torch.randn(6, 32, generator=generator),
        torch.rand(13, 3, generator=generator),
        torch.eye(13).repeat(3, 1, 1),
    )
    ability = AbilityHead.fit_hidden(vectors, list(range(6)) * 8, 6, torch.ones(48))
    return TemperatureSelector(encoder, ability, curve, curve_ability=own, about={"model": "a model"})


@pytest.fixture(scope="module")
def saved(tmp_path_factory, encoder_folder):
    folder = tmp_path_factory.mktemp("saved") / "s"
    make_selector(load_encoder(str(encoder_folder), 16)).save_pretrained(folder)
    return folder


@pytest.fixture
def folder(saved, tmp_path):
    return shutil.copytree(saved, tmp_path / "s")


@pytest.fixture
def no_encoder(monkeypatch):
    """Fails if an encoder is loaded, which is slow: a selector is refused before that."""
    monkeypatch.setattr("decoding.temperature.files.load_encoder", lambda *_: pytest.fail("an encoder was loaded"))


def refusal(folder):
    with pytest.raises(DecodingError) as caught:
        TemperatureSelector.from_pretrained(folder)
    return str(caught.value)


@pytest.mark.parametrize(
    ("name", "value", "must"),
    [
        ("tolerance", "x", "must be a number from 0 to 1, not 'x'"),
        ("tolerance", 1.5, "must be a number from 0 to 1, not 1.5"),
        ("tolerance", True, "must be a number from 0 to 1, not True"),
        ("caution", float("nan"), "must be a number of at least 0, not nan"),
        ("caution", -1, "must be a number of at least 0, not -1"),
        ("caution", None, "must be a number of at least 0, not None"),
        ("window", 10**9, "must be a whole number from 8 to 65536, not 1000000000"),
        ("window", 16.0, "must be a whole number from 8 to 65536, not 16.0"),
        ("window", 7, "must be a whole number from 8 to 65536, not 7"),
        ("multilingual", 0, "must be true or false, not 0"),
        ("about", ["a model"], "must be an object, not ['a model']"),
        ("about", [0] * 99, "must be an object, not [0, 0, 0"),
        ("encoder", 3, "must be a name, not 3"),
        ("encoder", " ", "must be a name, not ' '"),
        ("encoder_fingerprint", None, "must be a text, not None"),
        ("abilities", ["CR"], "must be the list CR, CT, ICL, IF, MT, SUMM, not ['CR']"),
        ("format", "2", "must be 1 to 2, not '2'"),
        ("format", True, "must be 1 to 2, not True"),
        ("format", [], "must be 1 to 2, not []"),
        ("format", 0, "must be 1 to 2, not 0"),
    ],
)
def test_a_setting_of_the_wrong_kind(folder, no_encoder, name, value, must):
    path = folder / CONFIG_FILE
    path.write_text(json.dumps(json.loads(path.read_text()) | {name: value}))
    said = refusal(folder)
    assert said.startswith(f"{path} is damaged: {name} {must}") and said.endswith(REMEDY) and len(said) < 400


@pytest.mark.parametrize(
    "name", ["abilities", "encoder", "encoder_fingerprint", "window", "multilingual", "tolerance", "caution", "about"]
)
def test_a_missing_setting(folder, no_encoder, name):
    path = folder / CONFIG_FILE
    config = json.loads(path.read_text())
    del config[name]
    path.write_text(json.dumps(config))
    assert refusal(folder).startswith(f"{path} is damaged: {name} is missing: ")


@pytest.mark.parametrize("content", [b"", b"{", b"\xff\xfe{}", b"[" * 10**5, b"[]", b"3", b'{"format": 2}'])
def test_settings_that_are_none(folder, no_encoder, content):
    (folder / CONFIG_FILE).write_bytes(content)
    assert refusal(folder).startswith(f"{folder / CONFIG_FILE} is damaged: ")


def test_a_newer_format(folder, no_encoder):
    path = folder / CONFIG_FILE
    path.write_text(json.dumps({"format": 3, "whatever": "it has"}))
    assert refusal(folder) == f"{path} has format 3, which a newer version made: upgrade decoding-middleware"


CUT = slice(0, -1)
TENSORS = [
    ("ability.weight", lambda t: t[CUT], "must be float32 [6, 192], not float32 [5, 192]"),
    ("ability.weight", lambda t: t[:, CUT], "must be float32 [6, 192], not float32 [6, 191]"),
    ("ability.bias", lambda t: t[CUT], "must be float32 [6], not float32 [5]"),
    ("ability.hidden", lambda t: t[0], "must be float32 [units, width], not float32 [96]"),
    ("ability.hidden_bias", lambda t: t[:, None], "must be float32 [192], not float32 [192, 1]"),
    ("ability.hidden_bias", lambda t: None, "is missing"),
    ("ability.weight", lambda t: t.double(), "must be float32 [6, 192], not float64 [6, 192]"),
    ("ability.bias", lambda t: t.index_fill(0, torch.tensor([2]), torch.nan), "holds numbers that are not finite"),
    ("curve_ability.weight", lambda t: t[:, 0], "must be float32 [6, width], not float32 [6]"),
    ("curve_ability.weight", lambda t: t.repeat(1, 4), "curve_ability reads vectors of 128 numbers, and ability of 96"),
    ("curve.temperatures", lambda t: t.flip(0), "must be positive numbers that ascend"),
    ("curve.temperatures", lambda t: t - 0.1, "must be positive numbers that ascend"),
    ("curve.temperatures", lambda t: t / 0, "holds numbers that are not finite"),
    ("curve.temperatures", lambda t: t[CUT], "curve.coefficients must be float32 [13, 2], not float32 [13, 3]"),
    ("curve.fixed", lambda t: t + 3, "must be from 0 to 2, the place of a temperature, not 3"),
    ("curve.fixed", lambda t: t.float(), "must be int64 [1], not float32 [1]"),
    ("curve.centre", lambda t: t[CUT], "must be float32 [32], not float32 [31]"),
    ("curve.components", lambda t: t[:, CUT], "must be float32 [components, 32], not float32 [6, 31]"),
    ("curve.components", lambda t: t[0, 0], "must be float32 [components, 32], not float32 []"),
    ("curve.coefficients", lambda t: t[CUT], "must be float32 [13, 3], not float32 [12, 3]"),
    ("curve.errors", lambda t: t[:, CUT], "must be float32 [3, 13, 13], not float32 [3, 12, 13]"),
    ("curve.errors", lambda t: None, "is missing"),
    ("curve.more", lambda t: torch.ones(1), "is no part of a selector"),
    ("more", lambda t: torch.ones(1), "is no part of a selector"),
]


@pytest.mark.parametrize(("name", "change", "must"), TENSORS)
def test_a_tensor_of_the_wrong_shape(folder, no_encoder, name, change, must):
    path = folder / HEADS_FILE
    tensors = load_file(path)
    changed = change(tensors.pop(name, None))
    tensors |= {} if changed is None else {name: changed.contiguous()}
    save_file(tensors, path)
    said = refusal(folder)
    assert said.startswith(f"{path} is damaged: curve" if "curve" in must else f"{path} is damaged: {name} {must}")
    assert must in said and said.endswith(REMEDY)


@pytest.mark.parametrize("kept", [0, 7, 40, 500, -1])
def test_heads_cut_short(folder, no_encoder, kept):
    path = folder / HEADS_FILE
    path.write_bytes(path.read_bytes()[:kept])
    said = refusal(folder)
    assert said.startswith(f"{path} is damaged: ") and said.endswith(REMEDY)


@pytest.mark.parametrize("file", [CONFIG_FILE, HEADS_FILE])
def test_a_missing_file(folder, no_encoder, file):
    (folder / file).unlink()
    assert refusal(folder) == f"no temperature selector at {folder}: there is no {file}"


def test_nothing_there():
    with pytest.raises(DecodingError, match="no temperature selector at nobody/nothing"):
        TemperatureSelector.from_pretrained("nobody/nothing")


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"encoder_fingerprint": "0"}, "were trained on another encoder than this"),
        ({"window": 64}, "the window must be 8 to 32 tokens for encoder"),
        ({"encoder": "nobody/nothing"}, "cannot load encoder nobody/nothing"),
    ],
)
def test_an_encoder_that_does_not_fit(folder, changes, message):
    path = folder / CONFIG_FILE
    path.write_text(json.dumps(json.loads(path.read_text()) | changes))
    said = refusal(folder)
    assert message in said and str(path) in said and "decoding temperature train" in said


@pytest.mark.parametrize("file", ["model.safetensors", "config.json", "tokenizer.json"])
def test_an_encoder_cut_short(folder, file):
    path = folder / ENCODER_FOLDER / file
    path.write_bytes(path.read_bytes()[:-100])
    assert "cannot load encoder" in refusal(folder)
    shutil.rmtree(path.parent)
    assert refusal(folder) == f"no encoder at {folder}: there is no folder {ENCODER_FOLDER}"


def test_what_no_folder_can_hold_is_not_written(encoder, tmp_path):
    selector = make_selector(encoder)
    selector.tolerance = "x"
    with pytest.raises(DecodingError, match="cannot be saved: tolerance must be a number from 0 to 1, not 'x'"):
        selector.save_pretrained(tmp_path / "s")
    selector.tolerance, selector.curve = 0.01, selector.curve._replace(fixed=torch.tensor([3]))
    with pytest.raises(DecodingError, match="cannot be saved: curve.fixed must be from 0 to 2"):
        selector.save_pretrained(tmp_path / "s")
    selector.curve, selector.about = selector.curve._replace(fixed=torch.tensor([0])), {"model": torch.ones(1)}
    with pytest.raises(DecodingError, match="cannot be saved: .*Tensor"):
        selector.save_pretrained(tmp_path / "s")
    assert not (tmp_path / "s").exists()


def test_an_encoder_of_a_folder_goes_where_its_selector_goes(encoder_folder, tmp_path):
    own = shutil.copytree(encoder_folder, tmp_path / "bert")
    selector = make_selector(load_encoder(str(own), 16))
    wanted = selector.select(PROMPTS, policy="curve"), selector.abilities(PROMPTS)
    selector.save_pretrained(tmp_path / "here" / "s")
    shutil.rmtree(own)
    moved = shutil.move(tmp_path / "here", tmp_path / "there") / "s"
    config = (moved / CONFIG_FILE).read_text()
    assert json.loads(config)["encoder"] == ENCODER_FOLDER and str(tmp_path) not in config
    opened = TemperatureSelector.from_pretrained(moved)
    assert opened.select(PROMPTS, policy="curve") == wanted[0]
    assert torch.equal(opened.abilities(PROMPTS), wanted[1])
    opened.save_pretrained(tmp_path / "again")
    assert torch.equal(TemperatureSelector.from_pretrained(tmp_path / "again").abilities(PROMPTS), wanted[1])


def test_an_encoder_of_a_folder_goes_to_the_hub_and_back(hub, encoder_folder):
    selector = make_selector(load_encoder(str(encoder_folder), 16))
    selector.push_to_hub("me/storm")
    opened = TemperatureSelector.from_pretrained("me/storm", revision="main")
    assert hub.patterns == ["encoder/*"]
    assert torch.equal(opened.abilities(PROMPTS), selector.abilities(PROMPTS))


@pytest.fixture(scope="module")
def multilingual_folder(tmp_path_factory):
    """A tiny BERT with as many entries in its vocabulary as multilingual ones have."""
    vocabulary = {"[PAD]": 0, "[UNK]": 1, "[CLS]": 2, "[SEP]": 3}
    words = " ".join([*PROMPTS, "schreibe ein gedicht über das meer", "重 要 的 海"]).split()
    for word in [*words, *(f"word{i}" for i in range(100_000))]:
        vocabulary.setdefault(word, len(vocabulary))
    inner = Tokenizer(models.WordLevel(vocabulary, unk_token="[UNK]"))
    inner.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    folder = tmp_path_factory.mktemp("multilingual")
    marks = {"pad_token": "[PAD]", "unk_token": "[UNK]", "cls_token": "[CLS]", "sep_token": "[SEP]"}
    PreTrainedTokenizerFast(tokenizer_object=inner, **marks).save_pretrained(folder)
    shape = {"hidden_size": 16, "num_hidden_layers": 2, "num_attention_heads": 2, "intermediate_size": 32}
    torch.manual_seed(0)
    config = BertConfig(vocab_size=len(vocabulary), max_position_embeddings=32, initializer_range=0.5, **shape)
    BertModel(config).save_pretrained(folder)
    return folder


def test_a_large_vocabulary_reads_every_language(multilingual_folder, tmp_path):
    selector = make_selector(load_encoder(str(multilingual_folder), 16))
    foreign = ["schreibe ein gedicht über das meer", "重 要 的 海"]
    selector.save_pretrained(tmp_path / "s")
    assert json.loads((tmp_path / "s" / CONFIG_FILE).read_text())["multilingual"] is True
    opened = TemperatureSelector.from_pretrained(tmp_path / "s")
    assert opened.reads(foreign) == [True, True]
    shares = opened.abilities(foreign)
    assert torch.equal(shares, selector.ability(selector.encoder(foreign)))
    assert (shares.amax(1) > 1 / 6 + 0.01).all()
    opened.encoder.multilingual = False
    assert opened.reads(foreign) == [False, False]
