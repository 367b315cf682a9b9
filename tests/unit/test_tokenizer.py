"""The tokenizer: texts of single tokens, chat templates, and what it says when files are missing or broken."""

from __future__ import annotations

import json
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from nanoflow.config import EngineConfig
from nanoflow.engine.tokenizer import (
    MissingTokenizerError,
    Tokenizer,
    TokenizerError,
    load_tokenizer,
)
from tests.toy_tokenizers import (
    EOS,
    TEMPLATE,
    byte_fallback_backend,
    toy_tokenizer,
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


def test_broken_files_are_one_clear_line(tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text("{}")
    (tmp_path / "tokenizer.json").write_text("{")
    with pytest.raises(TokenizerError, match=r"cannot be loaded: .+") as problem:
        Tokenizer.load(EngineConfig(model=str(tmp_path)))
    assert "\n" not in str(problem.value)
    write_tokenizer(tmp_path)
    with pytest.raises(TokenizerError, match=r"chat template .*nowhere.* cannot be read"):
        Tokenizer.load(EngineConfig(model=str(tmp_path), chat_template=str(tmp_path / "nowhere")))


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
    with pytest.raises(TokenizerError, match=r"chat_template.json cannot be read"):
        Tokenizer.load(EngineConfig(model=str(tmp_path)))


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
    tokenizer._backend = SimpleNamespace(encode=panic, decode=panic)
    for call in (
        lambda: tokenizer.encode("a"),
        lambda: tokenizer.decode([1]),
        lambda: tokenizer.apply_chat_template(CONVERSATION),
    ):
        with pytest.raises(ValueError, match=r"the tokenizer failed: index out of bounds$"):
            call()


def test_what_ends_a_program_goes_through() -> None:
    def interrupt(*_: object, **__: object) -> None:
        raise KeyboardInterrupt

    tokenizer = toy_tokenizer()
    tokenizer._backend = SimpleNamespace(encode=interrupt)
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
