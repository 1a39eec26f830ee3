"""What a model on this machine writes for visitors, and what is told of it, without a browser."""

import gc
import threading
import time
from itertools import count

import pytest
import torch

from decoding import DecodingError, FixedTemperature, generate
from decoding.playground.local import LocalModel
from decoding.playground.turns import Line
from decoding.playground.view import AT_LENGTH, ENDED, STOPPED
from decoding.style.background import model_frequencies


def last(views):
    return list(views)[-1]


def write(local, asked):
    return last(local.write(asked, threading.Event()))


def alone(local, asked, **options):
    torch.manual_seed(asked.seed)
    length = asked.max_new_tokens
    return generate(
        local._plain, asked.prompt, tokenizer=local.tokenizer, chat=asked.chat, max_new_tokens=length, **options
    )


def test_both_texts_are_what_generate_writes_with_that_seed(local, asked):
    wanted = asked(temperature=1.3)
    before = torch.get_rng_state()
    view = write(local, wanted)
    assert torch.equal(torch.get_rng_state(), before)
    assert view.status == "Done." and {view.plain.end, view.steered.end} <= {AT_LENGTH, ENDED}
    assert view.steered.text.strip() == alone(local, wanted, policy=wanted.policy()).strip()
    assert view.plain.text.strip() == alone(local, wanted, logits_processor=[FixedTemperature(1.3)]).strip()
    assert view.plain.text != view.steered.text
    assert view.steered.steps == len(view.steered.tokens) - 1 and view.steered.speed > 0


def test_what_is_told_of_tokens_is_what_model_and_prior_say(local, asked):
    wanted = asked()
    tokens = write(local, wanted).steered.tokens
    (prior,) = wanted.policy().processors(local.tokenizer, local._plain)[:1]
    ids = local.tokenizer(wanted.prompt, return_tensors="pt")["input_ids"]
    for token in tokens[:-1]:  # the last one may end the text, and spells nothing
        scores = local._plain(ids).logits[:, -1].detach()
        after = prior(ids, scores).softmax(-1)[0]
        drawn = int((after - token.after).abs().argmin())
        assert after[drawn] == pytest.approx(token.after, rel=1e-4)
        assert scores.softmax(-1)[0, drawn] == pytest.approx(token.before, rel=1e-4)
        assert token.order == prior.matching_orders(ids)[0]
        ids = torch.cat((ids, torch.tensor([[drawn]])), 1)
    assert len({token.order for token in tokens}) > 1


def test_chunks_are_read_on_one_side_alone(local, asked):
    wanted = asked(kv_budget=84, max_new_tokens=30, prompt="the captain said that his ship had never seen " * 14)
    view = write(local, wanted)
    assert view.plain.text == write(local, asked(prompt=wanted.prompt, max_new_tokens=30)).plain.text
    assert not view.plain.reads and len(view.steered.reads) >= len(view.steered.tokens) - 2
    assert all(read <= held for read, held in view.steered.reads)
    held = [step.held for step in view.steered.reads]
    assert held == list(range(held[0], held[0] + len(held)))  # one more each
    assert any(read < 0.95 * held for read, held in view.steered.reads)


def test_visitors_wait_for_each_other_and_get_what_they_get_alone(local, asked):
    mine, yours = asked(seed=1, max_new_tokens=60), asked(seed=2, lambda_=0.3)
    wanted = [write(local, each) for each in (mine, yours)]
    first = local.write(mine, threading.Event())
    began = next(first)  # which is all, if it is written by then
    told = []

    def visit():
        told.extend(local.write(yours, threading.Event()))

    second = threading.Thread(target=visit)
    second.start()
    while not told:
        time.sleep(0.01)
    assert told[0].status.startswith("You wait, number 1 in line")
    got = [began, *first][-1]
    second.join(30)
    for view, alone_ in zip((got, told[-1]), wanted, strict=True):
        assert (view.plain.text, view.steered.text) == (alone_.plain.text, alone_.steered.text)


def test_a_stop_ends_both_and_lets_the_next_one_on(local, asked):
    stop, passes = threading.Event(), count(1)
    hook = local._plain.register_forward_hook(lambda *_: stop.set() if next(passes) == 5 else None)
    try:
        view = last(local.write(asked(max_new_tokens=200), stop))
    finally:
        hook.remove()
    assert view.status == "Stopped." and view.plain.end == view.steered.end == STOPPED
    assert (len(view.plain.tokens), len(view.steered.tokens)) == (5, 4)
    assert write(local, asked()).status == "Done."


def test_a_page_that_goes_away_leaves_nothing_behind(local, asked):
    threads = threading.active_count()
    stop = threading.Event()
    hook = local._plain.register_forward_hook(lambda *_: time.sleep(0.1))
    try:
        views = local.write(asked(), stop)
        while next(views).status != "Writing.":
            pass
        del views
        gc.collect()
    finally:
        hook.remove()
    assert stop.is_set() and threading.active_count() <= threads
    assert not local.line._places


def test_what_cannot_be_had_is_said_and_the_next_one_is_served(local, asked):
    with pytest.raises(DecodingError, match="no style"):
        write(local, asked(style="not-there.txt"))
    with pytest.raises(DecodingError, match="marker"):
        write(local, asked(think_temperature=1.0))
    with pytest.raises(DecodingError, match="chat template"):
        write(local, asked(chat=True))
    assert write(local, asked()).status == "Done."


def test_visitors_come_before_the_measuring_which_measures_the_same(local, asked, monkeypatch):
    monkeypatch.setattr("decoding.style.background.openings", lambda: ("the captain", "rain"))
    monkeypatch.setattr("decoding.style.background._TOKENS_PER_OPENING", 16)
    wanted = model_frequencies(local._plain, local.tokenizer)
    monkeypatch.setattr("decoding.style.background.kept", lambda _, measured, *__: measured())
    at_step, goes_on, found = threading.Event(), threading.Event(), []
    give_way = LocalModel._give_way

    def slowly(self, share):
        at_step.set()
        goes_on.wait(30)
        give_way(self, share)

    monkeypatch.setattr(LocalModel, "_give_way", slowly)
    monkeypatch.setattr(
        "decoding.playground.local.model_frequencies", lambda *given: found.append(model_frequencies(*given))
    )
    measuring = local.prepare()
    assert at_step.wait(30)
    by_ratio = local.write(asked(mode="ratio"), threading.Event())
    assert "What the model writes by itself is measured" in next(by_ratio).status
    at_once = local.write(asked(), threading.Event())
    assert next(at_once).status.endswith("the model is measured.")
    goes_on.set()
    assert last(at_once).status == "Done." and not found  # in the midst of the measuring
    measuring.join(30)
    assert torch.equal(found[0], wanted)
    assert last(by_ratio).status == "Done."


def test_a_line_serves_who_came_first():
    line, served = Line(), []
    places = [line.enter(name) for name in "abc"]
    assert [line.ahead(place) for place in places] == [[], ["a"], ["a", "b"]]

    def wait(place):
        while line.ahead(place, 1):
            pass
        served.append(place.what)
        line.leave(place)

    threads = [threading.Thread(target=wait, args=(place,)) for place in reversed(places)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(10)
    assert served == ["a", "b", "c"]
