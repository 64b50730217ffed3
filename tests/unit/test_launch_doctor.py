"""What the job script makes of the doctor's end: launch/job.sh with an srun of the test's."""

from __future__ import annotations

import os
import subprocess
import time
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
SCRIPT = """
set -u
mf_signals='' mf_pid='' mf_exit=0 root={root}
. {root}/launch/job.sh
mf_srun=() mf_inside=() python=python3 mf_nodes=2 mf_ranks=4 mf_per_node=2 mf_cpus=3
mf_arguments=(my.yaml 'run_dir=a b')
mf_doctor
echo "exit $mf_exit"
"""


def doctor(folder: Path, srun: str, **environment: str) -> tuple[int, str, list[str]]:
    """mf_exit, what was said, and the words srun was called with."""
    program = folder / "srun"
    program.write_text(f'#!/bin/bash\nprintf "%s\\n" "$@" > {folder}/words\n{srun}\n')
    program.chmod(0o755)
    (folder / "words").unlink(missing_ok=True)
    path = f"{folder}{os.pathsep}{os.environ['PATH']}"
    done = subprocess.run(
        ["bash", "-c", SCRIPT.format(root=ROOT)],
        capture_output=True,
        text=True,
        timeout=60,
        check=True,
        env={**os.environ, "PATH": path, **environment},
    )
    words = (folder / "words").read_text().splitlines() if (folder / "words").is_file() else []
    return int(done.stdout.split()[-1]), done.stderr, words


@pytest.mark.parametrize(
    ("srun", "code"),
    [("exit 0", 0), ("exit 2", 2), ("exit 75", 75), ("exit 143", 85), ("exit 138", 85), ("exit 137", 0), ("exit 1", 0)],
)
def test_a_mistake_and_a_fault_end_the_job_and_a_doctor_that_dies_does_not(
    tmp_path: Path, srun: str, code: int
) -> None:
    ended, said, words = doctor(tmp_path, srun)
    assert ended == code
    assert ("the job goes on without it" in said) == (srun in ("exit 137", "exit 1"))
    assert {"--ntasks=4", "--ntasks-per-node=2", "--cpus-per-task=3", "--overlap", "--in-job", "my.yaml"} <= set(words)
    assert words[-1] == "run_dir=a b" and words[words.index("--seconds") + 1] == "50"


def test_one_that_hangs_does_not_hold_the_job(tmp_path: Path) -> None:
    began = time.monotonic()
    ended, said, _ = doctor(tmp_path, "trap '' TERM; for i in $(seq 300); do sleep 0.1; done", MF_DOCTOR_SECONDS="1")
    assert ended == 0 and "the doctor came to no end within 1 s" in said
    assert time.monotonic() - began < 10


def test_it_can_be_left_out_and_asked_for_all_lines(tmp_path: Path) -> None:
    assert doctor(tmp_path, "exit 2", MF_DOCTOR="0") == (0, "", [])
    assert "--verbose" in doctor(tmp_path, "exit 0", MF_DOCTOR="verbose")[2]
    ended, said, words = doctor(tmp_path, "exit 0", MF_DOCTOR_SECONDS="soon")
    assert ended == 0 and "MF_DOCTOR_SECONDS=soon is no number" in said and "50" in words
