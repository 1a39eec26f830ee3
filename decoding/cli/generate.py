"""``decoding generate``."""

from __future__ import annotations

from typing import Any

import click

from decoding.cli import options as shared
from decoding.cli import policies
from decoding.cli.sections import Command
from decoding.errors import DecodingError
from decoding.style.registered import DEFAULT_STYLE


@click.command(cls=Command)
@click.argument("prompt")
@shared.model
@shared.dtype
@shared.device
@shared.policy
@click.option("--style", type=shared.STYLE_NAME, default=DEFAULT_STYLE, show_default=True, help=shared.style_help)
@shared.lambda_or_auto
@shared.any_lambda
@shared.steering
@shared.field
@shared.order
@shared.smoothing
@shared.unwrap
@click.option(
    "--max-new-tokens", default=64, show_default=True, type=click.IntRange(min=1), help="How much to write at most."
)
@click.option(
    "--temperature",
    default="1",
    show_default=True,
    type=shared.TemperatureOrAuto(),
    help='"auto" has it chosen for the prompt; 0 takes the most probable token at every step.',
)
@click.option(
    "--top-p",
    type=click.FloatRange(0, 1, min_open=True),
    help="Sample from the likeliest tokens with this share together. By default 1, with --temperature auto the "
    "selector's.",
)
@click.option(
    "--chat/--no-chat",
    default=None,
    help="Answer PROMPT in the model's chat template, or continue it as it stands. By default as the model is made.",
)
@click.option(
    "--json", "as_json", is_flag=True, help="Print one object at the end, for programs: the text, how it was sampled."
)
@shared.seed
@click.pass_context
def generate(ctx: click.Context, prompt: str, policy: str | None, as_json: bool, **options: Any) -> None:
    """Answers PROMPT in a style, or continues it, and shows the text while it is written."""
    import json
    from dataclasses import asdict

    import torch

    from decoding import generate as continue_text
    from decoding.models import load_model, load_tokenizer
    from decoding.tokens import has_chat_template, require_text

    if not prompt.strip():
        raise DecodingError("the prompt is empty")
    require_text(prompt, "the prompt")
    if options["temperature"] == 0 and options["top_p"] is not None:
        raise DecodingError("--temperature 0 takes the most probable token: leave --top-p out")
    steered, sampling = _steered(options) if policy is None else _by_policy(ctx, policy)
    tokenizer = load_tokenizer(options["model"])
    chat = has_chat_template(tokenizer) if options["chat"] is None else options["chat"]
    for processor in steered.get("logits_processor", ()):
        if not getattr(processor, "needs_model", True):  # a style: what is wrong with it is said before loading
            processor.bind(tokenizer)
    model = load_model(options["model"], options["dtype"], options["device"])
    torch.manual_seed(options["seed"])
    before = "" if chat else prompt
    shown = _Shown(before)
    found = continue_text(
        model,
        prompt,
        tokenizer=tokenizer,
        max_new_tokens=options["max_new_tokens"],
        chat=chat,
        return_info=True,
        **steered,
        **sampling,
        **({} if as_json else {"streamer": shown}),
    )
    if as_json:
        click.echo(json.dumps(asdict(found) | {"text": before + found.text}, ensure_ascii=False))
    else:
        shown("\n")


class _Shown:
    """Prints pieces of a text, and what stands before it with the first."""

    def __init__(self, before: str):
        self._before = before

    def __call__(self, piece: str) -> None:
        click.echo(self._before + piece, nl=False)
        self._before = ""


def _steered(options: dict[str, Any]) -> tuple[dict[str, Any], dict[str, Any]]:
    """What `decoding.generate` is to do, by the options alone, and how it is to sample."""
    from decoding import AutoTemperature, FixedTemperature

    temperature, top_p = options["temperature"], options["top_p"]
    processors: list[Any] = [shared.style_prior(options["style"], options["lambda_"], options)]
    if temperature == 0:
        return {"logits_processor": processors}, {"do_sample": False}
    processors.append(AutoTemperature() if temperature == "auto" else FixedTemperature(float(temperature)))
    return {"logits_processor": processors}, {} if top_p is None else {"top_p": top_p}


def _by_policy(ctx: click.Context, name: str) -> tuple[dict[str, Any], dict[str, Any]]:
    """The same by a saved policy, and by those options that were given."""
    policies.require_no_training(ctx)
    changes, top_p = policies.asked(ctx), ctx.params["top_p"]
    policy = policies.opened(name, changes)
    if changes.get("temperature") == 0:
        return {"policy": policy}, {"do_sample": False}
    if top_p is None:
        return {"policy": policy}, {}
    return {"policy": policy}, {"top_p": top_p} | ({} if policy.temperature else {"do_sample": True})
