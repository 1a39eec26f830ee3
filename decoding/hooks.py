"""All that another package can add, each by an entry point of the group that is named here."""

from decoding.plugins import Hook

COMMANDS = Hook("decoding.commands")
"""A `click.Command`, called by the entry point's name: ``mine``, or ``bench.mine`` within a group."""

STYLES = Hook("decoding.styles")
"""A function without arguments: a style's documents, a list of texts."""

TASKS = Hook("decoding.tasks")
"""A function without arguments: a task's definition, a dictionary like those in ``experiments/temperature/tasks``."""

SCORERS = Hook("decoding.scorers")
"""A function of a `chunkllm.models.ModelShape`: a `chunkllm.Scorer`, a method of ``decoding chunk eval``."""
