"""What a server says of itself: its first model, its metrics, its plans and its settings.

`online.py` puts load on it.
"""

from __future__ import annotations

import urllib.request
from collections.abc import Mapping, Sequence
from typing import Any

import msgspec
from prometheus_client.parser import text_string_to_metric_families

from nanoflow.bench.client import read_address
from nanoflow.bench.online import describe
from nanoflow.bench.options import LoadConfig
from nanoflow.engine.book_facts import BookFacts, PlanName


def served_model(load: LoadConfig) -> str:
    """The name of a server's first model.

    Raises:
        ConnectionError: The server cannot be reached.
    """
    return str(_first_model(load)["id"])


def served_context(load: LoadConfig) -> int | None:
    """The longest prompt plus completion of a server's first model; None if it does not say.

    Raises:
        ConnectionError: The server cannot be reached.
    """
    length = _first_model(load).get("max_model_len")
    return length if isinstance(length, int) else None


def _first_model(load: LoadConfig) -> dict[str, Any]:
    try:
        document = msgspec.json.decode(_get(f"{load.url.rstrip('/')}/models", load.api_key))
        card: dict[str, Any] = document["data"][0]
        return {**card, "id": card["id"]}
    except (OSError, LookupError, TypeError, ValueError) as error:
        raise ConnectionError(f"no OpenAI-compatible server at {load.url}: {describe(error)}") from error


# For each metric: labels and value of its samples.
Samples = Mapping[str, Sequence[tuple[Mapping[str, str], float]]]


def served_metrics(load: LoadConfig) -> Samples:
    """A server's metrics by name, without a prefix that ends in a colon; empty if none can be read."""
    address = read_address(load.url)
    scheme = "https" if address.is_secure else "http"
    try:
        text = _get(f"{scheme}://{address.host}:{address.port}/metrics", load.api_key).decode()
        families = list(text_string_to_metric_families(text))
    except (OSError, ValueError, LookupError):
        return {}
    found: dict[str, list[tuple[Mapping[str, str], float]]] = {}
    for sample in (sample for family in families for sample in family.samples):
        found.setdefault(sample.name.rpartition(":")[2], []).append((sample.labels, sample.value))
    return found


def _get(url: str, api_key: str | None) -> bytes:
    headers = {"Authorization": f"Bearer {api_key}"} if api_key else {}
    # Never through a proxy, like the load.
    opener = urllib.request.build_opener(urllib.request.ProxyHandler({}))
    with opener.open(urllib.request.Request(url, headers=headers), timeout=10) as answer:
        content: bytes = answer.read()
    return content


def served_book(metrics: Samples) -> BookFacts | None:
    """The plan book that a server's metrics name; None if they name none."""
    found = [labels for labels, _ in metrics.get("plan_info", ())]
    if not found or not {"name", "digest", "book"} <= found[0].keys():
        return None
    plans = tuple(PlanName(name=labels["name"], digest=labels["digest"]) for labels in found)
    return BookFacts(digest=found[0]["book"], plans=plans)


def served_settings(metrics: Samples) -> dict[str, Any]:
    """A server's settings from its metrics: the labels of every metric `..._info` with one sample."""
    return {
        name: dict(samples[0][0])
        for name, samples in sorted(metrics.items())
        if name.endswith("_info") and len(samples) == 1 and not name.startswith("python")
    }
