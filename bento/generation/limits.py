"""What every engine refuses before it starts."""

from collections.abc import Sequence

from bento.generation.interface import Sampling
from ft_resources.errors import RequestError


def check(ids: Sequence[int], sampling: Sampling, context: int) -> None:
    """Raises:
    RequestError: `invalid_request`, there is no prompt or a number is out of its range; `input_too_large`, prompt and
        answer could exceed `context` tokens.
    """
    if not ids:
        raise RequestError("invalid_request", "the prompt has no token", mend="Send a text.")
    if sampling.max_tokens < 1 or sampling.temperature < 0 or not 0 < sampling.top_p <= 1:
        raise RequestError(
            "invalid_request",
            f"max_tokens is {sampling.max_tokens}, temperature {sampling.temperature}, top_p {sampling.top_p}",
            mend="Set max_tokens to 1 or more, temperature to 0 or more, top_p above 0 and up to 1.",
        )
    if len(ids) + sampling.max_tokens > context:
        raise RequestError(
            "input_too_large",
            f"the prompt has {len(ids)} tokens and up to {sampling.max_tokens} may be generated, "
            f"together more than the {context} tokens there is room for",
            status=413,
            mend="Shorten the prompt, or lower max_tokens.",
        )
