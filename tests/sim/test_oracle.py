"""The oracle is one function of prompt, seed and index, and notices whatever is not its KV."""

from __future__ import annotations

import pytest

from pdserve.request import FinishReason, Key, Request, SamplingParams
from sim.oracle import POISON, KvChain, Oracle

PROMPT = (5, 6, 7, 8)


@pytest.fixture
def oracle() -> Oracle:
    return Oracle(layer_count=2, vocab_size=101, context_tokens_max=64)


def request(prompt: tuple[int, ...] = PROMPT, output_count: int = 8, **fields: object) -> Request:
    named: dict[str, object] = {"sampling": SamplingParams(temperature=0.0), **fields}
    return Request(Key("a" * 32, 0), prompt, output_count, **named)  # type: ignore[arg-type]


def test_a_resumed_request_goes_on_as_the_undisturbed_one(oracle: Oracle) -> None:
    whole, finish = oracle.reference(request())
    assert finish is FinishReason.LENGTH
    assert len(whole) == 8
    for count in range(8):
        assert oracle.reference(request(emitted=whole[:count])) == (whole, finish)


def test_output_depends_on_every_token_of_the_prompt_and_on_the_seed(oracle: Oracle) -> None:
    seen = {oracle.reference(request())[0]}
    for position in range(len(PROMPT)):
        other = (*PROMPT[:position], 99, *PROMPT[position + 1 :])
        seen.add(oracle.reference(request(other))[0])
    for seed in range(4):
        sampling = SamplingParams(temperature=1.0, seed=seed)
        seen.add(oracle.reference(request(sampling=sampling))[0])
    assert len(seen) == 1 + len(PROMPT) + 4


def test_output_ends_at_a_stop_token_at_the_limit_and_at_the_context(oracle: Oracle) -> None:
    whole, _ = oracle.reference(request())
    stopped, finish = oracle.reference(request(stop_tokens=frozenset({whole[3]})))
    assert stopped == whole[: whole.index(whole[3]) + 1]
    assert finish is FinishReason.STOP
    full, finish = oracle.reference(request(PROMPT * 15, 20))
    assert finish is FinishReason.LENGTH
    assert len(full) == 64 - 60


def test_no_token_is_poison_and_all_are_words_of_the_model(oracle: Oracle) -> None:
    tokens = {
        token
        for seed in range(50)
        for token in oracle.reference(
            request(output_count=20, sampling=SamplingParams(temperature=1.0, seed=seed))
        )[0]
    }
    assert POISON not in tokens
    assert min(tokens) >= 1
    assert max(tokens) < 101


def test_kv_depends_on_tenant_layer_and_all_tokens_before() -> None:
    def words(salt: bytes, tokens: tuple[int, ...]) -> list[int]:
        chain = KvChain(2, salt)
        chain.extend(tokens)
        return [word for layer in chain.words for word in layer]

    assert words(b"", (1, 2, 3)) == words(b"", (1, 2, 3))
    # One by one or at once: how a prompt was cut does not matter.
    chain = KvChain(2, b"")
    for token in (1, 2, 3):
        chain.extend((token,))
    assert [word for layer in chain.words for word in layer] == words(b"", (1, 2, 3))
    all_words = [*words(b"", (1, 2, 3)), *words(b"x", (1, 2, 3)), *words(b"", (2, 2, 3))]
    assert len(set(all_words)) == 18


def test_a_foreign_word_is_named(oracle: Oracle) -> None:
    key = Key("b" * 32, 1)
    oracle.chain(key, b"").extend((4, 5, 6))
    word = oracle.chains[key].words[1][2]
    assert oracle.whose(word) == f"layer 1, position 2 of {key!r}"
    assert "never written" in oracle.whose(0)
    assert "no sequence" in oracle.whose(word ^ 1)


def test_layers_are_bounded() -> None:
    with pytest.raises(ValueError, match="layer_count is 9"):
        Oracle(layer_count=9, vocab_size=101, context_tokens_max=64)
