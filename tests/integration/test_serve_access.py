"""The whole server as the command line starts it: TLS, keys and hosts in every front end, and what the start says."""

from __future__ import annotations

import ssl
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import httpx
import pytest

from nanoflow.config import ServerConfig
from nanoflow.server.running import open_to_all
from tests.fake_server import wait_until
from tests.server_process import ServerProcess, launch, start_server

TLS = Path(__file__).parent.parent / "tls"
SERVED = ("--ssl-certfile", str(TLS / "server.pem"), "--ssl-keyfile", str(TLS / "server.key"))


@contextmanager
def serving(*arguments: str, **variables: str) -> Iterator[ServerProcess]:
    """The server around the fake engine, ready."""
    server = launch(sys.executable, "-m", "tests.fake_serve", "default", "--port", "0", *arguments, **variables)
    try:
        server.wait_ready(60)
        yield server
    finally:
        server.stop()


def trusting(*client: str) -> ssl.SSLContext:
    """Trust the certificate of the tests; show another if given."""
    context = ssl.create_default_context(cafile=str(TLS / "server.pem"))
    if client:
        context.load_cert_chain(*client)
    return context


def test_several_front_ends_answer_https_and_want_a_key_and_a_certificate() -> None:
    options = ("--api-servers", "2", *SERVED, "--ssl-ca-certs", str(TLS / "client.pem"))
    known = trusting(str(TLS / "client.pem"), str(TLS / "client.key"))
    with serving(*options, NANOFLOW_API_KEY="s3cret") as server:
        assert server.root_url.startswith("https://127.0.0.1:")
        for _ in range(12):  # connections are dealt out over the front ends
            with httpx.Client(base_url=server.root_url, verify=known) as http:
                assert http.get("/health").status_code == 200
                assert http.get("/v1/models").status_code == 401
                assert http.get("/v1/models", headers={"authorization": "Bearer s3cret"}).status_code == 200
                assert http.get("/health", headers={"host": "evil.example"}).status_code == 403
                assert http.get("/health", headers={"host": "localhost:1"}).status_code == 200
        with pytest.raises(httpx.HTTPError):
            httpx.get(f"{server.root_url}/health", verify=trusting())  # shows no certificate
        with pytest.raises(httpx.ConnectError):
            httpx.get(f"{server.root_url}/health")  # does not trust the server's
        with pytest.raises(httpx.HTTPError):
            httpx.get(f"http{server.root_url.removeprefix('https')}/health")
    assert "s3cret" not in "".join(server.lines)
    assert "Traceback" not in "".join(server.lines)


def test_who_serves_everybody_without_a_key_is_told() -> None:
    with serving("--host", "0.0.0.0", "--api-servers", "1") as server:
        root_url = server.root_url.replace("0.0.0.0", "127.0.0.1")
        assert httpx.get(f"{root_url}/health", headers={"host": "any.example"}).status_code == 200
    (line,) = [line for line in server.lines if "can use the model" in line]
    assert "--api-key-file" in line and "127.0.0.1" in line and server.root_url in line


def test_others_are_not_told() -> None:
    for config in (ServerConfig(), ServerConfig(host="0.0.0.0", api_key="key"), ServerConfig(host="localhost")):
        assert open_to_all(config, "http://0.0.0.0:1") is None


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (("--api-key", "s3cret key"), "api_key: a key has 1 to 1024 printable ASCII characters"),
        (("--api-key-file", "/no/such"), "api_key_file '/no/such' cannot be read"),
        (("--ssl-keyfile", "/no/such"), "need ssl_certfile"),
        (("--ssl-certfile", "/no/such"), "ssl_certfile '/no/such': there is no such file"),
        (("--allowed-hosts", "http://a"), "'http://a' is no name of a host"),
        (("--allowed-origins", "a.example"), "'a.example' is no origin"),
    ],
)
def test_what_cannot_be_used_is_said_in_a_line_before_a_model_is_looked_for(
    arguments: tuple[str, ...], words: str
) -> None:
    server = start_server("/no/such/model", "--port", "0", *arguments)
    assert server.process.wait(30) == 1
    wait_until(lambda: bool(server.lines))
    (line,) = server.lines
    assert line.startswith("nanoflow: error: ") and words in line and "s3cret" not in line
