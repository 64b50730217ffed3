"""launch/container.sh: what one variable makes of the commands. Stand-ins write down what they are given: no real
apptainer or pyxis runs here."""

from __future__ import annotations

import os
import subprocess
from pathlib import Path

import pytest

pytestmark = pytest.mark.integration
ROOT = Path(__file__).parents[2]
SAY = 'printf "<%s>" "${0##*/}" "$@"; echo\n'
PYXIS = 'if [ "$1" = --help ]; then echo "      --container-image=IMG  --container-env=NAME"; exit; fi\n'
SHOW = """
mf_launch=$1 mf_root=$2 python=/venv/bin/python
mf_say() { echo "mf_scale: $*" >&2; }
. "$mf_launch/container.sh"
mf_container || exit 2
printf 'head'; printf ' %s' ${mf_head[@]+"${mf_head[@]}"}; echo
printf 'srun'; printf ' %s' ${mf_srun[@]+"${mf_srun[@]}"}; echo
printf 'inside'; printf ' %s' ${mf_inside[@]+"${mf_inside[@]}"}; echo
echo "python $python"
"""


def shown(folder: Path, *programs: tuple[str, str], **environment: str) -> tuple[int, dict[str, str], str]:
    """Exit code, the lists by name, and what was said, with these stand-ins alone in PATH besides the system's own."""
    (folder / "bin").mkdir(exist_ok=True)
    for name, text in programs:
        (folder / "bin" / name).write_text(f"#!/bin/bash\n{text}")
        (folder / "bin" / name).chmod(0o755)
    done = subprocess.run(
        ["bash", "-uc", SHOW, "show", str(ROOT / "launch"), "/project"],
        cwd=folder, env={"PATH": f"{folder}/bin:/usr/bin:/bin", **environment},
        capture_output=True, text=True, timeout=30, check=False,
    )  # fmt: skip
    return done.returncode, dict(line.partition(" ")[::2] for line in done.stdout.splitlines()), done.stderr


def test_without_the_variable_nothing_changes(tmp_path):
    code, lists, _ = shown(tmp_path)
    assert code == 0 and lists == {"head": "", "srun": "", "inside": "", "python": "/venv/bin/python"}


@pytest.mark.parametrize("program", ["apptainer", "singularity"])
def test_apptainer_stands_before_python(tmp_path, program):
    (tmp_path / "x.sif").touch()
    mounts = {"MF_CONTAINER_MOUNTS": "/data,/scratch/me:/out:ro", "MF_PYTHON": "/opt/python"}
    code, lists, _ = shown(tmp_path, (program, SAY), MF_CONTAINER=f"{tmp_path}/x.sif", **mounts)
    bound = f"/project:/project,{tmp_path}:{tmp_path},/data:/data,/scratch/me:/out:ro"
    wanted = f"{tmp_path}/bin/{program} exec --bind {bound} --pwd {tmp_path} {tmp_path}/x.sif"
    assert code == 0
    assert lists == {"head": wanted, "srun": "", "inside": wanted, "python": "/opt/python"}


def test_gpus_are_passed_in_where_there_are_some(tmp_path):
    given = {"MF_CONTAINER": "docker://some/image:1", "SLURM_GPUS_ON_NODE": "2"}
    code, lists, _ = shown(tmp_path, ("apptainer", SAY), **given)
    assert code == 0 and lists["inside"].endswith(f"--pwd {tmp_path} --nv docker://some/image:1")
    assert lists["python"] == "python3"


def test_any_other_image_is_for_srun(tmp_path):
    given = {"MF_CONTAINER": "registry#some/image:1", "SLURM_JOB_ID": "3", "SLURMD_NODENAME": "n1"}
    code, lists, _ = shown(tmp_path, ("srun", PYXIS + SAY), MF_CONTAINER_MOUNTS="/data", **given)
    mounts = f"--container-mounts=/project:/project,{tmp_path}:{tmp_path},/data:/data"
    options = (
        f"--container-image=registry#some/image:1 {mounts} --container-workdir={tmp_path} "
        "--container-env=PYTHONPATH,PYTHONSAFEPATH,OMP_NUM_THREADS"
    )
    assert code == 0
    assert lists == {
        "head": f"srun --overlap --nodes=1 --ntasks=1 --nodelist=n1 --input=0 {options}",
        "srun": options, "inside": "", "python": "python3",
    }  # fmt: skip


@pytest.mark.parametrize(
    ("image", "programs", "wanted"),
    [
        ("/nowhere/x.sif", (("apptainer", SAY),), "there is no such image"),
        ("docker://x", (), "needs apptainer or singularity"),
        ("some/image", (("srun", SAY),), "pyxis is not installed"),
        ("some/image", (), "pyxis is not installed"),
    ],
)
def test_what_cannot_work_is_refused_with_the_remedy(tmp_path, image, programs, wanted):
    code, _, said = shown(tmp_path, *programs, MF_CONTAINER=image)
    assert code == 2 and wanted in said


def test_python_stays_the_task_itself(tmp_path):
    """The composed command of a rank, run by a stand-in that ends in exec as apptainer does: signals reach Python."""
    (tmp_path / "x.sif").touch()
    stand_in = 'while [ "$1" != "${MF_CONTAINER}" ]; do shift; done\nshift\nexec "$@"\n'
    (tmp_path / "bin").mkdir()
    (tmp_path / "bin/apptainer").write_text(f"#!/bin/bash\n{stand_in}")
    (tmp_path / "bin/apptainer").chmod(0o755)
    script = (
        SHOW.partition("printf")[0] + '"${mf_inside[@]}" "$python" -c "import os; print(os.getpid())" & echo $!; wait'
    )
    done = subprocess.run(
        ["bash", "-uc", script, "show", str(ROOT / "launch"), "/project"], cwd=tmp_path,
        env={"PATH": f"{tmp_path}/bin:{os.environ['PATH']}", "MF_CONTAINER": f"{tmp_path}/x.sif"},
        capture_output=True, text=True, timeout=30, check=True,
    )  # fmt: skip
    started, said = done.stdout.split()
    assert started == said
