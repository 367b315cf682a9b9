"""The worker of one device: takes dense batches in order and returns the tokens that they sampled.

`launch` returns at once, so that the next batch can be formed while this one runs. One thread queues work on the
device, batch after batch; another waits for tokens. Batches run strictly in the order of their launch. This is why the
scheduler may give freed pages and rows to a later batch without waiting.
"""

from __future__ import annotations

from collections.abc import Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import replace
from functools import partial

import torch

from nanoflow.batch import DenseBatch, Int32, PromptScore, SampledTokens
from nanoflow.device.detect import use_device
from nanoflow.device.transfer import to_device
from nanoflow.executor.buckets import Buckets
from nanoflow.executor.buffers import DeviceModel
from nanoflow.executor.captured import CapturedForward
from nanoflow.executor.forward import EagerForward, Forward, GraphKey
from nanoflow.executor.inputs import InputBuilder
from nanoflow.executor.layout import Layout, lay_out
from nanoflow.executor.page_copies import NoCopier, PageCopier
from nanoflow.executor.pipelined import PipelinedExecutor
from nanoflow.executor.pooling import Pooler
from nanoflow.executor.readback import PendingTokens, Scores
from nanoflow.executor.sampler import Sampler
from nanoflow.grammars.compiled import Grammars
from nanoflow.kernels.compiling import compiling
from nanoflow.kernels.launch import BatchInputs
from nanoflow.kvcache.copies import PageCopies
from nanoflow.plan.plan import PipelinePlan

# Neighbouring sizes mostly use the same kernels, and to ask for the kernels of a size takes 12 ms: one in so many is
# asked for. A kernel that is missed is compiled when the graph of its size is recorded.
_COMPILED_EVERY = 3


class Worker:
    """Runs batches of one model on one device.

    Args:
        model: The model with its caches.
        plans: Every plan that `launch` may be given.
        max_batch_tokens: Largest dense batch.
        num_rows: Rows of the state table.
        max_logits: Maximum number of rows with logits at once; `num_rows` if not given.
        captured_pages: Pages of the longest sequence if forward passes are CUDA graphs; None if they are not.
        copier: Copies KV pages to host memory and back; not needed without host memory.
        grammars: Compiles grammars of requests; not needed if none has one.
    """

    def __init__(
        self,
        model: DeviceModel,
        plans: tuple[PipelinePlan, ...],
        *,
        max_batch_tokens: int,
        num_rows: int,
        max_logits: int | None = None,
        captured_pages: int | None = None,
        copier: PageCopier | None = None,
        grammars: Grammars | None = None,
    ) -> None:
        graph, device = model.graph, model.device
        self._device = device
        self._max_logits = max_logits or num_rows
        self._inputs = InputBuilder(
            graph.ropes,
            num_rows=num_rows,
            device=device,
            pages_per_row=captured_pages or 0,
            num_groups=model.num_kv_groups,
        )
        self._executor = PipelinedExecutor(model, plans, max_batch_tokens=max_batch_tokens, max_logits=self._max_logits)
        self._forward: Forward = EagerForward(executor=self._executor, builder=self._inputs)
        if captured_pages is not None:
            buckets = Buckets(max_tokens=max_batch_tokens, max_requests=num_rows)
            self._forward = CapturedForward(
                self._executor, self._inputs, buckets, plans, pages_per_request=captured_pages, device=device
            )
        self._sampler = Sampler(num_rows=num_rows, vocab_size=graph.vocab_size, device=device, grammars=grammars)
        self._pooler = Pooler(self._max_logits)
        self._queue = ThreadPoolExecutor(1, "nanoflow-launch", initializer=partial(use_device, device))
        self._reader = ThreadPoolExecutor(max_workers=1, thread_name_prefix="nanoflow-read")
        self._copier: PageCopier = copier or NoCopier()
        # Saves and loads end in their own order.
        self._copies = ThreadPoolExecutor(max_workers=2, thread_name_prefix="nanoflow-copies")

    def launch(self, batch: DenseBatch, plan: PipelinePlan) -> Future[SampledTokens]:
        """Queue a batch; the future has its tokens once it has run."""
        queued = self._queue.submit(self._run, batch, plan)
        return self._reader.submit(lambda: queued.result().read())

    def copy(self, copies: PageCopies) -> Future[float]:
        """Queue copies of KV pages behind the batches launched so far; the future has the seconds that they took."""
        queued = self._queue.submit(self._copier.copy, copies)
        return self._copies.submit(lambda: queued.result()())

    @property
    def num_prepared(self) -> int:
        """See `Forward`."""
        return self._forward.num_prepared

    def prepare(self, wanted: Sequence[Sequence[GraphKey]], batch: DenseBatch, within_s: float) -> None:
        """Compile kernels and record CUDA graphs before batches need them.

        Args:
            wanted: Graphs in groups. The first group has one plan and many sizes, the smallest first; its graphs are
                recorded while kernels of the others are still compiled.
            batch: Any batch; what follows the layers is compiled for it.
            within_s: Seconds for recording each group that is not empty; `prepare_next` records the rest.
        """
        self._queue.submit(self._prepare, wanted, batch, within_s).result()

    def prepare_next(self) -> bool:
        """See `Forward`."""
        return self._queue.submit(torch.inference_mode()(self._forward.prepare_next)).result()

    def close(self) -> None:
        """Wait for running work, stop the threads, and release parts of the device. Closing twice does nothing."""
        self._queue.shutdown(wait=True, cancel_futures=True)
        self._reader.shutdown(wait=True, cancel_futures=True)
        self._copies.shutdown(wait=True, cancel_futures=True)
        self._copier.close()
        self._forward.close()

    @torch.inference_mode()
    def _run(self, batch: DenseBatch, plan: PipelinePlan) -> PendingTokens:
        """Queue one batch on the device: forward pass, prompt scores, vectors of prompts, sampling."""
        layout = lay_out(batch, plan.cuts)
        self._copier.protect(batch.new_pages)
        inputs = self._forward(batch, layout, plan)
        prompt_scores = [self._score(inputs, score, layout) for score in batch.prompt_scores]
        pooled = self._pooler.take(batch, layout, lambda places: self._executor.hidden(self._rows(inputs, places)))
        self._sampler.join(batch.joined)
        drawn = self._sampler.sample(batch, self._executor.logits(inputs))
        self._inputs.feed_back(batch.rows[batch.sampled], drawn.token_ids)
        return PendingTokens(drawn, prompt_scores, pooled)

    @torch.inference_mode()
    def _prepare(self, wanted: Sequence[Sequence[GraphKey]], batch: DenseBatch, within_s: float) -> None:
        first, *others = wanted
        with compiling(partial(use_device, self._device)) as compile_only:
            with compile_only():
                self._sampler.prepare(self._executor.logits(self._inputs.build(batch)).dtype)
                for group in (first[::_COMPILED_EVERY], *others):
                    self._forward.compile(group)
            self._forward.prepare(first, within_s)
        for group in filter(None, others):
            self._forward.prepare(group, within_s)

    def _score(self, inputs: BatchInputs, score: PromptScore, layout: Layout) -> list[Scores]:
        """Log probabilities of prompt tokens, in slices that fit into the tensor of logits."""
        targets = to_device(score.target_ids, self._device).long()
        slices: list[Scores] = []
        for first in range(score.start, score.stop, self._max_logits):
            places = layout.places[first : min(first + self._max_logits, score.stop)]
            logits = self._executor.logits(self._rows(inputs, places))
            wanted = targets[first - score.start :][: len(places)]
            slices.append(self._sampler.score(logits, wanted, score.num_logprobs))
        return slices

    def _rows(self, inputs: BatchInputs, places: Int32) -> BatchInputs:
        """The inputs of a batch that was run, for these of its tokens alone: their logits, or their hidden states."""
        return replace(inputs, logit_tokens=to_device(places, self._device))
