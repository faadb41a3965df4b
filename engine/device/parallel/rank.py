"""``python -m engine.device.parallel.rank``: one rank of a group; only its leader starts it.

It lives no longer than its leader: the kernel kills it with the thread that started it, and
where that is not heard, the end of its channel ends it, whatever it is busy with.
"""

import argparse
import ctypes
import logging
import mmap
import os
import queue
import signal
import sys
import threading
import traceback
from pathlib import Path

import torch

from engine.device.decoder import Decoder
from engine.device.draft import TextGuesser
from engine.device.parallel.channel import Channel
from engine.device.parallel.folder_header import read_spec
from engine.device.parallel.follower import Follower
from engine.device.parallel.links import Links
from engine.device.parallel.loader import Loader
from engine.device.parallel.messages import (
    Commit,
    Discard,
    Done,
    Failed,
    Layer,
    Prepare,
    Ready,
    Refused,
    Sampled,
    Start,
    Step,
    Stop,
    ToRank,
)
from engine.device.parallel.part import make_part
from engine.device.parallel.partition import Partition, part_layout
from engine.device.pool import KvPool
from engine.device.runner import Runner
from engine.speculation.choice import text_proposer
from pdserve.edge.process import log_to_stderr
from pdserve.errors import PdserveError

_PR_SET_PDEATHSIG = 1
_LOG = logging.getLogger(__name__)


class Rank:
    """A part of the model, its pool, and what it keeps of the requests."""

    def __init__(self, channel: Channel, start: Start, *, pool: int, store: int) -> None:
        """Load the part and link it to the others.

        Raises:
            PdserveError: the folder or a setting is at fault.

        """
        self._channel = channel
        self._inbox: queue.SimpleQueue[Step | Commit | Stop] = queue.SimpleQueue()
        self._sampled: queue.SimpleQueue[Sampled] = queue.SimpleQueue()
        spec = read_spec(Path(start.path))
        partition = Partition.of(spec, tp=start.tp, pp=start.pp)
        share = partition.shares[start.rank]
        self._share = share
        self._links = Links(
            partition,
            share,
            store=store,
            device="cpu",
            steps_in_flight_max=start.steps_in_flight_max,
        )
        dtype: torch.dtype = getattr(torch, start.dtype)
        layout = part_layout(spec, share, block_tokens=start.block_tokens, dtype=start.dtype)
        size_bytes = layout.pool_bytes(start.block_count)
        self._pool = KvPool(layout, start.block_count, mmap.mmap(pool, size_bytes))
        os.close(pool)

        def load(path: str) -> Decoder:
            torch.set_num_threads(start.threads)
            return make_part(
                Path(path),
                spec,
                partition,
                share,
                self._links,
                dtype=dtype,
                block_tokens=start.block_tokens,
            )

        self._model = load(start.path)
        self._loader = Loader(load, channel.send)
        is_sampler = share.rank == partition.sampler
        guesses = start.speculation
        self._runner = (
            Runner(
                start.sequences_max,
                spec.vocab_size,
                TextGuesser(text_proposer(guesses), guesses.draft_tokens),
            )
            if is_sampler
            else None
        )
        self._follower = Follower(
            start.sequences_max,
            spec.vocab_size,
            self._sampled if share.rank in partition.followers else None,
        )

    def listen(self) -> None:
        """Sort what the leader says; the leader's end is the process's."""
        try:
            while True:
                for message in self._channel.receive():
                    self._sort(message)
        except Exception:  # deaf, it would be waited for
            _LOG.exception("the rank ends")
            os._exit(1)

    def _sort(self, message: ToRank) -> None:
        match message:
            case Step() | Commit() | Stop():
                self._inbox.put(message)
            case Sampled():
                self._sampled.put(message)
            case Prepare():
                self._loader.prepare(message.number, message.path)
            case Discard():
                self._loader.discard(message.number)
            case Start():
                raise AssertionError("started twice")

    def run(self) -> None:
        """Compute until told to stop."""
        with torch.inference_mode():
            while True:
                match self._inbox.get():
                    case Step() as step:
                        self._step(step)
                    case Commit() as commit:
                        self._model = self._loader.take(commit.number)
                        self._follower.unbind()
                        if self._runner is not None:
                            self._runner.unbind()
                    case Stop():
                        self._links.close()
                        return

    def _step(self, step: Step) -> None:
        def written(layer: int) -> None:
            if step.wants_layers:
                self._channel.send(Layer(step.serial, self._share.layers.start + layer))

        if self._runner is not None:
            result = self._runner.run(step.plan, self._model, self._pool, written)
            self._channel.send(Done(step.serial, result))
            return
        rows = self._follower.rows(step.serial, step.plan, self._pool.block_count)
        if rows:
            self._model.forward(rows, self._pool, written)
        self._channel.send(Done(step.serial, None))


def main() -> int:
    """Be the rank that the leader's first message describes."""
    parser = argparse.ArgumentParser(prog="python -m engine.device.parallel.rank")
    for name in ("leader", "channel", "pool", "store"):
        parser.add_argument(f"--{name}", type=int, required=True)
    arguments = parser.parse_args()
    _die_with(arguments.leader)
    # A signal to the whole process group is the leader's: it ends its ranks when it is done.
    for number in (signal.SIGINT, signal.SIGTERM):
        signal.signal(number, signal.SIG_IGN)
    channel = Channel(arguments.channel)
    first, *rest = channel.receive()
    assert isinstance(first, Start), f"the first message is {first}"
    assert not rest, f"not waited for an answer: {rest}"
    log_to_stderr(f"rank-{first.rank} of {arguments.leader}")
    if first.cpus:
        os.sched_setaffinity(0, first.cpus)
    torch.set_num_threads(first.threads)
    try:
        rank = Rank(channel, first, pool=arguments.pool, store=arguments.store)
        threading.Thread(target=rank.listen, name="listen", daemon=True).start()
        channel.send(Ready())
        rank.run()
    except PdserveError as error:
        channel.send(Refused.of(0, error))
        return 1
    except Exception as error:
        _LOG.exception("the rank ends")
        last = traceback.extract_tb(error.__traceback__)[-1]
        place = f"{Path(last.filename).name}:{last.lineno}"
        channel.send(Failed(f"{type(error).__name__}: {error} ({place})"))
        return 1
    return 0


def _die_with(leader: int) -> None:
    """Have the kernel kill this process once the leader is gone, be it stopped or not."""
    libc = ctypes.CDLL(None, use_errno=True)
    if libc.prctl(_PR_SET_PDEATHSIG, signal.SIGKILL, 0, 0, 0):
        raise OSError(ctypes.get_errno(), "prctl(PR_SET_PDEATHSIG)")
    if os.getppid() != leader:  # it went before we asked
        os._exit(1)


if __name__ == "__main__":
    code = main()
    sys.stderr.flush()
    os._exit(code)  # threads of gloo and the listener do not end by themselves
