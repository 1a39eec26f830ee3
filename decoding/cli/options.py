"""Options that several commands share, and how they are read. Quick to import: shells complete by them."""

from __future__ import annotations

import math
import re
import sys
from collections.abc import Callable, Sequence
from datetime import datetime
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click
from click.shell_completion import CompletionItem

from decoding.errors import DecodingError
from decoding.files import require_writable
from decoding.names import DEFAULT_MODEL, DTYPES
from decoding.style.registered import registered_styles

if TYPE_CHECKING:
    from decoding.style.prior import StylePrior
    from decoding.style.source import StyleSource


class Numbers(click.ParamType):
    """``0:1``, ``0:1:0.05`` or ``0,0.1,0.3``."""

    def __init__(self, name: str):
        self.name = name

    def convert(self, value: Any, param: click.Parameter | None, ctx: click.Context | None) -> tuple[float, ...]:
        """Parses the text."""
        try:
            return parse_numbers(value, self.name)
        except DecodingError as error:
            self.fail(str(error), param, ctx)


class LambdaOrAuto(click.ParamType):
    """A number, or ``auto``."""

    name = "λ"

    def convert(self, value: Any, param: click.Parameter | None, ctx: click.Context | None) -> float | str:
        """Parses the text."""
        return value if value == "auto" else click.FLOAT.convert(value, param, ctx)


class Named(click.ParamType):
    """A text, for which shells offer some names, and files where none of them fits."""

    name = "text"

    def __init__(self, names: Callable[[], Sequence[str]], with_files: bool = True):
        self._names = names
        self._with_files = with_files

    def shell_complete(self, ctx: click.Context, param: click.Parameter, incomplete: str) -> list[CompletionItem]:
        """What fits."""
        found = [CompletionItem(name) for name in self._names() if name.startswith(incomplete)]
        return found or [CompletionItem(incomplete, type="file")] * self._with_files


class DeviceName(Named):
    """Where to compute; found out before anything is computed that it is there."""

    def __init__(self) -> None:
        super().__init__(lambda: ("auto", "cpu", "cuda", "mps", "xpu"), with_files=False)

    def convert(self, value: Any, param: click.Parameter | None, ctx: click.Context | None) -> str:
        """Looks for it."""
        if value == "auto" or (ctx is not None and ctx.resilient_parsing):  # a shell that completes does not wait
            return value
        from decoding.models import checked_device

        return checked_device(value)


class TemperatureOrAuto(click.ParamType):
    """A number of at least 0, or ``auto``."""

    name = "temperature"

    def convert(self, value: Any, param: click.Parameter | None, ctx: click.Context | None) -> float | str:
        """Parses the text."""
        if value == "auto":
            return value
        try:
            number = float(value)
        except ValueError:
            number = math.nan
        if not 0 <= number < math.inf:
            self.fail(f'must be "auto" or a number of at least 0, not {value!r}', param, ctx)
        return number


class Size(click.ParamType):
    """Bytes: ``4GB``, ``512MiB``, or a number."""

    name = "size"

    def convert(self, value: Any, param: click.Parameter | None, ctx: click.Context | None) -> int:
        """Parses the text."""
        found = re.fullmatch(r"(\d+(?:\.\d+)?) ?(?:([kmgt])(i?)b?|b)?", str(value).strip(), re.IGNORECASE)
        if found is None:
            self.fail(f"must read like 4GB or 512MiB, not {value!r}", param, ctx)
        number, prefix, binary = found.groups()
        return int(float(number) * (1024 if binary else 1000) ** (" kmgt".index((prefix or " ").lower())))


class CutOffs(click.ParamType):
    """``0,0,1``."""

    name = "cut-offs"

    def convert(self, value: Any, param: click.Parameter | None, ctx: click.Context | None) -> tuple[int, ...]:
        """Parses the text."""
        if not re.fullmatch(r"\d+(,\d+)*", str(value)):
            self.fail(f"must read like 0,0,1, not {value!r}", param, ctx)
        return tuple(map(int, str(value).split(",")))


class Writable(click.Path):
    """A file that can be written; found out before anything is computed."""

    def __init__(self) -> None:
        super().__init__(path_type=Path)

    def convert(self, value: Any, param: click.Parameter | None, ctx: click.Context | None) -> Path:
        """Tries the place."""
        path = Path(str(super().convert(value, param, ctx)))
        require_writable(path)
        return path


def parse_numbers(text: str, name: str) -> tuple[float, ...]:
    """A range ``first:last[:step]`` (step 0.1 by default, last included) or a list with commas, ascending.

    Raises:
        DecodingError: anything else.
    """
    try:
        numbers = [float(part) for part in text.replace(":", ",").split(",")]
    except ValueError:
        numbers = []
    is_range = ":" in text
    if not numbers or (is_range and ("," in text or len(numbers) > 3)) or not all(abs(x) < 1e6 for x in numbers):
        raise DecodingError(f"{name} must read like 0:1, 0:1:0.05 or 0,0.1,0.3, not {text!r}")
    if is_range:
        first, last, step = (*numbers, 0.1)[:3]
        if step <= 0 or last < first or (last - first) / step > 10_000:
            raise DecodingError(f"the {name} range {text!r} must ascend, by a positive step")
        count = int((last - first) / step + 1e-9) + 1
        numbers = [round(first + i * step, 10) for i in range(count)]
    return tuple(sorted(set(numbers)))


model = click.option(
    "--model",
    type=Named(lambda: [DEFAULT_MODEL]),
    default=DEFAULT_MODEL,
    show_default=True,
    help="A folder, a GGUF file or a Hugging Face hub id.",
)
dtype = click.option(
    "--dtype",
    type=Named(lambda: DTYPES, with_files=False),
    default="auto",
    show_default=True,
    help="auto, float32, bfloat16 or float16.",
)
device = click.option(
    "--device",
    type=DeviceName(),
    default="auto",
    show_default=True,
    help="Where to compute: cpu, cuda, cuda:1, mps or xpu; auto is the accelerator, if there is one.",
)
policy = click.option(
    "--policy",
    type=Named(lambda: ()),
    help="A saved policy, a folder or a hub id. Options that are given besides change it.",
)
STYLE_NAME = Named(registered_styles)
json_alone = click.option("--json", is_flag=True, expose_value=False, help="As without: it prints nothing but JSON.")
field = click.option("--field", help="The text's field in a file that has fields; or write FILE.jsonl#FIELD.")
order = click.option("--order", default=3, show_default=True, help="Order of the n-gram prior, 1 to 6.")
smoothing = click.option(
    "--smoothing", default="kneser-ney", show_default=True, help="kneser-ney, witten-bell or additive."
)
MOST_SEED = 2**40
seed = click.option(
    "--seed", default=0, show_default=True, type=click.IntRange(0, MOST_SEED), help="The same seed, the same text."
)
any_lambda = click.option("--allow-any-lambda", is_flag=True, help="Accept λ outside [0, 1].")
prompts = click.option(
    "--prompts", type=click.Path(path_type=Path), help="A text file, one prompt a line; 24 openings by default."
)
figures = click.option("--json", "out", type=Writable(), help="Also write the figures here.")
picture = click.option("--picture", type=Writable(), help="Also draw speed over context here, a .png file.")
batch_size = click.option("--batch-size", default=24, show_default=True, type=click.IntRange(min=1))
style_help = (
    f"{', '.join(registered_styles())}, a text file, a folder of them, a .jsonl, .json, .csv, .tsv or .parquet file "
    "with its field, or a saved prior."
)
out = click.option("--out", type=click.Path(path_type=Path), help="Folder for the results; a new one by default.")
resume = click.option("--resume", is_flag=True, help="Go on with the run in --out.")
lambda_or_auto = click.option(
    "--lambda",
    "lambda_",
    type=LambdaOrAuto(),
    help='Strength of the style, or "auto". By default 0.1 in mode paper, 0.6 in mode ratio.',
)
mode = click.option(
    "--mode",
    type=click.Choice(["paper", "ratio"]),
    help="paper by default, or a saved style's own; ratio is the better one.",
)
unwrap = click.option(
    "--unwrap/--no-unwrap",
    default=None,
    help="Join the lines of texts that are hard-wrapped. By default in Project Gutenberg's frames alone.",
)
_STEERING = (
    mode,
    click.option("--background", default="model", show_default=True, help="Of mode ratio: model, corpus, or a style."),
    click.option("--plausibility", type=float, help="Move only tokens this likely, as a share of the likeliest."),
    click.option("--max-js", type=float, help="Most divergence a step, in nats."),
    click.option("--entropy-gate", type=float, help="Steer less where the entropy is below, in nats."),
    click.option(
        "--steer-stop/--leave-stop", default=None, help="Steer the ids that end a text too. Left alone by default."
    ),
)
STEERING = ("mode", "background", "plausibility", "max_js", "entropy_gate", "steer_stop")
"""Names of the options of `steering`, which are parameters of `StylePrior`."""


def steering(command: Callable[..., Any]) -> Callable[..., Any]:
    """Adds the options that say how a prior steers."""
    for option in reversed(_STEERING):
        command = option(command)
    return command


def style_prior(style: str, lambda_: float | str | None, options: dict[str, Any]) -> StylePrior:
    """The prior that a command's options ask for."""
    from decoding.style.prior import StylePrior

    spec = style if options["field"] is None else f"{style}#{options['field']}"
    (source,) = sources([spec], {"unwrap": options["unwrap"]})
    return StylePrior(
        source,
        lambda_=lambda_,  # type: ignore[arg-type]  # "auto", if it is a text
        order=options["order"],
        smoothing=options["smoothing"],
        allow_any_lambda=options.get("allow_any_lambda", False),
        **{name: options[name] for name in STEERING},
    )


def sources(specs: Sequence[str], options: dict[str, Any]) -> list[StyleSource]:
    """What a command's styles are, given its options ``field`` and ``unwrap``, if it has them."""
    from decoding.style.source import StyleSource

    return [StyleSource.parse(spec, options.get("field"), unwrap=options.get("unwrap")) for spec in specs]


def out_folder(given: Path | None, where: str) -> Path:
    """The folder asked for, or a new one that is named by the time."""
    return given or Path(where) / datetime.now().strftime("%Y%m%d-%H%M%S")


def until_interrupted(work: Callable[[], Any], folder: Path, kept: str = "finished cells are kept") -> Any:
    """Does some work in a run folder; an interruption ends the command and says what is kept and how to go on."""
    try:
        return work()
    except KeyboardInterrupt:
        click.echo(f"\ninterrupted; {kept}: go on with --resume --out {folder}", err=True)
        sys.exit(130)
