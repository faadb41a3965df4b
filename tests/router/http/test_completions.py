"""/v1/completions, driven by the client everybody uses."""

import asyncio
from collections.abc import Sequence
from typing import Any

import openai
import pytest

from pdserve.request import FinishReason, SamplingParams
from router.api import GenerationSpec, OutputEnd, OutputToken
from router.model_folder import ModelFolder

(LETTER_A,) = ModelFolder.load("", "").codec.encode("A", adds_special=False, tokens_max=1)


async def text_of(stream: Any, index: int = 0) -> tuple[str, str | None]:
    """Join a stream's text of one choice, with how it ended."""
    text, finish = "", None
    async for chunk in stream:
        for choice in chunk.choices:
            if choice.index == index:
                text += choice.text
                finish = choice.finish_reason or finish
    return text, finish


async def test_a_text_comes_back_whole_and_counted(served: Any) -> None:
    answer = await served.openai.completions.create(model="demo", prompt="Tell me", max_tokens=100)
    assert answer.choices[0].text == "Once there was a fox."
    assert answer.choices[0].finish_reason == "stop"
    generation = await served.arrival()
    assert answer.usage.prompt_tokens == len(generation.spec.prompt)
    assert answer.usage.completion_tokens == generation.fetched_count - 1
    assert answer.usage.total_tokens == answer.usage.prompt_tokens + answer.usage.completion_tokens
    assert answer.id == f"cmpl-{generation.request_id}"


async def test_a_stream_adds_up_to_the_same_text(served: Any) -> None:
    stream = await served.openai.completions.create(
        model="demo", prompt="Tell me", max_tokens=100, stream=True
    )
    assert await text_of(stream) == ("Once there was a fox.", "stop")


async def test_a_finished_generation_is_neither_stopped_nor_abandoned(served: Any) -> None:
    await served.openai.completions.create(model="demo", prompt="Tell me", max_tokens=100)
    generation = await served.arrival()
    assert not generation.stopped.is_set()
    assert not generation.abandoned.is_set()


async def test_what_has_come_together_leaves_in_one_event(served: Any) -> None:
    served.core.batch_size = 1000
    body = {"prompt": "Tell me", "max_tokens": 100, "stream": True}
    raw = await served.http.post("/v1/completions", json=body)
    events = raw.text.split("\n\n")
    assert len(events) == 3  # all tokens, [DONE], and nothing behind it
    assert events[1:] == ["data: [DONE]", ""]
    assert raw.headers["content-type"].startswith("text/event-stream")


@pytest.mark.parametrize(
    "prompt",
    ["a fox", ["a fox", "a dog", "a cat"], [20, 21, 22], [[20, 21], [22, 23, 24]]],
    ids=["text", "texts", "tokens", "token lists"],
)
async def test_every_shape_of_prompt_reaches_the_core_in_order(served: Any, prompt: Any) -> None:
    answer = await served.openai.completions.create(model="demo", prompt=prompt, n=2)
    prompts = prompt if isinstance(prompt, list) and not isinstance(prompt[0], int) else [prompt]
    wanted = [
        tuple(one)
        if isinstance(one, list)
        else served.model.codec.encode(one, adds_special=True, tokens_max=100)
        for one in prompts
        for _ in range(2)
    ]
    assert [generation.spec.prompt for generation in served.core.started] == wanted
    assert [choice.index for choice in answer.choices] == list(range(len(wanted)))
    assert answer.usage.prompt_tokens == sum(map(len, wanted)) // 2


async def test_streamed_choices_carry_their_own_index(served: Any) -> None:
    def spell(spec: GenerationSpec) -> Sequence[OutputToken | OutputEnd]:
        # Each choice repeats one letter, told by its seed.
        tokens = [OutputToken(at, LETTER_A + spec.sampling.seed, 0.0, ()) for at in range(5)]
        return [*tokens, OutputEnd(FinishReason.LENGTH)]

    served.core.script = spell
    stream = await served.openai.completions.create(
        model="demo", prompt="x", n=3, seed=0, stream=True
    )
    texts = {0: "", 1: "", 2: ""}
    async for chunk in stream:
        for choice in chunk.choices:
            texts[choice.index] += choice.text
    assert texts == {0: "AAAAA", 1: "BBBBB", 2: "CCCCC"}


async def test_choices_have_seeds_of_their_own_and_prompts_do_not(served: Any) -> None:
    await served.openai.completions.create(model="demo", prompt=["a", "b"], n=2, seed=(1 << 63) - 1)
    seeds = [generation.spec.sampling.seed for generation in served.core.started]
    assert seeds == [(1 << 63) - 1, 1 << 63] * 2
    body = {"prompt": "x", "seed": (1 << 64) - 1, "n": 2}
    assert (await served.http.post("/v1/completions", json=body)).status_code == 200
    assert [one.spec.sampling.seed for one in served.core.started[4:]] == [(1 << 64) - 1, 0]


async def test_unset_seeds_differ(served: Any) -> None:
    await served.openai.completions.create(model="demo", prompt="a", n=8)
    assert len({generation.spec.sampling.seed for generation in served.core.started}) == 8


async def test_every_parameter_reaches_the_core(served: Any) -> None:
    await served.openai.completions.create(
        model="demo",
        prompt="a",
        max_tokens=40,
        temperature=0.5,
        top_p=0.25,
        presence_penalty=-1,
        frequency_penalty=1.5,
        logit_bias={"7": -100, "3": 2.5},
        seed=9,
        logprobs=4,
        user="somebody",
        extra_body={
            "top_k": 11,
            "min_p": 0.125,
            "repetition_penalty": 1.25,
            "min_tokens": 5,
            "ignore_eos": True,
            "stop_token_ids": [55, 56],
            "cache_salt": "pepper",
            "something_new": {"ignored": True},
        },
    )
    spec = (await served.arrival()).spec
    assert spec.sampling == SamplingParams(
        temperature=0.5,
        top_k=11,
        top_p=0.25,
        min_p=0.125,
        repetition_penalty=1.25,
        presence_penalty=-1.0,
        frequency_penalty=1.5,
        logit_bias=((3, 2.5), (7, -100.0)),
        seed=9,
        logprob_count=4,
    )
    assert (spec.output_tokens_max, spec.output_tokens_min) == (40, 5)
    assert spec.stop_tokens == {55, 56}  # end of text is ignored
    assert len(spec.cache_salt) == 16


async def test_what_is_not_said_has_the_api_s_defaults(served: Any) -> None:
    await served.http.post("/v1/completions", json={"prompt": "a"})
    spec = (await served.arrival()).spec
    seed = spec.sampling.seed
    assert spec.sampling == SamplingParams(seed=seed)
    assert (spec.output_tokens_max, spec.output_tokens_min) == (16, 0)
    assert spec.stop_tokens == served.model.eos_tokens == {0}
    assert spec.cache_salt == b""


async def test_different_salts_reach_the_cache_differently(served: Any) -> None:
    for salt in ("a", "b", "a"):
        await served.http.post("/v1/completions", json={"prompt": "x", "cache_salt": salt})
    first, second, third = [generation.spec.cache_salt for generation in served.core.started]
    assert first == third != second


@pytest.mark.parametrize("batch_size", [1, 3, 1000])
async def test_a_stop_string_across_token_borders_never_shows(served: Any, batch_size: int) -> None:
    served.core.batch_size = batch_size
    stop = ["ere wa", "unseen"]  # starts and ends inside tokens
    stream = await served.openai.completions.create(
        model="demo", prompt="x", max_tokens=100, stop=stop, stream=True
    )
    assert await text_of(stream) == ("Once th", "stop")
    whole = await served.openai.completions.create(
        model="demo", prompt="x", max_tokens=100, stop=stop
    )
    assert (whole.choices[0].text, whole.choices[0].finish_reason) == ("Once th", "stop")


async def test_a_stop_string_frees_the_workers(served: Any) -> None:
    await served.openai.completions.create(model="demo", prompt="x", max_tokens=99, stop="there")
    generation = await served.arrival()
    assert generation.stopped.is_set()
    assert generation.fetched_count < len(generation.script)


async def test_what_only_looked_like_a_stop_string_is_shown_in_the_end(served: Any) -> None:
    stream = await served.openai.completions.create(
        model="demo", prompt="x", max_tokens=100, stop="fox.!", stream=True
    )
    assert await text_of(stream) == ("Once there was a fox.", "stop")


async def test_stop_strings_count_only_behind_min_tokens(served: Any) -> None:
    served.core.text = "a a a a a a"
    answer = await served.openai.completions.create(
        model="demo", prompt="x", max_tokens=99, stop=" a", extra_body={"min_tokens": 3}
    )
    assert answer.choices[0].text == "a a a"


async def test_characters_of_many_bytes_are_never_split(served: Any) -> None:
    served.core.text = "狐狸 🦊 ☃ é — done"
    stream = await served.openai.completions.create(
        model="demo", prompt="x", max_tokens=200, stream=True
    )
    pieces = [chunk.choices[0].text async for chunk in stream]
    assert "".join(pieces) == served.core.text
    assert not any("\ufffd" in piece for piece in pieces)


async def test_half_a_character_at_the_end_is_shown_as_unreadable(served: Any) -> None:
    served.core.text = "ok 🦊"
    tokens = served.model.codec.encode("ok 🦊", adds_special=False, tokens_max=100)
    answer = await served.openai.completions.create(
        model="demo", prompt="x", max_tokens=len(tokens) - 1
    )
    assert answer.choices[0].text == "ok \ufffd"
    assert answer.choices[0].finish_reason == "length"


async def test_log_probabilities_come_with_every_token(served: Any) -> None:
    whole = await served.openai.completions.create(
        model="demo", prompt="x", max_tokens=100, logprobs=2
    )
    logprobs = whole.choices[0].logprobs
    assert "".join(logprobs.tokens[:-1]) == whole.choices[0].text
    assert logprobs.tokens[-1] == "<|end|>"
    assert logprobs.token_logprobs == [-0.5] * len(logprobs.tokens)
    assert all(
        token in top for token, top in zip(logprobs.tokens, logprobs.top_logprobs, strict=True)
    )
    for token, offset in zip(logprobs.tokens[:-1], logprobs.text_offset, strict=False):
        assert whole.choices[0].text[offset:].startswith(token)
    stream = await served.openai.completions.create(
        model="demo", prompt="x", max_tokens=100, logprobs=2, stream=True
    )
    streamed = [chunk.choices[0].logprobs async for chunk in stream]
    assert [token for part in streamed if part for token in part.tokens] == logprobs.tokens
    assert [at for part in streamed if part for at in part.text_offset] == logprobs.text_offset


async def test_token_ids_come_where_they_are_asked_for(served: Any) -> None:
    extra = {"return_token_ids": True}
    whole = await served.openai.completions.create(
        model="demo", prompt=[20, 21], max_tokens=100, extra_body=extra
    )
    generation = await served.arrival()
    wanted = [one.token for one in generation.script if isinstance(one, OutputToken)]
    assert whole.choices[0].token_ids == wanted
    assert whole.choices[0].prompt_token_ids == [20, 21]
    stream = await served.openai.completions.create(
        model="demo", prompt=[20, 21], max_tokens=100, stream=True, extra_body=extra
    )
    chunks = [chunk.choices[0] async for chunk in stream]
    assert [token for chunk in chunks for token in chunk.token_ids] == wanted
    assert chunks[0].prompt_token_ids == [20, 21]
    assert not hasattr(chunks[1], "prompt_token_ids")
    plain = await served.openai.completions.create(model="demo", prompt=[20, 21])
    assert not hasattr(plain.choices[0], "token_ids")


async def test_usage_closes_the_stream_where_asked_for(served: Any) -> None:
    stream = await served.openai.completions.create(
        model="demo",
        prompt="x",
        n=2,
        max_tokens=100,
        stream=True,
        stream_options={"include_usage": True},
    )
    chunks = [chunk async for chunk in stream]
    assert chunks[-1].choices == []
    assert all(chunk.usage is None for chunk in chunks[:-1])
    counted = sum(generation.fetched_count - 1 for generation in served.core.started)
    assert chunks[-1].usage.completion_tokens == counted
    assert chunks[-1].usage.prompt_tokens == 1


async def test_an_aborted_request_answers_with_what_it_had(served: Any) -> None:
    def cut(_: GenerationSpec) -> Sequence[OutputToken | OutputEnd]:
        return [OutputToken(0, LETTER_A, 0.0, ()), OutputEnd(FinishReason.ABORT)]

    served.core.script = cut
    whole = await served.openai.completions.create(model="demo", prompt="x")
    assert (whole.choices[0].text, whole.choices[0].finish_reason) == ("A", "abort")
    stream = await served.openai.completions.create(model="demo", prompt="x", stream=True)
    assert await text_of(stream) == ("A", "abort")


async def test_the_blocking_client_works_as_well(served: Any) -> None:
    def ask() -> list[str]:
        url = f"http://127.0.0.1:{served.port}/v1"
        with openai.OpenAI(base_url=url, api_key="none", max_retries=0) as client:
            stream = client.completions.create(
                model="demo", prompt="x", max_tokens=100, stream=True
            )
            return [chunk.choices[0].text for chunk in stream]

    assert "".join(await asyncio.to_thread(ask)) == "Once there was a fox."
