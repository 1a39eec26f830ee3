import numpy as np
import pytest
from click.testing import CliRunner

from chunkllm import Reading
from decoding.cli import cli
from experiments.long_context.heat_map import _means, _shares
from tests.conftest import WORDS


@pytest.fixture
def text_file(tmp_path):
    path = tmp_path / "long.txt"
    path.write_text(" ".join(np.random.default_rng(0).choice(WORDS, 400)))
    return path


@pytest.fixture
def draw(model_folder, text_file, tmp_path):
    def run(*more):
        shape = ["--context", "160", "--budget", "90", "--tokens", "30", "--no-adapters"]
        where = ["--model", str(model_folder), "--out", str(tmp_path / "read.png")]
        return CliRunner().invoke(cli, ["chunk", "picture", str(text_file), *where, *shape, *more])

    return run


def test_a_picture_from_the_command_line(draw, tmp_path):
    done = draw("--fact", "the captain said", "--question", "his ship")
    assert done.exit_code == 0, done.output
    assert (tmp_path / "read.png").read_bytes().startswith(b"\x89PNG")
    assert f"look at {tmp_path / 'read.png'}" in done.output


@pytest.mark.parametrize(
    "bad, says",
    [
        (["--context", "1000"], "the text has 400 tokens, not 1000"),
        (["--tokens", "200"], "the model has 256 positions"),
        (["--budget", "200"], "a budget of 200 tokens holds all"),
        (["--depth", "2"], "--depth must lie in"),
    ],
)
def test_bad_input_is_one_line(draw, tmp_path, bad, says):
    done = draw(*bad)
    assert done.exit_code == 2 and says in done.output
    assert not (tmp_path / "read.png").exists()


def test_shares_are_counted_over_layers_and_places():
    """Columns of unlike widths, and some of the places, against loops. All that is new is read."""
    rng = np.random.default_rng(1)
    readings = [Reading(0, length, rng.random((3, length)) < 0.4) for length in (700, 720, 850)]
    shares = _shares(readings, 900)
    for columns in (np.unique(np.linspace(0, 900, 371).astype(int)), np.arange(690, 721)):
        means = _means(shares, columns)
        assert means.shape == (3, len(columns) - 1)
        for line, reading, stop in zip(means, readings, (720, 850, 900), strict=True):
            for found, first, last in zip(line, columns, columns[1:], strict=False):
                known = [reading.kept[:, i].mean() if i < reading.length else 1 for i in range(first, min(last, stop))]
                assert found == pytest.approx(np.mean(known)) if known else np.isnan(found)
