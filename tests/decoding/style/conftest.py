import pytest


@pytest.fixture(scope="module")
def short_openings():
    """Two beginnings, and few tokens: a tiny model needs no more."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("decoding.style.background.openings", lambda: ("the captain", "rain"))
        patch.setattr("decoding.style.background._TOKENS_PER_OPENING", 16)
        yield
