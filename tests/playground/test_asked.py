"""What a visitor asks for, as calls that do the same."""

import json
import shlex
import sys
from types import SimpleNamespace

import pytest

from decoding import DecodingError, Policy
from decoding.playground.shown import about, details, panes, status
from decoding.playground.view import Read, Side, Token, View
from decoding.playground.visits import Visit, Visits
from decoding.temperature.explained import Explained


def test_the_python_runs_and_writes_the_same(local, asked, capsys, monkeypatch, style_file, tmp_path):
    wanted = asked()
    code = wanted.python(local.name)
    assert "style.txt" in code and str(style_file.parent) not in code
    monkeypatch.chdir(tmp_path)
    (tmp_path / "style.txt").write_bytes(style_file.read_bytes())
    exec(compile(code, "copied", "exec"), {})  # noqa: S102  # ours
    printed = capsys.readouterr().out.strip()
    from tests.playground.test_local import write

    assert printed and write(local, wanted).steered.text.strip() == printed
    assert Policy.from_pretrained(tmp_path / "my-policy").lambda_ == wanted.lambda_


def test_the_policy_is_the_one_that_steered(asked, tmp_path):
    wanted = asked(kv_budget=512, temperature="auto", lambda_=0.35)
    wanted.policy().save_pretrained(tmp_path / "policy")
    written = json.loads(wanted.policy_file())
    assert written == json.loads((tmp_path / "policy" / "policy.json").read_text())
    assert Policy.from_pretrained(tmp_path / "policy").lambda_ == 0.35 == written["lambda"]


def test_the_shell_lines_are_commands_and_a_request(asked):
    wanted = asked(prompt="it's a 'quoted' $HOME text", kv_budget=512, temperature="auto", mode="ratio", lambda_=0.6)
    serving, _, curl = wanted.curl("owner/model").split("\n", 2)
    assert serving == "decoding serve --model owner/model --policy my-policy --port 8000"
    words = shlex.split(curl)
    assert words[:2] == ["curl", "http://localhost:8000/v1/completions"]
    body = json.loads(words[-1])
    assert body["prompt"] == wanted.prompt and body["temperature"] == 1 and body["seed"] == 7
    assert body["vllm_xargs"] == {"style": "style", "lambda": 0.6, "temperature": "auto", "kv_budget": 512}


@pytest.mark.parametrize("chat", [False, True])
def test_the_python_for_a_server_makes_that_request(asked, monkeypatch, capsys, chat):
    wanted = asked(chat=chat, style="s", temperature="auto")
    path, body = wanted.request("m")
    made = []

    def create(self, *, extra_body, **arguments):
        made.append(arguments | extra_body)
        choice = SimpleNamespace(text="written", message=SimpleNamespace(content="written"))
        return SimpleNamespace(choices=[choice])

    calls = type("Calls", (), {"create": create})()
    client = SimpleNamespace(completions=calls, chat=SimpleNamespace(completions=calls))
    opened = SimpleNamespace(OpenAI=lambda **where: made.append(where) or client)
    monkeypatch.setitem(sys.modules, "openai", opened)
    exec(compile(wanted.client("m", "http://localhost:8000"), "copied", "exec"), {})  # noqa: S102  # ours
    assert made == [{"base_url": "http://localhost:8000/v1", "api_key": "none"}, body]
    assert capsys.readouterr().out == "written\n" and path.startswith("/v1/chat" if chat else "/v1/comp")


def test_phases_and_chats_in_a_request(asked):
    path, body = asked(chat=True, think_temperature=1.0, temperature=0.3, style="s").request("m")
    assert path == "/v1/chat/completions" and body["temperature"] == 1
    assert body["vllm_xargs"] == {"style": "s", "lambda": 1.0, "think_temperature": 1.0, "answer_temperature": 0.3}
    assert asked(think_temperature=1.0, temperature=0.3).plain_temperature == 1


@pytest.mark.parametrize("changes", [{"prompt": " "}, {"prompt": "\ud800"}, {"max_new_tokens": 0}])
def test_what_cannot_be_asked(asked, changes):
    with pytest.raises(DecodingError):
        asked(**changes)


def test_everything_shown_is_escaped(asked):
    nasty = "</span><img src=x onerror=alert(1)>{{ 7 * 7 }}${1}"
    view = View("", Side([Token(nasty, 0.5, 0.5)]), Side([Token(nasty, 0.1, 0.2, 3), Token("b")]))
    page = panes(asked(prompt=nasty, style_name=nasty), view, tells_all=True)
    assert "<img" not in page and page.count("&lt;img") == 5 and "{{ 7 * 7 }}" in page
    assert "&lt;b&gt;" in status("<b>", is_error=True) and 'role="alert"' in status("", is_error=True)
    assert page.count('tabindex="0"') == 2  # one stop for each text


def test_a_token_says_how_it_was_moved():
    assert about(Token("a", 0.1, 0.2, 3)) == "0.1 → 0.2 (+0.69 nats), order 3 matched"
    assert about(Token("a", 0.25)) == "probability 0.25"
    assert about(Token("a", 0.0, 0.0, 1)) == "0 → 0 (+0.00 nats), order 1 matched"
    assert about(Token("a")) == "nothing is told of this token"


def test_why_the_temperature_and_what_was_read():
    abilities = dict.fromkeys(("CR", "CT", "ICL", "IF", "MT", "SUMM"), 0.1) | {"CT": 0.5}
    explained = Explained("p", abilities, (0.5, 1.0), (0.9, 1.0), None, None, 1.0, "ability", None)
    reads = [Read(10, 10), Read(5, 20)]
    page = details(View("", steered=Side([], explained=explained, reads=reads)), 0.9)
    assert "reads as creativity" in page and "50 %" in page and "top-p 0.9" in page
    assert "Now 5 of 20" in page and "50 %" in page
    assert 'points="0.0,45.0 400.0,2.0"' in page and 'points="0.0,45.0 400.0,66.5"' in page
    assert details(View(""), None) == ""


def test_a_text_that_is_dropped_in_is_a_style_of_that_page_alone(style_file, tmp_path):
    visits = Visits({"king-james": "king-james"})
    name = visits.of("a").brings(str(style_file))
    assert name == "style.txt (yours)" and visits.of("a").styles[name] == str(style_file)
    assert list(visits.of("b").styles) == ["king-james"]
    run = visits.of("a").begins()
    visits.of("b").begins()
    assert not run.is_set()
    visits.leaves("a")
    assert run.is_set()


@pytest.mark.parametrize(
    ("file", "content"), [("empty.txt", b" \n"), ("half.txt", b"\xff\x00\x81"), ("x.jsonl", b"{}")]
)
def test_a_bad_file_is_a_sentence_without_the_servers_paths(tmp_path, file, content):
    (tmp_path / file).write_bytes(content)
    with pytest.raises(DecodingError, match=file) as raised:
        Visit({}).brings(str(tmp_path / file))
    assert str(tmp_path) not in str(raised.value)
