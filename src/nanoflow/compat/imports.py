"""Names that can be imported and their modules, and reasons for names of vLLM that cannot: data.

`NAMES` are names in `nanoflow` itself. `MODULES` are modules that exist under vLLM's path, as
`nanoflow.sampling_params`; they have no file and are made by `finder.py`. A home is the module that defines a name, or
`module:name` if the name differs there.
"""

from __future__ import annotations

from collections.abc import Mapping

_NO_POOLING = "models generate text, and `LLM.embed` gives vectors; there are no scores or classes"
_NO_BEAMS = "there is no beam search; n completions are sampled by SamplingParams(n=...)"
_NO_LORA = "there are no LoRA adapters: merge the adapter into the weights (peft: merge_and_unload)"
_NO_MULTIMODAL = "models take text alone"
_NO_CODE = "no code of users runs in the engine"
_ONE_GPU = "one GPU serves a model; nothing is distributed"
_OPTIONS = "options are arguments of LLM and EngineArgs: see docs/switching-from-vllm.md"

NAMES: Mapping[str, str] = {
    "LLM": "nanoflow.engine.llm",
    "AsyncEngine": "nanoflow.engine.async_engine",
    "SamplingParams": "nanoflow.request",
    "RequestError": "nanoflow.request",
    "RequestOutputKind": "nanoflow.request",
    "StructuredOutputsParams": "nanoflow.structured:structured_outputs_params",
    "GuidedDecodingParams": "nanoflow.structured:structured_outputs_params",
    "EngineConfig": "nanoflow.config",
    "ServerConfig": "nanoflow.config",
    "RequestOutput": "nanoflow.outputs",
    "EmbeddingRequestOutput": "nanoflow.outputs",
    "CompletionOutput": "nanoflow.outputs",
    "Logprob": "nanoflow.outputs",
    "FinishReason": "nanoflow.outputs",
    "AsyncLLM": "nanoflow.familiar.async_llm",
    "AsyncLLMEngine": "nanoflow.familiar.async_llm:AsyncLLM",
    "LLMEngine": "nanoflow.familiar.llm_engine",
    "EngineArgs": "nanoflow.familiar.engine_args",
    "AsyncEngineArgs": "nanoflow.familiar.engine_args",
    "TextPrompt": "nanoflow.familiar.prompts",
    "TokensPrompt": "nanoflow.familiar.prompts",
}
"""Names in `nanoflow`, and the home of each."""

MISSING: Mapping[str, str] = {
    **dict.fromkeys(("PoolingParams", "PoolingOutput", "PoolingRequestOutput"), _NO_POOLING),
    "PoolerConfig": _NO_POOLING,
    **dict.fromkeys(("ClassificationOutput", "ClassificationRequestOutput"), _NO_POOLING),
    **dict.fromkeys(("ScoringOutput", "ScoringRequestOutput"), _NO_POOLING),
    **dict.fromkeys(("BeamSearchParams", "BeamSearchOutput"), _NO_BEAMS),
    "RepetitionDetectionParams": "a completion ends by stop, stop_token_ids or max_tokens",
    "LoRARequest": _NO_LORA,
    "PromptAdapterRequest": "there are no prompt adapters",
    **dict.fromkeys(("EmbedsPrompt", "ExplicitEncoderDecoderPrompt"), "prompts are text or token ids"),
    **dict.fromkeys(("ModelRegistry", "register_model"), "architectures are added as docs/adding-a-model.md says"),
    **dict.fromkeys(("LogitsProcessor", "AdapterLogitsProcessor", "Executor", "Worker"), _NO_CODE),
    **dict.fromkeys(("VllmConfig", "ModelConfig", "CompilationConfig", "ParallelConfig", "CacheConfig"), _OPTIONS),
    **dict.fromkeys(("KVTransferConfig", "StructuredOutputsConfig", "SpeculativeConfig", "LoRAConfig"), _OPTIONS),
    "initialize_ray_cluster": _ONE_GPU,
    **dict.fromkeys(("Histogram", "Vector"), "`LLM.get_metrics` tells counters and gauges; the server has histograms"),
}
"""Names of vLLM that nanoflow lacks, with the reason."""

_LLM = {name: NAMES[name] for name in ("LLM",)}
_ASYNC = {name: NAMES[name] for name in ("AsyncLLM", "AsyncLLMEngine")}
_SYNC = {name: NAMES[name] for name in ("LLMEngine",)}
_ARGS = {name: NAMES[name] for name in ("EngineArgs", "AsyncEngineArgs")}
_PROMPTS = {
    **{name: NAMES[name] for name in ("TextPrompt", "TokensPrompt")},
    "PromptType": "nanoflow.engine.prompts:PromptInput",
}
_RANDOM = {"random_uuid": "nanoflow.familiar.prompts"}
_PARSER = {"FlexibleArgumentParser": "nanoflow.cli.options:CommandParser"}

MODULES: Mapping[str, Mapping[str, str]] = {
    "nanoflow.sampling_params": {
        name: NAMES[name]
        for name in ("SamplingParams", "RequestOutputKind", "StructuredOutputsParams", "GuidedDecodingParams")
    },
    "nanoflow.inputs": _PROMPTS,
    "nanoflow.inputs.data": _PROMPTS,
    "nanoflow.logprobs": {"Logprob": NAMES["Logprob"]},
    "nanoflow.sequence": {
        "Logprob": NAMES["Logprob"],
        "RequestMetrics": "nanoflow.outputs",
    },
    "nanoflow.engine.arg_utils": _ARGS,
    "nanoflow.engine.async_llm_engine": _ASYNC,
    "nanoflow.engine.llm_engine": _SYNC,
    "nanoflow.v1": {},
    "nanoflow.v1.engine": {},
    "nanoflow.v1.engine.async_llm": _ASYNC,
    "nanoflow.v1.engine.llm_engine": _SYNC,
    "nanoflow.v1.engine.exceptions": {"EngineDeadError": "nanoflow.engine.errors"},
    "nanoflow.v1.metrics": {},
    "nanoflow.v1.metrics.reader": dict.fromkeys(("Counter", "Gauge", "Metric"), "nanoflow.engine.llm_metrics"),
    "nanoflow.v1.metrics.stats": {"RequestStateStats": "nanoflow.outputs:RequestMetrics"},
    "nanoflow.entrypoints": {},
    "nanoflow.entrypoints.llm": _LLM,
    "nanoflow.usage": {},
    "nanoflow.utils": {**_RANDOM, **_PARSER},
    "nanoflow.utils.argparse_utils": _PARSER,
    "nanoflow.lora": {},
    "nanoflow.lora.request": {},
    "nanoflow.pooling_params": {},
    "nanoflow.beam_search": {},
}
"""Modules and their names, each with its home, and the reason why other names are missing."""

MISSING_MODULES: Mapping[str, str] = {
    "nanoflow.lora": _NO_LORA,
    "nanoflow.multimodal": _NO_MULTIMODAL,
    "nanoflow.assets": _NO_MULTIMODAL,
    "nanoflow.distributed": _ONE_GPU,
    "nanoflow.model_executor": "models are `nanoflow.models`, kernels are `nanoflow.kernels`",
    "nanoflow.worker": _NO_CODE,
    "nanoflow.v1.worker": _NO_CODE,
    "nanoflow.v1.sample": _NO_CODE,
    "nanoflow.plugins": _NO_CODE,
    "nanoflow.platforms": "`nanoflow env` says what there is",
    "nanoflow.entrypoints.openai": "`nanoflow serve` is the server",
    "nanoflow.entrypoints.api_server": "`nanoflow serve` is the server",
    "nanoflow.transformers_utils": "`LLM.get_tokenizer` gives the tokenizer",
    "nanoflow.attention": "attention is in `nanoflow.kernels`",
    "nanoflow.spec_decode": "speculative decoding is an option of the engine: speculative='ngram:4'",
    "nanoflow.usage.usage_lib": "no usage data is collected",
}
"""Modules of vLLM that nanoflow lacks, including their submodules."""
