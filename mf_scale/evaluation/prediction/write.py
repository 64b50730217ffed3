"""A part's results on disk: written under temporary names, and committed once all of it is there.

part-000000.json, written last, is the commit. What a killed process left is begun anew by whoever holds the part's
lock; a part that is committed is never touched again.
"""

from __future__ import annotations

import io
import json
import os
import tarfile
from pathlib import Path
from typing import IO, Any

from mf_scale.evaluation.prediction.claims import Claims, writer_mark
from mf_scale.evaluation.prediction.commits import books_of, is_committed, part_name
from mf_scale.evaluation.prediction.find import Written
from mf_scale.evaluation.prediction.plan import SUMMARY, mark
from mf_scale.evaluation.prediction.words import FILES
from mf_scale.rundir import disk_errors, fsync_folder, write_atomically
from mf_scale.tracking.pictures import write_bytes

NAMED = 5
"""Images without a segment that a part's commit names."""


class PartWriter:
    """Writes the parts of a prediction, one after the other; each of them is claimed before."""

    def __init__(self, folder: Path, layout: str, claims: Claims, extra: dict[str, Any]) -> None:
        self.folder, self.layout, self._claims, self._extra = folder, layout, claims, extra
        self.books, self._mark = books_of(folder, layout), writer_mark()
        self._open: dict[str, IO[bytes]] = {}
        self._tar: tarfile.TarFile | None = None
        self._part = -1
        self._counts = {"images": 0, "quarantined": 0, "empty": 0}
        self._empty: list[str] = []

    def add(self, part: int, written: Written) -> None:
        """One image's results into a part; FaultError or UserError where the disk does not take them."""
        with disk_errors(self.books):
            if part != self._part:
                self._begin(part)
            self._counts["images"] += 1
            line = (_json(written.record) + "\n").encode()
            if written.quarantined:
                self._counts["quarantined"] += 1
                self._file("quarantine.jsonl").write(line)
                return
            if not written.record["segments"]:
                self._counts["empty"] += 1
                self._empty.append(written.record["image"])
            self._file("jsonl").write(line)
            if self.layout == FILES:
                self._file("jsonl").flush()  # so that what lies in the folder is always known to be ours
                self._write_files(written)
            else:
                self._write_members(written)

    def commit(self, part: int) -> dict[str, int]:
        """The part is whole: give its files their names. Its counts."""
        with disk_errors(self.books):
            if part != self._part:
                self._begin(part)  # of a tar without a sample
            self._file("jsonl")
            if self._tar is not None:
                self._tar.close()
                self._tar = None
            if is_committed(self.books, self.layout, part):  # by another process, where there are no locks
                self._discard()
                self._claims.release(part)
                return dict(self._counts)
            for ending, file in self._open.items():
                file.flush()
                os.fsync(file.fileno())
                file.close()
                self._partial(ending).replace(self.books / part_name(part, ending))
            self._open = {}
            fsync_folder(self.books)
        commit = {**self._counts, "without_segments": self._empty[:NAMED]}
        write_atomically(self.books / part_name(part, "json"), _json(commit), mark=self._mark)
        self._claims.release(part)
        self._part = -1
        return dict(self._counts)

    def abandon(self) -> None:
        """Leave the part that is not whole: close its files and remove them."""
        if self.layout != FILES:
            self._discard()
        for file in self._open.values():  # they name the images whose files are there, for --overwrite
            file.close()
        self._open, self._tar, self._part = {}, None, -1

    def _discard(self) -> None:
        for ending, file in self._open.items():
            file.close()
            self._partial(ending).unlink(missing_ok=True)
        self._open, self._tar, self._part = {}, None, -1

    def _begin(self, part: int) -> None:
        self._claims.clean(part)
        (self.folder / SUMMARY).unlink(missing_ok=True)  # of all parts, when this one was there
        if self._claims.alone(part):  # else these may be another's that is about to commit them
            for ending in ("json", "jsonl", "quarantine.jsonl", "tar"):  # the first: of a part that lost a file
                (self.books / part_name(part, ending)).unlink(missing_ok=True)
        self._part, self._empty = part, []
        self._counts = dict.fromkeys(self._counts, 0)

    def _file(self, ending: str) -> IO[bytes]:
        if ending not in self._open:
            self._open[ending] = self._partial(ending).open("wb")
        return self._open[ending]

    def _partial(self, ending: str) -> Path:
        return self.books / f".{part_name(self._part, ending)}.{self._mark}"

    def _write_files(self, written: Written) -> None:
        for ending, content in written.files:
            write_bytes(self.folder / f"{written.name}{ending}", content)
        text = _json({**written.record, **self._extra}, indent=1)
        write_atomically(self.folder / f"{written.name}.json", text, mark=mark())

    def _write_members(self, written: Written) -> None:
        if self._tar is None:
            self._tar = tarfile.open(fileobj=self._file("tar"), mode="w")  # noqa: SIM115 - closed by `commit`
        for ending, content in written.files:
            member = tarfile.TarInfo(f"{written.name}{ending}")
            member.size = len(content)
            self._tar.addfile(member, io.BytesIO(content))
            self._tar.members = []  # type: ignore[attr-defined]  # it would keep them all


def _json(value: dict[str, Any], indent: int | None = None) -> str:
    """JSON for people; names of files that are not UTF-8 have question marks there."""
    return json.dumps(value, ensure_ascii=False, indent=indent).encode("utf-8", "replace").decode()
