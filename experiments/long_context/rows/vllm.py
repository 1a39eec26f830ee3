"""Chunk selection in vLLM on the texts of a ``decoding chunk eval``, for the same table.

    python -m experiments.long_context.rows.vllm JUDGED/texts.json --out vllm.json

Of each text the last tokens are written, whatever the model would say, by requests that differ in their budgets alone:
a processor keeps what the model says, then forces the text's own token.
"""

from __future__ import annotations

import argparse
import json
import os
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
import vllm
from torch import Tensor
from vllm.v1.sample.logits_processor import LogitsProcessor

from decoding.models import DEFAULT_MODEL, resolve_model
from decoding.vllm import engine_args
from decoding.vllm.declaration import BLOCK_SIZE
from decoding.vllm.v1 import take_in
from experiments.lab.progress import progress_of_cells
from experiments.long_context.rows.text import figures, row


class ForcedText(LogitsProcessor):
    """Makes a request write the text in its ``extra_args["text"]``, and keeps what the model would have said."""

    heard: dict[str, list[Tensor]] = {}  # log-probabilities [V] by ``extra_args["name"]``; one engine, one process

    def __init__(self, vllm_config: Any, device: torch.device, is_pin_memory: bool):
        self._rows: dict[int, tuple[str, Sequence[int], Sequence[int]]] = {}

    def is_argmax_invariant(self) -> bool:
        """No."""
        return False

    def update_state(self, batch_update: Any | None) -> None:
        """Rows come and go."""
        if batch_update is not None:
            take_in(batch_update, self._rows, self._kept)

    @staticmethod
    def _kept(params: Any, prompt: Any, output: Sequence[int]) -> tuple[str, Sequence[int], Sequence[int]]:
        return params.extra_args["name"], params.extra_args["text"], output

    def apply(self, logits: Tensor) -> Tensor:
        """Float32 [rows, V]."""
        for i, (name, text, output) in self._rows.items():
            self.heard.setdefault(name, []).append(logits[i].log_softmax(-1))
            logits[i] = -torch.inf
            logits[i, text[len(output)]] = 0
        return logits


def judged(llm: Any, ids: list[int], scored: int, budgets: dict[str, int | str]) -> dict[str, Tensor]:
    """Log-probabilities of a text's last tokens, float32 [scored, V], for each budget."""
    prompt, text = {"prompt_token_ids": ids[:-scored]}, ids[-scored:]

    def params(name: str, budget: int | str, tokens: int) -> Any:
        extra = {"name": name, "text": text, "kv_budget": budget}
        return vllm.SamplingParams(
            temperature=0, max_tokens=tokens, ignore_eos=True, detokenize=False, extra_args=extra
        )

    llm.generate([prompt], params("read", "full", 1), use_tqdm=False)  # once; the others find it in the prefix cache
    ForcedText.heard.clear()
    llm.generate([prompt] * len(budgets), [params(*each, scored) for each in budgets.items()], use_tqdm=False)
    return {name: torch.stack(heard) for name, heard in ForcedText.heard.items()}


def main() -> None:
    """See the module."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("texts", type=Path, help="texts.json of an evaluation")
    parser.add_argument("--model", default=DEFAULT_MODEL, help="folder or hub id")
    parser.add_argument("--adapters", default="default", help="folder or hub id")
    parser.add_argument("--retention", type=float, action="append", help="share to keep; 0.75, 0.5 and 0.25 by default")
    parser.add_argument("--block-size", type=int, default=BLOCK_SIZE, help="tokens of a block")
    parser.add_argument("--out", type=Path, required=True)
    chosen = parser.parse_args()
    held = json.loads(chosen.texts.read_bytes())
    scored, length = held["scored"], len(held["ids"][0])
    shares = chosen.retention or [0.75, 0.5, 0.25]
    budgets: dict[str, int | str] = {f"{share:g}": round(share * (length - scored / 2)) for share in shares}
    os.environ["VLLM_ENABLE_V1_MULTIPROCESSING"] = "0"
    os.environ.setdefault("VLLM_LOGGING_LEVEL", "ERROR")
    engine = engine_args(chunk_adapters=chosen.adapters) | {"block_size": chosen.block_size}
    engine["logits_processors"] = [*engine["logits_processors"], ForcedText]
    llm = vllm.LLM(
        resolve_model(chosen.model), dtype="float32", max_model_len=length, max_num_seqs=len(shares) + 1, **engine
    )
    by_share: dict[str, list[dict[str, float]]] = {name: [] for name in budgets}
    with progress_of_cells() as progress:
        for ids in progress.track(held["ids"]):
            heard = judged(llm, ids, scored, {"full": "full", **budgets})
            for name, by_text in by_share.items():
                by_text.append(figures(heard["full"], heard[name], torch.tensor(ids[-scored:])))
    name = f"adapter, by layer, in vLLM, blocks of {chosen.block_size}"
    rows = [row(name, float(share), by_text) for share, by_text in by_share.items()]
    versions = {package.__name__: package.__version__ for package in (torch, vllm)}
    chosen.out.write_text(json.dumps({"versions": versions, "rows": rows}, indent=1))


if __name__ == "__main__":
    main()
