"""``decoding generate``."""

from __future__ import annotations

from typing import Any

import click

from decoding.cli import options as shared
from decoding.errors import DecodingError
from decoding.style.registered import DEFAULT_STYLE
from decoding.tokens import has_chat_template, require_text


@click.command()
@click.argument("prompt")
@shared.model
@shared.dtype
@click.option("--style", default=DEFAULT_STYLE, show_default=True, help=shared.style_help)
@shared.lambda_or_auto
@shared.any_lambda
@shared.steering
@shared.field
@shared.order
@shared.smoothing
@shared.unwrap
@click.option("--max-new-tokens", default=64, show_default=True, type=click.IntRange(min=1))
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
@click.option("--info", is_flag=True, help="Print a line of JSON: the text, and how it was sampled.")
@click.option("--seed", default=0, show_default=True, type=click.IntRange(0, shared.MOST_SEED))
def generate(
    prompt: str,
    style: str,
    lambda_: float | str | None,
    seed: int,
    temperature: float | str,
    top_p: float | None,
    info: bool,
    **options: Any,
) -> None:
    """Answers PROMPT in a style, or continues it."""
    import json
    from dataclasses import asdict

    import torch

    from decoding import AutoTemperature, FixedTemperature
    from decoding import generate as continue_text
    from decoding.models import load_model, load_tokenizer

    if not prompt.strip():
        raise DecodingError("the prompt is empty")
    require_text(prompt, "the prompt")
    if temperature == 0 and top_p is not None:
        raise DecodingError("--temperature 0 takes the most probable token: leave --top-p out")
    prior = shared.style_prior(style, lambda_, options)
    tokenizer = load_tokenizer(options["model"])
    chat = has_chat_template(tokenizer) if options["chat"] is None else options["chat"]
    if not prior.needs_model:
        prior.bind(tokenizer)
    model = load_model(options["model"], options["dtype"])
    processors: list[Any] = [prior]
    if temperature != 0:
        processors.append(AutoTemperature() if temperature == "auto" else FixedTemperature(float(temperature)))
    torch.manual_seed(seed)
    sampling = {"do_sample": False} if temperature == 0 else {} if top_p is None else {"top_p": top_p}
    found = continue_text(
        model,
        prompt,
        tokenizer=tokenizer,
        logits_processor=processors,
        max_new_tokens=options["max_new_tokens"],
        chat=chat,
        return_info=True,
        **sampling,
    )
    text = found.text if chat else prompt + found.text
    click.echo(json.dumps(asdict(found) | {"text": text}, ensure_ascii=False) if info else text)
