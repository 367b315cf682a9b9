"""Options of `vllm serve` for the server, one entry each; those of the engine are in `engine_options.py`."""

from __future__ import annotations

from nanoflow.compat.entries import Alias, Foreign, Same, Table, negated, options, switches

_PROXY = "put a proxy (nginx, Caddy) before the server"
_LOGS = "the log has one format; `--log-level` says how much"
_ONE_SERVER = "one server has one engine; front ends share a port (--api-servers)"
_HTTP = "sizes of requests are bounded by the server"
_DOCS = "the API's description is at /openapi.json"

_OURS = (
    Same(name="host", note="127.0.0.1 if not given, where vLLM listens on all addresses"),
    Same(name="port"),
    Same(name="served_model_name"),
    Same(name="api_key", note="several: give the flag several times"),
    Same(name="ssl_keyfile"),
    Same(name="ssl_certfile"),
    Same(name="ssl_ca_certs", note="clients without a certificate are refused"),
    Same(name="allowed_origins", note="none if not given"),
    Same(name="shutdown_timeout", note="20 s if not given, where vLLM cuts at once"),
    Same(name="return_tokens_as_token_ids"),
    Same(name="enable_tokenizer_info_endpoint"),
    Same(name="trust_request_chat_template"),
    Same(name="tool_call_parser", note="found in the chat template if not given"),
    Same(name="otlp_traces_endpoint", note="over HTTP if OTEL_EXPORTER_OTLP_TRACES_PROTOCOL does not say grpc"),
    Same(name="reasoning_parser", note="found in the chat template if not given"),
    Alias(name="api_server_count", to="api_servers", flags=("-asc",)),
    Alias(name="uvicorn_log_level", to="log_level"),
    Alias(name="disable_log_stats", to="log_stats", convert=negated, note="turns it off"),
)
_NETWORK = (
    Foreign(name="ssl_ciphers", reason=f"ciphers are Python's defaults: {_PROXY}"),
    Foreign(name="ssl_cert_reqs", takes=(0,), reason="clients show certificates where ssl_ca_certs is given"),
    *switches(f"certificates are read once: {_PROXY}", "enable_ssl_refresh"),
    Foreign(name="uds", reason="the server listens at a port, not at a socket in the file system"),
    Foreign(name="root_path", takes=("", "/"), reason=f"routes begin at /: {_PROXY}"),
    *options(
        "all methods and headers are allowed to allowed_origins", "allowed_methods", "allowed_headers", takes=(["*"],)
    ),
    *switches(f"pages of other origins send keys, no cookies: {_PROXY}", "allow_credentials"),
    Foreign(name="middleware", takes=([],), reason=f"no code of users runs in the server: {_PROXY}"),
    *options(_HTTP, "h11_max_incomplete_event_size", "h11_max_header_count"),
    *switches("each answer has an x-request-id header", "enable_request_id_headers", takes=(True, False)),
    *switches(_DOCS, "disable_fastapi_docs", "enable_offline_docs"),
    *switches(_ONE_SERVER, "headless", "data_parallel_multi_port_external_lb"),
    *switches(_ONE_SERVER, "disable_frontend_multiprocessing", "tokens_only"),
    *options(_ONE_SERVER, "data_parallel_supervisor_port", takes=(9256,)),
    *options(_ONE_SERVER, "dp_supervisor_probe_interval_s", "dp_supervisor_probe_timeout_s", takes=(5,)),
    *options(_ONE_SERVER, "dp_supervisor_probe_failure_threshold", takes=(3,)),
    *switches("the server answers HTTP, not gRPC", "grpc"),
    Foreign(name="config", reason="options are given on the command line; a shell script keeps them"),
)
_ANSWERS = (
    *switches("calls are read where a request has tools", "enable_auto_tool_choice", takes=(True, False)),
    *switches(
        "the model is shown no tools where tool_choice is none", "exclude_tools_when_tool_choice_none", takes=(True,)
    ),
    *options("formats of calls are those of --tool-call-parser", "tool_parser_plugin", takes=("",)),
    *options("tools are called by clients", "tool_server", takes=("",)),
    Foreign(name="response_role", takes=("assistant",), reason="the role of an answer is assistant"),
    Foreign(
        name="chat_template_content_format",
        takes=("auto",),
        reason="whether a template takes texts or parts is read from the template",
    ),
    Foreign(
        name="default_chat_template_kwargs", takes=({},), reason="each request may bring its own chat_template_kwargs"
    ),
    *switches("usage has no details of the prompt", "enable_prompt_tokens_details"),
    *switches("a stream has usage where it asks for it (stream_options)", "enable_force_include_usage"),
    *switches("times are at GET /metrics", "enable_per_request_metrics", "enable_server_load_tracking"),
    Foreign(name="lora_modules", nargs="+", reason="there are no LoRA adapters: merge the adapter into the weights"),
    Foreign(name="prompt_adapters", nargs="+", reason="there are no prompt adapters"),
    Foreign(name="fingerprint_mode", takes=("full", "hash"), reason="system_fingerprint is version and digest"),
    Foreign(name="fingerprint_value", reason="system_fingerprint is version and digest"),
    *switches("there is no reasoning format", "cohere_is_reasoning_model", takes=(True, False)),
    Foreign(name="cohere_format", takes=("cmd4",), reason="the model's own chat template is used"),
    *switches("there is no scoring", "enable_flash_late_interaction", takes=(True, False)),
)
_LOGGING = (
    *switches("requests are not in the log one by one", "disable_uvicorn_access_log", takes=(True,)),
    Foreign(name="disable_access_log_for_endpoints", takes=("",), reason="requests are not in the log one by one"),
    Foreign(name="log_config_file", reason=_LOGS),
    Foreign(name="max_log_len", reason="prompts are not in the log"),
    *switches("answers are not in the log", "enable_log_outputs"),
    *switches("answers are not in the log", "enable_log_deltas", takes=(True, False)),
    *switches("stack traces of faults of the server are in the log", "log_error_stack"),
)

SERVER = Table.of("`nanoflow serve`", _OURS, _NETWORK, _ANSWERS, _LOGGING)
"""Options of the server."""
