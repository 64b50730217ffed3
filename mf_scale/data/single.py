"""Single files by path or url, for what has no index: through the storage, so retried, refused and redacted alike."""

from __future__ import annotations

import threading
from pathlib import Path
from urllib.parse import unquote, urlsplit

from mf_scale.config.urls import redact, scheme_of
from mf_scale.data.refusals import PLACE
from mf_scale.data.storage import MISSING, Storage
from mf_scale.errors import FaultError, UserError

MOST_BYTES = 256 << 20
"""Bytes of one image file that are read."""
LOCAL = "file://"


class AnyFiles(Storage):
    """The files of a server, a bucket or this machine, by whatever path a person gives: nobody else names them."""

    def _checked(self, name: str) -> str:
        return name


class SingleFiles:
    """Reads whole files by path or url. Safe for several threads; one connection pool a server."""

    def __init__(self) -> None:
        self._storages: dict[str, AnyFiles] = {}
        self._lock = threading.Lock()

    def read(self, given: str) -> bytes:
        """The bytes of a file; UserError where it cannot be read, FaultError where the network or disk fails for good.

        Neither says a secret of the url.
        """
        storage, name = self.place(given)
        if not storage.scheme:
            return self._read_local(Path(name))
        try:
            _refuse_size(storage.size(name), given)
            return storage.read_all(name)
        except FaultError:
            raise
        except UserError as error:
            remedy = "Check the url." if error.remedy == PLACE else error.remedy
            raise UserError(error.what, where=redact(error.where), remedy=remedy) from error

    def place(self, given: str) -> tuple[AnyFiles, str]:
        """Storage and name in it of a path or url; UserError for a url that is not read."""
        local = local_path(given)
        if local is not None:
            return self._storage("/"), str(local.absolute())
        scheme_of(given)
        parts = urlsplit(given)
        name = parts.path.lstrip("/")
        if not name:
            raise UserError("the url names no file", where=redact(given), remedy="Check the url.")
        return self._storage(f"{parts.scheme.lower()}://{parts.netloc}"), name

    def _storage(self, source: str) -> AnyFiles:
        with self._lock:
            return self._storages.setdefault(source, AnyFiles(source))

    @staticmethod
    def _read_local(path: Path) -> bytes:
        try:
            _refuse_size(path.stat().st_size, str(path))
            return path.read_bytes()
        except FileNotFoundError as error:
            raise UserError("the image does not exist", where=str(path), remedy="Check the path.") from error
        except MISSING as error:
            raise UserError(f"the image cannot be read: {error.strerror}", where=str(path)) from error
        except (OSError, ValueError) as error:  # ValueError: a name with a zero byte
            raise UserError(f"the image cannot be read: {error}", where=str(path), remedy="Check the disk.") from error


def local_path(given: str) -> Path | None:
    """The path of a local file (`file://` or plain); None for any other url."""
    if given.lower().startswith(LOCAL):
        return Path(unquote(urlsplit(given).path))
    return None if "://" in given else Path(given)


def _refuse_size(size: int, where: str) -> None:
    if size > MOST_BYTES:
        raise UserError(
            f"the file has {size / 2**20:,.0f} MiB, above the limit of {MOST_BYTES >> 20} MiB an image",
            where=redact(where),
            remedy="Make it smaller.",
        )
