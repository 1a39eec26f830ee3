"""The kernels, run by Triton's interpreter (see `tests.conftest`): against the torch path, and against dictionaries."""

import importlib
import os
from contextlib import ExitStack
from unittest.mock import patch

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from ngram import NGramError, NGramModel, kernels
from ngram.encoding import NEVER
from ngram.layout import join
from ngram.tables import add_log_prior, mixture_of_orders
from tests.ngram.test_against_brute_force import V, build, cases, usable

# Kernels compile with Triton 3.6, whose interpreter fails where numpy is newer than it.
triton = pytest.importorskip("triton", minversion="3.9", reason="no Triton whose interpreter runs the kernels")
# Only now: they import Triton.
prior_kernel = importlib.import_module("ngram.prior_kernel")
trie_kernel = importlib.import_module("ngram.trie_kernel")
kernel_trial = importlib.import_module("ngram.kernel_trial")

CUDA = torch.device("cuda")
CPU = torch.device("cpu")


def by(path, *arguments, sizes=None, **options):
    """What one path makes of arguments of `add_log_prior`. What it allocates is full of NaN, as memory may be.

    ``sizes`` are constants of the kernel: small ones divide small rows among programs, tiles, rounds and chunks.
    """

    def poisoned(scores, dtype):
        return torch.full(scores.shape, torch.nan, dtype=dtype)

    with ExitStack() as patched:
        patched.enter_context(patch.dict(os.environ, {kernels.SWITCH: path}))
        patched.enter_context(patch.object(prior_kernel, "_empty", poisoned))
        for name, value in (sizes or {}).items():
            patched.enter_context(patch(f"ngram.{name}", value))
        return add_log_prior(*arguments, **options)


@st.composite
def divisions(draw):
    constexpr = triton.language.constexpr
    held = draw(st.sampled_from([1, 40]))
    return {
        "prior_kernel._TILE": draw(st.sampled_from([4, 4096])),
        "prior_kernel.held_at_once": lambda device: held,
        "trie_kernel.PROBES": constexpr(draw(st.sampled_from([2, 4, 256]))),
        "trie_kernel.CHUNK": constexpr(draw(st.sampled_from([1, 128]))),
        "trie_kernel.MORE": constexpr(draw(st.sampled_from([2, 1024]))),
    }


def joined(tables, width=None):
    return join([each.shape for each in tables], tables, width=width)


def strengths(draw, rows):
    values = st.sampled_from([0.0, -0.0, 1.0, -1.0, 0.3, -0.7, 2.5])
    return torch.tensor(draw(st.lists(values, min_size=rows, max_size=rows)))


@settings(max_examples=30, deadline=None)
@given(case=cases(), sizes=divisions(), data=st.data())
def test_the_kernel_follows_the_formulas(case, sizes, data):
    model, reference = build(case)
    history = torch.tensor(case["contexts"])
    strength = strengths(data.draw, len(history))
    scores = torch.randn(len(history), V)
    scores[:, 1] = -torch.inf
    got = by("triton", model.tables, scores, history, strength, sizes=sizes)
    for row, context in enumerate(case["contexts"]):
        bonus = torch.tensor(reference.log_row(usable(context, case["order"] - 1), V)).clamp(min=-1e30)
        if strength[row] <= 0:
            bonus[bonus == -1e30] = 0
        torch.testing.assert_close(got[row], scores[row] + strength[row] * bonus, atol=1e-4, rtol=1e-4)


@settings(max_examples=50, deadline=None)
@given(some=st.lists(cases(), min_size=1, max_size=3), sizes=divisions(), data=st.data())
def test_the_kernel_agrees_with_the_torch_path(some, sizes, data):
    """Rows with a prior each, mixtures, short histories, columns beyond the vocabulary, every dtype, also in place."""
    draw = data.draw
    width = draw(st.integers(V, V + 6))
    priors = joined([build(case)[0].tables for case in some], width)
    history = torch.tensor([context for case in some for context in case["contexts"]])[:8]
    rows = len(history)
    history = history[:, draw(st.integers(0, 5)) :]
    dtype = draw(st.sampled_from([torch.float32, torch.float64, torch.float16, torch.bfloat16]))
    scores = torch.randn(rows, width).masked_fill_(torch.rand(rows, width) < 0.1, -torch.inf).to(dtype)
    strength = strengths(draw, rows)
    which = draw(st.lists(st.integers(0, len(some) - 1), min_size=rows, max_size=rows))
    options = {
        "prior": torch.tensor(which) if draw(st.booleans()) else which[0],
        "shift": draw(st.booleans()),
        "mixture": torch.rand(len(some), priors.order, priors.order) if draw(st.booleans()) else None,
    }
    wanted = by("torch", priors, scores, history, strength, **options)
    if dtype in (torch.float32, torch.float64) and draw(st.booleans()):
        got = scores.clone()
        assert by("triton", priors, got, history, strength, out=got, sizes=sizes, **options) is got
    else:
        got = by("triton", priors, scores, history, strength, sizes=sizes, **options)
    assert got.dtype == dtype
    rounding = max(1e-5, torch.finfo(dtype).eps)
    torch.testing.assert_close(got, wanted, atol=rounding, rtol=rounding)
    untouched = strength == 0
    assert torch.equal(got[untouched], scores[untouched])
    assert torch.equal(torch.signbit(got[untouched]), torch.signbit(scores[untouched]))


@pytest.fixture(scope="module")
def trained():
    ids = np.random.default_rng(0).integers(0, 40, 2000) ** 2 // 40
    return NGramModel.train([ids], 50, order=4, bos_id=49).tables, torch.from_numpy(ids[:60].reshape(6, 10))


MIXED = torch.tensor([0.5, 0.0, -1.0, 1.5, -0.0, 0.2])


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_narrow_scores_are_rounded_once(trained, dtype):
    tables, history = trained
    scores = torch.randn(6, 50).to(dtype)
    wide = by("triton", tables, scores.float(), history, MIXED)
    assert torch.equal(by("triton", tables, scores, history, MIXED), wide.to(dtype))


def test_rows_whose_strength_is_0_keep_every_bit(trained):
    tables, history = trained
    scores = torch.tensor([0.0, -0.0, torch.inf, -torch.inf, torch.nan, 1e-45]).repeat(6, 9)[:, :50]
    got = by("triton", tables, scores, history, torch.zeros(6))
    assert torch.equal(got.view(torch.int32), scores.view(torch.int32))


def test_what_a_row_rules_out_stays_under_negative_strengths_also_behind_contexts(trained):
    """Ratios may rule out ids that follow contexts of the model."""
    tables, history = trained
    row = tables.unigram[0].clone()
    row[row.argsort()[-8:]] = NEVER
    changed = tables.with_unigram(row)
    scores = torch.randn(6, 50)
    wanted = by("torch", changed, scores, history, -torch.ones(6))
    got = by("triton", changed, scores, history, -torch.ones(6))
    torch.testing.assert_close(got, wanted)
    assert torch.equal(got[:, row == NEVER], scores[:, row == NEVER])
    shift = by("triton", tables.with_unigram(torch.zeros(50)), scores, history, -torch.ones(6)) - scores
    assert (shift[:, row == NEVER].std(1) > 0).any(), "no such id follows a context: nothing was tested"


def test_scores_histories_strengths_and_results_may_be_views(trained):
    tables, history = trained
    scores = torch.randn(6, 50)
    wanted = by("torch", tables, scores, history, MIXED)
    sliced, turned = torch.zeros(6, 70)[:, 9:59].copy_(scores), torch.zeros(50, 6).T.copy_(scores)
    for own in (sliced, turned):
        torch.testing.assert_close(by("triton", tables, own, history, MIXED), wanted)
    around = torch.zeros(6, 70)
    got = by("triton", tables, scores, history, MIXED, out=around[:, 9:59])
    torch.testing.assert_close(got, wanted)
    assert not around[:, :9].any()
    assert not around[:, 59:].any()
    reversed_twice = history.T.contiguous().T
    torch.testing.assert_close(by("triton", tables, scores, reversed_twice, MIXED), wanted)
    priors = joined([tables, tables])
    mixture = torch.rand(1, 4, 4).expand(2, -1, -1)
    wanted = by("torch", priors, scores, history, MIXED, mixture, prior=1)
    torch.testing.assert_close(by("triton", priors, scores, history, MIXED, mixture, prior=1), wanted)
    one = by("torch", tables, scores, history, torch.ones(6))
    torch.testing.assert_close(by("triton", tables, scores, history, torch.ones(1).expand(6)), one)


def test_several_priors_without_contexts_have_shares_of_their_own():
    priors = joined([NGramModel.train([np.arange(end)], 50, order=1).tables for end in (10, 20, 50)])
    mixture = torch.tensor([0.2, 1.0, 0.6])[:, None, None]
    arguments = (priors, torch.randn(6, 50), torch.zeros(6, 3, dtype=torch.int64), MIXED, mixture)
    for prior in (2, torch.tensor([0, 1, 2, 1, 0, 2])):
        wanted = by("torch", *arguments, prior=prior)
        torch.testing.assert_close(by("triton", *arguments, prior=prior), wanted)


def test_a_result_with_columns_apart_is_refused(trained):
    tables, history = trained
    with pytest.raises(NGramError, match="side by side"):
        by("triton", tables, torch.randn(6, 50), history, MIXED, out=torch.zeros(50, 6).T)


def test_shapes_that_do_not_belong_together_are_refused(trained):
    """A kernel would read what stands in memory behind the shorter one."""
    tables, history = trained
    scores = torch.randn(6, 50)
    one_prior = {"prior": torch.zeros(1, dtype=torch.int64)}
    for few in (
        (scores, history[:5], MIXED, {}),
        (scores, history, MIXED[:1], {}),
        (scores, history, MIXED, one_prior),
    ):
        *arguments, options = few
        with pytest.raises(NGramError, match="each of 6 rows of scores needs"):
            by("triton", tables, *arguments, **options)
    with pytest.raises(NGramError, match="scores have 51 columns, tables 50"):
        by("triton", tables, torch.randn(6, 51), history, MIXED)


def test_no_rows(trained):
    tables, _ = trained
    for dtype in (torch.float32, torch.bfloat16):
        nothing = torch.zeros(0, 50, dtype=dtype)
        got = by("triton", tables, nothing, torch.zeros(0, 3, dtype=torch.int64), torch.zeros(0))
        assert got.shape == (0, 50)
        assert got.dtype == dtype


def test_rows_behind_the_two_billionth_score(trained):
    """Addresses are int64: rows that lie 2^30 scores apart, in memory that is never touched between them."""
    tables, history = trained
    scores = torch.randn(3, 50).half()
    far = torch.empty_strided((3, 50), (1 << 30, 1), dtype=torch.float16)
    for row in range(3):
        far[row] = scores[row]
    wanted = by("triton", tables, scores, history[:3], torch.ones(3))
    assert torch.equal(by("triton", tables, far, history[:3], torch.ones(3)), wanted)


@pytest.mark.parametrize("vocab_size", [32_000, 65_536, 151_936, 262_144])
def test_vocabularies_of_models(vocab_size):
    """One token is followed by a quarter of the vocabulary, so that a search takes two rounds, and at last three."""
    rng = np.random.default_rng(vocab_size)
    followers = rng.permutation(vocab_size)[: vocab_size // 4 + 1000]
    pairs = np.stack((np.full(len(followers), 7), followers), 1).reshape(-1)
    tables = NGramModel.train([pairs, rng.integers(0, vocab_size, 3000)], vocab_size, order=3).tables
    assert trie_kernel.rounds_of(tables.widest) == (3 if vocab_size == 262_144 else 2)
    history = torch.from_numpy(np.stack(([followers[50], 7], [7, followers[60]], pairs[-2:])))
    scores, strength = torch.randn(3, vocab_size), torch.tensor([1.0, 0.5, -1.0])
    mixture = mixture_of_orders([0.2, 0.3, 0.5])
    wanted = by("torch", tables, scores, history, strength, mixture)
    got = by("triton", tables, scores, history, strength, mixture)
    torch.testing.assert_close(got, wanted, atol=1e-5, rtol=1e-5)


def test_nothing_waits_for_the_device(trained):
    """The device "meta" holds no data: whatever asks it for a number fails. The launch itself is left out."""
    tables, history = trained
    launches = []

    class Launch:
        def __getitem__(self, grid):
            return lambda *arguments, **constants: launches.append((grid, arguments, constants))

    with patch.object(prior_kernel, "_add", Launch()), patch.dict(os.environ, {kernels.SWITCH: "triton"}):
        for prior in (0, torch.zeros(6, dtype=torch.int64, device="meta")):
            scores = torch.empty(6, 50, device="meta")
            got = add_log_prior(tables.to("meta"), scores, history.to("meta"), MIXED.to("meta"), prior=prior)
            assert got.shape == scores.shape
    assert [grid for grid, *_ in launches] == [(6, 1), (6, 1)]


def test_a_longer_history_is_no_other_kernel(trained):
    """What changes with each token must not be a constant: the kernel would be compiled again and again."""
    tables, history = trained
    seen = []

    class Launch:
        def __getitem__(self, grid):
            return lambda *arguments, **constants: seen.append((arguments, constants))

    with patch.object(prior_kernel, "_add", Launch()), patch.dict(os.environ, {kernels.SWITCH: "triton"}):
        for length in (10, 9):
            add_log_prior(tables, torch.randn(6, 50), history[:, -length:].contiguous(), MIXED)
    names = prior_kernel._add.arg_names
    (first, constants), (second, others) = seen
    assert constants == others
    changed = {
        name
        for name, a, b in zip(names, first, second, strict=False)
        if not isinstance(a, torch.Tensor) and a is not None and a != b
    }
    assert changed == {"history_row", "tokens"}
    assert changed <= set(NOT_SPECIALISED)


NOT_SPECIALISED = ("history_row", "history_step", "tokens", "prior", "vocab_size", "joined", "tiles")

COMPILED = """
import triton
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource
from ngram import prior_kernel, trie_kernel

kernel = prior_kernel._add
assert {{each.name for each in kernel.params if each.do_not_specialize}} == set({names})
for capability, narrow in ((80, True), (90, False)):
    word, scores = ("i16", "bf16") if narrow else ("i32", "fp32")
    types = {{
        "scores": scores, "out": "fp32", "history": "i64", "strength": "fp32", "priors": "i64", "mixture": "fp32",
        "unigram": "fp32", "nodes": word, "runs": "i32", "words": word, "deltas": "fp32", "book": "fp32",
        "book_starts": "i32",
    }}
    constants = {{
        "ORDER": 4, "PLACES": trie_kernel.places_of(4), "ROUNDS": 2, "SHIFT": True, "IN_PLACE": not narrow,
        "TILE": prior_kernel._TILE, **({{"priors": None, "mixture": None}} if narrow else {{}}),
    }}
    signature = {{
        name: "constexpr" if name in constants else "*" + types[name] if name in types else "i32"
        for name in kernel.arg_names
    }}
    aligned = [name in types or name in ("scores_row", "out_row", "width") for name in kernel.arg_names]
    divisible = {{
        (i,): [["tt.divisibility", 16]]
        for i, name in enumerate(kernel.arg_names) if aligned[i] and name not in constants
    }}
    source = ASTSource(fn=kernel, signature=signature, constexprs=constants, attrs=divisible)
    options = {{"num_warps": prior_kernel._WARPS, "maxnreg": prior_kernel._REGISTERS}}
    made = triton.compile(source, target=GPUTarget("cuda", capability, 32), options=options)
    assert len(made.asm["cubin"]) > 1000
    # Rows are read and written 16 bytes at a time.
    assert "st.global.v4.b32" in made.asm["ptx"]
    assert "ld.global.v4.b32" in made.asm["ptx"]
print("compiled")
"""


@pytest.mark.slow
def test_the_kernel_compiles_for_cards_that_are_not_here(compiles):
    compiles(COMPILED.format(names=NOT_SPECIALISED))


@pytest.fixture
def switch(monkeypatch):
    """Sets the switch; what was found out about devices is forgotten before and after."""
    caches = (kernels._is_compiled_for, kernels._has_triton)
    for each in caches:
        each.cache_clear()
    yield lambda choice: monkeypatch.setenv(kernels.SWITCH, choice)
    for each in caches:
        each.cache_clear()


def test_without_the_switch_a_cpu_uses_torch(monkeypatch, trained):
    monkeypatch.delenv(kernels.SWITCH, raising=False)
    assert not kernels.uses_triton(CPU)
    tables, history = trained
    with patch.object(prior_kernel, "_add", None):  # a launch would fail
        add_log_prior(tables, torch.randn(6, 50), history, MIXED)


@pytest.mark.parametrize(
    ("capability", "interpreted", "hip", "expected"),
    [((9, 0), "0", None, True), ((8, 0), "0", None, True), ((7, 5), "0", None, False), ((9, 0), "1", None, False)]
    + [((9, 0), "0", "6.4", False)],
)
def test_auto_uses_kernels_on_cards_that_triton_compiles_for(
    switch, monkeypatch, capability, interpreted, hip, expected
):
    switch("auto")
    monkeypatch.setenv("TRITON_INTERPRET", interpreted)
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: capability)
    monkeypatch.setattr(torch.version, "hip", hip)
    monkeypatch.setattr(kernel_trial, "try_on", lambda device: None)
    assert kernels.uses_triton(CUDA) is expected


def test_a_trial_passes_where_sums_are_right_and_only_there(monkeypatch):
    kernel_trial.try_on(CPU)
    real = prior_kernel.add_log_prior

    def loses_one(tables, *arguments, **options):  # as if a barrier were missing
        deltas = tables.deltas.clone()
        deltas[-1] = 0
        return real(tables._replace(deltas=deltas), *arguments, **options)

    monkeypatch.setattr(prior_kernel, "add_log_prior", loses_one)
    with pytest.raises(NGramError, match="sums are wrong"):
        kernel_trial.try_on(CPU)


def test_where_a_first_kernel_fails_torch_takes_its_place(switch, monkeypatch):
    def fails(device):
        raise RuntimeError("Failed to find C compiler")

    switch("auto")
    monkeypatch.setenv("TRITON_INTERPRET", "0")
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: (9, 0))
    monkeypatch.setattr(kernel_trial, "try_on", fails)
    with pytest.warns(UserWarning, match=r"Triton cannot run kernels on cuda \(Failed to find C compiler\): PyTorch's"):
        assert not kernels.uses_triton(CUDA)
    assert not kernels.uses_triton(CUDA)  # said once


@pytest.mark.parametrize("version", [None, "3.3.1"])
def test_without_a_triton_that_is_new_enough(switch, monkeypatch, version):
    def imported(name):
        if version is None:
            raise ImportError(name)
        return type("Module", (), {"__version__": version})

    monkeypatch.setenv("TRITON_INTERPRET", "0")
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: (9, 0))
    monkeypatch.setattr(kernels, "import_module", imported)
    switch("auto")
    assert not kernels.uses_triton(CUDA)
    switch("triton")
    with pytest.raises(NGramError, match=r"needs Triton 3\.6 or newer: pip install"):
        kernels.uses_triton(CUDA)


def test_an_empty_switch_is_none(switch):
    switch("")
    assert not kernels.uses_triton(CPU)


def test_the_switch_is_read_at_every_call(switch):
    for choice, expected in (("torch", False), ("triton", True), ("torch", False), ("auto", False)):
        switch(choice)
        assert kernels.uses_triton(CPU) is expected


@pytest.mark.parametrize("asked", [kernels.uses_triton, kernels.asks_for_triton])
def test_a_switch_that_does_not_exist_is_refused(switch, asked):
    switch("cuda")
    with pytest.raises(NGramError, match="DECODING_KERNELS must be one of auto, torch, triton, not 'cuda'"):
        asked(CPU)


def test_kernels_that_no_card_has_run_are_asked_for_in_a_word(switch, monkeypatch):
    monkeypatch.setattr(kernels, "_is_compiled_for", lambda device: True)
    switch("auto")
    assert kernels.uses_triton(CUDA) and not kernels.asks_for_triton(CUDA)
    switch("torch")
    assert not kernels.asks_for_triton(CUDA)
    switch("triton")
    assert kernels.asks_for_triton(CPU)  # interpreted


def test_kernels_on_a_cpu_want_the_interpreter(switch, monkeypatch):
    switch("triton")
    monkeypatch.setenv("TRITON_INTERPRET", "0")
    with pytest.raises(NGramError, match=r"type cpu: set DECODING_KERNELS=auto, or TRITON_INTERPRET=1"):
        kernels.uses_triton(CPU)
