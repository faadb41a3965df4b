"""A rank's links to the other ranks of its group, on torch.distributed.

Sums are taken in the order of the lanes, by every lane for itself: a library's all-reduce cuts
its tensor in pieces, adds each in another order, and the cut depends on how many rows there are,
so that a row's last bit would depend on who shares the batch (V16).
"""

import os
from collections import deque
from datetime import timedelta

import torch.distributed as dist
from torch import Tensor

from engine.device.parallel.partition import Partition, Share

_WAIT_S_MAX = 600.0
_BACKENDS = {"cpu": "gloo", "cuda": "nccl"}


class Links:
    """Of one rank; all of a group call the same methods in the same order."""

    def __init__(
        self,
        partition: Partition,
        share: Share,
        *,
        store: int,
        device: str,
        steps_in_flight_max: int,
    ) -> None:
        """Meet the others in ``store``, a descriptor of an empty file that all inherited.

        The file has no name, so nobody else finds the rendezvous and nothing stays behind.
        """
        tp = partition.tp
        # Loopback only: a group lives on one machine, and gloo listens where the host's name says.
        os.environ["GLOO_SOCKET_IFNAME"] = "lo"
        os.environ["NCCL_SOCKET_IFNAME"] = "lo"
        dist.init_process_group(
            _BACKENDS[device],
            store=dist.FileStore(  # type: ignore[attr-defined]
                f"/proc/self/fd/{store}", len(partition.shares)
            ),
            rank=share.rank,
            world_size=len(partition.shares),
            timeout=timedelta(seconds=_WAIT_S_MAX),
        )
        lanes = [list(range(stage * tp, (stage + 1) * tp)) for stage in range(partition.pp)]
        groups = [dist.new_group(ranks) for ranks in lanes]  # every rank makes all of them
        self._lanes = groups[share.stage]
        self._tp = tp
        self._lane = share.lane
        self._before = share.rank - tp
        self._after = share.rank + tp
        self._sent: deque[tuple[dist.Work, Tensor]] = deque()
        self._sent_max = steps_in_flight_max

    def total(self, part: Tensor) -> Tensor:
        """Sum contiguous ``part`` over the lanes."""
        if self._tp == 1:
            return part
        parts = part.new_empty((self._tp, *part.shape))
        dist.all_gather(list(parts.unbind()), part, group=self._lanes)
        whole = parts[0]
        for other in parts[1:]:
            whole += other
        return whole

    def join(self, part: Tensor) -> Tensor | None:
        """Lay the lanes' parts [lane, *part.shape] beside each other, on the first lane only."""
        if self._lane:
            dist.gather(part, None, group=self._lanes, group_dst=0)
            return None
        parts = part.new_empty((self._tp, *part.shape))
        if self._tp == 1:
            return part.unsqueeze(0)
        dist.gather(part, list(parts.unbind()), group=self._lanes, group_dst=0)
        return parts

    def send(self, hidden: Tensor) -> None:
        """Send a step's rows to the next stage, and go on: it may be at an earlier step."""
        while len(self._sent) >= self._sent_max:  # that step has ended everywhere
            self._sent.popleft()[0].wait()
        work = dist.isend(hidden, self._after)
        assert work is not None
        self._sent.append((work, hidden))

    def receive(self, rows: Tensor) -> Tensor:
        """Fill ``rows`` with what the stage before sent for this step."""
        dist.recv(rows, self._before)
        return rows

    def close(self) -> None:
        """Wait until the others have what was sent, and part."""
        for work, _ in self._sent:
            work.wait()
        self._sent.clear()
        dist.destroy_process_group()
