"""The plan book of an engine: that of the file, with the sequential plan as its fallback, and what is said of it.

`plan/book.py` chooses the plan of a batch; `build.py` reads the file.
"""

from __future__ import annotations

import logging

import torch

from nanoflow.device.detect import device_name
from nanoflow.engine.book_facts import BookFacts, PlanName
from nanoflow.graph.graph import OpGraph
from nanoflow.plan.book import PlanBook, StoredBook
from nanoflow.plan.dependencies import waits_in_period
from nanoflow.plan.plan import PlanError
from nanoflow.plan.sequential import sequential_plan

logger = logging.getLogger(__name__)


def plan_book(path: str | None, stored: StoredBook | None, max_batch_tokens: int, graph: OpGraph) -> PlanBook:
    """The plan book of an engine: the sequential plan as the fallback, and the entries of the file.

    Args:
        path: The file, for messages.
        stored: The content of the file; None without one.
        max_batch_tokens: The token budget.
        graph: The model's operations as the engine runs them.

    Raises:
        PlanError: The file has a plan that cannot run here; the message names the file.
    """
    fallback = sequential_plan(graph, max_batch_tokens)
    if stored is None:
        return PlanBook(fallback=fallback)
    try:
        return stored.with_fallback(fallback, graph)
    except PlanError as error:
        raise PlanError(f"{path}: {error}") from None


def warn_of_another(path: str | None, stored: StoredBook | None, model: str, device: torch.device) -> None:
    """Warn if a book was made for other hardware or another model: its plans give right results, but may be slow.

    Models are compared by the last part of their name, since the same model may be in any folder.
    """
    made_for = None if stored is None else stored.made_for
    if made_for is None:
        return
    here = f"1 x {device_name(device)}"
    if made_for.hardware != here:
        logger.warning("%s is for %s and runs on %s: its plans may be slow", path, made_for.hardware, here)
    if _last_part(made_for.model) != _last_part(model):
        logger.warning("%s is for %s and runs %s: its plans may be slow", path, made_for.model, model)


def _last_part(model: str) -> str:
    return model.removeprefix("preset:").rstrip("/").rpartition("/")[2].lower()


def book_facts(book: PlanBook, graph: OpGraph | None = None) -> BookFacts:
    """Names and digests of a book's plans; with the graph that they order also the plans as a whole, to be drawn."""
    plans = tuple(PlanName(name=plan.name, digest=plan.digest) for plan in book.plans)
    if graph is None:
        return BookFacts(digest=book.digest, plans=plans)
    return BookFacts(
        digest=book.digest,
        plans=plans,
        contents=book.plans,
        waits={plan.digest: waits_in_period(plan, graph) for plan in book.plans},
        resources={operation.name: operation.resource.value for operation in graph.layer},
    )
