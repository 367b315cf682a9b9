"""Tokenizers in GGUF files: the same tokens as the tokenizers that they were made from, and the model talks."""

from __future__ import annotations

import itertools
import json
import re
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest
from tokenizers import Tokenizer as Backend

from nanoflow import LLM, SamplingParams
from nanoflow.cli.main import main
from nanoflow.config import EngineConfig
from nanoflow.engine.tokenizer import Tokenizer, TokenizerError
from tests.families import make_model
from tests.gguf_files import tokenizer_metadata, write_gguf
from tests.toy_tokenizers import EOS, TEMPLATE, byte_level_backend

NORMAL, UNKNOWN, CONTROL, DEFINED, BYTE = 1, 2, 3, 4, 6
TEXTS = (
    "hello world, this is a small text",
    "  it's 12345 o'clock!\n\n\tDON'T  ",
    f"grüße aus köln 漢字 👍🏽 {EOS} x{EOS}",
    "",
)


def _byte_level(backend: Backend, **more: Any) -> dict[str, Any]:
    said = json.loads(backend.to_str())
    ids = backend.get_vocab()
    tokens = sorted(ids, key=lambda token: ids[token])
    merges = [" ".join(pair) for pair in said["model"]["merges"]]
    kinds = [CONTROL if token == EOS else NORMAL for token in tokens]
    options = {"pre": "gpt-2", "eos_token_id": 0, **more}
    return tokenizer_metadata(tokens, kinds, model="gpt2", template=TEMPLATE, merges=merges, **options)


def _write(folder: Path, metadata: dict[str, Any], **changes: Any) -> Path:
    """A model of one layer with this tokenizer."""
    num_tokens = len(metadata.get("tokenizer.ggml.tokens") or "1")
    make_model("llama2", folder, vocab_size=max(num_tokens, 8), num_hidden_layers=1, **changes)
    return write_gguf(folder, folder / "model.gguf", "llama", metadata=metadata)


def _load(folder: Path, metadata: dict[str, Any]) -> Tokenizer:
    return Tokenizer.load(EngineConfig(model=str(_write(folder, metadata))))


def test_bytes_in_words(tmp_path: Path) -> None:
    backend = byte_level_backend()
    tokenizer = _load(tmp_path, _byte_level(backend))
    for text in TEXTS:
        assert tokenizer.encode(text) == backend.encode(text).ids, text
        assert tokenizer.decode(tokenizer.encode(text), False) == text
    assert tokenizer.eos_token_ids == (0,) and tokenizer.special_names == {EOS: 0}
    assert tokenizer.byte_rule is not None
    ids = tokenizer.apply_chat_template([{"role": "user", "content": "hello"}])
    assert tokenizer.decode(ids) == "[user]hello[assistant]"
    tokenizer.close()


# Words of a text by each rule, as the published tokenizers of these models split it.
TEXT = "I'M it's don't x1234 A日本b \n\n end  !!/\n"
WORDS = {
    "gpt-2": ["I", "'", "M", " it", "'s", " don", "'t", " x", "1234", " A日本b", " \n\n", " end", " ", " !!/", "\n"],
    "llama-bpe": [
        *("I", "'M", " it", "'s", " don", "'t", " x", "123", "4", " A日本b", " \n\n", " end", " ", " !!/\n"),
    ],
    "qwen2": [
        *("I", "'M", " it", "'s", " don", "'t", " x", "1", "2", "3", "4", " A日本b", " \n\n", " end", " ", " !!/\n"),
    ],
    "smollm": [
        *("I", "'", "M", " it", "'s", " don", "'t", " x", "1", "2", "3", "4", " A日本b", " \n\n", " end", " "),
        *(" !!/", "\n"),
    ],
    "gpt-4o": ["I'M", " it's", " don't", " x", "123", "4", " A日本b", " \n\n", " end", " ", " !!/\n"],
    "tekken": [
        *("I", "'M", " it", "'s", " don", "'t", " x", "1", "2", "3", "4", " A日本b", " \n\n", " end", " ", " !!/\n"),
    ],
}


@pytest.mark.parametrize("rule", WORDS)
def test_words_of_each_rule(rule: str, tmp_path: Path) -> None:
    from nanoflow.engine.gguf_tokenizer import read_gguf_tokenizer

    _, backend = read_gguf_tokenizer(_write(tmp_path, _byte_level(byte_level_backend(), pre=rule)))
    assert [TEXT[start:end] for _, (start, end) in backend.pre_tokenizer.pre_tokenize_str(TEXT)] == WORDS[rule]


def test_texts_begin_with_a_token_where_the_file_or_its_rule_says_so(tmp_path: Path) -> None:
    backend = byte_level_backend()
    cases: tuple[tuple[dict[str, Any], bool], ...] = (
        ({"pre": "llama-bpe"}, True),
        ({"pre": "llama-bpe", "add_bos_token": False}, False),
        ({"pre": "gpt-2"}, False),
        ({"pre": "gpt-2", "add_bos_token": True}, True),
    )
    for number, (more, begins) in enumerate(cases):
        tokenizer = _load(tmp_path / str(number), _byte_level(backend, bos_token_id=0, **more))
        assert (tokenizer.encode("hello")[0] == 0) == begins
        assert tokenizer.encode("hello", add_special_tokens=False)[0] != 0
        tokenizer.close()


PIECES: Sequence[tuple[str, float, int]] = (
    *(("<unk>", 0.0, UNKNOWN), ("<s>", 0.0, CONTROL), ("</s>", 0.0, CONTROL)),
    *((f"<0x{byte:02X}>", 0.0, BYTE) for byte in range(256)),
    *((piece, -float(place), NORMAL) for place, piece in enumerate(("▁t", "he", "in", "▁a", "▁the", "▁th", "▁in"))),
    *((piece, -20.0 - place, NORMAL) for place, piece in enumerate(("▁", "▁▁", *"abcdefghijklmnopqrstuvwxyz.,ü"))),
    ("<mine>", 0.0, DEFINED),
)


def _best_merges(text: str) -> list[str]:
    """SentencePiece's rule: as long as two neighbours make a piece, those of the best score, the first if several."""
    scores = {piece: score for piece, score, kind in PIECES if kind == NORMAL}
    parts = list(text.replace(" ", "▁"))
    while True:
        found = [(-scores[a + b], i) for i, (a, b) in enumerate(itertools.pairwise(parts)) if a + b in scores]
        if not found:
            break
        place = min(found)[1]
        parts[place : place + 2] = [parts[place] + parts[place + 1]]
    return [
        token for part in parts for token in ([part] if part in scores else [f"<0x{b:02X}>" for b in part.encode()])
    ]


@pytest.mark.parametrize("has_prefix", [True, False])
def test_pieces(has_prefix: bool, tmp_path: Path) -> None:
    tokens, scores, kinds = map(list, zip(*PIECES, strict=True))
    metadata = tokenizer_metadata(
        tokens,
        kinds,
        model="llama",
        scores=scores,
        bos_token_id=1,
        eos_token_id=2,
        unknown_token_id=0,
        add_space_prefix=has_prefix,
    )
    tokenizer = _load(tmp_path, metadata)
    for text in ("the inn in the  thin a", "then . ü 漢", "hehe the"):
        ids = tokenizer.encode(text)
        assert ids[0] == 1
        assert tokenizer.token_names(ids[1:]) == _best_merges(f"{' ' if has_prefix else ''}{text}"), text
        assert tokenizer.decode(ids) == text
    assert tokens.index("<mine>") in tokenizer.encode("the <mine> in")
    assert tokenizer.decode([1, tokens.index("<mine>")]) == "<mine>"
    assert not tokenizer.has_chat_template and tokenizer.eos_token_ids == (2,)
    tokenizer.close()


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"model": "bert"}, "field 'model' must be gpt2 or llama, got 'bert': name another with tokenizer"),
        ({"pre": "poro-chat"}, "field 'pre' is 'poro-chat', a rule to split words that is not known: name a tokenizer"),
        ({"pre": None}, "field 'pre' is missing, the rule to split words, that is not known"),
        ({"merges": None}, "field 'merges' is missing"),
        ({"merges": ["ab"]}, "field 'merges' must hold pairs, got 'ab'"),
        ({"merges": ["nope nada"]}, "the tokenizer cannot be loaded: "),
        ({"token_type": [1]}, "field 'token_type' must have a type for each of"),
        ({"tokens": [1, 2]}, "field 'tokens' must be a list of texts"),
        ({"bos_token_id": 9999}, "field 'bos_token_id' must be below"),
        ({"model": "llama"}, "field 'scores' is missing"),
    ],
)
def test_tokenizers_that_cannot_be_read_are_one_line(change: dict[str, Any], message: str, tmp_path: Path) -> None:
    metadata = _byte_level(byte_level_backend())
    metadata.update({f"tokenizer.ggml.{name}": value for name, value in change.items()})
    file = _write(tmp_path, metadata)
    with pytest.raises(TokenizerError, match=re.escape(message)) as caught:
        Tokenizer.load(EngineConfig(model=str(file)))
    assert "\n" not in str(caught.value)


def test_a_file_generates_and_talks_as_its_twin_does(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """From the command line and from Python; a tokenizer that is named takes precedence."""
    backend = byte_level_backend()
    file = _write(tmp_path, _byte_level(backend), eos_token_id=0, std=0.05)
    twin = tmp_path / "twin"
    backend.save(str(twin / "tokenizer.json"))
    options = {"eos_token": EOS, "tokenizer_class": "PreTrainedTokenizerFast", "chat_template": TEMPLATE}
    (twin / "tokenizer_config.json").write_text(json.dumps(options))
    texts = []
    for model in (file, twin):
        command = ["generate", "hello", "--model", str(model), "--device", "cpu", "--temperature", "0"]
        assert main([*command, "--max-tokens", "12"]) == 0
        texts.append(capsys.readouterr().out)
    assert texts[0] == texts[1] and texts[0].strip()
    talks = []
    for model, named in ((file, None), (twin, None), (file, str(twin))):
        llm = LLM(str(model), tokenizer=named, device="cpu", max_num_seqs=2)
        params = SamplingParams(temperature=0.0, max_tokens=8)
        talks.append(llm.chat([{"role": "user", "content": "hello"}], params)[0].outputs[0].token_ids)
    assert talks[0] == talks[1] == talks[2] and len(talks[0]) > 2
