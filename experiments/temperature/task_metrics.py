"""How outputs of tasks are scored, all in [0, 1] and per output, so that prompts can be compared and resampled."""

from __future__ import annotations

import re
import string
from collections.abc import Callable, Sequence
from typing import Any

from torch.nn.functional import cosine_similarity

from decoding.temperature.encoder import load_encoder
from experiments.lab.libraries import required
from experiments.temperature.ifeval import share_followed


def accuracy(items: Sequence[Any], outputs: Sequence[str]) -> list[float]:
    """1 where the label is the right one; an output without a label is wrong."""
    return [float(output in item.answers) for item, output in zip(items, outputs, strict=True)]


def exact_match(items: Sequence[Any], outputs: Sequence[str]) -> list[float]:
    """1 where the output is one of the answers, but for case, articles and punctuation (as SQuAD compares)."""
    return [
        float(_bare(output) in {_bare(answer) for answer in item.answers})
        for item, output in zip(items, outputs, strict=True)
    ]


def _bare(text: str) -> str:
    text = "".join(character for character in text.lower() if character not in string.punctuation)
    return " ".join(re.sub(r"\b(a|an|the)\b", " ", text).split())


def chrf(items: Sequence[Any], outputs: Sequence[str]) -> list[float]:
    """chrF (Popović 2015) of sentences, by sacrebleu, over 100."""
    scorer = required("sacrebleu").CHRF()
    return [
        scorer.sentence_score(output, item.answers).score / 100 for item, output in zip(items, outputs, strict=True)
    ]


def rouge_l(items: Sequence[Any], outputs: Sequence[str]) -> list[float]:
    """ROUGE-L F1 (Lin 2004) with stemming, by rouge-score."""
    scorer = required("rouge_score.rouge_scorer").RougeScorer(["rougeL"], use_stemmer=True)
    return [
        scorer.score(item.answers[0], output)["rougeL"].fmeasure for item, output in zip(items, outputs, strict=True)
    ]


def ifeval(items: Sequence[Any], outputs: Sequence[str]) -> list[float]:
    """The share of the prompt's verifiable instructions that the output follows (IFEval, strict)."""
    return [share_followed(item.record, output) for item, output in zip(items, outputs, strict=True)]


def diversity_coherence(items: Sequence[Any], outputs: Sequence[str]) -> list[float]:
    """Diversity × coherence of open-ended continuations (Su et al. 2022, arXiv 2202.06417).

    Diversity = Π_{n=2..4} distinct n-grams / n-grams, over words. Coherence = the cosine between the prompt's and the
    continuation's vectors, at least 0; theirs are SimCSE's, ours all-MiniLM-L6's. A text of one word scores 0.
    """
    encoder = load_encoder()
    prompts = encoder.sentences([item.prompt for item in items])
    cosines = cosine_similarity(prompts, encoder.sentences(outputs)).clamp(min=0).tolist()
    return [diversity(output) * cosine for output, cosine in zip(outputs, cosines, strict=True)]


def diversity(text: str) -> float:
    """Π_{n=2..4} distinct n-grams / n-grams of a text's words; 0 if there is no pair of words."""
    words = text.split()
    product = float(len(words) > 1)
    for n in (2, 3, 4):
        grams = [tuple(words[i : i + n]) for i in range(len(words) - n + 1)]
        product *= len(set(grams)) / len(grams) if grams else 1.0
    return product


def spbleu(pairs: Sequence[Sequence[str]], pieces: Callable[[str], list[str]]) -> float:
    """BLEU of a corpus over subword pieces, in [0, 100], by sacrebleu.

    Args:
        pairs: output and reference.
        pieces: cuts a text.
    """
    scorer = required("sacrebleu").BLEU(tokenize="none", force=True)
    outputs, references = ([" ".join(pieces(pair[i])) for pair in pairs] for i in (0, 1))
    return scorer.corpus_score(outputs, [references]).score


METRICS: dict[str, Callable[[Sequence[Any], Sequence[str]], list[float]]] = {
    "accuracy": accuracy,
    "exact_match": exact_match,
    "chrf": chrf,
    "rouge_l": rouge_l,
    "ifeval": ifeval,
    "diversity_coherence": diversity_coherence,
}
