"""A step's inputs, at addresses that do not change.

Filled on the host, in one of several buffers that are used in turn, and copied to the device by
one copy.  Whatever lies between the batch's rows and the size of the capture that will read
them is filled too, with rows that do nothing: no place to store to, no length, nobody's slot.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from engine.device.cuda.streams import Device

_ALIGNMENT_BYTES = 64


@dataclass(frozen=True, slots=True)
class InputRow:
    """One chunk.  Without ``tokens`` its one token is the last one sampled for ``slot``."""

    tokens: tuple[int, ...]
    start: int
    stop: int
    slot: int
    samples: bool
    blocks: NDArray[np.int32]


@dataclass(frozen=True, slots=True)
class Shape:
    """What the host has to know of a filled step.

    The first ``decode_count`` of ``row_count`` rows have one token each.  ``samples`` pairs each
    given row that wants a sample with which of the ``sample_count`` it is.
    """

    token_count: int
    row_count: int
    decode_count: int
    sample_count: int
    queries_max: int
    length_max: int
    samples: tuple[tuple[int, int], ...]


@dataclass(frozen=True, slots=True)
class Batch:
    """The inputs of one step, on the device.

    tokens, sources, positions, places: [token] int64; a source is the slot whose last token is
    taken, or -1; a place is block * block_tokens + offset, or -1.
    lengths: [row] int32; tables: [row, blocks_max] int32; query_starts: int32, of the rows
    beyond the decode rows, counted from their first token.
    wanted, slots, draws: [sample] int64: a token of the batch, whose slot, and the position of
    the token to be drawn.
    """

    tokens: Tensor
    sources: Tensor
    positions: Tensor
    places: Tensor
    lengths: Tensor
    tables: Tensor
    query_starts: Tensor
    wanted: Tensor
    slots: Tensor
    draws: Tensor
    decode_count: int
    queries_max: int
    length_max: int


class Inputs:
    """Memory for steps of up to ``token_capacity`` tokens in ``row_capacity`` rows."""

    def __init__(
        self,
        device: Device,
        *,
        token_capacity: int,
        row_capacity: int,
        blocks_max: int,
        block_tokens: int,
        nobody: int,
        turn_count: int,
    ) -> None:
        """``nobody`` is the slot of rows that are none."""
        self.token_capacity = token_capacity
        self.row_capacity = row_capacity
        self._blocks_max = blocks_max
        self._block_tokens = block_tokens
        self._nobody = nobody
        counts = {
            "tokens": token_capacity,
            "sources": token_capacity,
            "positions": token_capacity,
            "places": token_capacity,
            "wanted": row_capacity,
            "slots": row_capacity,
            "draws": row_capacity,
            "lengths": row_capacity,
            "query_starts": row_capacity + 1,
            "tables": row_capacity * blocks_max,
        }
        self._sections: dict[str, tuple[int, int, torch.dtype]] = {}
        stop = 0
        for name, count in counts.items():
            start = -(-stop // _ALIGNMENT_BYTES) * _ALIGNMENT_BYTES
            is_narrow = name in ("lengths", "query_starts", "tables")
            stop = start + count * (4 if is_narrow else 8)
            self._sections[name] = (start, stop, torch.int32 if is_narrow else torch.int64)
        self._bytes = torch.zeros(stop, dtype=torch.uint8, device=device.place)
        self._columns = self._split(self._bytes)
        self._turns = [device.host_bytes(stop) for _ in range(turn_count)]
        self._arrays = [
            {name: column.numpy() for name, column in self._split(turn).items()}
            for turn in self._turns
        ]

    def __repr__(self) -> str:
        return f"<Inputs {self.token_capacity} tokens, {self.row_capacity} rows>"

    @property
    def address(self) -> int:
        """Where kernels read."""
        return self._bytes.data_ptr()

    def _split(self, whole: Tensor) -> dict[str, Tensor]:
        columns = {
            name: whole[start:stop].view(dtype)
            for name, (start, stop, dtype) in self._sections.items()
        }
        columns["tables"] = columns["tables"].view(self.row_capacity, self._blocks_max)
        return columns

    def fill(
        self, rows: Sequence[InputRow], turn: int, size: int | None = None
    ) -> tuple[Shape, Callable[[], None]]:
        """Write a step down, and give what copies it to the device, on a stream.

        With ``size`` all rows are of one token, and neutral rows follow up to that many.
        The buffer of this ``turn`` is free again once that copy is done.
        """
        shape = (
            self._fill_ragged(rows, self._arrays[turn])
            if size is None
            else self._fill_decode(rows, self._arrays[turn], size)
        )
        stop = self._sections["tables"][0] + 4 * shape.row_count * self._blocks_max
        source, target = self._turns[turn][:stop], self._bytes[:stop]

        def copy() -> None:
            target.copy_(source, non_blocking=True)

        return shape, copy

    def batch(self, shape: Shape) -> Batch:
        """See the device's side of a step of this shape."""
        columns = self._columns
        tokens = {
            name: columns[name][: shape.token_count]
            for name in ("tokens", "sources", "positions", "places")
        }
        samples = {
            name: columns[name][: shape.sample_count] for name in ("wanted", "slots", "draws")
        }
        rest = shape.row_count - shape.decode_count
        return Batch(
            **tokens,
            **samples,
            lengths=columns["lengths"][: shape.row_count],
            tables=columns["tables"][: shape.row_count],
            query_starts=columns["query_starts"][: rest + 1],
            decode_count=shape.decode_count,
            queries_max=shape.queries_max,
            length_max=shape.length_max,
        )

    def decode_shape(self, size: int) -> Shape:
        """Give the shape of a padded step of ``size`` rows, of any length there is room for."""
        length_max = self._blocks_max * self._block_tokens
        return Shape(size, size, size, size, 1, length_max, ())

    def _fill_decode(
        self, rows: Sequence[InputRow], arrays: dict[str, NDArray[np.int64]], size: int
    ) -> Shape:
        count = len(rows)
        assert count <= size <= min(self.token_capacity, self.row_capacity), f"{count} in {size}"
        assert all(row.stop - row.start == 1 for row in rows), "a row of several tokens"
        self._fill_rows(rows, arrays)
        arrays["slots"][:count] = [row.slot if row.samples else self._nobody for row in rows]
        arrays["draws"][:count] = [row.stop for row in rows]
        arrays["wanted"][:size] = np.arange(size)
        for name, neutral in (
            ("tokens", 0),
            ("sources", -1),
            ("positions", 0),
            ("places", -1),
            ("lengths", 0),
            ("slots", self._nobody),
            ("draws", 0),
        ):
            arrays[name][count:size] = neutral
        samples = tuple((index, index) for index in range(count) if rows[index].samples)
        return replace(self.decode_shape(size), samples=samples)

    def _fill_ragged(self, rows: Sequence[InputRow], arrays: dict[str, NDArray[np.int64]]) -> Shape:
        counts = [row.stop - row.start for row in rows]
        order = sorted(range(len(rows)), key=lambda index: counts[index] > 1)
        ordered = [rows[index] for index in order]
        decode_count = counts.count(1)
        stops = np.cumsum([counts[index] for index in order])
        assert stops[-1] <= self.token_capacity, f"{stops[-1]} tokens in {self!r}"
        assert len(rows) <= self.row_capacity, f"{len(rows)} rows in {self!r}"
        self._fill_rows(ordered, arrays)
        starts = arrays["query_starts"]
        starts[0] = 0
        starts[1 : len(rows) - decode_count + 1] = stops[decode_count:] - decode_count
        sampled = [at for at, row in enumerate(ordered) if row.samples]
        count = len(sampled)
        arrays["wanted"][:count] = stops[sampled] - 1
        arrays["slots"][:count] = [ordered[at].slot for at in sampled]
        arrays["draws"][:count] = [ordered[at].stop for at in sampled]
        return Shape(
            token_count=int(stops[-1]),
            row_count=len(rows),
            decode_count=decode_count,
            sample_count=count,
            queries_max=max(counts),
            length_max=max(row.stop for row in rows),
            samples=tuple((order[at], sample) for sample, at in enumerate(sampled)),
        )

    def _fill_rows(self, rows: Sequence[InputRow], arrays: dict[str, NDArray[np.int64]]) -> None:
        """Write tokens, their positions and places, and each row's length and blocks.

        Through lists: of a decode step's many rows of one token, each number written into an
        array for itself would cost more than all the rest.
        """
        size = self._block_tokens
        tokens: list[int] = []
        sources: list[int] = []
        positions: list[int] = []
        places: list[int] = []
        for index, row in enumerate(rows):
            count = row.stop - row.start
            block_count = -(-row.stop // size)
            assert block_count <= self._blocks_max, f"{row.stop} tokens in {self!r}"
            tokens += row.tokens or (0,)
            sources += [-1 if row.tokens else row.slot] * count
            positions += range(row.start, row.stop)
            if count == 1:
                places.append(int(row.blocks[row.start // size]) * size + row.start % size)
            else:
                at = np.arange(row.start, row.stop)
                places += (row.blocks[at // size].astype(np.int64) * size + at % size).tolist()
            arrays["tables"][index, :block_count] = row.blocks[:block_count]
        columns = {"tokens": tokens, "sources": sources, "positions": positions, "places": places}
        for name, values in columns.items():
            arrays[name][: len(values)] = values
        arrays["lengths"][: len(rows)] = [row.stop for row in rows]
