"""
Train the runs of a protocol: configurations x environments x seeds, through rl_zoo3, side by side, resumable.

    python benchmarks/run.py benchmarks/short.yml                                    # everything that is not finished
    python benchmarks/run.py benchmarks/short.yml --only SDAC SAC --envs HalfCheetah-v5 --seeds 0 --minutes 110
    python benchmarks/run.py benchmarks/short.yml --ray auto                         # on a Ray cluster (docs/sweep.md)

While a run goes on, its folder ``<work>/<protocol>/<configuration>_<env>_<seed>`` holds a row per evaluation and a checkpoint
(:mod:`sb3_sdac.checkpoint`), made every ``--checkpoint-minutes`` and when ``--minutes`` are over. A finished run moves its
rows into ``<results>/<protocol>.csv``, the one file that ``report.py`` reads, and its folder goes.
Called again, finished runs are left alone and the others go on from their checkpoints. Rows after the checkpoint are made
anew, and only the episodes under way at the interruption are lost. A run that fails is reported and tried again at the end.
On a cluster ``<results>`` and ``<work>`` must be on a file system that all machines share.

Columns: configuration, config (hash of algorithm and hyperparameters), commit (of the code that trained), env, seed,
env_steps, updates, wall_time (seconds of training without evaluations, the run's pieces added), returns (of each episode).
"""

import argparse
import contextlib
import csv
import hashlib
import inspect
import io
import json
import multiprocessing
import os
import re
import shutil
import socket
import subprocess
import sys
import time
import traceback
from collections.abc import Iterator
from dataclasses import dataclass
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any

try:
    import joblib
    import yaml
    from filelock import FileLock
except ModuleNotFoundError as error:
    raise ModuleNotFoundError(f'benchmarks/run.py needs {error.name}: pip install ".[benchmarks]"', name=error.name) from error

HERE = Path(__file__).parent
#: To be raised when SDAC computes something else with the same arguments, if only by a constant such as MAX_GRADIENT_NOISE
ALGORITHM_VERSION = 8
NOT_BEGUN = "not begun"
ROWS, CHECKPOINT, COUNTERS = "rows.csv", "checkpoint.zip", "counters.json"
COLUMNS = ["configuration", "config", "commit", "env", "seed", "env_steps", "updates", "wall_time", "returns"]


def defaults_of(function: Any) -> dict[str, Any]:
    """:return: its arguments that have a default, with it"""
    parameters = inspect.signature(function).parameters.values()
    return {parameter.name: parameter.default for parameter in parameters if parameter.default is not parameter.empty}


def with_defaults(algo: str, hyperparams: dict[str, Any]) -> dict[str, Any]:
    """
    :param algo: 'sdac' or 'dpmd'
    :param hyperparams: what is given to it
    :return: the same with every default of the algorithm's and, in ``policy_kwargs``, of the policy's constructor
    """
    import sb3_sdac

    policy_kwargs = hyperparams.get("policy_kwargs") or {}
    if isinstance(policy_kwargs, str):
        import rl_zoo3.exp_manager  # with whose names rl_zoo3 evaluates it

        policy_kwargs = eval(policy_kwargs, vars(rl_zoo3.exp_manager))
    policy = sb3_sdac.SDAC.policy_aliases.get(str(hyperparams.get("policy")), sb3_sdac.DiffusionPolicy)
    algorithms = [getattr(sb3_sdac, name) for name in ("SDAC", "DPMD")[: 1 + (algo == "dpmd")]]  # DPMD hands SDAC's on
    config = {name: default for algorithm in algorithms for name, default in defaults_of(algorithm).items()}
    return {**config, **hyperparams, "policy_kwargs": {**defaults_of(policy), **policy_kwargs}}


def config_hash(algo: str, hyperparams: dict[str, Any]) -> str:
    """
    Of what decides the outcome: a run never goes on from rows of other hyperparameters, defaults or versions of ours. Giving a
    default by name changes nothing.

    :param algo: as rl_zoo3 names it
    :param hyperparams: what is given to it
    :return: ten hexadecimal digits
    """
    config = {"algo": algo, **hyperparams}
    if algo in ("sdac", "dpmd"):
        config = {**with_defaults(algo, config), "version": ALGORITHM_VERSION}
        config.pop("compile")  # a matter of time, and of rounding

    def name(value: Any) -> str:  # a function's str() has its address
        return f"{value.__module__}.{value.__qualname__}" if hasattr(value, "__qualname__") else str(value)

    return hashlib.sha256(json.dumps(config, sort_keys=True, default=name).encode()).hexdigest()[:10]


def current_commit() -> str:
    """:return: of the code, with a plus sign if the package has changed since; outside a checkout the version"""
    import sb3_sdac

    git = ["git", "-C", str(Path(sb3_sdac.__file__).parent)]
    try:
        commit = subprocess.run([*git, "rev-parse", "--short=7", "HEAD"], capture_output=True, text=True, check=True).stdout
        changed = subprocess.run([*git, "status", "--porcelain", "."], capture_output=True, text=True, check=True).stdout
    except (OSError, subprocess.CalledProcessError):
        return f"version {sb3_sdac.__version__}"
    return commit.strip() + ("+" if changed else "")


def read_rows(path: Path) -> list[dict[str, str]]:
    """
    :param path: a CSV file
    :return: its rows; none if there is no such file
    """
    if not path.exists():
        return []
    with path.open(newline="") as file:
        return list(csv.DictReader(file))


def write_rows(path: Path, columns: list[str], rows: list[dict[str, Any]]) -> None:
    """
    Replace a CSV file in one step, so that a kill leaves the old or the new one.

    :param path: the file; its folder is made
    :param columns: in their order
    :param rows: all of them
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_suffix(".tmp")
    with temporary.open("w", newline="") as file:
        writer = csv.DictWriter(file, columns, lineterminator="\n")
        writer.writeheader()
        writer.writerows(rows)
    temporary.replace(path)


@dataclass(frozen=True)
class Run:
    """
    One training run: what is trained, and where its rows and its checkpoint lie.

    :param results: the protocol's table, which takes the rows of finished runs
    :param work: the run's own folder while it goes on
    """

    configuration: str
    algo: str
    hyperparams: dict[str, Any]
    commit: str
    env: str
    seed: int
    n_timesteps: int
    eval_freq: int
    eval_episodes: int
    results: Path
    work: Path

    @property
    def name(self) -> str:
        return f"{self.configuration}, {self.env}, seed {self.seed}"

    @property
    def config_hash(self) -> str:
        return config_hash(self.algo, self.hyperparams)

    def is_own(self, row: dict[str, str]) -> bool:
        """:return: whether a row of the table is of this configuration, environment and seed"""
        return (row["configuration"], row["env"], row["seed"]) == (self.configuration, self.env, str(self.seed))

    def read_rows(self) -> list[dict[str, str]]:
        """
        :return: the rows so far: those in the table if the run is finished, otherwise those in its folder
        :raises ValueError: if those in its folder come from other hyperparameters, or other evaluations
        """
        finished = [row for row in read_rows(self.results) if self.is_own(row)]
        if finished:
            return finished
        rows = read_rows(self.work / ROWS)
        for row in rows:
            self.check(self.work / ROWS, row["config"], len(row["returns"].split()))
        return rows

    def check(self, path: Path, config: str, n_episodes: int) -> None:
        """
        :param path: a file of this name
        :param config: hash of the hyperparameters that it comes from
        :param n_episodes: of each evaluation in it
        :raises ValueError: if they are not those of this run
        """
        if (config, n_episodes) != (self.config_hash, self.eval_episodes):
            raise ValueError(
                f"{path} holds a run of other hyperparameters or evaluations (config {config} and {n_episodes} episodes, now "
                f"{self.config_hash} and {self.eval_episodes}): give the configuration another name in the protocol, or "
                f"remove {self.work}"
            )

    def check_table(self) -> None:
        """
        Seeds of one configuration must not be mixed.

        :raises ValueError: if the table has rows of this configuration from other hyperparameters or evaluations
        """
        for row in read_rows(self.results):
            if (row["configuration"], row["env"]) == (self.configuration, self.env):
                found = (row["config"], len(row["returns"].split()))
                if found != (self.config_hash, self.eval_episodes):
                    raise ValueError(
                        f"{self.name} would be mixed with rows of other hyperparameters, evaluations or defaults in "
                        f"{self.results} (config {found[0]} and {found[1]} episodes of commit {row['commit']}, now "
                        f"{self.config_hash} and {self.eval_episodes}): give the configuration another name in the protocol, "
                        "take --results of your own, or remove those rows"
                    )

    def has_all_rows(self) -> bool:
        rows = self.read_rows()
        return bool(rows) and int(rows[-1]["env_steps"]) >= self.n_timesteps

    def is_finished(self) -> bool:
        """:return: whether its rows are in the table"""
        return any(self.is_own(row) and int(row["env_steps"]) >= self.n_timesteps for row in read_rows(self.results))

    def finish(self) -> None:
        """Move the rows into the table, whoever else does so at that time, and remove the run's folder."""
        rows = self.read_rows()
        self.results.parent.mkdir(parents=True, exist_ok=True)
        with FileLock(self.results.with_suffix(".lock")):
            merged = [*rows, *(row for row in read_rows(self.results) if not self.is_own(row))]
            merged.sort(key=lambda row: (row["configuration"], row["env"], int(row["seed"]), int(row["env_steps"])))
            write_rows(self.results, COLUMNS, merged)
        shutil.rmtree(self.work, ignore_errors=True)


def read_protocol(path: Path, results: Path, work: Path) -> list[Run]:
    """
    :param path: a protocol, such as ``short.yml``
    :param results: folder for the tables of finished runs
    :param work: folder for the runs that go on
    :return: all its runs, seed by seed, so that an early stop leaves whole comparisons
    """
    protocol = yaml.safe_load(path.read_text())
    protocol["n_timesteps"] = int(float(protocol["n_timesteps"]))  # 1e6 is a string to YAML
    runs: list[Run] = []
    commit = current_commit()
    of_reference = {*protocol["seeds"], *protocol.get("reference_seeds", [])}
    for seed in sorted(of_reference):
        for env in protocol["envs"]:
            for configuration, own in protocol["configurations"].items():
                if seed not in protocol["seeds"] and configuration != protocol["reference"]:
                    continue
                if "n_timesteps" in {**protocol["common"], **own}:
                    raise SystemExit(f"{path}: n_timesteps is the protocol's, the same for all, and stands at its top level")
                hyperparams = {"n_timesteps": protocol["n_timesteps"], **protocol["common"], **own}
                # No more than the run can fill; a larger buffer would only make checkpoints larger
                hyperparams.setdefault("buffer_size", min(protocol["n_timesteps"], 1_000_000))
                algo = hyperparams.pop("algo")
                stem = re.sub("[()]", "", re.sub("[ /]", "-", f"{configuration}_{env}_{seed}"))
                runs.append(
                    Run(
                        configuration=configuration,
                        algo=algo,
                        hyperparams=hyperparams,
                        commit=commit,
                        env=env,
                        seed=seed,
                        n_timesteps=protocol["n_timesteps"],
                        eval_freq=protocol["eval_freq"],
                        eval_episodes=protocol["eval_episodes"],
                        results=results / f"{path.stem}.csv",
                        work=work / path.stem / stem,
                    )
                )
                if runs[-1].work in [run.work for run in runs[:-1]]:
                    raise SystemExit(f"{path}: {runs[-1].name} and another run have the same folder {runs[-1].work.name}")
    return runs


def make_or_load(run: Run, device: str) -> tuple[Any, Any, float]:
    """
    :param run: the run
    :param device: for the networks
    :return: the model as rl_zoo3 makes it, or as its checkpoint has it, the environments of the evaluations, and the seconds
        of training so far
    :raises ValueError: if the checkpoint comes from other hyperparameters
    """
    import rl_zoo3.exp_manager

    from sb3_sdac.checkpoint import load_checkpoint

    checkpoint, resumed = run.work / CHECKPOINT, None
    if checkpoint.exists():
        # Saved just before; a kill between the two makes the wall time wrong by no more than one checkpoint's interval
        resumed = json.loads((run.work / COUNTERS).read_text())
        run.check(checkpoint, resumed["config"], resumed["eval_episodes"])
    run.work.mkdir(parents=True, exist_ok=True)
    hyperparams = dict(run.hyperparams)
    # As on rl_zoo3's command line; from its files it gives env_kwargs to the environments of training alone
    eval_env_kwargs = hyperparams.pop("eval_env_kwargs", hyperparams.get("env_kwargs"))
    config = run.work / "config.yml"
    config.write_text(yaml.safe_dump({run.env: hyperparams}))
    with contextlib.redirect_stdout(io.StringIO()):  # its own account of the hyperparameters
        manager = rl_zoo3.exp_manager.ExperimentManager(
            argparse.Namespace(),
            run.algo,
            run.env,
            str(run.work / "zoo"),
            config=str(config),
            seed=run.seed,
            eval_freq=-1,
            eval_env_kwargs=eval_env_kwargs,
            device=device,
            verbose=0,
        )
        experiment = manager.setup_experiment()
        assert experiment is not None
        model: Any = experiment[0]
        eval_env = manager.create_envs(run.eval_episodes, eval_env=True)  # side by side, one episode each
    eval_env.seed(1_000_000 + run.seed)
    if resumed is None:
        return model, eval_env, 0.0
    return load_checkpoint(checkpoint, model.get_env(), type(model), device), eval_env, resumed["wall_time"]


class Stopped(Exception):
    """Ends a run between two updates, which SB3's way, a callback that returns False, does not: it leaves one out."""


def train(run: Run, deadline: float, checkpoint_seconds: float, device: str) -> str:
    """
    Train until the run is finished or the deadline has come.

    :param run: the run
    :param deadline: when to stop, in the time of ``time.time()``
    :param checkpoint_seconds: time between two checkpoints
    :param device: for the networks
    :return: how far it came
    """
    # One thread: two processes side by side beat one of two threads, on networks of this size by far
    os.environ["OMP_NUM_THREADS"] = "1"
    import torch as th

    th.set_num_threads(1)
    import rl_zoo3.utils
    from stable_baselines3.common.callbacks import BaseCallback
    from stable_baselines3.common.evaluation import evaluate_policy
    from stable_baselines3.common.vec_env import VecNormalize, sync_envs_normalization

    from sb3_sdac import zoo
    from sb3_sdac.checkpoint import save_checkpoint

    zoo.add_algorithm(rl_zoo3.utils)

    if time.time() >= deadline:
        return NOT_BEGUN
    parent = os.getppid()
    checkpoint, counters = run.work / CHECKPOINT, run.work / COUNTERS
    model, eval_env, wall_time = make_or_load(run, device)
    # Rows after the checkpoint are made anew
    rows: list[dict[str, Any]] = [row for row in run.read_rows() if int(row["env_steps"]) <= model.num_timesteps]

    def evaluated_at() -> int:
        return int(rows[-1]["env_steps"]) if rows else 0

    class Keeper(BaseCallback):
        """Evaluates, writes rows and checkpoints, stops at the deadline."""

        def __init__(self) -> None:
            super().__init__()
            self.wall_time = wall_time
            self.resumed_at = self.saved_at = time.time()

        def _on_step(self) -> bool:
            return True

        def _on_rollout_start(self) -> None:  # between two updates, when everything is in the replay buffer
            if self.num_timesteps // run.eval_freq > evaluated_at() // run.eval_freq:
                self.evaluate()
            if time.time() - self.saved_at > checkpoint_seconds:
                self.save()
            if time.time() >= deadline or os.getppid() != parent:  # nobody waits for an orphan
                raise Stopped

        def evaluate(self) -> None:
            self.wall_time += time.time() - self.resumed_at
            if isinstance(eval_env, VecNormalize):
                sync_envs_normalization(self.training_env, eval_env)
            returns, _ = evaluate_policy(
                self.model, eval_env, run.eval_episodes, deterministic=True, return_episode_rewards=True
            )
            row = {
                "configuration": run.configuration,
                "config": run.config_hash,
                "commit": run.commit,
                "env": run.env,
                "seed": run.seed,
                "env_steps": self.num_timesteps,
                "updates": model._n_updates,
                "wall_time": f"{self.wall_time:.0f}",
                "returns": " ".join(f"{value:.2f}" for value in returns),  # type: ignore[union-attr]
            }
            rows.append(row)
            write_rows(run.work / ROWS, COLUMNS, rows)
            mean = sum(returns) / len(returns)  # type: ignore[arg-type]
            print(f"{run.name}: {mean:.0f} at {self.num_timesteps} steps after {self.wall_time / 60:.0f} min", flush=True)
            self.resumed_at = time.time()

        def save(self) -> None:
            self.wall_time += time.time() - self.resumed_at
            saved = {"wall_time": self.wall_time, "config": run.config_hash, "eval_episodes": run.eval_episodes}
            temporary = counters.with_suffix(".tmp")
            temporary.write_text(json.dumps(saved))
            temporary.replace(counters)
            save_checkpoint(model, checkpoint)
            self.resumed_at = self.saved_at = time.time()

    keeper = Keeper()
    with contextlib.closing(model.get_env()), contextlib.closing(eval_env):  # a checkpoint is of open ones
        with contextlib.suppress(Stopped):
            model.learn(run.n_timesteps - model.num_timesteps, keeper, log_interval=None, reset_num_timesteps=False)
        if model.num_timesteps >= run.n_timesteps > evaluated_at():
            keeper.evaluate()
        if not run.has_all_rows():
            keeper.save()
            return f"stopped at {model.num_timesteps} of {run.n_timesteps} steps, to be continued"
    run.finish()  # not before its monitor's file is closed
    return "finished"


def attempt(run: Run, *args: Any) -> tuple[Run, str, bool]:
    """
    :param run: the run
    :param args: see :func:`train`
    :return: the run, what became of it, and whether it failed
    """
    try:
        if run.has_all_rows():  # it failed, or was killed, after its end
            run.finish()
            return run, "finished", False
        return run, train(run, *args), False
    except Exception:
        return run, f"FAILED\n{traceback.format_exc()}", True


def send_attempt(sender: Connection, run: Run, *args: Any) -> None:
    """
    :param sender: takes what :func:`attempt` says
    :param run: the run
    :param args: see :func:`train`
    """
    sender.send(attempt(run, *args))


def attempt_apart(run: Run, deadline: float, *args: Any) -> tuple[Run, str, bool]:
    """
    :func:`attempt` in a process of its own, which may be killed (for memory, say) without any other run taking notice.

    :param run: the run
    :param deadline: see :func:`train`
    :param args: see :func:`train`
    :return: see :func:`attempt`
    """
    if time.time() >= deadline:
        return run, NOT_BEGUN, False
    spawn = multiprocessing.get_context("spawn")
    receiver, sender = spawn.Pipe(duplex=False)
    process = spawn.Process(target=send_attempt, args=(sender, run, deadline, *args))
    process.start()
    sender.close()
    try:
        outcome: tuple[Run, str, bool] = receiver.recv()
        return outcome
    except EOFError:
        process.join()
        return run, f"FAILED\nits process ended with exit status {process.exitcode}", True


def on_this_machine(runs: list[Run], jobs: int | None, *args: Any) -> Iterator[tuple[Run, str, bool]]:
    """
    :param runs: the runs
    :param jobs: how many side by side (None: one per core)
    :param args: see :func:`train`
    :return: what :func:`attempt` says, in the order in which they end
    """
    n_jobs = jobs or joblib.cpu_count()
    parallel = joblib.Parallel(n_jobs, batch_size=1, return_as="generator_unordered", prefer="threads")
    return parallel(joblib.delayed(attempt_apart)(run, *args) for run in runs)


def on_ray(runs: list[Run], gpus: float, *args: Any) -> Iterator[tuple[Run, str, bool]]:
    """
    Ray's own tasks and not joblib's, which tell nothing before all runs are over and have no GPU.

    :param runs: the runs
    :param gpus: share of a GPU that each run takes
    :param args: see :func:`train`
    :return: what :func:`attempt` says, in the order in which they end; Ray starts the runs of a lost machine on another
    """
    import ray

    task = ray.remote(attempt).options(num_cpus=1, num_gpus=gpus)
    tasks = {task.remote(run, *args): run for run in runs}
    while tasks:
        (ended,), _ = ray.wait(list(tasks))
        run = tasks.pop(ended)
        try:
            yield ray.get(ended)
        except ray.exceptions.RayError as error:  # lost more than once, or it cannot even be started there
            yield run, f"FAILED\n{error}", True


def connect_to_ray(address: str, jobs: int | None, device: str) -> float:
    """
    :param address: of a Ray cluster; 'auto' for the one this machine belongs to, 'local' for a new one on this machine
    :param jobs: runs side by side on a new one, or on each GPU of any
    :param device: for the networks
    :return: share of a GPU that each run takes
    """
    try:
        import ray
    except ImportError:
        raise SystemExit('--ray needs Ray: pip install ".[ray]"') from None
    try:
        if ":" in address:  # Ray itself would wait for minutes
            host, port = address.removeprefix("ray://").rsplit(":", 1)
            socket.create_connection((host, int(port)), timeout=10).close()
        ray.init(address=address, num_cpus=jobs if address == "local" else None)
    except (OSError, ValueError, RuntimeError) as error:
        raise SystemExit(f"--ray {address}: no Ray cluster answers there ({error})") from None
    if not device.startswith("cuda"):
        return 0.0
    if not ray.cluster_resources().get("GPU"):
        raise SystemExit(f"--device {device}: the Ray cluster has no GPU")
    return 1 / (jobs or 1)


def check_algorithms(runs: list[Run]) -> None:
    """
    :param runs: the runs
    :raises SystemExit: if one's algorithm is unknown, or has no replay buffer that a checkpoint could be of
    """
    import rl_zoo3.utils
    from stable_baselines3.common.off_policy_algorithm import OffPolicyAlgorithm

    from sb3_sdac import zoo

    zoo.add_algorithm(rl_zoo3.utils)
    known = [name for name, algorithm in rl_zoo3.utils.ALGOS.items() if issubclass(algorithm, OffPolicyAlgorithm)]
    for run in runs:
        if run.algo not in known:
            raise SystemExit(f"{run.configuration}: algo must be one of the off-policy algorithms {known}, got {run.algo!r}")


def progress(runs: list[Run]) -> float:
    """:return: how many runs' worth of environment steps stand in the rows of ``runs``, a started one counting in part"""
    rows = [run.read_rows() for run in runs]
    return sum(min(int(own[-1]["env_steps"]) / run.n_timesteps, 1) for run, own in zip(runs, rows, strict=True) if own)


def main() -> int:
    """:return: exit status: 1 if a run failed, and again when it was tried once more"""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("protocol", type=Path, help="a yml file like short.yml")
    parser.add_argument("--only", nargs="+", help="configurations to run (default: all)")
    parser.add_argument("--envs", nargs="+", help="environments to run (default: all)")
    parser.add_argument("--seeds", nargs="+", type=int, help="seeds to run (default: all)")
    parser.add_argument("--jobs", type=int, help="runs side by side (default: one per core); on Ray with cuda: per GPU")
    parser.add_argument("--minutes", type=float, default=float("inf"), help="stop and checkpoint after this time")
    parser.add_argument("--checkpoint-minutes", type=float, default=15)
    parser.add_argument("--device", default="cpu", help="cpu, or cuda to let the runs share a GPU")
    parser.add_argument("--ray", metavar="ADDRESS", help="run on the Ray cluster there ('auto', 'local' or host:port)")
    parser.add_argument("--results", type=Path, default=HERE / "results", help="folder for the tables of finished runs")
    parser.add_argument("--work", type=Path, help="folder for runs that go on (default: benchmarks/work, or RESULTS/work)")
    args = parser.parse_args()

    work = args.work or (HERE if args.results == HERE / "results" else args.results) / "work"
    runs = read_protocol(args.protocol, args.results.absolute(), work.absolute())
    for option, attribute in (("only", "configuration"), ("envs", "env"), ("seeds", "seed")):
        wanted, known = getattr(args, option), {getattr(run, attribute) for run in runs}
        if wanted is not None and not set(wanted) <= known:
            parser.error(f"--{option}: {sorted(set(wanted) - known)} not in {args.protocol}, which has {sorted(known)}")
        runs = [run for run in runs if wanted is None or getattr(run, attribute) in wanted]
    check_algorithms(runs)
    todo = [run for run in runs if not run.is_finished()]
    try:
        for run in todo:
            run.check_table()
        begin, done_before = time.time(), progress(runs)
    except ValueError as error:
        raise SystemExit(str(error)) from None
    print(f"{len(runs) - len(todo)} of {len(runs)} runs are finished")
    other = [run.name for run in runs if run not in todo and run.read_rows()[-1]["config"] != run.config_hash]
    if other:
        print(f"of other hyperparameters or defaults than today's, and left as they are: {'; '.join(other)}")
    arguments = (begin + 60 * args.minutes, 60 * args.checkpoint_minutes, args.device)
    gpus = connect_to_ray(args.ray, args.jobs, args.device) if args.ray is not None else 0.0

    failed: dict[str, Run] = {}
    for last_try in (False, True):
        outcomes = on_ray(todo, gpus, *arguments) if args.ray else on_this_machine(todo, args.jobs, *arguments)
        for run, outcome, has_failed in outcomes:
            if has_failed:
                failed[run.name] = run
            elif outcome != NOT_BEGUN:
                failed.pop(run.name, None)
            done = progress(runs)
            minutes_each = (time.time() - begin) / 60 / max(done - done_before, 1e-9)
            finished = sum(run.is_finished() for run in runs)
            left = f", about {(len(runs) - done) * minutes_each:.0f} min left" if done > done_before else ""
            print(f"{run.name}: {outcome}\n{finished} of {len(runs)} finished, {len(failed)} failed{left}", flush=True)
        if not failed or last_try:
            break
        print(f"{len(failed)} runs failed, once more")
        todo = list(failed.values())
    return 1 if failed else 0


if __name__ == "__main__":
    sys.exit(main())
