"""The page at /docs: routes and fields of the OpenAPI document, in HTML that loads nothing from other servers.

It has no scripts and no external style sheets, so it works without the internet; its content policy forbids them.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from html import escape
from typing import Any

from fastapi import APIRouter, FastAPI, Request
from starlette.responses import HTMLResponse

from nanoflow.server.service import Service

Schema = Mapping[str, Any]

_HEADERS = {
    "content-security-policy": "default-src 'none'; style-src 'unsafe-inline'; frame-ancestors 'none'",
    "x-content-type-options": "nosniff",
}
_STYLE = """
body { font: 15px/1.5 system-ui, sans-serif; max-width: 60rem; margin: 2rem auto; padding: 0 1rem }
code, pre { font: 13px/1.5 ui-monospace, monospace } pre { background: #8882; padding: .7rem; overflow: auto }
td { vertical-align: top; padding: .1rem .8rem .1rem 0 } h2 { margin: 2rem 0 .3rem; font-size: 1.1rem }
:root { color-scheme: light dark }
"""


def docs_router(app: FastAPI, service: Service) -> APIRouter:
    """The route of the page.

    Args:
        app: The application whose routes are shown.
        service: The service whose model is in the example.
    """
    router = APIRouter()

    @router.get("/docs", include_in_schema=False, response_class=HTMLResponse)
    async def docs(request: Request) -> HTMLResponse:
        """The page."""
        return HTMLResponse(page(app.openapi(), str(request.base_url), service.model_name), headers=_HEADERS)

    return router


def page(document: Schema, root_url: str, model_name: str) -> str:
    """The whole page.

    Args:
        document: The OpenAPI document.
        root_url: URL of the server, for the example.
        model_name: Model name, for the example.
    """
    data = f'{{"model": "{model_name}", "prompt": "import ", "max_tokens": 16}}'
    example = f"curl {root_url}v1/completions -H 'content-type: application/json' \\\n     -d '{data}'"
    about = f"{document['info'].get('summary', '')}, version {document['info']['version']}"
    parts = [
        f"<p>{escape(about)}. The same for programs: <a href='openapi.json'>openapi.json</a>.</p>",
        f"<pre>{escape(example)}</pre>",
        *(_route(document, path, method, route) for path, method, route in _routes(document)),
    ]
    title = escape(document["info"]["title"])
    head = f"<meta charset='utf-8'><title>{title}</title><style>{_STYLE}</style>"
    return f"<!doctype html><html lang='en'><head>{head}</head><body><h1>{title}</h1>{''.join(parts)}</body></html>"


def _routes(document: Schema) -> Iterator[tuple[str, str, Schema]]:
    for path, methods in document["paths"].items():
        for method, route in methods.items():
            yield path, method.upper(), route


def _route(document: Schema, path: str, method: str, route: Schema) -> str:
    body = route.get("requestBody", {}).get("content", {}).get("application/json", {}).get("schema")
    rows = "" if body is None else "".join(_rows(document, body))
    heading = f"<h2><code>{method} {escape(path)}</code></h2><p>{escape(route.get('description', ''))}</p>"
    return heading + (f"<table>{rows}</table>" if rows else "")


def _rows(document: Schema, schema: Schema) -> Iterator[str]:
    """A row for each field of a body, required ones first; fields without effect have no row."""
    body = _resolved(document, schema)
    required = set(body.get("required", ()))
    for name, field in sorted(body.get("properties", {}).items(), key=lambda item: item[0] not in required):
        text = field.get("description", "")
        if not text.startswith("Accepted and ignored"):
            needed = "required" if name in required else ""
            cells = (f"<code>{escape(name)}</code>", escape(_kind(document, field)), needed, escape(text))
            yield f"<tr>{''.join(f'<td>{cell}</td>' for cell in cells)}</tr>"


def _kind(document: Schema, field: Schema) -> str:
    """The type of a field, in a few words."""
    choices = [choice for choice in field.get("anyOf", field.get("oneOf", ())) if choice.get("type") != "null"]
    if choices:
        return " or ".join(dict.fromkeys(_kind(document, choice) for choice in choices))
    if "$ref" in field:
        return str(field["$ref"]).rpartition("/")[2]
    if field.get("type") == "array":
        return f"list of {_kind(document, field.get('items', {}))}"
    if "enum" in field or "const" in field:
        return " or ".join(map(repr, field.get("enum", [field.get("const")])))
    bounds = [format(field[name], "g") for name in ("minimum", "maximum") if name in field]
    return f"{field.get('type', 'any')}{f' ({bounds[0]} to {bounds[1]})' if len(bounds) == 2 else ''}"


def _resolved(document: Schema, schema: Schema) -> Schema:
    name = str(schema.get("$ref", "")).rpartition("/")[2]
    resolved: Schema = document["components"]["schemas"][name] if name else schema
    return resolved
