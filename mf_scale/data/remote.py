"""Remote: one request of a range, over http or through fsspec. Retrying is the storage's.

Credentials come from the environment only, as `mf_scale.config.urls.ENVIRONMENT` says.
"""

from __future__ import annotations

import logging
import os
import re
from collections.abc import Awaitable, Callable
from typing import Any, Protocol

from mf_scale.config.urls import EXTRAS
from mf_scale.data.refusals import BEHIND, status_of
from mf_scale.errors import UserError

AUTHORIZATION = "MF_SCALE_HTTP_AUTHORIZATION"
CONNECT_SECONDS = 30
SILENCE_SECONDS = 60
"""How long a server may be silent before the connection counts as broken."""
REQUEST = 4 << 20
"""Bytes of one request to a store whose answer comes whole or not at all."""
SMALLEST_REQUEST = 64 << 10


class Remote(Protocol):
    """The files of a server or store, by url. What goes wrong is raised as the library has it."""

    def read(self, url: str, offset: int, size: int) -> bytes:
        """1 to `size` bytes from `offset`; none behind the end."""

    def size(self, url: str) -> int | None:
        """Bytes of a file; None where the server does not tell."""


def open_remote(scheme: str, where: str) -> Remote:
    """The files of a scheme; for this process only: what it holds does not survive a fork.

    Raises UserError naming `where` if the packages for it are not installed.
    """
    try:
        return HttpFiles() if scheme in ("http", "https") else StoreFiles(scheme)
    except ImportError as error:
        raise UserError(
            f"reading {scheme} needs a package that is not installed: {error}",
            where=where,
            remedy=f"pip install 'mf_scale[{EXTRAS[scheme]}]'",
        ) from error


class HttpFiles:
    """Files of web servers. An answer that breaks delivers what came: the next request begins behind it."""

    def __init__(self) -> None:
        import aiohttp
        from fsspec.implementations.http import HTTPFileSystem

        headers = {"Accept-Encoding": "identity"}  # compressed answers have no ranges
        if secret := os.environ.get(AUTHORIZATION):
            headers["Authorization"] = secret  # aiohttp drops it where a redirect leads to another server
        timeout = aiohttp.ClientTimeout(total=None, sock_connect=CONNECT_SECONDS, sock_read=SILENCE_SECONDS)
        session = {"headers": headers, "timeout": timeout, "auto_decompress": False}
        self._files = HTTPFileSystem(client_kwargs=session, skip_instance_cache=True)

    def read(self, url: str, offset: int, size: int) -> bytes:
        """See Remote; one request for all of it."""
        received = bytearray()
        try:
            self._run(self._receive, url, offset, size, received)
        except UserError:
            raise
        except Exception:
            if not received:
                raise
        return bytes(received)

    def size(self, url: str) -> int | None:
        """See Remote; asked with a range of one byte, which tells as well whether ranges are answered."""
        size: int | None = self._run(self._total, url)
        return size

    def _run(self, act: Callable[..., Awaitable[Any]], *arguments: Any) -> Any:
        from fsspec.asyn import sync

        return sync(self._files.loop, act, *arguments)

    async def _receive(self, url: str, offset: int, size: int, received: bytearray) -> None:
        session = await self._files.set_session()
        async with session.get(url, headers={"Range": f"bytes={offset}-{offset + size - 1}"}) as answer:
            if answer.status == BEHIND:
                return
            answer.raise_for_status()
            if not _is_the_range(answer, offset, size):
                raise _no_ranges(url)
            async for chunk in answer.content.iter_any():
                if len(received) + len(chunk) > size:
                    raise _no_ranges(url)
                received += chunk

    async def _total(self, url: str) -> int | None:
        session = await self._files.set_session()
        async with session.get(url, headers={"Range": "bytes=0-0"}) as answer:
            total = re.fullmatch(r"bytes (?:\d+-\d+|\*)/(\d+)", answer.headers.get("Content-Range", ""))
            if answer.status != BEHIND:
                answer.raise_for_status()
            return int(total[1]) if total else _length(answer)


class StoreFiles:
    """Objects of an S3 or Google store, through fsspec. A request that breaks makes the next smaller for a while."""

    def __init__(self, scheme: str) -> None:
        import fsspec

        self._files = fsspec.filesystem(scheme, skip_instance_cache=True, **_settings(scheme))
        if scheme == "s3":
            self._files.retries = 1  # the storage tries again, and says how often
        self._request = REQUEST
        logging.getLogger("gcsfs").setLevel(logging.CRITICAL)  # it prints tracebacks of what is handled here

    def read(self, url: str, offset: int, size: int) -> bytes:
        """See Remote."""
        wanted = min(size, self._request)
        try:
            data: bytes = self._files.cat_file(url, start=offset, end=offset + wanted)
        except Exception as error:
            if status_of(error) == BEHIND:
                return b""
            self._request = max(self._request // 2, SMALLEST_REQUEST)
            raise
        self._request = min(self._request * 2, REQUEST)
        if len(data) > wanted:
            raise _no_ranges(url)
        return data

    def size(self, url: str) -> int | None:
        """See Remote."""
        size = self._files.size(url)
        return None if size is None else int(size)


def _settings(scheme: str) -> dict[str, Any]:
    if scheme != "s3":
        return {}
    return {
        "config_kwargs": {
            "retries": {"total_max_attempts": 1, "mode": "standard"},
            "connect_timeout": CONNECT_SECONDS,
            "read_timeout": SILENCE_SECONDS,
        }
    }


def _is_the_range(answer: Any, offset: int, size: int) -> bool:
    """Whether an answer of aiohttp holds the range asked for, or its beginning; a small file may be sent whole."""
    if answer.status != 206:
        length = _length(answer)
        return offset == 0 and length is not None and length <= size
    said = re.match(r"bytes (\d+)-", answer.headers.get("Content-Range", ""))
    return said is not None and int(said[1]) == offset


def _length(answer: Any) -> int | None:
    text = answer.headers.get("Content-Length", "")
    return int(text) if text.isdecimal() else None


def _no_ranges(url: str) -> UserError:
    return UserError(
        "the server sends something else than the range of the file that it was asked for",
        where=url,
        remedy="Use a server or store that answers range requests, or a local copy.",
    )
