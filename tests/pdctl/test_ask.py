import pytest

from pdctl.ask import pieces
from pdctl.exits import Failure


def event(text: str) -> str:
    return f'data: {{"choices": [{{"delta": {{"content": "{text}"}}}}]}}'


def test_the_pieces_come_in_order_and_end_with_the_stream() -> None:
    lines = [event("a"), "", ": a comment", 'data: {"choices": []}', event("b"), "data: [DONE]"]
    assert list(pieces(iter(lines))) == ["a", "b"]


def test_an_error_event_is_a_failure_after_what_came_before_it() -> None:
    answer = pieces(iter([event("a"), 'data: {"error": {"message": "worker lost"}}']))
    assert next(answer) == "a"
    with pytest.raises(Failure, match="worker lost"):
        next(answer)


def test_a_stream_that_breaks_off_is_a_failure() -> None:
    with pytest.raises(Failure, match="broke off"):
        list(pieces(iter([event("a")])))


def test_the_model_cannot_command_the_terminal() -> None:
    assert list(pieces(iter([event("\\u001b[2J\\n"), "data: [DONE]"]))) == ["\ufffd[2J\n"]
