"""Compiled grammars: made aside, kept, and waited for by their own requests alone."""

from __future__ import annotations

import json
import random
import threading
import time
from collections.abc import Callable, Iterator
from typing import Any

import numpy as np
import pytest
from llguidance import LLMatcher, LLTokenizer
from tokenizers import AddedToken

from nanoflow.chat_formats.formats import CALLS, REASONING, ChatFormat
from nanoflow.chat_formats.grammar import grammar_of as chat_grammar
from nanoflow.chat_formats.tools import Calling, ToolChoice
from nanoflow.grammars.compiled import Grammars, vocabulary
from nanoflow.grammars.text import GrammarError, grammar_of, limits, said
from nanoflow.request import Request, RequestError, SamplingParams
from nanoflow.scheduler.waiting import WaitingQueue, WaitingRequest
from nanoflow.structured import Structured, read_response_format, read_structured
from tests.toy_tokenizers import byte_fallback_backend, byte_level_backend, metaspace_backend, toy_tokenizer


def regex(text: str) -> Structured:
    return Structured(kind="regex", text=text)


class Gate:
    """Bytes as a vocabulary, once it is opened."""

    def __init__(self) -> None:
        self.opened = threading.Event()
        self.num_loads = 0

    def load(self) -> LLTokenizer:
        self.num_loads += 1
        assert self.opened.wait(30)
        return LLTokenizer("byte")


@pytest.fixture
def gate() -> Iterator[Gate]:
    made = Gate()
    yield made
    made.opened.set()


def until(is_there: Callable[[], bool]) -> None:
    end_s = time.monotonic() + 30
    while not is_there():
        assert time.monotonic() < end_s
        time.sleep(0.001)


def test_a_grammar_is_ready_once_it_is_compiled(gate: Gate) -> None:
    grammars = Grammars(gate.load)
    assert grammars.is_ready(None) and not grammars.is_ready(regex("a"))
    grammars.wait(0.01)
    assert not grammars.is_ready(regex("a"))
    gate.opened.set()
    until(lambda: grammars.is_ready(regex("a")))
    one, other = grammars.matcher(regex("a")), grammars.matcher(regex("a"))
    assert one.consume_token(ord("a")) and one.is_stopped() and not other.is_stopped()
    assert gate.num_loads == 1
    grammars.wait(30)  # for nothing
    grammars.close()


def test_a_copy_is_compiled_beside_the_first(gate: Gate, monkeypatch: pytest.MonkeyPatch) -> None:
    gate.opened.set()
    grammars, opened = Grammars(gate.load), threading.Event()
    first = grammars.compiled(regex("ab"))
    compile_one = grammars._compile

    def compile_when_opened(structured: Structured) -> LLMatcher:
        assert structured == regex("d") or opened.wait(30)
        if structured == regex("c"):
            raise GrammarError("no memory")
        return compile_one(structured)

    third = grammars.compiled(regex("c"))
    monkeypatch.setattr(grammars, "_compile", compile_when_opened)
    assert grammars.compiled(regex("ab"), copy=3) is first and grammars.compiled(regex("c"), copy=1) is third
    # Copies that are being compiled keep no other grammar from it.
    assert not grammars.matcher(regex("d")).is_error()
    opened.set()
    until(lambda: grammars.compiled(regex("ab"), copy=3) is not first)
    another = grammars.compiled(regex("ab"), copy=3)
    assert grammars.compiled(regex("ab"), copy=3) is another and grammars.compiled(regex("ab")) is first
    matcher = another.deep_copy()
    assert matcher.consume_token(ord("a")) and not another.consume_token(ord("b"))
    # One that fails is as good as none.
    until(lambda: grammars._futures[regex("c"), 1].done())
    assert grammars.compiled(regex("c"), copy=1) is third
    grammars.close()


def test_one_that_fails_is_ready_too(gate: Gate) -> None:
    gate.opened.set()
    grammars = Grammars(gate.load)
    until(lambda: grammars.is_ready(regex("(a")))
    with pytest.raises(GrammarError, match="invalid regex") as caught:
        grammars.matcher(regex("(a"))
    assert "\n" not in str(caught.value)
    grammars.close()


def test_a_vocabulary_that_cannot_be_loaded_is_an_error_of_these_requests() -> None:
    def fail() -> LLTokenizer:
        raise OSError("no such\nfile")

    grammars = Grammars(fail)
    with pytest.raises(GrammarError, match=r"^no such$"):
        grammars.matcher(regex("a"))
    grammars.close()


def test_those_used_last_are_kept(gate: Gate, monkeypatch: pytest.MonkeyPatch) -> None:
    gate.opened.set()
    grammars, made = Grammars(gate.load, num_kept=2), list[str]()
    compile_one = grammars._compile

    def compile_and_note(structured: Structured) -> LLMatcher:
        made.append(structured.text)
        return compile_one(structured)

    monkeypatch.setattr(grammars, "_compile", compile_and_note)
    for text in ("a", "b", "a", "c", "a", "b"):
        grammars.matcher(regex(text))
    assert made == ["a", "b", "c", "b"]
    grammars.close()


def test_few_are_compiled_at_once(gate: Gate) -> None:
    """A long queue does not fill the threads, and a matcher that is needed now is waited for."""
    grammars = Grammars(gate.load)
    for number in range(50):
        assert not grammars.is_ready(regex(f"a{number}"))
    assert len(grammars._futures) == 4
    threading.Timer(0.05, gate.opened.set).start()
    assert not grammars.matcher(regex("a49")).is_error()
    grammars.close()


@pytest.mark.parametrize("make", [byte_level_backend, byte_fallback_backend])
def test_both_kinds_of_tokenizers_spell_what_is_wanted(make: Callable[[], Any]) -> None:
    """Whatever the tokens are, also parts of characters, and spaces at the beginning of words."""
    tokenizer, texts = toy_tokenizer(make()), (" a b", "gr\u00fcn", "\U0001f600")
    size = tokenizer.vocab_size + 3
    made = vocabulary(tokenizer.as_json(), vocab_size=size, eos_token_ids=(0,))
    start = LLMatcher(made, grammar_of(Structured(kind="choice", text=json.dumps(texts))), limits=limits())
    rng, spelled = random.Random(0), set[str]()
    for _ in range(20):
        matcher, token_ids = start.deep_copy(), list[int]()
        while not matcher.is_stopped():
            bits = np.unpackbits(np.frombuffer(matcher.compute_bitmask(), np.uint8), bitorder="little")
            token_ids.append(rng.choice(np.flatnonzero(bits).tolist()))
            assert matcher.consume_token(token_ids[-1])
        spelled.add(b"".join(map(tokenizer.bytes_of, token_ids)).decode())
    assert spelled == set(texts)


def test_a_tokenizer_without_bytes_is_an_error() -> None:
    for backend in ("{}", toy_tokenizer(metaspace_backend()).as_json()):
        with pytest.raises(GrammarError, match="structured output is not possible with this tokenizer: "):
            vocabulary(backend, vocab_size=5, eos_token_ids=(0,))


def test_messages_are_a_line() -> None:
    assert said("") == "it has no meaning"
    assert said("\n at 1: \n  x\nerror: it is open\n") == "at 1: it is open"
    assert said("lexer error: too much\n<non-verbose/>") == "lexer error: too much"
    assert len(said("x" * 999)) == 200


def test_requests_that_are_not_ready_are_passed_and_keep_their_place() -> None:
    ready = {1, 2}
    queue = WaitingQueue(lambda request: request.request_id in ready)
    for number in (0, 1, 2):
        request = Request(request_id=number, prompt_token_ids=[1], params=SamplingParams(), seed=0, max_tokens=1)
        queue.push_back(WaitingRequest(request=request, token_ids=np.ones(1, np.int32)))
    assert [one.request.request_id for one in queue] == [1, 2] and len(queue) == 3 and 0 in queue
    ready.add(0)
    assert [one.request.request_id for one in queue] == [0, 1, 2]


def test_the_bytes_of_tokens_are_waited_for_where_they_are_needed() -> None:
    is_open = threading.Event()

    def load() -> LLTokenizer:
        assert is_open.wait(30)
        return LLTokenizer("byte")

    grammars = Grammars(load)
    assert grammars.is_ready(None)
    grammars.wait(30)  # there is nothing to wait for
    assert not grammars.is_ready(None, needs_bytes=True)
    start_s = time.monotonic()
    grammars.wait(0.05)
    assert time.monotonic() >= start_s + 0.05
    is_open.set()
    grammars.wait(30)
    assert grammars.is_ready(None, needs_bytes=True) and grammars.token_bytes(97) == b"a"
    grammars.close()

    def fail() -> LLTokenizer:
        raise OSError("no such file")

    failed = Grammars(fail)
    with pytest.raises(GrammarError, match="no such file"):
        failed.token_bytes(0)
    failed.close()


TAGS = {
    "structures": [
        {"begin": "<f=add>", "schema": {"type": "object", "properties": {"a": {"type": "integer"}}}, "end": "</f>"},
        {"begin": "<g>", "schema": {"type": "boolean"}, "end": ""},
    ],
    "triggers": ["<f=", "<g>"],
}


@pytest.mark.parametrize(
    ("text", "is_right"),
    [
        ("free <text> only", True),
        ('a <f=add>{"a": 1}</f> b <g>true c', True),
        ('<f=add>{"a": "1"}</f>', False),
        ('<f=rm>{"a": 1}</f>', False),
        ("a <g>", False),
        ("a <f=add>{}", False),
    ],
)
def test_a_structural_tag_holds_what_stands_behind_a_trigger(text: str, is_right: bool) -> None:
    for value in ({"structural_tag": json.dumps(TAGS)}, {"structural_tag": TAGS}):
        structured = read_structured("structured_outputs", value)
        assert structured == read_response_format("response_format", {"type": "structural_tag", **TAGS})
    assert structured is not None
    matcher = LLMatcher(LLTokenizer("byte"), grammar_of(structured), log_level=0)
    data = list(text.encode())
    assert (matcher.try_consume_tokens(data) == len(data) and matcher.is_accepting()) == is_right


@pytest.mark.parametrize(
    ("given", "message"),
    [
        ({**TAGS, "triggers": []}, "triggers must be a list of texts"),
        ({**TAGS, "triggers": ["<f="]}, r"structures\[1\].begin must begin with one of the triggers"),
        ({**TAGS, "structures": [{"begin": "<g>", "end": ""}]}, "schema must be a JSON schema"),
        ({**TAGS, "structures": [{"begin": "<g>"}]}, "must be an object with begin and end"),
        ({"format": {}}, "structures and triggers"),
        ("{", "is not valid JSON"),
    ],
)
def test_a_bad_structural_tag_is_refused(given: Any, message: str) -> None:
    with pytest.raises(RequestError, match=message):
        read_structured("structured_outputs", {"structural_tag": given})


def test_added_tokens_that_look_like_tags_are_taken_by_their_ids() -> None:
    """Qwen's marks are no special tokens for its tokenizer, but are for llguidance, which takes no text for them."""
    backend = byte_level_backend()
    names = ("<tool_call>", "</tool_call>", "<think>", "</think>", "plain")
    backend.add_tokens([AddedToken(name, special=False) for name in names])
    tokenizer = toy_tokenizer(backend)
    made = vocabulary(tokenizer.as_json(), vocab_size=tokenizer.vocab_size, eos_token_ids=[0])
    assert {*names[:-1]} <= tokenizer.mark_names.keys() and "plain" not in tokenizer.mark_names
    assert all(made.is_special_token(token_id) for token_id in tokenizer.mark_names.values())
    tool = {"type": "function", "function": {"name": "add", "strict": True}}
    form = ChatFormat(calls=CALLS["hermes"], reasoning=REASONING["qwen3"])
    call = '<tool_call>\n{"name": "add", "arguments": {}}\n</tool_call>'
    for calling, text in (("auto", f"Hello {call}"), ("auto", "Hello"), ("required", f"hm</think>\n{call}")):
        grammar = chat_grammar(
            form,
            [tool],
            ToolChoice(Calling(calling)),
            special=tokenizer.mark_names,
            is_reasoning=calling == "required" or None,
        )
        assert grammar is not None
        matcher = LLMatcher(made, LLMatcher.grammar_from_lark(grammar), log_level=0)
        ids = tokenizer.encode(text)
        assert matcher.try_consume_tokens(ids) == len(ids) and matcher.is_accepting(), text
    tokenizer.close()
