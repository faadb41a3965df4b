"""A step's way over the device: laid out, launched, and read back.

Sampled tokens stay on the device, where the next step finds them by slot, so that it can be
launched before anybody has seen them.  That is how all steps run whose rows are greedy.  Where a
row draws lots the kernel may leave it open, and rows whose logits are edited always are: the host
chooses for those (``engine.device.sampler``) and writes the token back.  A step with rows that may
be open is therefore settled before the next one is launched, though not before it is laid out.
"""

from collections.abc import Callable, Iterator, Sequence
from contextlib import suppress
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

import numpy as np
import torch
from torch import Tensor

from engine.device.cuda.graphs import StepGraphs, capture_sizes
from engine.device.cuda.inputs import Batch, InputRow, Inputs, Shape
from engine.device.cuda.lanes import Lane, SamplingTable
from engine.device.cuda.model import CudaModel
from engine.device.cuda.pool import DevicePool
from engine.device.cuda.streams import Device, Event, Work
from engine.device.sampler import sample
from engine.device.slots import Slot
from engine.step import Binding, Chunk, SampledToken, StepPlan, StepResult

if TYPE_CHECKING:
    from pdserve.request import Key

_TOKENS_FIRST = 1024
NOT_FINITE = "the model gave logits that are not finite"


@dataclass(frozen=True, slots=True)
class Sample:
    """One token to come: whose, and in which row of the outputs."""

    chunk: Chunk
    slot: Slot
    row: int
    is_host: bool


@dataclass(slots=True)
class Launched:
    """A step on the device.  ``layers`` holds per layer the events behind its keys and values."""

    turn: int
    samples: tuple[Sample, ...] = ()
    may_be_open: bool = False
    layers: list[tuple[Event, ...]] = field(default_factory=list)
    ends: list[Event] = field(default_factory=list)

    def wait_quietly(self) -> None:
        """Wait until the device does nothing more for this step, whatever became of it."""
        for event in (*(event for events in self.layers for event in events), *self.ends):
            try:
                event.wait()
            except Exception:  # whoever waited first has raised it
                continue


@dataclass(frozen=True, slots=True)
class Prepared:
    """A step laid out on the host."""

    chunks: tuple[Chunk, ...]
    inputs: Inputs
    shape: Shape
    copy: Callable[[], None]
    size: int | None  # of the captured step to be replayed
    landed: tuple[int, ...]  # blocks that came from elsewhere


class DeviceSteps:
    """Owns the streams, a step's inputs and outputs, the slots and the captured steps.

    ``bind``, ``prepare`` and ``launch`` are one thread's, ``collect`` is another's.
    """

    def __init__(
        self,
        device: Device,
        model: CudaModel,
        pool: DevicePool,
        *,
        sequences_max: int,
        depth: int,
        graph_rows_max: int = 256,
    ) -> None:
        """``depth`` steps at most are between ``prepare`` and the end of ``collect``."""
        spec = model.spec
        self.device = device
        self.model = model
        self.pool = pool
        self._vocab_size = spec.vocab_size
        self._nobody = sequences_max
        self._depth = depth
        self._sequences_max = sequences_max
        blocks_max = min(pool.layout.blocks_for(spec.context_tokens_max), pool.block_count)
        self._blocks_max = blocks_max
        sizes = capture_sizes(sequences_max, graph_rows_max)
        self._narrow = self._new_inputs(sizes[-1], sizes[-1])
        self._wide = self._new_inputs(_TOKENS_FIRST, sequences_max)
        place = device.place
        self._logits = torch.zeros(
            (sequences_max, spec.vocab_size), dtype=torch.float32, device=place
        )
        # Tokens, and whether each is decided: what a step writes, one copy per step in flight
        # that no later step writes to, and where the host finds it.
        shape = (2, sequences_max)
        self._result = torch.zeros(shape, dtype=torch.int64, device=place)
        self._results = [torch.zeros_like(self._result) for _ in range(depth)]
        self._seen = [device.host_bytes(16 * sequences_max).view(torch.int64).view(shape)
                      for _ in range(depth)]  # fmt: skip
        self.last_tokens = torch.zeros(sequences_max + 1, dtype=torch.int64, device=place)
        self.sampling = SamplingTable(device, sequences_max, depth)
        self._tables = np.zeros((sequences_max, blocks_max), np.int32)
        self._lanes: list[Lane | None] = [None] * sequences_max
        self.compute = device.stream("compute")
        self.copies = device.stream("copies")
        self._probe = device.stream("probe")
        self.launch_count = 0
        self.graphs = StepGraphs(device.capture, sizes, self._fixed_step, self._addresses)
        device.settle()

    def _new_inputs(self, token_capacity: int, row_capacity: int) -> Inputs:
        return Inputs(
            self.device,
            token_capacity=token_capacity,
            row_capacity=row_capacity,
            blocks_max=self._blocks_max,
            block_tokens=self.pool.layout.block_tokens,
            nobody=self._nobody,
            turn_count=self._depth + 1,
        )

    def _addresses(self) -> tuple[int, ...]:
        outputs = (self._logits, self._result, self.last_tokens)
        owners = (self.model, self.pool, self._narrow, self.sampling)
        return (*(owner.address for owner in owners), *(one.data_ptr() for one in outputs))

    def use(self, model: CudaModel) -> None:
        """Run another model from now on; nothing is in flight.  Unbinds all slots."""
        self.graphs.forget()
        self.model = model
        self._lanes = [None] * len(self._lanes)
        self.device.settle()

    def close(self) -> None:
        """Finish what is queued and let go of the streams.  Idempotent."""
        for stream in (self.compute, self.copies, self._probe):
            with suppress(Exception):  # a device that is lost finishes nothing
                stream.close()
        self.graphs.forget()

    def find_loss(self) -> Exception | None:
        """Say what has befallen a device that can do nothing any more; None if it goes on.

        A GPU that has met a fault of its own answers everything with it, an idle stream too.
        """
        try:
            self._probe.record().wait()
        except Exception as error:
            return error
        return None

    def capture(self) -> None:
        """Capture the decode steps; raises what goes wrong."""
        # No rows at all: padding does nothing, whatever the steps before have left behind.  The
        # buffer is no step's: theirs may be filled already, and wait for this.
        _, copy = self._narrow.fill((), self._depth, self.graphs.size_max)
        self.compute.run(copy)
        self.compute.run(self.graphs.capture)
        self.compute.record().wait()

    def bind(self, bindings: Sequence[Binding], turn: int) -> None:
        """Let requests take their slots, on the host and on the device."""
        if not bindings:
            return
        slots = []
        for binding in bindings:
            table = self._tables[binding.slot]
            lane = Lane(binding, self._vocab_size, table, self.pool.block_count)
            self._lanes[binding.slot] = lane
            slots.append(lane.slot)
        self.sampling.write(slots, [binding.slot for binding in bindings], self.compute, turn)

    def prepare(self, plan: StepPlan, turn: int, *, may_replay: bool) -> Prepared | None:
        """Lay a step out on the host; None if it has no chunks."""
        if not plan.chunks:
            return None
        landed: list[int] = []
        rows = [self._row(chunk, landed) for chunk in plan.chunks]
        size = None
        if may_replay and all(chunk.token_count == 1 for chunk in plan.chunks):
            size = self.graphs.size_for(len(rows))
        inputs = self._narrow
        if size is None:
            inputs = self._roomy(sum(chunk.token_count for chunk in plan.chunks))
        shape, copy = inputs.fill(rows, turn, size)
        return Prepared(plan.chunks, inputs, shape, copy, size, tuple(landed))

    def _row(self, chunk: Chunk, landed: list[int]) -> InputRow:
        lane = self._lane(chunk)
        assert 0 <= chunk.start < chunk.stop, f"empty chunk {chunk}"
        assert not chunk.draft_count, f"nobody guesses here: {chunk}"
        size = self.pool.layout.block_tokens
        assert len(chunk.blocks) * size >= chunk.stop, f"too few blocks: {chunk}"
        if lane.is_fresh:
            landed += chunk.blocks[: self.pool.layout.blocks_for(chunk.start)]
            lane.is_fresh = False
        table = lane.place_blocks(chunk.blocks)
        tokens = lane.take_tokens(chunk)
        return InputRow(tokens, chunk.start, chunk.stop, chunk.slot, chunk.samples, table)

    def _lane(self, chunk: Chunk) -> Lane:
        lane = self._lanes[chunk.slot]
        assert lane is not None, f"slot {chunk.slot} is not bound"
        assert lane.key == chunk.key, f"slot {chunk.slot} is bound to {lane.key}, not {chunk.key}"
        return lane

    def _roomy(self, token_count: int) -> Inputs:
        """Give inputs for an eager step; they may move, and no captured step reads them."""
        if token_count > self._wide.token_capacity:
            self.compute.record().wait()  # nobody reads the old ones any more
            self._wide = self._new_inputs(1 << (token_count - 1).bit_length(), self._sequences_max)
            self.device.settle()
        return self._wide

    def note_samples(self, prepared: Prepared, launched: Launched) -> None:
        """Say which tokens will come, and whether the device can decide all of them."""
        samples = []
        for index, row in prepared.shape.samples:
            chunk = prepared.chunks[index]
            lane = self._lane(chunk)
            is_host = lane.samples_on_host(chunk.stop)
            samples.append(Sample(chunk, lane.slot, row, is_host))
        launched.samples = tuple(samples)
        slots = [sample.chunk.slot for sample in samples]
        launched.may_be_open = any(one.is_host for one in samples) or not (
            self.sampling.is_all_greedy(slots)
        )

    def launch(self, prepared: Prepared, launched: Launched, *, wants_layers: bool) -> None:
        """Queue one step on the device, and in ``launched`` the events that tell of it."""
        if prepared.size is not None and not self.graphs.is_current:
            self.capture()
        compute, copies, turn = self.compute, self.copies, launched.turn
        if self.pool.is_staged and prepared.landed:
            # What another request may share has been settled, and so has been pushed.
            compute.run(lambda: self.pool.pull(prepared.landed))
        compute.run(prepared.copy)
        if prepared.size is not None:
            size = prepared.size
            compute.run(lambda: self.graphs.replay(size))
        else:
            self._run_eagerly(prepared, launched, wants_layers=wants_layers)
        if launched.samples:
            compute.run(lambda: self._results[turn].copy_(self._result))
        computed = compute.record()
        launched.ends.append(computed)
        copies.wait_for(computed)
        if launched.samples:
            copies.run(lambda: self._seen[turn].copy_(self._results[turn], non_blocking=True))
        if self.pool.is_staged and not wants_layers:
            self._push_full(prepared.chunks)
        launched.ends.append(copies.record())
        self.launch_count += 1

    def _run_eagerly(self, prepared: Prepared, launched: Launched, *, wants_layers: bool) -> None:
        batch = prepared.inputs.batch(prepared.shape)
        count = prepared.shape.sample_count
        stages = self.model.stages(batch, self.last_tokens, self.pool, self._logits[:count])
        blocks = _written(prepared.chunks, self.pool.layout.block_tokens)
        for layer in range(self.model.spec.layer_count):
            self.compute.run(lambda: next(stages, None))
            if not wants_layers:
                continue
            event = self.compute.record()
            launched.layers.append((event,))
            if self.pool.is_staged:
                self.copies.wait_for(event)
                self.copies.run(lambda layer=layer: self.pool.push(layer, blocks))  # type: ignore[misc]
                launched.layers[-1] = (event, self.copies.record())
        self.compute.run(lambda: self._finish(stages, batch, count))

    def run_again(self, prepared: Prepared) -> None:
        """Compute an eager step, whose inputs are there, on the current stream."""
        batch = prepared.inputs.batch(prepared.shape)
        count = prepared.shape.sample_count
        stages = self.model.stages(batch, self.last_tokens, self.pool, self._logits[:count])
        for _ in stages:
            pass
        self._finish(stages, batch, count)

    def _finish(self, stages: Iterator[int], batch: Batch, count: int) -> None:
        for layer in stages:
            raise AssertionError(f"layer {layer} was not waited for")
        if count:
            self._sample(batch, self._logits[:count], self._result[:, :count])

    def _fixed_step(self, size: int) -> Work:
        """Bind a decode step to what there is now, as a capture does."""
        batch = self._narrow.batch(self._narrow.decode_shape(size))
        logits, result = self._logits[:size], self._result[:, :size]
        model, pool = self.model, self.pool

        def step() -> None:
            for _ in model.stages(batch, self.last_tokens, pool, logits):
                pass
            self._sample(batch, logits, result)

        return step

    def _sample(self, batch: Batch, logits: Tensor, result: Tensor) -> None:
        sampled = self.sampling.choose(logits, batch.slots, batch.draws)
        result[0].copy_(sampled.tokens)
        result[1].copy_(sampled.is_decided)
        self.last_tokens.index_copy_(0, batch.slots, sampled.tokens)

    def _push_full(self, chunks: Sequence[Chunk]) -> None:
        size = self.pool.layout.block_tokens
        full = [
            block
            for chunk in chunks
            for block in chunk.blocks[chunk.start // size : chunk.stop // size]
        ]
        if full:
            for layer in range(self.pool.layout.layer_count):
                self.copies.run(lambda layer=layer: self.pool.push(layer, full))  # type: ignore[misc]

    def collect(self, step: int, launched: Launched) -> StepResult:
        """Read a finished step's tokens, and choose those that the device has not decided."""
        tokens, is_decided = self._seen[launched.turn].numpy()
        chosen: dict[Key, tuple[SampledToken, ...]] = {}
        faults: dict[Key, str] = {}
        left: list[Sample] = []
        for one in launched.samples:
            if not one.is_host and is_decided[one.row]:
                token = int(tokens[one.row])
                one.slot.push(token)
                chosen[one.chunk.key] = (SampledToken(token),)
            elif not one.is_host and one.slot.is_greedy:
                # The next step may be running, and have written over the logits.
                faults[one.chunk.key] = NOT_FINITE
            else:
                left.append(one)
        for one, outcome in zip(left, self._choose(left), strict=True):
            if isinstance(outcome, str):
                faults[one.chunk.key] = outcome
            else:
                chosen[one.chunk.key] = (outcome,)
        return StepResult(step, chosen, faults)

    def _choose(self, left: Sequence[Sample]) -> list[SampledToken | str]:
        """Sample on the host; nothing has been launched since the step that left these rows."""
        if not left:
            return []
        fetched: list[Tensor] = []
        rows = torch.tensor([one.row for one in left]).to(self.device.place)
        self.copies.run(lambda: fetched.append(self._logits.index_select(0, rows).cpu()))
        self.copies.record().wait()
        outcomes = sample(fetched[0].numpy(), [one.slot for one in left])
        for one, outcome in zip(left, outcomes, strict=True):
            if isinstance(outcome, SampledToken):
                self.compute.run(
                    lambda slot=one.chunk.slot, token=outcome.token: self.last_tokens[  # type: ignore[misc]
                        slot
                    ].fill_(token)
                )
        return outcomes


def _written(chunks: Sequence[Chunk], block_tokens: int) -> list[int]:
    """Blocks that a step writes to."""
    return [
        block
        for chunk in chunks
        for block in chunk.blocks[chunk.start // block_tokens : -(-chunk.stop // block_tokens)]
    ]
