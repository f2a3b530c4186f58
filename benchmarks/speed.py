"""
What an update, a prediction and learning cost: SDAC's default and the paper's configuration beside SAC, TQC and CrossQ.

    python benchmarks/speed.py --env HalfCheetah-v5            # the table
    python benchmarks/speed.py --env HalfCheetah-v5 --sweep    # how SDAC's cost grows

    python benchmarks/speed.py --env HalfCheetah-v5 --device cuda --turns 3    # on a GPU, in a few minutes

All algorithms have 3x256 networks (CrossQ its own, too) and take turns in one process on one thread, so that whatever
else the machine does meets them alike; the table holds medians, and ratios to SAC of the same turn. Learning is
with 5 environments and one update per step of all five. The first update's time and the peak memory are those of a process
of its own, which makes a model and one update: with ``compile=True`` once without and once with what the compiler keeps
on disk. Where there are more than three cores, half of them run these processes side by side.

Writes an entry ``speed_<env>_<device>`` of ``benchmarks/results/speed.json``, or with ``--sweep`` ``sweep_<env>_<device>``:
update time against particles, candidates, steps, batch size, action dimension, and time per step against the number of
environments, with the floor that the matrix products' arithmetic sets at the rate of a single large one.

    python benchmarks/speed.py --into docs/speed.md    # measures nothing: tables and pictures from all these entries

puts each table between the lines ``<!-- speed_<env>_<device> -->`` and ``<!-- /speed_<env>_<device> -->`` of the page, and the
pictures of the sweeps into the folder ``images`` beside it.
"""

import argparse
import json
import os
import platform
import shlex
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from functools import partial
from importlib.metadata import version
from pathlib import Path
from typing import Any

import gymnasium as gym
import joblib
import numpy as np
import torch as th
from sb3_contrib import TQC, CrossQ
from stable_baselines3 import SAC
from stable_baselines3.common.env_util import make_vec_env
from stable_baselines3.common.logger import configure
from stable_baselines3.common.off_policy_algorithm import OffPolicyAlgorithm
from torch.profiler import ProfilerActivity, profile

import sb3_sdac
from sb3_sdac import PAPER_SDAC, SDAC

#: What was measured, by name
MEASURED = Path(__file__).parent / "results" / "speed.json"
NETS = {"net_arch": [256, 256, 256]}
ALGORITHMS: dict[str, Callable[..., OffPolicyAlgorithm]] = {
    "SAC": lambda env, **kwargs: SAC("MlpPolicy", env, policy_kwargs=NETS, **kwargs),
    "TQC": lambda env, **kwargs: TQC("MlpPolicy", env, policy_kwargs=NETS, **kwargs),
    "CrossQ": lambda env, **kwargs: CrossQ("MlpPolicy", env, policy_kwargs=NETS, **kwargs),
    "CrossQ (its nets)": lambda env, **kwargs: CrossQ("MlpPolicy", env, **kwargs),
    "SDAC": lambda env, **kwargs: SDAC("MlpPolicy", env, **kwargs),
    "SDAC (compile=False)": lambda env, **kwargs: SDAC("MlpPolicy", env, compile=False, **kwargs),
    "SDAC (compiled)": lambda env, **kwargs: SDAC("MlpPolicy", env, compile=True, **kwargs),
    "SDAC (paper)": lambda env, **kwargs: SDAC("MlpPolicy", env, **{**PAPER_SDAC, **kwargs}),
    "SDAC (paper, compiled)": lambda env, **kwargs: SDAC("MlpPolicy", env, **{**PAPER_SDAC, **kwargs}, compile=True),
}

FIGURES = {
    "update": "update",
    "predict_1": "`predict`, 1 observation",
    "predict_64": "`predict`, 64 observations",
    "learn": "`learn`, environment steps per second",
}
LABELS = {
    "n_train_particles": "particles per action of the update, n_train_particles",
    "n_reverse_samples": "candidates, n_reverse_samples",
    "n_sampling_steps": "denoising steps, n_sampling_steps",
    "n_diffusion_steps": "diffusion steps, n_diffusion_steps",
    "batch_size": "batch size",
    "action_dim": "dimensions of the action",
    "n_envs": "environments, one update per step of all",
}
OF_THE_POLICY = ("n_train_particles", "n_sampling_steps", "n_diffusion_steps")
MATRIX_PRODUCTS = ("aten::mm", "aten::addmm", "aten::bmm", "aten::baddbmm")
#: Argument of SDAC or of its policy -> its values; the others keep their defaults
SWEEPS: dict[str, list[int]] = {
    "n_train_particles": [1, 2, 4, 8, 16, 32],
    "n_reverse_samples": [4, 8, 16, 32, 64],  # target_ess must exceed 1 / K
    "n_sampling_steps": [1, 5, 10, 15, 20],
    "n_diffusion_steps": [5, 20, 50, 100],
    "batch_size": [64, 128, 256, 512, 1024],
    "action_dim": [1, 6, 17, 38],
    "n_envs": [1, 2, 5, 10, 20],
}


class AnySize(gym.Env[np.ndarray, np.ndarray]):
    """
    Costs nothing, and has as many dimensions as wanted.

    :param action_dim: A
    """

    def __init__(self, action_dim: int):
        self.observation_space = gym.spaces.Box(-np.inf, np.inf, (17,))
        self.action_space = gym.spaces.Box(-1, 1, (action_dim,))

    def reset(self, **kwargs: Any) -> tuple[np.ndarray, dict[str, Any]]:
        """:return: zeros"""
        return np.zeros(17, np.float32), {}

    def step(self, action: np.ndarray) -> tuple[np.ndarray, float, bool, bool, dict[str, Any]]:
        """:return: zeros, without end"""
        return np.zeros(17, np.float32), 0.0, False, False, {}


def make_model(name: str, env_id: str, device: str) -> OffPolicyAlgorithm:
    """A model with a replay buffer full of plausible numbers."""
    return fill(ALGORITHMS[name](env_id, buffer_size=2000, seed=0, device=device))


def fill(model: OffPolicyAlgorithm) -> OffPolicyAlgorithm:
    """Fill the replay buffer with plausible numbers."""
    model.set_logger(configure(None, []))
    rng = np.random.default_rng(0)
    assert model.replay_buffer is not None and model.observation_space.shape is not None
    for _ in range(model.replay_buffer.buffer_size):
        obs, next_obs = rng.standard_normal((2, 1, *model.observation_space.shape))
        action = rng.uniform(-1, 1, (1, *(model.action_space.shape or ())))
        model.replay_buffer.add(obs, next_obs, action, rng.standard_normal(1), np.zeros(1), [{}])
    return model


def learning_model(name: str, env_id: str, device: str) -> OffPolicyAlgorithm:
    """A model with five environments that learns from the first step."""
    env = make_vec_env(env_id, n_envs=5, seed=0)
    model = ALGORITHMS[name](env, buffer_size=20_000, learning_starts=0, seed=0, device=device)
    return model.learn(5, log_interval=10_000)


def seconds(function: Callable[[], Any], repeats: int, device: str) -> float:
    """Mean wall time of a call."""
    start = time.perf_counter()
    for _ in range(repeats):
        function()
    if device == "cuda":
        th.cuda.synchronize()
    return (time.perf_counter() - start) / repeats


def first_update(name: str, env_id: str, device: str, threads: int) -> None:
    """Print the seconds from the model to the end of its first update, and the peak memory in MiB."""
    th.set_num_threads(threads)
    start = time.perf_counter()
    model = make_model(name, env_id, device)
    model.train(1, 256)
    duration = time.perf_counter() - start
    model.train(1 if device == "cpu" else 20, 256)  # so that graphs are captured, and count
    if device == "cuda":
        peak = th.cuda.max_memory_reserved() / 2**20
    else:
        import resource  # not on Windows

        peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / (2**20 if sys.platform == "darwin" else 1024)
    print(duration, peak)


def measure_first_update(name: str, env_id: str, device: str, threads: int) -> dict[str, float]:
    """In processes of their own: seconds to the first update (cold and warm compiler) and MiB."""
    with tempfile.TemporaryDirectory() as cache:
        code = f"from speed import first_update; first_update({name!r}, {env_id!r}, {device!r}, {threads})"
        runs = []
        for _ in range(2):
            out = subprocess.run(
                [sys.executable, "-W", "ignore", "-c", code],
                cwd=Path(__file__).parent,
                env={**os.environ, "TORCHINDUCTOR_CACHE_DIR": cache},
                check=True,
                capture_output=True,
                text=True,
            ).stdout
            runs.append([float(number) for number in out.split()[-2:]])
    return {"first_update_cold": runs[0][0], "first_update_warm": runs[1][0], "peak_memory_MiB": runs[1][1]}


def measure(env_id: str, device: str, turns: int, updates: int) -> dict[str, dict[str, list[float]]]:
    """For each algorithm the seconds of each turn, per update and per deterministic prediction of 1 and of 64 observations."""
    models = {name: make_model(name, env_id, device) for name in ALGORITHMS}
    learners = {name: learning_model(name, env_id, device) for name in ALGORITHMS}
    results: dict[str, dict[str, list[float]]] = {name: {figure: [] for figure in FIGURES} for name in models}
    for turn in range(-1, turns):  # the first turn warms up
        for name, model in models.items():
            single = model.observation_space.sample()
            batch = np.stack([single] * 64)
            n_updates = max(updates // 10, 2) if "paper" in name and device == "cpu" else updates
            figures = {
                "update": seconds(lambda m=model, n=n_updates: m.train(n, 256), 1, device) / n_updates,  # type: ignore[misc]
                "predict_1": seconds(lambda m=model, o=single: m.predict(o, deterministic=True), 20, device),  # type: ignore[misc]
                "predict_64": seconds(lambda m=model, o=batch: m.predict(o, deterministic=True), 20, device),  # type: ignore[misc]
            }
            learn = partial(learners[name].learn, 5 * n_updates, log_interval=10_000, reset_num_timesteps=False)
            figures["learn"] = seconds(learn, 1, device) / (5 * n_updates)
            if turn >= 0:
                for key, value in figures.items():
                    results[name][key].append(value)
    return results


def table(results: dict[str, dict[str, list[float]]], first: dict[str, dict[str, float]]) -> str:
    """Medians in milliseconds, and in brackets the median of the turns' ratios to SAC, as Markdown."""
    heads = [*FIGURES.values(), "to the first update, cold / warm", "peak memory"]
    lines = ["| | " + " | ".join(heads) + " |", "| --- |" + " --- |" * len(heads)]
    for name, figures in results.items():
        cells = []
        for key, values in figures.items():
            ratios = [value / sac for value, sac in zip(values, results["SAC"][key], strict=True)]
            if key == "learn":  # a rate, not a time
                rate = 1 / statistics.median(values)
                cells.append(f"{rate:.{0 if rate > 100 else 2}f} ({1 / statistics.median(ratios):.2f})")
            else:
                median = 1e3 * statistics.median(values)
                cells.append(f"{median:.0f} ms" if median > 100 else f"{median:.3g} ms")
                cells[-1] += f" ({statistics.median(ratios):.1f})"
        own = first[name]
        cells += [f"{own['first_update_cold']:.1f} / {own['first_update_warm']:.1f} s", f"{own['peak_memory_MiB']:.0f} MiB"]
        lines.append(f"| {name} | {' | '.join(cells)} |")
    return "\n".join(lines)


def sweep(env_id: str, device: str, turns: int) -> dict[str, Any]:
    """
    Measure how the time of an update grows, and what its matrix products would take at a large one's rate in float32.

    :param env_id: environment whose dimensions to use
    :param device: for the networks
    :param turns: how often each point is measured; medians are kept
    :return: the rate in GFLOP/s, and for each argument its values with the milliseconds of both
    """
    left, right = th.randn(4096, 256, device=device), th.randn(256, 256, device=device)
    rate = 2 * left.numel() * 256 / min(seconds(lambda: left @ right, 20, device) for _ in range(10))
    points: dict[str, Any] = {}
    for argument, values in SWEEPS.items():
        measured, floors = zip(*(sweep_point(argument, value, env_id, device, turns, rate) for value in values), strict=True)
        points[argument] = {"values": values, "measured": measured, "arithmetic": floors}
    return {"GFLOP/s": rate / 1e9, "milliseconds": points}


def draw_sweep(swept: dict[str, Any], path: Path) -> None:
    """
    :param swept: what :func:`sweep` says, and the setting
    :param path: of the picture
    """
    from matplotlib.figure import Figure

    points = swept["milliseconds"]
    figure = Figure(figsize=(12, 6), layout="constrained")
    axes = figure.subplots(2, (len(points) + 1) // 2, squeeze=False)
    for ax, (argument, line) in zip(axes.flat, points.items(), strict=False):
        ax.plot(line["values"], line["measured"], "o-", label="measured")
        floor = f"its matrix products at {swept['GFLOP/s']:.0f} GFLOP/s (float32)"
        ax.plot(line["values"], line["arithmetic"], "s--", label=floor)
        ax.set_xlabel(LABELS[argument], fontsize=9)
        ax.set_ylabel("ms per step of all environments" if argument == "n_envs" else "ms per update", fontsize=9)
        ax.set_ylim(bottom=0)
        ax.grid(alpha=0.3)
    for ax in axes.flat[len(points) :]:
        ax.set_axis_off()
    axes.flat[-1].legend(*axes.flat[0].get_legend_handles_labels(), loc="center", frameon=False)
    setting = swept["setting"]
    where = f"{setting['env']}, {setting['machine']}, 1 thread"
    figure.suptitle(f"Cost of an update of SDAC ({where}); one argument changed at a time")
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, dpi=80)


def renew(page: Path) -> None:
    """
    :param page: takes a table of each, and their pictures into the folder ``images`` beside it
    """
    from pages import insert  # beside this script; --help does without

    for name, kept in json.loads(MEASURED.read_text(encoding="utf-8")).items():
        if name.startswith("sweep"):
            draw_sweep(kept, page.parent / "images" / f"{name}.png")
            continue
        made_by = f"Made by\n`{kept['setting']['command']}`."
        insert(f"{made_by}\n\n{table(kept['seconds'], kept['first_update'])}\n", name, page)


def sweep_point(argument: str, value: int, env_id: str, device: str, turns: int, rate: float) -> tuple[float, float]:
    """:return: milliseconds of an update (with ``n_envs``: and a step), measured, and of its arithmetic at this rate"""
    own: dict[str, Any] = {} if argument in ("batch_size", "action_dim", "n_envs") else {argument: value}
    if argument in OF_THE_POLICY:
        own = {"policy_kwargs": own}
    batch_size = value if argument == "batch_size" else 256
    work: Callable[[], Any]
    env: Any = AnySize(value) if argument == "action_dim" else env_id
    if argument == "n_envs":
        env = make_vec_env(env_id, n_envs=value, seed=0)
        model = SDAC("MlpPolicy", env, buffer_size=20_000, learning_starts=0, seed=0, device=device).learn(value)
        n_updates = 2 * model.policy_delay
        work = partial(model.learn, n_updates * value, log_interval=10_000, reset_num_timesteps=False)
    else:
        model = SDAC("MlpPolicy", env, buffer_size=2000, seed=0, device=device, **own)
        fill(model)
        n_updates = 2 * model.policy_delay
        work = partial(model.train, n_updates, batch_size)
    # Warms up, too. torch's FlopCounterMode does not survive gradients with respect to inputs of a module
    with profile(activities=[ProfilerActivity.CPU], record_shapes=True, with_flops=True) as profiler:
        work()
    flops = sum(event.flops for event in profiler.key_averages() if event.key in MATRIX_PRODUCTS)
    floor = flops / n_updates / rate * 1e3
    measured = statistics.median(seconds(work, 1, device) for _ in range(turns)) / n_updates * 1e3
    print(f"{argument} {value}: {measured:.1f} ms, arithmetic {floor:.1f} ms", flush=True)
    return measured, floor


def describe(arguments: argparse.Namespace) -> dict[str, Any]:
    """
    :param arguments: of the command line
    :return: where and of what the figures are
    """
    spaces = gym.make(arguments.env)
    machine = th.cuda.get_device_name() if arguments.device == "cuda" else f"{os.cpu_count()} cores, {platform.machine()}"
    return {
        "env": arguments.env,
        "observation_dim": spaces.observation_space.shape,
        "action_dim": spaces.action_space.shape,
        "machine": machine,
        "cpu_capability": th.backends.cpu.get_cpu_capability(),
        "threads": arguments.threads,
        "batch_size": 256,
        "versions": {"sb3_sdac": sb3_sdac.__version__}
        | {name: version(name) for name in ("stable_baselines3", "sb3_contrib", "torch", "numpy")},
        "python": platform.python_version(),
        "command": shlex.join(["python", "benchmarks/speed.py", *sys.argv[1:]]),
    }


def main() -> None:
    """Measure, print, save."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--env", default="HalfCheetah-v5")
    parser.add_argument("--device", default="cpu", choices=["cpu", "cuda"])
    parser.add_argument("--threads", type=int, default=1, help="of PyTorch")
    parser.add_argument("--only", nargs="+", choices=list(ALGORITHMS), default=list(ALGORITHMS), help="algorithms; SAC always")
    parser.add_argument("--turns", type=int, default=5, help="how often each algorithm has its turn")
    parser.add_argument("--updates", type=int, default=20, help="updates per turn (the paper's configuration makes a tenth)")
    parser.add_argument("--sweep", action="store_true", help="how the cost of SDAC grows")
    parser.add_argument("--into", type=Path, metavar="PAGE", help="measure nothing, put what was measured into a page")
    arguments = parser.parse_args()
    th.set_num_threads(arguments.threads)
    for name in set(ALGORITHMS) - {"SAC", *arguments.only}:
        del ALGORITHMS[name]
    if arguments.into is not None:
        renew(arguments.into)
        return
    measured: dict[str, Any] = {"setting": describe(arguments)}
    if arguments.sweep:
        measured |= sweep(arguments.env, arguments.device, arguments.turns)
    else:
        parallel = joblib.Parallel(n_jobs=max((os.cpu_count() or 1) // 2, 1), prefer="threads")
        own = (arguments.env, arguments.device, arguments.threads)
        firsts = parallel(joblib.delayed(measure_first_update)(name, *own) for name in ALGORITHMS)
        measured["first_update"] = dict(zip(ALGORITHMS, firsts, strict=True))
        measured["seconds"] = measure(arguments.env, arguments.device, arguments.turns, arguments.updates)
        print(table(measured["seconds"], measured["first_update"]))
    threads = f"_{arguments.threads}_threads" if arguments.threads != 1 else ""
    name = f"{'sweep' if arguments.sweep else 'speed'}_{arguments.env}_{arguments.device}{threads}"
    kept = json.loads(MEASURED.read_text(encoding="utf-8"))
    MEASURED.write_text(json.dumps({**kept, name: measured}, indent=1) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
