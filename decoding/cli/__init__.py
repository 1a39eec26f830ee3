"""The command line: ``decoding``.

``chat``, ``completion``, ``doctor``, ``generate``, ``lm-eval``, ``playground`` and ``serve`` stand here. Everything
else is added by entry points, those of `experiments` first of all.
"""

from __future__ import annotations

import click

from decoding.cli.chat import chat
from decoding.cli.completion import completion
from decoding.cli.doctor import doctor
from decoding.cli.generate import generate
from decoding.cli.groups import Group
from decoding.cli.lm_eval import lm_eval
from decoding.cli.playground import playground
from decoding.cli.sections import Root
from decoding.cli.serve import serve


def _print_version(ctx: click.Context, param: click.Parameter, wanted: bool) -> None:
    if not wanted or ctx.resilient_parsing:
        return
    from decoding.environment import version_line

    click.echo(version_line())
    ctx.exit()


@click.group(cls=Root, context_settings={"help_option_names": ["-h", "--help"]})
@click.option(
    "--version",
    is_flag=True,
    is_eager=True,
    expose_value=False,
    callback=_print_version,
    help="Versions and machine in one line, for reports of faults.",
)
@click.pass_context
def cli(ctx: click.Context) -> None:
    """Inference-time decoding middleware for large language models."""
    if ctx.invoked_subcommand == completion.name:
        return  # a shell that starts does not wait for the rest
    from transformers.utils import logging

    logging.set_verbosity_error()
    logging.disable_progress_bar()


@cli.group(cls=Group)
def bench() -> None:
    """Measures speed, as ratios against a baseline in the same process."""


@cli.group(cls=Group)
def reproduce() -> None:
    """Reproduces the papers' experiments."""


for command in (chat, completion, doctor, generate, lm_eval, playground, serve):
    cli.add_command(command)
