"""The tokenizer, and text that comes token by token: never half a character, in sum what a full decode gives."""

from __future__ import annotations

from pathlib import Path

import pytest
from hypothesis import assume, example, given, settings
from hypothesis import strategies as st

from nanoflow.config import EngineConfig
from nanoflow.engine.detokenize import make_detokenizer
from nanoflow.engine.tokenizer import (
    REPLACEMENT,
    MissingTokenizerError,
    Tokenizer,
    TokenizerError,
    load_tokenizer,
)
from tests.toy_tokenizers import (
    EOS,
    TEMPLATE,
    byte_fallback_backend,
    byte_level_backend,
    toy_tokenizer,
    write_tokenizer,
)

BYTE_LEVEL = toy_tokenizer()
BYTE_FALLBACK = toy_tokenizer(byte_fallback_backend())
KINDS = {"byte-level": BYTE_LEVEL, "byte-fallback": BYTE_FALLBACK}

FALLBACK_HIGH_BYTES = [1 + byte for byte in range(0x80, 0x100)]
FALLBACK_ASCII = [id_ for id_ in range(257, BYTE_FALLBACK.vocab_size) if BYTE_FALLBACK.token_text(id_).isascii()]


def _tokens_of_bytes() -> dict[int, int]:
    """Token of each byte in the byte-level tokenizer: these name bytes by printable characters."""
    printable = [*range(33, 127), *range(161, 173), *range(174, 256)]
    others = [byte for byte in range(256) if byte not in printable]
    names = {byte: chr(byte) for byte in printable} | {byte: chr(256 + place) for place, byte in enumerate(others)}
    vocab = byte_level_backend().get_vocab()
    return {byte: vocab[name] for byte, name in names.items()}


TOKEN_OF_BYTE = _tokens_of_bytes()

TEXTS = st.text(
    st.one_of(
        st.sampled_from("hello wor,."),
        st.sampled_from("漢字かな👍🏽👩\u200d🎓é\u0301\u0308ßñ\u00a0"),
        # A tokenizer with byte fallback writes spaces as U+2581, and reads that as a space.
        st.characters(exclude_categories=["Cs"], exclude_characters=REPLACEMENT + "\u2581"),
    ),
    max_size=40,
)
PROMPTS = TEXTS.map(lambda text: "hi " + text + "!")


def pieces(tokenizer: Tokenizer, prompt: list[int], completion: list[int], *, skip: bool = True) -> list[str]:
    """What comes for each token, and last what is left."""
    detokenizer = make_detokenizer(tokenizer, prompt, skip)
    return [*(detokenizer.push([token_id]) for token_id in completion), detokenizer.flush()]


@pytest.mark.parametrize("kind", KINDS)
@given(prompt=PROMPTS, text=TEXTS)
@settings(max_examples=150, deadline=None)
def test_pieces_of_valid_text_are_whole_characters_and_add_up(kind: str, prompt: str, text: str) -> None:
    tokenizer = KINDS[kind]
    ids = tokenizer.encode(prompt + text)
    prompt_ids = ids[: len(tokenizer.encode(prompt))]
    assume(not tokenizer.decode(prompt_ids).endswith(REPLACEMENT))
    shown = pieces(tokenizer, prompt_ids, ids[len(prompt_ids) :])
    assert tokenizer.decode(prompt_ids) + "".join(shown) == prompt + text
    assert REPLACEMENT not in "".join(shown)


@given(prompt=PROMPTS, ids=st.lists(st.integers(1, BYTE_LEVEL.vocab_size - 1), max_size=60))
@settings(max_examples=300, deadline=None)
@example(prompt="x", ids=[BYTE_LEVEL.encode("👍")[0]] * 9)
def test_any_byte_level_tokens_add_up_to_the_full_decode(prompt: str, ids: list[int]) -> None:
    prompt_ids = BYTE_LEVEL.encode(prompt)
    assert prompt + "".join(pieces(BYTE_LEVEL, prompt_ids, ids)) == BYTE_LEVEL.decode(prompt_ids + ids)


@given(data=st.binary(max_size=40))
@settings(max_examples=300, deadline=None)
def test_any_bytes_add_up_to_the_full_decode(data: bytes) -> None:
    ids = [TOKEN_OF_BYTE[byte] for byte in data]
    shown = pieces(BYTE_LEVEL, BYTE_LEVEL.encode("x"), ids)
    assert "".join(shown) == data.decode("utf-8", "replace")


@given(ids=st.lists(st.sampled_from(FALLBACK_ASCII + FALLBACK_HIGH_BYTES), max_size=60))
@settings(max_examples=300, deadline=None)
def test_wrong_byte_tokens_spoil_no_other_token(ids: list[int]) -> None:
    shown = "".join(pieces(BYTE_FALLBACK, BYTE_FALLBACK.encode("hello"), ids))
    expected = "".join(BYTE_FALLBACK.token_text(token_id) for token_id in ids if token_id in FALLBACK_ASCII)
    assert "".join(char for char in shown if char.isascii()) == expected


def test_a_prompt_that_ends_inside_a_character_is_completed() -> None:
    ids = BYTE_LEVEL.encode("x🎓")
    assert "".join(pieces(BYTE_LEVEL, ids[:-1], ids[-1:])) == "🎓"


def test_garbage_is_shown_while_it_comes() -> None:
    half = BYTE_LEVEL.encode("🎓")[0]
    shown = pieces(BYTE_LEVEL, BYTE_LEVEL.encode("x"), [half] * 50)
    assert all(len(piece) <= 1 for piece in shown[:-1])
    assert "".join(shown) == REPLACEMENT * 50


@pytest.mark.parametrize("kind", KINDS)
def test_words_keep_their_leading_space_also_at_the_start(kind: str) -> None:
    tokenizer = KINDS[kind]
    prompt, both = tokenizer.encode("hello"), tokenizer.encode("hello world")
    assert "".join(pieces(tokenizer, prompt, both[len(prompt) :])) == " world"


def test_special_tokens_show_only_if_wanted() -> None:
    ids = [*BYTE_LEVEL.encode("hello"), 0, 0]
    assert "".join(pieces(BYTE_LEVEL, ids[:1], ids[1:])) == "hello"[len(BYTE_LEVEL.decode(ids[:1])) :]
    assert "".join(pieces(BYTE_LEVEL, ids[:1], ids[1:], skip=False)).endswith(EOS + EOS)


def test_ids_beyond_the_tokenizer_give_no_text() -> None:
    assert pieces(BYTE_LEVEL, [5], [99_999, 99_999]) == ["", "", ""]
    assert BYTE_LEVEL.decode([99_999]) == ""


@pytest.mark.parametrize("kind", KINDS)
def test_token_text_keeps_the_space_of_a_word(kind: str) -> None:
    tokenizer = KINDS[kind]
    space_h = tokenizer.encode("a h")[-1] if kind == "byte-fallback" else tokenizer.encode(" world")[0]
    assert tokenizer.token_text(space_h).startswith(" ")
    assert tokenizer.token_text(0) == EOS


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
