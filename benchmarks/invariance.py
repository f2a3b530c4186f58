"""
What should not matter: the unit of the rewards, and the number of environments at equal steps and updates.

    python benchmarks/invariance.py --jobs 2                                  # one seed
    python benchmarks/invariance.py --seeds 0 1 2 3 4 --jobs 8 --device cuda

SDAC's default on one environment: with all rewards times 0.01, 1 and 100 from five environments, and from 1
and 16 environments, with 0.2 updates per environment step (3 per 16: 0.19). Evaluations of 10 deterministic episodes with the
rewards as they are, one row each in ``benchmarks/results/invariance.csv``; what is there is not run again, and
rows of another default than today's are refused.
"""

import argparse
import csv
import functools
from pathlib import Path
from typing import Any

import gymnasium as gym
import joblib
import torch as th
from run import config_hash, write_rows

RESULTS = Path(__file__).parent / "results" / "invariance.csv"
#: Of the default
CONFIG = config_hash("sdac", {})
COLUMNS = ["variant", "config", "env", "seed", "env_steps", "updates", "returns"]
#: Factor on the rewards, number of environments, and how often to update how many times
VARIANTS: dict[str, tuple[float, int, dict[str, int]]] = {
    "rewards x 1": (1.0, 5, {}),
    "rewards x 0.01": (0.01, 5, {}),
    "rewards x 100": (100.0, 5, {}),
    "1 environment": (1.0, 1, {"train_freq": 5}),
    "16 environments": (1.0, 16, {"gradient_steps": 3}),
}


def train(variant: str, env_id: str, seed: int, steps: int, eval_freq: int, device: str) -> list[dict[str, Any]]:
    """
    :param variant: one of ``VARIANTS``
    :param env_id: the environment
    :param seed: of the run
    :param steps: environment steps
    :param eval_freq: environment steps from one evaluation to the next
    :param device: for the networks
    :return: a row per evaluation
    """
    th.set_num_threads(1)
    from stable_baselines3.common.env_util import make_vec_env
    from stable_baselines3.common.evaluation import evaluate_policy

    from sb3_sdac import SDAC

    factor, n_envs, schedule = VARIANTS[variant]
    scaled = functools.partial(gym.wrappers.TransformReward, func=lambda reward: factor * float(reward))
    env = make_vec_env(env_id, n_envs, seed, wrapper_class=scaled)
    eval_env = make_vec_env(env_id, 10, 1_000_000 + seed)
    arguments: dict[str, Any] = {"learning_starts": 5000, "buffer_size": steps, "seed": seed, "device": device, **schedule}
    model = SDAC("MlpPolicy", env, **arguments)
    rows = []
    for milestone in range(eval_freq, steps + 1, eval_freq):
        model.learn(milestone - model.num_timesteps, log_interval=10_000, reset_num_timesteps=False)
        returns, _ = evaluate_policy(model, eval_env, 10, return_episode_rewards=True)
        text = " ".join(f"{value:.1f}" for value in returns)  # type: ignore[union-attr]
        values = [variant, CONFIG, env_id, seed, model.num_timesteps, model._n_updates, text]
        rows.append(dict(zip(COLUMNS, values, strict=True)))
        print(rows[-1], flush=True)
    return rows


def main() -> None:
    """Run what is missing and add its rows."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--env", default="HalfCheetah-v5")
    parser.add_argument("--seeds", nargs="+", type=int, default=[0])
    parser.add_argument("--steps", type=int, default=60_000)
    parser.add_argument("--eval-freq", type=int, default=20_000)
    parser.add_argument("--only", nargs="+", choices=list(VARIANTS), default=list(VARIANTS))
    parser.add_argument("--jobs", type=int, default=1, help="runs side by side")
    parser.add_argument("--device", default="cpu", help="cpu, or cuda to let the runs share a GPU")
    args = parser.parse_args()
    rows: list[dict[str, Any]] = []
    if RESULTS.exists():
        with RESULTS.open(newline="") as file:
            rows = list(csv.DictReader(file))
    if any(row["config"] != CONFIG for row in rows):
        raise ValueError(f"{RESULTS} holds runs of another default, not to be compared with today's: move it away")
    done = {(row["variant"], row["env"], int(row["seed"])) for row in rows if int(row["env_steps"]) >= args.steps}
    todo = [(variant, args.env, seed) for seed in args.seeds for variant in args.only if (variant, args.env, seed) not in done]
    parallel = joblib.Parallel(n_jobs=args.jobs, batch_size=1, return_as="generator_unordered")
    for new in parallel(joblib.delayed(train)(*run, args.steps, args.eval_freq, args.device) for run in todo):
        # Of a shorter one that there was
        run = [new[0][name] for name in ("variant", "env", "seed")]
        rows = [row for row in rows if [row["variant"], row["env"], int(row["seed"])] != run] + new
        write_rows(RESULTS, COLUMNS, rows)


if __name__ == "__main__":
    main()
