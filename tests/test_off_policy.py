"""Collecting, storing and loading, with SB3's buffers and wrappers: what cannot work is said at once, and nothing is lost."""

import io
import sys
import zipfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import gymnasium as gym
import numpy as np
import pytest
import torch as th
from gymnasium import spaces
from helpers.envs import UNIT_BOX, CountingEnv, FaultyEnv
from helpers.models import all_of, make_model, observations
from helpers.watching import logged
from stable_baselines3 import PPO, SAC, TD3, HerReplayBuffer
from stable_baselines3.common.buffers import ReplayBuffer
from stable_baselines3.common.env_util import make_vec_env
from stable_baselines3.common.envs import BitFlippingEnv, FakeImageEnv, SimpleMultiObsEnv
from stable_baselines3.common.noise import ActionNoise, NormalActionNoise, OrnsteinUhlenbeckActionNoise, VectorizedActionNoise
from stable_baselines3.common.torch_layers import NatureCNN
from stable_baselines3.common.vec_env import DummyVecEnv, VecFrameStack, VecNormalize, VecTransposeImage

from sb3_sdac import DPMD, SDAC
from sb3_sdac.off_policy import fit_action_noise

# Action spaces

DISCRETE = [spaces.Discrete(3), spaces.MultiDiscrete([2, 3]), spaces.MultiBinary(2), spaces.Dict({"a": UNIT_BOX})]
UNBOUNDED = [
    spaces.Box(-np.inf, np.inf, (2,), np.float32),
    spaces.Box(np.array([-1, 0], np.float32), np.array([1, np.inf], np.float32)),
    spaces.Box(np.array([-1, 1], np.float32), np.array([1, 1], np.float32)),
]


@pytest.mark.parametrize("space", DISCRETE, ids=lambda space: type(space).__name__)
def test_action_spaces_other_than_box(space: spaces.Space) -> None:
    with pytest.raises((ValueError, AssertionError), match=all_of(type(space).__name__, "Box", "support")):
        make_model(FaultyEnv(actions=space))


@pytest.mark.parametrize("space", UNBOUNDED, ids=["unbounded", "half bounded", "empty"])
def test_bounds(space: spaces.Box) -> None:
    env = FaultyEnv(actions=space)
    with pytest.raises(ValueError, match=all_of("finite bounds", space, space.low, space.high, "RescaleAction")):
        make_model(env)
    # Neither as the next environment of a model
    with pytest.raises(ValueError, match="finite bounds"):
        make_model(FaultyEnv()).set_env(env)


# Not a number


def check_saveable(model: Any, tmp_path: Path) -> None:
    """The model as it was: it can be saved, loaded, and what it has stored and learned is finite."""
    buffer = model.replay_buffer
    assert buffer is not None
    for name in ("observations", "next_observations", "actions", "rewards"):
        values = getattr(buffer, name)
        for value in values.values() if isinstance(values, dict) else [values]:
            assert np.isfinite(value[: buffer.pos]).all(), name
    model.save(tmp_path / "model.zip")
    loaded = SDAC.load(tmp_path / "model.zip")
    for name, value in loaded.policy.state_dict().items():
        assert th.equal(value, model.policy.state_dict()[name])
        assert th.isfinite(value).all()


@pytest.mark.parametrize("dict_obs", [False, True])
@pytest.mark.parametrize("value", [np.nan, np.inf, -np.inf])
@pytest.mark.parametrize(
    "fault, when, name",
    [
        ("observation", 0, "observation"),
        ("observation", 13, "observation"),
        ("observation", 15, "terminal observation"),
        ("reward", 4, "reward"),
        ("reward", 13, "reward"),
    ],
)
def test_not_finite_during_learning(fault: str, when: int, name: str, value: float, dict_obs: bool, tmp_path: Path) -> None:
    env = FaultyEnv(fault, when, value, dict_obs)
    model = make_model(env, "MultiInputPolicy" if dict_obs else "MlpPolicy")
    key = " 'bad'" if dict_obs and fault == "observation" else ""
    with pytest.raises(ValueError, match=rf"The {name}{key} at environment step {when} is not finite: .*{value}"):
        model.learn(40)
    # Nothing of that step
    assert model.replay_buffer is not None and model.replay_buffer.pos == max(when - 1, 0)
    check_saveable(model, tmp_path)
    if when > 0:  # the fault is past, so learning can go on
        model.learn(20)


def test_second_environment_is_checked_too() -> None:
    env = DummyVecEnv([FaultyEnv, lambda: FaultyEnv("reward", 7)])
    with pytest.raises(ValueError, match=all_of("reward at environment step 14", "[ 1. nan]")):
        make_model(env).learn(40)


@pytest.mark.parametrize("fault", ["observation", "reward"])
@pytest.mark.parametrize("value", [np.nan, np.inf])
@pytest.mark.parametrize("training", [True, False])
@pytest.mark.filterwarnings("ignore:invalid value encountered:RuntimeWarning")  # in the wrapper's statistics
def test_not_finite_behind_vec_normalize(fault: str, value: float, training: bool, tmp_path: Path) -> None:
    """Also where the wrapper clips infinity to something finite."""
    env = VecNormalize(DummyVecEnv([lambda: FaultyEnv(fault, 13, value)]))
    env.training = training
    model = make_model(env)
    with pytest.raises(ValueError, match=f"{fault} at environment step 13 is not finite"):
        model.learn(40)
    check_saveable(model, tmp_path)


def test_broken_network(tmp_path: Path) -> None:
    """A weight that is not a number shows in the first action after the warm-up."""
    model = make_model(FaultyEnv()).learn(12)
    for parameter in model.actor.noise_predictor.rest.parameters():
        th.nn.init.constant_(parameter, np.nan)
    with pytest.raises(
        ValueError, match=r"The policy's action at environment step 12 is not finite: .*nan.*Learning has diverged"
    ):
        model.learn(10, reset_num_timesteps=False)
    model.save(tmp_path / "model.zip")
    loaded = SDAC.load(tmp_path / "model.zip")
    assert all(th.isnan(parameter).all() for parameter in loaded.actor.noise_predictor.rest.parameters())


def test_broken_action_noise(tmp_path: Path) -> None:
    model = make_model(FaultyEnv(), action_noise=NormalActionNoise(np.zeros(2), np.array([0.1, np.nan])))
    with pytest.raises(
        ValueError, match=r"The policy's action at environment step 0 is not finite: .*nan.*that of action_noise"
    ):
        model.learn(10)
    check_saveable(model, tmp_path)


# Damaged files, and those of others


@pytest.mark.parametrize("algorithm", [SAC, TD3, PPO])
def test_file_of_another_algorithm(algorithm: Any, tmp_path: Path) -> None:
    kwargs = {"n_steps": 8, "batch_size": 8} if algorithm is PPO else {"buffer_size": 10}
    model = algorithm("MlpPolicy", "Pendulum-v1", policy_kwargs={"net_arch": [4]}, **kwargs)
    model.save(tmp_path / "other.zip")
    name = type(model.policy).__name__
    for env in (None, gym.make("Pendulum-v1")):
        with pytest.raises(ValueError, match=all_of(name, "another algorithm", "DiffusionPolicy")):
            SDAC.load(tmp_path / "other.zip", env=env)


def rewrite(path: Path, change: Callable[[str, bytes], bytes | None]) -> None:
    """Replace each member of a zip file, or drop it."""
    with zipfile.ZipFile(path) as archive:
        members = {name: change(name, archive.read(name)) for name in archive.namelist()}
    with zipfile.ZipFile(path, "w") as archive:
        for name, content in members.items():
            if content is not None:
                archive.writestr(name, content)


DAMAGES: dict[str, Callable[[str, bytes], bytes | None]] = {
    "policy is garbage": lambda name, content: b"garbage" if name == "policy.pth" else content,
    "policy is empty": lambda name, content: b"" if name == "policy.pth" else content,
    "policy is cut": lambda name, content: content[: len(content) // 2] if name == "policy.pth" else content,
    "policy is missing": lambda name, content: None if name == "policy.pth" else content,
    "optimizer is missing": lambda name, content: None if name == "actor.optimizer.pth" else content,
    "variables are garbage": lambda name, content: b"garbage" if name == "pytorch_variables.pth" else content,
    "data is garbage": lambda name, content: b"garbage" if name == "data" else content,
    "data is binary": lambda name, content: bytes(range(256)) if name == "data" else content,
    "data is cut": lambda name, content: content[: len(content) // 2] if name == "data" else content,
    "data is empty": lambda name, content: b"{}" if name == "data" else content,
    "data is missing": lambda name, content: None if name == "data" else content,
    "everything is missing": lambda name, content: None,
}


@pytest.mark.parametrize("damage", DAMAGES)
def test_garbage_inside_a_zip(damage: str, tmp_path: Path) -> None:
    make_model().learn(14).save(tmp_path / "model.zip")
    rewrite(tmp_path / "model.zip", lambda name, content: content)
    SDAC.load(tmp_path / "model.zip")  # rewriting alone does no harm
    rewrite(tmp_path / "model.zip", DAMAGES[damage])
    with pytest.raises(ValueError, match=all_of("model.zip", "damaged")):
        SDAC.load(tmp_path / "model.zip")


@pytest.mark.parametrize("share", [0.0, 0.01, 0.5, 0.99])
def test_truncated_zip(share: float, tmp_path: Path) -> None:
    stream = io.BytesIO()
    make_model().save(stream)
    content = stream.getvalue()
    path = tmp_path / "model.zip"
    path.write_bytes(content[: int(share * len(content))])
    with pytest.raises(ValueError, match=r"(?s)(?=.*model\.zip).*(damaged|zip-file)"):
        SDAC.load(path)


def test_flipped_bytes(tmp_path: Path) -> None:
    """The checksums notice."""
    path = tmp_path / "model.zip"
    make_model().save(path)
    content = bytearray(path.read_bytes())
    middle = len(content) // 2
    content[middle : middle + 50] = bytes(byte ^ 255 for byte in content[middle : middle + 50])
    path.write_bytes(content)
    with pytest.raises(ValueError, match=all_of("model.zip")):
        SDAC.load(path)


def test_missing_file(tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError, match="nowhere"):
        SDAC.load(tmp_path / "nowhere.zip")


@pytest.mark.parametrize("what", ["Observation", "Action"])
def test_other_spaces(what: str, tmp_path: Path) -> None:
    model = make_model()
    model.save(tmp_path / "model.zip")
    other: gym.Env = FaultyEnv(actions=model.action_space) if what == "Observation" else FaultyEnv()
    if what == "Action":
        assert isinstance(model.observation_space, spaces.Box)
        other.observation_space = model.observation_space
    words = (f"{what} spaces do not match", getattr(model, f"{what.lower()}_space"), getattr(other, f"{what.lower()}_space"))
    with pytest.raises(ValueError, match=all_of(*words)):
        SDAC.load(tmp_path / "model.zip", env=other)
    with pytest.raises(ValueError, match=all_of(*words)):
        model.set_env(other)


def test_other_architecture(tmp_path: Path) -> None:
    make_model().save(tmp_path / "model.zip")
    with pytest.raises(ValueError, match=all_of("policy kwargs", "[16]", "[12]")):
        SDAC.load(tmp_path / "model.zip", policy_kwargs={"net_arch": [12]})
    # The file's own word for it, but other networks inside
    make_model(policy_kwargs={"net_arch": [12]}).save(tmp_path / "other.zip")
    with zipfile.ZipFile(tmp_path / "other.zip") as archive:
        policy = archive.read("policy.pth")
    rewrite(tmp_path / "model.zip", lambda name, content: policy if name == "policy.pth" else content)
    with pytest.raises(ValueError, match=all_of("model.zip", "architecture", "12", "16")):
        SDAC.load(tmp_path / "model.zip")


@pytest.mark.parametrize(
    "kwargs", [{"policy_kwargs": {"net_arch": [12]}}, {"policy_kwargs": {"average_actor": True}}], ids=str
)
def test_parameters_of_another_architecture(kwargs: dict[str, Any], tmp_path: Path) -> None:
    make_model(**kwargs).save(tmp_path / "other.zip")
    with pytest.raises((ValueError, RuntimeError), match=r"(?i)size mismatch|unexpected key|do not match"):
        make_model().set_parameters(str(tmp_path / "other.zip"))


@pytest.mark.parametrize("box", [spaces.Box(0, 10, (2,), np.uint8), spaces.Box(-3.4e38, 3.4e38, (1,), np.float32)], ids=str)
def test_boxes_that_cannot_be_scaled(box: spaces.Box) -> None:
    """Integers would truncate the actions in the buffer, and the width of the other is infinite."""
    with pytest.raises(ValueError, match=all_of("floating-point", "finite", box)):
        SDAC("MlpPolicy", FaultyEnv(actions=box))


def test_her_without_its_environment(tmp_path: Path) -> None:
    env = BitFlippingEnv(n_bits=4, continuous=True)
    model = SDAC(
        "MultiInputPolicy", env, replay_buffer_class=HerReplayBuffer, buffer_size=100, policy_kwargs={"net_arch": [4]}
    )
    model.save(tmp_path / "model.zip")
    with pytest.raises(ValueError, match=all_of("HerReplayBuffer", "env=")):
        SDAC.load(tmp_path / "model.zip")
    assert SDAC.load(tmp_path / "model.zip", env=env).replay_buffer is not None


# The order of calls


def transitions(model: Any, count: int = 20) -> Any:
    """The model with a replay buffer that was filled by hand."""
    for i in range(count):
        obs = np.full((1, 3), i, np.float32)
        model.replay_buffer.add(obs, obs + 1, np.zeros((1, 1), np.float32), np.ones(1), np.zeros(1), [{}])
    return model


@pytest.mark.parametrize("algorithm", [SDAC, DPMD])
def test_training_without_learning(algorithm: type[SDAC], tmp_path: Path) -> None:
    """Offline, on transitions from elsewhere: with an empty buffer an error, else updates, and a log."""
    model = make_model(algorithm=algorithm)
    for each in (model, make_model(algorithm=algorithm, learning_starts=0)):
        with pytest.raises(ValueError, match=r"replay buffer is empty.*learn"):
            each.train(1)
    transitions(model).train(3, batch_size=4)
    assert model._n_updates == 3 and model.num_timesteps == 0
    assert logged(model)["n_updates"] == 3
    model.save(tmp_path / "model.zip")
    model.save_replay_buffer(tmp_path / "buffer.pkl")
    loaded = algorithm.load(tmp_path / "model.zip")
    with pytest.raises(ValueError, match=r"replay buffer is empty.*learn"):  # there is none
        loaded.train(1)
    loaded.load_replay_buffer(tmp_path / "buffer.pkl")
    loaded.train(2, batch_size=4)
    assert loaded._n_updates == 5
    assert model.learn(14)._n_updates == 7


def test_learn_has_its_own_log_after_training_by_hand(tmp_path: Path) -> None:
    """The logger that train() made for want of one is no logger of the user's, which learn() would keep."""
    model = transitions(make_model(tensorboard_log=str(tmp_path)))
    model.train(1)
    model.learn(12, tb_log_name="other")
    assert (tmp_path / "other_1").is_dir()
    own = model.logger
    model.set_logger(own)
    model.train(1)
    assert model.learn(12, tb_log_name="third").logger is own and not (tmp_path / "third_1").exists()


def test_log_before_learning(capsys: pytest.CaptureFixture[str]) -> None:
    model = make_model(verbose=1)
    model.dump_logs()
    assert "total_timesteps" in capsys.readouterr().out
    model.learn(12).dump_logs()


def test_save_before_learning(tmp_path: Path) -> None:
    model = make_model()
    model.save(tmp_path / "model.zip")
    loaded = SDAC.load(tmp_path / "model.zip", env=model.get_env())
    expected, found = (each.predict(observations(), deterministic=True)[0] for each in (model, loaded))
    np.testing.assert_array_equal(found, expected)
    assert loaded.learn(12)._n_updates == 2


@pytest.mark.parametrize("learned", [False, True])
def test_learning_needs_an_environment(learned: bool, tmp_path: Path) -> None:
    model = make_model().learn(12 if learned else 0)
    model.save(tmp_path / "model.zip")
    loaded = SDAC.load(tmp_path / "model.zip")
    for reset in (True, False):
        with pytest.raises(ValueError, match=all_of("no environment", "set_env", "env=env")):
            loaded.learn(12, reset_num_timesteps=reset)
    assert loaded.num_timesteps == model.num_timesteps
    loaded.set_env(make_vec_env("Pendulum-v1"))
    loaded.learn(14, reset_num_timesteps=False)
    assert loaded.num_timesteps == model.num_timesteps + 14 and loaded._n_updates > model._n_updates


def test_learning_by_instalments() -> None:
    model = make_model()
    for total in (0, 1, 12, 5):
        model.learn(total, reset_num_timesteps=False)
    assert model.num_timesteps == 18 and model._n_updates == 8


def test_n_steps_beside_a_buffer_of_ones_own() -> None:
    with pytest.warns(UserWarning, match=all_of("n_steps=3", "replay_buffer_class", "replay_buffer_kwargs", "'n_steps': 3")):
        make_model(n_steps=3, replay_buffer_class=ReplayBuffer)
    make_model(n_steps=1, replay_buffer_class=ReplayBuffer)
    make_model(replay_buffer_class=ReplayBuffer)


# TD targets


def td_targets(
    model: Any, indices: list[int], next_q: float, monkeypatch: pytest.MonkeyPatch
) -> tuple[list[float], list[float]]:
    """
    Where the critic is drawn to at some transitions, and the observations at which the target critics were asked.

    A critic of zeros has the squared target for its loss.
    """
    asked = []

    def target_q_values(encoded: th.Tensor, actions: th.Tensor) -> th.Tensor:
        return th.full((1, *actions.shape[:-1]), next_q)

    def target_encode(obs: th.Tensor) -> th.Tensor:
        asked.append(obs[0, 0].item())
        return obs

    buffer = model.replay_buffer
    assert buffer is not None
    monkeypatch.setattr(model.critic_target, "q_values", target_q_values)
    monkeypatch.setattr(model.critic_target, "encode", target_encode)
    targets = []
    for index in indices:
        for parameter in model.critic.parameters():
            th.nn.init.zeros_(parameter)
        monkeypatch.setattr(buffer, "sample", lambda n, env, i=index: buffer._get_samples(np.full(n, i), env))
        model.train(gradient_steps=1, batch_size=4)
        targets.append(logged(model)["critic_loss"] ** 0.5)
    return targets, asked


def model_of_counting(length: int, terminates: bool, **kwargs: Any) -> Any:
    kwargs = {"gamma": 0.9, "reward_scale": 0.5, "gradient_steps": 0, "learning_starts": 0, "n_steps": 1, **kwargs}
    policy_kwargs = {"n_critics": 1, "batch_norm": False, "n_bins": 1}
    return make_model(CountingEnv(length, terminates), policy_kwargs=policy_kwargs, **kwargs).learn(12)


@pytest.mark.parametrize("terminates", [True, False], ids=["termination", "timeout"])
def test_timeout_is_not_a_terminal_state(terminates: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    """Episodes of 4 steps: the last one is bootstrapped from its terminal observation unless it terminates."""
    model = model_of_counting(4, terminates)
    targets, asked = td_targets(model, [2, 3, 4], 10.0, monkeypatch)
    bootstrapped = 0.5 + 0.9 * 10
    np.testing.assert_allclose(targets, [bootstrapped, 0.5 if terminates else bootstrapped, bootstrapped], rtol=1e-6)
    assert asked == [3, 4, 1]


def test_without_timeout_handling_it_is(monkeypatch: pytest.MonkeyPatch) -> None:
    model = model_of_counting(4, False, replay_buffer_kwargs={"handle_timeout_termination": False})
    np.testing.assert_allclose(td_targets(model, [3], 10.0, monkeypatch)[0], [0.5], rtol=1e-6)


@pytest.mark.parametrize("terminates", [True, False], ids=["termination", "timeout"])
def test_n_step_returns(terminates: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    """Episodes of 5 steps, 3-step returns: fewer steps are summed, and the discount is that of as many, near the end."""
    model = model_of_counting(5, terminates, n_steps=3)
    targets, asked = td_targets(model, [0, 2, 3, 4, 5], 10.0, monkeypatch)
    expected = []
    for count in (0, 2, 3, 4, 0):
        n_steps = min(3, 5 - count)
        rewards = sum(0.9**i for i in range(n_steps))
        ends = terminates and count + n_steps == 5
        expected.append(0.5 * rewards + (0 if ends else 0.9**n_steps * 10))
    np.testing.assert_allclose(targets, expected, rtol=1e-6)
    assert asked == [3, 5, 5, 5, 3]


# Hindsight experience replay


@pytest.mark.parametrize("image", [False, True])
def test_her(image: bool) -> None:
    env = make_vec_env(lambda: BitFlippingEnv(n_bits=4, continuous=True, image_obs_space=image), 2)
    model = make_model(
        env,
        "MultiInputPolicy",
        replay_buffer_class=HerReplayBuffer,
        replay_buffer_kwargs={"n_sampled_goal": 4, "goal_selection_strategy": "future"},
        policy_kwargs={"features_extractor_kwargs": {"cnn_output_dim": 8}},
    )
    model.learn(60)
    assert model._n_updates > 0
    assert isinstance(model.replay_buffer, HerReplayBuffer)
    batch = model.replay_buffer.sample(200)
    assert isinstance(batch.observations, dict)
    assert set(batch.observations) == {"observation", "achieved_goal", "desired_goal"}
    observation = env.reset()
    assert isinstance(observation, dict)
    # The environment's goal is always the same; others come from hindsight, and some of them were reached
    relabelled = (batch.observations["desired_goal"] != th.as_tensor(observation["desired_goal"][0])).flatten(1).any(dim=1)
    assert 0 < relabelled.sum() < 200
    assert set(batch.rewards[relabelled].flatten().tolist()) == {-1.0, 0.0}
    assert model.predict(observation)[0].shape == (2, 4)


# Normalisation


@pytest.mark.parametrize("dict_obs", [False, True])
def test_vec_normalize(dict_obs: bool) -> None:
    """Stored as they came, also those that ended an episode; normalised with the statistics of the day when sampled."""
    if dict_obs:
        venv = make_vec_env(
            lambda: gym.wrappers.TimeLimit(SimpleMultiObsEnv(discrete_actions=False, channel_last=False), 8), 2
        )
        env = VecNormalize(venv, norm_obs_keys=["vec"])
    else:
        env = VecNormalize(make_vec_env("Pendulum-v1", 2, env_kwargs={"max_episode_steps": 8}))
    model = make_model(env, "MultiInputPolicy" if dict_obs else "MlpPolicy")
    model.learn(60)
    assert model._n_updates > 0 and model._vec_normalize_env is env
    buffer = model.replay_buffer
    assert buffer is not None and buffer.dones.any()
    for kind in ("observations", "next_observations"):
        if dict_obs:
            stored = getattr(buffer, kind)["vec"][: buffer.pos]
            assert -1e-6 <= stored.min() < stored.max() <= 1 + 1e-6
        else:  # cosine and sine of an angle
            circle = np.square(getattr(buffer, kind)[: buffer.pos, :, :2]).sum(axis=-1)
            np.testing.assert_allclose(circle, 1, rtol=1e-5)

    np.random.seed(0)
    raw = buffer.sample(64)
    np.random.seed(0)
    sampled = buffer.sample(64, env=env)
    np.testing.assert_allclose(sampled.rewards, env.normalize_reward(raw.rewards.numpy()), rtol=1e-6)
    assert not np.allclose(sampled.rewards, raw.rewards)
    for kind in ("observations", "next_observations"):
        plain, normalised = getattr(raw, kind), getattr(sampled, kind)
        if dict_obs:
            assert th.equal(normalised["img"], plain["img"])
            plain, normalised = plain["vec"], normalised["vec"]
        rms = env.obs_rms["vec"] if isinstance(env.obs_rms, dict) else env.obs_rms
        np.testing.assert_allclose(normalised, (plain.numpy() - rms.mean) / np.sqrt(rms.var + 1e-8), rtol=1e-4, atol=1e-5)
        assert not np.allclose(normalised, plain)


@pytest.mark.parametrize("kwargs", [{"n_steps": 1}, {"n_steps": 2}, {"replay_recency": 1.0, "n_steps": 1}])
def test_train_samples_normalised(kwargs: dict[str, Any], monkeypatch: pytest.MonkeyPatch) -> None:
    """What an update is given are rows of the buffer, by the statistics of now."""
    env = VecNormalize(make_vec_env("Pendulum-v1"))
    model = make_model(env, **kwargs).learn(25)
    batches: list[Any] = []
    monkeypatch.setattr(model, "_run_update", lambda batch, *args: batches.append(batch) or {})  # type: ignore[func-returns-value]
    model.train(gradient_steps=2, batch_size=8)
    buffer = model.replay_buffer
    assert isinstance(buffer, ReplayBuffer) and len(batches) == 2
    for name in ("observations", "next_observations", "rewards"):
        stored = getattr(buffer, name)[:25].reshape(25, -1)
        rows: Any = env.normalize_reward(stored) if name == "rewards" else env.normalize_obs(stored)
        assert not np.allclose(rows, stored)
        for row in getattr(batches[0], name).numpy():
            if name != "rewards" or model.n_steps == 1:  # else they are sums
                assert np.isclose(rows, row, atol=1e-5).all(axis=1).any()


# Images


@pytest.mark.parametrize("channel_first", [False, True])
def test_stacked_images(channel_first: bool) -> None:
    kwargs = {"screen_height": 40, "screen_width": 36, "discrete": False, "channel_first": channel_first}
    env = VecFrameStack(make_vec_env(FakeImageEnv, 2, env_kwargs=kwargs), n_stack=3)
    policy_kwargs = {"features_extractor_kwargs": {"features_dim": 8}, "batch_norm": False}
    model = make_model(env, "CnnPolicy", policy_kwargs=policy_kwargs)
    assert model.critic_target is not None
    assert isinstance(model.get_env(), VecFrameStack if channel_first else VecTransposeImage)
    model.learn(26)
    assert model._n_updates == 8
    assert isinstance(model.actor.features_extractor, NatureCNN)
    assert isinstance(model.replay_buffer, ReplayBuffer)
    assert model.replay_buffer.observations.shape == (50, 2, 3, 40, 36)
    assert model.replay_buffer.observations.dtype == np.uint8
    # Without the wrapper that moves the channels, predict does it
    observation = env.reset()
    assert isinstance(observation, np.ndarray)
    assert model.predict(observation)[0].shape == (2, 5)


def test_every_extractor_of_images_learns() -> None:
    """The actor's and, with one of their own, the critics'; the targets' follows."""
    env = DummyVecEnv([lambda: FakeImageEnv(screen_height=36, screen_width=36, discrete=False)])
    policy_kwargs = {"features_extractor_kwargs": {"features_dim": 8}, "batch_norm": False}
    model = make_model(env, "CnnPolicy", policy_kwargs=policy_kwargs)
    assert model.critic_target is not None
    parts = [model.actor.features_extractor, model.critic.features_extractor, model.critic_target.features_extractor]
    before = [[parameter.clone() for parameter in part.parameters()] for part in parts]
    model.learn(24)
    for old, part in zip(before, parts, strict=True):
        assert isinstance(part, NatureCNN)
        assert not any(th.equal(*pair) for pair in zip(old, part.parameters(), strict=True))


class HandsOn(SDAC):
    """A subclass that names no argument."""

    def __init__(self, *args: Any, **kwargs: Any):
        super().__init__(*args, **kwargs)


@pytest.mark.parametrize("algorithm", [HandsOn, DPMD])
def test_subclass_is_loaded_with_arguments_of_sdac(algorithm: type[SDAC], tmp_path: Path) -> None:
    algorithm("MlpPolicy", "Pendulum-v1", buffer_size=50, policy_kwargs={"net_arch": [8]}).save(tmp_path / "model.zip")
    assert algorithm.load(tmp_path / "model.zip", seed=3, tau=0.1).tau == 0.1
    with pytest.raises(TypeError, match="n_particels"):
        algorithm.load(tmp_path / "model.zip", n_particels=4)


def test_log_without_tensorboard(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Said when the log is to be opened, so that a model that was trained with one can act without."""
    model = make_model(tensorboard_log=str(tmp_path))
    monkeypatch.setitem(sys.modules, "tensorboard", None)
    model.save(tmp_path / "model.zip")
    model = SDAC.load(tmp_path / "model.zip", env=model.get_env())
    with pytest.raises(ModuleNotFoundError, match=r'tensorboard_log needs tensorboard, .*pip install "sb3_sdac\[plots\]"'):
        model.learn(5)
    model.tensorboard_log = None
    assert model.learn(5).num_timesteps == 5


BOX = spaces.Box(-1, 1, (2,), np.float32)


def normal(sigma: float = 0.1, size: int = 2) -> NormalActionNoise:
    return NormalActionNoise(np.zeros(size), np.full(size, sigma))


class Labelled(VectorizedActionNoise):
    """With a constructor of its own."""

    def __init__(self, label: str) -> None:
        super().__init__(normal(), 3)
        self.label = label


@pytest.mark.parametrize("noise", [None, normal(), OrnsteinUhlenbeckActionNoise(np.zeros(2), np.ones(2))], ids=repr)
@pytest.mark.parametrize("n_envs", [1, 4])
def test_single_noise_is_left_to_sb3(noise: ActionNoise | None, n_envs: int) -> None:
    assert fit_action_noise(noise, n_envs, BOX) is noise


@pytest.mark.parametrize("base", [normal(), OrnsteinUhlenbeckActionNoise(np.zeros(2), np.ones(2))], ids=repr)
@pytest.mark.parametrize("before", [1, 3, 5])
@pytest.mark.parametrize("after", [1, 3, 5])
def test_other_number(base: ActionNoise, before: int, after: int) -> None:
    noise = VectorizedActionNoise(base, before)
    fitted: Any = fit_action_noise(noise, after, BOX)
    assert fitted().shape == (after, 2)
    assert (fitted is noise) == (before == after)
    assert len({id(single) for single in fitted.noises}) == after
    assert len(noise.noises) == before  # as it was
    fitted.reset(indices=[after - 1])


def test_one_noise_per_environment() -> None:
    noise = VectorizedActionNoise(normal(), 3)
    noise.noises = [normal(sigma) for sigma in (0.1, 0.2, 0.3)]
    for n_envs, sigmas in ((1, [0.1]), (2, [0.1, 0.2]), (5, [0.1, 0.2, 0.3, 0.1, 0.2])):
        fitted: Any = fit_action_noise(noise, n_envs, BOX)
        assert [single._sigma[0] for single in fitted.noises] == sigmas


@pytest.mark.parametrize("n_envs", [1, 2, 3])
def test_nested(n_envs: int) -> None:
    nested = VectorizedActionNoise(VectorizedActionNoise(VectorizedActionNoise(normal(), 4), 3), 2)
    fitted: Any = fit_action_noise(nested, n_envs, BOX)
    assert fitted().shape == (n_envs, 2)
    assert isinstance(fitted.base_noise, NormalActionNoise)


def test_subclass() -> None:
    fitted: Any = fit_action_noise(Labelled("mine"), 5, BOX)
    assert type(fitted) is Labelled and fitted.label == "mine" and fitted().shape == (5, 2)


@pytest.mark.parametrize("size, space", [(3, BOX), (2, spaces.Box(-1, 1, (1,))), (2, spaces.Box(-1, 1, (2, 3)))], ids=str)
@pytest.mark.parametrize("n_envs", [None, 2])
def test_other_shape(size: int, space: spaces.Box, n_envs: int | None) -> None:
    noise = normal(size=size) if n_envs is None else VectorizedActionNoise(normal(size=size), n_envs)
    with pytest.raises(ValueError, match=rf"noise of shape \({size},\), but an action has the shape \({space.shape[0]},"):
        fit_action_noise(noise, 2, space)


def test_noise_that_is_broadcast() -> None:
    noise = normal(size=1)
    assert fit_action_noise(noise, 1, BOX) is noise
    assert fit_action_noise(noise, 1, spaces.Box(-1, 1, (2, 3))) is noise


def test_random_numbers_are_left_alone() -> None:
    np.random.seed(0)
    expected = np.random.random()
    np.random.seed(0)
    fit_action_noise(VectorizedActionNoise(normal(), 3), 2, BOX)
    assert np.random.random() == expected


@pytest.mark.parametrize("before, after", [(3, 5), (3, 1), (1, 3)])
def test_saved_with_another_number_of_environments(before: int, after: int, tmp_path: Path) -> None:
    kwargs: dict[str, Any] = {"buffer_size": 200, "learning_starts": 10, "batch_size": 8, "policy_kwargs": {"net_arch": [8]}}
    model = SDAC("MlpPolicy", make_vec_env("Pendulum-v1", before), action_noise=normal(size=1), **kwargs)
    model.learn(18).save(tmp_path / "model.zip")
    model = SDAC.load(tmp_path / "model.zip", env=make_vec_env("Pendulum-v1", after))
    model.action_noise = fit_action_noise(model.action_noise, after, model.action_space)  # type: ignore[arg-type]
    model.learn(15)
    assert model.action_noise is not None and np.shape(model.action_noise())[-1] == 1
