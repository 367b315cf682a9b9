"""Lines of batches, and the server with its worker in one event loop, without a port."""

from __future__ import annotations

import asyncio
import json
from collections.abc import AsyncIterator, Callable, Iterable, Sequence
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any

import httpx
from openai import AsyncOpenAI

from nanoflow.config import ServerConfig
from nanoflow.server.app import create_app
from nanoflow.server.batch_worker import BatchWorker
from nanoflow.server.gate import Gate
from tests.fake_async_engine import FakeAsyncEngine

COMPLETIONS, CHAT = "/v1/completions", "/v1/chat/completions"


def completion(custom_id: str, prompt: str | list[int] = "abc", url: str = COMPLETIONS, **fields: Any) -> bytes:
    """A line of a batch."""
    body = {"prompt": prompt, "max_tokens": 2, **fields}
    return json.dumps({"custom_id": custom_id, "method": "POST", "url": url, "body": body}).encode()


def write(path: Path, lines: Iterable[bytes]) -> Path:
    """A file of lines."""
    path.write_bytes(b"".join(line + b"\n" for line in lines))
    return path


def read(path: Path | bytes) -> list[Any]:
    """The answers in a file."""
    text = path if isinstance(path, bytes) else path.read_bytes()
    return [json.loads(line) for line in text.splitlines()]


@asynccontextmanager
async def server(
    engine: FakeAsyncEngine,
    folder: Path | None,
    *,
    keys: Sequence[str] = (),
    gate: Gate | None = None,
    **options: Any,
) -> AsyncIterator[Callable[[str], AsyncOpenAI]]:
    """A server with a worker; yields a function from an API key to a client of it."""
    config = ServerConfig(
        served_model_name="toy", batch_dir=None if folder is None else str(folder), api_key=tuple(keys), **options
    )
    gate = gate or Gate()
    app = create_app(engine, config, gate=gate)
    worker = None
    if folder is not None:
        store = app.state.batch_store
        running = BatchWorker(app=app, store=store, gate=gate, num_at_once=4, max_lines=50)
        worker = asyncio.create_task(running.run())
    transport = httpx.ASGITransport(app=app)

    def client(key: str = "none") -> AsyncOpenAI:
        http = httpx.AsyncClient(transport=transport)
        return AsyncOpenAI(base_url="http://localhost/v1", api_key=key, http_client=http, max_retries=0)

    try:
        yield client
    finally:
        if worker is not None:
            worker.cancel()
            await asyncio.gather(worker, return_exceptions=True)


async def ended(client: AsyncOpenAI, batch_id: str, *, timeout_s: float = 20.0) -> Any:
    """A batch once it has ended."""
    async with asyncio.timeout(timeout_s):
        while True:
            batch = await client.batches.retrieve(batch_id)
            if batch.status in ("completed", "failed", "cancelled"):
                return batch
            await asyncio.sleep(0.02)
