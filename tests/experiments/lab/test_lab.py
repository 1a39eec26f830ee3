import json
from dataclasses import dataclass

import numpy as np
import pytest
from markdown_it import MarkdownIt
from scipy import stats

from decoding import DecodingError
from experiments.lab.cells import Cell
from experiments.lab.figures import ratio_of
from experiments.lab.runs import RunFolder, cpu_hours, finish, settings_of
from experiments.lab.stats import Estimate, interval
from experiments.lab.tables import markdown, plus_minus


@pytest.mark.parametrize("count", [2, 7, 40])
@pytest.mark.parametrize("is_log", [False, True])
def test_intervals_are_scipys(count, is_log):
    values = np.random.default_rng(count).standard_normal(count)
    drawn = {"n_resamples": 2000, "method": "percentile", "random_state": np.random.default_rng(0)}
    wanted = stats.bootstrap((values,), np.mean, **drawn).confidence_interval
    got = interval("x", values, is_log)
    numbers = np.array([values.mean(), wanted.low, wanted.high])
    np.testing.assert_allclose([got["x"], got["x_low"], got["x_high"]], np.exp(numbers) if is_log else numbers)


def test_what_has_no_interval():
    assert interval("x", None, False) == {"x": None, "x_low": None, "x_high": None}
    assert interval("x", np.array([1.0, np.nan]), False)["x"] is None
    assert interval("x", np.array([3.0]), False) == {"x": 3.0, "x_low": None, "x_high": None}
    assert interval("x", np.array([3.0, 3.0]), False) == {"x": 3.0, "x_low": 3.0, "x_high": 3.0}


def test_estimates_as_text():
    assert Estimate(0.5, 0.25, 0.75).shown(100) == "50.0 [25.0, 75.0]"


def test_errors_as_text():
    assert plus_minus(0.0004, 0.0001, 2, 1e3) == "0.40 ± 0.10"
    assert plus_minus(1.0, None, 1) == "1.0"


def test_a_table_keeps_what_stands_in_its_cells():
    lines = [["a|b", "`x|y`"], ["||", "c"]]
    tokens = MarkdownIt("commonmark").enable("table").parse(markdown(lines))
    assert [token.content for token in tokens if token.type == "inline"] == [cell for line in lines for cell in line]


@dataclass(frozen=True)
class Named(Cell):
    name: str

    @property
    def label(self):
        return "".join(c if c.isalnum() else "_" for c in self.name)


def test_cells_whose_labels_are_alike_have_keys_of_their_own():
    names = ["a|b", "a/b", "a_b", "日本語", "..", "a" * 40]
    assert len({Named(name).key for name in names}) == len(names)

    @dataclass(frozen=True)
    class Plain(Cell):
        name: str

    for name in names:
        assert "/" not in Plain(name).key and Plain(name).key not in (".", "..")


def test_a_record_is_found_under_the_label_that_it_had(tmp_path):
    folder = RunFolder(tmp_path / "run", {}, False)
    (folder.path / "cells" / "a_b.json").write_text('{"old": true}')
    records = finish(folder, [Named("a|b"), Named("c")], lambda cell: {"name": cell.name})
    assert records[Named("a|b")] == {"old": True}
    new = records[Named("c")]
    assert new == {"name": "c", "cpu_seconds": new["cpu_seconds"]} and 0 <= new["cpu_seconds"] < 1
    assert cpu_hours(records.values()) == new["cpu_seconds"] / 3600
    assert {path.stem for path in (folder.path / "cells").iterdir()} == {"a_b", Named("c").key}


def test_a_setting_that_the_run_did_not_keep_yet_is_no_other(tmp_path, model, tokenizer):
    settings = settings_of("tiny", model, tokenizer)
    assert set(settings) == {"model", "model_fingerprint", "dtype", "tokenizer_sha256"}
    before = {key: value for key, value in settings.items() if key != "tokenizer_sha256"}
    RunFolder(tmp_path / "run", before, False)
    RunFolder(tmp_path / "run", settings, True)
    assert json.loads((tmp_path / "run" / "run.json").read_text())["tokenizer_sha256"] == settings["tokenizer_sha256"]
    with pytest.raises(DecodingError, match="another tokenizer_sha256"):
        RunFolder(tmp_path / "run", settings | {"tokenizer_sha256": "0"}, True)
    with pytest.raises(DecodingError, match="another more"):
        RunFolder(tmp_path / "run", settings | {"more": 1}, True)


def test_brackets_are_quartiles_of_the_rounds_ratios():
    times, baseline = np.array([2.0, 4.0, 9.0, 8.0]), np.array([1.0, 2.0, 3.0, 8.0])
    ratio, shown = ratio_of(times, baseline)
    low, middle, high = np.quantile([2, 2, 3, 1], (0.25, 0.5, 0.75))
    assert ratio == middle and shown == f"{middle:.2f}× [{low:.2f}, {high:.2f}]"
