"""SDAC in SB3's grammar: when to collect and update, what to log, save and load. The update is in ``update.py``."""

import dataclasses
import functools
import inspect
import io
import pathlib
import warnings
from collections.abc import Callable, Hashable
from typing import Any, ClassVar, TypeVar

import numpy as np
import torch as th
from gymnasium import spaces
from stable_baselines3.common.buffers import NStepReplayBuffer, ReplayBuffer
from stable_baselines3.common.callbacks import BaseCallback
from stable_baselines3.common.noise import ActionNoise
from stable_baselines3.common.policies import BasePolicy
from stable_baselines3.common.type_aliases import GymEnv, MaybeCallback, Schedule, TensorDict, TrainFrequencyUnit
from stable_baselines3.common.utils import FloatSchedule
from stable_baselines3.her.her_replay_buffer import HerReplayBuffer

from sb3_sdac import score_matching as sm
from sb3_sdac.arguments import (
    ELSEWHERE,
    check,
    check_choice,
    is_count,
    is_fraction,
    is_lr_decay,
    is_number,
    is_positive,
    is_rate,
    is_train_freq,
)
from sb3_sdac.buffers import BatchIndices, DeviceReplayBuffer, locate_recent, sample_recent
from sb3_sdac.compilation import (
    Compiled,
    Graphed,
    addresses,
    denormals_flushed,
    has_bfloat16,
    has_compiler,
    keep_freed_memory,
    set_learning_rate,
)
from sb3_sdac.metrics import FETCH_INTERVAL, TrainingMetrics
from sb3_sdac.off_policy import CarefulOffPolicyAlgorithm
from sb3_sdac.options import UpdateOptions
from sb3_sdac.policies import Actor, CnnPolicy, Critic, DiffusionPolicy, MlpPolicy, MultiInputPolicy
from sb3_sdac.rewards import largest_value
from sb3_sdac.spaces import check_extractor
from sb3_sdac.temperature import Temperature, is_ent_coef
from sb3_sdac.update import Metrics, Update

#: With compile="auto": updates of a run from which on compiling them pays on a CPU
COMPILED_FROM = 50_000
#: Up to as many denoising steps are compiled as one function
MAX_UNROLLED = 8

SelfSDAC = TypeVar("SelfSDAC", bound="SDAC")


class SDAC(CarefulOffPolicyAlgorithm):
    """
    Soft Diffusion Actor-Critic (SDAC): online reinforcement learning with a diffusion policy.

    The policy is a diffusion model trained by score matching on the Q-function alone: it needs no samples of an optimal
    policy and no gradients through the denoising chain.

    Paper: https://arxiv.org/abs/2502.00361. Code of the authors: https://github.com/mahaitongdae/diffusion_policy_online_rl.
    ``SDAC("MlpPolicy", env, **PAPER_SDAC)`` is their configuration. What networks and acting need (diffusion steps,
    particles, exploration noise, ...) belongs to the policy: ``policy_kwargs=dict(n_particles=8)``. What :attr:`LIVE` names
    may be set at any time (``model.ent_coef = 0.02``), works at once, and is saved.

    :param policy: ``"MlpPolicy"``, ``"CnnPolicy"``, ``"MultiInputPolicy"`` or a subclass of :class:`~sb3_sdac.DiffusionPolicy`
    :param env: the environment to learn from (its id, if registered in Gymnasium); actions must be a ``Box`` with finite
        bounds
    :param learning_rate: learning rate of the actor, and of the critics if ``qf_learning_rate`` is not given; a float or a
        function of the progress remaining (from 1 to 0)
    :param buffer_size: size of the replay buffer, in transitions
    :param learning_starts: environment steps taken at random before learning starts
    :param batch_size: B, transitions per update
    :param tau: step of the targets' moving average (Polyak update), between 0 and 1; without effect by default, as there are
        neither target critics nor an averaged actor
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
        ``optimize_memory_usage`` or a ``replay_buffer_class`` of your own
    :param replay_recency: k, at least 1: how much more often recent transitions are replayed. Half of each batch comes from
        the newest 1 / 2^k of the replay buffer; with 1 all are drawn alike (the paper), as they are by a buffer with a
        ``sample`` of its own such as ``HerReplayBuffer`` (:func:`~sb3_sdac.buffers.sample_recent`)
    :param n_reverse_samples: K, candidates for x_0 per noisy action, at least 2; fewer than 4 need a larger ``target_ess``
    :param score_matching: where the noise predictor's target comes from. ``"reverse_sampling"``: the mean noise of K
        candidates weighted by exp(Q/lambda) (the paper). ``"gradient_assisted"``: the same, with Q's gradient at the
        candidates taking over where the noise is low
    :param proposal: distribution of the candidates: ``"truncated_normal"`` inside the box or ``"clipped_normal"`` (the paper)
    :param noised_actions: the actions that are noised to get x_t: ``"next"``, those of the TD target at the next
        observations, which saves a sampling pass, or ``"current"``, fresh ones at the observations (the paper)
    :param ent_coef: entropy coefficient or temperature (alpha or lambda in the paper), in the unit of the reward: a
        positive float, ``"auto"`` to set it from the data such that the candidates' weights have the effective sample
        size ``target_ess`` (``"auto_0.1"`` to start that from 0.1 instead of the first batch's solution), or
        ``"paper"`` for the authors' fixed curve from 5 to 0.984 (``"paper_1.5"`` ends at 0.54: the number is the target
        entropy per action dimension, negated, 0.9 by default; the end is inversely proportional to the policy's
        ``exploration_noise``, here 0.1)
    :param target_ess: effective sample size to reach with ``ent_coef="auto"``, as a fraction of K, between 1/K and 1
    :param clip_target_actions: clip the noisy actions of the update to the box; the authors do not. Actions for the
        environment always are
    :param policy_delay: step the actor on every ``policy_delay``-th update
    :param target_update_interval: update the targets on every ``target_update_interval``-th update
    :param reward_scale: factor on the rewards inside the critics' targets, or ``"auto"`` to divide them by five times the root
        mean square of the replayed ones (discounted sums of ``n_steps``), so that their unit does not matter; the temperature
        keeps the reward's unit
    :param qf_learning_rate: learning rate of the critics, a float or a function of the progress remaining; ``None`` for
        ``learning_rate``
    :param actor_lr_decay: ``(final, begin, end)``: the actor's learning rate goes linearly from ``learning_rate`` to
        ``final`` between its ``begin``-th and ``end``-th update (the paper)
    :param mixed_precision: use bfloat16 to sample the update's actions and, with the policy's ``batch_norm``, in the critics'
        training pass. ``"auto"``: if the processor supports it (CPUs with AVX512-BF16 or AMX, CUDA devices). Acting, losses,
        weights and optimizers stay float32
    :param compile: ``"auto"``: on CUDA capture whole updates and predictions as CUDA graphs, each then one launch instead of
        hundreds; on a CPU compile the updates with ``torch.compile`` where ``learn`` is to make 50,000 of them or more and
        there is a C++ compiler. True: compile them always (a minute or two the first time), on CUDA the denoising step (needs
        Triton). False: neither. Nothing of it is in a saved model
    :param stats_window_size: episodes over which the logged success rate, length and reward are averaged
    :param tensorboard_log: folder of the TensorBoard log; no log if ``None``
    :param policy_kwargs: arguments of the policy, see :class:`~sb3_sdac.DiffusionPolicy`
    :param verbose: 0 no output, 1 information, 2 debug
    :param seed: seed of the pseudo-random generators
    :param device: ``"cpu"``, ``"cuda"``, ..., or ``"auto"`` for the GPU if there is one
    :param _init_setup_model: whether to build the networks now
    :param unknown: raises; here so that the message can say what takes the place of an argument of SAC or TQC
    :raises ValueError: for arguments outside their range, or a CUDA device where there is none
    :raises TypeError: for arguments that it does not have
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
    update_class: ClassVar[type[Update]] = Update
    options_class: ClassVar[type[UpdateOptions]] = UpdateOptions
    #: Arguments that may be set on a live model; those of the policy are ``model.policy``'s
    LIVE: ClassVar[frozenset[str]] = frozenset(
        {
            *("learning_rate", "learning_starts", "batch_size", "tau", "gamma", "train_freq", "gradient_steps"),
            *("replay_recency", "n_reverse_samples", "score_matching", "proposal", "noised_actions", "ent_coef", "target_ess"),
            *("clip_target_actions", "policy_delay", "target_update_interval", "reward_scale", "qf_learning_rate"),
            *("actor_lr_decay", "mixed_precision", "compile"),
        }
    )
    FIXED: ClassVar[dict[str, str]] = {
        **dict.fromkeys(
            ("buffer_size", "replay_buffer_class", "replay_buffer_kwargs", "optimize_memory_usage", "n_steps"),
            "the replay buffer is made with it, so save the model and load it with this argument",
        ),
        "policy_kwargs": "the networks are made with them, so make a new model; what acting needs is set on model.policy",
        "seed": "use model.set_random_seed(...)",
        "stats_window_size": "save the model and load it with this argument",
    }

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
        n_reverse_samples: int = 4,
        score_matching: str = "gradient_assisted",
        proposal: str = "truncated_normal",
        noised_actions: str = "next",
        ent_coef: float | str = "auto",
        target_ess: float = 0.28,
        clip_target_actions: bool = True,
        policy_delay: int = 3,
        target_update_interval: int = 1,
        reward_scale: float | str = "auto",
        qf_learning_rate: float | Schedule | None = None,
        actor_lr_decay: tuple[float, int, int] | None = None,
        mixed_precision: bool | str = "auto",
        compile: bool | str = "auto",
        stats_window_size: int = 100,
        tensorboard_log: str | None = None,
        policy_kwargs: dict[str, Any] | None = None,
        verbose: int = 0,
        seed: int | None = None,
        device: th.device | str = "auto",
        _init_setup_model: bool = True,
        **unknown: Any,
    ):
        self._refuse_unknown(unknown)
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
            n_steps=n_steps,
            policy_kwargs=policy_kwargs,
            stats_window_size=stats_window_size,
            tensorboard_log=tensorboard_log,
            verbose=verbose,
            seed=seed,
            device=device,
            sde_support=False,
            supported_action_spaces=(spaces.Box,),
            support_multi_env=True,
        )
        self.replay_recency = replay_recency
        self.n_reverse_samples = n_reverse_samples
        self.score_matching = score_matching
        self.proposal = proposal
        self.noised_actions = noised_actions
        self.ent_coef = ent_coef
        self.target_ess = target_ess
        self.clip_target_actions = clip_target_actions
        self.policy_delay = policy_delay
        self.target_update_interval = target_update_interval
        self.reward_scale = reward_scale
        self.qf_learning_rate = qf_learning_rate
        self.actor_lr_decay = actor_lr_decay
        self.mixed_precision = mixed_precision
        self.compile = compile
        self._n_actor_updates = 0
        self._metrics = TrainingMetrics()

        if _init_setup_model:
            self._setup_model()

    def _setup_model(self) -> None:
        self._check_arguments()
        self._setup_lr_schedule()
        self.set_random_seed(self.seed)
        self._setup_replay_buffer()
        given = {name: value for name, value in self.policy_kwargs.items() if name != "use_sde"}  # False, from a SAC
        policy_kwargs = {"max_value": largest_value(self.gamma), **given}
        policy: Any = self.policy_class(self.observation_space, self.action_space, self.lr_schedule, **policy_kwargs)
        self.policy = policy.to(self.device)
        self._convert_train_freq()
        self._create_aliases()
        self.temperature = Temperature(self.ent_coef, self.policy.log_ent_coef, self.actor.action_dim)
        self.update = self.update_class(self.policy)
        self._setup_compilation()
        if self.device.type == "cpu":
            keep_freed_memory()
        self._go_live()

    def _create_aliases(self) -> None:
        self.actor = self.policy.actor
        self.actor_target = self.policy.actor_target
        self.critic = self.policy.critic
        self.critic_target = self.policy.critic_target

    def _setup_compilation(self) -> None:
        """What learning and acting call: functions as they are, or with ``compile`` faster ones."""
        self._mixed_precision = has_bfloat16(self.device) if self.mixed_precision == "auto" else bool(self.mixed_precision)
        worth_it = self.compile is True or (self.compile == "auto" and self._compiling_pays())
        _compile_update(self.update, worth_it, on_cpu=self.device.type == "cpu")
        self._run_update: Callable[..., Metrics] = self._gather_and_update
        vars(self.policy).pop("_predict", None)
        if self.compile and self.device.type == "cuda":
            key = functools.partial(_graph_key, self.policy)
            self._run_update = Graphed(self._gather_and_update, [self.actor.optimizer, self.critic.optimizer], key)
            vars(self.policy)["_predict"] = Graphed(self.policy.act, key=key).copied

    def _compiling_pays(self) -> bool:
        """:return: whether the updates of the whole run are worth a minute of compiling, and there is a compiler"""
        train_freq: Any = self.train_freq
        if self.device.type != "cpu" or not self._total_timesteps:
            return False
        steps_per_rollout = self.n_envs * (train_freq.frequency if train_freq.unit == TrainFrequencyUnit.STEP else 1000)
        per_rollout = steps_per_rollout if self.gradient_steps == -1 else self.gradient_steps
        return self._total_timesteps * per_rollout / steps_per_rollout >= COMPILED_FROM and has_compiler()

    def _setup_learn(self, *args: Any, **kwargs: Any) -> tuple[int, BaseCallback]:
        prepared = super()._setup_learn(*args, **kwargs)
        if self.compile == "auto" and self.device.type == "cpu":  # by the length of the run, which is known now
            self._setup_compilation()
        return prepared

    def _gather_and_update(self, batch: Any, *flags: Any) -> Metrics:
        """An update, of a batch or of what says where it lies in the replay buffer."""
        if isinstance(batch, BatchIndices):
            assert isinstance(self.replay_buffer, DeviceReplayBuffer)
            batch = self.replay_buffer.gather(batch)
        return self.update(batch, *flags)

    @property
    def log_ent_coef(self) -> th.Tensor | None:
        """Logarithm of the entropy coefficient, or None if that is fixed (as in SB3's SAC)."""
        return self.policy.log_ent_coef if isinstance(self.ent_coef, str) else None

    @property
    def ent_coef_tensor(self) -> th.Tensor:
        """The entropy coefficient (alpha or lambda in the paper), in the unit of the reward (DPMD: without one)."""
        return self.policy.log_ent_coef.exp()

    def update_options(self) -> UpdateOptions:
        """:return: what the next update depends on, from the arguments as they are now"""
        derived: dict[str, Any] = {
            "temperature_rate": self.temperature.data_rate(self._n_actor_updates),
            "mixed_precision": self._mixed_precision,
        }
        names = [field.name for field in dataclasses.fields(self.options_class)]
        return self.options_class(**{name: derived[name] if name in derived else getattr(self, name) for name in names})

    def train(self, gradient_steps: int, batch_size: int = 64) -> None:
        """
        Algorithm 1 of the paper (:class:`~sb3_sdac.update.Update`), ``gradient_steps`` times.

        :param gradient_steps: updates to make
        :param batch_size: B, transitions per update
        :raises ValueError: if there is nothing to learn from
        """
        super().train(gradient_steps, batch_size)
        _check_policy(self)  # arguments of its own may have been set since
        # Switch to train mode (this affects batch norm / dropout)
        self.policy.set_training_mode(True)
        if self.replay_buffer_class is None and isinstance(self.replay_buffer, NStepReplayBuffer):
            self.replay_buffer.gamma = self.gamma  # should somebody have changed it
        draw = locate_recent if isinstance(self._run_update, Graphed) else sample_recent  # a graph gathers faster

        for _ in range(gradient_steps):
            step_actor = self._n_updates % self.policy_delay == 0
            step_targets = self._n_updates % self.target_update_interval == 0
            batch = draw(self.replay_buffer, batch_size, self.replay_recency, self._vec_normalize_env)  # type: ignore[arg-type]
            set_learning_rate(self.actor.optimizer, self._actor_learning_rate())
            set_learning_rate(self.critic.optimizer, self._qf_learning_rate())
            with denormals_flushed():
                self._metrics.add(self._run_update(batch, self.update_options(), step_actor, step_targets))
            self.temperature.step(self._n_updates, self.policy.exploration_noise)
            self._n_actor_updates += step_actor
            self._n_updates += 1
            if self.device.type == "cpu" or self._n_updates % FETCH_INTERVAL == 0:
                self._record_metrics()

        self.logger.record("train/n_updates", self._n_updates, exclude="tensorboard")
        self.logger.record("train/learning_rate", self._actor_learning_rate())
        self.logger.record("train/qf_learning_rate", self._qf_learning_rate())

    def _record_metrics(self) -> None:
        """Hand the metrics to the logger."""
        totals = self._metrics.record(self.logger)
        if totals.get("targets_out_of_range", 0) > 0:
            assert self.critic.q_networks.bins is not None
            advice = "reward_scale='auto', a smaller reward_scale, policy_kwargs=dict(max_value=...) or n_bins=1 in it"
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
        self._prepare_log()
        self._record_metrics()
        super().dump_logs()

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
        tb_log_name: str | None = None,
        reset_num_timesteps: bool = True,
        progress_bar: bool = False,
    ) -> SelfSDAC:
        """
        Learn for a number of environment steps; see SB3's ``BaseAlgorithm.learn``.

        :param total_timesteps: environment steps, summed over all environments
        :param callback: called at every step
        :param log_interval: episodes between two logs
        :param tb_log_name: name of the run in TensorBoard; None for the algorithm's
        :param reset_num_timesteps: start counting anew, or go on from where an earlier call ended
        :param progress_bar: show a progress bar (needs tqdm and rich)
        :return: the model
        :raises ValueError: when an observation, action or reward is not finite
        """
        name = type(self).__name__ if tb_log_name is None else tb_log_name
        return super().learn(total_timesteps, callback, log_interval, name, reset_num_timesteps, progress_bar)

    @classmethod
    def load(
        cls: type[SelfSDAC],
        path: str | pathlib.Path | io.BufferedIOBase,
        env: GymEnv | None = None,
        *args: Any,
        **kwargs: Any,
    ) -> SelfSDAC:
        changed = {name: kwargs.pop(name) for name in ("ent_coef",) if name in kwargs}
        model = super().load(path, env, *args, **kwargs)
        for name, value in changed.items():  # whose value is in the policy, which comes from the file
            if value != getattr(model, name):
                setattr(model, name, value)
        model._warn_of_small_bins()
        return model

    load.__doc__ = CarefulOffPolicyAlgorithm.load.__doc__

    def _warn_of_small_bins(self) -> None:
        bins, largest = self.critic.q_networks.bins, self.policy_kwargs.get("max_value", largest_value(self.gamma))
        if bins is not None and bins.support[-1] < 0.999 * largest:
            warnings.warn(
                f"The critics of this model give values up to {bins.support[-1]:g} (in scaled rewards) and count larger ones "
                f"as that, but with gamma={self.gamma} there may be values up to {largest:g}. Train a new model if "
                "train/targets_out_of_range rises above 0",
                stacklevel=3,
            )

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
            self.temperature.start(self.ent_coef)

    def _excluded_save_params(self) -> list[str]:
        aliases = ["actor", "actor_target", "critic", "critic_target"]
        # Made anew: the other machine may have neither bfloat16 nor a compiler
        aliases += ["_metrics", "_mixed_precision", "_run_update", "_is_live"]
        return [*super()._excluded_save_params(), *aliases]

    def _get_torch_save_params(self) -> tuple[list[str], list[str]]:
        optimizers = ["actor.optimizer", "critic.optimizer", "temperature.optimizer"]
        return ["policy", *optimizers, "update.reward_statistics"], []

    def _apply_argument(self, name: str) -> None:
        if name in ("learning_rate", "qf_learning_rate"):
            self._setup_lr_schedule()
        elif name == "train_freq":
            self._convert_train_freq()
        elif name == "ent_coef":
            self.temperature.change(self.ent_coef)
        elif name in ("mixed_precision", "compile"):
            self._setup_compilation()
        elif name == "gamma":
            self._warn_of_small_bins()

    def _check_arguments(self) -> None:
        check_arguments(self)


def _compile_update(update: Update, worth_it: bool, on_cpu: bool) -> None:
    """
    Fuse the parts of an update with ``torch.compile`` when they are first called; they compute the same, to rounding.

    :param update: whose methods are replaced
    :param worth_it: whether to; else they are as they were written
    :param on_cpu: on CUDA a graph is made of the rest, and only one denoising step is compiled
    """
    for name in ("draw_actions", "critic_loss", "score_matching_loss"):
        vars(update).pop(name, None)
    # One denoising step and not the loop, where its steps are many, as each would be compiled
    one_step = worth_it and (not on_cpu or update.policy.n_sampling_steps > MAX_UNROLLED)
    update.noise_predictor = Compiled(update.policy.actor.noise_predictor) if one_step else None
    if not worth_it or not on_cpu:
        return
    # A partial and no closure, which a copy of the model would share, and with it these networks
    loss = functools.partial(_score_matching_loss, update.score_matching_loss, Compiled(update.score_matching_loss))
    parts = {"critic_loss": Compiled(update.critic_loss), "score_matching_loss": loss}
    vars(update).update(parts if one_step else {**parts, "draw_actions": Compiled(update.draw_actions)})


def _score_matching_loss(eager: Callable[..., Any], compiled: Callable[..., Any], *args: Any) -> tuple[th.Tensor, th.Tensor]:
    """A temperature rate of 1 comes once, in the very first update: not worth compiling for."""
    loss: tuple[th.Tensor, th.Tensor] = (eager if args[-1].temperature_rate == 1 else compiled)(*args)
    return loss


def _graph_key(policy: DiffusionPolicy) -> Hashable:
    """:return: what captured acting and updates hold of the policy as it was"""
    groups = [*policy.actor.optimizer.param_groups, *policy.critic.optimizer.param_groups]
    # Of each Adam its betas and so on; capturing itself changes the learning rate's type
    own = {"params", "lr", "capturable"}
    options = repr([[value for name, value in group.items() if name not in own] for group in groups])
    learning = tuple(parameter.requires_grad for group in groups for parameter in group["params"])
    return policy.training, tuple(policy.live_arguments().values()), options, learning, addresses(policy)


def check_arguments(model: SDAC) -> None:
    """
    Check an algorithm's arguments, whether they come from the constructor, from ``load`` or were set on a live model.

    :param model: has them as attributes
    :raises ValueError: says what was given and what is allowed
    """
    if "anchor" in vars(model):
        raise ValueError(
            "This model was saved by an sb3_sdac whose arguments had another layout: load it with the version that saved it, "
            "or train a new one"
        )
    if "critic_steps" in vars(model) and "critic_steps" not in model.LIVE:
        raise ValueError("This model was saved by DPMD: load it with sb3_sdac.DPMD.load")
    if not issubclass(model.policy_class, DiffusionPolicy):
        raise ValueError(
            "The policy of SDAC must be 'MlpPolicy', 'CnnPolicy', 'MultiInputPolicy' or a subclass of DiffusionPolicy, "
            f"got {model.policy_class.__name__}. If it comes from a file: another algorithm saved that, use it to load."
        )
    check(model, is_count, "an integer of at least 1", "policy_delay", "target_update_interval", "batch_size", "buffer_size")
    check(model, lambda value: value is None or is_count(value), "an integer of at least 1, or None", "n_steps")
    for name in ("gradient_steps", "train_freq"):  # Python's integers where SB3 wants them
        if isinstance(getattr(model, name), np.integer):
            vars(model)[name] = int(getattr(model, name))
    allowed = "an integer of at least -1"
    check(model, lambda value: is_count(value) or (type(value) is int and value in (0, -1)), allowed, "gradient_steps")
    allowed = "a number of at least 0"
    check(model, lambda value: is_number(value) and value >= 0, allowed, "learning_starts")
    check(model, is_train_freq, "an integer of at least 1, or a tuple of one and 'step' or 'episode'", "train_freq")
    allowed = "a positive number, or 'auto'"
    check(model, lambda value: value == "auto" or is_positive(value), allowed, "reward_scale")
    check(model, lambda value: is_number(value) and value >= 1, "a number of at least 1", "replay_recency")
    check(model, is_fraction, "a number between 0 and 1", "tau", "gamma")
    choices = {"score_matching": sm.SCORE_TARGETS, "proposal": sm.PROPOSALS, "noised_actions": ("next", "current")}
    check_choice(model, **choices)
    allowed = "an integer of at least 2 (the weight of a single one is always 1)"
    check(model, lambda value: is_count(value) and value >= 2, allowed, "n_reverse_samples")
    allowed = "a number of at least 0, or a function of the progress remaining"
    allowed += ", in Python stable_baselines3.common.utils.LinearSchedule(start, end, 1) where rl_zoo3 has 'lin_<start>'"
    check(model, is_rate, allowed, "learning_rate")
    check(model, lambda rate: rate is None or is_rate(rate), allowed, "qf_learning_rate")
    allowed = "(final learning rate, first, last actor update) with first < last, or None"
    check(model, lambda value: value is None or is_lr_decay(value), allowed, "actor_lr_decay")
    allowed = "True, False or 'auto'"
    check(model, lambda value: isinstance(value, bool) or value == "auto", allowed, "mixed_precision", "compile")
    check(model, lambda value: isinstance(value, bool), "True or False", "clip_target_actions")
    check(model, is_ent_coef, "a positive number, 'auto', 'auto_<number>', 'paper' or 'paper_<number>'", "ent_coef")
    if str(model.ent_coef).startswith("auto"):
        lowest = 1 / model.n_reverse_samples
        allowed = f"a fraction of n_reverse_samples={model.n_reverse_samples}, above {lowest:g} and below 1"
        check(model, lambda value: is_number(value) and lowest < value < 1, allowed, "target_ess")
    _check_policy(model)
    _check_buffer(model)


def _check_policy(model: SDAC) -> None:
    """:raises ValueError: for arguments of the policy that are none, are elsewhere, or contradict the algorithm's"""
    for name in model.policy_kwargs.keys() & (model._constructor_arguments() - model._policy_arguments()):
        given = f"policy_kwargs={{{name!r}: {model.policy_kwargs[name]!r}}}"
        raise ValueError(f"{name} is an argument of {type(model).__name__} itself: give {name}=... instead of {given}")
    unknown = model.policy_kwargs.keys() - inspect.signature(model.policy_class).parameters.keys()
    for name in unknown & ELSEWHERE.keys():
        if model.policy_kwargs[name] is False:  # use_sde, which a SAC puts into the dictionary that it is given
            continue
        raise TypeError(f"{name} (given: {model.policy_kwargs[name]!r}) is no argument of the policy: {ELSEWHERE[name]}")
    policy_class: Any = model.policy_class
    extractor = model.policy_kwargs.get("features_extractor_class") or policy_class.default_features_extractor_class
    check_extractor(extractor, model.observation_space, model.policy_kwargs.get("normalize_images", True), model.env)
    in_use = {**model.policy_kwargs, **(model.policy.live_arguments() if "_is_live" in vars(model) else {})}
    if str(model.ent_coef).startswith("paper") and in_use.get("exploration_noise") == 0:
        raise ValueError("ent_coef='paper' is made from the exploration noise's entropy: exploration_noise must be positive")


def _check_buffer(model: SDAC) -> None:
    """:raises ValueError: for arguments of the replay buffer that do not go together"""
    if model.replay_buffer_class is None:
        for name in model.replay_buffer_kwargs.keys() & {"n_steps", "gamma"}:
            given = f"replay_buffer_kwargs={{{name!r}: {model.replay_buffer_kwargs[name]!r}}}"
            raise ValueError(f"{name} is an argument of {type(model).__name__} itself: give {name}=... instead of {given}")
        one_step = isinstance(model.observation_space, spaces.Dict) or model.optimize_memory_usage
        if one_step and model.n_steps is not None and model.n_steps > 1:
            raise ValueError(
                f"n_steps must be 1 or None with Dict observations or optimize_memory_usage=True, got {model.n_steps}: SB3 "
                "has no n-step returns for these"
            )
    elif issubclass(model.replay_buffer_class, HerReplayBuffer) and model.env is None:
        raise ValueError("This model learns with HerReplayBuffer, which needs the environment: load it with env=...")
