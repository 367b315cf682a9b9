"""The benchmark of the front end's share of a token runs and writes what it found."""

from __future__ import annotations

import json
from pathlib import Path

from benchmarks.engine import detokenize


def test_every_case_is_measured_behind_few_and_many_tokens(tmp_path: Path) -> None:
    file = tmp_path / "found.json"
    options = ["--requests", "3", "--iterations", "16", "--tokens-before", "2", "40", "--repeats", "1"]
    assert detokenize.main([*options, "--json", str(file)]) == 0
    found = json.loads(file.read_text())
    assert [(row["case"], row["tokens_before"]) for row in found["cases"]] == [
        (case, num_before) for case in detokenize.CASES for num_before in (2, 40)
    ]
    assert all(row["process_us"] > 0 and row["token_us"] >= row["process_us"] for row in found["cases"])
    assert all(us > 0 for us in found["ways"].values()) and "bytes, 1 at once" in found["ways"]
