"""The server on a real socket, in a thread of its own, with an engine without a model."""

from __future__ import annotations

import asyncio
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import httpx
import uvicorn
from starlette.types import ASGIApp

from nanoflow.config import ServerConfig
from nanoflow.server.answering import http_protocol
from nanoflow.server.app import create_app
from nanoflow.server.listen import bind, url
from tests.fake_async_engine import FakeAsyncEngine

CHAT = [{"role": "user", "content": "hi"}]


@contextmanager
def served(engine: FakeAsyncEngine, config: ServerConfig | None = None, *, http: Any = None) -> Iterator[str]:
    """Start a server for the engine in a thread; yields its root URL. `http` replaces the server's HTTP protocol."""
    with listening(
        create_app(engine, config or ServerConfig(served_model_name="toy", heartbeat_timeout_s=5.0)), http
    ) as root:
        yield root


@contextmanager
def listening(app: ASGIApp, http: Any = None) -> Iterator[str]:
    """The same for an application."""
    server = uvicorn.Server(
        uvicorn.Config(app, http=http or http_protocol(), ws="none", log_level="warning", timeout_graceful_shutdown=1)
    )
    with bind("127.0.0.1", 0)[0] as listener:
        thread = threading.Thread(target=lambda: asyncio.run(server.serve(sockets=[listener])))
        thread.start()
        wait_until(lambda: server.started)
        try:
            yield url(listener)
        finally:
            server.should_exit = True
            thread.join()


def wait_until(is_true: Callable[[], bool], timeout_s: float = 5.0) -> None:
    deadline_s = time.monotonic() + timeout_s
    while not is_true():
        assert time.monotonic() < deadline_s, "waited too long"
        time.sleep(0.01)


def complete(http: httpx.Client, **fields: Any) -> Any:
    answer = http.post("/v1/completions", json={"prompt": "abc", **fields})
    assert answer.status_code == 200, answer.text
    return answer.json()


def error_of(answer: httpx.Response) -> Any:
    error = answer.json()["error"]
    assert set(error) == {"message", "type", "param", "code"}
    return error
