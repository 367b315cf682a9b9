"""/v1/files: upload, look up, list, read and delete the files of batches. `batch_store.py` keeps them."""

from __future__ import annotations

import os
import shutil
import time
from collections.abc import AsyncIterator, Mapping
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Annotated, Any, BinaryIO, Literal

from fastapi import APIRouter, Query, Request, Response
from fastapi.responses import FileResponse
from starlette.datastructures import FormData, UploadFile
from starlette.requests import ClientDisconnect

from nanoflow.server.batch_store import MAX_ROWS, BatchStore, StoredFile, new_id
from nanoflow.server.batches import beside, disk_errors, owner_of, page
from nanoflow.server.errors import ERROR_RESPONSES, ApiError, ClientDisconnectedError, json_response
from nanoflow.server.service import Service

PATH = "/v1/files"
UPLOADED, ANSWERS = "batch", "batch_output"
# What a multipart body has beside the file: borders, and a few short fields.
FORM_BYTES = 1 << 16
_MAX_FIELDS, _MAX_NAME_CHARS = 8, 255
_GIB = 2**30
_FORM: Mapping[str, Any] = {
    "requestBody": {
        "required": True,
        "content": {
            "multipart/form-data": {
                "schema": {
                    "type": "object",
                    "properties": {
                        "file": {"type": "string", "format": "binary"},
                        "purpose": {"type": "string", "enum": [UPLOADED]},
                    },
                    "required": ["file", "purpose"],
                }
            }
        },
    }
}
Limit = Annotated[int, Query(ge=1, le=10_000)]


def files_router(service: Service, store: BatchStore) -> APIRouter:
    """The routes of files."""
    router = APIRouter(tags=["batches"], responses=ERROR_RESPONSES)

    @router.post(PATH, openapi_extra=dict(_FORM))
    async def upload_file(request: Request) -> Response:
        """Keep a file of requests, one a line."""
        if not request.headers.get("content-type", "").lower().startswith("multipart/form-data"):
            raise ApiError(415, "the body must be multipart/form-data with file and purpose")
        await beside(_check_room, service, store)
        async with _form(request) as form:
            purpose, upload = form.get("purpose"), form.get("file")
            if purpose != UPLOADED:
                raise ApiError(400, f"purpose must be {UPLOADED!r}, got {str(purpose)[:40]!r}", param="purpose")
            if not isinstance(upload, UploadFile):
                raise ApiError(400, "file: there is none", param="file")
            name = Path(upload.filename or "requests.jsonl").name[:_MAX_NAME_CHARS]
            file = await beside(_kept, service, store, upload.file, name, owner_of(service, request))
        return json_response(shown(file))

    @router.get(PATH)
    async def list_files(
        request: Request,
        purpose: str | None = None,
        after: str | None = None,
        limit: Limit = 10_000,
        order: Literal["asc", "desc"] = "desc",
    ) -> Response:
        """Files, the newest first unless `order` is asc."""
        found = [shown(file) for file in await beside(store.files, owner_of(service, request), purpose)]
        found = found[::-1] if order == "asc" else found
        ids = [file["id"] for file in found]
        start = ids.index(after) + 1 if after in ids else 0
        return json_response(page(found[start : start + limit + 1], limit))

    @router.get(f"{PATH}/{{file_id}}")
    async def retrieve_file(file_id: str, request: Request) -> Response:
        """What a file is."""
        return json_response(shown(await _known(service, store, request, file_id)))

    @router.get(f"{PATH}/{{file_id}}/content", response_class=FileResponse)
    async def file_content(file_id: str, request: Request) -> Response:
        """What a file has."""
        file = await _known(service, store, request, file_id)
        path = store.path_of(file.id)
        if not await beside(path.exists):
            raise ApiError(404, f"the content of the file {file.id} is gone", code="file_not_found")
        return FileResponse(path, media_type="application/octet-stream")

    @router.delete(f"{PATH}/{{file_id}}")
    async def delete_file(file_id: str, request: Request) -> Response:
        """Remove a file that no batch reads any more."""
        file = await _known(service, store, request, file_id)
        user = await beside(store.uses, file.id)
        if user is not None:
            raise ApiError(409, f"the batch {user} reads this file and has not ended", code="file_in_use")
        await beside(store.delete_file, file.id)
        return json_response({"id": file.id, "object": "file", "deleted": True})

    return router


def shown(file: StoredFile) -> dict[str, Any]:
    """A file as OpenAI's API has it."""
    return {
        "id": file.id,
        "object": "file",
        "bytes": file.bytes,
        "created_at": file.created_at,
        "filename": file.filename,
        "purpose": file.purpose,
        "status": "processed",
        "expires_at": None,
        "status_details": None,
    }


@asynccontextmanager
async def _form(request: Request) -> AsyncIterator[FormData]:
    """The form of an upload; what is long is in a temporary file until the end of the block."""
    try:
        with disk_errors():
            form = await request.form(max_files=1, max_fields=_MAX_FIELDS, max_part_size=FORM_BYTES)
    except ClientDisconnect:
        raise ClientDisconnectedError from None
    try:
        yield form
    finally:
        await form.close()


async def _known(service: Service, store: BatchStore, request: Request, file_id: str) -> StoredFile:
    file = await beside(store.file, file_id, owner_of(service, request))
    if file is None:
        raise ApiError(404, f"there is no file {file_id[:100]!r}", code="file_not_found")
    return file


def _check_room(service: Service, store: BatchStore) -> None:
    most = int(service.config.batch_dir_gib * _GIB)
    if (size := store.num_bytes) >= most:
        message = f"files and batches take {size / _GIB:.1f} GiB, and may take {most / _GIB:g}: delete some"
        raise ApiError(507, message, code="no_room")
    if store.counts()[0] >= MAX_ROWS:
        raise ApiError(507, f"there are {MAX_ROWS} files: delete some", code="no_room")


def _kept(service: Service, store: BatchStore, content: BinaryIO, name: str, owner: str) -> StoredFile:
    """Write an upload to the disk, then its row."""
    file_id = new_id("file-")
    path = store.path_of(file_id)
    try:
        with path.open("xb") as target:
            shutil.copyfileobj(content, target, 1 << 20)
            target.flush()
            os.fsync(target.fileno())
        size = path.stat().st_size
        if size > service.config.max_file_bytes:
            raise ApiError(413, f"a file may have at most {service.config.max_file_bytes} bytes", param="file")
        if size == 0:
            raise ApiError(400, "file: it is empty", param="file")
        file = StoredFile(id=file_id, bytes=size, created_at=int(time.time()), filename=name, purpose=UPLOADED)
        store.add_file(file, owner)
    except BaseException:
        path.unlink(missing_ok=True)
        raise
    return file
