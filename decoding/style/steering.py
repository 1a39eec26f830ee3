"""How a prior is added to a step's scores: as it is, or held back by guards. Shared by transformers and vLLM.

By PyTorch's operations; `decoding.style.paths` puts kernels in their place.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, replace
from functools import reduce
from itertools import pairwise
from typing import Literal, NamedTuple

import numpy as np
import torch
from torch import Tensor

from chunkllm.late import send
from decoding.errors import DecodingError
from decoding.metrics import LN2
from ngram.tables import NEVER, Tables, add_log_prior, counts_on_host, mixture_of_orders

Combine = Literal["matching", "interpolated"]
HALVINGS = 12
"""Of the interval in which the largest λ′ is searched for: it is found to 1/4096 of λ."""
BINS = 512
"""Of a row's changes, for the search."""


class GuardSettings(NamedTuple):
    """What holds one prior back; None where nothing does."""

    plausibility: float | None = None  # α in (0, 1]
    max_js: float | None = None  # nats, in (0, ln 2]
    entropy_gate: float | None = None  # nats, above 0

    def checked(self) -> GuardSettings:
        """Itself.

        Raises:
            DecodingError: a value outside its range.
        """
        for name, value in self._asdict().items():
            most = _MOST.get(name, math.inf)
            if value is None:
                continue
            is_number = isinstance(value, int | float) and not isinstance(value, bool)
            if not is_number or not 0 < value <= most or value == math.inf:
                within = "above 0" if most == math.inf else f"above 0 and at most {most:.4g}"
                raise DecodingError(f"{name} must be a number {within}, not {value!r}")
        return self


_MOST = {"plausibility": 1.0, "max_js": math.log(2)}
_ABSENT = {"plausibility": 0.0, "max_js": math.inf, "entropy_gate": 0.0}
"""What a guard's column holds for priors that do not have it."""


@dataclass(frozen=True)
class Guards:
    """Guards of several, float32 [S] each (`_ABSENT` for those without); None where nobody has one."""

    plausibility: Tensor | None = None
    max_js: Tensor | None = None
    entropy_gate: Tensor | None = None

    def of(self, which: int | Tensor) -> Guards:
        """Those of one, [1, 1], or of as many as there are rows, [B, 1], as `steer` takes them."""
        return Guards(**{name: None if each is None else _rows(each, which) for name, each in vars(self).items()})


def _rows(values: Tensor, which: int | Tensor) -> Tensor:
    return (values.index_select(0, which) if isinstance(which, Tensor) else values[which : which + 1])[:, None]


def guards_of(settings: Sequence[GuardSettings], device: torch.device | str) -> Guards | None:
    """Guards on a device, or None if nobody has any."""

    def column(name: str) -> Tensor | None:
        values = [getattr(each, name) for each in settings]
        if all(value is None for value in values):
            return None
        filled = [_ABSENT[name] if value is None else value for value in values]
        return send(torch.tensor(filled, dtype=torch.float32), device)

    columns = {name: column(name) for name in GuardSettings._fields}
    return None if all(values is None for values in columns.values()) else Guards(**columns)


class BeforeStops(NamedTuple):
    """The scores of the ids that end a text, [B, K], and the highest one of any other, [B, 1]."""

    scores: Tensor
    top: Tensor


@dataclass(frozen=True)
class Stops:
    """The ids that end a text, which priors leave alone.

    Attributes:
        ids: int64 [K], ascending.
        between: the columns between them, as begin and end, on the host.
        leave: whether each of several does, bool [S]; None where all do.
    """

    ids: Tensor
    between: tuple[tuple[int, int], ...]
    leave: Tensor | None = None

    def of(self, which: int | Tensor) -> Stops:
        """As `Guards.of`."""
        return self if self.leave is None else replace(self, leave=_rows(self.leave, which))

    def left_by(self, steer_stop: Sequence[bool]) -> Stops | None:
        """With what several do, who steer them too or not; None if all steer them."""
        if all(steer_stop):
            return None
        leave = torch.tensor([not each for each in steer_stop]) if any(steer_stop) else None
        return replace(self, leave=None if leave is None else send(leave, self.ids.device))

    def before(self, scores: Tensor) -> BeforeStops:
        """What `undone` needs to know of scores before they are steered."""
        tops = (scores[:, begin:end].amax(-1, keepdim=True) for begin, end in self.between)
        top = reduce(torch.maximum, tops)
        return BeforeStops(scores.index_select(1, self.ids), top)

    def undone(self, before: BeforeStops, after: Tensor) -> Tensor:
        """Gives these ids, in ``after`` [B, W] and in place, their odds of before against the likeliest other one.

        Args:
            before: of the scores before.
            after: the steered scores.
        """
        steered = after.index_select(1, self.ids) if self.leave is not None else None
        moved = after.index_fill_(1, self.ids, -torch.inf).amax(-1, keepdim=True).sub_(before.top)
        kept = before.scores + moved.nan_to_num_(0)  # −inf less −inf: nothing else can be chosen
        if steered is not None and self.leave is not None:
            kept = torch.where(self.leave, kept, steered)
        return after.index_copy_(1, self.ids, kept.to(after.dtype))


def stops_of(ids: Sequence[int], width: int, device: torch.device | str) -> Stops | None:
    """The ids that end a text, which all leave alone; None if there are none, or no others.

    Args:
        ids: which; those from ``width`` on have no score.
        width: columns of the scores.
        device: where the scores are.
    """
    within = sorted({each for each in ids if 0 <= each < width})
    edges = [-1, *within, width]
    between = tuple((a + 1, b) for a, b in pairwise(edges) if a + 1 < b)
    return Stops(torch.tensor(within).to(device), between) if within and between else None


def mixture_of(
    model_order: int,
    orders: Sequence[int] | None,
    weights: Sequence[float] | None,
    combine: Combine,
    first: float | None,
) -> Tensor | None:
    """How a prior weighs its orders, as `ngram.tables.add_log_prior` takes it.

    Args:
        model_order: n.
        orders: those to use; None for all.
        weights: of each of them; None for shares that sum to 1.
        combine: "matching", Σ_k w_k log p_k over the orders whose context matches, or "interpolated", log p_n of the
            highest.
        first: the first order's share where no weights are given; None for equal ones.

    Returns:
        float32 [1, n, n], or None for the plain interpolated prior.

    Raises:
        DecodingError: orders that the model lacks, or weights that do not fit them.
    """
    used = list(range(1, model_order + 1) if orders is None else orders)
    if not used or len(set(used)) < len(used) or not all(k in range(1, model_order + 1) for k in used):
        raise DecodingError(f"orders must be some of 1 to {model_order}, each once, not {orders}")
    if combine == "interpolated":
        if max(used) == model_order:
            return None
        mixture = torch.zeros(1, model_order, model_order)
        mixture[:, 0, : max(used)] = 1
        return mixture
    if weights is None:
        used.sort()
    share = _shares(len(used), first) if weights is None else [float(w) for w in weights]
    if len(share) != len(used) or not all(math.isfinite(w) and w >= 0 for w in share) or not any(share):
        raise DecodingError(f"weights must be {len(used)} finite numbers, none negative and not all 0, not {weights}")
    by_order = dict(zip(used, share, strict=True))
    return mixture_of_orders([by_order.get(k, 0.0) for k in range(1, model_order + 1)])


def _shares(count: int, first: float | None) -> list[float]:
    if first is None or count == 1:
        return [1 / count] * count
    return [first, *[(1 - first) / (count - 1)] * (count - 1)]


def steer(
    tables: Tables,
    scores: Tensor,
    history: Tensor,
    strength: Tensor,
    mixture: Tensor | None = None,
    guards: Guards | None = None,
    stops: Stops | None = None,
    *,
    prior: int | Tensor = 0,
    shift: bool = True,
    out: Tensor | None = None,
    highest: Tensor | None = None,
) -> Tensor:
    """scores + λ · d, with d the log prior of every row, as far as its guards let it.

    With p = softmax(scores), the guards are, in this order:

    - entropy gate h: λ becomes λ · min(1, H(p) / h). Where the model is sure, as within a name, it is left alone.
    - plausibility α: only tokens with p(w) ≥ α · max p are moved (the set of contrastive decoding, arXiv 2210.15097).
      Together they keep their probability: q(w) ∝ p(w) · exp(λ d(w)) among them, q(w) = p(w) for the others.
    - the ids that end a text are left alone: they keep their odds against the likeliest other token, so that greedy
      texts end where they would have ended.
    - divergence budget max_js: λ becomes the largest λ′ ≤ λ for which JS(p, q) ≤ max_js. JS grows with λ′, so λ′ is
      found by halving, a fixed number of times; nothing waits for the device.

    Args:
        tables, scores, history, strength, mixture, prior, shift, out: as for `ngram.tables.add_log_prior`.
        guards: of the rows, [B, 1] each, or of all of them, [1, 1]; None adds the prior as it is.
        stops: the ids that end a text, with ``leave`` likewise; None steers them as any other.
        highest: where to put each row's highest score before, of the ids that end no text, float32 [B]: NaN if one is.
            Rows with λ = 0 need not be looked at.

    Returns:
        Float [B, W], in the dtype of ``scores``. Entries at −inf stay there.
    """
    if scores.dtype in (torch.float16, torch.bfloat16) and (guards is not None or stops is not None):
        # Rounded once, at the end: ids that end a text would get their odds against a rounded score.
        wide = steer(
            tables, scores.float(), history, strength, mixture, guards, stops,
            prior=prior, shift=shift, highest=highest,
        )  # fmt: skip
        return wide.to(scores.dtype) if out is None else out.copy_(wide)
    before = None if stops is None else stops.before(scores)
    if highest is not None:
        highest.copy_(scores.amax(-1) if before is None else before.top[:, 0])
    if guards is None:
        result = add_log_prior(tables, scores, history, strength, mixture, prior=prior, shift=shift, out=out)
        return result if stops is None or before is None else stops.undone(before, result)
    p = (
        scores.softmax(-1, dtype=torch.float32)
        if guards.entropy_gate is not None or guards.max_js is not None
        else None
    )
    if guards.entropy_gate is not None and p is not None:
        gate = guards.entropy_gate[:, 0].clamp(min=torch.finfo(torch.float32).tiny)
        share = torch.where(guards.entropy_gate[:, 0] > 0, _entropy(scores, p) / gate, 1)
        strength = strength * share.clamp(max=1)
    if guards.plausibility is None and guards.max_js is None:
        result = add_log_prior(tables, scores, history, strength, mixture, prior=prior, shift=shift, out=out)
        return result if stops is None or before is None else stops.undone(before, result)
    nothing = torch.zeros(scores.shape, device=scores.device)
    change = add_log_prior(tables, nothing, history, strength, mixture, prior=prior, shift=shift, out=nothing)
    if guards.plausibility is not None:
        change = _among_plausible(scores, change, guards.plausibility, strength)
    if guards.max_js is None or p is None:
        result = torch.add(scores, change.to(scores.dtype), out=out)
        return result if stops is None or before is None else stops.undone(before, result)
    if stops is not None and before is not None:
        moved = stops.undone(before, scores + change).index_select(1, stops.ids)
        change.index_copy_(1, stops.ids, (moved - before.scores).float().nan_to_num_(0))  # −inf stays −inf
    share = _share_within(p, change, guards.max_js, tables.impossible)
    return torch.add(scores, change.mul_(share).to(scores.dtype), out=out)


def _entropy(scores: Tensor, p: Tensor) -> Tensor:
    """Of p = softmax(scores), in nats, float32 [B]: logsumexp(scores) − Σ p · scores."""
    log_sum = scores.amax(-1).float() - p.amax(-1).log()
    finite = scores.float().clamp(min=NEVER)  # −inf · 0 is NaN
    return (log_sum - finite.mul_(p).sum(-1)).clamp_(min=0)


def _among_plausible(scores: Tensor, change: Tensor, plausibility: Tensor, strength: Tensor) -> Tensor:
    """``change`` where p(w) ≥ α · max p, less what keeps their probability together, and 0 elsewhere.

    Args:
        scores: float [B, W].
        change: float32 [B, W]; may be changed.
        plausibility: α, float32 [1, 1] or [B, 1]; 0 for all.
        strength: float32 [B]; rows with 0 stay as they are.
    """
    top = scores.amax(-1, keepdim=True).float()
    least = top + plausibility.log()
    if counts_on_host(scores.device):
        return _among_few(scores, change, top, least, strength)
    is_other = scores < least
    own = (scores - top).masked_fill_(is_other, -torch.inf)
    gained = (own + change).logsumexp(-1, keepdim=True) - own.logsumexp(-1, keepdim=True)
    change = change - gained.masked_fill_(strength[:, None] == 0, 0)
    return change.masked_fill_(is_other, 0)


def _among_few(scores: Tensor, change: Tensor, top: Tensor, least: Tensor, strength: Tensor) -> Tensor:
    """The same on the host, which can see that few tokens are plausible, and look at these alone."""
    where = torch.from_numpy(np.flatnonzero(scores.float().numpy() >= least.numpy()))
    rows = where.div(scores.shape[1], rounding_mode="floor")
    moves = change.view(-1).index_select(0, where)
    own = (scores.view(-1).index_select(0, where).float() - top[:, 0].index_select(0, rows)).exp_()
    highest = torch.full((len(scores),), NEVER).scatter_reduce_(0, rows, moves, "amax")
    sums = torch.zeros(2, len(scores))
    sums[0].index_add_(0, rows, own)
    sums[1].index_add_(0, rows, own * (moves - highest.index_select(0, rows)).exp_())
    gained = (sums[1] / sums[0]).log_() + highest
    moves -= gained.masked_fill_(strength == 0, 0).index_select(0, rows)
    return change.zero_().view(-1).index_copy_(0, where, moves).view(change.shape)


def _share_within(p: Tensor, change: Tensor, max_js: Tensor, impossible: Tensor | None = None) -> Tensor:
    """The largest share of each row's change that stays within its budget, float32 [B, 1].

    JS(p, q) with q ∝ p · exp(s · change) depends on how p is spread over changes alone: so p is gathered by change in
    `BINS` bins, each with the mean of its changes, and the search looks at these.
    Ids that cannot occur afterwards, ``impossible``, may have any change; all others' are of a kind. Overwrites ``p``.
    """
    p, change = _gathered(p, change, impossible)
    whole = _divergence(p, change) <= max_js
    low, quarters = torch.zeros(len(p), 1, device=p.device), torch.arange(1, 4, device=p.device) / 4
    for depth in range(HALVINGS // 2):  # two at once: a few numbers cost as little as one
        tried = (low + quarters * 0.25**depth)[..., None]
        within = _divergence(p[:, None], tried * change[:, None])[..., 0] <= max_js
        low += within.sum(1, keepdim=True) * 0.25 ** (depth + 1)
    return torch.where(whole, 1, low)


def _gathered(p: Tensor, change: Tensor, impossible: Tensor | None) -> tuple[Tensor, Tensor]:
    """Rows over a vocabulary as rows over bins of the change: probabilities, and mean changes, float64 [B, BINS + 1].

    Changes are less the highest one. The bins are few, and their differences small: hence float64. The first one is for
    what cannot occur afterwards. Overwrites ``p``.
    """
    rows = len(p)
    usual = change if impossible is None or not len(impossible) else change.index_fill(1, impossible, 0)
    low, high = usual.amin(-1, keepdim=True), usual.amax(-1, keepdim=True)
    per_bin = ((high - low) / (BINS - 1)).clamp(min=torch.finfo(torch.float32).tiny)
    width = BINS + 1
    starts = torch.arange(0, rows * width, width, dtype=torch.int32, device=p.device)[:, None]
    bins = (change - low).div_(per_bin).add_(1).clamp_(0, BINS).to(torch.int32).add_(starts).to(torch.int64).view(-1)
    mass, total = torch.zeros(2, rows * width, device=p.device)
    mass.scatter_add_(0, bins, p.view(-1))
    total.scatter_add_(0, bins, p.mul_(change).view(-1))
    means = (total / mass.clamp(min=torch.finfo(torch.float32).tiny)).view(rows, width).double()
    return mass.view(rows, width).double(), means - means.amax(-1, keepdim=True)


def _divergence(p: Tensor, change: Tensor) -> Tensor:
    """JS(p, q) with q ∝ p · exp(change), in nats, [B, 1]: ½ (Σ q · log r − Σ (p + q) · log((1 + r) / 2)), r = q / p.

    Cheaper than `decoding.metrics.jensen_shannon`: p is at hand, and r takes few operations.

    Args:
        p: [B, N].
        change: [B, N], at most 0, or not much above.
    """
    grown = change.exp()
    total = (p * grown).sum(-1, keepdim=True)
    r = grown / total
    q = p * r
    mean = (q * change).sum(-1, keepdim=True) - total.log()
    return (mean - ((p + q) * (r.log1p() - LN2)).sum(-1, keepdim=True)).clamp_(min=0) / 2
