"""What smaller weights cost: the demo model's perplexity on text it was not trained on."""

import math

import pytest
import torch
from tokenizers import Tokenizer
from torch.nn.functional import cross_entropy

from engine.demo.corpus import documents
from engine.device.batch import Row
from engine.device.folder import load_folder
from engine.device.loading import DEMO_FOLDER
from engine.device.native.build import Unbuilt, library
from engine.device.native.linear import Kind
from engine.device.native.model import NativeModel
from engine.device.pool import KvPool
from pdserve.layout import KvLayout

pytestmark = pytest.mark.skipif(
    isinstance(library(), Unbuilt), reason="there is no C compiler to build the native kernels"
)
HELD_OUT_SEED = 77_000_001
DOCUMENT_COUNT = 40
TOKENS_MAX = 256
BLOCK_TOKENS = 16


def held_out() -> list[list[int]]:
    tokenizer = Tokenizer.from_file(str(DEMO_FOLDER / "tokenizer.json"))
    texts = documents(HELD_OUT_SEED, DOCUMENT_COUNT)
    return [tokenizer.encode(text).ids[:TOKENS_MAX] for text in texts]


def perplexity(kind: Kind | None, dtype: torch.dtype) -> float:
    """Score each held-out text in one chunk whose every logit is asked for."""
    folder = load_folder(DEMO_FOLDER, dtype, 1)
    spec = folder.spec
    layout = KvLayout(
        spec.layer_count,
        BLOCK_TOKENS,
        spec.kv_head_count,
        spec.head_dim,
        str(dtype).removeprefix("torch."),
    )
    model = NativeModel(spec, folder.weights, BLOCK_TOKENS, kind=kind)
    pool = KvPool(layout, TOKENS_MAX // BLOCK_TOKENS)
    loss, count = 0.0, 0
    with torch.inference_mode():
        for tokens in held_out():
            row = Row(tokens, 0, range(pool.block_count), len(tokens))
            logits = model.forward([row], pool, None)[0][:-1]
            targets = torch.tensor(tokens[1:])
            loss += float(cross_entropy(logits, targets, reduction="sum"))
            count += len(targets)
    assert count > 3000
    return math.exp(loss / count)


@pytest.fixture(scope="module")
def exact() -> float:
    """Perplexity of float32 weights."""
    return perplexity(None, torch.float32)


def test_float32_is_as_sure_as_a_trained_model_is(exact: float) -> None:
    assert 1 < exact < 2


@pytest.mark.parametrize(
    ("kind", "dtype", "ratio_max"),
    [
        (Kind.INT8, torch.float32, 1.02),
        (None, torch.bfloat16, 1.01),
        (Kind.INT8, torch.bfloat16, 1.02),
    ],
    ids=["int8", "bfloat16", "int8 with a bfloat16 pool"],
)
def test_smaller_weights_are_hardly_less_sure(
    kind: Kind | None, dtype: torch.dtype, ratio_max: float, exact: float
) -> None:
    seen = perplexity(kind, dtype)
    print(f"{seen / exact:.4f}")  # noqa: T201
    assert seen < ratio_max * exact


def test_the_measure_notices_coarse_weights(exact: float, monkeypatch: pytest.MonkeyPatch) -> None:
    from engine.device.native import model

    def coarse(weight: torch.Tensor, bias: torch.Tensor | None, *, kind: Kind) -> object:
        step = weight.abs().amax(1, keepdim=True) / 3
        return real((weight / step).round() * step, bias, kind=kind)

    real = model.NativeLinear
    monkeypatch.setattr(model, "NativeLinear", coarse)
    assert perplexity(Kind.F32, torch.float32) > 1.02 * exact, "three bits are seen"
