"""Help in sections: commands by what they are for, options by what they are about."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping

import click

from decoding.cli.groups import Group

_COMMANDS = {
    "Write": ("chat", "generate", "playground", "serve"),
    "Make and judge": ("style", "temperature", "chunk", "sweep"),
    "Measure": ("bench", "lm-eval", "reproduce"),
    "This machine": ("doctor", "completion"),
}
_OPTIONS = {
    "Model": ("model", "dtype", "device", "engine"),
    "Policy and style": (
        *("policy", "style", "styles", "lambda_", "lambdas", "mode", "background", "plausibility", "max_js"),
        *("entropy_gate", "steer_stop", "combine", "allow_any_lambda"),
    ),
    "How a style is trained": ("field", "order", "smoothing", "unwrap"),
    "Text": ("prompts", "system", "chat", "max_new_tokens", "batch_size", "temperature", "top_p", "seed", "seeds"),
}


class Root(Group):
    """The command line's own group."""

    def format_commands(self, ctx: click.Context, formatter: click.HelpFormatter) -> None:
        """Writes the commands, those of other packages last."""
        found = {name: command for name in self.list_commands(ctx) if (command := self.get_command(ctx, name))}
        width = formatter.width - 6 - max(map(len, found))
        _write(found, _COMMANDS, "Others", lambda name: (name, found[name].get_short_help_str(width)), formatter)


class Command(click.Command):
    """One with many options."""

    def format_options(self, ctx: click.Context, formatter: click.HelpFormatter) -> None:
        """Writes the options, those of no section last."""
        records = {each.name: record for each in self.get_params(ctx) if (record := each.get_help_record(ctx))}
        _write(records, _OPTIONS, "Others", lambda name: records[name], formatter)


def _write(
    names: Iterable[str | None],
    sections: Mapping[str, tuple[str, ...]],
    rest: str,
    row: Callable[[str], tuple[str, str]],
    formatter: click.HelpFormatter,
) -> None:
    known = {name for section in sections.values() for name in section}
    left = tuple(name for name in names if name is not None and name not in known)
    for title, wanted in {**sections, rest: left}.items():
        if rows := [row(name) for name in wanted if name in names]:
            with formatter.section(title):
                formatter.write_dl(rows)
