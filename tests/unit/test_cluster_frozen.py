"""What is trained is what was submitted: copies of code and configuration in the run directory."""

from __future__ import annotations

import errno
import os
import shutil
import time
from dataclasses import dataclass
from pathlib import Path

import pytest

from mf_scale.cluster.frozen import Frozen, freeze, frozen_facts, open_frozen
from mf_scale.config.load import load_config
from mf_scale.errors import FaultError, UserError
from mf_scale.rundir import RunDir

NOW = time.time()


@dataclass
class Project:
    """A small stand-in for the project's folder; `write` says when a file was changed, in seconds from now."""

    root: Path
    run: RunDir

    def write(self, name: str, text: str, at: float) -> None:
        file = self.root / name
        file.parent.mkdir(parents=True, exist_ok=True)
        file.write_text(text)
        os.utime(file, (NOW + at, NOW + at))

    def freeze(self, submitted: float | None, *, anew: bool = False) -> Frozen:
        """The copy of a job submitted so many seconds from now; None: frozen at the submission itself."""
        config = self.root / "small.yaml"
        when = 0.0 if submitted is None else NOW + submitted
        effective = load_config(config)
        return freeze(self.run, config, effective, self.root, self.root / "mf_scale", submitted=when, anew=anew)


@pytest.fixture
def project(tmp_path: Path) -> Project:
    made = Project(tmp_path / "project", RunDir(tmp_path / "run"))
    for name in ("mf_scale/__init__.py", "mf_scale/data/order.py", "mf_scale/page.html", "launch/job.sh"):
        made.write(name, f"first {name}", -1000)
    made.write("base.yaml", "train: {steps: 7}\n", -1000)
    made.write("small.yaml", "base: base.yaml\nseed: 3\n", -1000)
    return made


def test_a_copy_holds_code_scripts_and_the_whole_configuration(project: Project) -> None:
    project.write("mf_scale/__pycache__/x.pyc", "x", -1000)
    frozen = project.freeze(-500)
    assert frozen.notes == ()
    assert (frozen.folder / "mf_scale/data/order.py").read_text() == "first mf_scale/data/order.py"
    assert (frozen.folder / "launch/job.sh").is_file() and (frozen.folder / "mf_scale/page.html").is_file()
    assert not (frozen.folder / "mf_scale/__pycache__").exists()
    config = load_config(frozen.config)
    assert (config.train.steps, config.seed) == (7, 3)
    assert frozen_facts(frozen.folder)["config"] == str(project.root / "small.yaml")
    assert project.freeze(-500).folder == frozen.folder
    assert len(list((project.run.path / "code").iterdir())) == 2  # the copy, and the name of the newest


def test_files_changed_after_the_submission_are_not_trained(project: Project) -> None:
    project.write("mf_scale/data/order.py", "edited", -10)
    with pytest.raises(UserError, match=r"order.py changed after the job was submitted"):
        project.freeze(-500)
    assert not (project.run.path / "code").exists()
    assert project.freeze(None).notes == ()  # at the submission itself: what is there is what is submitted


def test_the_configurations_base_counts_too(project: Project) -> None:
    project.write("base.yaml", "train: {steps: 8}\n", -10)
    with pytest.raises(UserError, match=r"small.yaml changed after the job was submitted"):
        project.freeze(-500)


def test_a_later_job_trains_the_older_copy_where_files_changed_after_it(project: Project) -> None:
    first = project.freeze(-500)
    project.write("mf_scale/data/order.py", "edited", -10)
    chained = project.freeze(-400)
    assert chained.folder == first.folder
    assert "order.py changed after the job was submitted; training from the copy made before" in chained.notes[0]


def test_a_later_job_trains_what_had_changed_before_it(project: Project) -> None:
    first = project.freeze(-500)
    project.write("mf_scale/data/order.py", "edited", -300)
    project.write("small.yaml", "base: base.yaml\nseed: 4\n", -300)
    later = project.freeze(-100)
    assert later.folder != first.folder and load_config(later.config).seed == 4
    assert "changed since the last submission; training from a new copy" in later.notes[0]
    assert open_frozen(first.folder).folder == first.folder  # the job before it still has its own


def test_files_changed_on_both_sides_of_the_submission_are_refused(project: Project) -> None:
    project.freeze(-500)
    project.write("mf_scale/data/order.py", "edited", -300)
    project.write("mf_scale/__init__.py", "edited", -10)
    with pytest.raises(UserError, match=r"__init__\.py changed after"):
        project.freeze(-100)
    assert project.freeze(-100, anew=True).notes


@pytest.mark.parametrize("name", ["mf_scale/data/order.py", "config.yaml", "launch/job.sh"])
def test_an_altered_copy_is_refused(project: Project, name: str) -> None:
    frozen = project.freeze(-500)
    (frozen.folder / name).write_text("altered")
    for again in (lambda: open_frozen(frozen.folder), lambda: project.freeze(-500)):
        with pytest.raises(UserError, match="altered after it was frozen"):
            again()


def test_an_altered_or_lost_copy_is_made_anew(project: Project) -> None:
    frozen = project.freeze(-500)
    (frozen.folder / "launch/job.sh").write_text("altered")
    again = project.freeze(-500, anew=True)
    assert again.folder == frozen.folder and (again.folder / "launch/job.sh").read_text() == "first launch/job.sh"
    shutil.rmtree(again.folder)
    assert open_frozen(project.freeze(-500).folder)


def test_what_editors_and_nfs_leave_is_not_the_program(project: Project) -> None:
    frozen = project.freeze(-500)
    for name in (".cli.py.swp", "data/.nfs0001", "page.html~", ".hidden/x.py"):
        project.write(f"mf_scale/{name}", "x", 0)
        (frozen.folder / "mf_scale" / name).parent.mkdir(exist_ok=True)
        (frozen.folder / "mf_scale" / name).write_text("x")
    assert project.freeze(-500) == frozen


def test_the_sites_own_settings_are_not_copied(project: Project) -> None:
    """They may hold a key, and run directories are shared."""
    project.write("launch/site.env", "export WANDB_API_KEY=x", -1000)
    assert not (project.freeze(-500).folder / "launch/site.env").exists()


def test_a_full_disk_leaves_no_half_copy(project: Project, monkeypatch: pytest.MonkeyPatch) -> None:
    def full(*_: object) -> None:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    monkeypatch.setattr("mf_scale.cluster.frozen.shutil.copy2", full)
    with pytest.raises(FaultError, match="No space left"):
        project.freeze(-500)
    assert not list((project.run.path / "code").glob(".*"))


def test_a_copy_that_was_cut_short_is_made_again(project: Project) -> None:
    left = project.run.path / "code" / ".freezing-0123-1"
    left.mkdir(parents=True)
    assert open_frozen(project.freeze(-500).folder)


def test_the_users_own_builder_is_copied(project: Project, monkeypatch: pytest.MonkeyPatch) -> None:
    project.write("mine/__init__.py", "", -1000)
    project.write("mine/net.py", "def build(): ...", -1000)
    project.write("alone.py", "def build(): ...", -1000)
    monkeypatch.syspath_prepend(str(project.root))
    for builder, name in (("mine.net:build", "mine/net.py"), ("alone:build", "alone.py")):
        project.write("small.yaml", f"model: {{pixel_level: {{builder: '{builder}'}}}}\n", -1000)
        assert (project.freeze(None).folder / name).read_text() == "def build(): ..."
    project.write("small.yaml", "model: {pixel_level: {builder: 'numpy:zeros'}}\n", -1000)
    assert not (project.freeze(None).folder / "numpy").exists()
