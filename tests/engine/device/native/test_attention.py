"""Native attention against the textbook in float64, and against itself bit for bit."""

import ctypes
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import pytest
import torch
from torch import Tensor

from engine.device.batch import Row
from engine.device.folder import load_folder
from engine.device.loading import DEMO_FOLDER
from engine.device.native import linear, model
from engine.device.native.build import Unbuilt, library, load_library
from engine.device.native.linear import Kind
from engine.device.native.model import NativeModel
from engine.device.pool import KvPool
from pdserve.layout import KvLayout

pytestmark = pytest.mark.skipif(
    isinstance(library(), Unbuilt), reason="there is no C compiler to build the native kernels"
)
# Sums of up to 300 float32 products and weights; bfloat16 is exact once it is stored.
TOLERANCE = 5e-6
BLOCKS = 40


class PdSpan(ctypes.Structure):
    """``pd_span`` of step.h."""

    _fields_ = (
        ("start", ctypes.c_int32),
        ("count", ctypes.c_int32),
        ("head", ctypes.c_int32),
        ("head_stop", ctypes.c_int32),
        ("query", ctypes.c_int64),
        ("result", ctypes.c_int64),
        ("blocks", ctypes.c_void_p),
    )


@dataclass
class Case:
    """One sequence of random queries, keys and values, in a pool of garbage."""

    heads: int
    kv_heads: int
    dim: int
    block_tokens: int
    dtype: torch.dtype
    token_count: int
    scale: float = 1.0

    def __post_init__(self) -> None:
        torch.manual_seed(self.dim + self.token_count)
        row = (self.heads + 2 * self.kv_heads) * self.dim
        self.qkv = torch.randn(self.token_count, row) * self.scale
        shape = (BLOCKS, 2, self.block_tokens, self.kv_heads, self.dim)
        self.pool = torch.full(shape, float("nan"), dtype=self.dtype)
        block_count = -(-self.token_count // self.block_tokens)
        assert block_count <= BLOCKS
        self.blocks = torch.randperm(BLOCKS)[:block_count].to(torch.int32)
        self.queries, *parts = self.qkv.split(
            [self.heads * self.dim, self.kv_heads * self.dim, self.kv_heads * self.dim], 1
        )
        for token in range(self.token_count):
            block, offset = divmod(token, self.block_tokens)
            for is_value, part in enumerate(parts):
                heads = part[token].view(self.kv_heads, self.dim)
                self.pool[int(self.blocks[block]), is_value, offset] = heads.to(self.dtype)
        self.keys, self.values = (part.to(self.dtype).double() for part in parts)

    def attend(self, window: int, spans: Sequence[tuple[int, int, int, int]]) -> Tensor:
        """Compute spans (start, stop, head, head_stop); what they leave is not a number."""
        loaded = library()
        assert not isinstance(loaded, Unbuilt)
        loaded.pd_attention_scratch_bytes.restype = ctypes.c_size_t
        config = model._PdModel(
            head_count=self.heads,
            kv_head_count=self.kv_heads,
            head_dim=self.dim,
            block_tokens=self.block_tokens,
            keeps_half=self.dtype == torch.bfloat16,
        )
        size = loaded.pd_attention_scratch_bytes(ctypes.byref(config))
        memory = torch.full((size // 4 + 32,), float("nan"))
        scratch = memory.data_ptr() + -memory.data_ptr() % 64
        result = torch.full((self.token_count, self.heads * self.dim), float("nan"))
        assert loaded.pd_span_tokens(ctypes.byref(config)) >= 1
        for start, stop, head, head_stop in spans:
            span = PdSpan(start, stop - start, head, head_stop, start, start)
            span.blocks = self.blocks.data_ptr()
            loaded.pd_attend(
                ctypes.byref(config),
                ctypes.byref(span),
                window,
                *(ctypes.c_void_p(each.data_ptr()) for each in (self.pool, self.qkv, result)),
                ctypes.c_void_p(scratch),
            )
        assert memory[-1].isnan(), "the scratch memory was as large as it said"
        return result

    def wanted(self, window: int) -> Tensor:
        """Compute the same in float64, from what the pool holds."""
        share = self.heads // self.kv_heads
        queries = self.queries.double().view(-1, self.heads, self.dim)
        keys, values = (
            part.view(-1, self.kv_heads, self.dim).repeat_interleave(share, 1)
            for part in (self.keys, self.values)
        )
        scores = torch.einsum("qhd,khd->hqk", queries, keys) * self.dim**-0.5
        at = torch.arange(self.token_count)
        sees = at[:, None] >= at
        if window:
            sees &= at > at[:, None] - window
        weights = scores.masked_fill(~sees, -torch.inf).softmax(-1)
        return torch.einsum("hqk,khd->qhd", weights, values).reshape(len(at), -1)


CASES = {
    "one head of two": Case(1, 1, 2, 16, torch.float32, 70),
    "heads of eight": Case(4, 2, 8, 3, torch.float32, 100),
    "heads of 24": Case(6, 2, 24, 8, torch.float32, 130),
    "heads of 80 in bfloat16": Case(4, 4, 80, 16, torch.bfloat16, 150),
    "heads of 64": Case(12, 4, 64, 16, torch.float32, 300),
    "heads of 128 in bfloat16": Case(16, 2, 128, 16, torch.bfloat16, 200),
    "one head for nine": Case(9, 1, 48, 7, torch.float32, 90),
    "blocks of one": Case(2, 1, 32, 1, torch.float32, 40),
    "steep": Case(4, 2, 32, 16, torch.float32, 200, scale=12.0),
}


def every_query(case: Case, window: int) -> Tensor:
    """Compute each query alone, all its heads together: what decode steps do."""
    return case.attend(window, [(at, at + 1, 0, case.kv_heads) for at in range(case.token_count)])


@pytest.mark.parametrize("window", [0, 1, 37, 64, 100])
@pytest.mark.parametrize("name", CASES)
def test_attention_is_that_of_the_textbook(name: str, window: int) -> None:
    case = CASES[name]
    wanted = case.wanted(window)
    seen = every_query(case, window)
    assert (seen - wanted).abs().max() < TOLERANCE * max(
        1.0, float(wanted.abs().max())
    ) * case.scale


@pytest.mark.parametrize("window", [0, 37, 64])
@pytest.mark.parametrize("name", CASES)
def test_a_query_is_bit_equal_alone_and_in_a_chunk(name: str, window: int) -> None:
    case = CASES[name]
    alone = every_query(case, window)
    loaded = library()
    assert not isinstance(loaded, Unbuilt)
    size_max = loaded.pd_span_tokens(
        ctypes.byref(model._PdModel(head_count=case.heads, kv_head_count=case.kv_heads))
    )
    for size in {2, 5, 13, size_max}:
        spans = [
            (start, min(start + size, case.token_count), head, head + 1)
            for start in range(0, case.token_count, size)
            for head in range(case.kv_heads)
        ]
        assert torch.equal(case.attend(window, spans), alone), f"chunks of {size}"


def test_values_beyond_a_query_do_not_reach_it_even_times_zero() -> None:
    case = Case(4, 2, 32, 8, torch.float32, 100)
    wanted = every_query(case, 0)
    block = int(case.blocks[90 // 8])
    case.pool[block, :, 90 % 8] = float("nan")
    for size in (1, 7, 50):
        spans = [
            (start, min(start + size, 100), head, head + 1)
            for start in range(0, 100, size)
            for head in range(2)
        ]
        seen = case.attend(0, spans)
        assert torch.equal(seen[:90], wanted[:90])
        assert seen[90:].isnan().all()


def test_values_a_window_has_left_do_not_reach_a_query() -> None:
    case = Case(4, 2, 32, 8, torch.float32, 200)
    wanted = every_query(case, 30)
    case.pool[int(case.blocks[100 // 8]), :, 100 % 8] = float("nan")
    spans = [(s, min(s + 48, 200), head, head + 1) for s in range(0, 200, 48) for head in range(2)]
    seen = case.attend(30, spans)
    assert torch.equal(seen[:100], wanted[:100])
    assert seen[100:130].isnan().all()
    assert torch.equal(seen[130:], wanted[130:])


@pytest.fixture(scope="module", params=["x86-64-v3", "x86-64"])
def other_library(
    request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory
) -> ctypes.CDLL:
    """The library as another processor would have it."""
    flags = Path("/proc/cpuinfo").read_text() if Path("/proc/cpuinfo").exists() else ""
    if " avx2 " not in flags or " fma " not in flags:
        pytest.skip("this processor does not run what x86-64-v3 is")
    folder = tmp_path_factory.mktemp("other")
    folder.chmod(0o700)
    built = load_library(folder, (f"-march={request.param}",))
    assert not isinstance(built, Unbuilt), built
    return built


@pytest.mark.parametrize("kind", [Kind.F32, Kind.INT8])
def test_a_step_has_the_same_bits_on_processors_with_other_vectors(
    kind: Kind, other_library: ctypes.CDLL, monkeypatch: pytest.MonkeyPatch
) -> None:
    def steps() -> list[Tensor]:
        folder = load_folder(DEMO_FOLDER, torch.float32, 1)
        spec = folder.spec
        layout = KvLayout(spec.layer_count, 16, spec.kv_head_count, spec.head_dim, "float32")
        pool = KvPool(layout, 8)
        native = NativeModel(spec, folder.weights, 16, kind=kind)
        tokens = [(7 * at) % 900 + 4 for at in range(101)]
        first, _ = native.forward([Row(tokens[:100], 0, range(8), 3)], pool, None)
        second, _ = native.forward([Row(tokens[100:], 100, range(8), 1)], pool, None)
        return [first, second, pool.slots[-1][:6].clone()]

    here = steps()
    for module in (model, linear):
        monkeypatch.setattr(module, "library", lambda: other_library)
    assert all(map(torch.equal, steps(), here))
