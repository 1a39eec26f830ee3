"""vLLM with ``tokenizer_mode="mistral"``, on the CPU: what is made with transformers' tokenizer goes with Mistral's."""

import json
import random
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from transformers import MistralConfig, MistralForCausalLM

from decoding import DecodingError, StylePrior, TemperatureSelector
from decoding.models import load_tokenizer
from decoding.style.files import load_prior
from decoding.style.training import name_and_file
from decoding.temperature.encoder import Encoder
from decoding.vllm import engine_args
from tests.conftest import TEXT, make_tokenizer

vllm = pytest.importorskip("vllm", reason="vLLM is not installed; `make test` runs these in .venv-vllm")
mistral_common = pytest.importorskip("mistral_common")
pytestmark = pytest.mark.real

DATA = Path(mistral_common.__file__).parent / "data"
VOCAB, SPECIAL = 4096, 1000
# No prefill in pieces, which vLLM cannot seed on a CPU.
ENGINE = {"dtype": "float32", "enforce_eager": True, "max_model_len": 640, "disable_log_stats": True}
ENGINE |= {"max_num_seqs": 4, "max_num_batched_tokens": 2560, "num_gpu_blocks_override": 96}
SHAPE = {
    "vocab_size": VOCAB,
    "hidden_size": 64,
    "intermediate_size": 64,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "num_key_value_heads": 1,
    "max_position_embeddings": 640,
    "sliding_window": None,
    "initializer_range": 0.2,
}
PROMPTS = ["the captain said", "His ship had seen <s> a storm", "¿Qué? 日本語 🚢", "it rained all night"]
BUDGET = 192
AUTO = {"temperature": "auto"}


@pytest.fixture(scope="module", autouse=True)
def in_this_process(tmp_path_factory):
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("XDG_CACHE_HOME", str(tmp_path_factory.mktemp("cache")))
        for name, value in {"VLLM_ENABLE_V1_MULTIPROCESSING": "0", "VLLM_CPU_KVCACHE_SPACE": "1"}.items():
            patch.setenv(name, value)
        for name in ("DECODING_STYLES", "DECODING_TEMPERATURE", "DECODING_CHUNKS"):
            patch.setenv(name, "{}")
        yield


def write_tekken(folder, first=0):
    """Mistral's own file, with fewer tokens: from ``first`` on, after all that are bytes."""
    content = json.loads((DATA / "tekken_240718.json").read_text(encoding="utf-8"))
    tokens = content["vocab"][:256] + content["vocab"][256 + first :]
    content["vocab"] = tokens[: VOCAB - SPECIAL]
    for rank, token in enumerate(content["vocab"]):
        token["rank"] = rank
    content["config"]["default_vocab_size"] = VOCAB
    folder.mkdir()
    (folder / "tekken.json").write_text(json.dumps(content), encoding="utf-8")


@pytest.fixture(scope="module")
def folders(tmp_path_factory):
    """A model with the files of both formats, and tokenizers: Mistral's file alone, others in both, an older one."""
    from transformers.integrations.mistral import convert_tekken_tokenizer

    root = tmp_path_factory.mktemp("models")
    config = MistralConfig(**SHAPE)
    for name, first in {"both": 0, "tekken": 0, "other": 500}.items():
        write_tekken(root / name, first)
        config.save_pretrained(root / name)
    for name in ("both", "other"):
        convert_tekken_tokenizer(str(root / name / "tekken.json")).save_pretrained(root / name)
    (root / "sentencepiece").mkdir()
    model_file = (DATA / "mistral_instruct_tokenizer_240323.model.v3").read_bytes()
    (root / "sentencepiece" / "tokenizer.model.v3").write_bytes(model_file)
    torch.manual_seed(0)
    MistralForCausalLM(config).save_pretrained(root / "both")
    return root


@pytest.fixture(scope="module")
def text(tmp_path_factory):
    path = tmp_path_factory.mktemp("style") / "style.txt"
    path.write_text(TEXT, encoding="utf-8")
    return str(path)


@pytest.fixture(scope="module")
def trained(text):
    """A saved prior of a text, for a tokenizer."""
    return lambda tokenizer: name_and_file(text, tokenizer, order=3, smoothing="kneser-ney")[1]


@pytest.fixture(scope="module")
def prior(folders, trained):
    return trained(load_tokenizer(str(folders / "both")))


@pytest.fixture(scope="module")
def llm(folders, prior, text, selector_folder):
    styles = {"sea": prior, "text": text}
    declared = engine_args(styles, temperature=selector_folder, model_size="medium", kv_budget=BUDGET)
    return vllm.LLM(str(folders / "both"), tokenizer_mode="mistral", **ENGINE, **declared)


def params(**options):
    return vllm.SamplingParams(**{"temperature": 0, "max_tokens": 16, "ignore_eos": True, "seed": 7} | options)


def texts(outputs):
    return [list(each.outputs[0].token_ids) for each in outputs]


def written(llm, prompts, sampling):
    return texts(llm.generate(prompts, sampling, use_tqdm=False))


def config_of(folder, mode):
    """Of an engine, as far as its tokenizer is concerned."""
    model = {"tokenizer": str(folder), "tokenizer_mode": mode, "tokenizer_revision": None, "hf_config": None}
    rest = {"runner_type": "generate", "trust_remote_code": False, "skip_tokenizer_init": False}
    return SimpleNamespace(model_config=SimpleNamespace(**model, **rest))


def test_the_engine_reads_prompts_with_mistrals_tokenizer_and_ours_is_transformers(llm, folders):
    from decoding.vllm.tokenizer import engine_tokenizer

    assert type(llm.get_tokenizer()).__name__ == "MistralTokenizer"
    ours, default = engine_tokenizer(llm.llm_engine.vllm_config), load_tokenizer(str(folders / "both"))
    assert ours.get_vocab() == default.get_vocab()
    assert ours.get_vocab() != llm.get_tokenizer().get_vocab()
    assert ours is engine_tokenizer(llm.llm_engine.vllm_config)
    assert ours.is_fast and default.is_fast


def test_greedy_texts_agree_with_transformers(llm, folders, prior):
    tokenizer = load_tokenizer(str(folders / "both"))
    model = MistralForCausalLM.from_pretrained(folders / "both").eval()
    style = StylePrior(load_prior(prior, tokenizer), λ=0.5, tokenizer=tokenizer)
    ours = written(llm, PROMPTS, params(extra_args={"style": "sea", "lambda": 0.5}))
    plain = written(llm, PROMPTS, params())
    for prompt, got, before in zip(PROMPTS, ours, plain, strict=True):
        assert got != before
        ids = torch.tensor([llm.get_tokenizer().encode(prompt)])
        for processors, wanted in (([style], got), ([], before)):
            output = model.generate(
                ids, do_sample=False, max_new_tokens=16, eos_token_id=-1, pad_token_id=0, logits_processor=processors
            )
            assert output[0, ids.shape[1] :].tolist() == wanted, prompt


def test_the_engine_trains_a_text_as_load_tokenizer_would_have_it(llm):
    saved, text = (written(llm, PROMPTS, params(extra_args={"style": name, "lambda": 0.5})) for name in ("sea", "text"))
    assert saved == text


def test_priors_of_other_tokenizers_are_refused(llm, folders, trained, monkeypatch):
    from decoding.vllm.processor import StyleLogitsProcessor

    for other in (load_tokenizer(str(folders / "other")), make_tokenizer()):
        monkeypatch.setenv("DECODING_STYLES", json.dumps({"other": str(trained(other))}))
        with pytest.raises(DecodingError, match="style 'other': the prior was trained with tokenizer"):
            StyleLogitsProcessor(llm.llm_engine.vllm_config, torch.device("cpu"), False)


def test_the_selector_reads_prompts_without_mistrals_frame(llm, selector_folder, monkeypatch):
    read, encode = [], Encoder.__call__
    monkeypatch.setattr(Encoder, "__call__", lambda self, texts: read.append(texts) or encode(self, texts))
    prompts = ["Why did the glass break when it fell?", "Translate into German: Good morning."]
    turns = [[{"role": "user", "content": prompt}] for prompt in prompts]
    sampling = params(temperature=1, extra_args=AUTO)
    asked = texts(llm.chat(turns, sampling, use_tqdm=False))
    plain = written(llm, prompts, sampling)
    assert read == [prompts, prompts]
    chosen = TemperatureSelector.from_pretrained(selector_folder).select(prompts, "medium")
    assert len(set(chosen)) == 2
    own = [params(temperature=value) for value in chosen]
    assert asked == texts(llm.chat(turns, own, use_tqdm=False))
    assert plain == written(llm, prompts, own)


def test_chunks_are_selected(llm, monkeypatch):
    from decoding.vllm.chunks import LayerGroup

    readings, begin = [], LayerGroup.begin
    monkeypatch.setattr(LayerGroup, "begin", lambda self, common: readings.append(begin(self, common)) or readings[-1])
    prompt = " ".join(random.Random(0).choices(TEXT.split(), k=200))
    selected = written(llm, [prompt], params())
    assert sum(reading is not None for reading in readings) == 15  # the steps after the prompt's
    full = written(llm, [prompt], params(extra_args={"kv_budget": "full"}))
    assert selected != full


def test_vllm_takes_mistrals_tokenizer_by_itself_where_there_are_mistrals_weights(folders):
    from vllm.tokenizers import cached_tokenizer_from_config

    from decoding.vllm.tokenizer import engine_tokenizer

    (folders / "other" / "consolidated.safetensors").touch()
    config = config_of(folders / "other", "auto")
    assert type(cached_tokenizer_from_config(config.model_config)).__name__ == "MistralTokenizer"
    assert engine_tokenizer(config).get_vocab() == load_tokenizer(str(folders / "other")).get_vocab()


def test_where_there_are_mistrals_files_alone_priors_of_its_tokenizer_fit(folders, trained):
    from decoding.vllm.tokenizer import engine_tokenizer

    ours, default = engine_tokenizer(config_of(folders / "tekken", "mistral")), load_tokenizer(str(folders / "tekken"))
    assert type(ours) is type(default)
    assert type(ours).__name__ == "MistralCommonBackend"
    prior = trained(default)
    load_prior(prior, ours)
    assert load_prior(prior).metadata["tokenizer"] == "tekken"
    with pytest.raises(DecodingError, match="trained with tokenizer 'tekken', and this one, 'sentencepiece'"):
        load_prior(prior, engine_tokenizer(config_of(folders / "sentencepiece", "mistral")))


def test_an_engine_without_a_tokenizer_has_none(folders):
    from decoding.vllm.tokenizer import engine_tokenizer

    config = config_of(folders / "both", "mistral")
    config.model_config.skip_tokenizer_init = True
    assert engine_tokenizer(config) is None
