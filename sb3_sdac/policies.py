"""
The policy: samples of a diffusion become actions.

Here live the box, best of N, exploration noise and the meaning of ``deterministic``. Letters: B batch, N particles, A action
dimension, C critics, H width of a network's first layer. Actions are scaled to [-1, 1] throughout, as in SB3's replay buffer.
"""

import inspect
from collections.abc import Callable
from typing import Any, ClassVar

import numpy as np
import torch as th
from gymnasium import spaces
from stable_baselines3.common.policies import BaseModel, BasePolicy
from stable_baselines3.common.preprocessing import get_action_dim
from stable_baselines3.common.torch_layers import (
    BaseFeaturesExtractor,
    CombinedExtractor,
    FlattenExtractor,
    NatureCNN,
    get_actor_critic_arch,
)
from stable_baselines3.common.type_aliases import PyTorchObs, Schedule
from torch import nn

from sb3_sdac.arguments import LiveArguments, check, check_choice, check_finite, is_count, is_fraction, is_number, is_positive
from sb3_sdac.diffusion import BETA_SCHEDULES, GaussianDiffusion
from sb3_sdac.files import save_in_one_step
from sb3_sdac.networks import CriticEnsemble, NoisePredictor


def _constructor_parameters(model: BaseModel, cls: type[BaseModel]) -> dict[str, Any]:
    """
    The value of every constructor argument, so that a saved policy can never silently lose one.

    :param model: keeps each argument of its constructor as an attribute of the same name
    :param cls: the class whose constructor is meant
    :return: arguments to build the model again
    """
    names = [name for name in inspect.signature(cls.__init__).parameters if name not in ("self", "lr_schedule")]
    return {name: getattr(model, name) for name in names}


class Sampler(LiveArguments, nn.Module):
    """
    How actions are denoised: the diffusion, where it starts, and the noise of ``deterministic=True``. Nothing is learned.

    An actor and its moving average share one. It is made anew when a setting changes (``policy.eta = 1.0``).

    :param action_dim: A
    :param n_diffusion_steps: T
    :param n_sampling_steps: denoising steps taken to draw an action, between 1 and T
    :param eta: 0 for deterministic denoising (DDIM) up to 1 for ancestral sampling (DDPM)
    :param init_noise_scale: standard deviation of x_T
    :param beta_schedule: one of ``BETA_SCHEDULES``
    :param n_particles: N, particles of a deterministic action
    """

    SETTINGS = ("n_diffusion_steps", "n_sampling_steps", "eta", "init_noise_scale", "beta_schedule", "n_particles")
    FIXED: ClassVar[dict[str, str]] = {name: f"set model.policy.{name}" for name in SETTINGS}

    fixed_x_T: th.Tensor
    fixed_step_noise: th.Tensor

    def __init__(
        self,
        action_dim: int,
        n_diffusion_steps: int,
        n_sampling_steps: int,
        eta: float,
        init_noise_scale: float,
        beta_schedule: str,
        n_particles: int,
    ):
        super().__init__()
        self.action_dim = action_dim
        self.n_diffusion_steps = n_diffusion_steps
        self.n_sampling_steps = n_sampling_steps
        self.eta = eta
        self.init_noise_scale = init_noise_scale
        self.beta_schedule = beta_schedule
        self.n_particles = n_particles
        check(self, is_count, "an integer of at least 1", "n_diffusion_steps", "n_sampling_steps", "n_particles")
        allowed = f"at most n_diffusion_steps={n_diffusion_steps}"
        check(self, lambda value: value <= n_diffusion_steps, allowed, "n_sampling_steps")
        check(self, is_fraction, "a number between 0 and 1", "eta")
        check(self, is_positive, "a positive number", "init_noise_scale")
        check_choice(self, beta_schedule=BETA_SCHEDULES)
        self.diffusion = GaussianDiffusion(BETA_SCHEDULES[beta_schedule](n_diffusion_steps), n_sampling_steps, eta)

        # The same noise for every observation, so that a deterministic action depends on nothing else. The first particle
        # starts from the most likely x_T, zero. Drawn by NumPy's legacy generator, whose stream is frozen for good, hence not
        # part of the state_dict and free to change with the number of particles.
        random_state = np.random.RandomState(0)
        x_T = init_noise_scale * random_state.standard_normal((1, n_particles, action_dim))
        x_T[:, 0] = 0
        step_noise = random_state.standard_normal((n_sampling_steps, 1, n_particles, action_dim))
        self.register_buffer("fixed_x_T", th.as_tensor(x_T, dtype=th.float32), persistent=False)
        self.register_buffer("fixed_step_noise", th.as_tensor(step_noise, dtype=th.float32), persistent=False)
        self._go_live()

    def changed(self, **settings: Any) -> "Sampler":
        """
        :param settings: that are to be other ones
        :return: a new sampler, on the same device
        :raises ValueError: for settings outside their range
        """
        kept = {name: getattr(self, name) for name in self.SETTINGS}
        return Sampler(self.action_dim, **{**kept, **settings}).to(self.fixed_x_T.device)

    def fixed_noise(self, n_particles: int) -> tuple[th.Tensor, th.Tensor]:
        """
        :param n_particles: the first of the N
        :return: x_T, shape (1, n_particles, A), and the noise of the steps, shape (n_sampling_steps, 1, n_particles, A)
        """
        return self.fixed_x_T[:, :n_particles], self.fixed_step_noise[:, :, :n_particles]

    def draw_noise(self, batch_size: int, n_particles: int) -> tuple[th.Tensor, th.Tensor | None]:
        """
        :param batch_size: B
        :param n_particles: N
        :return: x_T, shape (B, N, A), and the noise of the steps, shape (n_sampling_steps, B, N, A), or None if they add none
        """
        shape, device = (batch_size, n_particles, self.action_dim), self.fixed_x_T.device
        x_T = self.init_noise_scale * th.randn(shape, device=device)
        step_noise = th.randn((self.n_sampling_steps, *shape), device=device) if self.eta > 0 else None
        return x_T, step_noise


class _ActingPolicy(LiveArguments, BasePolicy):
    """A policy that refuses observations that are not numbers, which would become actions that are none."""

    def predict(
        self,
        observation: np.ndarray | dict[str, np.ndarray],
        state: tuple[np.ndarray, ...] | None = None,
        episode_start: np.ndarray | None = None,
        deterministic: bool = False,
    ) -> tuple[np.ndarray, tuple[np.ndarray, ...] | None]:
        """
        See SB3's ``BasePolicy.predict``.

        :param observation: one observation, or a batch of them
        :param state: not used, handed back
        :param episode_start: not used
        :param deterministic: make the action a function of the observation alone
        :return: actions of the action space, with a batch axis if the observations have one; state
        :raises ValueError: for observations that are NaN or infinite
        """
        given: Any = observation
        if not isinstance(given, tuple):  # the result of reset(), which SB3 refuses
            check_finite(
                "observation",
                given,
                "given to predict() is not finite: {value}. Mend the environment or what comes between it and the policy "
                "(VecNormalize's statistics, a sensor), or skip this observation.",
            )
        return super().predict(observation, state, episode_start, deterministic)

    def save(self, path: str) -> None:
        """
        Save the policy alone, see SB3's ``BaseModel.save``.

        :param path: the file; what is there is replaced once the new one is complete
        """
        save_in_one_step(super().save, path)


class Actor(_ActingPolicy):
    """
    Features extractor, noise predictor and the sampler that turns its predictions into actions.

    Used alone it acts without critics, on a single particle (with ``average_actor``, the policy acts with ``actor_target``).
    See :class:`DiffusionPolicy` for the arguments not listed.

    :param features_extractor: network that extracts features
    :param features_dim: width of the features
    """

    def __init__(
        self,
        observation_space: spaces.Space,
        action_space: spaces.Box,
        net_arch: list[int],
        features_extractor: BaseFeaturesExtractor,
        features_dim: int,
        activation_fn: type[nn.Module],
        normalize_images: bool,
        n_diffusion_steps: int,
        n_sampling_steps: int,
        eta: float,
        init_noise_scale: float,
        beta_schedule: str,
        n_particles: int,
        batch_norm: bool,
    ):
        super().__init__(
            observation_space,
            action_space,
            features_extractor=features_extractor,
            normalize_images=normalize_images,
            squash_output=True,
        )
        self.net_arch = net_arch
        self.features_dim = features_dim
        self.activation_fn = activation_fn
        self.batch_norm = batch_norm
        self.action_dim = get_action_dim(action_space)
        self.sampler = Sampler(
            self.action_dim, n_diffusion_steps, n_sampling_steps, eta, init_noise_scale, beta_schedule, n_particles
        )
        self.noise_predictor = NoisePredictor(
            features_dim, self.action_dim, n_diffusion_steps, net_arch, activation_fn, limit_features=batch_norm
        )
        self._go_live()

    FIXED: ClassVar[dict[str, str]] = {
        **Sampler.FIXED,
        **dict.fromkeys(("net_arch", "activation_fn", "batch_norm"), "networks cannot be changed, make a new model"),
    }

    def _get_constructor_parameters(self) -> dict[str, Any]:
        settings = {name: getattr(self.sampler, name) for name in Sampler.SETTINGS}
        own = set(inspect.signature(Actor.__init__).parameters) - {"self", *settings}
        return {**{name: getattr(self, name) for name in own}, **settings}

    def encode(self, obs: PyTorchObs) -> th.Tensor:
        """
        Extract the features and compute their share of the noise predictor's first layer.

        :param obs: observations
        :return: shape (B, H)
        """
        return self.noise_predictor.encode(self.extract_features(obs, self.features_extractor))

    def predict_noise(self, encoded: th.Tensor, noisy_actions: th.Tensor, diffusion_steps: th.Tensor) -> th.Tensor:
        """
        eps_theta(s, x_t, t)

        :param encoded: from :meth:`encode`, shape (B, H)
        :param noisy_actions: x_t, shape (B, A)
        :param diffusion_steps: t, int64, shape (B, 1)
        :return: shape (B, A)
        """
        # (T, H)[(B,)] -> (B, H)
        return self.noise_predictor(encoded, noisy_actions, self.noise_predictor.encode_time()[diffusion_steps.squeeze(-1)])

    def sample(
        self,
        encoded: th.Tensor,
        x_T: th.Tensor,
        step_noise: th.Tensor | None,
        noise_predictor: Callable[..., th.Tensor] | None = None,
    ) -> th.Tensor:
        """
        Reverse diffusion for N particles per observation.

        :param encoded: from :meth:`encode`, shape (B, H)
        :param x_T: where to start, shape (B, N, A), or (1, N, A) for the same start everywhere
        :param step_noise: noise of the steps, shape (n_sampling_steps, B, N, A) or (n_sampling_steps, 1, N, A), or None
        :param noise_predictor: the actor's own, compiled; ``None`` for that as it is
        :return: actions in [-1, 1], shape (B, N, A)
        """
        predict_noise = noise_predictor or self.noise_predictor
        shared = encoded.unsqueeze(1)  # (B, H) -> (B, 1, H), to broadcast over N
        encoded_t = self.noise_predictor.encode_time()  # (T, H)
        x_T = x_T.expand(encoded.shape[0], -1, -1)
        return self.sampler.diffusion.sample(lambda x_t, t: predict_noise(shared, x_t, encoded_t[t]), x_T, step_noise)

    def forward(self, obs: PyTorchObs, deterministic: bool = False) -> th.Tensor:
        """
        One particle per observation, without the critics' choice among several and without exploration noise.

        :param obs: observations
        :param deterministic: start from the fixed noise instead of drawing it
        :return: actions in [-1, 1], shape (B, A)
        """
        encoded = self.encode(obs)
        noise = self.sampler.fixed_noise(1) if deterministic else self.sampler.draw_noise(encoded.shape[0], 1)
        return self.sample(encoded, *noise).squeeze(1)

    def _predict(self, observation: PyTorchObs, deterministic: bool = False) -> th.Tensor:
        return self(observation, deterministic)


class Critic(LiveArguments, BaseModel):
    """
    Features extractor and an ensemble of Q-networks. See :class:`DiffusionPolicy` for the arguments not listed.

    :param features_extractor: network that extracts features
    :param features_dim: width of the features
    """

    features_extractor: BaseFeaturesExtractor
    FIXED: ClassVar[dict[str, str]] = {
        "pessimism": "set model.policy.pessimism",
        **dict.fromkeys(
            ("net_arch", "activation_fn", "n_critics", "share_features_extractor", "batch_norm", "n_bins", "max_value"),
            "networks cannot be changed, make a new model",
        ),
    }

    def __init__(
        self,
        observation_space: spaces.Space,
        action_space: spaces.Box,
        net_arch: list[int],
        features_extractor: BaseFeaturesExtractor,
        features_dim: int,
        activation_fn: type[nn.Module],
        normalize_images: bool,
        n_critics: int,
        share_features_extractor: bool,
        batch_norm: bool,
        n_bins: int,
        max_value: float,
    ):
        super().__init__(
            observation_space, action_space, features_extractor=features_extractor, normalize_images=normalize_images
        )
        self.net_arch = net_arch
        self.features_dim = features_dim
        self.activation_fn = activation_fn
        self.n_critics = n_critics
        self.share_features_extractor = share_features_extractor
        self.batch_norm = batch_norm
        self.n_bins = n_bins
        self.max_value = max_value
        action_dim = get_action_dim(action_space)
        self.q_networks = CriticEnsemble(
            n_critics, features_dim, action_dim, net_arch, activation_fn, batch_norm, n_bins, max_value
        )
        self._go_live()

    def _get_constructor_parameters(self) -> dict[str, Any]:
        return _constructor_parameters(self, Critic)

    def encode(self, obs: PyTorchObs) -> th.Tensor:
        """
        Extract the features and compute their share of the critics' first layer.

        :param obs: observations
        :return: shape (C, B, H)
        """
        return self.q_networks.encode(self._extract(obs))

    def _extract(self, obs: PyTorchObs) -> th.Tensor:
        # A shared extractor learns from the actor's loss only, as in SB3's ContinuousCritic
        with th.set_grad_enabled(th.is_grad_enabled() and not self.share_features_extractor):
            return self.extract_features(obs, self.features_extractor)

    def outputs(self, obs: PyTorchObs, actions: th.Tensor, normalise_batch: bool) -> th.Tensor:
        """
        Outputs of every critic's network for one action per observation, for :meth:`loss` and :meth:`values`.

        :param obs: observations
        :param actions: actions in [-1, 1], shape (B, A)
        :param normalise_batch: normalise by the statistics of this batch, which move the running ones (``batch_norm``)
        :return: shape (C, B, M)
        """
        if normalise_batch:
            return self.q_networks.normalise_batch(self._extract(obs), actions)
        return self.q_networks.outputs(self.encode(obs), actions)

    def values(self, outputs: th.Tensor) -> th.Tensor:
        """
        :param outputs: from :meth:`outputs`, shape (C, B, M)
        :return: every critic's values, shape (C, B)
        """
        return self.q_networks.values(outputs)

    def loss(self, outputs: th.Tensor, targets: th.Tensor) -> th.Tensor:
        """
        Cross-entropy of the distributions over ``n_bins`` values, or squared error if that is 1.

        :param outputs: from :meth:`outputs`, shape (C, B, M)
        :param targets: shape (B,)
        :return: shape (C, B)
        """
        return self.q_networks.loss(outputs, targets)

    def q_values(self, encoded: th.Tensor, actions: th.Tensor) -> th.Tensor:
        """
        Every critic's value of one or of N actions per observation.

        :param encoded: from :meth:`encode`, shape (C, B, H)
        :param actions: actions in [-1, 1], shape (B, A) or (B, N, A)
        :return: shape (C, B) or (C, B, N)
        """
        return self.q_networks(encoded, actions)

    def forward(self, obs: PyTorchObs, actions: th.Tensor) -> tuple[th.Tensor, ...]:
        """
        SB3's interface to a critic.

        :param obs: observations
        :param actions: actions in [-1, 1], shape (B, A)
        :return: for each critic its values, shape (B, 1)
        """
        return tuple(self.q_values(self.encode(obs), actions).unsqueeze(-1))


def _setting_of_sampler(name: str) -> Any:
    """A property of the policy whose owner is the sampler of its actor."""

    def change(policy: "DiffusionPolicy", value: Any) -> None:
        policy.set_sampler(policy.actor.sampler.changed(**{name: value}))

    return property(lambda policy: getattr(policy.actor.sampler, name), change)


class DiffusionPolicy(_ActingPolicy):
    """
    Actor, critics, target critics and, on demand, an averaged actor for acting.

    The critics belong to the policy because they take part in acting: of N particles the one with the highest Q is chosen.

    What :attr:`LIVE` names may be set at any time (``model.policy.n_particles = 16``), works at once, and is saved.

    :param observation_space: observation space
    :param action_space: a ``Box`` with finite bounds
    :param lr_schedule: learning rate schedule (its value at the start is used)
    :param net_arch: widths of the hidden layers, or ``dict(pi=[...], qf=[...])``; default three layers of 256 for both
    :param activation_fn: activation function; default SiLU
    :param features_extractor_class: features extractor; ``None`` means the policy's own (flatten, NatureCNN, or combined)
    :param features_extractor_kwargs: its keyword arguments
    :param normalize_images: divide images by 255
    :param optimizer_class: optimizer of the actor and of the critics
    :param optimizer_kwargs: its keyword arguments besides the learning rate; Adam is fused unless they say otherwise, and with
        ``batch_norm`` its first beta is 0.5
    :param n_critics: C, the number of critics
    :param share_features_extractor: let the critics use the actor's features extractor, which then learns from the actor's
        loss only (this saves memory and the critics' backward pass through it)
    :param n_diffusion_steps: T, the number of steps of the diffusion, at least 1
    :param n_sampling_steps: denoising steps taken whenever an action is drawn, between 1 and T
    :param eta: 0 for deterministic denoising (DDIM) up to 1 for ancestral sampling (DDPM, the paper)
    :param init_noise_scale: standard deviation of x_T, from which denoising starts; positive
    :param beta_schedule: ``"vp"`` (variance-preserving SDE), ``"linear"`` (the paper) or ``"cosine"``
    :param n_particles: N, particles among which the critics choose when acting deterministically, at least 1
    :param n_train_particles: the same for actions that explore and those of the update; ``None`` for ``n_particles`` (the
        paper)
    :param exploration_noise: standard deviation of the normal noise on sampled actions, which are scaled to [-1, 1]
    :param scale_noise_by_ent_coef: multiply the exploration noise with the entropy coefficient (the paper)
    :param average_actor: act with a moving average of the actor (the paper), of step ``tau``
    :param batch_norm: normalise the inputs of the critics' layers by the statistics of the batch, and do without target
        critics (CrossQ, Bhatt et al. 2024, arXiv 1902.05605). The features that the actor gets lose their mean, and their
        norm is limited
    :param n_bins: the critics give distributions over this many values and learn by cross-entropy
        (:class:`~sb3_sdac.value_bins.ValueBins`). An odd number, so that 0 is among them; 1 for critics that give the value
        itself and learn by squared error (the paper)
    :param max_value: largest value in these distributions, in scaled rewards; the least is its negative. ``None`` for
        2 / (1 - gamma), which values never exceed with ``reward_scale="auto"`` (200 without an algorithm)
    :param pessimism: what Q is in the TD target, the candidates' weights and the choice among particles: from 0 for the mean
        of the critics to 1 for the least of them (clipped double Q-learning, the paper). ``"auto"`` is 0 until a transition
        into a terminal state (not one cut off by a time limit) was learned from, and then 1
    :raises ValueError: for arguments outside their range
    """

    #: Arguments that may be set on a policy in use
    LIVE: ClassVar[frozenset[str]] = frozenset(
        {
            *("n_sampling_steps", "eta", "init_noise_scale", "n_particles", "n_train_particles"),
            *("exploration_noise", "scale_noise_by_ent_coef", "pessimism"),
        }
    )
    FIXED: ClassVar[dict[str, str]] = dict.fromkeys(
        (
            *("net_arch", "activation_fn", "features_extractor_class", "features_extractor_kwargs", "normalize_images"),
            *("optimizer_class", "optimizer_kwargs", "n_critics", "share_features_extractor", "n_diffusion_steps"),
            *("beta_schedule", "average_actor", "batch_norm", "n_bins", "max_value"),
        ),
        "networks and optimizers are made with it, make a new model with policy_kwargs=dict(...)",
    )
    n_diffusion_steps = _setting_of_sampler("n_diffusion_steps")
    n_sampling_steps = _setting_of_sampler("n_sampling_steps")
    eta = _setting_of_sampler("eta")
    init_noise_scale = _setting_of_sampler("init_noise_scale")
    beta_schedule = _setting_of_sampler("beta_schedule")
    n_particles = _setting_of_sampler("n_particles")
    seen_terminal: th.Tensor

    default_features_extractor_class: type[BaseFeaturesExtractor] = FlattenExtractor
    action_space: spaces.Box
    actor: Actor
    actor_target: Actor | None
    critic: Critic
    critic_target: Critic | None

    def __init__(
        self,
        observation_space: spaces.Space,
        action_space: spaces.Box,
        lr_schedule: Schedule,
        net_arch: list[int] | dict[str, list[int]] | None = None,
        activation_fn: type[nn.Module] = nn.SiLU,
        features_extractor_class: type[BaseFeaturesExtractor] | None = None,
        features_extractor_kwargs: dict[str, Any] | None = None,
        normalize_images: bool = True,
        optimizer_class: type[th.optim.Optimizer] = th.optim.Adam,
        optimizer_kwargs: dict[str, Any] | None = None,
        n_critics: int = 2,
        share_features_extractor: bool = False,
        n_diffusion_steps: int = 20,
        n_sampling_steps: int = 5,
        eta: float = 0.0,
        init_noise_scale: float = 0.5,
        beta_schedule: str = "vp",
        n_particles: int = 4,
        n_train_particles: int | None = 1,
        exploration_noise: float = 0.1,
        scale_noise_by_ent_coef: bool = False,
        average_actor: bool = False,
        batch_norm: bool = True,
        n_bins: int = 101,
        max_value: float | None = None,
        pessimism: float | str = "auto",
    ):
        super().__init__(
            observation_space,
            action_space,
            features_extractor_class or self.default_features_extractor_class,
            features_extractor_kwargs,
            normalize_images=normalize_images,
            optimizer_class=optimizer_class,
            optimizer_kwargs=optimizer_kwargs,
            squash_output=True,
        )
        self.net_arch = [256, 256, 256] if net_arch is None else net_arch
        self.activation_fn = activation_fn
        self.n_critics = n_critics
        self.share_features_extractor = share_features_extractor
        self.n_train_particles = n_train_particles
        self.exploration_noise = exploration_noise
        self.scale_noise_by_ent_coef = scale_noise_by_ent_coef
        self.average_actor = average_actor
        self.batch_norm = batch_norm
        self.n_bins = n_bins
        self.max_value = 200.0 if max_value is None else max_value
        self.pessimism = pessimism
        self._check_arguments()

        actor_arch, critic_arch = get_actor_critic_arch(self.net_arch)
        net_kwargs = {
            "observation_space": observation_space,
            "action_space": action_space,
            "activation_fn": activation_fn,
            "normalize_images": normalize_images,
        }
        self.actor_kwargs = {
            **net_kwargs,
            "net_arch": actor_arch,
            "n_diffusion_steps": n_diffusion_steps,
            "n_sampling_steps": n_sampling_steps,
            "eta": eta,
            "init_noise_scale": init_noise_scale,
            "beta_schedule": beta_schedule,
            "n_particles": n_particles,
            "batch_norm": batch_norm,
        }
        self.critic_kwargs = {
            **net_kwargs,
            "net_arch": critic_arch,
            "n_critics": n_critics,
            "share_features_extractor": share_features_extractor,
            "batch_norm": batch_norm,
            "n_bins": n_bins,
            "max_value": self.max_value,
        }
        # The logarithm of the entropy coefficient (alpha or lambda in the paper), kept with the policy since acting may
        # read it. It is set by the algorithm; no gradient ever reaches it.
        self.log_ent_coef = nn.Parameter(th.zeros(()), requires_grad=False)
        # 1 once a transition into a terminal state was learned from, by which pessimism="auto" goes
        self.register_buffer("seen_terminal", th.zeros(()))
        self._build(lr_schedule)
        #: What an algorithm saves of its policy is what differs from these
        self.initial_arguments = self.live_arguments()
        self._go_live()

    def _check_arguments(self) -> None:
        if not all(is_count(width) for widths in get_actor_critic_arch(self.net_arch) for width in widths):
            raise ValueError(f"net_arch must hold integers of at least 1, got {self.net_arch!r}")
        check(self, is_count, "an integer of at least 1", "n_critics")
        check(self, lambda value: is_count(value) and value % 2 == 1, "an odd integer of at least 1", "n_bins")
        allowed = "an integer of at least 1, or None for n_particles"
        check(self, lambda value: value is None or is_count(value), allowed, "n_train_particles")
        check(self, lambda value: is_number(value) and value >= 0, "a number of at least 0", "exploration_noise")
        allowed = "a number between 0 and 1, or 'auto'"
        check(self, lambda value: value == "auto" or is_fraction(value), allowed, "pessimism")
        check(self, is_positive, "a positive number", "max_value")
        names = "share_features_extractor", "scale_noise_by_ent_coef", "average_actor", "batch_norm"
        check(self, lambda value: isinstance(value, bool), "True or False", *names)

    def live_arguments(self) -> dict[str, Any]:
        """:return: the present value of every argument that may be set on a policy in use"""
        return {name: getattr(self, name) for name in sorted(self.LIVE)}

    def set_sampler(self, sampler: Sampler) -> None:
        """
        :param sampler: for the actor and its moving average
        """
        self.actor.sampler = sampler
        if self.actor_target is not None:
            self.actor_target.sampler = sampler

    def _build(self, lr_schedule: Schedule) -> None:
        self.actor = self.make_actor()
        self.actor.optimizer = self._make_optimizer(list(self.actor.parameters()), lr_schedule)
        if self.share_features_extractor:
            self.critic = self.make_critic(self.actor.features_extractor)
            # The shared extractor is stepped by the actor's optimizer only
            critic_parameters = [param for name, param in self.critic.named_parameters() if "features_extractor" not in name]
        else:
            self.critic = self.make_critic()
            critic_parameters = list(self.critic.parameters())
        self.critic.optimizer = self._make_optimizer(critic_parameters, lr_schedule)

        # Targets never share an extractor: it has to lag like the rest. They are always in evaluation mode.
        self.critic_target = None
        if not self.batch_norm:
            self.critic_target = self.make_critic()
            self.critic_target.load_state_dict(self.critic.state_dict())
            self.critic_target.set_training_mode(False)
        self.actor_target = None
        if self.average_actor:
            self.actor_target = self.make_actor()
            self.actor_target.load_state_dict(self.actor.state_dict())
            self.actor_target.set_training_mode(False)
            self.set_sampler(self.actor.sampler)

    def _make_optimizer(self, parameters: list[nn.Parameter], lr_schedule: Schedule) -> th.optim.Optimizer:
        kwargs = self.optimizer_kwargs
        if self.optimizer_class is th.optim.Adam:
            # Targets that move at once call for less momentum (CrossQ)
            own: dict[str, Any] = {} if kwargs.get("foreach") or kwargs.get("differentiable") else {"fused": True}
            kwargs = {**own, **({"betas": (0.5, 0.999)} if self.batch_norm else {}), **kwargs}
        return self.optimizer_class(parameters, lr=lr_schedule(1), **kwargs)  # type: ignore[call-arg]

    def _get_constructor_parameters(self) -> dict[str, Any]:
        # A dummy schedule: the learning rate is not needed to load a policy alone
        return {**_constructor_parameters(self, DiffusionPolicy), "lr_schedule": self._dummy_schedule}

    def make_actor(self, features_extractor: BaseFeaturesExtractor | None = None) -> Actor:
        """
        :param features_extractor: extractor to share, or None for one of its own
        :return: a new actor
        """
        return Actor(**self._update_features_extractor(self.actor_kwargs, features_extractor)).to(self.device)

    def make_critic(self, features_extractor: BaseFeaturesExtractor | None = None) -> Critic:
        """
        :param features_extractor: extractor to share, or None for one of its own
        :return: a new ensemble of critics
        """
        return Critic(**self._update_features_extractor(self.critic_kwargs, features_extractor)).to(self.device)

    def pessimistic(self, q_values: th.Tensor) -> th.Tensor:
        """
        The critics' common value: their mean (``pessimism=0``), the least of them (1, clipped double Q-learning, Fujimoto
        et al. 2018), or in between; of two critics that is mean - pessimism |Q_1 - Q_2| / 2.

        ``"auto"`` is 1 once a transition into a terminal state was learned from, and 0 before and where there are none:
        clipped double Q-learning for tasks with termination only, as in SimBa (Lee et al. 2025).

        :param q_values: shape (C, ...)
        :return: shape (...)
        """
        pessimism = self.seen_terminal if isinstance(self.pessimism, str) else self.pessimism
        return th.lerp(q_values.mean(dim=0), q_values.amin(dim=0), pessimism)

    def q(self, encoded_critic: th.Tensor, actions: th.Tensor) -> th.Tensor:
        """
        The :meth:`pessimistic` value of one or of N actions per observation.

        :param encoded_critic: from the critic's ``encode``, shape (C, B, H)
        :param actions: actions in [-1, 1], shape (B, A) or (B, N, A)
        :return: shape (B,) or (B, N)
        """
        return self.pessimistic(self.critic.q_values(encoded_critic, actions))

    def best_of(self, encode_critic: Callable[[], th.Tensor], particles: th.Tensor) -> th.Tensor:
        """
        The particle with the highest Q.

        :param encode_critic: gives the critic's encoding of the observations, shape (C, B, H); called if there is a choice
        :param particles: actions in [-1, 1], shape (B, N, A)
        :return: shape (B, A)
        """
        if particles.shape[1] == 1:
            return particles.squeeze(1)
        best = self.q(encode_critic(), particles).argmax(dim=1)  # (B, N) -> (B,)
        # gather, as torch.export takes take_along_dim for a fixed batch size
        best = best.view(-1, 1, 1).expand(-1, 1, particles.shape[2])
        return particles.gather(1, best).squeeze(1)  # (B, N, A) -> (B, A)

    def explore(self, actions: th.Tensor) -> th.Tensor:
        """
        Add normal noise of standard deviation ``exploration_noise`` (times the entropy coefficient, if it shall scale).

        :param actions: shape (B, A)
        :return: shape (B, A), not clipped
        """
        std: th.Tensor | float = self.exploration_noise
        if self.scale_noise_by_ent_coef:
            std = std * self.log_ent_coef.exp()
        return actions + std * th.randn_like(actions)

    def draw_actions(
        self,
        actor: Actor,
        encoded_actor: th.Tensor,
        encode_critic: Callable[[], th.Tensor],
        noise_predictor: Callable[..., th.Tensor] | None = None,
        clip: bool = True,
    ) -> th.Tensor:
        """
        Actions that explore: the best of ``n_train_particles``, with exploration noise.

        :param actor: whose actions
        :param encoded_actor: its encoding of the observations, shape (B, H)
        :param encode_critic: gives the critics' encoding of them, shape (C, B, H)
        :param noise_predictor: see :meth:`Actor.sample`
        :param clip: to the box, after the noise
        :return: shape (B, A)
        """
        noise = actor.sampler.draw_noise(len(encoded_actor), self.n_train_particles or self.n_particles)
        particles = actor.sample(encoded_actor, *noise, noise_predictor)  # (B, N, A)
        actions = self.explore(self.best_of(encode_critic, particles))
        return actions.clamp(-1, 1) if clip else actions

    def forward(self, obs: PyTorchObs, deterministic: bool = False) -> th.Tensor:
        return self._predict(obs, deterministic=deterministic)

    def _predict(self, observation: PyTorchObs, deterministic: bool = False) -> th.Tensor:
        return self.act(observation, deterministic)

    def act(self, observation: PyTorchObs, deterministic: bool = False) -> th.Tensor:
        """
        :meth:`draw_actions`, or if ``deterministic`` the best of ``n_particles`` from fixed noise.

        :param observation: observations
        :param deterministic: make the action a function of the observation alone
        :return: actions in [-1, 1], shape (B, A)
        """
        actor = self.actor if self.actor_target is None else self.actor_target
        encoded = actor.encode(observation)
        if not deterministic:
            return self.draw_actions(actor, encoded, lambda: self.critic.encode(observation))
        particles = actor.sample(encoded, *actor.sampler.fixed_noise(self.n_particles))
        return self.best_of(lambda: self.critic.encode(observation), particles)

    def unscale_action(self, scaled_action: np.ndarray) -> np.ndarray:
        """
        Rescale an action from [-1, 1] to the action space; clipped, because rounding may leave the box.

        :param scaled_action: action in [-1, 1]
        :return: action in the action space
        """
        return np.clip(super().unscale_action(scaled_action), self.action_space.low, self.action_space.high)

    def set_training_mode(self, mode: bool) -> None:
        """
        Put actor and critics in training or evaluation mode (batch normalisation, dropout); targets stay in evaluation mode.

        :param mode: whether to train
        """
        if mode == self.training == self.actor.training == self.critic.training:
            return  # as on nearly every prediction, where going through all modules would cost as much as two denoising steps
        self.train(mode)

    def train(self, mode: bool = True) -> "DiffusionPolicy":
        """
        As :meth:`set_training_mode`.

        :param mode: whether to train
        :return: the policy
        """
        super().train(mode)
        for target in (self.actor_target, self.critic_target):
            if target is not None:
                target.eval()
        return self


MlpPolicy = DiffusionPolicy


class CnnPolicy(DiffusionPolicy):
    """:class:`DiffusionPolicy` whose features extractor is a NatureCNN by default, for images."""

    default_features_extractor_class = NatureCNN


class MultiInputPolicy(DiffusionPolicy):
    """:class:`DiffusionPolicy` whose features extractor is a CombinedExtractor by default, for ``Dict`` observations."""

    default_features_extractor_class = CombinedExtractor
