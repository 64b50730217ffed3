"""Reading from web servers: what is asked again and where, what is not, and that no secret is told."""

from __future__ import annotations

import socket
import time
from typing import ClassVar

import pytest

from mf_scale.config.urls import redact, scheme_of
from mf_scale.data import remote as remote_module
from mf_scale.data import storage as storage_module
from mf_scale.data.index import Index
from mf_scale.data.storage import Storage, StorageError
from mf_scale.errors import UserError
from tests.servers import RangeHandler, http_server

pytest.importorskip("aiohttp", reason="reading http needs the extra mf_scale[http]")

DATA = bytes(range(256)) * 64
ASK = {"read": lambda storage: storage.read("a.tar", 0, 10), "size": lambda storage: storage.size("a.tar")}
SECRET = "Bearer wJalrXUtnFEMI"


@pytest.fixture(autouse=True)
def no_waiting(monkeypatch):
    monkeypatch.setattr(storage_module, "FIRST_WAIT", 0.0)


class Whole(RangeHandler):
    data = DATA
    asked: ClassVar[list[tuple[int, int]]] = []


class Dropping(Whole):
    """Cuts the connection in the middle of every answer of 700 bytes and more."""

    def answer(self, start, stop):
        size = stop - start
        self.begin(206, size, {"Content-Range": f"bytes {start}-{stop - 1}/{len(self.data)}"})
        self.wfile.write(self.data[start : stop if size < 700 else start + size // 2])


class Status(RangeHandler):
    """Answers each request with the next of `statuses`, the last one for ever."""

    data = DATA
    statuses: ClassVar[list[int]] = []

    def answer(self, start, stop):
        status = self.statuses.pop(0) if len(self.statuses) > 1 else self.statuses[0]
        if status == 206:
            super().answer(start, stop)
        else:
            self.begin(status, 0, {})


def test_a_broken_connection_is_taken_up_at_the_byte_where_it_broke(monkeypatch):
    monkeypatch.setattr(Dropping, "asked", [])
    monkeypatch.setattr(Storage, "_wait", lambda *_: pytest.fail("it delivered something each time"))
    with http_server(Dropping) as url:
        assert Storage(f"{url}/data").read("a.tar", 50, 5000) == DATA[50:5050]
    assert Dropping.asked == [(50, 5000), (2550, 2500), (3800, 1250), (4425, 625)]


@pytest.mark.parametrize("ask", ASK.values(), ids=ASK)
def test_a_refused_connection_is_a_fault_not_a_missing_file(ask):
    with socket.socket() as closed:
        closed.bind(("127.0.0.1", 0))  # bound, not listening: connections are refused
        url = f"http://127.0.0.1:{closed.getsockname()[1]}/x"
        with pytest.raises(StorageError, match=r"a\.tar .*9 times.*ClientConnectorError.*Cannot connect") as caught:
            ask(Storage(url))
        assert caught.value.where == url and "\n" not in str(caught.value)
        with pytest.raises(StorageError, match=r"index\.json for its size"):
            Index.open(url)


@pytest.mark.parametrize("status", [400, 401, 403, 404, 405, 410, 451])
@pytest.mark.parametrize("ask", ASK.values(), ids=ASK)
def test_a_refusal_is_told_at_once(ask, status, monkeypatch):
    monkeypatch.setattr(Status, "statuses", [status])
    monkeypatch.setattr(Storage, "_wait", lambda *_: pytest.fail("it was tried again"))
    with http_server(Status) as url, pytest.raises(UserError, match=rf"a\.tar cannot be read: .*{status}") as caught:
        ask(Storage(url))
    assert caught.value.exit_code == 2 and caught.value.where == url
    assert ("MF_SCALE_HTTP_AUTHORIZATION" in caught.value.remedy) == (status in (401, 403))


@pytest.mark.parametrize("status", [408, 425, 429, 500, 502, 503, 504])
@pytest.mark.parametrize("ask", ASK.values(), ids=ASK)
def test_a_server_in_trouble_is_asked_again(ask, status, monkeypatch):
    monkeypatch.setattr(Status, "statuses", [status, status, status, status, 206])
    with http_server(Status) as url:
        assert ask(Storage(url)) in (DATA[:10], len(DATA))
        monkeypatch.setattr(Status, "statuses", [status])
        with pytest.raises(StorageError, match=f"9 times.*{status}"):
            ask(Storage(url))


def test_a_silent_server_is_asked_again(monkeypatch):
    class Silent(Whole):
        asked: ClassVar[list[tuple[int, int]]] = []

        def answer(self, start, stop):
            if len(self.asked) == 1:
                time.sleep(3)
            super().answer(start, stop)

    monkeypatch.setattr(remote_module, "SILENCE_SECONDS", 0.2)
    with http_server(Silent) as url:
        began = time.monotonic()
        assert Storage(url).read("a.tar", 7, 9) == DATA[7:16]
        assert len(Silent.asked) == 2 and time.monotonic() - began < 2.5


@pytest.mark.parametrize("noise", [b"\x16\x03\x01 noise\r\n\r\n", b"HTTP/1.1 20x OK\r\n\r\n", b""])
def test_a_garbled_answer_is_asked_for_again(noise):
    class Garbled(Whole):
        asked: ClassVar[list[tuple[int, int]]] = []

        def answer(self, start, stop):
            self.wfile.write(noise) if len(self.asked) < 4 else super().answer(start, stop)

    with http_server(Garbled) as url:
        assert Storage(url).read("a.tar", 7, 9) == DATA[7:16]
    assert len(Garbled.asked) == 4


def test_what_a_server_sends_does_not_fill_the_message():
    class Noisy(Whole):
        def answer(self, start, stop):
            self.wfile.write(b"HTTP/1.1 " + b"noise " * 1000 + b"\r\n\r\n")

    with http_server(Noisy) as url, pytest.raises(StorageError, match="9 times") as caught:
        Storage(url).read("a.tar", 5, 10)
    assert len(str(caught.value)) < 600


def test_behind_the_end_the_file_was_cut(monkeypatch):
    monkeypatch.setattr(Status, "statuses", [416])
    with http_server(Status) as url, pytest.raises(UserError, match=r"a\.tar ends at byte 20000") as caught:
        Storage(url).read("a.tar", 20000, 10)
    assert caught.value.exit_code == 2


@pytest.mark.parametrize("kind", ["whole file", "another range", "more than asked for"])
def test_a_server_without_ranges_is_refused_before_its_bytes_are_taken(kind):
    sent = []

    class Odd(Whole):
        def answer(self, start, stop):
            if kind == "whole file":
                self.begin(200, 1 << 30, {})
            elif kind == "another range":
                self.begin(206, stop - start, {"Content-Range": f"bytes 0-{stop - start - 1}/{len(DATA)}"})
            else:
                self.begin(206, 1 << 30, {"Content-Range": f"bytes {start}-{stop - 1}/{len(DATA)}"})
            if kind == "another range":
                self.wfile.write(bytes(stop - start))
                return
            for _ in range(1 << 10):
                sent.append(self.wfile.write(bytes(1 << 20)))

    with http_server(Odd) as url, pytest.raises(UserError, match="something else than the range"):
        Storage(url).read("a.tar", 5, 10)
    time.sleep(0.1)
    assert len(sent) < 100


def test_bytes_come_as_they_lie_on_the_server():
    class Labelled(Whole):
        def answer(self, start, stop):
            headers = {"Content-Range": f"bytes {start}-{stop - 1}/{len(DATA)}", "Content-Encoding": "gzip"}
            self.begin(206, stop - start, headers)
            self.wfile.write(DATA[start:stop])

    with http_server(Labelled) as url:
        assert Storage(url).read("a.tar", 5, 10) == DATA[5:15]


def test_the_size_is_asked_for_without_the_file():
    class Unranged(Whole):
        def answer(self, start, stop):
            self.begin(200, 1 << 40, {})

    class Unsized(Whole):
        def answer(self, start, stop):
            self.send_response(200)
            self.end_headers()

    with http_server(Unranged) as url:
        assert Storage(url).size("a.tar") == 1 << 40
    with http_server(Unsized) as url, pytest.raises(UserError, match="does not tell the size"):
        Storage(url).size("a.tar")


@pytest.mark.parametrize("place", ["file:///etc/passwd", "ftp://localhost/a.tar", "pipe:id", "data:,x"])
def test_a_redirect_leads_to_no_other_scheme(place, monkeypatch):
    class Elsewhere(Whole):
        def answer(self, start, stop):
            self.begin(302, 0, {"Location": place})

    monkeypatch.setattr(Storage, "_wait", lambda *_: pytest.fail("it was tried again"))
    with http_server(Elsewhere) as url, pytest.raises(UserError, match=r"a\.tar cannot be read: .*not http"):
        Storage(url).read("a.tar", 0, 10)


def test_the_authorization_goes_to_its_server_only(monkeypatch):
    seen: list[tuple[str, str | None]] = []

    class Other(Whole):
        def answer(self, start, stop):
            seen.append((self.path, self.headers.get("Authorization")))
            super().answer(start, stop)

    with http_server(Other) as other:

        class First(Whole):
            def answer(self, start, stop):
                seen.append((self.path, self.headers.get("Authorization")))
                target = f"{other.replace('127.0.0.1', 'localhost')}{self.path}" if "away" in self.path else "/near"
                self.begin(302, 0, {"Location": target}) if self.path != "/near" else super().answer(start, stop)

        monkeypatch.setenv("MF_SCALE_HTTP_AUTHORIZATION", SECRET)
        with http_server(First) as first:
            assert Storage(f"{first}/home").read("a.tar", 0, 10) == DATA[:10]
            assert Storage(f"{first}/away").read("a.tar", 0, 10) == DATA[:10]
    assert seen == [("/home/a.tar", SECRET), ("/near", SECRET), ("/away/a.tar", SECRET), ("/away/a.tar", None)]


@pytest.mark.parametrize("status", [403, 503])
def test_what_a_fault_says_of_a_signed_url_holds_no_signature(status, monkeypatch):
    class Signed(Whole):
        def answer(self, start, stop):
            if "?" in self.path:
                self.begin(status, 0, {})
            else:
                self.begin(302, 0, {"Location": "/b?X-Amz-Credential=AKIAIOSFODNN7&X-Amz-Signature=fe5f80f77d"})

    with http_server(Signed) as url, pytest.raises(UserError, match=str(status)) as caught:
        Storage(url).read("a.tar", 0, 10)
    assert "Amz" not in str(caught.value) and "fe5f80f77d" not in str(caught.value)


HOLDING = [
    "https://user:hunter22@host/data",
    "https://tok3nhunter22@host/data",
    "https://user:hun/ter22@host/data",
    "https://host/data?sig=hunter22&se=2027",
    "https://host/data#hunter22",
    "s3://AKIA:hunter22@bucket/data",
    "gs://bucket/data?token=hunter22",
    "ftp://user:hunter22@host/data",
]


@pytest.mark.parametrize("url", HOLDING)
def test_a_url_that_holds_credentials_is_refused_without_repeating_them(url):
    with pytest.raises(UserError) as caught:
        Index.open(url)
    assert "ter22" not in str(caught.value) and "tok3n" not in str(caught.value)
    assert caught.value.exit_code == 2 and (url.startswith("ftp") or "environment" in str(caught.value))


def test_what_is_said_holds_no_secret(monkeypatch):
    monkeypatch.setenv("AWS_SECRET_ACCESS_KEY", "wJalrXUtnFEMI/K7MDENG")
    monkeypatch.setenv("MF_SCALE_HTTP_AUTHORIZATION", SECRET)
    said = redact(
        "Error 'https://u:p@h.org:80/a?sig=1&b=2' or <http://h/x?y> of wJalrXUtnFEMI/K7MDENG, sent wJalrXUtnFEMI: why?"
    )
    assert said == "Error 'https://***@h.org:80/a?***' or <http://h/x?***> of ***, sent ***: why?"


@pytest.mark.parametrize(
    ("source", "scheme"),
    [("https://h/a@b/c", "https"), ("HTTP://h:8080/a", "http"), ("s3://b/a-b_c", "s3"), ("gs://b", "gs"), ("/a?b", "")],
)
def test_plain_urls_are_taken(source, scheme):
    assert scheme_of(source) == scheme
    assert Storage(source).source.startswith(scheme)
