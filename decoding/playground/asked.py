"""What a visitor asks for, as a `Policy`, and as calls that do the same elsewhere."""

from __future__ import annotations

import json
import shlex
import tempfile
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from decoding.errors import DecodingError
from decoding.policy import Policy
from decoding.policy.files import POLICY_FILE
from decoding.style.settings import Mode
from decoding.style.source import StyleSource
from decoding.tokens import require_text

AUTO: Literal["auto"] = "auto"
SAVED = "my-policy"
LONGEST = 1024  # tokens that one run writes


@dataclass(frozen=True)
class Asked:
    """One run, with the texts of both sides.

    Attributes:
        prompt: plain text.
        chat: whether the prompt is what a user says.
        style: as `Policy` takes it, and ``style_name`` as it is shown.
        lambda_: λ.
        mode: of the style; None where it is the server's to know.
        temperature: a number, or "auto"; with ``think_temperature`` the answer's.
        think_temperature: that of thinking.
        kv_budget: tokens that attention reads; None for all.
        max_new_tokens: of each side.
        seed: of each side.

    Raises:
        DecodingError: no prompt, or one that is no text; a budget or a length that cannot be.
    """

    prompt: str
    chat: bool
    style: str
    style_name: str
    lambda_: float
    mode: Mode | None = "ratio"
    temperature: float | Literal["auto"] = 1.0
    think_temperature: float | None = None
    kv_budget: int | None = None
    max_new_tokens: int = 64
    seed: int = 0

    def __post_init__(self) -> None:
        if not self.prompt.strip():
            raise DecodingError("the prompt is empty: write what the model is to answer, or to go on from")
        require_text(self.prompt, "the prompt")
        if not 1 <= self.max_new_tokens <= LONGEST:
            raise DecodingError(f"the length must be 1 to {LONGEST} tokens, not {self.max_new_tokens}")

    @property
    def plain_temperature(self) -> float:
        """Of the text beside, which has nothing chosen for it: the same if it is one number, else 1."""
        return 1.0 if self.temperature == AUTO or self.think_temperature is not None else self.temperature

    def policy(self, adapters: str | None = None) -> Policy:
        """What steers.

        Args:
            adapters: of the selection of chunks, as `Policy` takes them.

        Raises:
            DecodingError: as `Policy`.
        """
        return Policy(**self._fields(self.style, adapters))

    def _fields(self, style: str, adapters: str | None) -> dict[str, Any]:
        chunks: Any = self.kv_budget if adapters is None else {"adapters": adapters, "budget": self.kv_budget}
        asked = {
            "style": style,
            "lambda_": self.lambda_,
            "mode": self.mode,
            "temperature": self.temperature,
            "think_temperature": self.think_temperature,
            "chunks": None if self.kv_budget is None else chunks,
        }
        return {name: value for name, value in asked.items() if value is not None}

    def python(self, model: str, adapters: str | None = None) -> str:
        """The lines of Python that write the steered text, and save its policy."""
        fields = self._fields(_elsewhere(self.style), adapters)
        arguments = ", ".join(f"{'λ' if name == 'lambda_' else name}={value!r}" for name, value in fields.items())
        return (
            "import torch\n\nfrom decoding import Policy, generate\n\n"
            f"policy = Policy({arguments})\n"
            f"policy.save_pretrained({SAVED!r})  # for decoding serve\n"
            f"torch.manual_seed({self.seed})\n"
            f"print(generate({model!r}, {self.prompt!r}, chat={self.chat}, policy=policy, "
            f"max_new_tokens={self.max_new_tokens}))\n"
        )

    def policy_file(self, adapters: str | None = None) -> str:
        """What `Policy.save_pretrained` writes: ``policy.json``, beside which an uploaded text would lie."""
        with tempfile.TemporaryDirectory() as folder:
            self.policy(adapters).save_pretrained(folder)
            return (Path(folder) / POLICY_FILE).read_text(encoding="utf-8")

    def request(self, model: str) -> tuple[str, dict[str, Any]]:
        """Path and body of the request that has a ``decoding serve`` write the steered text."""
        body = self.plain_request(model)[1]
        wanted: dict[str, Any] = {"style": self.style, "lambda": self.lambda_}
        if self.think_temperature is not None:
            body["temperature"] = 1
            wanted |= {"think_temperature": self.think_temperature, "answer_temperature": self.temperature}
        elif self.temperature == AUTO:
            wanted["temperature"] = AUTO
        if self.kv_budget is not None:
            wanted["kv_budget"] = self.kv_budget
        return self.plain_request(model)[0], body | {"vllm_xargs": wanted}

    def plain_request(self, model: str) -> tuple[str, dict[str, Any]]:
        """The same without any of it."""
        body = {"model": model, "max_tokens": self.max_new_tokens, "temperature": self.plain_temperature}
        body |= {"seed": self.seed}
        if self.chat:
            return "/v1/chat/completions", body | {"messages": [{"role": "user", "content": self.prompt}]}
        return "/v1/completions", body | {"prompt": self.prompt}

    def client(self, model: str, server: str) -> str:
        """The lines of Python that ask a server for the steered text."""
        body = self.request(model)[1]
        extra = {"vllm_xargs": body.pop("vllm_xargs")}
        calls, text = ("chat.completions", "message.content") if self.chat else ("completions", "text")
        arguments = "".join(f"    {name}={value!r},\n" for name, value in {**body, "extra_body": extra}.items())
        return (
            f"import openai\n\nclient = openai.OpenAI(base_url={f'{server}/v1'!r}, api_key='none')\n"
            f"answer = client.{calls}.create(\n{arguments})\nprint(answer.choices[0].{text})\n"
        )

    def curl(self, model: str, server: str | None = None) -> str:
        """The shell's lines that ask a server for the steered text, with that which starts one where there is none."""
        served = self if server else Asked(**(vars(self) | {"style": _name(self.style)}))
        path, body = served.request(model)
        address = shlex.quote(f"{server or 'http://localhost:8000'}{path}")
        request = shlex.quote(json.dumps(body, ensure_ascii=False, indent=1))
        asking = f"curl {address} -H 'Content-Type: application/json' -d {request}\n"
        if server:
            return asking
        return f"decoding serve --model {shlex.quote(model)} --policy {SAVED} --port 8000\n# once it answers:\n{asking}"


def _name(style: str) -> str:
    return StyleSource.parse(style).served_name


def _elsewhere(style: str) -> str:
    """A style as one would name it on another machine: an uploaded text by its file's name alone."""
    source = StyleSource.parse(style)
    return Path(source.where).name if source.kind == "text" else style
