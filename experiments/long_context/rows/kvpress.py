"""kvpress's methods (github.com/NVIDIA/kvpress) on the texts of a ``decoding chunk eval``, for the same table.

kvpress wants a transformers that is older than this project's, so it runs in an environment of its own, from the root
of the project:

    python -m venv kvpress && kvpress/bin/pip install kvpress==0.5.5
    kvpress/bin/python -m experiments.long_context.rows.kvpress JUDGED/texts.json MODEL \
        --press SnapKVPress --out kvpress.json

A press drops keys and values once, when a prompt has been read; what is dropped cannot come back. The prompt's share of
tokens is kept; the tokens behind it are all kept.
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

_LAST = 8  # Tokens of a prompt that are read after pressing, as in `experiments.long_context.evaluate`.


def predictions(model: Any, ids: Tensor, scored: int, press: Any | None) -> Tensor:
    """Log-probabilities of the last tokens of a text, float32 [scored, V], with what a press leaves of the rest."""
    begin = ids.shape[1] - scored - _LAST
    cache = transformers.DynamicCache()
    if press is None:
        model(ids[:, :begin], past_key_values=cache, logits_to_keep=1)
    else:
        with press(model):
            model(ids[:, :begin], past_key_values=cache, logits_to_keep=1)
    places = torch.arange(begin, ids.shape[1] - 1)[None]
    output = model(ids[:, begin:-1], position_ids=places, past_key_values=cache, logits_to_keep=scored)
    return output.logits[0].float().log_softmax(-1)


@torch.inference_mode()
def main() -> None:
    """See the module."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("texts", type=Path, help="texts.json of an evaluation")
    parser.add_argument("model", help="folder or hub id")
    parser.add_argument("--press", action="append", required=True, help="a class of kvpress; may repeat")
    parser.add_argument("--retention", type=float, action="append", help="share to keep; 0.75, 0.5 and 0.25 by default")
    parser.add_argument("--out", type=Path, required=True)
    chosen = parser.parse_args()
    held = json.loads(chosen.texts.read_bytes())
    model = transformers.AutoModelForCausalLM.from_pretrained(chosen.model, dtype=torch.float32).eval()
    cells = [(name, share) for share in chosen.retention or (0.75, 0.5, 0.25) for name in chosen.press]
    by_cell: dict[tuple[str, float], list[dict[str, float]]] = {cell: [] for cell in cells}
    for text in tqdm(held["ids"], unit="text"):
        ids = torch.tensor([text])
        targets = ids[0, -held["scored"] :]
        full = predictions(model, ids, held["scored"], None)
        for name, share in cells:
            pressed = predictions(model, ids, held["scored"], getattr(kvpress, name)(compression_ratio=1 - share))
            by_cell[name, share].append(figures(full, pressed, targets))
    rows = [row(f"kvpress {name}", share, by_text) for (name, share), by_text in by_cell.items()]
    versions = {package.__name__: package.__version__ for package in (torch, transformers)}
    chosen.out.write_text(json.dumps({"versions": versions, "rows": rows}, indent=1))


if __name__ == "__main__":
    main()
