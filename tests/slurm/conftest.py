"""One SLURM for all tests of this folder, healed after each of them."""

from __future__ import annotations

import shutil
import subprocess
import tempfile
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.slurm import names
from tests.slurm.client import ClusterError
from tests.slurm.testbed import Cluster, unavailable


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Every test of this folder is a SLURM test."""
    for item in items:
        if Path(__file__).parent in item.path.parents:
            item.add_marker("slurm")


@pytest.fixture(scope="session")
def cluster_folder() -> Iterator[Path]:
    """A folder for clusters with a short path, since a socket's path is short; removed at the end."""
    if why := unavailable():
        pytest.skip(why)
    folder = Path(tempfile.mkdtemp(prefix=names.PREFIX))
    folder.chmod(0o755)
    yield folder
    shutil.rmtree(folder, ignore_errors=True)


@pytest.fixture(scope="session")
def session_cluster(cluster_folder: Path) -> Iterator[Cluster]:
    """Three nodes with two GPUs each, up for the whole session; tests take `cluster`."""
    with Cluster(cluster_folder / "main") as cluster:
        yield cluster


@pytest.fixture
def cluster(session_cluster: Cluster) -> Iterator[Cluster]:
    """The cluster with every node idle; after the test its jobs are cancelled and its nodes repaired."""
    yield session_cluster
    try:
        session_cluster.heal()
    except (ClusterError, RuntimeError, subprocess.SubprocessError):
        # A test that broke it beyond repair must not take the others with it.
        session_cluster.down()
        session_cluster.up()
        raise
