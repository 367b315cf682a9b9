"""Options of vLLM's `LLM`, `EngineArgs` and `vllm serve` for the model and the engine, one entry each.

`entries.py` defines entries; `server_options.py` has the options of the server.
"""

from __future__ import annotations

from typing import Any

from nanoflow.compat.entries import Alias, Foreign, Same, Table, negated, options, switches
from nanoflow.compat.speculative_config import ngram_of
from nanoflow.parameters import read_count

_ONE_GPU = "one GPU serves a model; for several, start a server on each (CUDA_VISIBLE_DEVICES) behind a load balancer"
_NO_MULTIMODAL = "models take text alone"
_NO_LORA = "there are no LoRA adapters: merge the adapter into the weights (peft: merge_and_unload)"
_NO_SPECULATION = "speculative decoding is by prompt look-up alone: `speculative`, as ngram:4"
_NO_POOLING = "models generate text, and give vectors by `LLM.embed`; there are no scores or classes"
_NO_EXPERTS = "one GPU holds all experts, with one implementation, and does not tell which ones a token passes"
_ONE_GUIDE = "there is one backend of structured outputs, llguidance"
_NO_REASONING = "`nanoflow serve` separates reasoning from the rest of an answer; `LLM` gives the whole text"
_NO_TRANSFER = "KV caches are not moved between engines"
_NO_OFFLOAD = "weights and KV cache stay on the device; preempted requests are computed again"
_NO_CODE = "no Python of a model folder or of users is run in the engine"
_NO_MAMBA = "models with state spaces are not served"
_NO_COMPILER = "torch compiles no kernels; cuda_graphs launches all kernels of a step at once"
_CONFIG_JSON = "what config.json says of the model counts: change it in a copy of the folder"
_METRICS = "the metrics are those of docs/api.md, at GET /metrics"
_FCFS = "requests run by priority, and else in the order in which they come"


def _gib(num_bytes: Any) -> float:
    return read_count(str(num_bytes)) / 2**30


_OURS = (
    Same(name="model"),
    Same(name="tokenizer"),
    Same(name="revision", note="of model and tokenizer"),
    Same(name="dtype", values={"half": "float16", "float": "float32"}, note="auto is float32 on a CPU"),
    Same(
        name="load_format",
        values={"dummy": "random", **dict.fromkeys(("auto", "hf", "gguf"), "safetensors")},
        note="a GGUF file is known by its beginning",
        refused={
            **dict.fromkeys(("pt", "npcache"), "weights are read from safetensors alone: convert them"),
            **dict.fromkeys(("bitsandbytes", "mistral"), "weights are read from safetensors or a GGUF file"),
            **dict.fromkeys(
                ("tensorizer", "runai_streamer", "runai_streamer_sharded", "sharded_state", "fastsafetensors"),
                "weights are read from safetensors in a folder",
            ),
        },
    ),
    Same(
        name="quantization",
        values=dict.fromkeys(
            (
                *("awq", "awq_marlin", "gptq", "gptq_marlin", "compressed-tensors", "modelopt", "gguf", "fbgemm_fp8"),
                "mxfp4",
            ),
            "auto",
        ),
        note="the checkpoint says how weights are stored; fp8 quantises others at the start",
        flags=("-q",),
    ),
    Same(name="generation_config"),
    Same(name="seed", note="None is 0"),
    Same(name="max_model_len", note="4k is 4,000 and 4K is 4,096; auto and -1 are the model's own"),
    Same(
        name="kv_cache_dtype",
        values={"fp8": "fp8_e4m3"},
        refused=dict.fromkeys(
            ("fp8_e5m2", "fp8_inc", "fp8_ds_mla"), "the KV cache is fp8_e4m3, or of the type `dtype`"
        ),
        note="fp8 has a scale for each key and value, found when it is written",
    ),
    Same(name="max_num_seqs", note="chosen for goal, model and device if not given"),
    Same(name="gpu_memory_utilization"),
    Same(name="max_logprobs"),
    Same(name="async_scheduling"),
    Same(name="skip_tokenizer_init"),
    Same(name="device"),
    Same(name="kv_events_config", note="`event_format` in it says which version of vLLM's format is sent"),
    Same(name="chat_template", note="in `LLM.chat` it is an argument too"),
    Alias(name="max_num_batched_tokens", to="max_batch_tokens"),
    Alias(name="block_size", to="page_size"),
    Alias(name="kv_cache_memory_bytes", to="kv_cache_gib", convert=_gib, note="in bytes"),
    Alias(name="num_gpu_blocks_override", to="num_pages"),
    Alias(name="enforce_eager", to="cuda_graphs", convert=negated, note="turns it off"),
    Alias(
        name="speculative_config",
        to="speculative",
        convert=ngram_of,
        note="a mapping with method ngram, num_speculative_tokens, prompt_lookup_max and prompt_lookup_min",
        flags=("-sc",),
    ),
    Alias(name="performance_mode", to="goal", note="where interactivity is latency"),
    # `goal` is nanoflow's own name; vLLM has the same choice under another.
    Same(name="goal", values={"interactivity": "latency"}, note="vLLM calls it performance_mode"),
)
_MODEL = (
    Foreign(name="task", takes=("auto", "generate"), reason=_NO_POOLING),
    Foreign(name="runner", takes=("auto", "generate"), reason=_NO_POOLING),
    Foreign(name="convert", takes=("auto", "none"), reason=_NO_POOLING),
    Foreign(name="tokenizer_mode", takes=("auto", "hf"), reason="the tokens are those of tokenizer.json"),
    Foreign(
        name="tokenizer_revision",
        reason="`revision` is that of model and tokenizer; for another tokenizer give its folder as `tokenizer`",
    ),
    *switches(f"{_NO_CODE}; the architectures of docs/models.md need none: leave it out", "trust_remote_code"),
    Foreign(name="code_revision", reason=_NO_CODE),
    Foreign(
        name="hf_token",
        takes=(True,),
        nargs="?",
        is_secret=True,
        reason="set HF_TOKEN, or log in by `hf auth login`",
    ),
    Foreign(name="hf_config_path", reason=_CONFIG_JSON),
    Foreign(name="hf_overrides", takes=({},), reason=_CONFIG_JSON),
    Foreign(name="rope_scaling", takes=({},), reason=f"{_CONFIG_JSON} (rope_parameters)"),
    Foreign(name="rope_theta", reason=f"{_CONFIG_JSON} (rope_theta)"),
    Foreign(name="config_format", takes=("auto", "hf"), reason=_CONFIG_JSON),
    Foreign(name="model_impl", takes=("auto",), reason="there is one implementation of each architecture, ours"),
    *options("the checkpoint says how weights are stored", "quantization_config", "quantization_param_path"),
    *switches("the checkpoint says how weights are stored", "allow_deprecated_quantization"),
    Foreign(name="override_attention_dtype", reason="attention computes in the type that `dtype` says"),
    *switches("the sliding windows in the model's config.json are used", "disable_sliding_window"),
    *switches("there is no cascade attention", "disable_cascade_attn", takes=(True, False)),
    *switches("prompts are text or token ids, not embeddings", "enable_prompt_embeds"),
    Foreign(
        name="override_generation_config",
        takes=({},),
        reason="give the values in SamplingParams, or a folder with a generation_config.json as `generation_config`",
    ),
    *switches("a loaded model stays on the device: close it to free the memory", "enable_sleep_mode"),
    Foreign(
        name="logprobs_mode",
        takes=("raw_logprobs",),
        reason="they are the model's own, before temperature and penalties",
    ),
    Foreign(name="logits_processors", takes=([],), nargs="+", reason=_NO_CODE),
    Foreign(name="logits_processor_pattern", reason=_NO_CODE),
    Foreign(name="io_processor_plugin", reason=_NO_CODE),
    Foreign(name="renderer_num_workers", takes=(1,), reason="chat templates run in up to four processes"),
    Foreign(name="served_model_name", nargs="+", reason="it is an option of `nanoflow serve`"),
    *options(_NO_POOLING, "pooler_config", "override_pooler_config"),
    *switches(_NO_EXPERTS, "enable_return_routed_experts"),
    Foreign(name="allowed_local_media_path", takes=("",), reason=_NO_MULTIMODAL),
    Foreign(name="allowed_media_domains", takes=([],), nargs="+", reason=_NO_MULTIMODAL),
    Foreign(name="download_dir", reason="the Hub's cache is where HF_HOME says"),
    Foreign(
        name="ignore_patterns",
        takes=(["original/**/*"], "original/**/*"),
        nargs="+",
        reason="only config, tokenizer and safetensors are downloaded from the Hub",
    ),
    Foreign(name="model_loader_extra_config", takes=({},), reason="there is one loader, of safetensors"),
    Foreign(
        name="safetensors_load_strategy", takes=("lazy", "auto"), reason="weights are mapped and read tensor by tensor"
    ),
    *options("weights are read tensor by tensor, not fetched ahead", "safetensors_prefetch_num_threads", takes=(0,)),
    Foreign(name="model_weights", takes=("",), reason="weights and config.json are in one folder: `model`"),
    Foreign(name="pt_load_map_location", takes=("cpu",), reason="weights are read from safetensors"),
    *switches("a progress bar is shown if standard error is a terminal", "use_tqdm_on_load", takes=(True,)),
)
_CACHE = (
    Foreign(name="prefix_caching_hash_algo", takes=("sha256",), reason="pages are found by SHA-256"),
    Foreign(name="kv_cache_dtype_skip_layers", takes=([],), reason="all layers have the type `kv_cache_dtype`"),
    *switches("fp8 keys and values always have scales, found when they are written", "calculate_kv_scales"),
    Foreign(name="swap_space", takes=(0, 4), reason=f"{_NO_OFFLOAD}; the old default, 4, was for best_of only"),
    Foreign(name="cpu_offload_gb", takes=(0,), reason=_NO_OFFLOAD),
    Foreign(name="kv_offloading_size", takes=(0,), reason=_NO_OFFLOAD),
    *options(_NO_OFFLOAD, "offload_backend", takes=("auto",)),
    *options(_NO_OFFLOAD, "cpu_offload_params", takes=([],)),
    *options(_NO_OFFLOAD, "kv_offloading_backend", takes=("native",)),
    *options(_NO_OFFLOAD, "offload_group_size", "offload_num_in_group", "offload_prefetch_step", takes=(0, 1)),
    *options(_NO_OFFLOAD, "offload_params", takes=([],)),
    *switches("each layer has a cache of its own", "kv_sharing_fast_prefill"),
    *switches("all layers have pages of one size", "disable_hybrid_kv_cache_manager", takes=(True, False)),
    *options(_NO_MAMBA, "mamba_cache_dtype", "mamba_ssm_cache_dtype", takes=("auto",)),
    *options(_NO_MAMBA, "mamba_cache_mode", "mamba_backend", takes=("none", "triton")),
    *options(_NO_MAMBA, "mamba_block_size", "gdn_prefill_backend"),
    *options(_NO_MAMBA, "mamba_config", "mamba_cache_philox_rounds", takes=({}, 0)),
    *switches(_NO_MAMBA, "enable_mamba_cache_stochastic_rounding"),
    *options(_NO_TRANSFER, "kv_transfer_config", "ec_transfer_config"),
    Foreign(name="weight_transfer_config", reason="weights are read once, when the model is loaded"),
)
_PARALLEL = (
    Foreign(name="tensor_parallel_size", takes=(1,), flags=("-tp",), reason=_ONE_GPU),
    Foreign(name="pipeline_parallel_size", takes=(1,), flags=("-pp",), reason=_ONE_GPU),
    Foreign(name="data_parallel_size", takes=(1,), flags=("-dp",), reason=_ONE_GPU),
    Foreign(name="decode_context_parallel_size", takes=(1,), flags=("-dcp",), reason=_ONE_GPU),
    Foreign(name="prefill_context_parallel_size", takes=(1,), flags=("-pcp",), reason=_ONE_GPU),
    Foreign(name="data_parallel_size_local", takes=(1,), flags=("-dpl",), reason=_ONE_GPU),
    Foreign(name="data_parallel_rank", takes=(0,), flags=("-dpn",), reason=_ONE_GPU),
    Foreign(name="data_parallel_start_rank", takes=(0,), flags=("-dpr",), reason=_ONE_GPU),
    Foreign(name="data_parallel_address", flags=("-dpa",), reason=_ONE_GPU),
    Foreign(name="data_parallel_rpc_port", flags=("-dpp",), reason=_ONE_GPU),
    Foreign(name="data_parallel_backend", takes=("mp",), flags=("-dpb",), reason=_ONE_GPU),
    Foreign(name="nnodes", takes=(1,), flags=("-n",), reason=_ONE_GPU),
    Foreign(name="node_rank", takes=(0,), flags=("-r",), reason=_ONE_GPU),
    # With vLLM's default value, which changes nothing on one GPU, these options are accepted.
    *options(_ONE_GPU, "master_addr", takes=("127.0.0.1",)),
    *options(_ONE_GPU, "master_port", takes=(29501,)),
    *options(_ONE_GPU, "cp_kv_cache_interleave_size", "dcp_kv_cache_interleave_size", takes=(1,)),
    *options(_ONE_GPU, "dcp_comm_backend", takes=("ag_rs",)),
    *options(_ONE_GPU, "distributed_timeout_seconds", "max_parallel_loading_workers"),
    *switches(_ONE_GPU, "data_parallel_hybrid_lb", "data_parallel_external_lb", "enable_dbo", "enable_elastic_ep"),
    *switches(_ONE_GPU, "worker_use_ray", "ray_workers_use_nsight", "numa_bind"),
    *options(_ONE_GPU, "numa_bind_nodes", "numa_bind_cpus"),
    *switches("one GPU has no all-reduce", "disable_custom_all_reduce", takes=(True, False)),
    *switches("one GPU has no ranks", "disable_nccl_for_dp_synchronization", takes=(True, False)),
    Foreign(
        name="distributed_executor_backend", takes=("uni", "mp"), reason="one process runs the engine, without Ray"
    ),
    Foreign(name="ubatch_size", takes=(0,), reason="plans split batches into nano-batches: see docs/auto-search.md"),
    *options(_ONE_GPU, "dbo_decode_token_threshold", takes=(32,)),
    *options(_ONE_GPU, "dbo_prefill_token_threshold", takes=(512,)),
    Foreign(name="enable_expert_parallel", takes=(False,), is_switch=True, flags=("-ep",), reason=_NO_EXPERTS),
    *switches(_NO_EXPERTS, "enable_eplb", "enable_ep_weight_filter"),
    *options(_NO_EXPERTS, "eplb_config", "num_redundant_experts", takes=({}, 0)),
    *options(_NO_EXPERTS, "expert_placement_strategy", takes=("linear",)),
    *options(_NO_EXPERTS, "all2all_backend", "moe_backend", takes=("auto", "allgather_reducescatter")),
    *options(_NO_EXPERTS, "eplb_window_size", "eplb_step_interval", takes=(1000, 3000)),
    *switches(_NO_EXPERTS, "eplb_log_balancedness"),
    Foreign(name="worker_cls", takes=("auto",), reason=_NO_CODE),
    Foreign(name="worker_extension_cls", takes=("",), reason=_NO_CODE),
)
_SCHEDULER = (
    *switches("prompts are always computed in chunks", "enable_chunked_prefill", takes=(True,)),
    Foreign(
        name="scheduling_policy",
        takes=("fcfs", "priority"),
        reason="requests run by their `priority`, and those of one priority in the order in which they come",
    ),
    Foreign(name="scheduler_cls", reason=_NO_CODE),
    Foreign(name="max_num_partial_prefills", takes=(1,), reason=_FCFS),
    Foreign(name="max_long_partial_prefills", takes=(1,), reason=_FCFS),
    Foreign(
        name="long_prefill_token_threshold",
        takes=(0,),
        reason="`max_itl_ms` bounds the chunks of prompts that join decodes",
    ),
    *switches(
        "admission counts the pages that a request will need at its peak", "scheduler_reserve_full_isl", takes=(True,)
    ),
    Foreign(name="num_lookahead_slots", takes=(0,), reason=_NO_SPECULATION),
    Foreign(name="num_scheduler_steps", takes=(1,), reason="`async_scheduling` forms the next batch meanwhile"),
    *switches("tokens are read one iteration late", "multi_step_stream_outputs", takes=(True,)),
    Foreign(name="preemption_mode", takes=("recompute",), reason=_NO_OFFLOAD),
    *switches("pages are managed in one way", "use_v2_block_manager", takes=(True,)),
    *switches("tokens are read while the next batch runs", "disable_async_output_proc"),
    Foreign(name="scheduler_delay_factor", takes=(0,), reason=_FCFS),
    Foreign(name="stream_interval", takes=(1,), reason="`nanoflow serve` has --stream-interval-ms"),
    *options(_NO_SPECULATION, "speculative_model", "num_speculative_tokens", "ngram_prompt_lookup_max"),
    *options(_NO_SPECULATION, "spec_method", "spec_model", "spec_tokens"),
)
_KERNELS = (
    Foreign(name="compilation_config", takes=({},), flags=("-cc",), reason=_NO_COMPILER),
    Foreign(
        name="optimization_level", takes=(2, 3), flags=("-O",), reason=f"{_NO_COMPILER} (enforce_eager turns it off)"
    ),
    Foreign(
        name="max_seq_len_to_capture",
        takes=(8192,),
        reason="CUDA graphs are recorded by size of batch; any length is served",
    ),
    *options("sizes of CUDA graphs are chosen for the device", "cuda_graph_sizes", "cudagraph_capture_sizes"),
    Foreign(name="max_cudagraph_capture_size", reason="sizes of CUDA graphs are chosen for the device"),
    Foreign(name="attention_config", takes=({},), flags=("-ac",), reason="attention has kernels of its own"),
    Foreign(name="attention_backend", reason="attention has kernels of its own"),
    *options("there is one set of kernels a device", "kernel_config", "ir_op_priority", "linear_backend", takes=({},)),
    *switches("there are no FlashInfer kernels", "enable_flashinfer_autotune"),
    Foreign(
        name="additional_config", takes=({},), reason="there are no options beside those of `nanoflow serve --help`"
    ),
    *switches("environment variables named VLLM_* are not read", "fail_on_environ_validation"),
)
_FEATURES = (
    *switches(_NO_LORA, "enable_lora", "enable_lora_bias", "fully_sharded_loras", "enable_tower_connector_lora"),
    *switches(_NO_LORA, "specialize_active_lora", "enable_prompt_adapter"),
    # vLLM's defaults, which change nothing without adapters, are accepted.
    *options(_NO_LORA, "max_loras", "max_prompt_adapters", takes=(1,)),
    *options(_NO_LORA, "max_lora_rank", takes=(16,)),
    *options(_NO_LORA, "lora_dtype", takes=("auto",)),
    *options(_NO_LORA, "lora_extra_vocab_size", takes=(256,)),
    *options(_NO_LORA, "max_prompt_adapter_token", takes=(0,)),
    *options(_NO_LORA, "max_cpu_loras", "lora_target_modules", "default_mm_loras", "long_lora_scaling_factors"),
    *options(_ONE_GUIDE, "structured_outputs_config", takes=({}, {"backend": "auto"}, {"backend": "guidance"})),
    *options(_ONE_GUIDE, "guided_decoding_backend", takes=("auto", "guidance")),
    *switches(_ONE_GUIDE, "guided_decoding_disable_fallback", "guided_decoding_disable_any_whitespace"),
    *switches(_ONE_GUIDE, "guided_decoding_disable_additional_properties"),
    Foreign(name="reasoning_parser", takes=("",), reason=_NO_REASONING),
    Foreign(name="reasoning_parser_plugin", takes=("",), reason=_NO_REASONING),
    Foreign(name="reasoning_config", takes=({},), reason=_NO_REASONING),
    *switches(_NO_REASONING, "enable_reasoning"),
    *options(_NO_MULTIMODAL, "limit_mm_per_prompt", "mm_processor_kwargs", "media_io_kwargs", takes=({},)),
    *options(_NO_MULTIMODAL, "mm_processor_cache_gb", "video_pruning_rate", takes=(0, 4)),
    *options(_NO_MULTIMODAL, "mm_processor_cache_type", takes=("lru",)),
    *options(_NO_MULTIMODAL, "mm_shm_cache_max_object_size_mb", takes=(128,)),
    *options(_NO_MULTIMODAL, "mm_encoder_tp_mode", takes=("weights",)),
    *options(_NO_MULTIMODAL, "mm_encoder_fp8_scale_save_margin", takes=(1.5,)),
    *options(_NO_MULTIMODAL, "mm_tensor_ipc", takes=("direct_rpc",)),
    *options(_NO_MULTIMODAL, "mm_encoder_attn_backend", "mm_encoder_attn_dtype", "mm_encoder_fp8_scale_path"),
    *options(_NO_MULTIMODAL, "mm_encoder_fp8_scale_save_path"),
    *switches(_NO_MULTIMODAL, "language_model_only", takes=(True, False)),
    *switches(_NO_MULTIMODAL, "enable_mm_embeds", "interleave_mm_strings", "mm_encoder_only"),
    *switches(_NO_MULTIMODAL, "enable_multimodal_encoder_data_parallel", "enable_mm_processor_stats"),
    *switches(_NO_MULTIMODAL, "disable_mm_preprocessor_cache", "disable_chunked_mm_input", takes=(True, False)),
    *switches(_NO_MULTIMODAL, "skip_mm_profiling", takes=(True, False)),
)
_WATCHING = (
    *switches("requests are not logged one by one", "enable_log_requests"),
    *switches("requests are not logged one by one", "disable_log_requests", takes=(True,)),
    *switches("statistics are logged by `nanoflow serve` alone", "disable_log_stats", takes=(True,)),
    *switches("there is only one engine", "aggregate_engine_logging", takes=(True, False)),
    *switches(_METRICS, "kv_cache_metrics", "cudagraph_metrics", "enable_mfu_metrics"),
    *switches(_METRICS, "enable_logging_iteration_details"),
    *options(_METRICS, "kv_cache_metrics_sample", takes=(0.01,)),
    *options(_METRICS, "show_hidden_metrics_for_version"),
    *options("`nanoflow serve` traces requests, each as a whole", "otlp_traces_endpoint", "collect_detailed_traces"),
    *switches("`nanoflow profile` measures operations", "enable_layerwise_nvtx_tracing"),
    Foreign(
        name="profiler_config", takes=({},), reason="`nanoflow profile` measures operations, see docs/auto-search.md"
    ),
    Foreign(name="tokenizer_pool_size", takes=(0,), reason="long prompts are read in threads"),
    *options("long prompts are read in threads", "tokenizer_pool_type", takes=("ray",)),
    *options("long prompts are read in threads", "tokenizer_pool_extra_config"),
)

ENGINE = Table.of(
    "`LLM`, `EngineArgs` and `nanoflow serve`",
    *(_OURS, _MODEL, _CACHE, _PARALLEL, _SCHEDULER, _KERNELS, _FEATURES, _WATCHING),
)
"""Options of the model and the engine."""
