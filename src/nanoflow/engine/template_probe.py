"""Try a model's chat template at the start, to report one that is broken for every conversation.

A template that refuses only some conversations, such as those with a system message, is not broken.
"""

from __future__ import annotations

from nanoflow.engine.tokenizer import Tokenizer
from nanoflow.request import RequestError

_PROBES = (("user",), ("system", "user"), ("user", "assistant", "user"))


def template_problem(tokenizer: Tokenizer) -> str | None:
    """Why the default chat template can render no conversation; None if it can, or if there is no template."""
    if tokenizer.chat_templates.usual is None:
        return None
    problem = None
    for roles in _PROBES:
        try:
            tokenizer.apply_chat_template([{"role": role, "content": "Hello."} for role in roles])
        except RequestError as error:
            problem = problem or str(error)
        else:
            return None
    return problem
