"""Hostile files fed to the loaders, in a process with limits: `python -m tests.fuzz.files --seed S`, numbers on stdin.

Files are those of the embedded model and of records in the repository, with values changed in their JSON or bytes
changed anywhere. A loader takes a file, or raises the error that it documents, in one line. One line of JSON a number.
"""

from __future__ import annotations

import argparse
import json
import random
import re
import resource
import shutil
import signal
import sys
import tempfile
import traceback
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from nanoflow.config import ConfigError, EngineConfig
from nanoflow.engine.tokenizer import Tokenizer, TokenizerError
from nanoflow.models import config_json as model_configs
from nanoflow.models.fields import ModelError
from nanoflow.models.generation import load_sampling_defaults, named_file
from nanoflow.models.locate import locate_model
from nanoflow.models.registry import build_graph
from nanoflow.models.weights import check_weights
from nanoflow.plan.book import load_book
from nanoflow.plan.plan import PlanError
from nanoflow.profile.table import Profile, ProfileError
from nanoflow.request import RequestError
from tests.fuzz.values import hostile_value

_RESULTS = Path(__file__).parents[2] / "benchmarks" / "results"
_BOOK, _PROFILE = "plans_llama-3-8b_h200_1024-512.json", "profile_llama-3-8b_h200.json"
_MEMORY_BYTES = 8 * 2**30
_LONGEST_S = 20
_LONGEST_LINE = 2000


@dataclass(frozen=True, slots=True, kw_only=True)
class Loader:
    """A loader and what is fed to it.

    Attributes:
        files: Names of the files of which one is changed.
        load: What reads them, from the folder that they are in.
        errors: What it documents.
    """

    files: tuple[str, ...]
    load: Callable[[Path], object]
    errors: tuple[type[Exception], ...]


def _load_config(folder: Path) -> None:
    build_graph(model_configs.load(folder, named_file("auto")), None)


def _load_generation(folder: Path) -> None:
    load_sampling_defaults("auto", folder).params({})
    model_configs.load(folder, named_file("auto"))


def _load_weights(folder: Path) -> None:
    check_weights(build_graph(model_configs.load(folder), None), folder)


def _load_tokenizer(folder: Path) -> None:
    tokenizer = Tokenizer.load(EngineConfig(tokenizer=str(folder)))
    try:
        tokenizer.decode(tokenizer.encode("def f(x): \U0001f600"))
    finally:
        tokenizer.close()


def _load_template(folder: Path) -> None:
    tokenizer = Tokenizer.load(EngineConfig(tokenizer=str(folder), chat_template_timeout_s=2.0))
    try:
        tokenizer.apply_chat_template([{"role": "user", "content": "hi"}])
    finally:
        tokenizer.close()


_LOADERS: Mapping[str, Loader] = {
    "config": Loader(files=("config.json",), load=_load_config, errors=(ModelError, ConfigError)),
    "generation": Loader(
        files=("generation_config.json",), load=_load_generation, errors=(ModelError, ConfigError, RequestError)
    ),
    "weights": Loader(files=("model.safetensors",), load=_load_weights, errors=(ModelError,)),
    "tokenizer": Loader(
        files=("tokenizer.json", "tokenizer_config.json"),
        load=_load_tokenizer,
        errors=(TokenizerError, ModelError, RequestError),
    ),
    "template": Loader(
        files=("tokenizer_config.json",), load=_load_template, errors=(TokenizerError, ModelError, RequestError)
    ),
    "book": Loader(files=(_BOOK,), load=lambda folder: load_book(folder / _BOOK), errors=(PlanError,)),
    "profile": Loader(files=(_PROFILE,), load=lambda folder: Profile.load(folder / _PROFILE), errors=(ProfileError,)),
}
_ODDS: Mapping[str, int] = {
    "config": 30,
    "generation": 12,
    "weights": 25,
    "tokenizer": 4,
    "template": 1,
    "book": 18,
    "profile": 10,
}
_TEMPLATES: Sequence[str] = (
    *(
        "{{ messages",
        "{% for %}",
        "{% while 1 %}",
        "{{ 1/0 }}",
        "{{ x.y.z }}",
        "{{ raise_exception('no') }}",
        "{{ ''.__class__ }}",
    ),
    *("{% for i in range(10**9) %}x{% endfor %}", "{{ 'a' * 10**10 }}", "{{ messages | tojson }}", "{% include 'a' %}"),
    *(
        "{{ 9 ** 9 ** 9 }}",
        "{% macro f() %}{{ f() }}{% endmacro %}{{ f() }}",
        "\ud800",
        "{{ cycler }}",
        "{%- set x = [] %}",
    ),
)


def main() -> int:
    """Load what the numbers on standard input say."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--seed", type=int, required=True)
    seed: int = parser.parse_args().seed
    resource.setrlimit(resource.RLIMIT_AS, (_MEMORY_BYTES, _MEMORY_BYTES))
    with tempfile.TemporaryDirectory(prefix="nanoflow-fuzz-") as place:
        folder = Path(place) / "model"
        shutil.copytree(locate_model("default"), folder)
        for name in (_BOOK, _PROFILE):
            shutil.copy(_RESULTS / name, folder)
        whole = {path.name: path.read_bytes() for path in folder.iterdir()}
        for line in sys.stdin:
            signal.alarm(_LONGEST_S)  # by which the process ends, whatever the loader is at
            print(json.dumps(try_one(seed, int(line), folder, whole)), flush=True)
    return 0


def try_one(seed: int, number: int, folder: Path, whole: Mapping[str, bytes]) -> dict[str, Any]:
    """Change a file, load it, put it back; what came of it.

    Args:
        seed, number: Which change.
        folder: With all files as they should be.
        whole: Those files.
    """
    rng = random.Random(f"{seed}:{number}")
    kind = rng.choices(tuple(_ODDS), tuple(_ODDS.values()))[0]
    loader = _LOADERS[kind]
    file = folder / rng.choice(loader.files)
    file.write_bytes(_changed(rng, kind, whole[file.name]))
    end, problem = "loaded", None
    try:
        loader.load(folder)
    except loader.errors as error:
        end, message = "refused", str(error)
        if not message or "\n" in message or len(message) > _LONGEST_LINE:
            problem = f"{kind}: not one line that says something: {message[:200]!r}"
    # Anything else is what is looked for.
    except BaseException as error:
        end, where = "failed", traceback.extract_tb(error.__traceback__)[-1]
        problem = f"{kind}: {type(error).__name__}: {str(error)[:200]} ({Path(where.filename).name}:{where.lineno})"
    finally:
        file.write_bytes(whole[file.name])
    return {"number": number, "kind": kind, "end": end, "problem": problem}


def _changed(rng: random.Random, kind: str, data: bytes) -> bytes:
    if rng.random() < 0.1:
        return _with_other_bytes(rng, data)
    if kind == "weights":
        return _with_other_header(rng, data)
    if kind == "template":
        template = json.dumps(rng.choice(_TEMPLATES))
        return re.sub(rb'"chat_template": "(?:[^"\\]|\\.)*"', lambda _: b'"chat_template": ' + template.encode(), data)
    return _with_other_values(rng, data)


def _with_other_bytes(rng: random.Random, data: bytes) -> bytes:
    place = rng.randrange(len(data) + 1)
    start = data[:place]
    return rng.choice(
        (start, start + rng.randbytes(8) + data[place + 8 :], b"", b"[]", data + b"x", b"\xef\xbb\xbf" + data)
    )


def _with_other_header(rng: random.Random, data: bytes) -> bytes:
    """A safetensors file whose header says something else."""
    length = int.from_bytes(data[:8], "little")
    header = _with_other_values(rng, data[8 : 8 + length])
    said = rng.choice((len(header), len(header), len(header), rng.choice((0, 1, length, 2**31, 2**63, 2**64 - 1))))
    return said.to_bytes(8, "little") + header + data[8 + length :]


_VALUE = re.compile(rb'(?<=[:\[,])\s*("(?:[^"\\]|\\.)*"|-?[0-9.eE+-]+|true|false|null)')


def _with_other_values(rng: random.Random, data: bytes) -> bytes:
    """A JSON text with one value changed or several, or a name."""
    spans = [match.span(1) for match in _VALUE.finditer(data, 0, 200_000)]
    for start, stop in sorted(rng.sample(spans, min(len(spans), rng.choice((1, 1, 1, 2, 5)))), reverse=True):
        data = data[:start] + hostile_value(rng).encode("utf-8", "surrogatepass") + data[stop:]
    if rng.random() < 0.2:
        names = list(re.finditer(rb'"([a-z_]+)":', data[:200_000]))
        if names:
            start, stop = rng.choice(names).span(1)
            data = data[:start] + rng.choice((b"x", b"", rng.choice(names)[1])) + data[stop:]
    return data


if __name__ == "__main__":
    sys.exit(main())
