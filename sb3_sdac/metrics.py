"""Means of the training metrics, without making an update wait for the device."""

import torch as th
from stable_baselines3.common.logger import Logger

#: Updates after which metrics are fetched from another device than the CPU, if no log asked for them before
FETCH_INTERVAL = 1000


class TrainingMetrics:
    """Sums of scalars that stay on the device until they are logged."""

    def __init__(self) -> None:
        self._sums: dict[str, tuple[th.Tensor | float, int]] = {}

    def add(self, metrics: dict[str, th.Tensor]) -> None:
        """
        :param metrics: scalars of one update by their logged name, after ``train/``
        """
        for name, value in metrics.items():
            total, count = self._sums.get(name, (0.0, 0))
            self._sums[name] = total + value.detach(), count + 1

    def record(self, logger: Logger) -> dict[str, float]:
        """
        Hand the sums to the logger, as means over all updates since its last dump.

        :param logger: of the model
        :return: the sums
        """
        # Not the logger's record_mean, for which the sum of 1,000 updates would count as much as that of one
        totals = {name: float(total) for name, (total, _) in self._sums.items()}
        for name, (_, count) in self._sums.items():
            key = f"train/{name}"
            n_before = logger.name_to_count[key]
            mean = (n_before * logger.name_to_value[key] + totals[name]) / (n_before + count)
            logger.record(key, mean)
            logger.name_to_count[key] = n_before + count
        self._sums = {}
        return totals
