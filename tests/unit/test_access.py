"""Who may use the server: keys and where they come from, hosts, origins, certificates; what is refused at the start."""

from __future__ import annotations

import asyncio
import subprocess
import sys
from pathlib import Path
from typing import Any

import msgspec
import pytest

from nanoflow.bench.provenance import command
from nanoflow.cli.options import OptionGroup
from nanoflow.config import ConfigError, ServerConfig
from nanoflow.server.door import request_id_of
from nanoflow.server.hosts import Hosts, is_loopback, with_hosts
from nanoflow.server.keys import KeyMiddleware, Keys, with_all_keys
from nanoflow.server.tls import check_tls, uvicorn_arguments

TLS = Path(__file__).parent.parent / "tls"
CERTIFICATE, KEY = str(TLS / "server.pem"), str(TLS / "server.key")


# Keys


def test_keys_of_options_and_file_go_before_those_of_the_environment(tmp_path: Path) -> None:
    path = tmp_path / "keys"
    path.write_text("# of the team\n\n  one  \ntwo\none\n")
    environment = {"NANOFLOW_API_KEY": "three four", "VLLM_API_KEY": "five", "HOME": "/"}
    assert with_all_keys(ServerConfig(api_key_file=str(path), api_key="zero"), dict(environment)).api_key == (
        "zero",
        "one",
        "two",
    )
    assert with_all_keys(ServerConfig(), dict(environment)).api_key == ("three", "four")
    assert with_all_keys(ServerConfig(), {"VLLM_API_KEY": "five"}).api_key == ("five",)
    assert with_all_keys(ServerConfig(), {}).api_key == ()
    with_all_keys(ServerConfig(api_key="zero"), environment)
    assert environment == {"HOME": "/"}, "no process that is started later has them"


@pytest.mark.parametrize(
    ("content", "words"),
    [
        (b"", "holds no key"),
        (b"# nothing\n", "holds no key"),
        (b"good\ns3cret key\n", "line 2: a key has"),
        ("s3cret\u00fc\n".encode(), "line 1: a key has"),
        (b"s3cret\xff", "is no text"),
        (b"s3cret\n" * 200_000, "longer than"),
        (b"s3cret" * 1000, "line 1: a key has"),
    ],
)
def test_a_file_without_usable_keys_is_refused_and_shows_none(tmp_path: Path, content: bytes, words: str) -> None:
    path = tmp_path / "keys"
    path.write_bytes(content)
    with pytest.raises(ConfigError, match=words) as caught:
        with_all_keys(ServerConfig(api_key_file=str(path)), {})
    assert "s3cret" not in str(caught.value)


def test_what_should_hold_a_key_and_does_not_is_no_open_door(tmp_path: Path) -> None:
    for variable in ("NANOFLOW_API_KEY", "VLLM_API_KEY"):
        with pytest.raises(ConfigError, match=f"{variable} is set and holds no key"):
            with_all_keys(ServerConfig(), {variable: " "})
    with pytest.raises(ConfigError, match="cannot be read: No such file"):
        with_all_keys(ServerConfig(api_key_file=str(tmp_path / "none")), {})
    for key in ("", "s3cret key", "s3cr\u00e9t", "s3cret\n", "s" * 2000):
        with pytest.raises(ConfigError, match="api_key: a key has") as caught:
            ServerConfig(api_key=[key])
        assert "s3cr" not in str(caught.value)


def test_keys_are_not_shown_but_reach_other_processes() -> None:
    config = ServerConfig(api_key=["s3cret"])
    assert "s3cret" not in repr(config)
    assert msgspec.json.decode(msgspec.json.encode(config), type=ServerConfig).api_key == ["s3cret"]


def test_a_record_has_no_key_in_its_command() -> None:
    for words in (["--api-key", "s3cret"], ["--api-key=s3cret"]):
        shown = command(["/usr/bin/python3", "bench.py", *words, "--rate", "3"])
        assert "s3cret" not in shown and "***" in shown and shown.endswith("--rate 3")


@pytest.mark.skipif(sys.platform != "linux", reason="other systems keep the command line elsewhere")
def test_keys_disappear_from_the_list_of_processes() -> None:
    program = (
        "import sys; from nanoflow.cli.secrets import hide_arguments; hide_arguments(['s3cret', 'other']); "
        "print(open('/proc/self/cmdline').read().split(chr(0))[-5:])"
    )
    words = ["--api-key", "s3cret", "--api-key=other", "s3cretary"]
    shown = subprocess.run([sys.executable, "-c", program, *words], capture_output=True, text=True, check=True).stdout
    assert shown.strip() == str(["--api-key", "******", "--api-key=*****", "s3cretary", ""])


def test_every_key_is_compared_each_time(monkeypatch: pytest.MonkeyPatch) -> None:
    compared: list[bytes] = []

    def compare(one: bytes, other: bytes) -> bool:
        compared.append(one)
        return one == other

    monkeypatch.setattr("hmac.compare_digest", compare)
    keys = Keys(["a", "b", "c"])
    assert [keys.accept(token) for token in (b"a", b"c", b"d", b"")] == [True, True, False, False]
    assert len(compared) == 12 and b"a" not in compared, "digests"


def passes(raw_path: bytes | None, path: str, method: str = "GET", kind: str = "http", **headers: str) -> bool:
    """True if a request comes through to the application."""
    seen, sent = [], []

    async def app(scope: Any, _receive: Any, _send: Any) -> None:
        seen.append(scope)

    async def send(message: Any) -> None:
        sent.append(message)

    pairs = [(name.encode(), value.encode()) for name, value in headers.items()]
    scope = {"type": kind, "method": method, "path": path, "raw_path": raw_path, "headers": pairs}
    asyncio.run(KeyMiddleware(app, Keys(["key"]))(scope, None, send))  # type: ignore[arg-type]
    assert bool(seen) != bool(sent)
    return bool(seen)


@pytest.mark.parametrize("method", ["GET", "HEAD"])
def test_health_is_open(method: str) -> None:
    assert passes(b"/health", "/health", method)
    assert passes(None, "/health", method), "not every server tells the path as it was sent"


@pytest.mark.parametrize(
    ("raw_path", "path"),
    [
        (b"//health", "//health"),
        (b"/health/", "/health/"),
        (b"/Health", "/Health"),
        (b"/health/../v1/models", "/health/../v1/models"),
        (b"/v1/models/../../health", "/health"),
        (b"/%68ealth", "/health"),
        (b"/health%2e", "/health."),
        (b"/health", "/v1/models"),
        (b"/health;x", "/health;x"),
        (b"/health%00", "/health\0"),
        (b"health", "health"),
        (b"", ""),
        (b"*", "*"),
        (b"/v1/models", "/v1/models"),
    ],
)
def test_nothing_else_is(raw_path: bytes, path: str) -> None:
    assert not passes(raw_path, path)
    assert passes(raw_path, path, authorization="Bearer key"), "what it means is for the routes to say"


@pytest.mark.parametrize("method", ["OPTIONS", "POST", "TRACE", "get"])
def test_health_is_open_to_be_read_alone(method: str) -> None:
    assert not passes(b"/health", "/health", method)


def test_websockets_are_closed() -> None:
    assert not passes(b"/health", "/health", kind="websocket")


@pytest.mark.parametrize("value", ["Bearer key", "bearer key", "BEARER  key ", "bEaReR key"])
def test_the_scheme_is_written_in_any_case(value: str) -> None:
    assert passes(b"/", "/", authorization=value)


@pytest.mark.parametrize(
    "value", ["key", "Basic key", "Bearer", "Bearer ", "Bearer Key", "Bearer key2", "Bearer key key"]
)
def test_what_is_no_key_is_refused(value: str) -> None:
    assert not passes(b"/", "/", authorization=value)


# Hosts


@pytest.mark.parametrize(
    ("host", "is_own"),
    [("127.0.0.1", True), ("127.3.2.1", True), ("localhost", True), ("::1", True), ("0.0.0.0", False)],
)
def test_a_loopback_address_answers_for_names_of_the_loopback(host: str, is_own: bool) -> None:
    assert is_loopback(host) is is_own
    hosts = Hosts(with_hosts(ServerConfig(host=host)).allowed_hosts or ())
    for name in ("localhost", "LOCALHOST", "localhost.", "a.localhost", "127.0.0.1", "127.9.9.9", "[::1]", host):
        assert hosts.allow(name), name
    for name in ("evil.example", "localhost.evil.example", "127.0.0.1.evil.example", "10.0.0.1", "notlocalhost"):
        assert hosts.allow(name) is not is_own, name


def test_everywhere_is_no_loopback() -> None:
    assert not is_loopback("") and not is_loopback("::") and not is_loopback("no.such.host.invalid")


def test_hosts_are_names_suffixes_addresses_and_networks() -> None:
    hosts = Hosts(["API.example.", "*.Inner.example", "10.1.0.0/16", "::1"])
    for name in ("api.example", "a.inner.example", "a.b.inner.example", "10.1.2.3", "[::1]", "[0:0:0:0:0:0:0:1]"):
        assert hosts.allow(name), name
    for name in ("x.api.example", "inner.example", "xinner.example", "10.2.0.1", "[::2]", ""):
        assert not hosts.allow(name), name
    assert Hosts(["10.0.0.1"]).allow("[::ffff:10.0.0.1]")


@pytest.mark.parametrize(
    "host", ["http://a", "a:80", "a/b", "", " ", "*", "a b", "*.", "**.a", "[::1", "a..b", "10.0.0.0/99"]
)
def test_what_is_no_host_cannot_be_allowed(host: str) -> None:
    if host == "*":
        assert ServerConfig(allowed_hosts=[host])
        return
    with pytest.raises(ConfigError, match="is no name of a host"):
        ServerConfig(allowed_hosts=[host])


# Origins, certificates, names


@pytest.mark.parametrize(
    "origin", ["app.example", "https://", "https://a/", "https://a/b", "null", "", "https://u@a", "https://a:x"]
)
def test_what_is_no_origin_cannot_be_allowed(origin: str) -> None:
    with pytest.raises(ConfigError, match="is no origin"):
        ServerConfig(allowed_origins=["https://a.example", origin])


@pytest.mark.parametrize(
    ("files", "words"),
    [
        ({"ssl_certfile": "/none.pem", "ssl_keyfile": KEY}, "ssl_certfile '/none.pem': there is no such file"),
        ({"ssl_certfile": CERTIFICATE, "ssl_keyfile": str(TLS)}, "ssl_keyfile .*: there is no such file"),
        ({"ssl_certfile": CERTIFICATE}, "ssl_keyfile .* holds no private key"),
        ({"ssl_certfile": KEY, "ssl_keyfile": KEY}, "ssl_certfile .* holds no certificate"),
        ({"ssl_certfile": CERTIFICATE, "ssl_keyfile": str(TLS / "client.key")}, "is not that of the certificate"),
        ({"ssl_certfile": CERTIFICATE, "ssl_keyfile": str(TLS / "encrypted.key")}, "is encrypted"),
        (
            {"ssl_certfile": CERTIFICATE, "ssl_keyfile": KEY, "ssl_ca_certs": KEY},
            "ssl_ca_certs .* holds no certificate",
        ),
    ],
)
def test_certificates_that_cannot_be_used_are_refused_in_one_line(files: dict[str, Any], words: str) -> None:
    with pytest.raises(ConfigError, match=words) as caught:
        check_tls(ServerConfig(**files))
    assert "\n" not in str(caught.value)


def test_a_broken_certificate_is_refused(tmp_path: Path) -> None:
    broken = tmp_path / "broken.pem"
    broken.write_text("-----BEGIN CERTIFICATE-----\nAAAA\n-----END CERTIFICATE-----\n")
    with pytest.raises(ConfigError, match="cannot be used"):
        check_tls(ServerConfig(ssl_certfile=str(broken), ssl_keyfile=KEY))
    with pytest.raises(ConfigError, match="its certificates cannot be read"):
        check_tls(ServerConfig(ssl_certfile=CERTIFICATE, ssl_keyfile=KEY, ssl_ca_certs=str(broken)))


def test_parts_of_tls_alone_are_refused() -> None:
    given: list[dict[str, Any]] = [{"ssl_keyfile": KEY}, {"ssl_ca_certs": KEY}]
    for options in given:
        with pytest.raises(ConfigError, match="need ssl_certfile"):
            ServerConfig(**options)
    check_tls(ServerConfig())
    assert uvicorn_arguments(ServerConfig()) == {}


def test_names_may_be_given_several_times() -> None:
    import argparse

    options = OptionGroup(kind=ServerConfig, title="server")
    parser = argparse.ArgumentParser()
    options.add_to(parser)
    words = "--served-model-name a --served-model-name b --api-key k --api-key l --allowed-hosts h --allowed-hosts i"
    config = options.read(parser.parse_args(words.split()))
    assert (config.model_names, list(config.api_key)) == (("a", "b"), ["k", "l"])
    assert list(config.allowed_hosts or ()) == ["h", "i"]
    assert ServerConfig().model_names == ("default",) and ServerConfig(served_model_name="a").model_names == ("a",)
    several: list[Any] = [["a", "a"], ["a", ""], ""]
    for names in several:
        with pytest.raises(ConfigError, match="served_model_name must be different names"):
            ServerConfig(served_model_name=names)


def test_a_sane_request_id_is_kept() -> None:
    assert request_id_of([(b"X-Request-Id", b"a-1:b/c=")]) == "a-1:b/c="
    for value in (b"", b"a b", b"a\r\nset-cookie: x", b"x" * 129, "\u00fc".encode(), b"<a>"):
        assert request_id_of([(b"x-request-id", value)]).startswith("req-")
    assert request_id_of([(b"x-request-id", b"a"), (b"x-request-id", b"b")]).startswith("req-")


def test_caches_of_keys_need_keys() -> None:
    with pytest.raises(ConfigError, match="prefix_cache_per_key needs keys"):
        with_all_keys(ServerConfig(prefix_cache_per_key=True), {})
    assert with_all_keys(ServerConfig(prefix_cache_per_key=True), {"NANOFLOW_API_KEY": "six"}).prefix_cache_per_key
