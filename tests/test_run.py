"""Every option learns on small environments: the updates are made, everything stays finite, and the logs say so."""

import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import gymnasium as gym
import numpy as np
import pytest
import torch as th
from gymnasium import spaces
from helpers.watching import logged
from stable_baselines3 import SAC
from stable_baselines3.common.buffers import DictReplayBuffer, NStepReplayBuffer, ReplayBuffer
from stable_baselines3.common.callbacks import BaseCallback, CheckpointCallback, EvalCallback
from stable_baselines3.common.env_util import make_vec_env
from stable_baselines3.common.envs import FakeImageEnv, SimpleMultiObsEnv
from stable_baselines3.common.noise import NormalActionNoise, OrnsteinUhlenbeckActionNoise
from stable_baselines3.common.utils import LinearSchedule

from sb3_sdac import DPMD, PAPER_DPMD, PAPER_SDAC, SDAC

SMALL_POLICY: dict[str, Any] = {"net_arch": [16], "n_diffusion_steps": 5, "n_sampling_steps": 2, "n_particles": 2}
SMALL: dict[str, Any] = {
    "batch_size": 8,
    "buffer_size": 200,
    "learning_starts": 20,
    "policy_delay": 2,
    "seed": 0,
}
LOGGED = {"critic_loss", "q_value", "ent_coef", "actor_loss", "reverse_ess"}
LOGGED |= {"learning_rate", "qf_learning_rate", "n_updates"}


def make_model(env: gym.Env | str | Any = "Pendulum-v1", policy: str = "MlpPolicy", **kwargs: Any) -> SDAC:
    policy_kwargs = {**SMALL_POLICY, **kwargs.pop("policy_kwargs", {})}
    return SDAC(policy, env, policy_kwargs=policy_kwargs, **{**SMALL, "n_reverse_samples": 8, **kwargs})


def snapshot(model: SDAC) -> dict[str, th.Tensor]:
    return {name: value.clone() for name, value in model.policy.state_dict().items()}


def check_learning(model: SDAC, n_steps: int = 30, n_updates: int | None = None) -> dict[str, float]:
    """Learn, look at what was trained and logged; by default there is one update per step after the warm-up."""
    before = snapshot(model)
    model.learn(n_steps, log_interval=10_000)  # never dumped, so that all of it can be read
    assert model.num_timesteps == n_steps
    assert model._n_updates == (n_steps - model.learning_starts if n_updates is None else n_updates)
    after = snapshot(model)
    parts = ["actor.noise_predictor.rest", "critic.q_networks.rest"]
    for part in parts if model.policy.batch_norm else [*parts, "critic_target.q_networks.rest"]:
        names = [name for name in after if name.startswith(part)]
        assert names and all(not th.equal(after[name], before[name]) for name in names), part
    assert all(th.isfinite(value).all() for value in after.values())
    log = logged(model)
    expected = LOGGED | ({"reward_scale"} if model.reward_scale == "auto" else set())
    expected |= {"pessimism"} if model.policy.pessimism == "auto" else set()
    assert set(log) == expected | ({"targets_out_of_range"} if model.policy.n_bins > 1 else set())
    assert all(np.isfinite(value) for value in log.values())
    assert log["n_updates"] == model._n_updates
    most = model.batch_size if isinstance(model, DPMD) else model.n_reverse_samples
    assert 1 <= log["reverse_ess"] <= most
    assert log["ent_coef"] > 0
    return log


class DiscreteObsEnv(gym.Env):
    """Observations are numbers, which SB3 turns into one-hot vectors."""

    observation_space = spaces.Discrete(4)
    action_space = spaces.Box(-1, 1, (1,), np.float32)

    def reset(self, *, seed: int | None = None, options: dict[str, Any] | None = None) -> tuple[int, dict[str, Any]]:
        super().reset(seed=seed)
        return 0, {}

    def step(self, action: np.ndarray) -> tuple[int, float, bool, bool, dict[str, Any]]:
        state = int(self.np_random.integers(4))
        return state, float(action[0]), state == 0, False, {}


@pytest.mark.parametrize("score_matching", ["reverse_sampling", "gradient_assisted"])
@pytest.mark.parametrize("noised_actions", ["next", "current"])
@pytest.mark.parametrize("proposal", ["truncated_normal", "clipped_normal"])
def test_score_matching(score_matching: str, noised_actions: str, proposal: str) -> None:
    check_learning(make_model(score_matching=score_matching, noised_actions=noised_actions, proposal=proposal))


@pytest.mark.parametrize("critic_steps", [1, 2])
def test_mirror_descent(critic_steps: int) -> None:
    model = DPMD("MlpPolicy", "Pendulum-v1", ent_coef=1.0, critic_steps=critic_steps, policy_kwargs=SMALL_POLICY, **SMALL)
    check_learning(model)


@pytest.mark.parametrize("ent_coef, lowest, highest", [(0.3, 0.3, 0.3), ("paper", 4.9, 5), ("paper_1.5", 4.9, 5)])
def test_ent_coef_not_from_data(ent_coef: float | str, lowest: float, highest: float) -> None:
    log = check_learning(make_model(ent_coef=ent_coef))
    assert lowest - 1e-6 < log["ent_coef"] < highest + 1e-6


def test_ent_coef_from_data() -> None:
    """A start of 1000 is far from the solution for a fresh critic, and left slowly; without one, the first batch decides."""
    assert 900 > check_learning(make_model(ent_coef="auto_1000"))["ent_coef"] > 10
    cold: dict[str, Any] = {"target_ess": 0.2, "n_steps": 1, "policy_kwargs": {"beta_schedule": "linear"}}
    assert check_learning(make_model(ent_coef="auto", **cold))["ent_coef"] < 0.1


@pytest.mark.parametrize(
    "kwargs",
    [
        {"policy_kwargs": {"n_critics": 1}},
        {"policy_kwargs": {"n_critics": 3, "share_features_extractor": True}},
        {"policy_kwargs": {"optimizer_class": th.optim.AdamW, "activation_fn": th.nn.ReLU}},
        {"policy_kwargs": {"n_particles": 1}},
        {"policy_kwargs": {"n_particles": 1, "n_train_particles": 3}},
        {"policy_kwargs": {"n_particles": 3, "n_train_particles": None}},
        {"policy_kwargs": {"average_actor": True, "eta": 1.0}, "clip_target_actions": False},
        {"policy_kwargs": {"beta_schedule": "cosine", "exploration_noise": 0.0}},
        {"policy_kwargs": {"beta_schedule": "vp", "scale_noise_by_ent_coef": True}},
        {"policy_kwargs": {"n_diffusion_steps": 1, "n_sampling_steps": 1}},
        {"policy_kwargs": {"batch_norm": False}},
        {"policy_kwargs": {"pessimism": 1.0}},
        {"policy_kwargs": {"n_bins": 21}},
        {"mixed_precision": True},
        {"mixed_precision": False},
        {"target_update_interval": 2, "policy_delay": 1, "reward_scale": 1.0},
    ],
    ids=str,
)
def test_options(kwargs: dict[str, Any]) -> None:
    model = make_model(**kwargs)
    assert model.policy.n_critics == kwargs.get("policy_kwargs", {}).get("n_critics", 2)
    check_learning(model)


@pytest.mark.parametrize("batch_norm", [True, False])
def test_no_hidden_layers(batch_norm: bool) -> None:
    model = make_model(policy_kwargs={"net_arch": [], "batch_norm": batch_norm})
    before = snapshot(model)
    model.learn(30)
    for name in ("actor.noise_predictor.first.weight", "critic.q_networks.first.weight"):
        after = model.policy.state_dict()[name]
        assert th.isfinite(after).all() and not th.equal(after, before[name])


@pytest.mark.parametrize(
    "train_freq, gradient_steps, n_steps, n_updates",
    [
        (1, 2, 30, 20),
        (5, 1, 40, 4),
        ((3, "step"), -1, 30, 12),  # after steps 21, 24, 27 and 30
        ((2, "episode"), -1, 42, 28),  # after steps 28 and 42
        ((1, "episode"), 3, 28, 6),
    ],
)
def test_train_freq_and_gradient_steps(train_freq: Any, gradient_steps: int, n_steps: int, n_updates: int) -> None:
    env = gym.make("Pendulum-v1", max_episode_steps=7)
    check_learning(make_model(env, train_freq=train_freq, gradient_steps=gradient_steps), n_steps, n_updates)


def test_no_gradient_step_changes_nothing() -> None:
    model = make_model(gradient_steps=0, ent_coef="paper", policy_kwargs={"average_actor": True})
    before = snapshot(model)
    model.learn(40)
    model.train(gradient_steps=0, batch_size=8)
    after = snapshot(model)
    assert all(th.equal(after[name], before[name]) for name in before)
    assert model._n_updates == 0
    assert model.replay_buffer is not None and model.replay_buffer.pos == 40


@pytest.mark.parametrize("noise", [NormalActionNoise, OrnsteinUhlenbeckActionNoise])
def test_two_envs_with_time_limit_and_action_noise(noise: Callable[..., Any]) -> None:
    env = make_vec_env("Pendulum-v1", n_envs=2, env_kwargs={"max_episode_steps": 7})
    model = make_model(env, action_noise=noise(np.zeros(1), 0.3 * np.ones(1)), gradient_steps=-1, train_freq=2)
    check_learning(model, 40, n_updates=20)
    assert isinstance(model.replay_buffer, ReplayBuffer)
    assert model.replay_buffer.timeouts[:20].sum(axis=0).tolist() == [2, 2]  # 7 and 14 of 20 steps


@pytest.mark.parametrize(
    "kwargs",
    [
        {"env": SimpleMultiObsEnv(discrete_actions=False), "policy": "MultiInputPolicy"},
        {"optimize_memory_usage": True},
        {"replay_buffer_class": ReplayBuffer},
    ],
)
def test_n_steps_left_open_where_there_are_none(kwargs: dict[str, Any]) -> None:
    kwargs |= {"replay_buffer_kwargs": {"handle_timeout_termination": False}}
    model = make_model(**kwargs)
    check_learning(model)
    assert getattr(model.replay_buffer, "n_steps", 1) == 1 and not isinstance(model.replay_buffer, NStepReplayBuffer)


def test_an_empty_replay_buffer() -> None:
    with pytest.raises(ValueError, match=r"replay buffer is empty.*learn\(\)"):
        make_model().train(1, 8)


def test_arguments_of_the_policy_may_be_shared_with_sac() -> None:
    """Which adds one of its own."""
    policy_kwargs = {"net_arch": [16]}
    SAC("MlpPolicy", "Pendulum-v1", policy_kwargs=policy_kwargs, buffer_size=10)
    assert policy_kwargs == {"net_arch": [16], "use_sde": False}
    SDAC("MlpPolicy", "Pendulum-v1", policy_kwargs=policy_kwargs, buffer_size=10).predict(np.zeros(3))


def test_optimize_memory_usage() -> None:
    model = make_model(optimize_memory_usage=True, replay_buffer_kwargs={"handle_timeout_termination": False}, buffer_size=50)
    check_learning(model, 80)
    assert model.replay_buffer is not None and model.replay_buffer.full
    assert not hasattr(model.replay_buffer, "next_observations")


@pytest.mark.parametrize(
    "env, policy",
    [
        (FakeImageEnv(screen_height=36, screen_width=36, discrete=False), "CnnPolicy"),
        (SimpleMultiObsEnv(discrete_actions=False), "MultiInputPolicy"),
        (DiscreteObsEnv(), "MlpPolicy"),
    ],
    ids=["image", "dict", "discrete"],
)
def test_observation_spaces(env: gym.Env, policy: str) -> None:
    extractor = {"CnnPolicy": {"features_dim": 8}, "MultiInputPolicy": {"cnn_output_dim": 8}, "MlpPolicy": {}}[policy]
    model = make_model(env, policy, policy_kwargs={"features_extractor_kwargs": extractor})
    check_learning(model, 26)
    assert isinstance(model.replay_buffer, DictReplayBuffer) == (policy == "MultiInputPolicy")


def test_learning_rate_schedules() -> None:
    """Functions of the progress remaining, from 1 to 0."""
    model = make_model(learning_rate=lambda progress: 1e-3 * progress, qf_learning_rate=LinearSchedule(2e-3, 0, 1))
    log = check_learning(model, 40)
    assert log["learning_rate"] == pytest.approx(0, abs=1e-9)
    assert log["qf_learning_rate"] == pytest.approx(0, abs=1e-9)
    model._current_progress_remaining = 0.25
    model.train(1, 8)
    assert model.actor.optimizer.param_groups[0]["lr"] == pytest.approx(0.25e-3)
    assert model.critic.optimizer.param_groups[0]["lr"] == pytest.approx(0.5e-3)


def test_learning_rates() -> None:
    log = check_learning(make_model(learning_rate=1e-3))
    assert (log["learning_rate"], log["qf_learning_rate"]) == (1e-3, 1e-3)
    log = check_learning(make_model(learning_rate=1e-3, qf_learning_rate=2e-3, actor_lr_decay=(1e-4, 1, 4), policy_delay=1))
    assert log["learning_rate"] == pytest.approx(1e-4)
    assert log["qf_learning_rate"] == 2e-3


def test_progress_bar_and_stats_window(capsys: pytest.CaptureFixture[str]) -> None:
    pytest.importorskip("rich")
    tqdm = pytest.importorskip("tqdm")
    model = make_model(stats_window_size=3)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", tqdm.TqdmExperimentalWarning)
        model.learn(25, progress_bar=True)
    assert "25/25" in "".join(capsys.readouterr())
    assert model.ep_info_buffer is not None and model.ep_info_buffer.maxlen == 3


def test_tensorboard(tmp_path: Path) -> None:
    pytest.importorskip("tensorboard")
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator  # type: ignore[import-untyped]

    env = make_vec_env("Pendulum-v1", env_kwargs={"max_episode_steps": 5})
    make_model(env, tensorboard_log=str(tmp_path)).learn(40, log_interval=2)
    (folder,) = tmp_path.iterdir()
    assert folder.name == "SDAC_1"
    events = EventAccumulator(str(folder)).Reload()
    keys = events.Tags()["scalars"]
    assert {f"train/{key}" for key in LOGGED - {"n_updates"}} <= set(keys)
    assert {"rollout/ep_rew_mean", "rollout/ep_len_mean", "time/fps"} <= set(keys)
    assert [event.step for event in events.Scalars("rollout/ep_len_mean")] == [10, 20, 30, 40]


def test_callbacks(tmp_path: Path) -> None:
    eval_callback = EvalCallback(
        make_vec_env("Pendulum-v1"), eval_freq=20, n_eval_episodes=1, log_path=str(tmp_path), verbose=0
    )
    checkpoints = CheckpointCallback(save_freq=20, save_path=str(tmp_path), save_replay_buffer=True)
    make_model().learn(40, callback=[eval_callback, checkpoints])
    assert np.load(tmp_path / "evaluations.npz")["timesteps"].tolist() == [20, 40]
    assert np.isfinite(eval_callback.last_mean_reward)
    assert (tmp_path / "rl_model_20_steps.zip").is_file()
    assert (tmp_path / "rl_model_replay_buffer_40_steps.pkl").is_file()


class StopAt(BaseCallback):
    def _on_step(self) -> bool:
        return self.n_calls < 23


def test_callback_stops_learning() -> None:
    model = make_model().learn(40, callback=StopAt())
    assert (model.num_timesteps, model._n_updates) == (23, 2)


def test_learn_continued() -> None:
    model = make_model()
    check_learning(model, 30)
    model.learn(10, reset_num_timesteps=False)
    assert (model.num_timesteps, model._n_updates) == (40, 20)
    model.learn(30)
    assert (model.num_timesteps, model._n_updates) == (30, 30)  # counted anew, with a warm-up anew


@pytest.mark.parametrize("algorithm, preset", [(SDAC, PAPER_SDAC), (DPMD, PAPER_DPMD)], ids=["SDAC", "DPMD"])
def test_paper_presets(algorithm: type[SDAC], preset: dict[str, Any]) -> None:
    """As they are, but for a short warm-up and small sizes; with five environments and one update per vector step."""
    env = make_vec_env("Pendulum-v1", n_envs=5)
    policy_kwargs = {**preset["policy_kwargs"], "net_arch": [16]}
    small = {"learning_starts": 20, "buffer_size": 100, "batch_size": 8, "seed": 0, "policy_kwargs": policy_kwargs}
    model = algorithm("MlpPolicy", env, **{**preset, **small})
    model.learn(35, log_interval=10_000)
    assert model._n_updates == 3
    log = logged(model)
    assert set(log) == LOGGED
    assert all(np.isfinite(value) for value in log.values())
    assert log["ent_coef"] == pytest.approx(5, rel=0.01)
