"""Why a worker let go of an attempt, other than by its last token."""

from enum import Enum


class EndKind(Enum):
    """What the router should make of it."""

    DECLINED = "declined"  # no room within the time given; another worker may have some
    PREEMPTED = "preempted"  # an older request needed the blocks; resume
    TRANSFER_FAILED = "transfer_failed"  # the hand-off broke; resume
    FAILED = "failed"  # it cannot be computed; do not try again
    ABORTED = "aborted"  # confirms an abort
    DRAINED = "drained"  # the worker is leaving; resume elsewhere
