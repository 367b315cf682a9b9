"""The pieces of a measuring session on one card: the command of each, about how long it takes, and what it needs first.

Pieces are made one after the other, when they are asked for, since later ones need plan books of earlier ones.
`session.py` runs them.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

from benchmarks.common.rungs import SEQUENTIAL
from benchmarks.common.workloads import file_name
from benchmarks.ladder.books import SEARCHED, path_of, read_names
from nanoflow.models.presets import preset_name
from nanoflow.plan.book import load_book
from nanoflow.profile.table import Profile

# Seconds on one H200 with Llama-3-8B: from the start of a process to its first request, and a rung's turn in the steady
# state with its preparation.
_START_S, _TURN_S = 20.0, 10.0
# Seconds of a search with trials, of one without, and of making the books of the other rungs.
_SEARCH_S, _PREDICTED_S, _BOOKS_S = 300.0, 60.0, 90.0
# A quick session divides numbers of requests by this.
_QUICK = 4
TRACE = "trace:{}.csv"


@dataclass(frozen=True, slots=True, kw_only=True)
class Work:
    """A workload of whole runs, and about the seconds of a run."""

    workload: str
    num_requests: int
    run_s: float


WORKS = (
    Work(workload="512/512", num_requests=1100, run_s=45),
    Work(workload="1024/512", num_requests=1400, run_s=75),
    Work(workload="512/1024", num_requests=1000, run_s=72),
    Work(workload="1000/1000", num_requests=700, run_s=68),
    Work(workload="2048/128", num_requests=900, run_s=54),
    Work(workload=TRACE.format("sharegpt"), num_requests=2500, run_s=43),
    Work(workload=TRACE.format("lmsys"), num_requests=4000, run_s=50),
    Work(workload=TRACE.format("splitwise"), num_requests=1500, run_s=65),
)
_SHAREGPT = Work(workload=TRACE.format("sharegpt"), num_requests=1500, run_s=26)
_CONSTANT = Work(workload="1024/512", num_requests=1000, run_s=54)
_NUM_KINDS = 8
_LIMIT_PAIRS = ("2048/1024", "4096/1024", "8192/2048")
_NUM_GOALS = 2


@dataclass(frozen=True, slots=True, kw_only=True)
class Session:
    """Options of a session.

    Attributes:
        out, books, traces: Folders of records, of plan books (one folder a workload), and of FILE.csv.
        model, small_model: Presets; the small one is only served.
        profile: Profile of the model, with which plans are searched.
        book: Plan book with which a start with plans is measured.
        sequential: Limits of sequential rungs, in addition to those that the search finds.
        repeats: Repeats of every piece.
        is_quick: Whether to use a quarter of the requests.
        tries_plans: Whether searched plans are tried on the GPU; else they are only predicted, in a minute.
        is_whole_ladder: Whether whole runs include nano-batches and each mechanism.
        allows_dirty: Passed on as --allow-dirty.
        git_revision: Revision of the sources when the session began; None if unknown.
    """

    out: Path
    books: Path
    traces: Path
    model: str
    small_model: str
    profile: Path
    book: Path
    sequential: Sequence[str]
    repeats: int
    is_quick: bool
    tries_plans: bool
    is_whole_ladder: bool
    allows_dirty: bool
    git_revision: str | None

    def count(self, num_requests: int) -> int:
        """Number of requests in this session."""
        return -(-num_requests // _QUICK) if self.is_quick else num_requests

    def minutes(self, runs: float, run_s: float, starts: float) -> float:
        """Minutes of all repeats, for a number of runs and of starts in each."""
        return self.repeats * (runs * run_s / (_QUICK if self.is_quick else 1) + starts * _START_S) / 60

    def record(self, benchmark: str, model: str, *parts: str) -> Path:
        """Path of the record of a piece."""
        return self.out / f"{'_'.join([benchmark, preset_name(model) or Path(model).name, *parts])}.json"

    def located(self, workload: str) -> str:
        """The workload with the folder of its trace."""
        kind, _, name = workload.rpartition(":")
        return f"{kind}:{self.traces / name}" if kind else workload

    def counted(self, work: Work) -> str:
        """The workload as `--workloads` takes it, with its number of requests."""
        return f"{self.located(work.workload)}:{self.count(work.num_requests)}"


@dataclass(frozen=True, slots=True, kw_only=True)
class Piece:
    """One command.

    Attributes:
        name: Name in tables and for --only.
        words: Arguments after `python -m`.
        record: File or folder that it writes; it exists when the piece is done, perhaps earlier.
        minutes: About how long it takes on an H200.
        needs: Files without which it cannot run.
        goes_on: Whether it continues after an interruption, and so may start in whatever time is left.
        has_time_limit: Whether it has an option `--time-limit`.
        is_there: Whether its result exists, whoever made it.
        without: Why there is nothing to run; None if there is.
    """

    name: str
    words: Sequence[str]
    record: Path
    minutes: float
    needs: Sequence[Path] = ()
    goes_on: bool = False
    has_time_limit: bool = False
    is_there: bool = False
    without: str | None = None


def pieces(session: Session) -> Iterator[Piece]:
    """All pieces in order, each made when it is asked for."""
    yield from _starts(session)
    yield _sampled(session)
    yield from _served(session)
    yield _limits(session)
    for work in WORKS:
        yield from _books(session, work)
        yield _whole_runs(session, work)
        yield _steady(session, work)


def _starts(session: Session) -> Iterator[Piece]:
    with_book = ["--options", "--plan", str(session.book)]
    words = ["--model", session.model, "--repeats", str(session.repeats)]
    for name, options, needs in (("plain", [], []), ("book", with_book, [session.book])):
        record = session.record("startup", session.model, name)
        yield Piece(
            name=f"startup-{name}",
            words=["benchmarks.engine.startup", *words, "--json", str(record), *options],
            record=record,
            minutes=1.0 + session.repeats,
            needs=needs,
        )


def _in_turn(
    session: Session, name: str, module: str, record: Path, words: Sequence[str], *, minutes: float, **more: object
) -> Piece:
    """A piece that continues after an interruption."""
    dirty = ["--allow-dirty"] if session.allows_dirty else []
    common = ["--model", session.model, "--repeats", str(session.repeats), "--json", str(record), *dirty]
    return Piece(
        name=name,
        words=[f"benchmarks.{module}", *words, *common],
        record=record,
        minutes=minutes,
        goes_on=True,
        has_time_limit=True,
        **more,  # type: ignore[arg-type]
    )


def _sampled(session: Session) -> Piece:
    return _in_turn(
        session,
        "sampled",
        "engine.sampled",
        session.record("sampled", session.model),
        ["--workloads", session.counted(_SHAREGPT)],
        minutes=session.minutes(_NUM_KINDS, _SHAREGPT.run_s, 1 / session.repeats),
        needs=_traces(session, [_SHAREGPT]),
    )


def _traces(session: Session, works: Sequence[Work]) -> list[Path]:
    found = [session.located(work.workload).partition("trace:") for work in works]
    return [Path(file) for _, kind, file in found if kind]


def _served(session: Session) -> Iterator[Piece]:
    """A piece for each load, with a server of its own."""
    loads = (
        (session.model, "inf", 1200, 2 * 28.0, 3.0),
        (session.model, "20", 1200, 65.0, 1.5),
        (session.model, "35", 1200, 42.0, 1.5),
        (session.small_model, "inf", 3000, 2 * 15.0, 3.0),
        (session.small_model, "100", 3000, 35.0, 1.5),
    )
    trace = TRACE.format("sharegpt")
    for model, rate, num_requests, run_s, starts in loads:
        load = "at-once" if rate == "inf" else rate
        record = session.record("serving", model, load)
        words = ["--model", model, "--workload", session.located(trace), "--temperature", "0.7"]
        words += ["--rates", f"{rate}:{session.count(num_requests)}", "--repeats", str(session.repeats)]
        words += ["--in-process"] if rate == "inf" else []
        words += ["--allow-dirty"] if session.allows_dirty else []
        yield Piece(
            name=f"serving-{preset_name(model) or Path(model).name}-{load}",
            words=["benchmarks.engine.serving", *words, "--json", str(record)],
            record=record,
            minutes=session.minutes(1, run_s, starts / session.repeats),
            needs=_traces(session, [_SHAREGPT]),
        )


def _limits(session: Session) -> Piece:
    works = [_SHAREGPT, _CONSTANT]
    engines = len(_LIMIT_PAIRS) + _NUM_GOALS
    return _in_turn(
        session,
        "limits",
        "engine.limits",
        session.record("limits", session.model),
        ["--workloads", *(session.counted(work) for work in works), "--pairs", *_LIMIT_PAIRS],
        minutes=session.minutes(engines, sum(work.run_s for work in works), engines),
        needs=_traces(session, works),
    )


def _folder(session: Session, work: Work) -> Path:
    """Folder of the plan books of a workload."""
    return session.books / file_name(work.workload)


def _searched(session: Session, work: Work) -> Path:
    return _folder(session, work) / f"{SEARCHED}.json"


def _books(session: Session, work: Work) -> Iterator[Piece]:
    """A search over limits, and then books of the other rungs under the limits that it found."""
    name, searched = file_name(work.workload), _searched(session, work)
    needs = [session.profile, *_traces(session, [work])]
    workload = ["--workloads", session.located(work.workload)]
    yield Piece(
        name=f"search-{name}",
        words=["nanoflow", "search", str(session.profile), "-o", str(searched), *workload]
        + (["--measure"] if session.tries_plans else []),
        record=searched,
        minutes=(_SEARCH_S if session.tries_plans else _PREDICTED_S) / 60,
        needs=needs,
        goes_on=True,
        is_there=searched.exists(),
    )
    others = mechanism_books(session, work)
    yield Piece(
        name=f"books-{name}",
        words=[
            *("benchmarks.ladder.books", "--profile", str(session.profile), "--limits", _limits_of(searched)),
            *(*workload, "--out", str(searched.parent), "--rungs", *others),
        ],
        record=searched.parent,
        minutes=_BOOKS_S / 60,
        needs=[*needs, searched],
        goes_on=True,
        is_there=bool(others) and all(path.exists() for path in others.values()),
    )


def mechanism_books(session: Session, work: Work) -> dict[str, Path]:
    """Paths of the books of nano-batches and of each mechanism of the profile, at the limits of the searched one."""
    searched = _searched(session, work)
    if not session.profile.exists() or not searched.exists():
        return {}
    names = read_names(None, Profile.load(session.profile))
    limits = _limits_of(searched)
    return {name: path_of(searched.parent, session.model, name, limits) for name in names if name != SEARCHED}


def _limits_of(path: Path) -> str:
    """Limits of a book as TOKENS/SEQS; empty if it does not exist or has none."""
    limits = load_book(path).limits if path.exists() else None
    return "" if limits is None else f"{limits.max_batch_tokens}/{limits.max_num_seqs}"


def _rungs(session: Session, work: Work, *, with_all: bool) -> list[str]:
    """Rungs: sequential at all limits that may be best, then the searched book, and all others if asked for."""
    searched = _searched(session, work)
    if not searched.exists() or not (stored := load_book(searched)).plans:
        return []
    pairs = [*session.sequential]
    if stored.prediction is not None:
        best = stored.prediction.sequential_limits
        pairs.append(f"{best.max_batch_tokens}/{best.max_num_seqs}")
    if not with_all:
        return [*_sequential(pairs), f"{SEARCHED}={searched}"]
    # A sequential rung with the limits of the plans computes the same batches as they do.
    others = [f"{name}={path}" for name, path in mechanism_books(session, work).items() if _has_plans(path)]
    return [*_sequential([*pairs, _limits_of(searched)]), *others, f"{SEARCHED}={searched}"]


def _sequential(pairs: Sequence[str]) -> list[str]:
    return [f"{SEQUENTIAL}={pair}" for pair in dict.fromkeys(pairs)]


def _has_plans(path: Path) -> bool:
    return path.exists() and bool(load_book(path).plans)


def _compared(session: Session, work: Work, benchmark: str, workload: str, *, with_all: bool, run_s: float) -> Piece:
    """A piece that compares rungs with the best sequential one."""
    name, rungs = file_name(work.workload), _rungs(session, work, with_all=with_all)
    needs = [_searched(session, work), *_traces(session, [work])]
    words = ["--workloads", workload, "--rungs", *rungs]
    num_limits = len({rung.partition("=")[2] for rung in rungs if rung.startswith(SEQUENTIAL)} or session.sequential)
    num_rungs = len(rungs) or num_limits + 1
    piece = _in_turn(
        session,
        f"{benchmark.replace('_', '-')}-{name}",
        f"ladder.{benchmark}",
        session.record(benchmark, session.model, name),
        words,
        minutes=session.minutes(num_rungs, run_s, num_rungs if benchmark == "whole_runs" else num_limits),
        needs=needs,
    )
    has_none = all(path.exists() for path in needs) and not rungs
    return replace(piece, without="no plan wins: what was searched is sequential" if has_none else None)


def _whole_runs(session: Session, work: Work) -> Piece:
    with_all = session.is_whole_ladder
    return _compared(session, work, "whole_runs", session.counted(work), with_all=with_all, run_s=work.run_s)


def _steady(session: Session, work: Work) -> Piece:
    return _compared(session, work, "steady", session.located(work.workload), with_all=True, run_s=_TURN_S)
