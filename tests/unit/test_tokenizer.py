"""The tokenizer: texts of single tokens, chat templates, and what it says when files are missing or broken."""

from __future__ import annotations

from pathlib import Path

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
