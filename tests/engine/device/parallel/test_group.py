"""A group of real processes gives the tokens of one process, whatever it is cut into."""

import ctypes
import os
import signal
import threading
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from numpy.typing import NDArray

from engine.device.executor import TorchExecutor
from engine.device.loading import DEMO_FOLDER, load_executor
from engine.device.parallel.group import GroupExecutor
from engine.device.resources import Resources
from engine.step import Binding, Chunk, SampledToken, StepPlan
from pdserve.config import ModelConfig, SpeculationConfig
from pdserve.errors import LocalProtocolError
from pdserve.layout import KvMemory
from pdserve.request import Key, Request

Drive = Callable[..., dict[Key, list[SampledToken]]]
Tokens = Callable[[int, int], tuple[int, ...]]
# float32 sums of up to 80 products, added in another order, through up to 3 layers.
TOLERANCE = 1e-4


@dataclass(frozen=True)
class Pair:
    """A group, and one process on the same folder."""

    name: str
    tp: int
    pp: int
    group: GroupExecutor
    single: TorchExecutor


def _pair(name: str, tp: int, pp: int, *marks: pytest.MarkDecorator) -> Any:
    return pytest.param((name, tp, pp), marks=marks, id=f"{name}-tp{tp}-pp{pp}")


@pytest.fixture(
    scope="module",
    params=[
        _pair("llama-mha-biases-linear-sharded", 2, 1),
        _pair("qwen2-window-sharded", 1, 2),  # 3 layers: 1 and 2
        _pair("qwen3-layer-types-bias", 2, 2, pytest.mark.slow),
        _pair("demo", 4, 1, pytest.mark.slow),  # 2 KV heads, each twice
    ],
)
def pair(
    request: pytest.FixtureRequest,
    model_folder: Callable[[str], Path],
    start_group: Callable[..., GroupExecutor],
) -> Iterator[Pair]:
    name, tp, pp = request.param
    folder = DEMO_FOLDER if name == "demo" else model_folder(name)
    group = start_group(folder, tp=tp, pp=pp)
    single = load_executor(
        ModelConfig(path=str(folder), dtype="float32", backend="torch"),
        Resources(8, 200, 0, 16, 1, 4),
    )
    yield Pair(name, tp, pp, group, single)
    single.close()
    group.close()


@pytest.fixture
def requests(make_request: Callable[..., Request], random_tokens: Tokens) -> list[Request]:
    """Greedy, drawn, penalised and biased ones, over one and several tiles of attention."""
    return [
        make_request(0, random_tokens(75, 0), 9, logprob_count=5),
        make_request(1, random_tokens(3, 1), 12, temperature=0.9, top_p=0.9, seed=7),
        make_request(2, random_tokens(20, 2), 10, repetition_penalty=1.3, logprob_count=2),
        make_request(3, random_tokens(1, 3), 11, temperature=1.2, top_k=20, seed=3),
        make_request(4, random_tokens(30, 4), 5, logit_bias=((9, 3.0),), logprob_count=0),
    ]


def tokens_of(sampled: dict[Key, list[SampledToken]]) -> dict[Key, list[int]]:
    return {key: [each.token for each in tokens] for key, tokens in sampled.items()}


def logprobs_of(sampled: dict[Key, list[SampledToken]]) -> list[float]:
    values: list[float] = []
    for tokens in sampled.values():
        for each in tokens:
            values += [each.logprob, *sorted(value for _, value in each.top)]
    return values


def test_it_gives_the_tokens_of_one_process(
    pair: Pair, requests: list[Request], drive: Drive
) -> None:
    depth = pair.pp + 1
    settings: dict[str, Any] = {"chunk_tokens": 16, "stagger": 2, "scattered": True}
    seen = drive(pair.group, requests, depth=depth, **settings)
    wanted = drive(pair.single, requests, depth=1, **settings)
    assert tokens_of(seen) == tokens_of(wanted)
    assert logprobs_of(seen) == pytest.approx(logprobs_of(wanted), abs=TOLERANCE)
    if pair.tp == 1:
        assert seen == wanted, "stages change no bit"


def test_a_request_gets_the_same_bits_alone_and_in_company(
    pair: Pair, requests: list[Request], drive: Drive
) -> None:
    together = drive(pair.group, requests, chunk_tokens=[75, 3, 7, 1, 16], depth=2, stagger=1)
    again = drive(pair.group, requests, chunk_tokens=40, depth=1)
    assert together == again
    for request in requests:
        assert drive(pair.group, [request])[request.key] == together[request.key]


def test_a_resumed_request_goes_on_with_the_same_tokens(
    pair: Pair, requests: list[Request], drive: Drive
) -> None:
    whole = drive(pair.group, requests)
    resumed = [
        replace(request, emitted=tuple(each.token for each in whole[request.key][:3]))
        for request in requests
    ]
    rest = drive(pair.group, resumed)
    for request in requests:
        assert rest[request.key] == whole[request.key][3:]


def pool_of(memory: KvMemory) -> NDArray[np.float32]:
    """All that the shards hold: [layer, block, K and V, token, head, dim]; copies must agree."""
    layout = memory.layout
    heads = layout.kv_head_count
    shape = (layout.layer_count, memory.block_count, 2, layout.block_tokens, heads, layout.head_dim)
    whole = np.full(shape, np.nan, np.float32)
    for shard in memory.shards:
        size = (len(shard.layers), *shape[1:4], len(shard.heads), layout.head_dim)
        count = int(np.prod(size))
        part = np.ctypeslib.as_array((ctypes.c_float * count).from_address(shard.address))
        here = np.ix_(list(shard.layers), range(shape[1]), range(2), range(shape[3]), shard.heads)
        known = whole[here]
        assert (np.isnan(known) | (known == part.reshape(size))).all(), "copies differ"
        whole[here] = part.reshape(size)
    assert not np.isnan(whole).any(), "no shard has it"
    return whole


def test_the_leader_sees_every_ranks_keys_and_values(
    pair: Pair, requests: list[Request], drive: Drive
) -> None:
    memory = pair.group.memory
    assert [(shard.layers, shard.heads) for shard in memory.shards] == [
        (share.layers, share.kv_heads) for share in pair.group._partition.shares
    ]
    drive(pair.group, requests)
    drive(pair.single, requests)
    seen, wanted = pool_of(memory), pool_of(pair.single.memory)
    used = np.unique(np.nonzero(wanted)[1])
    assert len(used) > 10
    assert np.abs(seen[:, used] - wanted[:, used]).max() < TOLERANCE


def test_a_rank_reads_what_the_leader_was_sent(
    pair: Pair, make_request: Callable[..., Request], random_tokens: Tokens
) -> None:
    """The other side of a hand-off: KV that comes from elsewhere, by the leader's mapping."""
    request = make_request(1, random_tokens(16, 5), 4)
    first, blocks, elsewhere = request.prompt, (10, 11, 12), (20, 21, 22)
    chunk = Chunk(request.key, 0, 0, 16, first, blocks, True)
    group = pair.group
    result = group.submit(StepPlan(0, (chunk,), (Binding(0, request, ()),))).result(60)
    token = result.tokens[request.key][0].token
    decode = Chunk(request.key, 0, 16, 17, (), blocks, True)
    wanted = group.submit(StepPlan(1, (decode,))).result(60)
    for shard in group.memory.shards:
        layout = replace(
            group.memory.layout, layer_count=len(shard.layers), kv_head_count=len(shard.heads)
        )
        for layer in range(layout.layer_count):
            for source, target in zip(blocks[:2], elsewhere, strict=False):
                start, stop = (
                    shard.address + layout.offset_bytes(layer, block, group.memory.block_count)
                    for block in (target, source)
                )
                ctypes.memmove(start, stop, layout.piece_bytes)
    bound = Binding(1, replace(request, key=Key("f" * 32, 0)), (token,))
    moved = Chunk(Key("f" * 32, 0), 1, 16, 17, (), elsewhere, True)
    seen = group.submit(StepPlan(2, (moved,), (bound,))).result(60)
    assert list(seen.tokens.values()) == list(wanted.tokens.values())


def test_a_group_is_named_like_one_process(pair: Pair) -> None:
    """Workers of different groups pair."""
    group, single = pair.group.model, pair.single.model
    assert group.hash == single.hash, "they do not pair"
    if pair.name != "demo":
        assert replace(group, hash="") == replace(single, hash="")


def test_each_rank_tells_each_of_its_layers_before_the_step_ends(
    pair: Pair, make_request: Callable[..., Request], random_tokens: Tokens
) -> None:
    request = make_request(1, random_tokens(12, 1), 4)
    told: list[tuple[int, int, int]] = []
    chunk = Chunk(request.key, 0, 0, 12, request.prompt, (0, 1), False)
    plan = StepPlan(41, (chunk,), (Binding(0, request, ()),))
    future = pair.group.submit(plan, lambda *event: told.append(event))
    future.add_done_callback(lambda _future: told.append((0, 0, 0)))
    assert future.result(60).tokens == {}
    wanted = {
        (41, layer, rank)
        for rank, shard in enumerate(pair.group.memory.shards)
        for layer in shard.layers
    }
    assert set(told[:-1]) == wanted
    assert len(told) == len(wanted) + 1
    for rank in range(len(pair.group.memory.shards)):
        layers = [layer for _, layer, shard in told[:-1] if shard == rank]
        assert layers == sorted(layers)


def test_a_strange_token_faults_its_request_only(
    pair: Pair, requests: list[Request], drive: Drive, make_request: Callable[..., Request]
) -> None:
    strange = make_request(9, (1, 1 << 20, 2), 4)
    faults: dict[Key, str] = {}
    seen = drive(pair.group, [strange, *requests], faults=faults)
    assert list(faults) == [strange.key]
    assert "outside the vocabulary" in faults[strange.key]
    assert {key: seen[key] for key in seen if key != strange.key} == drive(pair.group, requests)


def test_too_many_steps_are_refused(pair: Pair) -> None:
    limit = pair.pp - 1 + 2
    os.kill(pair.group.pids[-1], signal.SIGSTOP)
    try:
        futures = [pair.group.submit(StepPlan(step)) for step in range(limit)]
        with pytest.raises(LocalProtocolError, match=rf"with {limit} unfinished.*\({limit}\)"):
            pair.group.submit(StepPlan(limit))
    finally:
        os.kill(pair.group.pids[-1], signal.SIGCONT)
    assert [future.result(60).step for future in futures] == list(range(limit))


def test_a_cancelled_step_runs_all_the_same(
    pair: Pair, make_request: Callable[..., Request], random_tokens: Tokens
) -> None:
    request = make_request(1, random_tokens(12, 1), 4)
    chunk = Chunk(request.key, 0, 0, 12, request.prompt, (0, 1), True)
    first = StepPlan(0, (chunk,), (Binding(0, request, ()),))
    second = StepPlan(1, (Chunk(request.key, 0, 12, 13, (), (0, 1), True),))
    pair.group.submit(first).result(60)
    wanted = pair.group.submit(second).result(60)
    os.kill(pair.group.pids[0], signal.SIGSTOP)
    try:
        cancelled = pair.group.submit(first)
        assert cancelled.cancel()
    finally:
        os.kill(pair.group.pids[0], signal.SIGCONT)
    assert pair.group.submit(second).result(60) == wanted


@pytest.fixture(scope="module")
def stages(
    model_folder: Callable[[str], Path], start_group: Callable[..., GroupExecutor]
) -> GroupExecutor:
    """Two stages that share their guesses of what comes next."""
    return start_group(
        model_folder("mistral-window"),
        pp=2,
        step_depth=1,
        speculation=SpeculationConfig(proposer="ngram", draft_tokens=3),
    )


def test_the_first_stage_starts_a_step_before_the_last_has_ended_the_one_before(
    stages: GroupExecutor, make_request: Callable[..., Request]
) -> None:
    """The last stage stands still, so that the step before cannot have left it."""
    a, b = make_request(1, (1, 2, 3), 9), make_request(2, (4, 5), 9)
    entered = threading.Event()
    plans = [
        StepPlan(
            step,
            (Chunk(each.key, step, 0, len(each.prompt), each.prompt, (step,), True),),
            (Binding(step, each, ()),),
        )
        for step, each in enumerate((a, b))
    ]
    order: list[tuple[int, int, int]] = []

    def on_layer(step: int, layer: int, shard: int) -> None:
        order.append((step, layer, shard))
        if (step, shard) == (1, 0):
            entered.set()

    os.kill(stages.pids[1], signal.SIGSTOP)
    try:
        futures = [stages.submit(plan, on_layer) for plan in plans]
        assert entered.wait(60), "the first stage waits for the last"
        assert order == [(0, 0, 0), (1, 0, 0)]
        assert not futures[0].done()
    finally:
        os.kill(stages.pids[1], signal.SIGCONT)
    results = [future.result(60) for future in futures]
    assert [set(result.tokens) for result in results] == [{a.key}, {b.key}]
    assert order[2:] == [(0, 1, 1), (1, 1, 1)]


def test_guesses_change_no_token(
    stages: GroupExecutor, model_folder: Callable[[str], Path], make_request: Callable[..., Request]
) -> None:
    """The scheduler's part is played here: what was guessed is tried in the next step."""
    request = make_request(3, (5, 6, 7, 8) * 5, 24)
    blocks = tuple(range(8))

    def generate(executor: Any) -> tuple[list[SampledToken], int]:
        chunk = Chunk(request.key, 2, 0, 20, request.prompt, blocks, True)
        plan = StepPlan(0, (chunk,), (Binding(2, request, ()),))
        sampled: list[SampledToken] = []
        steps = 0
        while True:
            result = executor.submit(plan).result(60)
            sampled += result.tokens[request.key]
            steps += 1
            if len(sampled) >= 24:
                return sampled[:24], steps
            guesses = tuple(result.drafts.get(request.key, ()))
            start = 19 + len(sampled)
            tokens = (sampled[-1].token, *guesses) if guesses else ()
            chunk = Chunk(
                request.key, 2, start, start + 1 + len(guesses), tokens, blocks, True, len(guesses)
            )
            plan = StepPlan(steps, (chunk,))

    seen, steps = generate(stages)
    single = load_executor(
        ModelConfig(path=str(model_folder("mistral-window")), dtype="float32", backend="torch"),
        Resources(8, 200, 0, 16, 1, 4),
    )
    wanted, plain_steps = generate(single)
    single.close()
    assert seen == wanted
    assert plain_steps == 24
    assert steps < 24, "no guess was right: nothing was tried"
