"""The unit of the rewards: what they are divided by, so that it does not matter."""

import torch as th
from torch import nn

#: Root mean square of the scaled replayed rewards, and the most that a single one may be
REWARD_RMS, REWARD_MAX = 0.2, 2.0
#: What rewards may be in size, and the largest factor on them
LARGEST_REWARD, MAX_SCALE = 1e30, 1e32
#: The least that 1 - gamma counts as where it says how large values can be
MIN_DISCOUNTING = 1e-4


def largest_value(gamma: float) -> float:
    """
    :param gamma: discount factor
    :return: the largest value that there can be in scaled rewards
    """
    return REWARD_MAX / max(1 - gamma, MIN_DISCOUNTING)


class RewardStatistics(nn.Module):
    """Of all replayed rewards (discounted sums of ``n_steps``): how many batches, their mean square, the largest in size."""

    n_batches: th.Tensor
    mean_square: th.Tensor
    largest: th.Tensor

    def __init__(self) -> None:
        super().__init__()
        for name in ("n_batches", "mean_square", "largest"):
            # float64, as the square of a reward of 1e30 or 1e-30 is no number of float32. Of shape (1,), as torch.compile
            # takes a float64 of shape () on a CPU for a constant, and what is written to it gets lost
            self.register_buffer(name, th.zeros(1, dtype=th.float64))

    def track(self, rewards: th.Tensor) -> None:
        """
        :param rewards: of a batch, shape (B, 1)
        """
        rewards = rewards.double()
        self.n_batches += 1
        self.mean_square += (rewards.square().mean() - self.mean_square) / self.n_batches
        self.largest.copy_(th.maximum(self.largest, rewards.abs().max()))

    def scale(self) -> th.Tensor:
        """
        The factor that gives the rewards a root mean square of 0.2, near what the authors' factor gives in MuJoCo's tasks,
        whatever the environment's unit. A rare large one counts at most ten times as much.

        :return: shape (); 1 while all rewards are zero
        """
        scale = th.minimum(REWARD_RMS / self.mean_square.sqrt(), REWARD_MAX / self.largest)
        return th.where(self.largest > 0, scale, 1.0).clamp(max=MAX_SCALE).float().squeeze(0)
