"""From an `EngineConfig` to a running `Engine`: the only place where all parts are put together."""

from __future__ import annotations

import logging
import sys
import time
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import torch

from nanoflow.config import EngineConfig
from nanoflow.device.detect import local_device, resolve_device, resolve_dtype, use_device
from nanoflow.device.host_memory import bound_host_memory
from nanoflow.device.transfer import StagedCopier
from nanoflow.engine.engine import Engine
from nanoflow.engine.iteration_times import IterationTimes
from nanoflow.engine.kv_publisher import publishing
from nanoflow.engine.limits import EngineLimits, choose_limits
from nanoflow.engine.memory import require_room_for_weights, reserve_caches, said_pools, size_cache, wanted_model_len
from nanoflow.engine.messages import EngineFacts
from nanoflow.engine.own_book import book_facts, plan_book, warn_of_another
from nanoflow.engine.precision import graph_of
from nanoflow.engine.tier_memory import TierMemory, fingerprint_of, opened_tiers, staging_bytes
from nanoflow.engine.vocabulary import vocabulary_of
from nanoflow.engine.warmup import compile_and_record, time_iterations
from nanoflow.executor.buffers import DeviceModel, draw_keys
from nanoflow.executor.sampler import sampling_bytes
from nanoflow.executor.worker import Worker
from nanoflow.grammars.compiled import Grammars
from nanoflow.graph.fuse import fuse_swiglu
from nanoflow.graph.graph import OpGraph
from nanoflow.graph.operation import OpKind
from nanoflow.kernels.dispatch import Kernels, are_capturable, kernels_for
from nanoflow.models.config_json import ModelConfig
from nanoflow.models.config_json import load as load_model_config
from nanoflow.models.generation import SamplingDefaults, load_sampling_defaults, named_file
from nanoflow.models.locate import locate_model
from nanoflow.models.presets import preset_config, preset_name
from nanoflow.models.weights import Weights, load_weights, random_weights
from nanoflow.plan.book import PlanBook, StoredBook, load_book
from nanoflow.plan.liveness import workspace_bytes
from nanoflow.scheduler.drafts import drafts_of, most_draft_tokens
from nanoflow.scheduler.forced import ForcedRuns
from nanoflow.scheduler.limits import SchedulerLimits
from nanoflow.scheduler.pace import Pace
from nanoflow.scheduler.scheduler import Scheduler

logger = logging.getLogger(__name__)


@dataclass(frozen=True, slots=True, kw_only=True)
class _Setup:
    """What is to run, where, and within which limits; nothing is loaded yet.

    Attributes:
        config: All options, as the user gave them.
        device, dtype: Where the model runs, and the type of its weights and activations.
        model_config, folder: What config.json says, and the model's folder or GGUF file; None for a preset.
        sampling: How requests that do not say so are sampled.
        graph: The operations, fused where the device has kernels for it.
        kernels: The kernel of each kind of operation.
        limits: Token budget, number of requests and bound on gaps, with their origin.
        book: The sequential plan and those of the plan book.
    """

    config: EngineConfig
    device: torch.device
    dtype: torch.dtype
    model_config: ModelConfig
    folder: Path | None
    sampling: SamplingDefaults
    graph: OpGraph
    kernels: Kernels
    limits: EngineLimits
    book: PlanBook

    @property
    def is_random(self) -> bool:
        """Whether weights are drawn at random instead of read."""
        return self.folder is None or self.config.load_format == "random"

    @property
    def is_captured(self) -> bool:
        """Whether forward passes are recorded as CUDA graphs."""
        are_wanted = self.config.cuda_graphs and self.device.type == "cuda"
        return are_wanted and are_capturable(self.kernels, self.graph.layer_operations)

    @property
    def num_logits(self) -> int:
        """Most rows of logits in a batch: one for each request and one for each drafted token."""
        return self.limits.max_num_seqs + most_draft_tokens(self.config.speculative, self.limits.max_num_seqs)

    @property
    def page_bytes(self) -> tuple[int, ...]:
        """Bytes of a page of each KV group."""
        page_size = self.config.page_size
        return tuple(group.bytes_per_token(self.dtype.itemsize) * page_size for group in self.graph.kv_groups)

    @property
    def fingerprint(self) -> str:
        """What the bytes of a KV page depend on beside its tokens."""
        name, device = self.graph.name, self.device.type
        return fingerprint_of(self.folder, self.config, name=name, device=device, dtype=self.dtype_name)

    @property
    def dtype_name(self) -> str:
        """The type as users write it, such as `bfloat16`."""
        return str(self.dtype).removeprefix("torch.")


def build_engine(config: EngineConfig, *, show_progress: bool = False, prepares_plans: bool = True) -> Engine:
    """Load a model and set up the loop around it.

    Args:
        config: All options.
        show_progress: Say on standard error which limits were chosen, and draw progress bars there.
        prepares_plans: Capture CUDA graphs for the plans of the book now; False captures each when it is first used.

    Raises:
        ConfigError, ModelError, PlanError: All ValueErrors with one line that says what is wrong.
    """
    start_s = time.monotonic()
    bound_host_memory()
    if config.num_threads is not None:
        torch.set_num_threads(config.num_threads)
    with publishing(config.kv_events_config) as publisher:
        # 1. Check and choose all options. Nothing is loaded yet, so that mistakes are reported at once.
        setup = _set_up(config, show_progress=show_progress)
        with opened_tiers(config, setup.page_bytes, device=setup.device, fingerprint=setup.fingerprint) as memory:
            # 2. Load the weights, allocate KV pages in the memory that is left, and make the worker that runs batches.
            grammars = Grammars(
                partial(vocabulary_of, config, setup.model_config.eos_token_ids, setup.graph.vocab_size)
            )
            model, limits = _load(setup, show_progress=show_progress)
            worker = _worker(setup, model, limits, memory, grammars)
            load_s = time.monotonic() - start_s
            # 3. Compile kernels and capture graphs, so that no request waits for that.
            times, pace = _warm_up(setup, worker, limits, prepares_plans=prepares_plans)
    drafts = drafts_of(config.speculative, limits.max_num_seqs, ForcedRuns(grammars.matcher_or_none))
    return Engine(
        facts=_facts(setup, limits, load_s=load_s, warm_up_s=time.monotonic() - start_s - load_s),
        scheduler=Scheduler(
            limits=limits,
            pace=pace,
            drafts=drafts,
            put_key_event=publisher.put,
            make_tiers=None if memory is None else memory.tiers,
            is_ready=lambda request: grammars.is_ready(request.structured, needs_bytes=request.thinking is not None),
        ),
        worker=worker,
        book=setup.book,
        is_async=config.async_scheduling,
        times=times,
        publisher=publisher,
        grammars=grammars,
    )


def _set_up(config: EngineConfig, *, show_progress: bool) -> _Setup:
    """Resolve every option against model, device and plan book, and check the headers of the weights."""
    device = resolve_device(config.device)
    use_device(device)
    model_config, folder = resolve_model(config)
    sampling = load_sampling_defaults(config.generation_config, folder)
    dtype = resolve_dtype(config.dtype, model_config.dtype, device)
    graph, form = graph_of(config, model_config, folder, dtype, device)
    if form is not None:
        logger.info("%s", form)
        _tell(form, is_shown=show_progress)
    kernels = kernels_for(device, dtype, graph.layer_operations)
    if OpKind.LINEAR_SWIGLU in kernels:
        graph = fuse_swiglu(graph)
    stored = None if config.plan is None else load_book(Path(config.plan))
    chosen = engine_limits(config, model_config, graph, dtype, device, stored)
    _tell(chosen.reason, is_shown=show_progress)
    if sampling.fields:
        _tell(str(sampling), is_shown=show_progress)
    warn_of_another(config.plan, stored, config.model, device)
    return _Setup(
        config=config,
        device=device,
        dtype=dtype,
        model_config=model_config,
        folder=folder,
        sampling=sampling,
        graph=graph,
        kernels=kernels,
        limits=chosen,
        book=plan_book(config.plan, stored, chosen.max_batch_tokens, graph),
    )


def _load(setup: _Setup, *, show_progress: bool) -> tuple[DeviceModel, SchedulerLimits]:
    """Load the weights, allocate KV pages in the memory that is left, and return both with the scheduler's limits."""
    graph, dtype, device, chosen = setup.graph, setup.dtype, setup.device, setup.limits
    weights = _weights(setup, show_progress=show_progress)
    taken_bytes = sampling_bytes(chosen.max_num_seqs, graph.vocab_size, device, setup.num_logits) + workspace_bytes(
        graph,
        setup.book.plans,
        num_tokens=chosen.max_batch_tokens,
        num_logits=setup.num_logits,
        dtype_bytes=dtype.itemsize,
    )
    taken_bytes += staging_bytes(setup.config, setup.page_bytes)
    pools, max_model_len = size_cache(
        setup.config, chosen, setup.model_config, graph, dtype, device, taken_bytes=taken_bytes
    )
    config, page_size = setup.config, setup.config.page_size
    caches = reserve_caches(graph, pools, page_size=page_size, dtype=dtype, device=device)
    if setup.is_random and device.type == "cuda":
        draw_keys(caches, setup.config.seed)
    limits = SchedulerLimits(
        max_batch_tokens=chosen.max_batch_tokens,
        max_num_seqs=chosen.max_num_seqs,
        max_model_len=max_model_len,
        num_pages=pools[0].num_pages,
        page_size=page_size,
        vocab_size=graph.vocab_size,
        group_pools=pools,
        max_sessions=config.max_sessions,
    )
    model = DeviceModel(graph=graph, dtype=dtype, weights=weights, caches=caches, kernels=setup.kernels)
    return model, limits


def _weights(setup: _Setup, *, show_progress: bool) -> Weights:
    """The weights, read from the model's folder or drawn at random."""
    graph, dtype, device, folder = setup.graph, setup.dtype, setup.device, setup.folder
    require_room_for_weights(graph, dtype, device)
    size = f"{graph.parameter_bytes(dtype.itemsize) / 2**30:.2f} GiB as {setup.dtype_name}"
    logger.info("%s weights: %s", "drawing random" if setup.is_random else f"reading, from {folder},", size)
    if folder is None or setup.is_random:
        return random_weights(graph, dtype, device, setup.config.seed)
    make_copier = StagedCopier if device.type == "cuda" else None
    return load_weights(graph, folder, dtype, device, show_progress=show_progress, make_copier=make_copier)


def _worker(
    setup: _Setup, model: DeviceModel, limits: SchedulerLimits, memory: TierMemory | None, grammars: Grammars
) -> Worker:
    """The worker that runs batches on the device."""
    return Worker(
        model,
        setup.book.plans,
        max_batch_tokens=limits.max_batch_tokens,
        num_rows=limits.max_num_seqs,
        max_logits=setup.num_logits,
        captured_pages=-(-limits.max_model_len // limits.page_size) if setup.is_captured else None,
        copier=None if memory is None else memory.copier(model.caches, num_rows=limits.max_num_seqs),
        grammars=grammars,
    )


def _warm_up(
    setup: _Setup, worker: Worker, limits: SchedulerLimits, *, prepares_plans: bool
) -> tuple[IterationTimes | None, Pace]:
    """Compile, record and measure; returns the times of iterations and the pace that keeps to the bound on gaps."""
    logger.info("%s KV pages of %d tokens", said_pools(limits.pools), limits.page_size)
    if setup.device.type == "cuda":
        logger.info("compiling kernels%s", " and recording CUDA graphs" if setup.is_captured else "")
        compile_and_record(worker, setup.book, limits, with_plans=prepares_plans)
    max_itl_ms = setup.limits.max_itl_ms
    max_ttft_ms = setup.config.max_ttft_ms
    if max_itl_ms is None and max_ttft_ms is None and setup.config.speculative is None:
        return None, Pace()
    if setup.is_captured:
        logger.info("measuring iterations")
    vocab_size = setup.graph.vocab_size
    timed = time_iterations(worker, setup.book.fallback, limits, vocab_size) if setup.is_captured else ()
    times = IterationTimes(timed)
    max_itl_s, max_ttft_s = (None if bound is None else bound / 1e3 for bound in (max_itl_ms, max_ttft_ms))
    return times, Pace(max_itl_s=max_itl_s, max_ttft_s=max_ttft_s, iteration_time=times.estimate)


def _facts(setup: _Setup, limits: SchedulerLimits, *, load_s: float, warm_up_s: float) -> EngineFacts:
    """What an engine tells its front ends about itself."""
    book, config, vocab_size = book_facts(setup.book, setup.graph), setup.config, setup.graph.vocab_size
    return EngineFacts(
        model_type=setup.graph.name,
        vocab_size=vocab_size,
        hidden_size=setup.model_config.hidden_size,
        max_model_len=limits.max_model_len,
        eos_token_ids=setup.model_config.eos_token_ids,
        num_pages=limits.num_pages,
        page_size=limits.page_size,
        group_pools=limits.group_pools,
        page_bytes=setup.page_bytes,
        max_batch_tokens=limits.max_batch_tokens,
        max_num_seqs=limits.max_num_seqs,
        device=str(setup.device),
        dtype=setup.dtype_name,
        kv_cache_dtype=config.kv_cache_dtype,
        plan=str(book),
        book=book,
        sampling=setup.sampling,
        max_logprobs=vocab_size if config.max_logprobs == -1 else config.max_logprobs,
        limits=setup.limits,
        has_prefix_cache=config.enable_prefix_caching,
        load_s=load_s,
        warm_up_s=warm_up_s,
    )


def _tell(line: str, *, is_shown: bool) -> None:
    """Print a line on standard error if it is to be shown; a server prints the same facts when it is ready."""
    logger.debug("%s", line)
    if is_shown:
        print(line, file=sys.stderr)


def resolve_model(config: EngineConfig) -> tuple[ModelConfig, Path | None]:
    """The model that a config names, and its folder or GGUF file; a preset, whose weights are random, has none.

    Raises:
        ModelError: There is no such model, or its config.json is invalid.
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
    """The limits of an engine on this device: given, from the book, or chosen. Called before the weights are loaded.

    Raises:
        ConfigError: The model does not support the length that is asked for.
    """
    return choose_limits(
        config,
        graph,
        local_device(device),
        max_model_len=wanted_model_len(config, model_config),
        dtype_bytes=dtype.itemsize,
        book=book,
    )
