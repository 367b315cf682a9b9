"""The process in which a grammar is compiled for the first time, since a hostile one may take forever or end it.

`engine/grammar_checks.py` runs it as a script. A job is a line of JSON with `kind` and `text`; so is its answer, with
`text` or `error`. The operating system kills the process when a job takes too long.
"""

from __future__ import annotations

import json
import signal
import sys
import threading
from dataclasses import replace

from llguidance import LLMatcher, LLTokenizer

from nanoflow.engine.template_process import limit_memory
from nanoflow.grammars.text import GrammarError, grammar_of, in_lark, limits, said
from nanoflow.structured import Structured

# A recursion that fits into this stack fits into those of the engine, which are at least twice as large.
STACK_BYTES = 1 << 20


def answer(line: bytes) -> dict[str, str]:
    """Compile a grammar on single bytes, and look for what it may begin with.

    Args:
        line: A `Structured` as JSON.

    Returns:
        The `text` to use, which is the given one except for a grammar in another format than Lark's; or an `error`.
    """
    structured = Structured(**json.loads(line))
    try:
        if structured.kind == "grammar":
            structured = replace(structured, text=in_lark(structured.text))
        error = _fault(structured)
        return {"text": structured.text} if error is None else {"error": error}
    except GrammarError as error:
        return {"error": str(error)}
    except MemoryError:
        return {"error": "it takes too much memory"}


def _fault(structured: Structured) -> str | None:
    grammar = grammar_of(structured)
    is_wrong, messages = LLMatcher.validate_grammar_with_warnings(grammar, limits=limits())
    if is_wrong:
        return said(messages[0])
    matcher = LLMatcher(LLTokenizer("byte"), grammar, log_level=0, limits=limits())
    matcher.compute_bitmask()
    if not matcher.is_error():
        return None
    # The first step of a grammar that no text satisfies, such as a reference to itself, finds nothing to allow.
    return "no text satisfies it" if "NoExtension" in matcher.get_error() else said(matcher.get_error())


def main() -> None:
    """Answer jobs until standard input ends."""
    timeout_s, memory_mib = float(sys.argv[1]), int(sys.argv[2])
    signal.signal(signal.SIGALRM, signal.SIG_DFL)
    limit_memory(memory_mib << 20)
    threading.stack_size(STACK_BYTES)
    worker = threading.Thread(target=_work, args=(timeout_s,))
    worker.start()
    worker.join()


def _work(timeout_s: float) -> None:
    for line in sys.stdin.buffer:
        signal.setitimer(signal.ITIMER_REAL, timeout_s)
        reply = answer(line)
        signal.setitimer(signal.ITIMER_REAL, 0)
        sys.stdout.buffer.write(json.dumps(reply).encode() + b"\n")
        sys.stdout.buffer.flush()


if __name__ == "__main__":
    main()
