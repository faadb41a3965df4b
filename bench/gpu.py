"""``python -m bench.gpu``: decode and prefill steps on a GPU, against what it can do at best.

A decode step has to read all weights, and the keys and values of every row: what it moves per
second is held against the rate at which this GPU copies memory.  A prefill step has to multiply:
its operations per second are held against those of a large bfloat16 product.  Weights are
random, which costs as much as any.  Beside them, the same step as plain torch, compiled by
torch, and attention alone: ours, torch's, FlashAttention's where it is installed.

Refuses where there is no GPU: its figures would mean nothing.
"""

import argparse
import importlib.util
import json
import sys
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from functools import partial
from pathlib import Path
from statistics import median
from time import perf_counter
from typing import Any

import torch
from torch import Tensor

from bench.gpu_plain import PlainModel, flash_attention, plain_attention
from bench.record import circumstances, write
from engine.device.cuda.streams import CudaDevice, Device, Stream
from engine.device.decoder import tensor_shapes
from engine.device.spec import ModelSpec, parse_config
from engine.step import Binding, Chunk, StepPlan
from pdserve.layout import ELEMENT_BYTES, KvLayout
from pdserve.request import Key, Request, SamplingParams

DECODE_TARGET, DECODE_ROWS_MIN = 0.75, 64
PREFILL_TARGET = 0.6
BLOCK_TOKENS = 16
_ROUNDS, _CALLS, _WARM_UP = 5, 20, 3
_DEVIATION = 0.02
_LLAMA = {"architectures": ["LlamaForCausalLM"], "max_position_embeddings": 16384}
CONFIGS: dict[str, dict[str, Any]] = {
    "1b": {
        "hidden_size": 2048,
        "intermediate_size": 8192,
        "num_hidden_layers": 16,
        "num_attention_heads": 32,
        "num_key_value_heads": 8,
        "head_dim": 64,
        "vocab_size": 128256,
        "tie_word_embeddings": True,
    },
    "8b": {
        "hidden_size": 4096,
        "intermediate_size": 14336,
        "num_hidden_layers": 32,
        "num_attention_heads": 32,
        "num_key_value_heads": 8,
        "head_dim": 128,
        "vocab_size": 128256,
        "tie_word_embeddings": False,
    },
}


@dataclass(frozen=True, slots=True)
class Figure:
    """One timed step.  ``fraction`` is of the GPU's best, where there is one to compare with."""

    what: str
    way: str
    rows: int
    tokens: int
    seconds: float
    fraction: float | None = None
    target: float | None = None

    @property
    def verdict(self) -> str:
        """Whether the target is met, where there is one."""
        if self.target is None or self.fraction is None:
            return ""
        return "met" if self.fraction >= self.target else "missed"


@dataclass(frozen=True, slots=True)
class Effort:
    """How long to measure."""

    rounds: int = _ROUNDS
    calls: int = _CALLS
    warm_up: int = _WARM_UP


def make_spec(name: str) -> ModelSpec:
    """Give a shape of ``CONFIGS``."""
    return parse_config({**_LLAMA, **CONFIGS[name]}, name)


def linear_count(spec: ModelSpec) -> int:
    """Count the weights that every token is multiplied by, the head's left out."""
    shapes = tensor_shapes(spec).items()
    return sum(
        shape[0] * shape[1]
        for name, shape in shapes
        if len(shape) == 2 and name.startswith("model.layers.")
    )


def decode_bytes(spec: ModelSpec, rows: int, context: int, element_bytes: int) -> int:
    """Bytes a decode step cannot do without: weights and head once, each row's context."""
    head = spec.vocab_size * spec.hidden_size
    per_token = 2 * spec.layer_count * spec.kv_head_count * spec.head_dim
    return element_bytes * (linear_count(spec) + head + rows * context * per_token)


def prefill_operations(spec: ModelSpec, tokens: int) -> int:
    """Multiplications and additions of a prompt's linear layers and causal attention.

    The head is left out: one row of many needs it.
    """
    pairs = tokens * (tokens + 1) // 2
    attention = 4 * spec.layer_count * spec.head_count * spec.head_dim * pairs
    return 2 * linear_count(spec) * tokens + attention


def seconds_of(stream: Stream, call: Callable[[], object], effort: Effort) -> float:
    """Time one call: the median of rounds, each of several calls queued without a wait."""
    taken = []
    for _ in range(effort.warm_up):
        stream.run(call)
    for _ in range(effort.rounds):
        stream.record().wait()
        start = perf_counter()
        for _ in range(effort.calls):
            stream.run(call)
        stream.record().wait()
        taken.append((perf_counter() - start) / effort.calls)
    return median(taken)


def copy_rate(device: Device, stream: Stream, size_bytes: int, effort: Effort) -> float:
    """Bytes per second, read and written ones."""
    source = torch.ones(size_bytes, dtype=torch.uint8, device=device.place)
    target = torch.empty_like(source)
    device.settle()
    return 2 * size_bytes / seconds_of(stream, lambda: target.copy_(source), effort)


def product_rate(device: Device, stream: Stream, size: int, effort: Effort) -> float:
    """Operations per second of a square bfloat16 product."""
    left = torch.randn(size, size, device=device.place).bfloat16()
    right = torch.randn(size, size, device=device.place).bfloat16()
    out = torch.empty_like(left)
    device.settle()
    return 2 * size**3 / seconds_of(stream, lambda: torch.mm(left, right, out=out), effort)


def random_weights(spec: ModelSpec, dtype: torch.dtype, place: torch.device) -> dict[str, Tensor]:
    """Give every tensor of a folder, on the device."""
    torch.manual_seed(20)
    return {
        name: torch.ones(shape, dtype=dtype, device=place)
        if name.endswith("norm.weight")
        else torch.randn(shape, dtype=dtype, device=place).mul_(_DEVIATION)
        for name, shape in tensor_shapes(spec).items()
    }


class Ours:
    """Steps of our own on a pool that holds ``rows`` sequences of ``context`` tokens."""

    def __init__(
        self, device: Device, spec: ModelSpec, dtype: torch.dtype, rows: int, context: int
    ) -> None:
        # Importing the kernels needs Triton, and whoever has no GPU is told so first.
        from engine.device.cuda.model import CudaModel
        from engine.device.cuda.pool import DevicePool
        from engine.device.cuda.steps import DeviceSteps

        layout = KvLayout(
            spec.layer_count,
            BLOCK_TOKENS,
            spec.kv_head_count,
            spec.head_dim,
            str(dtype).removeprefix("torch."),
        )
        self._context = context
        self._each = layout.blocks_for(context)
        self.steps = DeviceSteps(
            device,
            CudaModel(device, spec, random_weights(spec, dtype, device.place)),
            DevicePool(device, layout, rows * self._each),
            sequences_max=rows,
            depth=2,
            graph_rows_max=rows,
        )
        self.steps.capture()

    def decode(self, rows: int, *, is_captured: bool) -> Callable[[], object]:
        """Lay out a decode step and give what repeats it, on the compute stream."""
        chunks = tuple(self._chunk(slot, self._context - 1, self._context) for slot in range(rows))
        steps = self.steps
        plan = StepPlan(0, chunks, tuple(self._binding(slot) for slot in range(rows)))
        steps.bind(plan.bindings, 0)
        prepared = steps.prepare(plan, 0, may_replay=is_captured)
        assert prepared is not None
        steps.compute.run(prepared.copy)
        if prepared.size is not None:
            size = prepared.size
            return lambda: steps.graphs.replay(size)
        return lambda: steps.run_again(prepared)

    def prefill(self, tokens: int) -> Callable[[], object]:
        """Lay out one prompt's step and give what repeats it."""
        steps = self.steps
        plan = StepPlan(0, (self._chunk(0, 0, tokens),), (self._binding(0),))
        steps.bind(plan.bindings, 0)
        prepared = steps.prepare(plan, 0, may_replay=False)
        assert prepared is not None
        steps.compute.run(prepared.copy)
        return lambda: steps.run_again(prepared)

    def _binding(self, slot: int) -> Binding:
        request = Request(_key(slot), (1,), 1, sampling=SamplingParams(temperature=0.0))
        return Binding(slot, request, ())

    def _chunk(self, slot: int, start: int, stop: int) -> Chunk:
        blocks = tuple(range(slot * self._each, (slot + 1) * self._each))
        tokens = tuple(at % 100 for at in range(start, stop))
        return Chunk(_key(slot), slot, start, stop, tokens, blocks, True)


def _key(slot: int) -> Key:
    return Key(f"{slot:032x}", 0)


def measure_ours(
    ours: Ours, spec: ModelSpec, rows: Sequence[int], context: int, rates: tuple[float, float],
    effort: Effort,
) -> list[Figure]:  # fmt: skip
    """Time decode steps, captured and not, and a prompt; ``rates`` are copy's and product's."""
    figures = []
    stream = ours.steps.compute
    element_bytes = ELEMENT_BYTES[ours.steps.pool.layout.dtype]
    for count in rows:
        moved = decode_bytes(spec, count, context, element_bytes)
        for way, is_captured in (("captured", True), ("eager", False)):
            seconds = seconds_of(stream, ours.decode(count, is_captured=is_captured), effort)
            target = DECODE_TARGET if is_captured and count >= DECODE_ROWS_MIN else None
            fraction = moved / seconds / rates[0]
            figures.append(Figure("decode", way, count, context, seconds, fraction, target))
    seconds = seconds_of(stream, ours.prefill(context), effort)
    fraction = prefill_operations(spec, context) / seconds / rates[1]
    figures.append(Figure("prefill", "eager", 1, context, seconds, fraction, PREFILL_TARGET))
    return figures


def measure_plain(
    device: Device, spec: ModelSpec, dtype: torch.dtype, rows: Sequence[int], context: int,
    copy_bytes_s: float, effort: Effort, *, compiles: bool,
) -> list[Figure]:  # fmt: skip
    """Time the same decode step in plain torch, and compiled."""
    figures = []
    model = PlainModel(spec, random_weights(spec, dtype, device.place))
    stream = device.stream("plain")
    for count in rows:
        moved = decode_bytes(spec, count, context, ELEMENT_BYTES[str(dtype).removeprefix("torch.")])
        state = model.state(count, context)
        device.settle()
        ways: list[tuple[str, Callable[[], object]]] = [("torch", partial(model.step, state))]
        if compiles:
            compiled = torch.compile(model.step, mode="max-autotune-no-cudagraphs", dynamic=False)
            ways.append(("torch.compile", partial(compiled, state)))
        for way, call in ways:
            seconds = seconds_of(stream, call, effort)
            fraction = moved / seconds / copy_bytes_s
            figures.append(Figure("decode", way, count, context, seconds, fraction))
    stream.close()
    return figures


def measure_attention(
    device: Device, spec: ModelSpec, dtype: torch.dtype, rows: Sequence[int], context: int,
    copy_bytes_s: float, effort: Effort,
) -> list[Figure]:  # fmt: skip
    """Time one layer's decode attention: ours, torch's, and FlashAttention's if there is one."""
    from engine.device import kernels

    figures = []
    stream = device.stream("attention")
    heads, kv_heads, dim = spec.head_count, spec.kv_head_count, spec.head_dim
    each = -(-context // BLOCK_TOKENS)
    for count in rows:
        pool = torch.randn(
            (count * each, 2, BLOCK_TOKENS, kv_heads, dim), dtype=dtype, device=device.place
        )
        queries = torch.randn(count, heads, dim, dtype=dtype, device=device.place)
        tables = torch.arange(count * each, dtype=torch.int32, device=device.place).view(
            count, each
        )
        lengths = torch.full((count,), context, dtype=torch.int32, device=device.place)
        device.settle()
        ways: list[tuple[str, Callable[[], object] | None]] = [
            ("ours", partial(kernels.decode_attention, queries, pool, tables, lengths)),
            ("torch SDPA, one piece", plain_attention(queries, pool, context)),
            ("FlashAttention, paged", flash_attention(queries, pool, tables, lengths)),
        ]
        moved = count * context * 2 * kv_heads * dim * pool.element_size()
        for way, call in ways:
            if call is not None:
                seconds = seconds_of(stream, call, effort)
                fraction = moved / seconds / copy_bytes_s
                figures.append(Figure("attention", way, count, context, seconds, fraction))
    stream.close()
    return figures


def table(figures: Sequence[Figure]) -> str:
    """Lay figures out for people."""
    lines = ["| step | way | rows | tokens | ms | of the best | target |", "|" + "---|" * 7]
    for one in figures:
        share = "" if one.fraction is None else f"{one.fraction:.2f}"
        target = "" if one.target is None else f"{one.target:.2f} {one.verdict}"
        lines.append(
            f"| {one.what} | {one.way} | {one.rows} | {one.tokens} | {one.seconds * 1e3:.3f} "
            f"| {share} | {target} |"
        )
    return "\n".join(lines)


def main(arguments: Sequence[str] | None = None) -> int:
    """Measure and print; 1 if a target is missed, 2 where nothing can be measured."""
    parser = argparse.ArgumentParser(prog="bench.gpu", description=__doc__)
    parser.add_argument("--shape", choices=sorted(CONFIGS), default="8b")
    parser.add_argument("--rows", type=int, nargs="+", default=[1, 4, 16, 64, 128, 256])
    parser.add_argument("--context", type=int, default=1024)
    parser.add_argument("--plain", action="store_true", help="time plain and compiled torch, too")
    parser.add_argument("--out", type=Path, help="write a JSON record into this folder")
    options = parser.parse_args(arguments)
    if not torch.cuda.is_available():
        print("bench.gpu: torch sees no GPU here; nothing was measured", file=sys.stderr)
        return 2
    if importlib.util.find_spec("triton") is None:
        print("bench.gpu: triton is not installed; nothing was measured", file=sys.stderr)
        return 2
    device, dtype, effort = CudaDevice(), torch.bfloat16, Effort()
    spec, rows, context = make_spec(options.shape), sorted(options.rows), options.context
    with device.entered():
        stream = device.stream("ceilings")
        rates = (
            copy_rate(device, stream, 4 << 30, effort),
            product_rate(device, stream, 8192, effort),
        )
        ours = Ours(device, spec, dtype, rows[-1], context)
        figures = measure_ours(ours, spec, rows, context, rates, effort)
        ours.steps.close()
        del ours
        figures += measure_attention(device, spec, dtype, rows, context, rates[0], effort)
        if options.plain:
            figures += measure_plain(
                device, spec, dtype, rows, context, rates[0], effort, compiles=True
            )
    record = {
        "gpu": torch.cuda.get_device_name(),
        "cuda": torch.version.cuda,
        "circumstances": circumstances(),
        "shape": options.shape,
        "copy_bytes_per_s": rates[0],
        "bfloat16_operations_per_s": rates[1],
        "figures": [asdict(one) for one in figures],
    }
    print(json.dumps({name: record[name] for name in list(record)[:6]}, indent=1))
    print(table(figures))
    if options.out:
        print(write(options.out, "gpu", record))
    return int(any(one.verdict == "missed" for one in figures))


if __name__ == "__main__":
    sys.exit(main())
