"""launch/sweep.sh and launch/evaluate.sh on a real SLURM: three small runs two at a time, and one of them evaluated."""

from __future__ import annotations

import json
import sys
from pathlib import Path

from tests.integration.program import SMALL, Run
from tests.slurm.testbed import Cluster

ROOT = Path(__file__).parents[2]
ENVIRONMENT = {"MF_ROOT": str(ROOT), "MF_PYTHON": sys.executable, "MF_DOCTOR": "0"}
GRID = "optimizer.lr: [1e-3, 2e-3, 4e-3]\n"
STEPS = 2


def ended(cluster: Cluster, array: int, timeout: float) -> None:
    cluster.wait_until("the array has ended", lambda: not cluster.squeue("%i", f"--jobs={array}"), timeout, array)


def test_a_sweep_of_three_runs_and_an_evaluation_of_one(cluster: Cluster, tmp_path: Path, packed: Path) -> None:
    (tmp_path / "grid.yaml").write_text(GRID)
    sweep = tmp_path / "sweep"
    small = [word for word in SMALL if not word.startswith("optimizer.lr=")]
    given = [*small, f"data.train={packed}/train", f"data.val={packed}/val", f"run_dir={sweep}",
             f"train.steps={STEPS}", "data.workers=0", "tracking.wandb=disabled"]  # fmt: skip
    words = [str(ROOT / "launch/sweep.sh"), "grid.yaml", str(ROOT / "configs/base.yaml"), *given]

    told = cluster.login("bash", *words, env=ENVIRONMENT, cwd=tmp_path).stdout
    assert "2  lr-0.004  0.004" in told and "sbatch --array=0-2%2 launch/sweep.sh grid.yaml" in told
    assert not sweep.exists()

    few = cluster.sbatch("--array=0-1", "--output=few-%a.log", *words, cwd=tmp_path, env=ENVIRONMENT)
    array = cluster.sbatch("--array=0-2%2", "--output=%a.log", *words, cwd=tmp_path, env=ENVIRONMENT)
    ended(cluster, few, 60)
    assert "Submit with --array=0-2" in (tmp_path / "few-0.log").read_text()
    assert cluster.exit_code(f"{few}_0") == 2
    ended(cluster, array, 150)
    logs = [(tmp_path / f"{task}.log").read_text() for task in range(3)]
    assert [cluster.exit_code(f"{array}_{task}") for task in range(3)] == [0, 0, 0], logs

    runs = ["lr-0.001", "lr-0.002", "lr-0.004"]
    for name in runs:
        assert list(Run(sweep / name, packed).series("step", "loss")) == list(range(1, STEPS + 1))
        assert json.loads((sweep / name / "launches.jsonl").read_text().splitlines()[0])["job"].startswith(f"{array}_")
    rows = json.loads((sweep / "summary.json").read_text())
    assert [(row["run"], row["values"], row["state"], row["step"]) for row in rows] == [
        (name, {"optimizer.lr": float(name.removeprefix("lr-"))}, "done", STEPS) for name in runs
    ]
    assert sum((sweep / "summary.md").read_text().partition("\n\n")[2].strip() in log for log in logs) >= 1, logs

    job = cluster.sbatch("--nodes=2", "--ntasks-per-node=1", "--output=evaluate.log", str(ROOT / "launch/evaluate.sh"),
                         str(sweep / runs[0]), "--split", "val", cwd=tmp_path, env=ENVIRONMENT)  # fmt: skip
    ended(cluster, job, 90)
    said = (tmp_path / "evaluate.log").read_text()
    assert cluster.exit_code(job) == 0 and "mIoU" in said, said
    assert cluster.nodes_of(job) == cluster.nodes[:2]
    results = json.loads((sweep / runs[0] / "report/evaluation-val.json").read_text())
    assert results["samples"] == 13 and results["step"] == STEPS
