"""Where a request's output ends: one rule for both legs, so that they cannot disagree."""

from pdserve.request import FinishReason, Request


def output_count_max(request: Request, context_tokens_max: int) -> int:
    """Count the output tokens a request may have at most: its own limit, or the context's."""
    return min(request.output_tokens_max, context_tokens_max - len(request.prompt))


def finish_after(
    request: Request, token: int, output_count: int, context_tokens_max: int
) -> FinishReason | None:
    """Say whether the request ends with ``token``, its ``output_count``-th output token."""
    finish = request.finish_after(token, output_count)
    if finish is None and output_count >= output_count_max(request, context_tokens_max):
        return FinishReason.LENGTH
    return finish
