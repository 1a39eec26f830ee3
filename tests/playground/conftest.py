import pytest

from decoding.playground.asked import Asked
from decoding.playground.local import LocalModel


@pytest.fixture(scope="module")
def local(model_folder):
    return LocalModel(str(model_folder), "float32")


@pytest.fixture
def asked(style_file):
    """What a visitor of the tiny model wants, with changes."""

    def made(**changes):
        plain = {"prompt": "the captain said", "chat": False, "style": str(style_file), "style_name": "mine"}
        return Asked(**(plain | {"lambda_": 1.0, "mode": "paper", "max_new_tokens": 24, "seed": 7} | changes))

    return made
