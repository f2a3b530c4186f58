"""Files are complete or as they were before, whatever happens while they are written, and errors name them."""

import errno
import io
import os
import pickle
import signal
import stat
import subprocess
import sys
import zipfile
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch as th
from stable_baselines3.common.policies import BasePolicy

from sb3_sdac import SDAC
from sb3_sdac.checkpoint import load_checkpoint, save_checkpoint
from sb3_sdac.files import replaced_in_one_step, save_in_one_step

resource = pytest.importorskip("resource", reason="limits on the size of files are POSIX's")
#: What `write` raises when the disk is full; a file system with a quota says EDQUOT
FULL = [errno.ENOSPC, errno.EDQUOT]


@contextmanager
def files_of_at_most(n_bytes: int) -> Iterator[None]:
    """As with a full disk, ``write`` fails, halfway through a file, in Python and in C++."""
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    handler = signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
    resource.setrlimit(resource.RLIMIT_FSIZE, (n_bytes, limits[1]))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
        signal.signal(signal.SIGXFSZ, handler)


@pytest.fixture(scope="module")
def model() -> SDAC:
    model = SDAC("MlpPolicy", "Pendulum-v1", buffer_size=5000, learning_starts=20, policy_kwargs={"net_arch": [64]})
    return model.learn(22)


def only(path: Path, content: bytes) -> bool:
    """Whether this is the one file of its folder, and what is in it."""
    return list(path.parent.iterdir()) == [path] and path.read_bytes() == content


# The mechanism


def test_new_file(tmp_path: Path) -> None:
    path = tmp_path / "not" / "there" / "file.bin"
    with replaced_in_one_step(path) as file:
        file.write(b"new")
        assert not path.exists()
    assert only(path, b"new")


def test_old_file_until_the_end(tmp_path: Path) -> None:
    path = tmp_path / "file.bin"
    path.write_bytes(b"old")
    with replaced_in_one_step(str(path)) as file:
        file.write(b"new")
        file.flush()
        assert path.read_bytes() == b"old"
    assert only(path, b"new")


@pytest.mark.parametrize(
    "error", [KeyboardInterrupt, SystemExit, MemoryError, ValueError("mine"), RuntimeError("mine")], ids=repr
)
@pytest.mark.parametrize("old", [b"old", None])
def test_interrupted(error: Any, old: bytes | None, tmp_path: Path) -> None:
    """What is no error of the file's comes through as it is."""
    path = tmp_path / "file.bin"
    if old is not None:
        path.write_bytes(old)
    expected = error if isinstance(error, type) else type(error)
    with pytest.raises(expected) as caught, replaced_in_one_step(path) as file:
        file.write(b"new")
        raise error
    assert not isinstance(caught.value, OSError)
    assert [entry.read_bytes() for entry in tmp_path.iterdir()] == ([old] if old else [])


@pytest.mark.parametrize("code", FULL)
@pytest.mark.parametrize("old", [b"old", None])
def test_full_disk(code: int, old: bytes | None, tmp_path: Path) -> None:
    path = tmp_path / "file.bin"
    if old is not None:
        path.write_bytes(old)
    with pytest.raises(OSError) as caught, replaced_in_one_step(path) as file:
        file.write(b"new")
        raise OSError(code, os.strerror(code))
    assert (caught.value.errno, caught.value.filename) == (code, str(path))
    state = "the file is as it was" if old else "no file was written"
    assert str(caught.value) == f"[Errno {code}] {os.strerror(code)}, {state}: {str(path)!r}"
    assert [entry.read_bytes() for entry in tmp_path.iterdir()] == ([old] if old else [])


def test_full_at_the_last_moment(tmp_path: Path) -> None:
    """What was written is in Python's memory, and fails when it is flushed."""
    path = tmp_path / "file.bin"
    path.write_bytes(b"old")
    with files_of_at_most(100), pytest.raises(OSError, match=r"the file is as it was: '.*file\.bin'"):
        with replaced_in_one_step(path) as file:
            file.write(bytes(200))
    assert only(path, b"old")


def test_full_disk_behind_another_error(tmp_path: Path) -> None:
    """zipfile's clean-up says that there is an open writing handle."""
    path = tmp_path / "file.zip"
    with files_of_at_most(100), pytest.raises(OSError, match=r"no file was written: '.*file\.zip'"):
        with replaced_in_one_step(path) as file, zipfile.ZipFile(file, "w") as archive:
            with archive.open("part", "w", force_zip64=True) as part:
                part.write(np.random.default_rng(0).bytes(100_000))
    assert list(tmp_path.iterdir()) == []


def test_error_without_a_number(tmp_path: Path) -> None:
    with pytest.raises(OSError, match=r"file\.bin could not be written, no file was written: tape is torn"):
        with replaced_in_one_step(tmp_path / "file.bin"):
            raise OSError("tape is torn")


def test_error_of_another_file_names_that(tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError) as caught, replaced_in_one_step(tmp_path / "file.bin"):
        (tmp_path / "other").read_bytes()
    assert caught.value.filename == str(tmp_path / "other")
    assert list(tmp_path.iterdir()) == []


def test_folder_cannot_be_made(tmp_path: Path) -> None:
    (tmp_path / "file").write_bytes(b"old")
    with pytest.raises(OSError, match="file"), replaced_in_one_step(tmp_path / "file" / "model.zip"):
        pass
    with pytest.raises(IsADirectoryError, match=str(tmp_path)), replaced_in_one_step(tmp_path):
        pass
    assert only(tmp_path / "file", b"old")


def test_links_stay_links(tmp_path: Path) -> None:
    (tmp_path / "disk").mkdir()
    (tmp_path / "latest.bin").symlink_to(tmp_path / "disk" / "run.bin")
    for content in (b"first", b"second"):  # it leads nowhere at first
        with replaced_in_one_step(tmp_path / "latest.bin") as file:
            file.write(content)
        assert (tmp_path / "latest.bin").is_symlink()
        assert only(tmp_path / "disk" / "run.bin", content)


def test_permissions(tmp_path: Path) -> None:
    """Those of the old file; a new one has those that `open` gives."""
    for name in ("ours", "theirs"):
        with replaced_in_one_step(tmp_path / name) if name == "ours" else (tmp_path / name).open("wb") as file:
            file.write(b"old")
    modes = [stat.S_IMODE((tmp_path / name).stat().st_mode) for name in ("ours", "theirs")]
    assert modes[0] == modes[1]
    (tmp_path / "ours").chmod(0o640)
    with replaced_in_one_step(tmp_path / "ours") as file:
        file.write(b"new")
    assert stat.S_IMODE((tmp_path / "ours").stat().st_mode) == 0o640


def test_read_only_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Somebody wants to keep it."""
    path = tmp_path / "file.bin"
    path.write_bytes(b"old")
    monkeypatch.setattr(os, "access", lambda asked, mode: False)  # root may write to everything
    with pytest.raises(PermissionError, match=r"Permission denied.*file\.bin"), replaced_in_one_step(path) as file:
        file.write(b"new")
    assert only(path, b"old")


def test_what_is_no_plain_file() -> None:
    code = "from sb3_sdac.files import *\nwith replaced_in_one_step('/dev/stdout') as file: file.write(b'piped')"
    assert subprocess.run([sys.executable, "-c", code], capture_output=True, check=True).stdout == b"piped"
    with pytest.raises(OSError, match=r"No space left on device, .*'/dev/full'"):
        with replaced_in_one_step("/dev/full") as file:
            file.write(b"new")


# As SB3 saves


@pytest.mark.parametrize("kind", [str, Path])
@pytest.mark.parametrize(
    ("given", "suffix", "made"),
    [
        ("model", "zip", "model.zip"),
        ("model.zip", "zip", "model.zip"),
        ("model_0.5", "zip", "model_0.5"),
        ("policy", "", "policy"),
        ("buffer", "pkl", "buffer.pkl"),
    ],
)
def test_suffix(kind: Any, given: str, suffix: str, made: str, tmp_path: Path) -> None:
    save_in_one_step(lambda file: file.write(b"new"), kind(tmp_path / given), suffix)
    assert only(tmp_path / made, b"new")


def test_warnings_of_sb3(tmp_path: Path) -> None:
    def save(file: Any) -> None:
        file.write(b"new")

    with pytest.warns(UserWarning, match=r"'.*not/there' does not exist. Will create it"):
        save_in_one_step(save, tmp_path / "not" / "there" / "model", "zip")
    with pytest.warns(UserWarning, match="is a folder. Will save instead to .*not_2"):
        save_in_one_step(save, tmp_path / "not")
    assert (tmp_path / "not_2").read_bytes() == b"new"
    with pytest.warns(UserWarning, match="not_2' exists, will overwrite it"):
        save_in_one_step(save, tmp_path / "not_2", verbose=2)


def test_open_file_is_written_to(tmp_path: Path) -> None:
    stream = io.BytesIO()
    save_in_one_step(lambda file: file.write(b"new"), stream, "zip")
    assert stream.getvalue() == b"new" and not stream.closed


Save = Callable[[Any, Any], None]
SAVES: dict[str, tuple[str, Save, Callable[[Path], Any]]] = {
    "model": ("zip", lambda model, file: model.save(file), lambda path: SDAC.load(path)),
    "buffer": ("pkl", lambda model, file: model.save_replay_buffer(file), lambda path: pickle.loads(path.read_bytes())),
    "policy": ("", lambda model, file: BasePolicy.save(model.policy, file), lambda path: th.load(path, weights_only=False)),
}


@pytest.mark.parametrize("what", SAVES)
@pytest.mark.parametrize("n_bytes", [0, 1000, 20_000])
def test_full_disk_while_sb3_saves(what: str, n_bytes: int, model: SDAC, tmp_path: Path) -> None:
    suffix, save, load = SAVES[what]
    path = tmp_path / f"file.{suffix or 'pth'}"
    save_in_one_step(lambda file: save(model, file), path, suffix)
    content = path.read_bytes()
    with files_of_at_most(n_bytes), pytest.raises(OSError, match=rf"the file is as it was: '.*{path.name}'") as caught:
        save_in_one_step(lambda file: save(model, file), path, suffix)
    assert caught.value.errno == errno.EFBIG and caught.value.filename == str(path)
    assert only(path, content)
    load(path)


@pytest.mark.parametrize("n_bytes", [0, 5000])
def test_full_disk_while_a_checkpoint_is_saved(n_bytes: int, model: SDAC, tmp_path: Path) -> None:
    path = tmp_path / "checkpoint.zip"
    save_checkpoint(model, path)
    content = path.read_bytes()
    with files_of_at_most(n_bytes), pytest.raises(OSError, match=r"the file is as it was: '.*checkpoint\.zip'"):
        save_checkpoint(model, path)
    assert only(path, content)
    assert model.env is not None
    assert load_checkpoint(path, model.env).num_timesteps == 22


def test_ctrl_c_while_sb3_saves(model: SDAC, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / "model.zip"
    save_in_one_step(model.save, path)
    content = path.read_bytes()

    def interrupt(*_: Any, **__: Any) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(th, "save", interrupt)
    with pytest.raises(KeyboardInterrupt):
        save_in_one_step(model.save, path)
    assert only(path, content)
