"""Rendering a conversation by the model folder's own Jinja template.

The template is a stranger's program: it runs in the immutable sandbox, sees plain data only,
and its output is bounded.
"""

import json
from collections.abc import Mapping, Sequence
from typing import Any, NoReturn

import jinja2
from jinja2.sandbox import ImmutableSandboxedEnvironment

from pdserve.errors import InvalidModel, InvalidRequest

OUTPUT_CHARACTERS_MAX = 16 << 20


class _Refused(jinja2.TemplateError):
    """The template itself refuses the conversation."""


def _raise_exception(message: str) -> NoReturn:
    raise _Refused(message)


def _tojson(value: Any, indent: int | None = None, ensure_ascii: bool = False) -> str:
    # Jinja's own filter escapes for HTML, which no model was trained on.
    return json.dumps(value, indent=indent, ensure_ascii=ensure_ascii)


class ChatTemplate:
    """One compiled template and the special tokens it may name."""

    def __init__(self, source: str, special_tokens: Mapping[str, str]) -> None:
        environment = ImmutableSandboxedEnvironment(
            trim_blocks=True,
            lstrip_blocks=True,
            extensions=["jinja2.ext.loopcontrols"],
        )
        environment.globals["raise_exception"] = _raise_exception
        environment.filters["tojson"] = _tojson
        try:
            self._template = environment.from_string(source)
        except jinja2.TemplateError as error:
            raise InvalidModel(f"chat template: {error}") from error
        self._special_tokens = dict(special_tokens)

    def render(self, messages: Sequence[Mapping[str, str]]) -> str:
        """Turn the conversation into the prompt's text, open for the assistant's turn.

        Raises:
            InvalidRequest: the template refuses it, or its text is too long.

        """
        parts: list[str] = []
        length = 0
        try:
            for part in self._template.generate(
                messages=messages, add_generation_prompt=True, **self._special_tokens
            ):
                length += len(part)
                if length > OUTPUT_CHARACTERS_MAX:
                    raise InvalidRequest("the conversation is too long", param="messages")
                parts.append(part)
        except (jinja2.TemplateError, ArithmeticError, LookupError, RecursionError) as error:
            raise _refused(error) from error
        except (AttributeError, TypeError, ValueError) as error:
            raise _refused(error) from error
        return "".join(parts)


def _refused(error: Exception) -> InvalidRequest:
    return InvalidRequest(f"the chat template refuses the messages: {error}", param="messages")
