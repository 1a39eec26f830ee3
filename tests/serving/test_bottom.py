"""What adapters read of each architecture that may have them, in vLLM's own model classes, held to transformers."""

import gc
from types import SimpleNamespace

import pytest
import torch
import transformers
from torch import nn

from decoding import DecodingError
from decoding.vllm import engine_args

pytest.importorskip("vllm", reason="vLLM is not installed; `make test` runs these in .venv-vllm")

from vllm.compilation.backends import split_graph
from vllm.config import set_current_vllm_config
from vllm.config.compilation import CUDAGraphMode
from vllm.distributed import (
    cleanup_dist_env_and_memory,
    destroy_model_parallel,
    ensure_model_parallel_initialized,
    init_distributed_environment,
)
from vllm.engine.arg_utils import EngineArgs
from vllm.forward_context import set_forward_context
from vllm.model_executor.model_loader import get_model
from vllm.v1.attention.backends.registry import AttentionBackendEnum, register_backend

from decoding.vllm import bottom
from decoding.vllm.bottom import ARCHITECTURES, OPERATOR, refuse_unseen_ends
from decoding.vllm.chunks import refuse_what_is_missing
from decoding.vllm.plugin import CUDA_BACKEND, refuse_other_backends, register
from decoding.vllm.selecting import refuse_other_layers

pytestmark = pytest.mark.real

TOKENS, VOCAB = 20, 64
SHAPE = {
    "vocab_size": VOCAB,
    "hidden_size": 128,
    "intermediate_size": 128,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 32,
    "num_hidden_layers": 2,
    "max_position_embeddings": 64,
    "initializer_range": 0.2,
    "bos_token_id": None,
    "eos_token_id": None,
    "pad_token_id": None,
}
FEW_EXPERTS = {"num_local_experts": 4, "num_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 64}
CHANGES = {
    "MixtralForCausalLM": FEW_EXPERTS,
    "Qwen3MoeForCausalLM": FEW_EXPERTS,
    "GraniteForCausalLM": {"residual_multiplier": 0.5, "embedding_multiplier": 3.0},
}


@pytest.fixture(scope="module", autouse=True)
def one_process(tmp_path_factory):
    """As a worker has it."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("VLLM_CPU_KVCACHE_SPACE", "1")
        for name in ("DECODING_STYLES", "DECODING_TEMPERATURE", "DECODING_CHUNKS", "DECODING_POLICY"):
            patch.delenv(name, raising=False)
        patch.setattr("torch.accelerator.empty_cache", lambda: None)  # there is none
        # Each architecture is looked at in a process of its own, which takes ten seconds, lest it starts CUDA here.
        patch.setattr("vllm.model_executor.models.registry._run_in_subprocess", lambda look: look())
        yield
        cleanup_dist_env_and_memory()


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return tmp_path_factory.mktemp("models")


def saved(folder, architecture, **changes):
    """The folder with a tiny model of transformers, which comes with it the first time."""
    torch.manual_seed(0)
    path = folder / "-".join([architecture, *map(str, changes.values())])
    if path.exists():
        return None, path
    made = getattr(transformers, architecture)
    config = made.config_class(**SHAPE | CHANGES.get(architecture, {}) | changes)
    model = made(config).eval()
    with torch.no_grad():
        for name, values in model.named_parameters():
            if "norm" in name:  # else all ones, or zeros
                values.add_(torch.rand_like(values) * 0.5)
    model.save_pretrained(path)
    return model, path


def configured(path, adapters="default", **options):
    chunks = engine_args(chunk_adapters=adapters, kv_budget=512) if adapters else engine_args(kv_budget=512)
    engine = EngineArgs(str(path), skip_tokenizer_init=True, dtype="float32", enforce_eager=True, **chunks, **options)
    return engine.create_engine_config()


@pytest.fixture
def built(folder, monkeypatch):
    """vLLM's model of a folder, its attention computed by PyTorch, in one piece."""

    def attend(impl, layer, query, key, value, cache, metadata, output, *args, **options):
        groups = query.shape[1] // key.shape[1]
        keys, values = (each.repeat_interleave(groups, 1).transpose(0, 1) for each in (key, value))
        attended = torch.nn.functional.scaled_dot_product_attention(
            query.transpose(0, 1), keys, values, is_causal=True, scale=impl.scale
        )
        output.view_as(query).copy_(attended.transpose(0, 1))
        return output

    module = "vllm.v1.attention.backends.cpu_attn.CPUAttentionBackendImpl"
    monkeypatch.setattr(f"{module}.forward", attend)
    monkeypatch.setattr(f"{module}.do_kv_cache_update", lambda *_, **__: None)

    def build(config):
        with set_current_vllm_config(config):
            init_distributed_environment(1, 0, f"file://{folder}/init", 0, "gloo")
            destroy_model_parallel()  # a model with experts has groups of its own
            ensure_model_parallel_initialized(1, 1)
            return get_model(vllm_config=config)

    yield build
    bottom.stop_watching()
    gc.collect()


class Recorder:
    """Stands where a step's selection does."""

    def __init__(self):
        self.states = []

    def note_bottom_states(self, hidden_states, residual):
        self.states.append(hidden_states.clone() if residual is None else hidden_states + residual)

    wants_keys = False  # nor is anything read but what vLLM reads


def states_of(config, model, ids):
    """What adapters are shown of a prompt, and what the model computes of it."""
    recorder = Recorder()
    names = config.compilation_config.static_forward_context
    metadata = {name: SimpleNamespace(chunks=recorder) for name in names}
    slots = dict.fromkeys(names, torch.arange(len(ids)))
    with set_forward_context(metadata, config, num_tokens=len(ids), slot_mapping=slots), torch.inference_mode():
        hidden = model(ids, torch.arange(len(ids)))
    (states,) = recorder.states
    return states, hidden


@pytest.mark.parametrize("architecture", sorted(ARCHITECTURES))
def test_adapters_are_shown_what_transformers_has_behind_its_first_layer(folder, built, architecture):
    theirs, path = saved(folder, architecture)
    config = configured(path)
    assert config.model_config.architecture == architecture
    model = built(config)
    ids = torch.randint(0, VOCAB, (TOKENS,), generator=torch.Generator().manual_seed(1))
    states, hidden = states_of(config, model, ids)
    with torch.inference_mode():
        wanted = theirs.model(ids[None], output_hidden_states=True)
    torch.testing.assert_close(hidden, wanted.last_hidden_state[0], atol=2e-3, rtol=2e-3)  # it is the same model
    torch.testing.assert_close(states, wanted.hidden_states[1][0], atol=2e-3, rtol=2e-3)
    refuse_unseen_ends(config)


def test_other_architectures_have_pooled_scores_alone(folder, built):
    _, path = saved(folder, "CohereForCausalLM")
    config = configured(path)
    built(config)
    with pytest.raises(DecodingError, match=r"CohereForCausalLM have not been tried in vLLM: leave the adapters out"):
        refuse_unseen_ends(config)
    refuse_other_layers(config)


@pytest.mark.parametrize("adapters", [None, "default"])
def test_only_the_bottom_layer_is_watched_and_only_for_adapters(folder, built, adapters):
    _, path = saved(folder, "LlamaForCausalLM")
    model = built(configured(path, adapters))
    hooked = [name for name, module in model.named_modules() if module._forward_hooks]
    assert hooked == ([] if adapters is None else ["model.layers.0"])
    assert not bottom._watching


def test_another_models_layers_are_not_taken_for_the_bottom(folder):
    _, path = saved(folder, "LlamaForCausalLM")
    config, impl = configured(path), SimpleNamespace()
    own, other = nn.Module(), nn.Module()
    own.attn = nn.Module()
    own.attn.impl = impl
    with set_current_vllm_config(config):
        bottom.watch_bottom_layer(config, impl)
        other.layers = nn.ModuleList([nn.Linear(1, 1)])  # of the same model, without the first attention
        assert bottom._watching and not other.layers[0]._forward_hooks
        other.layers = nn.ModuleList([own])
    assert own._forward_hooks and impl.is_bottom and not bottom._watching
    with set_current_vllm_config(config):
        bottom.watch_bottom_layer(config, SimpleNamespace())
    other.layers = nn.ModuleList([nn.Linear(1, 1)])  # of another
    assert not bottom._watching and not other.layers[0]._forward_hooks


def test_where_there_are_cuda_graphs_they_are_split_at_the_operator(folder, built, monkeypatch):
    _, path = saved(folder, "LlamaForCausalLM")
    config = configured(path)
    compilation = config.compilation_config
    compilation.splitting_ops = ["vllm::unified_attention_with_output"]
    built(config)
    assert compilation.splitting_ops == ["vllm::unified_attention_with_output", OPERATOR]
    compilation.cudagraph_mode = CUDAGraphMode.FULL_AND_PIECEWISE
    refuse_unseen_ends(config)
    monkeypatch.setenv("VLLM_USE_BREAKABLE_CUDAGRAPH", "1")
    with pytest.raises(DecodingError, match="set VLLM_USE_BREAKABLE_CUDAGRAPH=0"):
        refuse_unseen_ends(config)
    monkeypatch.delenv("VLLM_USE_BREAKABLE_CUDAGRAPH")
    compilation.splitting_ops.remove(OPERATOR)
    with pytest.raises(DecodingError, match=f"splitting_ops of the compilation config lacks {OPERATOR}"):
        refuse_unseen_ends(config)
    compilation.cudagraph_mode = CUDAGraphMode.NONE
    refuse_unseen_ends(config)


def test_vllm_cuts_a_graph_at_the_operator():
    graph = torch.fx.Graph()
    states, anchor = graph.placeholder("states"), graph.placeholder("anchor")
    doubled = graph.call_function(torch.add, (states, states))
    graph.call_function(torch.ops.decoding.note_bottom_states.default, (doubled, None, anchor))
    graph.output(graph.call_function(torch.add, (doubled, states)))
    _, pieces = split_graph(torch.fx.GraphModule(nn.Module(), graph), [OPERATOR])
    assert [piece.is_splitting_graph for piece in pieces] == [False, True, False]


def test_a_model_with_windows_everywhere_is_refused(folder, built):
    for window, is_refused in ((16, True), (None, False)):
        _, path = saved(folder, "MistralForCausalLM", sliding_window=window)
        config = configured(path, None)
        built(config)
        if is_refused:
            with pytest.raises(DecodingError, match="none would select"):
                refuse_other_layers(config)
        else:
            refuse_other_layers(config)
    next(iter(config.compilation_config.static_forward_context.values())).impl = SimpleNamespace()
    with pytest.raises(DecodingError, match=r"an attention of its own \(SimpleNamespace\), not the plugin's"):
        refuse_other_layers(config)


def test_micro_batches_are_refused(folder):
    _, path = saved(folder, "LlamaForCausalLM")
    config = configured(path, None)
    refuse_what_is_missing(config)
    config.parallel_config.ubatch_size = 2
    with pytest.raises(DecodingError, match="does not go with micro-batches"):
        refuse_what_is_missing(config)


def test_an_engine_with_another_backend_is_refused(monkeypatch):
    def engine(backend):
        return SimpleNamespace(attention_config=SimpleNamespace(backend=backend))

    refuse_other_backends(engine(None))  # on a CPU there is one, which is ours
    monkeypatch.setattr("decoding.vllm.plugin.CPU_BACKEND", "somebody.Else")
    with pytest.raises(DecodingError, match="another plugin has taken the attention backend of CPUs"):
        refuse_other_backends(engine(None))
    monkeypatch.setattr("decoding.vllm.plugin.current_platform", SimpleNamespace(is_cpu=lambda: False))
    for backend, name in ((None, "one of vLLM's choice"), (AttentionBackendEnum.FLASH_ATTN, "FLASH_ATTN")):
        with pytest.raises(DecodingError, match=f'start with attention_backend="CUSTOM", not {name}'):
            refuse_other_backends(engine(backend))
    custom = AttentionBackendEnum.CUSTOM
    try:
        for path in (None, "somebody.Else"):
            if path is not None:
                register_backend(custom, path)
            with pytest.raises(DecodingError, match="another plugin has taken the attention backend CUSTOM"):
                refuse_other_backends(engine(custom))
        register_backend(custom, CUDA_BACKEND)
        refuse_other_backends(engine(custom))
    finally:
        custom.clear_override()


def test_an_engine_that_would_select_nothing_does_not_start_even_without_our_processor(folder, monkeypatch):
    """As on CUDA, where vLLM would choose a backend of its own."""
    _, path = saved(folder, "LlamaForCausalLM")
    custom = AttentionBackendEnum.CUSTOM

    def start(chunks, **options):
        additional = {} if chunks is None else {"additional_config": {"chunkllm": chunks}}
        return EngineArgs(str(path), skip_tokenizer_init=True, dtype="float32", **additional, **options)

    try:
        monkeypatch.setattr("decoding.vllm.plugin.current_platform", SimpleNamespace(is_cpu=lambda: False))
        for _ in range(2):  # vLLM loads plugins in each process, and may do so again
            register()
        start(None).create_engine_config()
        start({"kv_budget": 512}, attention_backend="CUSTOM").create_engine_config()
        with pytest.raises(DecodingError, match='start with attention_backend="CUSTOM", not one of vLLM\'s choice'):
            start({"kv_budget": 512}).create_engine_config()
        with pytest.raises(DecodingError, match="kv_budget must be a whole number"):
            start({"kv_budget": "much"}, attention_backend="CUSTOM").create_engine_config()
        monkeypatch.setattr("decoding.vllm.plugin.current_platform", SimpleNamespace(is_cpu=lambda: True))
        start({"kv_budget": 512}).create_engine_config()
    finally:
        custom.clear_override()
