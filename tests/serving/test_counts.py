"""Counted in one process and read in another."""

import subprocess
import sys

import numpy as np
import pytest

from decoding.vllm import counts
from decoding.vllm.counts import FileCounts, FolderCollector, PrometheusCounts, read_counts
from decoding.vllm.metrics import METRICS, REQUESTS, TEMPERATURE, TOKENS_HELD

prometheus_client = pytest.importorskip("prometheus_client", reason="vLLM brings it")
VALUES = (0.1, 0.4, 0.4, 2.5)


def samples(folder):
    families = FolderCollector(folder).collect()
    return {(each.name, *each.labels.values()): each.value for family in families for each in family.samples}


def test_counts_of_several_processes_are_added_up(tmp_path, monkeypatch):
    assert samples(tmp_path) == {}
    for process in (1, 2):
        monkeypatch.setattr("os.getpid", lambda process=process: process)
        mine = FileCounts(tmp_path)
        for value in VALUES:  # series begin one after the other, between values of those before
            mine.add(TEMPERATURE, value, "CT")
            mine.add(REQUESTS, 1, f"speeches of {process}")
        mine.add(TEMPERATURE, 0.7, "unknown")
        mine.add(TOKENS_HELD, 1000)
        mine.add(TOKENS_HELD, 24)
    found = samples(tmp_path)
    name = TEMPERATURE.name
    wanted = {border: 2 * sum(value <= border for value in VALUES) for border in TEMPERATURE.borders}
    assert {le: found[f"{name}_bucket", "CT", str(le)] for le in TEMPERATURE.borders} == wanted
    assert found[f"{name}_bucket", "CT", "+Inf"] == found[f"{name}_count", "CT"] == 8
    assert found[f"{name}_sum", "CT"] == pytest.approx(6.8)
    assert (found[f"{name}_count", "unknown"], found[f"{name}_sum", "unknown"]) == (2, 1.4)
    assert {key[1] for key in found if key[0].startswith(name)} == {"CT", "unknown"}
    assert [found["decoding:requests_total", f"speeches of {process}"] for process in (1, 2)] == [4, 4]
    assert found["decoding:chunk_tokens_held_total",] == 2 * 1024


def test_files_can_be_read_at_any_time(tmp_path):
    mine, held = FileCounts(tmp_path), {}
    draw = np.random.default_rng(0)
    labels = [None, "ä\n", "λ", "{}", *map(str, range(20))]
    for _ in range(300):
        metric, label = draw.choice(list(METRICS)), labels[draw.integers(len(labels))]
        mine.add(METRICS[metric], float(draw.random()), label)
        held[metric, label] = held.get((metric, label), 0) + 1
        (file,) = tmp_path.iterdir()
        found = read_counts(file)
        assert set(found) == set(held)
        for series, numbers in found.items():
            if METRICS[series[0]].borders:
                assert numbers[:-1].sum() == held[series]


def test_they_are_the_metrics_that_prometheus_makes(tmp_path, monkeypatch):
    registry, own = prometheus_client.CollectorRegistry(), prometheus_client.CollectorRegistry()
    registry.register(FolderCollector(tmp_path))
    collector = counts._collector

    def made(metric):
        each = collector(metric)
        prometheus_client.REGISTRY.unregister(each)
        own.register(each)
        return each

    monkeypatch.setattr(counts, "_collector", made)
    for mine in (FileCounts(tmp_path), PrometheusCounts()):
        for metric in METRICS.values():
            for label in ("a", 'b "c"') if metric.label else (None,):
                for value in (0.3, 1.0, 2.0):
                    mine.add(metric, value, label)

    def lines(each):
        text = prometheus_client.generate_latest(each).decode().splitlines()
        return sorted(line for line in text if "_created" not in line)

    assert lines(registry) == lines(own)
    assert sum(line.startswith("# HELP") for line in lines(own)) == len(METRICS)


def test_metrics_are_named_as_prometheus_wants_them():
    for metric in METRICS.values():
        assert metric.name.startswith("decoding:")
        assert not metric.name.endswith(("_total", "_count", "_sum", "_bucket"))
        assert metric.what.endswith(".")
        assert list(metric.borders) == sorted(set(metric.borders))


ASKED = """
import multiprocessing, os, pathlib
from decoding.vllm import counts
from decoding.vllm.metrics import REQUESTS, TEMPERATURE

def engine():
    counts.publish()  # that of an engine's process leaves its parent's folder as it is
    counts.counts_of_process().add(TEMPERATURE, 0.4, "MT")
    counts.counts_of_process().add(REQUESTS, 2, "mine")

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
    assert 'decoding:requests_total{style="mine"} 2.0' in result.stdout
    assert not list(tmp_path.glob("decoding-counts-*"))  # removed at its end
