"""The main job in one minute: start the server on the embedded model, ask it with the official openai client.

Run by `make demo`. Takes a free port on the loopback address and stops the server when it is done.
"""

from __future__ import annotations

import re
import subprocess
import sys
import time

from openai import OpenAI

PROMPT = "def "


def start_server() -> tuple[subprocess.Popen[str], str]:
    """Start `nanoflow serve` on a free port; returns the process and the base URL it prints when it is ready."""
    command = [sys.executable, "-m", "nanoflow", "serve", "--port", "0", "--log-level", "warning"]
    print("$ nanoflow serve --port 0")
    server = subprocess.Popen(command, stdout=subprocess.PIPE, text=True)
    assert server.stdout is not None
    for line in server.stdout:
        print(line, end="")
        if found := re.search(r"http://[^\s/]+/v1", line):
            return server, found.group()
    raise SystemExit(f"demo: the server ended with exit code {server.wait()} before it was ready")


def ask(client: OpenAI, model: str) -> None:
    """Stream one completion and print its speed."""
    print(f"\n$ openai: completions.create(prompt={PROMPT!r}, stream=True)\n\n{PROMPT}", end="")
    start_s = time.perf_counter()
    stream = client.completions.create(
        model=model,
        prompt=PROMPT,
        max_tokens=200,
        temperature=0.7,
        top_p=0.9,
        seed=7,
        stream=True,
        stream_options={"include_usage": True},
    )
    first_s, num_tokens = 0.0, 0
    for chunk in stream:
        first_s = first_s or time.perf_counter() - start_s
        if chunk.choices:
            print(chunk.choices[0].text, end="", flush=True)
        if chunk.usage:
            num_tokens = chunk.usage.completion_tokens
    total_s = time.perf_counter() - start_s
    print(f"\n\n{num_tokens} tokens, {num_tokens / total_s:.0f} tokens/s, first token after {first_s * 1e3:.0f} ms")


def main() -> None:
    """Run the demonstration."""
    server, base_url = start_server()
    try:
        client = OpenAI(base_url=base_url, api_key="none")
        model = client.models.list().data[0].id
        ask(client, model)
    finally:
        server.terminate()
        server.wait(timeout=30)


if __name__ == "__main__":
    main()
