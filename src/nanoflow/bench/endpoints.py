"""Where the rounds of a conversation are asked: an engine that is started for it, or a server by its address.

Both answer with the record of the request, how much of its prompt was cached, and the completion, which the next prompt
needs. `rounds.py` says what is asked and when; `conversations.py` draws it.
"""

from __future__ import annotations

import dataclasses
import time
from collections.abc import Mapping, Sequence
from typing import Any, Protocol

import msgspec

from nanoflow.bench.client import ExchangeFailed, post, read_address
from nanoflow.bench.offline import params_of, record_of_output
from nanoflow.bench.online import RequestFailed, completion_of, describe, options_of, send, words_of
from nanoflow.bench.options import BenchConfig, LoadConfig
from nanoflow.bench.served import Samples, served_context, served_metrics, served_model
from nanoflow.engine.async_engine import AsyncEngine
from nanoflow.request import RequestError
from nanoflow.round_metrics import Tiers
from nanoflow.run_metrics import RequestRecord

_TIER_METRIC = "kv_tier_"


@dataclasses.dataclass(frozen=True, slots=True, kw_only=True)
class Reply:
    """The answer to one round.

    Attributes:
        record: Times and numbers of tokens; `error` if it failed.
        num_cached_tokens: Tokens of the prompt that were in the KV cache; None if unknown.
        token_ids, text: The completion; one of them may be empty, depending on the endpoint.
    """

    record: RequestRecord
    num_cached_tokens: int | None = None
    token_ids: Sequence[int] = ()
    text: str = ""


class History(Protocol):
    """A conversation so far, in the form in which its endpoint takes prompts."""

    def hear(self, token_ids: Sequence[int], *, is_system: bool = False) -> None:
        """Add tokens of the user, of a tool, or of the system prompt."""

    def say(self, reply: Reply) -> None:
        """Add a completion."""

    @property
    def num_tokens(self) -> int:
        """Tokens of the prompt as asked for; a server that gets text may count others."""

    def fields(self) -> dict[str, Any]:
        """The prompt as fields of an HTTP body."""


class Endpoint(Protocol):
    """Something that answers rounds.

    Attributes:
        vocab_size: New token ids are drawn below this.
        max_model_len: Longest prompt plus completion in tokens; None if unknown.
    """

    vocab_size: int
    max_model_len: int | None

    def history(self) -> History:
        """A conversation in which nothing has been said."""

    async def ask(self, history: History, num_output_tokens: int) -> Reply:
        """Ask for a completion of that many tokens; a failure is in the record."""

    def tiers(self) -> Tiers:
        """What each tier of the KV cache has done since the start; empty if nothing is known."""


class TokenHistory:
    """A conversation as token ids: nothing but what was drawn and generated."""

    def __init__(self) -> None:
        self.token_ids: list[int] = []

    def hear(self, token_ids: Sequence[int], *, is_system: bool = False) -> None:
        """Add new tokens."""
        del is_system
        self.token_ids += token_ids

    def say(self, reply: Reply) -> None:
        """Add a completion."""
        self.token_ids += reply.token_ids

    @property
    def num_tokens(self) -> int:
        """Tokens of the prompt."""
        return len(self.token_ids)

    def fields(self) -> dict[str, Any]:
        """The prompt as token ids, and the wish for those of the completion."""
        return {"prompt": self.token_ids, "return_token_ids": True}


class TextHistory:
    """A conversation as one text: a word for each new token, and completions as they came."""

    def __init__(self) -> None:
        self._text = ""
        self.num_tokens = 0

    def hear(self, token_ids: Sequence[int], *, is_system: bool = False) -> None:
        """Add a word for each token."""
        del is_system
        self._text += f"{' ' if self._text else ''}{words_of(token_ids)}"
        self.num_tokens += len(token_ids)

    def say(self, reply: Reply) -> None:
        """Add a completion."""
        self._text += reply.text
        self.num_tokens += reply.record.num_output_tokens

    def fields(self) -> dict[str, Any]:
        """The prompt."""
        return {"prompt": self._text}


class ChatHistory:
    """A conversation as messages; the server's chat template makes the prompt of them."""

    def __init__(self) -> None:
        self._messages: list[dict[str, str]] = []
        self.num_tokens = 0

    def hear(self, token_ids: Sequence[int], *, is_system: bool = False) -> None:
        """Add a message with a word for each token."""
        self._messages.append({"role": "system" if is_system else "user", "content": words_of(token_ids)})
        self.num_tokens += len(token_ids)

    def say(self, reply: Reply) -> None:
        """Add a completion as a message of the assistant."""
        self._messages.append({"role": "assistant", "content": reply.text})
        self.num_tokens += reply.record.num_output_tokens

    def fields(self) -> dict[str, Any]:
        """The messages."""
        return {"messages": self._messages}


class EngineEndpoint:
    """An engine of ours without HTTP."""

    def __init__(self, engine: AsyncEngine, config: BenchConfig) -> None:
        self.vocab_size = engine.facts.vocab_size
        self.max_model_len: int | None = engine.facts.max_model_len
        self._engine, self._config = engine, config

    def history(self) -> TokenHistory:
        """A conversation in which nothing has been said."""
        return TokenHistory()

    async def ask(self, history: History, num_output_tokens: int) -> Reply:
        """Ask for a completion.

        Raises:
            EngineDeadError: The engine has died.
        """
        params = params_of(self._config, num_output_tokens, has_text=False)
        prompt = history.fields()["prompt"]
        try:
            async for output in self._engine.generate(list(prompt), params, streams=False):
                if output.finished:
                    return Reply(
                        record=record_of_output(output, num_output_tokens),
                        num_cached_tokens=output.num_cached_tokens,
                        token_ids=output.outputs[0].token_ids,
                    )
        except RequestError as error:
            return Reply(record=_failed(history, num_output_tokens, str(error)))
        raise AssertionError("a request ended without a last output")

    def tiers(self) -> Tiers:
        """Counts of the engine's tiers, where it has any."""
        tiers: Mapping[str, Any] = getattr(self._engine.stats, "tiers", {})
        return {name: dataclasses.asdict(counts) for name, counts in tiers.items()}


class ServedEndpoint:
    """A server that runs already; its answers are streamed.

    Raises:
        ValueError: Its address is none.
        ConnectionError: It cannot be reached.
    """

    def __init__(self, load: LoadConfig, config: BenchConfig) -> None:
        self._address = read_address(load.url)
        self.model = load.model or served_model(load)
        self.vocab_size = load.vocab_size
        self.max_model_len = served_context(load)
        self._load, self._config = load, config
        self._tls = self._address.tls
        self._path = "chat/completions" if load.api == "chat" else "completions"
        self._headers = {"authorization": f"Bearer {load.api_key}"} if load.api_key else {}

    def history(self) -> History:
        """A conversation in which nothing has been said, in the form that the load asks for."""
        if self._load.api == "chat":
            return ChatHistory()
        return TokenHistory() if self._load.prompts == "ids" else TextHistory()

    async def ask(self, history: History, num_output_tokens: int) -> Reply:
        """Ask for a completion. It is read at once, since the next prompt needs it."""
        body = options_of(self._load, self._config, self.model, num_output_tokens) | history.fields()
        message = post(self._address, self._path, msgspec.json.encode(body), self._headers)
        asked = RequestRecord(
            num_prompt_tokens=history.num_tokens, num_requested_tokens=num_output_tokens, arrival_s=time.monotonic()
        )
        sent = await send(self._address, message, asked, self._load.timeout_s, self._tls)
        if sent.pieces is None:
            return Reply(record=sent.request)
        try:
            found = completion_of(sent)
            if self._load.prompts == "ids" and len(found.token_ids) != found.record.num_output_tokens:
                raise RequestFailed("the server does not send the tokens of a completion: ask for --prompts text")
        except (RequestFailed, ExchangeFailed, msgspec.DecodeError) as error:
            return Reply(record=dataclasses.replace(asked, error=describe(error)))
        return Reply(
            record=found.record,
            num_cached_tokens=found.num_cached_tokens,
            token_ids=found.token_ids,
            text=found.text,
        )

    def tiers(self) -> Tiers:
        """Counts of the server's tiers, where its metrics have any."""
        return tiers_of(served_metrics(self._load))


def tiers_of(metrics: Samples) -> Tiers:
    """The metrics `kv_tier_NAME` or `kv_tier_NAME_total` with a label `tier`, by tier and NAME."""
    found: dict[str, dict[str, float]] = {}
    for name, samples in metrics.items():
        if not name.startswith(_TIER_METRIC) or name.endswith("_created"):
            continue
        short = name.removeprefix(_TIER_METRIC).removesuffix("_total")
        for labels, value in samples:
            tier = found.setdefault(labels.get("tier", ""), {})
            tier[short] = tier.get(short, 0.0) + value
    return found


def _failed(history: History, num_requested_tokens: int, error: str) -> RequestRecord:
    return RequestRecord(num_prompt_tokens=history.num_tokens, num_requested_tokens=num_requested_tokens, error=error)
