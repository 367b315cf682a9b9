"""A whole measuring session on one card, in pieces: an interrupted session goes on when it is started again.

Pieces: starts with and without plans; kinds of sampling; serving of the 8B and the 1B model; limits, chosen and set by
hand; and for each of eight workloads a search for plans, books of the other rungs, and whole runs and the steady state
against the best sequential setting. From the root of the repository, with traces in a folder:

    python -m benchmarks.session --traces traces --time-limit 540

Each piece is a command of its own, which is printed before it runs, and has a record of its own under --out. A piece
that is done is skipped; `session.json` beside the records lists these. So a session may be run in short parts: repeat
the command until it says that all is done. If a record is deleted, it is measured again. With --time-limit a piece
starts only if it can end in time, or can be continued later; the latter are interrupted, which may take a minute more.
`--list` shows all pieces and about how long they take on one H200. Exit status 0 if all requested pieces are done, else
1.
"""

from __future__ import annotations

import argparse
import json
import os
import shlex
import signal
import subprocess
import sys
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from enum import StrEnum
from pathlib import Path
from typing import Any

from benchmarks.common.document import write_json
from benchmarks.common.rungs import read_limits
from benchmarks.engine.serving_document import line as serving_line
from benchmarks.session_pieces import Piece, Session, pieces
from nanoflow.bench.machine import REVISION_VARIABLE, git_revision
from nanoflow.bench.provenance import portable, require_clean
from nanoflow.cli.options import CommandParser
from nanoflow.config import ConfigError

# Least seconds to begin what goes on later, seconds to write a record in the end, and to end a command that is cut.
_LEAST_S, _MARGIN_S, _END_S = 60.0, 15.0, 75.0


class State(StrEnum):
    """The state of a piece."""

    DONE = "done"
    LEFT = "left"
    CUT = "cut off"
    FAILED = "FAILED"
    MISSING = "needs"
    NOTHING = "nothing to run"


@dataclass(frozen=True, slots=True, kw_only=True)
class Outcome:
    """The state of a piece after this command; `text` says more."""

    piece: Piece
    state: State
    text: str = ""


def main(argv: Sequence[str] | None = None) -> int:
    """Run the pieces that are left, and print a table."""
    parser = make_parser()
    args = parser.parse_args(argv)
    try:
        session = read_session(args)
        require_clean(None if args.list else session.out / "session.json", allows_dirty=args.allow_dirty)
        deadline_s = None if args.time_limit is None else time.monotonic() + args.time_limit
        signal.signal(signal.SIGTERM, _end)
        # A shell has what it starts in the background ignore Ctrl-C, and so would all that is started here: but that is
        # how it is told to end.
        signal.signal(signal.SIGINT, signal.default_int_handler)
        outcomes = run(session, args.only, deadline_s, lists_only=args.list)
    except ConfigError as error:
        parser.error(str(error))
    print(table(outcomes))
    return 0 if all(each.state in (State.DONE, State.NOTHING) for each in outcomes) else 1


def _end(*_: object) -> None:
    """Exit in the normal way, so that commands that run are ended."""
    raise SystemExit(128 + signal.SIGTERM)


def make_parser() -> CommandParser:
    parser = CommandParser(prog="python -m benchmarks.session", description=__doc__)
    results = Path("benchmarks/results")
    parser.add_argument("--only", nargs="+", metavar="NAME", help="pieces, or what their names begin with, as serving")
    parser.add_argument("--list", action="store_true", help="run nothing")
    parser.add_argument("--time-limit", type=float, metavar="SECONDS", help="end after so long")
    parser.add_argument("--out", type=Path, default=results, metavar="FOLDER", help=f"of records (default: {results})")
    parser.add_argument("--quick", action="store_true", help="a quarter of the requests, records in the folder quick")
    parser.add_argument("--repeats", type=int, default=3, help="of all (default: 3)")
    parser.add_argument("--traces", type=Path, default=Path("traces"), metavar="FOLDER", help="of NAME.csv")
    parser.add_argument("--books", type=Path, metavar="FOLDER", help="of plan books (default: books under --out)")
    parser.add_argument("--model", default="preset:llama-3-8b", help="what is measured")
    parser.add_argument("--small-model", default="preset:llama-3.2-1b", help="what is also served")
    parser.add_argument(
        "--profile", type=Path, default=results / "profile_llama-3-8b_h200.json", help="by nanoflow profile"
    )
    parser.add_argument(
        "--book",
        type=Path,
        default=results / "plans_llama-3-8b_h200_1024-512.json",
        help="plans that a start is measured with",
    )
    parser.add_argument(
        "--sequential",
        nargs="+",
        default=["2048/1024", "8192/2048"],
        metavar="TOKENS/SEQS",
        help="limits that the sequential rung is tried at, beside those that the search says",
    )
    parser.add_argument(
        "--trials",
        action=argparse.BooleanOptionalAction,
        default=True,
        help="try searched plans on the GPU; without, they are predicted alone (default: --trials)",
    )
    parser.add_argument("--ladder", action="store_true", help="whole runs of nano-batches and of each mechanism too")
    parser.add_argument("--allow-dirty", action="store_true", help="write records of sources without a revision")
    return parser


def read_session(args: argparse.Namespace) -> Session:
    """The session of the command line; ConfigError if an option is invalid."""
    if args.repeats < 1:
        raise ConfigError(f"--repeats must be at least 1, got {args.repeats}")
    for pair in args.sequential:
        read_limits(pair)
    out = args.out / "quick" if args.quick else args.out
    return Session(
        out=out,
        books=args.books or args.out / "books",
        traces=args.traces,
        model=args.model,
        small_model=args.small_model,
        profile=args.profile,
        book=args.book,
        sequential=args.sequential,
        repeats=args.repeats,
        is_quick=args.quick,
        tries_plans=args.trials,
        is_whole_ladder=args.ladder,
        allows_dirty=args.allow_dirty,
        git_revision=git_revision(),
    )


def run(session: Session, only: Sequence[str] | None, deadline_s: float | None, *, lists_only: bool) -> list[Outcome]:
    """Run all requested pieces in order.

    Args:
        session: Options of the session.
        only: Names of pieces, or their beginnings up to a dash; all pieces if None.
        deadline_s: When to stop, on `time.monotonic`; None for never.
        lists_only: Only say the state of each piece.

    Raises:
        ConfigError: There is no piece of this name.
    """
    outcomes, names = list[Outcome](), list[str]()
    for piece in pieces(session):
        names.append(piece.name)
        if only is None or any(piece.name == name or piece.name.startswith(f"{name}-") for name in only):
            outcomes.append(_one(session, piece, deadline_s, lists_only=lists_only))
    for name in only or ():
        if not any(each == name or each.startswith(f"{name}-") for each in names):
            raise ConfigError(f"--only: there is no piece {name!r}; there are {', '.join(names)}")
    return outcomes


def _one(session: Session, piece: Piece, deadline_s: float | None, *, lists_only: bool) -> Outcome:
    path = session.out / "session.json"
    if piece.is_there or _is_done(path, piece):
        return Outcome(piece=piece, state=State.DONE, text=headline(piece.record))
    if missing := [each.name for each in piece.needs if not each.exists()]:
        return Outcome(piece=piece, state=State.MISSING, text=", ".join(missing))
    if piece.without is not None:
        return Outcome(piece=piece, state=State.NOTHING, text=piece.without)
    left_s = None if deadline_s is None else deadline_s - time.monotonic() - _MARGIN_S
    if lists_only or (left_s is not None and left_s < (_LEAST_S if piece.goes_on else piece.minutes * 60)):
        return Outcome(piece=piece, state=State.LEFT)
    words = [*piece.words, "--time-limit", f"{left_s:.0f}"] if piece.has_time_limit and left_s else list(piece.words)
    print(f"\n{piece.name}, about {piece.minutes:.0f} min: python -m {portable(shlex.join(words))}", flush=True)
    piece.record.parent.mkdir(parents=True, exist_ok=True)
    begin_s = time.monotonic()
    # Replaced records must not make the sources of the next piece look changed.
    known = {} if session.git_revision is None else {REVISION_VARIABLE: session.git_revision}
    if not sys.stderr.isatty():
        known["TQDM_DISABLE"] = "1"
    timeout_s = None if left_s is None else left_s + (_MARGIN_S if piece.has_time_limit else 0.0)
    status = run_command([sys.executable, "-m", *words], {**os.environ, **known}, timeout_s)
    if status == 0:
        seconds = round(time.monotonic() - begin_s)
        note = {"command": _command(piece), "seconds": seconds, "git_revision": session.git_revision}
        write_json(path, {**_notes(path), piece.name: note})
        return Outcome(piece=piece, state=State.DONE, text=headline(piece.record))
    is_over = status is None or (deadline_s is not None and time.monotonic() > deadline_s - 2 * _MARGIN_S)
    return Outcome(piece=piece, state=State.CUT if is_over else State.FAILED, text=headline(piece.record))


def run_command(command: Sequence[str], environment: Mapping[str, str], timeout_s: float | None) -> int | None:
    """Run a command: its exit status, or None if it was interrupted. It has ended in any case when this returns."""
    process = subprocess.Popen(command, env=environment, start_new_session=True)
    try:
        return process.wait(timeout_s)
    except subprocess.TimeoutExpired:
        return None
    finally:
        if process.poll() is None:
            # As Ctrl-C does, so that the command ends its own engines and servers.
            process.send_signal(signal.SIGINT)
            try:
                process.wait(_END_S)
            except subprocess.TimeoutExpired:
                os.killpg(process.pid, signal.SIGKILL)
                process.wait()


def _notes(path: Path) -> dict[str, Any]:
    notes: dict[str, Any] = json.loads(path.read_bytes()) if path.exists() else {}
    return notes


def _command(piece: Piece) -> str:
    return portable(shlex.join(piece.words))


def _is_done(path: Path, piece: Piece) -> bool:
    """Whether this exact command has succeeded, and its record still exists."""
    return piece.record.exists() and _notes(path).get(piece.name, {}).get("command") == _command(piece)


def headline(record: Path) -> str:
    """The main figures of a record in one line; empty if it has none."""
    if not record.is_file():
        return ""
    document = json.loads(record.read_bytes())
    if "starts" in document:
        return f"first token after {', '.join(format(each['sum'], '.1f') for each in document['starts'])} s"
    if "loads" in document:
        ratios = [f"HTTP over in-process {ratio:.3f}" for ratio in document.get("http_over_in_process", {}).values()]
        return "; ".join([*map(serving_line, document["loads"]), *ratios])
    return "; ".join(
        f"{each['name']} {each['ratio']:.3f} of {each['base']}"
        for each in document.get("results", ())
        if each["name"] != each["base"]
    )


def table(outcomes: Sequence[Outcome]) -> str:
    """A line for each piece."""
    lines = [
        f"{each.piece.name:<28}{each.piece.minutes:>5.0f} min  {each.state}{f' {each.text}' if each.text else ''}"
        for each in outcomes
    ]
    left = sum(each.piece.minutes for each in outcomes if each.state not in (State.DONE, State.NOTHING))
    num_done = sum(each.state in (State.DONE, State.NOTHING) for each in outcomes)
    lines.append(f"{num_done} of {len(outcomes)} done" + (f"; at most {left:.0f} min are left" if left else ""))
    return "\n".join(lines)


if __name__ == "__main__":
    sys.exit(main())
