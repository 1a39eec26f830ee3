"""`ChunkSelection`: what is selected and how, and its attachment to a model of transformers."""

from __future__ import annotations

from collections.abc import Callable
from types import TracebackType
from typing import Any
from weakref import WeakKeyDictionary, WeakSet

import torch
from torch import Tensor, nn
from transformers import Cache

from chunkllm.adapters import ChunkAdapters
from chunkllm.boundaries import punctuation_boundaries
from chunkllm.contiguous.attention import intercept
from chunkllm.contiguous.cache import ChunkCache
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
_attached: WeakKeyDictionary[nn.Module, Attachment] = WeakKeyDictionary()


class ChunkSelection:
    """Selects the chunks that the next tokens attend to, whenever one ends (ChunkLLM, arXiv 2510.02361).

    Prompts are read with full attention. While tokens are written one by one, attention reads the first tokens, the
    last ones, and the chunks that score best for the last queries; it chooses them anew when a chunk ends
    (Intra-Chunk Attention Consistency), which takes effect with the next token. As long as nothing need be dropped,
    the model computes what it computes without.

    Args:
        adapters: trained for the model: they detect boundaries and score chunks. Without, chunks end where punctuation
            ends a sentence, if `attach` is told the tokenizer, or else every 20 tokens, and `PooledScorer` scores them.
        scorer: another scorer than the adapters' or the pooled one.
        top_k: keep so many chunks. Or:
        budget: keep so many tokens in all, 2048 by default. Or:
        retention: keep this share of the tokens so far, in (0, 1].
        local: last tokens that always stay.
        sinks: first tokens that always stay.
        max_chunk: a chunk ends after so many tokens at the latest; 32 by default, 20 where nothing tells of boundaries.
        adaptive: divide the budget among layers by how sensitive the model is to what each of them reads, instead of
            evenly; the mean stays. By default where the adapters tell (`AdapterConfig.sensitivity`) and neither
            ``top_k`` nor ``vote`` speaks against it.
        vote: one selection for all layers, by their mean score.
        every_step: select at every token, not at boundaries.
        offload: keep what is not selected in the host's memory. Then a selection waits for the device.
        verify: lossless: while ``generate`` is at work, the selection drafts a few tokens, and full attention verifies
            them in one pass. What is written is what the model writes without a selection, token for token, sampled
            from a seed too; in lower precision than float32 but for ties. How many are drafted follows from what was
            accepted and what it cost, and is 0 where that is faster. Elsewhere than in ``generate`` everything is read.

    Raises:
        ChunkError: settings that contradict each other or leave nothing to choose.
    """

    def __init__(
        self,
        adapters: ChunkAdapters | None = None,
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
        if sum(x is not None for x in (top_k, budget, retention)) > 1:
            raise ChunkError("top_k, budget and retention say the same thing in three ways: give one")
        if top_k is not None and top_k < 1:
            raise ChunkError(f"top_k must be at least 1, not {top_k}")
        if retention is not None and not 0 < retention <= 1:
            raise ChunkError(f"retention must lie in (0, 1], not {retention}")
        if adaptive and (top_k is not None or vote):
            raise ChunkError("adaptive divides a budget of tokens among layers: it goes with neither top_k nor vote")
        knows_layers = adapters is not None and adapters.config.sensitivity is not None
        if adaptive and not knows_layers:
            raise ChunkError("adaptive needs adapters that know the layers' sensitivities: `decoding chunk train`")
        if local < 1 or sinks < 0 or (max_chunk is not None and max_chunk < 1):
            raise ChunkError("local and max_chunk must be at least 1, sinks at least 0")
        if verify and (offload or every_step):
            raise ChunkError(
                f"verify=True reads everything at every pass, and chooses anew behind it: leave "
                f"{'offload' if offload else 'every_step'} out"
            )
        self.adapters = adapters
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

        The adapters move to the model's device. A model's first selection is compared with the model's own attention,
        which takes four short passes (`chunkllm.contiguous.probe`). A refused model is as it was.

        Raises:
            ChunkError: the model lacks something, computes something else with a selection, lies on several devices, or
                has a selection attached, or the adapters are another model's.
        """
        if model in _attached:
            raise ChunkError("the model has a selection attached: detach it first")
        finds_boundaries = self.adapters is not None or tokenizer is not None
        max_chunk = self.max_chunk or (DEFAULT_MAX_CHUNK if finds_boundaries else FIXED_CHUNK)
        self._require_room(max(self.local, max_chunk))
        plan = self._plan(model, max_chunk)
        if self.verify:
            require_verifiable(model, plan)
        require_exact(model, plan, lambda probed, new_cache: Attachment(model, probed, None, None, new_cache=new_cache))
        new_cache = VerifiedCache if self.verify else ChunkCache
        return Attachment(model, plan, self.adapters, tokenizer, Record() if record else None, new_cache)

    def _plan(self, model: Any, max_chunk: int) -> Plan:
        shape = model_shape(model)
        if len({parameter.device for parameter in model.parameters()}) > 1:
            raise ChunkError("the model lies on several devices: chunk selection needs it on one")
        if self.adapters is not None:
            if self.adapters.config.shape != shape:
                differing = _difference(self.adapters.config.shape, shape)
                raise ChunkError(
                    f"the adapters are for another model ({differing}): train some with `decoding chunk train`"
                )
            self.adapters.to(model.device)
        scorer = self.scorer
        if scorer is None:
            pooled = PooledScorer(shape.head_dim, scaling=shape.scaling)
            scorer = pooled if self.adapters is None else self.adapters.scorer()
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
        assert self.adapters is not None and self.adapters.config.sensitivity is not None
        return layer_weights(self.adapters.config.sensitivity)


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
        self._caches: WeakSet[ChunkCache] = WeakSet()
        self._new_cache = new_cache
        self._current: ChunkCache | None = None
        decoder = decoder_of(model)
        self.cache_name = cache_argument(decoder)
        self._undo = [
            intercept(model, self._attend),
            tell_ids(model),
            decoder.register_forward_pre_hook(self._before, with_kwargs=True).remove,
            decoder.register_forward_hook(self._after, always_call=True).remove,
        ]
        if plan.verify:
            self._undo.append(_replaced(model, "generate", lossless(model.generate, self._counters)))
        if adapters is not None:
            self._undo.append(decoder.layers[0].register_forward_hook(self._detect).remove)
        _attached[model] = self

    def __enter__(self) -> Attachment:
        return self

    def __exit__(self, *_: type[BaseException] | BaseException | TracebackType | None) -> None:
        self.detach()

    def detach(self) -> None:
        """Takes the selection off the model. Caches that it made go on with full attention."""
        while self._undo:
            self._undo.pop()()
        _attached.pop(self._model, None)
        for cache in self._caches:
            cache.count_last_step()
            cache.settle()

    @property
    def stats(self) -> dict[str, Any]:
        """What happened since the selection was attached.

        ``kv_retention`` is the share of cached tokens that decode steps read, the mean over layers with full attention
        (``layers`` has each): of ``held`` tokens, those of all ``steps`` together, ``read`` were read. ``boundaries``
        are the chunks that ended, in prompts too, and ``selections`` how often a row's chunks were chosen.
        """
        for cache in self._caches:
            cache.count_last_step()
        counters = self._counters
        shares = {layer: kept / max(counters.total, 1) for layer, kept in counters.kept.items()}
        retention = sum(shares.values()) / len(shares) if shares else 1.0
        return {
            "kv_retention": retention,
            "read": retention * counters.total,
            "held": counters.total,
            "steps": counters.steps,
            "boundaries": counters.boundaries,
            "selections": counters.selections,
            "passes": counters.passes,
            "acceptance": counters.right / counters.tried if counters.tried else None,
            "layers": shares,
        }

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
        name = next((name for name in CACHE_NAMES if options.get(name) is not None), self.cache_name)
        cache = self._adopted(options.get(name), options.get("use_cache"))
        self._current = cache
        if cache is None:
            return args, options
        options[name] = cache
        ids = args[0] if args else options.get("input_ids")
        inputs = options["inputs_embeds"] if ids is None else ids
        cache.begin(inputs.shape[0], inputs.shape[1], options.get("attention_mask"), inputs.device)
        ids = told_ids(inputs) if ids is None else ids
        if self._punctuation is not None and ids is not None:
            cache.observe(self._punctuation[ids])
        return args, options

    def new_cache(self) -> ChunkCache:
        """An empty cache. A forward pass without a cache makes one by itself."""
        made = self._new_cache(self.plan, self._counters)
        self._caches.add(made)
        return made

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
            cache.plan, cache.counters = self.plan, self._counters
            self._caches.add(cache)
            return cache
        if cache is None:
            wanted = self.plan.config.use_cache if use_cache is None else use_cache
            if not wanted:
                return None
        elif type(cache).__name__ != "DynamicCache" or cache.get_seq_length():
            raise ChunkError(
                f"a {type(cache).__name__} that was built without selection: leave the cache out, and give the tokens"
            )
        made = self.new_cache()
        if any(getattr(layer, "record_past", False) for layer in getattr(cache, "layers", ())):
            made.activate_past_recording()  # assisted generation is going to crop it
        return made

    def _after(self, decoder: nn.Module, args: tuple, output: Any) -> None:
        cache, self._current = self._current, None
        # On CUDA what a step kept is counted a step later, when it has arrived.
        if cache is not None and output is not None and next(decoder.parameters()).device.type != "cuda":
            cache.count_last_step()

    def _detect(self, layer: nn.Module, args: tuple, output: Tensor | tuple[Tensor, ...]) -> None:
        if self._current is not None and self._adapters is not None:
            self._current.observe(self._adapters.is_boundary(bottom_states(output)))

    def _attend(
        self, attention: Any, module: Any, query: Tensor, key: Tensor, value: Tensor, mask: Any, **options: Any
    ) -> tuple[Tensor, Tensor | None]:
        layer = None if self._current is None else self._current.layers[module.layer_idx]
        if isinstance(layer, ChunkLayer):
            assert self._current is not None
            attended = self._current.attend(layer, query, key, value, options.get("scaling"))
            if attended is not None:
                return attended, None
        return attention(module, query, key, value, mask, **options)


def _replaced(model: Any, name: str, function: Callable[..., Any]) -> Callable[[], None]:
    """Gives a model a method of its own, and returns what takes it away."""
    held = vars(model).get(name)
    setattr(model, name, function)

    def undo() -> None:
        if held is None:
            delattr(model, name)
        else:
            setattr(model, name, held)

    return undo


def _punctuation(tokenizer: Any, model: Any) -> Tensor:
    """bool [V], where a model may have more tokens than its tokenizer, on its device."""
    found = punctuation_boundaries(tokenizer).to(model.device)
    return nn.functional.pad(found, (0, max(model.get_input_embeddings().num_embeddings - len(found), 0)))


def _difference(theirs: ModelShape, ours: ModelShape) -> str:
    name = next(name for name in ModelShape.__dataclass_fields__ if getattr(theirs, name) != getattr(ours, name))
    return f"its {name} is {getattr(ours, name)}, theirs {getattr(theirs, name)}"
