"""The training harness, benchmarks/run.py: runs of a protocol, interruption and resumption, the table of finished runs."""

import csv
import importlib
import itertools
import os
import re
import signal
import subprocess
import sys
from concurrent.futures import ProcessPoolExecutor
from dataclasses import replace
from multiprocessing import get_context
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import yaml

import sb3_sdac

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


def table(folder: Path, configuration: str) -> list[dict[str, str]]:
    """The rows of a finished run."""
    with (folder / "results" / "tiny.csv").open(newline="") as file:
        return [row for row in csv.DictReader(file) if row["configuration"] == configuration]


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
    first = interrupted.read_rows()
    assert [int(row["env_steps"]) for row in first] == [1500]
    assert not interrupted.is_finished() and (interrupted.work / "checkpoint.zip").exists()
    monkeypatch.undo()
    process = train(tmp_path, "--minutes", "0")
    assert process.returncode == 0 and process.stdout.count("not begun") == 2, process.stderr

    process = train(tmp_path, "--jobs", "2")
    assert process.returncode == 0, process.stderr
    assert "0 of 2 runs are finished" in process.stdout and "2 of 2 finished, 0 failed" in process.stdout
    assert table(tmp_path, "SDAC")[0] == first[0] and not list((tmp_path / "work" / "tiny").iterdir())
    assert "2 of 2 runs are finished" in train(tmp_path).stdout
    for configuration in ("SDAC", "SAC"):
        own = table(tmp_path, configuration)
        assert [int(row["env_steps"]) for row in own] == [1500, 3000]
        assert [row["env"] for row in own] == ["Pendulum-v1"] * 2
        assert all(len(row["returns"].split()) == 2 for row in own)
        assert int(own[-1]["updates"]) >= 1400 and len({row["config"] for row in own}) == 1
        # The first rows are made in this process; the others' package may be an installed one, which is of a version
        assert own[0]["commit"] == interrupted.commit or configuration == "SAC"
        assert {row["commit"] for row in own} <= {interrupted.commit, f"version {sb3_sdac.__version__}"}

    # A stop costs no update: as many as the run that went through has
    assert len({table(tmp_path, configuration)[-1]["updates"] for configuration in ("SDAC", "SAC")}) == 1

    process = run("report.py", tmp_path)
    assert process.returncode == 0, process.stderr
    score = sum(float(value) for row in table(tmp_path, "SDAC")[-2:] for value in row["returns"].split()) / 4
    assert f"| Pendulum-v1 | SDAC | {score:.0f} | {score:.0f} |" in (tmp_path / "results" / "tiny.md").read_text()
    assert (tmp_path / "results" / "tiny.png").stat().st_size > 10_000

    # Killed between its last row and the table, a run is not trained again
    finished = replace(interrupted, results=tmp_path / "others" / "tiny.csv")
    harness.write_rows(finished.work / "rows.csv", harness.COLUMNS, table(tmp_path, "SDAC"))
    assert not finished.is_finished() and harness.attempt(finished, None) == (finished, "finished", False)
    assert finished.is_finished() and not finished.work.exists()

    # Other hyperparameters or defaults: what is finished stays, with a word, and no other seed is added to it
    changed = {**PROTOCOL, "common": {**PROTOCOL["common"], "batch_size": 17}}  # type: ignore[dict-item]
    process = train(tmp_path, protocol=changed)
    assert process.returncode == 0 and "of other hyperparameters or defaults than today's" in process.stdout
    process = train(tmp_path, protocol={**changed, "seeds": [0, 1]})
    assert process.returncode == 1 and "SDAC, Pendulum-v1, seed 1 would be mixed with rows of other" in process.stderr
    assert len(table(tmp_path, "SDAC")) == 2


def make_rows(harness: Any, run: Any) -> None:
    """In the place of training."""
    steps = range(run.eval_freq, run.n_timesteps + 1, run.eval_freq)
    own = {"configuration": run.configuration, "config": "x", "commit": "y", "env": run.env, "seed": run.seed, "updates": 1}
    rows = [{**own, "env_steps": step, "wall_time": step, "returns": "1.00 2.00"} for step in steps]
    harness.write_rows(run.work / "rows.csv", harness.COLUMNS, rows)


def finish(run: Any) -> None:
    run.finish()


def test_runs_that_finish_at_the_same_time(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Of several processes: no row of another one is lost, and the table is in the same order, whoever comes first."""
    harness, runs = read(tmp_path, monkeypatch, seeds=list(range(8)))
    monkeypatch.setattr(harness.Run, "config_hash", "x")
    for own in runs:
        make_rows(harness, own)
    with ProcessPoolExecutor(4, get_context("fork")) as pool:
        list(pool.map(finish, runs))
    names = [(row["configuration"], int(row["seed"]), int(row["env_steps"])) for row in harness.read_rows(runs[0].results)]
    assert names == [(name, seed, steps) for name in ("SAC", "SDAC") for seed in range(8) for steps in (1500, 3000)]
    assert all(own.is_finished() and not own.work.exists() for own in runs)


def test_what_a_configuration_is(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A default given by name is the same, also the policy's, and so is what changes the time alone."""
    harness, (sdac, _) = read(tmp_path, monkeypatch)

    def changed(algo: str = "sdac", **hyperparams: Any) -> str:
        digits: str = harness.config_hash(algo, {**sdac.hyperparams, **hyperparams})
        return digits

    same: list[dict[str, Any]] = [
        {"tau": 0.005, "compile": True},
        {"policy_kwargs": {"net_arch": [8]}},
        {"policy_kwargs": "dict(net_arch=[8], n_critics=2, activation_fn=nn.SiLU)"},
    ]
    assert {changed(**hyperparams) for hyperparams in same} == {sdac.config_hash}
    others: list[dict[str, Any]] = [
        {"tau": 0.006},
        {"policy_kwargs": "dict(net_arch=[8], n_critics=3)"},
        {"policy_kwargs": "dict(net_arch=[8], activation_fn=nn.Mish)"},
    ]
    assert len({sdac.config_hash, changed("dpmd"), changed("sac"), *(changed(**other) for other in others)}) == 6


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
    assert not (interrupted.work / "rows.csv").exists() and (interrupted.work / "checkpoint.zip").exists()
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
        monitors = list(run.work.rglob("*.monitor.csv"))
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
    (own.work / "rows.csv").unlink(missing_ok=True)
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
    assert [run.work.name for run in runs] == ["A-B-x_dm_control-cheetah-run-v0_0"]
    with pytest.raises(SystemExit, match=r"A B x, Pendulum-v1, seed 0 and another run have the same folder"):
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
    assert [int(row["env_steps"]) for row in table(tmp_path, "SDAC")] == [100, 200]


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
