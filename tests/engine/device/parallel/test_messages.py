"""What is told arrives equal, however the bytes are cut on the way."""

import dataclasses
import random

import msgspec
import pytest

from engine.device.parallel.messages import (
    Commit,
    Discard,
    Done,
    Failed,
    Frames,
    FromRank,
    Layer,
    Prepare,
    Prepared,
    Ready,
    Refused,
    Sampled,
    Start,
    Step,
    Stop,
    ToRank,
    frame,
    from_rank,
    to_rank,
)
from engine.step import Binding, Chunk, SampledToken, StepPlan, StepResult
from pdserve.config import SpeculationConfig
from pdserve.errors import InvalidConfig, InvalidModel, PdserveError
from pdserve.request import SEED_LIMIT, Key, Request, SamplingParams

KEY, OTHER = Key("a" * 32, 0), Key("a" * 32, 1)
REQUEST = Request(
    KEY,
    (1, 2, 3),
    9,
    emitted=(4,),
    output_tokens_min=2,
    stop_tokens=frozenset({0, 7}),
    sampling=SamplingParams(
        temperature=0.1 + 0.2,
        top_k=3,
        top_p=1 / 3,
        min_p=0.01,
        repetition_penalty=1.1,
        presence_penalty=-0.7,
        frequency_penalty=0.3,
        logit_bias=((5, -1e30), (6, 1 / 7)),
        seed=SEED_LIMIT - 1,
        logprob_count=0,
    ),
    cache_salt=b"\x00\xff",
    traceparent="00-1",
    idempotency=b"x",
)
PLAN = StepPlan(
    12,
    (
        Chunk(KEY, 3, 0, 4, (1, 2, 3, 4), (9, 8), True),
        Chunk(OTHER, 0, 5, 8, (6, 1, 1), (1,), True, draft_count=2),
        Chunk(KEY, 3, 4, 5, (), (9, 8), False),
    ),
    (Binding(3, REQUEST, (4,)),),
)
RESULT = StepResult(
    12,
    {KEY: (SampledToken(5, -1 / 3, ((5, -1 / 3), (6, -2.5))), SampledToken(6))},
    {OTHER: "no token is left to sample"},
    {KEY: (1, 2)},
)
SPECULATION = SpeculationConfig(proposer="ngram", draft_tokens=3)
TO_RANK: list[ToRank] = [
    Start(1, 2, 3, "/a/b", "float32", 8, 99, 16, 4, 1, (0, 2), SPECULATION),
    Step(7, PLAN, True),
    Sampled(7, {KEY: (5, 6), OTHER: ()}),
    Prepare(2, "/c"),
    Commit(2),
    Discard(2),
    Stop(),
]
FROM_RANK: list[FromRank] = [
    Ready(),
    Layer(7, 3),
    Done(7, RESULT),
    Done(7, None),
    Prepared(2),
    Refused(2, "InvalidModel", "no", None),
    Failed("why"),
]


def test_every_message_arrives_equal_in_whatever_pieces() -> None:
    dice = random.Random(4)
    stream = b"".join(frame(message) for message in (*TO_RANK, *FROM_RANK))
    for _ in range(30):
        frames = Frames()
        bodies: list[bytes] = []
        start = 0
        while start < len(stream):
            size = dice.choice((1, 3, 50, 2000))
            bodies += frames.take(stream[start : start + size])
            start += size
        count = len(TO_RANK)
        assert [to_rank(body) for body in bodies[:count]] == TO_RANK
        assert [from_rank(body) for body in bodies[count:]] == FROM_RANK


def test_all_fields_of_a_plan_and_a_result_are_tried_away_from_their_defaults() -> None:
    """A field that is new must be added above; then its way over the channel is tried."""
    shown = (REQUEST, REQUEST.sampling, PLAN, PLAN.chunks[1], PLAN.bindings[0], RESULT)
    for value in (*shown, RESULT.tokens[KEY][0]):
        for field in dataclasses.fields(value):
            default = field.default
            if field.default_factory is not dataclasses.MISSING:
                default = field.default_factory()
            assert getattr(value, field.name) != default, f"{type(value).__name__}.{field.name}"


def test_no_message_of_the_other_direction_is_understood() -> None:
    with pytest.raises(msgspec.ValidationError):
        to_rank(frame(Ready())[4:])
    with pytest.raises(msgspec.ValidationError):
        from_rank(frame(Stop())[4:])


@pytest.mark.parametrize("kind", [InvalidModel, InvalidConfig, PdserveError])
def test_a_refusal_is_the_same_error_on_the_other_side(kind: type[PdserveError]) -> None:
    error = Refused.of(3, kind("file: field is 1", param="field")).error()
    assert type(error) is kind
    assert (error.message, error.param) == ("file: field is 1", "field")
