"""A package that adds one of everything. Its pyproject.toml names what is here."""

import click

from chunkllm import PooledScorer


@click.command()
def captain():
    """Says who is the captain."""
    click.echo("I am")


def log():
    return ["the captain said that the sea was black with rain"] * 20


def orders():
    records = [{"said": f"the captain said {word}", "done": "rain"} for word in ("sea", "night", "wind", "ship")]
    task = {"name": "captains-orders", "suites": ["abilities"], "ability": "IF", "records": records}
    return task | {"templates": ["{said}"], "answer": "{done}", "metric": "chrf", "max_new_tokens": 2}


class Longest(PooledScorer):
    """The longest chunks."""

    is_distribution = False

    def __init__(self, shape):
        super().__init__(shape.head_dim, scaling=shape.scaling)

    def reduce(self, layer, logits, lengths, distances):
        return lengths
