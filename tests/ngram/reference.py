"""N-gram models written down plainly, to compare with: dictionaries, loops, and the formulas as they are printed."""

import math
from collections import Counter


class Reference:
    def __init__(
        self,
        documents,
        vocab_size,
        order,
        smoothing,
        bos=None,
        eos=None,
        pad=False,
        delta=0.1,
        weights=None,
        cutoffs=None,
    ):
        self.order, self.smoothing, self.bos, self.pad, self.delta = order, smoothing, bos, pad, delta
        self.weights = weights or [1.0] * order
        self.predicted = [w for w in range(vocab_size) if w != bos]
        markers = [[bos] if bos is not None else [], [eos] if eos is not None else []]
        texts = [markers[0] + list(document) + markers[1] for document in documents if len(document)]
        raw = Counter(tuple(t[i : i + k]) for t in texts for k in range(1, order + 1) for i in range(len(t) - k + 1))
        self.kept = {gram for gram, count in raw.items() if cutoffs is None or count > cutoffs[len(gram) - 1]}
        self.counts = dict(raw)
        if smoothing == "kneser-ney":
            for gram in raw:
                if len(gram) < order and gram[0] != bos:
                    before = {
                        t[i - 1] if i else None
                        for t in texts
                        for i in range(len(t))
                        if tuple(t[i : i + len(gram)]) == gram
                    }
                    self.counts[gram] = len(before)
        self.counts.pop((bos,), None)
        self.contexts = {}
        for gram in self.counts:
            self.contexts.setdefault(gram[:-1], []).append(gram)
        self.discounts = {k: self._discounts(k) for k in range(1, order + 1)}

    def _discounts(self, k):
        t = [0] * 5
        for gram, count in self.counts.items():
            if len(gram) == k and count < 5:
                t[count] += 1
        if not (t[1] and t[2] and t[3]):
            return [0, 0.5, 1.0, 1.5]
        y = t[1] / (t[1] + 2 * t[2])
        d = [0] + [i - (i + 1) * y * t[i + 1] / t[i] for i in (1, 2, 3)]
        return d if all(0 < d[i] <= i for i in (1, 2, 3)) else [0, 0.5, 1.0, 1.5]

    def uniform(self, w):
        seen = {gram[0] for gram in self.contexts[()]}
        unseen = len(self.predicted) - len(seen)
        if self.smoothing != "kneser-ney" or self.pad:
            return 1 / len(self.predicted)
        types = len(seen) + (unseen > 0)
        return 1 / types if w in seen else 1 / types / unseen

    def probability(self, context, w):
        """p_k(w | context), k = len(context) + 1."""
        if w == self.bos:
            return 0.0
        k = len(context) + 1
        lower = self.probability(context[1:], w) if k > 1 else self.uniform(w)
        grams = self.contexts.get(tuple(context))
        if grams is None:
            return lower
        if self.smoothing == "additive" and k == 1:
            total = sum(self.counts[gram] for gram in grams)
            return (self.counts.get((w,), 0) + self.delta) / (total + self.delta * len(self.predicted))
        mass, gamma = self._terms(grams, k)
        left = gamma + sum(mass[gram] for gram in grams if gram not in self.kept)
        gram = (*context, w)
        return (mass[gram] if gram in mass and gram in self.kept else 0) + left * lower

    def _terms(self, grams, k):
        """What each n-gram of a context has, and what is left for all tokens."""
        counts = {gram: self.counts[gram] for gram in grams}
        total = sum(counts.values())
        if self.smoothing == "witten-bell":
            total += len(grams)
            return {gram: count / total for gram, count in counts.items()}, len(grams) / total
        if self.smoothing == "additive":
            share = self.weights[k - 1] / sum(self.weights[:k])
            return {gram: share * count / total for gram, count in counts.items()}, 1 - share
        taken = {gram: self.discounts[k][min(count, 3)] for gram, count in counts.items()}
        return {gram: (counts[gram] - taken[gram]) / total for gram in grams}, sum(taken.values()) / total

    def log_row(self, context, vocab_size):
        return [math.log(p) if (p := self.probability(context, w)) else -math.inf for w in range(vocab_size)]

    def matches(self, context):
        return any(gram in self.kept for gram in self.contexts.get(tuple(context), ()))
