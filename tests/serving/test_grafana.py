"""The board in the docs asks for metrics that there are, by labels that they have."""

import json
import re
from pathlib import Path

import pytest

from decoding.vllm.metrics import METRICS

BOARD = json.loads((Path(__file__).parents[2] / "docs" / "grafana.json").read_text(encoding="utf-8"))
OF_VLLM = {  # `test_server.py` sees these on a running server
    "vllm:generation_tokens_total",
    "vllm:prompt_tokens_total",
    "vllm:num_requests_running",
    "vllm:num_requests_waiting",
    "vllm:kv_cache_usage_perc",
    "vllm:time_to_first_token_seconds_bucket",
    "vllm:inter_token_latency_seconds_bucket",
    "vllm:e2e_request_latency_seconds_bucket",
}
LABELS = {
    f"{metric.name}{suffix}": {metric.label, "le" if suffix == "_bucket" else None} - {None}
    for metric in METRICS.values()
    for suffix in (("_bucket", "_sum", "_count") if metric.borders else ("_total",))
} | {name: {"le"} if name.endswith("_bucket") else set() for name in OF_VLLM}
PANELS = [panel for panel in BOARD["panels"] if panel["type"] != "row"]
TARGETS = [target for panel in PANELS for target in panel["targets"]]


@pytest.mark.parametrize("target", TARGETS, ids=lambda target: target["expr"])
def test_expressions_name_metrics_that_exist_and_their_labels(target):
    expression = target["expr"]
    names = re.findall(r"\b(?:vllm|decoding):\w+", expression)
    assert names
    assert set(names) <= set(LABELS)
    labels = {label.strip() for group in re.findall(r"\bby \(([^)]*)\)", expression) for label in group.split(",")}
    known = set.intersection(*(LABELS[name] for name in names))
    assert labels <= known
    assert set(re.findall(r"{{(\w+)}}", target["legendFormat"])) == labels - {"le"}
    words = "|".join((*names, *labels, "sum", "max", "rate", "by", "histogram_quantile"))
    assert re.sub(rf"\b(?:{words})\b|\[\$__rate_interval]|[\d.,()/\s]", "", expression) == ""  # and nothing else
    assert expression.count("(") == expression.count(")")


def test_every_metric_of_ours_is_on_the_board():
    shown = " ".join(target["expr"] for target in TARGETS)
    assert [name for name in METRICS if name not in shown] == []


def test_panels_have_places_of_their_own():
    places = [
        (x, y)
        for panel in BOARD["panels"]
        for x in range(panel["gridPos"]["x"], panel["gridPos"]["x"] + panel["gridPos"]["w"])
        for y in range(panel["gridPos"]["y"], panel["gridPos"]["y"] + panel["gridPos"]["h"])
    ]
    assert len(places) == len(set(places))
    assert max(x for x, _ in places) < 24
    assert len({panel["id"] for panel in BOARD["panels"]}) == len(BOARD["panels"])
    assert {panel["datasource"]["uid"] for panel in PANELS} == {"${datasource}"}
