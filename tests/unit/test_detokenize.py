"""Text that comes in groups of tokens: never half a character, in sum what a full decode gives, however it is cut."""

from __future__ import annotations

import itertools
from collections.abc import Callable, Iterator, Sequence

import pytest
from hypothesis import assume, example, given, settings
from hypothesis import strategies as st
from tokenizers import AddedToken, decoders, models
from tokenizers import Tokenizer as Backend

from nanoflow.engine.detokenize import ByteDetokenizer, Detokenizer, WindowDetokenizer, make_detokenizer
from nanoflow.engine.tokenizer import REPLACEMENT, Tokenizer
from tests.all_cases import num_examples
from tests.toy_tokenizers import EOS, byte_fallback_backend, byte_level_backend, toy_tokenizer

SPACE = "\N{LOWER ONE EIGHTH BLOCK}"


def _with_added_tokens(backend: Backend) -> Tokenizer:
    """Tokens added as text: one that looks like bytes, one that does not, a special one, one made of spaces."""
    plain = ["<é>", "<漢>", "    "]
    backend.add_tokens([AddedToken(text, normalized=False) for text in plain])
    backend.add_special_tokens(["<|ß|>"])
    return toy_tokenizer(backend)


def _without_strip() -> Tokenizer:
    """As of Gemma: a text may begin with a space."""
    backend = byte_fallback_backend()
    backend.decoder = decoders.Sequence([decoders.Replace(SPACE, " "), decoders.ByteFallback(), decoders.Fuse()])
    return toy_tokenizer(backend)


def _with_decoder(backend: Backend, decoder: decoders.Decoder) -> Tokenizer:
    backend.decoder = decoder
    return toy_tokenizer(backend)


def _metaspace() -> Tokenizer:
    """As of T5: the decoder drops the first space."""
    words = [EOS, f"{SPACE}hello", f"{SPACE}", "wor", "ld", "漢", "🎓", "é", f"{SPACE}{SPACE}", ".", REPLACEMENT]
    backend = Backend(models.WordLevel({word: i for i, word in enumerate(words)}, unk_token="."))
    backend.decoder = decoders.Metaspace(replacement=SPACE, prepend_scheme="always")
    backend.add_special_tokens([EOS])
    return toy_tokenizer(backend)


BYTE_LEVEL = toy_tokenizer()
BYTE_FALLBACK = toy_tokenizer(byte_fallback_backend())
BYTE_LEVEL_ADDED = _with_added_tokens(byte_level_backend())
BYTE_FALLBACK_ADDED = _with_added_tokens(byte_fallback_backend())
WITHOUT_STRIP = _without_strip()
METASPACE = _metaspace()
# Decoders that make characters of bytes and do more, so that they are not decoded by bytes.
LEVEL_AND_MORE = _with_decoder(
    byte_level_backend(), decoders.Sequence([decoders.ByteLevel(), decoders.Replace("~~", "~")])
)
FALLBACK_AND_MORE = _with_decoder(
    byte_fallback_backend(), decoders.Sequence([decoders.ByteFallback(), decoders.Metaspace(prepend_scheme="never")])
)

TEXT_KINDS = {"byte-level": BYTE_LEVEL, "byte-fallback": BYTE_FALLBACK}
LEVEL_KINDS = {"byte-level": BYTE_LEVEL, "byte-level, added tokens": BYTE_LEVEL_ADDED}
FALLBACK_KINDS = {
    "byte-fallback": BYTE_FALLBACK,
    "byte-fallback, added tokens": BYTE_FALLBACK_ADDED,
    "without strip": WITHOUT_STRIP,
}
OTHER_KINDS = {
    "metaspace": METASPACE,
    "byte-level and more": LEVEL_AND_MORE,
    "byte-fallback and more": FALLBACK_AND_MORE,
}
KINDS = {**LEVEL_KINDS, **FALLBACK_KINDS, **OTHER_KINDS}

Make = Callable[[Tokenizer, Sequence[int], bool], Detokenizer]
WAYS: dict[str, Make] = {"bytes": ByteDetokenizer, "window": WindowDetokenizer}

FALLBACK_HIGH_BYTES = [1 + byte for byte in range(0x80, 0x100)]
FALLBACK_CONTINUATIONS = FALLBACK_HIGH_BYTES[:0x40]
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
        st.characters(exclude_categories=["Cs"], exclude_characters=REPLACEMENT + SPACE),
    ),
    max_size=40,
)
PROMPTS = TEXTS.map(lambda text: "hi " + text + "!")
CUTS = st.lists(st.integers(0, 60))


def pieces(
    tokenizer: Tokenizer, prompt: list[int], completion: list[int], *, skip: bool = True, make: Make = make_detokenizer
) -> list[str]:
    """What comes for each token, and last what is left."""
    detokenizer = make(tokenizer, prompt, skip)
    return [*(detokenizer.push([token_id]) for token_id in completion), detokenizer.flush()]


def grouped(
    tokenizer: Tokenizer,
    prompt: list[int],
    completion: list[int],
    cuts: list[int],
    *,
    skip: bool = True,
    make: Make = make_detokenizer,
) -> str:
    """The text where tokens come in groups that end at the cuts; some groups are empty."""
    detokenizer = make(tokenizer, prompt, skip)
    return "".join(detokenizer.push(group) for group in _groups(completion, cuts)) + detokenizer.flush()


def _groups(token_ids: list[int], cuts: list[int]) -> Iterator[list[int]]:
    borders = [0, *sorted(min(cut, len(token_ids)) for cut in cuts), len(token_ids)]
    return (token_ids[start:end] for start, end in itertools.pairwise(borders))


def _any_ids(tokenizer: Tokenizer) -> st.SearchStrategy[list[int]]:
    """Tokens of all sorts, special ones and ids that do not exist among them."""
    return st.lists(st.integers(0, tokenizer.vocab_size + 1), max_size=60)


def _whole_ids(tokenizer: Tokenizer) -> st.SearchStrategy[list[int]]:
    """Tokens that each are whole characters, with encoded texts among them.

    Bytes at random are rarely valid UTF-8: a test that needs valid text would throw most of them away.
    """
    whole = [id_ for id_ in range(tokenizer.vocab_size + 2) if REPLACEMENT not in tokenizer.decode([id_], False)]
    few = st.lists(st.sampled_from(whole), max_size=10)
    return st.lists(st.one_of(few, TEXTS.map(tokenizer.encode)), max_size=6).map(
        lambda groups: [*itertools.chain.from_iterable(groups)]
    )


def full_text(tokenizer: Tokenizer, prompt: list[int], completion: list[int], *, skip: bool = True) -> str:
    """What decoding everything shows after the prompt, which ends with a whole character."""
    text = tokenizer.decode(prompt + completion, skip)
    shown = tokenizer.decode(prompt, skip)
    assert text.startswith(shown)
    return text[len(shown) :]


def test_known_decoders_are_decoded_by_bytes() -> None:
    by_bytes = {
        kind: isinstance(make_detokenizer(tokenizer, [1]), ByteDetokenizer) for kind, tokenizer in KINDS.items()
    }
    assert by_bytes == {kind: kind not in OTHER_KINDS for kind in KINDS}


@pytest.mark.parametrize("way", WAYS)
@pytest.mark.parametrize("kind", TEXT_KINDS)
@given(prompt=PROMPTS, text=TEXTS, cuts=CUTS)
@settings(max_examples=num_examples(150), deadline=None)
def test_pieces_of_valid_text_are_whole_characters_and_add_up(
    kind: str, way: str, prompt: str, text: str, cuts: list[int]
) -> None:
    tokenizer = TEXT_KINDS[kind]
    ids = tokenizer.encode(prompt + text)
    prompt_ids = ids[: len(tokenizer.encode(prompt))]
    assume(not tokenizer.decode(prompt_ids).endswith(REPLACEMENT))
    shown = pieces(tokenizer, prompt_ids, ids[len(prompt_ids) :], make=WAYS[way])
    assert tokenizer.decode(prompt_ids) + "".join(shown) == prompt + text
    assert REPLACEMENT not in "".join(shown)
    assert grouped(tokenizer, prompt_ids, ids[len(prompt_ids) :], cuts, make=WAYS[way]) == "".join(shown)


@pytest.mark.parametrize("way", WAYS)
@pytest.mark.parametrize("kind", LEVEL_KINDS)
@given(data=st.data(), prompt=PROMPTS, cuts=CUTS, skip=st.booleans())
@settings(max_examples=num_examples(200), deadline=None)
def test_any_byte_level_tokens_add_up_to_the_full_decode(
    kind: str, way: str, data: st.DataObject, prompt: str, cuts: list[int], skip: bool
) -> None:
    tokenizer = LEVEL_KINDS[kind]
    ids, prompt_ids = data.draw(_any_ids(tokenizer)), tokenizer.encode(prompt)
    expected = full_text(tokenizer, prompt_ids, ids, skip=skip)
    assert "".join(pieces(tokenizer, prompt_ids, ids, skip=skip, make=WAYS[way])) == expected
    assert grouped(tokenizer, prompt_ids, ids, cuts, skip=skip, make=WAYS[way]) == expected


@pytest.mark.parametrize("way", WAYS)
@given(data=st.binary(max_size=40), cuts=CUTS)
@settings(max_examples=num_examples(300), deadline=None)
@example(data="👍".encode()[:1] * 9, cuts=[3, 5])
def test_any_bytes_add_up_to_the_full_decode(way: str, data: bytes, cuts: list[int]) -> None:
    ids = [TOKEN_OF_BYTE[byte] for byte in data]
    shown = pieces(BYTE_LEVEL, BYTE_LEVEL.encode("x"), ids, make=WAYS[way])
    assert "".join(shown) == data.decode("utf-8", "replace")
    assert grouped(BYTE_LEVEL, BYTE_LEVEL.encode("x"), ids, cuts, make=WAYS[way]) == "".join(shown)


@pytest.mark.parametrize("kind", KINDS)
@given(data=st.data(), cuts=CUTS, skip=st.booleans())
@settings(max_examples=num_examples(200), deadline=None)
def test_how_tokens_are_grouped_makes_no_difference(
    kind: str, data: st.DataObject, cuts: list[int], skip: bool
) -> None:
    tokenizer = KINDS[kind]
    ids, prompt = data.draw(_any_ids(tokenizer)), data.draw(_any_ids(tokenizer))
    one_by_one = "".join(pieces(tokenizer, prompt, ids, skip=skip))
    assert grouped(tokenizer, prompt, ids, cuts, skip=skip) == one_by_one


@pytest.mark.parametrize("kind", ["without strip", "byte-fallback, added tokens", "metaspace"])
@given(data=st.data(), skip=st.booleans())
@settings(max_examples=num_examples(200), deadline=None)
def test_first_spaces_and_added_tokens_are_those_of_the_full_decode(kind: str, data: st.DataObject, skip: bool) -> None:
    tokenizer = KINDS[kind]
    ids, prompt = data.draw(_whole_ids(tokenizer)), data.draw(_whole_ids(tokenizer))[:3]
    text = tokenizer.decode(prompt + ids, skip)
    assume(REPLACEMENT not in text and REPLACEMENT not in tokenizer.decode(prompt, skip))
    assert "".join(pieces(tokenizer, prompt, ids, skip=skip)) == full_text(tokenizer, prompt, ids, skip=skip)


@pytest.mark.parametrize("kind", FALLBACK_KINDS)
def test_a_text_that_begins_with_the_completion_drops_its_first_space(kind: str) -> None:
    tokenizer = KINDS[kind]
    ids = tokenizer.encode("hello world")
    for prompt in ([], [0], [0, 0]):
        assert "".join(pieces(tokenizer, prompt, ids)) == tokenizer.decode(ids)


@given(ids=st.lists(st.sampled_from(FALLBACK_ASCII + FALLBACK_HIGH_BYTES), max_size=60))
@settings(max_examples=num_examples(300), deadline=None)
def test_wrong_byte_tokens_spoil_no_other_token(ids: list[int]) -> None:
    shown = "".join(pieces(BYTE_FALLBACK, BYTE_FALLBACK.encode("hello"), ids))
    expected = "".join(BYTE_FALLBACK.token_text(token_id) for token_id in ids if token_id in FALLBACK_ASCII)
    assert "".join(char for char in shown if char.isascii()) == expected


@given(ids=st.lists(st.sampled_from(FALLBACK_ASCII + FALLBACK_CONTINUATIONS), max_size=60))
@settings(max_examples=num_examples(300), deadline=None)
def test_wrong_byte_tokens_give_a_replacement_each(ids: list[int]) -> None:
    prompt = BYTE_FALLBACK.encode("hello")
    assert "".join(pieces(BYTE_FALLBACK, prompt, ids)) == full_text(BYTE_FALLBACK, prompt, ids)


@pytest.mark.parametrize("way", WAYS)
@pytest.mark.parametrize("num_shown", [1, 2, 3])
def test_a_prompt_that_ends_inside_a_character_is_completed(way: str, num_shown: int) -> None:
    for tokenizer, ids in (
        (BYTE_LEVEL, [TOKEN_OF_BYTE[byte] for byte in "x🎓".encode()]),
        (BYTE_FALLBACK, [*BYTE_FALLBACK.encode("h"), *(1 + byte for byte in "🎓".encode())]),
    ):
        split = len(ids) - 4 + num_shown
        assert "".join(pieces(tokenizer, ids[:split], ids[split:], make=WAYS[way])) == "🎓"


@pytest.mark.parametrize("way", WAYS)
def test_garbage_is_shown_while_it_comes(way: str) -> None:
    half = TOKEN_OF_BYTE["🎓".encode()[0]]
    shown = pieces(BYTE_LEVEL, BYTE_LEVEL.encode("x"), [half] * 50, make=WAYS[way])
    assert all(len(piece) <= 1 for piece in shown[:-1])
    assert "".join(shown) == REPLACEMENT * 50


@pytest.mark.parametrize("way", WAYS)
@pytest.mark.parametrize("kind", TEXT_KINDS)
def test_words_keep_their_leading_space_also_at_the_start(kind: str, way: str) -> None:
    tokenizer = TEXT_KINDS[kind]
    prompt, both = tokenizer.encode("hello"), tokenizer.encode("hello world")
    assert "".join(pieces(tokenizer, prompt, both[len(prompt) :], make=WAYS[way])) == " world"


@pytest.mark.parametrize("way", WAYS)
def test_special_tokens_show_only_if_wanted(way: str) -> None:
    ids = [*BYTE_LEVEL.encode("hello"), 0, 0]
    text = "hello"[len(BYTE_LEVEL.decode(ids[:1])) :]
    assert "".join(pieces(BYTE_LEVEL, ids[:1], ids[1:], make=WAYS[way])) == text
    assert "".join(pieces(BYTE_LEVEL, ids[:1], ids[1:], skip=False, make=WAYS[way])) == text + EOS + EOS


@pytest.mark.parametrize("way", WAYS)
def test_ids_beyond_the_tokenizer_give_no_text(way: str) -> None:
    assert pieces(BYTE_LEVEL, [5], [99_999, 99_999], make=WAYS[way]) == ["", "", ""]


@pytest.mark.parametrize("way", WAYS)
def test_the_price_of_a_token_does_not_depend_on_those_before_it(way: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Counted in tokens that are looked at, one by one or by a decode."""
    tokenizer, looked_at = toy_tokenizer(), [0]
    decode, token_bytes = tokenizer.decode, tokenizer.token_bytes

    class Counted(dict[int, bytes]):
        def __getitem__(self, token_id: int) -> bytes:
            looked_at[0] += 1
            return token_bytes(skip_special_tokens=True)[token_id]

    def counted(token_ids: Sequence[int], skip_special_tokens: bool = True) -> str:
        looked_at[0] += len(token_ids)
        return decode(token_ids, skip_special_tokens)

    monkeypatch.setattr(tokenizer, "decode", counted)
    monkeypatch.setattr(tokenizer, "token_bytes", lambda skip_special_tokens: Counted())
    ids = tokenizer.encode("hello world, 漢字 👍🏽 grüße ")

    def price(num_prompt: int, num_before: int) -> int:
        looked_at[0] = 0
        detokenizer = WAYS[way](tokenizer, (ids * num_prompt)[:num_prompt], True)
        prompt_price = looked_at[0]
        for start in range(0, num_before, 1000):
            detokenizer.push((ids * 1000)[start % len(ids) :][:1000])
        for token_id in ids * 8:
            detokenizer.push([token_id])
        looked_at[0] = 0
        for token_id in ids * 8:
            detokenizer.push([token_id])
        return prompt_price + looked_at[0]

    assert price(20_000, 100_000) <= 1.5 * price(20, 100)


def test_bytes_of_half_a_surrogate_at_the_end_are_two_wrong_bytes() -> None:
    tokenizer = LEVEL_KINDS["byte-level"]
    ids = [TOKEN_OF_BYTE[0xED], TOKEN_OF_BYTE[0xA0]]
    for make in WAYS.values():
        assert "".join(pieces(tokenizer, tokenizer.encode("hi"), ids, make=make)) == tokenizer.decode(ids)
