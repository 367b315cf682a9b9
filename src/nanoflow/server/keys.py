"""API keys: read them, and refuse every request without one except GET /health and what the caller opens.

The check uses the path as it was sent, before it is decoded or normalised: any path but the literal `/health`, and what
is opened, needs a key, whatever routes there are. A key is compared by its digest with all keys each time, so the time
taken reveals nothing. `access.py` says which characters a key may have.
"""

from __future__ import annotations

import dataclasses
import hashlib
import hmac
from collections.abc import Callable, Iterable, Mapping, MutableMapping
from pathlib import Path

from starlette.types import ASGIApp, Receive, Scope, Send

from nanoflow.access import check_key, several
from nanoflow.config import ConfigError, ServerConfig
from nanoflow.server.errors import ApiError

# The second is vLLM's: a server that was protected by it there must not run unprotected here.
KEY_VARIABLES = ("NANOFLOW_API_KEY", "VLLM_API_KEY")
MAX_KEY_FILE_BYTES = 1 << 20
OPEN_PATH = "/health"
OTHER_HEADER = b"x-api-key"


def with_all_keys(config: ServerConfig, environment: MutableMapping[str, str]) -> ServerConfig:
    """The options with the keys of file and environment among `api_key`.

    Keys in options take precedence over those in the environment. The variables are removed from the environment, so
    that processes started later do not inherit them.

    Args:
        config: Options of the server.
        environment: A mapping such as `os.environ`.

    Raises:
        ConfigError: The file cannot be read, or a place for keys has none, or has an invalid key.
    """
    inherited = {name: environment.pop(name) for name in KEY_VARIABLES if name in environment}
    keys = [*several(config.api_key), *(_keys_of_file(config.api_key_file) if config.api_key_file else ())]
    keys = keys or _keys_of_environment(inherited)
    if config.prefix_cache_per_key and not keys:
        raise ConfigError("prefix_cache_per_key needs keys: give api_key or api_key_file")
    return dataclasses.replace(config, api_key=tuple(dict.fromkeys(keys)), api_key_file=None)


def _keys_of_file(path: str) -> list[str]:
    name = f"api_key_file {path!r}"
    try:
        with Path(path).open("rb") as file:
            text = file.read(MAX_KEY_FILE_BYTES + 1).decode()
    except OSError as error:
        raise ConfigError(f"{name} cannot be read: {error.strerror or error}") from None
    except UnicodeDecodeError:
        raise ConfigError(f"{name} is no text") from None
    if len(text) > MAX_KEY_FILE_BYTES:
        raise ConfigError(f"{name} is longer than {MAX_KEY_FILE_BYTES} bytes")
    lines = [(number, line.strip()) for number, line in enumerate(text.splitlines(), 1)]
    keys = [(number, line) for number, line in lines if line and not line.startswith("#")]
    for number, key in keys:
        check_key(key, f"{name}, line {number}")
    if not keys:
        raise ConfigError(f"{name} holds no key")
    return [key for _, key in keys]


def _keys_of_environment(variables: Mapping[str, str]) -> list[str]:
    """The keys in the first variable that is set, separated by white space."""
    for name, value in variables.items():
        keys = value.split()
        if not keys:
            raise ConfigError(f"the environment variable {name} is set and holds no key; unset it to serve without")
        for key in keys:
            check_key(key, f"the environment variable {name}")
        return keys
    return []


class Keys:
    """Keys, kept as digests.

    Args:
        keys: At least one.
    """

    def __init__(self, keys: Iterable[str]) -> None:
        self._digests = [_digest(key.encode()) for key in keys]

    def accept(self, token: bytes) -> bool:
        """True for one of the keys; takes as long for any token of one length."""
        digest, is_known = _digest(token), False
        for known in self._digests:
            is_known |= hmac.compare_digest(known, digest)
        return is_known


def _digest(text: bytes) -> bytes:
    return hashlib.sha256(text).digest()


def salt_of(authorization: str | None, salt: str | None) -> str:
    """A salt for cached pages that only requests with the same key and the same salt have.

    Args:
        authorization: Value of the request's header.
        salt: The request's own; None if it has none.
    """
    _, _, token = (authorization or "").strip().partition(" ")
    return f"{_digest(token.strip().encode()).hex()} {salt or ''}"


class KeyMiddleware:
    """Refuses HTTP requests without a valid key (401), except GET and HEAD of /health, and those that are opened.

    Args:
        app: The application behind it.
        keys: The valid keys.
        opens: Whether an HTTP request needs no key; None opens nothing.
    """

    def __init__(self, app: ASGIApp, keys: Keys, opens: Callable[[Scope], bool] | None = None) -> None:
        self._app = app
        self._keys = keys
        self._opens = opens

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Pass a request on, or refuse it."""
        scope = _with_authorization(scope)
        is_open = scope["type"] == "lifespan" or _is_open(scope) or self._is_opened(scope)
        problem = None if is_open else self._problem(scope)
        if problem is None:
            return await self._app(scope, receive, send)
        error = ApiError(401, problem, code="invalid_api_key")
        return await error.response({"www-authenticate": "Bearer"})(scope, receive, send)

    def _is_opened(self, scope: Scope) -> bool:
        return scope["type"] == "http" and self._opens is not None and self._opens(scope)

    def _problem(self, scope: Scope) -> str | None:
        values = [value for name, value in scope["headers"] if name.lower() == b"authorization"]
        scheme, _, token = values[0].strip().partition(b" ") if len(values) == 1 else (b"", b"", b"")
        is_known = self._keys.accept(token.strip())
        if len(values) > 1:
            return "there is more than one Authorization header"
        if scheme.lower() != b"bearer":
            return "this server needs an API key: send the header 'Authorization: Bearer KEY'"
        return None if is_known else "the API key is not known to this server"


def _with_authorization(scope: Scope) -> Scope:
    """The request with the key of a header `x-api-key`, as clients of Anthropic's API send it, where all look for it.

    A header `Authorization` counts before it. Several keys are left for `_problem` to refuse.
    """
    headers = scope.get("headers", ())
    if any(name.lower() == b"authorization" for name, _ in headers):
        return scope
    found = [(b"authorization", b"Bearer " + value) for name, value in headers if name.lower() == OTHER_HEADER]
    return {**scope, "headers": [*headers, *found]} if found else scope


def _is_open(scope: Scope) -> bool:
    """True for a request that needs no key; both the path as sent and the decoded path are checked."""
    sent = scope.get("raw_path")
    is_health = scope["path"] == OPEN_PATH and (sent is None or sent == OPEN_PATH.encode())
    return is_health and scope["type"] == "http" and scope["method"] in ("GET", "HEAD")
