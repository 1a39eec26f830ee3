import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from chunkllm.adapters import AdapterConfig, AdapterScorer, ChunkAdapters
from chunkllm.models import ModelShape
from chunkllm.scorers import (
    ChunkStatistics,
    PooledScorer,
    chunk_scores,
    chunk_statistics,
    features_of_layers,
    scores_of_layers,
)

B, H, GROUPS, D, QUERIES = 2, 4, 2, 8, 3
SHAPE = ModelShape("llama", 32, H, GROUPS, D, D**-0.5, (0, 2))


def layout(lengths, before=0):
    """Chunk of every token and ends of chunks, for rows with chunks of these lengths; none before and behind them."""
    count, total = max(map(len, lengths)), before + max(map(sum, lengths)) + 1
    chunk_of = torch.full((len(lengths), total), count)
    ends = torch.zeros(len(lengths), count, dtype=torch.int64)
    for row, sizes in enumerate(lengths):
        at = before
        for number, size in enumerate(sizes):
            chunk_of[row, at : at + size] = number
            at += size
            ends[row, number] = at - 1
    return chunk_of, ends


def padded(lengths):
    return torch.nn.utils.rnn.pad_sequence([torch.tensor(row) for row in lengths], batch_first=True).float()


@settings(max_examples=50, deadline=None)
@given(
    st.lists(st.lists(st.integers(1, 6), min_size=1, max_size=5), min_size=1, max_size=3),
    st.integers(0, 3),
    st.sampled_from([torch.float32, torch.bfloat16]),
)
def test_statistics_are_those_of_loops(lengths, before, dtype):
    chunk_of, ends = layout(lengths, before)
    torch.manual_seed(0)
    keys = torch.randn(len(lengths), GROUPS, chunk_of.shape[1], D).to(dtype)
    keys[:, :, :before] = 1e4  # of no chunk: must not be read
    got = chunk_statistics(keys, chunk_of, ends)
    for part in got:
        assert part.dtype == torch.float32
        assert part.shape == (len(lengths), GROUPS, ends.shape[1], D)
    for row, sizes in enumerate(lengths):
        at = before
        for number, size in enumerate(sizes):
            for head in range(GROUPS):
                tokens = keys[row, head, at : at + size].float()
                torch.testing.assert_close(got.mean[row, head, number], tokens.mean(0), atol=1e-5, rtol=1e-5)
                variance = tokens.var(0, unbiased=False)
                torch.testing.assert_close(got.variance[row, head, number], variance, atol=1e-4, rtol=1e-4)
                assert torch.equal(got.last[row, head, number], tokens[-1])
            at += size


def test_a_chunk_has_the_same_bits_whatever_is_summarised_with_it():
    chunk_of, ends = layout([[3, 2, 7, 5, 4], [6, 1, 9, 2, 8]])
    keys = torch.randn(2, GROUPS, chunk_of.shape[1], D) * 3 + 40
    together = chunk_statistics(keys, chunk_of, ends)
    for row, number in ((0, 0), (0, 3), (1, 2), (1, 4)):
        tokens = chunk_of[row] == number
        size = int(tokens.sum())
        alone = chunk_statistics(
            keys[row : row + 1, :, tokens], torch.zeros(1, size).long(), torch.tensor([[size - 1]])
        )
        for whole, part in zip(together, alone, strict=True):
            assert torch.equal(whole[row, :, number], part[0, :, 0])


def test_statistics_of_chunks_that_a_row_lacks_are_finite():
    chunk_of, ends = layout([[3, 2, 4], [5]])
    got = chunk_statistics(torch.randn(2, GROUPS, chunk_of.shape[1], D), chunk_of, ends)
    assert all(bool(part.isfinite().all()) for part in got)
    assert not got.mean[1, :, 1:].any()
    assert not got.variance[1, :, 1:].any()


def true_attention(queries, keys, chunk_of, count, scaling):
    """[B, C], the attention of tokens summed over chunks, by loops over rows and heads; mean over heads and queries."""
    batch, heads = queries.shape[:2]
    shared = heads // keys.shape[1]
    out = torch.zeros(batch, count, dtype=torch.float64)
    for row in range(batch):
        inside = chunk_of[row] < count
        for head in range(heads):
            logits = queries[row, head].double() @ keys[row, head // shared, inside].double().T * scaling
            shares = logits.softmax(-1).mean(0) / heads
            out[row].index_add_(0, chunk_of[row, inside], shares)
    return out


def pooled_scores(queries, keys, chunk_of, ends, lengths, **options):
    scorer = PooledScorer(queries.shape[-1], **options)
    features = scorer.summarise(0, keys, chunk_of, ends)
    return chunk_scores(scorer, 0, queries, features, lengths, torch.ones_like(lengths))


@pytest.mark.parametrize("scaling", [None, 0.2])
def test_the_pooled_score_is_exact_for_chunks_of_one_token(scaling):
    torch.manual_seed(0)
    lengths = [[1] * 7, [1] * 4]
    chunk_of, ends = layout(lengths)
    keys, queries = torch.randn(B, GROUPS, chunk_of.shape[1], D) * 2, torch.randn(B, H, QUERIES, D) * 2
    got = pooled_scores(queries, keys, chunk_of, ends, padded(lengths), scaling=scaling)
    wanted = true_attention(queries, keys, chunk_of, 7, D**-0.5 if scaling is None else scaling)
    torch.testing.assert_close(got.double(), wanted, atol=1e-5, rtol=1e-4)
    assert not got[1, 4:].any()


def test_the_pooled_score_is_about_the_attention_that_normal_keys_get():
    torch.manual_seed(0)
    width, count = 16, 60
    sizes = torch.randint(16, 64, (count,)).tolist()
    chunk_of, ends = layout([sizes])
    spread = (torch.rand(count, 1) * 1.5 + 0.2)[chunk_of[0].clamp(max=count - 1)]
    centre = torch.randn(count, width)[chunk_of[0].clamp(max=count - 1)] * 0.5
    keys = torch.stack([centre + spread * torch.randn_like(centre) for _ in range(GROUPS)])[None]
    queries = torch.randn(1, H, QUERIES, width) * 1.5
    wanted = true_attention(queries, keys, chunk_of, count, width**-0.5)[0]

    def correlation(**options):
        got = pooled_scores(queries, keys, chunk_of, ends, torch.tensor([sizes]).float(), **options)[0]
        assert got.sum() == pytest.approx(1, abs=1e-5)
        return torch.corrcoef(torch.stack((got.double().log(), wanted.log())))[0, 1].item()

    assert correlation() > 0.95
    assert correlation() > correlation(use_variance=False) + 0.05


def random_case(queries=QUERIES):
    torch.manual_seed(1)
    lengths = [[3, 8, 1, 5], [2, 2]]
    chunk_of, ends = layout(lengths, before=2)
    keys = torch.randn(B, GROUPS, chunk_of.shape[1], D)
    return torch.randn(B, H, queries, D), keys, chunk_of, ends, padded(lengths)


def adapter_scores(adapters, layer, queries, keys, chunk_of, ends, lengths, distances=None):
    scorer = AdapterScorer(adapters)
    features = scorer.summarise(layer, keys, chunk_of, ends)
    distances = torch.arange(1.0, lengths.shape[1] + 1).flip(0).expand_as(lengths) if distances is None else distances
    return chunk_scores(scorer, layer, queries, features, lengths, distances)


@pytest.mark.parametrize("layer", SHAPE.full_layers)
def test_adapters_score_as_the_pooled_scorer_before_training(layer):
    case = random_case()
    with torch.no_grad():
        got = adapter_scores(ChunkAdapters(AdapterConfig(SHAPE, width=4)), layer, *case)
    torch.testing.assert_close(got, pooled_scores(*case))


def trained():
    torch.manual_seed(2)
    adapters = ChunkAdapters(AdapterConfig(SHAPE, width=4))
    for weights in (adapters.query, adapters.key, adapters.gains):
        weights.data = torch.randn_like(weights) * 0.5
    return adapters


@pytest.mark.parametrize("place", [0, 1])
def test_trained_adapters_score_by_the_formula_of_their_docstring(place):
    queries, keys, chunk_of, ends, lengths = case = random_case()
    adapters = trained()
    got = adapter_scores(adapters, SHAPE.full_layers[place], *case)
    s, one = D**-0.5, torch.ones(1)
    for row in range(B):
        total = torch.zeros(4)
        count = int((lengths[row] > 0).sum())
        for h in range(H):
            gain = adapters.gains[place, h]
            for q in queries[row, h]:
                logits = []
                for c in range(count):
                    tokens = keys[row, h // 2, chunk_of[row] == c]
                    mean, variance, last = tokens.mean(0), tokens.var(0, unbiased=False), tokens[-1]
                    learned = torch.cat((q, one)) @ adapters.query[place, h]
                    inputs = torch.cat((mean, variance.sqrt(), last, one))
                    learned = learned @ (inputs @ adapters.key[place, h // 2])
                    near = gain[0] * s * q @ mean + gain[1] * (s * q) ** 2 @ variance / 2
                    far = gain[2] * lengths[row, c].log() + gain[3] * torch.tensor(4.0 - c).log()
                    logits.append(near + far + learned)
                total[:count] += torch.stack(logits).softmax(0) / (H * QUERIES)
        torch.testing.assert_close(got[row], total, atol=1e-5, rtol=1e-4)


def test_adapters_of_some_heads_are_those_heads():
    """Scores are means over heads: those of parts of equal size have the mean that all heads have."""
    (queries, keys, *rest), adapters = random_case(), trained()
    state = torch.get_rng_state()
    parts = [(slice(0, 2), slice(0, 1)), (slice(2, 4), slice(1, 2))]
    of_parts = [adapters.of_heads(*part) for part in parts]
    assert torch.equal(torch.get_rng_state(), state)
    scores = [
        adapter_scores(of_part, 2, queries[:, query], keys[:, kv], *rest)
        for of_part, (query, kv) in zip(of_parts, parts, strict=True)
    ]
    torch.testing.assert_close(torch.stack(scores).mean(0), adapter_scores(adapters, 2, queries, keys, *rest))
    assert not torch.allclose(*scores)
    for of_part in of_parts:
        assert (of_part.config.shape.heads, of_part.config.shape.kv_heads) == (2, 1)
        assert not any(weight.requires_grad for weight in of_part.parameters())
        hidden = torch.randn(1, 5, SHAPE.hidden_size)
        assert torch.equal(of_part.boundary(hidden), adapters.boundary(hidden))
    assert adapters.query.requires_grad and adapters.config.shape.heads == H


@pytest.mark.parametrize("score", [pooled_scores, lambda *case: adapter_scores(trained(), 0, *case)])
def test_chunks_that_a_row_lacks_get_0_and_nothing_of_theirs_is_read(score):
    queries, keys, chunk_of, ends, lengths = random_case()
    got = score(queries, keys, chunk_of, ends, lengths)
    assert not got[1, 2:].any()
    torch.testing.assert_close(got.sum(1), torch.ones(2))
    ends[1, 2:] = 5
    assert torch.equal(score(queries, keys, chunk_of, ends, lengths), got)


def test_the_mean_is_over_queries():
    queries, *rest = random_case()
    each = torch.stack([pooled_scores(queries[:, :, i : i + 1], *rest) for i in range(QUERIES)])
    torch.testing.assert_close(pooled_scores(queries, *rest), each.mean(0))


# Keys with a bias that is large, as some models' are; a rotation turns it with the place.


def biased_keys(dtype, chunks=40, size=8, bias=300.0):
    torch.manual_seed(4)
    chunk_of, ends = layout([[size] * chunks])
    length = chunk_of.shape[1]
    angle = torch.arange(length)[:, None] * 0.5 ** torch.arange(D // 2)
    turned = torch.cat((angle.cos(), angle.sin()), -1) * bias
    keys = (turned + torch.randn(1, GROUPS, length, D)).to(dtype)
    queries = (torch.randn(1, H, QUERIES, D) * 0.3).to(dtype)
    return queries, keys, chunk_of, ends, torch.full((1, chunks), float(size))


def scores_in_double(queries, keys, chunk_of, ends, lengths):
    """The docstring of `PooledScorer` in float64, for chunks of one length: [1, C]."""
    size, s = int(lengths[0, 0]), D**-0.5
    of_chunks = keys[:, :, : size * lengths.shape[1]].double().unflatten(2, (-1, size))
    mean, variance = of_chunks.mean(3).repeat_interleave(2, 1), of_chunks.var(3, unbiased=False)
    q = queries.double() * s
    logits = q @ mean.transpose(-1, -2) + q.square() @ variance.repeat_interleave(2, 1).transpose(-1, -2) / 2
    return logits.softmax(-1).mean((1, 2))


DTYPES = [torch.float32, torch.bfloat16, torch.float16]


@pytest.mark.parametrize("dtype", DTYPES)
def test_ranks_of_keys_with_a_large_bias_are_those_of_float64(dtype):
    case = biased_keys(dtype)
    wanted = scores_in_double(*case)
    for got in (pooled_scores(*case), adapter_scores(ChunkAdapters(AdapterConfig(SHAPE, width=4)), 0, *case).detach()):
        torch.testing.assert_close(got.double(), wanted, atol=1e-6, rtol=1e-2)
        ranked = wanted[0, got.argsort(descending=True)[0]]
        assert (ranked[:-1] * 1.01 + 1e-6 >= ranked[1:]).all()  # but for ties


@pytest.mark.parametrize("bias", [300.0, 6e4])
def test_a_bias_that_all_keys_share_leaves_their_variance(bias):
    chunk_of, ends = layout([[50]])
    spread = torch.randn(1, GROUPS, 51, D)
    got = chunk_statistics(spread + bias, chunk_of, ends).variance[0, :, 0]
    wanted = (spread + bias)[0, :, :50].double().var(1, unbiased=False)
    torch.testing.assert_close(got.double(), wanted, rtol=1e-3, atol=0)


class OfOneLayer(PooledScorer):
    """As a package of somebody's may have it."""

    def query_features(self, layer, queries):
        return super().query_features(layer, queries * (layer + 1))


@pytest.mark.parametrize("made", [lambda: AdapterScorer(trained()), lambda: PooledScorer(D), lambda: OfOneLayer(D)])
def test_several_layers_at_once_score_as_one_by_one(made):
    scorer, layers = made(), SHAPE.full_layers
    cases = [(torch.randn(B, H, QUERIES, D), torch.randn(B, GROUPS, 20, D)) for _ in layers]
    chunk_of, ends = layout([[3, 8, 1, 5], [2, 2]], before=2)
    lengths = padded([[3, 8, 1, 5], [2, 2]])
    statistics = [chunk_statistics(keys, chunk_of, ends) for _, keys in cases]
    distances = torch.rand_like(lengths) * 9 + 1
    with torch.no_grad():
        features = [scorer.chunk_features(layer, each) for layer, each in zip(layers, statistics, strict=True)]
        wanted = [
            chunk_scores(scorer, layer, queries, own, lengths, distances)
            for layer, (queries, _), own in zip(layers, cases, features, strict=True)
        ]
        together = features_of_layers(scorer, layers, ChunkStatistics(*map(torch.stack, zip(*statistics, strict=True))))
        queries = torch.stack([queries for queries, _ in cases])
        got = scores_of_layers(scorer, layers, queries, together, lengths, distances)
    torch.testing.assert_close(together, torch.stack(features))
    torch.testing.assert_close(got, torch.stack(wanted))
