"""A source in Google's storage (gcp-storage-emulator): the same samples, through broken connections and refusals."""

from __future__ import annotations

import json
import logging
from pathlib import Path

import pytest

from mf_scale.data import storage as storage_module
from mf_scale.data.index import Index, verify_shards
from mf_scale.data.storage import Storage
from mf_scale.errors import UserError
from tests.servers import RangeHandler, cutting_proxy, gs_server, http_server, send
from tests.sources import make_source

pytestmark = pytest.mark.integration
pytest.importorskip("gcsfs", reason="reading gs needs the extra mf_scale[gcs]")
pytest.importorskip("gcp_storage_emulator", reason="the Google storage of the tests is gcp-storage-emulator")

LARGE = bytes(range(256)) * 8_000
"""About 2 MB."""


@pytest.fixture(scope="module")
def local(tmp_path_factory):
    return make_source(tmp_path_factory.mktemp("source"), [5, 4])


@pytest.fixture(scope="module")
def endpoint(local):
    with gs_server() as url:
        send(f"{url}/storage/v1/b?project=test", b'{"name": "bucket"}', "POST", "application/json")
        files = {path.name: path.read_bytes() for path in Path(local.source).iterdir()} | {"large.tar": LARGE}
        for name, data in files.items():
            send(f"{url}/upload/storage/v1/b/bucket/o?uploadType=media&name=sets/train/{name}", data, "POST")
        yield url


@pytest.fixture(autouse=True)
def environment(monkeypatch, tmp_path):
    """Nothing of the developer's."""
    monkeypatch.setenv("GOOGLE_APPLICATION_CREDENTIALS", str(tmp_path / "none.json"))
    monkeypatch.setenv("NO_GCE_CHECK", "true")
    monkeypatch.setattr(storage_module, "FIRST_WAIT", 0.01)


def test_a_source_reads_as_the_local_one(endpoint, local, monkeypatch):
    monkeypatch.setenv("STORAGE_EMULATOR_HOST", endpoint)
    index = Index.open("gs://bucket/sets/train")
    assert index.digest == local.digest
    verify_shards(index, checksums=True)
    for row in map(index.sample, range(index.samples)):
        part = row.shard, row.offset, row.size
        assert index.storage.read(*part) == local.storage.read(*part)


def test_a_connection_that_breaks_in_mid_body_is_got_through(endpoint, monkeypatch):
    numbers = []

    def allowed(number: int) -> int | None:
        numbers.append(number)
        return 300_000 if number == 0 else None

    with cutting_proxy(endpoint, allowed) as proxy:
        monkeypatch.setenv("STORAGE_EMULATOR_HOST", proxy)
        assert Storage("gs://bucket/sets/train").read("large.tar", 7, len(LARGE) - 7) == LARGE[7:]
    assert len(numbers) > 1


@pytest.mark.parametrize("source", ["gs://bucket/sets/other", "gs://no-such-bucket/x"])
def test_what_is_not_there_is_told_at_once(endpoint, source, monkeypatch):
    monkeypatch.setenv("STORAGE_EMULATOR_HOST", endpoint)
    monkeypatch.setattr(Storage, "_wait", lambda *_: pytest.fail("it was tried again"))
    with pytest.raises(UserError, match=r"index\.json cannot be read: it is not there \(404\)") as caught:
        Index.open(source)
    assert caught.value.exit_code == 2 and caught.value.where == source
    with pytest.raises(UserError, match=r"large\.tar ends at byte 9000000"):
        Storage("gs://bucket/sets/train").read("large.tar", 9_000_000, 5)


@pytest.mark.parametrize(("status", "remedy"), [(401, "CREDENTIALS"), (403, "CREDENTIALS"), (400, "url"), (416, "cut")])
def test_a_refusal_is_told_at_once_and_prints_nothing_else(status, remedy, monkeypatch, capfd):
    class Refusing(RangeHandler):
        def answer(self, start, stop):
            body = json.dumps({"error": {"code": status, "message": "invalid" if status == 400 else "no"}}).encode()
            self.begin(status, len(body), {"Content-Type": "application/json"})
            self.wfile.write(body)

    monkeypatch.setattr(Storage, "_wait", lambda *_: pytest.fail("it was tried again"))
    monkeypatch.setattr(logging.root, "handlers", [])
    with http_server(Refusing) as url:
        monkeypatch.setenv("STORAGE_EMULATOR_HOST", url)
        with pytest.raises(UserError, match=remedy) as caught:
            Storage("gs://bucket/x").read("a.tar", 0, 1)
    assert caught.value.exit_code == 2
    assert capfd.readouterr() == ("", "")
