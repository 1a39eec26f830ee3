import sys

import numpy as np
import pytest

from decoding.errors import DecodingError
from decoding.style.source import Corpus
from experiments.style.judge import BUNDLE, Split, StyleJudge, passages, split_corpus, train_judges

pytest.importorskip("sklearn")

COMMON = "the of and to in that it was with for his as but not at by from all this which"
VOCABULARY = {
    "sailor": "whale harpoon colour harbour spar mast honour gale rigging stern",
    "lawyer": "plaintiff statute clause tort tribunal verdict counsel damages appeal breach",
    "gardener": "tulip orchard soil pruning blossom hedge compost seedling trellis lawn",
}
SENTENCE = {"sailor": 25, "lawyer": 12, "gardener": 6}


def words_of(author, seed, count):
    """Half content words, half function words that every author prefers differently."""
    common = COMMON.split()
    rng = np.random.default_rng([seed, *author.encode()])
    preference = np.random.default_rng(list(author.encode())).dirichlet(np.ones(len(common)))
    function = rng.choice(common, count, p=preference)
    return np.where(rng.random(count) < 0.5, function, rng.choice(VOCABULARY[author].split(), count)).tolist()


def text_of(author, seed=0, paragraphs=300):
    size = SENTENCE[author]
    words = iter(words_of(author, seed, paragraphs * 50))
    sentences = [" ".join(next(words) for _ in range(size)) + "." for _ in range(paragraphs * 50 // size)]
    each = len(sentences) // paragraphs
    return "\n\n".join(" ".join(sentences[i : i + each]) for i in range(0, len(sentences), each))


@pytest.fixture(scope="module")
def splits():
    return {author: split_corpus(Corpus(author, (text_of(author),))) for author in VOCABULARY}


@pytest.fixture(scope="module")
def judges(splits):
    return train_judges(splits, list(splits))


def parts_of(splits):
    return ({name: getattr(split, part) for name, split in splits.items()} for part in ("judging", "testing"))


def numbered(paragraphs):
    return [f"Paragraph {i} " + "says something or other, " * 10 for i in paragraphs]


def test_split_of_one_document():
    paragraphs = numbered(range(500))
    split = split_corpus(Corpus("numbers", ("\n\n".join(paragraphs),)))
    assert isinstance(split, Split)
    assert [len(part.documents) for part in split] == [1, 1, 1]
    assert {part.name for part in split} == {"numbers"}
    cut = [part.documents[0].split("\n\n") for part in split]
    assert [text.strip() for part in cut for text in part] == [text.strip() for text in paragraphs]
    assert np.allclose([len(part) for part in cut], [350, 100, 50], atol=2)


def test_split_of_many_documents():
    documents = tuple(f"{text}\n \n{text}" for text in numbered(range(400)))
    split = split_corpus(Corpus("numbers", documents))
    assert " ".join(text for part in split for text in part.documents).split() == " ".join(documents).split()
    assert np.allclose([len(part.documents) for part in split], [280, 80, 40], atol=2)


@pytest.mark.parametrize(
    "documents", [("Too short.",), tuple(numbered(range(50))), ("A long text without paragraphs. " * 4000,)]
)
def test_split_of_too_little(documents):
    with pytest.raises(DecodingError, match="brief is too short to judge by.*give a text of at least 62,400"):
        split_corpus(Corpus("brief", documents))


def test_passages():
    corpus = Corpus("words", ("one  two\nthree four five", "six seven\n\neight nine"))
    assert passages(corpus, 12) == ["one two three", "four five six", "seven eight nine"]
    assert passages(corpus, 15) == ["one two three four", "five six seven eight"]
    assert passages(corpus, 500) == []


def test_passages_have_about_the_size_of_64_tokens(splits):
    assert all(260 <= len(text) < 280 for text in passages(splits["sailor"].testing))


@pytest.mark.parametrize("author", VOCABULARY)
def test_judges_tell_authors_apart(judges, author):
    judge = judges[author]
    assert judge.accuracy > 0.95
    assert judge.function_word_accuracy > 0.95
    for other in VOCABULARY:
        probability = judge.probability(passages(Corpus(other, (text_of(other, seed=1, paragraphs=30),))))
        assert probability.dtype == np.float64
        assert probability.mean() > 0.9 if other == author else probability.mean() < 0.1


@pytest.mark.parametrize("author", VOCABULARY)
def test_delta_is_least_to_the_own_author(judges, author):
    texts = passages(Corpus(author, (text_of(author, seed=2, paragraphs=40),)))[:BUNDLE]
    deltas = {name: judge.delta(texts) for name, judge in judges.items()}
    assert min(deltas, key=lambda name: deltas[name]) == author


def test_delta_counts_no_topic(judges):
    """A sailor's function words about gardens stay a sailor's."""
    content = dict(zip(VOCABULARY["sailor"].split(), VOCABULARY["gardener"].split(), strict=True))
    text = " ".join(content.get(word, word) for word in words_of("sailor", 3, 1000))
    assert judges["sailor"].delta([text]) < judges["gardener"].delta([text])
    assert judges["sailor"].probability([text])[0] < 0.5


@pytest.mark.parametrize("author", VOCABULARY)
def test_length_of_sentences(judges, author):
    assert judges[author].target_sentence_words == pytest.approx(SENTENCE[author], rel=0.1)


def test_sentence_words(judges):
    judge = judges["sailor"]
    assert judge.sentence_words(["It cost 3.5 dollars.", '"No!" he said. And', "so on."]) == pytest.approx(9 / 4)
    assert judge.sentence_words(["no end at all"]) == 4


def test_the_same_author_twice_cannot_be_told_apart():
    texts = {name: text_of("sailor", seed, paragraphs=1500) for seed, name in enumerate(["one", "two"])}
    same = {name: split_corpus(Corpus(name, (text,))) for name, text in texts.items()}
    judge = train_judges(same, ["one"])["one"]
    assert 0.35 < judge.accuracy < 0.65
    assert judge.function_word_accuracy < 0.9


def test_shuffled_passages_cannot_be_told_apart(splits):
    pieces = [text for split in splits.values() for part in split for text in passages(part)]
    order = np.random.default_rng(0).permutation(len(pieces))
    halves = {"one": order[::2], "two": order[1::2]}
    shuffled = {
        name: split_corpus(Corpus(name, tuple(pieces[i] + "\n\n" for i in half))) for name, half in halves.items()
    }
    assert 0.3 < train_judges(shuffled, ["two"])["two"].accuracy < 0.7


def test_one_judge_is_as_those_of_many(splits, judges):
    texts = passages(splits["lawyer"].testing)[:3]
    judge = StyleJudge("lawyer", *parts_of(splits))
    assert judge.accuracy == judges["lawyer"].accuracy
    assert np.array_equal(judge.probability(texts), judges["lawyer"].probability(texts))
    assert judge.delta(texts) == judges["lawyer"].delta(texts)


def test_unknown_target(splits):
    with pytest.raises(DecodingError, match="no style corpus 'poet'.*sailor, lawyer, gardener"):
        train_judges(splits, ["poet"])


def test_authors_that_do_not_match(splits):
    judging, testing = parts_of(splits)
    for wrong in ({}, {"sailor": testing["sailor"]}):
        with pytest.raises(DecodingError, match="two or more style corpora"):
            StyleJudge("sailor", judging, wrong)
    with pytest.raises(DecodingError, match="two or more style corpora"):
        train_judges({"sailor": splits["sailor"]}, ["sailor"])


def test_too_little_to_judge_by(splits):
    judging, testing = parts_of(splits)
    with pytest.raises(DecodingError, match="brief is too short"):
        StyleJudge("sailor", judging, testing | {"lawyer": Corpus("brief", ("A short text.",))})


def test_texts_without_words(judges):
    for measure in (judges["sailor"].delta, judges["sailor"].sentence_words):
        with pytest.raises(DecodingError, match="without words"):
            measure(["... 42"])
        with pytest.raises(DecodingError, match="without words"):
            measure([])


def test_without_scikit_learn(monkeypatch, splits):
    monkeypatch.setitem(sys.modules, "sklearn.feature_extraction.text", None)
    with pytest.raises(DecodingError, match=r"decoding-middleware\[compare\]"):
        train_judges(splits, ["sailor"])


@pytest.mark.parametrize("author", VOCABULARY)
def test_ceiling_and_floor_are_held_out_text(judges, splits, author):
    judge = judges[author]
    ceiling, floor = judge.ceiling(40), judge.floor(40)
    assert ceiling["judge"] > 0.9 > 0.1 > floor["judge"]
    assert ceiling["likeness"] > floor["likeness"] + 0.1
    assert ceiling["delta"] < floor["delta"]
    own = passages(splits[author].testing)
    assert ceiling["judge"] == pytest.approx(judge.probability(own).mean(), abs=0.05), "some of these"


def test_likeness_by_another_encoder(splits):
    def length(texts):
        return np.array([[1.0, 0.0] if "whale" in text else [0.0, 1.0] for text in texts])

    judge = train_judges(splits, ["sailor"], length)["sailor"]
    assert judge.likeness(["a whale", "a lawn"]) == pytest.approx([1, 0], abs=0.2)
