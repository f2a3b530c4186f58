"""
One update of SDAC: the paper's algorithm box (Ma et al., "Soft Diffusion Actor-Critic", arXiv 2502.00361, Algorithm 1).

It knows batches, policies and score matching; no environment, logger, zip file or algorithm of SB3. All its work is on the
device: no number is read back, and nothing but tensors changes, so that a CUDA graph can replay it.
Letters: B batch, A action dimension, K candidates, C critics, M bins, H width of a network's first layer.
"""

from collections.abc import Callable

import torch as th
from stable_baselines3.common.type_aliases import PyTorchObs, ReplayBufferSamples
from stable_baselines3.common.utils import get_parameters_by_name, polyak_update

from sb3_sdac import score_matching as sm
from sb3_sdac.compilation import rounded_products
from sb3_sdac.options import UpdateOptions
from sb3_sdac.policies import DiffusionPolicy
from sb3_sdac.rewards import RewardStatistics

Metrics = dict[str, th.Tensor]


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
        with rounded_products(rounds_products(self.policy, options)):
            return self.step(batch, options, step_actor, step_targets)

    def step(self, batch: ReplayBufferSamples, options: UpdateOptions, step_actor: bool, step_targets: bool) -> Metrics:
        """
        The algorithm box; see :meth:`__call__`.

        :param batch: B transitions
        :param options: numbers and choices
        :param step_actor: whether it is the actor's turn, too
        :param step_targets: whether it is the targets' turn
        :return: scalars for the log
        """
        actor, critic = self.policy.actor, self.policy.critic
        noises_next_actions = options.noised_actions == "next"

        # Next actions: one reverse diffusion, or the best of several by Q, plus noise. The actor's features are extracted once
        # per observation; its loss may need the gradient of these
        obs = batch.next_observations
        with th.set_grad_enabled(step_actor and noises_next_actions):
            encoded_actor = actor.encode(obs)  # (B, H)
        actions = next_actions = self.draw_actions(encoded_actor, obs, options)  # (B, A)

        # Critic loss against the TD target
        critic_loss, metrics = self.critic_loss(batch, next_actions, options)
        critic.optimizer.zero_grad()
        critic_loss.backward()

        # Score matching at an action of the policy, on the critics as they are before this update's step
        if step_actor:
            if not noises_next_actions:
                obs = batch.observations
                encoded_actor = actor.encode(obs)
                actions = self.draw_actions(encoded_actor, obs, options)
            actor_loss, metrics["reverse_ess"] = self.score_matching_loss(encoded_actor, obs, actions, options)
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

    @th.no_grad()
    def draw_actions(self, encoded_actor: th.Tensor, obs: PyTorchObs, options: UpdateOptions) -> th.Tensor:
        """
        Actions of the current policy, with exploration noise.

        :param encoded_actor: the actor's encoding of the observations, shape (B, H)
        :param obs: B observations
        :param options: numbers and choices
        :return: shape (B, A)
        """
        # The activations are rounded, too: with many particles they are what takes the time
        with th.autocast(encoded_actor.device.type, dtype=th.bfloat16, enabled=options.mixed_precision):
            return self.policy.draw_actions(
                self.policy.actor,
                encoded_actor.detach(),
                lambda: self.encode_critic(obs),
                self.noise_predictor,
                options.clip_target_actions,
            )

    @th.no_grad()
    def encode_critic(self, obs: PyTorchObs) -> th.Tensor:
        """
        :param obs: B observations
        :return: the critics' encoding of them, shape (C, B, H), float32
        """
        with th.autocast(self.policy.device.type, enabled=False):
            return self.policy.critic.encode(obs)

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
        outputs, next_q_values = self.critic_outputs(batch, next_actions)  # (C, B, M), (C, B)
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

    def critic_outputs(self, batch: ReplayBufferSamples, next_actions: th.Tensor) -> tuple[th.Tensor, th.Tensor]:
        """
        :param batch: B transitions
        :param next_actions: the policy's actions at the next observations, shape (B, A)
        :return: outputs of the critics, shape (C, B, M), and the next values, shape (C, B), without gradient
        """
        critic, critic_target = self.policy.critic, self.policy.critic_target
        if critic_target is None:
            # Both in one batch, so that both are normalised alike; then no target network is needed (Bhatt et al. 2024,
            # "CrossQ", arXiv 1902.05605)
            obs = concatenate(batch.observations, batch.next_observations)
            actions = th.cat([batch.actions, next_actions])
            outputs = critic.outputs(obs, actions, normalise_batch=True)
            outputs, next_outputs = outputs.chunk(2, dim=1)  # (C, 2 B, M) -> (C, B, M), (C, B, M)
            return outputs, critic.values(next_outputs.detach())
        with th.no_grad():
            next_q_values = critic_target.q_values(critic_target.encode(batch.next_observations), next_actions)
        return critic.outputs(batch.observations, batch.actions, normalise_batch=False), next_q_values

    def score_matching_loss(
        self, encoded_actor: th.Tensor, obs: PyTorchObs, actions: th.Tensor, options: UpdateOptions
    ) -> tuple[th.Tensor, th.Tensor]:
        """
        The loss of the noise predictor; sets the temperature on the way if it comes from the data.

        :param encoded_actor: the actor's encoding of the observations, with its gradient, shape (B, H)
        :param obs: B observations
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
            encoded_critic = self.encode_critic(obs)  # (C, B, H)
            q_values, gradients = self.q_values_and_gradients(encoded_critic, x_0, options, target.needs_gradients)
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
        self, encoded_critic: th.Tensor, x_0: th.Tensor, options: UpdateOptions, needs_gradients: bool
    ) -> tuple[th.Tensor, th.Tensor | None]:
        """
        :param encoded_critic: the critics' encoding of B observations, shape (C, B, H)
        :param x_0: candidates, shape (B, K, A)
        :param options: numbers and choices
        :param needs_gradients: whether to compute the gradients, too
        :return: Q, shape (B, K), and its gradient with respect to x_0, shape (B, K, A), or None
        """
        policy, critics = self.policy, self.policy.critic.q_networks
        outputs = critics.outputs_by_difference if rounds_products(policy, options) else critics.outputs

        def q(x_0: th.Tensor) -> th.Tensor:
            return policy.pessimistic(critics.values(outputs(encoded_critic, x_0)))

        if not needs_gradients:
            return q(x_0), None
        if th.compiler.is_compiling():  # autograd.grad would break the graph, and compute the weights' gradients, too
            gradients, q_values = th.func.grad(lambda x_0: (q(x_0).sum(), q(x_0)), has_aux=True)(x_0)
            return q_values, gradients
        with th.enable_grad():
            q_values = q(x_0.requires_grad_())
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


def rounds_products(policy: DiffusionPolicy, options: UpdateOptions) -> bool:
    """
    :param policy: of the update
    :param options: numbers and choices
    :return: whether its matrix products may round their inputs: what is normalised keeps what it varies by
    """
    return options.mixed_precision and policy.batch_norm


def concatenate(first: PyTorchObs, second: PyTorchObs) -> PyTorchObs:
    """
    :param first: B observations
    :param second: as many
    :return: 2 B observations
    """
    if isinstance(first, dict) and isinstance(second, dict):
        return {key: th.cat([value, second[key]]) for key, value in first.items()}
    return th.cat([first, second])  # type: ignore[list-item]
