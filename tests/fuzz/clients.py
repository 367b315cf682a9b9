"""Clients that send hostile inputs, several at the same time, and note what is wrong with the answers."""

from __future__ import annotations

import asyncio
from collections import Counter
from collections.abc import Callable, Iterable
from contextlib import suppress
from dataclasses import dataclass, field

from tests.fuzz.judge import Broken, Reply, problem_of, read_reply
from tests.fuzz.messages import Hostile

# Where no answer may be due, this is waited for one. What has been sent well may take longer: it may be served. One in
# so many is waited for until it ends, so that an answer that never comes is found.
_RAW_WAIT_S = 0.15
_PATIENCE_S = 3.0
_LONG_PATIENCE_S = 120.0
_LONG_EVERY = 40
_PIECES = 4
_MAX_LINE = 2**24


@dataclass(frozen=True, slots=True, kw_only=True)
class Finding:
    """Something wrong: with which input, and what."""

    number: int
    what: str


@dataclass(slots=True, kw_only=True)
class Findings:
    """What came of all inputs.

    Attributes:
        findings: What was wrong.
        num_of: Inputs by kind and status.
    """

    findings: list[Finding] = field(default_factory=list)
    num_of: Counter[str] = field(default_factory=Counter)

    def add(self, number: int, what: str) -> None:
        """Note that something is wrong."""
        self.findings.append(Finding(number=number, what=what))


async def send_all(
    port: int, inputs: Callable[[int], Hostile], numbers: Iterable[int], num_clients: int, findings: Findings
) -> None:
    """Send the inputs of these numbers through so many clients."""
    left = iter(numbers)

    async def client() -> None:
        for number in left:
            await _send(port, inputs(number), findings)

    await asyncio.gather(*(client() for _ in range(num_clients)))


async def _send(port: int, hostile: Hostile, findings: Findings) -> None:
    try:
        reader, writer = await asyncio.open_connection("127.0.0.1", port, limit=_MAX_LINE)
    except OSError as error:
        findings.add(hostile.number, f"no connection: {error}")
        return
    try:
        statuses = await _exchange(reader, writer, hostile)
    except Broken as error:
        findings.add(hostile.number, f"{hostile.kind}: {error}")
        statuses = ["broken"]
    except OSError as error:
        # The server may close while a client that breaks the rules still sends, but not on one that keeps them.
        statuses = ["reset"]
        if hostile.how in ("whole", "slow"):
            findings.add(hostile.number, f"{hostile.kind}: {type(error).__name__}")
    finally:
        writer.transport.abort()
    findings.num_of.update(f"{hostile.kind} {status}" for status in statuses)


async def _exchange(reader: asyncio.StreamReader, writer: asyncio.StreamWriter, hostile: Hostile) -> list[str]:
    """Send an input as it is to be sent; the statuses of the answers."""
    if hostile.how == "slow":
        size = len(hostile.data) // _PIECES + 1
        for start in range(0, len(hostile.data), size):
            writer.write(hostile.data[start : start + size])
            await writer.drain()
            await asyncio.sleep(0.01)
    else:
        writer.write(hostile.data)
        await writer.drain()
    if hostile.how == "cut":
        await asyncio.sleep(0.01)
        if hostile.number % 2:
            with suppress(OSError):
                writer.write_eof()
        return ["cut"]
    if hostile.how == "leave":
        await asyncio.sleep(hostile.number % 10 / 100)
        return ["left"]
    if hostile.how == "raw":
        return await _answers(reader, hostile)
    patience_s = _PATIENCE_S if hostile.number % _LONG_EVERY else _LONG_PATIENCE_S
    try:
        reply = await asyncio.wait_for(read_reply(reader), patience_s)
    except TimeoutError:
        if patience_s == _LONG_PATIENCE_S:
            raise Broken(f"no answer in {patience_s:g} s") from None
        return ["unfinished"]
    if reply is None:
        raise Broken("the connection was closed without an answer")
    return [_judged(reply)]


async def _answers(reader: asyncio.StreamReader, hostile: Hostile) -> list[str]:
    """What comes of something to which there may be no answer, or several."""
    statuses = []
    is_head = hostile.data[:5].upper() == b"HEAD "
    with suppress(TimeoutError):
        async with asyncio.timeout(_RAW_WAIT_S * (10 if hostile.number % _LONG_EVERY == 0 else 1)):
            while (reply := await read_reply(reader, is_head=is_head)) is not None:
                statuses.append(_judged(reply, is_head=is_head))
    return statuses or ["silence"]


def _judged(reply: Reply, *, is_head: bool = False) -> str:
    problem = problem_of(reply, is_head=is_head)
    if problem is not None:
        raise Broken(problem)
    return str(reply.status)
