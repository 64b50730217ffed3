"""A source in an S3 store (moto's server): the same samples, through broken connections; credentials only as told."""

from __future__ import annotations

import multiprocessing
import os
import subprocess
import sys
from pathlib import Path

import pytest

from mf_scale.data import remote as remote_module
from mf_scale.data import storage as storage_module
from mf_scale.data.cache import CacheSettings
from mf_scale.data.index import Index, verify_shards
from mf_scale.data.storage import Storage, StorageError
from mf_scale.errors import UserError
from tests.servers import cutting_proxy, free_port, s3_server, send
from tests.sources import make_source

pytestmark = pytest.mark.integration
pytest.importorskip("s3fs", reason="reading s3 needs the extra mf_scale[s3]")
pytest.importorskip("moto", reason="the S3 server of the tests is moto")

KEY, SECRET = "AKIAIOSFODNN7EXAMPLE", "wJalrXUtnFEMI/K7MDENG/bPxRfiCYEXAMPLEKEY"
LARGE = bytes(range(256)) * 8_000
"""About 2 MB."""


@pytest.fixture(scope="module")
def local(tmp_path_factory):
    return make_source(tmp_path_factory.mktemp("source"), [5, 4])


@pytest.fixture(scope="module")
def endpoint(local):
    with s3_server() as url:
        send(f"{url}/bucket", b"")
        for path in Path(local.source).iterdir():
            send(f"{url}/bucket/sets/train/{path.name}", path.read_bytes())
        send(f"{url}/bucket/sets/train/large.tar", LARGE)
        yield url


@pytest.fixture(autouse=True)
def environment(monkeypatch, tmp_path):
    """Credentials of the test's own, and nothing of the developer's."""
    for name in [name for name in os.environ if name.startswith("AWS_")]:
        monkeypatch.delenv(name)
    for name in ("AWS_CONFIG_FILE", "AWS_SHARED_CREDENTIALS_FILE"):
        monkeypatch.setenv(name, str(tmp_path / "none"))
    monkeypatch.setenv("AWS_EC2_METADATA_DISABLED", "true")
    monkeypatch.setenv("AWS_ACCESS_KEY_ID", KEY)
    monkeypatch.setenv("AWS_SECRET_ACCESS_KEY", SECRET)
    monkeypatch.setenv("AWS_DEFAULT_REGION", "us-east-1")
    monkeypatch.setattr(storage_module, "FIRST_WAIT", 0.001)


def contents(index: Index) -> list[bytes]:
    return [index.storage.read(row.shard, row.offset, row.size) for row in map(index.sample, range(index.samples))]


def test_a_source_reads_as_the_local_one_with_and_without_a_cache(endpoint, local, tmp_path, monkeypatch):
    monkeypatch.setenv("AWS_ENDPOINT_URL", endpoint)
    index = Index.open("s3://bucket/sets/train")
    assert index.digest == local.digest
    verify_shards(index, checksums=True)
    assert contents(index) == contents(local)
    settings = CacheSettings(str(tmp_path), 1 << 26)
    assert contents(Index.open("s3://bucket/sets/train", settings)) == contents(local)
    index = Index.open("s3://bucket/sets/train", settings)
    monkeypatch.setenv("AWS_ENDPOINT_URL", "http://127.0.0.1:1")
    assert contents(index) == contents(local)  # the store is gone, the cache is not


def test_a_forked_process_reads_like_its_parent(endpoint, monkeypatch):
    monkeypatch.setenv("AWS_ENDPOINT_URL", endpoint)
    storage = Storage("s3://bucket/sets/train")
    assert storage.read("large.tar", 5, 10) == LARGE[5:15]
    child = multiprocessing.get_context("fork").Process(
        target=lambda: os._exit(int(storage.read("large.tar", 9, 300) != LARGE[9:309]))
    )
    child.start()
    child.join(timeout=30)
    child.kill()
    assert child.exitcode == 0 and storage.read("large.tar", 5, 10) == LARGE[5:15]


def test_connections_that_break_in_mid_body_are_got_through(endpoint, monkeypatch):
    asked = []
    real = remote_module.StoreFiles.read

    def read(files, url, offset, size):
        asked.append(offset)
        return real(files, url, offset, size)

    monkeypatch.setattr(remote_module.StoreFiles, "read", read)
    # Every connection breaks after 300 kB: the 2 MB come in 8 pieces that fit, none of them twice.
    with cutting_proxy(endpoint, lambda _: 300_000) as proxy:
        monkeypatch.setenv("AWS_ENDPOINT_URL", proxy)
        assert Storage("s3://bucket/sets/train").read("large.tar", 7, len(LARGE) - 7) == LARGE[7:]
    assert asked == sorted(asked) and len(set(asked)) == 8 and len(asked) < 20
    with cutting_proxy(endpoint, lambda _: 50) as proxy:
        monkeypatch.setenv("AWS_ENDPOINT_URL", proxy)
        with pytest.raises(StorageError, match=r"large\.tar at byte 0 failed 9 times"):
            Storage("s3://bucket/sets/train").read("large.tar", 0, 10)


@pytest.mark.parametrize("source", ["s3://bucket/sets/other", "s3://no-such-bucket/x", "s3://BAD_bucket..name/x"])
def test_what_is_not_there_is_told_at_once(endpoint, source, monkeypatch):
    monkeypatch.setenv("AWS_ENDPOINT_URL", endpoint)
    monkeypatch.setattr(Storage, "_wait", lambda *_: pytest.fail("it was tried again"))
    with pytest.raises(UserError, match=r"index\.json cannot be read") as caught:
        Index.open(source)
    assert caught.value.exit_code == 2 and caught.value.where.startswith("s3://")
    with pytest.raises(UserError, match=r"large\.tar ends at byte 9000000"):
        Storage("s3://bucket/sets/train").read("large.tar", 9_000_000, 5)


def test_credentials_that_are_missing_or_refused_are_told_and_not_repeated(local, monkeypatch):
    monkeypatch.setattr(Storage, "_wait", lambda *_: pytest.fail("it was tried again"))
    with s3_server(INITIAL_NO_AUTH_ACTION_COUNT="1") as strict:
        send(f"{strict}/bucket", b"")  # the one action without a check
        monkeypatch.setenv("AWS_ENDPOINT_URL", strict)
        for ask in (lambda storage: storage.size("a.tar"), lambda storage: storage.read("a.tar", 0, 1)):
            with pytest.raises(UserError, match=r"403.*Set AWS_ACCESS_KEY_ID") as caught:
                ask(Storage("s3://bucket/x"))
            assert KEY not in str(caught.value) and SECRET not in str(caught.value)
        monkeypatch.delenv("AWS_ACCESS_KEY_ID")
        monkeypatch.delenv("AWS_SECRET_ACCESS_KEY")
        with pytest.raises(UserError, match=r"no credentials were found.*Set AWS_ACCESS_KEY_ID"):
            Storage("s3://bucket/x").size("a.tar")


READ = """
import sys
from mf_scale.data.index import Index
index = Index.open("s3://bucket/sets/train")
print(index.samples, len(index.storage.read(index.shards[0].name, 0, index.shards[0].size)) == index.shards[0].size)
"""


def test_a_program_that_reads_it_ends_quietly(endpoint, monkeypatch):
    monkeypatch.setenv("AWS_ENDPOINT_URL", endpoint)
    run = subprocess.run([sys.executable, "-c", READ], capture_output=True, text=True, timeout=60, check=False)
    assert (run.returncode, run.stdout, run.stderr) == (0, "9 True\n", "")
    monkeypatch.setenv("AWS_ENDPOINT_URL", f"http://127.0.0.1:{free_port()}")
    code = f"from mf_scale.data import storage; storage.FIRST_WAIT = 0.0\n{READ}"
    run = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=60, check=False)
    assert run.returncode == 1 and "failed 9 times" in run.stderr and SECRET not in run.stderr
