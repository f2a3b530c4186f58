"""
What an update, a prediction and learning cost: SDAC's default and the paper's configuration beside SAC, TQC and CrossQ.

    python benchmarks/speed.py --env HalfCheetah-v5            # the table
    python benchmarks/speed.py --env HalfCheetah-v5 --sweep    # how SDAC's cost grows

All algorithms have 3x256 networks (CrossQ its own, too) and take turns in one process on one thread, so that whatever
else the machine does meets them alike; the table holds medians, and ratios to SAC of the same turn. Learning is
with 5 environments and one update per step of all five. Writes ``benchmarks/results/speed_<env>_<device>.json`` and
its Markdown table beside it, or with ``--sweep`` ``sweep_<env>_<device>.png``: update time against N, K, sampling steps and
batch size, with the floor that the matrix products' arithmetic sets at the rate of a single large one.
"""

import argparse
import json
import os
import platform
import statistics
import time
from collections.abc import Callable
from functools import partial
from importlib.metadata import version
from pathlib import Path
from typing import Any

import gymnasium as gym
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

NETS = {"net_arch": [256, 256, 256]}
ALGORITHMS: dict[str, Callable[..., OffPolicyAlgorithm]] = {
    "SAC": lambda env, **kwargs: SAC("MlpPolicy", env, policy_kwargs=NETS, **kwargs),
    "TQC": lambda env, **kwargs: TQC("MlpPolicy", env, policy_kwargs=NETS, **kwargs),
    "CrossQ": lambda env, **kwargs: CrossQ("MlpPolicy", env, policy_kwargs=NETS, **kwargs),
    "CrossQ (its nets)": lambda env, **kwargs: CrossQ("MlpPolicy", env, **kwargs),
    "SDAC": lambda env, **kwargs: SDAC("MlpPolicy", env, **kwargs),
    "SDAC (paper)": lambda env, **kwargs: SDAC("MlpPolicy", env, **{**PAPER_SDAC, **kwargs}),
}


FIGURES = {
    "update": "update",
    "predict_1": "`predict`, 1 observation",
    "predict_64": "`predict`, 64 observations",
    "learn": "`learn`, environment steps per second",
}
MATRIX_PRODUCTS = ("aten::mm", "aten::addmm", "aten::bmm", "aten::baddbmm")
#: Argument of SDAC -> its values; the others keep their defaults
SWEEPS: dict[str, list[int]] = {
    "n_target_particles": [1, 2, 4, 8, 16, 32],
    "n_reverse_samples": [8, 16, 32, 64],  # target_ess must exceed 1 / K
    "n_sampling_steps": [1, 5, 10, 15, 20],
    "batch_size": [64, 128, 256, 512, 1024],
}


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


def measure(env_id: str, device: str, turns: int, updates: int) -> dict[str, dict[str, list[float]]]:
    """For each algorithm the seconds of each turn, per update and per deterministic prediction of 1 and of 64 observations."""
    models = {name: make_model(name, env_id, device) for name in ALGORITHMS}
    learners = {name: learning_model(name, env_id, device) for name in ALGORITHMS}
    results: dict[str, dict[str, list[float]]] = {name: {figure: [] for figure in FIGURES} for name in models}
    for turn in range(-1, turns):  # the first turn warms up
        for name, model in models.items():
            single = model.observation_space.sample()
            batch = np.stack([single] * 64)
            n_updates = max(updates // 10, 2) if name == "SDAC (paper)" else updates
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


def table(results: dict[str, dict[str, list[float]]]) -> str:
    """Medians in milliseconds, and in brackets the median of the turns' ratios to SAC, as Markdown."""
    lines = ["| | " + " | ".join(FIGURES.values()) + " |", "| --- |" + " --- |" * len(FIGURES)]
    for name, figures in results.items():
        cells = []
        for key, values in figures.items():
            ratios = [value / sac for value, sac in zip(values, results["SAC"][key], strict=True)]
            if key == "learn":  # a rate, not a time
                cells.append(f"{1 / statistics.median(values):.3g} ({1 / statistics.median(ratios):.2f})")
            else:
                cells.append(f"{1e3 * statistics.median(values):.3g} ms ({statistics.median(ratios):.1f})")
        lines.append(f"| {name} | {' | '.join(cells)} |")
    return "\n".join(lines)


def sweep(env_id: str, device: str, turns: int, path: Path) -> None:
    """
    Draw how the time of an update grows, beside what its matrix products would take at a large one's rate in float32.

    :param env_id: environment whose dimensions to use
    :param device: for the networks
    :param turns: how often each point is measured; the picture shows medians
    :param path: of the picture
    """
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    left, right = th.randn(4096, 256, device=device), th.randn(256, 256, device=device)
    rate = 2 * left.numel() * 256 / min(seconds(lambda: left @ right, 20, device) for _ in range(10))
    figure, axes = plt.subplots(1, len(SWEEPS), figsize=(3.4 * len(SWEEPS), 3.2), sharey=True)
    for ax, (argument, values) in zip(axes, SWEEPS.items(), strict=True):
        times, floors = [], []
        for value in values:
            kwargs = {} if argument == "batch_size" else {argument: value}
            batch_size = value if argument == "batch_size" else 256
            model = SDAC("MlpPolicy", env_id, buffer_size=2000, seed=0, device=device, **kwargs)  # type: ignore[arg-type]
            fill(model)
            n_updates = 2 * model.policy_delay
            # Warms up, too. torch's FlopCounterMode does not survive gradients with respect to inputs of a module
            with profile(activities=[ProfilerActivity.CPU], record_shapes=True, with_flops=True) as profiler:
                model.train(n_updates, batch_size)
            flops = sum(event.flops for event in profiler.key_averages() if event.key in MATRIX_PRODUCTS)
            floors.append(flops / n_updates / rate * 1e3)
            train = partial(model.train, n_updates, batch_size)
            update = [seconds(train, 1, device) for _ in range(turns)]
            times.append(statistics.median(update) / n_updates * 1e3)
            print(f"{argument} {value}: {times[-1]:.1f} ms, arithmetic {floors[-1]:.1f} ms", flush=True)
        ax.plot(values, times, "o-", label="measured")
        ax.plot(values, floors, "s--", label=f"arithmetic at {rate / 1e9:.0f} GFLOP/s")
        ax.set(xlabel=argument, ylim=(0, None))
    axes[0].set_ylabel("ms per update")
    axes[0].legend()
    figure.tight_layout()
    figure.savefig(path, dpi=80)


def main() -> None:
    """Measure, print, save."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--env", default="HalfCheetah-v5")
    parser.add_argument("--device", default="cpu", choices=["cpu", "cuda"])
    parser.add_argument("--turns", type=int, default=5, help="how often each algorithm has its turn")
    parser.add_argument("--updates", type=int, default=20, help="updates per turn (the paper's configuration makes a tenth)")
    parser.add_argument("--sweep", action="store_true", help="how the cost of SDAC grows, as a picture")
    arguments = parser.parse_args()
    th.set_num_threads(1)
    folder = Path(__file__).parent / "results"
    folder.mkdir(exist_ok=True)
    if arguments.sweep:
        sweep(arguments.env, arguments.device, arguments.turns, folder / f"sweep_{arguments.env}_{arguments.device}.png")
        return
    results = measure(arguments.env, arguments.device, arguments.turns, arguments.updates)
    spaces = gym.make(arguments.env)
    machine = th.cuda.get_device_name() if arguments.device == "cuda" else f"{os.cpu_count()} cores, {platform.machine()}"
    setting = {
        "env": arguments.env,
        "observation_dim": spaces.observation_space.shape,
        "action_dim": spaces.action_space.shape,
        "machine": machine,
        "cpu_capability": th.backends.cpu.get_cpu_capability(),
        "threads": 1,
        "batch_size": 256,
        "versions": {"sb3_sdac": sb3_sdac.__version__}
        | {name: version(name) for name in ("stable_baselines3", "sb3_contrib", "torch", "numpy")},
        "python": platform.python_version(),
        "command": f"python benchmarks/speed.py --env {arguments.env} --device {arguments.device} --turns {arguments.turns} "
        f"--updates {arguments.updates}",
    }
    path = folder / f"speed_{arguments.env}_{arguments.device}.json"
    path.with_suffix(".md").write_text(table(results) + "\n", encoding="utf-8")
    path.write_text(json.dumps({"setting": setting, "seconds": results}, indent=1) + "\n", encoding="utf-8")
    print(table(results))


if __name__ == "__main__":
    main()
