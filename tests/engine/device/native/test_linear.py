"""Native linear layers: right to rounding, and the same bits whoever shares the batch."""

import ctypes
import gc
import platform
import shutil
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest
import torch
from torch import Tensor

from engine.device.native import build
from engine.device.native.build import Unbuilt, library
from engine.device.native.linear import Kind, NativeLinear, PdLinear, declare, linear_path

if isinstance(library(), Unbuilt):
    pytest.skip(f"no native library here: {library()}", allow_module_level=True)

KINDS = list(Kind)
# in, out: one, odd, a tile and more, a vocabulary, several blocks of the reduction
SHAPES = [(1, 1), (5, 3), (48, 80), (64, 64), (100, 972), (517, 131), (300, 65)]
# what GCC calls the processor, what makes of it the path of integers, flags it needs
TARGETS = {
    "portable": (("-march=x86-64",), "portable", ()),
    "avx2": (("-march=x86-64-v3",), "avx2", ("avx2", "fma")),
    "avx512": (("-march=x86-64-v4",), "avx512", ("avx512bw", "avx512vl", "avx512dq", "avx512cd")),
    "vnni": (("-march=x86-64-v4", "-mavx512vnni"), "vnni", ("avx512bw", "avx512_vnni")),
    "avx-vnni": (("-march=x86-64-v3", "-mavxvnni"), "vnni", ("avx2", "avx_vnni")),
}


def _layer(kind: Kind, shape: tuple[int, int], *, has_bias: bool = True) -> NativeLinear:
    return NativeLinear(*_weights(shape, has_bias), kind=kind)


def _weights(shape: tuple[int, int], has_bias: bool = True) -> tuple[Tensor, Tensor | None]:
    generator = torch.Generator().manual_seed(shape[0])
    weight = torch.randn(shape[1], shape[0], generator=generator)
    bias = torch.randn(shape[1], generator=generator)
    return weight, bias if has_bias else None


def _rows(count: int, width: int, seed: int = 1) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    magnitudes = torch.rand(count, 1, generator=generator) * 9 + 0.1
    return torch.randn(count, width, generator=generator) * magnitudes


@pytest.mark.parametrize("shape", [*SHAPES, (1024, 192)])
@pytest.mark.parametrize("kind", [Kind.F32, Kind.BF16])
def test_sums_of_floats_are_right_to_rounding(kind: Kind, shape: tuple[int, int]) -> None:
    weight, bias = _weights(shape)
    assert bias is not None
    x = _rows(33, shape[0])
    y = NativeLinear(weight, bias, kind=kind)(x)
    if kind is Kind.BF16:
        weight, x = weight.bfloat16(), x.bfloat16()
    wanted = x.double() @ weight.double().T + bias
    # each of in + 2 additions errs by half a unit of float32, of at most the sum of magnitudes
    sizes = x.double().abs() @ weight.double().abs().T + bias.abs()
    assert ((y - wanted).abs() <= (shape[0] + 2) * 2.0**-24 * sizes).all()


def _quantised(values: Tensor) -> tuple[Tensor, Tensor]:
    most = values.abs().amax(1, keepdim=True)
    factor = torch.tensor(127.0) / most
    return (values * factor).round(), most / 127.0


@pytest.mark.parametrize("shape", [*SHAPES, (4096, 96)])
def test_int8_is_integers_times_one_scale_per_row_and_output(shape: tuple[int, int]) -> None:
    weight, bias = _weights(shape)
    assert bias is not None
    x = _rows(40, shape[0])
    y = NativeLinear(weight, bias, kind=Kind.INT8)(x)
    (q_x, x_scale), (q_w, w_scale) = _quantised(x), _quantised(weight)
    assert q_x.abs().max() == 127
    sums = (q_x.long() @ q_w.long().T).float()
    assert torch.equal(y, bias + sums * x_scale * w_scale.T)


def test_int8_keeps_the_largest_integers_of_both_signs() -> None:
    weight = torch.tensor([[1.0], [-1.0]]).expand(2, 1000).contiguous()
    x = torch.tensor([[1.0], [-1.0]]).expand(2, 1000).contiguous()
    y = NativeLinear(weight, kind=Kind.INT8)(x)
    assert torch.allclose(y, 1000 * torch.tensor([[1.0, -1.0], [-1.0, 1.0]]), rtol=1e-6)


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("kind", KINDS)
def test_a_row_has_the_same_bits_in_every_batch_place_and_number_of_threads(
    kind: Kind, shape: tuple[int, int]
) -> None:
    layer = _layer(kind, shape)
    x = _rows(40, shape[0])
    whole = layer(x)
    for count in range(1, 41):
        threads = 1 + count % 3
        assert torch.equal(layer(x[:count], threads=threads), whole[:count]), count
        assert torch.equal(layer(x[40 - count :], threads=threads), whole[40 - count :]), count
    for row in range(40):
        assert torch.equal(layer(x[row : row + 1]), whole[row : row + 1]), row


@pytest.mark.parametrize("kind", KINDS)
def test_a_row_has_the_same_bits_in_a_long_prompt(kind: Kind) -> None:
    layer = _layer(kind, (2100, 70))  # more than a block of rows in tiles
    x = _rows(700, 2100)
    whole = layer(x, threads=2)
    for start, stop in ((0, 1), (127, 129), (255, 257), (400, 433), (511, 513), (699, 700)):
        assert torch.equal(layer(x[start:stop]), whole[start:stop])
    assert torch.equal(layer(x.flip(0)), whole.flip(0))


@pytest.mark.parametrize("kind", KINDS)
def test_threads_compute_side_by_side_what_one_computes(kind: Kind) -> None:
    layer = _layer(kind, (256, 972))
    x = _rows(50, 256)
    whole = layer(x)
    prepared = layer.prepare(x)
    with ThreadPoolExecutor(3) as pool:
        for _ in range(20):
            y = torch.full_like(whole, torch.nan)

            def share(thread: int, y: Tensor = y) -> None:
                layer.run(x, prepared, y, adds=False, thread=thread, threads=3)

            list(pool.map(share, range(3)))
            assert torch.equal(y, whole)


# bits: a NaN, both infinities, and the NaN that rounding up would carry over into minus zero
@pytest.mark.parametrize("bad", [0x7FC00000, 0x7F800000, -0x800000, 0x7FFFFFFF])
@pytest.mark.parametrize("kind", KINDS)
def test_a_row_that_is_not_finite_spoils_no_other(kind: Kind, bad: int) -> None:
    layer = _layer(kind, (100, 70))
    x = _rows(20, 100)
    good = layer(x)
    x.view(torch.int32)[7, 99] = bad
    x.view(torch.int32)[13, 0] = bad
    spoilt = layer(x)
    others = [row for row in range(20) if row not in (7, 13)]
    assert torch.equal(spoilt[others], good[others])
    assert not spoilt[[7, 13]].isfinite().any()


@pytest.mark.parametrize("kind", KINDS)
def test_nothing_is_written_or_read_beyond_the_rows(kind: Kind) -> None:
    """Rows are windows of larger buffers, at odd addresses; what is around them is poison."""
    layer = _layer(kind, (77, 131))
    x = _rows(19, 77)
    wanted = layer(x)
    wide_x = torch.full((19 * 90 + 1,), torch.nan)
    window = wide_x[1:].view(19, 90)[:, 3:80]
    window.copy_(x)
    wide_y = torch.full((19 * 140 + 1,), 7.0)
    target = wide_y[1:].view(19, 140)[:, 5:136]
    size = layer.prepare(x).numel()
    # what is prepared has poison behind it, and under the rows that are not there
    buffer = torch.full((size + 192,), 255, dtype=torch.uint8)
    start = -buffer.data_ptr() % 64
    prepared = buffer[start : start + size]
    loaded = library()
    assert isinstance(loaded, ctypes.CDLL)
    for thread in range(2):
        loaded.pd_prepare(
            *(layer.address(), window.data_ptr(), 90, 19, prepared.data_ptr(), thread, 2)
        )
    for thread in range(3):
        layer.run(window, prepared, target, adds=False, thread=thread, threads=3)
    assert torch.equal(target, wanted)
    assert (buffer[start + size :] == 255).all()
    target.fill_(7.0)
    assert (wide_y == 7.0).all()


@pytest.mark.parametrize("has_bias", [True, False])
@pytest.mark.parametrize("kind", KINDS)
def test_a_sum_is_added_with_one_rounding(kind: Kind, has_bias: bool) -> None:
    layer = _layer(kind, (96, 200), has_bias=has_bias)
    x, residual = _rows(9, 96), _rows(9, 200, 2)
    before = residual.clone()
    assert torch.equal(layer(x, residual), residual + layer(x))
    assert torch.equal(residual, before)


def test_int8_keeps_small_rows_as_well_as_large_ones() -> None:
    layer = _layer(Kind.INT8, (100, 30), has_bias=False)
    x = _rows(4, 100)
    assert torch.allclose(layer(x * 1e-33) * 1e33, layer(x), rtol=1e-2, atol=0.2)
    assert torch.allclose(layer(x * 1e33) * 1e-33, layer(x), rtol=1e-2, atol=0.2)


@pytest.mark.parametrize("kind", KINDS)
def test_zeros_give_the_bias(kind: Kind) -> None:
    weight, bias = _weights((65, 70))
    assert bias is not None
    weight[3] = 0.0
    x = _rows(5, 65)
    x[2] = 0.0
    x[4] = 1e-38  # too small for a scale of its own in int8
    y = NativeLinear(weight, bias, kind=kind)(x)
    assert torch.equal(y[2], bias)
    assert torch.equal(y[:, 3], bias[3].expand(5))
    assert torch.allclose(y[4], bias)


def test_no_rows_give_no_rows() -> None:
    assert _layer(Kind.F32, (8, 3))(torch.empty(0, 8)).shape == (0, 3)


@pytest.mark.parametrize("kind", KINDS)
def test_the_address_stays_good_while_the_layer_lives(kind: Kind) -> None:
    weight, bias = _weights((64, 96))
    assert bias is not None
    layer = NativeLinear(weight, bias, kind=kind)
    x = _rows(3, 64)
    wanted = layer(x)
    weight.zero_()
    bias.zero_()
    del weight, bias
    gc.collect()
    seen = PdLinear.from_address(layer.address())
    assert (seen.kind, seen.input_count, seen.output_count) == (kind, 64, 96)
    assert torch.equal(layer(x), wanted)


def test_large_weights_begin_on_a_huge_page() -> None:
    layer = _layer(Kind.F32, (1024, 1024))
    assert PdLinear.from_address(layer.address()).packed % (2 << 20) == 0
    x = _rows(2, 1024)
    assert torch.equal(layer(x)[1:], layer(x[1:]))


def test_rows_of_another_width_are_refused() -> None:
    layer = _layer(Kind.F32, (8, 3))
    if not __debug__:
        pytest.skip("an assert")
    with pytest.raises(AssertionError, match="width 9"):
        layer(torch.zeros(1, 9))


@pytest.fixture(scope="module")
def other_library(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], ctypes.CDLL]:
    """The layers as compiled for another processor that this one can stand in for."""
    made: dict[str, ctypes.CDLL] = {}
    cache = tmp_path_factory.mktemp("libraries")
    folder = tmp_path_factory.mktemp("sources")
    for path in build.sources("l*.[ch]"):
        shutil.copy(path, folder)

    def load(name: str) -> ctypes.CDLL:
        target, _, needed = TARGETS[name]
        if platform.machine() != "x86_64":
            pytest.skip("the other processors are x86")
        flags = Path("/proc/cpuinfo").read_text().split()
        if missing := [flag for flag in needed if flag not in flags]:
            pytest.skip(f"this processor has no {missing}")
        if name not in made:
            with pytest.MonkeyPatch.context() as patch:
                patch.setattr(build, "SOURCE_FOLDER", folder)
                loaded = build.load_library(cache, target)
            assert not isinstance(loaded, Unbuilt), loaded
            made[name] = declare(loaded)
        return made[name]

    return load


@pytest.mark.parametrize("target", TARGETS)
def test_every_processor_gives_the_same_bits(
    target: str, other_library: Callable[[str], ctypes.CDLL]
) -> None:
    loaded = other_library(target)
    assert linear_path(Kind.INT8, loaded) == TARGETS[target][1]
    baseline = other_library("portable")
    for kind in KINDS:
        # tiles add bfloat16 products in an order of their own
        has_own_order = kind is Kind.BF16 and linear_path(kind) == "amx"
        for shape in SHAPES:
            weight, bias = _weights(shape)
            x = _rows(15, shape[0])
            there = NativeLinear(weight, bias, kind=kind, loaded=loaded)(x)
            assert torch.equal(NativeLinear(weight, bias, kind=kind, loaded=baseline)(x), there)
            if not has_own_order:
                assert torch.equal(NativeLinear(weight, bias, kind=kind)(x), there)


@pytest.mark.parametrize("target", TARGETS)
@pytest.mark.parametrize("kind", KINDS)
def test_every_processor_keeps_rows_apart(
    kind: Kind, target: str, other_library: Callable[[str], ctypes.CDLL]
) -> None:
    layer = NativeLinear(*_weights((70, 131)), kind=kind, loaded=other_library(target))
    x = _rows(20, 70)
    x[4, 4] = torch.nan
    whole = layer(x)
    for row in (0, 3, 5, 13, 19):
        assert torch.equal(layer(x[row : row + 1]), whole[row : row + 1])
        assert whole[row].isfinite().all()
    assert torch.equal(layer(x[5:], threads=3), whole[5:])
