"""Files that are complete or as they were before: written beside their place, then moved there in one step."""

import os
import shutil
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, BinaryIO


@contextmanager
def replaced_in_one_step(path: str | Path) -> Iterator[BinaryIO]:
    """
    A file to write to, which takes its place once it is complete::

        with replaced_in_one_step("model.onnx") as file:
            file.write(content)

    A kill, Ctrl-C or a full disk leaves the file at ``path`` as it was. Parent folders are made. What is no plain file
    (``/dev/stdout``, a pipe) is written to directly. The new content lies in ``<path>.new`` until then, so only one process
    at a time may write to a path.

    :param path: the file; a link stays one, and the file that it leads to is replaced
    :return: the file, open for writing bytes
    :raises OSError: names ``path``, also where the error on the way (of zipfile, pickle, torch) does not
    """
    path = Path(path)
    target = Path(os.path.realpath(path))
    temporary = target.with_name(target.name + ".new")
    try:
        if path.exists() and not path.is_file():
            with path.open("wb") as file:
                yield file
            return
        target.parent.mkdir(parents=True, exist_ok=True)
        if target.exists() and not os.access(target, os.W_OK):
            raise PermissionError(13, "Permission denied", str(path))  # which moving another file there would not ask for
        try:
            with temporary.open("wb") as file:
                yield file
                file.flush()
                os.fsync(file.fileno())
            if target.exists():
                shutil.copymode(target, temporary)
            temporary.replace(target)
        finally:
            temporary.unlink(missing_ok=True)
    except Exception as error:
        cause = _os_error(error)
        if cause is None or cause.filename not in (None, str(temporary), str(target)):
            raise
        state = "the file is as it was" if target.is_file() else "no file was written"
        if cause.errno is None:
            raise OSError(f"{path} could not be written, {state}: {cause}") from error
        raise OSError(cause.errno, f"{cause.strerror}, {state}", str(path)) from error


def save_in_one_step(save: Callable[[Any], None], path: Any, suffix: str = "", verbose: int = 0) -> None:
    """
    Save as SB3 does, through :func:`replaced_in_one_step`.

    As there, a missing folder is made with a warning, a path that is a folder gets ``_2`` at its end with a warning, and an
    open file is written to directly.

    :param save: writes to the file that it is given, for instance a ``save`` of SB3's
    :param path: str or Path, with or without ``suffix``; anything else is handed to ``save``
    :param suffix: for paths that have none, without a dot, as ``"zip"``; empty to leave them alone
    :param verbose: 2 to warn before a file is replaced
    :raises OSError: names the file, which is as it was
    """
    if not isinstance(path, (str, Path)):
        save(path)
        return
    path = Path(path)
    if suffix and not path.suffix:
        path = Path(f"{path}.{suffix}")
    if path.is_dir():
        warnings.warn(f"Path '{path}' is a folder. Will save instead to {path}_2", stacklevel=3)
        path = Path(f"{path}_2")
    if not path.parent.exists():
        warnings.warn(f"Path '{path.parent}' does not exist. Will create it.", stacklevel=3)
    if verbose >= 2 and path.is_file():
        warnings.warn(f"Path '{path}' exists, will overwrite it.", stacklevel=3)
    with replaced_in_one_step(path) as file:
        save(file)


def _os_error(error: BaseException) -> OSError | None:
    """The OSError itself, or the one behind it: zipfile's and torch's clean-up may raise something else on top of it."""
    seen: set[int] = set()
    current: BaseException | None = error
    while current is not None and id(current) not in seen:
        if isinstance(current, OSError):
            return current
        seen.add(id(current))
        current = current.__cause__ or current.__context__
    return None
