"""Runs chat templates in processes that can be killed, so that no template can block this process or fill its memory.

`job_processes.py` has the processes, which run `template_process.py`. `chat_template.py` prepares messages and
interprets the results.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from nanoflow.engine.job_processes import JobLimitError, JobProcesses
from nanoflow.request import RequestError

MAX_PROCESSES = 4
_SCRIPT = Path(__file__).with_name("template_process.py")
# Memory for a template's work; the text that it makes is far smaller.
_MEMORY_MIB = 512


class ChatTemplateError(RequestError):
    """A chat template cannot render a conversation; the message is one line that says why."""


class ChatTemplateLimitError(ChatTemplateError):
    """A chat template was stopped because it took too long, or its process has ended."""


class TemplateRenderer:
    """Up to `MAX_PROCESSES` processes that render chat templates. Methods may be called from several threads.

    Args:
        timeout_s: Longest time that a template may take.
        max_chars: Longest text that it may write.
    """

    def __init__(self, *, timeout_s: float, max_chars: int) -> None:
        self._processes = JobProcesses(
            _SCRIPT, (max_chars, _MEMORY_MIB), timeout_s=timeout_s, max_processes=MAX_PROCESSES
        )

    def render(self, job: Mapping[str, Any]) -> str:
        """Text of a conversation.

        Args:
            job: Keyword arguments of the renderer, all JSON values; see `template_process.answer`.

        Raises:
            ChatTemplateError: The template raises an error, or writes too much.
            ChatTemplateLimitError: It takes too long, or ends its process.
            EngineDeadError: The renderer was closed.
        """
        try:
            line = json.dumps(job).encode()
        except (TypeError, ValueError, RecursionError) as error:
            raise ChatTemplateError(f"it takes JSON values only: {error}") from None
        try:
            reply = self._processes.ask(line)
        except JobLimitError as error:
            raise ChatTemplateLimitError(str(error)) from None
        if "error" in reply:
            raise ChatTemplateError(reply["error"])
        return reply["text"]

    def close(self) -> None:
        """End all processes, including those that are working."""
        self._processes.close()
