"""A sweep's texts from vLLM, in this process: requests in one continuous batch, each with its style."""

from __future__ import annotations

import os
import tempfile
import time
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from vllm import LLM, SamplingParams

from decoding.models import resolve_model
from decoding.vllm import engine_args
from decoding.vllm.processor import StyleLogitsProcessor
from experiments.lab.runs import dtype_of
from experiments.lab.timing import Timer
from experiments.style.cells import Style, SweepCell, SweepOptions
from experiments.style.engines import Batch, prior_of, seed_of

TIMER = Timer()


class TimedStyleProcessor(StyleLogitsProcessor):
    """Adds the time that it takes to `TIMER`."""

    def apply(self, logits: Tensor, ctx: Any | None = None) -> Tensor:
        """Steers a step."""
        with TIMER.measuring(logits.device):
            return super().apply(logits, ctx)


class VllmEngine:
    """vLLM samples; the distributions that it sampled from are computed again with transformers, in one forward pass.

    Args:
        model: the same model in transformers.
        tokenizer: its tokenizer.
        model_name: how the user called it.
        styles: the sweep's.
        options: the sweep's.
    """

    def __init__(self, model: Any, tokenizer: Any, model_name: str, styles: Mapping[str, Style], options: SweepOptions):
        self.model = model
        self.tokenizer = tokenizer
        self.styles = styles
        self.options = options
        self._priors = tempfile.TemporaryDirectory()
        folders = {name: Path(self._priors.name) / str(i) for i, name in enumerate(styles)}
        for name, style in styles.items():
            prior_of(style, options).save_pretrained(folders[name])
        on_gpu = model.device.type == "cuda"
        os.environ.setdefault("VLLM_ENABLE_V1_MULTIPROCESSING", "0")  # the timer is in this process
        longest = max(len(tokenizer(prompt)["input_ids"]) for prompt in options.prompts)
        self.llm = LLM(
            resolve_model(model_name),
            dtype=dtype_of(model),
            max_model_len=longest + options.max_new_tokens,
            max_num_seqs=options.batch_size,
            enforce_eager=not on_gpu,
            disable_log_stats=True,
            # On a GPU the other half is transformers'. On a CPU vLLM would take, and fill, much of the memory.
            **({"gpu_memory_utilization": 0.5} if on_gpu else {"kv_cache_memory_bytes": 1 << 30}),
            **engine_args(folders) | {"logits_processors": [f"{__name__}:{TimedStyleProcessor.__name__}"]},
        )

    def generate(self, cell: SweepCell, start: int, prompts: list[str]) -> Batch:
        """See `experiments.style.engines.Engine`."""
        prompt_ids = [self.tokenizer(prompt)["input_ids"] for prompt in prompts]
        length = self.options.max_new_tokens
        sampling = [
            SamplingParams(
                temperature=cell.temperature,
                seed=seed_of(cell, start + i),
                min_tokens=length,
                max_tokens=length,
                detokenize=False,
                extra_args=None if cell.style is None else {"style": cell.style, "lambda": cell.lambda_},
            )
            for i in range(len(prompts))
        ]
        TIMER.reset()
        began = time.perf_counter()
        outputs = self.llm.generate([{"prompt_token_ids": ids} for ids in prompt_ids], sampling, use_tqdm=False)
        seconds = time.perf_counter() - began
        tokens = torch.tensor([list(output.outputs[0].token_ids) for output in outputs], device=self.model.device)
        rows = [torch.tensor(ids) for ids in prompt_ids]
        return Batch(rows, tokens, self._steps(cell, rows, tokens), seconds, TIMER.seconds)

    def _steps(self, cell: SweepCell, prompt_ids: list[Tensor], tokens: Tensor) -> Iterator[tuple[Tensor, Tensor]]:
        """Raw and processed scores before each token of the texts."""
        width, length = max(map(len, prompt_ids)), tokens.shape[1]
        prompts = torch.stack([torch.nn.functional.pad(ids, (width - len(ids), 0), value=-1) for ids in prompt_ids])
        sequences = torch.cat((prompts.to(tokens.device), tokens), 1)
        mask = (sequences >= 0).long()
        with torch.inference_mode():
            logits = self.model(
                input_ids=sequences.clamp(min=0),
                attention_mask=mask,
                position_ids=(mask.cumsum(1) - 1).clamp(min=0),
                logits_to_keep=length + 1,
            ).logits
        ends = torch.tensor(self.model.generation_config.eos_token_id, device=logits.device).view(-1)
        prior = None if cell.style is None else prior_of(self.styles[cell.style], self.options, λ=cell.lambda_)
        for step in range(length):
            raw = logits[:, step].float()
            processed = raw.index_fill(1, ends, -torch.inf)  # min_tokens
            if prior is not None:
                processed = prior(sequences[:, : width + step], processed)
            yield raw, processed / cell.temperature
