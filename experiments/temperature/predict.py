"""What a selector makes of one prompt, for people and as JSON."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, get_args

import torch

from decoding.models import load_tokenizer
from decoding.temperature.abilities import NAMES
from decoding.temperature.explained import BLANK, NO_GAIN, UNREAD, Explained
from decoding.temperature.prompts import PromptFrame
from decoding.temperature.selector import Policy, TemperatureSelector

_CELLS = 32  # of a score of 1
_MOST_CELLS = 40
_Z = 1.96  # 95 % of a normal distribution
_SHOWN = 300  # characters of a text
_WHY = {
    BLANK: "there is no text to read: this is best for prompts of any kind",
    UNREAD: "the encoder does not read this language: this is best for prompts of any kind",
    NO_GAIN: "the best fixed one, since no expected gain over it exceeds {:g} × its standard error",
}


def request_in(prompt: str, model: str) -> str:
    """The user's last turn in a prompt that stands in a model's chat template.

    Raises:
        DecodingError: no such model.
    """
    tokenizer = load_tokenizer(model)
    return PromptFrame(tokenizer).text_of(tokenizer(prompt, add_special_tokens=False)["input_ids"])


def explained(
    selector: TemperatureSelector, text: str, model_size: str, policy: Policy | None = None
) -> list[Explained]:
    """By each policy, or by one. The text is encoded once, and may be blank.

    Raises:
        DecodingError: an unknown size, or a selector without a curve.
    """
    policies = [each for each in get_args(Policy) if each == "ability" or selector.curve is not None]
    encoder = selector.encoder
    vectors = encoder([text]) if text.strip() else torch.zeros(1, encoder.width, device=encoder.model.device)
    chosen = policies if policy is None else [policy]
    return [selector.explain_read([text], vectors, model_size, each)[0] for each in chosen]


def as_dict(selector: TemperatureSelector, found: Sequence[Explained], model_size: str) -> dict[str, Any]:
    """For `json.dumps`: the text that was read, its abilities, and a part for each policy."""
    first = found[0]
    shares = {name: round(share, 4) for name, share in first.abilities.items()}
    parts: dict[str, Any] = {
        "text": first.prompt,
        "abilities": shares,
        "encoder_reads_it": first.reason not in (BLANK, UNREAD),
    }
    for each in found:
        of = {"model_size": model_size} if each.policy == "ability" else {"model": selector.about.get("model")}
        own = {
            "temperature": each.temperature,
            "reason": each.reason,
            "expected_scores": _by_temperature(each, each.expected),
        }
        parts[each.policy] = of | own | (_gains(each) if each.policy == "curve" else {})
    return parts


def _by_temperature(each: Explained, values: Sequence[float] | None) -> dict[str, float] | None:
    if values is None:
        return None
    return {f"{t:g}": round(x, 4) for t, x in zip(each.temperatures, values, strict=True)}


def _gains(each: Explained) -> dict[str, Any]:
    """What the choice is expected to gain over the best fixed temperature, None where nothing was read."""
    gain = error = errors = None
    if each.expected is not None and each.errors is not None and each.best_fixed is not None:
        at, fixed = each.temperatures.index(each.temperature), each.temperatures.index(each.best_fixed)
        gain, error = round(each.expected[at] - each.expected[fixed], 4), round(each.errors[at], 4)
        errors = _by_temperature(each, each.errors)
    fixed_one = {"best_fixed_temperature": each.best_fixed}
    return fixed_one | {"expected_gain": gain, "standard_error": error, "standard_errors": errors}


def as_text(selector: TemperatureSelector, found: Sequence[Explained], model_size: str) -> str:
    """For people: bars of probabilities and of expected scores, the chosen temperature marked."""
    first = found[0]
    lines = [f"Read: {_shortened(first.prompt)}", ""]
    if first.reason not in (BLANK, UNREAD):
        ranked = sorted(first.abilities.items(), key=lambda pair: -pair[1])
        lines += [f"  {NAMES[name]:<22} {100 * share:5.1f} %  {_bar(share)}" for name, share in ranked]
        lines.append("")
    for each in found:
        lines += [_title(selector, each, model_size), *_plot(each), _verdict(selector, each), ""]
    return "\n".join(line.rstrip() for line in lines[:-1])


def _shortened(text: str) -> str:
    text = " ".join(text.split())
    half = _SHOWN // 2
    return text if len(text) <= _SHOWN else f"{text[:half]} … {text[-half:]}"


def _title(selector: TemperatureSelector, each: Explained, model_size: str) -> str:
    if each.policy == "ability":
        return f"Policy ability: scores of {model_size} models in the paper, as shares of the best"
    model = selector.about.get("model", "one model")
    return f"Policy curve: scores of {model}, with 95 % intervals of the distance from the best fixed temperature"


def _plot(each: Explained) -> list[str]:
    """A line for each temperature."""
    if each.expected is None:
        return []
    errors = each.errors or [0.0] * len(each.expected)
    rows = zip(each.temperatures, each.expected, errors, strict=True)
    marks = {each.temperature: "◀ chosen", **({each.best_fixed: "best fixed"} if each.best_fixed else {})}
    if each.temperature == each.best_fixed:
        marks[each.temperature] = "◀ chosen, the best fixed"
    return [f"  {t:4g} {100 * x:6.1f} %  {_bar(x, _Z * e):<{_MOST_CELLS}} {marks.get(t, '')}" for t, x, e in rows]


def _bar(value: float, reach: float = 0.0) -> str:
    """A bar from 0, and the interval around its end."""
    low, end, high = (min(max(round(_CELLS * x), 0), _MOST_CELLS) for x in (value - reach, value, value + reach))
    if low == high:
        return "█" * end
    cells = list("█" * low + "─" * (high - low))
    cells[low], cells[high - 1] = "├", "┤"
    cells[min(max(end, low), high - 1)] = "┼"
    return "".join(cells)


def _verdict(selector: TemperatureSelector, each: Explained) -> str:
    if each.reason is not None:
        return f"Temperature {each.temperature:g}: {_WHY[each.reason].format(selector.caution)}"
    return f"Temperature {each.temperature:g}"
