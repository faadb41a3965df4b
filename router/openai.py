"""What clients ask: the bodies of /v1/completions and /v1/chat/completions, checked.

Pure.  A body becomes a ``Call`` or an ``InvalidRequest`` that names the field.  Parameters
that are known and would change the answer but are not served are refused by name.  Ignored are
fields nobody knows, and those without influence on the answer, as clients send many: user,
metadata, store, service_tier, safety_identifier, prompt_cache_key, parallel_tool_calls,
spaces_between_special_tokens.
"""

from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Any, TypeVar

from pdserve.errors import InvalidRequest, NotFound
from pdserve.request import SEED_LIMIT, SamplingParams
from router.model_folder import ModelFolder, SamplingDefaults
from router.openai_fields import Fields, decode_object, shown

_T = TypeVar("_T")

PROMPTS_MAX = 32
CHOICES_MAX = 8
MESSAGES_MAX = 1024
PARTS_MAX = 1024
STOPS_MAX = 16
STOP_CHARACTERS_MAX = 256
STOP_TOKENS_MAX = 128
BIASES_MAX = 1024
LOGPROBS_MAX = 20
LABEL_CHARACTERS_MAX = 1024
TEXT_CHARACTERS_MAX = 1 << 30  # the body is bounded already
COMPLETION_TOKENS = 16  # max_tokens of /v1/completions where none is given

_UNSUPPORTED: Mapping[str, tuple[Any, ...]] = {
    # Each with the values that ask for nothing.
    "echo": (False,), "suffix": ("",), "tools": ([],), "tool_choice": ("none", "auto"),
    "functions": ([],), "function_call": ("none", "auto"), "audio": (), "prediction": (),
    "modalities": (["text"],), "response_format": ({"type": "text"},), "web_search_options": (),
    "reasoning_effort": (), "verbosity": (),
    "prompt_logprobs": (), "prompt_embeds": (), "structured_outputs": (), "guided_json": (),
    "guided_regex": (), "guided_choice": (), "guided_grammar": (), "allowed_token_ids": (),
    "bad_words": ([],), "logits_processors": ([],), "kv_transfer_params": (),
    "use_beam_search": (False,), "length_penalty": (1.0,), "truncate_prompt_tokens": (),
    "chat_template": (), "chat_template_kwargs": ({},), "documents": ([],),
    "add_generation_prompt": (True,), "continue_final_message": (False,), "priority": (0,),
    "add_special_tokens": (), "skip_special_tokens": (True,),
    "include_stop_str_in_output": (False,), "lora_request": (),
}  # fmt: skip


@dataclass(frozen=True, slots=True)
class Call:
    """What both endpoints share.

    ``sampling`` lacks its seed: every choice gets its own.  ``max_tokens`` is None where the
    client leaves it to the context's end.
    """

    choice_count: int
    max_tokens: int | None
    min_tokens: int
    stops: tuple[str, ...]
    stop_tokens: frozenset[int]
    sampling: SamplingParams
    seed: int | None
    is_stream: bool
    wants_usage: bool
    wants_token_ids: bool
    cache_salt: str


@dataclass(frozen=True, slots=True)
class CompletionCall:
    """One body of /v1/completions; a prompt is a text or token ids."""

    call: Call
    prompts: tuple[str | tuple[int, ...], ...]


@dataclass(frozen=True, slots=True)
class ChatCall:
    """One body of /v1/chat/completions; every message has ``role`` and ``content``."""

    call: Call
    messages: tuple[Mapping[str, str], ...]


def parse_completion(body: bytes, model: ModelFolder) -> CompletionCall:
    """Check a body of /v1/completions.

    Raises:
        InvalidRequest: names the field.
        NotFound: another model.

    """
    fields = decode_object(body)
    call = _call(fields, model, fields.whole("logprobs", 0, LOGPROBS_MAX))
    max_tokens = fields.whole("max_tokens", 1, model.context_tokens_max)
    if max_tokens is None:
        max_tokens = max(COMPLETION_TOKENS, call.min_tokens)
    call = replace(call, max_tokens=max_tokens)
    _check_lengths(call)
    best_of = fields.whole("best_of", 1, CHOICES_MAX)
    if best_of not in (None, call.choice_count):
        raise _unsupported("best_of", best_of)
    return CompletionCall(call, _prompts(fields, model.vocab_size))


def parse_chat(body: bytes, model: ModelFolder) -> ChatCall:
    """Check a body of /v1/chat/completions.

    Raises:
        InvalidRequest: names the field.
        NotFound: another model.

    """
    fields = decode_object(body)
    top_count = fields.whole("top_logprobs", 0, LOGPROBS_MAX)
    wants_logprobs = fields.flag("logprobs") or False
    if top_count and not wants_logprobs:
        fields.fail("top_logprobs", top_count, "logprobs to be true with it")
    call = _call(fields, model, (top_count or 0) if wants_logprobs else None)
    limit = model.context_tokens_max
    old = fields.whole("max_tokens", 1, limit)
    new = fields.whole("max_completion_tokens", 1, limit)
    call = replace(call, max_tokens=new if new is not None else old)
    _check_lengths(call)
    return ChatCall(call, _messages(fields))


def _call(fields: Fields, model: ModelFolder, logprob_count: int | None) -> Call:
    name = fields.text("model", LABEL_CHARACTERS_MAX)
    if name and name != model.name:
        message = f"the model {shown(name)} does not exist; served is {model.name!r}"
        raise NotFound(message, param="model", reason="model_not_found")
    _refuse_unsupported(fields)
    stream_options = fields.inner("stream_options") or Fields({})
    is_stream = fields.flag("stream") or False
    if fields.get("stream_options") is not None and not is_stream:
        fields.fail("stream_options", fields.get("stream_options"), "stream to be true with it")
    fields.text("user", LABEL_CHARACTERS_MAX)
    stop_tokens = _token_list(fields, "stop_token_ids", STOP_TOKENS_MAX, model.vocab_size)
    ends = frozenset[int]() if fields.flag("ignore_eos") else model.eos_tokens
    seed = fields.whole("seed", -(SEED_LIMIT // 2), SEED_LIMIT - 1)
    return Call(
        choice_count=_or(fields.whole("n", 1, CHOICES_MAX), 1),
        max_tokens=None,
        min_tokens=_or(fields.whole("min_tokens", 0, model.context_tokens_max), 0),
        stops=_stops(fields),
        stop_tokens=ends.union(stop_tokens),
        sampling=_sampling(fields, model.defaults, logprob_count, model.vocab_size),
        seed=None if seed is None else seed % SEED_LIMIT,
        is_stream=is_stream,
        wants_usage=stream_options.flag("include_usage") or False,
        wants_token_ids=fields.flag("return_token_ids") or False,
        cache_salt=fields.text("cache_salt", LABEL_CHARACTERS_MAX) or "",
    )


def _or(value: _T | None, default: _T) -> _T:
    return default if value is None else value


def _refuse_unsupported(fields: Fields) -> None:
    for name, harmless in _UNSUPPORTED.items():
        value = fields.get(name)
        # 0 == False, but only one of them is what was meant.
        if value is None or any(type(value) is type(one) and value == one for one in harmless):
            continue
        raise _unsupported(name, value)


def _unsupported(name: str, value: object) -> InvalidRequest:
    return InvalidRequest(
        f"{name} is {shown(value)}; this is not supported",
        param=name,
        reason="unsupported_parameter",
    )


def _check_lengths(call: Call) -> None:
    if call.max_tokens is not None and call.min_tokens > call.max_tokens:
        message = f"min_tokens is {call.min_tokens}; wanted at most max_tokens ({call.max_tokens})"
        raise InvalidRequest(message, param="min_tokens")


def _sampling(
    fields: Fields, defaults: SamplingDefaults, logprob_count: int | None, vocab_size: int
) -> SamplingParams:
    top_k = fields.whole("top_k", -1, (1 << 31) - 1)
    return SamplingParams(
        temperature=_or(fields.number("temperature", 0, 2), defaults.temperature),
        top_p=_or(fields.number("top_p", 0, 1), defaults.top_p),
        top_k=defaults.top_k if top_k is None else max(top_k, 0),
        min_p=_or(fields.number("min_p", 0, 1), defaults.min_p),
        repetition_penalty=_or(
            fields.number("repetition_penalty", 0, 10), defaults.repetition_penalty
        ),
        presence_penalty=_or(fields.number("presence_penalty", -2, 2), 0.0),
        frequency_penalty=_or(fields.number("frequency_penalty", -2, 2), 0.0),
        logit_bias=_biases(fields, vocab_size),
        logprob_count=logprob_count,
    )


def _biases(fields: Fields, vocab_size: int) -> tuple[tuple[int, float], ...]:
    given = fields.get("logit_bias")
    if given is None:
        return ()
    if not isinstance(given, dict) or len(given) > BIASES_MAX:
        fields.fail("logit_bias", given, f"an object of at most {BIASES_MAX} token ids")
    biases: dict[int, float] = {}
    for key, value in given.items():
        is_id = key.isascii() and key.isdigit() and len(key) <= 10 and int(key) < vocab_size
        if not is_id:
            fields.fail("logit_bias", key, f"token ids below {vocab_size}")
        if type(value) not in (int, float) or not -100 <= value <= 100:
            fields.fail("logit_bias", value, "numbers from -100 to 100")
        biases[int(key)] = float(value)
    return tuple(sorted(biases.items()))


def _stops(fields: Fields) -> tuple[str, ...]:
    given = fields.get("stop")
    if given is None:
        return ()
    wanted = f"at most {STOPS_MAX} texts of 1 to {STOP_CHARACTERS_MAX} characters"
    stops = [given] if isinstance(given, str) else given
    if not isinstance(stops, list) or len(stops) > STOPS_MAX:
        fields.fail("stop", given, wanted)
    for stop in stops:
        if not isinstance(stop, str) or not 1 <= len(stop) <= STOP_CHARACTERS_MAX:
            fields.fail("stop", stop, wanted)
    return tuple(dict.fromkeys(stops))


def _token_list(fields: Fields, name: str, count_max: int, vocab_size: int) -> tuple[int, ...]:
    given = fields.entries(name, count_max) or []
    return _tokens(fields, name, given, vocab_size)


def _tokens(fields: Fields, name: str, given: list[Any], vocab_size: int) -> tuple[int, ...]:
    for token in given:
        if type(token) is not int or not 0 <= token < vocab_size:
            fields.fail(name, token, f"token ids from 0 to {vocab_size - 1}")
    return tuple(given)


def _prompts(fields: Fields, vocab_size: int) -> tuple[str | tuple[int, ...], ...]:
    given = fields.get("prompt")
    wanted = "a text, a list of texts, token ids, or a list of token id lists"
    if isinstance(given, str):
        return (_prompt_text(fields, given),)
    if not isinstance(given, list) or not given:
        fields.fail("prompt", given, wanted)
    if isinstance(given[0], int):
        return (_tokens(fields, "prompt", given, vocab_size),)
    if len(given) > PROMPTS_MAX:
        fields.fail("prompt", f"{len(given)} prompts", f"at most {PROMPTS_MAX}")
    prompts: list[str | tuple[int, ...]] = []
    for prompt in given:
        if isinstance(prompt, str):
            prompts.append(_prompt_text(fields, prompt))
        elif isinstance(prompt, list) and prompt:
            prompts.append(_tokens(fields, "prompt", prompt, vocab_size))
        else:
            fields.fail("prompt", prompt, wanted)
    return tuple(prompts)


def _prompt_text(fields: Fields, text: str) -> str:
    if not text:
        fields.fail("prompt", text, "at least one character")
    return text


def _messages(fields: Fields) -> tuple[Mapping[str, str], ...]:
    given = fields.entries("messages", MESSAGES_MAX)
    if not given:
        fields.fail("messages", given, "a list of messages")
    messages: list[Mapping[str, str]] = []
    for at, entry in enumerate(given):
        if not isinstance(entry, dict):
            fields.fail(f"messages[{at}]", entry, "an object")
        messages.append(_message(Fields(entry), at))
    return tuple(messages)


def _message(message: Fields, at: int) -> Mapping[str, str]:
    role = message.get("role")
    if not isinstance(role, str) or not 1 <= len(role) <= 64:
        message.fail(f"messages[{at}].role", role, "a text, such as user")
    for name in ("tool_calls", "tool_call_id", "function_call", "audio"):
        if message.get(name):
            raise _unsupported(f"messages[{at}].{name}", message.get(name))
    return {"role": role, "content": _content(message, f"messages[{at}].content")}


def _content(message: Fields, name: str) -> str:
    given = message.get("content")
    if isinstance(given, str):
        return given
    if not isinstance(given, list) or not given or len(given) > PARTS_MAX:
        message.fail(name, given, "a text or a list of text parts")
    texts: list[str] = []
    for part in given:
        if not isinstance(part, dict) or not isinstance(part.get("type"), str):
            message.fail(name, part, "parts with a type")
        if part["type"] != "text":  # nothing is ever fetched
            raise _unsupported(f"{name}.type", part["type"])
        if not isinstance(part.get("text"), str):
            message.fail(f"{name}.text", part.get("text"), "a text")
        texts.append(part["text"])
    return "\n".join(texts)
