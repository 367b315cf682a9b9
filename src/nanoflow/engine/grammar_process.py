"""The process in which a grammar is compiled for the first time, since a hostile one may take forever or end it.

`engine/grammar_checks.py` runs it as a script. A job is a line of JSON with `kind` and `text`, and for a grammar the
special tokens that it may name; its answer is a line with `text` or `error`. The operating system kills the process
when a job takes too long.
"""

from __future__ import annotations

import json
import signal
import sys
import threading
from collections.abc import Mapping
from dataclasses import replace
from functools import lru_cache

from llguidance import LLMatcher, LLTokenizer, TokenizerWrapper

from nanoflow.engine.template_process import limit_memory
from nanoflow.grammars.text import GrammarError, grammar_of, in_lark, limits, said
from nanoflow.grammars.unheld import unheld_in
from nanoflow.structured import Structured

# A recursion that fits into this stack fits into those of the engine, which are at least twice as large.
STACK_BYTES = 1 << 20
_NUM_BYTES = 256


def answer(line: bytes) -> dict[str, str]:
    """Compile a grammar on single bytes and special tokens, and look for what it may begin with.

    Args:
        line: JSON: the fields of a `Structured`, and for a grammar `special` (ids by name) and `vocab_size`.

    Returns:
        The `text` to use, which is the given one except for a grammar in another format than Lark's; or an `error`.
    """
    job = json.loads(line)
    special, vocab_size = job.pop("special", {}), job.pop("vocab_size", 0)
    structured = Structured(**job)
    try:
        if structured.kind == "grammar":
            structured = replace(structured, text=in_lark(structured.text))
        error = _fault(structured, _vocabulary(frozenset(special.items()), vocab_size))
        return {"text": structured.text} if error is None else {"error": error}
    except GrammarError as error:
        return {"error": str(error)}
    except MemoryError:
        return {"error": "it takes too much memory"}


def _fault(structured: Structured, vocabulary: LLTokenizer) -> str | None:
    grammar = grammar_of(structured)
    is_wrong, messages = LLMatcher.validate_grammar_with_warnings(grammar, limits=limits())
    if is_wrong:
        return said(messages[0])
    if (reason := unheld_in(structured)) is not None:
        return said(reason)
    matcher = LLMatcher(vocabulary, grammar, log_level=0, limits=limits())
    matcher.compute_bitmask()
    if not matcher.is_error():
        return None
    # The first step of a grammar that no text satisfies, such as a reference to itself, finds nothing to allow.
    return "no text satisfies it" if "NoExtension" in matcher.get_error() else said(matcher.get_error())


class _Bytes:
    """A vocabulary of all bytes and of special tokens, as llguidance reads one; other tokens have no text."""

    def __init__(self, special: Mapping[str, int], vocab_size: int) -> None:
        self.special_token_ids = sorted(set(special.values()))
        self.eos_token_id = min(self.special_token_ids, default=_NUM_BYTES)
        self.bos_token_id = None
        self.tokens = [b""] * max(vocab_size, _NUM_BYTES + 1 + len(special), *(place + 1 for place in special.values()))
        for name, token_id in special.items():
            self.tokens[token_id] = name.encode()
        taken = {self.eos_token_id, *self.special_token_ids}
        places = (place for place in range(len(self.tokens)) if place not in taken)
        for byte, place in zip(range(_NUM_BYTES), places, strict=False):
            self.tokens[place] = bytes([byte])

    def __call__(self, text: bytes) -> list[int]:
        """Bytes as tokens."""
        return [self.tokens.index(bytes([byte])) for byte in text]


@lru_cache(2)
def _vocabulary(special: frozenset[tuple[str, int]], vocab_size: int) -> LLTokenizer:
    return LLTokenizer(TokenizerWrapper(_Bytes(dict(special), vocab_size)))


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
