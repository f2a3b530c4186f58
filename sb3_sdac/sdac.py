"""The algorithm: from transitions to TD targets, score targets and a better diffusion policy."""

import io
import json
import pathlib
import warnings
from collections.abc import Callable
from typing import Any, ClassVar, TypeVar

import numpy as np
import torch as th
from gymnasium import spaces
from stable_baselines3.common.buffers import DictReplayBuffer, NStepReplayBuffer, ReplayBuffer
from stable_baselines3.common.callbacks import BaseCallback
from stable_baselines3.common.noise import ActionNoise
from stable_baselines3.common.off_policy_algorithm import OffPolicyAlgorithm
from stable_baselines3.common.policies import BasePolicy
from stable_baselines3.common.type_aliases import (
    GymEnv,
    MaybeCallback,
    PyTorchObs,
    ReplayBufferSamples,
    Schedule,
    TensorDict,
)
from stable_baselines3.common.utils import (
    FloatSchedule,
    get_device,
    get_parameters_by_name,
    polyak_update,
)
from stable_baselines3.common.vec_env import VecEnv
from stable_baselines3.her.her_replay_buffer import HerReplayBuffer
from torch import nn

from sb3_sdac import score_matching as sm
from sb3_sdac.buffers import (
    BatchIndices,
    DeviceReplayBuffer,
    cut_off_episodes,
    fits_on_device,
    locate_recent,
    sample_recent,
)
from sb3_sdac.compilation import Compiled, Graphed, set_learning_rate
from sb3_sdac.diffusion import BETA_SCHEDULES
from sb3_sdac.networks import denormals_flushed
from sb3_sdac.policies import Actor, CnnPolicy, Critic, DiffusionPolicy, MlpPolicy, MultiInputPolicy, is_count

SelfSDAC = TypeVar("SelfSDAC", bound="SDAC")

#: Share of each batch's solution that the temperature set from data takes over: a memory of about 20 actor updates
TEMPERATURE_RATE = 0.05
#: Length of the returns where SB3 has a replay buffer for more than one step
DEFAULT_N_STEPS = 2
#: With ``reward_scale="auto"``: root mean square of the scaled replayed rewards, and the most that a single one may be
REWARD_RMS, REWARD_MAX = 0.2, 2.0
#: The least that 1 - gamma counts as where it says how large values can be
MIN_DISCOUNTING = 1e-4
#: Updates after which metrics are fetched from another device than the CPU, if no log asked for them before
RECORD_INTERVAL = 1000
#: Moving average of Q's mean and standard deviation in the mirror-descent loss (official DPMD)
Q_STATISTICS_RATE = 1e-3
#: The paper's temperature: start, learning rate and interval in updates (official SDAC)
PAPER_ENT_COEF_INIT, PAPER_ENT_COEF_LR, PAPER_ENT_COEF_INTERVAL = 5.0, 7e-3, 250

#: Official SDAC, point by point; with five environments and one update per vector step (README, "The paper's configuration")
PAPER_SDAC: dict[str, Any] = {
    "learning_rate": 3e-4,
    "learning_starts": 30_000,
    "batch_size": 256,
    "tau": 0.005,
    "gamma": 0.99,
    "train_freq": 1,
    "gradient_steps": 1,
    "n_steps": 1,
    "replay_recency": 1.0,
    "n_diffusion_steps": 20,
    "n_sampling_steps": 20,
    "eta": 1.0,
    "init_noise_scale": 0.5,
    "beta_schedule": "linear",
    "n_particles": 32,
    "n_target_particles": None,
    "n_reverse_samples": 64,
    "score_matching": "reverse_sampling",
    "proposal": "clipped_normal",
    "anchor": "current",
    "ent_coef": "paper",
    "exploration_noise": 0.1,
    "scale_noise_by_ent_coef": True,
    "clip_target_actions": False,
    "policy_delay": 2,
    "target_update_interval": 2,
    "average_actor": True,
    "reward_scale": 0.2,
    "qf_learning_rate": None,
    "actor_lr_decay": (3e-5, 25_000, 75_000),
    "critic_steps": 1,
    "batch_norm": False,
    "n_bins": 1,
    "pessimism": 1.0,
    "policy_kwargs": {"activation_fn": nn.Mish},
}

#: Official DPMD: the mirror-descent loss and two steps of the critics' optimizer per update. The first version of the paper
#: called it SDAC and used ``beta_schedule="cosine"`` and ``ent_coef="paper_1.5"``.
PAPER_DPMD: dict[str, Any] = {**PAPER_SDAC, "score_matching": "mirror_descent", "anchor": "next", "critic_steps": 2}


class SDAC(OffPolicyAlgorithm):
    """
    Soft Diffusion Actor-Critic (SDAC): online reinforcement learning with a diffusion policy.

    The policy is a diffusion model trained by score matching on the Q-function alone: it needs no samples of an optimal
    policy and no gradients through the denoising chain.

    Paper: https://arxiv.org/abs/2502.00361. Code of the authors: https://github.com/mahaitongdae/diffusion_policy_online_rl.
    ``SDAC("MlpPolicy", env, **PAPER_SDAC)`` is their configuration; docs/defaults.md says where and why the defaults differ.

    :param policy: ``"MlpPolicy"``, ``"CnnPolicy"``, ``"MultiInputPolicy"`` or a subclass of :class:`~sb3_sdac.DiffusionPolicy`
    :param env: the environment to learn from (its id, if registered in Gymnasium); actions must be a ``Box`` with finite
        bounds
    :param learning_rate: learning rate of the actor, and of the critics if ``qf_learning_rate`` is not given; a float or a
        function of the progress remaining (from 1 to 0)
    :param buffer_size: size of the replay buffer, in transitions
    :param learning_starts: environment steps taken at random before learning starts
    :param batch_size: B, transitions per update
    :param tau: step of the targets' moving average (Polyak update), between 0 and 1
    :param gamma: discount factor, between 0 and 1
    :param train_freq: update every ``train_freq`` steps, or ``(5, "step")``, ``(2, "episode")``
    :param gradient_steps: updates after each rollout; -1 for as many as environment steps were made in it
    :param action_noise: further noise added to the actions, cf. ``stable_baselines3.common.noise``
    :param replay_buffer_class: replay buffer, for instance ``HerReplayBuffer``; ``None`` for SB3's, or on CUDA
        :class:`~sb3_sdac.buffers.DeviceReplayBuffer` where it can be used and takes at most half of the GPU's free memory
    :param replay_buffer_kwargs: its keyword arguments; with ``None`` for its class not ``n_steps`` and ``gamma``, see below
    :param optimize_memory_usage: store observations once instead of twice; needs
        ``replay_buffer_kwargs={"handle_timeout_termination": False}``, as in all of SB3
    :param n_steps: length of n-step returns; ``None`` for 2, or 1 where SB3 has none: with observations that are a ``Dict``,
        ``optimize_memory_usage`` or a ``replay_buffer_class`` of your own (what it came to is ``replay_buffer.n_steps``)
    :param replay_recency: k, at least 1: how much more often recent transitions are replayed. Half of each batch comes from
        the newest 1 / 2^k of the replay buffer; with 1 all are drawn alike (the paper), as they are by a buffer with a
        ``sample`` of its own such as ``HerReplayBuffer`` (:func:`~sb3_sdac.buffers.sample_recent`)
    :param n_diffusion_steps: T, the number of steps of the diffusion, at least 1
    :param n_sampling_steps: denoising steps taken whenever an action is drawn, between 1 and T
    :param eta: 0 for deterministic denoising (DDIM) up to 1 for ancestral sampling (DDPM, the paper)
    :param init_noise_scale: standard deviation of x_T, from which denoising starts; positive
    :param beta_schedule: ``"vp"`` (variance-preserving SDE), ``"linear"`` (the paper) or ``"cosine"``
    :param n_particles: N, particles among which the critics choose when acting deterministically, at least 1
    :param n_target_particles: the same for actions that explore and those of the update; ``None`` for ``n_particles`` (the
        paper)
    :param n_reverse_samples: K, candidates for x_0 per noisy action, at least 2; fewer than 4 need a larger ``target_ess``
    :param score_matching: where the noise predictor's target comes from. ``"reverse_sampling"``: the mean noise of K
        candidates weighted by exp(Q/lambda) (SDAC of the final paper). ``"gradient_assisted"``: the same, with Q's
        gradient at the candidates taking over where the noise is low. ``"mirror_descent"``: denoising of the policy's
        own actions, weighted by exp(Q) (DPMD; K, ``proposal`` and ``anchor`` do not matter).
    :param proposal: distribution of the candidates: ``"truncated_normal"`` inside the box or ``"clipped_normal"`` (the paper)
    :param anchor: the actions that are noised to get x_t: ``"next"``, those of the TD target at the next observations,
        which saves a sampling pass, or ``"current"``, fresh ones at the observations (the paper)
    :param ent_coef: entropy coefficient or temperature (alpha or lambda in the paper), in the unit of the reward: a
        positive float, ``"auto"`` to set it from the data such that the candidates' weights have the effective sample
        size ``target_ess`` (``"auto_0.1"`` to start that from 0.1 instead of the first batch's solution), or
        ``"paper"`` for the authors' fixed curve from 5 to 0.984 (``"paper_1.5"`` ends at 0.54: the number is the target
        entropy per action dimension, negated, 0.9 by default; the end is inversely proportional to ``exploration_noise``, here
        0.1). With mirror descent it has no unit.
    :param target_ess: effective sample size to reach with ``ent_coef="auto"``, as a fraction of K, between 1/K and 1
    :param exploration_noise: standard deviation of the normal noise on sampled actions, which are scaled to [-1, 1]
    :param scale_noise_by_ent_coef: multiply the exploration noise with the entropy coefficient (the paper)
    :param clip_target_actions: clip the noisy actions of the update to the box; the authors do not. Actions for the
        environment always are.
    :param policy_delay: step the actor on every ``policy_delay``-th update
    :param target_update_interval: update the targets on every ``target_update_interval``-th update
    :param average_actor: act with a moving average of the actor (the paper), of step ``tau``
    :param reward_scale: factor on the rewards inside the critics' targets, or ``"auto"`` to divide them by five times the root
        mean square of the replayed ones (discounted sums of ``n_steps``), so that their unit does not matter; the temperature
        keeps the reward's unit
    :param qf_learning_rate: learning rate of the critics, a float or a function of the progress remaining; ``None`` for
        ``learning_rate``
    :param actor_lr_decay: ``(final, begin, end)``: the actor's learning rate goes linearly from ``learning_rate`` to
        ``final`` between its ``begin``-th and ``end``-th update (the paper)
    :param critic_steps: steps of the critics' optimizer per update, all with the same gradient (2 in official DPMD)
    :param batch_norm: normalise the inputs of the critics' layers by the statistics of the batch, and do without target
        critics (CrossQ); ``tau`` and ``target_update_interval`` then only concern an averaged actor. Of the features that
        the actor gets the mean is taken off, and their norm is limited
    :param n_bins: the critics give distributions over this many values and learn by cross-entropy
        (:class:`~sb3_sdac.networks.ValueBins`). An odd number, so that 0 is among them; 1 for critics that give the value
        itself and learn by squared error (the paper). The largest, in scaled rewards, is 2 / (1 - gamma), which values never
        exceed with ``reward_scale="auto"``; ``policy_kwargs=dict(max_value=...)`` sets another
    :param pessimism: what Q is in the TD target, the candidates' weights and the choice among particles: from 0 for the mean
        of the critics to 1 for the least of them (clipped double Q-learning, the paper). ``"auto"`` is 0 until a transition
        into a terminal state (not one cut off by a time limit) was learned from, and then 1
    :param mixed_precision: draw the update's actions in bfloat16, under ``torch.autocast``, and with ``batch_norm`` compute
        the critics' features extractor and hidden layers in it where they learn; ``"auto"`` where the processor has such
        instructions (CPUs with AVX512-BF16 or AMX, CUDA devices). Acting, what the critics give, losses, weights and
        optimizers stay float32
    :param compile: ``"auto"``: on CUDA capture whole updates and predictions as CUDA graphs, each then one launch instead of
        hundreds. True: also compile the denoising step of the updates with ``torch.compile`` (up to half a minute the first
        time; needs a C++ compiler, on CUDA Triton), which on a CPU pays with many particles, as in the paper's configuration,
        and not with the defaults. False: neither. Nothing of it is in a saved model
    :param use_sde: not supported, must be False; here so that whoever comes from SAC is told so
    :param sde_sample_freq: goes with ``use_sde``, without effect
    :param stats_window_size: episodes over which the logged success rate, length and reward are averaged
    :param tensorboard_log: folder of the TensorBoard log; no log if ``None``
    :param policy_kwargs: further arguments of the policy, see :class:`~sb3_sdac.DiffusionPolicy`
    :param verbose: 0 no output, 1 information, 2 debug
    :param seed: seed of the pseudo-random generators
    :param device: ``"cpu"``, ``"cuda"``, ..., or ``"auto"`` for the GPU if there is one
    :param _init_setup_model: whether to build the networks now
    :raises ValueError: for arguments outside their range, ``use_sde=True``, or a CUDA device where there is none
    """

    policy_aliases: ClassVar[dict[str, type[BasePolicy]]] = {
        "MlpPolicy": MlpPolicy,
        "CnnPolicy": CnnPolicy,
        "MultiInputPolicy": MultiInputPolicy,
    }
    policy: DiffusionPolicy
    actor: Actor
    actor_target: Actor | None
    critic: Critic
    critic_target: Critic | None

    def __init__(
        self,
        policy: str | type[DiffusionPolicy],
        env: GymEnv | str,
        learning_rate: float | Schedule = 1e-3,
        buffer_size: int = 1_000_000,
        learning_starts: int = 100,
        batch_size: int = 256,
        tau: float = 0.005,
        gamma: float = 0.99,
        train_freq: int | tuple[int, str] = 1,
        gradient_steps: int = 1,
        action_noise: ActionNoise | None = None,
        replay_buffer_class: type[ReplayBuffer] | None = None,
        replay_buffer_kwargs: dict[str, Any] | None = None,
        optimize_memory_usage: bool = False,
        n_steps: int | None = None,
        replay_recency: float = 2.0,
        n_diffusion_steps: int = 20,
        n_sampling_steps: int = 5,
        eta: float = 0.0,
        init_noise_scale: float = 0.5,
        beta_schedule: str = "vp",
        n_particles: int = 4,
        n_target_particles: int | None = 1,
        n_reverse_samples: int = 4,
        score_matching: str = "gradient_assisted",
        proposal: str = "truncated_normal",
        anchor: str = "next",
        ent_coef: float | str = "auto",
        target_ess: float = 0.28,
        exploration_noise: float = 0.1,
        scale_noise_by_ent_coef: bool = False,
        clip_target_actions: bool = True,
        policy_delay: int = 3,
        target_update_interval: int = 1,
        average_actor: bool = False,
        reward_scale: float | str = "auto",
        qf_learning_rate: float | Schedule | None = None,
        actor_lr_decay: tuple[float, int, int] | None = None,
        critic_steps: int = 1,
        batch_norm: bool = True,
        n_bins: int = 101,
        pessimism: float | str = "auto",
        mixed_precision: bool | str = "auto",
        compile: bool | str = "auto",
        use_sde: bool = False,
        sde_sample_freq: int = -1,
        stats_window_size: int = 100,
        tensorboard_log: str | None = None,
        policy_kwargs: dict[str, Any] | None = None,
        verbose: int = 0,
        seed: int | None = None,
        device: th.device | str = "auto",
        _init_setup_model: bool = True,
    ):
        _check_device(device)
        super().__init__(
            policy,
            env,
            learning_rate,
            buffer_size=buffer_size,
            learning_starts=learning_starts,
            batch_size=batch_size,
            tau=tau,
            gamma=gamma,
            train_freq=train_freq,
            gradient_steps=gradient_steps,
            action_noise=action_noise,
            replay_buffer_class=replay_buffer_class,
            replay_buffer_kwargs=replay_buffer_kwargs,
            optimize_memory_usage=optimize_memory_usage,
            n_steps=n_steps,  # type: ignore[arg-type]
            policy_kwargs=policy_kwargs,
            stats_window_size=stats_window_size,
            tensorboard_log=tensorboard_log,
            verbose=verbose,
            seed=seed,
            device=device,
            use_sde=use_sde,
            sde_sample_freq=sde_sample_freq,
            sde_support=False,
            supported_action_spaces=(spaces.Box,),
            support_multi_env=True,
        )
        self.replay_recency = replay_recency
        self.n_diffusion_steps = n_diffusion_steps
        self.n_sampling_steps = n_sampling_steps
        self.eta = eta
        self.init_noise_scale = init_noise_scale
        self.beta_schedule = beta_schedule
        self.n_particles = n_particles
        self.n_target_particles = n_target_particles
        self.n_reverse_samples = n_reverse_samples
        self.score_matching = score_matching
        self.proposal = proposal
        self.anchor = anchor
        self.ent_coef = ent_coef
        self.target_ess = target_ess
        self.exploration_noise = exploration_noise
        self.scale_noise_by_ent_coef = scale_noise_by_ent_coef
        self.clip_target_actions = clip_target_actions
        self.policy_delay = policy_delay
        self.target_update_interval = target_update_interval
        self.average_actor = average_actor
        self.reward_scale = reward_scale
        self.qf_learning_rate = qf_learning_rate
        self.actor_lr_decay = actor_lr_decay
        self.critic_steps = critic_steps
        self.batch_norm = batch_norm
        self.n_bins = n_bins
        self.pessimism = pessimism
        self.mixed_precision = mixed_precision
        self.compile = compile
        self._saved_ent_coef = ent_coef  # what it was when the model was saved, should `load` change it
        self._n_actor_updates = 0
        self._metrics: dict[str, tuple[th.Tensor | float, int]] = {}

        if _init_setup_model:
            self._setup_model()

    def _setup_model(self) -> None:
        self._check_arguments()
        # SB3 gets what the arguments come to here; kept, compared by `load` and saved are the arguments themselves, so that
        # what was left open is chosen anew on another device, or with other arguments
        names = ["policy_kwargs", "n_steps", "replay_buffer_class", "replay_buffer_kwargs", "buffer_size"]
        given = {name: getattr(self, name) for name in names}
        self.replay_buffer_class, self.replay_buffer_kwargs = self._choose_buffer()
        if given["replay_buffer_class"] is None or self.n_steps is None:
            self.n_steps = 1  # the buffer has its own, and SB3 would warn that it ignores this one
        # What the policy must know to act travels in its keyword arguments. A SAC that shares them has put use_sde there
        policy_kwargs = {name: value for name, value in self.policy_kwargs.items() if name != "use_sde"}
        max_value = REWARD_MAX / max(1 - self.gamma, MIN_DISCOUNTING)  # the largest that there can be, with "auto" for rewards
        self.policy_kwargs = {"max_value": max_value, **policy_kwargs, **self._diffusion_kwargs()}
        acting_only = self.env is None and self.replay_buffer is None  # loaded without an environment: see set_env
        if acting_only:
            self.buffer_size = self.n_envs
        super()._setup_model()
        vars(self).update(given)
        if acting_only:
            self.replay_buffer = None
        else:
            assert self.replay_buffer is not None
            self.replay_buffer.device = self.device  # if it comes from a file
        self._create_aliases()
        # Running statistics, of batch normalisation and of the features, are copied, not averaged, see SB3's issue 996
        self.batch_norm_stats, self.batch_norm_stats_target = [], []
        if self.critic_target is not None:
            self.batch_norm_stats += get_parameters_by_name(self.critic, ["running_"])
            self.batch_norm_stats_target += get_parameters_by_name(self.critic_target, ["running_"])
        if self.actor_target is not None:
            self.batch_norm_stats += get_parameters_by_name(self.actor, ["running_"])
            self.batch_norm_stats_target += get_parameters_by_name(self.actor_target, ["running_"])
        self._setup_temperature()
        self._mixed_precision = _has_bfloat16(self.device) if self.mixed_precision == "auto" else bool(self.mixed_precision)
        self._setup_compilation()
        if self.device.type == "cpu":
            # glibc gives large blocks back to the system at once, and new pages cost more than the arithmetic on them, until
            # it has seen one of nearly 32 MiB freed (mallopt(3), M_MMAP_THRESHOLD): 2,000 page faults per update less
            th.empty(2**25 - 2**16, dtype=th.uint8)
        # Of all batches so far: their number, mean square and largest absolute value
        self.reward_statistics = th.zeros(3, device=self.device)
        self.q_running_mean = th.zeros((), device=self.device)
        self.q_running_std = th.ones((), device=self.device)

    def _choose_buffer(self) -> tuple[type[ReplayBuffer], dict[str, Any]]:
        """:return: class and keyword arguments of the replay buffer; what was left open as it suits the other arguments"""
        if self.replay_buffer_class is not None:
            return self.replay_buffer_class, self.replay_buffer_kwargs
        is_dict = isinstance(self.observation_space, spaces.Dict)
        n_steps = self.n_steps
        if n_steps is None:
            n_steps = 1 if is_dict or self.optimize_memory_usage else DEFAULT_N_STEPS  # type: ignore[unreachable]
        kwargs = {**self.replay_buffer_kwargs, "n_steps": n_steps, "gamma": self.gamma}
        on_device = fits_on_device(self.device, self.buffer_size, self.observation_space, self.action_space, self.n_envs)
        if on_device and not self.optimize_memory_usage:
            return DeviceReplayBuffer, kwargs
        if n_steps > 1:
            return NStepReplayBuffer, kwargs
        return DictReplayBuffer if is_dict else ReplayBuffer, self.replay_buffer_kwargs

    def _diffusion_kwargs(self) -> dict[str, Any]:
        names = ["n_diffusion_steps", "n_sampling_steps", "eta", "init_noise_scale", "beta_schedule", "n_particles"]
        names += ["n_target_particles", "exploration_noise", "scale_noise_by_ent_coef", "average_actor", "batch_norm"]
        names += ["n_bins", "pessimism"]
        return {name: getattr(self, name) for name in names}

    def _setup_compilation(self) -> None:
        """What learning and acting call: functions as they are, or with ``compile`` faster ones."""
        self._noise_predictor: Callable[..., th.Tensor] = self.actor.noise_predictor
        self._run_update: Callable[..., dict[str, th.Tensor]] = self._update
        if self.compile is True:
            # One denoising step, not the loop, which would be compiled for every step of it
            self._noise_predictor = Compiled(self.actor.noise_predictor)
        self.policy.captured_act = None
        if self.compile and self.device.type == "cuda":
            optimizers = [self.actor.optimizer, self.critic.optimizer]
            self._run_update = Graphed(self._gather_and_update, optimizers, self._graph_key)
            self.policy.captured_act = Graphed(self.policy.act, key=self.policy.graph_key).copied

    def _graph_key(self) -> tuple[Any, ...]:
        """:return: what a captured update holds as it was, should somebody change it by hand"""
        # Not self.pessimism, nor self.exploration_noise, nor particles: networks and policy have their own
        numbers = self.gamma, self.tau, self.target_ess, self.reward_scale, self.ent_coef
        counts = self.n_reverse_samples, self.critic_steps
        kinds = self.score_matching, self.proposal, self.anchor, self.clip_target_actions
        groups = [*self.actor.optimizer.param_groups, *self.critic.optimizer.param_groups]
        # Of each Adam its betas and so on; capturing itself changes the learning rate's type
        own = {"params", "lr", "capturable"}
        options = repr([[value for name, value in group.items() if name not in own] for group in groups])
        learning = tuple(parameter.requires_grad for group in groups for parameter in group["params"])
        return *self.policy.graph_key(), *numbers, *counts, *kinds, options, learning

    def _setup_temperature(self) -> None:
        """
        The entropy coefficient's start and, for the paper's curve, its target entropy and optimizer.

        The optimizer is there with every kind of coefficient, so that a model can be loaded with another.
        """
        self.ent_coef_optimizer = th.optim.Adam([self.policy.log_ent_coef], lr=PAPER_ENT_COEF_LR)
        self._target_entropy: float | None = None
        mode, number = _parse_ent_coef(self.ent_coef)
        initial = number or 1.0
        if mode == "paper":
            initial = PAPER_ENT_COEF_INIT
            self._target_entropy = -(number or 0.9) * self.actor.action_dim
        self.policy.log_ent_coef.data.fill_(np.log(initial))

    @property
    def log_ent_coef(self) -> th.Tensor | None:
        """Logarithm of the entropy coefficient, or None if that is fixed (as in SB3's SAC)."""
        return self.policy.log_ent_coef if isinstance(self.ent_coef, str) else None

    @property
    def ent_coef_tensor(self) -> th.Tensor:
        """The entropy coefficient (alpha or lambda in the paper), in the unit of the reward (mirror descent: without one)."""
        return self.policy.log_ent_coef.exp()

    @property
    def reward_scale_tensor(self) -> th.Tensor | float:
        """
        The factor on the rewards inside the TD target, which sets the unit of the critics.

        With ``reward_scale="auto"`` the replayed rewards (discounted sums of ``n_steps``) have a root mean square of 0.2, near
        what the authors' factor gives in MuJoCo's tasks, whatever the environment's unit. A rare large one counts at most ten
        times as much.
        """
        if not isinstance(self.reward_scale, str):
            return self.reward_scale
        _, mean_square, largest = self.reward_statistics
        scale = th.minimum(REWARD_RMS / mean_square.sqrt(), REWARD_MAX / largest)
        return th.where(largest > 0, scale, 1.0)  # while all rewards are zero there is nothing to scale

    def _create_aliases(self) -> None:
        self.actor = self.policy.actor
        self.actor_target = self.policy.actor_target
        self.critic = self.policy.critic
        self.critic_target = self.policy.critic_target

    def train(self, gradient_steps: int, batch_size: int = 64) -> None:
        """
        Algorithm 1 of the paper, ``gradient_steps`` times.

        :param gradient_steps: updates to make
        :param batch_size: B, transitions per update
        """
        # Switch to train mode (this affects batch norm / dropout)
        self.policy.set_training_mode(True)
        if self.replay_buffer_class is None and isinstance(self.replay_buffer, NStepReplayBuffer):
            self.replay_buffer.gamma = self.gamma  # should somebody have changed it
        draw = locate_recent if isinstance(self._run_update, Graphed) else sample_recent  # a graph gathers faster

        for _ in range(gradient_steps):
            step_actor = self._n_updates % self.policy_delay == 0
            step_targets = self._n_updates % self.target_update_interval == 0
            replay_data = draw(
                self.replay_buffer, batch_size, self.replay_recency, self._vec_normalize_env  # type: ignore[arg-type]
            )
            set_learning_rate(self.actor.optimizer, self._actor_learning_rate())
            set_learning_rate(self.critic.optimizer, self._qf_learning_rate())

            with denormals_flushed():
                metrics = self._run_update(replay_data, step_actor, step_targets)
            self._track(**metrics)

            if self._target_entropy is not None and self._n_updates % PAPER_ENT_COEF_INTERVAL == 0:
                self._step_paper_temperature(self._target_entropy)
            self._n_actor_updates += step_actor
            self._n_updates += 1
            if self.device.type == "cpu" or self._n_updates % RECORD_INTERVAL == 0:
                self._record_metrics()

        self.logger.record("train/n_updates", self._n_updates, exclude="tensorboard")
        self.logger.record("train/learning_rate", self._actor_learning_rate())
        self.logger.record("train/qf_learning_rate", self._qf_learning_rate())

    def _gather_and_update(self, batch: Any, step_actor: bool, step_targets: bool) -> dict[str, th.Tensor]:
        """:meth:`_update`, of a batch or of what says where it lies in the replay buffer."""
        if isinstance(batch, BatchIndices):
            assert isinstance(self.replay_buffer, DeviceReplayBuffer)
            batch = self.replay_buffer.gather(batch)
        return self._update(batch, step_actor, step_targets)

    def _update(self, replay_data: ReplayBufferSamples, step_actor: bool, step_targets: bool) -> dict[str, th.Tensor]:
        """
        The body of Algorithm 1. All on the device: no number is read back, and nothing of Python's own changes.

        :param replay_data: B transitions
        :param step_actor: whether it is the actor's turn, too
        :param step_targets: whether it is the targets' turn
        :return: scalars for the log
        """
        anchor_is_next = self.anchor == "next" or self.score_matching == "mirror_descent"
        # For n-step replay, the discount factor is gamma**n_steps (when no early termination)
        discounts = self.gamma if replay_data.discounts is None else replay_data.discounts
        self.critic.terminates.copy_(th.maximum(self.critic.terminates, replay_data.dones.max()))

        # Features are extracted once per network and observation; the actor's loss may need the gradient of these
        with th.set_grad_enabled(step_actor and anchor_is_next):
            encoded_actor = self.actor.encode(replay_data.next_observations)  # (B, H)
        with th.no_grad():
            # Next actions: N reverse diffusions, the best by Q, noise
            encoded_critic = self.critic.encode(replay_data.next_observations)  # (C, B, H)
            actions = next_actions = self._sample_actions(encoded_actor, encoded_critic)  # (B, A)

        # TD target: without an entropy term, as in the authors' code
        outputs, next_q_values = self._critic_outputs(replay_data, next_actions)  # (C, B, M), (C, B)
        next_q_values = self.critic.pessimistic(next_q_values).unsqueeze(1)  # (C, B) -> (B, 1)
        reward_scale = self._track_reward_scale(replay_data.rewards)
        target_q_values = reward_scale * replay_data.rewards + (1 - replay_data.dones) * discounts * next_q_values

        # Critic loss: each critic against the TD target
        critic_loss = self.critic.loss(outputs, target_q_values.squeeze(1)).mean(dim=1).sum()
        metrics = {"critic_loss": critic_loss, "q_value": self.critic.values(outputs.detach()).mean()}
        if isinstance(reward_scale, th.Tensor):
            metrics["reward_scale"] = reward_scale
        if self.pessimism == "auto":
            metrics["pessimism"] = self.critic.terminates
        bins = self.critic.q_networks.bins
        if bins is not None:
            metrics["targets_out_of_range"] = (target_q_values.abs() > bins.support[-1]).float().mean()
        self.critic.optimizer.zero_grad()
        critic_loss.backward()
        for _ in range(self.critic_steps - 1):
            self.critic.optimizer.step()

        # Score matching at an action of the policy, on the critics as they are before this update's (last) step
        if self.critic_steps > 1 and anchor_is_next:
            with th.no_grad():  # other critics than above
                encoded_critic = self.critic.encode(replay_data.next_observations)
        if step_actor:
            if not anchor_is_next:
                encoded_actor = self.actor.encode(replay_data.observations)
                with th.no_grad():
                    encoded_critic = self.critic.encode(replay_data.observations)
                    actions = self._sample_actions(encoded_actor, encoded_critic)
            actor_loss, reverse_ess = self._score_matching_loss(encoded_actor, encoded_critic, actions)
            metrics.update(actor_loss=actor_loss, reverse_ess=reverse_ess)
        if self.score_matching == "mirror_descent":
            self._track_q_statistics(self.critic.q(encoded_critic, next_actions).detach())

        self.critic.optimizer.step()
        if step_actor:
            self.actor.optimizer.zero_grad()
            actor_loss.backward()
            self.actor.optimizer.step()
        if step_targets:
            self._update_targets()
        return {**metrics, "ent_coef": self.ent_coef_tensor}

    def _track(self, **metrics: th.Tensor) -> None:
        """
        Add to the sums whose means are logged; they stay on the device, so that no update waits for it.

        :param metrics: scalars by their logged name, after ``train/``
        """
        for name, value in metrics.items():
            total, count = self._metrics.get(name, (0.0, 0))
            self._metrics[name] = total + value.detach(), count + 1

    def _record_metrics(self) -> None:
        """Hand the sums to the logger, as means over all updates since its last dump."""
        # Not the logger's record_mean, for which the sum of 1,000 updates would count as much as that of one
        for name, (total, count) in self._metrics.items():
            key = f"train/{name}"
            n_before = self.logger.name_to_count[key]
            mean = (n_before * self.logger.name_to_value[key] + float(total)) / (n_before + count)
            self.logger.record(key, mean)
            self.logger.name_to_count[key] = n_before + count
        out_of_range, _ = self._metrics.get("targets_out_of_range", (0.0, 0))
        self._metrics = {}
        if out_of_range > 0:
            assert self.critic.q_networks.bins is not None
            advice = "reward_scale='auto', a smaller reward_scale, policy_kwargs=dict(max_value=...) or n_bins=1"
            if self.reward_scale == "auto":
                advice = "a new model for this gamma, or with a larger policy_kwargs=dict(max_value=...)"
            warnings.warn(
                "There are TD targets (train/targets_out_of_range is their share) that lie beyond "
                f"{self.critic.q_networks.bins.support[-1]:g} in size, the largest value that the critics can give, and count "
                f"as that: use {advice}",
                stacklevel=2,
            )

    def dump_logs(self) -> None:
        """Write the log, with the means of the training metrics since the last one."""
        self._record_metrics()
        super().dump_logs()

    def _critic_outputs(self, replay_data: ReplayBufferSamples, next_actions: th.Tensor) -> tuple[th.Tensor, th.Tensor]:
        """
        What the critics say of the transitions and, without gradient, the values that the TD target is made from.

        :param replay_data: B transitions
        :param next_actions: the policy's actions at the next observations, shape (B, A)
        :return: outputs of the critics, shape (C, B, M), and values, shape (C, B)
        """
        if self.critic_target is None:
            # Both in one batch, so that both are normalised alike; then no target network is needed (Bhatt et al. 2024,
            # "CrossQ", arXiv 1902.05605)
            obs = _concatenate(replay_data.observations, replay_data.next_observations)
            actions = th.cat([replay_data.actions, next_actions])
            with th.autocast(self.device.type, dtype=th.bfloat16, enabled=self._mixed_precision):
                outputs = self.critic.outputs(obs, actions, normalise_batch=True)
            outputs, next_outputs = outputs.chunk(2, dim=1)  # (C, 2 B, M) -> (C, B, M), (C, B, M)
            return outputs, self.critic.values(next_outputs.detach())
        with th.no_grad():
            encoded_target = self.critic_target.encode(replay_data.next_observations)
            next_q_values = self.critic_target.q_values(encoded_target, next_actions)
        return self.critic.outputs(replay_data.observations, replay_data.actions, normalise_batch=False), next_q_values

    def _sample_actions(self, encoded_actor: th.Tensor, encoded_critic: th.Tensor) -> th.Tensor:
        """
        Actions of the current policy for the update, with exploration noise.

        :param encoded_actor: the actor's encoding of B observations, shape (B, H)
        :param encoded_critic: the critics' encoding of them, shape (C, B, H)
        :return: shape (B, A)
        """
        noise = self.actor.draw_noise(len(encoded_actor), self.policy.n_target_particles)
        # The candidates' Q stays float32: its rounding would spread their weights, and with it ent_coef="auto" rose by half
        with th.autocast(self.device.type, dtype=th.bfloat16, enabled=self._mixed_precision):
            best = self.policy.best_of(
                encoded_critic, self.actor.sample(encoded_actor.detach(), *noise, self._noise_predictor)
            )
        actions = self.policy.explore(best)
        return actions.clamp(-1, 1) if self.clip_target_actions else actions

    def _score_matching_loss(
        self, encoded_actor: th.Tensor, encoded_critic: th.Tensor, actions: th.Tensor
    ) -> tuple[th.Tensor, th.Tensor]:
        """
        The loss of the noise predictor; sets the temperature on the way if it comes from the data.

        :param encoded_actor: the actor's encoding of B observations, with its gradient, shape (B, H)
        :param encoded_critic: the critics' encoding of them, shape (C, B, H)
        :param actions: the anchors, actions of the policy at these observations, shape (B, A)
        :return: the loss, and the mean effective sample size of the weights
        """
        # x_t: the action, noised to a random diffusion step
        t = th.randint(self.n_diffusion_steps, (len(actions), 1), device=self.device)  # (B, 1)
        noise = th.randn_like(actions)
        noisy_actions = self.actor.diffusion.q_sample(actions, t, noise)  # (B, A)
        predicted_noise = self.actor.predict_noise(encoded_actor, noisy_actions, t)

        if self.score_matching == "mirror_descent":
            with th.no_grad():
                q_values = self.critic.q(encoded_critic, actions).unsqueeze(1)  # (B, 1)
                weights = sm.mirror_descent_weights(q_values, self.q_running_mean, self.q_running_std, self.ent_coef_tensor)
                # Effective sample size over the batch, as a number between 1 and B
                reverse_ess = sm.effective_sample_size((weights / weights.sum()).squeeze(1))
            return sm.denoising_loss(predicted_noise, noise, weights), reverse_ess

        with th.no_grad():
            # Candidates for x_0 given x_t, their Q and softmax weights: (B, K, A), (B, K), (B, K)
            propose, draw = sm.PROPOSALS[self.proposal]
            random_numbers = draw((len(actions), self.n_reverse_samples, self.actor.action_dim), device=self.device)
            x_0, noises = propose(self.actor.diffusion, noisy_actions, t, random_numbers)
            q_values, gradients = self._q_values_and_gradients(encoded_critic, x_0)
            if _parse_ent_coef(self.ent_coef)[0] == "auto":
                self._set_temperature(q_values)
            # In the unit of the critics, whose rewards are scaled
            temperature = self.reward_scale_tensor * self.ent_coef_tensor
            weights = sm.softmax_weights(q_values, temperature)
            reverse_ess = sm.effective_sample_size(weights).mean()

        if gradients is None:  # reverse sampling alone
            # (B, A) -> (B, 1, A): one prediction for all K noises
            return sm.denoising_loss(predicted_noise.unsqueeze(1), noises, weights.unsqueeze(2)), reverse_ess
        gradient_noises = sm.gradient_noise(self.actor.diffusion, t, gradients, temperature)
        # Both are estimates of E[noise | x_t], unbiased until bounded; (B, K, A) -> (B, A)
        noises = noises.lerp(gradient_noises, sm.gradient_share(self.actor.diffusion, t).unsqueeze(2))
        return sm.denoising_loss(predicted_noise, sm.expected_noise(noises, weights)), reverse_ess

    def _q_values_and_gradients(self, encoded_critic: th.Tensor, x_0: th.Tensor) -> tuple[th.Tensor, th.Tensor | None]:
        """
        :param encoded_critic: the critics' encoding of B observations, shape (C, B, H)
        :param x_0: candidates, shape (B, K, A)
        :return: Q, shape (B, K), and, for the gradient-assisted target, its gradient with respect to x_0, shape (B, K, A)
        """
        if self.score_matching == "reverse_sampling":
            return self.critic.q(encoded_critic, x_0), None
        with th.enable_grad():
            q_values = self.critic.q(encoded_critic, x_0.requires_grad_())
            (gradients,) = th.autograd.grad(q_values.sum(), x_0)
        return q_values.detach(), gradients

    def _track_reward_scale(self, rewards: th.Tensor) -> th.Tensor | float:
        """
        :param rewards: of the batch, shape (B, 1)
        :return: the factor for them, see :attr:`reward_scale_tensor`
        """
        if isinstance(self.reward_scale, str):
            n_batches, mean_square, largest = self.reward_statistics
            n_batches += 1
            mean_square += (rewards.square().mean() - mean_square) / n_batches
            largest.copy_(th.maximum(largest, rewards.abs().max()))
        return self.reward_scale_tensor

    def _track_q_statistics(self, q_values: th.Tensor) -> None:
        """
        Moving averages of Q's mean and standard deviation, on every update (official DPMD).

        :param q_values: Q of the next actions, shape (B,)
        """
        self.q_running_mean.lerp_(q_values.mean(), Q_STATISTICS_RATE)
        self.q_running_std.lerp_(q_values.std(correction=0), Q_STATISTICS_RATE)

    def _set_temperature(self, q_values: th.Tensor) -> None:
        """
        Move the entropy coefficient towards the one that gives the weights their effective sample size.

        :param q_values: Q of the candidates, shape (B, K)
        """
        temperature = sm.solve_temperature(q_values, self.target_ess * self.n_reverse_samples)
        first = self._n_actor_updates == 0 and self.ent_coef == "auto"
        rate = 1.0 if first else TEMPERATURE_RATE
        self.policy.log_ent_coef.lerp_((temperature / self.reward_scale_tensor).log(), rate)

    def _step_paper_temperature(self, target_entropy: float) -> None:
        """
        One step of the authors' temperature: loss = -log_alpha (target - H), where H is the entropy of the exploration noise.

        No data enters. H = A/2 log(2 pi e (0.1 alpha)^2) counts as a constant, so the gradient is H - target.

        :param target_entropy: -0.9 A unless told otherwise, in nats
        """
        log_std = np.log(self.exploration_noise) + self.policy.log_ent_coef
        entropy = self.actor.action_dim * (0.5 * np.log(2 * np.pi * np.e) + log_std)
        self.policy.log_ent_coef.grad = entropy - target_entropy
        self.ent_coef_optimizer.step()

    def _update_targets(self) -> None:
        """Polyak step of the target critics and of the averaged actor."""
        if self.critic_target is not None:
            polyak_update(self.critic.parameters(), self.critic_target.parameters(), self.tau)
        polyak_update(self.batch_norm_stats, self.batch_norm_stats_target, 1.0)
        if self.actor_target is not None:
            polyak_update(self.actor.parameters(), self.actor_target.parameters(), self.tau)

    def _setup_lr_schedule(self) -> None:
        super()._setup_lr_schedule()
        # None: whatever the actor's schedule is at the time
        self.qf_lr_schedule = None if self.qf_learning_rate is None else FloatSchedule(self.qf_learning_rate)

    def _actor_learning_rate(self) -> float:
        """
        :return: learning rate of the actor's next update: the schedule in training progress, decayed in its own updates if so
            asked (the paper)
        """
        learning_rate = self.lr_schedule(self._current_progress_remaining)
        if self.actor_lr_decay is not None:
            final, begin, end = self.actor_lr_decay
            fraction = min(max((self._n_actor_updates - begin) / (end - begin), 0.0), 1.0)
            learning_rate += fraction * (final - learning_rate)
        return learning_rate

    def _qf_learning_rate(self) -> float:
        """:return: learning rate of the critics, which follows the actor's schedule (not its decay) unless it has its own"""
        return (self.qf_lr_schedule or self.lr_schedule)(self._current_progress_remaining)

    def learn(
        self: SelfSDAC,
        total_timesteps: int,
        callback: MaybeCallback = None,
        log_interval: int = 4,
        tb_log_name: str = "SDAC",
        reset_num_timesteps: bool = True,
        progress_bar: bool = False,
    ) -> SelfSDAC:
        """
        Learn for a number of environment steps; see SB3's ``BaseAlgorithm.learn``.

        :param total_timesteps: environment steps, summed over all environments
        :param callback: called at every step
        :param log_interval: episodes between two logs
        :param tb_log_name: name of the run in TensorBoard
        :param reset_num_timesteps: start counting anew, or go on from where an earlier call ended
        :param progress_bar: show a progress bar (needs tqdm and rich)
        :return: the model
        :raises ValueError: when an observation, action or reward is not finite
        """
        return super().learn(
            total_timesteps=total_timesteps,
            callback=callback,
            log_interval=log_interval,
            tb_log_name=tb_log_name,
            reset_num_timesteps=reset_num_timesteps,
            progress_bar=progress_bar,
        )

    def _setup_learn(
        self,
        total_timesteps: int,
        callback: MaybeCallback = None,
        reset_num_timesteps: bool = True,
        tb_log_name: str = "run",
        progress_bar: bool = False,
    ) -> tuple[int, BaseCallback]:
        if (reset_num_timesteps or self._last_obs is None) and self.replay_buffer is not None:
            cut_off_episodes(self.replay_buffer)  # SB3 is about to reset the environments
        return super()._setup_learn(total_timesteps, callback, reset_num_timesteps, tb_log_name, progress_bar)

    def _sample_action(
        self, learning_starts: int, action_noise: ActionNoise | None = None, n_envs: int = 1
    ) -> tuple[np.ndarray, np.ndarray]:
        self._check_finite("observation", self._last_obs)  # type: ignore[arg-type]
        action, buffer_action = super()._sample_action(learning_starts, action_noise, n_envs)
        self._check_finite("action", buffer_action)
        return action, buffer_action

    def _store_transition(
        self,
        replay_buffer: ReplayBuffer,
        buffer_action: np.ndarray,
        new_obs: np.ndarray | dict[str, np.ndarray],
        reward: np.ndarray,
        dones: np.ndarray,
        infos: list[dict[str, Any]],
    ) -> None:
        if self._vec_normalize_env is None:
            original_obs, original_reward = new_obs, reward
        else:  # what is stored; VecNormalize's clipping would hide that it is infinite
            original_obs = self._vec_normalize_env.get_original_obs()
            original_reward = self._vec_normalize_env.get_original_reward()
        self._check_finite("observation", original_obs)
        self._check_finite("reward", original_reward)
        for info in infos:
            if info.get("terminal_observation") is not None:
                self._check_finite("terminal observation", info["terminal_observation"])
        super()._store_transition(replay_buffer, buffer_action, new_obs, reward, dones, infos)

    def _check_finite(self, name: str, array: np.ndarray | dict[str, np.ndarray]) -> None:
        """
        Stop before something that is not a number gets into the replay buffer or the networks.

        One thing passes: VecNormalize hands over terminal observations clipped, so that an infinite one looks finite.

        :param name: what the array is
        :param array: observations (of a Dict space, by key), actions or rewards
        :raises ValueError: if any entry is NaN or infinite
        """
        for key, value in array.items() if isinstance(array, dict) else [(None, array)]:
            if not np.isfinite(value).all():
                name = name if key is None else f"{name} '{key}'"
                raise ValueError(
                    f"The {name} at environment step {self.num_timesteps} is not finite: {value}. Nothing of this step was "
                    "stored or learned from; the model can still be saved. SB3's VecCheckNan helps to find the origin."
                )

    def set_env(self, env: GymEnv, force_reset: bool = True) -> None:
        """
        Set the environment to learn from, see SB3's ``BaseAlgorithm.set_env``.

        A model loaded without an environment has no replay buffer, as acting needs none; it gets one here.

        :param env: the environment
        :param force_reset: reset it before learning goes on
        """
        super().set_env(env, force_reset)
        if self.replay_buffer is None:
            buffer_class, kwargs = self._choose_buffer()
            self.replay_buffer = buffer_class(
                self.buffer_size,
                self.observation_space,
                self.action_space,
                device=self.device,
                n_envs=self.n_envs,
                optimize_memory_usage=self.optimize_memory_usage,
                **kwargs,
            )

    @staticmethod
    def _wrap_env(env: GymEnv, verbose: int = 0, monitor_wrapper: bool = True) -> VecEnv:
        vec_env = OffPolicyAlgorithm._wrap_env(env, verbose, monitor_wrapper)
        action_space = vec_env.action_space
        if isinstance(action_space, spaces.Box):  # SB3 itself refuses the others
            with np.errstate(over="ignore", invalid="ignore"):
                width = action_space.high - action_space.low
            floating = np.issubdtype(action_space.dtype, np.floating)
            if not floating or not np.isfinite(width).all() or (width <= 0).any():
                raise ValueError(
                    f"SDAC needs a floating-point action space with finite bounds, low < high, but got {action_space} with "
                    f"low {action_space.low} and high {action_space.high}. Wrap the environment, for instance with "
                    "gymnasium.wrappers.RescaleAction."
                )
        return vec_env

    @classmethod
    def load(
        cls: type[SelfSDAC],
        path: str | pathlib.Path | io.BufferedIOBase,
        env: GymEnv | None = None,
        device: th.device | str = "auto",
        custom_objects: dict[str, Any] | None = None,
        print_system_info: bool = False,
        force_reset: bool = True,
        **kwargs: Any,
    ) -> SelfSDAC:
        """
        Load a model from a zip file, see SB3's ``BaseAlgorithm.load``.

        Without ``env`` the model can act at once and has no replay buffer until :meth:`set_env`.

        :param path: the file, with or without ``.zip``
        :param env: environment to go on learning from
        :param device: where to put the networks; if it is not there, a warning and the CPU, so that models move between
            machines
        :param custom_objects: objects to use instead of those saved under the same name
        :param print_system_info: print versions at saving and now
        :param force_reset: reset the environment before learning goes on
        :param kwargs: arguments of the constructor to change
        :return: the model
        :raises ValueError: if the file is not a complete model of SDAC, or does not fit the environment or the arguments
        """
        if str(device) != "auto" and th.device(device).type != get_device(device).type:
            warnings.warn(
                f"device={str(device)!r} was asked for but is not there: the model is loaded on {get_device(device)}",
                stacklevel=2,
            )
            device = "auto"
        try:
            model = super().load(path, env, device, custom_objects, print_system_info, force_reset, **kwargs)
        except Exception as error:
            # A damaged file speaks through many types of SB3, zipfile, json and torch; a plain ValueError is a verdict already
            damaged = isinstance(error, (UnicodeError, json.JSONDecodeError))
            if isinstance(error, (OSError, ValueError)) and not damaged:
                raise
            # SB3 meets a ValueError of load_state_dict with an attempt to read an old DQN, whose KeyError says nothing
            reason = error.__context__ if isinstance(error, KeyError) and error.__context__ is not None else error
            raise ValueError(
                f"{path} cannot be loaded, it is damaged, of another architecture, or a checkpoint, for which there is "
                f"sb3_sdac.checkpoint.load_checkpoint: {reason!r}"
            ) from error
        if model.ent_coef != model._saved_ent_coef:  # changed by `kwargs`, while the saved policy holds the former coefficient
            if model.ent_coef != "auto":  # which is where "auto" goes on from
                model._setup_temperature()
            model._saved_ent_coef = model.ent_coef
        bins = model.critic.q_networks.bins
        if bins is not None and bins.support[-1] < 0.999 * model.critic.max_value:
            warnings.warn(
                f"The critics in {path} give values up to {bins.support[-1]:g} (in scaled rewards) and count larger ones as "
                f"that, but with gamma={model.gamma} there may be values up to {model.critic.max_value:g}. Train a new model "
                "if train/targets_out_of_range rises above 0",
                stacklevel=2,
            )
        return model

    def set_parameters(
        self,
        load_path_or_dict: str | TensorDict,
        exact_match: bool = True,
        device: th.device | str = "auto",
    ) -> None:
        """
        Set networks and optimizers, see SB3's ``BaseAlgorithm.set_parameters``; a fixed entropy coefficient stays.

        :param load_path_or_dict: a file, or ``get_parameters()`` of another model
        :param exact_match: whether every part must be given
        :param device: where to put them
        """
        super().set_parameters(load_path_or_dict, exact_match, device)
        if not isinstance(self.ent_coef, str):
            self.policy.log_ent_coef.data.fill_(np.log(self.ent_coef))

    def _excluded_save_params(self) -> list[str]:
        aliases = ["actor", "actor_target", "critic", "critic_target", "batch_norm_stats", "batch_norm_stats_target"]
        # Made anew: the other machine may have neither bfloat16 nor a compiler
        aliases += ["_metrics", "_mixed_precision", "_noise_predictor", "_run_update"]
        return [*super()._excluded_save_params(), *aliases]

    def _get_torch_save_params(self) -> tuple[list[str], list[str]]:
        optimizers = ["actor.optimizer", "critic.optimizer", "ent_coef_optimizer"]
        return ["policy", *optimizers], ["q_running_mean", "q_running_std", "reward_statistics"]

    def _check_arguments(self) -> None:
        """
        Check SDAC's own arguments, whether they come from the constructor or from ``load``.

        :raises ValueError: says what was given and what is allowed
        """
        if not issubclass(self.policy_class, DiffusionPolicy):
            raise ValueError(
                "The policy of SDAC must be 'MlpPolicy', 'CnnPolicy', 'MultiInputPolicy' or a subclass of DiffusionPolicy, "
                f"got {self.policy_class.__name__}. If it comes from a file: another algorithm saved that, use it to load."
            )
        if self.use_sde:
            raise ValueError(
                "use_sde=True is not supported: a diffusion policy has no Gaussian whose noise could depend on the state. "
                "Leave it False; exploration_noise and action_noise set how SDAC explores."
            )
        counts = ["n_diffusion_steps", "n_sampling_steps", "n_particles", "policy_delay", "target_update_interval"]
        counts += ["critic_steps", "batch_size", "buffer_size"]
        self._check(is_count, "an integer of at least 1", *counts)
        self._check(lambda value: is_count(value) and value % 2 == 1, "an odd integer of at least 1", "n_bins")
        allowed = "an integer of at least 1, or None"
        self._check(lambda value: value is None or is_count(value), allowed, "n_target_particles", "n_steps")
        # Python's integers where SB3 wants them
        self.gradient_steps, self.train_freq = _as_int(self.gradient_steps), _as_int(self.train_freq)
        allowed = "an integer of at least -1"
        self._check(lambda value: is_count(value) or (type(value) is int and value in (0, -1)), allowed, "gradient_steps")
        self._check(
            lambda value: is_count(value[0] if isinstance(value, tuple) and value else value),
            "an integer of at least 1, or a tuple of one and 'step' or 'episode'",
            "train_freq",
        )
        at_most = f"at most n_diffusion_steps={self.n_diffusion_steps}"
        self._check(lambda value: value <= self.n_diffusion_steps, at_most, "n_sampling_steps")
        self._check(lambda value: _is_number(value) and value > 0, "a positive number", "init_noise_scale")
        allowed = "a positive number, or 'auto'"
        self._check(lambda value: value == "auto" or (_is_number(value) and value > 0), allowed, "reward_scale")
        self._check(lambda value: _is_number(value) and value >= 1, "a number of at least 1", "replay_recency")
        self._check(lambda value: _is_number(value) and value >= 0, "a number of at least 0", "exploration_noise")
        self._check(lambda value: _is_number(value) and 0 <= value <= 1, "a number between 0 and 1", "eta", "tau", "gamma")
        allowed = "a number between 0 and 1, or 'auto'"
        self._check(lambda value: value == "auto" or (_is_number(value) and 0 <= value <= 1), allowed, "pessimism")
        for name, known in (
            ("beta_schedule", list(BETA_SCHEDULES)),
            ("score_matching", ["reverse_sampling", "gradient_assisted", "mirror_descent"]),
            ("proposal", list(sm.PROPOSALS)),
            ("anchor", ["next", "current"]),
        ):
            self._check(known.__contains__, f"one of {known}", name)
        if self.score_matching != "mirror_descent":
            allowed = "an integer of at least 2 (the weight of a single one is always 1)"
            self._check(lambda value: is_count(value) and value >= 2, allowed, "n_reverse_samples")
        for name in ("learning_rate", "qf_learning_rate"):
            allowed = "a number of at least 0, or a function of the progress remaining"
            self._check(lambda rate: rate is None or callable(rate) or (_is_number(rate) and rate >= 0), allowed, name)
        if self.actor_lr_decay is not None:
            allowed = "(final learning rate, first, last actor update) with first < last, or None"
            self._check(_is_lr_decay, allowed, "actor_lr_decay")
        allowed = "True, False or 'auto'"
        self._check(lambda value: isinstance(value, bool) or value == "auto", allowed, "mixed_precision", "compile")
        self._check(_is_ent_coef, "a positive number, 'auto', 'auto_<number>', 'paper' or 'paper_<number>'", "ent_coef")
        ent_coef_mode, _ = _parse_ent_coef(self.ent_coef)
        if ent_coef_mode == "auto":
            if self.score_matching == "mirror_descent":
                raise ValueError("ent_coef='auto' needs reverse samples; with 'mirror_descent' give a number or 'paper'")
            lowest = 1 / self.n_reverse_samples
            allowed = f"a fraction of n_reverse_samples={self.n_reverse_samples}, above {lowest:g} and below 1"
            self._check(lambda value: _is_number(value) and lowest < value < 1, allowed, "target_ess")
        if ent_coef_mode == "paper" and self.exploration_noise == 0:
            raise ValueError(
                "ent_coef='paper' is made from the exploration noise's entropy: exploration_noise must be positive"
            )
        self._check_policy_and_buffer()

    def _check_policy_and_buffer(self) -> None:
        """
        Check what the arguments of the policy and of the replay buffer may be.

        :raises ValueError: says what was given and what is allowed
        """
        misplaced = [("policy_kwargs", self.policy_kwargs, list(self._diffusion_kwargs()))]
        if self.replay_buffer_class is None:
            misplaced.append(("replay_buffer_kwargs", self.replay_buffer_kwargs, ["n_steps", "gamma"]))
            one_step = isinstance(self.observation_space, spaces.Dict) or self.optimize_memory_usage
            if one_step and self.n_steps is not None and self.n_steps > 1:
                raise ValueError(
                    f"n_steps must be 1 or None with Dict observations or optimize_memory_usage=True, got {self.n_steps}: SB3 "
                    "has no n-step returns for these"
                )
        elif issubclass(self.replay_buffer_class, HerReplayBuffer) and self.env is None:
            raise ValueError("This model learns with HerReplayBuffer, which needs the environment: load it with env=...")
        for where, kwargs, names in misplaced:
            for name in names:
                if name in kwargs:
                    given = f"{where}={{{name!r}: {kwargs[name]!r}}}"
                    raise ValueError(f"{name} is an argument of SDAC itself: give {name}=... instead of {given}")
        if self.policy_kwargs.get("use_sde"):
            raise ValueError("policy_kwargs={'use_sde': True} is not supported, as use_sde=True is not: leave it out")

    def _check(self, is_valid: Callable[[Any], bool], allowed: str, *names: str) -> None:
        for name in names:
            value = getattr(self, name)
            if not is_valid(value):
                raise ValueError(f"{name} must be {allowed}, got {value!r}")


def _is_number(value: Any) -> bool:
    return isinstance(value, (int, float, np.number)) and not isinstance(value, bool) and bool(np.isfinite(value))


def _concatenate(first: PyTorchObs, second: PyTorchObs) -> PyTorchObs:
    if isinstance(first, dict) and isinstance(second, dict):
        return {key: th.cat([value, second[key]]) for key, value in first.items()}
    return th.cat([first, second])  # type: ignore[list-item]


def _as_int(value: Any) -> Any:
    return int(value) if isinstance(value, np.integer) else value


def _is_lr_decay(value: Any) -> bool:
    return (
        isinstance(value, (tuple, list))
        and len(value) == 3
        and all(map(_is_number, value))
        and value[0] >= 0 <= value[1] < value[2]
    )


def _parse_ent_coef(value: float | str) -> tuple[str, float | None]:
    """``"auto_0.1"`` is ("auto", 0.1), ``"paper"`` is ("paper", None), and 0.1 is ("fixed", 0.1)."""
    if not isinstance(value, str):
        return "fixed", value
    mode, separator, number = value.partition("_")
    return mode, float(number) if separator else None


def _is_ent_coef(value: Any) -> bool:
    if not isinstance(value, str):
        return _is_number(value) and bool(value > 0)
    try:
        mode, number = _parse_ent_coef(value)
    except ValueError:
        return False
    return mode in ("auto", "paper") and (number is None or 0 < number < np.inf)


def _has_bfloat16(device: th.device) -> bool:
    """Whether matrix products in bfloat16 are faster there than in float32."""
    if device.type == "cuda":
        with th.cuda.device(device):  # it is asked of the current one
            return th.cuda.is_bf16_supported(including_emulation=False)
    if device.type != "cpu":
        return False
    # Not public, so they may go
    probes = [getattr(th.cpu, name, None) for name in ("_is_avx512_bf16_supported", "_is_amx_tile_supported")]
    return any(probe is not None and probe() for probe in probes)


def _check_device(device: th.device | str) -> None:
    """SB3 falls back to the CPU without a word where CUDA was asked for and is missing."""
    if str(device).startswith("cuda") and not th.cuda.is_available():
        raise ValueError(f"device={str(device)!r} was given but PyTorch finds no CUDA device here; use device='cpu' or 'auto'")
