"""
What an update and a prediction cost: SDAC's default and the paper's configuration beside SAC, TQC and CrossQ.

    python benchmarks/speed.py --env HalfCheetah-v5

All algorithms have 3x256 networks (CrossQ its own, too) and take turns in one process on one thread, so that whatever
else the machine does meets them alike; the table holds medians, and ratios to SAC of the same turn.
Writes ``benchmarks/results/speed_<env>_<device>.json``.
"""

import argparse
import json
import os
import platform
import statistics
import time
from collections.abc import Callable
from importlib.metadata import version
from pathlib import Path
from typing import Any

import gymnasium as gym
import numpy as np
import torch as th
from sb3_contrib import TQC, CrossQ
from stable_baselines3 import SAC
from stable_baselines3.common.logger import configure
from stable_baselines3.common.off_policy_algorithm import OffPolicyAlgorithm

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


def make_model(name: str, env_id: str, device: str) -> OffPolicyAlgorithm:
    """A model with a replay buffer full of plausible numbers."""
    model = ALGORITHMS[name](env_id, buffer_size=2000, seed=0, device=device)
    model.set_logger(configure(None, []))
    rng = np.random.default_rng(0)
    assert model.replay_buffer is not None and model.observation_space.shape is not None
    for _ in range(model.replay_buffer.buffer_size):
        obs, next_obs = rng.standard_normal((2, 1, *model.observation_space.shape))
        action = rng.uniform(-1, 1, (1, *(model.action_space.shape or ())))
        model.replay_buffer.add(obs, next_obs, action, rng.standard_normal(1), np.zeros(1), [{}])
    return model


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
    results: dict[str, dict[str, list[float]]] = {name: {"update": [], "predict_1": [], "predict_64": []} for name in models}
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
            if turn >= 0:
                for key, value in figures.items():
                    results[name][key].append(value)
    return results


def table(results: dict[str, dict[str, list[float]]]) -> str:
    """Medians in milliseconds, and in brackets the median of the turns' ratios to SAC, as Markdown."""
    lines = ["| | update | `predict`, 1 observation | `predict`, 64 observations |", "| --- | --- | --- | --- |"]
    for name, figures in results.items():
        cells = []
        for key, values in figures.items():
            ratio = statistics.median(value / sac for value, sac in zip(values, results["SAC"][key], strict=True))
            cells.append(f"{1e3 * statistics.median(values):.3g} ms ({ratio:.1f})")
        lines.append(f"| {name} | {' | '.join(cells)} |")
    return "\n".join(lines)


def main() -> None:
    """Measure, print, save."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--env", default="HalfCheetah-v5")
    parser.add_argument("--device", default="cpu", choices=["cpu", "cuda"])
    parser.add_argument("--turns", type=int, default=5, help="how often each algorithm has its turn")
    parser.add_argument("--updates", type=int, default=20, help="updates per turn (the paper's configuration makes a tenth)")
    arguments = parser.parse_args()
    th.set_num_threads(1)
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
        "versions": {name: version(name) for name in ("sb3_sdac", "stable_baselines3", "sb3_contrib", "torch", "numpy")},
        "python": platform.python_version(),
        "command": f"python benchmarks/speed.py --env {arguments.env} --device {arguments.device} --turns {arguments.turns} "
        f"--updates {arguments.updates}",
    }
    path = Path(__file__).parent / "results" / f"speed_{arguments.env}_{arguments.device}.json"
    path.parent.mkdir(exist_ok=True)
    path.write_text(json.dumps({"setting": setting, "seconds": results}, indent=1) + "\n", encoding="utf-8")
    print(table(results))


if __name__ == "__main__":
    main()
