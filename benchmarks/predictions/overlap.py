"""One iteration under plans that overlap: measured on this GPU, and predicted from the profile.

For each batch it tries nano-batches on one lane, and every way to divide the device of which the profile has pairs,
each under sustained load and with energy. The gain over the sequential plan is measured and predicted. From the root of
the repository:

    python -m benchmarks.predictions.overlap --profile benchmarks/results/profile_llama-3-8b_h200.json \\
        --batches 2048:683:1280:1024 1024:1024:768:1 --json overlap.json

A batch is TOKENS:DECODES:KEYS:PROMPT: number of tokens, number of decodes, keys of each decode; all other tokens are of
prompts of PROMPT tokens.
"""

from __future__ import annotations

import dataclasses
import sys
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

from benchmarks.common.document import write_document
from nanoflow.cli.options import CommandParser
from nanoflow.device.detect import resolve_device, use_device
from nanoflow.graph.operation import BatchShape
from nanoflow.plan.plan import PipelinePlan
from nanoflow.plan.sequential import nanobatch_plan
from nanoflow.profile.table import Profile
from nanoflow.search.search import Search
from nanoflow.search.shapes import batch_of
from nanoflow.simulate.iteration import IterationModel
from nanoflow.trials.iterations import Trial, measure_trials


@dataclass(frozen=True, slots=True, kw_only=True)
class Row:
    """One plan on one batch; gains are over the sequential plan."""

    batch: str
    plan: str
    digest: str
    time_s: float
    energy_j: float | None
    sequential_s: float
    sequential_j: float | None
    predicted_s: float
    gain: float
    predicted_gain: float


def main(argv: Sequence[str] | None = None) -> int:
    """Print a row for each plan, and write the record."""
    parser = CommandParser(prog="python -m benchmarks.predictions.overlap", description=__doc__)
    parser.add_argument("--profile", type=Path, required=True)
    parser.add_argument("--batches", nargs="+", required=True, metavar="TOKENS:DECODES:KEYS:PROMPT")
    parser.add_argument("--device", default="auto", help="where to measure")
    parser.add_argument("--json", type=Path, help="file to write the result to")
    args = parser.parse_args(argv)
    profile = Profile.load(args.profile)
    device = resolve_device(args.device)
    use_device(device)
    model = IterationModel(profile)
    texts = {parse_batch(text): text for text in args.batches}
    wanted = [(shape, plan) for shape in texts for plan in candidates(profile, model, shape)]
    rows = []
    for trial in measure_trials(profile, wanted, device=device):
        rows.append(compare(model, texts[trial.shape], trial))
        print(line(rows[-1]), flush=True)
    if args.json is not None:
        write_document(
            args.json,
            "overlap",
            model=profile.model,
            rows=[dataclasses.asdict(row) for row in rows],
        )
    return 0


def parse_batch(text: str) -> BatchShape:
    """The batch shape of TOKENS:DECODES:KEYS:PROMPT."""
    num_tokens, num_decodes, context, prompt = (int(part) for part in text.split(":"))
    return batch_of(num_tokens, num_decodes, context, prompt)


def candidates(profile: Profile, model: IterationModel, shape: BatchShape) -> Iterator[PipelinePlan]:
    """Nano-batches, and what the search tries."""
    middle = round(shape.num_tokens / 256) * 128 or shape.num_tokens // 2
    yield nanobatch_plan(model.graph, shape.num_tokens, [middle])
    attempts = Search(profile, shape).run().attempts
    yield from (attempt.plan for attempt in sorted(attempts, key=lambda attempt: attempt.makespan_s)[:4])


def compare(model: IterationModel, text: str, trial: Trial) -> Row:
    """Measured and predicted gains of the plans."""
    predicted_s = model.predict(trial.shape, trial.plan).iteration_s
    return Row(
        batch=text,
        plan=trial.plan.name,
        digest=trial.plan.digest,
        time_s=trial.planned.time_s,
        energy_j=trial.planned.energy_j,
        sequential_s=trial.sequential.time_s,
        sequential_j=trial.sequential.energy_j,
        predicted_s=predicted_s,
        gain=trial.gain,
        predicted_gain=model.predict(trial.shape).iteration_s / predicted_s,
    )


def line(row: Row) -> str:
    """A line of the table."""
    energy = "" if row.energy_j is None else f" {row.energy_j:7.2f} J (sequential {row.sequential_j:.2f})"
    return (
        f"{row.batch:<20} {row.plan:<44} {row.time_s * 1e3:8.2f} ms (sequential {row.sequential_s * 1e3:.2f}, "
        f"predicted {row.predicted_s * 1e3:.2f}){energy}  gain {row.gain:.3f} (predicted {row.predicted_gain:.3f})"
    )


if __name__ == "__main__":
    sys.exit(main())
