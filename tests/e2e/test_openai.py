"""The standard client against two prefill and two decode workers."""

import asyncio
from typing import Any

import openai
import pytest

pytestmark = pytest.mark.slow  # real processes: left out of `make check`, not of `make test`

FOX = [{"role": "user", "content": "Tell me a story about a fox."}]


def test_a_chat_answer_is_readable_and_counted(quiet_cluster: Any) -> None:
    client = quiet_cluster.client()
    answer = client.chat.completions.create(
        model=quiet_cluster.model, messages=FOX, temperature=0, max_tokens=200
    )
    text = answer.choices[0].message.content
    assert "fox" in text.lower()
    assert answer.choices[0].finish_reason in {"stop", "length"}
    assert answer.usage.total_tokens == answer.usage.prompt_tokens + answer.usage.completion_tokens


def test_a_stream_adds_up_to_the_whole_answer_with_usage(quiet_cluster: Any) -> None:
    client = quiet_cluster.client()
    whole = client.chat.completions.create(
        model=quiet_cluster.model, messages=FOX, temperature=0, max_tokens=80
    )
    chunks = list(
        client.chat.completions.create(
            model=quiet_cluster.model,
            messages=FOX,
            temperature=0,
            max_tokens=80,
            stream=True,
            stream_options={"include_usage": True},
        )
    )
    text = "".join(chunk.choices[0].delta.content or "" for chunk in chunks if chunk.choices)
    assert text == whole.choices[0].message.content
    assert chunks[-1].usage == whole.usage
    ends = [chunk.choices[0].finish_reason for chunk in chunks if chunk.choices]
    assert [end for end in ends if end] == [whole.choices[0].finish_reason]


def test_a_stop_string_across_token_borders_ends_the_text_before_it(quiet_cluster: Any) -> None:
    client = quiet_cluster.client()
    options = {"model": quiet_cluster.model, "messages": FOX, "temperature": 0, "max_tokens": 80}
    text = client.chat.completions.create(**options).choices[0].message.content
    stop = text[11:23]
    answer = client.chat.completions.create(**options, stop=[stop, "never seen"])
    assert answer.choices[0].message.content == text[: text.index(stop)]
    assert answer.choices[0].finish_reason == "stop"
    streamed = client.chat.completions.create(**options, stop=stop, stream=True)
    pieces = [chunk.choices[0].delta.content or "" for chunk in streamed if chunk.choices]
    assert "".join(pieces) == text[: text.index(stop)]


def test_multi_byte_text_is_never_split(quiet_cluster: Any) -> None:
    client = quiet_cluster.client()
    prompt = "héllo wörld — 狐狸 🦊 ☃"
    stream = client.completions.create(
        model=quiet_cluster.model,
        prompt=prompt,
        max_tokens=60,
        temperature=1.5,
        seed=11,
        stream=True,
        extra_body={"ignore_eos": True, "return_token_ids": True},
    )
    pieces, tokens = [], []
    for chunk in stream:
        pieces.append(chunk.choices[0].text)
        tokens += chunk.choices[0].token_ids or []
    whole = client.completions.create(
        model=quiet_cluster.model,
        prompt=prompt,
        max_tokens=60,
        temperature=1.5,
        seed=11,
        extra_body={"ignore_eos": True, "return_token_ids": True},
    )
    assert tokens == whole.choices[0].token_ids
    assert "".join(pieces) == whole.choices[0].text


def test_log_probabilities_come_with_each_token(quiet_cluster: Any) -> None:
    client = quiet_cluster.client()
    chat = client.chat.completions.create(
        model=quiet_cluster.model,
        messages=FOX,
        temperature=0,
        max_tokens=12,
        logprobs=True,
        top_logprobs=3,
    )
    rows = chat.choices[0].logprobs.content
    assert len(rows) == chat.usage.completion_tokens
    for row in rows:
        assert len(row.top_logprobs) == 3
        assert row.logprob == pytest.approx(row.top_logprobs[0].logprob)
        assert row.logprob <= 0
    text = client.completions.create(
        model=quiet_cluster.model, prompt="Once", temperature=0, max_tokens=5, logprobs=2
    )
    logprobs = text.choices[0].logprobs
    assert len(logprobs.tokens) == len(logprobs.token_logprobs) == text.usage.completion_tokens
    assert "".join(logprobs.tokens) == text.choices[0].text


def test_the_same_seed_gives_the_same_text_and_choices_differ(quiet_cluster: Any) -> None:
    client = quiet_cluster.client()
    options = {
        "model": quiet_cluster.model,
        "prompt": "The",
        "max_tokens": 30,
        "temperature": 1.2,
        "n": 3,
        "extra_body": {"ignore_eos": True},
    }
    one = client.completions.create(**options, seed=5)
    two = client.completions.create(**options, seed=5)
    texts = [choice.text for choice in one.choices]
    assert texts == [choice.text for choice in two.choices]
    assert len(set(texts)) > 1
    assert [choice.index for choice in one.choices] == [0, 1, 2]


def test_limits_are_kept(quiet_cluster: Any) -> None:
    client = quiet_cluster.client()
    for tokens in (1, 2, 5):
        answer = client.completions.create(
            model=quiet_cluster.model,
            prompt="A",
            max_tokens=tokens,
            temperature=0,
            extra_body={"min_tokens": tokens, "ignore_eos": False},
        )
        assert answer.usage.completion_tokens == tokens
        assert answer.choices[0].finish_reason == "length"


async def test_thirty_two_streams_at_once_each_get_their_own_tokens(quiet_cluster: Any) -> None:
    client = quiet_cluster.async_client()

    async def read(number: int) -> list[int]:
        tokens: list[int] = []
        stream = await client.completions.create(
            model=quiet_cluster.model,
            prompt=[20 + number % 8] * (5 + 9 * (number % 8)),
            max_tokens=40,
            temperature=0,
            stream=True,
            extra_body={"ignore_eos": True, "return_token_ids": True},
        )
        async for chunk in stream:
            for choice in chunk.choices:
                tokens += choice.token_ids or []  # type: ignore[attr-defined]
        return tokens

    answers = await asyncio.gather(*(read(number) for number in range(32)))
    await client.close()
    for number, tokens in enumerate(answers):
        assert len(tokens) == 40
        assert tokens == answers[number % 8]
    assert len({tuple(tokens) for tokens in answers}) > 1


def test_errors_of_the_caller_are_errors_of_the_client(quiet_cluster: Any) -> None:
    client = quiet_cluster.client()
    with pytest.raises(openai.NotFoundError):
        client.completions.create(model="nobody", prompt="A")
    with pytest.raises(openai.BadRequestError, match="max_tokens"):
        client.completions.create(model=quiet_cluster.model, prompt="A", max_tokens=-1)
    with pytest.raises(openai.BadRequestError):
        client.completions.create(model=quiet_cluster.model, prompt=[3] * 100_000)
