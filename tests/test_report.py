"""benchmarks/report.py and speed.py: tables and pictures are made from rows, whatever code and defaults made those."""

import importlib
import re
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import yaml

ROOT = Path(__file__).parents[1]
COLUMNS = "configuration,config,commit,env,seed,env_steps,updates,wall_time,returns\n"
PROTOCOL: dict[str, Any] = {
    "envs": ["A-v1", "B-v1"],
    "n_timesteps": "3e3",  # as YAML has it
    "eval_episodes": 2,
    "score_evaluations": 1,
    "configurations": {"SDAC": {}, "other": {}, "none": {}},
}
FINISHED = {("SDAC", "A-v1", 0): 100, ("SDAC", "A-v1", 1): 300, ("SDAC", "B-v1", 0): 50, ("other", "A-v1", 1): 150}


def row(configuration: str, env: str, seed: int, value: float, config: str = "0123456789", steps: int = 3000) -> str:
    return f"{configuration},{config},abc1234,{env},{seed},{steps},1500,60,{value - 1} {value + 1}\n"


def report(folder: Path, *args: str, rows: str | None = None, **changes: Any) -> subprocess.CompletedProcess[str]:
    path, results = folder / "tiny.yml", folder / "results"
    path.write_text(yaml.safe_dump({**PROTOCOL, **changes}, sort_keys=False))
    results.mkdir(exist_ok=True)
    if rows is not None:
        (results / "tiny.csv").write_text(COLUMNS + rows)
    command = [sys.executable, str(ROOT / "benchmarks" / "report.py"), str(path), "--results", str(results), *args]
    return subprocess.run(command, capture_output=True, text=True, timeout=300, check=False)


@pytest.mark.slow
def test_report_of_an_ablation_goes_into_a_page(tmp_path: Path) -> None:
    """One line per configuration with the ratio of the means to the reference's, here worked out by hand."""
    rows = "".join(row(*run, value) for run, value in {**FINISHED, ("other", "B-v1", 0): 100}.items())
    page = tmp_path / "page.md"
    page.write_text("before\n<!-- tiny -->\nold\n<!-- /tiny -->\nafter\n")
    pages = []
    for _ in range(2):  # the second finds what the first has written
        process = report(tmp_path, "--into", str(page), rows=rows, reference="SDAC")
        assert process.returncode == 0, process.stderr
        pages.append(page.read_text())
    assert pages[0] == pages[1] == f"before\n<!-- tiny -->\n{process.stdout.removesuffix(chr(10))}<!-- /tiny -->\nafter\n"
    said = " ".join(pages[0].split())
    assert "after 3,000 environment steps and 1,500 gradient updates" in said
    assert "Rows: `tiny.csv`, of commit abc1234" in said
    assert "| SDAC | 200 (100, 300) | 50 (50) | 1.00 |\n| other | 150 (150) | 100 (100) | 1.38 |\n" in pages[0]
    assert not list(tmp_path.rglob("*.png"))

    page.write_text("no place for it")
    process = report(tmp_path, "--into", str(page), reference="SDAC")
    assert process.returncode == 1 and "needs the lines '<!-- tiny -->'" in process.stderr
    assert page.read_text() == "no place for it"


@pytest.mark.slow
def test_report_of_a_comparison(tmp_path: Path) -> None:
    """Beside the rows: its table and picture; in a page: its picture beside the page, under the protocol's name for it."""
    rows = "".join(row(*run, value) for run, value in FINISHED.items())
    process = report(tmp_path, rows=rows)
    assert process.returncode == 0, process.stderr
    text = (tmp_path / "results" / "tiny.md").read_text()
    assert "| A-v1 | SDAC | 200 | 100, 300 |" in text and "No interquartile mean" in text
    assert (tmp_path / "results" / "tiny.png").stat().st_size > 10_000
    page = tmp_path / "page.md"
    page.write_text("<!-- tiny -->\n<!-- /tiny -->\n<!-- results -->\n<!-- /results -->\n")
    peers = "algorithm,updates_per_step,env,env_steps,seeds,mean,std,min,max\nX,2,A-v0,3000,5,400,10,380,420\n"
    (tmp_path / "results" / "peers.csv").write_text(peers)
    process = report(tmp_path, "--into", str(page), "--time", picture="hero.png", peers="peers.csv")
    assert process.returncode == 0, process.stderr
    assert {path.name for path in (tmp_path / "images").iterdir()} == {"hero.png", "hero_time.png"}
    assert "| X | 2 | 5 | 400 ± 10 |" in page.read_text()
    assert report(tmp_path, "--summary", str(page)).returncode == 0
    small = "|  | SDAC | other |\n| --- | --- | --- |\n| A-v1 | 200 | 150 |\n| B-v1 | 50 |  |\n<!-- /results -->"
    assert small in page.read_text()


@pytest.mark.slow
def test_unfinished_runs(tmp_path: Path) -> None:
    """Are in a picture if asked for, and in no table."""
    assert report(tmp_path).returncode == 1
    work = tmp_path / "work" / "tiny" / "SDAC_A-v1_0"
    work.mkdir(parents=True)
    (work / "rows.csv").write_text(COLUMNS + row("SDAC", "A-v1", 0, 100, steps=1500))
    assert report(tmp_path, "--work", str(tmp_path / "work")).returncode == 0
    assert "| SDAC |" not in (tmp_path / "results" / "tiny.md").read_text()


@pytest.mark.slow
def test_seeds_of_different_hyperparameters_are_refused(tmp_path: Path) -> None:
    rows = row("SAC", "A-v1", 0, 1, config="a" * 10) + row("SAC", "A-v1", 1, 1, config="b" * 10)
    process = report(tmp_path, rows=rows)
    assert process.returncode == 1 and "seeds of SAC on A-v1 come from different hyperparameters" in process.stderr


@pytest.fixture
def module(monkeypatch: pytest.MonkeyPatch) -> Any:
    monkeypatch.syspath_prepend(ROOT / "benchmarks")
    return importlib.import_module("report")


def curves(module: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, records: list[dict], **kwargs: Any) -> Any:
    drawn: list[Any] = []
    monkeypatch.setattr(module.plt, "close", drawn.append)
    module.plot(module.pd.DataFrame(records), ["SAC"], tmp_path / "curves.png", **kwargs)
    return drawn[0]


def test_curves_of_seeds_that_were_interrupted(module: Any, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """Their evaluations may be some steps apart, and still make one curve; y starts at 0."""
    steps = {0: [20, 40, 60, 80], 1: [20, 43, 63, 83]}
    records = [
        {"configuration": "SAC", "env": "A-v1", "seed": seed, "env_steps": at, "wall_time": at, "return": at}
        for seed in steps
        for at in steps[seed]
    ]
    figure = curves(module, tmp_path, monkeypatch, records)
    (line,) = figure.axes[0].lines
    np.testing.assert_allclose(line.get_xydata(), [[x / 1000, x] for x in (20, 41.5, 61.5, 81.5)])
    assert figure.axes[0].get_title() == "A-v1 (2 seeds)" and figure.axes[0].get_ylim()[0] == 0


def test_returns_below_zero_are_shown(module: Any, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    own = {"configuration": "SAC", "env": "A-v1", "seed": 0, "wall_time": 1}
    records = [{**own, "env_steps": at, "return": -at} for at in (20, 40)]
    axes = curves(module, tmp_path, monkeypatch, records).axes[0]
    assert axes.get_title() == "A-v1 (1 seed)" and axes.get_ylim()[0] < -40


@pytest.mark.parametrize("protocol", ["short", "long", "ablation", "invariance"])
def test_committed_rows_are_of_the_protocol(module: Any, protocol: str) -> None:
    """Not of today's code or defaults: no training has to be done again because one of them changed."""
    folder = ROOT / "benchmarks"
    if not (folder / "results").exists():
        pytest.skip("the rows are in the repository alone")
    described, rows, table = module.read_protocol(folder / f"{protocol}.yml", folder / "results", None)
    assert set(rows["env"]) <= set(described["envs"]) and set(rows["configuration"]) <= set(described["configurations"])
    assert not rows.duplicated(["configuration", "env", "seed", "env_steps"]).any() and (rows["commit"].str.len() > 6).all()
    assert len(table) == len(rows.groupby(["configuration", "env", "seed"]))  # all are finished


@pytest.mark.slow
def test_the_pages_can_be_renewed(tmp_path: Path) -> None:
    """By the commands that they show, which find their places in the pages."""
    if not (ROOT / "benchmarks" / "results").exists():
        pytest.skip("the rows are in the repository alone")
    for page in ("results.md", "speed.md"):
        copy = Path(shutil.copy(ROOT / "docs" / page, tmp_path))
        (command,) = re.findall(rf"^(python .*--into) docs/{page}", copy.read_text(), re.MULTILINE)
        copy.write_text(re.sub(r"^\|.*\n", "", copy.read_text(), flags=re.MULTILINE))
        script, *args = command.split()[1:]
        process = subprocess.run(
            [sys.executable, script, *args, str(copy)], cwd=ROOT, capture_output=True, text=True, check=False
        )
        assert process.returncode == 0, process.stderr
        assert copy.read_text().count("\n|") > 20
