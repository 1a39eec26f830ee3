"""``decoding bench gpu``."""

from __future__ import annotations

import sys
from functools import partial
from pathlib import Path
from typing import Any

import click

from decoding.cli import options as shared
from decoding.errors import DecodingError


@click.command(name="gpu")
@shared.out
@click.option("--only", multiple=True, help="A piece, by name. May repeat; all by default.")
@click.option(
    "--minutes",
    type=click.FloatRange(min=0, min_open=True),
    default=8,
    show_default=True,
    help="For all pieces that are run: what does not fit is left out.",
)
@click.option(
    "--toy", is_flag=True, help="At toy sizes, also on a CPU: to see that all of it runs. Nothing is a speed."
)
@shared.resume
def bench_gpu(out: Path | None, only: tuple[str, ...], minutes: float, toy: bool, resume: bool) -> None:
    """Measures everything on a GPU, piece by piece. Let the machine be idle.

    What was found is in OUT at any time. The exit status is 1 if a piece failed or ran out of time, or a check failed.
    """
    from experiments.gpu import summary
    from experiments.gpu.pieces import chosen
    from experiments.gpu.run import run
    from experiments.lab.device import card, device_here
    from experiments.lab.runs import CELLS, RunFolder

    pieces, device = chosen(only), device_here()
    if device.type != "cuda" and not toy:
        raise DecodingError("no GPU here, which this measures: add --toy to see that it runs, or go where there is one")
    folder = shared.out_folder(out, "gpu-benchmarks")
    RunFolder(folder, {"card": card(device)["name"], "toy": toy}, resume)
    work = partial(run, folder / CELLS, pieces, minutes, toy, _show)
    records: dict[str, dict[str, Any]] = shared.until_interrupted(work, folder, "what was measured is kept")
    shown = summary.write(folder)
    click.echo(f"look at {shown}")
    if any(summary.is_bad(record) for record in records.values()):
        sys.exit(1)


def _show(piece: Any, record: dict[str, Any] | None) -> None:
    from experiments.gpu import summary

    click.echo(
        f"{piece.name}: {piece.title} …" if record is None else f"{piece.name}: {summary.verdict(record)}", err=True
    )
