"""What the user asks for is found in any prompt, whatever the model's template puts around it."""

import pytest

from decoding.temperature.prompts import PromptFrame
from tests.conftest import make_tokenizer
from tests.decoding.temperature.families import FAMILIES, NAMES, tokenizer_of

TEXT = "Write a poem about rain on the sea."
SYSTEM = {"role": "system", "content": "You are a pirate.\n\nAnswer briefly."}
EARLIER = [
    {"role": "user", "content": "Which of these words is a colour: red, two?"},
    {"role": "assistant", "content": "<think>\nEasy.\n</think>\n\nThe word is red."},
    {"role": "user", "content": "And what does the other one mean here?"},
    {"role": "assistant", "content": "It is a number."},
]
TOOLS = [
    {
        "type": "function",
        "function": {
            "name": name,
            "description": f"Looks up the {name} of a place.",
            "parameters": {"type": "object", "properties": {"place": {"type": "string"}}, "required": ["place"]},
        },
    }
    for name in ("weather", "tide")
]
CALL = {"type": "function", "id": "123456789", "function": {"name": "weather", "arguments": {"place": "here"}}}
RESULT = [
    {"role": "assistant", "content": "", "tool_calls": [CALL]},
    {"role": "tool", "name": "weather", "tool_call_id": "123456789", "content": "It rains, and will go on to."},
]
TEXTS = {
    "lines": "Sort these lines:\n\n  b\n\n\n  a\nand keep the rest.",
    "space before": "   \n  What stands before this has no meaning.",
    "roles": "user\nYou are the user, and the assistant: user assistant system model.",
    "brackets": "What do [INST], [/INST] and <<SYS>> x <</SYS>> mean in a prompt?",
    "look-alikes": "Explain <|im_start| >user and <|user |> and < |eot_id|> and <s > to me.",
    "characters": "Übersetze «Größe» 🌊 ins Japanische: 雨が海に降る。",
    "json": '{"task": "sort", "items": [3, 1]}\n\nDo what this object says now.',
    "spaces within": "Keep  two   spaces,\tand a tab.",
}


@pytest.fixture(scope="module", params=NAMES)
def family(request):
    return FAMILIES[request.param]


@pytest.fixture(scope="module")
def tokenizer(family):
    return tokenizer_of(family)


@pytest.fixture(scope="module")
def frame(tokenizer):
    return PromptFrame(tokenizer)


def asked(text=TEXT):
    return {"role": "user", "content": text}


def ids_of(tokenizer, turns, behind="", again=False, **options):
    text = tokenizer.apply_chat_template(turns, tokenize=False, **{"add_generation_prompt": True} | options)
    return tokenizer(text + behind, add_special_tokens=again)["input_ids"]


@pytest.mark.parametrize("prompts", [True, False])
@pytest.mark.parametrize("earlier", [0, 2, 4])
def test_the_last_turn(frame, tokenizer, earlier, prompts):
    turns = [*EARLIER[:earlier], asked()]
    for options in ({}, {"again": True}, {"behind": "The sea, the sea"} if prompts else {}):
        assert frame.text_of(ids_of(tokenizer, turns, add_generation_prompt=prompts, **options)) == TEXT


@pytest.mark.parametrize("earlier", [0, 2, 4])
def test_below_a_system_prompt(frame, tokenizer, family, earlier):
    turns = [SYSTEM, *EARLIER[:earlier], asked()]
    if "gemma" in family["model"]:
        with pytest.raises(Exception, match="System role"):
            ids_of(tokenizer, turns)
        return
    found = frame.text_of(ids_of(tokenizer, turns))
    joined = found != TEXT and family.get("joins_system")  # of which the first paragraph alone is told apart
    assert found == (f"Answer briefly.\n\n{TEXT}" if joined else TEXT)


@pytest.mark.parametrize("name", [name for name in NAMES if FAMILIES[name].get("joins_system")])
@pytest.mark.parametrize(
    ("system", "is_told"),
    [
        ("You are a helpful assistant.", True),
        ("You're Pip.\nBe cheerful.", True),
        ("# Role\nAn assistant", True),
        ("System: be harmless.", True),
        ("A chat between a user and an assistant.", True),
        ("Be brief.", False),
        ("Your roles vary.", False),
        ("Yousef wrote this.", False),
    ],
)
def test_a_joined_system_prompt_is_known_by_how_it_begins(name, system, is_told):
    frame, tokenizer = PromptFrame(tokenizer_of(FAMILIES[name])), tokenizer_of(FAMILIES[name])
    texts = ["Write a poem\n\nabout rain in spring, please.", "You are a pirate. Tell me of the sea."]
    for text in texts:
        found = frame.text_of(ids_of(tokenizer, [{"role": "system", "content": system}, asked(text)]))
        assert found == (text if is_told else f"{system}\n\n{text}")
        assert frame.text_of(ids_of(tokenizer, [asked(text)])) == text


@pytest.mark.parametrize("text", TEXTS.values(), ids=TEXTS)
@pytest.mark.parametrize("earlier", [0, 2])
def test_any_text(frame, tokenizer, text, earlier):
    if "[INST]" in tokenizer.all_special_tokens:  # there is no other way to read it
        text = text.replace("[", "[ ")
    for options in ({}, {"again": True}, {"behind": "Sure: "}):
        assert frame.text_of(ids_of(tokenizer, [*EARLIER[:earlier], asked(text)], **options)) == text.strip()


def test_padding(frame, tokenizer):
    for prompts in (True, False):
        ids = ids_of(tokenizer, [asked()], add_generation_prompt=prompts, again=True)
        pads = [tokenizer.pad_token_id] * 3
        for padded in (pads + ids, ids + pads, pads + ids + pads):
            assert frame.text_of(padded) == TEXT
    assert frame.text_of(pads) == frame.text_of([]) == ""


def test_padding_of_another_kind(family):
    tokenizer = tokenizer_of(family, special=[*family["special"], "<|other|>"], pad="<|other|>")
    pads, ids = [tokenizer.pad_token_id] * 2, ids_of(tokenizer, [asked()])
    assert PromptFrame(tokenizer).text_of(pads + ids + pads) == TEXT


@pytest.mark.parametrize("thinks", [True, False])
def test_thinking(frame, tokenizer, thinks):
    for behind in ("", "<think>\nThe user wants a poem.\n</think>\n\nThe"):
        turns = [*EARLIER, asked()]
        assert frame.text_of(ids_of(tokenizer, turns, behind, enable_thinking=thinks)) == TEXT


@pytest.mark.parametrize("text", [TEXT, TEXTS["lines"], TEXTS["json"]])
def test_tools(frame, tokenizer, family, text):
    turns = [*EARLIER[:2], asked(text)]
    assert frame.text_of(ids_of(tokenizer, turns, tools=TOOLS, xml_tools=TOOLS)) == text
    assert frame.text_of(ids_of(tokenizer, turns[-1:], tools=TOOLS[:1])) == text
    if family.get("tools"):
        assert "Looks up" in tokenizer.decode(ids_of(tokenizer, turns, tools=TOOLS))
        assert frame.text_of(ids_of(tokenizer, [*turns, *RESULT], tools=TOOLS)) == text
        assert frame.text_of(ids_of(tokenizer, [asked(text), *RESULT, RESULT[1]], tools=TOOLS)) == text


def test_a_short_turn_is_read_with_the_one_before(frame, tokenizer):
    more = [asked("And now in German!"), EARLIER[3], asked("shorter")]
    answered = [asked(), EARLIER[3]]
    assert frame.text_of(ids_of(tokenizer, [*EARLIER, *answered, more[0]])) == f"{TEXT}\nAnd now in German!"
    assert frame.text_of(ids_of(tokenizer, [*answered, *more])) == f"{TEXT}\nAnd now in German!\nshorter"
    assert frame.text_of(ids_of(tokenizer, more[2:])) == "shorter"
    assert frame.text_of(ids_of(tokenizer, [*answered, asked("用德语")])) == f"{TEXT}\n用德语"
    assert frame.text_of(ids_of(tokenizer, [*answered, asked("把这首诗翻译成德语")])) == "把这首诗翻译成德语"
    assert frame.text_of(ids_of(tokenizer, [*answered, asked(" ")])) == TEXT


def test_a_text_that_is_no_chat(frame, tokenizer):
    for again in (True, False):
        ids = tokenizer("The sea was  black.\nIt rained.", add_special_tokens=again)["input_ids"]
        assert frame.text_of(ids).strip() == "The sea was  black.\nIt rained."


def test_a_marker_that_a_text_spells_is_none():
    tokenizer = tokenizer_of(FAMILIES["qwen-2.5"])
    text = "What does <|im_end|>\n<|im_start|>user\nmean in these prompts?"
    begin, end = (tokenizer(part)["input_ids"] for part in ("<|im_start|>user\n", "<|im_end|>\n<|im_start|>assistant"))
    spelled = tokenizer(text, split_special_tokens=True)["input_ids"]
    assert PromptFrame(tokenizer).text_of([*begin, *spelled, *end]) == text


def test_an_end_that_is_the_models_own():
    tokenizer = tokenizer_of(FAMILIES["gpt-oss"])
    first = ids_of(tokenizer, EARLIER[:1], behind="<|channel|>final<|message|>Red.<|return|>")
    more = tokenizer(f"<|start|>user<|message|>{TEXT}<|end|><|start|>assistant")["input_ids"]
    assert PromptFrame(tokenizer).text_of(first + more) == TEXT


VICUNA = (
    "{{ bos_token }}A chat between a curious user and an assistant. {% for m in messages %}{% if m.role == 'user' %}"
    "USER: {{ m.content }} {% else %}ASSISTANT: {{ m.content }}{{ eos_token }}{% endif %}{% endfor %}"
    "{% if add_generation_prompt %}ASSISTANT:{% endif %}"
)
CHATML = "{% for m in messages %}<|im_start|>{{ m.role }}\n{{ m.content }}<|im_end|>\n{% endfor %}"
PARTS = CHATML.replace("{{ m.content }}", "{% for p in m.content %}{{ p.text }}{% endfor %}")
TWO_BY_TWO = "{% if messages|length == 1 %}{{ raise_exception('a lone message') }}{% endif %}" + CHATML
NEVER = "{{ raise_exception('never') }}"
ALIKE = "{% for m in messages %}said: {{ m.content }}\n{% endfor %}"


def chat_tokenizer(template):
    return tokenizer_of(FAMILIES["qwen-2.5"], chat_template=template, bos_token="<|endoftext|>")


@pytest.mark.parametrize("template", [VICUNA, CHATML, PARTS, TWO_BY_TWO])
def test_templates_of_other_kinds(template):
    tokenizer = chat_tokenizer(template)
    turns = [*EARLIER[:2], asked()]
    if template is PARTS:
        turns = [turn | {"content": [{"type": "text", "text": turn["content"]}]} for turn in turns]
    assert PromptFrame(tokenizer).text_of(ids_of(tokenizer, turns, behind="The")) == TEXT


@pytest.mark.parametrize("template", [NEVER, ALIKE, None, {"rag": CHATML, "tool_use": CHATML}])
def test_without_markers_all_text_counts(template):
    tokenizer = chat_tokenizer(template)
    ids = tokenizer(f"<|im_start|>user\n{TEXT}<|im_end|>\n")["input_ids"]
    assert PromptFrame(tokenizer).text_of(ids).strip() == f"user\n{TEXT}"


def test_named_templates_with_a_default():
    tokenizer = chat_tokenizer({"default": CHATML, "tool_use": CHATML})
    assert PromptFrame(tokenizer).text_of(ids_of(tokenizer, [SYSTEM, asked()])) == TEXT


def test_a_tokenizer_of_words():
    tokenizer = make_tokenizer([*TEXT.split(), "<|im_start|>user", "<|im_start|>assistant", "<|im_end|>"])
    tokenizer.chat_template = CHATML.replace("<|im_end|>", " <|im_end|>")
    assert PromptFrame(tokenizer).text_of([0, 0, *ids_of(tokenizer, [asked()]), 0]) == TEXT


def test_padding_by_the_unknown_token():
    tokenizer = tokenizer_of(FAMILIES["llama-2"], pad="<unk>")
    tokenizer.unk_token = "<unk>"
    pads = [tokenizer.pad_token_id] * 2
    assert PromptFrame(tokenizer).text_of(pads + ids_of(tokenizer, [asked()]) + pads) == TEXT
