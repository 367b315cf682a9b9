"""Makes a tokenizer of any size, so that a model with random weights has text: `--tokenizer FOLDER`.

Such a model outputs every token of its vocabulary. The tokens made here are bytes and made-up words with the lengths of
real ones, in the byte-level form of GPT-2 and its successors, so that decoding them costs as much as with a real
tokenizer. From the root of the repository:

    python -m benchmarks.common.vocabulary --size 128256 /tmp/vocabulary
"""

from __future__ import annotations

import json
import random
import sys
from collections.abc import Sequence
from pathlib import Path

from tokenizers import Tokenizer, decoders, models, pre_tokenizers

from nanoflow.cli.options import CommandParser

_SPACE = "\N{LATIN CAPITAL LETTER G WITH DOT ABOVE}"
_LETTERS = "etaoinshrdlcumwfgypbvk"
# How many letters words have, as often as they stand here.
_LENGTHS = (1, 2, 2, 3, 3, 3, 4, 4, 4, 4, 5, 5, 5, 6, 6, 7, 8, 10)


def main(argv: Sequence[str] | None = None) -> int:
    """Write the folder."""
    parser = CommandParser(prog="python -m benchmarks.common.vocabulary", description=__doc__)
    parser.add_argument("folder", type=Path, help="where to write tokenizer.json")
    parser.add_argument("--size", type=int, default=128_256, help="number of tokens (default: 128256)")
    args = parser.parse_args(argv)
    write_vocabulary(args.folder, args.size)
    return 0


def write_vocabulary(folder: Path, size: int) -> None:
    """Write a tokenizer of so many tokens; the same ones each time."""
    folder.mkdir(parents=True, exist_ok=True)
    vocabulary = {token: place for place, token in enumerate(sorted(pre_tokenizers.ByteLevel.alphabet()))}
    draw = random.Random(0)
    while len(vocabulary) < size:
        word = "".join(draw.choices(_LETTERS, k=draw.choice(_LENGTHS)))
        token = _SPACE + word if draw.random() < 0.6 else word
        vocabulary.setdefault(token, len(vocabulary))
    tokenizer = Tokenizer(models.BPE(vocab=dict(list(vocabulary.items())[:size]), merges=[]))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    tokenizer.save(str(folder / "tokenizer.json"))
    config = {"tokenizer_class": "PreTrainedTokenizerFast", "clean_up_tokenization_spaces": False}
    (folder / "tokenizer_config.json").write_text(json.dumps(config), encoding="utf-8")


if __name__ == "__main__":
    sys.exit(main())
