"""`TemperatureSelector`: the sampling temperature that suits a prompt, and a model."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from os import PathLike
from pathlib import Path
from typing import Any, Literal, get_args

import torch
from torch import Tensor

from chunkllm.late import send
from decoding.errors import DecodingError
from decoding.hub import upload
from decoding.models import model_fingerprint
from decoding.temperature.abilities import (
    ABILITIES,
    DEFAULT_TOLERANCE,
    expected_scores,
    expected_temperatures,
    lowest_within,
)
from decoding.temperature.encoder import Encoder
from decoding.temperature.explained import BLANK, NO_GAIN, UNREAD, Explained
from decoding.temperature.files import ENCODER_FOLDER, SavedSelector, read_encoder, read_folder, write_folder
from decoding.temperature.heads import AbilityHead, CurveHead, Prediction

Policy = Literal["ability", "curve"]
EMBEDDED = Path(__file__).with_name("embedded")
DEFAULT_CAUTION = 2.0


@dataclass(repr=False)
class TemperatureSelector:
    """Chooses the sampling temperature of prompts, by what they ask for (arXiv 2506.07295).

    Policy "ability" is the paper's: a BERT-family classifier of six abilities, then the best temperature for the
    model's size class, from the paper's published scores. The classifier's doubt counts: the score is expected over
    its probabilities. Where temperatures score alike the lowest within ``tolerance`` of the best is taken, or within
    the table's noise (1.1 % for small and large models, 2 % for medium ones): arg-max would set 1.3 for 0.8 points,
    which one model of four decides.

    Policy "curve" is ours, for one given model: a regression of its scores at each temperature on the prompt's
    encoding. It takes the lowest temperature within ``tolerance`` of the highest expected score, and keeps to the best
    fixed temperature unless the expected gain over it exceeds ``caution`` standard errors.

    A prompt that the encoder cannot read gets what is best for all abilities, which are as probable then: one of which
    it knows no more than half the tokens, or, where the encoder is not multilingual, one that asks in another language
    than English.

    Examples:
        >>> selector = TemperatureSelector.from_pretrained()
        >>> selector.select(["Translate into German: Good morning.", "Write a poem about rain."], model_size="small")
        [0.4, 0.7]

    Args:
        encoder: reads the prompts.
        ability: classifier of its vectors.
        curve: regression for the model with fingerprint ``about["model_fingerprint"]``, if there is one.
        tolerance: a share of the best score.
        caution: in standard errors. At 2, noise alone passes for a gain about once in forty times.
        curve_ability: the classifier whose probabilities the curve was fitted to, if it is another than ``ability``.
        about: what made the heads: model, data, command, scores.
    """

    encoder: Encoder
    ability: AbilityHead
    curve: CurveHead | None = None
    tolerance: float = DEFAULT_TOLERANCE
    caution: float = DEFAULT_CAUTION
    curve_ability: AbilityHead | None = None
    about: dict[str, Any] = field(default_factory=dict)

    def abilities(self, prompts: Sequence[str]) -> Tensor:
        """Probabilities of the six abilities: float32 [N, 6] on the encoder's device, in the order of `ABILITIES`.

        Those of a prompt that the encoder cannot read are 1/6 each.

        Raises:
            DecodingError: no prompt, or an empty one.
        """
        return self._shares(self._encoded(prompts))

    def reads(self, prompts: Sequence[str]) -> list[bool]:
        """Whether the encoder can read each prompt.

        Raises:
            DecodingError: no prompt, or an empty one.
        """
        return self._encoded(prompts).any(-1).tolist()

    def curves(self, prompts: Sequence[str]) -> Prediction:
        """What the model's scores are expected to be at each temperature, as shares of the best mean score of a task.

        Raises:
            DecodingError: no prompt, an empty one, or a selector without a curve.
        """
        return self._curve(self._encoded(prompts))

    def select(self, prompts: Sequence[str], model_size: str = "small", policy: Policy | None = None) -> list[float]:
        """A temperature for each prompt, which are read in one batch.

        Args:
            prompts: texts, as a user writes them (without a chat template's frame).
            model_size: "small" (below 5e9 parameters), "medium" or "large" (from 25e9), for policy "ability".
            policy: "ability" by default.

        Raises:
            DecodingError: no prompt, an empty one, an unknown size or policy, or a selector without a curve.
        """
        return _rounded(self.temperatures(prompts, model_size, policy))

    def temperatures(self, prompts: Sequence[str], model_size: str = "small", policy: Policy | None = None) -> Tensor:
        """As `select`, float32 [N] on the encoder's device, without waiting for it."""
        return self.temperatures_of(self._encoded(prompts), model_size, policy)

    def temperatures_of(self, vectors: Tensor, model_size: str = "small", policy: Policy | None = None) -> Tensor:
        """As `temperatures`, for prompts that are encoded: float32 [N, width] -> float32 [N]."""
        if policy not in (None, *get_args(Policy)):
            raise DecodingError(f"unknown policy {policy!r}: choose from {', '.join(get_args(Policy))}")
        if policy == "curve":
            return self._by_curve(vectors, vectors.any(-1))
        return expected_temperatures(self._shares(vectors), model_size, self.tolerance)

    @property
    def top_p(self) -> float | None:
        """The top-p that scores were sampled with, for which the temperatures are chosen; None where not recorded."""
        value = self.about.get("top_p")
        return float(value) if isinstance(value, int | float) and 0 < value <= 1 else None

    def explain(
        self, prompts: Sequence[str], model_size: str = "small", policy: Policy | None = None
    ) -> list[Explained]:
        """As `select`, with all that led to each temperature.

        Raises:
            DecodingError: as `select`.
        """
        return self.explain_read(prompts, self._encoded(prompts), model_size, policy)

    def explain_read(
        self, prompts: Sequence[str], vectors: Tensor, model_size: str = "small", policy: Policy | None = None
    ) -> list[Explained]:
        """As `explain`, for prompts that are encoded, float32 [N, width]; blank ones are zero vectors."""
        chosen, shares = self.temperatures_of(vectors, model_size, policy), self._shares(vectors)
        is_known, errors, best_fixed = vectors.any(-1), None, None
        has_gain = torch.ones_like(is_known)
        if policy == "curve":
            expected, _, errors = self._curve(vectors)
            assert self.curve is not None
            tried, best_fixed = self.curve.temperatures, _rounded(self.curve.temperatures[self.curve.fixed])[0]
            has_gain = chosen == tried[lowest_within(expected, self.tolerance)]
        else:
            tried, expected = expected_scores(shares, model_size)
        temperatures, tried_ones, known, gains = _rounded(chosen), _rounded(tried), is_known.tolist(), has_gain.tolist()

        def explained(at: int, prompt: str) -> Explained:
            has_scores = known[at] or policy != "curve"
            unread = UNREAD if prompt.strip() else BLANK
            return Explained(
                prompt,
                abilities=dict(zip(ABILITIES, shares[at].tolist(), strict=True)),
                temperatures=tuple(tried_ones),
                expected=tuple(expected[at].tolist()) if has_scores else None,
                errors=tuple(errors[at].tolist()) if has_scores and errors is not None else None,
                best_fixed=best_fixed,
                temperature=temperatures[at],
                policy=policy or "ability",
                reason=unread if not known[at] else None if gains[at] else NO_GAIN,
            )

        return [explained(at, prompt) for at, prompt in enumerate(prompts)]

    def kinds_of(self, vectors: Tensor) -> Tensor:
        """The most probable ability of prompts that are encoded: int64 [N], 6 for those that were not read."""
        return self._shares(vectors).argmax(-1).where(vectors.any(-1), len(ABILITIES))

    def _shares(self, vectors: Tensor) -> Tensor:
        return self.ability(vectors).where(vectors.any(-1, keepdim=True), 1 / len(ABILITIES))

    def _by_curve(self, vectors: Tensor, known: Tensor) -> Tensor:
        mean, gain, error = self._curve(vectors)
        assert self.curve is not None
        chosen = lowest_within(mean, self.tolerance)
        is_worth_it = (gain > self.caution * error).gather(-1, chosen[:, None])[:, 0] & known
        return self.curve.temperatures[chosen.where(is_worth_it, self.curve.fixed)]

    def _curve(self, vectors: Tensor) -> Prediction:
        if self.curve is None:
            raise DecodingError("this selector has no curve: train one with `decoding temperature train --collection`")
        # The averages of whole texts stand first, whatever the encoder reads beside them.
        read = vectors[:, : len(self.curve.centre)]
        return self.curve(read, (self.curve_ability or self.ability)(read if self.curve_ability else vectors))

    def _encoded(self, prompts: Sequence[str]) -> Tensor:
        if isinstance(prompts, str):
            raise DecodingError("prompts must be a list of texts: write [prompt]")
        empty = [i for i, prompt in enumerate(prompts) if not (isinstance(prompt, str) and prompt.strip())]
        if empty or not len(prompts):
            raise DecodingError(f"prompt {empty[0]} is empty or no text" if empty else "there is no prompt")
        return self.encoder(prompts)

    def is_for(self, model: Any) -> bool:
        """Whether the curve is of this very model. Not known, and no, of one whose weights are not in memory."""
        if self.curve is None or any(parameter.is_meta for parameter in model.parameters()):
            return False
        return self.about.get("model_fingerprint") == model_fingerprint(model)

    def save_pretrained(self, save_directory: str | PathLike) -> None:
        """Writes heads and settings to a folder, and the encoder too if no hub has it.

        Raises:
            DecodingError: settings or heads that no selector can have, before anything is written.
        """
        encoder, folder = self.encoder, Path(save_directory)
        is_carried = encoder.is_local or encoder.name == ENCODER_FOLDER
        saved = SavedSelector(
            ENCODER_FOLDER if is_carried else encoder.name,
            model_fingerprint(encoder.model),
            encoder.window,
            encoder.reading,
            encoder.multilingual,
            self.tolerance,
            self.caution,
            self.about,
            self.ability,
            self.curve,
            self.curve_ability,
        )
        write_folder(saved, folder)
        if is_carried:
            encoder.model.save_pretrained(folder / ENCODER_FOLDER)
            encoder.tokenizer.save_pretrained(folder / ENCODER_FOLDER)

    def push_to_hub(self, repo_id: str, *, private: bool | None = None, token: str | None = None) -> str:
        """Uploads what `save_pretrained` writes to a repository on the hub, made if needed, and returns its address."""
        return upload(self.save_pretrained, "temperature selector", repo_id, private, token)

    @classmethod
    def from_pretrained(
        cls, name_or_path: str | PathLike | None = None, *, device: str = "cpu", **hub: Any
    ) -> TemperatureSelector:
        """Opens what `save_pretrained` or ``push_to_hub`` wrote; by default the one that the package brings along.

        Args:
            name_or_path: a folder, or a repository on the Hugging Face hub.
            device: where the encoder computes.
            hub: ``revision`` and ``token``.

        Raises:
            DecodingError: nothing there, damaged, or made for another encoder.
        """
        where = EMBEDDED if name_or_path is None else name_or_path
        saved = read_folder(where, hub)
        encoder = read_encoder(where, saved, device, hub)
        ability, curve, curve_ability = saved.heads_on(device)
        return cls(encoder, ability, curve, saved.tolerance, saved.caution, curve_ability, saved.about)


def _rounded(temperatures: Tensor) -> list[float]:
    return [round(value, 4) for value in temperatures.tolist()]


def read_texts(selector: TemperatureSelector, texts: Sequence[str]) -> Tensor:
    """Texts as `TemperatureSelector.temperatures_of` takes them: float32 [N, width] on the encoder's device.

    Equal texts are read once. Blank ones are not read at all: they are zero, as are those that the encoder cannot read.
    """
    legible = list(dict.fromkeys(text for text in texts if text.strip()))
    nothing = torch.zeros(1, selector.encoder.width, device=selector.encoder.model.device)
    vectors = torch.cat([selector.encoder(legible), nothing]) if legible else nothing
    places = {text: place for place, text in enumerate(legible)}
    return vectors[send(torch.tensor([places.get(text, len(legible)) for text in texts]), vectors.device)]
