"""
Diffusion Policy Mirror Descent (DPMD), the paper's other algorithm: denoising of the policy's own actions, weighted by exp(Q).

It is to SDAC as DDPG is to TD3: another loss of the actor, a second step of the critics, and running statistics of Q.
"""

from dataclasses import dataclass
from typing import Any, ClassVar

import torch as th
from stable_baselines3.common.type_aliases import GymEnv, ReplayBufferSamples
from torch import nn

from sb3_sdac import score_matching as sm
from sb3_sdac.arguments import check, is_count
from sb3_sdac.options import UpdateOptions
from sb3_sdac.policies import DiffusionPolicy
from sb3_sdac.sdac import SDAC
from sb3_sdac.update import Metrics, Update

#: Moving average of Q's mean and standard deviation (official DPMD)
Q_STATISTICS_RATE = 1e-3
#: What SDAC has and the mirror-descent loss does not use
UNUSED = ("n_reverse_samples", "score_matching", "proposal", "noised_actions", "target_ess")


class QStatistics(nn.Module):
    """Moving averages of the mean and the standard deviation of Q over a batch."""

    mean: th.Tensor
    std: th.Tensor

    def __init__(self) -> None:
        super().__init__()
        self.register_buffer("mean", th.zeros(()))
        self.register_buffer("std", th.ones(()))

    def track(self, q_values: th.Tensor) -> None:
        """
        :param q_values: shape (B,)
        """
        self.mean.lerp_(q_values.mean(), Q_STATISTICS_RATE)
        self.std.lerp_(q_values.std(correction=0), Q_STATISTICS_RATE)


def mirror_descent_weights(
    q_values: th.Tensor, running_mean: th.Tensor, running_std: th.Tensor, temperature: th.Tensor | float
) -> th.Tensor:
    """
    Weights of official DPMD: exp(clip(Q - mean / std, -3, 3) / alpha), not normalised.

    As published: the division binds to the mean alone, where (Q - mean) / std was probably meant.

    :param q_values: Q of the actions that are noised, shape (...)
    :param running_mean: moving average of the batches' mean of Q
    :param running_std: moving average of the batches' standard deviation of Q
    :param temperature: alpha > 0, without a unit
    :return: shape (...)
    """
    return ((q_values - running_mean / running_std).clamp(-3, 3) / temperature).exp()


@dataclass(frozen=True)
class MirrorDescentOptions(UpdateOptions):
    """
    :param critic_steps: steps of the critics' optimizer, all with the same gradient
    """

    critic_steps: int


class MirrorDescentUpdate(Update):
    """:class:`~sb3_sdac.update.Update` of DPMD; it remembers the statistics of Q, too."""

    def __init__(self, policy: DiffusionPolicy):
        super().__init__(policy)
        self.q_statistics = QStatistics().to(self.policy.device)

    def step(self, batch: ReplayBufferSamples, options: UpdateOptions, step_actor: bool, step_targets: bool) -> Metrics:
        """
        :param batch: B transitions
        :param options: numbers and choices
        :param step_actor: whether it is the actor's turn, too
        :param step_targets: whether it is the targets' turn
        :return: scalars for the log
        """
        assert isinstance(options, MirrorDescentOptions)
        actor, critic, obs = self.policy.actor, self.policy.critic, batch.next_observations

        # Next actions
        with th.set_grad_enabled(step_actor):
            encoded_actor = actor.encode(obs)  # (B, H)
        next_actions = self.draw_actions(encoded_actor, obs, options)  # (B, A)

        # Critic loss against the TD target, and all steps but the last
        critic_loss, metrics = self.critic_loss(batch, next_actions, options)
        critic.optimizer.zero_grad()
        critic_loss.backward()
        for _ in range(options.critic_steps - 1):
            critic.optimizer.step()

        # Mirror descent at the next actions, on the critics as they are before the last step
        with th.no_grad():
            q_values = self.policy.q(self.encode_critic(obs), next_actions)  # (B,)
        if step_actor:
            actor_loss, metrics["reverse_ess"] = self.mirror_descent_loss(encoded_actor, q_values, next_actions)
            metrics["actor_loss"] = actor_loss
        self.q_statistics.track(q_values)

        # The last step of the critics, and the actor's
        critic.optimizer.step()
        if step_actor:
            actor.optimizer.zero_grad()
            actor_loss.backward()
            actor.optimizer.step()
        if step_targets:
            self.step_targets(options.tau)
        return {**metrics, "ent_coef": self.policy.log_ent_coef.exp()}

    def mirror_descent_loss(
        self, encoded_actor: th.Tensor, q_values: th.Tensor, actions: th.Tensor
    ) -> tuple[th.Tensor, th.Tensor]:
        """
        :param encoded_actor: the actor's encoding of B observations, with its gradient, shape (B, H)
        :param q_values: Q of the actions, shape (B,)
        :param actions: actions of the policy at these observations, shape (B, A)
        :return: the loss, and the effective sample size of the weights over the batch, between 1 and B
        """
        _, noise, _, predicted_noise = self.noised(encoded_actor, actions)
        with th.no_grad():
            statistics = self.q_statistics.mean, self.q_statistics.std
            weights = mirror_descent_weights(q_values, *statistics, self.policy.log_ent_coef.exp()).unsqueeze(1)  # (B, 1)
            ess = sm.effective_sample_size((weights / weights.sum()).squeeze(1))
        return sm.denoising_loss(predicted_noise, noise, weights), ess


class DPMD(SDAC):
    """
    Diffusion Policy Mirror Descent (DPMD): the policy's own actions, denoised with weights exp(Q / alpha).

    Paper: https://arxiv.org/abs/2502.00361, whose first version called it SDAC. ``DPMD("MlpPolicy", env, **PAPER_DPMD)`` is
    the authors' configuration; the defaults are SDAC's, tuned for that.

    :param policy: see :class:`~sb3_sdac.SDAC`
    :param env: see :class:`~sb3_sdac.SDAC`
    :param ent_coef: temperature of the weights, without a unit: a positive float, or ``"paper"`` or ``"paper_<number>"`` for
        the authors' fixed curve
    :param critic_steps: steps of the critics' optimizer per update, all with the same gradient; at least 1
    :param kwargs: arguments of :class:`~sb3_sdac.SDAC`, but for those of its score matching (``n_reverse_samples``,
        ``score_matching``, ``proposal``, ``noised_actions``, ``target_ess``)
    :raises ValueError: for arguments outside their range
    :raises TypeError: for arguments that it does not have
    """

    update_class = MirrorDescentUpdate
    options_class = MirrorDescentOptions
    LIVE: ClassVar[frozenset[str]] = (SDAC.LIVE | {"critic_steps"}) - set(UNUSED)
    FIXED: ClassVar[dict[str, str]] = {
        **SDAC.FIXED,
        **dict.fromkeys(UNUSED, "mirror descent does not use it, SDAC does"),
    }

    def __init__(
        self,
        policy: str | type[DiffusionPolicy],
        env: GymEnv | str,
        ent_coef: float | str = "paper",
        critic_steps: int = 2,
        **kwargs: Any,
    ):
        for name in UNUSED:
            if name in kwargs:
                raise TypeError(f"DPMD has no {name} (given: {kwargs[name]!r}): mirror descent does not use it, SDAC does")
        self.critic_steps = critic_steps
        super().__init__(policy, env, ent_coef=ent_coef, **kwargs)

    @classmethod
    def _constructor_arguments(cls) -> set[str]:
        return super()._constructor_arguments() - set(UNUSED)

    def _get_torch_save_params(self) -> tuple[list[str], list[str]]:
        state_dicts, variables = super()._get_torch_save_params()
        return [*state_dicts, "update.q_statistics"], variables

    def _check_arguments(self) -> None:
        super()._check_arguments()
        check(self, is_count, "an integer of at least 1", "critic_steps")
        allowed = "a positive number, 'paper' or 'paper_<number>': mirror descent has no candidates that 'auto' could go by"
        check(self, lambda value: not (isinstance(value, str) and value.startswith("auto")), allowed, "ent_coef")
