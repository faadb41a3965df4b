"""Looks for the part of a failing schedule that fails by itself."""

from dataclasses import replace

from sim.schedule import Schedule
from sim.world import run


def shrink(plan: Schedule) -> Schedule:
    """Drop troubles and callers, one by one, as long as some promise is still broken.

    Every drop moves the dice of what is left, so the smaller failure need not be the same.
    """
    is_smaller = True
    while is_smaller:
        is_smaller = False
        for candidate in _smaller(plan):
            if run(plan.seed, candidate).violation is not None:
                plan, is_smaller = candidate, True
                break
    return plan


def _smaller(plan: Schedule) -> list[Schedule]:
    fewer_troubles = [
        replace(plan, troubles=plan.troubles[:at] + plan.troubles[at + 1 :])
        for at in range(len(plan.troubles))
    ]
    fewer_callers = [
        replace(plan, callers=plan.callers[:at] + plan.callers[at + 1 :])
        for at in range(len(plan.callers))
        if len(plan.callers) > 1
    ]
    return fewer_troubles + fewer_callers
