"""Reading single fields of a request body: type, range, and a message that names the field.

``true`` is not a number, ``1.5`` is not a whole number, and null means "not given".
"""

from collections.abc import Mapping
from typing import Any, NoReturn

from msgspec import DecodeError, json

from pdserve.errors import InvalidRequest

JSON_DEPTH_MAX = 64


def decode_object(body: bytes) -> "Fields":
    """Decode a body that must be one JSON object, nested no deeper than ``JSON_DEPTH_MAX``.

    Raises:
        InvalidRequest: it is not.

    """
    if not body:
        raise InvalidRequest("the body is empty; wanted a JSON object")
    try:
        value = json.decode(body)
    except RecursionError:
        raise InvalidRequest(f"the JSON is nested deeper than {JSON_DEPTH_MAX}") from None
    except (DecodeError, UnicodeDecodeError, ValueError) as error:
        raise InvalidRequest(f"the body is not JSON: {error}") from None
    if not isinstance(value, dict):
        raise InvalidRequest("the body is not a JSON object")
    # So few brackets cannot nest too deep: most bodies are not walked.
    if body.count(b"[") + body.count(b"{") > JSON_DEPTH_MAX:
        _check_depth(value)
    return Fields(value)


def _check_depth(value: Any) -> None:
    level: list[Any] = [value]
    for _ in range(JSON_DEPTH_MAX):
        inner: list[Any] = []
        for one in level:
            members = one.values() if type(one) is dict else one
            inner += [member for member in members if type(member) in (dict, list)]
        if not inner:
            return
        level = inner
    raise InvalidRequest(f"the JSON is nested deeper than {JSON_DEPTH_MAX}")


class Fields:
    """A decoded object, read field by field."""

    def __init__(self, values: Mapping[str, Any]) -> None:
        self._values = values

    def get(self, name: str) -> Any:
        """Give the plain value, None where it is null or missing."""
        return self._values.get(name)

    def whole(self, name: str, low: int, high: int) -> int | None:
        """Read a whole number."""
        value = self._values.get(name)
        if value is None:
            return None
        if type(value) is not int or not low <= value <= high:
            self.fail(name, value, f"a whole number from {low} to {high}")
        return value

    def number(self, name: str, low: float, high: float) -> float | None:
        """Read a finite number."""
        value = self._values.get(name)
        if value is None:
            return None
        # Written so that NaN fails too.
        if type(value) not in (int, float) or not low <= value <= high:
            self.fail(name, value, f"a number from {low:g} to {high:g}")
        return float(value)

    def flag(self, name: str) -> bool | None:
        """Read true or false."""
        value = self._values.get(name)
        if value is None or isinstance(value, bool):
            return value
        return self.fail(name, value, "true or false")

    def text(self, name: str, length_max: int) -> str | None:
        """Read a text."""
        value = self._values.get(name)
        if value is None:
            return None
        if not isinstance(value, str):
            self.fail(name, value, "a text")
        if len(value) > length_max:
            self.fail(name, value, f"at most {length_max} characters")
        return value

    def inner(self, name: str) -> "Fields | None":
        """Read an object."""
        value = self._values.get(name)
        if value is None:
            return None
        if not isinstance(value, dict):
            self.fail(name, value, "an object")
        return Fields(value)

    def entries(self, name: str, count_max: int) -> list[Any] | None:
        """Read a list of anything."""
        value = self._values.get(name)
        if value is None:
            return None
        if not isinstance(value, list):
            self.fail(name, value, "a list")
        if len(value) > count_max:
            self.fail(name, f"{len(value)} entries", f"at most {count_max}")
        return value

    def fail(self, name: str, seen: object, wanted: str) -> NoReturn:
        """Refuse a field.

        Raises:
            InvalidRequest: always.

        """
        raise InvalidRequest(f"{name} is {shown(seen)}; wanted {wanted}", param=name)


def shown(value: object) -> str:
    """Quote what a client sent, in short: messages must not grow with the input."""
    if isinstance(value, list | dict):
        return f"a {'list' if isinstance(value, list) else 'object'} of {len(value)}"
    if type(value) is int and value.bit_length() > 128:
        return "a very large number"
    text = repr(value)
    return text if len(text) <= 64 else text[:61] + "..."
