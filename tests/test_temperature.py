"""The temperature: fixed, from the data, or on the paper's curve."""

import math
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch as th
from helpers.models import make_model
from helpers.update_helpers import PLAIN, batch, fill, make_update, options, score_matching_loss
from helpers.watching import logged
from torch import nn

from sb3_sdac import SDAC
from sb3_sdac.temperature import Temperature, is_ent_coef, parse_ent_coef


def make_temperature(ent_coef: float | str, action_dim: int = 1) -> Temperature:
    return Temperature(ent_coef, nn.Parameter(th.zeros(()), requires_grad=False), action_dim)


def value(temperature: Temperature) -> float:
    return temperature.log_ent_coef.exp().item()


@pytest.mark.parametrize(
    "ent_coef, parsed, start",
    [
        (0.1, ("fixed", 0.1), 0.1),
        ("auto", ("auto", None), 1.0),
        ("auto_0.1", ("auto", 0.1), 0.1),
        ("paper", ("paper", None), 5.0),
        ("paper_1.5", ("paper", 1.5), 5.0),
    ],
)
def test_kinds(ent_coef: float | str, parsed: tuple[str, float | None], start: float) -> None:
    assert is_ent_coef(ent_coef) and parse_ent_coef(ent_coef) == parsed
    assert value(make_temperature(ent_coef)) == pytest.approx(start)


@pytest.mark.parametrize(
    "ent_coef", [0, -1, True, None, "auto_", "auto_0", "auto_nan", "paper_-1", "paper_inf", "manual_1", ""]
)
def test_no_kinds(ent_coef: Any) -> None:
    assert not is_ent_coef(ent_coef)


def test_changes() -> None:
    """ "auto" goes on from the present value, everything else starts anew."""
    temperature = make_temperature(0.3)
    changes: list[tuple[Any, str, float]] = [("auto", "auto", 0.3), ("auto_2.0", "auto", 2.0), ("auto", "auto", 2.0)]
    for ent_coef, kind, expected in (*changes, ("paper", "paper", 5.0), (0.7, "fixed", 0.7)):
        temperature.change(ent_coef)
        assert (temperature.ent_coef, temperature.kind) == (ent_coef, kind)
        assert value(temperature) == pytest.approx(expected)
    assert temperature.number == 0.7


def test_share_of_the_data() -> None:
    """Everything of the first batch, then little; of an initial value from the start; nothing with the other kinds."""
    assert [make_temperature("auto").data_rate(n) for n in (0, 1, 100)] == [1.0, 0.05, 0.05]
    assert [make_temperature("auto_1.0").data_rate(n) for n in (0, 1)] == [0.05, 0.05]
    assert make_temperature("paper").data_rate(0) is make_temperature(0.3).data_rate(0) is None


@pytest.mark.parametrize("rate", [1.0, 0.05])
def test_data_temperature_hits_its_target(rate: float) -> None:
    """The effective sample size is the one asked for if all of the solution is taken over; else it comes closer."""
    solved = make_update()
    _, ess = score_matching_loss(solved, batch(), options(target_ess=0.5, temperature_rate=1.0))
    assert ess.item() == pytest.approx(4.0, rel=1e-3)
    update = make_update(ent_coef=100.0)
    score_matching_loss(update, batch(), options(target_ess=0.5, temperature_rate=rate))
    expected = (1 - rate) * math.log(100) + rate * solved.policy.log_ent_coef.item()
    assert update.policy.log_ent_coef.item() == pytest.approx(expected, rel=1e-3)


@pytest.mark.parametrize(("ent_coef", "hits"), [("auto", True), ("auto_100.0", False)])
def test_models_begin_with_the_first_batchs_solution(ent_coef: str, hits: bool) -> None:
    model = fill(make_model(ent_coef=ent_coef, target_ess=0.5, n_reverse_samples=16, policy_kwargs=PLAIN))
    model.train(1)
    assert (logged(model)["reverse_ess"] == pytest.approx(8.0, rel=1e-3)) == hits
    assert hits or math.exp(0.9 * math.log(100)) < model.ent_coef_tensor.item() < 100


def test_fixed_coefficient_stays() -> None:
    model = fill(make_model(ent_coef=0.3))
    model.train(3)
    assert model.ent_coef_tensor.item() == pytest.approx(0.3)
    assert model.log_ent_coef is None and model.update_options().temperature_rate is None


@pytest.mark.parametrize("exploration_noise", [0.1, 0.3])
@pytest.mark.parametrize(("ent_coef", "target_per_dim"), [("paper", 0.9), ("paper_1.5", 1.5)])
def test_paper_temperature(ent_coef: str, target_per_dim: float, exploration_noise: float) -> None:
    """It starts at 5, moves on updates 0, 250, ... only, and tends to exp(-target) / sqrt(2 pi e) / noise whatever A."""
    temperature = make_temperature(ent_coef, action_dim=3)
    values = []
    for n_updates in range(252):
        temperature.step(n_updates, exploration_noise)
        values.append(value(temperature))
    assert np.flatnonzero(np.diff([5.0, *values])).tolist() == [0, 250]
    assert values[0] == pytest.approx(5 * math.exp(-7e-3), rel=1e-4)  # Adam's first step is its learning rate
    for _ in range(2000):
        temperature.step(0, exploration_noise)
    fixed_point = math.exp(-target_per_dim) / math.sqrt(2 * math.pi * math.e) / exploration_noise
    assert value(temperature) == pytest.approx(fixed_point, rel=1e-3)
    if (ent_coef, exploration_noise) == ("paper", 0.1):
        assert fixed_point == pytest.approx(0.984, abs=1e-3)


def test_paper_temperature_of_a_model() -> None:
    """By the model's updates, and whatever the data."""
    model = fill(make_model(ent_coef="paper", policy_delay=100))
    values = []
    for _ in range(252):
        model.train(1)
        values.append(model.ent_coef_tensor.item())
    assert np.flatnonzero(np.diff(values)).tolist() == [249]  # between the updates 249 and 250


@pytest.mark.parametrize("ent_coef", ["auto_0.3", 0.3])
def test_only_the_paper_steps(ent_coef: float | str) -> None:
    temperature = make_temperature(ent_coef)
    temperature.step(0, 0.1)
    assert value(temperature) == pytest.approx(0.3)


def test_temperature_given_anew(tmp_path: Path) -> None:
    """What ``load`` is told wins over the saved coefficient; what it is told again changes nothing."""
    model = fill(make_model(ent_coef="paper"))
    model.train(1)
    model.save(tmp_path / "model.zip")
    now = model.ent_coef_tensor.item()
    assert now != pytest.approx(5, rel=1e-3)
    for ent_coef, expected in (("paper", now), ("auto", now), (0.2, 0.2), ("auto_0.3", 0.3), ("paper_1.5", 5.0)):
        loaded = SDAC.load(tmp_path / "model.zip", ent_coef=ent_coef)
        assert loaded.ent_coef == ent_coef and loaded.ent_coef_tensor.item() == pytest.approx(expected), ent_coef
    started = SDAC.load(tmp_path / "model.zip", ent_coef="auto_0.3")
    started.policy.log_ent_coef.data.fill_(math.log(0.7))  # learned since
    started.save(tmp_path / "again.zip")
    assert SDAC.load(tmp_path / "again.zip").ent_coef_tensor.item() == pytest.approx(0.7)
    fixed = make_model(ent_coef=0.2)
    fixed.set_parameters(str(tmp_path / "model.zip"))
    assert fixed.ent_coef_tensor.item() == pytest.approx(0.2)
