"""The baseline that trains: a LoRA of a frozen causal language model, learnt from a corpus in minutes on a CPU."""

from __future__ import annotations

import hashlib
import json
import math
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch.nn.utils import clip_grad_norm_

from decoding.environment import environment
from decoding.errors import DecodingError
from decoding.files import require_writable
from decoding.models import model_fingerprint
from experiments.lab.libraries import required
from experiments.lab.progress import progress_of_cells
from ngram.storage import write_atomically

RECORD = "training.json"
WARM_UP = 0.05  # of all steps
SUMMARIZED = 20  # steps that the first and last loss are means of


@dataclass(frozen=True)
class LoraRecipe:
    """How a LoRA is trained, the same on every device.

    Attributes:
        rank: of the two factors beside every linear layer of the attention and feed-forward blocks.
        alpha: their product is scaled by ``alpha / rank``.
        rate: AdamW's, at the end of a warm-up; from there it falls to zero along a cosine.
        window: tokens of a piece that is learnt from.
        batch: pieces of a step.
        steps: how many.
        dropout: of what goes into the factors.
        seed: of the factors' first values, of dropout, and of the pieces drawn.
    """

    rank: int = 8
    alpha: float = 16
    rate: float = 2e-4
    window: int = 256
    batch: int = 4
    steps: int = 300
    dropout: float = 0.0
    seed: int = 0

    @property
    def tokens(self) -> int:
        """Tokens read in all."""
        return self.steps * self.batch * self.window


def train_lora(
    model: Any, documents: Sequence[np.ndarray], folder: Path, recipe: LoraRecipe, eos_id: int
) -> dict[str, Any]:
    """Trains a LoRA into a folder. The model is as before, afterwards.

    A finished one of the same recipe, corpus and model is kept as it is; any other in the folder is replaced. An
    interrupted training starts again: it takes minutes.

    Args:
        model: a causal language model. Training computes in float32 if it is that, else in bfloat16; the LoRA's
            weights are float32.
        documents: int64 token ids, as `decoding.style.source.tokenize` gives them.
        folder: for peft's ``adapter_model.safetensors`` and ``adapter_config.json``, and ``training.json``.
        recipe: how.
        eos_id: the token to put after every document.

    Returns:
        What ``training.json`` holds: the recipe, ``tokens`` read and ``seconds`` taken, ``first_loss`` and
        ``last_loss`` (nats a token, means of 20 steps), fingerprints of corpus and model, and the environment.

    Raises:
        DecodingError: the corpus is shorter than one window, the folder cannot be written, or peft is missing.
    """
    if (length := sum(map(len, documents))) < recipe.window:
        raise DecodingError(f"a LoRA learns from windows of {recipe.window} tokens, and the style has {length} in all")
    stream = np.concatenate([np.append(document, eos_id) for document in documents])
    about = {
        "recipe": asdict(recipe),
        "corpus_sha256": hashlib.sha256(stream.astype("<i8").tobytes()).hexdigest(),
        "model_fingerprint": model_fingerprint(model),
    }
    held = _held_record(folder)
    if held and all(held.get(key) == value for key, value in about.items()):
        return held
    peft = required("peft", "compare")
    require_writable(folder)
    begun = time.perf_counter()
    with torch.random.fork_rng(), _plain_afterwards(model, lambda: _with_new_factors(peft, model, recipe)) as adapted:
        losses = _fit(adapted, torch.from_numpy(stream), recipe)
        seconds = time.perf_counter() - begun
        (folder / RECORD).unlink(missing_ok=True)  # so that none but finished weights have one
        adapted.save_pretrained(folder, save_embedding_layers=False)
    record = {
        **about,
        "tokens": recipe.tokens,
        "seconds": seconds,
        "first_loss": float(np.mean(losses[:SUMMARIZED])),
        "last_loss": float(np.mean(losses[-SUMMARIZED:])),
        "environment": environment(),
    }
    write_atomically(folder / RECORD, json.dumps(record, indent=1).encode())
    return record


def open_lora(model: Any, folder: Path) -> Any:
    """A model with a trained LoRA, as peft's ``PeftModel`` in evaluation mode. Its ``unload`` makes it plain again.

    Args:
        model: the one that it was trained for; its layers are wrapped in place and all its weights frozen.
        folder: as `train_lora` writes it.

    Raises:
        DecodingError: no finished LoRA there, one of another model, or peft is missing.
    """
    record = _held_record(folder)
    if record is None:
        raise DecodingError(f"{folder} holds no finished LoRA: train it first")
    if record["model_fingerprint"] != model_fingerprint(model):
        raise DecodingError(f"the LoRA in {folder} is of another model: train one for this")
    return required("peft", "compare").PeftModel.from_pretrained(model, folder).eval()


@contextmanager
def with_lora(model: Any, folder: Path, share: float = 1.0) -> Iterator[Any]:
    """Gives a model a share of a trained LoRA for a while. It is yielded itself, and plain afterwards, bit for bit.

    Raises:
        DecodingError: as `open_lora`.
    """
    with _plain_afterwards(model, lambda: open_lora(model, folder)) as adapted:
        for module in adapted.modules():
            if hasattr(module, "scale_layer"):
                module.scale_layer(share)
        yield model


@contextmanager
def _plain_afterwards(model: Any, adapt: Callable[[], Any]) -> Iterator[Any]:
    trainable = {name: parameter.requires_grad for name, parameter in model.named_parameters()}
    training = model.training
    adapted = adapt()
    try:
        yield adapted
    finally:
        adapted.unload()
        model.train(training)
        for name, parameter in model.named_parameters():
            parameter.requires_grad_(trainable[name])


def _with_new_factors(peft: Any, model: Any, recipe: LoraRecipe) -> Any:
    torch.manual_seed(recipe.seed)  # peft draws them on the CPU, whatever the model is on
    config = peft.LoraConfig(
        task_type="CAUSAL_LM",
        target_modules="all-linear",
        r=recipe.rank,
        lora_alpha=recipe.alpha,
        lora_dropout=recipe.dropout,
    )
    return peft.get_peft_model(model, config)


def _fit(adapted: Any, stream: torch.Tensor, recipe: LoraRecipe) -> list[float]:
    """Trains the factors; every step's loss in nats a token."""
    factors = [parameter for parameter in adapted.parameters() if parameter.requires_grad]
    optimizer = torch.optim.AdamW(factors, lr=recipe.rate)
    schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: _share_of_rate(step, recipe.steps))
    device, is_exact = adapted.device, adapted.base_model.model.dtype == torch.float32
    losses: list[float] = []
    adapted.train()
    with progress_of_cells() as progress:
        task = progress.add_task("LoRA", total=recipe.steps)
        for ids in _batches(stream, recipe):
            ids = ids.to(device)
            with torch.autocast(device.type, torch.bfloat16, enabled=not is_exact):  # float16's gradients underflow
                loss = adapted(input_ids=ids, labels=ids, use_cache=False).loss
            optimizer.zero_grad()
            loss.backward()
            clip_grad_norm_(factors, 1.0)
            optimizer.step()
            schedule.step()
            losses.append(loss.item())
            progress.update(task, advance=1, description=f"LoRA (loss {losses[-1]:.2f})")
    return losses


def _share_of_rate(step: int, steps: int) -> float:
    warm_up = max(1, round(WARM_UP * steps))
    if step < warm_up:
        return (step + 1) / warm_up
    return (1 + math.cos(math.pi * (step - warm_up) / max(1, steps - warm_up))) / 2


def _batches(stream: torch.Tensor, recipe: LoraRecipe) -> Iterator[torch.Tensor]:
    """Windows at random places, ``[batch, window]`` a step: the same on every device."""
    generator = torch.Generator().manual_seed(recipe.seed)
    windows = stream.unfold(0, recipe.window, 1)
    for _ in range(recipe.steps):
        yield windows[torch.randint(len(windows), (recipe.batch,), generator=generator)]


def _held_record(folder: Path) -> dict[str, Any] | None:
    path = folder / RECORD
    if not path.is_file():
        return None
    try:
        return json.loads(path.read_bytes())
    except (OSError, ValueError) as error:
        raise DecodingError(f"{path} is damaged: remove the folder, or choose another") from error
