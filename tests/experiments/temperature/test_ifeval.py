import json
import sys

import pytest

from decoding.errors import DecodingError
from experiments.temperature.ifeval import follows, share_followed

ENGLISH = "The captain said that his ship had never seen such a storm and that the sea was black with rain."
FRENCH = "Le capitaine a dit que son navire n'avait jamais vu une telle tempête et que la mer était noire de pluie."
LISTED = "Do this:\n\n1. Ask Dr. Smith.\n2. Wait"  # The numbers are sentences, as to NLTK.

# An instruction, its arguments, responses that follow it, and others that do not.
CASES = [
    ("keywords:existence", {"keywords": ["sea", "rain"]}, [ENGLISH, "RAINY seaside"], ["The sea."]),
    ("keywords:frequency", {"keyword": "sea ", "frequency": 2, "relation": "at least"}, ["Sea, seas"], ["sea"]),
    ("keywords:frequency", {"keyword": "sea", "frequency": 2, "relation": "less than"}, ["sea"], ["Sea, seas"]),
    ("keywords:forbidden_words", {"forbidden_words": ["sea", "sky"]}, ["a seaside"], ["the Sea.", "sky"]),
    (
        "keywords:letter_frequency",
        {"letter": "A", "let_frequency": 2, "let_relation": "at least"},
        ["a cat", "AA"],
        ["cat"],
    ),
    ("keywords:letter_frequency", {"letter": "!", "let_frequency": 2, "let_relation": "less than"}, ["a!"], ["!a!"]),
    ("language:response_language", {"language": "fr"}, [FRENCH, "1 + 1"], [ENGLISH]),
    (
        "length_constraints:number_sentences",
        {"num_sentences": 2, "relation": "at least"},
        ["One. Two!", 'He said: "One. Two."', "it is one. it is two."],
        ["Ask Dr. Smith.", "One\ntwo\n\nthree"],
    ),
    ("length_constraints:number_sentences", {"num_sentences": 4, "relation": "at least"}, [LISTED], ["A. B. C."]),
    ("length_constraints:number_sentences", {"num_sentences": 2, "relation": "less than"}, ["One."], ["One. Two."]),
    (
        "length_constraints:number_paragraphs",
        {"num_paragraphs": 2},
        ["a\n\n***\n\nb", "***\na *** b\n***"],
        ["a\n\nb", "a***b***c", "a *** *** b", "***"],
    ),
    ("length_constraints:number_words", {"num_words": 3, "relation": "at least"}, ["a b c", "it's so"], ["a, b"]),
    ("length_constraints:number_words", {"num_words": 3, "relation": "less than"}, ["a - b"], ["a b c"]),
    (
        "length_constraints:nth_paragraph_first_word",
        {"num_paragraphs": 2, "nth_paragraph": 2, "first_word": "The"},
        ["a\n\nthe b", "a\n\n'The\" b", "a\n\nthe, b\n\n "],
        ["a\n\nb", "the a\n\nb", "a\n\nthe b\n\nc", "a\n\n\n\nthe b", "a\n\nthen", "the a"],
    ),
    ("detectable_content:number_placeholders", {"num_placeholders": 2}, ["[name] at [place]"], ["[name]", "[a\n] [b]"]),
    ("detectable_content:postscript", {"postscript_marker": "P.S."}, ["Bye.\np. s. Hm"], ["Bye.", "PS: hm"]),
    ("detectable_content:postscript", {"postscript_marker": "P.P.S"}, ["Bye.\nP.P.S hm"], ["P.S. hm"]),
    ("detectable_content:postscript", {"postscript_marker": "PS:"}, ["Bye. ps: hm"], ["P.S. hm"]),
    (
        "detectable_format:number_bullet_lists",
        {"num_bullets": 2},
        ["* a\n* b", "So:\n- a\n  * b", "- a\n---"],
        ["* a", "* a\n* b\n* c", "**a**\n* b", "1. a\n2. b"],
    ),
    ("detectable_format:constrained_response", {}, ["So: My answer is no."], ["my answer is no.", "No."]),
    (
        "detectable_format:number_highlighted_sections",
        {"num_highlights": 2},
        ["*a* and *b c*", "**a** and *b*"],
        ["**a**", "*a\nb* *c*", "* * *a*"],
    ),
    (
        "detectable_format:multiple_sections",
        {"section_spliter": "Section", "num_sections": 2},
        ["Section 1\na\nSection 2\nb", "**Section1** a **Section 2** b"],
        ["Section 1\na", "section 1 section 2", "Section A Section B"],
    ),
    ("detectable_format:json_format", {}, ['{"a": [1]}', '```json\n{"a": 1}\n```'], ["{'a': 1}", "So: {}", "[" * 9999]),
    ("detectable_format:title", {}, ["<<Rain>>\nIt fell."], ["<Rain>", "<< >>", "<<a\nb>>"]),
    ("combination:two_responses", {}, ["a\n******\nb", "******a******b"], ["a", "a ****** a", "a******b******c"]),
    ("combination:repeat_prompt", {"prompt_to_repeat": "Say it. "}, ["say it. It."], ["I say it.", "It."]),
    ("combination:repeat_prompt", {}, ["The prompt? Yes."], ["Yes. The prompt?"]),
    ("startend:end_checker", {"end_phrase": "The end."}, ["So. THE END.\n", '"The end."'], ["The end. So."]),
    ("startend:quotation", {}, [' "a" b "c"\n'], ["a", '"', '"a', "“a”"]),
    (
        "change_case:capital_word_frequency",
        {"capital_frequency": 2, "capital_relation": "at least"},
        ["I'm in NASA", "DON'T", "CANNOT", "A,B", "the GOP's U.S.A. plan"],
        ["AND/OR", "1,000 HIGH-END", "NATO Nato"],
    ),
    ("change_case:capital_word_frequency", {"capital_frequency": 1, "capital_relation": "less than"}, ["It"], ["IT"]),
    ("change_case:english_capital", {}, [ENGLISH.upper()], [ENGLISH, FRENCH.upper()]),
    ("change_case:english_lowercase", {}, [ENGLISH.lower()], [ENGLISH, FRENCH.lower()]),
    ("punctuation:no_comma", {}, ["One two; three."], ["One, two."]),
]


@pytest.mark.parametrize(("instruction", "arguments", "good", "bad"), CASES, ids=lambda value: str(value)[:40])
def test_what_follows_and_what_does_not(instruction, arguments, good, bad):
    for response in good:
        assert follows(instruction, arguments, "The prompt?", response) is True, response
    for response in bad:
        assert follows(instruction, arguments, "The prompt?", response) is False, response


def test_every_type_of_the_paper_is_here():
    assert len({instruction for instruction, *_ in CASES}) == 25


def test_the_share_counts_instructions_and_ignores_empty_arguments():
    item = {
        "prompt": "Say it.",
        "instruction_id_list": ["punctuation:no_comma", "startend:quotation", "length_constraints:number_words"],
        "kwargs": [{"num_words": None}, {}, {"num_words": 2, "relation": "at least", "keyword": None}],
    }
    assert share_followed(item, "a b") == pytest.approx(2 / 3)
    assert share_followed(item, '"a b"') == 1
    assert share_followed(item, " \n") == 0


def test_what_cannot_be_checked_is_said():
    with pytest.raises(DecodingError, match="unknown instruction 'punctuation:no_dash': choose from change_case"):
        follows("punctuation:no_dash", {}, "", "")
    with pytest.raises(DecodingError, match="number_words has no 'num_words'"):
        follows("length_constraints:number_words", {"num_words": None, "relation": "at least"}, "", "a")


@pytest.mark.parametrize("package", ["langdetect", "pysbd"])
def test_a_missing_package_is_named(package, monkeypatch):
    monkeypatch.setitem(sys.modules, package, None)
    instruction = {"langdetect": "language:response_language", "pysbd": "length_constraints:number_sentences"}[package]
    arguments = {"language": "en", "num_sentences": 1, "relation": "at least"}
    with pytest.raises(DecodingError, match=rf"pip install decoding-middleware\[tasks\].*{package}"):
        follows(instruction, arguments, "", "One.")


def test_every_instruction_of_the_data_can_be_checked(shared):
    path = shared / "abilities" / "ifeval_input_data.jsonl"
    items = [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]
    shares = [share_followed(item, item["prompt"]) for item in items]
    assert len(shares) > 200
    assert 0 < sum(shares) < len(shares)
