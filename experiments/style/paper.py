"""The style paper's experiment: three corpora × λ × seeds, beside an unsteered model of the same entropy.

Adding λ · log p to the logits also sharpens the distribution, as a lower temperature does, and a sharper distribution
alone lowers perplexities. So every (style, λ) is set beside the unsteered model, sampled at the temperature that gives
its texts the same mean entropy.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import numpy as np

from decoding.errors import DecodingError
from experiments.style.cells import SweepCell
from experiments.style.report import Point
from experiments.style.sweep import Sweep, points_of

LAMBDAS = (0.0, 0.05, 0.1, 0.2, 0.3, 0.5, 0.8, 1.0)
SEEDS = (0, 1, 2)
TEMPERATURES = (0.2, 0.3, 0.4, 0.5, 0.6, 0.7, 0.8, 0.9)
FILES = {
    "don-quixote": "don_quixote_ormsby_pg996.txt",
    "cnn-highlights": "cnn_dailymail_val.jsonl#highlights",
    "arxiv-abstracts": "arxiv_abstracts_2007.jsonl#abstract",
}


def style_specs(data: Path) -> list[str]:
    """The three corpora as style specs.

    Raises:
        DecodingError: a file is missing.
    """
    missing = [name for name in FILES.values() if not (data / name.partition("#")[0]).is_file()]
    if missing:
        raise DecodingError(f"{data} has no {missing[0].partition('#')[0]}")
    return [f"{style}={data / name}" for style, name in FILES.items()]


def run(sweep: Sweep) -> list[Point]:
    """Runs the sweep, then the unsteered model over temperatures, then at the matching ones."""
    seeds = sweep.options.seeds
    sweep.run(sweep.steering_cells())
    steered = [point for point in points_of(sweep) if point.lambda_ > 0]
    curve = {t: [SweepCell(None, 0.0, t, seed) for seed in seeds] for t in TEMPERATURES}
    sweep.run([cell for cells in curve.values() for cell in cells])
    curve[1.0] = [SweepCell(None, 0.0, 1.0, seed) for seed in seeds]
    entropies = {t: _mean_entropy([sweep.records[cell] for cell in cells]) for t, cells in curve.items()}
    matching = [(point, matching_temperature(entropies, _mean_entropy(point.records))) for point in steered]
    sweep.run([SweepCell(None, 0.0, t, seed) for t in sorted({t for _, t in matching}) for seed in seeds])
    matched = {}
    for point, t in matching:
        records = [sweep.records[SweepCell(None, 0.0, t, seed)] for seed in seeds]
        key = (point.style, point.lambda_)
        matched[key] = Point(*key, "entropy-matched", t, records)
    pairs = [(point, matched.get((point.style, point.lambda_))) for point in points_of(sweep)]
    return [point for pair in pairs for point in pair if point is not None]


def matching_temperature(entropies: dict[float, float], wanted: float) -> float:
    """The temperature, to 0.01, at which the unsteered model's mean entropy is as wanted, by linear interpolation.

    Args:
        entropies: measured mean entropy (nats) by temperature.
        wanted: mean entropy (nats); beyond the measured range the nearest temperature is taken.
    """
    by_entropy = sorted((entropy, t) for t, entropy in entropies.items())
    return round(float(np.interp(wanted, [e for e, _ in by_entropy], [t for _, t in by_entropy])), 2)


def _mean_entropy(records: Sequence[dict]) -> float:
    return float(np.mean([text["entropy"] for record in records for text in record["texts"]]))
