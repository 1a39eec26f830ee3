"""Checks of IFEval's verifiable instructions (Zhou et al. 2023, arXiv 2311.07911), in the strict sense.

Where the authors' program is lenient or odd, so are these checks, that scores compare with published ones. They differ
in the sentences, which pysbd cuts and not NLTK's Punkt, whose data need a download, and in that nothing is left to
chance: the guess of a language is seeded, and a missing argument is an error, where theirs draws one.
"""

from __future__ import annotations

import json
import re
from collections.abc import Callable, Mapping
from typing import Any

from decoding.errors import DecodingError
from experiments.lab.libraries import required

_OPTIONS = ("My answer is yes.", "My answer is no.", "My answer is maybe.")
_FENCES = ("```json", "```Json", "```JSON", "```")
_POSTSCRIPTS = {"P.S.": r"p\.\s?s\.", "P.P.S": r"p\.\s?p\.\s?s"}
# Where NLTK's word tokenizer cuts: I'm, GOP's, DON'T and CANNOT are two words each, AND/OR is one.
_CUTS = re.compile(
    r"""[\s\[\](){}<>«»“”‘’„`";@#$%&?!*‒–—―]|[:,](?!\d)|--|\.\.+|''"""
    r"""|(?=(?i:'(?:s|m|d|ll|re|ve)|n't)(?!\w))|(?<=\bCAN)(?=NOT\b)"""
)


def share_followed(item: Mapping[str, Any], response: str) -> float:
    """The share of an item's instructions that a response follows, in [0, 1].

    Args:
        item: a record of IFEval's data: ``prompt``, ``instruction_id_list`` and ``kwargs``, one for each instruction.
        response: what was written. A blank one follows no instruction.

    Raises:
        DecodingError: see `follows`.
    """
    instructions = item["instruction_id_list"]
    pairs = zip(instructions, item["kwargs"], strict=True)
    return sum(follows(name, arguments, item["prompt"], response) for name, arguments in pairs) / len(instructions)


def follows(instruction: str, arguments: Mapping[str, Any], prompt: str, response: str) -> bool:
    """Whether a response follows one instruction; a blank one never does.

    Args:
        instruction: its name, such as ``"punctuation:no_comma"``.
        arguments: what the instruction asks for, named as in the data; those that are None are ignored.
        prompt: what ``"combination:repeat_prompt"`` wants repeated, if the arguments do not say.
        response: what was written.

    Raises:
        DecodingError: an unknown instruction, a missing argument, or a missing package.
    """
    if instruction not in _CHECKS:
        raise DecodingError(f"unknown instruction {instruction!r}: choose from {', '.join(sorted(_CHECKS))}")
    given = {"prompt_to_repeat": prompt} | {name: value for name, value in arguments.items() if value is not None}
    try:
        return bool(response.strip()) and _CHECKS[instruction](response, given)
    except KeyError as error:
        raise DecodingError(f"the instruction {instruction} has no {error}: give it in its kwargs") from error


def _existence(response: str, given: Mapping[str, Any]) -> bool:
    # Keywords are patterns, here and below, and parts of words count, but for forbidden words.
    return all(re.search(keyword, response, re.IGNORECASE) for keyword in given["keywords"])


def _frequency(response: str, given: Mapping[str, Any]) -> bool:
    count = len(re.findall(given["keyword"].strip(), response, re.IGNORECASE))
    return _compared(count, given["relation"], given["frequency"])


def _forbidden_words(response: str, given: Mapping[str, Any]) -> bool:
    return not any(re.search(rf"\b{word}\b", response, re.IGNORECASE) for word in given["forbidden_words"])


def _letter_frequency(response: str, given: Mapping[str, Any]) -> bool:
    # The data have "!" and "#" as letters: the original draws another letter then, we count what the prompt asks for.
    count = response.lower().count(given["letter"].strip().lower())
    return _compared(count, given["let_relation"], given["let_frequency"])


def _compared(count: int, relation: str, bound: int) -> bool:
    return count < bound if relation == "less than" else count >= bound


def _response_language(response: str, given: Mapping[str, Any]) -> bool:
    return _is_in(given["language"], response)


def _english_capital(response: str, given: Mapping[str, Any]) -> bool:
    return response.isupper() and _is_in("en", response)


def _english_lowercase(response: str, given: Mapping[str, Any]) -> bool:
    return response.islower() and _is_in("en", response)


def _is_in(language: str, text: str) -> bool:
    """Whether langdetect finds a text to be in a language; so is, as in the original, one without a word."""
    langdetect = required("langdetect")
    langdetect.DetectorFactory.seed = 0
    try:
        return langdetect.detect(text) == language
    except langdetect.LangDetectException:
        return True


def _number_sentences(response: str, given: Mapping[str, Any]) -> bool:
    segmenter = required("pysbd").Segmenter(language="en", clean=False)
    return _compared(len(segmenter.segment(_prose(response))), given["relation"], given["num_sentences"])


def _prose(text: str) -> str:
    """What makes pysbd cut where Punkt would.

    To Punkt the end of a line ends no sentence, quotation marks and brackets hold none together, and the number of a
    list's item is a sentence.
    """
    text = re.sub(r"^[^\w\n]*\d+\.(?=\s)", " Item. ", text, flags=re.MULTILINE)
    return " ".join(re.sub(r"[^\w\s.?!,;:]", " ", text).split())


def _number_paragraphs(response: str, given: Mapping[str, Any]) -> bool:
    paragraphs = _divided(response, "***")
    return all(paragraphs) and len(paragraphs) == given["num_paragraphs"]


def _two_responses(response: str, given: Mapping[str, Any]) -> bool:
    responses = _divided(response, "******")
    return all(responses) and len(responses) == 2 and responses[0] != responses[1]


def _divided(text: str, divider: str) -> list[str]:
    """What stands between dividers; a divider may also open or close the text."""
    parts = [part.strip() for part in text.split(divider)]
    first = 0 if parts[0] else 1
    last = len(parts) if parts[-1] else -1
    return parts[first:last]


def _number_words(response: str, given: Mapping[str, Any]) -> bool:
    return _compared(len(re.findall(r"\w+", response)), given["relation"], given["num_words"])


def _nth_paragraph_first_word(response: str, given: Mapping[str, Any]) -> bool:
    paragraphs = response.split("\n\n")
    count = sum(bool(paragraph.strip()) for paragraph in paragraphs)
    if count != given["num_paragraphs"] or given["nth_paragraph"] > count:
        return False
    # Blank paragraphs are not counted, but numbered.
    words = paragraphs[given["nth_paragraph"] - 1].split()
    if not words:
        return False
    word = re.split(r"[.,?!'\"]", words[0].lstrip("'").lstrip('"'))[0]
    return word.lower() == given["first_word"].lower()


def _number_placeholders(response: str, given: Mapping[str, Any]) -> bool:
    return len(re.findall(r"\[.*?\]", response)) >= given["num_placeholders"]


def _postscript(response: str, given: Mapping[str, Any]) -> bool:
    marker = given["postscript_marker"].strip()
    return re.search(_POSTSCRIPTS.get(marker, marker.lower()), response.lower()) is not None


def _number_bullet_lists(response: str, given: Mapping[str, Any]) -> bool:
    # Any line that begins with a dash is a bullet, a rule (---) too.
    stars = re.findall(r"^\s*\*[^*].*$", response, re.MULTILINE)
    dashes = re.findall(r"^\s*-.*$", response, re.MULTILINE)
    return len(stars) + len(dashes) == given["num_bullets"]


def _constrained_response(response: str, given: Mapping[str, Any]) -> bool:
    return any(option in response for option in _OPTIONS)


def _number_highlighted_sections(response: str, given: Mapping[str, Any]) -> bool:
    single = re.findall(r"\*([^\n*]*)\*", response)
    double = re.findall(r"\*\*([^\n*]*)\*\*", response)
    return sum(bool(section.strip()) for section in single + double) >= given["num_highlights"]


def _multiple_sections(response: str, given: Mapping[str, Any]) -> bool:
    return len(re.findall(rf"{given['section_spliter'].strip()}\s?\d+", response)) >= given["num_sections"]


def _json_format(response: str, given: Mapping[str, Any]) -> bool:
    content = response.strip()
    for fence in _FENCES:
        content = content.removeprefix(fence)
    try:
        json.loads(content.removesuffix("```").strip())
    except (ValueError, RecursionError):
        return False
    return True


def _title(response: str, given: Mapping[str, Any]) -> bool:
    return any(title.lstrip("<").rstrip(">").strip() for title in re.findall(r"<<[^\n]+>>", response))


def _repeat_prompt(response: str, given: Mapping[str, Any]) -> bool:
    return response.strip().lower().startswith(given["prompt_to_repeat"].strip().lower())


def _end_checker(response: str, given: Mapping[str, Any]) -> bool:
    return response.strip().strip('"').lower().endswith(given["end_phrase"].strip().lower())


def _quotation(response: str, given: Mapping[str, Any]) -> bool:
    text = response.strip()
    return len(text) > 1 and text[0] == text[-1] == '"'


def _capital_word_frequency(response: str, given: Mapping[str, Any]) -> bool:
    count = sum(word.isupper() for word in _CUTS.split(response))
    return _compared(count, given["capital_relation"], given["capital_frequency"])


def _no_comma(response: str, given: Mapping[str, Any]) -> bool:
    return "," not in response


_CHECKS: dict[str, Callable[[str, Mapping[str, Any]], bool]] = {
    "keywords:existence": _existence,
    "keywords:frequency": _frequency,
    "keywords:forbidden_words": _forbidden_words,
    "keywords:letter_frequency": _letter_frequency,
    "language:response_language": _response_language,
    "length_constraints:number_sentences": _number_sentences,
    "length_constraints:number_paragraphs": _number_paragraphs,
    "length_constraints:number_words": _number_words,
    "length_constraints:nth_paragraph_first_word": _nth_paragraph_first_word,
    "detectable_content:number_placeholders": _number_placeholders,
    "detectable_content:postscript": _postscript,
    "detectable_format:number_bullet_lists": _number_bullet_lists,
    "detectable_format:constrained_response": _constrained_response,
    "detectable_format:number_highlighted_sections": _number_highlighted_sections,
    "detectable_format:multiple_sections": _multiple_sections,
    "detectable_format:json_format": _json_format,
    "detectable_format:title": _title,
    "combination:two_responses": _two_responses,
    "combination:repeat_prompt": _repeat_prompt,
    "startend:end_checker": _end_checker,
    "startend:quotation": _quotation,
    "change_case:capital_word_frequency": _capital_word_frequency,
    "change_case:english_capital": _english_capital,
    "change_case:english_lowercase": _english_lowercase,
    "punctuation:no_comma": _no_comma,
}
