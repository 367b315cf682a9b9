"""guidellm: its benchmark command for a few seconds, over completions and chats; every request must succeed."""

from __future__ import annotations

import json
import subprocess
import sys
import tempfile
from pathlib import Path


def main(root_url: str, key: str, tokenizer: str) -> None:
    """Run the benchmark and look at its report."""
    for request_format in ("/v1/completions", "/v1/chat/completions"):
        with tempfile.TemporaryDirectory() as folder:
            report = Path(folder) / "report.json"
            command = [
                *(str(Path(sys.executable).parent / "guidellm"), "run", "--disable-console"),
                *("--backend", f"kind=openai_http,target={root_url},api_key={key},request_format={request_format}"),
                *("--tokenizer", f"kind=huggingface_auto,model={tokenizer}", "--profile", "kind=synchronous"),
                *("--data", "kind=synthetic_text,prompt_tokens=32,output_tokens=8"),
                *("--constraint", "kind=max_requests,count=4", "--output", f"kind=json,path={report}"),
            ]
            subprocess.run(command, check=True)
            totals = json.loads(report.read_text())["benchmarks"][0]["metrics"]["request_totals"]
            assert totals["successful"] == 4 and totals["errored"] == 0, totals


if __name__ == "__main__":
    main(*sys.argv[1:4])
