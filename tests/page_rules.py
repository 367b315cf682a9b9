"""How `test_pages.py` tests each command of the documentation.

Every command in a block must have an entry here, and every entry must be in a block.
"""

from __future__ import annotations

from dataclasses import dataclass

from tests.all_cases import RUNS_ALL_CASES

STORED_PROFILE = "benchmarks/results/profile_llama-3-8b_h200.json"
QUICK_SEARCH = (
    f"nanoflow search {STORED_PROFILE} -o plans.json --workloads 1024/512 --max-batch-tokens 2048 --max-num-seqs 1024"
)
# The plan for one of its batches.
ONE_SEARCH = (
    f"nanoflow search {STORED_PROFILE} -o plans.json --max-batch-tokens 2048 --decodes 683 --context 1280 "
    "--prompt-tokens 1024"
)
QUICK_SEARCH_SAYS = "sequential best: 2,048 tokens, 1,024 requests: 27,462 tokens/s, predicted"


@dataclass(frozen=True, slots=True, kw_only=True)
class Run:
    """Run the command in this process; it must end with status 0.

    Attributes:
        instead: The command with arguments that are fast enough for a test; None if it is fast as it is.
        says: Regular expressions that must match its output.
        typed: Its standard input.
        writes: Files that it must write.
        shows: The first line of the block of the page that is its output; None if no page has it.
    """

    instead: str | None = None
    says: tuple[str, ...] = ()
    typed: str | None = None
    writes: tuple[str, ...] = ()
    shows: str | None = None


@dataclass(frozen=True, slots=True, kw_only=True)
class Serve:
    """A server command: its options are parsed, and a shared server of the default model answers a request."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Parse:
    """A command that needs a GPU, the Hub or minutes: only its options and values are parsed.

    Attributes:
        why: What it needs.
        result: A file of the repository that replaces the one it would write.
    """

    why: str
    result: str | None = None


@dataclass(frozen=True, slots=True, kw_only=True)
class Make:
    """A target of the Makefile, run with --dry-run."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Install:
    """An installation: names and versions are compared with pyproject.toml."""


Rule = Run | Serve | Parse | Make | Install

# One thread for the default model on CPU: short runs of a small model.
_CPU = "--device cpu"
_TEMPLATE = "{% for message in messages %}{{ message['content'] }}{% endfor %}"

RULES: dict[str, Rule] = {
    # README.md
    "make demo": Make(),
    "make test": Make(),
    "make test-all": Make(),
    "make lint": Make(),
    "make docs": Make(),
    "pip install -e .": Install(),
    "pip install nanoflow-engine": Install(),
    "make soak": Make(),
    "make fuzz": Make(),
    "nanoflow serve --host 0.0.0.0 --api-key-file keys.txt": Parse(why="a file of keys"),
    "nanoflow serve model.gguf": Parse(why="a GGUF file"),
    'nanoflow generate "Once upon a time" --model model.gguf': Parse(why="a GGUF file"),
    'nanoflow generate "def "': Run(instead=f'nanoflow generate "def " {_CPU} --max-tokens 16', says=(r"\S",)),
    "nanoflow serve Qwen/Qwen2.5-0.5B-Instruct": Serve(),
    "nanoflow serve Qwen/Qwen2.5-0.5B-Instruct --quantization fp8": Serve(),
    "nanoflow chat --model Qwen/Qwen2.5-0.5B-Instruct": Run(
        instead=f'nanoflow chat --model default {_CPU} --max-tokens 4 --chat-template "{_TEMPLATE}"', typed="def \n"
    ),
    "nanoflow bench throughput --workload 512/128 --num-requests 32": Run(
        instead=f"nanoflow bench throughput --workload 32/8 --num-requests 4 {_CPU}", says=("tokens/s",)
    ),
    "nanoflow bench throughput --model preset:llama-3-8b": Parse(why="a GPU"),
    "nanoflow env": Run(says=("nanoflow", "torch")),
    # What is found must not depend on how busy the machine is.
    QUICK_SEARCH: Run(
        instead=f"{QUICK_SEARCH if RUNS_ALL_CASES else ONE_SEARCH} --time-limit 1000",
        writes=("plans.json",),
        shows=QUICK_SEARCH_SAYS if RUNS_ALL_CASES else None,
    ),
    f"nanoflow plan show plans.json --profile {STORED_PROFILE} --svg plan.svg": Run(
        says=(r"% faster than one after the other", "attention inside"), writes=("plan.svg",)
    ),
    f"nanoflow simulate {STORED_PROFILE} --plan plans.json --workload 1024/512 --request-rate 20 --gpus 2": Run(
        says=(r"throughput +[\d,]+ tokens/s, [\d,]+ a GPU",)
    ),
    "nanoflow serve preset:llama-3-8b --plan plans.json": Parse(why="a GPU"),
    "nanoflow profile preset:llama-3-8b -o profile.json --max-batch-tokens 2048": Parse(
        why="a GPU", result=STORED_PROFILE
    ),
    "nanoflow profile preset:llama-3-8b -o estimate.json --max-batch-tokens 2048 --estimate h100": Run(
        says=(r"estimate\.json: \d+ points",), writes=("estimate.json",)
    ),
    "nanoflow search profile.json -o plans.json --workloads 1024/512 --measure": Parse(why="a GPU"),
    # docs/auto-search.md
    "nanoflow profile preset:llama-3-8b -o profile.json --max-batch-tokens 8192": Parse(
        why="a GPU", result=STORED_PROFILE
    ),
    "nanoflow search profile.json -o plans.json --workloads 512/512": Parse(
        why="a minute", result="benchmarks/results/plans_llama-3-8b_h200_1024-512.json"
    ),
    # docs/batches.md
    "nanoflow search profile.json -o plans.json --workloads 8000/100x1,200/1000x12": Parse(
        why="minutes", result="benchmarks/results/plans_llama-3-8b_h200_mix.json"
    ),
    "nanoflow batch requests.jsonl -o answers.jsonl --model preset:llama-3-8b --plan plans.json": Parse(why="a GPU"),
    "nanoflow plan show plans.json --profile profile.json --svg plan.svg": Run(writes=("plan.svg",)),
    "nanoflow simulate profile.json --plan plans.json --workload 512/512 --num-requests 1000": Run(
        instead="nanoflow simulate profile.json --plan plans.json --workload 512/512 --num-requests 100",
        says=("throughput",),
    ),
    "nanoflow profile preset:llama-2-70b -o a100.json --estimate a100-80x8": Run(writes=("a100.json",)),
    "nanoflow simulate a100.json --workload trace:lengths.csv --num-requests 20000 --request-rate 100 --find-gpus "
    "--max-normalized-latency-ms 200": Run(
        instead="nanoflow simulate a100.json --workload trace:lengths.csv --num-requests 100 --request-rate 20 "
        "--find-gpus --max-normalized-latency-ms 200",
        says=("GPUs serve 20 requests/s",),
    ),
    f"nanoflow simulate {STORED_PROFILE} --workload 256/128 --rounds 4 --num-conversations 400 --think-time 20 "
    "--kv-host-gib 64": Run(
        instead=f"nanoflow simulate {STORED_PROFILE} --workload 256/16 --rounds 2 --num-conversations 20 "
        "--think-time 1 --kv-host-gib 64",
        says=(r"KV host +[\d,]+ of [\d,]+ tokens found", r"prompt tokens computed: 1 of \d"),
    ),
    f"nanoflow simulate {STORED_PROFILE} --workload 1024/512 --num-requests 600 --kv-host-gib 64 --max-tokens 1024 "
    "--policies": Run(
        instead=f"nanoflow simulate {STORED_PROFILE} --workload 256/16 --num-requests 20 --kv-host-gib 64 "
        "--max-tokens 64 --policies",
        says=(r"\* predicted +swap",),
    ),
    # docs/tools.md
    "nanoflow serve Qwen/Qwen3-8B": Serve(),
    # docs/limits.md
    "nanoflow serve ./my-model": Serve(),
    "nanoflow serve ./my-model --goal latency": Serve(),
    "nanoflow serve ./my-model --goal throughput --max-num-seqs 512": Serve(),
    # docs/priorities.md
    f"nanoflow simulate {STORED_PROFILE} --workload 512/256 --num-requests 1200 --request-rate 25 --max-itl-ms 75 "
    "--max-ttft-ms 300 --batch-requests 5000": Run(
        instead=f"nanoflow simulate {STORED_PROFILE} --workload 64/8 --num-requests 10 --request-rate 20 "
        "--max-itl-ms 75 --max-ttft-ms 300 --batch-requests 400 --batch-workload 64/8 --max-num-seqs 32",
        says=(r"share of the rest +\d+%",),
    ),
    # docs/rounds.md
    "nanoflow bench rounds --workload 64/32 --num-conversations 8": Run(
        instead=f"nanoflow bench rounds --workload 24/4 --num-conversations 2 --rounds 2 --num-warmup 0 {_CPU}",
        says=(r"prompt tokens computed: 1 of \d", r"^round +requests"),
    ),
    "nanoflow bench rounds --workload trace:lengths.csv --rounds 8 --think-time 2 --max-concurrency 64": Parse(
        why="a minute"
    ),
    "nanoflow bench rounds --shared-system 0.5 --system-tokens 512 --agent-share 0.25 --json run.json": Parse(
        why="a minute"
    ),
    "nanoflow bench rounds --url http://127.0.0.1:8000/v1 --workload 512/128": Parse(why="a server"),
    # docs/kv-tiers.md
    "nanoflow serve ./my-model --kv-host-gib 64 --kv-dir /var/cache/nanoflow --kv-disk-gib 200": Serve(),
    # docs/memory.md
    "nanoflow serve ./my-model --kv-cache-dtype fp8": Serve(),
    "nanoflow analyze preset:llama-3-8b --kv-cache-dtype fp8": Run(says=("KV cache +66,560 bytes a token",)),
    # docs/kv-events.md
    "nanoflow serve ./my-model --kv-events-config "
    '\'{"enable_kv_cache_events": true, "replay_endpoint": "tcp://*:5558"}\'': Serve(),
    # docs/structured-output.md
    """nanoflow generate "The answer is " --structured-outputs '{"choice": ["yes", "no"]}'""": Run(
        instead=f"""nanoflow generate "The answer is " --structured-outputs '{{"choice": ["yes", "no"]}}' {_CPU}""",
        says=(r"^(yes|no)$",),
    ),
    # docs/batches.md
    "nanoflow batch requests.jsonl -o answers.jsonl": Run(
        instead=f"nanoflow batch requests.jsonl -o answers.jsonl --max-num-seqs 4 {_CPU}", writes=("answers.jsonl",)
    ),
    "nanoflow batch requests.jsonl -o answers.jsonl --model Qwen/Qwen3-0.6B --served-model-name gpt-4o-mini": Parse(
        why="a download"
    ),
    "nanoflow serve ./my-model --batch-dir /var/lib/nanoflow/batches": Serve(),
    # docs/page.md
    "nanoflow serve ./my-model --disable-page": Serve(),
    # docs/monitoring.md
    "pip install 'nanoflow-engine[otel]'": Install(),
    "nanoflow serve ./my-model --otlp-traces-endpoint http://127.0.0.1:4318": Serve(),
    # docs/speculative.md
    "nanoflow serve ./my-model --speculative ngram:4": Serve(),
}

# Blocks without commands, by language and first line, and what they are compared with.
SHOWN: dict[str, str] = {
    QUICK_SEARCH_SAYS: "the search of the quick start",
    "nanoflow: weights are stored as AWQ int4 and served as bfloat16: 14.96 GiB": "tests/unit/test_quantised.py",
    "from nanoflow import LLM, SamplingParams": "run",
    "from nanoflow import LLM": "run",
    "# Two requests that somebody waits for, the second more urgently, and one for which nobody does.": "run",
    "from nanoflow import LLM, SamplingParams, StructuredOutputsParams": "run",
    "from openai import OpenAI": "run against the server",
    '{"custom_id": "a", "method": "POST", "url": "/v1/completions", "body": {"prompt": "def ", "max_tokens": 16}}': (
        "the requests.jsonl of test_pages.py"
    ),
    '{"id": "batch_req_1", "custom_id": "a", "response": {"status_code": 200, "request_id": "req-5c...",': (
        "test_batch_command.py"
    ),
    "# A response, and one that goes on from it.": "run against the server",
    'curl http://127.0.0.1:8000/v1/embeddings -H "Content-Type: application/json" \\': "test_server.py asks the same",
    "from anthropic import Anthropic": "tools/client_checks/ask_anthropic.py asks the same",
    "export ANTHROPIC_BASE_URL=http://127.0.0.1:8000": "settings of another program",
    'model = "MODEL"': "settings of another program",
    "# A server with --batch-dir.": "test_batches_api.py",
    "# The second time, all full pages of the prompt are found.": "run",
    "# A turn with a call, and a turn with its result.": "tests/integration/test_tools_http.py runs it",
    "# A turn of a conversation, then advice that the next one will come.": "run against the server",
    "src/nanoflow/": "the tree, written and checked by tools/docs.py",
    "# models/readings.py: the fields that exist in its config.json, what an absent one means, and which may be "
    "null": "run",
    "def build(config: ModelConfig, max_model_len: int | None) -> OpGraph:": "the signature of models/llama.py",
    '{"version": 1,': "fields of plan books",
    "10  familiar                              names that users of vLLM know": "layers in pyproject.toml",
    'curl http://127.0.0.1:8000/v1/models -H "Authorization: Bearer $(cat keys.txt)"': "test_door.py sends such keys",
    "location /llm/ {": "test_page_browser.py has a proxy that does so",
    "maximise u": "a formula",
    "copies      tokens x bytes of a token / link                saves and loads use one direction each": "a formula",
    "maximise u >= 1 / (shortest period so far)": "a formula",
    "nanoflow limits for balanced: max_batch_tokens 2,048 (about 50 ms an iteration on NVIDIA H200), max_num_seqs 100 "
    "(given), gaps of at most 75 ms between tokens (goal balanced)": "a line of the server",
    "nanoflow sampling defaults of the model: temperature=0.7, top_p=0.8, top_k=20, repetition_penalty=1.05": (
        "the line of such a model"
    ),
}
