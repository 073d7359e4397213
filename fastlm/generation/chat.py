"""Conversations with a chat model: its own template makes the text that it continues.

The template is Jinja, as transformers' `apply_chat_template` reads it, and code from wherever the model came from: it
runs in Jinja's sandbox.
"""

from __future__ import annotations

import datetime
import json
import re
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import jinja2
from jinja2.ext import Extension
from jinja2.sandbox import ImmutableSandboxedEnvironment

from fastlm.data.bpe import BPETokenizer

Message = dict[str, str]  # {"role": "system", "user" or "assistant", "content": …}

TEMPLATE_FILE, CONFIG_FILE = "chat_template.jinja", "tokenizer_config.json"


class ChatTemplate:
    """The chat template of a model folder.

    Args:
        source: the template.
        special: what it may ask for by name: bos_token, eos_token, …

    Raises:
        ValueError: it is no template.
    """

    def __init__(self, source: str, special: dict[str, str] | None = None) -> None:
        environment = ImmutableSandboxedEnvironment(
            trim_blocks=True, lstrip_blocks=True, extensions=[_Generation, "jinja2.ext.loopcontrols"]
        )
        environment.filters["tojson"] = _to_json
        environment.globals["raise_exception"] = _raise
        environment.globals["strftime_now"] = lambda form: datetime.datetime.now().strftime(form)
        try:
            self._template = environment.from_string(source)
        except jinja2.TemplateError as error:
            raise ValueError(f"the chat template is no Jinja template: {error}") from None
        self._special = special or {}

    @classmethod
    def from_folder(cls, folder: str | Path) -> ChatTemplate:
        """The template in chat_template.jinja or tokenizer_config.json; of several in the latter "default".

        Raises:
            ValueError: there is none.
        """
        folder = Path(folder)
        config_file, file = folder / CONFIG_FILE, folder / TEMPLATE_FILE
        fields = json.loads(config_file.read_text(encoding="utf-8")) if config_file.is_file() else {}
        source = file.read_text(encoding="utf-8") if file.is_file() else fields.get("chat_template")
        if isinstance(source, list):
            source = {one["name"]: one["template"] for one in source}.get("default")
        if not source:
            raise ValueError(
                f"{folder} has no chat template (wanted {TEMPLATE_FILE}, or chat_template in {CONFIG_FILE}): is it a "
                "chat model? `fastlm generate` continues texts"
            )
        named = {name: t["content"] if isinstance(t, dict) else t for name, t in fields.items() if _is_token(name)}
        return cls(source, {name: token for name, token in named.items() if isinstance(token, str)})

    def render(self, messages: Sequence[Message]) -> str:
        """The text of a conversation, up to where the assistant's next answer begins.

        Raises:
            ValueError: the template refuses the conversation (two messages of one role in a row, a system message).
        """
        try:
            options: dict[str, Any] = {"tools": None, "documents": None, "add_generation_prompt": True}
            return self._template.render(messages=messages, **options, **self._special)
        except Exception as error:  # a template is a program
            raise ValueError(f"the chat template refuses this conversation: {error}") from None

    def encode(self, tokenizer: BPETokenizer, messages: Sequence[Message]) -> list[int]:
        """The ids of `render`. Special tokens that are said are text: they end no turn and begin none."""
        special = [re.escape(token) for token in tokenizer.special_tokens if len(token) > 1]
        inside = re.compile("|".join(special) if special else r"(?!)")
        said = "".join(message["content"] for message in messages)
        mark = next(c for c in map(chr, range(0xE000, 0xF900)) if c not in said)  # of the private-use area

        def broken(message: Message) -> Message:
            return {**message, "content": inside.sub(lambda m: m[0][0] + mark + m[0][1:], message["content"])}

        pieces = self.render([broken(message) for message in messages]).split(mark)
        return [token for piece in pieces for token in tokenizer.encode_marked_up(piece)]


class _Generation(Extension):
    """{% generation %} … {% endgeneration %} marks what the assistant said, for training; here it is only its text."""

    tags = {"generation"}  # noqa: RUF012

    def parse(self, parser: jinja2.parser.Parser) -> list[jinja2.nodes.Node]:
        next(parser.stream)
        return parser.parse_statements(("name:endgeneration",), drop_needle=True)


def _is_token(name: str) -> bool:
    return name.endswith("_token")


def _to_json(value: Any, ensure_ascii: bool = False, indent: int | None = None, **options: Any) -> str:
    """Jinja's own escapes HTML."""
    return json.dumps(value, ensure_ascii=ensure_ascii, indent=indent, **options)


def _raise(message: str) -> None:
    raise jinja2.TemplateError(message)
