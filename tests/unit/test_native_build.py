"""How the native library comes to be, what is refused on the way, and which kernels are taken then."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from mf_scale.errors import UserError
from mf_scale.kernels import choose, native, native_build
from mf_scale.kernels.choose import choose_kernels, fallback_reason, why_not

pytestmark = pytest.mark.skipif(
    why_not("native", "cpu", torch.float32) is not None,
    reason=f"no native kernels: {why_not('native', 'cpu', torch.float32)}",
)


def _fresh(code: str, **environment: str | None) -> str:
    """Print of a new process whose kernels were not built yet; None takes a variable away."""
    process = subprocess.run(
        [sys.executable, "-c", code],
        capture_output=True,
        text=True,
        timeout=120,
        check=False,
        env={name: value for name, value in {**os.environ, **environment}.items() if value is not None},
        cwd=Path(__file__).parents[2],
    )
    assert process.returncode == 0, process.stderr
    return process.stdout


REPORT = (
    "import torch; from mf_scale.kernels.choose import choose_kernels, why_not;"
    "print(choose_kernels('auto', 'cpu', torch.float32), why_not('native', 'cpu', torch.float32))"
)


def test_it_is_built_once_and_a_damaged_or_foreign_cache_is_survived(tmp_path):
    environment = {"XDG_CACHE_HOME": str(tmp_path / "cache"), "TMPDIR": str(tmp_path)}
    assert _fresh(REPORT, **environment).startswith("native")
    (library,) = (tmp_path / "cache/mf_scale").glob("native-*.so")
    built = library.stat().st_mtime_ns
    assert _fresh(REPORT, **environment).startswith("native") and library.stat().st_mtime_ns == built
    library.write_bytes(b"not a library")
    assert _fresh(REPORT, **environment).startswith("native")
    (tmp_path / "blocked").write_text("a file where a folder should be")
    assert _fresh(REPORT, XDG_CACHE_HOME=str(tmp_path / "blocked"), TMPDIR=str(tmp_path)).startswith("native")
    assert [f.name for f in tmp_path.rglob("tmp*.so")] == []


def test_without_a_compiler_the_eager_path_serves(tmp_path):
    told = _fresh(REPORT, PATH=str(tmp_path), CXX="", XDG_CACHE_HOME=str(tmp_path), TMPDIR=str(tmp_path))
    assert told.startswith("eager") and "there is no C++ compiler" in told
    _script(tmp_path / "c++", "echo no such header >&2\nexit 1")
    told = _fresh(REPORT, PATH=f"{tmp_path}:/bin-less", CXX="", XDG_CACHE_HOME=str(tmp_path), TMPDIR=str(tmp_path))
    assert told.startswith("eager") and "no such header" in told


# In this process: the library's makers under other folders and compilers


@pytest.fixture
def places(tmp_path, monkeypatch) -> tuple[Path, Path]:
    """The two folders, neither of which exists yet; nothing is compiled in earnest, the library in use is copied."""
    (made,) = {Path(native.library()._name)}

    def pretend(command, compiler):
        if Path(compiler[0]).name == "broken":
            raise native_build.NoNativeLibraryError("broken failed: no such header")
        shutil.copy(made, command[command.index("-o") + 1])

    monkeypatch.setattr(native_build, "_run", pretend)
    monkeypatch.delenv("CXX", raising=False)
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    monkeypatch.setattr(native_build.tempfile, "gettempdir", lambda: str(tmp_path))
    return tmp_path / "mf_scale", tmp_path / f"mf_scale-{os.getuid()}"


def _script(path: Path, text: str) -> Path:
    path.write_text(f"#!/bin/sh\n{text}\n")
    path.chmod(0o755)
    return path


def _folder_of_a_fresh_library() -> Path:
    return Path(native_build.library.__wrapped__()._name).parent


def test_a_folder_or_file_that_others_may_write_is_not_trusted(places, tmp_path):
    cache, temporary = places
    assert _folder_of_a_fresh_library() == cache
    for mode in (0o770, 0o707):
        cache.chmod(mode)
        assert _folder_of_a_fresh_library() == temporary
    cache.rename(tmp_path / "elsewhere")
    (tmp_path / "elsewhere").chmod(0o700)
    cache.symlink_to(tmp_path / "elsewhere")
    assert _folder_of_a_fresh_library() == temporary
    (library,) = temporary.glob("*.so")
    library.unlink()  # it is in use: not to be written over
    library.write_bytes(b"planted")
    library.chmod(0o666)
    assert _folder_of_a_fresh_library() == temporary
    assert library.stat().st_mode & 0o777 == 0o700 and library.read_bytes() != b"planted"
    temporary.chmod(0o777)
    with pytest.raises(native_build.NoNativeLibraryError, match=r"mf_scale: others own it .*others own it"):
        native_build.library.__wrapped__()


def test_folders_of_others_are_named(places, monkeypatch):
    monkeypatch.setattr(native_build.os, "getuid", lambda: 12345)
    with pytest.raises(native_build.NoNativeLibraryError, match=r"cannot be kept anywhere .*others own it"):
        native_build.library.__wrapped__()


def test_without_a_home_the_temporary_folder_serves(places, monkeypatch):
    def homeless(_):
        raise RuntimeError("Could not determine home directory.")

    monkeypatch.delenv("XDG_CACHE_HOME")
    monkeypatch.setattr(Path, "expanduser", homeless)
    assert _folder_of_a_fresh_library() == places[1]


def test_a_broken_compiler_gives_way_to_the_next(places, tmp_path, monkeypatch):
    monkeypatch.setenv("CXX", str(_script(tmp_path / "broken", "exit 1")))
    assert _folder_of_a_fresh_library() == places[0]
    monkeypatch.setenv("PATH", str(tmp_path))
    with pytest.raises(native_build.NoNativeLibraryError, match="no such header"):
        native_build.library.__wrapped__()


def test_a_compiler_with_arguments(monkeypatch):
    monkeypatch.setenv("CXX", "env 'A=a b' g++")
    found = shutil.which("env")
    assert native_build._compilers()[0] == [found, "A=a b", "g++"]
    plain, more = native_build._fingerprint([str(found), "g++"]), native_build._fingerprint([str(found), "g++", "-O1"])
    assert plain != more
    monkeypatch.setenv("CXX", "'g++")
    assert all(len(command) == 1 for command in native_build._compilers())


def test_what_is_no_program_is_said_of_the_compiler_and_not_of_the_folder(tmp_path):
    text = tmp_path / "c++"
    text.write_bytes(b"\x7fnothing")
    text.chmod(0o755)
    with pytest.raises(native_build.NoNativeLibraryError, match=r"c\+\+ cannot be run: Exec format error"):
        native_build._compile([str(text)], tmp_path / "native.so")
    assert [file.name for file in tmp_path.iterdir()] == ["c++"]


# Threads and memory that the system does not give


def test_no_threads_and_no_memory_end_no_process():
    """Both are shown to the library by a limit on the process, after all is loaded."""
    code = """
import resource, torch
from mf_scale.kernels.native import PairSums, mask_loss
from mf_scale.kernels.settings import Settings
torch.set_num_threads(1)
i = torch.zeros(1, 8, dtype=torch.int64)
def loss(maps):
    settings = Settings(1.0, 1.0, 0.5, 2.0, False)
    return mask_loss(torch.ones(1, 8, 2, 2), maps, i, i, i[0, :1] + 8, settings, want_gradient=True)
def sums(segments):
    pair = PairSums(1, torch.zeros(segments, dtype=torch.int64), 0.25, 2.0, False)
    pair.add(torch.ones(4, 1), torch.zeros(1, 4, dtype=torch.int16), 0)
    return pair
narrow, broad = (torch.zeros(1, 1, 2, width, dtype=torch.int16) for width in (50, 100000))
wanted = loss(narrow)  # by one thread: the stacks of others would be kept and used again
torch.set_num_threads(4)
limit = int(open('/proc/self/statm').read().split()[0]) * 4096 + 3 * 2**20  # less than the stack of a thread
resource.setrlimit(resource.RLIMIT_AS, (limit, limit))
assert all(torch.equal(a, b) for a, b in zip(wanted, loss(narrow)))
for attempt in (lambda: loss(broad), lambda: sums(20000)):
    try:
        attempt()
    except MemoryError as error:
        print(error)
"""
    assert _fresh(code).splitlines() == ["the native kernels had no memory for their work"] * 2


# Which kernels are taken


def test_what_is_asked_for_and_cannot_run_is_explained():
    assert choose_kernels("auto", "cpu", torch.float32) == "native"
    assert choose_kernels("auto", "cpu", torch.float64) == "eager"
    with pytest.raises(
        UserError, match=r"native kernels cannot run here on cpu in torch\.float64: they compute in fp32"
    ):
        choose_kernels("native", "cpu", torch.float64)
    with pytest.raises(UserError, match="triton kernels cannot run here on cpu"):
        choose_kernels("triton", "cpu", torch.float32)


def test_why_auto_means_eager_is_not_lost():
    assert fallback_reason("auto", "cpu", torch.float32) is None
    assert fallback_reason("eager", "cpu", torch.float64) is None
    assert fallback_reason("auto", "cpu", torch.float64) == (
        "the native kernels cannot run here on cpu in torch.float64: they compute in fp32"
    )


def test_wrong_numbers_of_a_kernel_are_found_by_the_trial(monkeypatch):
    def trial() -> str | None:
        return why_not.__wrapped__("native", "cpu", torch.float32)

    right = choose.run

    def no_gradient(kernels, *arguments, **options):
        focal, dice, gradient = right(kernels, *arguments, **options)
        assert gradient is not None
        return focal, dice, gradient if kernels == "eager" else torch.zeros_like(gradient)

    assert trial() is None
    with monkeypatch.context() as patch:
        patch.setattr(native.PairSums, "add", lambda *_: None)
        assert "a trial of the matching sums gave [0.0, 0.0, 0.0, 0.0]" in (trial() or "")
    with monkeypatch.context() as patch:
        patch.setattr(choose, "run", no_gradient)
        assert "and the gradient [0.0, 0.0, 0.0, 0.0]" in (trial() or "")


def test_the_library_is_loaded_once():
    assert native.library() is native.library()
