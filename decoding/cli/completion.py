"""``decoding completion``."""

from __future__ import annotations

import os
from pathlib import Path

import click
from click.shell_completion import get_completion_class

from decoding.errors import DecodingError

_SHELLS = ("bash", "zsh", "fish")


@click.command()
@click.argument("shell", type=click.Choice(_SHELLS), required=False)
def completion(shell: str | None) -> None:
    """Prints what makes a shell complete commands, options, styles and files.

    \b
    bash, in ~/.bashrc:  eval "$(decoding completion bash)"
    zsh, in ~/.zshrc:    eval "$(decoding completion zsh)"
    fish:                decoding completion fish > ~/.config/fish/completions/decoding.fish

    SHELL is by default the one that $SHELL names.
    """
    name = shell or Path(os.environ.get("SHELL", "")).name
    found = get_completion_class(name) if name in _SHELLS else None
    if found is None:
        raise DecodingError(f"name the shell: decoding completion {'|'.join(_SHELLS)}")
    root = click.get_current_context().find_root()
    click.echo(found(root.command, {}, "decoding", "_DECODING_COMPLETE").source())
