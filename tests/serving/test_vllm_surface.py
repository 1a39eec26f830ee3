"""What we assume of vLLM: the list, held to its Python sources, which need no kernels and are not imported.

    VLLM_SOURCES=FOLDER python -m pytest --noconftest tests/serving/test_vllm_surface.py

FOLDER holds ``vllm/``, such as an unpacked wheel; by default it is the installed vLLM. ``make test-vllm-newest``
downloads the newest. What we import from vLLM is found in our sources; the rest stands in `ASSUMED`, one line for each
thing: what it is, what we want of it, and why.
"""

from __future__ import annotations

import ast
import importlib.util
import os
from collections.abc import Iterator
from dataclasses import dataclass
from functools import cache
from pathlib import Path

import pytest

OURS = Path(__file__).parents[2]


def vllm_sources() -> Path | None:
    """The folder that holds ``vllm/``."""
    if given := os.environ.get("VLLM_SOURCES"):
        return Path(given).resolve()
    spec = importlib.util.find_spec("vllm")
    return Path(spec.origin).parents[1] if spec is not None and spec.origin else None


SOURCES = vllm_sources()


@cache
def parsed(path: Path) -> ast.Module:
    return ast.parse(path.read_text(encoding="utf-8"))


def module_file(root: Path, name: str) -> Path | None:
    path = root.joinpath(*name.split("."))
    return next((file for file in (path / "__init__.py", path.with_suffix(".py")) if file.is_file()), None)


@dataclass(frozen=True)
class Found:
    """A definition, and the module that it stands in."""

    module: str
    node: ast.AST


def outside_functions(node: ast.AST) -> Iterator[ast.AST]:
    """Statements of a module or a class, those under ``if`` and ``try`` as well."""
    for child in ast.iter_child_nodes(node):
        yield child
        if isinstance(child, ast.If | ast.Try | ast.With):
            yield from outside_functions(child)


def find(root: Path, dotted: str) -> Found | None:
    """A module, or what one defines or imports; None if there is nothing of that name."""
    if (file := module_file(root, dotted)) is not None:
        return Found(dotted, parsed(file))
    module, _, name = dotted.rpartition(".")
    if not module:
        return None
    if (file := module_file(root, module)) is not None:
        return _in_module(root, module, file, name)
    of_class = find(root, module)
    return None if of_class is None else members(root, of_class).get(name)


def _in_module(root: Path, module: str, file: Path, name: str) -> Found | None:
    for node in outside_functions(parsed(file)):
        if isinstance(node, ast.ClassDef | ast.FunctionDef | ast.AsyncFunctionDef) and node.name == name:
            return Found(module, node)
        if isinstance(node, ast.Assign | ast.AnnAssign) and name in _targets(node):
            return Found(module, node)
        if isinstance(node, ast.ImportFrom):
            names = {alias.asname or alias.name: alias.name for alias in node.names}
            imported = names.get(name, name if "*" in names else None)
            found = None if imported is None else find(root, f"{_origin(node, module, file)}.{imported}")
            if found is not None:
                return found
    return None


def _origin(node: ast.ImportFrom, module: str, file: Path) -> str:
    if not node.level:
        return node.module or ""
    parts = module.split(".")
    up = node.level - (file.name == "__init__.py")
    return ".".join([*parts[: len(parts) - up], *filter(None, [node.module])])


def _targets(node: ast.Assign | ast.AnnAssign, of: str | None = None) -> set[str]:
    """Names that an assignment gives a value: ``x``, or with ``of="self"`` those of ``self.x``."""
    targets = node.targets if isinstance(node, ast.Assign) else [node.target]
    each = [part for target in targets for part in (target.elts if isinstance(target, ast.Tuple) else [target])]
    if of is None:
        return {target.id for target in each if isinstance(target, ast.Name)}
    attributes = [target for target in each if isinstance(target, ast.Attribute)]
    return {target.attr for target in attributes if ast.unparse(target.value) == of}


def members(root: Path, found: Found) -> dict[str, Found]:
    """What a class or its bases in vLLM define: fields, methods, and what methods give ``self``."""
    if not isinstance(found.node, ast.ClassDef):
        return {}
    held: dict[str, Found] = {}
    for base in reversed(found.node.bases):
        name = ast.unparse(base.value if isinstance(base, ast.Subscript) else base)
        if (of := find(root, f"{found.module}.{name}")) is not None:
            held |= members(root, of)
    for node in ast.walk(found.node):
        if isinstance(node, ast.Assign | ast.AnnAssign):
            held |= {name: Found(found.module, node) for name in _targets(node, "self")}
    for node in outside_functions(found.node):
        if isinstance(node, ast.Assign | ast.AnnAssign):
            held |= {name: Found(found.module, node) for name in _targets(node)}
        if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef):
            held[node.name] = Found(found.module, node)
    return held


def parameters(node: ast.AST) -> dict[str, bool]:
    """A function's parameters but for ``self`` and ``cls``, and whether each must be given; a dataclass has fields."""
    if isinstance(node, ast.ClassDef):
        init = next((each for each in node.body if isinstance(each, ast.FunctionDef) and each.name == "__init__"), None)
        if init is not None:
            return parameters(init)
        fields = [each for each in node.body if isinstance(each, ast.AnnAssign)]
        return {ast.unparse(each.target): each.value is None for each in fields}
    assert isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef)
    plain = [*node.args.posonlyargs, *node.args.args]
    required = {each.arg: i < len(plain) - len(node.args.defaults) for i, each in enumerate(plain)}
    by_name = zip(node.args.kwonlyargs, node.args.kw_defaults, strict=True)
    required |= {each.arg: default is None for each, default in by_name}
    return {name: value for name, value in required.items() if name not in ("self", "cls")}


@dataclass(frozen=True)
class Exists:
    """Something is there, and has these members."""

    what: str
    names: str
    why: str

    def missing(self, root: Path) -> str | None:
        if (found := find(root, self.what)) is None:
            return "is not there"
        held = members(root, found) if isinstance(found.node, ast.ClassDef) else None
        lacks = [
            name
            for name in self.names.split()
            if (find(root, f"{self.what}.{name}") is None if held is None else name not in held)
        ]
        return f"lacks {', '.join(lacks)}" if lacks else None


@dataclass(frozen=True)
class Called:
    """A function can be called with these arguments, by position or by name, and wants no others."""

    what: str
    names: str
    why: str

    def missing(self, root: Path) -> str | None:
        if (found := find(root, self.what)) is None:
            return "is not there"
        held, given = parameters(found.node), self.names.split()
        by_position = [name for name in given if not name.endswith("=")]
        if list(held)[: len(by_position)] != by_position:
            return f"begins with {', '.join(list(held)[: len(by_position)]) or 'nothing'}"
        plain = [name.rstrip("=") for name in given]
        if lacks := [name for name in plain if name not in held]:
            return f"does not take {', '.join(lacks)}"
        wants = [name for name, is_required in held.items() if is_required and name not in plain]
        return f"wants {', '.join(wants)}" if wants else None


@dataclass(frozen=True)
class Overridden:
    """A method that ours stands in for has these parameters, in this order, and no others."""

    what: str
    names: str
    why: str

    def missing(self, root: Path) -> str | None:
        if (found := find(root, self.what)) is None:
            return "is not there"
        held = list(parameters(found.node))
        return None if held == self.names.split() else f"takes {', '.join(held) or 'nothing'}"


@dataclass(frozen=True)
class Says:
    """A definition's source holds this text, in Python's own spacing (`ast.unparse`)."""

    what: str
    names: str
    why: str

    def missing(self, root: Path) -> str | None:
        if (found := find(root, self.what)) is None:
            return "is not there"
        return None if self.names in ast.unparse(found.node) else f"does not say {self.names!r}"


@dataclass(frozen=True)
class Abstract:
    """A class leaves no methods but these to those who derive from it."""

    what: str
    names: str
    why: str

    def missing(self, root: Path) -> str | None:
        if (found := find(root, self.what)) is None:
            return "is not there"
        left = [name for name, each in members(root, found).items() if _is_abstract(each.node)]
        others = [name for name in left if name not in self.names.split()]
        return f"wants {', '.join(others)} of its subclasses" if others else None


def _is_abstract(node: ast.AST) -> bool:
    return isinstance(node, ast.FunctionDef) and "abstractmethod" in map(ast.unparse, node.decorator_list)


BACKEND, V1, V2 = "vllm.v1.attention.backend", "vllm.v1.sample.logits_processor", "vllm.v1.worker.gpu"
OF_V2, LINEAR = f"{V2}.sample.logits_processor", "vllm.model_executor.layers.linear.QKVParallelLinear"
STEP = f"{BACKEND}.CommonAttentionMetadata"
DRAFTED = f"{V2}.spec_decode.rejection_sampler.RejectionSampler"
CPU, FLASH = "vllm.v1.attention.backends.cpu_attn.CPUAttention", "vllm.v1.attention.backends.flash_attn.FlashAttention"
ATTENTION = "num_heads head_size scale num_kv_heads sliding_window logits_soft_cap sinks alibi_slopes "
ATTENTION += "kv_sharing_target_layer_name kv_cache_dtype supports_quant_query_input"
FORWARD = "layer query key value kv_cache attn_metadata output output_scale output_block_scale"
BUILD = "common_prefix_len common_attn_metadata fast_build"
XARGS = "self.vllm_xargs if self.vllm_xargs"
AFTER = "query, key, value, output, self.layer_name"

ASSUMED = [
    # Configuration
    Exists("vllm.config.VllmConfig", "additional_config instance_id", "chunk selection is asked for there, by engine"),
    Exists("vllm.config.VllmConfig", "model_config cache_config parallel_config scheduler_config", "read at start"),
    Exists("vllm.config.VllmConfig", "compilation_config speculative_config kv_transfer_config", "read at start"),
    Exists("vllm.config.VllmConfig", "use_v2_model_runner", "which runner"),
    Exists("vllm.config.ModelConfig", "dtype max_model_len hf_text_config logits_processors", "read at start"),
    Exists("vllm.config.ModelConfig", "tokenizer tokenizer_revision runner_type trust_remote_code", "its tokenizer"),
    Called("vllm.config.ModelConfig.get_vocab_size", "", "how wide logits are"),
    Called("vllm.config.ModelConfig.try_get_generation_config", "", "ids that end a text"),
    Called("vllm.config.ModelConfig.get_total_num_kv_heads", "", "the whole model's, under tensor parallelism"),
    Exists("vllm.config.CacheConfig", "cache_dtype block_size num_gpu_blocks", "summaries lie beside the cache"),
    Exists("vllm.config.CompilationConfig", "static_forward_context splitting_ops", "layers by name; our operator"),
    Exists("vllm.config.SchedulerConfig", "max_num_seqs", "the most rows of a step"),
    Exists("vllm.config.VllmConfig", "diffusion_config", "refused: such models have samplers of their own"),
    Exists("vllm.config.SpeculativeConfig", "num_speculative_tokens", "how many drafts a phase may lie behind"),
    Exists("vllm.config.ParallelConfig", "rank tensor_parallel_size pipeline_parallel_size", "who has which heads"),
    Exists("vllm.config.ParallelConfig", "decode_context_parallel_size prefill_context_parallel_size", "refused"),
    Exists("vllm.config.ParallelConfig", "use_ubatching", "refused"),
    Says("vllm.v1.worker.worker_base.WorkerBase", "self.parallel_config.rank = rank", "a process knows its rank"),
    # How heads are divided among processes
    Exists(LINEAR, "num_kv_head_replicas", "neighbours share a head"),
    Says(LINEAR, "self.tp_rank // self.num_kv_head_replicas", "likewise"),
    # Attention backends
    Exists(f"{CPU}BackendImpl", ATTENTION, "refused or read"),
    Exists(f"{FLASH}Impl", ATTENTION, "refused or read"),
    Overridden(f"{CPU}BackendImpl.forward", FORWARD, "keys and queries are taken there"),
    Overridden(f"{FLASH}Impl.forward", FORWARD, "keys and queries are taken there"),
    Says(f"{FLASH}Impl", "(-1, -1)", "a layer without a window says so"),
    Says(f"{CPU}BackendImpl", "self.sliding_window = -1", "a layer without a window says so"),
    Says("vllm.model_executor.layers.attention.Attention.forward", AFTER, "keys come as they are, not quantized"),
    Says("vllm.model_executor.layers.attention.Attention", "self.impl.supports_quant_query_input", "queries may not"),
    Exists("vllm.model_executor.layers.attention.Attention", "impl get_kv_cache_spec", "of static_forward_context"),
    Called(f"{CPU}MetadataBuilder", "kv_cache_spec layer_names vllm_config device", "ours goes before it"),
    Called(f"{FLASH}MetadataBuilder", "kv_cache_spec layer_names vllm_config device", "ours goes before it"),
    Overridden(f"{CPU}MetadataBuilder.build", BUILD, "a selection is made there"),
    Overridden(f"{FLASH}MetadataBuilder.build", BUILD, "a selection is made there"),
    Exists(f"{CPU}MetadataBuilder", "num_heads num_kv_heads head_dim dtype isa kv_cache_dtype", "the kernel's plan"),
    Exists(f"{CPU}Metadata", "block_table seq_lens scheduler_metadata query_start_loc causal dynamic_causal", "too"),
    Exists(f"{FLASH}Metadata", "block_table seq_lens scheduler_metadata", "replaced for each layer"),
    Overridden(f"{FLASH}MetadataBuilder.get_cudagraph_support", "vllm_config kv_cache_spec", "full graphs or none"),
    Overridden(f"{FLASH}MetadataBuilder.build_for_cudagraph_capture", "common_attn_metadata", "a graph's"),
    Exists(f"{FLASH}MetadataBuilder", "supports_update_block_table", "a selection is one table's"),
    Exists(f"{CPU}Backend", "get_impl_cls get_builder_cls", "ours answer in their place"),
    Exists(f"{FLASH}Backend", "get_impl_cls get_builder_cls get_name", "ours answer in their place"),
    Exists(f"{BACKEND}.AttentionCGSupport", "NEVER UNIFORM_SINGLE_TOKEN_DECODE", "full graphs or none"),
    Exists("vllm.config.compilation.CUDAGraphMode", "has_full_cudagraphs", "full graphs where vLLM has them"),
    Exists(STEP, "num_reqs block_table_tensor seq_lens max_seq_len max_query_len", "a step"),
    Exists(STEP, "query_start_loc query_start_loc_cpu is_prefilling req_idx", "its rows"),
    Exists(STEP, "seq_lens_cpu_upper_bound", "how long its rows are, known without waiting"),
    Exists("vllm.v1.kv_cache_interface.FullAttentionSpec", "block_size", "the layers that select; how long a block is"),
    Called(
        "vllm._custom_ops.cpu_attn_get_scheduler_metadata",
        "num_reqs= num_heads= num_kv_heads= head_dim= seq_lens= dtype= query_start_loc= causal= sliding_window_size= "
        "isa= enable_kv_split= dynamic_causal= kv_cache_dtype=",
        "the CPU kernel's plan, for the tokens that are read",
    ),
    Exists("vllm.envs", "VLLM_CPU_ATTN_SPLIT_KV VLLM_USE_V2_MODEL_RUNNER", "the plan; which runner"),
    Exists("vllm.envs", "VLLM_RAY_EXTRA_ENV_VARS_TO_COPY VLLM_WORKER_MULTIPROC_METHOD", "what processes are told"),
    Exists("vllm.envs", "VLLM_ENABLE_V1_MULTIPROCESSING VLLM_LOGGING_LEVEL", "benchmarks look into the engine"),
    Exists("vllm.v1.attention.backends.registry.AttentionBackendEnum", "CPU_ATTN CUSTOM is_overridden", "our backends"),
    Called("vllm.v1.attention.backends.registry.register_backend", "backend class_path", "our backends"),
    Exists("vllm.platforms.interface.Platform", "is_cpu", "which backend is ours"),
    Exists("vllm.forward_context.ForwardContext", "attn_metadata", "the bottom layer's operator finds its step there"),
    Says("vllm.model_executor.models.llama", "self.layers = make_layers(", "the list of layers is called layers"),
    Says("vllm.model_executor.models.llama.LlamaDecoderLayer.forward", "return (hidden_states, residual)", "their sum"),
    Says("vllm.plugins", "'vllm.general_plugins'", "the group of our entry point"),
    Says("vllm.v1.worker.worker_base", "load_general_plugins()", "every worker loads the plugin"),
    Says("vllm.v1.worker.gpu_model_runner", "is_prefilling=is_prefilling", "V1 says which rows read their prompts"),
    Exists(f"{V2}.attn_utils.build_attn_metadata", "", "V2 makes a step's metadata there"),
    Says(f"{V2}.attn_utils.build_attn_metadata", "req_idx=", "V2 says whose each row is"),
    Says(f"{V2}.attn_utils.build_attn_metadata", "is_prefilling=", "V2 says which rows read their prompts"),
    # Logits processors
    Abstract(f"{V1}.LogitsProcessor", "__init__ apply is_argmax_invariant update_state", "ours has these"),
    Overridden(f"{V1}.LogitsProcessor.__init__", "vllm_config device is_pin_memory", "V1 makes ours so"),
    Overridden(f"{V1}.LogitsProcessor.update_state", "batch_update", "V1: who joined, left or moved"),
    Overridden(f"{V1}.LogitsProcessor.apply", "logits", "V1: a step"),
    Overridden(f"{V1}.LogitsProcessor.validate_params", "sampling_params", "V1: admission"),
    Exists(f"{V1}.interface.BatchUpdate", "removed added moved", "V1: taken in by us in that order"),
    Says(f"{V1}.interface", "AddedRequest = tuple[int, SamplingParams, list[int] | None, list[int]]", "V1: who joined"),
    Says(f"{V1}.interface", "MovedRequest = tuple[int, int, MoveDirectionality]", "V1: who moved"),
    Exists(f"{V1}.MoveDirectionality", "SWAP", "V1: two rows changed places"),
    Abstract(f"{OF_V2}.LogitsProcessor", "apply", "ours has it"),
    Overridden(f"{OF_V2}.LogitsProcessor.__init__", "vllm_config req_states", "V2 makes ours so"),
    Overridden(f"{OF_V2}.LogitsProcessor.apply", "logits ctx", "V2: a step"),
    Overridden(f"{OF_V2}.LogitsProcessor.add_request", "req_idx sampling_params", "V2: who joined"),
    Overridden(f"{OF_V2}.LogitsProcessor.validate_params", "sampling_params", "V2: admission"),
    Overridden(f"{OF_V2}.LogitsProcessor.apply_staged_writes", "", "V2: before each step"),
    Exists(f"{OF_V2}.LogitsProcRequestState", "device max_num_reqs all_token_ids", "V2: histories"),
    Exists(f"{OF_V2}.LogitsProcRequestState", "prompt_len prefill_len", "V2: prompts"),
    Exists(f"{OF_V2}.LogitsContext", "expanded_idx_mapping idx_mapping_np", "V2: whose a row is"),
    Exists(f"{OF_V2}.LogitsContext", "expanded_local_pos input_ids pos", "V2: draft tokens"),
    Says(DRAFTED, "pos, draft_sampled, expanded_local_pos", "V2: likewise where drafts are verified"),
    Exists(f"{V2}.buffer_utils.StagedWriteTensor", "gpu", "V2: histories on the device"),
    Exists(f"{V2}.buffer_utils.UvaBackedTensor", "np gpu", "V2: lengths on both sides"),
    Exists("vllm.SamplingParams", "extra_args temperature top_p top_k min_p stop_token_ids", "what a request asks for"),
    # The server
    Says("vllm.entrypoints.openai.chat_completion.protocol.ChatCompletionRequest", XARGS, "vllm_xargs are extra_args"),
    Says("vllm.entrypoints.openai.completion.protocol.CompletionRequest", XARGS, "vllm_xargs are extra_args"),
    Says("vllm.entrypoints.speech_to_text.transcription.protocol", "json.loads(xargs)", "in forms they are a text"),
    Called("vllm.EngineArgs.create_engine_config", "", "an engine in which nothing would be selected is refused there"),
    Called("vllm.entrypoints.cli.serve.cmd_init", "", "`decoding serve` is `vllm serve`"),
    Called("vllm.entrypoints.cli.serve.ServeSubcommand.subparser_init", "subparsers", "its options"),
    Called("vllm.entrypoints.cli.serve.ServeSubcommand.validate", "args", "their check"),
    Called("vllm.entrypoints.cli.serve.ServeSubcommand.cmd", "args", "its run"),
    Exists("vllm.EngineArgs", "logits_processors additional_config override_generation_config", "options that we add"),
    Exists("vllm.EngineArgs", "block_size attention_backend served_model_name", "options that we add"),
    Exists("vllm.EngineArgs", "load_format enforce_eager create_engine_config", "a trial of a model without weights"),
    Exists("vllm.EngineArgs", "max_num_seqs max_num_batched_tokens max_model_len dtype hf_overrides", "benchmarks"),
    Exists("vllm.EngineArgs", "kv_cache_memory_bytes gpu_memory_utilization disable_log_stats", "benchmarks, sweeps"),
    Says("vllm.v1.sample.logits_processor.build_logitsprocs", "raise ValueError", "V1 refuses ours beside drafts"),
    # Tokenizers
    Called("vllm.tokenizers.cached_tokenizer_from_config", "model_config", "the engine's"),
    Exists("vllm.tokenizers.mistral.MistralTokenizer", "transformers_tokenizer", "mistral_common's, from transformers"),
    # The trial of a model without its weights
    Called(
        "vllm.distributed.init_distributed_environment",
        "world_size rank distributed_init_method local_rank backend",
        "a model is built in a world of one",
    ),
    Called(
        "vllm.distributed.ensure_model_parallel_initialized",
        "tensor_model_parallel_size pipeline_model_parallel_size",
        "likewise",
    ),
    Called("vllm.model_executor.model_loader.utils.initialize_model", "vllm_config", "likewise"),
    Called("vllm.model_executor.models.utils.extract_layer_index", "layer_name", "a layer's place in the model"),
    # The engine from the inside, for benchmarks and sweeps
    Exists("vllm.LLM", "generate llm_engine", "texts"),
    Exists("vllm.v1.engine.llm_engine.LLMEngine", "engine_core add_request step abort_request", "steps, one by one"),
    Exists("vllm.v1.engine.llm_engine.LLMEngine", "has_unfinished_requests vllm_config", "likewise"),
    Exists("vllm.v1.engine.core_client.InprocClient", "engine_core", "an engine in this process"),
    Exists("vllm.v1.engine.core.EngineCore", "model_executor scheduler", "likewise"),
    Exists("vllm.v1.executor.uniproc_executor.UniProcExecutor", "driver_worker", "likewise"),
    Exists("vllm.v1.worker.worker_base.WorkerWrapperBase", "worker", "likewise"),
    Exists("vllm.v1.worker.gpu_model_runner.GPUModelRunner", "attn_groups input_batch model", "likewise"),
    Called("vllm.v1.worker.utils.AttentionGroup.get_metadata_builder", "ubatch_id", "to take the selection out"),
    Exists("vllm.v1.worker.gpu_input_batch.InputBatch", "logitsprocs logitsprocs_need_output_token_ids", "a processor"),
    Exists(f"{V1}.LogitsProcessors", "non_argmax_invariant", "to take a processor out"),
]


def imported() -> list[str]:
    """What our packages import from vLLM."""
    names = set()
    for package in ("decoding", "experiments"):
        for path in (OURS / package).rglob("*.py"):
            for node in ast.walk(parsed(path)):
                if isinstance(node, ast.ImportFrom) and (node.module or "").partition(".")[0] == "vllm":
                    names |= {f"{node.module}.{alias.name}" for alias in node.names}
    return sorted(names)


needs_sources = pytest.mark.skipif(SOURCES is None, reason="no vLLM: set VLLM_SOURCES to a folder with its sources")


FAKE = """
from abc import ABC, abstractmethod
from . import other
from .other import *

class Base(ABC):
    held: int = 0

    @abstractmethod
    def step(self, rows, *, wanted): ...

class Made(Base):
    def __init__(self, name, size=1):
        self.name, self._size = name, size
        other.thing = size

    if True:
        def read(self, tokens, mask=None):
            local = tokens
            return (local, mask)
"""


@pytest.mark.parametrize(
    ("assumed", "problem"),
    [
        (Exists("fake.Made", "held name _size step read", ""), None),
        (Exists("fake.Made", "held thing local", ""), "lacks thing, local"),
        (Exists("fake.Gone", "", ""), "is not there"),
        (Exists("fake", "Made Base other star", ""), None),
        (Exists("fake", "Made gone", ""), "lacks gone"),
        (Called("fake.Made", "name", ""), None),
        (Called("fake.Made", "size=", ""), "wants name"),
        (Called("fake.Made.read", "tokens mask=", ""), None),
        (Called("fake.Made.read", "mask", ""), "begins with tokens"),
        (Called("fake.Made.read", "tokens other=", ""), "does not take other"),
        (Called("fake.Made.step", "rows", ""), "wants wanted"),
        (Overridden("fake.Made.read", "tokens mask", ""), None),
        (Overridden("fake.Made.read", "tokens", ""), "takes tokens, mask"),
        (Says("fake.Made.read", "return (local, mask)", ""), None),
        (Says("fake.Made.read", "return tokens", ""), "does not say 'return tokens'"),
        (Abstract("fake.Made", "step", ""), None),
        (Abstract("fake.Made", "read", ""), "wants step of its subclasses"),
    ],
)
def test_what_is_missing_is_seen(tmp_path, assumed, problem):
    (tmp_path / "fake").mkdir()
    (tmp_path / "fake" / "__init__.py").write_text(FAKE)
    (tmp_path / "fake" / "other.py").write_text("star = 1\n")
    assert assumed.missing(tmp_path) == problem


@needs_sources
@pytest.mark.parametrize("name", imported())
def test_what_we_import_is_there(name):
    module, _, last = name.rpartition(".")
    is_lazy = last in {"current_platform"}  # made by the module's __getattr__
    assert find(SOURCES, name) is not None or (is_lazy and find(SOURCES, module) is not None), f"{name} is gone"


@needs_sources
@pytest.mark.parametrize("assumed", ASSUMED, ids=lambda each: f"{each.what}: {each.why}")
def test_what_we_assume_holds(assumed):
    problem = assumed.missing(SOURCES)
    assert problem is None, f"{assumed.what} {problem}. We want {assumed.names!r} of it: {assumed.why}"
