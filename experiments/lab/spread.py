"""Stages of independent tasks, spread over processes of this machine, a Ray cluster, or Slurm.

A task that is done says so itself, so that work goes on where it was stopped, whatever it ran on. Quick to import,
since each worker does: torch comes with the tasks that need it.
"""

from __future__ import annotations

import math
import multiprocessing
import os
import sys
import threading
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import FIRST_COMPLETED, Future, ProcessPoolExecutor, wait
from concurrent.futures.process import BrokenProcessPool
from contextlib import contextmanager
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any, Literal

from rich.progress import Progress, TaskID

from decoding.errors import DecodingError
from decoding.packages import versions
from experiments.lab.libraries import required
from experiments.lab.progress import progress_of_cells

Kind = Literal["local", "ray", "slurm"]
_TRIES = 3  # of a task whose worker is gone
_LOOK = 2.0  # seconds between looks at what is done


@dataclass(frozen=True)
class Stage:
    """Tasks that need nothing of each other.

    Attributes:
        name: what is shown.
        tasks: how many.
        run: does one of them. Can be pickled.
        is_done: whether one is done.
        amount: of what is counted for progress; tasks by default.
        counted: how much of it is done.
    """

    name: str
    tasks: int
    run: Callable[[int], None]
    is_done: Callable[[int], bool]
    amount: int | None = None
    counted: Callable[[], int] | None = None

    @property
    def todo(self) -> list[int]:
        """Tasks that are left."""
        return [task for task in range(self.tasks) if not self.is_done(task)]

    @property
    def progress(self) -> tuple[int, int]:
        """What is done, and of how much."""
        if self.counted is None or self.amount is None:
            return self.tasks - len(self.todo), self.tasks
        return self.counted(), self.amount


@dataclass(frozen=True)
class Workers:
    """What works.

    Attributes:
        kind: "local", processes; "ray", the cluster that ``RAY_ADDRESS`` names, or a new one here; "slurm".
        count: how many work at once.
        memory: bytes of each, which Ray and Slurm set aside; None if that is not known.
        gpus: of each.
        sbatch: options of Slurm, by name; ``partition`` and ``time`` must be there.
    """

    kind: Kind
    count: int
    memory: int | None = None
    gpus: int = 0
    sbatch: Mapping[str, str] = field(default_factory=dict)


def run(stages: Sequence[Stage], workers: Workers) -> dict[str, float]:
    """Does all tasks that are left, a stage when the one before is whole, with progress.

    Args:
        stages: in their order.
        workers: which do them; not Slurm's.

    Returns:
        Seconds that each stage took, by name.

    Raises:
        DecodingError: a task failed, or workers that there are not.
    """
    seconds = {}
    with _ENGINES[workers.kind](workers) as engine, progress_of_cells() as progress:
        for stage in stages:
            began = time.perf_counter()
            done, amount = stage.progress
            shown = progress.add_task(stage.name, total=amount, completed=done)
            with _watching(partial(_show, progress, shown, stage)):
                engine(stage, stage.todo)
            seconds[stage.name] = time.perf_counter() - began
    return seconds


def _show(progress: Progress, shown: TaskID, stage: Stage) -> None:
    progress.update(shown, completed=stage.progress[0])


@contextmanager
def _watching(look: Callable[[], Any]) -> Iterator[None]:
    """Looks now and then, and at the end."""
    ended = threading.Event()

    def watch() -> None:
        while not ended.wait(_LOOK):
            look()

    thread = threading.Thread(target=watch, daemon=True)
    thread.start()
    try:
        yield
    finally:
        ended.set()
        thread.join()
        look()


Engine = Callable[[Stage, Sequence[int]], None]
"""Does tasks of a stage."""


@contextmanager
def _local(workers: Workers) -> Iterator[Engine]:
    pool: ProcessPoolExecutor | None = None

    context = multiprocessing.get_context("spawn")
    devices = _devices(workers)

    def opened() -> ProcessPoolExecutor:
        threads = max((os.cpu_count() or 1) // workers.count, 1)
        shares = context.SimpleQueue()
        for share in devices:
            shares.put(share)
        return ProcessPoolExecutor(workers.count, context, _begin_worker, (threads, shares))

    def do(stage: Stage, tasks: Sequence[int]) -> None:
        nonlocal pool
        left, tries = list(tasks), 0
        while left:
            pool = pool or opened()
            try:
                for task in _done_by(pool, stage, tuple(left)):
                    left.remove(task)
                    tries = 0
                return
            except BrokenProcessPool as error:
                pool, tries = None, tries + 1
                if tries == _TRIES:
                    raise _killed(stage) from error

    try:
        yield do
    finally:
        if pool is not None:
            pool.shutdown(cancel_futures=True)


def _done_by(pool: ProcessPoolExecutor, stage: Stage, tasks: Sequence[int]) -> Iterator[int]:
    here = versions()
    waiting: dict[Future[None], int] = {pool.submit(_do, stage.run, task, here): task for task in tasks}
    while waiting:
        finished, _ = wait(waiting, return_when=FIRST_COMPLETED)
        for future in finished:
            task = waiting.pop(future)
            with _saying(stage, task):
                future.result()
            yield task


def _devices(workers: Workers) -> list[str | None]:
    """What each worker sees of the GPUs; None if it sees what there is.

    Raises:
        DecodingError: fewer GPUs than asked for.
    """
    if not workers.gpus:
        return [None] * workers.count
    import torch

    told = os.environ.get("CUDA_VISIBLE_DEVICES")
    there = (
        list(map(str, range(torch.cuda.device_count()))) if told is None else [each for each in told.split(",") if each]
    )
    if len(there) < workers.gpus * workers.count:
        raise DecodingError(
            f"{workers.count} workers with {workers.gpus} GPUs each need {workers.gpus * workers.count}, and there are "
            f"{len(there)}: give fewer --workers"
        )
    return [",".join(there[worker * workers.gpus :][: workers.gpus]) for worker in range(workers.count)]


def _begin_worker(threads: int, shares: Any) -> None:
    """Takes a share of cores and GPUs, and ends when the process that began this one does, however that ends."""
    devices = shares.get()
    if devices is not None:
        os.environ["CUDA_VISIBLE_DEVICES"] = devices
    for name in ("OMP_NUM_THREADS", "RAYON_NUM_THREADS"):  # torch's, and tokenizers'
        os.environ[name] = str(threads)
    threading.Thread(target=_end_with_parent, daemon=True).start()


def _end_with_parent() -> None:
    parent = multiprocessing.parent_process()
    if parent is not None:
        parent.join()
        os._exit(1)


@contextmanager
def _ray(workers: Workers) -> Iterator[Engine]:
    ray = required("ray", "cluster")
    began = not ray.is_initialized()
    if began:
        try:
            ray.init(log_to_driver=False, include_dashboard=False, logging_level="ERROR")
        except ConnectionError as error:
            raise DecodingError(f"no Ray cluster answers at RAY_ADDRESS={os.environ.get('RAY_ADDRESS')}") from error
    try:
        wanted = {"CPU": 1, "GPU": workers.gpus, "memory": workers.memory or 0}
        nodes = [node["Resources"] for node in ray.nodes() if node["Alive"]]
        if not any(all(node.get(name, 0) >= amount for name, amount in wanted.items()) for node in nodes):
            raise DecodingError(f"no machine of the Ray cluster has what a worker takes ({wanted}): give less")
        # Ray tries again where a worker is gone, not where a task failed.
        options = {"num_cpus": 1, "num_gpus": workers.gpus, "memory": workers.memory, "max_retries": _TRIES}
        yield partial(_do_by_ray, ray, ray.remote(**options)(_do), workers.count)
    finally:
        if began:
            ray.shutdown()


def _do_by_ray(ray: Any, remote: Any, count: int, stage: Stage, tasks: Sequence[int]) -> None:
    here, run, left = versions(), ray.put(stage.run), list(tasks)
    waiting: dict[Any, int] = {}
    while left or waiting:
        while left and len(waiting) < count:
            task = left.pop(0)
            waiting[remote.remote(run, task, here)] = task
        (finished,), _ = ray.wait(list(waiting))
        with _saying(stage, waiting.pop(finished)):
            try:
                ray.get(finished)
            except ray.exceptions.RayTaskError as error:
                raise error.cause or error from None
            except (ray.exceptions.WorkerCrashedError, ray.exceptions.OutOfMemoryError) as error:
                raise _killed(stage) from error


_ENGINES = {"local": _local, "ray": _ray}


def submit(stages: Sequence[Stage], workers: Workers, work: Path) -> None:
    """Hands what is left of stages to Slurm, each to begin when the one before is whole.

    Args:
        stages: in their order.
        workers: Slurm's.
        work: a folder that all machines see, for logs.

    Raises:
        DecodingError: no Slurm here, or options that it wants and has not.
    """
    slurm = required("datatrove.executor.slurm", "cluster")
    required("loguru", "cluster").logger.disable("datatrove")  # what it submits is said by the command
    sbatch = dict(workers.sbatch)
    missing = [name for name in ("partition", "time") if name not in sbatch]
    if missing:
        raise DecodingError(f"Slurm wants to know {' and '.join(missing)}: add --sbatch {missing[0]}=…")
    told = {name: sbatch.pop(name) for name in ("partition", "time")}
    last = None
    for number, stage in enumerate(stages):
        if todo := stage.todo:
            last = slurm.SlurmPipelineExecutor(
                [_Ranks(stage.run, todo, versions())],
                tasks=len(todo),
                workers=workers.count,
                mem_per_cpu_gb=math.ceil((workers.memory or 2 << 30) / (1 << 30)),
                gpus_per_task=workers.gpus,
                qos=sbatch.pop("qos", None),
                job_name=f"decoding-{stage.name}",
                env_command=f'export PATH="{Path(sys.executable).parent}:$PATH"',
                logging_dir=str(work.absolute() / "slurm" / f"{number}-{stage.name}"),
                skip_completed=False,  # what is left was asked for above
                sbatch_args=sbatch,
                depends=last,
                **told,
            )
    try:
        if last is not None:
            last.run()
    except OSError as error:
        raise DecodingError(f"Slurm's sbatch cannot be called here: {error}") from error


@dataclass(frozen=True)
class _Ranks:
    """A step of datatrove's: a rank does the task of its number among those that are left."""

    run: Callable[[int], None]
    tasks: Sequence[int]
    versions: Mapping[str, str]

    def __call__(self, data: Any, rank: int, world_size: int) -> None:
        _do(self.run, self.tasks[rank], self.versions)


def _do(run: Callable[[int], None], task: int, begun_with: Mapping[str, str]) -> None:
    """Does a task, where what is installed is the same as where the run was begun."""
    here = versions()
    other = next((name for name in here if here[name] != begun_with.get(name)), None)
    if other is not None:
        raise DecodingError(
            f"a worker has {other} {here[other]}, and the run was begun with {begun_with.get(other)}: install the same "
            "versions on all machines"
        )
    run(task)


class WorkerKilledError(DecodingError):
    """A task's worker went away, and so did those that tried again."""


def _killed(stage: Stage) -> WorkerKilledError:
    return WorkerKilledError(
        f"a worker was killed at stage {stage.name}, time and again: where memory is short, give fewer --workers or "
        "less --memory"
    )


@contextmanager
def _saying(stage: Stage, task: int) -> Iterator[None]:
    """Says which task failed."""
    try:
        yield
    except (BrokenProcessPool, WorkerKilledError):
        raise
    except ModuleNotFoundError as error:
        raise DecodingError(f"a worker lacks {error.name}: install the same packages on all machines") from error
    except MemoryError as error:
        raise DecodingError(f"a worker ran out of memory at stage {stage.name}: give less --memory") from error
    except ValueError as error:  # which all errors for users are
        raise DecodingError(f"task {task} of stage {stage.name} failed: {error}") from error
