"""``decoding doctor``."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from itertools import groupby
from typing import TYPE_CHECKING, Any

import click

if TYPE_CHECKING:
    from rich.console import Console

_WIDTH = 120  # where there is no terminal
_WORKS = {True: "yes", False: "no", None: "unknown"}


@click.command()
@click.argument("model", required=False)
@click.option("--json", "as_json", is_flag=True, help="Print all of it as JSON, for reports of faults.")
@click.option("--no-speed", is_flag=True, help="Leave the measuring out, which takes some ten seconds.")
def doctor(model: str | None, as_json: bool, no_speed: bool) -> None:
    """Says what is here, and which methods work with MODEL in which engine, and how fast.

    MODEL is a folder or a Hugging Face hub id. Its configuration and tokenizer will do; no weights are downloaded.
    """
    import json

    from rich.console import Console

    from decoding.doctor import examine

    with Console(stderr=True).status("examining …"):
        found = examine(model, with_speed=not no_speed).as_dict()
    if as_json:
        click.echo(json.dumps(found, indent=1, ensure_ascii=False))
        return
    console = Console(markup=False, highlight=False)
    if not console.is_terminal:
        console.width = _WIDTH
    _print_machine(console, found["machine"])
    if found["model"] is not None:
        _print_model(console, found["model"])
        _print_methods(console, found["methods"])
    if found["speed"]:
        _print_speed(console, found["speed"], found["machine"])


def _print_machine(console: Console, machine: dict[str, Any]) -> None:
    triton, plugin = machine["triton"], machine["vllm_plugin"]
    default = next(device["kind"] for device in machine["devices"] if device["is_default"])
    rows = [
        ("versions", ", ".join(f"{name} {version}" for name, version in machine["versions"].items())),
        ("platform", machine["platform"]),
        *((f"engine {name}", version or "not installed") for name, version in machine["engines"].items()),
        *((f"device {device['kind']}", device["name"]) for device in machine["devices"]),
        ("torch's threads", f"{machine['threads']}, with {machine['cores']} cores"),
        ("models are loaded to", default),
        ("Triton's kernels", _lines(triton["state"], triton["why"])),
        ("vLLM's plugin", _lines("registered" if plugin["works"] else "no", plugin["why"], plugin["fix"])),
    ]
    _print_table(console, "This machine", ("", ""), rows)
    optional = [
        (each["name"], "there" if each["install"] is None else "missing", each["install"] or "")
        for each in machine["extras"]
    ]
    _print_table(console, "Optional", ("what", "", "to install it"), optional)


def _print_model(console: Console, model: dict[str, Any]) -> None:
    tokenizer, thinking = model["tokenizer"], model["thinking"]
    layers = [
        "not told" if model["full_layers"] is None else f"{model['full_layers']} with full attention",
        f"{model['sliding_layers']} with windows of {model['window']} tokens" if model["sliding_layers"] else None,
        f"{model['other_layers']} of another kind" if model["other_layers"] else None,
    ]
    rows = [
        ("type", f"{model['model_type']}, {model['parameters']:,} parameters"),
        ("size class", f"{model['size']}, for the temperature selector"),
        ("layers", ", ".join(filter(None, layers))),
        ("positions", "no limit is named" if model["positions"] is None else f"{model['positions']:,}"),
        ("token ids", f"{model['ids']:,} scored, {tokenizer['ids']:,} of the tokenizer"),
        ("tokenizer", f"{tokenizer['kind']}, {'fast' if tokenizer['is_fast'] else 'slow'}"),
        ("chat template", "yes" if tokenizer["has_chat_template"] else "no"),
        ("markers of thinking", " … ".join(thinking) if thinking else "none found"),
        ("embedded curve is its own", _lines(_WORKS[model["has_curve"]], model["curve_why"])),
        *(("note", note) for note in model["notes"]),
    ]
    _print_table(console, model["name"], ("", ""), rows)


def _print_methods(console: Console, verdicts: Iterable[dict[str, Any]]) -> None:
    rows = []
    for (engine, works, about), alike in groupby(verdicts, _about):
        rows.append((engine, "\n".join(each["method"] for each in alike), works, about))
    _print_table(console, "What works with it", ("engine", "method", "works", "how, or why not and what to do"), rows)


def _about(verdict: dict[str, Any]) -> tuple[str, str, str]:
    lines = _lines(verdict["why"], verdict["fix"], verdict["note"])
    return verdict["engine"], _WORKS[verdict["works"]], lines


def _print_speed(console: Console, timings: Iterable[dict[str, Any]], machine: dict[str, Any]) -> None:
    rows = [(each["what"], _milliseconds(each), each["on"]) for each in timings]
    _print_table(console, "Speed here, of each method's own work", ("what", "median [quartiles]", "on"), rows)
    if (machine["load"] or 0) > machine["cores"] / 2:
        console.print(
            f"The machine was busy before (load {machine['load']:.1f}, {machine['cores']} cores): idle, it is faster."
        )


def _milliseconds(timing: dict[str, Any]) -> str:
    if timing["milliseconds"] is None:
        return f"not measured: {timing['why']}"
    low, high = timing["quartiles"]
    return f"{timing['milliseconds']:.2f} ms [{low:.2f}, {high:.2f}]"


def _lines(*parts: str | None) -> str:
    return "\n".join(filter(None, parts))


def _print_table(console: Console, title: str, heads: Sequence[str], rows: Iterable[Sequence[str]]) -> None:
    from rich.table import Table

    table = Table(title=title, title_justify="left", show_header=any(heads))
    for head in heads:
        table.add_column(head, overflow="fold")
    for row in rows:
        table.add_row(*row)
    console.print(table)
