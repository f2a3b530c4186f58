"""What is shipped, what it costs at start-up, and which module may import which."""

import os
import py_compile
import re
import shutil
import subprocess
import sys
import sysconfig
import tarfile
import venv
import zipfile
from pathlib import Path

import pytest

import sb3_sdac

ROOT = Path(__file__).parents[1]
PACKAGE = ROOT / "sb3_sdac"
CONFIGS = [f"sb3_sdac/hyperparams/{path.name}" for path in (ROOT / "hyperparams").glob("*.yml")]
DATA = ["sb3_sdac/py.typed", "sb3_sdac/version.txt", *CONFIGS]
HOOK = ["sb3_sdac_zoo_hook.pth", "sb3_sdac_zoo_hook.py"]


def copy_source(target: Path) -> Path:
    """A clone's files, without what was built or trained in it."""
    not_source = shutil.ignore_patterns(".*", "build", "dist", "*.egg-info", "__pycache__", "logs", "runs")
    shutil.copytree(ROOT, target, ignore=not_source)
    return target


def run_python(code: str, *options: str) -> str:
    """What a fresh interpreter prints."""
    return subprocess.run([sys.executable, *options, "-c", code], check=True, capture_output=True, text=True, cwd=ROOT).stdout


def test_version_and_public_names():
    assert re.fullmatch(r"\d+\.\d+\.\d+", sb3_sdac.__version__)
    assert all(hasattr(sb3_sdac, name) for name in sb3_sdac.__all__)


def test_import_leaves_rl_zoo3_alone():
    assert run_python("import sys, sb3_sdac; print([name for name in sys.modules if name.startswith('rl_zoo3')])") == "[]\n"


def test_hook_costs_nothing_and_is_silent(tmp_path):
    # -S: without site-packages, so that neither rl_zoo3 nor an installed hook is there. With them, Python itself imports os.
    code = f"""
import os, sys, time
sys.path.insert(0, {str(tmp_path)!r})
before, start = set(sys.modules), time.perf_counter()
import sb3_sdac_zoo_hook
seconds = time.perf_counter() - start
assert sys.modules.keys() - before == {{"sb3_sdac_zoo_hook"}}, sys.modules.keys() - before
try:
    import rl_zoo3.utils
except ModuleNotFoundError:
    print(seconds)
"""
    py_compile.compile(shutil.copy(ROOT / HOOK[1], tmp_path))  # as pip does
    assert min(float(run_python(code, "-S")) for _ in range(5)) < 1e-3


def test_hook_can_be_switched_off(monkeypatch):
    code = "import sys; sys.path.insert(0, '.'); from sb3_sdac_zoo_hook import ZooFinder; print(ZooFinder in sys.meta_path)"
    monkeypatch.delenv("SB3_SDAC_NO_ZOO_HOOK", raising=False)
    assert run_python(code, "-S") == "True\n"
    monkeypatch.setenv("SB3_SDAC_NO_ZOO_HOOK", "1")
    assert run_python(code, "-S") == "False\n"


@pytest.mark.slow
def test_sdist_and_wheel(tmp_path):
    """The wheel is built from the sdist, so that the sdist has to be complete."""
    source = copy_source(tmp_path / "source")
    command = [sys.executable, "-W", "ignore", "-m", "build", "--no-isolation", "--outdir", str(tmp_path), str(source)]
    result = subprocess.run(command, capture_output=True, text=True, env={**os.environ, "PIP_NO_INDEX": "1"})
    assert result.returncode == 0, result.stdout + result.stderr

    [sdist], [wheel] = tmp_path.glob("*.tar.gz"), tmp_path.glob("*.whl")
    assert sb3_sdac.__version__ in wheel.name
    with tarfile.open(sdist) as archive:
        in_sdist = {name.partition("/")[2] for name in archive.getnames()}
    assert {name.replace("sb3_sdac/hyperparams", "hyperparams") for name in DATA} <= in_sdist
    assert {"LICENSE", "tests/test_package.py", *HOOK} <= in_sdist
    with zipfile.ZipFile(wheel) as archive:
        in_wheel = set(archive.namelist())
        [record] = (archive.read(name).decode() for name in in_wheel if name.endswith("/RECORD"))
    assert {*DATA, *HOOK, *(f"sb3_sdac/{path.name}" for path in PACKAGE.glob("*.py"))} <= in_wheel
    assert {name.split("/")[0] for name in in_wheel} == {"sb3_sdac", f"sb3_sdac-{sb3_sdac.__version__}.dist-info", *HOOK}
    assert {name for name in in_wheel if name.endswith(".yml")} == set(CONFIGS)
    assert all(f"\n{name}," in f"\n{record}" for name in in_wheel)  # what pip uninstall removes


@pytest.mark.slow
@pytest.mark.parametrize("options", [["-e"], []], ids=["editable", "plain"])
def test_installed_from_a_clone(options, tmp_path):
    """Into an environment of its own, and imported from the folder above the clone, whose name is the package's."""
    clone = copy_source(tmp_path / "sb3_sdac")
    builder = venv.EnvBuilder(symlinks=os.name != "nt", with_pip=False)
    builder.create(tmp_path / "venv")
    context = builder.ensure_directories(tmp_path / "venv")
    [site_packages] = (tmp_path / "venv").glob("**/site-packages")
    # The tests' own packages, but not what their .pth files add: an editable install of this very package
    packages = sysconfig.get_path("purelib")
    (site_packages / "tests.pth").write_text(packages, encoding="utf-8")

    def run(*arguments):
        environment = {name: value for name, value in os.environ.items() if name != "PYTHONPATH"} | {"PIP_NO_INDEX": "1"}
        command = [context.env_exe, *arguments]
        result = subprocess.run(command, cwd=tmp_path, env=environment, capture_output=True, text=True)
        assert result.returncode == 0, result.stdout + result.stderr
        return result.stdout

    run("-m", "pip", "install", "-q", "--ignore-installed", "--no-deps", "--no-build-isolation", *options, "./sb3_sdac")
    code = "from sb3_sdac import SDAC, zoo; print(SDAC.__module__, zoo.HYPERPARAMS, *sorted(zoo.HYPERPARAMS.glob('*.yml')))"
    module, folder, *configs = run("-c", code).split()
    assert module == "sb3_sdac.sdac"
    home = clone / "hyperparams" if options else site_packages / "sb3_sdac" / "hyperparams"
    assert Path(folder).resolve() == home.resolve()
    assert {Path(config).name for config in configs} == {Path(config).name for config in CONFIGS}
    # The start-up hook is what only a plain install has
    assert run("-c", "import sys; print('sb3_sdac_zoo_hook' in sys.modules)").strip() == str(not options)
