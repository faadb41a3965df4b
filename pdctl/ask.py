"""One chat request through the public endpoint, its answer passed on as it arrives."""

import json
from collections.abc import Iterator
from typing import Any

from pdctl.exits import ExitCode, Failure
from pdctl.render import printable

ANSWER_TOKENS_MAX = 128
HINT = "the router's log says more; pdctl status shows the workers"


def ask(url: str, question: str, timeout_s: float) -> Iterator[str]:
    """Yield the pieces of the first model's answer."""
    import httpx

    try:
        with httpx.Client(base_url=url, timeout=timeout_s, trust_env=False, verify=False) as client:
            body = {
                "model": model_name(client.get("/v1/models").json()),
                "messages": [{"role": "user", "content": question}],
                "max_tokens": ANSWER_TOKENS_MAX,
                "stream": True,
            }
            with client.stream("POST", "/v1/chat/completions", json=body) as answer:
                if not answer.is_success:
                    raise _refused(f"{answer.status_code} {answer.read().decode(errors='replace')}")
                yield from pieces(answer.iter_lines())
    except httpx.TimeoutException:
        raise Failure(ExitCode.TIMEOUT, f"no answer within {timeout_s:g} s", HINT) from None
    except httpx.HTTPError as error:
        raise Failure(ExitCode.NO_CONNECTION, f"{url}: {error}", HINT) from None
    except (ValueError, KeyError, IndexError, TypeError, AttributeError) as error:
        raise _refused(f"not an OpenAI answer: {error!r}") from None


def served_model(url: str) -> str:
    """Name the model behind an endpoint; MODEL if it does not say."""
    import httpx

    try:
        answer = httpx.get(f"{url}/v1/models", timeout=5, trust_env=False, verify=False)
        return model_name(answer.json())
    except (httpx.HTTPError, ValueError, KeyError, IndexError, TypeError):
        return "MODEL"


def model_name(listing: Any) -> str:
    """Name the first model of a /v1/models answer."""
    return str(listing["data"][0]["id"])


def pieces(lines: Iterator[str]) -> Iterator[str]:
    """Yield the text of a chat stream's events; a stream without its end is a failure."""
    for line in lines:
        if not line.startswith("data:"):
            continue
        text = line.removeprefix("data:").strip()
        if text == "[DONE]":
            return
        event = json.loads(text)
        if "error" in event:
            raise _refused(str(event["error"].get("message", event["error"])))
        for choice in event["choices"]:
            content = choice["delta"].get("content")
            if content:
                yield printable(content, keep="\t\n")
    raise _refused("the stream broke off")


def _refused(reason: str) -> Failure:
    return Failure(ExitCode.FAILED, f"the question failed: {printable(reason)}", HINT)
