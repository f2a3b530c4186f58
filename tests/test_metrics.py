"""Metrics are means over updates, whoever writes the log, and nothing waits for them."""

import numpy as np
import pytest
import torch as th
from helpers.models import make_model
from helpers.update_helpers import fill
from helpers.watching import logged
from stable_baselines3.common.logger import configure

from sb3_sdac.metrics import TrainingMetrics
from sb3_sdac.update import Metrics, Update


def test_means_over_several_records() -> None:
    """Each over those that had it; 1,000 updates count 1,000 times as much as one."""
    metrics, logger = TrainingMetrics(), configure(None, [])
    for _ in range(1000):
        metrics.add({"loss": th.tensor(1.0, requires_grad=True)})
    assert metrics.record(logger) == {"loss": 1000.0}
    metrics.add({"loss": th.tensor(1002.0), "rare": th.tensor(5.0)})
    assert metrics.record(logger) == {"loss": 1002.0, "rare": 5.0}
    assert metrics.record(logger) == {}
    assert logger.name_to_value == {"train/loss": pytest.approx(2.0), "train/rare": 5.0}
    assert type(logger.name_to_value["train/loss"]) is float
    logger.dump()
    metrics.add({"loss": th.tensor(3.0)})
    metrics.record(logger)
    assert logger.name_to_value == {"train/loss": 3.0}


class Spied(Update):
    """Remembers what each update gave."""

    seen: list[Metrics]

    def __call__(self, *args: object) -> Metrics:
        metrics = super().__call__(*args)  # type: ignore[arg-type]
        self.seen.append({name: value.detach().clone() for name, value in metrics.items()})
        return metrics


def test_metrics_are_means_since_the_last_log() -> None:
    """Over several calls of train(), each metric over the updates that made it; the log after shows none of it again."""
    policy_kwargs = {"n_bins": 1, "pessimism": 1.0}
    model = fill(make_model(policy_delay=2, reward_scale=0.2, policy_kwargs=policy_kwargs))
    spied = model.update = Spied(model.policy)
    spied.seen = []
    model.train(3)
    model.train(2)
    log = logged(model)
    names = {"critic_loss": 5, "q_value": 5, "ent_coef": 5, "actor_loss": 3, "reverse_ess": 3}
    for name, count in names.items():
        values = [metrics[name].item() for metrics in spied.seen if name in metrics]
        assert len(values) == count and len(set(values)) > 1
        assert log[name] == pytest.approx(np.mean(values), rel=1e-5)
        assert type(log[name]) is float
    assert set(log) == {*names, "learning_rate", "qf_learning_rate", "n_updates"}

    assert logged(model) == {}
    model.train(1)  # the actor is not stepped on this one
    log = logged(model)
    assert set(log) == {"critic_loss", "q_value", "ent_coef", "learning_rate", "qf_learning_rate", "n_updates"}
    assert log["critic_loss"] == pytest.approx(spied.seen[-1]["critic_loss"].item())


def test_every_dump_of_the_logger_has_the_metrics() -> None:
    """As those of EvalCallback, not only that of ``dump_logs``, which comes when episodes end."""
    model = fill(make_model())
    for _ in range(2):
        model.train(3)
        assert model.logger.name_to_count["train/critic_loss"] == 3
        assert model.logger.name_to_value["train/critic_loss"] > 0
        model.logger.dump()
        assert "train/critic_loss" not in model.logger.name_to_value
