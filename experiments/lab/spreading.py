"""The options by which commands spread their work. Quick to import: shells complete by them."""

from __future__ import annotations

import os
from collections.abc import Callable
from functools import wraps
from typing import TYPE_CHECKING, Any

import click

from decoding.errors import DecodingError

if TYPE_CHECKING:
    from experiments.lab.spread import Workers

_OPTIONS = (
    click.option(
        "--executor",
        type=click.Choice(["local", "ray", "slurm"]),
        help="Spread the work: over processes of this machine, a Ray cluster (RAY_ADDRESS, or one here), or Slurm.",
    ),
    click.option("--workers", type=click.IntRange(min=1), help="That work at once. As many as there are cores here."),
    click.option("--gpus-per-worker", type=click.IntRange(min=0), default=0, show_default=True),
    click.option("--sbatch", metavar="NAME=VALUE", multiple=True, help="Of Slurm: partition=…, time=…. May repeat."),
)


def workers(command: Callable[..., Any]) -> Callable[..., Any]:
    """Adds the options that say what works."""
    for option in reversed(_OPTIONS):
        command = option(command)
    return command


def workers_of(options: dict[str, Any], memory: int | None = None) -> Workers:
    """What a command's options ask for.

    Raises:
        DecodingError: options of another executor.
    """
    from experiments.lab.spread import Workers

    if options["sbatch"] and options["executor"] != "slurm":
        raise DecodingError("--sbatch goes with --executor slurm")
    pairs = [each.partition("=") for each in options["sbatch"]]
    if wrong := [name for name, equals, _ in pairs if not equals]:
        raise DecodingError(f"--sbatch must read like partition=cpu, not {wrong[0]!r}")
    count = options["workers"] or os.cpu_count() or 1
    return Workers(
        options["executor"], count, memory, options["gpus_per_worker"], {name: value for name, _, value in pairs}
    )


def refuse_without_executor(ctx: click.Context, *names: str) -> None:
    """Refuses options that are of no use without --executor.

    Raises:
        DecodingError: one was given.
    """
    default = click.core.ParameterSource.DEFAULT
    for name in ("workers", "gpus_per_worker", "sbatch", *names):
        if ctx.get_parameter_source(name) != default:
            raise DecodingError(f"--{name.replace('_', '-')} goes with --executor")


def of_cells(callback: Callable[..., Any]) -> Callable[..., Any]:
    """Adds these options to a command that finishes cells, with ``out`` and ``resume`` among its parameters.

    Its cells are then measured by workers, each of which runs the command with a part of them.
    """

    @wraps(callback)
    @click.pass_context
    def command(ctx: click.Context, executor: str | None, **params: Any) -> Any:
        chosen = {name: params.pop(name) for name in ("workers", "gpus_per_worker", "sbatch")}
        if executor is None:
            refuse_without_executor(ctx)
            return callback(**params)
        from experiments.lab.parts import sent_to

        with sent_to(workers_of({"executor": executor, **chosen}), callback, params):
            return callback(**params)

    return workers(command)
