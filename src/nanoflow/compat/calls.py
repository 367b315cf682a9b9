"""Arguments of vLLM's methods that ours lack, and methods that nanoflow lacks: data, and a check of arguments.

Accepted values and refusals are as for options (`entries.py`).
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from nanoflow.compat.entries import Foreign, Table
from nanoflow.parameters import RequestError

_NO_LORA = "there are no LoRA adapters: merge the adapter into the weights"
_NO_MULTIMODAL = "models take text alone"
_NO_POOLING = "models generate text, and `LLM.embed` gives vectors; there are no scores or classes"

_OF_REQUESTS = (
    Foreign(name="lora_request", reason=_NO_LORA),
    Foreign(name="prompt_adapter_request", reason="there are no prompt adapters"),
    Foreign(name="guided_options_request", reason="give `structured_outputs` of SamplingParams"),
    Foreign(
        name="tokenization_kwargs",
        takes=({},),
        reason="`truncate_prompt_tokens` is a parameter of SamplingParams; give token ids for all else",
    ),
    Foreign(name="mm_processor_kwargs", takes=({},), reason=_NO_MULTIMODAL),
    Foreign(name="trace_headers", takes=({},), reason="there is no tracing"),
    Foreign(name="data_parallel_rank", takes=(0,), reason="there is one engine"),
    Foreign(name="reasoning_ended", reason="the whole text is returned, with its reasoning"),
    Foreign(
        name="prompt_text", reason="a prompt of token ids may bring its text: {'prompt': ..., 'prompt_token_ids': ...}"
    ),
    Foreign(name="arrival_time", reason="a request arrives when it is given to the engine"),
)
_OF_CHATS = (
    Foreign(
        name="chat_template_content_format",
        takes=("auto",),
        reason="whether a template takes texts or parts is read from the template",
    ),
)
_OF_ENGINES = (
    Foreign(name="usage_context", takes=("ENGINE_CONTEXT", "LLM_CLASS"), reason="no usage data is collected"),
    Foreign(name="stat_loggers", takes=([],), reason="`nanoflow serve` logs statistics"),
    Foreign(name="start_engine_loop", takes=(True,), reason="the engine starts when it is first used"),
    Foreign(name="enable_log_requests", takes=(False,), reason="requests are not logged one by one"),
    Foreign(name="disable_log_requests", takes=(True,), reason="requests are not logged one by one"),
    Foreign(name="disable_log_stats", takes=(True, False), reason="`nanoflow serve` logs statistics"),
    Foreign(name="enable_multiprocessing", takes=(False,), reason="`AsyncLLM` has the engine in a process of its own"),
    Foreign(name="timeout", takes=(0,), reason="the engine has ten seconds to end by itself"),
)

CALLS = Table.of("`LLM.generate` and `LLM.chat`", _OF_REQUESTS, _OF_CHATS)
"""Arguments of the methods of `LLM`."""

ASYNC_CALLS = Table.of("`AsyncLLM`", _OF_REQUESTS, _OF_ENGINES)
"""Arguments of the methods of `AsyncLLM`."""

ENGINE_CALLS = Table.of("`LLMEngine`", _OF_REQUESTS, _OF_ENGINES)
"""Arguments of the methods of `LLMEngine`."""

PROMPTS = Table.of(
    "a prompt",
    (
        Foreign(name="multi_modal_data", takes=({},), reason=_NO_MULTIMODAL),
        Foreign(name="multi_modal_uuids", takes=({},), reason=_NO_MULTIMODAL),
        Foreign(name="mm_processor_kwargs", takes=({},), reason=_NO_MULTIMODAL),
        Foreign(name="prompt_embeds", reason="prompts are text or token ids, not embeddings"),
        Foreign(name="token_type_ids", reason="models have no token types"),
        Foreign(name="encoder_prompt", reason="models have no encoder"),
        Foreign(name="decoder_prompt", reason="models have no encoder"),
        Foreign(name="type", takes=("text", "token"), reason="a prompt is text or token ids"),
    ),
)
"""Keys of a prompt that is a mapping, beside `prompt` and `prompt_token_ids`."""


@dataclass(frozen=True, slots=True)
class Methods:
    """Methods that nanoflow lacks, with what to use instead."""

    reasons: Mapping[str, str]

    def ending(self, name: str) -> str:
        """The end of a message about a method that does not exist; empty if it is not vLLM's either."""
        return f": {self.reasons[name]}" if name in self.reasons else ""


METHODS = Methods(
    {
        **dict.fromkeys(("encode", "classify", "score", "reward"), _NO_POOLING),
        "beam_search": "there is no beam search; n completions are sampled by SamplingParams(n=...)",
        **dict.fromkeys(("sleep", "wake_up", "is_sleeping"), "a loaded model stays on the device: close it"),
        **dict.fromkeys(("collective_rpc", "apply_model"), "no code of users runs in the engine"),
        **dict.fromkeys(("start_profile", "stop_profile"), "`nanoflow profile` measures operations"),
        "set_tokenizer": "give the tokenizer's folder as option `tokenizer`",
        "llm_engine": "`LLM` drives its engine itself; `facts` has sizes and limits, `LLMEngine` goes step by step",
        **dict.fromkeys(
            ("model_config", "vllm_config", "get_model_config", "engine"), "`LLM.facts` says what is loaded"
        ),
        **dict.fromkeys(("add_lora", "remove_lora", "list_loras", "pin_lora"), _NO_LORA),
        "preprocess_chat": "`LLM.chat` renders and completes; the tokenizer has apply_chat_template",
        "reset_mm_cache": _NO_MULTIMODAL,
        "wait_for_requests_to_drain": "await what `generate` yields",
        "do_log_stats": "`nanoflow serve` logs statistics, and `get_metrics` has them",
    }
)
"""Methods of `LLM`, `AsyncLLM` and `LLMEngine` that nanoflow lacks."""


def pass_over(table: Table, method: str, others: Mapping[str, Any]) -> None:
    """Check arguments that a method lacks.

    Raises:
        RequestError: A value would change something.
        TypeError: The argument does not exist in vLLM either.
    """
    for name, value in others.items():
        entry = table.entries.get(name)
        if not isinstance(entry, Foreign):
            if table is PROMPTS:
                raise RequestError(f"a prompt's mapping has 'prompt' or 'prompt_token_ids', got {name!r}")
            raise TypeError(f"{method}() got an unexpected keyword argument {name!r}")
        if not entry.changes_nothing(getattr(value, "name", value)):
            raise RequestError(entry.refusal(value))
