"""`ChunkSelection`: what is selected and how, and its attachment to a model of transformers."""

from __future__ import annotations

from collections.abc import Callable
from copy import deepcopy
from numbers import Integral, Real
from os import PathLike
from types import TracebackType
from typing import Any, Never
from weakref import WeakMethod, WeakSet

import torch
from torch import Tensor, nn
from transformers import Cache

from chunkllm.adapters import ChunkAdapters
from chunkllm.boundaries import punctuation_boundaries
from chunkllm.calibration import ChunkCalibration, open_saved
from chunkllm.contiguous.attention import intercept
from chunkllm.contiguous.cache import ChunkCache
from chunkllm.contiguous.calls import Running, call_of, wrap_generate
from chunkllm.contiguous.ids import tell_ids, told_ids
from chunkllm.contiguous.layer import ChunkLayer
from chunkllm.contiguous.lossless import lossless, require_verifiable
from chunkllm.contiguous.plan import Counters, Plan
from chunkllm.contiguous.probe import require_exact
from chunkllm.contiguous.reading import Reading, Record
from chunkllm.contiguous.verified import VerifiedCache
from chunkllm.errors import ChunkError
from chunkllm.models import CACHE_NAMES, ModelShape, bottom_states, cache_argument, decoder_of, model_shape
from chunkllm.scorers import PooledScorer, Scorer
from chunkllm.selection import DEFAULT_BUDGET, DEFAULT_LOCAL, DEFAULT_SINKS, layer_weights

DEFAULT_MAX_CHUNK, FIXED_CHUNK = 32, 20
_attached: WeakSet[nn.Module] = WeakSet()  # which have their attachments themselves, so that both can be freed


class ChunkSelection:
    """Selects the chunks that the next tokens attend to, whenever one ends (ChunkLLM, arXiv 2510.02361).

    Prompts are read with full attention, in ``generate`` to their last token. While tokens are written one by one,
    attention reads the first tokens, the last ones, and the chunks that score best for the last queries; it chooses
    them anew when a chunk ends (Intra-Chunk Attention Consistency), which takes effect with the next token. As long as
    nothing need be dropped, the model computes what it computes without. What a row of a batch keeps is what it keeps
    alone.

    Args:
        adapters: trained for the model: they detect boundaries and score chunks. Without, chunks end where punctuation
            ends a sentence, if `attach` is told the tokenizer, or else every 20 tokens, and `PooledScorer` scores them.
            Or a `ChunkCalibration` of the model, for ``adaptive`` without adapters. Or the folder or hub id of either.
        scorer: another scorer than the adapters' or the pooled one.
        top_k: keep so many chunks. Or:
        budget: keep so many tokens in all, 2048 by default. Or:
        retention: keep this share of the tokens so far, in (0, 1].
        local: last tokens that always stay.
        sinks: first tokens that always stay.
        max_chunk: a chunk ends after so many tokens at the latest; 32 by default, 20 where nothing tells of boundaries.
        adaptive: divide the budget among layers by how sensitive the model is to what each of them reads, instead of
            evenly; the mean stays. By default where adapters (`AdapterConfig.sensitivity`) or a
            calibration tell, and neither ``top_k`` nor ``vote`` speaks against it.
        vote: one selection for all layers, by their mean score.
        every_step: select at every token, not at boundaries.
        offload: keep what is not selected in the host's memory. Then a selection waits for the device.
        verify: lossless: while ``generate`` is at work, the selection drafts a few tokens, and full attention verifies
            them in one pass. What is written is what the model writes without a selection, token for token, sampled
            from a seed too; in lower precision than float32 but for ties. How many are drafted follows from what was
            accepted and what it cost, and is 0 where that is faster. Elsewhere than in ``generate`` everything is read.

    Raises:
        ChunkError: settings that contradict each other or leave nothing to choose, or nothing to open there.
    """

    def __init__(
        self,
        adapters: ChunkAdapters | ChunkCalibration | str | PathLike | None = None,
        *,
        scorer: Scorer | None = None,
        top_k: int | None = None,
        budget: int | None = None,
        retention: float | None = None,
        local: int = DEFAULT_LOCAL,
        sinks: int = DEFAULT_SINKS,
        max_chunk: int | None = None,
        adaptive: bool | None = None,
        vote: bool = False,
        every_step: bool = False,
        offload: bool = False,
        verify: bool = False,
    ):
        _require_numbers(retention, top_k=top_k, budget=budget, local=local, sinks=sinks, max_chunk=max_chunk)
        if sum(x is not None for x in (top_k, budget, retention)) > 1:
            raise ChunkError("top_k, budget and retention say the same thing in three ways: give one")
        if top_k is not None and top_k < 1:
            raise ChunkError(f"top_k must be at least 1, not {top_k}")
        if retention is not None and not 0 < retention <= 1:
            raise ChunkError(f"retention must lie in (0, 1], not {retention}")
        if adaptive and (top_k is not None or vote):
            raise ChunkError("adaptive divides a budget of tokens among layers: it goes with neither top_k nor vote")
        if local < 1 or sinks < 0 or (max_chunk is not None and max_chunk < 1):
            raise ChunkError("local and max_chunk must be at least 1, sinks at least 0")
        if verify and (offload or every_step):
            raise ChunkError(
                f"verify=True reads everything at every pass, and chooses anew behind it: leave "
                f"{'offload' if offload else 'every_step'} out"
            )
        saved = open_saved(adapters) if isinstance(adapters, str | PathLike) else adapters
        self._sensitivity = None if saved is None else saved.config.sensitivity
        knows_layers = self._sensitivity is not None
        if adaptive and not knows_layers:
            raise ChunkError(
                "adaptive needs adapters or a calibration that tell layers' sensitivities: `decoding chunk calibrate`"
            )
        self.adapters = None if isinstance(saved, ChunkCalibration) else saved
        self.calibration = saved if isinstance(saved, ChunkCalibration) else None
        self.scorer = scorer
        self.max_chunk = max_chunk
        self.top_k = top_k
        self.budget = DEFAULT_BUDGET if top_k is None and retention is None and budget is None else budget
        self.retention = retention
        self.local, self.sinks = local, sinks
        self.adaptive = knows_layers and top_k is None and not vote if adaptive is None else adaptive
        self.vote, self.every_step, self.offload, self.verify = vote, every_step, offload, verify
        self._require_room(local if max_chunk is None else max(local, max_chunk))

    def _require_room(self, recent: int) -> None:
        if self.budget is not None and self.budget <= self.sinks + recent:
            raise ChunkError(
                f"a budget of {self.budget} tokens leaves nothing to choose: sinks ({self.sinks}) and the local "
                f"window or running chunk ({recent}) take {self.sinks + recent}"
            )

    def attach(self, model: Any, tokenizer: Any | None = None, *, record: bool = False) -> Attachment:
        """Attaches the selection to a model until `Attachment.detach`, or the end of a ``with`` block.

        Args:
            model: a causal language model of transformers: grouped-query or multi-head attention with rotary position
                embeddings. Layers with sliding windows are left alone.
            tokenizer: of the model, for boundaries by punctuation where there are no adapters.
            record: keep each selection for `Attachment.readings`: 9 bytes of the host's memory a token read and layer.

        Adapters that lie on another device are copied to the model's. A model's first selection is compared with the
        model's own attention, which takes four short passes (`chunkllm.contiguous.probe`). A refused model is as it
        was. Several threads can use the model at once. What is said of prompts holds for ``model.generate``; in forward
        passes of your own, a token that comes alone to a cache goes on with the text.

        Raises:
            ChunkError: the model lacks something, computes something else with a selection, lies on several devices, or
                has a selection attached, or adapters or calibration are another model's.
        """
        if model in _attached:
            raise ChunkError("the model has a selection attached: detach it first")
        finds_boundaries = self.adapters is not None or tokenizer is not None
        max_chunk = self.max_chunk or (DEFAULT_MAX_CHUNK if finds_boundaries else FIXED_CHUNK)
        self._require_room(max(self.local, max_chunk))
        shape = model_shape(model)
        adapters = self._adapters_for(model, shape)
        plan = self._plan(model, shape, adapters, max_chunk)
        if self.verify:
            require_verifiable(model, plan)
        require_exact(model, plan, lambda probed, new_cache: Attachment(model, probed, None, None, new_cache=new_cache))
        new_cache = VerifiedCache if self.verify else ChunkCache
        return Attachment(model, plan, adapters, tokenizer, Record() if record else None, new_cache)

    def _adapters_for(self, model: Any, shape: ModelShape) -> ChunkAdapters | None:
        """The adapters, on the model's device: others may use them on theirs."""
        if len({parameter.device for parameter in model.parameters()}) > 1:
            raise ChunkError("the model lies on several devices: chunk selection needs it on one")
        if self.calibration is not None and self.calibration.config.shape != shape:
            differing = _difference(self.calibration.config.shape, shape)
            raise ChunkError(
                f"the calibration is another model's ({differing}): make one with `decoding chunk calibrate`"
            )
        if self.adapters is None:
            return None
        if self.adapters.config.shape != shape:
            differing = _difference(self.adapters.config.shape, shape)
            raise ChunkError(
                f"the adapters are for another model ({differing}): train some with `decoding chunk train`"
            )
        is_there = all(weights.device == model.device for weights in self.adapters.parameters())
        return self.adapters if is_there else deepcopy(self.adapters).to(model.device)

    def _plan(self, model: Any, shape: ModelShape, adapters: ChunkAdapters | None, max_chunk: int) -> Plan:
        scorer = self.scorer
        if scorer is None:
            pooled = PooledScorer(shape.head_dim, scaling=shape.scaling)
            scorer = pooled if adapters is None else adapters.scorer()
        return Plan(
            owner=self,
            config=model.config.get_text_config(decoder=True),
            shape=shape,
            scorer=scorer,
            top_k=self.top_k,
            budget=self.budget,
            retention=1.0 if self.retention is None else self.retention,
            local=self.local,
            sinks=self.sinks,
            max_chunk=max_chunk,
            weights=self._weights(len(shape.full_layers)),
            vote=self.vote,
            every_step=self.every_step,
            offload=self.offload,
            verify=self.verify,
        )

    def _weights(self, layers: int) -> Tensor:
        """Float64 [L], in what proportion layers share the budget."""
        if not self.adaptive:
            return torch.ones(layers, dtype=torch.float64)
        assert self._sensitivity is not None
        return layer_weights(self._sensitivity)


class Attachment:
    """A selection on a model. Leaves the model as it was when detached, or at the end of a ``with`` block."""

    def __init__(
        self,
        model: Any,
        plan: Plan,
        adapters: ChunkAdapters | None,
        tokenizer: Any | None,
        record: Record | None = None,
        new_cache: Callable[[Plan, Counters], ChunkCache] = ChunkCache,
    ):
        self.plan = plan
        self._model = model
        self._adapters = adapters
        self._punctuation = None if adapters is not None or tokenizer is None else _punctuation(tokenizer, model)
        self._counters = Counters(layers=plan.shape.full_layers, record=record)
        self._new_cache = new_cache
        self._running = Running()
        self._layers = plan.config.num_hidden_layers
        decoder = decoder_of(model)
        self.cache_name = cache_argument(decoder)
        self._undo = [
            intercept(model, _weakly(self._attend)),
            tell_ids(model),
            decoder.register_forward_pre_hook(self._before, with_kwargs=True).remove,
            decoder.register_forward_hook(self._after, with_kwargs=True, always_call=True).remove,
            wrap_generate(model, self._generate),
        ]
        if adapters is not None:
            self._undo.append(decoder.layers[0].register_forward_hook(self._detect).remove)
        _attached.add(model)

    def __reduce_ex__(self, protocol: Any) -> Never:
        raise ChunkError("a model with a selection attached cannot be copied or pickled: detach it first")

    def __enter__(self) -> Attachment:
        return self

    def __exit__(self, *_: type[BaseException] | BaseException | TracebackType | None) -> None:
        self.detach()

    def detach(self) -> None:
        """Takes the selection off the model. Caches that it made go on with full attention."""
        while self._undo:
            self._undo.pop()()
        _attached.discard(self._model)
        for cache in self._counters.joined():
            cache.count_last_step()
            cache.settle()

    @property
    def stats(self) -> dict[str, Any]:
        """What happened since the selection was attached.

        ``kv_retention`` is the share of cached tokens that decode steps read, the mean over layers with full attention
        (``layers`` has each): of ``held`` tokens, those of all ``steps`` together, ``read`` were read. ``boundaries``
        are the chunks that ended, in prompts too, and ``selections`` how often a row's chunks were chosen.
        """
        for cache in self._counters.joined():
            cache.count_if_resting()
        return self._counters.totals()

    @property
    def readings(self) -> list[Reading]:
        """What was read, a `Reading` for each row of each selection since ``attach(…, record=True)``, in their order.

        Before a row's first selection, and after a pass of several tokens until the next one, all is read.

        Raises:
            ChunkError: nothing was recorded.
        """
        if self._counters.record is None:
            raise ChunkError("nothing was recorded: write attach(model, tokenizer, record=True)")
        return self._counters.record.readings()

    def _before(self, decoder: nn.Module, args: tuple, options: dict[str, Any]) -> tuple[tuple, dict[str, Any]]:
        """Gives the forward pass a cache of ours, and lets it refresh its selection."""
        name = self._name_in(options)
        cache = self._adopted(options.get(name), options.get("use_cache"))
        if cache is None:
            self._running.passes.append(None)
            return args, options
        options[name] = cache
        ids = args[0] if args else options.get("input_ids")
        inputs = options["inputs_embeds"] if ids is None else ids
        ids = told_ids(inputs) if ids is None else ids
        mask, prompt = options.get("attention_mask"), self._running.prompt_in(cache)
        cache.enter()
        self._running.passes.append(cache)
        cache.begin(inputs.shape[0], inputs.shape[1], mask, inputs.device, prompt)
        if self._punctuation is not None and ids is not None:
            cache.observe(self._punctuation[ids])
        return args, options

    def _name_in(self, options: dict[str, Any]) -> str:
        """What the cache is called in a forward pass."""
        return next((name for name in CACHE_NAMES if options.get(name) is not None), self.cache_name)

    def new_cache(self) -> ChunkCache:
        """An empty cache. A forward pass without a cache makes one by itself."""
        return self._new_cache(self.plan, self._counters)

    def boundaries(self, input_ids: Tensor, bottom_states: Tensor) -> Tensor:
        """Where chunks end, bool [B, T].

        Args:
            input_ids: int64 [B, T].
            bottom_states: [B, T, hidden_size], output of the bottommost layer.
        """
        if self._adapters is not None:
            return self._adapters.is_boundary(bottom_states)
        if self._punctuation is not None:
            return self._punctuation[input_ids]
        return torch.zeros_like(input_ids, dtype=torch.bool)

    def _adopted(self, cache: Cache | None, use_cache: bool | None) -> ChunkCache | None:
        if isinstance(cache, ChunkCache):
            if cache.plan.owner is not self.plan.owner:
                raise ChunkError("the cache was built with another selection: attach that one, or begin a new cache")
            cache.follow(self.plan, self._counters)
            return cache
        if self.plan.config.num_hidden_layers < self._layers:
            return None  # a draft by the first layers alone (assistant_early_exit), which all of them check
        if cache is None:
            wanted = self.plan.config.use_cache if use_cache is None else use_cache
            if not wanted:
                return None
        else:
            self._require_replaceable(cache)
        made = self.new_cache()
        if any(getattr(layer, "record_past", False) for layer in getattr(cache, "layers", ())):
            made.activate_past_recording()  # assisted generation is going to crop it
        return made

    def _require_replaceable(self, cache: Any) -> None:
        kind = type(cache).__name__
        if kind != "DynamicCache":
            raise ChunkError(
                f"chunk selection has a cache of its own, not a {kind}: leave the cache and cache_implementation out"
            )
        if cache.get_seq_length():
            raise ChunkError(
                "a DynamicCache that was built without selection: leave the cache out, and give the tokens"
            )
        if cache.offloading and not self.plan.offload:
            raise ChunkError(
                "a cache with offloading: write ChunkSelection(offload=True), and leave the cache and "
                "cache_implementation out"
            )

    def _after(self, decoder: nn.Module, args: tuple, options: dict[str, Any], output: Any) -> None:
        """Also after an error, be it of a hook before ours, which then has nothing to take back."""
        given = options.get(self._name_in(options))
        cache = given if isinstance(given, ChunkCache) else None
        passes = self._running.passes
        if not passes or passes[-1] is not cache:
            return
        passes.pop()
        if cache is None:
            return
        # On CUDA what a step kept is counted a step later, when it has arrived.
        if output is not None and next(decoder.parameters()).device.type != "cuda":
            cache.count_last_step()
        cache.leave()

    def _generate(self, generate: Callable[..., Any], *args: Any, **options: Any) -> Any:
        generate = lossless(generate, self._counters) if self.plan.verify else generate
        call, running = call_of(args, options), self._running
        depth = len(running.passes)
        running.calls.append(call)
        try:
            output = generate(*args, **options)
        finally:
            running.calls.pop()
            del running.passes[depth:]  # of one that was interrupted from the keyboard, which calls no hooks
        call.finish(output)
        return output

    def _detect(self, layer: nn.Module, args: tuple, output: Tensor | tuple[Tensor, ...]) -> None:
        cache = self._running.cache
        if cache is not None and self._adapters is not None:
            cache.observe(self._adapters.is_boundary(bottom_states(output)))

    def _attend(
        self, attention: Any, module: Any, query: Tensor, key: Tensor, value: Tensor, mask: Any, **options: Any
    ) -> tuple[Tensor, Tensor | None]:
        cache = self._running.cache
        layer = None if cache is None else cache.layers[module.layer_idx]
        if cache is not None and isinstance(layer, ChunkLayer):
            attended = cache.attend(layer, query, key, value, options.get("scaling"))
            if attended is not None:
                return attended, None
        return attention(module, query, key, value, mask, **options)


def _weakly(method: Callable[..., Any]) -> Callable[..., Any]:
    """A method for a table that lasts: it keeps nothing alive, and is called while its object is."""
    held = WeakMethod(method)

    def call(*args: Any, **options: Any) -> Any:
        found = held()
        assert found is not None  # the model that calls has hooks of the same object
        return found(*args, **options)

    return call


def _punctuation(tokenizer: Any, model: Any) -> Tensor:
    """bool [V], where a model may have more tokens than its tokenizer, on its device."""
    found = punctuation_boundaries(tokenizer).to(model.device)
    return nn.functional.pad(found, (0, max(model.get_input_embeddings().num_embeddings - len(found), 0)))


def _difference(theirs: ModelShape, ours: ModelShape) -> str:
    name = next(name for name in ModelShape.__dataclass_fields__ if getattr(theirs, name) != getattr(ours, name))
    return f"its {name} is {getattr(ours, name)}, theirs {getattr(theirs, name)}"


def _require_numbers(share: Any, **whole: Any) -> None:
    """Refuses settings of other types.

    Raises:
        ChunkError: says which.
    """
    for name, value in whole.items():
        if value is not None and (isinstance(value, bool) or not isinstance(value, Integral)):
            raise ChunkError(f"{name} must be a whole number, not {value!r}")
    if share is not None and (isinstance(share, bool) or not isinstance(share, Real)):
        raise ChunkError(f"retention must be a number, not {share!r}")
