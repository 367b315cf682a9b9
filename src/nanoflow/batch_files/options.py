"""Options of `nanoflow batch`. Nothing heavy is imported here: `--help` shows these options."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

from nanoflow.option import ConfigError, option, read_count, require_positive

LineOrder = Literal["throughput", "arrival"]


@dataclass(frozen=True, slots=True, kw_only=True)
class BatchConfig:
    """How the lines of a file are answered."""

    order: LineOrder = option(
        "throughput",
        "Order in which lines are sent: throughput puts shared beginnings together and long prompts beside long "
        "completions, arrival is that of the file; answers are written as they are ready",
    )
    look_ahead: int = option(10_000, "Lines among which the order is chosen, at most 128 MiB of them", read=read_count)
    num_at_once: int | None = option(
        None, "Most lines under way; twice the requests that run at once (max_num_seqs) if not given", read=read_count
    )
    served_model_name: str | Sequence[str] | None = option(
        None,
        "Name that lines may have as their model, may be given several times; the model argument if not given. A line "
        "with another name gets an error, one without a name is answered",
    )
    progress: bool = option(True, "Show tokens/s, lines done and the time left: a bar, or a line every 30 s in a file")

    def __post_init__(self) -> None:
        if self.order not in ("throughput", "arrival"):
            raise ConfigError(f"order must be throughput or arrival, got {self.order!r}")
        for name in ("look_ahead", "num_at_once"):
            if getattr(self, name) is not None:
                require_positive(name, getattr(self, name))
