"""Read and check prompts: what users write becomes a `Prompt`, and a `Prompt` becomes requests of the engine.

Every error of a single request is raised here, with one line. `output.py` handles requests after that.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from nanoflow.chat_formats.formats import ChatFormat
from nanoflow.compat.calls import PROMPTS, pass_over
from nanoflow.config import DEFAULT_MAX_LOGPROBS
from nanoflow.engine.messages import EngineFacts
from nanoflow.engine.tokenizer import Tokenizer, TokenizerError
from nanoflow.kvcache.keys import page_keys, root_key
from nanoflow.parameters import integers, shown
from nanoflow.priorities import PRIORITY, Priority
from nanoflow.request import MAX_BAD_WORD_TOKENS, Request, RequestError, SamplingParams
from nanoflow.scheduler.limits import CONTEXT_OVERFLOW, SchedulerLimits, checked_prompt
from nanoflow.thinking import ThinkingLimit

_PROMPT_KEYS = ("prompt", "prompt_token_ids")
_NAME_KEYS = ("cache_salt", "session_id")
_PRIORITY_KEY = "priority"
_NUM_SEEDS = 2**64
_DEFAULT_MAX_TOKENS = SamplingParams().max_tokens
# Most log probabilities of one request, prompt and completions together, if it asks for more of them at each place than
# usual: so many make an answer of about a gigabyte.
_MAX_SCORES = 2**23
# Numbers (token ids and the like) of the requests in one message.
_NUMBERS_A_MESSAGE = 1 << 16


@dataclass(frozen=True, slots=True, kw_only=True)
class Prompt:
    """What to complete.

    Attributes:
        text: As given; None if it came as token ids.
        token_ids: Tokens, beginning of sequence included if the model wants one.
        cache_salt: Cached pages are shared only between prompts that have the same one, or none.
        session_id: The conversation that it is a turn of: its pages can be asked for by this name before the next turn.
        form: How the model writes its answer; None if nobody has looked, then it is as in the model's own template.
        is_reasoning: With a form, whether the prompt has opened a section of reasoning; None if it says nothing.
        priority: Who goes first: an integer, of which lower ones do, or "batch" (`priorities.py`).
    """

    text: str | None
    token_ids: list[int]
    cache_salt: str | None = None
    session_id: str | None = None
    form: ChatFormat | None = None
    is_reasoning: bool | None = None
    priority: Priority = 0


PromptInput = str | Sequence[int] | Mapping[str, Any] | Prompt
"""A text, its token ids, {"prompt": text}, {"prompt_token_ids": ids}, or what was read already.

A mapping may have "cache_salt", "session_id" and "priority" too: see `Prompt`."""


def with_names(prompt: PromptInput, **names: Any) -> PromptInput:
    """A prompt in any of its forms with `cache_salt`, `session_id` and `priority`, as far as they are not None."""
    given = {name: value for name, value in names.items() if value is not None}
    if not given:
        return prompt
    if isinstance(prompt, Prompt):
        return dataclasses.replace(prompt, **given)
    if isinstance(prompt, Mapping):
        return {**prompt, **given}
    return {"prompt" if isinstance(prompt, str) else "prompt_token_ids": prompt, **given}


def read_prompt(prompt: PromptInput, tokenizer: Tokenizer | None) -> Prompt:
    """Read a prompt in any of its forms. A text is encoded with the model's special tokens.

    Raises:
        RequestError: The prompt has none of the forms, or is a text and there is no tokenizer.
    """
    if isinstance(prompt, Prompt):
        return prompt
    text, value = _parts(prompt) if isinstance(prompt, Mapping) else (None, prompt)
    names = _names(prompt) if isinstance(prompt, Mapping) else {}
    if isinstance(value, str):
        if tokenizer is None:
            raise RequestError(
                "this model has no tokenizer: give the prompt as token ids, with detokenize=False", param="prompt"
            )
        return Prompt(text=value, token_ids=tokenizer.encode(value), **names)
    return Prompt(text=text, token_ids=_checked_ids(value), **names)


def read_bad_words(words: Sequence[str], tokenizer: Tokenizer | None) -> tuple[tuple[int, ...], ...]:
    """The token sequences of words, without duplicates: as at the beginning of a text, and as after a space.

    Raises:
        RequestError: There is no tokenizer, or a word has no tokens or too many.
    """
    if not words:
        return ()
    if tokenizer is None:
        raise RequestError("this model has no tokenizer: bad_words cannot be read", param="bad_words")
    sequences = [tuple(tokenizer.encode(form, add_special_tokens=False)) for word in words for form in _forms(word)]
    for ids in sequences:
        if not 1 <= len(ids) <= MAX_BAD_WORD_TOKENS:
            word = shown(tokenizer.decode(ids))
            message = f"bad_words: {word} has {len(ids)} tokens; there may be 1 to {MAX_BAD_WORD_TOKENS}"
            raise RequestError(message, param="bad_words")
    return tuple(dict.fromkeys(sequences))


def end_of_sequence(facts: EngineFacts, tokenizer: Tokenizer | None) -> tuple[int, ...]:
    """The token ids that end a completion: the model's, then the tokenizer's.

    Raises:
        TokenizerError: One of them is outside the model's vocabulary.
    """
    own = tokenizer.eos_token_ids if tokenizer else ()
    for owner, token_ids in (("the model's config", facts.eos_token_ids), ("the tokenizer", own)):
        wrong = [token_id for token_id in token_ids if not 0 <= token_id < facts.vocab_size]
        if wrong:
            ids = ", ".join(map(str, wrong))
            sizes = f"the model has {facts.vocab_size} tokens" + (
                f" and the tokenizer {tokenizer.vocab_size}" if tokenizer else ""
            )
            raise TokenizerError(f"{owner} ends a sequence with token id {ids}, but {sizes}: are they of one model?")
    return tuple(dict.fromkeys((*facts.eos_token_ids, *own)))


def truncated(prompt: Prompt, params: SamplingParams, facts: EngineFacts) -> Prompt:
    """The prompt, cut to its last `truncate_prompt_tokens` tokens if the parameters say so.

    Raises:
        RequestError: More tokens are to be kept than the context has room for.
    """
    wanted = params.truncate_prompt_tokens
    if wanted is None:
        return prompt
    room = max(facts.max_model_len - (params.max_tokens or 1), 1)
    if wanted > room:
        raise RequestError(f"truncate_prompt_tokens is {wanted}, and there is room for {room} tokens")
    num_kept = room if wanted == -1 else wanted
    return dataclasses.replace(prompt, token_ids=prompt.token_ids[-num_kept:])


def make_requests(
    prompt: Prompt,
    params: SamplingParams,
    *,
    facts: EngineFacts,
    first_id: int,
    first_seed: int,
    eos_token_ids: tuple[int, ...],
    bad_word_ids: tuple[tuple[int, ...], ...] = (),
    thinking: ThinkingLimit | None = None,
    arrival_s: float,
) -> list[Request]:
    """The `n` requests of a prompt; request i has id `first_id + i` and seed `first_seed + i`.

    Only the first one computes log probabilities of the prompt: they are the same for all.

    Raises:
        RequestError: The prompt is empty, or does not fit in the context together with what is asked for; a token id is
            out of the vocabulary; or more log probabilities are asked for than may be.
    """
    num_prompt = len(prompt.token_ids)
    room = max(facts.max_model_len - num_prompt, 0)
    max_tokens = _max_tokens(params, room)
    params = _counted_logprobs(params, num_prompt, max_tokens, facts)
    first = Request(
        request_id=first_id,
        prompt_token_ids=prompt.token_ids,
        params=params,
        seed=first_seed % _NUM_SEEDS,
        max_tokens=max_tokens,
        eos_token_ids=() if params.ignore_eos else eos_token_ids,
        bad_word_ids=bad_word_ids,
        arrival_s=arrival_s,
        session=prompt.session_id,
        thinking=thinking,
        priority=prompt.priority,
    )
    _check(first, facts)
    if first.structured is not None and not eos_token_ids:
        raise RequestError(
            "this model has no end of sequence, with which structured outputs end", param="structured_outputs"
        )
    if max_tokens > room:
        raise RequestError(
            f"This model's maximum context length is {facts.max_model_len} tokens; the prompt has {num_prompt} tokens "
            f"and max_tokens is {max_tokens}, together {num_prompt + max_tokens}",
            param="max_tokens",
            code=CONTEXT_OVERFLOW,
        )
    if facts.has_prefix_cache:
        first = dataclasses.replace(first, page_keys=_page_keys(prompt, facts))
    others = dataclasses.replace(params, prompt_logprobs=None, pooling=None)
    return [first] + [
        dataclasses.replace(first, request_id=first_id + i, seed=(first_seed + i) % _NUM_SEEDS, params=others)
        for i in range(1, params.n)
    ]


def sendable(requests: list[Request]) -> Iterator[list[Request]]:
    """Split the requests of one prompt into messages that take some milliseconds each to send."""
    first = requests[0]
    num_chars = len(first.structured.text) if first.structured else 0
    num_numbers = len(first.prompt_token_ids) + len(first.params.allowed_token_ids or ()) + num_chars // 2 + 64
    count = max(_NUMBERS_A_MESSAGE // num_numbers, 1)
    return (requests[start : start + count] for start in range(0, len(requests), count))


def _page_keys(prompt: Prompt, facts: EngineFacts) -> bytes:
    """Keys for `Request.page_keys`."""
    root = root_key(prompt.cache_salt)
    return b"".join((root, *page_keys(prompt.token_ids, facts.page_size, root)))


def _forms(word: str) -> tuple[str, ...]:
    """The forms of a word: alone, and after a space; white space has only its own form."""
    stem = word.lstrip()
    return (stem, f" {stem}") if stem else (word,)


def _max_tokens(params: SamplingParams, room: int) -> int:
    """Most tokens to generate. The default value is reduced if the context has less room; another one is not."""
    wanted = params.max_tokens
    if wanted is None:
        return room
    return min(wanted, room) if wanted == _DEFAULT_MAX_TOKENS else wanted


def _counted_logprobs(params: SamplingParams, num_prompt: int, max_tokens: int, facts: EngineFacts) -> SamplingParams:
    """Check the numbers of log probabilities; return the parameters with the vocabulary size in place of -1."""
    counts: dict[str, Any] = {}
    for name, num_places in (("logprobs", params.n * max_tokens), ("prompt_logprobs", num_prompt)):
        wanted = getattr(params, name)
        if wanted is None:
            continue
        count = facts.vocab_size if wanted == -1 else wanted
        if count > facts.max_logprobs:
            message = f"{name} is {count}, this engine gives at most {facts.max_logprobs} (max_logprobs)"
            raise RequestError(message, param=name)
        if count > DEFAULT_MAX_LOGPROBS and count * num_places > _MAX_SCORES:
            message = f"{name} is {count} at {num_places} tokens, more than {_MAX_SCORES} numbers in all"
            raise RequestError(message, param=name)
        counts[name] = count
    return dataclasses.replace(params, **counts) if counts else params


def _names(prompt: Mapping[str, Any]) -> dict[str, Any]:
    """Salt, session and priority of a prompt, as far as it has them."""
    given: dict[str, Any] = {name: prompt[name] for name in _NAME_KEYS if prompt.get(name) is not None}
    for name, value in given.items():
        if not isinstance(value, str) or not value:
            raise RequestError(f"a prompt's {name} is a string that is not empty, got {shown(value)}", param=name)
    if prompt.get(_PRIORITY_KEY) is not None:
        given[_PRIORITY_KEY] = PRIORITY.read(_PRIORITY_KEY, prompt[_PRIORITY_KEY])
    return given


def _parts(prompt: Mapping[str, Any]) -> tuple[str | None, Any]:
    """The text to show, and what is completed: token ids go before a text that stands beside them."""
    own = (*_PROMPT_KEYS, *_NAME_KEYS, _PRIORITY_KEY)
    pass_over(PROMPTS, "a prompt", {name: value for name, value in prompt.items() if name not in own})
    given = {name: prompt[name] for name in _PROMPT_KEYS if prompt.get(name) is not None}
    if not given:
        names = ", ".join(map(repr, prompt)) or "nothing"
        raise RequestError(f"a prompt's mapping has 'prompt' or 'prompt_token_ids', got {names}", param="prompt")
    for name, value in given.items():
        if isinstance(value, str) != (name == "prompt"):
            raise RequestError(f"{name!r} of a prompt cannot be a {type(value).__name__}", param="prompt")
    return given.get("prompt"), given.get("prompt_token_ids", given.get("prompt"))


def _checked_ids(value: Any) -> list[int]:
    if not isinstance(value, Sequence) or isinstance(value, bytes):
        raise RequestError(f"a prompt is a string or a list of token ids, got {type(value).__name__}", param="prompt")
    return integers("a prompt's token ids", value)


def _check(request: Request, facts: EngineFacts) -> None:
    """Make the scheduler's checks here, before the request is sent to it."""
    limits = SchedulerLimits(
        max_batch_tokens=facts.max_batch_tokens,
        max_num_seqs=facts.max_num_seqs,
        max_model_len=facts.max_model_len,
        num_pages=facts.num_pages,
        page_size=facts.page_size,
        vocab_size=facts.vocab_size,
        group_pools=facts.group_pools,
    )
    checked_prompt(request, limits)
