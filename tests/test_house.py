"""The house: which module may import which, how long a function and a class may become."""

import ast
import inspect
import sys
from pathlib import Path

import pytest

import sb3_sdac
from sb3_sdac import DPMD, SDAC

PACKAGE = Path(sb3_sdac.__file__).parent
MODULES = {path.stem: path for path in sorted(PACKAGE.glob("*.py"))}
#: What each module may import of the package: those on a line before its own
LAYERS = [
    {
        *("diffusion", "arguments", "files", "spaces", "options", "presets"),
        *("layers", "value_bins", "metrics", "rewards"),
    },
    {"score_matching", "networks", "temperature", "buffers", "compilation"},
    {"policies"},
    {"update", "off_policy"},
    {"sdac"},
    {"dpmd"},
    {"checkpoint", "export", "official", "plotting"},
    {"__init__"},
    {"zoo"},
]
#: Lines of a function without its docstring, of the class SDAC, and of update.py
MAX_FUNCTION, MAX_CLASS, MAX_UPDATE = 60, 450, 300
#: Constructor arguments, see design.md
MAX_ARGUMENTS = 40


def level(module: str) -> int:
    (found,) = (i for i, layer in enumerate(LAYERS) if module in layer)
    return found


def imported_modules(path: Path) -> set[str]:
    """The full names in the import statements of a file, wherever they stand."""
    names = set()
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Import):
            names |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0 and node.module is not None, f"relative import in {path}"
            # `from sb3_sdac import zoo` imports sb3_sdac.zoo
            names |= {f"{node.module}.{alias.name}" if node.module == "sb3_sdac" else node.module for alias in node.names}
    return names


def own_imports(module: str) -> set[str]:
    """Modules of the package that one imports; a name of the package's front door counts as that."""
    names = {name.partition("sb3_sdac.")[2].split(".")[0] for name in imported_modules(MODULES[module]) if "sb3_sdac" in name}
    return {name if name in MODULES else "__init__" for name in names}


def length_without_docstring(node: ast.FunctionDef | ast.AsyncFunctionDef) -> int:
    """From the first line after the signature to the last."""
    body = node.body[1:] if ast.get_docstring(node) is not None else node.body
    return 0 if not body else (body[-1].end_lineno or 0) - body[0].lineno + 1


@pytest.mark.parametrize("module", MODULES)
def test_imports_point_one_way(module: str) -> None:
    own = own_imports(module)
    if module == "zoo":  # `python -m sb3_sdac.zoo` imports itself by its full name
        own -= {"zoo"}
    wrong = {name for name in own if level(name) >= level(module)}
    assert not wrong, f"{module} may import what stands before it in LAYERS, but imports {wrong}"


@pytest.mark.parametrize("module", ["diffusion", "score_matching"])
def test_maths_imports_torch_and_standard_library_only(module: str) -> None:
    packages = {name.split(".")[0] for name in imported_modules(MODULES[module])}
    assert packages <= {"torch", "sb3_sdac"} | sys.stdlib_module_names
    assert own_imports(module) <= {"diffusion"}


@pytest.mark.parametrize("module", ["update", "temperature"])
def test_the_algorithm_knows_no_environment_logger_or_file(module: str) -> None:
    names = imported_modules(MODULES[module])
    allowed = {"stable_baselines3.common.type_aliases", "stable_baselines3.common.utils"}
    assert {name for name in names if name.startswith("stable_baselines3")} <= allowed
    assert not {name.split(".")[0] for name in names} & {"gymnasium", "zipfile", "json", "pathlib", "io", "logging"}


def test_every_module_has_a_layer() -> None:
    """One, and each of them is there."""
    listed = [module for layer in LAYERS for module in layer]
    assert len(listed) == len(set(listed))
    assert set(MODULES) == set(listed)


@pytest.mark.parametrize("module", MODULES)
def test_functions_are_short(module: str) -> None:
    """The constructors' lists of arguments stand before the body, so only what they do counts."""
    functions = [
        node
        for node in ast.walk(ast.parse(MODULES[module].read_text(encoding="utf-8")))
        if isinstance(node, (ast.FunctionDef, ast.AsyncFunctionDef))
    ]
    lengths = {f"{node.name}, line {node.lineno}": length_without_docstring(node) for node in functions}
    assert {name: length for name, length in lengths.items() if length > MAX_FUNCTION} == {}


def test_sizes() -> None:
    lines, _ = inspect.getsourcelines(SDAC)
    assert len(lines) <= MAX_CLASS
    assert len(MODULES["update"].read_text(encoding="utf-8").splitlines()) <= MAX_UPDATE
    for algorithm in (SDAC, DPMD):
        assert len(algorithm._constructor_arguments()) <= MAX_ARGUMENTS


def test_nobody_keeps_a_second_copy() -> None:
    """Each argument has one owner: the algorithm or the policy."""
    assert not SDAC._constructor_arguments() & SDAC._policy_arguments()
    assert not DPMD._constructor_arguments() & DPMD._policy_arguments()
