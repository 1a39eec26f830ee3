"""``decoding playground``."""

from __future__ import annotations

import threading

import click

from decoding.cli import options as shared
from decoding.errors import DecodingError
from decoding.style.registered import registered_styles


@click.command()
@shared.model
@shared.dtype
@click.option("--server", help="Play with a running `decoding serve` at this address instead.")
@click.option(
    "--style", "styles", multiple=True, help=f"NAME=SPEC, first in the list. SPEC: {shared.style_help} May repeat."
)
@click.option("--host", default="127.0.0.1", show_default=True, help="Where to listen; by default this machine alone.")
@click.option("--port", type=click.IntRange(1, 65535), help="By default the first free one from 7860 on.")
@click.option("--share", is_flag=True, help="Also make a link that anybody can open, by way of Gradio's servers.")
@click.option("--browser/--no-browser", default=True, help="Open the page in a browser.")
@click.pass_context
def playground(
    ctx: click.Context,
    model: str,
    dtype: str,
    server: str | None,
    styles: tuple[str, ...],
    host: str,
    port: int | None,
    share: bool,
    browser: bool,
) -> None:
    """A page to play on: a model's text with and without a style, side by side."""
    default = click.core.ParameterSource.DEFAULT
    given = [name for name in ("model", "dtype", "styles") if ctx.get_parameter_source(name) != default]
    if server is not None and given:
        raise DecodingError(f"--{given[0].rstrip('s')} is the server's own: leave it out beside --server")
    try:
        from decoding.playground.page import Playground
    except ImportError as error:
        raise DecodingError(f"the playground needs Gradio: pip install 'gradio>=6.31' ({error})") from error
    from decoding.playground.local import LocalModel
    from decoding.playground.served import ServedModel

    named = {source.name: spec for source, spec in zip(shared.sources(styles, {}), styles, strict=True)}
    if server is None:
        local = LocalModel(model, dtype)
        local.prepare()
        page = Playground(local, named | {name: name for name in registered_styles() if name not in named})
    else:
        served = ServedModel(server)
        page = Playground(served, {name: name for name in served.styles})
    try:
        click.echo(f"The playground is at {page.launch(host, port, share, browser)}  (Ctrl+C ends it)")
        threading.Event().wait()
    except KeyboardInterrupt:
        click.echo("", err=True)
    finally:
        page.close()
