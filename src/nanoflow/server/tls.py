"""TLS of the HTTP server: certificate and key are checked at the start, then passed to uvicorn.

`access.py` checks which options must be given together.
"""

from __future__ import annotations

import ssl
from pathlib import Path
from typing import Any

from nanoflow.config import ConfigError, ServerConfig


def check_tls(config: ServerConfig) -> None:
    """Refuse unusable certificates and keys, before the model is loaded.

    Raises:
        ConfigError: A file is missing or has another format, or key and certificate do not match.
    """
    if config.ssl_certfile is None:
        return
    key = config.ssl_keyfile or config.ssl_certfile
    _check_holds("ssl_certfile", config.ssl_certfile, b"CERTIFICATE-----", "certificate")
    _check_holds("ssl_keyfile", key, b"PRIVATE KEY-----", "private key")
    if config.ssl_ca_certs is not None:
        _check_holds("ssl_ca_certs", config.ssl_ca_certs, b"CERTIFICATE-----", "certificate")
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    try:
        context.load_cert_chain(config.ssl_certfile, config.ssl_keyfile, password=_no_password)
    except _EncryptedKeyError:
        raise ConfigError(
            f"the key in {key!r} is encrypted; give one without password (openssl pkey -in FILE)"
        ) from None
    except (ssl.SSLError, OSError) as error:
        raise ConfigError(_cannot_load(config.ssl_certfile, key, error)) from None
    try:
        if config.ssl_ca_certs is not None:
            context.load_verify_locations(config.ssl_ca_certs)
    except (ssl.SSLError, OSError):
        raise ConfigError(f"ssl_ca_certs {config.ssl_ca_certs!r}: its certificates cannot be read") from None


def uvicorn_arguments(config: ServerConfig) -> dict[str, Any]:
    """uvicorn's options for TLS; empty without TLS."""
    if config.ssl_certfile is None:
        return {}
    required = {"ssl_ca_certs": config.ssl_ca_certs, "ssl_cert_reqs": ssl.CERT_REQUIRED}
    return {
        "ssl_certfile": config.ssl_certfile,
        "ssl_keyfile": config.ssl_keyfile,
        **(required if config.ssl_ca_certs is not None else {}),
    }


class _EncryptedKeyError(Exception):
    """OpenSSL asks for a password."""


def _no_password() -> str:
    raise _EncryptedKeyError


def _check_holds(name: str, path: str, mark: bytes, what: str) -> None:
    """Refuse a file that cannot be read, or lacks what it should contain."""
    try:
        if not Path(path).is_file():
            raise ConfigError(f"{name} {path!r}: there is no such file")
        content = Path(path).read_bytes()
    except OSError as error:
        raise ConfigError(f"{name} {path!r} cannot be read: {error.strerror or error}") from None
    if mark not in content:
        raise ConfigError(f"{name} {path!r} holds no {what} (PEM)")


def _cannot_load(certificate: str, key: str, error: Exception) -> str:
    if getattr(error, "reason", None) == "KEY_VALUES_MISMATCH":
        return f"the key in {key!r} is not that of the certificate in {certificate!r}"
    return f"the certificate in {certificate!r} and the key in {key!r} cannot be used"
