"""A source on a real nginx: the same samples, through restarts, slow lines, authorization and TLS."""

from __future__ import annotations

import re
import subprocess
import sys
import threading
import time
from itertools import islice
from pathlib import Path

import pytest
import torch

from mf_scale.data import storage as storage_module
from mf_scale.data.cache import CacheSettings
from mf_scale.data.index import Index, verify_shards
from mf_scale.data.loader import train_steps
from mf_scale.data.reader import SampleReader
from mf_scale.data.storage import Storage, StorageError
from mf_scale.errors import UserError
from tests.servers import free_port, nginx
from tests.sources import make_source, open_state, small_config

pytestmark = pytest.mark.integration
pytest.importorskip("aiohttp", reason="reading http needs the extra mf_scale[http]")

LARGE = bytes(range(256)) * 40_000
"""Bytes of the one large file."""


@pytest.fixture(scope="module")
def local(tmp_path_factory):
    index = make_source(tmp_path_factory.mktemp("root") / "train", [5, 4])
    Path(index.source, "large.tar").write_bytes(LARGE)
    return index


@pytest.fixture
def root(local):
    return Path(local.source).parent


def ranges(folder: Path) -> list[tuple[int, int]]:
    """(status, bytes sent) of every request for large.tar that nginx logged."""
    lines = re.findall(r'"GET /train/large\.tar [^"]*" (\d+) (\d+)', (folder / "access.log").read_text())
    return [(int(status), int(sent)) for status, sent in lines]


def same_samples(index: Index, local: Index) -> bool:
    def load(source):
        reader = SampleReader(source, block_samples=3, budget=1 << 20, max_pixels=1 << 20)
        return [reader.load(i, lane=0)[0] for i in range(source.samples)]

    pairs = list(zip(load(index), load(local), strict=True))
    return all((a.image == b.image).all() and (a.stored_map == b.stored_map).all() for a, b in pairs)


def test_a_source_reads_as_the_local_one_with_and_without_a_cache(local, root, tmp_path):
    with nginx(root, tmp_path / "nginx", free_port()) as url:
        index = Index.open(f"{url}/train/")
        assert index.digest == local.digest and index.source == f"{url}/train"
        verify_shards(index, checksums=True)
        assert same_samples(index, local)
        index = Index.open(f"{url}/train/", CacheSettings(str(tmp_path / "cache"), 1 << 26))
        assert same_samples(index, local)
    assert same_samples(index, local)  # the server is gone, the cache is not


def test_loader_workers_that_share_a_cache_make_the_local_batches(local, root, tmp_path):
    settings, config = CacheSettings(str(tmp_path / "cache"), 1 << 26), small_config(workers=2)

    def batches(index: Index) -> list[list[torch.Tensor]]:
        stream = train_steps([index], open_state(index, config, 4), config, rank=0, world=1, step=3)
        try:
            return [[b.images, b.segment_map, b.labels] for _, b in islice(stream, 6)]
        finally:
            stream.close()

    with nginx(root, tmp_path / "nginx", free_port()) as url:
        index = Index.open(f"{url}/train", settings)
        assert index.storage.read(index.shards[0].name, 0, 10)  # so the workers are forked from a process that reads
        first = batches(index)
        asked = (tmp_path / "nginx/access.log").read_text().count(".tar ")
        again = batches(Index.open(f"{url}/train", settings))
        assert (tmp_path / "nginx/access.log").read_text().count(".tar ") == asked
    expected = batches(local)
    for found in (first, again):
        for batch, other in zip(found, expected, strict=True):
            assert all(torch.equal(a, b) for a, b in zip(batch, other, strict=True))


def test_a_server_killed_in_mid_body_and_started_again_is_taken_up_where_it_broke(root, tmp_path, monkeypatch):
    monkeypatch.setattr(storage_module, "FIRST_WAIT", 0.05)
    port, folder, got = free_port(), tmp_path / "nginx", []
    with nginx(root, folder, port, server="limit_rate 3m;") as url:
        reading = threading.Thread(
            target=lambda: got.append(Storage(f"{url}/train").read("large.tar", 9, len(LARGE) - 9))
        )
        reading.start()
        time.sleep(1.0)
    time.sleep(0.3)
    assert not got
    with nginx(root, folder, port):
        reading.join(timeout=60)
        assert got == [LARGE[9:]]
        time.sleep(0.2)
        ((status, sent),) = ranges(folder)  # what was killed logs nothing
        assert status == 206 and 1 << 20 < sent < len(LARGE) - (1 << 20)


def test_a_server_that_stays_away_is_a_fault(root, tmp_path, monkeypatch):
    monkeypatch.setattr(storage_module, "FIRST_WAIT", 0.01)
    with nginx(root, tmp_path / "nginx", free_port()) as url:
        storage = Storage(f"{url}/train")
        assert storage.read("large.tar", 0, 10) == LARGE[:10]
    with pytest.raises(StorageError, match=r"large\.tar at byte 10 failed 9 times") as caught:
        storage.read("large.tar", 10, 10)
    assert caught.value.exit_code == 75


def test_too_many_requests_are_waited_for(root, tmp_path, monkeypatch):
    monkeypatch.setattr(storage_module, "FIRST_WAIT", 0.1)
    limits = {"http": "limit_req_zone all zone=z:1m rate=5r/s; limit_req_status 429;", "server": "limit_req zone=z;"}
    with nginx(root, tmp_path / "nginx", free_port(), **limits) as url:
        storage = Storage(f"{url}/train")
        assert [storage.read("large.tar", i, 1) for i in range(6)] == [LARGE[i : i + 1] for i in range(6)]
    statuses = [status for status, _ in ranges(tmp_path / "nginx")]
    assert statuses.count(206) == 6 and 429 in statuses


def test_the_server_wants_authorization(root, tmp_path, monkeypatch, capfd):
    rule = 'if ($http_authorization != "Bearer c2VjcmV0LXRva2Vu") { return 401; }'
    with nginx(root, tmp_path / "nginx", free_port(), server=rule) as url:
        monkeypatch.setenv("MF_SCALE_HTTP_AUTHORIZATION", "Bearer another-token")
        with pytest.raises(UserError, match=r"401.*Set MF_SCALE_HTTP_AUTHORIZATION") as caught:
            Index.open(f"{url}/train")
        assert "another-token" not in str(caught.value)
        monkeypatch.setenv("MF_SCALE_HTTP_AUTHORIZATION", "Bearer c2VjcmV0LXRva2Vu")
        assert Index.open(f"{url}/train").samples == 9
    assert "c2VjcmV0" not in "".join(capfd.readouterr())


READ = "import sys; from mf_scale.data.index import Index; print(Index.open(sys.argv[1]).samples)"


def test_tls_is_checked_and_leaving_is_quiet(root, tmp_path, monkeypatch):
    certificate, key = make_certificate(tmp_path)
    tls = f"ssl_certificate {certificate}; ssl_certificate_key {key};"
    with nginx(root, tmp_path / "nginx", free_port(), tls=tls) as url:

        def read(code: str) -> tuple[int, str, str]:
            command = [sys.executable, "-c", code, f"{url}/train"]
            run = subprocess.run(command, capture_output=True, text=True, timeout=60, check=False)
            return run.returncode, run.stdout, run.stderr

        began = time.monotonic()
        monkeypatch.delenv("SSL_CERT_FILE", raising=False)
        code, _, said = read(READ)
        assert code == 1 and "certificate is not trusted" in said and "SSL_CERT_FILE" in said
        assert time.monotonic() - began < 15  # not tried again
        monkeypatch.setenv("SSL_CERT_FILE", str(certificate))
        assert read(READ) == (0, "9\n", "")


def make_certificate(folder: Path) -> tuple[Path, Path]:
    """A certificate of localhost that only itself vouches for, and its key."""
    certificate, key = folder / "certificate.pem", folder / "key.pem"
    command = ["openssl", "req", "-x509", "-newkey", "rsa:2048", "-nodes", "-subj", "/CN=localhost", "-days", "2"]
    command += ["-addext", "subjectAltName=DNS:localhost", "-keyout", str(key), "-out", str(certificate)]
    try:
        subprocess.run(command, check=True, capture_output=True, timeout=60)
    except FileNotFoundError:
        pytest.skip("openssl is not installed")
    return certificate, key
