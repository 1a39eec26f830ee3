"""Groups of commands: some of their own, others added by packages (`decoding.hooks.COMMANDS`)."""

from __future__ import annotations

import sys
from typing import Any

import click
from click.shell_completion import CompletionItem

from decoding import hooks
from decoding.errors import DecodingError


class BadInput(click.ClickException):
    """One line, and exit status 2."""

    exit_code = 2


class Group(click.Group):
    """Finds commands by entry points too, and turns errors that users can mend into one line and exit status 2.

    A module that adds commands is imported when one of them is called, or described by --help.
    """

    def invoke(self, ctx: click.Context) -> Any:
        """Runs the command."""
        try:
            return super().invoke(ctx)
        except mendable() as error:
            raise BadInput(str(error)) from error

    def list_commands(self, ctx: click.Context) -> list[str]:
        """Names of all commands."""
        prefix = _path(ctx)
        added = {name.removeprefix(prefix) for name in hooks.COMMANDS.names if name.startswith(prefix)}
        return sorted({*super().list_commands(ctx), *(name for name in added if "." not in name)})

    def shell_complete(self, ctx: click.Context, incomplete: str) -> list[CompletionItem]:
        """Commands by their names alone, since their modules may take long to import, and options."""
        found = [CompletionItem(name) for name in self.list_commands(ctx) if name.startswith(incomplete)]
        return found + super(click.Group, self).shell_complete(ctx, incomplete)

    def get_command(self, ctx: click.Context, cmd_name: str) -> click.Command | None:
        """The command of a name; one that cannot be loaded says so when it is called."""
        own = super().get_command(ctx, cmd_name)
        name = _path(ctx) + cmd_name
        if own is not None or name not in hooks.COMMANDS.names:
            return own
        try:
            return _checked(name, hooks.COMMANDS.load(name))
        except DecodingError as error:
            return _broken(cmd_name, error)


def mendable() -> tuple[type[Exception], ...]:
    """The errors that tell users what to do. Those of packages that nobody has imported have not been raised."""
    return DecodingError, *(
        getattr(sys.modules[module], name)
        for module, name in (("chunkllm.errors", "ChunkError"), ("ngram.errors", "NGramError"))
        if module in sys.modules
    )


def _path(ctx: click.Context) -> str:
    """What stands before a command's name in its entry point: the groups that it is in."""
    groups = []
    while ctx.parent is not None:
        groups.append(f"{ctx.info_name}.")
        ctx = ctx.parent
    return "".join(reversed(groups))


def _checked(name: str, command: Any) -> click.Command:
    if not isinstance(command, click.Command):
        raise DecodingError(f"{name!r} ({hooks.COMMANDS.group}) is no click.Command, but {command!r}")
    return command


def _broken(name: str, error: DecodingError) -> click.Command:
    def fail(**_: Any) -> None:
        raise error

    anything = click.Argument(["arguments"], nargs=-1, type=click.UNPROCESSED)
    settings = {"ignore_unknown_options": True, "help_option_names": []}
    return click.Command(name, settings, fail, [anything], help="(cannot be loaded)")
