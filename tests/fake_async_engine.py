"""An engine without a model for tests of the server: bytes are tokens, and completions repeat one sentence."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncGenerator, Mapping, Sequence
from typing import Any

from benchmarks.common.stub_facts import stub_facts

from nanoflow.engine.conversation import joined_text
from nanoflow.engine.errors import EngineDeadError
from nanoflow.engine.messages import ClassCounts, EngineStats, PrefetchCounts
from nanoflow.engine.observer import FinishedRequest, Observer
from nanoflow.engine.prompts import Prompt as ReadPrompt
from nanoflow.outputs import CompletionOutput, FinishReason, Logprob, PositionLogprobs, RequestOutput
from nanoflow.priorities import Priority
from nanoflow.request import RequestError, SamplingParams
from nanoflow.scheduler.limits import CONTEXT_OVERFLOW
from nanoflow.server.backend import ChatMessage, EnginePrompt

SENTENCE = "the quick brown fox jumps over the lazy dog. "
EOS, BOS = 256, 257
VOCAB_SIZE = 258
MAX_MODEL_LEN = 256


class ByteTokenizer:
    """A tokenizer in which a token id is a byte; it has two special tokens."""

    def encode(self, text: str, add_special_tokens: bool = True) -> list[int]:
        return ([BOS] if add_special_tokens and text else []) + list(text.encode())

    def decode(self, token_ids: Sequence[int], skip_special_tokens: bool = True) -> str:
        if skip_special_tokens:
            token_ids = [token_id for token_id in token_ids if token_id < EOS]
        return "".join(self.token_text(token_id) for token_id in token_ids)

    def token_text(self, token_id: int) -> str:
        return {EOS: "<eos>", BOS: "<bos>"}.get(token_id) or bytes([token_id]).decode("latin-1")

    def token_names(self, token_ids: Sequence[int]) -> list[str]:
        return [self.token_text(token_id) for token_id in token_ids]

    def description(self) -> dict[str, Any]:
        return {"tokenizer_class": "ByteTokenizer", "chat_template": "one line a message", "added": {"256": "<eos>"}}

    def apply_chat_template(
        self,
        messages: Sequence[ChatMessage],
        *,
        add_generation_prompt: bool = True,
        continue_final_message: bool = False,
        add_special_tokens: bool = False,
        chat_template: str | None = None,
        chat_template_kwargs: Mapping[str, Any] | None = None,
        tools: Sequence[Mapping[str, Any]] | None = None,
        reasoning_effort: str | None = None,
    ) -> list[int]:
        if messages[-1]["content"] == "refuse me":
            raise RequestError("the chat template refuses the messages: no")
        turns = [f"{message['role']}: {joined_text(message['content'])}" for message in messages]
        text = "\n".join([*([chat_template] if chat_template else []), *turns])
        options = f" {dict(chat_template_kwargs)}" if chat_template_kwargs else ""
        extra = [BOS] if add_special_tokens else []
        return extra + self.encode(text + (f"\nassistant{options}: " if add_generation_prompt else ""))


class FakeAsyncEngine:
    """Generates a token every `step_s` seconds for each running request; `num_closed` counts aborted requests."""

    def __init__(self, step_s: float = 0.0, *, has_tokenizer: bool = True) -> None:
        self.step_s = step_s
        self.has_tokenizer = has_tokenizer
        self.observer: Observer | None = None
        self.heartbeat_age_s = 0.0
        self.is_alive = True
        self.seen_params: list[SamplingParams] = []
        self.seen_salts: list[str | None] = []
        self.seen_sessions: list[str | None] = []
        self.seen_priorities: list[Priority] = []
        self.classes: dict[str, ClassCounts] = {}
        self.prefetched: list[EnginePrompt] = []
        self.num_running = 0
        self.num_closed = 0
        self.num_preemptions = 0
        self.facts = stub_facts(
            model_type="fake",
            vocab_size=VOCAB_SIZE,
            max_model_len=MAX_MODEL_LEN,
            eos_token_ids=(EOS,),
            num_pages=64,
            max_batch_tokens=64,
            max_num_seqs=8,
        )

    @property
    def tokenizer(self) -> ByteTokenizer:
        if not self.has_tokenizer:
            raise RequestError("this model has no tokenizer")
        return ByteTokenizer()

    @property
    def stats(self) -> EngineStats:
        return EngineStats(
            num_running=self.num_running,
            pages_in_use=self.num_running,
            num_pages=64,
            num_preemptions=self.num_preemptions,
            classes=self.classes,
        )

    async def generate(
        self, prompt: EnginePrompt, params: SamplingParams, request_id: str | None = None, *, streams: bool = True
    ) -> AsyncGenerator[RequestOutput, None]:
        self._check_alive()
        if prompt == "crash":
            raise RuntimeError("broken: /secret/path")
        if prompt == "bug":
            int("/secret/path")
        token_ids = self._prompt_ids(prompt, params)
        self.seen_params.append(params)
        output = RequestOutput(
            request_id=request_id or "",
            prompt=prompt if isinstance(prompt, str) else None,
            prompt_token_ids=token_ids,
            outputs=[
                CompletionOutput(index=index, logprobs=None if params.logprobs is None else [])
                for index in range(params.n)
            ],
        )
        if params.prompt_logprobs is not None:
            output.prompt_logprobs = [None, *(logprobs_of(token, params.prompt_logprobs) for token in token_ids[1:])]
        self.num_running += 1
        try:
            async for grown in self._grow(output, params):
                if streams or grown.finished:
                    yield grown
        finally:
            self.num_running -= 1
            self.num_closed += not output.finished

    async def prefetch(self, prompt: EnginePrompt) -> PrefetchCounts:
        """Half of any prompt is cached."""
        self._check_alive()
        self.prefetched.append(prompt)
        assert isinstance(prompt, ReadPrompt)
        num_tokens = len(self._prompt_ids(prompt.token_ids, SamplingParams()))
        return PrefetchCounts(num_tokens=num_tokens, num_cached_tokens=num_tokens // 2, num_prefetched_tokens=3)

    async def prefetch_session(self, session_id: str) -> PrefetchCounts | None:
        """A session that a prompt has named is known."""
        self._check_alive()
        is_known = session_id in self.seen_sessions
        return PrefetchCounts(num_tokens=9, num_cached_tokens=8, num_prefetched_tokens=0) if is_known else None

    async def _grow(self, output: RequestOutput, params: SamplingParams) -> AsyncGenerator[RequestOutput, None]:
        room = MAX_MODEL_LEN - len(output.prompt_token_ids)
        num_tokens = min(room, params.max_tokens or room)
        for step in range(num_tokens):
            await asyncio.sleep(self.step_s)
            self._check_alive()
            if output.prompt == "fail":
                output.error, output.finished = "its logits are not finite", True
            for completion in output.outputs:
                self._add_token(completion, params, is_last=step == num_tokens - 1)
            self._observe_step(output, step)
            output.finished = output.finished or all(completion.is_finished for completion in output.outputs)
            if output.finished:
                self._observe_end(output, params)
            yield output
            if output.finished:
                return

    def _add_token(self, completion: CompletionOutput, params: SamplingParams, *, is_last: bool) -> None:
        if completion.is_finished:
            return
        token_id = ord(SENTENCE[(completion.index + len(completion.token_ids)) % len(SENTENCE)])
        completion.token_ids.append(token_id)
        completion.text += chr(token_id) if params.detokenize else ""
        if isinstance(completion.logprobs, list):
            completion.logprobs.append(logprobs_of(token_id, params.logprobs or 0))
        for stop in params.stop or ():
            if stop in completion.text:
                completion.text = completion.text[: completion.text.index(stop)]
                completion.finish_reason, completion.stop_reason = FinishReason.STOP, stop
                return
        if is_last:
            completion.finish_reason = FinishReason.LENGTH

    def _observe_step(self, output: RequestOutput, step: int) -> None:
        if self.observer is None:
            return
        self.observer.observe_step(EngineStats(iteration_tokens=len(output.outputs)))
        self.observer.observe_tokens(len(output.outputs))
        if step == 0:
            self.observer.observe_first_token(0.01, len(output.prompt_token_ids))
        else:
            self.observer.observe_next_tokens([0.001] * len(output.outputs))

    def _observe_end(self, output: RequestOutput, params: SamplingParams) -> None:
        if self.observer is None:
            return
        lengths = [len(completion.token_ids) for completion in output.outputs]
        self.observer.observe_finished(
            FinishedRequest(
                reason=output.outputs[-1].finish_reason or FinishReason.ERROR,
                num_prompt_tokens=len(output.prompt_token_ids),
                num_generated_tokens=sum(lengths),
                longest_completion_tokens=max(lengths),
                n=params.n,
                max_tokens=params.max_tokens,
                num_preemptions=0,
                queue_s=0.0,
                prefill_s=0.01,
                decode_s=0.02,
                inference_s=0.03,
                tpot_s=None,
                e2e_s=0.04,
            )
        )

    def _prompt_ids(self, prompt: EnginePrompt, params: SamplingParams) -> list[int]:
        if isinstance(prompt, Mapping):
            self.seen_salts.append(prompt.get("cache_salt"))
            self.seen_sessions.append(prompt.get("session_id"))
            self.seen_priorities.append(prompt.get("priority", 0))
            prompt = prompt["prompt"] if "prompt" in prompt else prompt["prompt_token_ids"]
        token_ids = self.tokenizer.encode(prompt) if isinstance(prompt, str) else list[int](prompt)  # type: ignore[arg-type]
        if not token_ids:
            raise RequestError("the prompt has no tokens")
        bad = [
            token_id
            for token_id in (*token_ids, *(params.stop_token_ids or ()), *(params.logit_bias or ()))
            if token_id >= VOCAB_SIZE
        ]
        if bad:
            message = f"prompt: token id {bad[0]} is out of vocabulary, which has {VOCAB_SIZE} tokens"
            raise RequestError(message, param="prompt")
        if len(token_ids) >= MAX_MODEL_LEN:
            raise RequestError(
                f"This model's maximum context length is {MAX_MODEL_LEN} tokens; the prompt has {len(token_ids)}",
                param="prompt",
                code=CONTEXT_OVERFLOW,
            )
        return token_ids

    def _check_alive(self) -> None:
        if not self.is_alive:
            raise EngineDeadError("the engine has died")


def logprobs_of(token_id: int, num_top: int) -> PositionLogprobs:
    """The token itself at rank 1, then its neighbours; -1 asks for all, and there are no more than that."""
    num_top = VOCAB_SIZE if num_top == -1 else min(num_top, VOCAB_SIZE)
    others = {
        (token_id + step) % VOCAB_SIZE: Logprob(logprob=-1.0 - step, rank=step + 1, decoded_token=None)
        for step in range(1, num_top)
    }
    return {token_id: Logprob(logprob=-0.5, rank=1, decoded_token=None), **others}
