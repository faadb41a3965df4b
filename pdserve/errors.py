"""The faults a caller can meet, in one tree.

PdserveError
  InvalidRequest   the caller must change the request
  NotFound         the thing named does not exist
  Conflict         not in the present state; the message says what stands in the way
  Rejected         no room now; the caller may retry elsewhere or later
  Unavailable      the service cannot now: paused, draining, no workers
  Expired          the deadline passed
  PeerLost         the other side went away
  InvalidConfig    a setting is wrong; names the setting
  InvalidModel     a model folder is unsupported or damaged; names file and field
  ProtocolError
    LocalProtocolError    we broke the rules: a bug here
    RemoteProtocolError   they broke the rules: a bug or a version skew there

A broken invariant is none of these: it is an ``AssertionError``, and the process stops.
"""


class PdserveError(Exception):
    """Base of every fault that may cross a process boundary.

    ``code`` is the gRPC status name it travels as, ``http_status`` and ``reason`` what a
    REST caller sees; ``param`` names the field at fault, if one is.
    """

    code = "INTERNAL"
    http_status = 500
    reason = "internal"
    retryable = False

    def __init__(
        self,
        message: str,
        *,
        param: str | None = None,
        reason: str | None = None,
        retry_after_s: int | None = None,
    ) -> None:
        super().__init__(message)
        self.message = message
        self.param = param
        self.retry_after_s = retry_after_s
        if reason is not None:
            self.reason = reason


class InvalidRequest(PdserveError):
    """The request can never succeed as written."""

    code = "INVALID_ARGUMENT"
    http_status = 400
    reason = "invalid_request"


class NotFound(PdserveError):
    """The thing named does not exist."""

    code = "NOT_FOUND"
    http_status = 404
    reason = "not_found"


class Conflict(PdserveError):
    """Not possible in the present state."""

    code = "FAILED_PRECONDITION"
    http_status = 409
    reason = "conflict"


class Rejected(PdserveError):
    """No room now."""

    code = "RESOURCE_EXHAUSTED"
    http_status = 429
    reason = "queue_full"
    retryable = True


class Unavailable(PdserveError):
    """The service cannot serve this now."""

    code = "UNAVAILABLE"
    http_status = 503
    reason = "unavailable"
    retryable = True


class Expired(PdserveError):
    """The deadline passed before the work was done."""

    code = "DEADLINE_EXCEEDED"
    http_status = 504
    reason = "deadline_exceeded"


class PeerLost(PdserveError):
    """The peer stopped answering, or closed the connection half way."""

    code = "UNAVAILABLE"
    http_status = 500
    reason = "worker_lost"
    retryable = True


class InvalidConfig(PdserveError):
    """A setting is wrong; the message names it, what was seen and what was wanted."""

    code = "INVALID_ARGUMENT"


class InvalidModel(PdserveError):
    """A model folder is unsupported or damaged; the message names file and field."""

    code = "INVALID_ARGUMENT"


class ProtocolError(PdserveError):
    """A message arrived, or was about to leave, in a state that forbids it."""

    code = "FAILED_PRECONDITION"


class LocalProtocolError(ProtocolError):
    """Our own side broke the rules."""


class RemoteProtocolError(ProtocolError):
    """The other side broke the rules."""
