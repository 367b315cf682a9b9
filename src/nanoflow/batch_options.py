"""Options of the server's batch API: where files and batches are kept, and how much they may take."""

from __future__ import annotations

from dataclasses import dataclass, fields

from nanoflow.bounds import ServerBounds
from nanoflow.option import option, read_count, require_positive


@dataclass(frozen=True, slots=True, kw_only=True)
class BatchServerOptions(ServerBounds):
    """Files and batches over HTTP; `server/batch_store.py` keeps them."""

    batch_dir: str | None = option(
        None, "Folder that /v1/files and /v1/batches are kept in, which turns them on; they outlive the server"
    )
    batch_requests_at_once: int | None = option(
        None,
        "Most requests of batches under way, beside those of other calls; as many as run at once (max_num_seqs) if "
        "not given",
        read=read_count,
    )
    batch_dir_gib: float = option(16.0, "GiB of files in batch_dir beyond which nothing is taken any more (507)")
    max_file_bytes: int = option(200 * 2**20, "Longest file that may be uploaded (413)", read=read_count)
    max_batch_lines: int = option(50_000, "Most requests of a batch; one with more fails", read=read_count)
    max_open_batches: int = option(256, "Most batches that wait or run at once; more are refused (429)")

    def check_bounds(self) -> None:
        """Check that every bound is possible; ConfigError otherwise."""
        ServerBounds.check_bounds(self)
        inherited = {one.name for one in fields(ServerBounds)}
        for one in fields(BatchServerOptions):
            value = getattr(self, one.name)
            if one.name not in inherited and one.name != "batch_dir" and value is not None:
                require_positive(one.name, value)
