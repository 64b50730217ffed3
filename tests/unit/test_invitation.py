"""How ranks find rank 0: the file's name, its addresses, who may answer at a port, who is refused."""

from __future__ import annotations

import os
import socket
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from datetime import timedelta
from pathlib import Path

import pytest
from torch.distributed import TCPStore

from mf_scale.distributed import addresses, meeting
from mf_scale.distributed.addresses import own_addresses
from mf_scale.distributed.env import World
from mf_scale.distributed.invitation import NONCE, Door, Invitation, _knock, invitation_name, publish, sweep
from mf_scale.errors import FaultError, UserError

STEP = {"SLURM_JOB_ID": "7", "SLURM_STEP_ID": "1"}


def test_the_name_tells_starts_apart():
    assert invitation_name(STEP) == ".meeting-7-0-1"
    assert invitation_name({**STEP, "SLURM_RESTART_COUNT": "3"}) == ".meeting-7-3-1"
    array = {"SLURM_ARRAY_JOB_ID": "5", "SLURM_ARRAY_TASK_ID": "2"}
    assert invitation_name({**STEP, **array}) == ".meeting-5_2-0-1"
    assert invitation_name({"SLURM_JOB_ID": "7"}) is None
    assert invitation_name({**STEP, "SLURM_STEP_ID": "batch"}) is None
    assert invitation_name({}) is None


def test_addresses_begin_with_names_and_end_with_the_loopback():
    found = own_addresses({"SLURMD_NODENAME": "node7"})
    assert found[:2] == ("node7", socket.gethostname())
    assert found[2:]
    local = [a.startswith("127.") or a == "::1" for a in found[2:]]
    assert local == sorted(local)
    assert "127.0.0.1" in found
    assert own_addresses({"SLURMD_NODENAME": "node7", "MF_ADDRESS": "10.0.0.1"}) == ("10.0.0.1",)


def test_addresses_of_an_interface_with_ipv6(tmp_path):
    table = tmp_path / "if_inet6"
    table.write_text(
        "fd000000000000000000000000000002 02 40 00 80     eth0\n"
        "fe80000000000000000000fffe000002 02 40 20 80     eth0\n"
        "00000000000000000000000000000001 01 80 10 80       lo\n"
    )
    assert list(addresses._numbers_6(table)) == ["fd00::2", "::1"]
    assert list(addresses._numbers_6(tmp_path / "none")) == []


@contextmanager
def stranger(answer: bytes) -> Iterator[int]:
    """The port of somebody who takes every call, says `answer` and nothing more."""
    calls = []
    with socket.create_server(("127.0.0.1", 0)) as server:

        def serve() -> None:
            while True:
                try:
                    call, _ = server.accept()
                    calls.append(call)
                    call.sendall(answer)
                except OSError:
                    return

        threading.Thread(target=serve, daemon=True).start()
        yield server.getsockname()[1]
    for call in calls:
        call.close()


def store(nonce: str | None) -> TCPStore:
    made = TCPStore("localhost", 0, is_master=True, timeout=timedelta(seconds=5), wait_for_workers=False)
    if nonce is not None:
        made.set(NONCE, nonce)
    return made


def test_only_the_store_that_knows_the_nonce_is_rank_0(monkeypatch):
    monkeypatch.setattr("mf_scale.distributed.invitation._KNOCK_SECONDS", 1.0)
    ours, theirs, empty = store("mine"), store("theirs"), store(None)
    found, answer = _knock("127.0.0.1", Invitation((), ours.port, "mine"))
    assert found is not None
    assert found.get(NONCE) == b"mine"
    assert answer == ""
    for other in (theirs, empty):
        assert _knock("127.0.0.1", Invitation((), other.port, "mine")) == (None, "somebody else answers")
    for words in (b"", b"SSH-2.0-OpenSSH_9.2\r\n" * 20):
        with stranger(words) as port:
            assert _knock("127.0.0.1", Invitation((), port, "mine")) == (None, "somebody else answers")
    assert _knock("127.0.0.1", Invitation((), 1, "mine")) == (None, "Connection refused")
    assert _knock("no name\ud800", Invitation((), 1, "mine"))[0] is None


def test_addresses_are_tried_in_order_until_rank_0_answers(tmp_path):
    ours, file = store("mine"), tmp_path / ".meeting-7-0-0"
    door = Door(file)
    assert not door.opens()
    assert door.state == "there is no file yet"
    for torn in ("", "{", "[]", '{"addresses": 1}', '{"addresses": [], "port": "x", "nonce": ""}'):
        file.write_text(torn)
        assert not door.opens()
        assert door.state.startswith("the file cannot be read")
    publish(file, Invitation(("127.0.0.9",), 1, "mine"))
    assert not door.opens()
    assert door.state == "port 1 of 127.0.0.9 (Connection refused)"
    publish(file, Invitation(("", "no name\ud800", "127.0.0.1"), ours.port, "mine"))
    assert door.opens()
    assert door.state == f"127.0.0.1 port {ours.port}"


def test_sweeping_spares_what_may_be_in_use(tmp_path):
    file = tmp_path / ".meeting-7-2-0"
    later, sibling, other = ".meeting-7-3-0", ".meeting-7-2-1", ".meeting-8-0-0"
    gone = [".meeting-7-1-5", "..meeting-7-0-0", ".meeting-9-0-0"]
    foreign = [".meeting-notes", "x.meeting-7-1-0"]
    for name in (file.name, later, sibling, other, *gone, *foreign):
        (tmp_path / name).write_text("")
    hours_ago = file.stat().st_mtime - 3700
    for name in (".meeting-9-0-0", *foreign):
        os.utime(tmp_path / name, (hours_ago, hours_ago))
    sweep(file)
    assert {f.name for f in tmp_path.iterdir()} == {file.name, later, sibling, other, *foreign}


def test_a_rank_without_gpu_among_others_with_one_is_named(tmp_path, monkeypatch):
    monkeypatch.setattr(meeting, "_LAST_WORD_SECONDS", 0.3)
    file = tmp_path / ".meeting-7-0-0"
    said: dict[int, UserError] = {}

    def join(rank: int, device: str) -> None:
        try:
            meeting.meet(World(rank, 3, rank), file, device=device, timeout=30)
        except UserError as error:
            said[rank] = error

    ranks = [threading.Thread(target=join, args=(n, kind)) for n, kind in enumerate(("cuda", "cuda", "cpu"))]
    for thread in ranks:
        thread.start()
    for thread in ranks:
        thread.join(30)
    assert {type(error) for error in said.values()} == {FaultError}
    assert said[0].what == f"some ranks see no GPU: rank 2 on {socket.gethostname()}, the other 2 do"
    assert [said[n].said_by_first_rank for n in range(3)] == [False, True, True]
    assert not file.exists()


def test_a_folder_that_cannot_be_made_is_a_mistake(tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(UserError, match="cannot meet in this folder"):
        publish(tmp_path / "file" / Path(".meeting-7-0-0"), Invitation((), 1, "x"))
