"""The docs' page about GPUs: it says so where nothing was measured, and shows what was."""

import pytest

pytest.importorskip("cogapp", reason="cogapp is not installed")

from figures import data, gpu

from experiments.gpu.pieces import PIECES
from experiments.gpu.record import DONE, Record, close, write
from experiments.gpu.ways import WAYS
from experiments.lab.figures import Figure
from experiments.lab.runs import CELLS
from tests.experiments.gpu.conftest import CARD

TABLES = [gpu.goals, gpu.style, gpu.long_context, *(lambda name=piece.name: gpu.figures(name) for piece in PIECES)]


@pytest.fixture
def folder(tmp_path, monkeypatch):
    monkeypatch.setattr(gpu, "FOLDER", tmp_path)
    return tmp_path


def lines(text):
    return [[cell.strip() for cell in line.split("|")[1:-1]] for line in text.strip().splitlines()]


def test_where_nothing_was_measured_it_says_so(folder):
    assert all(table() == "\nNot measured yet.\n" for table in TABLES)
    assert gpu.place() == "\nNo card has run it yet.\n"
    _, _, *rows = lines(gpu.pieces())
    assert [row[0] for row in rows] == [f"`{piece.name}`" for piece in PIECES]
    assert {row[3] for row in rows} == {"not measured"}
    assert gpu.front()[0].startswith("not measured")


@pytest.mark.slow
@pytest.mark.parametrize("name", ["style", "long-context"])
def test_tables_have_what_a_piece_has_found(folder, toy_record, name):
    record = toy_record(name)
    write(folder / CELLS / f"{name}.json", record)
    shown = {each["what"]: each["shown"] for each in record["figures"]}
    heads, _, *rows = lines(gpu.style() if name == "style" else gpu.long_context())
    assert len({len(row) for row in [heads, *rows]}) == 1
    cells = [cell for row in rows for cell in row[1:]]
    assert "not measured" not in cells and set(cells) <= set(shown.values())
    assert len(rows) == (len(WAYS) if name == "style" else len(record["settings"]["cells"]))
    if name == "long-context":
        assert rows[1][3] == shown["toy, 400 tokens, batch 2: 128 tokens kept, against best dense, both replayed"]
        assert rows[1][4] == shown["toy, 400 tokens, batch 2: 200 tokens kept, against best dense, both replayed"]
    assert len(lines(gpu.figures(name))) == 2 + len(shown)


def test_goals_say_what_was_missed_and_the_card_has_its_name(folder):
    path = folder / CELLS / "style.json"
    record = Record(path, "style", CARD, {}, is_toy=False)
    record.check("right", lambda: (True, ""))
    record.figure(Figure("a step", 31.0, "31 µs", "≤ 30 µs", False), "right")
    record.figure(Figure("another", 20.0, "20 µs", "≤ 30 µs", True), "right")
    record.figure(Figure("without a goal", 5.0, "5 µs"), "right")
    close(path, "style", DONE, None, 3.0)
    _, _, *rows = lines(gpu.goals())
    assert rows == [["a step", "31 µs", "≤ 30 µs, missed"], ["another", "20 µs", "≤ 30 µs"]]
    assert gpu.front()[:2] == ["1 of 2 goals for speed met", "NVIDIA H200"]
    assert gpu.place().startswith("\nNVIDIA H200, 150 GiB")
    assert "done; 1 of 1 checks passed" in gpu.pieces()


def test_what_is_committed_was_measured_on_a_card():
    if not (data.DOCS / "gpu").is_dir():
        pytest.skip("docs/gpu is not there: no card has run the command")
    assert "toy" not in gpu.place()
