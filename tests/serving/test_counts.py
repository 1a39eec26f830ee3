"""Chosen temperatures, counted in one process and read in another."""

import subprocess
import sys

import pytest

from decoding.vllm import counts
from decoding.vllm.counts import BORDERS, KINDS, FileCounts, FolderCollector
from decoding.vllm.temperatures import PromptTemperatures
from tests.serving.conftest import FakeFrame, fake_temperature

prometheus_client = pytest.importorskip("prometheus_client", reason="vLLM brings it")


def samples(folder):
    (family,) = FolderCollector(folder).collect()
    return {(each.name.partition("temperature")[2], *each.labels.values()): each.value for each in family.samples}


def test_counts_of_several_processes_are_one_histogram(tmp_path, monkeypatch):
    assert samples(tmp_path) == {}
    for process in (1, 2):
        monkeypatch.setattr("os.getpid", lambda process=process: process)
        mine = FileCounts(tmp_path)
        for value in (0.1, 0.4, 0.4, 2.5):
            mine.add("CT", value)
        mine.add("unknown", 0.7)
    found = samples(tmp_path)
    wanted = {border: 2 * sum(value <= border for value in (0.1, 0.4, 0.4, 2.5)) for border in BORDERS}
    assert {le: found["_bucket", "CT", str(le)] for le in BORDERS} == wanted
    assert found["_bucket", "CT", "+Inf"] == found["_count", "CT"] == 8
    assert found["_sum", "CT"] == pytest.approx(6.8)
    assert (found["_count", "unknown"], found["_sum", "unknown"]) == (2, 1.4)
    assert {key[1] for key in found} == {"CT", "unknown"}


def test_it_is_the_histogram_that_prometheus_makes(tmp_path):
    registry = prometheus_client.CollectorRegistry()
    registry.register(FolderCollector(tmp_path))
    own = prometheus_client.CollectorRegistry()
    about = {"labelnames": ["ability"], "buckets": BORDERS, "registry": own}
    histogram = prometheus_client.Histogram("decoding:chosen_temperature", counts._WHAT, **about)
    mine = FileCounts(tmp_path)
    for kind, value in (("MT", 0.3), ("MT", 1.0), ("CR", 2.0)):
        mine.add(kind, value)
        histogram.labels(kind).observe(value)

    def lines(each):
        text = prometheus_client.generate_latest(each).decode().splitlines()
        return sorted(line for line in text if "_created" not in line)

    assert lines(registry) == lines(own)


ASKED = """
import multiprocessing, os, pathlib
from decoding.vllm import counts

def engine():
    counts.publish()  # that of an engine's process leaves its parent's folder as it is
    counts.counts_of_process().add("MT", 0.4)

if __name__ == "__main__":
    counts.publish()
    from prometheus_client import REGISTRY, generate_latest, multiprocess, CollectorRegistry
    process = multiprocessing.get_context("spawn").Process(target=engine)
    process.start()
    process.join()
    if "PROMETHEUS_MULTIPROC_DIR" in os.environ:
        REGISTRY = CollectorRegistry()
        multiprocess.MultiProcessCollector(REGISTRY)
    print(generate_latest(REGISTRY).decode())
"""


@pytest.mark.slow
@pytest.mark.parametrize("is_shared_by_prometheus", [False, True])
def test_a_server_shows_what_its_engines_process_counts(tmp_path, monkeypatch, is_shared_by_prometheus):
    monkeypatch.delenv(counts.COUNTS_VARIABLE, raising=False)
    if is_shared_by_prometheus:  # as vLLM says with several API servers
        (tmp_path / "shared").mkdir()
        monkeypatch.setenv("PROMETHEUS_MULTIPROC_DIR", str(tmp_path / "shared"))
    monkeypatch.setenv("TMPDIR", str(tmp_path))
    script = tmp_path / "asked.py"
    script.write_text(ASKED)
    result = subprocess.run([sys.executable, script], capture_output=True, text=True)
    assert 'decoding:chosen_temperature_bucket{ability="MT",le="0.4"} 1.0' in result.stdout, result.stderr
    assert 'decoding:chosen_temperature_bucket{ability="MT",le="0.3"} 0.0' in result.stdout
    assert not list(tmp_path.glob("decoding-counts-*"))  # removed at its end


class Listing:
    def __init__(self):
        self.added = []

    def add(self, kind, temperature):
        self.added.append((kind, temperature))


def test_every_request_counts_also_of_prompts_that_are_remembered(selector):
    listing = Listing()
    choose = PromptTemperatures(selector, FakeFrame(), "medium", counts=listing)
    choose([[1, 2], [3], None])
    choose([[3]])
    choose([])
    values = [fake_temperature(prompt) for prompt in ([1, 2], [3], [3])]
    kinds = [KINDS[int(8 * value) % 6] for value in values]
    assert listing.added == [*zip(kinds[:2], values[:2], strict=True), ("unknown", 1.75), (kinds[2], values[2])]


def test_what_cannot_be_counted_stops_no_engine(selector, monkeypatch, caplog):
    class Full:
        def add(self, kind, temperature):
            raise OSError("no space left on device")

    choose = PromptTemperatures(selector, FakeFrame(), "medium", counts=Full())
    assert float(choose([[3]])[0]) == fake_temperature([3])
    assert "no longer counted" in caplog.text
    assert float(choose([[4]])[0]) == fake_temperature([4])
    monkeypatch.setenv(counts.COUNTS_VARIABLE, "/not/there")
    monkeypatch.delenv("PROMETHEUS_MULTIPROC_DIR", raising=False)
    assert counts.counts_of_process.__wrapped__() is None
    monkeypatch.delenv(counts.COUNTS_VARIABLE)
    assert counts.counts_of_process.__wrapped__() is None
