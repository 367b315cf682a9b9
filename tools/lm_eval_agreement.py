"""Compare lm-evaluation-harness over HTTP here with the same harness over transformers in process.

    python -m tools.lm_eval_agreement FOLDER --lm-eval OTHER_VENV/bin/lm_eval

Three small tasks with data of their own: multiple choice with short and with long answers, and perplexity of whole
texts, longer than one window. Needs `lm_eval[api,hf]`, best in an environment of its own, and a model that both can run
in float32 on this machine. No network is used.
"""

from __future__ import annotations

import argparse
import itertools
import json
import os
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

from tests.server_process import running_server

_MAX_LENGTH = 256
_CAPITALS = {
    "France": "Paris",
    "Japan": "Tokyo",
    "Germany": "Berlin",
    "Italy": "Rome",
    "Spain": "Madrid",
    "Greece": "Athens",
    "Norway": "Oslo",
    "Egypt": "Cairo",
    "Cuba": "Havana",
    "Peru": "Lima",
    "Poland": "Warsaw",
    "Kenya": "Nairobi",
}
_ENDINGS = (
    (
        "She put the kettle on the stove and",
        ("waited for the water to boil.", "flew over the kettle's green sister 🎓."),
    ),
    ("Because it was raining, he", ("took an umbrella with him.", "ate the umbrella with a Grüße of salt.")),
    ("To open the file, the program", ("calls open() with its name.", "calls 漢字 and then sings it a song.")),
    ("The dog saw the cat and", ("ran after it.", "divided it by zero, as café owners do.")),
    ("At night the sky is", ("dark and full of stars.", "a spreadsheet of ten columns.")),
    ("In winter many lakes", ("freeze over.", "learn to read the newspaper.")),
)
_TEXTS = (
    "The sea covers most of the planet. " * 3 + "It is salty, deep and, at its bottom, dark.",
    "def add(a, b):\n    return a + b\n\n\ndef sub(a, b):\n    return a - b\n" * 6,
    "Grüße aus Köln! 漢字とかな、そして 🎓🎓. Ελληνικά; русский текст. café, naïve, œuvre.\n" * 9,
    "One two three four five six seven eight nine ten. " * 40,
)
_CHOICES = (
    "output_type: multiple_choice\ndoc_to_text: '{{question}}'\ndoc_to_target: '{{answer}}'\n"
    "doc_to_choice: '{{choices}}'\n"
)
_ROLLING = (
    "output_type: loglikelihood_rolling\ndoc_to_text: ''\ndoc_to_target: '{{text}}'\n"
    "metric_list:\n  - metric: word_perplexity\n  - metric: byte_perplexity\n  - metric: bits_per_byte\n"
)


def tasks() -> dict[str, tuple[str, list[dict[str, Any]]]]:
    """Of each task what its file says, and its documents."""
    names = list(_CAPITALS.values())
    capitals = [
        {"question": f"Q: What is the capital of {country}?\nA:", "answer": place % 3, "choices": _three(names, place)}
        for place, country in enumerate(_CAPITALS)
    ]
    endings = [
        {"question": begin, "answer": place % 2, "choices": list(ends if place % 2 == 0 else reversed(ends))}
        for place, (begin, ends) in enumerate(_ENDINGS)
    ]
    texts: list[dict[str, Any]] = [{"text": text} for text in _TEXTS]
    return {"capitals": (_CHOICES, capitals), "endings": (_CHOICES, endings), "texts": (_ROLLING, texts)}


def _three(names: list[str], place: int) -> list[str]:
    """Three names; the right one stands at `place` modulo 3."""
    right, others = names[place], [names[(place + 4) % len(names)], names[(place + 7) % len(names)]]
    return [*others[: place % 3], right, *others[place % 3 :]]


def write_tasks(folder: Path) -> None:
    """Write the files of the tasks as the harness reads them."""
    for name, (definition, documents) in tasks().items():
        data = folder / f"{name}.jsonl"
        data.write_text("".join(json.dumps(document) + "\n" for document in documents))
        source = f"task: nanoflow_{name}\ndataset_path: json\ndataset_kwargs:\n  data_files:\n    test: {data}\n"
        source += "test_split: test\n"
        (folder / f"{name}.yaml").write_text(source + definition)


def evaluate(lm_eval: str, model: str, model_args: dict[str, Any], folder: Path) -> dict[str, dict[str, Any]]:
    """Run the harness; return its numbers by task and metric, with each document's log likelihoods as "samples"."""
    out = folder / model
    arguments = ",".join(f"{name}={value}" for name, value in model_args.items())
    names = ",".join(f"nanoflow_{name}" for name in tasks())
    command = [lm_eval, "run", "--model", model, "--model_args", arguments, "--tasks", names, "--log_samples"]
    command += ["--include_path", str(folder), "--output_path", str(out), "--batch_size", "4"]
    offline = {"HF_DATASETS_OFFLINE": "1", "HF_HUB_OFFLINE": "1", "HF_HOME": str(folder / "cache")}
    subprocess.run(command, check=True, env={**os.environ, **offline}, stdout=subprocess.DEVNULL)
    results = json.loads(next(out.rglob("results_*.json")).read_text())["results"]
    numbers: dict[str, dict[str, Any]] = {name: dict(metrics) for name, metrics in results.items()}
    for name in numbers:
        lines = next(out.rglob(f"samples_{name}_*.jsonl")).read_text().splitlines()
        samples = sorted(map(json.loads, lines), key=lambda sample: int(sample["doc_id"]))
        numbers[name]["samples"] = [_likelihoods(sample["filtered_resps"]) for sample in samples]
    return numbers


def _likelihoods(responses: list[Any]) -> list[tuple[float, bool]]:
    """Log likelihood of each answer, and whether it is the greedy one."""
    pairs = [response if isinstance(response, list) else [response, False] for response in responses]
    return [(float(value), str(is_greedy) == "True") for value, is_greedy in pairs]


def compare(ours: dict[str, dict[str, Any]], theirs: dict[str, dict[str, Any]], tolerance: float) -> int:
    """Print each number of both; return how many differ."""
    num_wrong = 0
    for name, metrics in theirs.items():
        for metric, value in metrics.items():
            if isinstance(value, float) and "stderr" not in metric:
                is_same = abs(value - ours[name][metric]) <= tolerance * max(1.0, abs(value))
                num_wrong += not is_same
                print(f"{name:20} {metric:24} here {ours[name][metric]:.6f}  transformers {value:.6f}")
        pairs = [
            (one, other)
            for here, there in zip(ours[name]["samples"], metrics["samples"], strict=True)
            for one, other in zip(here, there, strict=True)
        ]
        error = max(abs(one[0] - other[0]) / max(1.0, abs(other[0])) for one, other in pairs)
        num_greedy = sum(one[1] != other[1] for one, other in pairs)
        print(
            f"{name:20} {len(pairs)} log likelihoods: largest relative error {error:.1e}, {num_greedy} greedy otherwise"
        )
        num_wrong += (error > tolerance) + num_greedy
    return num_wrong


def main() -> int:
    """Evaluate the model twice; return 1 if numbers differ."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("model", help="folder of the model")
    parser.add_argument("--lm-eval", default="lm_eval", help="the harness's command")
    parser.add_argument("--tolerance", type=float, default=1e-4, help="relative (0.0001)")
    args = parser.parse_args()
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        write_tasks(folder)
        model = str(Path(args.model).resolve())
        options = {"--served-model-name": "model", "--dtype": "float32", "--device": "cpu", "--max-model-len": "512"}
        with running_server([model, *itertools.chain(*options.items())]) as server:
            api = {
                "model": "model",
                "base_url": f"{server.root_url}/v1/completions",
                "tokenizer_backend": "huggingface",
                "tokenizer": model,
                # The harness gives an API two tokens less, for its answer.
                "max_length": _MAX_LENGTH + 2,
                "num_concurrent": 2,
            }
            ours = evaluate(args.lm_eval, "local-completions", api, folder)
        hf = {"pretrained": model, "dtype": "float32", "max_length": _MAX_LENGTH}
        theirs = evaluate(args.lm_eval, "hf", hf, folder)
    num_wrong = compare(ours, theirs, args.tolerance)
    print(f"{num_wrong} differences")
    return int(num_wrong > 0)


if __name__ == "__main__":
    sys.exit(main())
