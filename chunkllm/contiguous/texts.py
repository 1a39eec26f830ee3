"""The texts of one call of the lossless mode: which tokens they get, and when they end, each at its own pace."""

from __future__ import annotations

from typing import Any

import numpy as np
import torch
from torch import Tensor
from transformers import LogitsProcessorList, StoppingCriteriaList
from transformers.generation import EosTokenCriteria, MaxLengthCriteria, StopStringCriteria

from chunkllm.contiguous.noise import Noise
from chunkllm.late import send

_ROOM = 256
# What these say of a text depends on it alone, so that they can be asked about one that is not sure yet.
_PURE = (EosTokenCriteria, MaxLengthCriteria, StopStringCriteria)


class Texts:
    """Rows of a batch, each as long as it has come. What ``generate`` calls with all rows gets all rows here too.

    Args:
        prompts: int64 [B, P].
        processors: of scores; called for every place as often as it is drafted or verified.
        criteria: that end texts; called once for every place, in their order.
        config: of the call, a prepared GenerationConfig.
        streamer: takes the tokens of one text.

    Attributes:
        ids: int64 [B, room], of which row b's first ``lengths[b]`` are sure.
        lengths: int64 [B].
        is_done: whether nothing is left to write.
        length: of all texts when they are done; as far as all of them are known until then.
    """

    def __init__(
        self,
        prompts: Tensor,
        processors: LogitsProcessorList,
        criteria: StoppingCriteriaList,
        config: Any,
        streamer: Any | None,
    ):
        batch, length = prompts.shape
        self.ids = prompts
        self.lengths = np.full(batch, length, np.int64)
        self.is_done = False
        self.length = self.prompt_length = length
        self.scores: tuple[Tensor, ...] | None = () if config.return_dict_in_generate and config.output_scores else None
        self.logits: tuple[Tensor, ...] | None = () if config.return_dict_in_generate and config.output_logits else None
        self._processors, self._criteria, self._streamer = processors, criteria, streamer
        self._noise = Noise(prompts.device) if config.do_sample else None
        self._ends_early = any(hasattr(each, "eos_token_id") for each in criteria)
        self._is_pure = all(isinstance(each, _PURE) for each in criteria)
        self._limit = criteria.max_length
        self._pad = config._pad_token_tensor
        self._unfinished = np.ones(batch, bool)
        self._ended_at = self.lengths.copy()
        self._kept: dict[int, tuple[Tensor, Tensor]] = {}
        self._newest = length, torch.zeros(batch, 0, dtype=torch.int64)

    @property
    def active(self) -> np.ndarray:
        """bool [B], the rows that still write."""
        return self._writing if self._limit is None else self._writing & (self.lengths < self._limit)

    @property
    def _writing(self) -> np.ndarray:
        """Without an end-of-text token, ``generate`` writes on until all rows are finished."""
        return self._unfinished if self._ends_early else np.full(len(self.lengths), not self.is_done)

    @property
    def left(self) -> int:
        """Tokens that there are to write, of the row with the most."""
        return _ROOM if self._limit is None else int(self._limit - self.lengths[self.active].min())

    def tokens(self, places: np.ndarray, count: int) -> tuple[Tensor, Tensor]:
        """Places and tokens, each int64 [B, count], from a place of each row on, int64 [B]."""
        at = self._at(places, count)
        return at, self.ids.gather(1, at)

    def _at(self, places: np.ndarray, count: int) -> Tensor:
        """int64 [B, count], for which there is room."""
        self._make_room(int(places.max()) + count)
        return send(places, self.ids.device)[:, None] + torch.arange(count, device=self.ids.device)

    def _make_room(self, length: int) -> None:
        if length > self.ids.shape[1]:
            self.ids = torch.nn.functional.pad(self.ids, (0, length + _ROOM - self.ids.shape[1]))

    def draft(self, logits: Tensor, number: int) -> None:
        """Chooses a drafted token, ``number`` places behind what is sure, by its logits [B, 1, V]."""
        tokens = self._choose(logits, self.lengths + number, is_draft=True)
        at = self._at(self.lengths + number, 1)  # which may put other ids in their place
        self.ids.scatter_(1, at, tokens)

    def take(self, logits: Tensor, together: bool) -> tuple[np.ndarray, np.ndarray]:
        """Keeps the longest right beginning of what was drafted, and the token behind it. Waits for the device once.

        Args:
            logits: [B, k + 1, V], behind the last sure token and behind each of k drafted ones.
            together: whether all rows must keep as many as the one with the fewest.

        Returns:
            int64 [B], drafted tokens that were right, −1 for rows that do not write, and int64 [B], tokens kept.
        """
        active, drafted = self.active, logits.shape[1] - 1
        chosen = self._choose(logits, self.lengths, is_draft=False)
        at, held = self.tokens(self.lengths, drafted + 1)
        right = (held == chosen)[:, :drafted].long().cumprod(1).sum(1)
        self.ids.scatter_(1, at, chosen)
        upto = range(self.length + 1, int(self.lengths[active].max()) + drafted + 2)
        ended = [self._asked(length).long() for length in upto] if self._is_pure else []
        arrived = torch.cat((right[:, None], chosen, *(each[:, None] for each in ended)), 1).cpu().numpy()
        right_here = np.where(active, arrived[:, 0], -1)
        kept = np.where(active, right_here + 1, 0)
        if self._limit is not None:
            kept = np.minimum(kept, np.maximum(self._limit - self.lengths, 0))
        if together:
            kept = np.where(active, kept[active].min(), 0)
        self._newest = int(self.lengths[0]), torch.from_numpy(arrived[:, 1 : drafted + 2])
        self.lengths = self.lengths + kept
        self._finish({length: arrived[:, drafted + 2 + i] > 0 for i, length in enumerate(upto)} if ended else {})
        if self.is_done:  # in the midst of what was kept, if a text has ended there
            kept = kept - np.clip(self.lengths - self.length, 0, kept)
        elif self._noise is not None:
            self._noise.forget(int(self.lengths[self.active].min()))
        return right_here, kept

    def _asked(self, length: int) -> Tensor:
        """bool [B], what the criteria say when all rows have so many tokens."""
        return self._criteria(self.ids[:, :length], self.scores)

    def _finish(self, known: dict[int, np.ndarray]) -> None:
        """Goes on to where all rows are known, place by place, as ``generate`` does."""
        while not self.is_done and self.length < self.lengths[self._writing].min():
            self.length += 1
            self._record()
            ended = known.get(self.length)
            if ended is None:
                ended = self._asked(self.length).cpu().numpy()
            if self._streamer is not None:
                self._streamer.put(self._newest_at(self.length - 1))
            newly = self._unfinished & ended
            self._unfinished = self._unfinished & ~ended
            self.is_done = not self._unfinished.any()
            if self._ends_early and newly.any():
                self._ended_at = np.where(newly, self.length, self._ended_at)
        if not self._unfinished.all() and self._ends_early:
            self._fill()

    def _newest_at(self, place: int) -> Tensor:
        """int64 [B], on the host."""
        if len(self.lengths) > 1:
            return self.ids[:, place].cpu()
        began, tokens = self._newest
        return tokens[:, place - began]

    def _record(self) -> None:
        scores, logits = self._kept.pop(self.length - 1, (None, None))
        if self.scores is not None and scores is not None:
            self.scores += (scores,)
        if self.logits is not None and logits is not None:
            self.logits += (logits,)

    def _fill(self) -> None:
        """Padding behind the texts that have ended."""
        for row in np.flatnonzero(~self._unfinished):
            self.ids[row, self._ended_at[row] :] = self._pad

    def end(self) -> Tensor:
        """The texts, int64 [B, length]."""
        if self._noise is not None:
            self._noise.end(self.length)
        if self._streamer is not None:
            self._streamer.end()
        return self.ids[:, : self.length].contiguous()

    def _choose(self, logits: Tensor, places: np.ndarray, is_draft: bool) -> Tensor:
        """Tokens int64 [B, n] by logits [B, n, V], the first of which are for a place of each row, int64 [B]."""
        active, count = self.active, logits.shape[1]
        records = not is_draft and (self.scores is not None or self.logits is not None)
        if not self._processors and self._noise is None and not records:
            return logits.to(torch.float32).argmax(-1)
        if (places[active] == places[active][0]).all():
            at, rows = int(places[active][0]), send(active, logits.device)
            return torch.stack([self._choose_at(logits[:, i], at + i, rows, records) for i in range(count)], 1)
        return self._choose_apart(logits, places, records)

    def _choose_apart(self, logits: Tensor, places: np.ndarray, records: bool) -> Tensor:
        """The same for rows of different lengths: processors get one place at a time, and all rows."""
        active, count = self.active, logits.shape[1]
        chosen = torch.zeros(logits.shape[:2], dtype=torch.int64, device=self.ids.device)
        for place in sorted({place for first in places[active] for place in range(first, first + count)}):
            number = place - places
            of_place = send(active & (number >= 0) & (number < count), chosen.device)
            index = send(np.clip(number, 0, count - 1), chosen.device)[:, None]
            scores = logits.gather(1, index[:, :, None].expand(-1, -1, logits.shape[2]))[:, 0]
            tokens = self._choose_at(scores, place, of_place, records)
            chosen.scatter_(1, index, torch.where(of_place[:, None], tokens[:, None], chosen.gather(1, index)))
        return chosen

    def _choose_at(self, logits: Tensor, place: int, rows: Tensor, records: bool) -> Tensor:
        """Tokens int64 [B] by logits [B, V] of one place, as ``generate`` does; of the rows that the place is for."""
        raw = logits.to(self.ids.device, torch.float32, copy=True)
        ids: Any = self.ids[:, :place].contiguous()
        scores = self._processors(ids, raw)
        if records:
            held = self._kept.get(place, (scores, raw))
            mine = rows[:, None]
            self._kept[place] = torch.where(mine, scores, held[0]), torch.where(mine, raw, held[1])
        return scores.argmax(-1) if self._noise is None else self._noise.pick(scores, place)
