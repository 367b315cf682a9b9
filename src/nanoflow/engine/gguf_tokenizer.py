"""Builds a tokenizer from the metadata of a GGUF file: tokens, merges, special tokens and chat templates.

Such a file names the rule by which texts are split into words, but does not contain it: the rules are in the code of
llama.cpp, and here. A rule that is not known is refused, since a wrong one gives other tokens in silence.
`tokenizer_files.py` reads all other tokenizers.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from tokenizers import AddedToken, Regex, decoders, models, normalizers, pre_tokenizers, processors
from tokenizers import Tokenizer as Backend

from nanoflow.engine.tokenizer_names import TokenizerNames
from nanoflow.models.fields import Fields, shown
from nanoflow.models.gguf_file import read_gguf

_SPACE = "▁"
# Kinds of tokens.
_UNKNOWN, _CONTROL, _USER_DEFINED = 2, 3, 4
_ROLES = {
    "bos": "bos_token",
    "eos": "eos_token",
    "unknown": "unk_token",
    "padding": "pad_token",
    "seperator": "sep_token",
    "mask": "mask_token",
}
_CONTRACTIONS = "(?i:'s|'t|'re|'ve|'m|'ll|'d)"
_UPPER, _LOWER = r"[\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}]", r"[\p{Ll}\p{Lm}\p{Lo}\p{M}]"
_ENDING = r"\s*[\r\n]+|\s+(?!\S)|\s+"
_GPT2 = r"'s|'t|'re|'ve|'m|'ll|'d| ?\p{L}+| ?\p{N}+| ?[^\s\p{L}\p{N}]+|\s+(?!\S)|\s+"
_LLAMA3 = rf"{_CONTRACTIONS}|[^\r\n\p{{L}}\p{{N}}]?\p{{L}}+|\p{{N}}{{1,3}}| ?[^\s\p{{L}}\p{{N}}]+[\r\n]*|{_ENDING}"
_QWEN2 = _LLAMA3.replace("{1,3}", "")


def _by_case(end: str, number: str) -> str:
    start = r"[^\r\n\p{L}\p{N}]?"
    words = f"{start}{_UPPER}*{_LOWER}+{end}|{start}{_UPPER}+{_LOWER}*{end}"
    return rf"{words}|{number}| ?[^\s\p{{L}}\p{{N}}]+[\r\n/]*|{_ENDING}"


# Patterns that split texts into words, one after the other, by the names in `tokenizer.ggml.pre`.
_WORDS: Mapping[str, Sequence[str]] = {
    **dict.fromkeys(("llama-bpe", "llama3", "llama-v3", "smaug-bpe", "dbrx"), (_LLAMA3,)),
    **dict.fromkeys(("qwen2", "deepseek-r1-qwen", "megrez"), (_QWEN2,)),
    **dict.fromkeys(("gpt-2", "phi-2", "mpt", "olmo"), (_GPT2,)),
    **dict.fromkeys(("smollm", "starcoder", "refact", "command-r", "codeshell"), (r"\p{N}", _GPT2)),
    **dict.fromkeys(("gpt-4o", "llama4"), (_by_case(f"{_CONTRACTIONS}?", r"\p{N}{1,3}"),)),
    "tekken": (_by_case("", r"\p{N}"),),
}
# Names of rules by which a word that is a token is not split, and which begin a text with a token.
_WHOLE_WORDS = ("llama-bpe", "llama3", "llama-v3", "tekken")
_WITH_BOS = ("llama-bpe", "llama3", "llama-v3", "tekken")


def read_gguf_tokenizer(path: Path) -> tuple[TokenizerNames, Backend]:
    """The names of special tokens with the chat templates, and the tokens.

    Raises:
        ModelError: The file is damaged, or has no tokenizer, or one that is not known.
    """
    values = read_gguf(path).metadata
    prefix = "tokenizer.ggml."
    own = {key.removeprefix(prefix): value for key, value in values.items() if key.startswith(prefix)}
    fields = Fields(values=own, origin=f"{path}: tokenizer.ggml")
    kind = fields.text("model")
    if kind not in ("gpt2", "llama"):
        raise fields.error("model", f"must be gpt2 or llama, got {shown(kind)}: name another with tokenizer")
    tokens = _texts(fields, "tokens")
    backend = _bytes_in_words(fields, tokens) if kind == "gpt2" else _pieces(fields, tokens)
    backend.add_tokens(list(_added(fields, tokens)))
    given = ((role, _token(fields, tokens, name)) for name, role in _ROLES.items())
    found = {role: token for role, token in given if token is not None}
    _begin(backend, fields, found.get("bos_token"))
    names = TokenizerNames(
        tokenizer_class="PreTrainedTokenizerFast",
        special_tokens_map=found,
        chat_template=_templates(values),
        init_kwargs=found,
    )
    return names, backend


def _bytes_in_words(fields: Fields, tokens: Sequence[str]) -> Backend:
    """Words of bytes, merged by pairs."""
    rule = fields.text("pre", "")
    if rule not in _WORDS:
        said = f"is {shown(rule)}, a rule to split words" if rule else "is missing, the rule to split words,"
        raise fields.error("pre", f"{said} that is not known: name a tokenizer of the same model with tokenizer")
    merges = [_pair(fields, merge) for merge in _texts(fields, "merges")]
    backend = Backend(models.BPE(vocab=_ids(tokens), merges=merges, ignore_merges=rule in _WHOLE_WORDS))
    if rule == "qwen2":
        backend.normalizer = normalizers.NFC()
    splits = [pre_tokenizers.Split(Regex(pattern), "isolated") for pattern in _WORDS[rule]]
    byte_level = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    backend.pre_tokenizer = pre_tokenizers.Sequence([*splits, byte_level])
    backend.decoder = decoders.ByteLevel()
    return backend


def _pieces(fields: Fields, tokens: Sequence[str]) -> Backend:
    """Pieces of SentencePiece, of which those with the best score are merged first; unknown characters are bytes."""
    scores = fields.raw("scores")
    if not isinstance(scores, list) or len(scores) != len(tokens):
        raise fields.error("scores", f"must have a score for each of {len(tokens)} tokens")
    unknown = _token(fields, tokens, "unknown")
    ids = _ids(tokens)
    merges = _merges(ids, scores)
    backend = Backend(models.BPE(vocab=ids, merges=merges, unk_token=unknown, fuse_unk=True, byte_fallback=True))
    has_prefix = fields.flag("add_space_prefix", default=True)
    spaces = normalizers.Replace(" ", _SPACE)
    backend.normalizer = normalizers.Sequence([normalizers.Prepend(_SPACE), spaces]) if has_prefix else spaces
    ends = [decoders.Strip(content=" ", left=1)] if has_prefix else []
    backend.decoder = decoders.Sequence(
        [decoders.Replace(_SPACE, " "), decoders.ByteFallback(), decoders.Fuse(), *ends]
    )
    return backend


def _merges(ids: Mapping[str, int], scores: Sequence[float]) -> list[tuple[str, str]]:
    """Every way to make a piece of two others, those of the best pieces first."""
    found = [
        (-scores[number], number, (token[:cut], token[cut:]))
        for token, number in ids.items()
        for cut in range(1, len(token))
        if token[:cut] in ids and token[cut:] in ids
    ]
    return [pair for _, _, pair in sorted(found, key=lambda each: each[:2])]


def _added(fields: Fields, tokens: Sequence[str]) -> Iterator[AddedToken]:
    """Tokens that are found in a text before it is split."""
    kinds = fields.raw("token_type", [1] * len(tokens))
    if not isinstance(kinds, list) or len(kinds) != len(tokens):
        raise fields.error("token_type", f"must have a type for each of {len(tokens)} tokens")
    for token, kind in zip(tokens, kinds, strict=True):
        if kind in (_UNKNOWN, _CONTROL, _USER_DEFINED):
            yield AddedToken(token, special=kind != _USER_DEFINED, normalized=False)


def _begin(backend: Backend, fields: Fields, bos: str | None) -> None:
    """Let texts begin with a token, if the file or its kind of tokenizer says so."""
    is_default = fields.values["model"] == "llama" or fields.values.get("pre") in _WITH_BOS
    if fields.flag("add_bos_token", default=is_default) and bos is not None:
        backend.post_processor = processors.TemplateProcessing(
            single=f"{bos}:0 $A:0", pair=f"{bos}:0 $A:0 {bos}:1 $B:1", special_tokens=[(bos, backend.token_to_id(bos))]
        )


def _templates(values: Mapping[str, Any]) -> str | dict[str, str] | None:
    """The chat template, or several by name."""
    key = "tokenizer.chat_template"
    usual = values.get(key)
    if not isinstance(usual, str):
        return None
    named = {name.removeprefix(f"{key}."): text for name, text in values.items() if name.startswith(f"{key}.")}
    texts = {name: text for name, text in named.items() if isinstance(text, str)}
    return {"default": usual, **texts} if texts else usual


def _texts(fields: Fields, name: str) -> Sequence[str]:
    values = fields.raw(name)
    if not isinstance(values, list) or not all(isinstance(value, str) for value in values):
        raise fields.error(name, "must be a list of texts")
    return values


def _ids(tokens: Sequence[str]) -> dict[str, int]:
    """Ids by token. Of equal tokens the first has the id."""
    ids: dict[str, int] = {}
    for number, token in enumerate(tokens):
        ids.setdefault(token, number)
    return ids


def _pair(fields: Fields, merge: str) -> tuple[str, str]:
    left, space, right = merge.partition(" ")
    if not space or not left or not right:
        raise fields.error("merges", f"must hold pairs, got {shown(merge)}")
    return left, right


def _token(fields: Fields, tokens: Sequence[str], name: str) -> str | None:
    """The token whose id is given for a purpose."""
    number = fields.values.get(f"{name}_token_id")
    if number is None:
        return None
    if not isinstance(number, int) or not 0 <= number < len(tokens):
        raise fields.error(f"{name}_token_id", f"must be below {len(tokens)}, got {shown(number)}")
    return tokens[number]
