"""What is written with ``verify=True`` is what the model writes without, whatever was drafted."""

from concurrent.futures import ThreadPoolExecutor
from copy import deepcopy

import numpy as np
import pytest
import torch
from transformers import LogitsProcessor, StoppingCriteria
from transformers.generation.streamers import BaseStreamer

from chunkllm import ChunkError, ChunkSelection
from chunkllm.contiguous.noise import Noise
from chunkllm.pace import Pace
from tests.chunkllm.conftest import KINDS, VOCAB, Stops, cache_name, cache_of, tiny_model
from tests.chunkllm.contiguous.conftest import SMALL, generate, logits_of
from tests.chunkllm.every_type import tiny_model_of, types

LENGTHS = (60, 33, 47)
SAMPLING = {"do_sample": True, "top_k": 10, "temperature": 0.7, "num_return_sequences": 2}


@pytest.fixture
def drafting(monkeypatch):
    """Sets how many tokens are drafted, whatever they cost and however many were right."""

    def set_length(count):
        monkeypatch.setattr(Pace, "length", lambda self, active, most: min(count, most))
        monkeypatch.setattr(Pace, "took", lambda *_: None)

    set_length(4)
    return set_length


def attach(model, **options):
    return ChunkSelection(verify=True, **{"budget": 14} | SMALL | options).attach(model, Stops())


def lossless(model, lengths=LENGTHS, chunks=None, **options):
    with attach(model, **chunks or {}) as attached:
        return generate(model, lengths, **options), attached.stats


def assert_same(got, wanted):
    assert torch.equal(got.sequences, wanted.sequences)
    torch.testing.assert_close(logits_of(got), logits_of(wanted), atol=1e-3, rtol=1e-3)


class TestEquality:
    @pytest.mark.parametrize("count", [0, 1, 5])
    @pytest.mark.parametrize("kind", KINDS)
    def test_greedy_and_sampled_texts_are_the_models_own(self, models, drafting, kind, count):
        drafting(count)
        for lengths in ((60,), LENGTHS):
            for options in ({}, SAMPLING):
                wanted = generate(models(kind), lengths, **options)
                state = torch.get_rng_state()
                got, stats = lossless(models(kind), lengths, **options)
                assert_same(got, wanted)
                assert torch.equal(torch.get_rng_state(), state)
                assert (stats["acceptance"] is None) == (count == 0)
                assert count == 0 or stats["kv_retention"] < 0.6

    @pytest.mark.parametrize(
        "chunks", [{"retention": 0.3, "budget": None}, {"top_k": 2, "budget": None}, {"vote": True}]
    )
    def test_however_it_is_selected(self, llama, drafting, chunks):
        got, _ = lossless(llama, chunks=chunks)
        assert_same(got, generate(llama, LENGTHS))

    @pytest.mark.parametrize("room", [0, 1, 2, 7])
    def test_room_for_tokens_is_made_at_any_of_them(self, llama, drafting, monkeypatch, room):
        monkeypatch.setattr("chunkllm.contiguous.texts._ROOM", room)
        for lengths in ((60,), LENGTHS):
            got, _ = lossless(llama, lengths, max_new_tokens=40)
            assert_same(got, generate(llama, lengths, max_new_tokens=40))

    def test_chunks_that_end_are_counted(self, llama, drafting):
        drafted = lossless(llama, (60,))[1]
        drafting(0)
        assert drafted["boundaries"] == lossless(llama, (60,))[1]["boundaries"] > 0

    def test_eager_attention(self, models, drafting):
        model = models("llama", "eager")
        got, _ = lossless(model)
        assert_same(got, generate(model, LENGTHS))

    @pytest.mark.parametrize("kind", ["afmoe", "mllama", "qwen2_vl", "phi3"])
    def test_other_architectures(self, drafting, kind):
        if kind not in types():
            pytest.skip(f"this transformers has no {kind}")
        model = tiny_model_of(kind).eval()
        ids = torch.randint(20, 80, (2, 40), generator=torch.Generator().manual_seed(0))
        options = {"ids": ids, "eos_token_id": None, "pad_token_id": 0}
        wanted = generate(model, **options)
        with attach(model):
            assert torch.equal(generate(model, **options).sequences, wanted.sequences)

    def test_its_own_pace(self, llama):
        got, stats = lossless(llama, max_new_tokens=40)
        assert_same(got, generate(llama, LENGTHS, max_new_tokens=40))
        assert stats["passes"] > 0

    def test_a_context_within_the_budget_is_not_drafted(self, llama, drafting):
        got, stats = lossless(llama, chunks={"budget": 500})
        assert_same(got, generate(llama, LENGTHS))
        assert stats["acceptance"] is None

    def test_bfloat16_differs_by_rounding_alone(self, drafting):
        model = tiny_model().to(torch.bfloat16)
        got, wanted = lossless(model, (60,))[0], generate(model, (60,))
        parted = (got.sequences != wanted.sequences)[0, 60:].long()
        upto = int(parted.argmax()) + 1 if parted.any() else 12
        torch.testing.assert_close(logits_of(got)[:, :upto], logits_of(wanted)[:, :upto], atol=0.3, rtol=0.05)
        if parted.any():  # at a tie
            best = logits_of(wanted)[0, upto - 1].topk(2).values
            assert best[0] - best[1] < 0.2

    def test_all_is_right_where_everything_is_drafted_with_everything(self, llama, drafting):
        _, stats = lossless(llama, (60,), {"budget": 59})
        assert stats["acceptance"] > 0.9

    def test_threads_write_side_by_side(self, llama, drafting):
        seeds = range(3)
        texts = [torch.randint(3, VOCAB, (2, 60), generator=torch.Generator().manual_seed(seed)) for seed in seeds]
        wanted = [generate(llama, ids=ids).sequences for ids in texts]
        with attach(llama), ThreadPoolExecutor(3) as pool:
            got = list(pool.map(lambda ids: generate(llama, ids=ids).sequences, texts))
        assert all(torch.equal(*pair) for pair in zip(got, wanted, strict=True))

    def test_the_host_waits_once_a_cycle(self, llama, drafting, monkeypatch):
        waits = []
        own = torch.Tensor.cpu
        monkeypatch.setattr(torch.Tensor, "cpu", lambda tensor: waits.append(tensor.shape) or own(tensor))
        with attach(llama) as attached:
            before = len(waits)
            generate(llama, eos_token_id=1)
        prompt = 1 + 1  # its padding, and the first tokens
        assert len(waits) - before <= attached.stats["passes"] + prompt + 1


class TestEnds:
    @pytest.fixture
    def eos(self, llama):
        """A token that ends the three texts at different places, if it ends any."""
        written = generate(llama, LENGTHS, max_new_tokens=30).sequences[:, 60:]
        firsts = {
            int(t): [(row == t).nonzero()[0].item() if (row == t).any() else 30 for row in written]
            for t in range(VOCAB)
        }
        return max(firsts, key=lambda token: len(set(firsts[token])) - (max(firsts[token]) == 30) * 0.5)

    @pytest.mark.parametrize("count", [0, 2, 7])
    def test_texts_end_at_their_end(self, llama, drafting, eos, count):
        drafting(count)
        for options in ({}, SAMPLING):
            options = options | {"eos_token_id": eos, "max_new_tokens": 30}
            wanted = generate(llama, LENGTHS, **options)
            got, _ = lossless(llama, **options)
            assert torch.equal(got.sequences, wanted.sequences)
            assert cache_of(got).get_seq_length() == cache_of(wanted).get_seq_length()

    def test_a_returned_cache_goes_on(self, llama, drafting, eos):
        more = torch.randint(3, VOCAB, (3, 5), generator=torch.Generator().manual_seed(9))

        def turns():
            first = generate(llama, LENGTHS, eos_token_id=eos, max_new_tokens=20)
            ids = torch.cat((first.sequences, more), 1)
            mask = torch.cat(
                (torch.arange(60) >= 60 - torch.tensor(LENGTHS)[:, None], torch.ones(3, ids.shape[1] - 60)), 1
            )
            options = {cache_name(llama): cache_of(first), "attention_mask": mask.long(), "pad_token_id": 0}
            return llama.generate(ids, max_new_tokens=12, do_sample=False, **options)

        wanted = turns()
        with attach(llama):
            assert torch.equal(turns(), wanted)

    def test_own_criteria_are_asked_as_generate_asks_them(self, llama, drafting):
        class Odd(StoppingCriteria):
            """Counts on being asked once for every length, with all rows."""

            def __init__(self):
                self.asked = []

            def __call__(self, ids, scores, **_):
                self.asked.append(ids.tolist())
                return torch.tensor([len(self.asked) > 5 + row for row in range(len(ids))])

        wanted, got = Odd(), Odd()
        plain = generate(llama, LENGTHS, stopping_criteria=[wanted], max_new_tokens=30)
        assert torch.equal(lossless(llama, stopping_criteria=[got], max_new_tokens=30)[0].sequences, plain.sequences)
        assert got.asked == wanted.asked

    def test_a_streamer_gets_every_token(self, llama, drafting):
        class Kept(BaseStreamer):
            def __init__(self):
                self.got = []

            def put(self, value):
                self.got.append(value.tolist())

            def end(self):
                self.got.append("end")

        wanted, got = Kept(), Kept()
        generate(llama, (60,), streamer=wanted)
        lossless(llama, (60,), streamer=got)
        assert got.got == wanted.got

    def test_stop_strings(self, drafting):
        from tokenizers import Tokenizer, decoders, models, pre_tokenizers
        from transformers import PreTrainedTokenizerFast

        letters = Tokenizer(
            models.BPE({letter: i for i, letter in enumerate(sorted(pre_tokenizers.ByteLevel.alphabet()))}, [])
        )
        letters.pre_tokenizer, letters.decoder = pre_tokenizers.ByteLevel(add_prefix_space=False), decoders.ByteLevel()
        tokenizer, model = PreTrainedTokenizerFast(tokenizer_object=letters), tiny_model(vocab_size=256)
        ids = torch.randint(3, 256, (1, 60), generator=torch.Generator().manual_seed(2))
        written = tokenizer.convert_ids_to_tokens(generate(model, ids=ids, max_new_tokens=30).sequences[0, 60:])
        shown = [letter for letter in written[5:] if letter.isascii()][0]
        options = {"ids": ids, "tokenizer": tokenizer, "stop_strings": shown, "max_new_tokens": 30}
        wanted = generate(model, **options)
        assert wanted.sequences.shape[1] < 90
        config = deepcopy(model.generation_config)
        config.stop_strings = options["stop_strings"]
        with attach(model):
            assert torch.equal(generate(model, **options).sequences, wanted.sequences)
            options = options | {"stop_strings": None, "generation_config": config}
            assert torch.equal(generate(model, **options).sequences, wanted.sequences)


class TestProcessors:
    def test_own_processors_see_what_they_would_see(self, llama, drafting):
        class ByHistory(LogitsProcessor):
            """Depends on the length, on all rows' texts, and on which row it is."""

            def __call__(self, ids, scores):
                assert scores.shape == (3, VOCAB)
                assert scores.dtype == torch.float32
                favoured = (ids.sum(1) + ids.shape[1]) % VOCAB
                bonus = torch.tensor([2.0, 4.0, 6.0])[:, None]
                return scores.scatter_add(1, favoured[:, None], bonus)

        options = {
            "logits_processor": [ByHistory()],
            "repetition_penalty": 1.2,
            "min_new_tokens": 5,
            "max_new_tokens": 25,
        }
        for sampling in ({}, {"do_sample": True}):
            assert_same(lossless(llama, **options, **sampling)[0], generate(llama, LENGTHS, **options, **sampling))


def test_the_distribution_is_the_models(drafting):
    """Chi-squared, over all texts of three tokens."""
    drafting(3)
    model = tiny_model(vocab_size=5, initializer_range=0.25)
    ids = torch.randint(1, 5, (1, 40), generator=torch.Generator().manual_seed(3))
    rows = 1500
    torch.manual_seed(11)
    with attach(model) as attached:
        written = model.generate(ids, do_sample=True, num_return_sequences=rows, max_new_tokens=3, top_k=0)
    assert 0.2 < attached.stats["acceptance"] < 0.999
    texts = torch.cartesian_prod(*[torch.arange(5)] * 3)
    with torch.no_grad():
        logits = model(torch.cat((ids.expand(125, -1), texts), 1)).logits[:, 39:42].log_softmax(-1)
    wanted = logits.gather(2, texts[:, :, None])[..., 0].sum(1).exp()
    places = written[:, 40:] @ torch.tensor([25, 5, 1])
    seen = torch.bincount(places, minlength=125)
    from scipy.stats import chisquare

    common = wanted * rows > 5
    observed = np.append(seen[common], seen[~common].sum())
    expected = np.append(wanted[common], wanted[~common].sum()).astype(np.float64) * rows
    assert chisquare(observed, expected * observed.sum() / expected.sum()).pvalue > 1e-3


class TestRefused:
    @pytest.mark.parametrize(
        ("options", "said"),
        [
            ({"num_beams": 2}, "beam search"),
            ({"assistant_model": "itself"}, "assisted"),
            ({"prompt_lookup_num_tokens": 3}, "assisted"),
            ({"use_cache": False}, "use_cache"),
            ({"output_attentions": True}, "attentions"),
            ({"guidance_scale": 1.5}, "Guidance"),
            ({"custom_generate": lambda *_, **__: None}, "custom_generate"),
        ],
    )
    def test_what_cannot_be_verified(self, llama, options, said):
        options = {name: llama if value == "itself" else value for name, value in options.items()}
        with attach(llama), pytest.raises(ChunkError, match=said):
            generate(llama, (60,), **options)
        assert torch.equal(generate(llama, (60,)).sequences, generate(llama, (60,)).sequences)

    @pytest.mark.parametrize("option", ["offload", "every_step"])
    def test_what_would_do_nothing(self, option):
        with pytest.raises(ChunkError, match=option):
            ChunkSelection(verify=True, **{option: True})

    def test_detached_a_model_generates_as_before(self):
        model = tiny_model()
        own = model.generate
        with attach(model):
            assert model.generate != own
        assert model.generate == own
        assert "generate" not in vars(model)


class TestNoise:
    def test_it_is_what_multinomial_draws(self):
        scores = torch.randn(3, 50)
        torch.manual_seed(4)
        wanted = [torch.multinomial(scores.softmax(-1), 1)[:, 0] for _ in range(4)]
        state = torch.get_rng_state()
        torch.multinomial(scores.softmax(-1), 1)
        torch.manual_seed(4)
        noise = Noise(torch.device("cpu"))
        got = [noise.pick(scores, place) for place in (7, 8, 9, 8, 11, 10)]
        for place, tokens in zip((7, 8, 9, 8, 10), (*got[:4], got[5]), strict=True):
            assert torch.equal(tokens, wanted[place - 7])
        noise.end(11)
        assert torch.equal(torch.get_rng_state(), state)


def test_what_a_draft_reads_is_known_before(llama):
    with attach(llama):
        cache = cache_of(generate(llama, (60,)))
    states = 2 * 4 * sum(layer.keys.shape[1] * layer.keys.shape[3] for layer in cache.full_layers)  # of a token
    held = int(cache.lengths[0])
    assert cache.share(0) == pytest.approx(14 / held)
    assert cache.share(states * held) == pytest.approx((14 + held) / (2 * held))


class TestPace:
    ALL = np.array([True])

    def paced(self, plain, more, draft, acceptance, choice=0.0):
        pace = Pace(1, share=0)
        for slow in (3, 1):
            pace.took(0, 0, 0, slow * plain)
        for _ in range(200):
            pace.saw(10, np.array([9]))
            pace._right[:] = acceptance * pace._tried
        for _ in range(30):
            pace.took(3, choice, 3 * draft, plain + 3 * more)
        return pace

    @pytest.mark.parametrize(("most", "length"), [(16, 3), (2, 2)])
    def test_first_plain_steps_then_a_trial(self, most, length):
        pace = Pace(1, share=0.3)
        for _ in range(2):
            assert pace.length(self.ALL, most) == 0
            pace.took(0, 0, 0, 1.0)
        assert pace.length(self.ALL, most) == length

    @pytest.mark.parametrize("share", [0.7, 1.0])
    def test_where_little_is_saved_a_trial_comes_late(self, share):
        pace, steps = Pace(1, share), 0
        while not pace.length(self.ALL, 16):
            pace.took(0, 0, 0, 1.0)
            steps += 1
        assert steps == 256 + 2

    @pytest.mark.parametrize(
        ("plain", "more", "draft", "acceptance", "choice"),
        [
            (424, 8, 55, 0.95, 10),
            (142, 5, 55, 0.95, 10),
            (71, 4, 55, 0.95, 10),
            (142, 5, 55, 0.5, 10),
            (10, 0.1, 1, 0.99, 1),
        ],
    )
    def test_the_length_is_the_fastest(self, plain, more, draft, acceptance, choice):
        def speed(k):
            written = sum(acceptance**i for i in range(k + 1))
            return written / (plain + k * (more + draft) + choice * (k > 0))

        got = self.paced(plain, more, draft, acceptance, choice).length(self.ALL, 16)
        assert got == max((0, 1, 3, 7, 11, 15), key=speed)

    def test_where_it_does_not_pay_it_is_tried_again_ever_more_rarely(self):
        pace = self.paced(50, 5, 55, 0.95)
        tried = []
        for step in range(400):
            if pace.length(self.ALL, 16):
                tried.append(step)
        assert 2 <= len(tried) <= 3
        assert np.diff(tried).min() >= 64

    def test_a_length_whose_passes_are_slow_is_left(self):
        """Costs that jump: a line through them would have the longest draft tried again and again."""
        pace, tried = self.paced(100, 5, 20, 0.95), []
        for _ in range(40):
            length = pace.length(self.ALL, 16)
            tried.append(length)
            pace.saw(length, np.array([length]))
            pace.took(length, 10, 20 * length, 100 + (15 if length <= 7 else 60) * length)
        assert tried[-20:] == [7] * 20
        assert tried.count(11) + tried.count(15) <= 4

    def test_a_trial_after_a_rest_forgets_what_passes_took(self):
        pace = self.paced(50, 500, 5, 0.99)
        lengths = [pace.length(self.ALL, 16) for _ in range(66)]
        assert lengths.count(3) == 1
        for _ in range(4):
            pace.took(3, 1, 15, 55)
            pace.saw(3, np.array([3]))
        assert pace.length(self.ALL, 16) >= 7

    def test_acceptance_is_learnt_by_row(self):
        pace = Pace(2, share=0)
        for _ in range(100):
            pace.saw(4, np.array([4, 0]))
        assert pace.acceptance[0] > 0.97
        assert pace.acceptance[1] < 0.1
        pace.saw(4, np.array([-1, 4]))
        assert pace.acceptance[0] > 0.97
