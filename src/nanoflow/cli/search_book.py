"""How `nanoflow search` makes a plan book: sweep limits, search plans under the best ones, try plans, choose.

Progress is printed on standard error, results on standard output.
"""

from __future__ import annotations

import sys
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from nanoflow.cli.search_words import COMPARED, cell_line, why_none
from nanoflow.plan.book import BookLimits, BookPrediction, MadeFor, StoredBook, WorkloadPrediction
from nanoflow.profile.host_link import copies_of
from nanoflow.search.books import BookSearch, FoundPlan, divided, gain_under
from nanoflow.search.limits import LimitsFound, WithPlans, fastest, limits_to_try, strongest, swept, worth_searching
from nanoflow.search.workloads import SimulatedWorkloads
from nanoflow.simulate.iteration import graphs_of
from nanoflow.timeline.drawing import faster_or_slower

if TYPE_CHECKING:
    from nanoflow.cli.search import SearchConfig
    from nanoflow.graph.operation import BatchShape
    from nanoflow.profile.table import Profile
    from nanoflow.trials.journal import TrialJournal

# Seconds to warm up, capture and measure one plan; for some also the sequential plan.
_TRIAL_S = 3.0


def kept_trials(output: Path, profile: Profile, *, is_fresh: bool) -> TrialJournal:
    """Those of an interrupted search for this file; ProfileError if plans of the profile cannot be tried here."""
    from nanoflow.trials.journal import TrialJournal

    _check_machine(profile)
    kept = TrialJournal(output.with_name(f"{output.name}.trials"), profile)
    if is_fresh:
        kept.forget()
    return kept


class LimitsSearch:
    """One search for a plan book.

    Args:
        profile, config: Measured operations, and what to search for.
        workloads: Workloads as the user named them.
        kept: Stored trials; None if plans are not to be tried.
        is_quiet: Print results only.

    Raises:
        ConfigError: A workload cannot be read, or a limit is beyond the profile or the memory.
    """

    def __init__(
        self,
        profile: Profile,
        config: SearchConfig,
        workloads: Sequence[str],
        kept: TrialJournal | None,
        *,
        is_quiet: bool,
    ) -> None:
        self._profile, self._config, self._kept, self._is_quiet = profile, config, kept, is_quiet
        self._names = [_label(workload) for workload in workloads]
        self._budgets, self._counts = limits_to_try(profile, config.max_batch_tokens, config.max_num_seqs)
        copies = copies_of(profile, graphs_of(profile)[0], host_gib=config.kv_host_gib)
        self._simulated = SimulatedWorkloads(
            profile,
            workloads,
            num_requests=config.num_requests,
            seed=config.seed,
            gpu_memory_utilization=config.gpu_memory_utilization,
            copies=copies,
        )
        self._examples: dict[tuple[int, tuple[float, float]], BatchShape] = {}
        self._search = BookSearch(
            profile,
            time_limit_s=config.time_limit,
            will_be_tried=kept is not None,
            margin=_part(config.margin),
            copies=copies,
        )

    def book(self) -> StoredBook:
        """The best limits and their plans (none if sequential is fastest), and the best limits without plans."""
        sequential = self._swept()
        best = fastest(sequential)
        found = [self._with_plans(each.limits) for each in worth_searching(sequential)]
        if self._kept is not None:
            found = [self._measured(each, self._kept) for each in strongest(found, best)]
        chosen = max(found, key=lambda each: each.rate)
        is_better = chosen.rate > best.rate
        if not is_better:
            chosen = WithPlans(limits=best.limits, rates=best.rates, plans=())
        prediction = self._prediction(best, chosen)
        self._say_result(prediction, chosen)
        if not is_better:
            tried, is_measured = self._kept is not None, self._profile.setup.is_measured
            for line in why_none(found, best, is_measured=is_measured, was_tried=tried):
                print(f"  {line}", flush=True)
        setup = self._profile.setup
        return StoredBook(
            entries=tuple(each.entry for each in chosen.plans if each.entry is not None),
            made_for=MadeFor(model=self._profile.model, gpu=setup.gpu, num_gpus=setup.num_gpus),
            limits=chosen.limits,
            prediction=prediction,
        )

    def _swept(self) -> list[LimitsFound]:
        found = []
        for each in swept(self._budgets, self._counts, self._simulated.sequential):
            found.append(each)
            self._say(f"{each.limits}: {self._rates(each.rates)} tokens/s sequentially")
        return found

    def _with_plans(self, limits: BookLimits) -> WithPlans:
        """Search plans for the batches of the workloads under some limits, and predict the runs with them."""
        self._say(f"plans for {limits} ({COMPARED})")
        plans = []
        for each in self._search.found(self._simulated.batches(limits), limits.max_batch_tokens):
            plans.append(each)
            self._say(f"  {cell_line(each)}")
        return self._judged(limits, plans, "predicted")

    def _measured(self, found: WithPlans, kept: TrialJournal) -> WithPlans:
        """Every plan on the middle one of the batches that it may be for; of each kind the best stays, if it wins.

        Plans of rare cells are not tried; those that are predicted to win by a safe margin remain.
        """
        from nanoflow.device.detect import resolve_device
        from nanoflow.trials.iterations import measure_trials

        tried, rare = divided(found.plans)
        wanted = [(self._example(each), plan) for each in tried for plan in each.plans]
        missing = [key for key in wanted if key not in kept]
        before = f", {len(wanted) - len(missing)} more were tried before" if len(missing) < len(wanted) else ""
        minutes = len(missing) * _TRIAL_S / 60
        self._say(f"trials for {found.limits}: {len(missing)} plans to try, about {minutes:.0f} minutes{before}")
        trials = measure_trials(self._profile, missing, device=resolve_device("auto"))
        judged = []
        for each in tried:
            keys = [(self._example(each), plan) for plan in each.plans]
            while not all(key in kept for key in keys):
                kept.add(next(trials))
            judged.append(each.confirmed([kept[key] for key in keys]))
            self._say(f"  {cell_line(judged[-1])}")
        trusted = [each.trusted for each in rare]
        self._say(f"  rare batches: {sum(bool(each.plans) for each in trusted)} plans as predicted")
        return self._judged(found.limits, [*judged, *trusted], "measured")

    def _example(self, found: FoundPlan) -> BatchShape:
        """The batch of a cell that plans are tried on: the same under all limits, so that no plan is tried twice."""
        cell = found.cell
        return self._examples.setdefault((cell.max_tokens, cell.keys), cell.example)

    def _judged(self, limits: BookLimits, plans: Sequence[FoundPlan], how: str) -> WithPlans:
        rates = self._simulated.rates(limits, gain_under(plans))
        self._say(f"{limits}: {self._rates(rates)} tokens/s with plans, {how}")
        return WithPlans(limits=limits, rates=rates, plans=tuple(plans))

    def _prediction(self, best: LimitsFound, chosen: WithPlans) -> BookPrediction:
        return BookPrediction(
            sequential_limits=best.limits,
            workloads=tuple(
                WorkloadPrediction(
                    workload=name,
                    num_requests=self._config.num_requests,
                    sequential_tokens_per_s=before,
                    tokens_per_s=now,
                )
                for name, before, now in zip(self._names, best.rates, chosen.rates, strict=True)
            ),
            is_measured=self._kept is not None,
        )

    def _say_result(self, prediction: BookPrediction, chosen: WithPlans) -> None:
        """Print the best run with and without plans and their ratio; for several workloads a line each and the mean."""
        how = "measured" if prediction.is_measured else "predicted"
        best = [each.sequential_tokens_per_s for each in prediction.workloads]
        print(f"sequential best: {prediction.sequential_limits}: {self._rates(best)} tokens/s, predicted")
        if not any(each.plans for each in chosen.plans):
            print("with plans: nothing beats that; the book has these limits and no plan", flush=True)
            return
        print(f"with plans: {chosen.limits}: {self._rates(chosen.rates)} tokens/s, by gains as {how}")
        for each in prediction.workloads if len(prediction.workloads) > 1 else ():
            print(f"  {each.workload}: {each.gain:.3f}x of sequential at its best")
        print(
            f"{how} for all of {', '.join(self._names)}: {prediction.gain:.3f}x of sequential at its best, "
            f"{faster_or_slower(prediction.gain)}",
            flush=True,
        )
        if not prediction.is_measured:
            print("no plan was tried on a GPU: these are predictions, --measure tries plans", flush=True)

    def _rates(self, rates: Sequence[float]) -> str:
        return ", ".join(f"{rate:,.0f}" for rate in rates)

    def _say(self, line: str) -> None:
        if not self._is_quiet:
            print(f"  {line}", file=sys.stderr, flush=True)


def _check_machine(profile: Profile) -> None:
    """Raise ProfileError unless this machine is the one that was profiled."""
    from nanoflow.device.detect import resolve_device, use_device
    from nanoflow.profiler.setup import check_same_machine, detect_setup

    device = resolve_device("auto")
    use_device(device)
    check_same_machine(profile, detect_setup(device))


def _part(percent: float | None) -> float | None:
    return None if percent is None else percent / 100


def _label(workload: str) -> str:
    """The workload as text; a trace is named by its file name without the folder."""
    return f"trace:{Path(workload.removeprefix('trace:')).name}" if workload.startswith("trace:") else workload
