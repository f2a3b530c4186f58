"""The temperature (``ent_coef`` in SB3, alpha or lambda in the paper): fixed, from the data, or on the paper's curve."""

import math
from typing import Any

import torch as th
from torch import nn

from sb3_sdac.arguments import is_number, is_positive

#: Share of each batch's solution that the temperature set from data takes over: a memory of about 20 actor updates
DATA_RATE = 0.05
#: The paper's temperature: start, learning rate and interval in updates (official SDAC)
PAPER_START, PAPER_LEARNING_RATE, PAPER_INTERVAL = 5.0, 7e-3, 250
#: The paper's target entropy per action dimension, negated
PAPER_TARGET = 0.9


def parse_ent_coef(value: float | str) -> tuple[str, float | None]:
    """
    ``"auto_0.1"`` is ("auto", 0.1), ``"paper"`` is ("paper", None), and 0.1 is ("fixed", 0.1).

    :param value: ``ent_coef``
    :return: its kind, and the number in it
    """
    if not isinstance(value, str):
        return "fixed", value
    kind, separator, number = value.partition("_")
    return kind, float(number) if separator else None


def is_ent_coef(value: Any) -> bool:
    """
    :param value: anything
    :return: whether it is a positive number, ``"auto"``, ``"auto_<number>"``, ``"paper"`` or ``"paper_<number>"``
    """
    if not isinstance(value, str):
        return is_positive(value)
    try:
        kind, number = parse_ent_coef(value)
    except ValueError:
        return False
    return kind in ("auto", "paper") and (number is None or (is_number(number) and number > 0))


class Temperature:
    """
    What happens to the entropy coefficient between updates. Its logarithm is the policy's, since acting may read it.

    :param ent_coef: as given to SDAC
    :param log_ent_coef: the policy's tensor, shape ()
    :param action_dim: A
    """

    def __init__(self, ent_coef: float | str, log_ent_coef: nn.Parameter, action_dim: int):
        self.log_ent_coef = log_ent_coef
        self.action_dim = action_dim
        # There with every kind of coefficient, so that a model can be loaded with another
        self.optimizer = th.optim.Adam([log_ent_coef], lr=PAPER_LEARNING_RATE)
        self.start(ent_coef)

    def start(self, ent_coef: float | str) -> None:
        """
        :param ent_coef: a number, or where the coefficient starts and what becomes of it
        """
        self.ent_coef = ent_coef
        self.kind, self.number = parse_ent_coef(ent_coef)
        initial = PAPER_START if self.kind == "paper" else self.number or 1.0
        self.log_ent_coef.data.fill_(math.log(initial))

    def change(self, ent_coef: float | str) -> None:
        """
        As :meth:`start`, but ``"auto"`` goes on from the present value.

        :param ent_coef: of a model that may have learned already
        """
        if ent_coef == "auto":
            self.ent_coef, self.kind, self.number = ent_coef, "auto", None
        else:
            self.start(ent_coef)

    def data_rate(self, n_actor_updates: int) -> float | None:
        """
        :param n_actor_updates: of the actor so far
        :return: how much of a batch's solution the coefficient takes over; None if it does not come from the data
        """
        if self.kind != "auto":
            return None
        return 1.0 if n_actor_updates == 0 and self.number is None else DATA_RATE

    def step(self, n_updates: int, exploration_noise: float) -> None:
        """
        With the paper's curve one step of the authors' optimizer, every ``PAPER_INTERVAL`` updates: loss = -log_alpha (target
        - H), where H is the entropy of the exploration noise.

        No data enters. H = A/2 log(2 pi e (0.1 alpha)^2) counts as a constant, so the gradient is H - target.

        :param n_updates: before this one
        :param exploration_noise: standard deviation, positive
        """
        if self.kind != "paper" or n_updates % PAPER_INTERVAL:
            return
        target_entropy = -(self.number or PAPER_TARGET) * self.action_dim
        log_std = math.log(exploration_noise) + self.log_ent_coef
        entropy = self.action_dim * (0.5 * math.log(2 * math.pi * math.e) + log_std)
        self.log_ent_coef.grad = entropy - target_entropy
        self.optimizer.step()
