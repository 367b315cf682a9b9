"""Compare tokens with those of tokenizer.json for every tokenizer class that the installed transformers knows.

    python -m tools.tokenizer_classes

Each class name, with each kind of tokenizer.json, is a folder as `Tokenizer.load` reads it; so is each model type
without a class name. Run it with every version of transformers that is to be supported; torch is not needed. It also
tells how many of the folders `AutoTokenizer` reads otherwise, or not at all.
"""

from __future__ import annotations

import argparse
import collections
import contextlib
import json
import logging
import random
import sys
import tempfile
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import tokenizers
import transformers
from tests.toy_tokenizers import (
    EOS,
    byte_fallback_backend,
    byte_level_backend,
    metaspace_backend,
    wordpiece_backend,
    write_tokenizer,
)
from tokenizers import Tokenizer as Backend
from transformers.models.auto import tokenization_auto

from nanoflow.config import EngineConfig
from nanoflow.engine.tokenizer import Tokenizer

KINDS = {
    "byte-level": byte_level_backend,
    "byte-fallback": byte_fallback_backend,
    "metaspace": metaspace_backend,
    "wordpiece": wordpiece_backend,
}
TEXTS = (
    "hello world",
    " hello  world ",
    "\n\tx",
    "grüße 漢字 👍🏽",
    f"h{EOS}o",
    f"{EOS} hello",
    "\ufffd",
    "",
    "▁h<0x41>",
)
NUM_RANDOM = 20


@dataclass(frozen=True, slots=True, kw_only=True)
class Case:
    """A folder: what its files say of the class."""

    kind: str
    name: str
    options: dict[str, Any]
    model_type: str | None = None


def cases() -> Iterator[Case]:
    """Every class name and every model type with every kind of file."""
    for kind in KINDS:
        for name in sorted(class_names()):
            yield Case(kind=kind, name=name, options={"tokenizer_class": name})
        for model_type in tokenization_auto.TOKENIZER_MAPPING_NAMES:
            yield Case(kind=kind, name=f"model type {model_type}", options={}, model_type=model_type)


def class_names() -> set[str]:
    """Names that are mapped, names of the module, and each with and without "Fast"."""
    mapped = (names for names in tokenization_auto.TOKENIZER_MAPPING_NAMES.values() if names)
    names = {name for names in mapped for name in ((names,) if isinstance(names, str) else names) if name}
    names |= {name for name in dir(transformers) if name.endswith(("Tokenizer", "TokenizerFast", "TokenizersBackend"))}
    names |= {f"{name}Fast" for name in names if name.endswith("Tokenizer")}
    return names | {name.removesuffix("Fast") for name in names}


def difference(tokenizer: Tokenizer, file: Backend) -> str | None:
    """The first text or tokens that a tokenizer treats otherwise than its file; None if there is none."""
    for text in TEXTS:
        for adds in (True, False):
            if tokenizer.encode(text, adds) != file.encode(text, add_special_tokens=adds).ids:
                return f"encodes {text!r} as {tokenizer.encode(text, adds)}"
    draw = random.Random(0)
    for _ in range(NUM_RANDOM):
        ids = [draw.randrange(file.get_vocab_size()) for _ in range(8)]
        for skips in (True, False):
            if tokenizer.decode(ids, skips) != file.decode(ids, skip_special_tokens=skips):
                return f"decodes {ids} as {tokenizer.decode(ids, skips)!r}"
    return None


def check(case: Case, folder: Path) -> tuple[str | None, bool]:
    """What is wrong with a folder as it is loaded here, and whether `AutoTokenizer` has the same tokens."""
    write_tokenizer(folder, KINDS[case.kind](), tokenizer_class=None)
    config = json.loads((folder / "tokenizer_config.json").read_text())
    del config["tokenizer_class"]
    (folder / "tokenizer_config.json").write_text(json.dumps(config | case.options))
    (folder / "config.json").write_text(json.dumps({"model_type": case.model_type} if case.model_type else {}))
    file = Backend.from_file(str(folder / "tokenizer.json"))
    try:
        problem = difference(Tokenizer.load(EngineConfig(model=str(folder))), file)
    except Exception as error:
        problem = f"{type(error).__name__}: {error}"
    try:
        auto = transformers.AutoTokenizer.from_pretrained(str(folder), trust_remote_code=False)
        return problem, difference(Tokenizer(auto), file) is None
    except Exception:
        return problem, False


def main() -> int:
    """Print what differs; return 1 if anything does."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--only", default="", help="only classes and model types with this in their name")
    only = parser.parse_args().only
    logging.disable(logging.WARNING)
    counts: collections.Counter[str] = collections.Counter()
    for case in cases():
        if only not in case.name:
            continue
        with tempfile.TemporaryDirectory() as name, contextlib.redirect_stderr(None):
            problem, is_auto_same = check(case, Path(name))
        counts.update(folders=1, wrong=problem is not None, auto=not is_auto_same)
        if problem is not None:
            print(f"{case.kind}, {case.name}: {problem}")
    print(
        f"transformers {transformers.__version__}, tokenizers {tokenizers.__version__}: {counts['folders']} folders, "
        f"{counts['wrong']} with other tokens than tokenizer.json; AutoTokenizer alone: {counts['auto']}"
    )
    return int(counts["wrong"] > 0)


if __name__ == "__main__":
    sys.exit(main())
