"""
Array by array against the authors' JAX implementation (``data/official_sdac.npz``, computed in float32).

Every comparison allows float32 rounding only: a relative or absolute error of 1e-3 anywhere fails. The parts are those that
``SDAC(**PAPER_SDAC)`` trains with, in float32 where a processor would choose bfloat16.
"""

import inspect
from pathlib import Path
from typing import Any

import gymnasium as gym
import numpy as np
import pytest
import torch as th
from gymnasium import spaces
from stable_baselines3.common.type_aliases import ReplayBufferSamples
from torch import nn

from sb3_sdac import DPMD, PAPER_DPMD, PAPER_SDAC, SDAC, DiffusionPolicy
from sb3_sdac import score_matching as sm
from sb3_sdac.diffusion import GaussianDiffusion, cosine_betas, linear_betas
from sb3_sdac.dpmd import mirror_descent_weights
from sb3_sdac.layers import EnsembleLinear, Mish
from sb3_sdac.networks import NoisePredictor
from sb3_sdac.official import Layers, set_critics, set_noise_predictor
from sb3_sdac.temperature import Temperature

ARRAYS = np.load(Path(__file__).parent / "data" / "official_sdac.npz")
OBS_DIM, ACTION_DIM, WIDTH, BATCH, N, K, T = ARRAYS["meta/obs_dim_act_dim_hidden_B_P_K_T"].tolist()
ALPHA = float(ARRAYS["critic/alpha"])


def array(name: str) -> th.Tensor:
    """A reference array as a tensor; integers as int64."""
    value = th.as_tensor(ARRAYS[name])
    return value.long() if not value.is_floating_point() else value


def assert_matches(found: th.Tensor | np.ndarray, name: str, atol: float = 2e-6, rtol: float = 2e-5) -> None:
    np.testing.assert_allclose(np.asarray(found), ARRAYS[name], atol=atol, rtol=rtol, err_msg=name)


def noise_predictor_layers(net: NoisePredictor) -> list[nn.Linear]:
    """Linear layers in the order of the reference: time embedding, then trunk."""
    return [module for module in [*net.time_mlp, net.first, *net.rest] if isinstance(module, nn.Linear)]


def layer_name(index: int) -> str:
    return "linear" if index == 0 else f"linear_{index}"


def official_layers(prefix: str) -> Layers:
    """A network's arrays, as a checkpoint of the authors has them."""
    count = sum(name.startswith(f"{prefix}/linear") and name.endswith("/w") for name in ARRAYS)
    names = [f"{prefix}/{layer_name(index)}" for index in range(count)]
    return [(ARRAYS[f"{name}/w"], ARRAYS[f"{name}/b"]) for name in names]


class ReferenceEnv(gym.Env[np.ndarray, np.ndarray]):
    """Only its spaces matter: those of the reference arrays."""

    observation_space = spaces.Box(-np.inf, np.inf, (OBS_DIM,))
    action_space = spaces.Box(-1, 1, (ACTION_DIM,))


def make_model(algorithm: type[SDAC], preset: dict[str, Any]) -> Any:
    policy_kwargs = {**preset["policy_kwargs"], "net_arch": [WIDTH] * 3, "n_particles": N}
    arguments = {**preset, "policy_kwargs": policy_kwargs, "buffer_size": 10, "mixed_precision": False}
    if "n_reverse_samples" in preset:
        arguments["n_reverse_samples"] = K
    model = algorithm("MlpPolicy", ReferenceEnv(), **arguments)
    set_noise_predictor(model.actor.noise_predictor, official_layers("actor/dacer_policy_net"))
    set_critics(model.critic.q_networks, [official_layers("q1/q_net"), official_layers("q2/q_net")])
    assert model.critic_target is not None
    targets = [official_layers("target_q1/q_net"), official_layers("target_q2/q_net")]
    set_critics(model.critic_target.q_networks, targets)
    model.policy.log_ent_coef.data.fill_(np.log(ALPHA))
    return model


@pytest.fixture
def model() -> Any:
    return make_model(SDAC, PAPER_SDAC)


@pytest.mark.parametrize(("name", "betas"), [("linear", linear_betas(T)), ("cosine", cosine_betas(T))])
def test_schedule(name: str, betas: th.Tensor) -> None:
    diffusion = GaussianDiffusion(betas, eta=1.0)
    # From the cleanest to the noisiest step, as the sampler takes them
    _, coef_x_0, coef_x_t, std = th.tensor(diffusion._sampling_plan, dtype=th.float64).flip(0).T
    # The schedules are float64 in the reference, and so are betas and the sampler's coefficients here
    assert_matches(betas, f"schedule/{name}/betas", atol=0, rtol=1e-12)
    assert_matches(th.cumprod(1 - betas, 0), f"schedule/{name}/alphas_cumprod", atol=0, rtol=1e-12)
    assert_matches(diffusion.sqrt_alphas_cumprod.square(), f"schedule/{name}/alphas_cumprod", atol=0, rtol=1e-6)
    assert_matches(std.square(), f"schedule/{name}/posterior_variance", atol=0, rtol=1e-6)
    assert_matches(coef_x_0, f"schedule/{name}/posterior_mean_coef1", atol=0, rtol=1e-6)
    assert_matches(coef_x_t, f"schedule/{name}/posterior_mean_coef2", atol=0, rtol=1e-6)


@th.no_grad()
def test_networks(model: Any) -> None:
    predicted = model.actor.predict_noise(model.actor.encode(array("obs")), array("net/x_t"), array("net/t").unsqueeze(1))
    assert_matches(predicted, "net/noise_pred")
    q_values = model.critic.q_values(model.critic.encode(array("obs")), array("actions"))
    assert_matches(q_values[0], "net/q1")
    assert_matches(q_values[1], "net/q2")


@th.no_grad()
def test_sampling_and_best_of_n(model: Any) -> None:
    # Reference (N, B, A) and (T, N, B, A) -> ours (B, N, A) and (T, B, N, A)
    x_T, step_noise = array("sample/x_T").transpose(0, 1), array("sample/step_noise").transpose(1, 2)
    particles = model.actor.sample(model.actor.encode(array("next_obs")), x_T, step_noise)
    # Rounding grows along 20 steps of up to 1 / sqrt(abar_19) = 1e3 each; clipping keeps it in bounds
    assert_matches(particles.transpose(0, 1), "sample/particles", atol=2e-5)
    encoded = model.critic.encode(array("next_obs"))
    assert_matches(model.policy.q(encoded, particles).T, "sample/particle_q", atol=2e-5)
    assert (model.policy.q(encoded, particles).argmax(1) == array("sample/best_index")).all()
    assert_matches(model.policy.best_of(lambda: encoded, particles), "sample/best_action", atol=2e-5)


class Draws:
    """Stands in for torch's random numbers: hands out the reference's noise in the order in which an update draws it."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch):
        self.queue: list[th.Tensor] = []
        for name in ("randn", "randn_like", "randint"):
            monkeypatch.setattr(th, name, self.draw)
        monkeypatch.setitem(sm.PROPOSALS, "clipped_normal", (sm.clipped_normal_candidates, self.draw))

    def draw(self, *args: object, **kwargs: object) -> th.Tensor:
        return self.queue.pop(0)


def replay_data() -> ReplayBufferSamples:
    columns = [array("obs"), array("actions"), array("next_obs"), array("dones"), array("rewards")]
    observations, actions, next_observations, dones, rewards = columns
    return ReplayBufferSamples(observations, actions, next_observations, dones.unsqueeze(1), rewards.unsqueeze(1), None)


def test_td_target_and_critic_losses(model: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    """The next actions as the update draws them, and the critic loss that is logged, for two critics together."""
    draws = Draws(monkeypatch)
    x_T, step_noise = array("sample/x_T").transpose(0, 1), array("sample/step_noise").transpose(1, 2)
    queue = [x_T / model.policy.init_noise_scale, step_noise, array("critic/exploration_noise")]
    draws.queue = list(queue)
    options, data = model.update_options(), replay_data()
    next_actions = model.update.draw_actions(model.actor.encode(array("next_obs")), array("next_obs"), options)
    assert_matches(next_actions, "critic/next_actions", atol=2e-5)
    assert next_actions.abs().max() > 1  # as the authors', not clipped

    outputs, _ = model.update.critic_outputs(data, next_actions)
    draws.queue = list(queue)
    metrics = model.update(data, options, step_actor=False, step_targets=False)
    losses = float(ARRAYS["critic/q1_loss"]) + float(ARRAYS["critic/q2_loss"])
    assert metrics["critic_loss"].item() == pytest.approx(losses, rel=2e-5)
    # The same from the reference's own target: mean squared distance of each critic to it
    current_q = model.critic.values(outputs.detach())
    for index, name in enumerate(["critic/q1_loss", "critic/q2_loss"]):
        assert_matches((current_q[index] - array("critic/target_q")).square().mean(), name)


def test_reverse_sampling(model: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    """x_t, candidates, weights, loss and the gradient of every actor array, through the update's own method."""
    t = array("reverse/t").unsqueeze(1)
    diffusion = model.actor.sampler.diffusion
    x_t = diffusion.q_sample(array("reverse/a_0"), t, array("reverse/forward_noise"))
    assert_matches(x_t, "reverse/x_t")
    x_0, _ = sm.clipped_normal_candidates(diffusion, array("reverse/x_t"), t, array("reverse/noise"))
    # At t = 19 x_0 is the difference of two numbers of size 1e3, then clipped
    assert_matches(x_0, "reverse/x_0", atol=2e-4)
    with th.no_grad():
        q_values = model.policy.q(model.critic.encode(array("obs")), array("reverse/x_0"))
    # The authors multiply Q by 5 / alpha; our temperature is alpha times the reward scale of 0.2
    assert_matches(sm.softmax_weights(q_values, model.reward_scale * ALPHA), "reverse/weights")

    draws = Draws(monkeypatch)
    draws.queue = [t, array("reverse/forward_noise"), array("reverse/noise")]
    encoded, options = model.actor.encode(array("obs")), model.update_options()
    loss, _ = model.update.score_matching_loss(encoded, array("obs"), array("reverse/a_0"), options)
    assert_matches(loss.detach(), "reverse/loss", rtol=5e-5)
    loss.backward()
    check_gradients(model, "reverse")


def test_mirror_descent(monkeypatch: pytest.MonkeyPatch) -> None:
    model = make_model(DPMD, PAPER_DPMD)
    model.update.q_statistics.mean.copy_(array("mirror/running_mean"))
    model.update.q_statistics.std.copy_(array("mirror/running_std"))
    draws = Draws(monkeypatch)
    draws.queue = [array("mirror/t").unsqueeze(1), array("mirror/noise")]
    next_actions = array("critic/next_actions")
    with th.no_grad():
        q_values = model.policy.q(model.critic.encode(array("next_obs")), next_actions)
    weights = mirror_descent_weights(q_values, array("mirror/running_mean"), array("mirror/running_std"), ALPHA)
    assert_matches(weights, "mirror/weights")
    loss, _ = model.update.mirror_descent_loss(model.actor.encode(array("next_obs")), q_values, next_actions)
    assert_matches(loss.detach(), "mirror/loss", rtol=5e-5)
    loss.backward()
    check_gradients(model, "mirror")


def check_gradients(model: Any, kind: str) -> None:
    for index, layer in enumerate(noise_predictor_layers(model.actor.noise_predictor)):
        assert layer.weight.grad is not None and layer.bias.grad is not None
        prefix = f"{kind}/grad/dacer_policy_net/{layer_name(index)}"
        scale = float(np.abs(ARRAYS[f"{prefix}/w"]).max())
        assert_matches(layer.weight.grad.T, f"{prefix}/w", atol=1e-5 * scale, rtol=1e-4)
        assert_matches(layer.bias.grad, f"{prefix}/b", atol=1e-5 * scale, rtol=1e-4)


@pytest.mark.parametrize("action_dim", [1, 3])
def test_alpha_curve(action_dim: int) -> None:
    exploration_noise = PAPER_SDAC["policy_kwargs"]["exploration_noise"]
    log_alpha = nn.Parameter(th.zeros((), dtype=th.float64), requires_grad=False)
    temperature = Temperature(PAPER_SDAC["ent_coef"], log_alpha, action_dim)
    alphas = [log_alpha.exp().item()]
    for _ in range(800):
        temperature.step(0, exploration_noise)
        alphas.append(log_alpha.exp().item())
    # The reference ran in float32: 800 steps of 7e-3, each rounded
    assert_matches(np.array(alphas), f"alpha/trajectory_dim{action_dim}", rtol=1e-4)


def test_actor_learning_rate(model: Any) -> None:
    rates = []
    for n_updates in ARRAYS["policy_lr/at_actor_update"].tolist():
        model._n_actor_updates = n_updates
        rates.append(model._actor_learning_rate())
    assert_matches(np.array(rates), "policy_lr/value", atol=0, rtol=1e-6)


@pytest.mark.parametrize(("algorithm", "preset"), [(SDAC, PAPER_SDAC), (DPMD, PAPER_DPMD)])
def test_presets_are_complete(algorithm: type[SDAC], preset: dict[str, Any]) -> None:
    """Whatever a default becomes, they stay the paper's; its networks and its optimizer are what the policy has by default."""
    model = algorithm("MlpPolicy", "Pendulum-v1", buffer_size=10, **preset)
    assert (model.policy.net_arch, model.policy.n_critics, model.policy.activation_fn) == ([256] * 3, 2, nn.Mish)
    assert model.policy.optimizer_class is th.optim.Adam and not model.policy.optimizer_kwargs
    for rest in (model.actor.noise_predictor.time_mlp, model.actor.noise_predictor.rest, model.critic.q_networks.rest):
        activations = [module for module in rest if not isinstance(module, (nn.Linear, EnsembleLinear))]
        assert activations and all(type(module) is Mish for module in activations)
    # The user's own: what does not change the algorithm, mixed_precision among it
    own = {"policy", "env", "buffer_size", "stats_window_size", "tensorboard_log", "verbose", "seed", "device"}
    own |= {"action_noise", "replay_buffer_class", "replay_buffer_kwargs", "optimize_memory_usage"}
    own |= {"compile", "mixed_precision", "target_ess", "_init_setup_model", "unknown"}
    assert algorithm._constructor_arguments() - own == set(preset)
    # Of the networks what Pendulum needs no other one of; max_value is that of distributions, which there are none of
    own = {"net_arch", "n_critics", "optimizer_class", "optimizer_kwargs", "share_features_extractor", "max_value"}
    own |= {"features_extractor_class", "features_extractor_kwargs", "normalize_images"}
    names = set(inspect.signature(DiffusionPolicy).parameters) - {"observation_space", "action_space", "lr_schedule"}
    assert names - own == set(preset["policy_kwargs"])
