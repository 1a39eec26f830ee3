"""The page: controls, two texts, what is known of them, and calls to copy. With Gradio."""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Iterator, Sequence
from contextlib import closing
from pathlib import Path
from typing import Any, get_args

import gradio as gr

from chunkllm import ChunkError
from decoding.coloured import head_of_page
from decoding.errors import DecodingError
from decoding.playground.asked import AUTO, LONGEST, Asked
from decoding.playground.local import LocalModel
from decoding.playground.served import ServedModel
from decoding.playground.shown import details, panes, status
from decoding.playground.view import View
from decoding.playground.visits import Visit, Visits
from decoding.style.settings import Mode
from ngram import NGramError

_FIXED, _CHOSEN, _PHASES = "fixed", "chosen for the prompt", "by phase"
_ALL, _BUDGET = "everything", "chunks, by a budget"
_PROMPT = "What should a traveller do in a storm?"
_CONTINUED = "The captain said that"
_DAY = 24 * 60 * 60  # seconds that files which were dropped in are kept
_PAUSE = 0.4  # seconds that the slider must rest
_READY = "Write a prompt, and press Write (or Shift+Enter). Move λ, and the text is written anew."
_FONT, _MONO = ("system-ui", "sans-serif"), ("ui-monospace", "monospace")  # the machine's: none is fetched
_LOG = logging.getLogger(__name__)


class Playground:
    """A page on one model.

    Args:
        model: on this machine, or a server's.
        styles: to choose from: as `decoding.Policy` takes them, by the names shown; the first is chosen.
    """

    def __init__(self, model: LocalModel | ServedModel, styles: dict[str, str]):
        self._model = model
        self._is_local = isinstance(model, LocalModel)
        self.visits = Visits(styles)
        self._styles = list(styles)
        self.blocks = gr.Blocks(title="decoding playground", analytics_enabled=False, delete_cache=(_DAY, _DAY))
        with self.blocks:
            self._lay_out()
            self._connect()
        self.blocks.queue(default_concurrency_limit=None)

    def launch(self, host: str, port: int | None, share: bool, browser: bool) -> str:
        """Serves the page from now on, in the background, and gives its address.

        Raises:
            DecodingError: the port is taken.
        """
        theme = gr.themes.Base(primary_hue="blue", neutral_hue="slate", font=_FONT, font_mono=_MONO)
        try:
            _, local, shared = self.blocks.launch(
                server_name=host,
                server_port=port,
                share=share,
                inbrowser=browser,
                prevent_thread_lock=True,
                quiet=True,
                ssr_mode=False,
                footer_links=[],
                max_file_size="100mb",
                theme=theme,
                head=head_of_page() + Path(__file__).with_name("page.html").read_text(encoding="utf-8"),
            )
        except OSError as error:
            raise DecodingError(f"cannot serve at {host}:{port or 7860} ({error}): choose another --port") from error
        return shared or local

    def close(self) -> None:
        """Stops what is written, and serves no more."""
        self.visits.close()
        self.blocks.close()

    def _lay_out(self) -> None:
        local, chats = self._is_local, self._model.chats
        prompt = _PROMPT if chats else _CONTINUED
        gr.Markdown(f"## decoding playground\n{self._model.name}{'' if local else f' at {self._model.server}'}")
        self._prompt = gr.Textbox(prompt, label="Prompt", lines=2, max_lines=12)
        self._chat = gr.Checkbox(
            chats, label="Answer it, as a chat. Otherwise the text goes on from it", interactive=chats
        )
        with gr.Row():
            self._style = gr.Dropdown(
                self._styles, value=next(iter(self._styles), None), label="Style", allow_custom_value=not local
            )
            self._lambda = gr.Slider(0, 1, 0.6, step=0.05, label="λ, the style's strength", elem_id="lambda")
            self._mode = gr.Radio(get_args(Mode), value="ratio", label="Mode", visible=local)
        with gr.Accordion("A style of your own, temperature, budget, length", open=False):
            self._file = gr.File(label="Drop a text in: it becomes a style", type="filepath", height=150, visible=local)
            with gr.Row():
                self._kind = gr.Radio([_FIXED, _CHOSEN, _PHASES], value=_FIXED, label="Temperature")
                self._temperature = gr.Slider(0.1, 2, 0.7, step=0.1, label="Temperature of all")
                self._think = gr.Slider(0.1, 2, 1, step=0.1, label="Temperature to think", visible=False)
                self._answer = gr.Slider(0.1, 2, 0.3, step=0.1, label="Temperature to answer", visible=False)
            with gr.Row():
                self._reads = gr.Radio([_ALL, _BUDGET], value=_ALL, label="Attention reads")
                self._budget = gr.Number(256, label="Tokens that it reads", precision=0, minimum=1, visible=False)
            with gr.Row():
                self._length = gr.Slider(8, LONGEST, 80, step=8, label="Length, in tokens")
                self._seed = gr.Number(0, label="Seed of both texts", precision=0, minimum=0)
        with gr.Row():
            self._write = gr.Button("Write", variant="primary", elem_id="write")
            self._stop = gr.Button("Stop", elem_id="stop")
        self._status = gr.HTML(status(_READY))
        style = self._styles[0] if self._styles else "no style"
        first = Asked(prompt, chats, style, style, lambda_=0.6, mode=self._mode_of("ratio"), temperature=0.7)
        self._panes = gr.HTML(panes(first, View(""), self._is_local))
        self._details = gr.HTML("", elem_classes="details")
        with gr.Accordion("The same elsewhere", open=False):
            with gr.Tab("Python"):
                self._python = gr.Code(language="python", label="Python", interactive=False, wrap_lines=True)
            with gr.Tab("curl"):
                self._curl = gr.Code(language="shell", label="curl", interactive=False, wrap_lines=True)
            with gr.Tab("policy.json", visible=local):
                self._policy = gr.Code(language="json", label="policy.json", interactive=False, wrap_lines=True)

    def _connect(self) -> None:
        asked = [self._prompt, self._chat, self._style, self._lambda, self._mode, self._kind, self._temperature]
        asked += [self._think, self._answer, self._reads, self._budget, self._length, self._seed]
        shown = [self._panes, self._details, self._python, self._curl, self._policy, self._status]
        moved = gr.State(0)
        gr.on(
            [self._write.click, self._prompt.submit, moved.change],
            self._run,
            asked,
            shown,
            trigger_mode="multiple",
            show_progress="hidden",
            api_visibility="private",
        )
        quiet: dict[str, Any] = {"show_progress": "hidden", "api_visibility": "private"}
        self._lambda.input(self._rested, None, moved, trigger_mode="multiple", **quiet)
        self._stop.click(self._halt, None, None, queue=False, **quiet)
        self._file.upload(self._adopt, self._file, [self._style, self._status], **quiet)
        self._kind.change(_for_kind, self._kind, [self._temperature, self._think, self._answer], **quiet)
        self._reads.change(lambda reads: gr.update(visible=reads == _BUDGET), self._reads, self._budget, **quiet)
        self.blocks.unload(self._leave)

    def _mode_of(self, mode: Any) -> Any:
        return mode if self._is_local else None  # a server's styles have their own

    def _asked(self, visit: Visit, values: Sequence[Any]) -> Asked:
        prompt, chat, style, lambda_, mode, kind, temperature, think, answer, reads, budget, length, seed = values
        if style is None:
            raise DecodingError("choose a style")
        return Asked(
            prompt=prompt,
            chat=chat,
            style=visit.styles[style] if self._is_local else style,
            style_name=style,
            lambda_=lambda_,
            mode=self._mode_of(mode),
            temperature={_FIXED: temperature, _CHOSEN: AUTO, _PHASES: answer}[kind],
            think_temperature=think if kind == _PHASES else None,
            kv_budget=_whole("the budget", budget) if reads == _BUDGET else None,
            max_new_tokens=_whole("the length", length),
            seed=_whole("the seed", seed),
        )

    def _run(self, request: gr.Request, *values: Any) -> Iterator[list[Any]]:
        """Writes both texts, and shows them meanwhile."""
        visit = self.visits.of(str(request.session_hash))
        stop = visit.begins()
        rest: list[Any] = [gr.skip()] * 3
        try:
            asked = self._asked(visit, values)
            rest = self._calls(asked)
            top_p = asked.policy(self._model.adapters).top_p if self._is_local else None
            with closing(self._model.write(asked, stop)) as views:
                for view in views:
                    if visit.run is not stop:  # something new was asked for
                        return
                    shown = panes(asked, view, self._is_local)
                    yield [shown, details(view, top_p), *rest, status(view.status)]
                    rest = [gr.skip()] * 3
        except (DecodingError, ChunkError, NGramError) as error:
            yield [gr.skip(), gr.skip(), *rest, status(f"{error}", is_error=True)]
        except Exception as error:
            _LOG.exception("a run failed")
            yield [gr.skip(), gr.skip(), *rest, status(f"That failed, which is our fault ({error!r}).", is_error=True)]

    def _calls(self, asked: Asked) -> list[Any]:
        name, adapters = self._model.name, self._model.adapters
        if (server := self._model.server) is not None:
            return [asked.client(name, server), asked.curl(name, server), gr.skip()]
        return [asked.python(name, adapters), asked.curl(name), asked.policy_file(adapters)]

    async def _rested(self, request: gr.Request) -> Any:
        """Something new once the slider rests, nothing while it moves."""
        visit = self.visits.of(str(request.session_hash))
        visit.moves += 1
        mine = visit.moves
        await asyncio.sleep(_PAUSE)
        return mine if visit.moves == mine else gr.skip()

    def _halt(self, request: gr.Request) -> None:
        self.visits.of(str(request.session_hash)).run.set()

    def _adopt(self, path: str, request: gr.Request) -> list[Any]:
        visit = self.visits.of(str(request.session_hash))
        try:
            name = visit.brings(path)
        except (DecodingError, NGramError) as error:
            return [gr.skip(), status(str(error), is_error=True)]
        told = f"{name} is a style now, for this page alone. Press Write: it is counted first."
        return [gr.update(choices=list(visit.styles), value=name), status(told)]

    def _leave(self, request: gr.Request) -> None:
        self.visits.leaves(str(request.session_hash))


def _for_kind(kind: str) -> list[Any]:
    return [gr.update(visible=kind == shown) for shown in (_FIXED, _PHASES, _PHASES)]


def _whole(what: str, value: Any) -> int:
    if value is None or value != int(value):
        raise DecodingError(f"{what} must be a whole number")
    return int(value)
