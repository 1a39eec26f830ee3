"""Commands whose cells are measured by workers: each runs the command again, with a part of its cells."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import chdir, contextmanager, redirect_stderr, redirect_stdout
from dataclasses import dataclass
from importlib import import_module
from pathlib import Path
from typing import Any

import click

from experiments.lab import runs
from experiments.lab.spread import Stage, Workers, run, submit


@contextmanager
def sent_to(workers: Workers, callback: Callable[..., Any], params: Mapping[str, Any]) -> Iterator[None]:
    """Has cells done by workers.

    Args:
        workers: which.
        callback: the command's function, which can be imported by its name.
        params: of the command.
    """
    here = {name: value.absolute() if isinstance(value, Path) else value for name, value in params.items()}

    def send(folder: Path, keys: Sequence[str], counted: Callable[[], int], title: str) -> None:
        again = here | {"out": folder.absolute(), "resume": True}
        count = min(workers.count, len(keys))
        parts = [frozenset(keys[rank::count]) for rank in range(count)]
        part = _Part(callback.__module__, callback.__name__, again, parts, Path.cwd())
        stage = Stage(title, count, part, lambda _: False, len(keys), counted)
        if workers.kind != "slurm":
            run([stage], workers)
            return
        submit([stage], workers, folder)
        click.echo(f"handed to Slurm: when it is done, the same command with --resume --out {folder} goes on")
        raise click.exceptions.Exit

    token = runs.elsewhere.set(send)
    try:
        yield
    finally:
        runs.elsewhere.reset(token)


@dataclass(frozen=True)
class _Part:
    """Runs a command with a part of its cells.

    Attributes:
        module, name: of the command.
        params: as the command takes them.
        parts: keys of cells, by task.
        typed_in: the folder that paths are relative to: a cluster's workers stand elsewhere.
    """

    module: str
    name: str
    params: Mapping[str, Any]
    parts: Sequence[frozenset[str]]
    typed_in: Path

    def __call__(self, task: int) -> None:
        command = getattr(import_module(self.module), self.name)
        callback = inspect.unwrap(command.callback)
        logs = self.params["out"] / "logs"
        logs.mkdir(exist_ok=True)
        token = runs.part.set(self.parts[task])
        try:
            with (
                (logs / f"worker-{task}.txt").open("a") as log,
                redirect_stdout(log),
                redirect_stderr(log),
                chdir(self.typed_in),
            ):
                callback(**self.params)
        except runs.PartDone:
            pass
        finally:
            runs.part.reset(token)
