"""The job scripts, called where they cannot work: what is the matter and what to do, at once."""

from __future__ import annotations

import os
import subprocess
from pathlib import Path

import pytest

pytestmark = pytest.mark.integration
ROOT = Path(__file__).parents[2]


@pytest.mark.parametrize("script", ["multinode", "singlenode", "sweep", "evaluate", "pack"])
def test_job_scripts_refuse_what_cannot_work(script, tmp_path):
    environment = {"PATH": os.environ["PATH"]}
    words = ("grid.yaml", "x.yaml", "z")
    for arguments, folder, wanted in (((), ROOT, "usage:"), (words, tmp_path, "is not the project's folder")):
        done = subprocess.run(
            ["bash", str(ROOT / f"launch/{script}.sh"), *arguments],
            cwd=folder,
            env=environment,
            capture_output=True,
            text=True,
            timeout=30,
            check=False,
        )
        assert done.returncode == 2
        assert wanted in done.stderr
