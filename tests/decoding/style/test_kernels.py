"""The guards' kernels, run by Triton's interpreter (see `tests.conftest`), against the torch path and JS itself."""

import importlib
import os
from contextlib import ExitStack
from dataclasses import replace
from functools import cache
from unittest.mock import patch

import numpy as np
import pytest
import torch
from hypothesis import Phase, given, settings
from hypothesis import strategies as st

from decoding import DecodingError, StylePrior
from decoding.style import paths, steering
from decoding.style.paths import steer
from decoding.style.steering import GuardSettings, guards_of, stops_of
from ngram import NGramModel
from ngram.kernels import SWITCH
from ngram.layout import join, unigram_tables
from ngram.tables import NEVER

pytest.importorskip("triton", minversion="3.9", reason="no Triton whose interpreter runs the kernels")
kernels = importlib.import_module("decoding.style.kernels")  # only now: it imports Triton

pytestmark = pytest.mark.filterwarnings("ignore::RuntimeWarning")  # of numpy, where lanes that are masked hold NaN

V, CPU = 50, torch.device("cpu")
BUDGET_SLACK = 1 + 1e-3  # of JS as a float32 sum, and of guesses of ln Z that were not exact


def by(path, *arguments, tile=None, programs=1, **options):
    """What one path makes of arguments of `steer`. What it allocates is full of NaN, as memory may be."""

    def poisoned(step, dtype, *shape):
        return torch.full((step.rows, *shape), torch.nan, dtype=dtype, device=step.scores.device)

    with ExitStack() as patched:
        patched.enter_context(patch.dict(os.environ, {SWITCH: path}))
        patched.enter_context(patch.object(kernels._Step, "_empty", poisoned))
        patched.enter_context(patch.object(kernels, "held_at_once", lambda device: programs))
        if tile is not None:
            patched.enter_context(patch.object(kernels, "_TILE", tile))
            patched.enter_context(patch.object(kernels, "_SMALL_TILE", tile))
        return steer(*arguments, **options)


def divergence(before, after):
    """JS in nats, [B], in float64: `decoding.metrics` is as good as float32 is."""
    p, q = before.double().softmax(-1), after.double().softmax(-1)
    mean = (p + q) / 2
    return (torch.xlogy(p, p / mean) + torch.xlogy(q, q / mean)).nan_to_num_(0).sum(-1) / 2


@cache
def trained(order, bos_id=None):
    ids = np.random.default_rng(order).integers(0, 40, 2000) ** 2 // 40
    return NGramModel.train([ids], V, order=order, bos_id=bos_id, pad_vocab=True).tables


HISTORY = torch.from_numpy((np.random.default_rng(3).integers(0, 40, 2000) ** 2 // 40)[:60].reshape(6, 10))
SETTINGS = st.builds(
    GuardSettings,
    plausibility=st.sampled_from([None, None, 1e-3, 0.1, 1.0]),
    max_js=st.sampled_from([None, None, 1e-4, 0.01, 0.1, 0.3]),
    entropy_gate=st.sampled_from([None, None, 1.0, 3.0]),
)


def joined(tables, width=V):
    return join([each.shape for each in tables], tables, width=width)


@settings(max_examples=25, deadline=None, phases=[Phase.explicit, Phase.reuse, Phase.generate])
@given(data=st.data())
def test_the_kernels_agree_with_the_torch_path(data):
    """Joined priors, guards and ends of text of each row or of all, every dtype, in place and not, divided or not."""
    draw = data.draw
    width, rows = draw(st.integers(V, V + 6)), draw(st.integers(1, 4))
    some = st.sampled_from([trained(1), trained(3), trained(4, 49)])
    priors = joined(draw(st.lists(some, min_size=1, max_size=3)), width)
    count = len(priors.unigram)
    which = draw(st.lists(st.integers(0, count - 1), min_size=rows, max_size=rows))
    prior = torch.tensor(which) if draw(st.booleans()) else which[0]
    strength = torch.tensor(draw(st.lists(st.sampled_from([0.0, 1.0, -1.0, 0.3, 2.5]), min_size=rows, max_size=rows)))
    dtype = draw(st.sampled_from([torch.float32, torch.float32, torch.float64, torch.bfloat16]))
    generator = torch.Generator().manual_seed(draw(st.integers(0, 9)))
    scores = draw(st.sampled_from([0.5, 3.0])) * torch.randn(rows, width, generator=generator)
    scores[torch.rand(rows, width, generator=generator) < 0.1] = -torch.inf
    scores = scores.to(dtype)
    held = draw(st.lists(SETTINGS, min_size=count, max_size=count))
    guards = guards_of(held, "cpu")
    guards = None if guards is None else guards.of(prior)
    ends = draw(st.lists(st.integers(0, width - 1), max_size=5))
    stops = stops_of(ends, width, "cpu")
    stops = None if stops is None else stops.left_by(draw(st.lists(st.booleans(), min_size=count, max_size=count)))
    stops = None if stops is None else stops.of(prior)
    mixture = torch.rand(count, priors.order, priors.order, generator=generator) if draw(st.booleans()) else None
    options = {"prior": prior, "shift": draw(st.booleans())}
    arguments = (priors, scores, HISTORY[:rows], strength, mixture)

    wanted = by("torch", *arguments, guards, stops, **options)
    division = {"tile": draw(st.sampled_from([16, 64])), "programs": draw(st.sampled_from([1, 40]))}
    if dtype is not torch.bfloat16 and draw(st.booleans()):
        got = scores.clone()
        assert by("triton", priors, got, *arguments[2:], guards, stops, out=got, **division, **options) is got
    else:
        got = by("triton", *arguments, guards, stops, **division, **options)
    assert got.dtype == dtype
    untouched = strength == 0
    assert torch.equal(got[untouched], scores[untouched])
    assert torch.equal(got == -torch.inf, scores == -torch.inf)
    # The torch path rounds its share down to 1/4096, and its bins take away as much again; the kernels stay within
    # 1/4096 of the exact one. bfloat16: 8 bits.
    moved = (wanted - scores).float().nan_to_num_(0).abs()
    free = by("torch", *arguments, None if guards is None else without_budget(guards), stops, **options)
    whole = (free - scores).float().nan_to_num_(0).abs().maximum(moved)
    rounding = 2e-5 * (1 + whole)
    if dtype is torch.bfloat16:
        rounding = 0.02 * scores.float().abs().clamp(max=20) + 0.05 * whole
    off = (got.double() - wanted.double()).nan_to_num_(0).abs()
    assert (off <= whole * 4 / 4096 + rounding).all()


def without_budget(guards):
    return type(guards)(guards.plausibility, None, guards.entropy_gate)


def steered_by_rows(changes, scores, budget, path="triton", **options):
    """Each row with a change of its own, as a prior of order 1, under one budget."""
    rows, width = scores.shape
    priors = joined([unigram_tables(row, torch.ones(width, dtype=torch.bool)) for row in changes], width)
    guards = guards_of([GuardSettings(max_js=budget)], "cpu").of(0)
    history = torch.zeros(rows, 1, dtype=torch.int64)
    return by(path, priors, scores, history, torch.ones(rows), None, guards, prior=torch.arange(rows), **options)


@pytest.mark.parametrize("budget", [1e-5, 1e-3, 0.05, 0.3, 0.6])
@pytest.mark.parametrize("tokens", [3, 200])
def test_the_search_finds_the_largest_share_whatever_the_change(budget, tokens):
    generator = torch.Generator().manual_seed(tokens)
    spread, scale = torch.rand(8, 1, generator=generator) * 8, 10 ** (3 * torch.rand(8, 1, generator=generator) - 1)
    scores = (torch.randn(8, tokens, generator=generator) * spread).double()
    changes = torch.randn(8, tokens, generator=generator) * scale.clamp(max=20)
    got = steered_by_rows(changes, scores, budget, tile=256)
    change = changes.double()
    share = ((got - scores) * change).sum(1, keepdim=True) / change.square().sum(1, keepdim=True)
    torch.testing.assert_close(got - scores, share * change, atol=1e-5, rtol=1e-5)
    assert (divergence(scores, scores + share * change) <= budget * BUDGET_SLACK).all()
    more = divergence(scores, scores + (share + 1.5 / 4096) * change)
    assert (more > budget)[share[:, 0] < 1 - 1e-6].all()


@pytest.mark.parametrize("path", ["torch", "triton"])
def test_what_the_prior_never_predicts_does_not_spend_the_budget(path):
    """Its loss is a step in JS at the beginning, as large as its probability; what the rest may do follows from it."""
    scores = torch.zeros(2, 40)
    scores[0, 7], scores[1, 7] = -9, 3
    changes = torch.randn(1, 40, generator=torch.Generator().manual_seed(0)).repeat(2, 1)
    changes[:, 7] = NEVER
    got = steered_by_rows(changes, scores, 0.02, path, tile=16)
    share = ((got - scores)[0] / changes[0])[torch.arange(40) != 7].median()
    assert 0.1 < share < 1
    q = torch.where(torch.arange(40) == 7, -torch.inf, scores[0] + share * changes[0])
    assert 0.0195 < divergence(scores[:1], q[None]) <= 0.02 * BUDGET_SLACK
    assert torch.equal(got[1], scores[1])  # the step alone is beyond the budget


def test_rows_keep_every_bit_where_nothing_is_asked():
    scores = torch.tensor([0.0, -0.0, torch.inf, -torch.inf, torch.nan, 1e-45]).repeat(3, 9)[:, :V]
    stops = stops_of([3, 4], V, "cpu")
    for settings_of_all in (GuardSettings(), GuardSettings(0.1, 0.1, 0.1)):
        guards = guards_of([settings_of_all], "cpu")
        guards = None if guards is None else guards.of(0)
        for out in (None, scores.clone(), torch.full_like(scores, torch.nan)):
            own = out if out is not None and torch.equal(out[:, 0], scores[:, 0]) else scores
            got = by("triton", trained(3), own, HISTORY[:3], torch.zeros(3), None, guards, stops, out=out, tile=16)
            assert torch.equal(got.view(torch.int32), scores.view(torch.int32))


@pytest.mark.parametrize("held", [GuardSettings(), GuardSettings(entropy_gate=1.0), GuardSettings(0.1, 0.05, 1.0)])
def test_masks_bring_no_nan(held):
    """Rows of which everything is masked, or all but one, or all but what ends a text."""
    scores = torch.full((4, V), -torch.inf)
    scores[1, 5] = scores[2, 1] = 2.0
    scores[3] = torch.randn(V)
    stops, guards = stops_of([1], V, "cpu"), guards_of([held], "cpu")
    guards = None if guards is None else guards.of(0)
    got = by("triton", trained(3), scores, HISTORY[:4], torch.ones(4), None, guards, stops, tile=16)
    assert not got.isnan().any()
    assert torch.equal(got == -torch.inf, scores == -torch.inf)
    assert got[2, 1] == 2


@pytest.mark.parametrize("held", [None, GuardSettings(entropy_gate=1.0), GuardSettings(max_js=0.05)])
@pytest.mark.parametrize("ends", [[], [4, 9]])
def test_the_highest_score_is_told_and_nan_is_the_highest(held, ends):
    scores = torch.randn(3, V)
    scores[0, 4], scores[1, 7] = 9, torch.nan
    guards = None if held is None else guards_of([held], "cpu").of(0)
    highest = {}
    for path in ("torch", "triton"):
        highest[path] = torch.full((3,), torch.nan)
        arguments = (trained(3), scores, HISTORY[:3], torch.ones(3), None, guards, stops_of(ends, V, "cpu"))
        by(path, *arguments, tile=16, highest=highest[path])
    torch.testing.assert_close(highest["triton"], highest["torch"], equal_nan=True)
    assert highest["torch"].isnan().tolist() == [False, True, False]


def test_scores_and_results_may_be_views():
    scores, guards = torch.randn(3, V), guards_of([GuardSettings(0.05, 0.01)], "cpu").of(0)
    for stops in (None, stops_of([4], V, "cpu")):
        for held in (None, guards):
            others = (HISTORY[:3], torch.ones(3), None, held, stops)
            wanted = by("triton", trained(3), scores, *others)
            turned, wide = torch.zeros(V, 3).T.copy_(scores), torch.zeros(3, V + 20)
            assert torch.equal(by("triton", trained(3), turned, *others), wanted)
            assert torch.equal(by("triton", trained(3), scores, *others, out=wide[:, 5 : 5 + V]), wanted)
            assert not wide[:, :5].any()
            assert not wide[:, 5 + V :].any()


def test_shapes_that_do_not_belong_together_are_refused():
    scores, stops = torch.randn(3, V), stops_of([4], V, "cpu")
    with pytest.raises(DecodingError, match="side by side"):
        by("triton", trained(3), scores, HISTORY[:3], torch.ones(3), None, None, stops, out=torch.zeros(V, 3).T)
    for rows in (1, 2):
        with pytest.raises(DecodingError, match="each of 3 rows"):
            by("triton", trained(3), scores, HISTORY[:rows], torch.ones(3), None, None, stops)
    two = guards_of([GuardSettings(max_js=0.1)] * 2, "cpu").of(torch.tensor([0, 1]))
    with pytest.raises(DecodingError, match="each of 3 rows"):
        by("triton", trained(3), scores, HISTORY[:3], torch.ones(3), None, two)


def test_a_row_does_not_depend_on_its_batch_nor_on_how_it_is_divided():
    scores = 3 * torch.randn(4, 200)
    changes = torch.randn(4, 200)
    together = steered_by_rows(changes, scores, 0.05, tile=64)
    alone = steered_by_rows(changes[2:3], scores[2:3], 0.05, tile=64, programs=9)
    assert torch.equal(together[2:3], alone)


@pytest.mark.slow
@pytest.mark.parametrize("vocab_size", [32_000, 65_536, 151_936, 262_144])
def test_vocabularies_of_models(vocab_size):
    rng = np.random.default_rng(vocab_size)
    ids = (rng.random(20_000) ** 3 * vocab_size).astype(np.int64)
    tables = NGramModel.train([ids], vocab_size, order=3, pad_vocab=True).tables
    scores = 2 * torch.randn(1, vocab_size, generator=torch.Generator().manual_seed(0))
    guards = guards_of([GuardSettings(plausibility=1e-4, max_js=0.02, entropy_gate=12.0)], "cpu").of(0)
    arguments = (tables, scores, torch.from_numpy(ids[None, 500:502]), torch.ones(1), None)
    stops = stops_of([2, vocab_size - 1], vocab_size, "cpu")
    wanted, got = (by(path, *arguments, guards, stops) for path in ("torch", "triton"))
    whole = (by("torch", *arguments, without_budget(guards), stops) - scores).abs()
    assert ((got - wanted).abs() <= whole * 2 / 4096 + 1e-4).all()
    assert divergence(scores, got) <= 0.02 * BUDGET_SLACK
    plain, wanted = (by(path, *arguments, None, stops) for path in ("triton", "torch"))
    torch.testing.assert_close(plain, wanted, atol=1e-4, rtol=1e-5)


KERNELS = ("look", "change", "search", "apply", "put_stops_right")


def launches_of(held, ends, rows=3, history=HISTORY):
    """The names, arguments and constants of what is launched, on the device "meta", which holds no data: whatever asks
    it for a number fails.
    """
    launched = []

    class Launch:
        def __init__(self, name):
            self.name = name

        def __getitem__(self, grid):
            return lambda *arguments, **constants: launched.append((self.name, arguments, constants))

    guards = guards_of([held], "cpu")
    meta = {"device": "meta"}
    if guards is not None:
        guards = type(guards)(*(None if each is None else each.to("meta")[:, None] for each in vars(guards).values()))
    stops = stops_of(ends, V, "meta")
    with ExitStack() as patched:
        for name in KERNELS:
            patched.enter_context(patch.object(kernels, name, Launch(name)))
        patched.enter_context(patch.object(kernels, "add_log_prior", Launch("prior")[0]))
        scores, strength = torch.empty(rows, V, **meta), torch.empty(rows, **meta)
        tables = trained(3).to("meta")
        by("triton", tables, scores, history[:rows].to("meta"), strength, None, guards, stops, out=scores)
    return launched


@pytest.mark.parametrize(
    ("held", "ends", "expected"),
    [
        (GuardSettings(), [], ["prior"]),
        (GuardSettings(), [4], ["change", "put_stops_right"]),
        (GuardSettings(entropy_gate=1.0), [], ["look", "change"]),
        (GuardSettings(plausibility=0.1), [4], ["look", "change", "apply"]),
        (GuardSettings(max_js=0.1), [4], ["change", *["search"] * kernels.PASSES, "apply"]),
        (GuardSettings(0.1, 0.1, 1.0), [], ["look", "change", *["search"] * kernels.PASSES, "apply"]),
    ],
)
def test_launches_are_few_and_nothing_waits_for_the_device(held, ends, expected):
    assert [name for name, *_ in launches_of(held, ends)] == expected


def test_a_longer_history_is_no_other_kernel():
    """What changes with each token must not be a constant: the kernel would be compiled again and again."""
    held = GuardSettings(0.1, 0.1, 1.0)
    shorter = launches_of(held, [4], history=HISTORY[:, 1:].contiguous())
    for (name, first, constants), (_, second, others) in zip(launches_of(held, [4]), shorter, strict=True):
        own = {key: value for key, value in constants.items() if not isinstance(value, torch.Tensor)}
        assert own == {key: value for key, value in others.items() if not isinstance(value, torch.Tensor)}
        kernel = getattr(kernels, name)
        changed = {
            each for each, a, b in zip(kernel.arg_names, first, second, strict=False) if isinstance(a, int) and a != b
        }
        assert changed == ({"history_row", "tokens"} if name == "change" else set())


COMPILED = """
import triton
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource
from decoding.style import kernels

kinds = {"history": "i64", "priors": "i64", "stops": "i64", "leave": "i1", "nodes": "i16", "words": "i16"}
kinds |= {"runs": "i32", "book_starts": "i32"}
floats = "scores moves out looks facts state sums next_state next_sums highest kept strength budget gate plausibility"
kinds |= dict.fromkeys(floats.split() + "mixture unigram deltas book".split(), "fp32")
sizes = {"ORDER": 3, "PLACES": 2, "ROUNDS": 2, "SHIFT": True, "STOPS": 4, "TILE": 4096, "TILES": 64, "IN_PLACE": True}
unguarded = dict.fromkeys(["looks", "gate", "plausibility", "leave", "priors", "mixture"])
variants = [
    (kernels.look, {}), (kernels.change, {"ALONE": True, "BUDGET": True}),
    (kernels.change, {"ALONE": False, "BUDGET": False, **unguarded}), (kernels.search, {"BEGINS": True}),
    (kernels.search, {"BEGINS": False}), (kernels.apply, {}), (kernels.apply, {"budget": None, "highest": None}),
    (kernels.put_stops_right, {}),
]
for capability in (80, 90):
    for kernel, own in variants:
        names = kernel.arg_names
        assert not [each.name for each in kernel.params if each.do_not_specialize and each.name not in names]
        constants = {name: value for name, value in {**sizes, **own}.items() if name in names}
        signature = {
            name: "constexpr" if name in constants else "*" + kinds[name] if name in kinds else "i32" for name in names
        }
        divisible = {
            (i,): [["tt.divisibility", 16]]
            for i, name in enumerate(names)
            if name not in constants and (name in kinds or name in ("scores_row", "moves_row", "out_row", "width"))
        }
        source = ASTSource(fn=kernel, signature=signature, constexprs=constants, attrs=divisible)
        warps = 1 if kernel is kernels.put_stops_right else kernels._WARPS
        made = triton.compile(source, target=GPUTarget("cuda", capability, 32), options={"num_warps": warps})
        assert len(made.asm["cubin"]) > 1000
        if kernel is not kernels.put_stops_right:
            assert "ld.global.v4.b32" in made.asm["ptx"]  # rows are read 16 bytes at a time
        assert "st.local" not in made.asm["ptx"]
print("compiled")
"""


@pytest.mark.slow
def test_the_kernels_compile_for_cards_that_are_not_here(compiles):
    compiles(COMPILED)


def test_a_trial_of_guards_passes():
    paths.try_on(CPU)


@pytest.mark.parametrize("part", ["max_js", "plausibility", "entropy_gate", "stops"])
def test_a_trial_of_guards_fails_if_one_of_them_does_nothing(monkeypatch, part):
    real = kernels.steer

    def forgetful(tables, scores, history, strength, mixture, guards, stops):
        if part == "stops":
            return real(tables, scores, history, strength, mixture, guards, None)
        return real(tables, scores, history, strength, mixture, guards and replace(guards, **{part: None}), stops)

    monkeypatch.setattr(kernels, "steer", forgetful)
    with pytest.raises(DecodingError, match="their scores are .* off"):
        paths.try_on(CPU)


def test_where_kernels_of_guards_fail_torch_takes_their_place(monkeypatch):
    def fails(device):
        raise RuntimeError("out of shared memory")

    monkeypatch.setattr(paths, "uses_triton", lambda device: True)
    monkeypatch.setattr(paths, "asks_for_triton", lambda device: False)
    monkeypatch.setattr(paths, "try_on", fails)
    monkeypatch.setattr(kernels, "steer", lambda *_, **__: pytest.fail("kernels do not run"))
    paths._are_right_on.cache_clear()
    tables, guards = trained(2), guards_of([GuardSettings(max_js=0.05)], CPU).of(0)
    arguments = tables, torch.randn(3, V), HISTORY[:3], torch.ones(3), None, guards
    with pytest.warns(UserWarning, match=r"kernels of guards fail on cpu \(out of shared memory\): PyTorch's"):
        found = paths.steer(*arguments)
    torch.testing.assert_close(found, steering.steer(*arguments))
    assert not paths.has_guards_on(CPU)  # said once
    paths._are_right_on.cache_clear()


@pytest.mark.parametrize("guards", [{}, {"plausibility": 0.1, "max_js": 0.02, "entropy_gate": 1.0}])
def test_a_style_runs_on_kernels(monkeypatch, guards):
    model = NGramModel.train([(np.random.default_rng(0).integers(0, 40, 2000) ** 2 // 40)], V, order=3, eos_id=45)
    style = StylePrior(model, λ=0.8, allow_any_lambda=True, **guards)
    scores = torch.randn(3, V)
    monkeypatch.setenv(SWITCH, "torch")
    wanted = style(HISTORY[:3], scores)
    monkeypatch.setenv(SWITCH, "triton")
    torch.testing.assert_close(style(HISTORY[:3], scores), wanted, atol=2e-3, rtol=1e-3)  # a share within 2/4096
    scores[1, 3] = torch.nan
    with pytest.raises(DecodingError, match="hold NaN before the style prior"):
        style(HISTORY[:3], scores)


@pytest.mark.parametrize("guards", [{}, {"plausibility": 1e-3}, {"max_js": 0.05}, {"entropy_gate": 1.0}])
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
@pytest.mark.parametrize("in_place", [False, True])
def test_torch_rounds_narrow_scores_once(dtype, guards, in_place):
    """Also of ids that end a text, whose odds depend on the highest score before and after."""
    scores = (3 * torch.randn(4, V, generator=torch.Generator().manual_seed(9))).to(dtype)
    scores[:, 7] = -torch.inf
    arguments = (HISTORY[:4], torch.tensor([-1.0, 0.3, 0.0, 1.0]), None)
    of_all = guards_of([GuardSettings(**guards)], "cpu")
    held = None if of_all is None else of_all.of(0), stops_of([19, 3], V, "cpu")
    wanted = by("torch", trained(3), scores.float(), *arguments, *held).to(dtype)
    given, before = scores.clone(), scores[2].clone()
    got = by("torch", trained(3), given, *arguments, *held, out=given if in_place else None)
    assert torch.equal(got, wanted) and torch.equal(got[2], before)
    assert (got is given) is in_place and torch.equal(given, got if in_place else scores)
