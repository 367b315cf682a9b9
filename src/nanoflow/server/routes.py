"""The routes of an application, for errors about a wrong path or method."""

from __future__ import annotations

import difflib
import re
from collections.abc import Iterable

from fastapi import APIRouter, FastAPI
from fastapi.routing import APIRoute


def include(app: FastAPI, routers: Iterable[APIRouter]) -> None:
    """Add the routes of routers to an application, and record them for errors."""
    app.state.places = [route for router in routers for route in router.routes if isinstance(route, APIRoute)]
    for router in routers:
        app.include_router(router)


def no_such_route(app: FastAPI, path: str) -> str:
    """What to say of a path where there is nothing: what there is, and the nearest of it."""
    shown = [route for route in _places(app) if route.include_in_schema]
    near = difflib.get_close_matches(path, [route.path_format for route in shown], n=1, cutoff=0.8)
    hint = f"; did you mean {near[0]}?" if near else ";"
    routes = ", ".join(f"{method} {route.path_format}" for route in shown for method in sorted(route.methods or ()))
    return f"there is nothing at {path}{hint} there are {routes}"


def allowed_methods(app: FastAPI, path: str) -> list[str]:
    """The methods of a path; HEAD is one if GET is."""
    found = {method for route in _places(app) if re.match(route.path_regex, path) for method in route.methods or ()}
    return sorted(found | ({"HEAD"} if "GET" in found else set()))


def _places(app: FastAPI) -> list[APIRoute]:
    places: list[APIRoute] = getattr(app.state, "places", [])
    return places
