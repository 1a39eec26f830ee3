"""``decoding serve``."""

from __future__ import annotations

from typing import Any

import click

from decoding.cli import options as shared

_OURS = "ours"


def _print_help(ctx: click.Context, param: click.Parameter, wanted: str | None) -> None:
    if wanted is None or ctx.resilient_parsing:
        return
    if wanted == _OURS:
        click.echo(ctx.get_help())
        ctx.exit()
    from decoding.vllm.server import print_help

    print_help(wanted)
    ctx.exit()


class _Serve(click.Command):
    """Takes -h for --help. As an option of one letter click would find it in vLLM's -dph."""

    def parse_args(self, ctx: click.Context, args: list[str]) -> list[str]:
        """Reads what is given."""
        return super().parse_args(ctx, ["--help" if each == "-h" else each for each in args])


@click.command(
    cls=_Serve,
    context_settings={"ignore_unknown_options": True, "help_option_names": []},
    epilog="Options that are not here are vLLM's, such as --port 8000: --help=all lists them, --help=Frontend those of "
    "a section, --help=max those with max in their names.",
)
@click.option(
    "--help",
    is_flag=False,
    flag_value=_OURS,
    is_eager=True,
    expose_value=False,
    callback=_print_help,
    metavar="[=all|SECTION|WORD]",
    help="Shows this text; with a value, vLLM's options.",
)
@shared.model
@click.option(
    "--style",
    "styles",
    type=shared.STYLE_NAME,
    multiple=True,
    help=f"NAME=SPEC. SPEC: {shared.style_help} May repeat.",
)
@shared.order
@shared.smoothing
@shared.unwrap
@click.option("--policy", help="What every request has unless it says otherwise: a saved policy's folder or hub id.")
@click.option("--temperature-selector", help='"default" (the embedded one), a folder or a hub id; none by default.')
@click.option("--temperature-policy", type=click.Choice(["ability", "curve"]), help="Of the selector.")
@click.option("--model-size", type=click.Choice(["small", "medium", "large"]), help="By its parameters by default.")
@click.option("--phases", is_flag=True, help="Requests may have one temperature to think and one to answer.")
@click.option("--phase-markers", type=(str, str), metavar="BEGIN END", help="Of thinking; by default the model's own.")
@click.option(
    "--chunk-adapters", help='Select chunks: "default" (SmolLM2-135M\'s), a folder or a hub id, also of a calibration.'
)
@click.option("--kv-budget", type=click.IntRange(min=1), help="Select chunks: tokens to read, 2048 with adapters.")
@click.option("--full-graphs", is_flag=True, help="Of chunk selection: CUDA graphs of whole steps. Not tried yet.")
@click.argument("vllm_options", nargs=-1, type=click.UNPROCESSED)
def serve(model: str, styles: tuple[str, ...], vllm_options: tuple[str, ...], **options: Any) -> None:
    """Serves a model over HTTP: vLLM's OpenAI-compatible server, which takes all of its own options.

    A request names its style in vllm_xargs, {"style": "NAME", "lambda": 0.1}, and guards of its own, {"max_js": 0.05};
    "off" does without what the server's policy has. It has its temperature chosen with
    {"temperature": "auto"}, and with it the selector's top-p unless it has its own, thinks and answers at two with
    {"think_temperature": 1, "answer_temperature": 0.3} (a number or "auto"), and reads another number of tokens with
    {"kv_budget": 4096}, or all with "full".
    """
    from decoding.models import load_tokenizer, resolve_model
    from decoding.style.source import require_distinct
    from decoding.style.training import name_and_file
    from decoding.vllm import engine_args
    from decoding.vllm.server import serve as run_server

    path = resolve_model(model)
    tokenizer = load_tokenizer(model)
    trained = {"order": options["order"], "smoothing": options["smoothing"]}
    named = [name_and_file(source, tokenizer, **trained) for source in shared.sources(styles, options)]
    require_distinct([name for name, _ in named])
    selector = options["temperature_selector"]
    engine = engine_args(
        dict(named),
        policy=options["policy"],
        model=path,
        temperature=True if selector == "default" else selector,
        model_size=options["model_size"],
        temperature_policy=options["temperature_policy"],
        phases=options["phase_markers"] or options["phases"],
        chunk_adapters=options["chunk_adapters"],
        kv_budget=options["kv_budget"],
        full_graphs=options["full_graphs"],
    )
    run_server(path, model, engine, vllm_options)
