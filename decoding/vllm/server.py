"""``decoding serve``: vLLM's own OpenAI-compatible server, with our processors and what they need in it."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from decoding.errors import DecodingError
from decoding.selector import Policy
from decoding.vllm.declaration import engine_args


def serve(
    model: str,
    name: str,
    styles: Mapping[str, str],
    arguments: Sequence[str],
    *,
    temperature: bool | str | None = None,
    model_size: str | None = None,
    policy: Policy | None = None,
) -> None:
    """Runs ``vllm serve MODEL`` until it is stopped.

    Args:
        model: a folder or a hub id.
        name: what the API calls the model, unless ``arguments`` say otherwise.
        styles: as for `engine_args`.
        arguments: any of ``vllm serve``.
        temperature: as for `engine_args`.
        model_size: likewise.
        policy: likewise.

    Raises:
        DecodingError: vLLM is not installed, or a style or the selector is not there.
    """
    try:
        from vllm.entrypoints.cli.serve import cmd_init
        from vllm.entrypoints.serve.utils.api_utils import cli_env_setup
        from vllm.utils.argparse_utils import FlexibleArgumentParser
    except ImportError as error:
        raise DecodingError(f"serving needs vLLM, 0.32 or newer: pip install vllm ({error})") from error

    processors = engine_args(styles, temperature=temperature, model_size=model_size, policy=policy)["logits_processors"]
    # As vLLM's command line does it. That one cannot be called: it knows one name of vLLM's distribution only.
    cli_env_setup()
    parser = FlexibleArgumentParser(prog="decoding")
    (command,) = cmd_init()
    command.subparser_init(parser.add_subparsers(dest="subparser"))
    args = parser.parse_args(["serve", model, *arguments])
    args.logits_processors = [*(args.logits_processors or []), *processors]
    args.served_model_name = args.served_model_name or [name]
    command.validate(args)
    command.cmd(args)
