"""The line of statistics, what an engine says while it loads, and chat templates that are tried at the start."""

from __future__ import annotations

import asyncio
import logging
from pathlib import Path

import pytest
import torch

from nanoflow.config import EngineConfig
from nanoflow.engine.messages import EngineStats, Told
from nanoflow.engine.own_book import warn_of_another
from nanoflow.engine.telling import told
from nanoflow.engine.template_probe import template_problem
from nanoflow.engine.tokenizer import load_tokenizer
from nanoflow.plan.book import MadeFor, StoredBook
from nanoflow.server.metrics import ServerMetrics
from nanoflow.server.stats_log import TokenCounts, log_stats, stats_line
from tests.fake_async_engine import FakeAsyncEngine
from tests.toy_models import write_toy_model


def test_the_line_says_rates_of_its_span_and_the_state_at_its_end() -> None:
    stats = EngineStats(num_running=3, num_waiting=2, pages_in_use=25, num_pages=100)
    before, after = TokenCounts(prompt=100, generated=10), TokenCounts(prompt=600, generated=1010)
    assert stats_line(stats, before, after, 10.0) == (
        "running 3, waiting 2; prompt 50.0 tokens/s, generation 100.0 tokens/s; KV cache 25.0% in use"
    )
    assert "KV cache 0.0%" in stats_line(EngineStats(), before, after, 10.0)


def test_there_are_lines_while_there_is_work_and_none_while_there_is_none(caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level(logging.INFO)
    engine = FakeAsyncEngine()
    metrics = ServerMetrics(engine, prefix="nanoflow", model_name="toy")

    async def run() -> list[int]:
        counts = []
        task = asyncio.create_task(log_stats(engine, metrics, 0.03))
        for num_tokens in (0, 5, 0):
            await asyncio.sleep(0.07)
            counts.append(len(caplog.records))
            metrics.observe_tokens(num_tokens)
        engine.num_running = 1  # a prompt that takes long: nothing is generated, and yet there is work
        await asyncio.sleep(0.1)
        task.cancel()
        return [*counts, len(caplog.records)]

    idle, _, worked, running = asyncio.run(run())
    assert (idle, worked) == (0, 1) and running >= 3


def test_what_is_said_while_loading_is_handed_on() -> None:
    sent: list[Told] = []
    with told(sent.append):
        logging.getLogger("nanoflow.engine.build").info("reading %d", 3)
        logging.getLogger("nanoflow.models").warning("odd")
        logging.getLogger("nanoflow.models").debug("much")
    logging.getLogger("nanoflow.models").error("later")
    assert [(one.level, one.text) for one in sent] == [(logging.INFO, "reading 3"), (logging.WARNING, "odd")]


def test_a_book_of_another_model_or_card_warns_with_both_names(caplog: pytest.LogCaptureFixture) -> None:
    book = StoredBook(entries=(), made_for=MadeFor(model="preset:llama-3-8b", gpu="NVIDIA H200"))
    warn_of_another("book.json", book, "/models/Qwen3-0.6B/", torch.device("cpu"))
    card, model = (record.getMessage() for record in caplog.records)
    assert "1 x NVIDIA H200" in card and "runs on 1 x " in card
    assert "preset:llama-3-8b" in model and "/models/Qwen3-0.6B/" in model
    caplog.clear()
    warn_of_another("book.json", book, "/models/Llama-3-8B", torch.device("cpu"))
    assert len(caplog.records) == 1, "the card alone"


@pytest.mark.parametrize(
    ("template", "words"),
    [
        ("{% for m in messages %}{{ m.content }}{% endfor %}", None),
        ("{% if messages[0].role == 'user' %}{{ raise_exception('no') }}{% endif %}{{ messages }}", None),
        ("{% for m in messages %}{{ m.content | no_such_filter }}{% endfor %}", "no_such_filter"),
        ("{% for m in messages %}{{ m.content }}", "endfor"),
        ("{{ messages[0].nothing.at_all }}", "nothing"),
    ],
)
def test_a_template_is_broken_if_it_renders_no_conversation(tmp_path: Path, template: str, words: str | None) -> None:
    tokenizer = load_tokenizer(EngineConfig(model=str(write_toy_model(tmp_path)), chat_template=template))
    assert tokenizer is not None
    problem = template_problem(tokenizer)
    tokenizer.close()
    assert problem is None if words is None else problem is not None and words in problem and "\n" not in problem
