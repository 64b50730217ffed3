"""Ranged reads: retried at the byte where they broke; nothing outside the source, nothing to a shell."""

from __future__ import annotations

import errno
import os
import pickle

import pytest

from mf_scale.data import storage as storage_module
from mf_scale.data.index import Index
from mf_scale.data.storage import Storage, StorageError, plain_name
from mf_scale.errors import FaultError, UserError

DATA = bytes(range(256)) * 64


@pytest.fixture
def source(tmp_path):
    (tmp_path / "a.tar").write_bytes(DATA)
    return tmp_path


@pytest.fixture(autouse=True)
def no_waiting(monkeypatch):
    monkeypatch.setattr(storage_module, "FIRST_WAIT", 0.0)


def test_a_range_is_read(source):
    storage = pickle.loads(pickle.dumps(Storage(str(source))))  # noqa: S301 - our own object
    assert storage.read("a.tar", 100, 50) == DATA[100:150]
    assert storage.read_all("a.tar") == DATA
    assert storage.read("a.tar", 5, 0) == b""


def test_a_broken_read_goes_on_where_it_broke(source, monkeypatch):
    real, asked = os.pread, []

    def flaky(descriptor, size, offset):
        asked.append(offset)
        if len(asked) in (2, 3):
            raise OSError(errno.EIO, "broken")
        return real(descriptor, min(size, 1000), offset)

    monkeypatch.setattr(os, "pread", flaky)
    assert Storage(str(source)).read("a.tar", 10, 2500) == DATA[10:2510]
    assert asked == [10, 1010, 1010, 1010, 2010]


def test_a_lasting_fault_stops_the_run_with_its_place(source, monkeypatch):
    def broken(*_):
        raise OSError(errno.EIO, "broken")

    monkeypatch.setattr(os, "pread", broken)
    with pytest.raises(StorageError, match=r"a\.tar at byte 7 failed 9 times.*broken") as caught:
        Storage(str(source)).read("a.tar", 7, 1)
    error = pickle.loads(pickle.dumps(caught.value))  # noqa: S301 - our own object
    assert type(error) is StorageError and isinstance(error, FaultError) and error.exit_code == 75
    assert str(error) == str(caught.value) and str(source) in error.where and error.remedy


def test_missing_and_short_files_are_told(source):
    with pytest.raises(UserError, match=r"b\.tar cannot be read"):
        Storage(str(source)).read("b.tar", 0, 1)
    with pytest.raises(UserError, match="ends at byte 16384"):
        Storage(str(source)).read("a.tar", 16000, 1000)


def test_a_size_that_nothing_has_takes_no_memory(source):
    with pytest.raises(UserError, match="ends at byte 16384"):
        Storage(str(source)).read("a.tar", 5, 1 << 60)


@pytest.mark.parametrize(
    "url", ["pipe:cat /etc/passwd", "file:///tmp", "ftp://host/x", "http:relative", "PIPE:id", "https:///x"]
)
def test_other_schemes_are_refused(url):
    with pytest.raises(UserError, match=r"are not read|has no host"):
        Index.open(url)


@pytest.mark.parametrize("name", ["../a.tar", "/etc/passwd", "b/a.tar", "", "..", ".hidden", "pipe:id", "a\\b", "a\n"])
def test_only_plain_names_are_read(source, name):
    with pytest.raises(UserError, match="not a plain file name"):
        plain_name(name)
    with pytest.raises(UserError):
        Storage(str(source / "sub")).read(name, 0, 1)
