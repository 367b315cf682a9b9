"""`LLM`: complete prompts in this process, as one batch, in the calling thread.

It runs the engine's loop itself and returns when every prompt is done. `output.py` turns tokens into outputs. For
requests that arrive one by one there is `async_engine.py`.
"""

from __future__ import annotations

import sys
import time
from collections.abc import Callable, Mapping, Sequence
from typing import Any

from tqdm import tqdm

from nanoflow.compat.calls import CALLS, METHODS, pass_over
from nanoflow.config import DEFAULT_MODEL, UNWATCHED_DEFAULTS, EngineConfig
from nanoflow.engine.conversation import Conversation
from nanoflow.engine.embeddings import as_embedding, embedding_params, read_dimensions
from nanoflow.engine.errors import EngineDeadError
from nanoflow.engine.garbage import heap_left_alone
from nanoflow.engine.grammar_checks import GrammarChecks
from nanoflow.engine.interrupts import interrupts_deferred, naming_place
from nanoflow.engine.llm_metrics import LLMMetrics, Metric
from nanoflow.engine.messages import EngineFacts
from nanoflow.engine.observer import Observer
from nanoflow.engine.output import OutputProcessor
from nanoflow.engine.prompt_forms import inputs_of, params_of_each, priority_of_each
from nanoflow.engine.prompts import PromptInput, read_prompt, with_names
from nanoflow.engine.reasoning import chat_prompt
from nanoflow.engine.tokenizer import Tokenizer, load_tokenizer
from nanoflow.engine.transformers_tokenizer import transformers_tokenizer
from nanoflow.option_names import from_kwargs
from nanoflow.outputs import EmbeddingRequestOutput, RequestOutput
from nanoflow.priorities import Priority
from nanoflow.request import Request, RequestError, SamplingParams

ParamsInput = SamplingParams | Sequence[SamplingParams] | None
Priorities = Priority | Sequence[Priority] | None


class LLM:
    """A loaded model that completes prompts.

    Close it, or use it in a `with` block, to free the model.

    Args:
        model: Model folder, Hugging Face Hub name, or "default" for the small embedded model.
        **options: Any other field of `EngineConfig`, e.g. `dtype="bfloat16"`, `max_batch_tokens=1024`, or one of its
            aliases, e.g. `enforce_eager=True`. `goal` is "throughput" if not given (`config.UNWATCHED_DEFAULTS`).

    Raises:
        ConfigError: An option does not exist (the message names the nearest one) or has a value it cannot have.
        ModelError, TokenizerError: The model or its tokenizer cannot be loaded. All of these are ValueErrors.
    """

    def __init__(self, model: str = DEFAULT_MODEL, **options: Any) -> None:
        # Imports torch, which takes seconds, so not at the top of the file.
        from nanoflow.engine.build import build_engine

        config = from_kwargs(EngineConfig, {**UNWATCHED_DEFAULTS, "model": model, **options})
        self._config = config
        self._tokenizer = load_tokenizer(config)
        self._engine = build_engine(config, show_progress=sys.stderr.isatty())
        try:
            has_text = not config.skip_tokenizer_init
            self._processor = OutputProcessor(self._engine.facts, self._tokenizer, seed=config.seed, has_text=has_text)
        except BaseException:
            self._engine.close()
            raise
        self._metrics, self._checks = LLMMetrics(config.model), GrammarChecks(self._tokenizer)
        self._of_transformers: Any = None
        self._num_requests = 0
        self._is_closed = False

    @classmethod
    def from_engine_args(cls, engine_args: Any) -> LLM:
        """A model with the options of `EngineArgs`."""
        return cls(**vars(engine_args))

    def __getattr__(self, name: str) -> Any:
        raise AttributeError(f"LLM has no {name}" + METHODS.ending(name))

    def __enter__(self) -> LLM:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    @property
    def facts(self) -> EngineFacts:
        """What is loaded: sizes, limits, device."""
        return self._engine.facts

    def observe(self, observer: Observer | None) -> None:
        """Set the observer, which is told of times and counts in the calling thread; None removes it."""
        self._processor.observer = observer

    @property
    def tokenizer(self) -> Tokenizer:
        """The tokenizer that requests are read with; RequestError if the model has none."""
        if self._tokenizer is None:
            raise RequestError("this model has no tokenizer")
        return self._tokenizer

    def get_tokenizer(self) -> Any:
        """The model's tokenizer as `transformers` has it, with the tokens of `tokenizer`; it is loaded once.

        Raises:
            RequestError: The model has none, or `transformers` cannot load it.
        """
        if self._of_transformers is None:
            self._of_transformers = transformers_tokenizer(self._config, self.tokenizer)
        return self._of_transformers

    def get_default_sampling_params(self) -> SamplingParams:
        """The parameters that generation_config.json recommends (see option `generation_config`), else the defaults."""
        return self.facts.sampling.params({})

    def get_metrics(self) -> list[Metric]:
        """Counters and gauges of all calls so far, each with `name` and `value`."""
        return self._metrics.read()

    def reset_prefix_cache(self) -> bool:
        """Forget what the KV cache has of earlier prompts and completions; True, as it always can."""
        self._engine.reset_prefix_cache()
        return True

    def generate(
        self,
        prompts: PromptInput | Sequence[PromptInput] | None = None,
        sampling_params: ParamsInput = None,
        use_tqdm: bool | Callable[..., Any] = True,
        *,
        prompt_token_ids: Sequence[int] | Sequence[Sequence[int]] | None = None,
        priority: Priorities = None,
        **others: Any,
    ) -> list[RequestOutput]:
        """Complete one prompt or many. Ctrl-C drops them all and leaves the model ready for the next call.

        Args:
            prompts: One prompt or a list of them: text, token ids, {"prompt": text} or {"prompt_token_ids": ids}.
            sampling_params: For all prompts, or one for each; `get_default_sampling_params()` if not given.
            use_tqdm: Show a progress bar if standard error is a terminal; or a function that makes one, called as tqdm.
            prompt_token_ids: Prompts as token ids, as older versions of vLLM take them.
            priority: Of all prompts, or of each: an integer, of which lower ones go first, or "batch"; 0 if not given.
            **others: What vLLM takes beside them, at values that change nothing.

        Returns:
            One output a prompt, in their order. One that failed alone has finish reason "error" and an `error`.

        Raises:
            RequestError: A prompt cannot be served; the message names its place, and no prompt has run.
            EngineDeadError: The model has been closed.
        """
        pass_over(CALLS, "generate", others)
        inputs = inputs_of(prompts, prompt_token_ids)
        all_params = params_of_each(
            self.get_default_sampling_params() if sampling_params is None else sampling_params, len(inputs)
        )
        priorities = priority_of_each(priority, len(inputs))
        self._check_open()
        with interrupts_deferred() as raise_if_interrupted:
            try:
                outputs = self._add_all(inputs, all_params, priorities, raise_if_interrupted)
                self._run(len(outputs), raise_if_interrupted, use_tqdm)
                self._metrics.end(outputs)
            except BaseException:
                self._abort_all()
                raise
        return outputs

    def chat(
        self,
        messages: Conversation | Sequence[Conversation],
        sampling_params: ParamsInput = None,
        use_tqdm: bool | Callable[..., Any] = True,
        *,
        add_generation_prompt: bool = True,
        continue_final_message: bool = False,
        chat_template: str | None = None,
        chat_template_kwargs: Mapping[str, Any] | None = None,
        tools: Sequence[Mapping[str, Any]] | None = None,
        priority: Priorities = None,
        **others: Any,
    ) -> list[RequestOutput]:
        """Answer one conversation or many, by the model's chat template.

        Args:
            messages: One conversation (a list of {"role": ..., "content": ...}) or a list of them. A content is a
                text, or a list of parts {"type": "text", "text": ...}.
            sampling_params, use_tqdm, priority: As for `generate`.
            add_generation_prompt: Open the assistant's turn.
            continue_final_message: Continue the last message instead; not with `add_generation_prompt`.
            chat_template: Jinja text, or the name of one of the tokenizer's templates, instead of the usual one.
            chat_template_kwargs: Further variables of the template, such as `enable_thinking`; JSON values.
            tools: Functions that the model may call, as OpenAI describes them. Its calls are in the text.
            **others: What vLLM takes beside them, at values that change nothing.

        Raises:
            RequestError: As for `generate`, or there is no chat template, or it refuses the messages.
            EngineDeadError: The model has been closed.
        """
        self._check_open()
        pass_over(CALLS, "chat", others)
        tokenizer = self.tokenizer
        conversations: Sequence[Any] = [messages] if messages and isinstance(messages[0], Mapping) else messages
        prompts = []
        for place, conversation in enumerate(conversations):
            with naming_place(place, len(conversations)):
                token_ids = tokenizer.apply_chat_template(
                    conversation,
                    add_generation_prompt=add_generation_prompt,
                    continue_final_message=continue_final_message,
                    chat_template=chat_template,
                    chat_template_kwargs=chat_template_kwargs,
                    tools=tools,
                )
            prompts.append(chat_prompt(tokenizer, token_ids, chat_template, has_tools=bool(tools)))
        return self.generate(prompts, sampling_params, use_tqdm=use_tqdm, priority=priority)

    def embed(
        self,
        prompts: PromptInput | Sequence[PromptInput],
        use_tqdm: bool | Callable[..., Any] = True,
        *,
        pooling: str = "last",
        normalize: bool = True,
        dimensions: int | None = None,
        truncate_prompt_tokens: int | None = None,
    ) -> list[EmbeddingRequestOutput]:
        """The vector of each prompt, from the hidden states of its tokens behind the model's last norm.

        Args:
            prompts, use_tqdm: As for `generate`.
            pooling: "last" takes the state of the last token, "mean" the mean of all.
            normalize: Divide the vector by its length.
            dimensions: Keep so many first numbers, for models trained for that; before `normalize`.
            truncate_prompt_tokens: As in `SamplingParams`.

        Raises:
            RequestError, EngineDeadError: As for `generate`.
        """
        params = embedding_params(pooling, truncate_prompt_tokens)
        kept = read_dimensions(dimensions, self.facts.hidden_size)
        outputs = self.generate(prompts, params, use_tqdm)
        return [as_embedding(output, dimensions=kept, normalize=normalize) for output in outputs]

    def add(
        self, request_id: str, prompt: PromptInput, params: SamplingParams, priority: Priority | None = None
    ) -> RequestOutput:
        """Add a request, which `step` then computes; its output grows in place.

        Raises:
            RequestError, EngineDeadError: As `generate`.
        """
        self._check_open()
        whole = read_prompt(with_names(prompt, priority=priority), self._tokenizer)
        output, requests = self._processor.add(request_id, whole, self._checks.checked(params))
        self._add_to_engine(requests)
        return output

    def step(self) -> list[RequestOutput]:
        """Run one iteration; return the outputs that grew or ended, with their text."""
        self._check_open()
        if not self._engine.has_work:
            return []
        grown = self._take_step()
        for output in grown:
            self._processor.refresh(output)
        self._engine.abort(self._processor.take_stopped())
        self._metrics.end(output for output in grown if output.finished)
        return grown

    def abort(self, request_id: str) -> None:
        """Drop a request that was added; an unknown one is ignored."""
        self._engine.abort(self._processor.abort(request_id))

    def close(self) -> None:
        """Free the model; it cannot be used afterwards."""
        if not self._is_closed:
            self._is_closed = True
            self._checks.close()
            if self._tokenizer is not None:
                self._tokenizer.close()
            self._engine.close()

    def _check_open(self) -> None:
        if self._is_closed:
            raise EngineDeadError("this LLM has been closed")

    def _add_all(
        self,
        inputs: Sequence[Any],
        all_params: Sequence[SamplingParams],
        priorities: Sequence[Priority | None],
        raise_if_interrupted: Callable[[], None],
    ) -> list[RequestOutput]:
        """Hand all requests to the engine, once every one of them has been checked."""
        outputs, all_requests = [], []
        for place, (given, params, priority) in enumerate(zip(inputs, all_params, priorities, strict=True)):
            raise_if_interrupted()
            with naming_place(place, len(inputs)):
                prompt = read_prompt(with_names(given, priority=priority), self._tokenizer)
                output, requests = self._processor.add(self._new_id(), prompt, self._checks.checked(params))
            outputs.append(output)
            all_requests.append(requests)
        for place, requests in enumerate(all_requests):
            with naming_place(place, len(inputs)):
                self._add_to_engine(requests)
        return outputs

    def _add_to_engine(self, requests: Sequence[Request]) -> None:
        for request in requests:
            self._engine.add(request)

    def _new_id(self) -> str:
        self._num_requests += 1
        return str(self._num_requests - 1)

    def _take_step(self) -> list[RequestOutput]:
        """Run an iteration and return the outputs that grew."""
        step = self._engine.step()
        grown = self._processor.process(step)
        self._engine.abort(self._processor.take_stopped())
        self._metrics.take(step.stats, self._processor.num_generated_tokens)
        return grown

    def _run(
        self, num_requests: int, raise_if_interrupted: Callable[[], None], use_tqdm: bool | Callable[..., Any]
    ) -> None:
        """Step until the engine has nothing left to do."""
        start_s, num_tokens_before = time.monotonic(), self._processor.num_generated_tokens
        make_bar = use_tqdm if callable(use_tqdm) else tqdm
        # A function that the user gave decides itself whether to show anything.
        is_shown = bool(use_tqdm) and (callable(use_tqdm) or sys.stderr.isatty())
        bar = make_bar(total=num_requests, unit="request", dynamic_ncols=True, disable=not is_shown)
        with bar, heap_left_alone():
            while self._engine.has_work:
                raise_if_interrupted()
                self._take_step()
                num_tokens = self._processor.num_generated_tokens - num_tokens_before
                bar.set_postfix_str(f"{num_tokens / (time.monotonic() - start_s):.0f} output tokens/s", refresh=False)
                bar.update(num_requests - len(self._processor) - bar.n)

    def _abort_all(self) -> None:
        self._engine.abort(self._processor.abort_all())
        while self._engine.has_work:
            self._engine.step()
