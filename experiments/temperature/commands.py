"""``decoding temperature`` and ``bench temperature``."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import click
from click.core import ParameterSource

from decoding.cli import options as shared
from decoding.cli.groups import Group
from decoding.errors import DecodingError
from experiments.lab import spreading

_data = click.option(
    "--data", required=True, type=click.Path(path_type=Path), help="Folder that the tasks' files are relative to."
)
_selector = click.option("--selector", help="A folder or a hub id; the embedded one by default.")
_model_size = click.option(
    "--model-size", default="small", show_default=True, help="small (below 5e9 parameters), medium or large (25e9)."
)


@click.group(cls=Group)
def temperature() -> None:
    """Collects scores, trains, evaluates and asks temperature selectors."""


@temperature.command()
@click.option(
    "--task", "tasks", multiple=True, help="NAME or NAME:PROMPTS, or a .json file. May repeat; --suite by default."
)
@click.option("--suite", type=click.Choice(["abilities", "superglue"]), default="abilities", show_default=True)
@_data
@click.option("--limit", default=100, show_default=True, type=click.IntRange(min=1), help="Prompts of each task.")
@click.option(
    "--temperatures", type=shared.Numbers("temperature"), default="0.1:1.9:0.3", show_default=True, help="0.1:1.9:0.3."
)
@click.option("--seeds", default=2, show_default=True, type=click.IntRange(min=1), help="Texts at each temperature.")
@click.option("--top-p", default=0.9, show_default=True, type=click.FloatRange(0, 1, min_open=True))
@click.option("--batch-size", default=8, show_default=True, type=click.IntRange(min=1), help="Prompts in a batch.")
@click.option(
    "--baselines/--no-baselines", default=True, show_default=True, help="Also min-p, top-nσ, EDT and dynatemp."
)
@shared.model
@shared.dtype
@shared.device
@click.option("--out", required=True, type=click.Path(path_type=Path), help="Folder for the collection.")
@shared.resume
@spreading.of_cells
def collect(tasks: tuple[str, ...], suite: str, data: Path, limit: int, out: Path, resume: bool, **chosen: Any) -> None:
    """Scores a model on tasks at every temperature; goes on with --resume after an interruption."""
    from decoding.models import load_model, load_tokenizer
    from decoding.temperature.processors import checked_temperature
    from experiments.lab.runs import check_unused, settings_of
    from experiments.temperature.collect import Collection, CollectOptions
    from experiments.temperature.tasks import load_tasks

    for value in chosen["temperatures"]:
        checked_temperature(value)
    if not resume:
        check_unused(out)
    limits = dict(_name_and_limit(spec, limit) for spec in tasks)
    definitions = load_tasks(list(limits), suite)
    if unscored := [task.name for task in definitions if task.metric is None]:
        raise DecodingError(f"task {unscored[0]} has no metric: its prompts are for classification alone")
    counts = list(limits.values()) or [limit] * len(definitions)
    items = {task: task.items(data, count) for task, count in zip(definitions, counts, strict=True)}
    tokenizer = load_tokenizer(chosen["model"])
    model = load_model(chosen["model"], chosen["dtype"], chosen["device"])
    about = settings_of(chosen["model"], model, tokenizer)
    settings = {key: chosen[key] for key in ("temperatures", "seeds", "top_p", "batch_size", "baselines")}
    collection = Collection(model, tokenizer, about, items, CollectOptions(**settings), out, resume)
    shared.until_interrupted(collection.run, out, "finished batches are kept")
    click.echo(f"{out}: train with `decoding temperature train --collection {out}`")


def _name_and_limit(spec: str, limit: int) -> tuple[str, int]:
    name, colon, number = spec.rpartition(":")
    if not colon:
        return spec, limit
    if not number.isdigit() or int(number) < 1:
        raise DecodingError(f"--task must read like NAME or NAME:100, not {spec!r}")
    return name, int(number)


@temperature.command()
@click.option(
    "--data",
    type=click.Path(path_type=Path),
    help="Folder that the tasks' files are relative to. Without it another selector's classifier is kept.",
)
@click.option("--classifier-of", help="The selector whose classifier to keep; the embedded one by default.")
@click.option(
    "--task",
    "tasks",
    multiple=True,
    help="Tasks to learn from. May repeat; by default the embedded one's, and without --data all that were collected.",
)
@click.option(
    "--collection",
    type=click.Path(path_type=Path),
    help="Of `collect`: also learns this model's scores by temperature.",
)
@click.option("--encoder", default="minilm-l6", show_default=True, help="A BERT-family model: a folder or a hub id.")
@click.option("--window", default=256, show_default=True, help="Tokens of a prompt that the encoder reads.")
@click.option(
    "--fine-tune", default=0, show_default=True, type=click.IntRange(min=0), help="Epochs; 0 keeps the encoder frozen."
)
@click.option(
    "--multilingual/--english", default=None, help="What the encoder reads; by default told by its vocabulary's size."
)
@click.option("--curve-of", help="A selector whose curve to keep, where there is no collection of its model.")
@click.option("--out", required=True, type=click.Path(path_type=Path), help="Folder for the selector.")
def train(
    data: Path | None,
    classifier_of: str | None,
    tasks: tuple[str, ...],
    collection: Path | None,
    encoder: str,
    window: int,
    fine_tune: int,
    multilingual: bool | None,
    curve_of: str | None,
    out: Path,
) -> None:
    """Trains a selector: the classifier of abilities and, from a collection, one model's scores by temperature.

    For tasks of your own a collection is enough: without --data the classifier is the embedded selector's.
    """
    from decoding.temperature.encoder import load_encoder
    from decoding.temperature.selector import TemperatureSelector
    from experiments.lab.runs import check_unused
    from experiments.temperature.collect import read_collection
    from experiments.temperature.data import TRAINED, held_out_prompts, training_prompts
    from experiments.temperature.train import train as train_selector

    check_unused(out)
    collected = None if collection is None else read_collection(collection)
    if collection is not None and curve_of is not None:
        raise DecodingError("give --collection for a new curve, or --curve-of for another selector's, not both")
    if data is None:
        _train_curve(collected, classifier_of, tasks, out)
        return
    if classifier_of is not None:
        raise DecodingError("give --data for a new classifier, or --classifier-of for another selector's, not both")
    kept = None if curve_of is None else TemperatureSelector.from_pretrained(curve_of)
    labelled, held_out = training_prompts(data, tasks), held_out_prompts(data, tasks or TRAINED)
    reader = load_encoder(encoder, window, multilingual=multilingual)
    selector = train_selector(reader, labelled, held_out, collected, fine_tune, kept)
    named = "FOLDER" if reader.is_local else encoder
    chosen = [*(f"--task {name}" for name in tasks), f"--encoder {named}", f"--window {window}"]
    chosen += [f"--fine-tune {fine_tune}", "--data DATA", "--collection COLLECTION"][: 2 if collected is None else 3]
    if multilingual is not None:
        chosen.append("--multilingual" if multilingual else "--english")
    chosen += [] if curve_of is None else ["--curve-of SELECTOR"]
    selector.about["command"] = " ".join(["decoding temperature train", *chosen])
    selector.about["encoder"] = Path(encoder).resolve().name if reader.is_local else encoder
    selector.save_pretrained(out)
    for task, share in selector.about["held_out_accuracy"].items():
        click.echo(f"{task}: {100 * share:.1f} % of the prompts held out are told to be of its ability")
    click.echo(f"{out}: judge it with `decoding temperature eval --selector {out}`")


def _train_curve(collected: Any, classifier_of: str | None, tasks: tuple[str, ...], out: Path) -> None:
    """Trains what needs no data: a curve on top of another selector's classifier."""
    from decoding.temperature.selector import TemperatureSelector
    from experiments.temperature.train import with_curve

    given = click.get_current_context().get_parameter_source
    teaching = ("encoder", "window", "fine_tune", "multilingual", "curve_of")
    if used := [name for name in teaching if given(name) is ParameterSource.COMMANDLINE]:
        raise DecodingError(
            f"--{used[0].replace('_', '-')} is for a classifier of your own: give the folder of its data with --data"
        )
    if collected is None:
        raise DecodingError("there is nothing to learn from: give --collection, --data, or both")
    selector = with_curve(TemperatureSelector.from_pretrained(classifier_of), collected, tasks)
    chosen = [*(f"--task {name}" for name in tasks), "--collection COLLECTION"]
    chosen += [] if classifier_of is None else ["--classifier-of SELECTOR"]
    selector.about["command"] = " ".join(["decoding temperature train", *chosen])
    selector.save_pretrained(out)
    click.echo(f"{out}: judge it with `decoding temperature eval --selector {out}`")


@temperature.command(name="eval")
@click.option(
    "--selector",
    "selectors",
    multiple=True,
    help="A folder or a hub id; the embedded one by default. May repeat: curves of other models are tried as well.",
)
@_model_size
@click.option(
    "--data", type=click.Path(path_type=Path), help="Folder of the tasks' files, to judge the telling of abilities by."
)
@click.option(
    "--collection", "collections", multiple=True, type=click.Path(path_type=Path), help="Of `collect`. May repeat."
)
@click.option(
    "--task", "tasks", multiple=True, help="That it was trained on. May repeat; the embedded one's by default."
)
@click.option(
    "--generate/--no-generate",
    "shipped",
    default=False,
    show_default=True,
    help="Also run the collections' held-out prompts through decoding.generate.",
)
@click.option("--out", required=True, type=click.Path(path_type=Path), help="Folder for tables, figures and picture.")
def evaluate(
    selectors: tuple[str, ...],
    model_size: str,
    data: Path | None,
    collections: tuple[Path, ...],
    tasks: tuple[str, ...],
    shipped: bool,
    out: Path,
) -> None:
    """Judges selectors on prompts that they were not trained on, against fixed temperatures and other sampling."""
    from decoding.temperature.abilities import published_scores
    from decoding.temperature.selector import TemperatureSelector
    from experiments.lab.runs import check_unused
    from experiments.temperature import report
    from experiments.temperature.collect import read_collection
    from experiments.temperature.contest import DEFAULTS
    from experiments.temperature.data import prompts_to_judge_by
    from experiments.temperature.evaluate import evaluate as judge

    check_unused(out)
    published_scores(model_size)
    if not collections and data is None:
        raise DecodingError("there is nothing to judge by: give --collection, --data, or both")
    opened = [TemperatureSelector.from_pretrained(each) for each in selectors or (None,)]
    collected = [read_collection(folder, DEFAULTS) for folder in collections]
    labelled = {} if data is None else prompts_to_judge_by(data, tasks, opened[0].about["prompts"])
    found = judge(opened, collected, labelled, model_size, (data or Path()) if shipped else None)
    click.echo(report.write(*found, out))


@temperature.command()
@click.argument("prompt")
@_selector
@_model_size
@click.option("--policy", type=click.Choice(["ability", "curve"]), help="Both by default, where there is a curve.")
@click.option("--model", help="PROMPT stands in this model's chat template: its last user turn is what is read.")
@click.option("--json", "as_json", is_flag=True, help="For programs.")
def predict(prompt: str, selector: str | None, model_size: str, policy: Any, model: str | None, as_json: bool) -> None:
    """Shows what a selector makes of PROMPT: abilities, expected scores, and why it chooses which temperature."""
    import json

    from decoding.temperature.selector import TemperatureSelector
    from experiments.temperature.predict import as_dict, as_text, explained, request_in

    opened = TemperatureSelector.from_pretrained(selector)
    text = prompt if model is None else request_in(prompt, model)
    found = explained(opened, text, model_size, policy)
    shown = json.dumps(as_dict(opened, found, model_size), indent=2) if as_json else as_text(opened, found, model_size)
    click.echo(shown)


@click.command(name="temperature")
@shared.model
@click.option("--rounds", default=15, show_default=True, type=click.IntRange(min=1))
@shared.figures
def bench_temperature(model: str, rounds: int, out: Path | None) -> None:
    """Measures what choosing a temperature costs. Let the machine be idle."""
    from experiments.temperature import bench

    bench.main(model, rounds, out)
