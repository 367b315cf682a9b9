"""From an `EngineConfig` to a running `Engine`: the one place where all parts are put together."""

from __future__ import annotations

import logging
import sys
import time
from pathlib import Path

import torch

from nanoflow.config import EngineConfig
from nanoflow.device.detect import device_name, local_device, resolve_device, resolve_dtype, use_device
from nanoflow.device.host_memory import bound_host_memory
from nanoflow.engine.engine import Engine
from nanoflow.engine.iteration_times import IterationTimes
from nanoflow.engine.limits import EngineLimits, choose_limits
from nanoflow.engine.memory import require_room_for_weights, reserve_caches, size_cache, wanted_model_len
from nanoflow.engine.messages import BookFacts, EngineFacts, PlanName
from nanoflow.engine.warmup import compile_and_record, time_iterations
from nanoflow.executor.buffers import DeviceModel, draw_keys
from nanoflow.executor.sampler import sampling_bytes
from nanoflow.executor.worker import Worker
from nanoflow.graph.fuse import fuse_swiglu
from nanoflow.graph.graph import OpGraph
from nanoflow.graph.operation import OpKind
from nanoflow.kernels.dispatch import are_capturable, kernels_for
from nanoflow.models.config import ModelConfig
from nanoflow.models.config import load as load_model_config
from nanoflow.models.generation import load_sampling_defaults, named_file
from nanoflow.models.locate import locate_model
from nanoflow.models.presets import preset_config, preset_name
from nanoflow.models.registry import build_graph
from nanoflow.models.weights import check_weights, load_weights, random_weights
from nanoflow.plan.book import PlanBook, StoredBook, load_book
from nanoflow.plan.liveness import workspace_bytes
from nanoflow.plan.plan import PlanError
from nanoflow.plan.sequential import sequential_plan
from nanoflow.scheduler.drafts import Drafter, most_draft_tokens
from nanoflow.scheduler.limits import SchedulerLimits
from nanoflow.scheduler.pace import Pace
from nanoflow.scheduler.scheduler import Scheduler
from nanoflow.speculation import read_speculation

logger = logging.getLogger(__name__)


def build_engine(config: EngineConfig, *, show_progress: bool = False, prepares_plans: bool = True) -> Engine:
    """Load a model and set up the loop around it.

    Args:
        config: All options.
        show_progress: Say on standard error which limits were chosen, and draw bars there.
        prepares_plans: Capture CUDA graphs for the plans of the book before the first request; else when they are met.

    Raises:
        ConfigError, ModelError, PlanError: All ValueErrors with one line that says what is wrong.
    """
    start_s = time.monotonic()
    bound_host_memory()
    if config.num_threads is not None:
        torch.set_num_threads(config.num_threads)
    # 1. What is to run, where, and within which limits. Nothing is loaded yet, so that mistakes are told at once.
    device = resolve_device(config.device)
    use_device(device)
    model_config, folder = resolve_model(config)
    sampling = load_sampling_defaults(config.generation_config, folder)
    dtype = resolve_dtype(config.dtype, model_config.dtype, device)
    graph = build_graph(model_config, config.max_model_len)
    is_random = folder is None or config.load_format == "random"
    if folder is not None and not is_random:
        check_weights(graph, folder)
    kernels = kernels_for(device, dtype, graph.layer)
    if OpKind.LINEAR_SWIGLU in kernels:
        graph = fuse_swiglu(graph)
    stored = None if config.plan is None else load_book(Path(config.plan))
    chosen = engine_limits(config, model_config, graph, dtype, device, stored)
    _tell(chosen.reason, is_shown=show_progress)
    if sampling.fields:
        _tell(str(sampling), is_shown=show_progress)
    warn_of_another(config.plan, stored, config.model, device)
    book = plan_book(config.plan, stored, chosen.max_batch_tokens, graph)
    # 2. Weights, and KV pages in what they leave.
    require_room_for_weights(graph, dtype, device)
    size = f"{graph.num_parameters * dtype.itemsize / 2**30:.2f} GiB as {str(dtype).removeprefix('torch.')}"
    logger.info("%s weights: %s", "drawing random" if is_random else f"reading, from {folder},", size)
    if folder is None or is_random:
        weights = random_weights(graph, dtype, device, config.seed)
    else:
        weights = load_weights(graph, folder, dtype, device, show_progress=show_progress)
    speculation = None if config.speculative is None else read_speculation(config.speculative)
    num_logits = chosen.max_num_seqs + most_draft_tokens(speculation, chosen.max_num_seqs)
    taken_bytes = sampling_bytes(
        chosen.max_num_seqs, graph.vocab_size, device, num_logits=num_logits
    ) + workspace_bytes(
        graph,
        book.plans,
        num_tokens=chosen.max_batch_tokens,
        num_logits=num_logits,
        dtype_bytes=dtype.itemsize,
    )
    num_pages, max_model_len = size_cache(config, chosen, model_config, graph, dtype, device, taken_bytes=taken_bytes)
    caches = reserve_caches(graph, num_pages=num_pages, page_size=config.page_size, dtype=dtype, device=device)
    if is_random and device.type == "cuda":
        draw_keys(caches, config.seed)
    # 3. What runs batches, and what forms them.
    model = DeviceModel(graph=graph, weights=weights, caches=caches, kernels=kernels)
    is_captured = config.cuda_graphs and device.type == "cuda" and are_capturable(kernels)
    worker = Worker(
        model,
        book.plans,
        max_batch_tokens=chosen.max_batch_tokens,
        num_rows=chosen.max_num_seqs,
        max_logits=num_logits,
        captured_pages=-(-max_model_len // config.page_size) if is_captured else None,
    )
    limits = SchedulerLimits(
        max_batch_tokens=chosen.max_batch_tokens,
        max_num_seqs=chosen.max_num_seqs,
        max_model_len=max_model_len,
        num_pages=num_pages,
        page_size=config.page_size,
        vocab_size=graph.vocab_size,
    )
    load_s = time.monotonic() - start_s
    # 4. Whatever can be done before a request waits for it.
    logger.info("%d KV pages of %d tokens", num_pages, config.page_size)
    if device.type == "cuda":
        logger.info("compiling kernels%s", " and recording CUDA graphs" if is_captured else "")
        compile_and_record(worker, book, limits, with_plans=prepares_plans)
    times, pace = None, Pace()
    if chosen.max_itl_ms is not None or speculation is not None:
        if is_captured:
            logger.info("measuring iterations")
        times = IterationTimes(time_iterations(worker, book.fallback, limits) if is_captured else ())
        max_itl_s = None if chosen.max_itl_ms is None else chosen.max_itl_ms / 1e3
        pace = Pace(max_itl_s=max_itl_s, iteration_time=times.estimate)
    facts = EngineFacts(
        model_type=graph.name,
        vocab_size=graph.vocab_size,
        max_model_len=max_model_len,
        eos_token_ids=model_config.eos_token_ids,
        num_pages=num_pages,
        page_size=config.page_size,
        max_batch_tokens=chosen.max_batch_tokens,
        max_num_seqs=chosen.max_num_seqs,
        device=str(device),
        dtype=str(dtype).removeprefix("torch."),
        plan=str(book_facts(book)),
        book=book_facts(book),
        sampling=sampling,
        max_logprobs=graph.vocab_size if config.max_logprobs == -1 else config.max_logprobs,
        limits=chosen,
        load_s=load_s,
        warm_up_s=time.monotonic() - start_s - load_s,
    )
    return Engine(
        facts=facts,
        scheduler=Scheduler(
            limits=limits,
            pace=pace,
            drafts=None if speculation is None else Drafter(speculation, max_num_seqs=chosen.max_num_seqs),
        ),
        worker=worker,
        book=book,
        is_async=config.async_scheduling,
        times=times,
    )


def _tell(line: str, *, is_shown: bool) -> None:
    """Show a line to whoever watches the start; a server says the same by itself when it is ready."""
    logger.debug("%s", line)
    if is_shown:
        print(line, file=sys.stderr)


def resolve_model(config: EngineConfig) -> tuple[ModelConfig, Path | None]:
    """The model that a config names, and its folder; a preset has none, so its weights are always drawn at random.

    Raises:
        ModelError: There is no such model, or its config.json makes no sense.
    """
    preset = preset_name(config.model)
    if preset is None:
        folder = locate_model(config.model, config.revision)
        return load_model_config(folder, named_file(config.generation_config)), folder
    return preset_config(preset), None


def engine_limits(
    config: EngineConfig,
    model_config: ModelConfig,
    graph: OpGraph,
    dtype: torch.dtype,
    device: torch.device,
    book: StoredBook | None = None,
) -> EngineLimits:
    """The limits of an engine on this device, given, from the book, or chosen; before the weights are loaded.

    Raises:
        ConfigError: The model cannot have the length that is asked for.
    """
    return choose_limits(
        config,
        graph,
        local_device(device),
        max_model_len=wanted_model_len(config, model_config),
        dtype_bytes=dtype.itemsize,
        book=book,
    )


def plan_book(path: str | None, stored: StoredBook | None, max_batch_tokens: int, graph: OpGraph) -> PlanBook:
    """The sequential plan, and the plans of the file for the batches that they are for.

    Args:
        path: The file, for messages.
        stored: What stands in it; None without one.
        max_batch_tokens: The token budget.
        graph: What runs the plans.

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
    """Warn if a book was made for other hardware than this, or for another model: its plans are right, but may be slow.

    Models are told apart by the last part of their name, for the same may lie in any folder.
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


def book_facts(book: PlanBook) -> BookFacts:
    """Names and digests of a book's plans."""
    plans = tuple(PlanName(name=plan.name, digest=plan.digest) for plan in book.plans)
    return BookFacts(digest=book.digest, plans=plans)
