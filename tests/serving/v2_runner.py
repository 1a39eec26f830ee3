"""vLLM's V2 model runner on a CPU: its own classes and methods, with plain PyTorch where it has Triton kernels.

The scheduler, the tables of requests and blocks, the batches and the attention metadata are vLLM's. There is no model:
keys, queries and hidden states of a token follow from the token.
"""

from types import SimpleNamespace

import pytest
import torch

pytest.importorskip("vllm", reason="vLLM is not installed; `make test` runs these in .venv-vllm")

from vllm import SamplingParams
from vllm.config import set_current_vllm_config
from vllm.config.compilation import CUDAGraphMode
from vllm.engine.arg_utils import EngineArgs
from vllm.forward_context import set_forward_context
from vllm.model_executor.layers.attention import Attention
from vllm.utils.hashing import sha256
from vllm.v1.core.kv_cache_utils import get_request_block_hasher, init_none_hash
from vllm.v1.core.sched.scheduler import Scheduler
from vllm.v1.kv_cache_interface import KVCacheConfig, KVCacheGroupSpec
from vllm.v1.outputs import ModelRunnerOutput
from vllm.v1.request import Request
from vllm.v1.structured_output import StructuredOutputManager
from vllm.v1.worker.gpu import buffer_utils, model_runner
from vllm.v1.worker.gpu.attn_utils import init_attn_backend
from vllm.v1.worker.gpu.block_table import BlockTables
from vllm.v1.worker.gpu.cudagraph_utils import BatchExecutionDescriptor
from vllm.v1.worker.gpu.input_batch import InputBuffers
from vllm.v1.worker.gpu.model_states.default import DefaultModelState
from vllm.v1.worker.gpu.sample.logits_processor import LogitsProcRequestState
from vllm.v1.worker.gpu.states import RequestState

CPU = torch.device("cpu")


def _apply_write(self):
    begin = 0
    for index, start, end in zip(
        self._staged_write_indices, self._staged_write_starts, self._staged_write_cu_lens, strict=True
    ):
        content = torch.tensor(self._staged_write_contents[begin:end], dtype=self.dtype)
        row = self.gpu[index] if self.gpu.dim() > 1 else self.gpu[index : index + 1]
        row[start : start + len(content)] = content
        begin = end
    self.clear_staged_writes()


def _gather_block_tables(self, idx_mapping, num_reqs_padded, out=None, out_ptrs=None):
    """Rows keep what they had behind their blocks, as with vLLM's kernel."""
    for group, (held, given) in enumerate(zip(self.block_tables, self.input_block_tables, strict=True)):
        for row, slot in enumerate(idx_mapping.tolist()):
            count = int(self.num_blocks.np[group, slot])
            given[row, :count] = held.gpu[slot, :count]
    return tuple(table[:num_reqs_padded] for table in self.input_block_tables)


def _compute_slot_mappings(self, idx_mapping, query_start_loc, positions, num_tokens_padded, out=None):
    self.slot_mappings.fill_(-1)
    for group, (held, size) in enumerate(zip(self.block_tables, self.block_sizes, strict=True)):
        for row, slot in enumerate(idx_mapping.tolist()):
            tokens = slice(int(query_start_loc[row]), int(query_start_loc[row + 1]))
            at = positions[tokens]
            self.slot_mappings[group, tokens] = held.gpu[slot, at // size].long() * size + at % size
    return self.slot_mappings[:, :num_tokens_padded]


def _prepare_prefill_inputs(input_ids, next_tokens, idx_mapping, starts, all_ids, prefill_len, computed):
    for row, slot in enumerate(idx_mapping.tolist()):
        begin, end, done = int(starts[row]), int(starts[row + 1]), int(computed[slot])
        if done < prefill_len[slot]:
            input_ids[begin:end] = all_ids[slot, done : done + end - begin]


def _prepare_pos_seq_lens(idx_mapping, starts, computed, positions, lengths):
    lengths.zero_()
    for row, slot in enumerate(idx_mapping.tolist()):
        begin, end, done = int(starts[row]), int(starts[row + 1]), int(computed[slot])
        positions[begin:end] = torch.arange(done, done + end - begin)
        lengths[row] = done + end - begin


def _combine_sampled(input_ids, idx_mapping, sampled, starts, lengths, prefill_len, *rest):
    for row, slot in enumerate(idx_mapping.tolist()):
        if lengths[row] > prefill_len[slot]:
            input_ids[int(starts[row + 1]) - 1] = sampled[slot, 0]
    return starts[1 : len(idx_mapping) + 1].long() - 1


def put_plain_kernels(patch):
    """Instead of Triton's."""
    patch.setattr(buffer_utils, "is_uva_available", lambda: False)
    patch.setattr(buffer_utils.StagedWriteTensor, "apply_write", _apply_write)
    patch.setattr(BlockTables, "gather_block_tables", _gather_block_tables)
    patch.setattr(BlockTables, "compute_slot_mappings", _compute_slot_mappings)
    patch.setattr(model_runner, "prepare_prefill_inputs", _prepare_prefill_inputs)
    patch.setattr(model_runner, "prepare_pos_seq_lens", _prepare_pos_seq_lens)
    patch.setattr(model_runner, "combine_sampled_and_draft_tokens", _combine_sampled)


def configured(model, patch, **options):
    """An engine's configuration, and the layers of a model in it. Then V2 is on: vLLM refuses it without Triton."""
    config = EngineArgs(str(model), skip_tokenizer_init=True, dtype="float32", enforce_eager=True, **options)
    config = config.create_engine_config()
    patch.setenv("VLLM_USE_V2_MODEL_RUNNER", "1")
    assert config.use_v2_model_runner
    hf = config.model_config.hf_text_config
    head = hf.hidden_size // hf.num_attention_heads
    with set_current_vllm_config(config):
        for i in range(hf.num_hidden_layers):
            Attention(
                hf.num_attention_heads,
                head,
                head**-0.5,
                num_kv_heads=hf.num_key_value_heads,
                cache_config=config.cache_config,
                prefix=f"model.layers.{i}.self_attn.attn",
            )
    return config


class Runner(model_runner.GPUModelRunner):
    """What of vLLM's runner comes before and behind a model."""

    def __init__(self, config, blocks, processor):
        scheduling, length = config.scheduler_config, config.model_config.max_model_len
        self.vllm_config, self.model_config, self.device = config, config.model_config, CPU
        self.cache_config, self.parallel_config = config.cache_config, config.parallel_config
        self.max_num_reqs, self.max_num_tokens = scheduling.max_num_seqs, scheduling.max_num_batched_tokens
        layers = config.compilation_config.static_forward_context
        (spec,) = {layer.get_kv_cache_spec(config) for layer in layers.values()}
        self.kv_cache_config = KVCacheConfig(blocks, [], [KVCacheGroupSpec(list(layers), spec)])
        config.cache_config.num_gpu_blocks = blocks
        self.attn_groups, *_ = init_attn_backend(self.kv_cache_config, config, CPU)
        count = -(-length // spec.block_size)
        self.block_tables = BlockTables([spec.block_size], self.max_num_reqs, self.max_num_tokens, [count], CPU)
        self.input_buffers = InputBuffers(self.max_num_reqs, self.max_num_tokens, CPU)
        vocabulary = config.model_config.get_vocab_size()
        self.req_states = RequestState(self.max_num_reqs, length, self.max_num_tokens, 0, vocabulary, CPU)
        self.processor = processor(config, LogitsProcRequestState.from_request_state(self.req_states))
        nothing = SimpleNamespace(add_request=lambda *_: None, remove_request=lambda *_: None)
        self.model_state = SimpleNamespace(
            **vars(nothing),
            apply_staged_writes=lambda: None,
            num_new_sampled_tokens_per_step=1,
            max_model_len=length,
            supports_mm_inputs=False,
        )
        self.sampler = self.processor
        self.prompt_logprobs_worker = self.lora_state = nothing
        self.pooling_runner = self.pp_handler = self.encoder_cache = self.adaptive_verification = None
        self.pcp_manager = self.fast_prefill = self.kv_block_zeroer = None
        self.is_last_pp_rank, self.use_pp, self.decode_query_len = True, False, 1

    def prepared(self, scheduled):
        """A scheduler's step as a batch, and its attention metadata by layer."""
        self.finish_requests(scheduled)
        self.add_requests(scheduled)
        self.update_requests(scheduled)
        self.block_tables.apply_staged_writes()
        state, _ = self.gather_batch_req_state(scheduled, dummy_run=False)
        eager = BatchExecutionDescriptor(CUDAGraphMode.NONE, state.num_tokens, None)
        batch = self.prepare_inputs(scheduled, state, eager, 0)
        return batch, self.metadata(batch, *self.prepare_attn(batch))

    def metadata(self, batch, block_tables, slot_mappings):
        """A batch's attention metadata by layer."""
        return DefaultModelState.prepare_attn(
            self.model_state,
            batch,
            CUDAGraphMode.NONE,
            block_tables,
            slot_mappings,
            self.attn_groups,
            self.kv_cache_config,
        )

    def finish(self, batch, sampled):
        """Takes in the tokens that were sampled for the rows of a batch."""
        states = self.req_states
        for row, slot in enumerate(batch.idx_mapping_np.tolist()):
            states.num_computed_tokens.gpu[slot] += int(batch.num_scheduled_tokens[row])
            if sampled[row]:
                states.all_token_ids.gpu[slot, states.total_len.gpu[slot]] = sampled[row][0]
                states.total_len.gpu[slot] += 1
                states.last_sampled_tokens[slot] = sampled[row][0]


class Serving:
    """A scheduler and a runner. ``model`` is called with what a step's tokens are, and its metadata."""

    def __init__(self, config, blocks, processor):
        init_none_hash(sha256)
        self.runner = Runner(config, blocks, processor)
        self.config, size = config, self.runner.block_tables.block_sizes[0]
        self._hasher = get_request_block_hasher(size, sha256)
        manager = StructuredOutputManager(config)
        self.scheduler = Scheduler(config, self.runner.kv_cache_config, manager, block_size=size)
        self.requests = {}

    def add(self, name, ids, **options):
        """A request."""
        params = SamplingParams(ignore_eos=True, **options)
        self.requests[name] = Request(name, list(ids), params, None, block_hasher=self._hasher)
        self.scheduler.add_request(self.requests[name])

    def step(self, model, sample):
        """Schedules a step, hands it to a model, and takes in what is sampled. Its batch; None if there was nothing."""
        scheduled = self.scheduler.schedule()
        if not scheduled.total_num_scheduled_tokens:
            self.runner.finish_requests(scheduled)
            return None
        batch, metadata = self.runner.prepared(scheduled)
        with set_forward_context(metadata, self.config):
            model(batch, metadata)
        ended = batch.seq_lens[: batch.num_reqs].numpy() >= batch.prefill_len_np
        sampled = [[sample()] if is_ended else [] for is_ended in ended]
        self.runner.finish(batch, sampled)
        places = {name: row for row, name in enumerate(batch.req_ids)}
        self.scheduler.update_from_output(scheduled, ModelRunnerOutput(batch.req_ids, places, sampled))
        return batch
