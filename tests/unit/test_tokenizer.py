"""The tokenizer: texts of single tokens, chat templates, and what it says when files are missing or broken."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st
from tokenizers import Tokenizer as Backend
from tokenizers import decoders, models, processors

from nanoflow.config import EngineConfig
from nanoflow.engine.tokenizer import (
    MissingTokenizerError,
    Tokenizer,
    TokenizerError,
    load_tokenizer,
)
from tests.error_chain import is_shown_alone
from tests.toy_tokenizers import (
    EOS,
    TEMPLATE,
    byte_fallback_backend,
    byte_level_backend,
    metaspace_backend,
    panicking_backend,
    toy_tokenizer,
    wordpiece_backend,
    write_tokenizer,
)

BYTE_LEVEL = toy_tokenizer()
BYTE_FALLBACK = toy_tokenizer(byte_fallback_backend())
KINDS = {"byte-level": BYTE_LEVEL, "byte-fallback": BYTE_FALLBACK}


@pytest.mark.parametrize("kind", KINDS)
def test_token_text_keeps_the_space_of_a_word(kind: str) -> None:
    tokenizer = KINDS[kind]
    space_h = tokenizer.encode("a h")[-1] if kind == "byte-fallback" else tokenizer.encode(" world")[0]
    assert tokenizer.token_text(space_h).startswith(" ")
    assert tokenizer.token_text(0) == EOS


def test_ids_beyond_the_tokenizer_give_no_text() -> None:
    assert BYTE_LEVEL.decode([99_999]) == ""


def test_lone_surrogates_are_refused() -> None:
    with pytest.raises(ValueError, match="surrogate"):
        BYTE_LEVEL.encode("\ud800")


def test_chat_template_opens_or_continues_a_turn() -> None:
    tokenizer = toy_tokenizer(chat_template=TEMPLATE)
    messages = [{"role": "user", "content": "hello"}]
    assert tokenizer.decode(tokenizer.apply_chat_template(messages)) == "[user]hello[assistant]"
    open_ids = tokenizer.apply_chat_template(messages, add_generation_prompt=False, continue_final_message=True)
    assert tokenizer.decode(open_ids) == "[user]hello"


def test_chat_errors_are_one_line() -> None:
    with pytest.raises(ValueError, match="no chat template"):
        BYTE_LEVEL.apply_chat_template([{"role": "user", "content": "x"}])
    refusing = toy_tokenizer(chat_template="{{ raise_exception('roles must alternate') }}")
    with pytest.raises(ValueError, match="roles must alternate"):
        refusing.apply_chat_template([{"role": "user", "content": "x"}])


def test_load_reads_a_folder_and_a_template_file(tmp_path: Path) -> None:
    write_tokenizer(tmp_path)
    (tmp_path / "config.json").write_text("{}")
    (tmp_path / "chat.jinja2").write_text(TEMPLATE)
    tokenizer = Tokenizer.load(EngineConfig(model=str(tmp_path), chat_template=str(tmp_path / "chat.jinja2")))
    assert tokenizer.decode(tokenizer.encode("hello 漢字")) == "hello 漢字"
    assert tokenizer.eos_token_ids == (0,)
    assert tokenizer.has_chat_template


def test_a_folder_without_tokenizer_is_one_clear_line(tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text("{}")
    with pytest.raises(MissingTokenizerError, match=r"has no tokenizer \(tokenizer.json\)"):
        Tokenizer.load(EngineConfig(model=str(tmp_path)))
    assert load_tokenizer(EngineConfig(model=str(tmp_path), load_format="random")) is None


# Tokens are those of tokenizer.json

BACKENDS: dict[str, Callable[[], Backend]] = {
    "byte-level": byte_level_backend,
    "byte-fallback": byte_fallback_backend,
    "metaspace": metaspace_backend,
    "wordpiece": wordpiece_backend,
}
# All classes, on several versions of transformers: `python -m tools.tokenizer_classes`.
CLASSES = [
    "LlamaTokenizerFast",
    "GPT2TokenizerFast",
    "Qwen2Tokenizer",
    "GemmaTokenizer",
    "T5Tokenizer",
    "BertTokenizer",
]
TEXTS = ["hello world", "  two  spaces ", "a\tb\n", "grüße 漢字 👍🏽", f"x{EOS}y", "\ufffd", ""]


def load_folder(folder: Path, backend: Backend, **options: Any) -> Tokenizer:
    write_tokenizer(folder, backend, **options)
    (folder / "config.json").write_text("{}")
    return Tokenizer.load(EngineConfig(model=str(folder)))


def check_tokens(tokenizer: Tokenizer, file: Backend) -> None:
    for text in TEXTS:
        for adds in (True, False):
            assert tokenizer.encode(text, add_special_tokens=adds) == file.encode(text, add_special_tokens=adds).ids
        for skips in (True, False):
            ids = file.encode(text).ids
            assert tokenizer.decode(ids, skips) == file.decode(ids, skip_special_tokens=skips)


@pytest.mark.parametrize("kind", BACKENDS)
@pytest.mark.parametrize("name", [*CLASSES, "NoSuchTokenizer"])
def test_tokens_are_those_of_the_file_whatever_the_class(kind: str, name: str, tmp_path: Path) -> None:
    tokenizer = load_folder(tmp_path, BACKENDS[kind](), tokenizer_class=name)
    check_tokens(tokenizer, Backend.from_file(str(tmp_path / "tokenizer.json")))
    assert tokenizer.eos_token_ids == (0,)


@pytest.mark.parametrize(
    "options",
    [
        {"add_bos_token": True, "add_eos_token": True, "bos_token": EOS},
        {"add_prefix_space": True, "legacy": False},
        {"added_tokens_decoder": {"900": {"content": "<new>", "special": True}}},
        {"auto_map": {"AutoTokenizer": ["code.Tokenizer", None]}, "tokenizer_class": "OwnTokenizer"},
    ],
)
@pytest.mark.parametrize("name", CLASSES[:2])
def test_what_the_config_says_of_tokens_changes_nothing(name: str, options: dict[str, Any], tmp_path: Path) -> None:
    backend = byte_level_backend()
    backend.post_processor = processors.TemplateProcessing(single=f"{EOS} $A", special_tokens=[(EOS, 0)])
    tokenizer = load_folder(tmp_path, backend, **{"tokenizer_class": name, **options})
    check_tokens(tokenizer, backend)
    assert tokenizer.encode("<new>")[0] == 0 and 900 not in tokenizer.encode("<new>")


def test_tokens_that_only_the_config_names_are_told(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    known = {"0": {"content": EOS, "special": True}}
    load_folder(tmp_path, byte_level_backend(), added_tokens_decoder=known)
    assert not caplog.records
    load_folder(tmp_path, byte_level_backend(), added_tokens_decoder={**known, "900": {"content": "<new>"}})
    assert [record.message.partition(" (")[0] for record in caplog.records if record.name.startswith("nanoflow")] == [
        "tokenizer_config.json names tokens that tokenizer.json lacks, which are not used: <new>"
    ]


def test_padding_and_truncation_of_the_file_are_off(tmp_path: Path) -> None:
    backend = byte_level_backend()
    backend.enable_truncation(2)
    backend.enable_padding(length=9)
    assert load_folder(tmp_path, backend).encode("hello world") == BYTE_LEVEL.encode("hello world")


def test_an_end_of_sequence_that_is_no_token_is_none(tmp_path: Path) -> None:
    assert load_folder(tmp_path, byte_level_backend(), eos_token="<nowhere>").eos_token_ids == ()


def test_a_folder_of_older_files_is_converted_or_says_what_to_do(tmp_path: Path) -> None:
    vocab = {"h": 0, "i": 1, "hi": 2, "<|endoftext|>": 3}
    (tmp_path / "config.json").write_text('{"model_type": "gpt2"}')
    (tmp_path / "vocab.json").write_text(json.dumps(vocab))
    (tmp_path / "merges.txt").write_text("#version: 0.2\nh i\n")
    assert Tokenizer.load(EngineConfig(model=str(tmp_path))).encode("hi") == [2]
    broken = tmp_path / "broken"
    broken.mkdir()
    (broken / "config.json").write_text('{"model_type": "llama"}')
    (broken / "tokenizer.model").write_bytes(b"\x00no model")
    with pytest.raises(TokenizerError, match=r"no tokenizer.json, .+AutoTokenizer.+save_pretrained") as problem:
        Tokenizer.load(EngineConfig(model=str(broken)))
    assert "\n" not in str(problem.value) and is_shown_alone(problem.value)


# A token's text, bytes and places


@given(ids=st.lists(st.integers(0, 330), max_size=20))
@settings(max_examples=200, deadline=None)
def test_bytes_of_tokens_add_up_to_the_text(ids: list[int]) -> None:
    whole = BYTE_LEVEL.decode(ids, skip_special_tokens=False)
    assert b"".join(map(BYTE_LEVEL.bytes_of, ids)).decode("utf-8", "replace") == whole


def test_bytes_of_tokens_that_are_no_byte_tokens_are_their_text() -> None:
    metaspace, wordpiece = toy_tokenizer(metaspace_backend()), toy_tokenizer(wordpiece_backend())
    assert (metaspace.bytes_of(3), metaspace.bytes_of(0), metaspace.bytes_of(16)) == (
        b" hello",
        EOS.encode(),
        b"\xef\xbf\xbd",
    )
    assert (wordpiece.bytes_of(2), wordpiece.bytes_of(4)) == (b" hello", b"ld")
    assert (BYTE_FALLBACK.bytes_of(1 + 0x0A), BYTE_FALLBACK.bytes_of(1 + 0xE2)) == (b"\n", b"\xe2")


def test_bytes_of_parts_of_characters_by_a_decoder_that_does_more() -> None:
    backend = byte_fallback_backend()
    backend.decoder = decoders.Sequence([decoders.ByteFallback(), decoders.Metaspace(prepend_scheme="never")])
    tokenizer = toy_tokenizer(backend)
    assert tokenizer.byte_rule is None
    assert [tokenizer.bytes_of(1 + byte) for byte in "✓".encode()] == [b"\xe2", b"\x9c", b"\x93"]
    assert tokenizer.bytes_of(tokenizer.encode("a h")[-1]) == b" h" and tokenizer.bytes_of(0) == EOS.encode()


def _trimming() -> Tokenizer:
    """Its offsets leave out the spaces around a token, as those of RoBERTa do."""
    backend = byte_level_backend()
    backend.post_processor = processors.ByteLevel(trim_offsets=True)
    return toy_tokenizer(backend)


@pytest.mark.parametrize("tokenizer", [BYTE_LEVEL, _trimming()], ids=["plain", "trimming"])
@given(text=st.text("hello  wor\n漢é🎓\ufffd", max_size=20))
@example(text="hello world")
def test_offsets_of_a_text_are_where_its_tokens_begin(tokenizer: Tokenizer, text: str) -> None:
    offsets = tokenizer.text_offsets(text)
    for offset, token_id in zip(offsets, tokenizer.encode(text), strict=True):
        data = tokenizer.bytes_of(token_id)
        own = data.decode("utf-8", "ignore")
        assert text[offset:].startswith(own) or own.encode() != data
    assert offsets == sorted(offsets)


# What a tokenizer fails at


def test_a_panic_is_an_error_of_what_was_asked() -> None:
    tokenizer = toy_tokenizer(panicking_backend())
    with pytest.raises(ValueError, match=r"cannot encode this text: .+") as problem:
        tokenizer.encode("a" * 60 + "b")
    assert "\n" not in str(problem.value)
    with pytest.raises(ValueError, match=r"cannot decode these tokens: .+"):
        tokenizer.decode([2, 1])
    assert tokenizer.encode("a") == [2] and tokenizer.token_text(1) == " "


def test_what_the_library_refuses_is_one_too() -> None:
    backend = Backend(models.WordLevel({EOS: 0}, unk_token="<nowhere>"))
    with pytest.raises(ValueError, match="cannot encode this text"):
        toy_tokenizer(backend).encode("a")
    for token_id in (-1, 2**40):
        with pytest.raises(ValueError, match="cannot decode these tokens"):
            BYTE_LEVEL.decode([token_id])


def test_ctrl_c_in_a_tokenizer_stays_what_it_is(monkeypatch: pytest.MonkeyPatch) -> None:
    class Interrupted:
        def encode_batch_fast(self, *_: object, **__: object) -> None:
            raise KeyboardInterrupt

    tokenizer = toy_tokenizer()
    monkeypatch.setattr(tokenizer, "_backend", Interrupted())
    with pytest.raises(KeyboardInterrupt):
        tokenizer.encode("a")


def test_a_file_that_panics_cannot_be_loaded(tmp_path: Path) -> None:
    write_tokenizer(tmp_path)
    content = json.loads((tmp_path / "tokenizer.json").read_text())
    content["model"]["continuing_subword_prefix"] = "####"
    (tmp_path / "tokenizer.json").write_text(json.dumps(content))
    (tmp_path / "config.json").write_text("{}")
    with pytest.raises(TokenizerError, match="cannot be loaded"):
        Tokenizer.load(EngineConfig(model=str(tmp_path)))


def test_broken_files_are_one_clear_line(tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text("{}")
    (tmp_path / "tokenizer.json").write_text("{")
    with pytest.raises(TokenizerError, match=r"cannot be loaded: .+") as problem:
        Tokenizer.load(EngineConfig(model=str(tmp_path)))
    assert "\n" not in str(problem.value) and is_shown_alone(problem.value)
    write_tokenizer(tmp_path)
    with pytest.raises(TokenizerError, match=r"chat template .*nowhere.* cannot be read") as problem:
        Tokenizer.load(EngineConfig(model=str(tmp_path), chat_template=str(tmp_path / "nowhere")))
    assert is_shown_alone(problem.value)


# Which template


CONVERSATION = [{"role": "user", "content": "hello"}]


def with_templates(folder: Path, **options: Any) -> Path:
    """A model folder whose tokenizer_config.json has these options."""
    write_tokenizer(folder, **options)
    (folder / "config.json").write_text("{}")
    return folder


def template_of(folder: Path, chat_template: str | None = None, *, asked: str | None = None) -> str:
    """The template that the folder, the option and a request choose, without the part that all have in common."""
    tokenizer = Tokenizer.load(EngineConfig(model=str(folder), chat_template=chat_template))
    return tokenizer.chat_templates.get(asked).text.removesuffix(TEMPLATE)


def test_the_default_of_a_list_of_templates_is_used(tmp_path: Path) -> None:
    named = [{"name": name, "template": name + TEMPLATE} for name in ("tool_use", "default")]
    with_templates(tmp_path, chat_template=named)
    assert template_of(tmp_path) == "default"
    assert template_of(tmp_path, "tool_use") == "tool_use"
    assert template_of(tmp_path, asked="tool_use") == "tool_use"
    assert template_of(tmp_path, asked="own" + TEMPLATE) == "own"


def test_with_tools_the_template_for_them_is_used(tmp_path: Path) -> None:
    named = [{"name": name, "template": name + TEMPLATE} for name in ("tool_use", "default")]
    with_templates(tmp_path, chat_template=named)
    for asked, expected in ((None, "tool_use"), ("default", "default")):
        templates = Tokenizer.load(EngineConfig(model=str(tmp_path), chat_template=asked)).chat_templates
        assert templates.get(has_tools=True).text == expected + TEMPLATE
        assert templates.get().text == templates.get("default", has_tools=True).text == "default" + TEMPLATE


def test_templates_of_a_folder_are_named_by_their_files(tmp_path: Path) -> None:
    with_templates(tmp_path)
    (tmp_path / "chat_template.jinja").write_text("first" + TEMPLATE)
    assert template_of(tmp_path) == "first"
    (tmp_path / "additional_chat_templates").mkdir()
    (tmp_path / "additional_chat_templates" / "rag.jinja").write_text("rag" + TEMPLATE)
    assert template_of(tmp_path) == "first"
    assert template_of(tmp_path, "rag") == "rag"


def test_a_processors_template_is_used_if_there_is_no_other(tmp_path: Path) -> None:
    with_templates(tmp_path)
    (tmp_path / "chat_template.json").write_text(json.dumps({"chat_template": "json" + TEMPLATE}))
    assert template_of(tmp_path) == "json"
    several = [{"name": "a", "template": "x"}, {"name": "default", "template": "named" + TEMPLATE}]
    (tmp_path / "chat_template.json").write_text(json.dumps({"chat_template": several}))
    assert template_of(tmp_path) == "named"
    (tmp_path / "chat_template.json").write_text("[]")
    with pytest.raises(TokenizerError, match=r"chat_template.json cannot be read") as problem:
        Tokenizer.load(EngineConfig(model=str(tmp_path)))
    assert is_shown_alone(problem.value)


def test_templates_without_a_default_are_named_when_one_is_needed(tmp_path: Path) -> None:
    with_templates(tmp_path, chat_template=[{"name": "tool_use", "template": TEMPLATE}])
    with pytest.raises(ValueError, match="no chat template named 'default', but 'tool_use'; give one"):
        template_of(tmp_path)


def test_a_template_may_be_given_as_text_or_as_a_file(tmp_path: Path) -> None:
    with_templates(tmp_path)
    (tmp_path / "mine").write_text("file" + TEMPLATE)
    assert template_of(tmp_path, str(tmp_path / "mine")) == "file"
    assert template_of(tmp_path, "text" + TEMPLATE) == "text"


def test_limits_of_templates_are_options(tmp_path: Path) -> None:
    with_templates(
        tmp_path, chat_template="{% for i in range(99999) %}{% for j in range(9999) %}{% endfor %}{% endfor %}"
    )
    config = EngineConfig(model=str(tmp_path), chat_template_timeout_s=1.5, chat_template_max_chars=10)
    tokenizer = Tokenizer.load(config)
    with pytest.raises(ValueError, match=r"the chat template was stopped: it takes longer than 1\.5 s"):
        tokenizer.apply_chat_template(CONVERSATION)
    with pytest.raises(ValueError, match="it writes 11 characters, and 10 are the most"):
        tokenizer.apply_chat_template(CONVERSATION, chat_template="{{ messages[0].content }}" + "x" * 6)
    tokenizer.close()


def test_special_tokens_are_added_to_a_conversation_if_asked_for() -> None:
    from tokenizers.processors import TemplateProcessing

    tokenizer = toy_tokenizer(chat_template=TEMPLATE)
    tokenizer._backend.post_processor = TemplateProcessing(single=f"{EOS} $A", special_tokens=[(EOS, 0)])
    bare = tokenizer.apply_chat_template(CONVERSATION)
    assert tokenizer.apply_chat_template(CONVERSATION, add_special_tokens=True) == [0, *bare]


# Failures of the tokenizer itself


class PanicException(BaseException):
    """As PyO3 makes of a panic in Rust: no `Exception`."""


def test_a_panic_is_an_error_of_the_text() -> None:
    def panic(*_: object, **__: object) -> None:
        raise PanicException("index out of bounds\nnote: run with RUST_BACKTRACE=1")

    tokenizer = toy_tokenizer(chat_template=TEMPLATE)
    tokenizer._backend = SimpleNamespace(encode_batch_fast=panic, encode_batch=panic, decode_batch=panic)
    for call in (
        lambda: tokenizer.encode("a"),
        lambda: tokenizer.decode([1]),
        lambda: tokenizer.apply_chat_template(CONVERSATION),
    ):
        with pytest.raises(ValueError, match=r"the tokenizer cannot .*: index out of bounds$"):
            call()


def test_what_ends_a_program_goes_through() -> None:
    def interrupt(*_: object, **__: object) -> None:
        raise KeyboardInterrupt

    tokenizer = toy_tokenizer()
    tokenizer._backend = SimpleNamespace(encode_batch_fast=interrupt)
    with pytest.raises(KeyboardInterrupt):
        tokenizer.encode("a")


def test_a_description_is_plain_json(tmp_path: Path) -> None:
    with_templates(tmp_path, chat_template=TEMPLATE, model_max_length=1e30, odd=[1, None, 2.5])
    tokenizer = Tokenizer.load(EngineConfig(model=str(tmp_path)))
    description = tokenizer.description()
    assert json.loads(json.dumps(description, allow_nan=False)) == description
    assert (description["chat_template"], description["eos_token"], description["odd"]) == (
        TEMPLATE,
        EOS,
        [1, None, 2.5],
    )
    assert description["tokenizer_class"] and not any(name.endswith("_file") for name in description)
    assert tokenizer.token_names([0, *tokenizer.encode(" 1"), 99_999]) == [EOS, "Ġ", "1", ""]
