"""Who guesses, how well and with whom changes no token: scheduler and executor together."""

from collections import deque
from collections.abc import Callable, Iterator, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

from bench.speculation import BLOCK_TOKENS, Decoded, Decoding, open_executor
from engine.device.executor import TorchExecutor
from engine.device.model import Model
from engine.speculation.choice import Guessing, for_prefill
from engine.step import Binding, Chunk, SampledToken, StepPlan
from pdserve.config import SpeculationConfig
from pdserve.errors import InvalidConfig, InvalidModel
from pdserve.request import Key, Request, SamplingParams

TARGET = "llama-gqa-tied-llama3"  # 2 layers, 2 kv heads of 16, 203 tokens
WINDOWED = "qwen3-layer-types-bias"  # the same shape of KV, other weights
SAMPLING: list[dict[str, Any]] = [
    {"temperature": 0.0},
    {"temperature": 1.0},
    {"temperature": 0.0, "repetition_penalty": 1.3, "frequency_penalty": 0.4},
    {"temperature": 0.7, "top_p": 0.9, "presence_penalty": 0.8},
    {"temperature": 0.0, "logprob_count": 2, "logit_bias": ((7, 2.0), (9, -5.0))},
    {"temperature": 0.3, "top_k": 20, "min_p": 0.01},
]


def make_requests(count: int, output_max: int = 24) -> list[Request]:
    """All different: sampling, lengths, minima, stops; prompts that repeat themselves."""
    generator = torch.Generator().manual_seed(8)
    requests: list[Request] = []
    for number in range(count):
        some: list[int] = torch.randint(0, 203, (5 + 3 * number,), generator=generator).tolist()
        requests.append(
            Request(
                Key(f"{number:032x}", 0),
                (*some, *some, *some[:3]),
                output_max - number % 5,
                output_tokens_min=number % 4,
                stop_tokens=frozenset(range(number % 3 * 2)),
                sampling=SamplingParams(seed=number, **SAMPLING[number % len(SAMPLING)]),
            )
        )
    return requests


@pytest.fixture(scope="module")
def open_one(model_folder: Callable[[str], Path]) -> Iterator[Callable[..., TorchExecutor]]:
    """Start executors of the target; they are closed after the module."""
    started: dict[SpeculationConfig, TorchExecutor] = {}

    def start(config: SpeculationConfig) -> TorchExecutor:
        if config not in started:
            started[config] = open_executor(
                model_folder(TARGET), config, block_count=80, sequences_max=6
            )
        return started[config]

    yield start
    for executor in started.values():
        executor.close()


@pytest.fixture(scope="module")
def wanted(open_one: Callable[..., TorchExecutor]) -> dict[Key, list[SampledToken]]:
    """What nobody guessing gives, one request after the other."""
    executor = open_one(SpeculationConfig())
    tokens: dict[Key, list[SampledToken]] = {}
    for request in make_requests(12):
        tokens |= Decoding(executor, Guessing(), sequences_max=1).run([request]).tokens
    return tokens


@pytest.fixture(scope="module")
def configs(model_folder: Callable[[str], Path]) -> dict[str, SpeculationConfig]:
    itself, other = (str(model_folder(name)) for name in (TARGET, WINDOWED))
    return {
        "naive": SpeculationConfig(),
        "ngram": SpeculationConfig(proposer="ngram", draft_tokens=5),
        "suffix": SpeculationConfig(proposer="suffix", draft_tokens=3),
        "draft: itself": SpeculationConfig(proposer="draft", draft_path=itself, draft_tokens=4),
        "draft: other": SpeculationConfig(proposer="draft", draft_path=other, draft_tokens=2),
    }


NAMES = ["naive", "ngram", "suffix", "draft: itself", "draft: other"]


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize(("step_depth", "microbatch_count"), [(1, 1), (3, 2)])
def test_every_proposer_gives_the_very_tokens_of_no_proposer(
    name: str,
    step_depth: int,
    microbatch_count: int,
    open_one: Callable[..., TorchExecutor],
    configs: dict[str, SpeculationConfig],
    wanted: dict[Key, list[SampledToken]],
) -> None:
    decoding = Decoding(
        open_one(configs[name]),
        Guessing.of(configs[name]),
        sequences_max=6,
        step_depth=step_depth,
        microbatch_count=microbatch_count,
    )
    decoded = decoding.run(make_requests(12))
    assert decoded.tokens == wanted
    assert decoded.faults == {}
    assert decoding.pool.counts.is_baseline
    decoding.scheduler.check()
    expected_share = {"naive": 0.0, "draft: itself": 1.0}
    if name in expected_share:
        right, guessed = decoded.right_count, decoded.guess_count
        assert right == guessed * expected_share[name]
        assert (guessed > 0) == (name != "naive")


def test_a_draft_model_of_the_same_mind_saves_most_steps(
    open_one: Callable[..., TorchExecutor], configs: dict[str, SpeculationConfig]
) -> None:
    """At every temperature and with every penalty: it draws with the same random numbers."""
    config = configs["draft: itself"]
    requests = [replace(each, stop_tokens=frozenset()) for each in make_requests(6)]
    decoded = Decoding(open_one(config), Guessing.of(config), sequences_max=6).run(requests)
    # 23 tokens behind the first one: one alone, then 5 with each step.
    assert decoded.step_count == 6


def test_a_request_resumed_in_the_middle_goes_on_as_before(
    open_one: Callable[..., TorchExecutor],
    configs: dict[str, SpeculationConfig],
    wanted: dict[Key, list[SampledToken]],
) -> None:
    for name in NAMES:
        executor = open_one(configs[name])
        resumed = [
            replace(
                request,
                key=Key(request.key.request_id, 1),
                emitted=tuple(each.token for each in wanted[request.key][:kept]),
            )
            for request in make_requests(12)
            if len(wanted[request.key]) > (kept := 3 + len(request.prompt) % 4)
        ]
        decoded = Decoding(executor, Guessing.of(configs[name]), sequences_max=6).run(resumed)
        for request in resumed:
            before = wanted[Key(request.key.request_id, 0)]
            assert decoded.tokens[request.key] == before[len(request.emitted) :]


def test_a_broken_request_does_not_touch_the_guesses_of_others(
    open_one: Callable[..., TorchExecutor],
    configs: dict[str, SpeculationConfig],
    wanted: dict[Key, list[SampledToken]],
) -> None:
    good = make_requests(4)
    broken = replace(good[0], key=Key("f" * 32, 0), prompt=(*good[0].prompt, 9999))
    for name in NAMES:
        decoding = Decoding(open_one(configs[name]), Guessing.of(configs[name]), sequences_max=6)
        decoded = decoding.run([*good[:2], broken, *good[2:]])
        assert "token 9999 is outside the vocabulary" in decoded.faults[broken.key]
        for request in good:
            assert decoded.tokens[request.key] == wanted[request.key]


def decode_by_hand(
    executor: TorchExecutor, request: Request, guesses: Sequence[Sequence[int]]
) -> list[list[SampledToken]]:
    """Run a prompt, then one chunk for each of ``guesses``, whatever they are."""
    blocks, count = tuple(range(8)), len(request.prompt)
    prompt = Chunk(request.key, 0, 0, count, request.prompt, blocks, samples=True)
    plans = StepPlan(0, (prompt,), (Binding(0, request, ()),))
    told = [list(executor.submit(plans).result(timeout=60).tokens[request.key])]
    for step, some in enumerate(guesses):
        start = count + sum(map(len, told)) - 1
        tokens = (told[-1][-1].token, *some)
        stop = start + len(tokens)
        chunk = Chunk(request.key, 0, start, stop, tokens, blocks, True, len(some))
        result = executor.submit(StepPlan(1 + step, (chunk,))).result(timeout=60)
        told.append(list(result.tokens[request.key]))
    return told


def test_any_guesses_at_all_leave_the_tokens_alone(
    open_one: Callable[..., TorchExecutor], wanted: dict[Key, list[SampledToken]]
) -> None:
    """Right ones, wrong ones, ones outside the vocabulary: what is kept is what was sampled."""
    executor = open_one(SpeculationConfig())
    for request in make_requests(12):
        tokens = [each.token for each in wanted[request.key]]
        if len(tokens) < 12:
            continue
        some = [tokens[1:4], [tokens[5] ^ 1, tokens[6]], [10**9, -5], [], [tokens[8]]]
        told = decode_by_hand(executor, request, some)
        assert [len(each) for each in told] == [1, 4, 1, 1, 1, 2]
        assert [each for some in told for each in some] == wanted[request.key][:10]


def test_a_draft_models_kv_crosses_the_hand_off_like_any_other(
    model_folder: Callable[[str], Path],
    configs: dict[str, SpeculationConfig],
    open_one: Callable[..., TorchExecutor],
    wanted: dict[Key, list[SampledToken]],
) -> None:
    """Computed and signalled layer by layer on one side, right at once on the other."""
    config = configs["draft: itself"]
    prefill = open_executor(
        model_folder(TARGET), for_prefill(config), block_count=80, sequences_max=1
    )
    decode = open_one(config)
    try:
        assert prefill.memory.layout == decode.memory.layout
        assert prefill.memory.layout.layer_count == 4
        request = make_requests(1)[0]
        count = len(request.prompt)
        blocks = tuple(range(-(-count // BLOCK_TOKENS)))
        layers: list[int] = []
        binding, first = Binding(0, request, ()), 0
        for start, stop in ((0, 5), (5, count)):
            tokens = request.prompt[start:stop]
            covering = blocks[: -(-stop // BLOCK_TOKENS)]
            chunk = Chunk(request.key, 0, start, stop, tokens, covering, stop == count)
            plan = StepPlan(start, (chunk,), () if start else (binding,))
            result = prefill.submit(plan, lambda _s, layer, _r: layers.append(layer)).result(60)
            assert result.drafts == {}
        assert layers == [0, 1, 2, 3] * 2
        first = result.tokens[request.key][0].token
        assert prefill._pool is not None
        assert decode._pool is not None
        with torch.inference_mode():
            decode._pool._blocks[:, : len(blocks)] = prefill._pool._blocks[:, : len(blocks)]
    finally:
        prefill.close()
    step = Chunk(request.key, 0, count, count + 1, (first,), tuple(range(8)), samples=True)
    plan = StepPlan(0, (step,), (Binding(0, request, (first,)),))
    result = decode.submit(plan).result(60)
    tokens = [each.token for each in wanted[request.key]]
    assert result.tokens[request.key][0].token == tokens[1]
    assert list(result.drafts[request.key]) == tokens[2:6]


@pytest.mark.parametrize("name", ["draft: other", "draft: itself"])
def test_a_draft_models_kv_is_right_whatever_was_tried_and_wherever_it_was(
    name: str, open_one: Callable[..., TorchExecutor], configs: dict[str, SpeculationConfig]
) -> None:
    """After every step it guesses what one would that reads the whole text for the first time.

    Its own guesses are tried, or others', or none; and blocks behind the last token's are
    other ones in the next step, as where they were lent and given back.
    """
    executor = open_one(configs[name])
    request = replace(make_requests(2)[0], output_tokens_max=50, stop_tokens=frozenset())
    truth = Decoding(executor, Guessing(), sequences_max=1).run([request]).tokens[request.key]
    text = (*request.prompt, *(each.token for each in truth))
    twin = replace(request, key=Key("b" * 32, 0))
    count = len(request.prompt)
    spare = deque(range(20, 40))
    blocks: tuple[int, ...] = (10, 11)
    stop, drafts = count, ()
    plan = StepPlan(
        0,
        (Chunk(request.key, 0, 0, count, request.prompt, blocks, samples=True),),
        (Binding(0, request, ()),),
    )
    for step in range(1, 24):
        result = executor.submit(plan).result(60)
        drafts = result.drafts[request.key]
        stop += len(result.tokens[request.key])
        assert [each.token for each in result.tokens[request.key]][-1] == text[stop - 1]
        fresh = Chunk(twin.key, 1, 0, stop - 1, text[: stop - 1], (0, 1, 2, 3, 4, 5), samples=True)
        binding = Binding(1, twin, text[count : stop - 1])
        again = executor.submit(StepPlan(100 + step, (fresh,), (binding,))).result(60)
        assert again.drafts[twin.key] == drafts
        tried = (drafts, text[stop : stop + 4], ())[step % 3]
        kept_count = (stop - 1) // BLOCK_TOKENS + 1
        spare.rotate()
        blocks = (*blocks[:kept_count], spare[0], spare[1])
        chunk = Chunk(
            request.key,
            0,
            stop - 1,
            stop + len(tried),
            (text[stop - 1], *tried),
            blocks,
            samples=True,
            draft_count=len(tried),
        )
        plan = StepPlan(step, (chunk,))
        if stop + 8 > len(text):
            break
    assert stop > count + 35


def test_a_draft_model_guesses_no_further_than_its_blocks_and_its_request(
    open_one: Callable[..., TorchExecutor], configs: dict[str, SpeculationConfig]
) -> None:
    executor = open_one(configs["draft: itself"])
    # In one block of 16, behind a prompt of 13 and two tokens, one place is left; it and the last
    # token's own can be asked for a guess each.
    for count, blocks, output_max, guess_count in (
        (13, (0,), 50, 2),
        (15, (0,), 50, 0),
        (13, (0, 1), 50, 4),
        (13, (0, 1), 4, 1),
        (13, (0, 1), 3, 0),
    ):
        request = Request(Key("a" * 32, 0), tuple(range(1, 1 + count)), output_max)
        chunk = Chunk(request.key, 0, 0, count, request.prompt, (0,), samples=True)
        plan = StepPlan(0, (chunk,), (Binding(0, request, ()),))
        first = executor.submit(plan).result(60).tokens[request.key][0].token
        chunk = Chunk(request.key, 0, count, count + 1, (first,), blocks, samples=True)
        drafts = executor.submit(StepPlan(1, (chunk,))).result(60).drafts
        assert len(drafts.get(request.key, ())) == guess_count


class Speechless:
    """A model whose every logit is not a number."""

    def __init__(self, model: Model) -> None:
        self.spec = model.spec
        self._model = model

    def forward(self, *arguments: Any) -> tuple[torch.Tensor, tuple[int, ...]]:
        logits, owners = self._model.forward(*arguments)
        return logits.fill_(float("nan")), owners


def test_a_draft_model_that_says_nothing_sensible_costs_guesses_and_no_tokens(
    model_folder: Callable[[str], Path],
    configs: dict[str, SpeculationConfig],
    wanted: dict[Key, list[SampledToken]],
) -> None:
    config = configs["draft: other"]
    executor = open_executor(model_folder(TARGET), config, block_count=80, sequences_max=6)
    try:
        guesser: Any = executor._runner._guesser
        guesser._model = Speechless(guesser._model)
        decoded = Decoding(executor, Guessing.of(config), sequences_max=6).run(make_requests(6))
    finally:
        executor.close()
    assert decoded.guess_count == 0
    assert all(tokens == wanted[key] for key, tokens in decoded.tokens.items())


@pytest.mark.parametrize(
    ("name", "field"),
    [
        ("llama-mha-biases-linear-sharded", "num_key_value_heads"),
        ("qwen3-yarn-head64", "head_dim"),
    ],
)
def test_a_draft_model_of_another_form_is_refused(
    name: str, field: str, model_folder: Callable[[str], Path]
) -> None:
    config = SpeculationConfig(proposer="draft", draft_path=str(model_folder(name)))
    with pytest.raises(InvalidModel, match=f"{field} of the draft model is"):
        open_executor(model_folder(TARGET), config, block_count=8, sequences_max=1)


def test_a_draft_model_must_be_named(model_folder: Callable[[str], Path]) -> None:
    with pytest.raises(InvalidConfig, match="draft_path is empty"):
        open_executor(
            model_folder(TARGET),
            SpeculationConfig(proposer="draft"),
            block_count=8,
            sequences_max=1,
        )


def test_other_weights_forget_every_text(
    open_one: Callable[..., TorchExecutor], configs: dict[str, SpeculationConfig]
) -> None:
    for name in ("ngram", "suffix", "draft: itself"):
        executor = open_one(configs[name])
        _decode_something(executor, configs[name])
        guesser: Any = executor._runner._guesser
        holder = guesser._proposer if hasattr(guesser, "_proposer") else guesser
        assert holder._texts
        executor._runner.unbind()
        assert not holder._texts


def _decode_something(executor: TorchExecutor, config: SpeculationConfig) -> Decoded:
    return Decoding(executor, Guessing.of(config), sequences_max=6).run(make_requests(2))
