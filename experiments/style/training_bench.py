"""``decoding bench training``: a corpus that outgrows memory, trained on disk by some workers, and in memory.

The tokens are drawn from a trigram model of a text, mixed with its bigrams and single tokens, so that new n-grams keep
coming as in a text. Let the machine be idle.
"""

from __future__ import annotations

import multiprocessing
import resource
import tempfile
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from decoding.errors import DecodingError
from decoding.models import load_tokenizer
from decoding.style.source import Corpus
from decoding.tokens import id_count, tokenize
from experiments.lab.figures import Figure, report
from experiments.lab.spread import Workers
from experiments.style.bench import run_lmplz
from experiments.style.train_on_disk import train
from ngram import NGramModel
from ngram.distributed import Training

_SHARES = (0.7, 0.2, 0.1)  # of tokens drawn behind two tokens, behind one, and alone
_CHAINS = 1 << 14  # that are drawn side by side
_DOCUMENT = 512
_SHARD = 1 << 24  # tokens of a file
_GIBIBYTE = 1 << 30


@dataclass(frozen=True)
class Shards:
    """Token ids in files, for training on disk.

    Attributes:
        folder: that holds them.
        tasks: among which they are divided.
    """

    folder: Path
    tasks: int

    def __call__(self, task: int) -> Iterator[np.ndarray]:
        """Those of a task."""
        for path in sorted(self.folder.glob("*.npy"))[task :: self.tasks]:
            yield from np.load(path, mmap_mode="r")

    def whole(self) -> list[np.ndarray]:
        """All of them."""
        return [document for path in sorted(self.folder.glob("*.npy")) for document in np.load(path)]


def draw(text: np.ndarray, tokens: int, folder: Path) -> None:
    """Writes documents that are drawn from a text's n-grams.

    Args:
        text: token ids [T].
        tokens: how many to draw, at least.
        folder: for the files, int32 [documents, tokens of one] each.
    """
    generator = np.random.default_rng(0)
    stride = int(text.max()) + 1
    by_order = [_places(text[:-1], 1), _places(text[:-2].astype(np.int64) * stride + text[1:-1], 2)]
    files = -(-tokens // _SHARD)
    for number in range(files):
        rows = _SHARD // _DOCUMENT
        drawn = np.empty((rows, _DOCUMENT), np.int32)
        for begin in range(0, rows, _CHAINS):
            some = drawn[begin : begin + _CHAINS]
            some[:, :2] = text[generator.integers(0, len(text), (len(some), 2))]
            for at in range(2, _DOCUMENT):
                some[:, at] = _next(text, by_order, stride, some[:, at - 2 : at].astype(np.int64), generator)
        np.save(folder / f"{number:05}.npy", drawn)


def _places(keys: np.ndarray, ahead: int) -> tuple[np.ndarray, np.ndarray]:
    """Contexts in order, and the places of the tokens behind them."""
    order = np.argsort(keys, kind="stable")
    return keys[order], order + ahead


def _next(
    text: np.ndarray,
    by_order: Sequence[tuple[np.ndarray, np.ndarray]],
    stride: int,
    last: np.ndarray,
    generator: np.random.Generator,
) -> np.ndarray:
    wanted = [last[:, 1], last[:, 0] * stride + last[:, 1]]
    chosen = generator.integers(0, len(text), len(last))
    order = generator.choice(3, len(last), p=_SHARES)
    for (keys, places), key, is_mine in zip(by_order, wanted, (order <= 1, order == 0), strict=True):
        begin, end = (np.searchsorted(keys, key, side) for side in ("left", "right"))
        at = begin + (generator.random(len(key)) * (end - begin)).astype(np.int64)
        use = is_mine & (end > begin)
        chosen[use] = places[at[use]]
    return text[chosen]


def main(
    corpus: Corpus,
    model: str,
    tokens: int,
    workers: Sequence[int],
    memory: int,
    in_memory: bool,
    lmplz: Path | None,
    out: Path | None,
) -> None:
    """Measures, prints the table, and writes it as JSON if asked.

    Args:
        corpus: what is drawn from.
        model: whose tokenizer.
        tokens: to draw.
        workers: numbers of them.
        memory: bytes of n-grams of each.
        in_memory: whether to train in memory, too.
        lmplz: KenLM's trainer, to compare with.
        out: file for the figures.
    """
    tokenizer = load_tokenizer(model)
    text = np.concatenate(tokenize(corpus.documents, tokenizer))
    with tempfile.TemporaryDirectory(prefix="decoding-bench-") as name:
        folder = Path(name)
        (ids := folder / "ids").mkdir()
        draw(text, tokens, ids)
        drawn = [np.load(path, mmap_mode="r") for path in sorted(ids.glob("*.npy"))]
        texts = tokenizer.batch_decode(drawn[0][:64])
        count = sum(each.size for each in drawn)
        text_bytes = round(count * sum(len(each.encode()) for each in texts) / (64 * _DOCUMENT))
        about: dict[str, Any] = {"corpus": corpus.name, "tokens": count, "text_bytes": text_bytes, "order": 3}
        figures: list[Figure] = []
        try:
            _measure(folder, ids, id_count(tokenizer), workers, memory, in_memory, lmplz, figures, about)
        finally:  # what was measured is told, whatever comes
            title = f"training on {count:,} tokens, some {text_bytes / 1e9:.2f} GB of text, drawn from {corpus.name}"
            report(figures, title, about, out)


def _measure(
    folder: Path,
    ids: Path,
    size: int,
    workers: Sequence[int],
    memory: int,
    in_memory: bool,
    lmplz: Path | None,
    figures: list[Figure],
    about: dict[str, Any],
) -> None:
    seconds: dict[Any, float] = {}
    about["seconds_of_steps"] = {}
    for number in workers:
        seconds[number], peak, about["seconds_of_steps"][number] = _apart(_on_disk, ids, folder, size, number, memory)
        what = f"on disk, {number} worker{'s' * (number > 1)}"
        figures += [
            _seconds(what, seconds[number]),
            _memory(f"{what}, peak of each, of {_size(memory)} for n-grams", peak, 4),
        ]
    if len(workers) > 1:
        ratio = seconds[workers[0]] / seconds[workers[1]]
        what = f"{workers[1]} workers against {workers[0]}"
        figures.append(Figure(what, ratio, f"{ratio:.2f}×", "≥ 1.7×", ratio >= 1.7))
    written = folder / "disk.safetensors"
    about |= {"ngrams": len(NGramModel.load(written, mmap=True)), "model_bytes": written.stat().st_size}
    if in_memory:
        seconds["memory"], peak, _ = _apart(_in_memory, ids, folder, size)
        figures += [_seconds("in memory", seconds["memory"]), _memory("in memory, peak", peak)]
    if lmplz is not None:
        seconds["lmplz"], _, _ = _apart(_by_lmplz, ids, folder, lmplz, memory)
        figures.append(_seconds(f"lmplz -S {_size(memory)}", seconds["lmplz"]))
        ratio = seconds[workers[0]] / seconds["lmplz"]
        figures.append(Figure("on disk, one worker, against lmplz", ratio, f"{ratio:.2f}×", "≤ 1.5×", ratio <= 1.5))


Work = Callable[..., tuple[float, Mapping[str, float]]]
"""Gives its seconds, and those of its steps."""


def _apart(work: Work, *arguments: Any) -> tuple[float, float, Mapping[str, float]]:
    """Seconds of some work in a process of its own, the most bytes that one of it and its workers took, and its steps'.

    Raises:
        DecodingError: it failed.
    """
    context = multiprocessing.get_context("spawn")
    ours, theirs = context.Pipe(duplex=False)
    process = context.Process(target=_measured, args=(theirs, work, arguments))
    process.start()
    theirs.close()
    try:
        found = ours.recv()
    except EOFError as error:
        raise DecodingError("a measurement's process was killed: is there memory for it?") from error
    process.join()
    if isinstance(found, DecodingError):
        raise found
    return found


def _measured(answer: Any, work: Work, arguments: Sequence[Any]) -> None:
    try:
        seconds, steps = work(*arguments)
    except DecodingError as error:
        answer.send(error)
        return
    children, own = (resource.getrusage(who).ru_maxrss for who in (resource.RUSAGE_CHILDREN, resource.RUSAGE_SELF))
    answer.send((seconds, (children or own) * 1024, steps))


def _on_disk(ids: Path, folder: Path, size: int, workers: int, memory: int) -> tuple[float, Mapping[str, float]]:
    began = time.perf_counter()
    work = folder / f"work{workers}"
    tasks = 2 * workers
    training = Training(work, Shards(ids, tasks), size, order=3, pad_vocab=True, tasks=tasks, memory=memory)
    steps = train(training, Workers("local", workers), work, folder / "disk.safetensors")
    return time.perf_counter() - began, steps or {}


def _in_memory(ids: Path, folder: Path, size: int) -> tuple[float, Mapping[str, float]]:
    began = time.perf_counter()
    NGramModel.train(Shards(ids, 1).whole(), size, order=3, pad_vocab=True).save(folder / "memory.safetensors")
    return time.perf_counter() - began, {}


def _by_lmplz(ids: Path, folder: Path, lmplz: Path, memory: int) -> tuple[float, Mapping[str, float]]:
    text = folder / "ids.txt"
    with text.open("w") as file:
        for document in Shards(ids, 1).whole():
            file.write(" ".join(map(str, document.tolist())) + "\n")
    began = time.perf_counter()
    run_lmplz(lmplz, text, folder, memory)
    return time.perf_counter() - began, {}


def _seconds(what: str, seconds: float) -> Figure:
    return Figure(what, seconds, f"{seconds:.0f} s")


def _memory(what: str, peak: float, most: float | None = None) -> Figure:
    gibibytes = peak / _GIBIBYTE
    target, met = ("", None) if most is None else (f"≤ {most:g} GiB", gibibytes <= most)
    return Figure(what, gibibytes, f"{gibibytes:.2f} GiB", target, met)


def _size(memory: int) -> str:
    return f"{memory / _GIBIBYTE:g} GiB"
