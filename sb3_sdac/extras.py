"""Packages that are not installed with sb3_sdac itself: the error names the extra that brings them."""

import importlib


def require(package: str, extra: str, what: str) -> None:
    """
    Import a package of an extra, so that a missing one is an error that says what to install.

    :param package: as it is imported, for instance ``"tensorboard"``
    :param extra: of setup.cfg, for instance ``"plots"``
    :param what: needs it, for instance ``"tensorboard_log"``
    :raises ModuleNotFoundError: with the command that installs it. If something else is missing, on which the package depends,
        its own error
    """
    try:
        importlib.import_module(package)
    except ModuleNotFoundError as error:
        if (error.name or "").partition(".")[0] != package.partition(".")[0]:
            raise
        raise ModuleNotFoundError(
            f'{what} needs {package.partition(".")[0]}, which is not installed: pip install "sb3_sdac[{extra}]"',
            name=error.name,
        ) from error
