"""/v1/chat/completions, driven by the client everybody uses."""

from typing import Any

import openai
import pytest

FOX = [{"role": "user", "content": "Tell me"}]


async def test_a_chat_is_rendered_by_the_model_s_own_template(served: Any) -> None:
    answer = await served.openai.chat.completions.create(
        model="demo", messages=[{"role": "system", "content": "Be kind."}, *FOX]
    )
    assert answer.choices[0].message.content == "Once there was a fox."
    assert answer.choices[0].message.role == "assistant"
    assert answer.choices[0].finish_reason == "stop"
    wanted = "<|system|>Be kind.<|user|>Tell me<|assistant|>"
    prompt = served.model.codec.encode(wanted, adds_special=False, tokens_max=100)
    generation = await served.arrival()
    assert generation.spec.prompt == prompt
    assert answer.id == f"chatcmpl-{generation.request_id}"


async def test_a_chat_s_output_may_go_on_to_the_end_of_the_context(served: Any) -> None:
    await served.openai.chat.completions.create(model="demo", messages=FOX)
    spec = (await served.arrival()).spec
    assert spec.output_tokens_max == served.model.context_tokens_max - len(spec.prompt)


async def test_text_parts_are_one_text(served: Any) -> None:
    parts = [{"type": "text", "text": "Tell"}, {"type": "text", "text": "me"}]
    await served.openai.chat.completions.create(
        model="demo", messages=[{"role": "user", "content": parts}]
    )
    text = "<|user|>Tell\nme<|assistant|>"
    wanted = served.model.codec.encode(text, adds_special=False, tokens_max=100)
    assert (await served.arrival()).spec.prompt == wanted


async def test_a_streamed_chat_starts_with_the_role_and_adds_up(served: Any) -> None:
    stream = await served.openai.chat.completions.create(
        model="demo", messages=FOX, stream=True, n=2, stream_options={"include_usage": True}
    )
    texts, roles, finishes = ["", ""], ["", ""], ["", ""]
    last = None
    async for chunk in stream:
        last = chunk
        assert chunk.object == "chat.completion.chunk"
        for choice in chunk.choices:
            texts[choice.index] += choice.delta.content or ""
            roles[choice.index] += choice.delta.role or ""
            finishes[choice.index] += choice.finish_reason or ""
    assert texts == ["Once there was a fox."] * 2
    assert roles == ["assistant"] * 2
    assert finishes == ["stop"] * 2
    assert last is not None
    assert last.choices == []
    assert last.usage.total_tokens == last.usage.prompt_tokens + last.usage.completion_tokens


async def test_the_newer_name_of_max_tokens_wins(served: Any) -> None:
    answer = await served.openai.chat.completions.create(
        model="demo", messages=FOX, max_completion_tokens=3, max_tokens=5
    )
    assert answer.usage.completion_tokens == 3
    assert answer.choices[0].finish_reason == "length"


async def test_log_probabilities_of_a_chat(served: Any) -> None:
    served.core.text = "a 🦊"
    whole = await served.openai.chat.completions.create(
        model="demo", messages=FOX, logprobs=True, top_logprobs=3
    )
    rows = whole.choices[0].logprobs.content
    assert len(rows) == whole.usage.completion_tokens
    assert b"".join(bytes(row.bytes) for row in rows[:-1]).decode() == "a 🦊"
    assert all(len(row.top_logprobs) == 3 for row in rows)
    stream = await served.openai.chat.completions.create(
        model="demo", messages=FOX, logprobs=True, top_logprobs=3, stream=True
    )
    streamed = []
    async for chunk in stream:
        if chunk.choices[0].logprobs:
            streamed += chunk.choices[0].logprobs.content
    assert streamed == rows
    plain = await served.openai.chat.completions.create(model="demo", messages=FOX)
    assert plain.choices[0].logprobs is None


async def test_token_ids_of_a_chat_stand_beside_its_prompt_s(served: Any) -> None:
    extra = {"return_token_ids": True}
    whole = await served.openai.chat.completions.create(
        model="demo", messages=FOX, extra_body=extra
    )
    spec = (await served.arrival()).spec
    assert tuple(whole.prompt_token_ids) == spec.prompt
    assert whole.choices[0].token_ids[-1] == 0
    stream = await served.openai.chat.completions.create(
        model="demo", messages=FOX, extra_body=extra, stream=True
    )
    chunks = [chunk async for chunk in stream]
    assert tuple(chunks[0].prompt_token_ids) == spec.prompt
    tokens = [token for chunk in chunks for token in chunk.choices[0].token_ids]
    assert tokens == whole.choices[0].token_ids


async def test_what_is_not_text_is_refused_and_never_fetched(served: Any) -> None:
    part = {"type": "image_url", "image_url": {"url": "http://127.0.0.1:1/x.png"}}
    with pytest.raises(openai.BadRequestError) as caught:
        await served.openai.chat.completions.create(
            model="demo", messages=[{"role": "user", "content": [part]}]
        )
    assert caught.value.code == "unsupported_parameter"
    assert caught.value.param == "messages[0].content.type"
