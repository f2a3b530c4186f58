"""The documentation tells the truth: its Python runs, its links lead somewhere, its commands and options exist."""

import contextlib
import functools
import io
import re
import runpy
import shlex
import subprocess
import sys
import warnings
from pathlib import Path

import pytest

from sb3_sdac import zoo

ROOT = Path(__file__).parents[1]
DOCS = sorted((ROOT / "docs").glob("*.md"))
PAGES = [ROOT / "README.md", *DOCS, *sorted((ROOT / "benchmarks").glob("*.md"))]
#: A block that cannot run here has ``<!-- not run: reason -->`` on the line before
BLOCK = re.compile(r"^(<!-- not run: \S.*-->\n)?```(\w+)\n(.*?)^```$", re.MULTILINE | re.DOTALL)
LINK = re.compile(r"\]\((?![a-z]+:)([^)\s]+)")
#: What to run of a line, ours or rl_zoo3's
COMMAND = re.compile(r"python (-m (?:rl_zoo3|sb3_sdac)\.\S+|(?:benchmarks|examples)/\S+\.py)")


def blocks(page: Path, language: str) -> list[tuple[int, str]]:
    """First line and text of each block of a language that is to be run."""
    text = page.read_text(encoding="utf-8")
    found = [match for match in BLOCK.finditer(text) if match[2] == language and match[1] is None]
    return [(text.count("\n", 0, match.start(3)), match[3]) for match in found]


def commands(page: Path) -> list[str]:
    """Every command of ours or of rl_zoo3 in the bash blocks of a page, without what surrounds it."""
    lines = [line for _, block in blocks(page, "bash") for line in block.replace("\\\n", " ").splitlines()]
    parts = [part.strip() for line in lines for part in re.split(r"&&|;|\||&", line.split(" #")[0])]
    return [part[match.start() :] for part in parts if (match := COMMAND.search(part))]


@functools.cache
def help_of(*command: str) -> str:
    """What a module (``-m``, name, subcommand) or a script prints with ``--help``; in this process, which has loaded torch."""
    printed, argv, call = io.StringIO(), sys.argv, subprocess.call
    with contextlib.redirect_stdout(printed), contextlib.redirect_stderr(printed), warnings.catch_warnings():
        warnings.simplefilter("ignore")
        try:
            if command[0] == "-m":
                zoo.register()  # what the start-up hook of an installed package does
                sys.argv = ["", *command[2:], "--help"]
                runpy.run_module(command[1], run_name="__main__", alter_sys=True)
            else:
                sys.argv = [command[0], "--help"]
                runpy.run_path(str(ROOT / command[0]), run_name="__main__")
        except SystemExit as exit_status:
            assert not exit_status.code, f"{command}: {printed.getvalue()}"
        finally:
            sys.argv, subprocess.call = argv, call
    return printed.getvalue()


@pytest.mark.slow
@pytest.mark.parametrize("page", [page for page in DOCS if blocks(page, "python")], ids=lambda page: page.name)
def test_python_runs(page: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """In the order of the page, in one namespace, in an empty folder."""
    monkeypatch.chdir(tmp_path)
    namespace = {"__name__": "__main__"}
    for line, block in blocks(page, "python"):
        exec(compile("\n" * line + block, str(page), "exec"), namespace)  # a traceback shows the page's line


def test_the_readme_shows_the_example() -> None:
    """All of it, but for its docstring; its expected return is said in a comment."""
    first, *_ = [block for _, block in blocks(ROOT / "README.md", "python")]
    code = (ROOT / "examples" / "pendulum.py").read_text(encoding="utf-8").split('"""')[2].strip()
    assert re.sub(" +# about.*", "", first).strip() == code


def anchors(page: Path) -> set[str]:
    """Of the headings, as GitHub makes them."""
    headings = re.findall("^#+ (.+)$", page.read_text(encoding="utf-8"), re.MULTILINE)
    return {re.sub(r"[^\w -]", "", heading.lower()).replace(" ", "-") for heading in headings}


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_links_lead_somewhere(page: Path) -> None:
    for link in LINK.findall(page.read_text(encoding="utf-8")):
        path, _, anchor = link.partition("#")
        target = page.parent / path if path else page
        assert target.exists(), link
        assert not anchor or anchor in anchors(target), link


@pytest.mark.slow
@pytest.mark.parametrize("page", [page for page in PAGES if commands(page)], ids=lambda page: page.name)
def test_commands_and_options_exist(page: Path) -> None:
    for command in commands(page):
        _, *words = shlex.split(command)
        module = words[: 3 if words[1] == "sb3_sdac.zoo" else 2] if words[0] == "-m" else words[:1]
        options = [word.split("=")[0] for word in words[len(module) :] if re.match("--?[a-zA-Z]", word)]
        known = set(re.findall(r"(?<![\w-])--?[a-zA-Z][\w-]*", help_of(*module))) if options else set()
        assert [option for option in options if option not in known] == [], command
        scripts = [word for word in words if re.match("(benchmarks|examples)/", word)]
        assert [script for script in scripts if not (ROOT / script).is_file()] == [], command
