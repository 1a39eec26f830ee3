"""``decoding bench lossless``: how fast the lossless mode writes, beside what it is to be compared with.

On texts, a model reads the beginning of each once, and every way writes behind it by ``model.generate``: so acceptance
is what it is, and it is looked whether the tokens are full attention's. Without texts, weights and contexts are random,
and a drafted token is right with a probability that is given: so contexts can be longer than one would wait for.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import asdict, dataclass, field
from functools import partial, wraps
from itertools import product
from pathlib import Path
from typing import Any

import numpy as np
import torch
from rich.console import Console
from torch import Tensor
from transformers import LogitsProcessor
from transformers.generation.streamers import BaseStreamer

from chunkllm import Attachment, ChunkAdapters, ChunkCalibration, ChunkSelection
from chunkllm.contiguous.cache import ChunkCache
from chunkllm.contiguous.layer import ChunkLayer
from chunkllm.contiguous.plan import Plan
from chunkllm.contiguous.verified import VerifiedCache
from chunkllm.models import cache_argument
from chunkllm.pace import Pace
from chunkllm.selection import Chunks, score_per_token
from decoding.errors import DecodingError
from decoding.models import input_device, load_model, load_tokenizer
from decoding.style.source import StyleSource, require_distinct
from decoding.tokens import tokenize
from experiments.lab.device import device_here, free
from experiments.lab.figures import Figure, ratio_of, report
from experiments.long_context.bench import BenchOptions, contents, random_model, selection
from experiments.long_context.paths import DEFAULT, DENSE, SELECTED, filled
from experiments.long_context.reading import read

Saved = ChunkAdapters | ChunkCalibration
LOSSLESS, LOOKUP = "lossless", "prompt lookup"
# For acceptance: lossless, whatever it costs; and with drafts that read what the last tokens attended to most.
DRAFTING, SAMPLED = "always drafting", "always drafting, sampled"
ATTENDED, ATTENDED_SAMPLED = (f"{way}, by true attention" for way in (DRAFTING, SAMPLED))
_DRAFTED = 7
_LAST = 4  # tokens of a prompt that each way reads itself
_LOOKED_UP = 10
_GOALS = {DEFAULT: {32768: 2.5, 120_000: 14.0}, DENSE: {8192: 0.97, 32768: 1.5, 120_000: 3.0}}


@dataclass(frozen=True)
class Setting:
    """What is written, and how.

    Attributes:
        tokens: to write.
        budget: tokens that a selection keeps.
        rounds: times that each way writes.
    """

    tokens: int
    budget: int
    rounds: int


@dataclass
class Record:
    """What one way did behind one context.

    Attributes:
        text, context, way: which.
        seconds: for a token, of each round, the first token left out.
        same: tokens written before the first that full attention would not have written.
        tokens: tokens written.
        acceptance: of drafted tokens, the share that was right.
        passes: with full attention, for all tokens.
    """

    text: str
    context: int
    way: str
    seconds: list[float] = field(default_factory=list)
    same: int | None = None
    tokens: int = 0
    acceptance: float | None = None
    passes: int | None = None


class _Clock(BaseStreamer):
    """Keeps when tokens came, and which."""

    def __init__(self, batch: int) -> None:
        self.times: list[float] = []
        self.tokens: list[int] = []  # of the first row
        self._batch = batch
        self._is_prompt = True

    def put(self, value: Tensor) -> None:
        """The prompt first; then the next token of all rows, or with assisted generation some of one."""
        if not self._is_prompt:
            new = value.flatten()[:: self._batch].tolist()
            self.tokens += new
            self.times += [time.perf_counter()] * len(new)
        self._is_prompt = False

    def end(self) -> None:
        """Nothing."""

    @property
    def seconds(self) -> float:
        """For a token: the first comes with the prompt's last tokens."""
        return (self.times[-1] - self.times[0]) / (len(self.times) - 1)


def _write(model: Any, ids: Tensor, cache: Any, count: int, **options: Any) -> _Clock:
    clock = _Clock(len(ids))
    settings = {"do_sample": False, "pad_token_id": 0, "eos_token_id": None, "max_new_tokens": count}
    held = {cache_argument(model): cache, "attention_mask": torch.ones_like(ids)}
    model.generate(ids, streamer=clock, **held, **settings | options)
    return clock


def on_text(
    name: str,
    ids: Tensor,
    model: Any,
    tokenizer: Any,
    adapters: Saved | None,
    setting: Setting,
) -> Iterator[Record]:
    """What each way does behind a text, int64 [1, T]."""
    prompt, _ = read(model, ids)
    # Machines drift: those that are compared stand side by side.
    timed, once = (DEFAULT, SELECTED, DENSE, LOSSLESS, LOOKUP), (DRAFTING, SAMPLED, ATTENDED, ATTENDED_SAMPLED)

    def ended(chunks: Attachment) -> Tensor:
        return chunks.boundaries(ids[:, : prompt.bottom.shape[1]], prompt.bottom)

    def written(way: str) -> tuple[_Clock, Attachment | None]:
        chosen = ChunkSelection(adapters, budget=setting.budget, verify=way in (LOSSLESS, *once))
        options: dict[str, Any] = {}
        if way == LOOKUP:
            options = {"prompt_lookup_num_tokens": _LOOKED_UP}
        elif way in (SAMPLED, ATTENDED_SAMPLED):
            torch.manual_seed(0)
            options = {"do_sample": True, "top_k": 0}
        with ExitStack() as stack:
            path = DEFAULT if way == LOOKUP else way
            cache, chunks = stack.enter_context(filled(path, model, prompt.states, chosen, ended, tokenizer))
            if way in once:
                stack.enter_context(always_drafting())
            if way in (ATTENDED, ATTENDED_SAMPLED):
                stack.enter_context(_by_true_attention())
            if way == LOOKUP:
                stack.enter_context(_reading_on(model, cache))
            return _write(model, ids, cache, setting.tokens, **options), chunks

    records = {way: Record(name, ids.shape[1], way) for way in (*timed, *once)}
    own: list[int] = []
    for ways in (*(_turned(timed, turn) for turn in range(setting.rounds)), once):
        for way in ways:
            record = records[way]
            clock, chunks = written(way)
            own = own or clock.tokens
            record.seconds.append(clock.seconds)
            record.tokens = len(clock.tokens)
            record.same = None if way in (SAMPLED, ATTENDED_SAMPLED) else _same(clock.tokens, own)
            _tell(record, chunks)
    yield from records.values()


def _turned(ways: Sequence[str], turn: int) -> Sequence[str]:
    """To and fro, lest what one way leaves in caches be always the same one's lot."""
    return ways[::-1] if turn % 2 else ways


@contextmanager
def _reading_on(model: Any, cache: Any) -> Iterator[None]:
    """Transformers' assisted generation reads a whole prompt, also what a given cache holds: here the rest of it."""
    own, held = model.prepare_inputs_for_generation, cache.get_seq_length()

    @wraps(own)
    def rest(ids: Tensor, next_sequence_length: int | None = None, **options: Any) -> Any:
        unread = ids.shape[1] - held if next_sequence_length is None else next_sequence_length
        return own(ids, next_sequence_length=unread, **options)

    model.prepare_inputs_for_generation = rest
    try:
        yield
    finally:
        del model.prepare_inputs_for_generation


@contextmanager
def always_drafting() -> Iterator[None]:
    """The lossless mode drafts as many tokens each time, whatever it costs."""
    own = Pace.length
    setattr(Pace, "length", lambda _, active, most: min(_DRAFTED, most))  # noqa: B010
    try:
        yield
    finally:
        setattr(Pace, "length", own)  # noqa: B010


@contextmanager
def _by_true_attention() -> Iterator[None]:
    """Chunks are chosen by the attention that the last tokens paid to them, computed once more."""

    def ranks(cache: ChunkCache, rows: np.ndarray, chunks: Chunks, *_: Any) -> list[Tensor]:
        return [
            score_per_token(_attention_to(chunks, layer, cache.plan)[rows], chunks.lengths)
            for layer in cache.full_layers
        ]

    own = ChunkCache._ranks
    setattr(ChunkCache, "_ranks", ranks)  # noqa: B010
    try:
        yield
    finally:
        setattr(ChunkCache, "_ranks", own)  # noqa: B010


def _attention_to(chunks: Chunks, layer: ChunkLayer, plan: Plan) -> Tensor:
    """Float64 [B, C], what chunks get of the attention of the last tokens: the mean over these and over heads."""
    assert layer.keys is not None
    keys = layer.keys[:, :, : layer.stored].float()
    queries = layer.last_queries(plan.scorer.queries).float().reshape(*keys.shape[:2], -1, keys.shape[3])
    shares = (queries @ keys.transpose(-1, -2) * plan.shape.scaling).softmax(-1).mean((1, 2))
    until = torch.nn.functional.pad(shares.double().cumsum(-1), (1, 0))
    return until.gather(1, chunks.starts + chunks.lengths) - until.gather(1, chunks.starts)


def _same(tokens: Sequence[int], own: Sequence[int]) -> int:
    return next((i for i, (one, other) in enumerate(zip(tokens, own, strict=False)) if one != other), len(own))


def _tell(record: Record, chunks: Attachment | None) -> None:
    if chunks is not None and chunks.plan.verify:
        record.acceptance, record.passes = chunks.stats["acceptance"], chunks.stats["passes"]


class _Script(LogitsProcessor):
    """Lets a model write given tokens; what is drafted is wrong with a probability."""

    def __init__(self, length: int, acceptance: float, vocabulary: int):
        generator = torch.Generator().manual_seed(0)
        self.tokens = torch.randint(vocabulary - 1, (length,), generator=generator)
        self._right = torch.rand(length, generator=generator) < acceptance
        self.cache: Any = None

    def __call__(self, input_ids: Tensor, scores: Tensor) -> Tensor:
        """The place's token, for certain."""
        place = input_ids.shape[1]
        is_draft = isinstance(self.cache, VerifiedCache) and self.cache.is_drafting
        token = self.tokens[place] + int(is_draft and not self._right[place])
        return torch.full_like(scores, -torch.inf).index_fill_(1, token[None].to(scores.device), 0)


WAYS = (DEFAULT, SELECTED, DENSE, LOSSLESS)


def on_random(
    options: BenchOptions,
    acceptance: float,
    setting: Setting,
    show: Callable[[str], None],
    ways: Sequence[str] = WAYS,
) -> Iterator[Record]:
    """What each way does behind random contexts."""
    model = random_model(options, device_here())
    for batch in options.batches:
        for context in options.contexts:
            text = f"random, batch {batch}"
            records = {way: Record(text, context, way) for way in ways}
            script = _Script(context + _LAST + setting.tokens + 1, acceptance, model.config.vocab_size)
            ids = script.tokens[: context + _LAST].expand(batch, -1).to(model.device)
            for turn in range(setting.rounds):
                for way in _turned(ways, turn):
                    show(f"{options.shape}, {context:,} tokens × {batch}, {way}")
                    _write_script(records[way], model, ids, script, context, setting)
                    free()  # two caches of long contexts may not fit
            yield from records.values()


def _write_script(record: Record, model: Any, ids: Tensor, script: _Script, context: int, setting: Setting) -> None:
    """Once, in the record's way."""
    chosen = selection(model, budget=setting.budget, verify=record.way == LOSSLESS)
    states, never = contents(model, len(ids), context), partial(_never, len(ids), context)
    with torch.inference_mode(), filled(record.way, model, states, chosen, never) as (cache, chunks):
        script.cache = cache
        clock = _write(model, ids, cache, setting.tokens, logits_processor=[script])
        record.seconds.append(clock.seconds)
        record.tokens = len(clock.tokens)
        _tell(record, chunks)
    script.cache = None


def _never(batch: int, length: int, _: Attachment) -> Tensor:
    return torch.zeros(batch, length, dtype=torch.bool)


def figures_of(records: Sequence[Record]) -> Iterator[Figure]:
    """Speeds against both dense ways; acceptance; whether texts are the same."""
    for (text, context), group in _groups(records).items():
        where = f"{text}, {context:,} tokens"
        times = {way: np.array(record.seconds) for way, record in group.items()}
        for against in (DEFAULT, DENSE):
            for way in (LOSSLESS, SELECTED, LOOKUP, DENSE):
                if way in times and way != against:
                    ratio, shown = ratio_of(times[against], times[way])
                    goal = _GOALS[against].get(context) if way == LOSSLESS else None
                    met = None if goal is None else ratio >= goal
                    target = "" if goal is None else f"≥ {goal:g}×"
                    yield Figure(f"{where}: {way}, against {against}", ratio, shown, target, met)
        for way in (LOSSLESS, DRAFTING, SAMPLED, ATTENDED, ATTENDED_SAMPLED):
            if way in group and (share := group[way].acceptance) is not None:
                passes = group[way].passes or 1
                shown = f"{100 * share:.1f} %, {group[way].tokens / passes:.1f} tokens a pass"
                yield Figure(f"{where}: {way}, drafted tokens that are right", share, shown)
        for way in (DENSE, LOSSLESS, SELECTED, LOOKUP):
            if way in group and (same := group[way].same) is not None:
                shown = f"{same} of {group[DEFAULT].tokens}"
                yield Figure(f"{where}: {way}, tokens as full attention's", same, shown)


def _groups(records: Iterable[Record]) -> dict[tuple[str, int], dict[str, Record]]:
    groups: dict[tuple[str, int], dict[str, Record]] = {}
    for record in records:
        groups.setdefault((record.text, record.context), {})[record.way] = record
    return groups


def measure_texts(
    sources: Sequence[StyleSource],
    contexts: Sequence[int],
    model: str,
    dtype: str,
    adapters: Saved | None,
    setting: Setting,
    out: Path | None,
) -> None:
    """Behind the beginning of each text, at each length."""
    require_distinct([source.name for source in sources])
    tokenizer = load_tokenizer(model)
    texts = {source.name: np.concatenate(tokenize(source.corpus().documents, tokenizer)) for source in sources}
    for name, ids in texts.items():
        if len(ids) < max(contexts):
            raise DecodingError(f"{name} has {len(ids):,} tokens: give a text of {max(contexts):,}")
    loaded = load_model(model, dtype)
    about = {"model": Path(model).name, "dtype": str(loaded.dtype)}
    with _reported(about, setting, out) as records, Console(stderr=True).status("measuring") as status:
        for (name, ids), context in product(texts.items(), contexts):
            status.update(f"{name}, {context:,} tokens")
            text = torch.from_numpy(ids[None, :context]).to(input_device(loaded))
            with torch.inference_mode():
                records += on_text(name, text, loaded, tokenizer, adapters, setting)


def measure_random(
    contexts: tuple[int, ...],
    batches: tuple[int, ...],
    acceptance: float,
    setting: Setting,
    dtype: str,
    out: Path | None,
) -> None:
    """On a GPU Llama-3.1-8B's shape in bfloat16, else SmolLM2-135M's."""
    on_gpu = torch.cuda.is_available()
    precision = (torch.bfloat16 if on_gpu else torch.float32) if dtype == "auto" else getattr(torch, dtype)
    shape = "llama-3.1-8b" if on_gpu else "smollm2-135m"
    options = BenchOptions(shape, precision, contexts, batches, setting.rounds)
    about = {"shape": shape, "dtype": str(precision), "acceptance": acceptance}
    with _reported(about, setting, out) as records, Console(stderr=True).status("measuring") as status:
        for record in on_random(options, acceptance, setting, status.update):
            records.append(record)


@contextmanager
def _reported(about: dict[str, Any], setting: Setting, out: Path | None) -> Iterator[list[Record]]:
    """Takes records, and reports them when all are there; those that are, if it is interrupted."""
    title = "lossless chunk selection: speeds are ratios of tokens a second, medians of rounds with quartiles"
    records: list[Record] = []
    try:
        yield records
    finally:
        if records:
            told = about | asdict(setting) | {"records": [asdict(each) for each in records]}
            report(list(figures_of(records)), title, told, out)
