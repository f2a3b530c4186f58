"""From observations to actions: the box, what ``deterministic`` means, best of N, exploration, and saving a policy."""

import inspect
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch as th
from gymnasium import spaces
from helpers.models import TINY_POLICY, make_model, observations
from stable_baselines3.common.env_util import make_vec_env
from stable_baselines3.common.envs import FakeImageEnv
from stable_baselines3.common.policies import BaseModel
from stable_baselines3.common.torch_layers import BaseFeaturesExtractor, CombinedExtractor, FlattenExtractor, NatureCNN
from stable_baselines3.common.utils import ConstantSchedule
from torch import nn

from sb3_sdac import CnnPolicy, DiffusionPolicy, MultiInputPolicy
from sb3_sdac.layers import EnsembleLinear, Mish
from sb3_sdac.policies import Actor, Critic

OBSERVATIONS = spaces.Box(-1, 1, (3,), np.float32)
ACTIONS = spaces.Box(-1, 1, (2,), np.float32)
BOXES: dict[str, spaces.Box] = {
    "asymmetric": spaces.Box(np.array([-3.0, 0.1], np.float32), np.array([-1.0, 100.3], np.float32)),
    "matrix": spaces.Box(-0.3, 0.7, (2, 3), np.float32),
    "float64": spaces.Box(np.array([-1 / 3, 1e-9]), np.array([2 / 3, 1e9]), dtype=np.float64),
}


def make_policy(
    action_space: spaces.Box = ACTIONS,
    policy_class: type[DiffusionPolicy] = DiffusionPolicy,
    observation_space: spaces.Space = OBSERVATIONS,
    **kwargs: Any,
) -> DiffusionPolicy:
    th.manual_seed(0)
    return policy_class(observation_space, action_space, ConstantSchedule(1e-3), **{**TINY_POLICY, **kwargs})


def head(actor: Actor) -> nn.Linear:
    layer = actor.noise_predictor.rest[-1]
    assert isinstance(layer, nn.Linear)
    return layer


def blank_policy(**kwargs: Any) -> DiffusionPolicy:
    """A noise predictor of zero only scales x_T up: the action is nearly 0 if x_T is."""
    policy = make_policy(**kwargs)
    nn.init.zeros_(head(policy.actor).weight)
    return policy


class NoisyExtractor(BaseFeaturesExtractor):
    """Batch normalisation and dropout: changes whenever it is wrongly used in training mode."""

    def __init__(self, observation_space: spaces.Box, features_dim: int = 8):
        super().__init__(observation_space, features_dim)
        self.net = nn.Sequential(
            nn.Flatten(), nn.Linear(observation_space.shape[0], features_dim), nn.BatchNorm1d(features_dim), nn.Dropout(0.5)
        )

    def forward(self, obs: th.Tensor) -> th.Tensor:
        return self.net(obs)


# Shapes and the box


@pytest.mark.parametrize("box", BOXES)
@pytest.mark.parametrize("deterministic", [True, False])
def test_actions_lie_in_the_box(box: str, deterministic: bool) -> None:
    space = BOXES[box]
    policy = make_policy(space, exploration_noise=3.0, init_noise_scale=3.0)
    nn.init.normal_(head(policy.actor).weight, std=100)  # to reach the faces
    actions, state = policy.predict(observations(500), deterministic=deterministic)
    assert state is None
    assert actions.shape == (500, *space.shape)
    assert actions.dtype == space.dtype
    assert (actions >= space.low).all() and (actions <= space.high).all()
    # All of the box is in reach: here both faces, exactly
    assert (actions == space.low).any() and (actions == space.high).any()
    single, _ = policy.predict(observations(1)[0], deterministic=deterministic)
    assert single.shape == space.shape
    assert space.contains(single)


@pytest.mark.parametrize("box", BOXES)
def test_scaling_inverts_and_never_leaves_the_box(box: str) -> None:
    space = BOXES[box]
    policy = make_policy(space)
    faces = np.array([space.low, space.high])
    np.testing.assert_array_equal(policy.unscale_action(np.stack([np.full(space.shape, x) for x in (-1, 1)])), faces)
    actions = np.array([space.sample() for _ in range(100)])
    scaled = policy.scale_action(np.concatenate([faces, actions]))
    assert np.abs(scaled).max() <= 1
    spread = float((space.high - space.low).max())
    np.testing.assert_allclose(policy.unscale_action(scaled[2:]), actions, rtol=1e-6, atol=1e-6 * spread)


def test_predict_in_a_vec_env() -> None:
    env = make_vec_env("Pendulum-v1", n_envs=3)
    model = make_model(env)
    obs = env.reset()
    assert isinstance(obs, np.ndarray)
    actions, _ = model.predict(obs)
    assert actions.shape == (3, 1)
    _, rewards, _, _ = env.step(actions)
    assert rewards.shape == (3,)


# Deterministic means: a function of the observation alone


@pytest.mark.parametrize("eta", [0.0, 1.0])
@pytest.mark.parametrize("n_particles", [1, 4])
def test_deterministic_depends_on_the_observation_alone(eta: float, n_particles: int) -> None:
    # From a larger x_T the actions of a fresh policy lie at a face of the box, whatever the observation
    policy = make_policy(eta=eta, n_particles=n_particles, beta_schedule="linear", init_noise_scale=0.1)
    obs = observations(33)
    batch, _ = policy.predict(obs, deterministic=True)
    again, _ = policy.predict(obs, deterministic=True)
    np.testing.assert_array_equal(again, batch)
    singles = np.stack([policy.predict(row, deterministic=True)[0] for row in obs])
    np.testing.assert_allclose(singles, batch, rtol=1e-5, atol=1e-6)
    backwards, _ = policy.predict(obs[::-1].copy(), deterministic=True)
    np.testing.assert_allclose(backwards[::-1], batch, rtol=1e-5, atol=1e-6)
    assert np.ptp(batch, axis=0).min() > 1e-3, "it must depend on the observation"


@pytest.mark.parametrize("eta", [0.0, 1.0])
def test_deterministic_draws_no_random_number(eta: float) -> None:
    policy = make_policy(eta=eta)
    before, np_before = th.get_rng_state(), np.random.get_state(legacy=False)["state"]["key"]
    policy.predict(observations(), deterministic=True)
    assert th.equal(th.get_rng_state(), before)
    np.testing.assert_array_equal(np.random.get_state(legacy=False)["state"]["key"], np_before)
    policy.predict(observations(), deterministic=False)
    assert not th.equal(th.get_rng_state(), before)


@pytest.mark.parametrize("kwargs", [{"exploration_noise": 0.0}, {"init_noise_scale": 1e-9}], ids=["x_T", "exploration"])
def test_stochastic_varies(kwargs: dict[str, float]) -> None:
    """Between calls and between equal rows, through x_T alone and through the exploration noise alone."""
    policy = blank_policy(n_particles=1, **{"init_noise_scale": 0.01, **kwargs})
    obs = np.repeat(observations(1), 5, axis=0)
    first, _ = policy.predict(obs)
    second, _ = policy.predict(obs)
    assert len(np.unique(np.concatenate([first, second]), axis=0)) == 10


# Observations that are not numbers, and none at all

IMAGE = spaces.Box(0, 255, (3, 36, 36), np.uint8)
KINDS: dict[str, tuple[type[DiffusionPolicy], spaces.Space]] = {
    "box": (DiffusionPolicy, OBSERVATIONS),
    "matrix": (DiffusionPolicy, spaces.Box(-1, 1, (2, 3), np.float32)),
    "one number": (DiffusionPolicy, spaces.Box(-1, 1, (1,), np.float64)),
    "image": (CnnPolicy, IMAGE),
    "discrete": (DiffusionPolicy, spaces.Discrete(5)),
    "several": (DiffusionPolicy, spaces.MultiDiscrete([3, 4])),
    "bits": (DiffusionPolicy, spaces.MultiBinary(3)),
    "dict": (
        MultiInputPolicy,
        spaces.Dict({"good": OBSERVATIONS, "bad": OBSERVATIONS, "image": IMAGE, "one": spaces.Discrete(3)}),
    ),
}


def batch_of(space: spaces.Space, size: int) -> Any:
    """Observations as a vectorised environment gives them."""
    if isinstance(space, spaces.Dict):
        return {key: batch_of(part, size) for key, part in space.items()}
    sample = np.asarray(space.sample())
    return np.stack([sample] * size) if size else np.zeros((0, *sample.shape), sample.dtype)


def actors_of(policy: DiffusionPolicy) -> list[Any]:
    """All that has ``predict``."""
    return [policy, policy.actor] + ([] if policy.actor_target is None else [policy.actor_target])


@pytest.mark.parametrize("deterministic", [True, False])
@pytest.mark.parametrize("value", [np.nan, np.inf, -np.inf])
@pytest.mark.parametrize("dtype", [np.float16, np.float32, np.float64])
def test_observations_that_are_not_numbers(dtype: Any, value: float, deterministic: bool) -> None:
    """In one of a batch, which is named, in a single one, in lists, and in the model, the policy and the actor alone."""
    model = make_model(policy_kwargs={"average_actor": True})
    obs = observations(5).astype(dtype)
    obs[3, 1] = obs[1, 0] = value
    for acting in [model, *actors_of(model.policy)]:
        with pytest.raises(ValueError, match=rf"The observation \(number 1, 3 of 5\) given to predict.*not finite: .*{value}"):
            acting.predict(obs, deterministic=deterministic)
        for single in (obs[3], obs[3:4]):
            with pytest.raises(ValueError, match=rf"The observation given to predict\(\) is not finite: .*{value}.*Mend"):
                acting.predict(single, deterministic=deterministic)
        acting.predict(obs[[0, 2, 4]], deterministic=deterministic)


@pytest.mark.parametrize("value", [np.nan, np.inf])
def test_dict_observations_that_are_not_numbers(value: float) -> None:
    policy_class, space = KINDS["dict"]
    policy = make_policy(policy_class=policy_class, observation_space=space)
    obs = batch_of(space, 4)
    obs["bad"][2, 0] = value
    for acting in actors_of(policy):
        with pytest.raises(ValueError, match=rf"The observation 'bad' \(number 2 of 4\) given to predict.*{value}"):
            acting.predict(obs)
        with pytest.raises(ValueError, match=rf"The observation 'bad' given to predict.*{value}"):
            acting.predict({key: part[2] for key, part in obs.items()})
    obs["bad"][2, 0] = 0
    assert policy.predict(obs)[0].shape == (4, 2)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("size", [None, 1, 3], ids=["single", "one", "three"])
def test_all_kinds_of_observations_pass(kind: str, size: int | None) -> None:
    """Bytes, counts and single numbers are never taken for what they are not."""
    policy_class, space = KINDS[kind]
    policy = make_policy(policy_class=policy_class, observation_space=space)
    obs: Any = space.sample() if size is None else batch_of(space, size)
    for acting in actors_of(policy):
        for deterministic in (True, False):
            actions, _ = acting.predict(obs, deterministic=deterministic)
            assert actions.shape == ((2,) if size is None else (size, 2))


def test_result_of_reset_given_as_observation() -> None:
    """SB3 says what is wrong, not NumPy."""
    for acting in (model := make_model(), model.policy, model.actor):
        with pytest.raises(ValueError, match=r"tuple.*Gym"):
            acting.predict((observations(1)[0], {}))


@pytest.mark.parametrize("box", BOXES)
@pytest.mark.parametrize("kind", KINDS)
def test_empty_batches(kind: str, box: str) -> None:
    """As many actions as observations, also if these are none: when no environment is left to act in."""
    policy_class, space = KINDS[kind]
    cases: list[dict[str, Any]] = [
        {},
        {"n_particles": 1},
        {"n_train_particles": 3, "batch_norm": False, "average_actor": True},
    ]
    for kwargs in cases:
        policy = make_policy(BOXES[box], policy_class, space, **kwargs)
        for acting in actors_of(policy):
            for deterministic in (True, False):
                actions, state = acting.predict(batch_of(space, 0), deterministic=deterministic)
                assert actions.shape == (0, *BOXES[box].shape) and actions.dtype == BOXES[box].dtype and state is None


@pytest.mark.parametrize(
    "kwargs", [{"eta": 1.0}, {"n_bins": 1}, {"share_features_extractor": True}, {"n_critics": 1}], ids=str
)
def test_empty_batches_of_other_policies(kwargs: dict[str, Any]) -> None:
    model = make_model(policy_kwargs=kwargs)
    for deterministic in (True, False):
        assert model.predict(np.zeros((0, 3), "f"), deterministic=deterministic)[0].shape == (0, 1)


# Best of N


@pytest.mark.parametrize("pessimism", [0.0, 0.4, 1.0])
@pytest.mark.parametrize("deterministic", [True, False])
def test_best_of_n_has_the_highest_q(deterministic: bool, pessimism: float, monkeypatch: pytest.MonkeyPatch) -> None:
    policy = make_policy(n_particles=5, n_train_particles=4, n_critics=3, exploration_noise=0.0, pessimism=pessimism)
    drawn = []
    original = policy.actor.sample

    def sample(*args: Any) -> th.Tensor:
        drawn.append(original(*args))
        return drawn[-1]

    monkeypatch.setattr(policy.actor, "sample", sample)
    obs = th.as_tensor(observations(50))
    with th.no_grad():
        actions = policy(obs, deterministic=deterministic)
        (particles,) = drawn
        assert particles.shape == (50, 5 if deterministic else 4, 2)
        # One by one through SB3's interface, a tuple of (B, 1) per critic
        of_each_critic = [th.cat(policy.critic(obs, action), dim=1) for action in (actions, *particles.unbind(1))]
        chosen, *each = (q.mean(dim=1) + pessimism * (q.amin(dim=1) - q.mean(dim=1)) for q in of_each_critic)
    th.testing.assert_close(chosen, th.stack(each).amax(dim=0), rtol=1e-5, atol=1e-6)
    assert (actions.unsqueeze(1) == particles).all(dim=2).any(dim=1).all()
    assert len(th.stack(each).argmax(dim=0).unique()) > 1


@pytest.mark.parametrize("deterministic", [True, False])
def test_one_particle_needs_no_critic(deterministic: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    def called(*_: Any) -> th.Tensor:
        raise RuntimeError("the critic was called")

    monkeypatch.setattr(Critic, "encode", called)
    one, several = make_policy(n_particles=1, n_train_particles=2), make_policy(n_particles=2, n_train_particles=1)
    if not deterministic:
        one, several = several, one
    one.predict(observations(), deterministic=deterministic)
    with pytest.raises(RuntimeError, match="the critic was called"):
        several.predict(observations(), deterministic=deterministic)


def test_actor_forward_is_one_particle() -> None:
    policy = make_policy(n_particles=4)
    obs = th.as_tensor(observations())
    with th.no_grad():
        alone = make_policy(n_particles=1)(obs, deterministic=True)
        th.testing.assert_close(policy.actor(obs, deterministic=True), alone)
        assert not th.equal(policy.actor(obs), policy.actor(obs))


# Exploration


@pytest.mark.parametrize("scaled", [False, True])
def test_exploration_noise_has_its_standard_deviation(scaled: bool) -> None:
    policy = blank_policy(exploration_noise=0.1, scale_noise_by_ent_coef=scaled, init_noise_scale=1e-9)
    policy.log_ent_coef.data.fill_(np.log(1.5))
    expected, n_samples = 0.15 if scaled else 0.1, 20_000
    actions, _ = policy.predict(np.zeros((n_samples // 2, 3), np.float32))
    # Standard errors of mean and standard deviation of n normal samples; the box is more than six deviations away
    assert abs(actions.mean()) < 4 * expected / n_samples**0.5
    assert abs(actions.std() - expected) < 4 * expected / (2 * n_samples) ** 0.5
    deterministic, _ = policy.predict(np.zeros((2, 3), np.float32), deterministic=True)
    assert np.abs(deterministic).max() < 1e-6


def test_explore_is_not_clipped_but_actions_are() -> None:
    policy = make_policy(exploration_noise=10.0)
    assert policy.explore(th.zeros(100, 2)).abs().max() > 10
    with th.no_grad():
        assert policy(th.as_tensor(observations(100))).abs().max() == 1


def test_averaged_actor_is_the_one_that_acts() -> None:
    policy = make_policy(average_actor=True)
    assert policy.actor_target is not None
    before, _ = policy.predict(observations(), deterministic=True)
    np.testing.assert_array_equal(make_policy(average_actor=False).predict(observations(), deterministic=True)[0], before)
    for actor, changes in [(policy.actor, False), (policy.actor_target, True)]:
        nn.init.normal_(head(actor).weight)
        after, _ = policy.predict(observations(), deterministic=True)
        assert np.array_equal(after, before) != changes
    assert make_policy(average_actor=False).actor_target is None


# Training and evaluation mode


def test_set_training_mode_leaves_targets_in_evaluation() -> None:
    policy = make_policy(average_actor=True, batch_norm=False)
    assert policy.actor_target is not None and policy.critic_target is not None
    for mode, change in ((True, policy.set_training_mode), (False, policy.train), (True, policy.train)):
        change(mode)
        assert policy.actor.training == policy.critic.training == policy.training == mode
        networks = {*policy.actor_target.modules(), *policy.critic_target.modules()} - {*policy.actor.sampler.modules()}
        assert not any(module.training for module in networks)  # the sampler is shared, and has no mode
    policy.predict(observations())
    assert not policy.actor.training and not policy.critic.training


def running_means(module: nn.Module) -> list[th.Tensor]:
    return [value.clone() for name, value in module.state_dict().items() if name.endswith("running_mean")]


@pytest.mark.parametrize("share", [False, True])
def test_dropout_and_batch_norm(share: bool) -> None:
    """Acting neither uses nor changes the statistics of training; training does, and the targets get them."""
    policy_kwargs = {"features_extractor_class": NoisyExtractor, "share_features_extractor": share}
    policy_kwargs |= {"average_actor": True, "batch_norm": False}
    model = make_model(learning_starts=20, gradient_steps=0, policy_kwargs=policy_kwargs)
    initial = {name: value.clone() for name, value in model.policy.state_dict().items()}
    first, _ = model.predict(observations(), deterministic=True)
    model.learn(30)  # 10 steps with actions of the policy, no update
    for name, value in model.policy.state_dict().items():
        assert th.equal(value, initial[name]), name
    np.testing.assert_array_equal(model.predict(observations(), deterministic=True)[0], first)

    model.train(gradient_steps=2, batch_size=8)
    assert model.actor_target is not None and model.critic_target is not None
    for net, target in [(model.actor, model.actor_target), (model.critic, model.critic_target)]:
        (mean,), (target_mean,) = running_means(net), running_means(target)
        assert mean.abs().max() > 0
        assert th.equal(mean, target_mean), "statistics are copied, not averaged"
    second, _ = model.predict(observations(), deterministic=True)
    np.testing.assert_array_equal(model.predict(observations(), deterministic=True)[0], second)


# Saving

#: Something other than the default for every argument of the constructor
OTHER_THAN_DEFAULT: dict[str, Any] = {
    "net_arch": {"pi": [16, 8], "qf": [12]},
    "activation_fn": nn.Tanh,
    "features_extractor_class": NoisyExtractor,
    "features_extractor_kwargs": {"features_dim": 6},
    "normalize_images": False,
    "optimizer_class": th.optim.AdamW,
    "optimizer_kwargs": {"weight_decay": 0.1},
    "n_critics": 3,
    "share_features_extractor": True,
    "n_diffusion_steps": 7,
    "n_sampling_steps": 3,
    "eta": 0.5,
    "init_noise_scale": 0.7,
    "beta_schedule": "cosine",
    "n_particles": 3,
    "n_train_particles": 2,
    "exploration_noise": 0.2,
    "scale_noise_by_ent_coef": True,
    "average_actor": True,
    "batch_norm": False,
    "n_bins": 11,
    "max_value": 30.0,
    "pessimism": 0.25,
}


def arguments(cls: type[BaseModel]) -> set[str]:
    return set(inspect.signature(cls.__init__).parameters) - {"self"}


@pytest.mark.parametrize("share", [True, False])
def test_policy_saves_and_loads_every_argument(share: bool, tmp_path: Path) -> None:
    kwargs = {**OTHER_THAN_DEFAULT, "share_features_extractor": share}
    required = {"observation_space", "action_space", "lr_schedule"}
    assert set(kwargs) == arguments(DiffusionPolicy) - required, "give the new argument a value other than its default here"
    for name, parameter in inspect.signature(DiffusionPolicy).parameters.items():
        assert name in required or OTHER_THAN_DEFAULT[name] != parameter.default, name

    policy = make_policy(**kwargs)
    assert set(policy._get_constructor_parameters()) == arguments(DiffusionPolicy)
    policy.log_ent_coef.data.fill_(-1.3)
    nn.init.constant_(head(policy.actor).bias, 0.2)
    policy.save(str(tmp_path / "policy.pth"))
    loaded = DiffusionPolicy.load(str(tmp_path / "policy.pth"))
    for name in arguments(DiffusionPolicy) - {"lr_schedule"}:
        assert getattr(loaded, name) == getattr(policy, name), name
    assert (loaded.critic.features_extractor is loaded.actor.features_extractor) == share
    for name, value in policy.state_dict().items():
        assert th.equal(loaded.state_dict()[name], value), name
    for deterministic in (True, False):
        actions = []
        for each in (policy, loaded):
            th.manual_seed(1)
            actions.append(each.predict(observations(), deterministic=deterministic)[0])
        np.testing.assert_array_equal(actions[0], actions[1])


@pytest.mark.parametrize("cls", [Actor, Critic])
def test_constructor_parameters_are_complete(cls: type[BaseModel]) -> None:
    policy = make_policy(**OTHER_THAN_DEFAULT)
    model = policy.actor if cls is Actor else policy.critic
    parameters = model._get_constructor_parameters()
    assert set(parameters) == arguments(cls)
    given = {**OTHER_THAN_DEFAULT, "net_arch": OTHER_THAN_DEFAULT["net_arch"]["pi" if cls is Actor else "qf"]}
    for name in arguments(cls) & set(given):
        assert parameters[name] == given[name], name


def test_actor_alone_saves_loads_and_predicts(tmp_path: Path) -> None:
    actor = make_policy(n_particles=3, eta=0.5).actor
    actor.save(str(tmp_path / "actor.pth"))
    loaded = Actor.load(str(tmp_path / "actor.pth"))
    expected, _ = actor.predict(observations(), deterministic=True)
    np.testing.assert_array_equal(loaded.predict(observations(), deterministic=True)[0], expected)
    assert loaded.predict(observations()[0])[0].shape == (2,)
    assert loaded.sampler.n_particles == 3


# Networks and optimizers


def widths(module: nn.Module) -> list[int]:
    """Sizes of the biases, which are the widths of the layers."""
    return [value.shape[-1] for name, value in module.state_dict().items() if name.endswith("bias") and "time" not in name]


@pytest.mark.parametrize(
    "net_arch, actor, critic",
    [
        ({"pi": [16, 8], "qf": [12]}, [16, 8, 2], [12, 7]),
        ([6, 5], [6, 5, 2], [6, 5, 7]),
        (None, [256] * 3 + [2], [256] * 3 + [7]),
    ],
)
def test_net_arch(net_arch: Any, actor: list[int], critic: list[int]) -> None:
    policy = make_policy(net_arch=net_arch, batch_norm=False, n_bins=7)
    assert policy.critic_target is not None
    assert widths(policy.actor) == actor
    assert widths(policy.critic) == widths(policy.critic_target) == critic


@pytest.mark.parametrize("share", [False, True])
def test_optimizers(share: bool) -> None:
    policy = make_policy(
        optimizer_class=th.optim.SGD,
        optimizer_kwargs={"momentum": 0.7},
        features_extractor_class=NoisyExtractor,
        share_features_extractor=share,
        batch_norm=False,
    )
    assert policy.critic_target is not None
    stepped = []
    for model in (policy.actor, policy.critic):
        assert isinstance(model.optimizer, th.optim.SGD)
        (group,) = model.optimizer.param_groups
        assert (group["momentum"], group["lr"]) == (0.7, 1e-3)
        stepped.append({id(parameter) for parameter in group["params"]})
    # Every parameter has one optimizer; the shared extractor goes with the actor
    assert not stepped[0] & stepped[1]
    assert stepped[0] == {id(parameter) for parameter in policy.actor.parameters()}
    assert stepped[0] | stepped[1] == {id(p) for model in (policy.actor, policy.critic) for p in model.parameters()}
    assert (policy.critic.features_extractor is policy.actor.features_extractor) == share
    assert policy.critic_target.features_extractor is not policy.critic.features_extractor


@pytest.mark.parametrize(
    "kwargs, fused",
    [
        ({}, True),
        ({"optimizer_kwargs": {"betas": (0.7, 0.99), "eps": 1e-6}}, True),
        ({"optimizer_kwargs": {"fused": False}}, False),
        ({"optimizer_kwargs": {"foreach": True}}, None),
        ({"optimizer_class": th.optim.AdamW}, None),
    ],
    ids=["default", "other arguments", "not fused", "foreach", "AdamW"],
)
def test_adam_is_fused(kwargs: dict[str, Any], fused: bool | None) -> None:
    """Unless the user says otherwise; what the user gave is what is saved."""
    policy = make_policy(**kwargs)
    for model in (policy.actor, policy.critic):
        (group,) = model.optimizer.param_groups
        assert group["fused"] is fused
        assert all(group[name] == value for name, value in kwargs.get("optimizer_kwargs", {}).items())
    assert policy.optimizer_kwargs == kwargs.get("optimizer_kwargs", {})


@pytest.mark.parametrize(("batch_norm", "beta"), [(True, 0.5), (False, 0.9)])
def test_first_beta_of_adam(batch_norm: bool, beta: float) -> None:
    """CrossQ's with normalised critics, and PyTorch's, which is the paper's, without."""
    policy = make_policy(batch_norm=batch_norm)
    assert [group["betas"] for model in (policy.actor, policy.critic) for group in model.optimizer.param_groups] == [
        (beta, 0.999)
    ] * 2


def test_fused_adam_takes_the_same_steps() -> None:
    """As the one that is not fused, from the same gradients, to rounding."""
    weights = []
    for fused in (True, False):
        policy = make_policy(optimizer_kwargs={"fused": fused})
        for _ in range(3):
            policy.actor.optimizer.zero_grad()
            policy.actor.encode(th.as_tensor(observations())).square().mean().backward()
            policy.actor.optimizer.step()
        weights.append(policy.actor.noise_predictor.first.weight.detach())
    th.testing.assert_close(weights[0], weights[1], rtol=1e-4, atol=1e-6)


# Activations


def activations(policy: DiffusionPolicy) -> list[nn.Module]:
    nets = [policy.actor.noise_predictor.time_mlp, policy.actor.noise_predictor.rest, policy.critic.q_networks.rest]
    return [module for net in nets for module in net if not isinstance(module, (nn.Linear, EnsembleLinear))]


@pytest.mark.parametrize("given, used", [(None, nn.SiLU), (nn.Mish, Mish), (Mish, Mish), (nn.Tanh, nn.Tanh)])
def test_activation(given: type[nn.Module] | None, used: type[nn.Module], tmp_path: Path) -> None:
    """SiLU by default; ours in the place of ``nn.Mish``, of which the policy's arguments and its file know nothing."""
    kwargs: dict[str, Any] = {} if given is None else {"activation_fn": given}
    policy = make_policy(**kwargs)
    assert len(activations(policy)) == 3 and all(type(module) is used for module in activations(policy))
    assert policy.activation_fn is (given or nn.SiLU)
    policy.save(str(tmp_path / "policy.pth"))
    loaded = DiffusionPolicy.load(str(tmp_path / "policy.pth"))
    assert loaded.activation_fn is (given or nn.SiLU) and type(activations(loaded)[0]) is used


@pytest.mark.parametrize(
    "policy_class, space, extractor",
    [
        (DiffusionPolicy, OBSERVATIONS, FlattenExtractor),
        (CnnPolicy, spaces.Box(0, 255, (1, 36, 36), np.uint8), NatureCNN),
        (MultiInputPolicy, spaces.Dict({"a": OBSERVATIONS, "b": spaces.Discrete(3)}), CombinedExtractor),
    ],
)
def test_default_features_extractor(policy_class: type[DiffusionPolicy], space: spaces.Space, extractor: type) -> None:
    policy = make_policy(policy_class=policy_class, observation_space=space, batch_norm=False)
    assert policy.critic_target is not None
    for model in (policy.actor, policy.critic, policy.critic_target):
        assert type(model.features_extractor) is extractor
    observation: Any = space.sample()
    assert policy.predict(observation)[0].shape == (2,)
    custom = make_policy(policy_class=policy_class, features_extractor_class=NoisyExtractor)
    assert isinstance(custom.actor.features_extractor, NoisyExtractor)


def test_images_are_normalised_on_demand() -> None:
    env = FakeImageEnv(screen_height=36, screen_width=36, discrete=False, channel_first=True)
    image = env.observation_space.sample()
    for normalise in (True, False):
        actor = make_policy(policy_class=CnnPolicy, observation_space=env.observation_space, normalize_images=normalise).actor
        actor.set_training_mode(False)
        with th.no_grad():
            obs = th.as_tensor(image[None])
            expected = actor.noise_predictor.encode(actor.features_extractor(obs.float() / (255 if normalise else 1)))
            th.testing.assert_close(actor.encode(obs), expected)


def test_shared_extractor_learns_from_the_actor_only() -> None:
    for share in (True, False):
        policy = make_policy(features_extractor_class=NoisyExtractor, share_features_extractor=share)
        obs, actions = th.as_tensor(observations()), th.zeros(7, 2)
        th.cat(policy.critic(obs, actions)).sum().backward()
        gradients = [parameter.grad is not None for parameter in policy.critic.features_extractor.parameters()]
        assert gradients == [not share] * len(gradients)
        policy.actor.encode(obs).sum().backward()
        assert all(parameter.grad is not None for parameter in policy.actor.features_extractor.parameters())
