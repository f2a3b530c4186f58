"""A package of an extra that is missing: the error says what to install."""

import sys
from pathlib import Path

import pytest

from sb3_sdac.extras import require


@pytest.mark.parametrize("package", ["absent_package", "absent_package.part"])
def test_missing(package: str) -> None:
    message = r'tensorboard_log needs absent_package, which is not installed: pip install "sb3_sdac\[plots\]"'
    with pytest.raises(ModuleNotFoundError, match=message) as caught:
        require(package, "plots", "tensorboard_log")
    assert caught.value.name == "absent_package"


def test_installed() -> None:
    require("json.decoder", "plots", "anything")


def test_what_the_package_itself_is_missing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """To install it again would not help."""
    (tmp_path / "half_installed.py").write_text("import absent_package", encoding="utf-8")
    monkeypatch.syspath_prepend(tmp_path)
    with pytest.raises(ModuleNotFoundError, match=r"^No module named 'absent_package'$"):
        require("half_installed", "plots", "anything")
    assert "half_installed" not in sys.modules
