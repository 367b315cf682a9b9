"""Grammars that are compiled for a model's vocabulary: aside from the engine's loop, and kept for later requests.

The engine asks whether a request's grammar is ready before the request may run, which starts its compilation; then the
executor takes a matcher of it. `text.py` says what a grammar is. Front ends have refused grammars that take too long
(`engine/grammar_checks.py`).
"""

from __future__ import annotations

import logging
import threading
from collections import OrderedDict
from collections.abc import Callable, Sequence
from concurrent.futures import FIRST_COMPLETED, Future, ThreadPoolExecutor, wait
from typing import Any

from llguidance import LLMatcher, LLTokenizer

from nanoflow.errors import one_line
from nanoflow.grammars.text import GrammarError, grammar_of, limits, said
from nanoflow.structured import Structured

logger = logging.getLogger(__name__)

_NUM_KEPT = 256
_NUM_THREADS = 2
# Further copies of grammars are compiled one at a time, and no more than so many wait for that.
_NUM_WAITING_COPIES = 16


def vocabulary(tokenizer_json: str, *, vocab_size: int, eos_token_ids: Sequence[int]) -> LLTokenizer:
    """The bytes of a model's tokens.

    Args:
        tokenizer_json: The content of tokenizer.json.
        vocab_size: Width of the model's logits.
        eos_token_ids: Tokens that may be chosen where a grammar may end.

    Raises:
        GrammarError: The tokenizer is of a kind whose tokens have no bytes of their own.
    """
    try:
        return LLTokenizer(tokenizer_json, n_vocab=vocab_size, eos_token=list(eos_token_ids))
    except Exception as error:
        raise GrammarError(f"structured output is not possible with this tokenizer: {one_line(error)}") from None


class Grammars:
    """Compiled grammars. Methods may be called from several threads.

    Args:
        load: Makes the vocabulary; it is called once, in a thread, and what it raises concerns requests with a grammar.
        num_kept: Grammars that are kept, those used last.
    """

    def __init__(self, load: Callable[[], LLTokenizer], *, num_kept: int = _NUM_KEPT) -> None:
        self._num_kept = num_kept
        self._pool = ThreadPoolExecutor(_NUM_THREADS, "nanoflow-grammar")
        self._copy_pool = ThreadPoolExecutor(1, "nanoflow-grammar-copy")
        self._vocabulary = self._pool.submit(load)
        # Whether any request needs the bytes of tokens.
        self._awaits_bytes = False
        self._lock = threading.Lock()
        # By grammar and number of its copy.
        self._futures: OrderedDict[tuple[Structured, int], Future[LLMatcher]] = OrderedDict()

    def is_ready(self, structured: Structured | None, *, needs_bytes: bool = False) -> bool:
        """Whether a request with this grammar may run; if not, it is being compiled, or will be when asked again.

        Args:
            structured: The grammar; None for none.
            needs_bytes: Whether the request needs `token_bytes` without waiting.
        """
        if structured is None:
            self._awaits_bytes |= needs_bytes
            return not needs_bytes or self._vocabulary.done()
        future = self._find(structured)
        return future is not None and future.done()

    def compiled(self, structured: Structured, copy: int = 0) -> LLMatcher:
        """A grammar as a matcher at its beginning, of which each request gets a `deep_copy`.

        All copies of a matcher share one automaton, which only one of them can use at a time. So a grammar that many
        requests have is compiled several times.

        Args:
            structured: The grammar; it is compiled if it is not there.
            copy: Which compiled form of it, from 0. If another than 0 is not there, it is compiled in the background,
                and 0 is returned.

        Raises:
            GrammarError: It cannot be compiled.
        """
        while (future := self._find(structured)) is None:
            self.wait(1.0)
        first = future.result()
        another = self._find(structured, copy) if copy else None
        return first if another is None or not another.done() or another.exception() else another.result()

    def matcher(self, structured: Structured) -> LLMatcher:
        """A matcher at the grammar's beginning; arguments and errors as of `compiled`."""
        return self.compiled(structured).deep_copy()

    def matcher_or_none(self, structured: Structured) -> LLMatcher | None:
        """`matcher`; None if the grammar cannot be used, which its request learns elsewhere."""
        try:
            return self.matcher(structured)
        except GrammarError:
            return None

    def token_bytes(self, token_id: int) -> bytes:
        """The bytes of a token; a special token has those of its name.

        Raises:
            GrammarError: The tokens of this model have no bytes of their own.
        """
        return bytes(self._loaded().decode_bytes([token_id]))

    def wait(self, timeout_s: float) -> None:
        """Wait until a grammar that is being compiled is ready, or the bytes of tokens; not at all if there is none."""
        with self._lock:
            pending: list[Future[Any]] = [future for future in self._futures.values() if not future.done()]
        if self._awaits_bytes and not self._vocabulary.done():
            pending.append(self._vocabulary)
        if pending:
            wait(pending, timeout_s, FIRST_COMPLETED)

    def close(self) -> None:
        """Stop compiling."""
        self._pool.shutdown(wait=False, cancel_futures=True)
        self._copy_pool.shutdown(wait=False, cancel_futures=True)

    def _find(self, structured: Structured, copy: int = 0) -> Future[LLMatcher] | None:
        """The grammar, which may still be compiled; None if enough others are."""
        pool, most = (self._copy_pool, _NUM_WAITING_COPIES) if copy else (self._pool, 2 * _NUM_THREADS)
        with self._lock:
            future = self._futures.get((structured, copy))
            if future is None:
                alike = (each for (_, number), each in self._futures.items() if bool(number) == bool(copy))
                if sum(not each.done() for each in alike) >= most:
                    return None
                future = self._futures[structured, copy] = pool.submit(self._compile, structured)
            self._futures.move_to_end((structured, copy))
            while len(self._futures) > self._num_kept and next(iter(self._futures.values())).done():
                self._futures.popitem(last=False)
            return future

    def _loaded(self) -> LLTokenizer:
        try:
            return self._vocabulary.result()
        except GrammarError:
            raise
        # Whatever kept the vocabulary from being loaded concerns the requests that need it alone.
        except Exception as error:
            logger.exception("the vocabulary of grammars cannot be loaded")
            raise GrammarError(one_line(error)) from None

    def _compile(self, structured: Structured) -> LLMatcher:
        matcher = LLMatcher(self._loaded(), grammar_of(structured), log_level=0, limits=limits())
        if matcher.is_error():
            raise GrammarError(said(matcher.get_error()))
        return matcher
