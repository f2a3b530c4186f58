"""The numbers and choices that one update depends on."""

from dataclasses import dataclass


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
