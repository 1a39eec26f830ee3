"""``decoding lm-eval``."""

from __future__ import annotations

import sys

import click

from decoding.errors import DecodingError


@click.command("lm-eval", context_settings={"ignore_unknown_options": True, "help_option_names": []})
@click.argument("options", nargs=-1, type=click.UNPROCESSED)
def lm_eval(options: tuple[str, ...]) -> None:
    """Runs lm-eval, which takes all of its own options, with one more model: --model decoding.

    --model_args are those of hf, and policy=FOLDER, or a policy's fields: style=king-james,lambda=0.6,mode=ratio.
    """
    try:
        from lm_eval.__main__ import cli_evaluate

        import decoding.evaluation.harness  # noqa: F401  # registers it
    except ImportError as error:
        raise DecodingError(f'this needs lm-eval: pip install "lm-eval>=0.4.13" accelerate ({error})') from error
    sys.argv = ["lm-eval", *options]
    cli_evaluate()
