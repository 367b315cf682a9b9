"""Small tokenizers of the kinds that models have, and folders that `AutoTokenizer` can load."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from tokenizers import Regex, decoders, models, normalizers, pre_tokenizers, trainers
from tokenizers import Tokenizer as Backend
from transformers import PreTrainedTokenizerFast

from nanoflow.engine.tokenizer import Tokenizer

EOS = "<|end|>"
TEMPLATE = (
    "{% for message in messages %}[{{ message.role }}]{{ message.content }}{% endfor %}"
    "{% if add_generation_prompt %}[assistant]{% endif %}"
)
_TEXTS = ["hello world, this is a small text", "grüße aus köln", "漢字かな交じり文 漢字 漢字", "👍👍🏽 👩‍👩‍👧"]


def byte_level_backend(vocab_size: int = 320) -> Backend:
    """Byte-level BPE, as in GPT-2, Llama 3 and Qwen. Token 0 is the end of sequence."""
    backend = Backend(models.BPE())
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    backend.decoder = decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    trainer = trainers.BpeTrainer(
        vocab_size=vocab_size, special_tokens=[EOS], initial_alphabet=alphabet, show_progress=False
    )
    backend.train_from_iterator(_TEXTS * 3, trainer)
    return backend


def byte_fallback_backend() -> Backend:
    """Words with "▁" in front, and byte tokens, as in Llama 2 and Mistral. Token 0 is the end of sequence."""
    letters = sorted({char for text in _TEXTS[:2] for char in text.replace(" ", "▁")})
    tokens = [EOS, *(f"<0x{byte:02X}>" for byte in range(256)), *letters, "▁h", "▁w", "or"]
    merges = [("▁", "h"), ("▁", "w"), ("o", "r")]
    vocab = {token: token_id for token_id, token in enumerate(dict.fromkeys(tokens))}
    backend = Backend(models.BPE(vocab=vocab, merges=merges, byte_fallback=True, fuse_unk=True))
    backend.normalizer = normalizers.Sequence([normalizers.Prepend("▁"), normalizers.Replace(" ", "▁")])
    backend.decoder = decoders.Sequence(
        [decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse(), decoders.Strip(" ", 1, 0)]
    )
    backend.add_special_tokens([EOS])
    return backend


def metaspace_backend() -> Backend:
    """Unigram pieces with "▁" in front, as in T5 and XLM-R. Token 0 is the end of sequence."""
    words = [EOS, "<unk>", "▁", "▁hello", "▁w", "or", "ld", "h", "e", "l", "o", ".", ",", "▁▁", "é", "漢", "\ufffd"]
    backend = Backend(models.Unigram([(word, -float(place)) for place, word in enumerate(words)], unk_id=1))
    backend.pre_tokenizer = pre_tokenizers.Metaspace(replacement="▁", prepend_scheme="always")
    backend.decoder = decoders.Metaspace(replacement="▁", prepend_scheme="always")
    backend.add_special_tokens([EOS])
    return backend


def wordpiece_backend() -> Backend:
    """Words and word endings, as in BERT. Token 0 is the end of sequence."""
    words = [EOS, "[UNK]", "hello", "wor", "##ld", "h", "##e", "##l", "##o", ".", ",", "é", "漢", "\ufffd"]
    backend = Backend(models.WordPiece({word: place for place, word in enumerate(words)}, unk_token="[UNK]"))
    backend.normalizer = normalizers.BertNormalizer()
    backend.pre_tokenizer = pre_tokenizers.BertPreTokenizer()
    backend.decoder = decoders.WordPiece()
    backend.add_special_tokens([EOS])
    return backend


def panicking_backend() -> Backend:
    """The library panics on "a" * 60 + "b" (pattern) and on decoding a space (token 1). Token 2 is "a"."""
    backend = Backend(models.WordLevel({EOS: 0, " ": 1, "a": 2}, unk_token="a"))
    backend.pre_tokenizer = pre_tokenizers.Split(Regex("(a|aa)+$"), "isolated")
    backend.decoder = decoders.Strip(" ", 1, 1)
    backend.add_special_tokens([EOS])
    return backend


def toy_tokenizer(
    backend: Backend | None = None, chat_template: str | None = None, *, eos_token: str = EOS
) -> Tokenizer:
    """A `Tokenizer` with this backend, byte-level by default."""
    fast = PreTrainedTokenizerFast(tokenizer_object=backend or byte_level_backend(), eos_token=eos_token)
    return Tokenizer(fast, chat_template)


def write_tokenizer(folder: Path, backend: Backend | None = None, **options: Any) -> None:
    """Write the files of a tokenizer; `options` go to tokenizer_config.json."""
    (backend or byte_level_backend()).save(str(folder / "tokenizer.json"))
    config = {"tokenizer_class": "PreTrainedTokenizerFast", "eos_token": EOS, **options}
    (folder / "tokenizer_config.json").write_text(json.dumps(config))
