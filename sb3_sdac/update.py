"""
One update of SDAC: the paper's algorithm box (Ma et al., "Soft Diffusion Actor-Critic", arXiv 2502.00361, Algorithm 1).

It knows batches, policies and score matching; no environment, logger, zip file or algorithm of SB3. All its work is on the
device: no number is read back, and nothing but tensors changes, so that a CUDA graph can replay it.
Letters: B batch, A action dimension, K candidates, C critics, M bins, H width of a network's first layer.
"""

from collections.abc import Callable
from dataclasses import dataclass
from functools import cache

import torch as th
from stable_baselines3.common.type_aliases import PyTorchObs, ReplayBufferSamples
from stable_baselines3.common.utils import get_parameters_by_name, polyak_update

from sb3_sdac import score_matching as sm
from sb3_sdac.policies import DiffusionPolicy
from sb3_sdac.rewards import RewardStatistics

Metrics = dict[str, th.Tensor]


@dataclass(frozen=True)
class UpdateOptions:
    """
    The numbers and choices that an update depends on, besides the policy's. See :class:`~sb3_sdac.SDAC` for the others.

    Frozen and compared by value: a captured update is replayed for equal options only.

    :param temperature_rate: how much of the temperature that a batch calls for is taken over; None if it does not come from
        the data
    :param mixed_precision: whether to use bfloat16
    """

    gamma: float
    tau: float
    n_reverse_samples: int
    score_matching: str
    proposal: str
    noised_actions: str
    target_ess: float
    clip_target_actions: bool
    reward_scale: float | str
    temperature_rate: float | None
    mixed_precision: bool


class Update:
    """
    Updates of one policy, and what they remember: the statistics of the rewards.

    :param policy: whose networks and optimizers
    """

    def __init__(self, policy: DiffusionPolicy):
        self.policy = policy
        #: The actor's own, compiled; ``None`` for that as it is
        self.noise_predictor: Callable[..., th.Tensor] | None = None
        self.reward_statistics = RewardStatistics().to(policy.device)
        # Running statistics, of batch normalisation and of the features, are copied, not averaged, see SB3's issue 996
        pairs = [(policy.critic, policy.critic_target), (policy.actor, policy.actor_target)]
        self.averages = [(network, target) for network, target in pairs if target is not None]
        self.running = [get_parameters_by_name(network, ["running_"]) for network, _ in self.averages]
        self.running_target = [get_parameters_by_name(target, ["running_"]) for _, target in self.averages]

    def __call__(self, batch: ReplayBufferSamples, options: UpdateOptions, step_actor: bool, step_targets: bool) -> Metrics:
        """
        :param batch: B transitions
        :param options: numbers and choices
        :param step_actor: whether it is the actor's turn, too
        :param step_targets: whether it is the targets' turn
        :return: scalars for the log
        """
        actor, critic = self.policy.actor, self.policy.critic
        noises_next_actions = options.noised_actions == "next"

        # Next actions: one reverse diffusion, or the best of several by Q, plus noise. Features are extracted once per network
        # and observation; the actor's loss may need the gradient of these
        with th.set_grad_enabled(step_actor and noises_next_actions):
            encoded_actor = actor.encode(batch.next_observations)  # (B, H)
        encode_critic = self.critic_encoder(batch.next_observations, now=step_actor and noises_next_actions)
        actions = next_actions = self.draw_actions(encoded_actor, encode_critic, options)  # (B, A)

        # Critic loss against the TD target
        critic_loss, metrics = self.critic_loss(batch, next_actions, options)
        critic.optimizer.zero_grad()
        critic_loss.backward()

        # Score matching at an action of the policy, on the critics as they are before this update's step
        if step_actor:
            if not noises_next_actions:
                encoded_actor = actor.encode(batch.observations)
                encode_critic = self.critic_encoder(batch.observations, now=True)
                actions = self.draw_actions(encoded_actor, encode_critic, options)
            actor_loss, metrics["reverse_ess"] = self.score_matching_loss(encoded_actor, encode_critic(), actions, options)
            metrics["actor_loss"] = actor_loss

        # Optimizers
        critic.optimizer.step()
        if step_actor:
            actor.optimizer.zero_grad()
            actor_loss.backward()
            actor.optimizer.step()

        # Targets, if there are any
        if step_targets:
            self.step_targets(options.tau)
        return {**metrics, "ent_coef": self.policy.log_ent_coef.exp()}

    def critic_encoder(self, observations: PyTorchObs, now: bool) -> Callable[[], th.Tensor]:
        """
        :param observations: B
        :param now: whether it will be needed; else it is computed at the first call, if there is one
        :return: gives the critics' encoding of the observations, shape (C, B, H), float32, without gradient
        """

        @cache
        def encode() -> th.Tensor:
            with th.no_grad(), th.autocast(self.policy.device.type, enabled=False):
                return self.policy.critic.encode(observations)

        if now:
            encode()
        return encode

    @th.no_grad()
    def draw_actions(
        self, encoded_actor: th.Tensor, encode_critic: Callable[[], th.Tensor], options: UpdateOptions
    ) -> th.Tensor:
        """
        Actions of the current policy, with exploration noise.

        :param encoded_actor: the actor's encoding of B observations, shape (B, H)
        :param encode_critic: gives the critics' encoding of them, shape (C, B, H)
        :param options: numbers and choices
        :return: shape (B, A)
        """
        # The candidates' Q stays float32: its rounding would spread their weights, and with it ent_coef="auto" rose by half
        with th.autocast(encoded_actor.device.type, dtype=th.bfloat16, enabled=options.mixed_precision):
            return self.policy.draw_actions(
                self.policy.actor, encoded_actor.detach(), encode_critic, self.noise_predictor, options.clip_target_actions
            )

    def critic_loss(
        self, batch: ReplayBufferSamples, next_actions: th.Tensor, options: UpdateOptions
    ) -> tuple[th.Tensor, Metrics]:
        """
        Each critic against the TD target: without an entropy term, as in the authors' code.

        :param batch: B transitions
        :param next_actions: the policy's actions at the next observations, shape (B, A)
        :param options: numbers and choices
        :return: loss, and scalars for the log
        """
        policy, critic = self.policy, self.policy.critic
        policy.seen_terminal.copy_(th.maximum(policy.seen_terminal, batch.dones.max()))
        outputs, next_q_values = self.critic_outputs(batch, next_actions, options.mixed_precision)  # (C, B, M), (C, B)
        next_q_values = policy.pessimistic(next_q_values).unsqueeze(1)  # (C, B) -> (B, 1)
        if isinstance(options.reward_scale, str):
            self.reward_statistics.track(batch.rewards)
        # For n-step replay, the discount factor is gamma**n_steps (when no early termination)
        discounts = options.gamma if batch.discounts is None else batch.discounts
        reward_scale = self.reward_scale(options)
        targets = reward_scale * batch.rewards + (1 - batch.dones) * discounts * next_q_values  # (B, 1)

        loss = critic.loss(outputs, targets.squeeze(1)).mean(dim=1).sum()
        metrics = {"critic_loss": loss, "q_value": critic.values(outputs.detach()).mean()}
        if isinstance(reward_scale, th.Tensor):
            metrics["reward_scale"] = reward_scale
        if policy.pessimism == "auto":
            metrics["pessimism"] = policy.seen_terminal
        bins = critic.q_networks.bins
        if bins is not None:
            metrics["targets_out_of_range"] = (targets.abs() > bins.support[-1]).float().mean()
        return loss, metrics

    def reward_scale(self, options: UpdateOptions) -> th.Tensor | float:
        """
        :param options: numbers and choices
        :return: the factor on the rewards in the TD target, which sets the unit of the critics
        """
        return self.reward_statistics.scale() if isinstance(options.reward_scale, str) else options.reward_scale

    def critic_outputs(
        self, batch: ReplayBufferSamples, next_actions: th.Tensor, mixed_precision: bool
    ) -> tuple[th.Tensor, th.Tensor]:
        """
        :param batch: B transitions
        :param next_actions: the policy's actions at the next observations, shape (B, A)
        :param mixed_precision: whether to use bfloat16
        :return: outputs of the critics, shape (C, B, M), and the next values, shape (C, B), without gradient
        """
        critic, critic_target = self.policy.critic, self.policy.critic_target
        if critic_target is None:
            # Both in one batch, so that both are normalised alike; then no target network is needed (Bhatt et al. 2024,
            # "CrossQ", arXiv 1902.05605)
            obs = concatenate(batch.observations, batch.next_observations)
            actions = th.cat([batch.actions, next_actions])
            with th.autocast(actions.device.type, dtype=th.bfloat16, enabled=mixed_precision):
                outputs = critic.outputs(obs, actions, normalise_batch=True)
            outputs, next_outputs = outputs.chunk(2, dim=1)  # (C, 2 B, M) -> (C, B, M), (C, B, M)
            return outputs, critic.values(next_outputs.detach())
        with th.no_grad():
            next_q_values = critic_target.q_values(critic_target.encode(batch.next_observations), next_actions)
        return critic.outputs(batch.observations, batch.actions, normalise_batch=False), next_q_values

    def score_matching_loss(
        self, encoded_actor: th.Tensor, encoded_critic: th.Tensor, actions: th.Tensor, options: UpdateOptions
    ) -> tuple[th.Tensor, th.Tensor]:
        """
        The loss of the noise predictor; sets the temperature on the way if it comes from the data.

        :param encoded_actor: the actor's encoding of B observations, with its gradient, shape (B, H)
        :param encoded_critic: the critics' encoding of them, shape (C, B, H)
        :param actions: actions of the policy at these observations, which are noised, shape (B, A)
        :param options: numbers and choices
        :return: the loss, and the mean effective sample size of the weights
        """
        diffusion, target = self.policy.actor.sampler.diffusion, sm.SCORE_TARGETS[options.score_matching]
        t, _, x_t, predicted_noise = self.noised(encoded_actor, actions)
        with th.no_grad():
            # Candidates for x_0 given x_t, their Q and softmax weights: (B, K, A), (B, K), (B, K)
            propose, draw = sm.PROPOSALS[options.proposal]
            random_numbers = draw((len(actions), options.n_reverse_samples, actions.shape[1]), device=actions.device)
            x_0, noise = propose(diffusion, x_t, t, random_numbers)
            q_values, gradients = self.q_values_and_gradients(encoded_critic, x_0, target.needs_gradients)
            # The critics' rewards are scaled. In logarithms, as neither factor need be a number of float32
            log_reward_scale = th.as_tensor(self.reward_scale(options), device=x_t.device).log()
            if options.temperature_rate is not None:
                # Towards the temperature that gives the weights their effective sample size
                solution = sm.solve_temperature(q_values, options.target_ess * options.n_reverse_samples)
                self.policy.log_ent_coef.lerp_(solution.log() - log_reward_scale, options.temperature_rate)
            # In the unit of the critics; bounded, as it lags by 60 decades when rewards of 1e-30 are followed by one of 1e30
            temperature = (self.policy.log_ent_coef + log_reward_scale).exp().clamp(1e-30, 1e30)
            weights = sm.softmax_weights(q_values, temperature)
        candidates = sm.Candidates(noise, q_values, gradients)
        loss = target.loss(diffusion, t, predicted_noise, candidates, weights, temperature)
        return loss, sm.effective_sample_size(weights).mean()

    def noised(self, encoded_actor: th.Tensor, actions: th.Tensor) -> tuple[th.Tensor, th.Tensor, th.Tensor, th.Tensor]:
        """
        Actions, noised to random diffusion steps, and what the actor sees in them.

        :param encoded_actor: the actor's encoding of B observations, shape (B, H)
        :param actions: shape (B, A)
        :return: t, shape (B, 1), and noise, x_t and predicted noise, shape (B, A)
        """
        sampler = self.policy.actor.sampler
        t = th.randint(sampler.n_diffusion_steps, (len(actions), 1), device=actions.device)  # (B, 1)
        noise = th.randn_like(actions)
        x_t = sampler.diffusion.q_sample(actions, t, noise)  # (B, A)
        return t, noise, x_t, self.policy.actor.predict_noise(encoded_actor, x_t, t)

    def q_values_and_gradients(
        self, encoded_critic: th.Tensor, x_0: th.Tensor, needs_gradients: bool
    ) -> tuple[th.Tensor, th.Tensor | None]:
        """
        :param encoded_critic: the critics' encoding of B observations, shape (C, B, H)
        :param x_0: candidates, shape (B, K, A)
        :param needs_gradients: whether to compute the gradients, too
        :return: Q, shape (B, K), and its gradient with respect to x_0, shape (B, K, A), or None
        """
        if not needs_gradients:
            return self.policy.q(encoded_critic, x_0), None
        with th.enable_grad():
            q_values = self.policy.q(encoded_critic, x_0.requires_grad_())
            (gradients,) = th.autograd.grad(q_values.sum(), x_0)
        return q_values.detach(), gradients

    def step_targets(self, tau: float) -> None:
        """
        Polyak step of the target critics and of the averaged actor.

        :param tau: step, between 0 and 1
        """
        for (network, target), running, running_target in zip(self.averages, self.running, self.running_target, strict=True):
            polyak_update(network.parameters(), target.parameters(), tau)
            polyak_update(running, running_target, 1.0)


def concatenate(first: PyTorchObs, second: PyTorchObs) -> PyTorchObs:
    """
    :param first: B observations
    :param second: as many
    :return: 2 B observations
    """
    if isinstance(first, dict) and isinstance(second, dict):
        return {key: th.cat([value, second[key]]) for key, value in first.items()}
    return th.cat([first, second])  # type: ignore[list-item]
