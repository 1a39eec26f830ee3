"""The tables of docs/temperature are what its committed scores come to."""

import json
from pathlib import Path

from experiments.temperature.evaluate import tables
from experiments.temperature.report import markdown_of

PUBLISHED = Path(__file__).parents[3] / "docs" / "temperature"


def test_the_published_tables_are_made_of_the_published_scores():
    results = json.loads((PUBLISHED / "results.json").read_text())
    again = json.loads(json.dumps(tables(json.loads((PUBLISHED / "scores.json").read_text()))))
    assert again == {key: results[key] for key in again}
    assert markdown_of(results) == (PUBLISHED / "results.md").read_text()


def test_what_generate_chose_is_what_the_selector_chooses():
    for model in json.loads((PUBLISHED / "scores.json").read_text())["models"]:
        for task in model["tasks"]:
            shipped = task["chosen"].get("selector, through generate")
            assert (shipped is not None) == (task["ability"] is not None)
            for one, other in zip(shipped or [], task["chosen"]["selector, curve"], strict=False):
                assert one is None or one == other
