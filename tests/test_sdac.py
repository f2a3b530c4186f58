"""SDAC in SB3's grammar: when what is updated, learning rates, what is said and saved."""

import inspect
import json
import zipfile
from contextlib import nullcontext
from pathlib import Path
from typing import Any

import pytest
import torch as th
from helpers.models import make_model
from helpers.update_helpers import PLAIN, changed, fill, snapshot
from helpers.watching import logged, nothing_read_back
from stable_baselines3 import SAC
from stable_baselines3.common.save_util import load_from_zip_file, save_to_zip_file
from stable_baselines3.common.utils import LinearSchedule

from sb3_sdac import DPMD, PAPER_DPMD, PAPER_SDAC, SDAC, sdac
from sb3_sdac import score_matching as sm
from sb3_sdac.options import UpdateOptions
from sb3_sdac.update import Metrics, Update

# Schedules and delays


def test_delays() -> None:
    """As in the authors' code, what is delayed happens on update 0, then on every n-th."""
    policy_kwargs = {**PLAIN, "average_actor": True}
    model = fill(make_model(policy_delay=3, target_update_interval=2, policy_kwargs=policy_kwargs))
    happened: dict[str, list[int]] = {"actor": [], "critic": [], "critic_target": [], "actor_target": []}
    for update in range(7):
        before = {name: snapshot(getattr(model, name)) for name in happened}
        model.train(1, 8)
        for name, updates in happened.items():
            if changed(before[name], getattr(model, name)):
                updates.append(update)
    assert happened["actor"] == [0, 3, 6]
    assert happened["critic"] == list(range(7))
    assert happened["critic_target"] == [0, 2, 4, 6]
    assert happened["actor_target"] == [0, 2, 4, 6]
    assert (model._n_updates, model._n_actor_updates) == (7, 3)


def test_learning_rates() -> None:
    """Those of both optimizers follow their schedules; the actor's also decays in its own updates."""
    model = fill(make_model(learning_rate=LinearSchedule(1e-2, 0.0, 1.0), policy_delay=2, actor_lr_decay=(1e-4, 2, 4)))

    def rates() -> tuple[float, float]:
        model.train(1, 8)
        actor, critic = (optimizer.param_groups[0]["lr"] for optimizer in (model.actor.optimizer, model.critic.optimizer))
        return actor, critic

    assert rates() == pytest.approx((1e-2, 1e-2))
    model._current_progress_remaining = 0.5
    found = [rates() for _ in range(8)]  # updates 1 to 8, before which the actor was stepped 1, 1, 2, 2, 3, 3, 4, 4 times
    middle, end = (5e-3 + 1e-4) / 2, 1e-4
    assert [actor for actor, _ in found] == pytest.approx([5e-3, 5e-3, 5e-3, 5e-3, middle, middle, end, end])
    assert all(critic == pytest.approx(5e-3) for _, critic in found)
    model.qf_learning_rate = 3e-3
    assert rates() == pytest.approx((end, 3e-3))
    log = logged(model)
    assert log["learning_rate"] == pytest.approx(end) and log["qf_learning_rate"] == pytest.approx(3e-3)


class Recorded(Update):
    """Remembers with which arguments it was called."""

    calls: list[Any]

    def __call__(self, *args: Any) -> Metrics:
        self.calls.append(args[1:])
        return super().__call__(*args)


class RecordedSDAC(SDAC):
    update_class = Recorded

    update: Recorded


def test_options_are_the_arguments_as_they_are_now() -> None:
    """A change is in the next update's; what is derived is there, too."""
    model = fill(make_model(algorithm=RecordedSDAC, policy_delay=2, target_update_interval=3, mixed_precision=False))
    model.update.calls = []
    model.train(1, 8)
    model.gamma, model.tau, model.target_ess, model.reward_scale = 0.9, 0.1, 0.5, 0.3
    model.train(3, 8)
    (first, *flags), *others = model.update.calls
    assert (first.gamma, first.tau, first.target_ess, first.reward_scale) == (0.99, 0.005, 0.28, "auto")
    assert first.temperature_rate == 1.0 and flags == [True, True]
    for chosen, *_ in others:
        assert (chosen.gamma, chosen.tau, chosen.target_ess, chosen.reward_scale) == (0.9, 0.1, 0.5, 0.3)
        assert chosen.temperature_rate == 0.05 and chosen == model.update_options()
    assert [flags for _, *flags in others] == [[False, False], [True, False], [False, True]]
    model.ent_coef, model.mixed_precision = 0.2, True
    assert model.update_options().temperature_rate is None and model.update_options().mixed_precision


def test_discount_factor_of_the_returns() -> None:
    """n-step returns are summed in the replay buffer, which has to hear of a change."""
    model = fill(make_model(gamma=0.9, n_steps=3))
    model.train(1, 8)
    assert model.replay_buffer.gamma == 0.9
    model.gamma = 0.8
    model.train(1, 8)
    assert model.replay_buffer.gamma == 0.8


def test_a_batch_of_one_has_no_variance() -> None:
    model = make_model(batch_size=1, learning_starts=5)
    model.learn(10)
    assert all(value.isfinite().all() for value in model.policy.state_dict().values())


def test_a_new_score_target_is_an_entry(monkeypatch: pytest.MonkeyPatch) -> None:
    """It is an argument at once, among those that a message lists, and trains."""

    def loss(diffusion: Any, t: Any, predicted: th.Tensor, candidates: sm.Candidates, weights: th.Tensor, _: Any) -> th.Tensor:
        return sm.denoising_loss(predicted, sm.expected_noise(candidates.noise, weights))

    with pytest.raises(ValueError, match="score_matching must be one of"):
        make_model(score_matching="mean noise")
    monkeypatch.setitem(sm.SCORE_TARGETS, "mean noise", sm.ScoreTarget(loss, needs_gradients=False))
    with pytest.raises(ValueError, match="mean noise"):
        make_model(score_matching="median noise")
    model = make_model(score_matching="mean noise")
    start = snapshot(model.actor)
    model.learn(20)
    assert changed(start, model.actor)


# What an update may not do


def denormal() -> float:
    return (th.tensor(1e-39) * 1).item()


class SeesDenormals(Update):
    """Looks at whether denormals are flushed; raises in the third update."""

    seen: list[float]

    def __call__(self, *args: Any) -> Metrics:
        self.seen.append(denormal())
        if len(self.seen) == 3:
            raise KeyError
        return {}


@pytest.mark.parametrize("before", [False, True])
def test_updates_count_denormals_as_zero(before: bool) -> None:
    """Within updates, also where one raises; outside it is as it was."""
    model = fill(make_model())
    update = model.update = SeesDenormals(model.policy)
    update.seen = []
    assert th.set_flush_denormal(before)
    try:
        outside = [denormal()]
        model.train(2)
        outside.append(denormal())
        with pytest.raises(KeyError):
            model.train(1)
        outside.append(denormal())
    finally:
        th.set_flush_denormal(False)
    assert update.seen == [0, 0, 0]
    assert outside == [0, 0, 0] if before else all(outside)


CONFIGURATIONS = pytest.mark.parametrize(
    "algorithm, kwargs",
    [
        (SDAC, {}),
        (SDAC, {"noised_actions": "current"}),
        (SDAC, {"n_steps": 3}),
        (SDAC, {"score_matching": "reverse_sampling"}),
        (SDAC, PAPER_SDAC),
        (DPMD, {}),
        (DPMD, PAPER_DPMD),
    ],
    ids=["default", "current", "n steps", "reverse sampling", "paper", "DPMD", "DPMD of the paper"],
)


@CONFIGURATIONS
@pytest.mark.parametrize("mixed_precision", [False, True])
def test_an_update_reads_nothing_back(algorithm: Any, kwargs: dict[str, Any], mixed_precision: bool) -> None:
    """On a GPU every number that Python asks for waits until all is computed; train() asks for none, from batch to log."""
    policy_kwargs = {**kwargs.get("policy_kwargs", {}), "n_sampling_steps": 2, "n_particles": 2}
    small = {"n_reverse_samples": 8} if algorithm is SDAC else {}
    kwargs = {**kwargs, **small, "mixed_precision": mixed_precision, "policy_kwargs": policy_kwargs}
    model = fill(make_model(algorithm=algorithm, **kwargs))

    def is_exempt(tensor: th.Tensor) -> bool:
        # Adam that is not fused, for the paper's temperature, counts its steps in a tensor on the CPU
        return any(tensor is state["step"] for state in model.temperature.optimizer.state.values())

    for read in (float, th.nonzero, lambda x: x[x > 0], th.where, lambda x: x.numpy()):
        with pytest.raises(AssertionError, match="was called"), nothing_read_back():
            read(th.zeros(1))
    model._record_metrics = lambda: None  # as on a GPU, where it is called when the log is written
    with nothing_read_back(is_exempt):
        model.train(4, 8)
    del model._record_metrics
    with pytest.raises(AssertionError, match="was called"), nothing_read_back():
        model.dump_logs()  # this is the one that waits
    assert model._n_updates == 4


# What is said


@pytest.mark.parametrize(
    "kwargs, is_said, words",
    [
        ({"reward_scale": 1.0, "gamma": 0.99}, True, "beyond 200 in size.*a smaller reward_scale"),
        ({"policy_kwargs": {"max_value": 0.1}}, True, "beyond 0.1 in size.*a larger policy_kwargs"),
        ({"policy_kwargs": {"n_bins": 1}, "reward_scale": 1.0}, False, ""),
    ],
    ids=["fixed scale", "auto", "plain values"],
)
def test_targets_out_of_range_are_said(kwargs: dict[str, Any], is_said: bool, words: str) -> None:
    """With rewards that make larger values than the distributions reach; not with plain values."""
    model = fill(make_model(**kwargs), reward_factor=1000.0)
    with pytest.warns(UserWarning, match=words) if is_said else nullcontext():
        model.train(1, 8)
    share = logged(model).get("targets_out_of_range")
    assert share is None if not is_said else share is not None and 0 < share <= 1


@pytest.mark.parametrize("kwargs, largest", [({"gamma": 0.95}, 40), ({"gamma": 1.0}, 2e4), ({"max_value": 7.0}, 7)])
def test_largest_value(kwargs: dict[str, float], largest: float, tmp_path: Path) -> None:
    """From the discount factor unless given; weights that were learned with it keep it."""
    policy_kwargs = {"n_bins": 21, **{name: kwargs[name] for name in kwargs if name == "max_value"}}
    model = make_model(gamma=kwargs.get("gamma", 0.99), policy_kwargs=policy_kwargs)
    model.save(tmp_path / "model.zip")
    for each in (model, SDAC.load(tmp_path / "model.zip"), SDAC.load(tmp_path / "model.zip", gamma=0.9)):
        assert each.critic.q_networks.bins is not None
        assert each.critic.q_networks.bins.support[[0, -1]].tolist() == pytest.approx([-largest, largest])


def test_terminal_states_are_remembered(tmp_path: Path) -> None:
    """In the file, too, since acting goes by it; fill() has some."""
    model = fill(make_model(n_steps=1, replay_recency=1.0))
    assert model.policy.seen_terminal == 0
    model.train(10, 32)
    assert model.policy.seen_terminal == 1 and 0 < logged(model)["pessimism"] <= 1
    model.save(tmp_path / "model.zip")
    assert SDAC.load(tmp_path / "model.zip").policy.seen_terminal == 1


# Files of before, arguments that are gone


@pytest.mark.parametrize("algorithm", [SDAC, DPMD])
def test_a_file_of_an_older_version_is_refused(algorithm: Any, tmp_path: Path) -> None:
    """Its arguments had other owners; the message says so, and not what is missing first."""
    make_model().save(tmp_path / "model.zip")
    data, params, variables = load_from_zip_file(tmp_path / "model.zip")
    assert data is not None
    renamed = {"anchor" if name == "noised_actions" else name: value for name, value in data.items()}
    old = {**renamed, "n_particles": 4, "n_target_particles": 1, "eta": 0.0, "critic_steps": 1, "use_sde": False}
    old["policy_kwargs"] = {"net_arch": [16]}
    save_to_zip_file(tmp_path / "old.zip", data=old, params=params, pytorch_variables=variables)
    for env in (None, make_model().get_env()):
        with pytest.raises(ValueError, match=r"saved by an sb3_sdac whose arguments had another layout.*or train a new one"):
            algorithm.load(tmp_path / "old.zip", env=env)


def test_every_option_of_the_update_is_an_argument() -> None:
    """But for the two that are derived."""
    names = set(UpdateOptions.__dataclass_fields__) - {"temperature_rate"}
    assert names <= set(inspect.signature(SDAC).parameters) & SDAC.LIVE


def test_policy_arguments_shared_with_sac() -> None:
    """SAC writes use_sde=False into the dictionary that it is given; as it asks for nothing, SDAC takes that, too."""
    policy_kwargs: dict[str, Any] = {"net_arch": [16]}
    for algorithm in (SDAC, SAC, SDAC, DPMD):
        algorithm("MlpPolicy", "Pendulum-v1", policy_kwargs=policy_kwargs, buffer_size=10)
    assert policy_kwargs == {"net_arch": [16], "use_sde": False}
    with pytest.raises(TypeError, match="use_sde"):
        SDAC("MlpPolicy", "Pendulum-v1", policy_kwargs={"use_sde": True})


# Mixed precision


@pytest.mark.parametrize("hardware", [True, False])
def test_mixed_precision_follows_the_processor(hardware: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sdac, "has_bfloat16", lambda device: hardware)
    for kwargs in ({}, {"mixed_precision": "auto"}):
        assert make_model(**kwargs).update_options().mixed_precision is hardware
    for mixed_precision in (True, False):
        assert make_model(mixed_precision=mixed_precision).update_options().mixed_precision is mixed_precision


@pytest.mark.parametrize("mixed_precision", ["auto", True])
def test_a_file_does_not_carry_it_along(mixed_precision: bool | str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Saved where there is bfloat16, loaded where there is none: "auto" is decided anew, what was asked for stays."""
    monkeypatch.setattr(sdac, "has_bfloat16", lambda device: True)
    model = fill(make_model(mixed_precision=mixed_precision))
    model.train(2)
    model.save(tmp_path / "model.zip")
    with zipfile.ZipFile(tmp_path / "model.zip") as archive:
        data = json.loads(archive.read("data"))
    assert data["mixed_precision"] == mixed_precision and "_mixed_precision" not in data

    monkeypatch.setattr(sdac, "has_bfloat16", lambda device: False)
    loaded = SDAC.load(tmp_path / "model.zip", env=model.get_env(), device="cpu")
    assert (loaded.mixed_precision, loaded.update_options().mixed_precision) == (mixed_precision, mixed_precision is True)
    assert all(th.equal(loaded.policy.state_dict()[name], value) for name, value in model.policy.state_dict().items())
    fill(loaded).train(2)
    assert loaded._n_updates == 4
    assert not SDAC.load(tmp_path / "model.zip", device="cpu", mixed_precision=False).update_options().mixed_precision
