"""Distributions of other people whose modules have our names."""

import subprocess
import sys

import pytest

from decoding.neighbours import installed_neighbours


@pytest.fixture
def neighbour(tmp_path, monkeypatch):
    """As pip would leave it, beside us."""

    def install(name):
        info = tmp_path / f"{name}-4.0.3.dist-info"
        info.mkdir()
        (info / "METADATA").write_text(f"Name: {name}\nVersion: 4.0.3\n")
        monkeypatch.syspath_prepend(tmp_path)
        monkeypatch.setenv("PYTHONPATH", str(tmp_path))

    return install


def test_nobody_is_there():
    assert list(installed_neighbours()) == []


@pytest.mark.parametrize(("name", "says"), [("ngram", "has a package ngram"), ("decoding", "uninstall both")])
def test_one_sentence_says_who_is_there(neighbour, name, says):
    neighbour(name)
    (sentence,) = installed_neighbours()
    assert says in sentence and "4.0.3" in sentence and "\n" not in sentence


@pytest.mark.slow
def test_the_command_line_says_so_once_and_works(neighbour):
    neighbour("ngram")
    done = subprocess.run([sys.executable, "-m", "decoding", "style", "--help"], capture_output=True, text=True)
    assert done.returncode == 0 and "Commands:" in done.stdout
    assert done.stderr.count("another project's") == 1


@pytest.mark.slow
@pytest.mark.parametrize(("module", "arguments"), [("decoding.models", ["generate", "x"]), ("decoding.errors", [])])
def test_a_broken_installation_is_said_in_a_line(neighbour, tmp_path, module, arguments):
    neighbour("decoding")
    stub = f"import sys; sys.modules[{module!r}] = type(sys)({module!r})\n"  # theirs, in place of ours
    code = f"{stub}sys.argv = {['decoding', *arguments]}\nfrom decoding.__main__ import main; main()"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert done.returncode == 2
    assert (
        done.stderr.splitlines()[1].startswith("Error: the installation is broken") and "Traceback" not in done.stderr
    )
