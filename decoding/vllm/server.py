"""``decoding serve``: vLLM's own OpenAI-compatible server, with our processors and what they need in it."""

from __future__ import annotations

import os
from collections.abc import Mapping, Sequence
from contextlib import suppress
from typing import Any

from decoding.errors import DecodingError
from decoding.vllm.dropped import MIDDLEWARE


def serve(model: str, name: str, engine: Mapping[str, Any], arguments: Sequence[str]) -> None:
    """Runs ``vllm serve MODEL`` until it is stopped.

    Args:
        model: a folder or a hub id.
        name: what the API calls the model, unless ``arguments`` say otherwise.
        engine: from `decoding.vllm.engine_args`.
        arguments: any of ``vllm serve``.

    Raises:
        DecodingError: vLLM is not installed, or chunk selection cannot have the attention backend that is asked for.
    """
    parser, command = _parser_and_command()
    args = parser.parse_args(["serve", model, *arguments])
    _take_in(args, engine)
    args.served_model_name = args.served_model_name or [name]
    command.validate(args)
    command.cmd(args)


def print_help(what: str) -> None:
    """Prints vLLM's options.

    Args:
        what: "all" of them, those of a section, such as "Frontend", or those with a word in their names.

    Raises:
        DecodingError: vLLM is not installed.
    """
    parser, _ = _parser_and_command()
    with suppress(SystemExit):  # with which argparse ends behind a help text
        parser.parse_args(["serve", f"--help={what}"])


def _parser_and_command() -> tuple[Any, Any]:
    """vLLM's own, of ``serve``.

    As vLLM's command line makes them. That one cannot be called: it knows one name of vLLM's distribution only.
    """
    try:
        from vllm.entrypoints.cli.serve import cmd_init
        from vllm.utils.argparse_utils import FlexibleArgumentParser
    except ImportError as error:
        raise DecodingError(f"serving needs vLLM, 0.32 or newer: pip install vllm ({error})") from error

    os.environ.setdefault("VLLM_WORKER_MULTIPROC_METHOD", "spawn")  # as vLLM's command line does
    parser = FlexibleArgumentParser(prog="decoding")
    (command,) = cmd_init()
    command.subparser_init(parser.add_subparsers(dest="subparser"))
    return parser, command


def _take_in(args: Any, engine: Mapping[str, Any]) -> None:
    """Adds what an engine needs to the arguments that the user gave."""
    args.middleware = [*(args.middleware or []), MIDDLEWARE]
    args.logits_processors = [*(args.logits_processors or []), *engine["logits_processors"]]
    args.additional_config = {**(args.additional_config or {}), **engine.get("additional_config", {})}
    defaults = {**engine.get("override_generation_config", {}), **(args.override_generation_config or {})}
    args.override_generation_config = defaults
    args.block_size = args.block_size or engine.get("block_size")
    backend = engine.get("attention_backend")
    if backend is not None:
        if args.attention_backend is not None:
            raise DecodingError("chunk selection is an attention backend itself: leave --attention-backend out")
        args.attention_backend = backend
