"""Ask a server through the client libraries that people use, and say which versions get along with it.

Makes a virtual environment and a folder of Node packages where there are none, starts `nanoflow serve` with the
embedded model and a key, and runs the scripts in `client_checks/`. What cannot be installed is skipped by name.
`make clients` does that; with `--record` the table in docs/clients.md is written anew.
"""

from __future__ import annotations

import argparse
import os
import re
import shutil
import socket
import subprocess
import sys
import time
import urllib.request
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
CHECKS = ROOT / "tools/client_checks"
PAGE = ROOT / "docs/clients.md"
KEY = "sk-of-the-check"
TIMEOUT_S = 300


@dataclass(frozen=True, slots=True, kw_only=True)
class Client:
    """A library and the script that asks through it.

    Attributes:
        name: Of the package.
        script: In `client_checks`.
        about: What is asked.
        more: Further arguments of the script.
    """

    name: str
    script: str
    about: str
    more: Sequence[str] = ()


NODE = Client(name="openai (Node)", script="ask_openai.mjs", about="completions, chats, streams, models, ids, errors")
EXAMPLE = Client(name="vLLM's example", script="ask_vllm_example.py", about="`LLM` and `SamplingParams`, in process")
PYTHON = (
    Client(
        name="openai",
        script="ask_openai.py",
        about="completions, chats, responses, streams, models, raw answers, errors; plain and asynchronous",
    ),
    Client(
        name="anthropic",
        script="ask_anthropic.py",
        about="messages, streams, counts of tokens, errors; plain and asynchronous",
    ),
    Client(
        name="langchain-openai",
        script="ask_langchain.py",
        about="chats and completions, invoked, streamed, in batches, asynchronous; errors",
    ),
    Client(
        name="litellm",
        script="ask_litellm.py",
        about="as `openai`, `hosted_vllm` and `text-completion-openai`; errors that its fallbacks look for",
    ),
    Client(
        name="guidellm",
        script="ask_guidellm.py",
        about="a benchmark over completions and one over chats",
        more=(str(ROOT / "src/nanoflow/default_model"),),
    ),
)


@dataclass(frozen=True, slots=True, kw_only=True)
class Outcome:
    """How it went with one client; `version` is None for what could not be installed."""

    client: Client
    version: str | None
    is_good: bool
    said: str = ""


def main() -> int:
    """Run all checks; 1 if one fails."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--folder", type=Path, default=ROOT / ".venv-clients", help="Where clients are installed")
    parser.add_argument("--record", action="store_true", help="Write the table in docs/clients.md")
    args = parser.parse_args()
    install(args.folder)
    with server() as root_url:
        outcomes = [ask(client, args.folder, root_url) for client in (*PYTHON, NODE, EXAMPLE)]
    for outcome in outcomes:
        state = "skipped: not installed" if outcome.version is None else ("passed" if outcome.is_good else "FAILED")
        print(f"{outcome.client.name:<18}{outcome.version or '':<12}{state}\n{outcome.said}", end="")
    if args.record:
        PAGE.write_text(with_table(PAGE.read_text(), outcomes))
    return int(any(outcome.version is not None and not outcome.is_good for outcome in outcomes))


def install(folder: Path) -> None:
    """Install what is not there, each for itself, so that one that cannot be installed does not take others along."""
    python = folder / "bin/python"
    if not python.exists():
        subprocess.run([sys.executable, "-m", "venv", str(folder)], check=True)
    for client in PYTHON:
        if version_of(client, folder) is None:
            # As the environment of the tests: on a machine without a GPU the CPU build of torch.
            limits = [] if shutil.which("nvidia-smi") else ["-c", str(ROOT / "constraints-cpu.txt")]
            subprocess.run([str(python), "-m", "pip", "install", "-q", *limits, client.name], check=False)
    if version_of(NODE, folder) is None and shutil.which("npm"):
        subprocess.run(["npm", "install", "--silent", "--prefix", str(folder / "node"), "openai"], check=False)


def version_of(client: Client, folder: Path) -> str | None:
    """The version of a client that is installed."""
    if client is EXAMPLE:
        return subprocess.run(
            [sys.executable, "-c", "import nanoflow; print(nanoflow.__version__)"], capture_output=True, text=True
        ).stdout.strip()
    if client is NODE:
        package = folder / "node/node_modules/openai/package.json"
        found = re.search(r'"version": "([^"]+)"', package.read_text()) if package.exists() else None
        return found[1] if found and shutil.which("node") else None
    program = f"from importlib.metadata import version; print(version({client.name!r}))"
    said = subprocess.run([str(folder / "bin/python"), "-c", program], capture_output=True, text=True, env=clean())
    return said.stdout.strip() or None


def clean() -> dict[str, str]:
    """The environment without this project's own modules, and without ways to other models."""
    kept = {name: value for name, value in os.environ.items() if name != "PYTHONPATH" and "API_KEY" not in name}
    return {**kept, "HF_HUB_OFFLINE": "1", "PYTHONDONTWRITEBYTECODE": "1"}


@contextmanager
def server() -> Iterator[str]:
    """Root URL of a server that is ready."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        root_url = f"http://127.0.0.1:{free.getsockname()[1]}"
    command = [sys.executable, "-m", "nanoflow", "serve", "default", "--port", root_url.rpartition(":")[2]]
    process = subprocess.Popen([*command, "--api-key", KEY])
    try:
        deadline_s = time.monotonic() + TIMEOUT_S
        while not is_healthy(root_url):
            if process.poll() is not None or time.monotonic() > deadline_s:
                raise RuntimeError("the server did not get ready")
            time.sleep(0.2)
        yield root_url
    finally:
        process.terminate()
        process.wait(30)


def is_healthy(root_url: str) -> bool:
    """True once the server answers."""
    try:
        with urllib.request.urlopen(f"{root_url}/health", timeout=5) as answer:
            return bool(answer.status == 200)
    except OSError:
        return False


def ask(client: Client, folder: Path, root_url: str) -> Outcome:
    """Run the script of a client."""
    version = version_of(client, folder)
    if version is None:
        return Outcome(client=client, version=None, is_good=False)
    script, environment, where = CHECKS / client.script, clean(), None
    interpreter = str(folder / "bin/python")
    if client is EXAMPLE:
        interpreter, environment = sys.executable, dict(os.environ)
    elif client is NODE:
        # Node looks for packages beside the script.
        interpreter, where = "node", folder / "node"
        script = Path(shutil.copy(script, where))
    command = [interpreter, str(script), root_url, KEY, *client.more]
    try:
        done = subprocess.run(command, capture_output=True, text=True, timeout=TIMEOUT_S, env=environment, cwd=where)
    except subprocess.TimeoutExpired:
        return Outcome(client=client, version=version, is_good=False, said=f"not done after {TIMEOUT_S} s\n")
    is_good = done.returncode == 0
    return Outcome(client=client, version=version, is_good=is_good, said="" if is_good else done.stdout + done.stderr)


def with_table(page: str, outcomes: Sequence[Outcome]) -> str:
    """A page with the outcomes in its table."""
    rows = [
        f"| {one.client.name} | {one.version or 'not installed'} | {'passes' if one.is_good else 'does not pass'} | "
        f"{one.client.about} |"
        for one in outcomes
    ]
    table = "\n".join(["| client | version | | what is asked |", "| --- | --- | --- | --- |", *rows])
    return re.sub(r"(<!-- clients -->\n).*?(<!-- /clients -->)", rf"\1{table}\n\2", page, flags=re.DOTALL)


if __name__ == "__main__":
    sys.exit(main())
