"""Protobuf messages to dataclasses and back: the only module that knows both.

Whatever comes from outside is range-checked by the dataclass it becomes; a message that does
not fit raises ``InvalidRequest`` or ``RemoteProtocolError`` and creates nothing.
"""

import re

from pdserve.ends import EndKind
from pdserve.errors import RemoteProtocolError
from pdserve.request import FinishReason, Key, Request, SamplingParams
from pdserve.status import Audit, BlockCounts, Role, WorkerInfo, WorkerStatus
from pdserve.v1 import types_pb2, worker_service_pb2

_REQUEST_ID = re.compile(r"[0-9a-f]{32}")

_ROLE_TO_WIRE = {
    Role.PREFILL: types_pb2.ROLE_PREFILL,
    Role.DECODE: types_pb2.ROLE_DECODE,
}
_ROLE_FROM_WIRE = {value: role for role, value in _ROLE_TO_WIRE.items()}

_FINISH_TO_WIRE = {
    FinishReason.STOP: types_pb2.FINISH_REASON_STOP,
    FinishReason.LENGTH: types_pb2.FINISH_REASON_LENGTH,
    FinishReason.ABORT: types_pb2.FINISH_REASON_ABORT,
    FinishReason.ERROR: types_pb2.FINISH_REASON_ERROR,
}
_FINISH_FROM_WIRE = {value: reason for reason, value in _FINISH_TO_WIRE.items()}

_END_TO_WIRE = {
    EndKind.DECLINED: worker_service_pb2.END_KIND_DECLINED,
    EndKind.PREEMPTED: worker_service_pb2.END_KIND_PREEMPTED,
    EndKind.TRANSFER_FAILED: worker_service_pb2.END_KIND_TRANSFER_FAILED,
    EndKind.FAILED: worker_service_pb2.END_KIND_FAILED,
    EndKind.ABORTED: worker_service_pb2.END_KIND_ABORTED,
    EndKind.DRAINED: worker_service_pb2.END_KIND_DRAINED,
}
_END_FROM_WIRE = {value: kind for kind, value in _END_TO_WIRE.items()}


def key_to_wire(key: Key) -> types_pb2.RequestKey:
    """Pack a key."""
    return types_pb2.RequestKey(request_id=key.request_id, attempt=key.attempt)


def key_from_wire(message: types_pb2.RequestKey) -> Key:
    """Unpack a key, or raise ``RemoteProtocolError``."""
    if not _REQUEST_ID.fullmatch(message.request_id) or message.attempt < 0:
        raise RemoteProtocolError(
            f"key is {message.request_id!r}#{message.attempt}; wanted 32 hex digits and 0 or more"
        )
    return Key(message.request_id, message.attempt)


def finish_to_wire(reason: FinishReason | None) -> types_pb2.FinishReason.ValueType:
    """Pack why a request ended; None while it goes on."""
    if reason is None:
        return types_pb2.FINISH_REASON_UNSPECIFIED
    return _FINISH_TO_WIRE[reason]


def finish_from_wire(value: types_pb2.FinishReason.ValueType) -> FinishReason | None:
    """Unpack why a request ended."""
    return _FINISH_FROM_WIRE.get(value)


def end_to_wire(key: Key, epoch: int, kind: EndKind, message: str) -> worker_service_pb2.Ended:
    """Pack why a worker let go."""
    return worker_service_pb2.Ended(
        key=key_to_wire(key), kind=_END_TO_WIRE[kind], message=message, epoch=epoch
    )


def end_kind_from_wire(value: worker_service_pb2.EndKind.ValueType) -> EndKind:
    """Unpack why a worker let go, or raise ``RemoteProtocolError``."""
    kind = _END_FROM_WIRE.get(value)
    if kind is None:
        raise RemoteProtocolError(f"end kind is {value}; wanted a known one")
    return kind


def request_to_wire(request: Request) -> types_pb2.Request:
    """Pack a request."""
    sampling = request.sampling
    count = sampling.logprob_count
    return types_pb2.Request(
        key=key_to_wire(request.key),
        prompt_tokens=request.prompt,
        emitted_tokens=request.emitted,
        output_tokens_max=request.output_tokens_max,
        output_tokens_min=request.output_tokens_min,
        stop_tokens=sorted(request.stop_tokens),
        sampling=types_pb2.SamplingParams(
            temperature=sampling.temperature,
            top_k=sampling.top_k,
            top_p=sampling.top_p,
            min_p=sampling.min_p,
            repetition_penalty=sampling.repetition_penalty,
            presence_penalty=sampling.presence_penalty,
            frequency_penalty=sampling.frequency_penalty,
            logit_bias=[
                types_pb2.LogitBias(token=token, bias=bias) for token, bias in sampling.logit_bias
            ],
            seed=sampling.seed,
            logprob_count=-1 if count is None else count,
        ),
        cache_salt=request.cache_salt,
        traceparent=request.traceparent,
        idempotency=request.idempotency,
    )


def request_from_wire(message: types_pb2.Request) -> Request:
    """Unpack a request; raises ``InvalidRequest`` naming the field at fault."""
    sampling = message.sampling
    return Request(
        key=key_from_wire(message.key),
        prompt=tuple(message.prompt_tokens),
        emitted=tuple(message.emitted_tokens),
        output_tokens_max=message.output_tokens_max,
        output_tokens_min=message.output_tokens_min,
        stop_tokens=frozenset(message.stop_tokens),
        sampling=SamplingParams(
            temperature=sampling.temperature,
            top_k=sampling.top_k,
            top_p=sampling.top_p,
            min_p=sampling.min_p,
            repetition_penalty=sampling.repetition_penalty,
            presence_penalty=sampling.presence_penalty,
            frequency_penalty=sampling.frequency_penalty,
            logit_bias=tuple((bias.token, bias.bias) for bias in sampling.logit_bias),
            seed=sampling.seed,
            logprob_count=None if sampling.logprob_count < 0 else sampling.logprob_count,
        ),
        cache_salt=message.cache_salt,
        traceparent=message.traceparent,
        idempotency=message.idempotency,
    )


def info_to_wire(info: WorkerInfo) -> types_pb2.WorkerInfo:
    """Pack a worker's identity."""
    return types_pb2.WorkerInfo(
        name=info.name,
        role=_ROLE_TO_WIRE[info.role],
        address=info.address,
        incarnation=info.incarnation,
        pid=info.pid,
        version=info.version,
        model_hash=info.model_hash,
        kv_layout_hash=info.kv_layout_hash,
        model_name=info.model_name,
        block_tokens=info.block_tokens,
        block_count=info.block_count,
        sequence_count_max=info.sequence_count_max,
        context_tokens_max=info.context_tokens_max,
        test_build=info.is_test_build,
    )


def info_from_wire(message: types_pb2.WorkerInfo) -> WorkerInfo:
    """Unpack a worker's identity, or raise ``RemoteProtocolError``."""
    role = _ROLE_FROM_WIRE.get(message.role)
    if role is None or not message.name or not message.address:
        raise RemoteProtocolError(
            f"worker {message.name!r} at {message.address!r} with role {message.role}; "
            "wanted a name, an address and a known role"
        )
    sizes = (message.block_tokens, message.block_count, message.sequence_count_max)
    if min(sizes) < 1:
        raise RemoteProtocolError(f"worker {message.name!r} has sizes {sizes}; wanted 1 or more")
    return WorkerInfo(
        name=message.name,
        role=role,
        address=message.address,
        incarnation=message.incarnation,
        pid=message.pid,
        version=message.version,
        model_hash=message.model_hash,
        kv_layout_hash=message.kv_layout_hash,
        model_name=message.model_name,
        block_tokens=message.block_tokens,
        block_count=message.block_count,
        sequence_count_max=message.sequence_count_max,
        context_tokens_max=message.context_tokens_max,
        is_test_build=message.test_build,
    )


def blocks_to_wire(blocks: BlockCounts) -> types_pb2.BlockCounts:
    """Pack a pool's counts."""
    return types_pb2.BlockCounts(
        free=blocks.free,
        used=blocks.used,
        cached=blocks.cached,
        leased=blocks.leased,
        quarantined=blocks.quarantined,
        total=blocks.total,
    )


def blocks_from_wire(message: types_pb2.BlockCounts) -> BlockCounts:
    """Unpack a pool's counts."""
    return BlockCounts(
        free=message.free,
        used=message.used,
        cached=message.cached,
        leased=message.leased,
        quarantined=message.quarantined,
        total=message.total,
    )


def status_to_wire(status: WorkerStatus) -> types_pb2.WorkerStatus:
    """Pack a heartbeat."""
    return types_pb2.WorkerStatus(
        loop_count=status.loop_count,
        step_count=status.step_count,
        steps_in_flight=status.steps_in_flight,
        step_age_s=status.step_age_s,
        request_counts=dict(status.request_counts),
        blocks=blocks_to_wire(status.blocks),
        draining=status.is_draining,
        idle=status.is_idle,
        held=status.is_held,
    )


def status_from_wire(message: types_pb2.WorkerStatus) -> WorkerStatus:
    """Unpack a heartbeat."""
    return WorkerStatus(
        loop_count=message.loop_count,
        step_count=message.step_count,
        steps_in_flight=message.steps_in_flight,
        step_age_s=message.step_age_s,
        request_counts=dict(message.request_counts),
        blocks=blocks_from_wire(message.blocks),
        is_draining=message.draining,
        is_idle=message.idle,
        is_held=message.held,
    )


def audit_to_wire(audit: Audit, info: WorkerInfo) -> worker_service_pb2.GetAuditResponse:
    """Pack an audit."""
    return worker_service_pb2.GetAuditResponse(
        worker=info_to_wire(info),
        blocks=blocks_to_wire(audit.blocks),
        slots_used=audit.slots_used,
        slots_total=audit.slots_total,
        request_counts=dict(audit.request_counts),
        session_counts=dict(audit.session_counts),
        pending_signal_count=audit.pending_signal_count,
        steps_in_flight=audit.steps_in_flight,
        undelivered_count=audit.undelivered_count,
        tombstone_count=audit.tombstone_count,
        dropped_counts=dict(audit.dropped_counts),
        conserved=audit.is_conserved,
        violation=audit.violation,
        idle=audit.is_fully_idle,
    )


def audit_from_wire(message: worker_service_pb2.GetAuditResponse) -> Audit:
    """Unpack an audit."""
    return Audit(
        blocks=blocks_from_wire(message.blocks),
        slots_used=message.slots_used,
        slots_total=message.slots_total,
        request_counts=dict(message.request_counts),
        session_counts=dict(message.session_counts),
        pending_signal_count=message.pending_signal_count,
        steps_in_flight=message.steps_in_flight,
        undelivered_count=message.undelivered_count,
        tombstone_count=message.tombstone_count,
        dropped_counts=dict(message.dropped_counts),
        violation=message.violation,
    )
