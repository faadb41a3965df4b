import pytest
from hypothesis import given, strategies as st

from pdserve import wire
from pdserve.ends import EndKind
from pdserve.errors import InvalidRequest, RemoteProtocolError
from pdserve.request import FinishReason, Key, Request, SamplingParams
from pdserve.status import Audit, BlockCounts, Role, WorkerInfo, WorkerStatus
from pdserve.v1 import types_pb2, worker_service_pb2

ID = "0123456789abcdef" * 2
tokens = st.integers(0, 2**31 - 1)
samplings = st.builds(
    SamplingParams,
    temperature=st.floats(0, 2),
    top_k=st.integers(0, 1000),
    top_p=st.floats(0.001, 1),
    min_p=st.floats(0, 1),
    repetition_penalty=st.floats(0.1, 10),
    presence_penalty=st.floats(-2, 2),
    frequency_penalty=st.floats(-2, 2),
    logit_bias=st.lists(st.tuples(tokens, st.floats(-100, 100))).map(tuple),
    seed=st.integers(0, 2**64 - 1),
    logprob_count=st.none() | st.integers(0, 20),
)
requests = st.builds(
    Request,
    key=st.builds(Key, st.just(ID), st.integers(0, 100)),
    prompt=st.lists(tokens, min_size=1).map(tuple),
    emitted=st.lists(tokens, max_size=5).map(tuple),
    output_tokens_max=st.integers(6, 1000),
    output_tokens_min=st.integers(0, 6),
    stop_tokens=st.frozensets(tokens),
    sampling=samplings,
    cache_salt=st.binary(),
    traceparent=st.text(),
)


@given(requests)
def test_a_request_survives_the_wire(request: Request) -> None:
    message = types_pb2.Request.FromString(wire.request_to_wire(request).SerializeToString())
    assert wire.request_from_wire(message) == request


@pytest.mark.parametrize("request_id", ["", "x" * 32, ID.upper(), ID + "0", ID + "\n"])
def test_a_malformed_key_is_refused(request_id: str) -> None:
    with pytest.raises(RemoteProtocolError, match="32 hex digits"):
        wire.key_from_wire(types_pb2.RequestKey(request_id=request_id))


def test_a_negative_attempt_is_refused() -> None:
    with pytest.raises(RemoteProtocolError):
        wire.key_from_wire(types_pb2.RequestKey(request_id=ID, attempt=-1))


def test_a_request_without_a_prompt_is_refused_with_the_field_named() -> None:
    message = types_pb2.Request(key=types_pb2.RequestKey(request_id=ID), output_tokens_max=1)
    message.sampling.top_p = 1
    message.sampling.repetition_penalty = 1
    with pytest.raises(InvalidRequest, match="prompt is 'empty'"):
        wire.request_from_wire(message)


@pytest.mark.parametrize("reason", [None, *FinishReason])
def test_finish_reasons_survive_the_wire(reason: FinishReason | None) -> None:
    assert wire.finish_from_wire(wire.finish_to_wire(reason)) is reason


@pytest.mark.parametrize("kind", EndKind)
def test_end_kinds_survive_the_wire(kind: EndKind) -> None:
    message = wire.end_to_wire(Key(ID, 3), 2, kind, "why")
    assert wire.end_kind_from_wire(message.kind) is kind
    assert (wire.key_from_wire(message.key), message.epoch) == (Key(ID, 3), 2)


def test_an_unknown_end_kind_is_refused() -> None:
    with pytest.raises(RemoteProtocolError, match="end kind"):
        wire.end_kind_from_wire(worker_service_pb2.END_KIND_UNSPECIFIED)


INFO = WorkerInfo(
    name="decode-0",
    role=Role.DECODE,
    address="127.0.0.1:1",
    incarnation=2**63,
    pid=7,
    version="0.1.0",
    model_hash="m",
    kv_layout_hash="k",
    model_name="demo",
    block_tokens=16,
    block_count=4,
    sequence_count_max=2,
    context_tokens_max=99,
)


def test_a_worker_survives_the_wire() -> None:
    assert wire.info_from_wire(wire.info_to_wire(INFO)) == INFO


@pytest.mark.parametrize(
    ("field", "value"), [("name", ""), ("address", ""), ("role", 0), ("block_count", 0)]
)
def test_a_worker_that_makes_no_sense_is_refused(field: str, value: object) -> None:
    message = wire.info_to_wire(INFO)
    setattr(message, field, value)
    with pytest.raises(RemoteProtocolError):
        wire.info_from_wire(message)


def test_status_and_audit_survive_the_wire() -> None:
    blocks = BlockCounts(1, 2, 3, 4, 5, 15)
    status = WorkerStatus(9, 8, 2, 0.5, {"running": 3}, blocks, True, False)
    assert wire.status_from_wire(wire.status_to_wire(status)) == status
    audit = Audit(blocks, 1, 2, {"running": 1}, {"open": 1}, 3, 4, 5, 6, {"stale": 7}, "broken")
    assert wire.audit_from_wire(wire.audit_to_wire(audit, INFO)) == audit
