"""Train on Pendulum-v1, save, load, evaluate. Takes a minute or two on a laptop; expect about -150 +/- 80."""

import gymnasium as gym
from stable_baselines3.common.evaluation import evaluate_policy
from stable_baselines3.common.monitor import Monitor

from sb3_sdac import SDAC

env = Monitor(gym.make("Pendulum-v1"))
model = SDAC("MlpPolicy", env, learning_starts=500, policy_kwargs={"net_arch": [64, 64]})
model.learn(7_000, progress_bar=True)
model.save("sdac_pendulum")

model = SDAC.load("sdac_pendulum", env=env)
mean_return, std_return = evaluate_policy(model, env, n_eval_episodes=10)
print(f"{mean_return:.0f} +/- {std_return:.0f}")
