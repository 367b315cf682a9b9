"""The page at /: a conversation with the model, and what the server does now, for a browser.

Its files are in `page_files/`. They load nothing from other servers, and the content policy forbids it. The page itself
holds nothing secret and needs no API key: it asks its reader for one, and sends it with its requests. Programs that do
not ask for HTML get a few words in JSON at /, for which they need a key like everywhere.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

from fastapi import APIRouter, Request, Response
from starlette.types import Scope

from nanoflow.server.errors import ApiError, json_response
from nanoflow.server.responses import RootResponse
from nanoflow.server.service import Service

ROOT = "/"
FOLDER = Path(__file__).with_name("page_files")
_INDEX = "index.html"
_TYPES = {
    ".html": "text/html; charset=utf-8",
    ".css": "text/css; charset=utf-8",
    ".js": "text/javascript; charset=utf-8",
    ".svg": "image/svg+xml",
}
# Scripts, styles and pictures of this server alone, no inline code, and no text that becomes markup (Trusted Types).
POLICY = "; ".join(
    (
        "default-src 'none'",
        *(f"{kind}-src 'self'" for kind in ("script", "style", "img", "connect")),
        *(f"{what} 'none'" for what in ("base-uri", "form-action", "frame-ancestors", "trusted-types")),
        "require-trusted-types-for 'script'",
    )
)
HEADERS = {
    "content-security-policy": POLICY,
    "x-content-type-options": "nosniff",
    "referrer-policy": "no-referrer",
    "cache-control": "no-cache",
    "vary": "accept",
}
# The path of each file.
PATHS: Mapping[str, str] = {
    ROOT if path.name == _INDEX else f"/page/{path.name}": path.name
    for path in sorted(FOLDER.iterdir())
    if path.suffix in _TYPES
}


def is_of_page(scope: Scope) -> bool:
    """True if an HTTP request reads the page or one of its files, by exactly their path."""
    sent = scope.get("raw_path")
    is_path = scope["path"] in PATHS and (sent is None or sent == scope["path"].encode())
    return is_path and scope["method"] in ("GET", "HEAD") and (scope["path"] != ROOT or _takes_html(scope))


def page_router(service: Service) -> APIRouter:
    """The routes of the page, and of what programs get in its place."""
    router = APIRouter(include_in_schema=False)
    is_shown = not service.config.disable_page

    @router.get(ROOT)
    async def root(request: Request) -> Response:
        """The page, or where to go from here in JSON."""
        if is_shown and _takes_html(request.scope):
            return _file(_INDEX)
        answer: RootResponse = {"name": "nanoflow", "model": service.model_name, "api": "/v1", "docs": "/docs"}
        return json_response(answer, headers={"vary": "accept"})

    @router.get("/page/{name}")
    async def file(name: str) -> Response:
        """A file of the page."""
        path = f"/page/{name}"
        if not is_shown or path not in PATHS:
            raise ApiError(404, f"there is nothing at {path[:100]}", code="unknown_url")
        return _file(PATHS[path])

    return router


def _file(name: str) -> Response:
    path = FOLDER / name
    return Response(path.read_bytes(), headers=HEADERS, media_type=_TYPES[path.suffix])


def _takes_html(scope: Scope) -> bool:
    """True if the sender asks for HTML by name, as browsers do."""
    accepted = b",".join(value for name, value in scope["headers"] if name.lower() == b"accept")
    return any(kind.partition(b";")[0].strip().lower() == b"text/html" for kind in accepted.split(b","))
