"""Hold completions of the embedded model to many JSON schemas, and validate each that has ended.

  python -m benchmarks.robustness.schemas                          300 schemas of growing difficulty
  python -m benchmarks.robustness.schemas --schemas 20 --seed 7
  python -m benchmarks.robustness.schemas --json benchmarks/results/schemas.json

It fails if a completion that ended by itself does not validate, if a request fails, or if a schema is refused. It also
tells how long a schema takes to be checked and compiled.
"""

from __future__ import annotations

import argparse
import json
import random
import time
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import jsonschema
import numpy as np

from benchmarks.common.document import write_document
from nanoflow.cli.options import CommandParser
from nanoflow.config import EngineConfig
from nanoflow.engine.grammar_checks import GrammarChecks
from nanoflow.engine.llm import LLM
from nanoflow.engine.vocabulary import vocabulary_of
from nanoflow.grammars.compiled import Grammars
from nanoflow.outputs import FinishReason, RequestOutput
from nanoflow.request import SamplingParams
from nanoflow.structured import Structured, read_structured

Schema = dict[str, Any]

MAX_TOKENS = 400
_WORDS = ("name", "size", "kind", "tags", "next", "left", "code", "note", "rate", "ends")
_PATTERNS = ("^[a-z]{2,6}$", "^[A-Z][0-9]{3}$", "^(on|off)-[a-f]+$", "^\\d{4}/\\d{2}$")
_FORMATS = ("date", "time", "date-time", "uuid", "ipv4", "email")


def main(argv: Sequence[str] | None = None) -> int:
    """Complete, validate and report. Exit status 1 if anything was wrong."""
    args = parse_args(argv)
    schemas = [made_schema(args.seed, number) for number in range(args.schemas)]
    seconds = compile_seconds(schemas, args.model)
    with LLM(args.model) as llm:
        outputs = llm.generate(["A record as JSON: "] * len(schemas), [params_of(each) for each in schemas])
    found = judged(schemas, outputs)
    found |= {f"{step}_ms": _milliseconds(values) for step, values in seconds.items()}
    print(json.dumps(found, indent=1))
    if args.json is not None:
        write_document(args.json, "schemas", options={"seed": args.seed, "model": args.model}, **found)
    return 1 if found["findings"] else 0


def parse_args(argv: Sequence[str] | None) -> argparse.Namespace:
    """The options."""
    parser = CommandParser(prog="python -m benchmarks.robustness.schemas", description=__doc__)
    parser.add_argument("--schemas", type=int, default=300, help="number of schemas (default: 300)")
    parser.add_argument("--seed", type=int, default=0, help="seed of the schemas (default: 0)")
    parser.add_argument("--model", default="default", help="model that answers (default: the embedded model)")
    parser.add_argument("--json", type=Path, help="file to write the record to")
    args = parser.parse_args(argv)
    if args.schemas < 1:
        parser.error("--schemas must be at least 1")
    return args


def made_schema(seed: int, number: int) -> Schema:
    """A schema; with the number the depth grows from 0 to 3, and with it what is combined."""
    rng = random.Random(seed << 32 | number)
    depth = min(number // 8, 3) if number < 32 else rng.randint(1, 3)
    schema = _any(rng, depth)
    if depth and rng.random() < 0.3:
        # A tree whose nodes refer to their definition.
        node = _object(rng, 0, more={"next": {"anyOf": [{"$ref": "#/$defs/node"}, {"type": "null"}]}})
        return {
            "$defs": {"node": node, "other": schema},
            "anyOf": [{"$ref": "#/$defs/node"}, {"$ref": "#/$defs/other"}],
        }
    return schema


def _any(rng: random.Random, depth: int) -> Schema:
    simple: tuple[Callable[[random.Random], Schema], ...] = (_integer, _number, _text, _choice, _truth)
    if depth == 0:
        return rng.choice(simple)(rng)
    made: tuple[Callable[[random.Random, int], Schema], ...] = (_object, _object, _list, _union)
    return rng.choice(made)(rng, depth)


def _integer(rng: random.Random) -> Schema:
    low = rng.randint(-500, 500)
    exclusive = {"exclusiveMaximum": low + rng.randint(2, 900)}
    return {"type": "integer", "minimum": low, **rng.choice((exclusive, {"maximum": low + rng.randint(0, 90)}))}


def _number(rng: random.Random) -> Schema:
    return {"type": "number", "minimum": round(rng.uniform(-5, 0), 2), "maximum": rng.randint(1, 50)}


def _text(rng: random.Random) -> Schema:
    shape: Schema = rng.choice(
        (
            {"minLength": rng.randint(0, 3), "maxLength": rng.randint(3, 20)},
            {"pattern": rng.choice(_PATTERNS), "maxLength": 12},
            {"format": rng.choice(_FORMATS)},
        )
    )
    return {"type": "string", **shape}


def _choice(rng: random.Random) -> Schema:
    values = [rng.choice((word, number, None, True, [word])) for number, word in enumerate(_WORDS)]
    return rng.choice(({"enum": rng.sample(values, 4)}, {"const": rng.choice(values)}))


def _truth(rng: random.Random) -> Schema:
    del rng
    return {"type": ["boolean", "null"]}


def _object(rng: random.Random, depth: int, more: Mapping[str, Schema] | None = None) -> Schema:
    names = rng.sample(_WORDS, rng.randint(1, 4))
    properties = {name: _any(rng, rng.randint(0, max(depth - 1, 0))) for name in names}
    properties |= more or {}
    required = sorted(name for name in properties if rng.random() < 0.7)
    return {"type": "object", "properties": properties, "required": required, "additionalProperties": False}


def _list(rng: random.Random, depth: int) -> Schema:
    low = rng.randint(0, 2)
    return {"type": "array", "items": _any(rng, depth - 1), "minItems": low, "maxItems": low + rng.randint(0, 2)}


def _union(rng: random.Random, depth: int) -> Schema:
    return {"anyOf": [_any(rng, rng.randint(0, depth - 1)) for _ in range(rng.randint(2, 3))]}


def params_of(schema: Schema) -> SamplingParams:
    """How a schema is asked for; greedy sampling would let a weak model repeat itself."""
    return SamplingParams(structured_outputs=structured_of(schema), max_tokens=MAX_TOKENS, seed=0)


def structured_of(schema: Schema) -> Structured:
    """The shape of a schema."""
    structured = read_structured("structured_outputs", {"json": schema})
    assert structured is not None
    return structured


def compile_seconds(schemas: Sequence[Schema], model: str = "default") -> dict[str, list[float]]:
    """How long each schema takes to be checked in its process, and to be compiled in the engine."""
    config = EngineConfig(model=model)
    checks = GrammarChecks()
    grammars = Grammars(lambda: vocabulary_of(config, (), _vocab_size(config)), num_kept=len(schemas))
    seconds: dict[str, list[float]] = {"check": [], "compile": []}
    try:
        # What is started at first use is not counted.
        checks.checked(params_of({"const": 0}))
        grammars.matcher(structured_of({"const": 0}))
        for schema in schemas:
            params = params_of(schema)
            seconds["check"].append(_timed(partial(checks.checked, params)))
            seconds["compile"].append(_timed(partial(grammars.matcher, structured_of(schema))))
    finally:
        checks.close()
        grammars.close()
    return seconds


def _vocab_size(config: EngineConfig) -> int:
    from nanoflow.engine.tokenizer import load_tokenizer

    tokenizer = load_tokenizer(config)
    assert tokenizer is not None
    return tokenizer.vocab_size


def _timed(do: Callable[[], object]) -> float:
    start_s = time.perf_counter()
    do()
    return time.perf_counter() - start_s


def judged(schemas: Sequence[Schema], outputs: Sequence[RequestOutput]) -> dict[str, Any]:
    """How the completions ended, and what is wrong with those that ended by themselves."""
    findings, num_of = [], Counter[str]()
    for number, (schema, output) in enumerate(zip(schemas, outputs, strict=True)):
        (completion,) = output.outputs
        num_of[str(completion.finish_reason)] += 1
        if completion.finish_reason is FinishReason.ERROR:
            findings.append({"number": number, "what": str(output.error)})
        elif completion.finish_reason is FinishReason.STOP:
            problem = problem_of(completion.text, schema)
            findings += [{"number": number, "what": problem}] if problem else []
    return {"num_schemas": len(schemas), "num_of": dict(sorted(num_of.items())), "findings": findings}


def problem_of(text: str, schema: Schema) -> str | None:
    """Why a text is no JSON of a schema; None if it is."""
    try:
        validator = jsonschema.Draft202012Validator(
            schema, format_checker=jsonschema.Draft202012Validator.FORMAT_CHECKER
        )
        validator.validate(json.loads(text))
    except (ValueError, jsonschema.ValidationError) as error:
        return f"{text!r}: {str(error).splitlines()[0]}"
    return None


def _milliseconds(values: Sequence[float]) -> dict[str, float]:
    p50, p99 = np.percentile(values, [50, 99]) * 1e3
    return {"p50": round(float(p50), 3), "p99": round(float(p99), 3), "max": round(max(values) * 1e3, 3)}


if __name__ == "__main__":
    raise SystemExit(main())
