"""Parameters of vLLM's `SamplingParams`, one entry each (`entries.py`)."""

from __future__ import annotations

from nanoflow.compat.entries import Alias, Foreign, Same, Table, options, switches

_NO_BEAMS = "there is no beam search"

_OURS = (
    Same(name="n", note="128 at most"),
    Same(name="presence_penalty"),
    Same(name="frequency_penalty"),
    Same(name="repetition_penalty"),
    Same(name="temperature"),
    Same(name="top_p", note="0 is taken too"),
    Same(name="top_k"),
    Same(name="min_p"),
    Same(name="seed", note="completion i of n samples with seed + i"),
    Same(name="stop"),
    Same(name="stop_token_ids"),
    Same(name="bad_words"),
    Same(name="ignore_eos"),
    Same(name="max_tokens"),
    Same(name="min_tokens"),
    Same(name="logprobs"),
    Same(name="prompt_logprobs"),
    Same(name="detokenize"),
    Same(name="skip_special_tokens"),
    Same(name="include_stop_str_in_output"),
    Same(name="output_kind", note="`AsyncLLM` and `LLMEngine` follow it; `LLM` returns what is finished"),
    Same(name="logit_bias"),
    Same(name="allowed_token_ids"),
    Same(name="truncate_prompt_tokens", note="the last tokens are kept"),
    Same(name="pooling", note="not a parameter of vLLM's: `LLM.embed` sets it"),
    Same(name="structured_outputs", note="`json`, `regex`, `choice`, `grammar` (Lark or GBNF) and `json_object`"),
    Same(name="thinking_token_budget", note="counted from the end of the opening tag, which may be in the prompt"),
    Alias(name="thinking_budget", to="thinking_token_budget", note="as Qwen's API calls it"),
    Alias(name="guided_decoding", to="structured_outputs", note="as older versions call it"),
)
_FOREIGN = (
    Foreign(name="best_of", same_as="n", reason="all n completions are returned: give n"),
    *switches(_NO_BEAMS, "use_beam_search", "early_stopping"),
    Foreign(name="length_penalty", takes=(1,), reason=_NO_BEAMS),
    Foreign(name="beam_width", reason=_NO_BEAMS),
    Foreign(name="logits_processors", takes=([],), reason="no code of users runs in the engine; there is logit_bias"),
    *switches(
        "tokens are put together as the tokenizer's decoder does", "spaces_between_special_tokens", takes=(True,)
    ),
    Foreign(name="logprob_token_ids", takes=([],), reason="`logprobs` gives the most probable tokens, -1 gives all"),
    *options("`prompt_logprobs` scores the whole prompt", "prompt_logprob_token_ids", takes=([],)),
    Foreign(name="prompt_logprob_start", takes=(0,), reason="`prompt_logprobs` scores the whole prompt"),
    *switches("log probabilities are mappings a place, made when they are read", "flat_logprobs"),
    Foreign(name="stream_interval", takes=(1,), reason="tokens that wait are sent together: --stream-interval-ms"),
    *switches("parameters are copied when a request is made", "skip_clone"),
    *switches("a cached prefix changes no answer", "skip_reading_prefix_cache", takes=(True, False)),
    Foreign(name="repetition_detection", reason="a completion ends by stop, stop_token_ids or max_tokens"),
    Foreign(name="extra_args", takes=({},), reason="there are no parameters of extensions"),
    Foreign(name="routed_experts_prompt_start", takes=(0,), reason="which experts a token passes is not told"),
    Foreign(name="trace_decode_token_ids", takes=([],), reason="tokens are sampled; prompt_logprobs scores given ones"),
    Foreign(
        name="output_text_buffer_length", takes=(0,), reason="how much text is held back for stop strings cannot be set"
    ),
)

SAMPLING = Table.of("`SamplingParams`", _OURS, _FOREIGN)
"""Sampling parameters."""
