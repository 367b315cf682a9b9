"""Names of formats, as the options --tool-call-parser and --reasoning-parser take them. `choice.py` finds the formats.

Nothing heavy is imported here: `--help` shows these names.
"""

from __future__ import annotations

from collections.abc import Mapping

AUTO, NONE = "auto", "none"

CALL_NAMES: Mapping[str, str] = {
    "hermes": "hermes",
    "llama3_json": "llama3_json",
    "mistral": "mistral",
    "deepseek_v3": "deepseek_v3",
    "deepseek_v31": "deepseek_v31",
    "openai": "openai",
    "llama4_json": "llama3_json",
    "qwen3_coder": "qwen3_coder",
    "qwen3_xml": "qwen3_coder",
    "glm45": "glm45",
    "glm47": "glm45",
    "kimi_k2": "kimi_k2",
    "seed_oss": "seed_oss",
    "qwen2": "hermes",
    "qwen25": "hermes",
    "qwen3": "hermes",
}
"""Names of formats of calls, with the name of the format that each means."""

REASONING_NAMES: Mapping[str, str] = {
    "qwen3": "qwen3",
    "deepseek_r1": "deepseek_r1",
    "deepseek_v3": "deepseek_v3",
    "mistral": "mistral",
    "openai_gptoss": "openai_gptoss",
    "deepseek_v31": "deepseek_v3",
    "holo2": "qwen3",
    "glm45": "qwen3",
    "kimi_k2": "qwen3",
    "seed_oss": "seed_oss",
}
"""Names of formats of reasoning, with the name of the format that each means."""
