"""The documentation tells the truth: its Python and its quick commands run, its links lead somewhere, nothing is left out."""

import argparse
import importlib.util
import inspect
import json
import os
import re
import runpy
import shlex
import subprocess
import sys
import warnings
from pathlib import Path
from typing import Any
from unittest.mock import patch

import pytest
from helpers.models import make_model
from helpers.watching import logged

import sb3_sdac
from sb3_sdac import DPMD, SDAC, DiffusionPolicy, zoo

ROOT = Path(__file__).parents[1]
DOCS = sorted((ROOT / "docs").glob("*.md"))
PAGES = [ROOT / "README.md", ROOT / "CONTRIBUTING.md", *DOCS, ROOT / "benchmarks" / "README.md"]
#: Made by a script, or history
UNWRAPPED = {"changelog.md"}
#: What follows the language in a fence: nothing, ``quick`` (a command that a test runs) or ``not run: reason``
BLOCK = re.compile(r"^```(\w+)(?: +(\S[^\n]*))?\n(.*?)^```$", re.MULTILINE | re.DOTALL)
LINK = re.compile(r"\]\((?![a-z]+:)([^)\s]+)")
#: What to run of a line, ours or rl_zoo3's
COMMAND = re.compile(r"python (-m (?:rl_zoo3|sb3_sdac)\.\S+|(?:benchmarks|examples|docs)/\S+\.py)")
#: Blocks of Python that cannot run here, by page
NOT_RUN = {"gpu.md": ["not run: needs a GPU"], "share.md": ["not run: needs the hub"]}


def blocks(page: Path, language: str, attribute: str | None = "") -> list[tuple[int, str]]:
    """
    First line and text of the blocks of a page in a language.

    :param page: a Markdown file
    :param language: the fence's first word
    :param attribute: the rest of the fence's line; None for any
    """
    text = page.read_text(encoding="utf-8")
    found = [match for match in BLOCK.finditer(text) if match[1] == language and attribute in (None, match[2] or "")]
    return [(text.count("\n", 0, match.start(3)), match[3]) for match in found]


def commands(page: Path, attribute: str | None = None) -> list[str]:
    """Every command of ours or of rl_zoo3 in the bash blocks of a page, without what surrounds it."""
    lines = [line for _, block in blocks(page, "bash", attribute) for line in block.replace("\\\n", " ").splitlines()]
    parts = [part.strip() for line in lines for part in re.split(r"&&|;|\||&", line.split(" #")[0])]
    return [part[match.start() :] for part in parts if (match := COMMAND.search(part))]


# --- Python ---------------------------------------------------------------------------------------------------------------


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore:.*TensorBoard:UserWarning")
@pytest.mark.parametrize("page", [page for page in PAGES if blocks(page, "python")], ids=lambda page: page.name)
def test_python_runs(page: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """In the order of the page, in one namespace, in an empty folder. The README's training is cut short."""
    monkeypatch.chdir(tmp_path)
    module = type(sys)("page")  # importable, as a saved policy names its class
    monkeypatch.setitem(sys.modules, "page", module)
    with patch.dict(sb3_sdac.score_matching.SCORE_TARGETS), patch.dict(sb3_sdac.score_matching.PROPOSALS):
        for line, block in blocks(page, "python"):
            code = block.replace("7_000, progress_bar=True", "600") if page.name == "README.md" else block
            exec(compile("\n" * line + code, str(page), "exec"), vars(module))  # a traceback shows the page's line


def test_what_does_not_run_is_counted() -> None:
    found: dict[str, list[str]] = {}
    for page in PAGES:
        for match in BLOCK.finditer(page.read_text(encoding="utf-8")):
            if match[1] == "python" and match[2]:
                found.setdefault(page.name, []).append(match[2])
    assert found == NOT_RUN


def test_the_readme_shows_the_example() -> None:
    """All of it, but for its docstring; its expected return is said in a comment."""
    first, *_ = [block for _, block in blocks(ROOT / "README.md", "python")]
    code = (ROOT / "examples" / "pendulum.py").read_text(encoding="utf-8").split('"""')[2].strip()
    assert re.sub(" +# about.*", "", first).strip() == code


def test_the_notebook_is_the_page() -> None:
    """So its cells run, as the page's blocks do."""
    script: Any = runpy.run_path(str(ROOT / "docs" / "notebook.py"))
    made = script["notebook"](script["PAGE"].read_text(encoding="utf-8"))
    assert json.loads(script["NOTEBOOK"].read_text(encoding="utf-8")) == made, "python docs/notebook.py makes it anew"
    code = ["".join(cell["source"]) for cell in made["cells"] if cell["cell_type"] == "code"]
    assert code == [block.strip() for _, block in blocks(script["PAGE"], "python")]


# --- Commands -------------------------------------------------------------------------------------------------------------


class Parsed(BaseException):
    """Raised where a command has parsed its arguments and would begin."""


def parse(command: str, folder: Path) -> None:
    """
    What the shell would run, until its arguments are parsed; in this process, which has loaded torch.

    :param command: from ``python`` on
    :param folder: that the scripts are in
    :raises SystemExit: if its own parser refuses them
    """
    _, *words = shlex.split(command)
    parse_args = argparse.ArgumentParser.parse_args

    def parse_and_stop(self: argparse.ArgumentParser, *args: Any, **kwargs: Any) -> None:
        parse_args(self, *args, **kwargs)
        raise Parsed

    if words[:2] == ["-m", "sb3_sdac.zoo"]:
        words = ["-m", zoo.COMMANDS[words[2]], *words[3:]]
    with patch.object(argparse.ArgumentParser, "parse_args", parse_and_stop), warnings.catch_warnings():
        warnings.simplefilter("ignore")
        try:
            if words[0] == "-m":
                with patch.object(sys, "argv", words[1:]):
                    runpy.run_module(words[1], run_name="__main__", alter_sys=True)
            elif "ArgumentParser" in (folder / words[0]).read_text(encoding="utf-8"):
                with patch.object(sys, "argv", words):
                    runpy.run_path(str(folder / words[0]), run_name="__main__")
        except Parsed:
            return
        assert words[0] != "-m", f"{command} parses no arguments"


@pytest.mark.slow
@pytest.mark.parametrize("page", [page for page in PAGES if commands(page)], ids=lambda page: page.name)
def test_commands_are_understood(page: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """By the parser of the command itself, with every option, choice and protocol that the page gives it."""
    zoo.register()  # what the start-up hook of an installed package does
    for command in commands(page):
        try:
            parse(command, ROOT)
        except SystemExit:
            pytest.fail(f"{command}\n{capsys.readouterr().err}")
        files = [word for word in shlex.split(command) if re.match("(benchmarks|examples)/", word)]
        assert [file for file in files if not (ROOT / file).is_file()] == [], command


@pytest.mark.slow
def test_quick_commands_run(tmp_path: Path) -> None:
    """One after the other in one folder: pages go on with the run of the page on training."""
    names = ["train", "evaluate", "resume", "sweep", "tune"]
    pages = [ROOT / "docs" / f"{name}.md" for name in names]
    assert [page for page in PAGES if commands(page, "quick") and page not in pages] == []
    environment = {**os.environ, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1", "MPLBACKEND": "Agg"}
    for page in pages:
        for _, block in blocks(page, "yaml"):
            (tmp_path / block.split()[1]).write_text(block, encoding="utf-8")  # it begins with "# name.yml"
        assert commands(page, "quick"), page.name
        for command in commands(page, "quick"):
            _, *words = shlex.split(command)
            if words[0] == "-m":  # as there may be no start-up hook
                words = ["-m", "sb3_sdac.zoo", words[1].split(".")[-1], *words[2:]]
            else:
                words[0] = str(ROOT / words[0])
            done = subprocess.run([sys.executable, *words], cwd=tmp_path, env=environment, capture_output=True, text=True)
            assert done.returncode == 0, f"{command}\n{done.stdout[-2000:]}{done.stderr[-2000:]}"
    for name in ("best_model.zip", "evaluations.npz", "checkpoint.zip", "0.monitor.csv", "Pendulum-v1/config.yml"):
        assert (tmp_path / "logs/sdac/Pendulum-v1_1" / name).is_file()
    assert (tmp_path / "my_results" / "quick.md").is_file()


def test_ci_finds_the_test_command() -> None:
    """``.ci/run`` greps the README for it."""
    text = (ROOT / "README.md").read_text(encoding="utf-8")
    assert re.search(r"^pip install .*\[tests\].* && python -m pytest$", text, re.MULTILINE)


# --- Links and form -------------------------------------------------------------------------------------------------------


def anchors(page: Path) -> set[str]:
    """Of the headings, as GitHub makes them."""
    text = BLOCK.sub("", page.read_text(encoding="utf-8"))
    return {
        re.sub(r"[^\w -]", "", heading.lower()).replace(" ", "-") for heading in re.findall("^#+ (.+)$", text, re.MULTILINE)
    }


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_links_lead_somewhere(page: Path) -> None:
    for link in LINK.findall(BLOCK.sub("", page.read_text(encoding="utf-8"))):
        path, _, anchor = link.partition("#")
        target = page.parent / path if path else page
        assert target.exists(), link
        assert not anchor or anchor in anchors(target), link


def test_the_readme_is_short() -> None:
    assert len((ROOT / "README.md").read_text(encoding="utf-8").split()) <= 900


@pytest.mark.parametrize("page", [page for page in PAGES if page.name not in UNWRAPPED], ids=lambda page: page.name)
def test_prose_is_wrapped(page: Path) -> None:
    """Tables, code and what the benchmarks make are as wide as they are."""
    text = BLOCK.sub("", page.read_text(encoding="utf-8"))
    assert [line for line in text.splitlines() if len(line) > 120 and not line.startswith(("|", "`python", "!["))] == []


# --- Nothing is left out --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("documented", [SDAC, DPMD, DiffusionPolicy], ids=lambda cls: cls.__name__)
def test_every_argument_is_documented(documented: type) -> None:
    arguments = set(inspect.signature(documented).parameters)
    assert arguments - set(re.findall(r":param (\w+):", documented.__doc__ or "")) == set()


def test_every_logged_value_is_explained() -> None:
    """And nothing is explained that nobody logs."""
    page = (ROOT / "docs" / "sdac.md").read_text(encoding="utf-8")
    explained = {key.removeprefix("train/") for key in re.findall(r"^\| `(train/\w+)`", page, re.MULTILINE)}
    seen = set()
    for algorithm, kwargs in ((SDAC, {}), (SDAC, {"reward_scale": 0.2}), (DPMD, {"policy_kwargs": {"n_bins": 1}})):
        model = make_model(algorithm=algorithm, policy_delay=1, **kwargs)
        model.learn(12, log_interval=1000)
        seen |= set(logged(model))
    assert seen == explained


def test_every_module_has_its_place() -> None:
    """In the table of rooms; what the table names besides may be on its way."""
    page = (ROOT / "docs" / "architecture.md").read_text(encoding="utf-8")
    rooms = set(re.findall(r"^\| `(\w+)\.py` \|", page, re.MULTILINE))
    modules = {path.stem for path in Path(sb3_sdac.__file__).parent.glob("*.py")} - {"__init__"}
    assert modules - rooms == set()


@pytest.mark.parametrize("argument", sorted(SDAC._constructor_arguments() | SDAC._policy_arguments()))
def test_coming_from_sac_names_every_argument(argument: str) -> None:
    page = (ROOT / "docs" / "coming_from_sac.md").read_text(encoding="utf-8")
    assert argument in ("policy", "env") or f"`{argument}`" in page


@pytest.mark.skipif(importlib.util.find_spec("sphinx") is None, reason="needs the extra docs")
def test_settings_of_the_site() -> None:
    """The site itself is built by ``make docs``."""
    settings = runpy.run_path(str(ROOT / "docs" / "conf.py"))
    lines = ["mean - pessimism |Q_1 - Q_2| / 2 of shape (B, *action_shape)", "*one* and ``a|b``"]
    settings["_escape"](None, "method", "name", None, None, lines)
    assert lines == [r"mean - pessimism \|Q_1 - Q_2\| / 2 of shape (B, \*action_shape)", "*one* and ``a|b``"]
    source = ["[rows](../benchmarks/results), [example](../examples/toy_2d.py), [guide](../CONTRIBUTING.md#form), [a](b.md)"]
    settings["_link_outside"](None, "page", source)
    assert source == ["rows, [example](../examples/toy_2d.py), guide, [a](b.md)"]
