"""``decoding chat``."""

from __future__ import annotations

import io
import sys
from collections.abc import Iterator
from contextlib import suppress
from typing import TYPE_CHECKING, Any

import click

from decoding.cli import options as shared
from decoding.cli import policies
from decoding.cli.groups import mendable
from decoding.cli.sections import Command
from decoding.errors import DecodingError

if TYPE_CHECKING:
    from decoding.cli.talk import Talk


@click.command(cls=Command)
@shared.model
@shared.dtype
@shared.device
@shared.policy
@click.option("--style", type=shared.STYLE_NAME, help=f"None by default. {shared.style_help}")
@shared.lambda_or_auto
@shared.mode
@click.option(
    "--temperature",
    type=shared.TemperatureOrAuto(),
    help='"auto" has it chosen for each turn; 0 takes the most probable token at every step. By default the model\'s '
    "own settings hold.",
)
@click.option("--system", help="What the model is told before the conversation.")
@click.option(
    "--max-new-tokens", default=512, show_default=True, type=click.IntRange(min=1), help="Of an answer, at most."
)
@shared.seed
@click.pass_context
def chat(ctx: click.Context, policy: str | None, system: str | None, seed: int, **options: Any) -> None:
    """Talks with a model under a policy, which /commands change while it goes on: /help lists them.

    Ctrl-C stops an answer, Ctrl-D ends. Through a pipe each line is a turn, and answers alone go to the output.
    """
    import torch

    from decoding.cli.talk import Talk
    from decoding.models import load_model, load_tokenizer
    from decoding.tokens import has_chat_template, require_text

    require_text(system or "", "the system prompt")
    changes = policies.asked(ctx)
    chosen = policies.opened(policy, changes)
    tokenizer = load_tokenizer(options["model"])
    if not has_chat_template(tokenizer):
        raise DecodingError(f"{options['model']} has no chat template: `decoding generate` continues a text with it")
    model = load_model(options["model"], options["dtype"], options["device"])
    talk = Talk(model, tokenizer, options["max_new_tokens"])
    talk.instruct(system)
    talk.take(chosen, is_greedy=changes.get("temperature") == 0)
    torch.manual_seed(seed)
    _converse(talk, options["model"])


def _converse(talk: Talk, name: str) -> None:
    is_terminal = _is_terminal()
    if is_terminal:
        _tell(f"{name}: {talk.manner}. /help lists commands, Ctrl-D ends.")
    for line in _typed() if is_terminal else _piped():
        if not line.strip():
            continue
        try:
            if not _goes_on(talk, line):
                return
        except mendable() as error:
            click.echo(f"Error: {error}", err=True)
        except KeyboardInterrupt:
            if not is_terminal:
                raise
            click.echo("")


def _is_terminal() -> bool:
    return sys.stdin.isatty() and sys.stdout.isatty()


def _goes_on(talk: Talk, line: str) -> bool:
    from decoding.cli.talk import obey

    if line.startswith("/"):
        answer = obey(talk, line)
        if answer is not None:
            _tell(answer)
        return answer is not None
    talk.answer(line.strip(), lambda piece: click.echo(piece, nl=False))
    click.echo("")
    return True


def _tell(text: str) -> None:
    click.secho(text, err=True, dim=True)


def _typed() -> Iterator[str]:
    """Lines from a terminal, with editing and a history, until Ctrl-C or Ctrl-D."""
    with suppress(ImportError):  # not everywhere
        import readline  # noqa: F401  # `input` uses it
    while True:
        try:
            yield input("> ")
        except (EOFError, KeyboardInterrupt):
            click.echo("", err=True)
            return


def _piped() -> Iterator[str]:
    if isinstance(sys.stdin, io.TextIOWrapper):
        sys.stdin.reconfigure(errors="surrogateescape")  # what is no text is told line by line
    for line in sys.stdin:
        yield line.rstrip("\r\n")
