"""The worker: one device, one queue. Takes dense batches in order and gives back the tokens they sampled.

`launch` returns at once, so that the next batch can be formed while this one runs. Batches run strictly in the order in
which they were launched: that is what lets the scheduler hand freed pages and rows to a later batch without waiting.
"""

from __future__ import annotations

from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import replace

import torch

from nanoflow.batch import DenseBatch, PromptScore, SampledTokens, TopLogprobs
from nanoflow.executor.buffers import DeviceModel
from nanoflow.executor.inputs import InputBuilder
from nanoflow.executor.pipelined import PipelinedExecutor
from nanoflow.executor.sampler import Sampler
from nanoflow.kernels.launch import BatchInputs
from nanoflow.kernels.sample import top_logprobs
from nanoflow.plan.plan import PipelinePlan


class Worker:
    """Runs batches of one model on one device.

    Args:
        model: The model with its caches.
        plans: Every plan that `launch` may be given.
        max_batch_tokens: Largest dense batch.
        num_rows: Rows of the state table, also the most rows with logits at once.
    """

    def __init__(
        self, model: DeviceModel, plans: tuple[PipelinePlan, ...], *, max_batch_tokens: int, num_rows: int
    ) -> None:
        graph, device = model.graph, model.device
        self._max_logits = num_rows
        self._inputs = InputBuilder(graph.rope, num_rows=num_rows, device=device)
        self._executor = PipelinedExecutor(model, plans, max_batch_tokens=max_batch_tokens, max_logits=num_rows)
        self._sampler = Sampler(num_rows=num_rows, vocab_size=graph.vocab_size, device=device)
        self._queue = ThreadPoolExecutor(max_workers=1, thread_name_prefix="nanoflow-worker")

    def launch(self, batch: DenseBatch, plan: PipelinePlan) -> Future[SampledTokens]:
        """Queue a batch; the result is there when it has run."""
        return self._queue.submit(self.run, batch, plan)

    def close(self) -> None:
        """Wait for what runs and stop the queue."""
        self._queue.shutdown(wait=True, cancel_futures=True)

    @torch.inference_mode()
    def run(self, batch: DenseBatch, plan: PipelinePlan) -> SampledTokens:
        """Run one batch: index tensors, forward pass, prompt scores, sampling."""
        for joined in batch.joined:
            self._sampler.join(joined)
        inputs = self._inputs.build(batch)
        self._executor.forward(inputs, plan)
        prompt_logprobs = tuple(self._score(inputs, score) for score in batch.prompt_scores)
        token_ids, result = self._sampler.sample(batch, self._executor.logits(inputs))
        self._inputs.feed_back(batch.rows[batch.sampled], token_ids)
        return replace(result, prompt_logprobs=prompt_logprobs)

    def _score(self, inputs: BatchInputs, score: PromptScore) -> TopLogprobs:
        """Log probabilities of prompt tokens, in slices that the logits' tensor can hold."""
        targets = torch.from_numpy(score.target_ids).to(inputs.token_ids.device).long()
        parts = []
        for first in range(score.start, score.stop, self._max_logits):
            tokens = torch.arange(first, min(first + self._max_logits, score.stop), device=targets.device)
            logits = self._executor.logits(replace(inputs, logit_tokens=tokens))
            wanted = targets[first - score.start :][: len(tokens)]
            parts.append(top_logprobs(logits, wanted, score.num_logprobs))
        return TopLogprobs.concatenate(parts)
