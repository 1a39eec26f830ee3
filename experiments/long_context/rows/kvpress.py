"""kvpress's methods (github.com/NVIDIA/kvpress) on what a ``decoding chunk eval`` was about, for the same tables.

kvpress wants a transformers that is older than this project's, so it runs in an environment of its own, from the root
of the project:

    python -m venv kvpress && kvpress/bin/pip install kvpress==0.5.5
    kvpress/bin/python -m experiments.long_context.rows.kvpress JUDGED/texts.json MODEL \
        --press SnapKVPress --out kvpress.json
    kvpress/bin/python -m experiments.long_context.rows.kvpress JUDGED MODEL --press SnapKVPress --kept 1024

The second answers the prompts of suites of tasks, and leaves what it wrote in the run's folder: the same command with
``--resume`` scores it. A press drops keys and values once, when a prompt has been read, its question too;
what is dropped cannot come back. The tokens behind it are all kept.
"""

from __future__ import annotations

import argparse
import json
from pathlib import Path
from typing import Any

import kvpress
import torch
import transformers
from torch import Tensor
from tqdm import tqdm

from experiments.long_context.rows.text import figures, row

_LAST = 8  # Tokens of a text that are read after pressing, as in `experiments.long_context.reading`.


def pressed(model: Any, ids: Tensor, press: Any | None) -> transformers.DynamicCache:
    """The cache of a prompt, int64 [1, T], and what a press leaves of it."""
    cache = transformers.DynamicCache()
    if press is None:
        model(ids, past_key_values=cache, logits_to_keep=1)
    else:
        with press(model):
            model(ids, past_key_values=cache, logits_to_keep=1)
    return cache


def predictions(model: Any, ids: Tensor, scored: int, press: Any | None) -> Tensor:
    """Log-probabilities of the last tokens of a text, float32 [scored, V], with what a press leaves of the rest."""
    begin = ids.shape[1] - scored - _LAST
    cache = pressed(model, ids[:, :begin], press)
    places = torch.arange(begin, ids.shape[1] - 1)[None]
    output = model(ids[:, begin:-1], position_ids=places, past_key_values=cache, logits_to_keep=scored)
    return output.logits[0].float().log_softmax(-1)


def answer(model: Any, tokenizer: Any, prompt: dict[str, Any], press: Any) -> str:
    """What a model writes greedily behind a prompt of a suite, of which a press leaves some."""
    ids = torch.tensor([prompt["ids"]])
    cache, written = pressed(model, ids[:, :-1], press), [int(ids[0, -1])]
    text = ""
    for place in range(ids.shape[1] - 1, ids.shape[1] - 1 + prompt["new_tokens"]):
        token = torch.tensor([written[-1:]])
        logits = model(token, position_ids=torch.tensor([[place]]), past_key_values=cache).logits
        written.append(int(logits[0, -1].argmax()))
        text = tokenizer.decode(written[1:], skip_special_tokens=True)
        if written[-1] in prompt["ends"] or (prompt["ends_line"] and "\n" in text.lstrip()):
            break
    return text


def _press(name: str, kept: float, tokens: int) -> Any:
    share = kept if kept <= 1 else min(kept / tokens, 1.0)
    return getattr(kvpress, name)(compression_ratio=1 - share)


def of_texts(model: Any, texts: Path, cells: list[tuple[str, float]], out: Path) -> None:
    """Rows about the texts of an evaluation."""
    held = json.loads(texts.read_bytes())
    by_cell: dict[tuple[str, float], list[dict[str, float]]] = {cell: [] for cell in cells}
    for text in tqdm(held["ids"], unit="text"):
        ids = torch.tensor([text])
        targets = ids[0, -held["scored"] :]
        full = predictions(model, ids, held["scored"], None)
        for name, kept in cells:
            found = predictions(model, ids, held["scored"], _press(name, kept, ids.shape[1]))
            by_cell[name, kept].append(figures(full, found, targets))
    rows = [row(f"kvpress {name}", kept, by_text) for (name, kept), by_text in by_cell.items()]
    out.write_text(json.dumps({"versions": _versions(), "rows": rows}, indent=1))


def of_suites(model: Any, tokenizer: Any, folder: Path, cells: list[tuple[str, float]]) -> None:
    """What is written behind the prompts that a run left, in its folder "others"; goes on where it stopped."""
    (folder / "others").mkdir(exist_ok=True)
    for name, kept in cells:
        path = folder / "others" / f"{name}-{kept:g}.json"
        about = {"method": f"kvpress {name}", "kept": kept, "versions": _versions()}
        written = json.loads(path.read_bytes())["written"] if path.is_file() else {}
        for prompt in tqdm(sorted((folder / "prompts").glob("*.json")), desc=f"{name} {kept:g}"):
            if prompt.stem in written:
                continue
            held = json.loads(prompt.read_bytes())
            written[prompt.stem] = answer(model, tokenizer, held, _press(name, kept, len(held["ids"])))
            path.write_text(json.dumps(about | {"written": written}, ensure_ascii=False))


def _versions() -> dict[str, str]:
    return {package.__name__: package.__version__ for package in (torch, transformers)}


@torch.inference_mode()
def main() -> None:
    """See the module."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("judged", type=Path, help="texts.json of an evaluation, or the folder of one of suites")
    parser.add_argument("model", help="folder or hub id")
    parser.add_argument("--press", action="append", required=True, help="a class of kvpress; may repeat")
    parser.add_argument(
        "--kept", type=float, action="append", help="share or tokens to keep; 0.75, 0.5 and 0.25 by default"
    )
    parser.add_argument("--dtype", default="float32")
    parser.add_argument("--out", type=Path, help="a file, for texts")
    chosen = parser.parse_args()
    if chosen.judged.is_dir() == (chosen.out is not None):
        parser.error("--out goes with texts.json")
    dtype = getattr(torch, chosen.dtype)
    model = transformers.AutoModelForCausalLM.from_pretrained(chosen.model, dtype=dtype).eval()
    cells = [(name, kept) for kept in chosen.kept or (0.75, 0.5, 0.25) for name in chosen.press]
    if chosen.judged.is_dir():
        of_suites(model, transformers.AutoTokenizer.from_pretrained(chosen.model), chosen.judged, cells)
    else:
        of_texts(model, chosen.judged, cells, chosen.out)


if __name__ == "__main__":
    main()
