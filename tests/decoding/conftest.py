import pytest
from click.testing import CliRunner

from decoding.cli import cli
from tests.conftest import make_tokenizer


@pytest.fixture
def run(monkeypatch, tmp_path):
    monkeypatch.chdir(tmp_path)
    return lambda *arguments, **options: CliRunner().invoke(cli, [str(each) for each in arguments], **options)


@pytest.fixture
def chat_folder(model, tmp_path):
    """A model to talk to: its template says "night" before what anybody says, and "captain said" after it."""
    tokenizer = make_tokenizer()
    tokenizer.chat_template = (
        "{% for m in messages %}{% if m['content'] == 'boom' %}{{ raise_exception('no boom') }}{% endif %}"
        "night {{ m['content'] }} {% endfor %}{% if add_generation_prompt %}captain said{% endif %}"
    )
    model.save_pretrained(tmp_path / "chat")
    tokenizer.save_pretrained(tmp_path / "chat")
    return tmp_path / "chat"
