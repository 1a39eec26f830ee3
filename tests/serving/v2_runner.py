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
from vllm.v1.outputs import DraftTokenIds, ModelRunnerOutput
from vllm.v1.request import Request
from vllm.v1.structured_output import StructuredOutputManager
from vllm.v1.worker.gpu import buffer_utils, model_runner
from vllm.v1.worker.gpu.attn_utils import init_attn_backend
from vllm.v1.worker.gpu.block_table import BlockTables
from vllm.v1.worker.gpu.cudagraph_utils import BatchExecutionDescriptor
from vllm.v1.worker.gpu.input_batch import InputBuffers
from vllm.v1.worker.gpu.model_states.default import DefaultModelState
from vllm.v1.worker.gpu.sample import sampler
from vllm.v1.worker.gpu.sample.logits_processor import LogitsProcRequestState, build_custom_logits_processors
from vllm.v1.worker.gpu.spec_decode import rejection_sampler
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


def _combine_sampled(
    input_ids, idx_mapping, sampled, starts, lengths, prefill_len, drafts, logit_starts, num_logits, num_sampled
):
    indices = torch.empty(num_logits, dtype=torch.long)
    for row, slot in enumerate(idx_mapping.tolist()):
        first, end = int(logit_starts[row]), int(logit_starts[row + 1])
        begin = int(starts[row + 1]) - (end - first)
        indices[first:end] = torch.arange(begin, begin + end - first)
        if lengths[row] > prefill_len[slot]:
            if lengths[row] - (end - first) >= prefill_len[slot]:
                input_ids[begin] = sampled[slot, 0]
            input_ids[begin + 1 : begin + end - first] = drafts[slot, : end - first - 1]
    return indices


def _expand_idx_mapping(idx_mapping, num_logits, starts, most):
    counts = (starts[1:] - starts[:-1]).long()
    first = starts[:-1].repeat_interleave(counts, output_size=num_logits)
    return idx_mapping.repeat_interleave(counts), torch.arange(num_logits, dtype=torch.int32) - first


def _gather_drafts(input_ids, positions, indices, slots, places, prefill_len):
    ids, at = input_ids[indices].clone(), positions[indices]
    ids[(places > 0) & (at - places < prefill_len[slots])] = -1  # fill up a step that reads a prompt
    return ids, at


def _accept_greedily(
    logits, draft_logits, drafts, starts, pos, idx_mapping, slots, places, temperature, seed, most, *rest, **options
):
    """Of each request the tokens that its scores like best, up to the first that is not its draft; and how many."""
    best, counts = logits.argmax(-1), []
    sampled = torch.zeros(len(starts) - 1, most + 1, dtype=torch.long)
    for row, (first, end) in enumerate(zip(starts.tolist(), starts[1:].tolist(), strict=False)):
        sampled[row, : end - first] = best[first:end]
        counts.append(1 + int((best[first : end - 1] == drafts[first + 1 : end]).long().cumprod(0).sum()))
    return sampled, torch.tensor(counts, dtype=torch.int32)


def _count_sampled(counts, lengths, starts, idx_mapping, prefill_len):
    is_read = lengths[: len(idx_mapping)] >= prefill_len[idx_mapping]
    counts = counts.where(is_read, 0)
    return counts, (starts[1:] - starts[:-1] - counts).where(is_read, 0)


def put_plain_kernels(patch):
    """Instead of Triton's."""
    patch.setattr(buffer_utils, "is_uva_available", lambda: False)
    patch.setattr(buffer_utils.StagedWriteTensor, "apply_write", _apply_write)
    patch.setattr(BlockTables, "gather_block_tables", _gather_block_tables)
    patch.setattr(BlockTables, "compute_slot_mappings", _compute_slot_mappings)
    patch.setattr(model_runner, "prepare_prefill_inputs", _prepare_prefill_inputs)
    patch.setattr(model_runner, "prepare_pos_seq_lens", _prepare_pos_seq_lens)
    patch.setattr(model_runner, "combine_sampled_and_draft_tokens", _combine_sampled)
    patch.setattr(model_runner, "expand_idx_mapping", _expand_idx_mapping)
    patch.setattr(sampler, "gumbel_sample", lambda logits, *rest, **options: logits.argmax(-1))
    patch.setattr(rejection_sampler, "gather_draft_sampled", _gather_drafts)
    patch.setattr(rejection_sampler, "rejection_sample", _accept_greedily)
    for module in (sampler, rejection_sampler):
        patch.setattr(module, "get_num_sampled_and_rejected", _count_sampled)


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
    """What of vLLM's runner comes before and behind a model. With vLLM's samplers, unless it has a processor alone."""

    def __init__(self, config, blocks, processor=None):
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
        drafts = config.num_speculative_tokens
        self.req_states = RequestState(self.max_num_reqs, length, self.max_num_tokens, drafts, vocabulary, CPU)
        nothing = SimpleNamespace(add_request=lambda *_: None, remove_request=lambda *_: None)
        self.model_state = SimpleNamespace(
            **vars(nothing),
            apply_staged_writes=lambda: None,
            num_new_sampled_tokens_per_step=1,
            max_model_len=length,
            supports_mm_inputs=False,
        )
        if processor is None:
            self._add_samplers(vocabulary)
        else:
            self.sampler = processor(config, LogitsProcRequestState.from_request_state(self.req_states))
        self.prompt_logprobs_worker = self.lora_state = nothing
        self.pooling_runner = self.pp_handler = self.encoder_cache = self.adaptive_verification = None
        self.pcp_manager = self.fast_prefill = self.kv_block_zeroer = None
        self.is_last_pp_rank, self.use_pp, self.decode_query_len = True, False, 1 + drafts
        self.graph_rows = 0  # of a CUDA graph of whole steps of single tokens, if there is one

    def _add_samplers(self, vocabulary):
        named = self.model_config.logits_processors
        custom = build_custom_logits_processors(self.vllm_config, self.req_states, False, named)
        self.sampler = sampler.Sampler(
            self.vllm_config, self.max_num_reqs, vocabulary, CPU, self.req_states, custom_logits_processors=custom
        )
        speculative = self.vllm_config.speculative_config
        self.rejection_sampler = rejection_sampler.RejectionSampler(self.sampler, speculative, CPU)

    def sampled(self, batch, logits):
        """The tokens of each row of a batch, greedily: those that the scores [rows, V] were sampled to."""
        output = (self.rejection_sampler if batch.num_draft_tokens else self.sampler)(logits, batch)
        return [
            ids[:count]
            for ids, count in zip(output.sampled_token_ids.tolist(), output.num_sampled.tolist(), strict=True)
        ]

    def prepared(self, scheduled):
        """A scheduler's step as a batch, and its attention metadata by layer."""
        self.finish_requests(scheduled)
        self.add_requests(scheduled)
        self.update_requests(scheduled)
        self.block_tables.apply_staged_writes()
        state, _ = self.gather_batch_req_state(scheduled, dummy_run=False)
        mode, tokens, rows = CUDAGraphMode.NONE, state.num_tokens, None
        if self.graph_rows and tokens == len(state.req_ids):
            mode, tokens, rows = CUDAGraphMode.FULL, self.graph_rows, self.graph_rows
        batch = self.prepare_inputs(scheduled, state, BatchExecutionDescriptor(mode, tokens, rows), 0)
        return batch, self.metadata(batch, *self.prepare_attn(batch), mode)

    def metadata(self, batch, block_tables, slot_mappings, mode=CUDAGraphMode.NONE, for_capture=False):
        """A batch's attention metadata by layer."""
        return DefaultModelState.prepare_attn(
            self.model_state,
            batch,
            mode,
            block_tables,
            slot_mappings,
            self.attn_groups,
            self.kv_cache_config,
            for_capture,
        )

    def finish(self, batch, sampled):
        """Takes in the tokens that were sampled for the rows of a batch."""
        states = self.req_states
        drafts = batch.num_draft_tokens_per_req
        for row, (slot, ids) in enumerate(zip(batch.idx_mapping_np.tolist(), sampled, strict=True)):
            rejected = 0 if drafts is None or not ids else int(drafts[row]) + 1 - len(ids)
            states.num_computed_tokens.gpu[slot] += int(batch.num_scheduled_tokens[row]) - rejected
            if ids:
                begin = int(states.total_len.gpu[slot])
                states.all_token_ids.gpu[slot, begin : begin + len(ids)] = torch.tensor(ids, dtype=torch.int32)
                states.total_len.gpu[slot] += len(ids)
                states.last_sampled_tokens[slot] = ids[-1]

    def draft(self, name, ids):
        """Drafts for a request's next step, on the device, as a speculator leaves them; −1 for one that is none."""
        self.req_states.draft_tokens[self.req_states.req_id_to_index[name], : len(ids)] = torch.tensor(ids)


class Serving:
    """A scheduler and a runner. ``model`` is called with what a step's tokens are, and its metadata."""

    def __init__(self, config, blocks, processor=None):
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

        def sampled(batch, metadata):
            with set_forward_context(metadata, self.config):
                model(batch, metadata)
            ended = batch.seq_lens[: batch.num_reqs].numpy() >= batch.prefill_len_np
            return [[sample()] if is_ended else [] for is_ended in ended]

        return self._step(sampled)

    def step_with_drafts(self, scores, drafts):
        """Likewise, with vLLM's samplers, and drafts for the step behind it.

        Args:
            scores: of a batch, gives the logits [rows, V].
            drafts: of a request, gives the ids that are drafted for it.
        """
        batch = self._step(lambda batch, metadata: self.runner.sampled(batch, scores(batch)))
        held = [name for name in self.runner.req_states.req_id_to_index if not self.requests[name].is_finished()]
        drafted = {name: drafts(self.requests[name]) for name in held}
        for name, ids in drafted.items():
            self.runner.draft(name, ids)
        # The host knows how many there are and not which, as with async scheduling.
        self.scheduler.update_draft_token_ids(DraftTokenIds(held, [[-1] * len(ids) for ids in drafted.values()]))
        return batch

    def _step(self, sampled_of):
        scheduled = self.scheduler.schedule()
        if not scheduled.total_num_scheduled_tokens:
            self.runner.finish_requests(scheduled)
            return None
        batch, metadata = self.runner.prepared(scheduled)
        sampled = sampled_of(batch, metadata)
        self.runner.finish(batch, sampled)
        places = {name: row for row, name in enumerate(batch.req_ids)}
        self.scheduler.update_from_output(scheduled, ModelRunnerOutput(batch.req_ids, places, sampled))
        return batch
