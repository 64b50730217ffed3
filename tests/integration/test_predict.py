"""Prediction by real processes: killed and gone on, of a real web server, and as launch/predict.sh starts it."""

from __future__ import annotations

import json
import os
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import pytest

from mf_scale.data import storage
from mf_scale.errors import FaultError, UserError
from tests.servers import free_port, nginx
from tests.unit.predicting import IMAGES, contents, lines, predicted, small_run

pytestmark = pytest.mark.integration
ROOT = Path(__file__).parents[2]
COMMAND = [sys.executable, "-m", "mf_scale.cli", "predict"]


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> str:
    return small_run(tmp_path_factory.mktemp("run"))


@pytest.fixture(scope="module")
def listed(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The bundled images and a file that is none."""
    file = tmp_path_factory.mktemp("list") / "images.txt"
    file.write_text("\n".join([*map(str, IMAGES[:11]), str(ROOT / "README.md")]) + "\n")
    return file


@pytest.fixture(scope="module")
def whole(run: str, listed: Path, tmp_path_factory: pytest.TempPathFactory) -> dict[str, bytes]:
    out = tmp_path_factory.mktemp("whole") / "out"
    assert predicted([listed], run, out, "instance", part_size=1, overlay=True) == 2
    return contents(out)


def arguments(listed: Path, run: str, out: Path) -> list[str]:
    return [str(listed), "--run", run, "--out", str(out), "--task", "instance", "--part-size", "1", "--overlay"]


def commits(out: Path) -> dict[str, int]:
    return {path.name: path.stat().st_mtime_ns for path in out.glob("part-*.json")}


def wait_until(true: Callable[[], bool], process: subprocess.Popen[str]) -> None:
    deadline = time.monotonic() + 120
    while not true():
        assert process.poll() is None and time.monotonic() < deadline
        time.sleep(0.02)


def test_killed_and_gone_on_with_as_many_processes_as_there_are(
    run: str, listed: Path, whole: dict[str, bytes], tmp_path: Path
) -> None:
    command = [*COMMAND, *arguments(listed, run, tmp_path)]
    first = subprocess.Popen(
        command, text=True, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, start_new_session=True
    )
    wait_until(lambda: len(commits(tmp_path)) >= 2, first)
    os.killpg(first.pid, signal.SIGKILL)
    first.communicate(timeout=30)
    before = commits(tmp_path)
    assert len(before) < 12 and not (tmp_path / "summary.json").exists()
    done = subprocess.run(
        [*command, "--processes", "2"], capture_output=True, text=True, timeout=200, cwd=tmp_path.parent, check=False
    )
    assert done.returncode == 2, done.stderr
    assert f"{len(before)} of 12 parts are there" in done.stdout and "11 of 12 images predicted" in done.stdout
    assert done.stdout.count("images predicted") == 1 and "README.md" in done.stderr
    assert before.items() <= commits(tmp_path).items(), "what was committed was not done again"
    assert contents(tmp_path) == whole


def test_urls_of_a_web_server(run: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    served = tmp_path / "served"
    (served / "some folder").mkdir(parents=True)
    shutil.copy(IMAGES[0], served / "a.jpg")
    shutil.copy(IMAGES[1], served / "some folder" / "b.jpg")
    monkeypatch.setattr(storage, "ATTEMPTS", 2)
    monkeypatch.setenv("MF_SCALE_HTTP_AUTHORIZATION", "Bearer hunter2")
    dead = f"http://127.0.0.1:{free_port()}/c.jpg"
    with nginx(served, tmp_path / "nginx", free_port()) as url:
        named = [f"{url}/a.jpg", f"{url}/gone.jpg", f"{url}/some%20folder/b.jpg", dead, f"{url}/", str(IMAGES[2])]
        (tmp_path / "urls.txt").write_text("\n".join(named))
        assert predicted([tmp_path / "urls.txt"], run, tmp_path / "out") == 2
        assert predicted([named[0]], run, tmp_path / "one") == 0
        with pytest.raises(UserError, match=r"gone\.jpg cannot be read: it is not there \(404\).*Check the url\."):
            predicted([named[1]], run, tmp_path / "none")
        shutil.copy(served / "a.jpg", served / "7.jpg")
        with tempfile_tar(served) as tar:
            assert predicted([f"{url}/{tar}"], run, tmp_path / "tars") == 0
    with pytest.raises(FaultError, match="failed 2 times"):
        predicted([dead], run, tmp_path / "none")
    assert not (tmp_path / "none").exists()
    reasons = {entry["image"]: entry["reason"] for entry in lines(tmp_path / "out/quarantine.jsonl")}
    assert list(reasons) == [named[1], dead, named[4]]
    assert "(404)" in reasons[named[1]] and "failed 2 times" in reasons[dead] and "names no file" in reasons[named[4]]
    local, fetched = tmp_path / "local", contents(tmp_path / "out")
    assert predicted(IMAGES[:3], run, local) == 0
    maps = {name: content for name, content in contents(local).items() if name.endswith(".map.png")}
    assert [fetched[f"{n}.map.png"] for n in ("a", "b", IMAGES[2].stem)] == list(maps.values())
    assert not any(b"hunter2" in content for content in fetched.values())


class tempfile_tar:  # noqa: N801 - reads as a function
    """A tar of the served images, for as long as it is wanted."""

    def __init__(self, folder: Path) -> None:
        self.path = folder / "some.tar"
        subprocess.run(["tar", "cf", self.path, "-C", folder, "a.jpg", "7.jpg"], check=True, timeout=30)

    def __enter__(self) -> str:
        return self.path.name

    def __exit__(self, *_: object) -> None:
        self.path.unlink()


def slurm(folder: Path) -> dict[str, str]:
    """A `scontrol` that tells of a running job and writes down what else it is asked, an `srun` that starts a task."""
    facts = "JobState=RUNNING Reason=None Restarts=0 Requeue=1"
    scontrol = f"""case "$*" in
"show job "*) echo "{facts}" ;;
show*) echo n1 ;;
*) echo "$@" >> {folder}/asked ;;
esac"""
    srun = """while [ "${1#--}" != "$1" ]; do shift; done
export SLURM_STEP_ID=0 SLURM_PROCID=0 SLURM_NTASKS=1 SLURM_LOCALID=0
exec "$@"
"""
    (folder / "bin").mkdir()
    for name, text in (("scontrol", scontrol), ("srun", srun)):
        (folder / "bin" / name).write_text(f"#!/bin/bash\n{text}\n")
        (folder / "bin" / name).chmod(0o755)
    job = {"SLURM_JOB_ID": "42", "SLURM_ARRAY_JOB_ID": "42", "SLURM_JOB_NODELIST": "n1", "MF_PYTHON": sys.executable}
    return {**os.environ, "MF_ROOT": str(ROOT), "PATH": f"{folder}/bin:{os.environ['PATH']}", **job}


def task(environment: dict[str, str], number: int, words: list[str], **more: str) -> subprocess.Popen[str]:
    """A task of an array of two, as SLURM starts it."""
    array = {"ID": number, "MIN": 0, "MAX": 1, "COUNT": 2}
    return subprocess.Popen(
        ["bash", str(ROOT / "launch/predict.sh"), *words], text=True, start_new_session=True,
        env={**environment, **{f"SLURM_ARRAY_TASK_{name}": str(value) for name, value in array.items()}, **more},
        stdout=subprocess.PIPE, stderr=subprocess.PIPE,
    )  # fmt: skip


@pytest.mark.soak
def test_an_array_out_of_time_is_requeued_and_goes_on(
    run: str, listed: Path, whole: dict[str, bytes], tmp_path: Path
) -> None:
    environment, out = slurm(tmp_path), tmp_path / "out"
    words = arguments(listed, run, out)
    first = task(environment, 0, words)
    wait_until(lambda: len(commits(out)) >= 1, first)
    os.kill(first.pid, signal.SIGUSR1)
    said = first.communicate(timeout=120)
    assert first.returncode == 85 and "the same command goes on" in said[0], said
    assert "out of time: the job is requeued" in said[1] and (tmp_path / "asked").read_text() == "requeue 42_0\n"
    before = commits(out)
    assert 1 <= len(before) < 6 and all(int(name[5:11]) % 2 == 0 for name in before)
    for number, told in ((0, "share 0 of 2 is done"), (1, "11 of 12 images predicted")):
        again = task(environment, number, words)
        said = again.communicate(timeout=200)
        assert told in said[0] and again.returncode == (2 if number else 0), said
    assert before.items() <= commits(out).items() and contents(out) == whole
    gaps = task(environment, 1, words, SLURM_ARRAY_TASK_MAX="7")
    assert "set SHARES" in gaps.communicate(timeout=60)[1] and gaps.returncode == 2
    assert json.loads(contents(out)["summary.json"])["merged"] == ["instances.json", "images.json"]
