"""The native step computes what transformers computes, and the same bits in any company (V16)."""

import gc
from collections.abc import Callable, Iterator, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

from engine.device.batch import Row
from engine.device.executor import TorchExecutor
from engine.device.folder import load_folder
from engine.device.loading import DEMO_FOLDER, load_executor
from engine.device.native.build import Unbuilt, library
from engine.device.native.linear import Kind
from engine.device.native.model import NativeModel
from engine.device.pool import KvPool
from engine.device.resources import Resources
from pdserve.config import ModelConfig
from pdserve.layout import KvLayout

pytestmark = pytest.mark.skipif(
    isinstance(library(), Unbuilt), reason="there is no C compiler to build the native kernels"
)
NAMES = [
    "llama-gqa-tied-llama3",
    "llama-mha-biases-linear-sharded",
    "llama-wide-mlp",
    "qwen2-tied",
    "qwen2-window-sharded",
    "qwen3-yarn-head64",
    "qwen3-layer-types-bias",
    "mistral-window",
    "mistral-mqa-no-window",
]
BLOCK_TOKENS = 8
LOGIT_TOLERANCE = 1e-4  # float32, as the torch decoder's
# bfloat16 keeps 8 bits: 2**-8 relative per layer, on logits of up to about 8 here.
BFLOAT16_TOLERANCE = 0.35
KINDS = [(torch.float32, None), (torch.bfloat16, None), (torch.float32, Kind.INT8)]
KIND_NAMES = ["float32", "bfloat16", "int8"]


class Loaded:
    """A native model and a pool full of garbage."""

    def __init__(
        self,
        folder: Path,
        dtype: torch.dtype = torch.float32,
        kind: Kind | None = None,
        *,
        threads: int = 1,
    ) -> None:
        read = load_folder(folder, dtype, 1)
        spec = read.spec
        self.layout = KvLayout(
            spec.layer_count,
            BLOCK_TOKENS,
            spec.kv_head_count,
            spec.head_dim,
            str(dtype).removeprefix("torch."),
        )
        self.model = NativeModel(spec, read.weights, BLOCK_TOKENS, kind=kind, threads=threads)
        assert not read.weights, "all weights were taken"

    def pool(self, block_count: int = 512) -> KvPool:
        """Make a pool whose every byte is not a number until it is written."""
        pool = KvPool(self.layout, block_count)
        for layer in pool.heads:
            layer.fill_(float("nan"))
        return pool

    def step(self, pool: KvPool, *rows: Row) -> tuple[torch.Tensor, tuple[int, ...]]:
        """Compute one step in which nobody listens for layers."""
        return self.model.forward(list(rows), pool, None)

    def chunks(
        self, pool: KvPool, tokens: Sequence[int], blocks: Sequence[int], stops: Sequence[int]
    ) -> list[torch.Tensor]:
        """Compute a sequence alone, in chunks ending at ``stops``: each chunk's last logits."""
        starts = [0, *stops]
        return [
            self.step(pool, Row(tokens[start:stop], start, blocks, 1))[0][0]
            for start, stop in zip(starts, stops, strict=False)
        ]


def shuffled(count: int, seed: int) -> list[int]:
    return torch.randperm(count, generator=torch.Generator().manual_seed(seed)).tolist()


def held(pool: KvPool, blocks: Sequence[int], token_count: int) -> torch.Tensor:
    """Keys and values of a sequence's tokens, of all layers."""
    at = torch.arange(token_count)
    places = torch.tensor(blocks)[at // BLOCK_TOKENS], at % BLOCK_TOKENS
    return torch.stack([layer[places] for layer in pool.slots])


@pytest.mark.parametrize("name", NAMES)
def test_logits_of_chunked_prompts_are_those_of_transformers(
    name: str,
    model_folder: Callable[[str], Path],
    reference: Callable[..., torch.Tensor],
    random_tokens: Callable[[int, int], tuple[int, ...]],
) -> None:
    loaded = Loaded(model_folder(name))
    for count, stops in ((1, [1]), (20, [7, 20]), (170, [64, 65, 130, 169, 170])):
        tokens = random_tokens(count, count)
        wanted = reference(model_folder(name), tokens)
        for blocks in (list(range(30)), shuffled(512, 3)[:30]):
            logits = loaded.chunks(loaded.pool(), tokens, blocks, stops)
            for stop, row in zip(stops, logits, strict=True):
                assert (row - wanted[stop - 1]).abs().max() < LOGIT_TOLERANCE


@pytest.mark.parametrize(("dtype", "kind"), KINDS, ids=KIND_NAMES)
@pytest.mark.parametrize("name", NAMES)
def test_a_row_is_bit_equal_alone_in_a_batch_in_chunks_and_with_two_threads(
    name: str,
    dtype: torch.dtype,
    kind: Kind | None,
    model_folder: Callable[[str], Path],
    random_tokens: Callable[[int, int], tuple[int, ...]],
) -> None:
    one = Loaded(model_folder(name), dtype, kind)
    lengths = (1, 2, 9, 63, 64, 65, 80, 129, 140, 33, 5, 70, 150, 17, 128, 3)
    sequences = [random_tokens(count, count) for count in lengths]
    ids = shuffled(512, 4)
    blocks = [ids[20 * index : 20 * index + 20] for index in range(len(lengths))]
    alone_pool = one.pool()
    alone = [
        one.chunks(alone_pool, tokens, blocks[index], [len(tokens)])[0]
        for index, tokens in enumerate(sequences)
    ]
    two = Loaded(model_folder(name), dtype, kind, threads=2)
    for loaded in (one, two):
        pool = loaded.pool()
        # Odd ones up to their last token in one step, every third in the middle of a chunk before.
        odd = [i for i, tokens in enumerate(sequences) if i % 2 and len(tokens) > 1]
        cuts = {i: len(sequences[i]) // 2 if i % 3 == 0 else len(sequences[i]) - 1 for i in odd}
        loaded.step(pool, *(Row(sequences[i][: cuts[i]], 0, blocks[i], 0) for i in odd))
        starts = [cuts.get(i, 0) for i in range(len(sequences))]
        rows = [
            Row(tokens[start:], start, blocks[i], 1)
            for i, (tokens, start) in enumerate(zip(sequences, starts, strict=True))
        ]
        together, owners = loaded.step(pool, *rows)
        assert sorted(owners) == list(range(len(sequences)))
        for row, index in zip(together, owners, strict=True):
            assert torch.equal(row, alone[index]), f"sequence of {lengths[index]} tokens"
        for index in range(len(lengths)):
            ours, theirs = (
                held(each, blocks[index], lengths[index]) for each in (alone_pool, pool)
            )
            assert torch.equal(ours, theirs), "keys and values depend on company"
            assert ours.isfinite().all()


@pytest.mark.parametrize("threads", [1, 2])
@pytest.mark.parametrize("name", ["llama-gqa-tied-llama3", "qwen3-layer-types-bias"])
def test_logits_of_guesses_are_those_of_one_token_after_the_other(
    name: str,
    threads: int,
    model_folder: Callable[[str], Path],
    random_tokens: Callable[[int, int], tuple[int, ...]],
) -> None:
    loaded = Loaded(model_folder(name), threads=threads)
    tokens, others = random_tokens(80, 1), random_tokens(60, 2)
    single = loaded.pool()
    wanted = loaded.chunks(single, tokens, range(10), [62, *range(63, 81)])
    pool = loaded.pool()
    loaded.step(pool, Row(tokens[:62], 0, range(10), 0))
    logits, owners = loaded.step(
        pool, Row(others, 0, range(20, 28), 3), Row(tokens[62:], 62, range(10), 12)
    )
    assert owners == (0,) * 3 + (1,) * 12
    assert torch.equal(logits[3:], torch.stack(wanted[-12:]))
    assert torch.equal(held(pool, range(10), 80), held(single, range(10), 80))


def test_what_was_written_behind_a_sequence_does_not_matter(
    model_folder: Callable[[str], Path], random_tokens: Callable[[int, int], tuple[int, ...]]
) -> None:
    loaded = Loaded(model_folder("qwen2-window-sharded"))
    tokens = random_tokens(77, 1)
    wanted = loaded.chunks(loaded.pool(), tokens, range(12), [70, 77])
    pool = loaded.pool()
    loaded.step(pool, Row(random_tokens(90, 2), 0, range(12), 1))
    assert all(map(torch.equal, loaded.chunks(pool, tokens, range(12), [70, 77]), wanted))


@pytest.mark.parametrize("threads", [1, 2])
def test_a_sequence_that_is_not_a_number_does_not_infect_its_batch(
    threads: int,
    model_folder: Callable[[str], Path],
    random_tokens: Callable[[int, int], tuple[int, ...]],
) -> None:
    loaded = Loaded(model_folder("qwen3-yarn-head64"), threads=threads)
    tokens = random_tokens(40, 1)
    wanted = loaded.chunks(loaded.pool(), tokens, range(8), [40])[0]
    pool = loaded.pool()
    ill = Row(random_tokens(1, 2), 30, range(8, 16), 1)  # its first 30 tokens were never written
    logits, owners = loaded.step(pool, ill, Row(tokens, 0, range(8), 1), ill)
    assert owners == (0, 1, 2)
    assert logits[0].isnan().all()
    assert torch.equal(logits[1], wanted)


@pytest.mark.parametrize("threads", [1, 2])
def test_a_layer_is_signalled_once_it_is_written_and_not_before(
    threads: int,
    model_folder: Callable[[str], Path],
    random_tokens: Callable[[int, int], tuple[int, ...]],
) -> None:
    loaded = Loaded(model_folder("qwen2-window-sharded"), threads=threads)
    pool = loaded.pool(16)
    seen: list[list[bool]] = []

    def on_layer(layer: int) -> None:
        assert layer == len(seen)
        written = held(pool, range(10), 75).isfinite()
        seen.append([bool(each.all()) for each in written])

    logits, owners = loaded.model.forward(
        [Row(random_tokens(75, 1), 0, range(10), 0)], pool, on_layer
    )
    assert seen == [[True, False, False], [True, True, False], [True, True, True]]
    assert logits.shape == (0, 203)
    assert owners == ()


@pytest.mark.parametrize("threads", [1, 2])
def test_what_a_listener_raises_ends_the_step_and_nothing_more(
    threads: int, model_folder: Callable[[str], Path]
) -> None:
    loaded = Loaded(model_folder("qwen2-tied"), threads=threads)
    calls: list[int] = []

    def on_layer(layer: int) -> None:
        calls.append(layer)
        raise OSError("the wire is cut")

    pool = loaded.pool()
    wanted = loaded.step(pool, Row((5, 6), 0, (3,), 1))[0]
    with pytest.raises(OSError, match="the wire is cut"):
        loaded.model.forward([Row((5, 6), 0, (1,), 1)], pool, on_layer)
    assert calls == [0]
    assert torch.equal(loaded.step(pool, Row((5, 6), 0, (1,), 1))[0], wanted)


def test_helpers_end_with_their_model(model_folder: Callable[[str], Path]) -> None:
    tasks = Path("/proc/self/task")
    if not tasks.exists():
        pytest.skip("no /proc here to count threads in")
    loaded = Loaded(model_folder("qwen2-tied"), threads=3)
    before = set(tasks.iterdir())
    loaded.step(loaded.pool(16), Row((1,), 0, (3,), 1))
    assert len(set(tasks.iterdir()) - before) == 2
    gc.disable()
    try:
        del loaded
        assert not set(tasks.iterdir()) - before, "weights and threads go with the last reference"
    finally:
        gc.enable()


@pytest.mark.parametrize(
    "row",
    [
        Row((203,), 0, (0,), 1),
        Row((-1,), 0, (0,), 1),
        Row((1,), 0, (16,), 1),
        Row((1,), 0, (-1,), 1),
        Row((1, 2), 7, (0,), 1),
        Row((), 0, (0,), 0),
        Row((1,), 0, (0,), 2),
    ],
    ids=["token", "negative token", "block", "negative block", "blocks", "no token", "logits"],
)
def test_nothing_outside_the_model_or_the_pool_is_touched(
    row: Row, model_folder: Callable[[str], Path]
) -> None:
    loaded = Loaded(model_folder("qwen2-tied"))
    with pytest.raises(AssertionError, match="out of range"):
        loaded.step(loaded.pool(16), Row((1,), 0, (3,), 1), row)


def test_a_positions_angles_do_not_depend_on_how_the_tables_grew(
    model_folder: Callable[[str], Path],
) -> None:
    whole, grown = (Loaded(model_folder("qwen3-yarn-head64")).model for _ in range(2))
    before = torch.get_num_threads()
    try:
        torch.set_num_threads(2)
        whole._reach(40_001)
        torch.set_num_threads(1)
        for count in (1025, 1027, 2100, 3003, 40_001):
            grown._reach(count)
    finally:
        torch.set_num_threads(before)
    assert len(whole._cosine) == len(grown._cosine) == 40_001
    assert torch.equal(whole._cosine, grown._cosine)
    assert torch.equal(whole._sine, grown._sine)


def test_a_sequence_may_outgrow_the_first_tables(
    model_folder: Callable[[str], Path],
    reference: Callable[..., torch.Tensor],
    random_tokens: Callable[[int, int], tuple[int, ...]],
) -> None:
    loaded = Loaded(model_folder("mistral-window"))
    tokens = random_tokens(60, 1)
    wanted = reference(model_folder("mistral-window"), tokens)[-1]
    loaded.model._cosine = loaded.model._sine = torch.empty(0, 6)
    loaded.model.spec = replace(loaded.model.spec, context_tokens_max=20)
    seen = loaded.chunks(loaded.pool(), tokens, range(8), [10, 30, 60])[-1]
    assert (seen - wanted).abs().max() < LOGIT_TOLERANCE


def test_a_bfloat16_pool_holds_what_a_float32_pool_would_rounded_to_nearest() -> None:
    tokens = [(7 * at) % 900 + 4 for at in range(64)]
    kept = []
    for dtype in (torch.float32, torch.bfloat16):  # the demo model's weights are bfloat16's
        loaded = Loaded(DEMO_FOLDER, dtype, Kind.F32)
        pool = loaded.pool(8)
        loaded.step(pool, Row(tokens, 0, range(8), 0))
        kept.append(held(pool, range(8), 64)[0])
    assert torch.equal(kept[0].to(torch.bfloat16), kept[1])


@pytest.fixture
def start(model_folder: Callable[[str], Path]) -> Iterator[Callable[..., TorchExecutor]]:
    """Start executors on native models; they are closed after the test."""
    started: list[TorchExecutor] = []

    def start(name: str, *, threads: int = 1, depth: int = 4, **changes: Any) -> TorchExecutor:
        path = str(model_folder(name)) if name else ""
        config = ModelConfig(path=path, backend="native", **changes)
        resources = Resources(BLOCK_TOKENS, 600, 0, 16, threads, depth)
        started.append(load_executor(config, resources))
        return started[-1]

    yield start
    for executor in started:
        executor.close()


@pytest.mark.parametrize(
    ("name", "changes"),
    [
        ("qwen2-window-sharded", {}),
        ("qwen3-yarn-head64", {"dtype": "bfloat16"}),
        ("llama-wide-mlp", {"weights": "int8"}),
        ("", {"weights": "int8", "dtype": "bfloat16"}),
    ],
)
def test_requests_in_mixed_batches_get_the_tokens_they_get_alone(
    name: str,
    changes: dict[str, Any],
    start: Callable[..., TorchExecutor],
    drive: Callable[..., Any],
    make_request: Callable[..., Any],
    random_tokens: Callable[[int, int], tuple[int, ...]],
) -> None:
    executor = start(name, **changes)
    counts = [1, 2, 40, 100, 7, 31, 64, 65, 90, 3]
    requests = [
        make_request(i, random_tokens(n, i), 20, temperature=float(i % 2), seed=i, logprob_count=2)
        for i, n in enumerate(counts)
    ]
    alone = {}
    for request in requests:
        alone |= drive(executor, [request])
    sizes = [512, 1, 16, 40, 3, 31, 64, 32, 45, 1]
    for other in (executor, start(name, threads=2, **changes)):
        mixed = drive(other, requests, chunk_tokens=sizes, depth=2, stagger=3, scattered=True)
        assert mixed == alone


def test_other_weights_take_the_place_of_a_native_models(
    start: Callable[..., TorchExecutor],
    drive: Callable[..., Any],
    make_request: Callable[..., Any],
    random_tokens: Callable[[int, int], tuple[int, ...]],
    model_folder: Callable[[str], Path],
    tmp_path: Path,
) -> None:
    from shutil import copytree

    from safetensors.torch import load_file, save_file

    folder = copytree(model_folder("qwen2-tied"), tmp_path / "other")
    weights = load_file(folder / "model.safetensors")
    halves = {name: weight * 0.5 for name, weight in weights.items()}
    save_file(halves, folder / "model.safetensors", metadata={"format": "pt"})
    executor = start("qwen2-tied", threads=2)
    request = make_request(1, random_tokens(20, 1), 8, logprob_count=1)
    before = drive(executor, [request])
    info = executor.prepare_weights(str(folder))
    executor.commit_weights()
    assert executor.model == info
    after = drive(executor, [request])
    assert after != before
    with torch.inference_mode():
        fresh = load_executor(
            ModelConfig(path=str(folder), backend="native"),
            Resources(BLOCK_TOKENS, 600, 0, 16, 1, 4),
        )
    try:
        assert fresh.model.hash == info.hash
        assert drive(fresh, [request]) == after
    finally:
        fresh.close()
