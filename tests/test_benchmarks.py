"""The training harness: runs of a protocol, interruption and resumption, results and report."""

import csv
import importlib
import itertools
import os
import re
import shutil
import signal
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import yaml

ROOT = Path(__file__).parents[1]
PROTOCOL = {
    "envs": ["Pendulum-v1"],
    "seeds": [0],
    "n_timesteps": 3000,
    "eval_freq": 1500,
    "eval_episodes": 2,
    "score_evaluations": 2,
    "common": {"policy": "MlpPolicy", "n_envs": 2, "learning_starts": 50, "batch_size": 16},
    "configurations": {
        "SDAC": {"algo": "sdac", "policy_kwargs": "dict(net_arch=[8])", "normalize": True},
        "SAC": {"algo": "sac", "policy_kwargs": "dict(net_arch=[8])"},
    },
}

pytestmark = pytest.mark.slow


def run(script: str, folder: Path, *args: str, protocol: dict | None = None) -> subprocess.CompletedProcess[str]:
    path = folder / "tiny.yml"
    path.write_text(yaml.safe_dump(protocol or PROTOCOL, sort_keys=False))
    command = [sys.executable, str(ROOT / "benchmarks" / script), str(path), "--results", str(folder / "results"), *args]
    return subprocess.run(command, capture_output=True, text=True, timeout=300, check=False)


def train(folder: Path, *args: str, protocol: dict | None = None) -> subprocess.CompletedProcess[str]:
    return run("run.py", folder, "--work", str(folder / "work"), *args, protocol=protocol)


def rows(folder: Path, configuration: str) -> list[dict[str, str]]:
    with (folder / "results" / "tiny" / f"{configuration}_Pendulum-v1_0.csv").open(newline="") as file:
        return list(csv.DictReader(file))


def test_runs_resume_and_are_reported(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Stopped by its time budget and called again, a run goes on from its checkpoint; what is finished is left alone."""
    monkeypatch.setenv("OMP_NUM_THREADS", "1")  # which it sets itself
    monkeypatch.syspath_prepend(ROOT / "benchmarks")
    harness = importlib.import_module("run")
    # A clock that goes by its readings, two per step of the environments: time is over after the first evaluation, anywhere
    monkeypatch.setattr(harness, "time", SimpleNamespace(time=itertools.count().__next__))
    path = tmp_path / "tiny.yml"
    path.write_text(yaml.safe_dump(PROTOCOL, sort_keys=False))
    interrupted, _ = harness.read_protocol(path, tmp_path / "results", tmp_path / "work")
    outcome = harness.train(interrupted, 2000, 500, "cpu")
    assert re.fullmatch("stopped at [0-9]+ of 3000 steps, to be continued", outcome)
    first = rows(tmp_path, "SDAC")
    assert [int(row["env_steps"]) for row in first] == [1500]
    assert not interrupted.is_finished() and (interrupted.checkpoint / "checkpoint.zip").exists()
    monkeypatch.undo()
    process = train(tmp_path, "--minutes", "0")
    assert process.returncode == 0 and process.stdout.count("not begun") == 2, process.stderr

    process = train(tmp_path, "--jobs", "2")
    assert process.returncode == 0, process.stderr
    assert "0 of 2 runs are finished" in process.stdout and "2 of 2 finished, 0 failed" in process.stdout
    assert rows(tmp_path, "SDAC")[0] == first[0] and not list((tmp_path / "work" / "tiny").iterdir())
    assert "2 of 2 runs are finished" in train(tmp_path).stdout
    for configuration in ("SDAC", "SAC"):
        table = rows(tmp_path, configuration)
        assert [int(row["env_steps"]) for row in table] == [1500, 3000]
        assert [row["env"] for row in table] == ["Pendulum-v1"] * 2
        assert all(len(row["returns"].split()) == 2 for row in table)
        assert int(table[-1]["updates"]) >= 1400 and len({row["config"] for row in table}) == 1

    # A stop costs no update: as many as the run that went through has
    assert len({rows(tmp_path, configuration)[-1]["updates"] for configuration in ("SDAC", "SAC")}) == 1

    process = run("report.py", tmp_path)
    assert process.returncode == 0, process.stderr
    score = sum(float(value) for row in rows(tmp_path, "SDAC")[-2:] for value in row["returns"].split()) / 4
    assert f"| Pendulum-v1 | SDAC | {score:.0f} | {score:.0f} |" in (tmp_path / "results" / "tiny.md").read_text()
    assert (tmp_path / "results" / "tiny.png").stat().st_size > 10_000

    # A default given by name is the same configuration, and so is what changes the time alone
    configurations = PROTOCOL["configurations"]
    named = {"SDAC": {**configurations["SDAC"], "tau": 0.005, "compile": True}}  # type: ignore[index]
    path.write_text(yaml.safe_dump({**PROTOCOL, "configurations": named}, sort_keys=False))
    finished, *_ = harness.read_protocol(path, tmp_path / "results", tmp_path / "work")
    assert len(finished.read_rows()) == 2
    assert harness.attempt(finished, None) == (finished, "finished", False)  # nothing is trained when it failed after its end

    # Other hyperparameters under the same name are refused, and what is there stays
    changed = {**PROTOCOL, "common": {**PROTOCOL["common"], "batch_size": 17}}  # type: ignore[dict-item]
    process = train(tmp_path, protocol=changed)
    assert process.returncode != 0 and "other hyperparameters" in process.stderr
    assert len(rows(tmp_path, "SDAC")) == 2


def test_report_of_an_ablation_goes_into_a_page(tmp_path: Path) -> None:
    """One line per configuration with the ratio of the means to the reference's, here worked out by hand."""
    configurations: dict[str, dict] = {"SDAC": {}, "other": {}, "none": {}}
    protocol = {**PROTOCOL, "reference": "SDAC", "score_evaluations": 1, "configurations": configurations}
    protocol["n_timesteps"] = "3e3"  # as YAML has it
    finished = {("SDAC", "A-v1", 0): 100, ("SDAC", "A-v1", 1): 300, ("SDAC", "B-v1", 0): 50, ("other", "A-v1", 1): 150}
    folder = tmp_path / "results" / "tiny"
    folder.mkdir(parents=True)
    for (configuration, env, seed), value in {**finished, ("other", "B-v1", 0): 100}.items():
        row = f"{configuration},0123456789,{env},{seed},3000,1500,60,{value - 1} {value + 1}\n"
        (folder / f"{configuration}_{env}_{seed}.csv").write_text(
            "configuration,config,env,seed,env_steps,updates,wall_time,returns\n" + row
        )
    page = tmp_path / "page.md"
    page.write_text("before\n<!-- tiny.md -->\nold\n<!-- end of tiny.md -->\nafter\n")
    for _ in range(2):  # the second finds what the first has written
        process = run("report.py", tmp_path, "--into", str(page), protocol=protocol)
        assert process.returncode == 0, process.stderr
    written = (tmp_path / "results" / "tiny.md").read_text()
    assert "after 3,000 environment steps" in written
    assert "| SDAC | 200 (100, 300) | 50 (50) | 1.00 |\n| other | 150 (150) | 100 (100) | 1.38 |\n" in written
    assert page.read_text() == f"before\n<!-- tiny.md -->\n{written}<!-- end of tiny.md -->\nafter\n"

    page.write_text("no place for it")
    process = run("report.py", tmp_path, "--into", str(page), protocol=protocol)
    assert process.returncode == 1 and "needs the lines '<!-- tiny.md -->'" in process.stderr
    assert page.read_text() == "no place for it"


@pytest.mark.parametrize(
    ("protocols", "source"),
    [(["short", "long"], "README.md"), (["ablation", "invariance"], "benchmarks/README.md")],
    ids=["README.md", "benchmarks/README.md"],
)
def test_the_pages_show_what_is_in_the_result_files(tmp_path: Path, protocols: list[str], source: str) -> None:
    """Each has one command for all of them, which changes nothing when run on copies."""
    results = tmp_path / "results"
    for protocol in protocols:
        shutil.copytree(ROOT / "benchmarks" / "results" / protocol, results / protocol)
    page = Path(shutil.copy(ROOT / source, tmp_path))
    paths = " ".join(f"benchmarks/{protocol}.yml" for protocol in protocols)
    command = f"python benchmarks/report.py {paths} --into {source}"
    assert f"`{command}`" in page.read_text()
    script, *args = command.removesuffix(source).split()[1:]
    process = subprocess.run(
        [sys.executable, script, *args, str(page), "--results", str(results)],
        cwd=ROOT,
        capture_output=True,
        text=True,
        check=False,
    )
    assert process.returncode == 0, process.stderr
    assert page.read_text() == (ROOT / source).read_text()
    for protocol in protocols:
        assert (results / f"{protocol}.md").read_text() == (ROOT / "benchmarks" / "results" / f"{protocol}.md").read_text()


@pytest.mark.parametrize("protocol", ["short", "long", "ablation", "invariance"])
def test_committed_rows_are_of_the_protocols(protocol: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """And of today's default, or the command that made them would be refused; trials keep the others."""
    monkeypatch.syspath_prepend(ROOT / "benchmarks")
    path = ROOT / "benchmarks" / f"{protocol}.yml"
    runs = importlib.import_module("run").read_protocol(path, path.parent / "results", path.parent / "work")
    committed = {row for row in (path.parent / "results" / protocol).glob("*.csv")}
    assert {run.results for run in runs if run.read_rows()} == committed


def read(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, **changes: Any) -> tuple[Any, list[Any]]:
    """The harness as a module, and the runs of a protocol."""
    monkeypatch.setenv("OMP_NUM_THREADS", "1")  # which it sets itself
    monkeypatch.syspath_prepend(ROOT / "benchmarks")
    harness = importlib.import_module("run")
    path = tmp_path / "tiny.yml"
    path.write_text(yaml.safe_dump({**PROTOCOL, **changes}, sort_keys=False))
    return harness, harness.read_protocol(path, tmp_path / "results", tmp_path / "work")


def test_a_checkpoint_of_other_hyperparameters_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Also where there are no rows yet that would say so."""
    harness, (interrupted, _) = read(tmp_path, monkeypatch)
    with monkeypatch.context() as patch:
        patch.setattr(harness, "time", SimpleNamespace(time=itertools.count().__next__))
        assert "to be continued" in harness.train(interrupted, 300, 1e9, "cpu")
    assert not interrupted.results.exists() and (interrupted.checkpoint / "checkpoint.zip").exists()
    for changes in ({"common": {**PROTOCOL["common"], "batch_size": 17}}, {"eval_episodes": 3}):  # type: ignore[dict-item]
        _, (changed, _) = read(tmp_path, monkeypatch, **changes)
        with pytest.raises(ValueError, match=r"checkpoint.zip holds a run of other hyperparameters or evaluations.*remove"):
            harness.train(changed, float("inf"), 1e9, "cpu")


def test_evaluations_have_env_kwargs_of_their_own(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Those of training where none are given, as on the zoo's command line; rewards times 0 are learned from."""
    no_rewards = {"forward_reward_weight": 0, "ctrl_cost_weight": 0, "max_episode_steps": 30}
    sdac = {**PROTOCOL["configurations"]["SDAC"], "env_kwargs": no_rewards}  # type: ignore[index]
    changes = {
        "envs": ["HalfCheetah-v5"],
        "configurations": {"the same": sdac, "others": {**sdac, "eval_env_kwargs": {"max_episode_steps": 30}}},
        "n_timesteps": 60,
        "eval_freq": 60,
    }
    harness, runs = read(tmp_path, monkeypatch, **changes)
    monkeypatch.setattr(harness.shutil, "rmtree", lambda *_, **__: None)  # keeps what the training environments returned
    for run, measured in zip(runs, (False, True), strict=True):
        assert harness.train(run, float("inf"), 1e9, "cpu") == "finished"
        monitors = list(run.checkpoint.rglob("*.monitor.csv"))
        learned = [float(row.split(",")[0]) for monitor in monitors for row in monitor.read_text().splitlines()[2:]]
        assert learned and not any(learned)
        returns = [float(value) for value in run.read_rows()[-1]["returns"].split()]
        assert all(returns) if measured else not any(returns)


def test_evaluations_do_not_pile_up(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A length that is no multiple of their interval has one at the end, and rows that got lost are not made up for."""
    harness, (own, _) = read(tmp_path, monkeypatch, n_timesteps=250, eval_freq=100, eval_episodes=1)
    with monkeypatch.context() as patch:
        patch.setattr(harness, "time", SimpleNamespace(time=itertools.count().__next__))
        assert "to be continued" in harness.train(own, 160, 1e9, "cpu")
    own.results.unlink()
    assert harness.train(own, float("inf"), 1e9, "cpu") == "finished"
    steps = [int(row["env_steps"]) for row in own.read_rows()]
    assert steps[-2:] == [200, 250] and len(steps) <= 3


def test_lengths_as_yaml_has_them(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """1e6 is a string to YAML, and with rl_zoo3's tag a float."""
    for length in ("3e3", 3e3):
        _, (own, _) = read(tmp_path, monkeypatch, n_timesteps=length)
        assert repr(own.n_timesteps) == repr(own.hyperparams["buffer_size"]) == "3000"


def test_the_reference_may_have_more_seeds(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    _, runs = read(tmp_path, monkeypatch, reference="SAC", reference_seeds=[0, 1])
    assert [(run.configuration, run.seed) for run in runs] == [("SDAC", 0), ("SAC", 0), ("SAC", 1)]


def test_names_of_files(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    configurations = {"A/B (x)": {"algo": "sac"}}
    _, runs = read(tmp_path, monkeypatch, configurations=configurations, envs=["dm_control/cheetah-run-v0"])
    assert [run.results.name for run in runs] == ["A-B-x_dm_control-cheetah-run-v0_0.csv"]
    with pytest.raises(SystemExit, match=r"A B x, Pendulum-v1, seed 0 and another run have the same file"):
        read(tmp_path, monkeypatch, configurations={**configurations, "A B x": {"algo": "sac"}})
    with pytest.raises(SystemExit, match="n_timesteps is the protocol's"):
        read(tmp_path, monkeypatch, common={"n_timesteps": 5})


def killed(sender: Any, run: Any, *args: Any) -> None:
    """In the place of a run that the system kills."""
    if run.configuration == "SDAC":
        os.kill(os.getpid(), signal.SIGKILL)
    sender.send((run, "finished", False))


def test_a_killed_run_leaves_the_others_alone(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    harness, runs = read(tmp_path, monkeypatch)
    monkeypatch.setattr(harness, "send_attempt", killed)
    ended = harness.on_this_machine(runs, 2, float("inf"))
    outcomes = {run.configuration: (outcome, failed) for run, outcome, failed in ended}
    assert outcomes["SAC"] == ("finished", False)
    assert outcomes["SDAC"] == ("FAILED\nits process ended with exit status -9", True)


def test_a_failure_that_there_is_no_time_to_try_again(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    harness, _ = read(tmp_path, monkeypatch)
    outcomes = iter([("FAILED", True), ("stopped", False), ("not begun", False)])
    monkeypatch.setattr(harness, "on_this_machine", lambda runs, *_: [(run, *next(outcomes)) for run in runs])
    monkeypatch.setattr(sys, "argv", ["run.py", str(tmp_path / "tiny.yml"), "--results", str(tmp_path / "results")])
    assert harness.main() == 1


def test_seeds_of_different_hyperparameters_are_refused(tmp_path: Path) -> None:
    folder = tmp_path / "results" / "tiny"
    folder.mkdir(parents=True)
    for seed, config in ((0, "aaaaaaaaaa"), (1, "bbbbbbbbbb")):
        rows = f"configuration,config,env,seed,env_steps,updates,wall_time,returns\nSAC,{config},A-v1,{seed},3000,1,60,1 2\n"
        (folder / f"SAC_A-v1_{seed}.csv").write_text(rows)
    process = run("report.py", tmp_path)
    assert process.returncode == 1 and "seeds of SAC on A-v1 come from different hyperparameters" in process.stderr


def test_curves_of_seeds_that_were_interrupted(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """Their evaluations may be some steps apart, and still make one curve."""
    monkeypatch.syspath_prepend(ROOT / "benchmarks")
    report = importlib.import_module("report")
    steps = {0: [20, 40, 60, 80], 1: [20, 43, 63, 83]}
    records = [
        {"configuration": "SAC", "env": "A-v1", "seed": seed, "env_steps": at, "wall_time": at, "return": at}
        for seed in steps
        for at in steps[seed]
    ]
    drawn: list[Any] = []
    monkeypatch.setattr(report.plt, "close", drawn.append)
    report.plot(report.pd.DataFrame(records), ["SAC"], tmp_path / "curves.png", against_time=False)
    (line,) = drawn[0].axes[0].lines
    np.testing.assert_allclose(line.get_xydata(), [[x / 1000, x] for x in (20, 41.5, 61.5, 81.5)])


def test_a_failed_run_is_reported_and_tried_again(tmp_path: Path) -> None:
    """The others go on; the exit status says that something failed."""
    configurations = {"SDAC": {"algo": "sdac", "tau": 7}, "SAC": PROTOCOL["configurations"]["SAC"]}  # type: ignore[index]
    broken = {**PROTOCOL, "n_timesteps": 200, "eval_freq": 100, "eval_episodes": 1, "configurations": configurations}
    process = train(tmp_path, "--jobs", "1", protocol=broken)
    assert process.returncode == 1
    assert process.stdout.count("tau must be a number between 0 and 1, got 7") == 2
    assert "SAC, Pendulum-v1, seed 0: finished" in process.stdout
    assert re.search("1 of 2 finished, 1 failed, about [0-9]+ min left", process.stdout)

    process = run("report.py", tmp_path, protocol=broken)
    assert process.returncode == 0, process.stderr
    assert "| Pendulum-v1 | SAC |" in process.stdout and "No interquartile mean" in process.stdout


def test_runs_on_ray(tmp_path: Path) -> None:
    """In a cluster of this machine: its processes import what they need, and an error comes back like any other."""
    configurations = {"SDAC": PROTOCOL["configurations"]["SDAC"], "SAC": {"algo": "sac", "tau": "x"}}  # type: ignore[index]
    protocol = {**PROTOCOL, "n_timesteps": 200, "eval_freq": 100, "configurations": configurations}
    process = train(tmp_path, "--ray", "local", "--jobs", "1", protocol=protocol)
    assert process.returncode == 1, process.stderr
    assert "SAC, Pendulum-v1, seed 0: FAILED" in process.stdout and "in attempt" in process.stdout
    assert "SDAC, Pendulum-v1, seed 0: finished\n1 of 2 finished" in process.stdout
    assert [int(row["env_steps"]) for row in rows(tmp_path, "SDAC")] == [100, 200]


@pytest.mark.parametrize("port", ["1", "x"])
def test_no_ray_cluster(tmp_path: Path, port: str) -> None:
    process = train(tmp_path, "--ray", f"127.0.0.1:{port}")
    assert process.returncode == 1
    assert re.search(rf"--ray 127\.0\.0\.1:{port}: no Ray cluster answers there \(.*(refused|invalid literal)", process.stderr)


def test_unknown_names_are_refused(tmp_path: Path) -> None:
    process = train(tmp_path, "--envs", "Ant-v5")
    assert process.returncode == 2 and "['Ant-v5'] not in" in process.stderr
    assert run("report.py", tmp_path).returncode == 1
    for algo in ("ppo", "sdca"):
        process = train(tmp_path, protocol={**PROTOCOL, "configurations": {"X": {"algo": algo}}})
        assert process.returncode == 1 and f"got '{algo}'" in process.stderr and "'sdac'" in process.stderr
