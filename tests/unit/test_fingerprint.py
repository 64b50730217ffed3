"""The digest of the program's code, and what is said of ranks that run different ones."""

from __future__ import annotations

import shutil
import subprocess
import sys
from pathlib import Path

import mf_scale
from mf_scale.distributed.same_program import _sentence
from mf_scale.fingerprint import code_digest, code_files

PACKAGE = Path(mf_scale.__file__).parent


def digest_of(folder: Path) -> str:
    code = "from mf_scale.fingerprint import code_digest as d; import sys; print(d(), 'torch' in sys.modules)"
    done = subprocess.run(
        [sys.executable, "-c", code], cwd=folder, capture_output=True, text=True, timeout=60, check=True
    )
    assert done.stdout.split()[1] == "False"
    return done.stdout.split()[0]


def test_the_digest_is_of_the_code_wherever_it_lies(tmp_path):
    ignored = shutil.ignore_patterns("__pycache__")
    copy = shutil.copytree(PACKAGE, tmp_path / "mf_scale", ignore=ignored)
    assert digest_of(tmp_path) == code_digest() == digest_of(tmp_path)  # what Python compiled is not part of it
    (copy / "notes.txt").write_text("not the program")
    assert digest_of(tmp_path) == code_digest()
    for file in ("kernels/native.cpp", "tracking/report.html", "cli.py"):
        before = digest_of(tmp_path)
        with (copy / file).open("a") as stream:
            stream.write("\n")
        assert digest_of(tmp_path) != before, file
    before = digest_of(tmp_path)
    (copy / "seeding.py").write_text((copy / "training/seeding.py").read_text())
    assert digest_of(tmp_path) != before


def test_every_file_of_the_program_counts():
    assert {
        "cli.py",
        "kernels/native.cpp",
        "tracking/report/page.html",
        "merges/common.json",
        "training/trainer.py",
    } <= set(code_files())
    assert not any("__pycache__" in name for name in code_files())


def test_a_difference_is_told_with_ranks_and_hosts():
    old, new = {"version of torch": "2.14.0", "code of a": "1"}, {"version of torch": "2.15.0", "code of a": "1"}
    said = _sentence(["node1"] * 4 + ["node2"] * 4 + ["node3"] * 4, [new] * 4 + [old] * 8)
    assert said.endswith(
        "they differ in version of torch (2.15.0 on ranks 0, 1, 2, 3 (node1); "
        "2.14.0 on ranks 4, 5, 6, 7, ... (8 ranks) (node2, node3))"
    )


def test_a_file_that_one_rank_has_not_is_told():
    said = _sentence(["a", "b"], [{"code of x": "1"}, {}])
    assert said.endswith("they differ in code of x (1 on rank 0 (a); nothing on rank 1 (b))")


def test_many_differences_are_counted():
    said = _sentence(["a", "b"], [{f"code of {n}": "1" for n in range(9)}, {f"code of {n}": "2" for n in range(9)}])
    assert said.count("code of") == 4
    assert said.endswith("; and 5 more")
