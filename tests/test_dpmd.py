"""DPMD, the paper's other algorithm: its loss, its critics' steps, its statistics, and what of SDAC it has not."""

import dataclasses
from pathlib import Path
from typing import Any

import pytest
import torch as th
from helpers.models import make_model
from helpers.update_helpers import OPTIONS, PLAIN, B, batch, changed, fill, make_policy, snapshot
from helpers.watching import logged
from stable_baselines3.common.type_aliases import PyTorchObs

from sb3_sdac import DPMD, PAPER_DPMD, SDAC
from sb3_sdac.dpmd import (
    UNUSED,
    MirrorDescentOptions,
    MirrorDescentUpdate,
    QStatistics,
    mirror_descent_weights,
)
from sb3_sdac.options import UpdateOptions


def options(critic_steps: int = 2, **changes: Any) -> MirrorDescentOptions:
    return MirrorDescentOptions(**{**dataclasses.asdict(OPTIONS), **changes}, critic_steps=critic_steps)


def make_update(**kwargs: Any) -> MirrorDescentUpdate:
    return MirrorDescentUpdate(make_policy(**kwargs))


# The update


def test_weights_by_hand() -> None:
    """exp(clip(Q - mean / std, -3, 3) / alpha), as published."""
    q_values = th.tensor([0.0, 1.0, 10.0, -10.0])
    found = mirror_descent_weights(q_values, th.tensor(1.0), th.tensor(2.0), 0.5)
    th.testing.assert_close(found, th.tensor([-0.5, 0.5, 3.0, -3.0]).mul(2).exp())


def test_statistics_by_hand() -> None:
    """Moving averages that start at 0 and 1; a standard deviation is that of the batch itself."""
    statistics, q_values = QStatistics(), th.tensor([1.0, 2.0, 4.0, 5.0])
    statistics.track(q_values)
    assert statistics.mean.item() == pytest.approx(3e-3, rel=1e-5)
    assert statistics.std.item() == pytest.approx(0.999 + 1e-3 * 2.5**0.5, rel=1e-6)


def test_loss_touches_the_actor_only() -> None:
    update, data = make_update(), batch()
    q_values = update.policy.q(update.encode_critic(data.next_observations), data.actions)
    loss, ess = update.mirror_descent_loss(update.policy.actor.encode(data.next_observations), q_values, data.actions)
    loss.backward()
    policy = update.policy
    assert policy.critic_target is not None and 1 <= ess.item() <= B
    assert all(parameter.grad is None for parameter in [*policy.critic.parameters(), *policy.critic_target.parameters()])
    assert all(parameter.grad is not None for parameter in policy.actor.noise_predictor.parameters())


class Recorded(MirrorDescentUpdate):
    """Looks at what the loss is handed, and when."""

    def mirror_descent_loss(
        self, encoded_actor: th.Tensor, q_values: th.Tensor, actions: th.Tensor
    ) -> tuple[th.Tensor, th.Tensor]:
        self.calls.append((self.policy.critic, snapshot(self.policy.critic), encoded_actor, q_values, actions))
        with th.no_grad():
            assert th.equal(q_values, self.policy.q(self.encode_critic(self.observations), actions))
            assert th.equal(encoded_actor, self.policy.actor.encode(self.observations))
        return super().mirror_descent_loss(encoded_actor, q_values, actions)

    calls: list[Any]
    observations: PyTorchObs


@pytest.mark.parametrize("critic_steps", [1, 2, 3])
def test_the_loss_is_handed_what_belongs_together(critic_steps: int) -> None:
    """Of the next observations, by critics that have taken all of their steps but the last."""
    update, data = Recorded(make_policy()), batch()
    update.calls, update.observations = [], data.next_observations
    start = snapshot(update.policy.critic)
    update(data, options(critic_steps), step_actor=True, step_targets=True)
    ((critic, then, encoded_actor, q_values, actions),) = update.calls
    assert encoded_actor.requires_grad and not q_values.requires_grad and not actions.requires_grad
    assert any(not th.equal(a, b) for a, b in zip(start, then, strict=True)) == (critic_steps > 1)
    assert changed(then, critic)
    update(data, options(critic_steps), step_actor=False, step_targets=True)
    assert len(update.calls) == 1


@pytest.mark.parametrize("critic_steps", [1, 2])
def test_critic_steps_repeat_the_same_gradient(critic_steps: int) -> None:
    """Official DPMD steps Adam twice with one gradient: from rest, each of Adam's first steps moves by the learning rate."""
    update = make_update()
    *_, bias = update.policy.critic.q_networks.parameters()
    before = bias.detach().clone()
    update(batch(), options(critic_steps), step_actor=False, step_targets=False)
    assert (bias - before).abs().max().item() == pytest.approx(critic_steps * 1e-3, rel=1e-3)


def test_statistics_move_on_every_update() -> None:
    """Also when the actor is not stepped, and by the Q of the next actions that its weights go by."""
    update = make_update()
    mean, std = 0.0, 1.0
    for i in range(3):
        seen: list[th.Tensor] = []
        track = update.q_statistics.track
        update.q_statistics.track = lambda q_values, seen=seen: seen.append(q_values)  # type: ignore[method-assign, misc]
        update(batch(), options(), step_actor=i % 2 == 0, step_targets=True)
        update.q_statistics.track = track  # type: ignore[method-assign]
        (q_values,) = seen
        assert q_values.shape == (B,)
        track(q_values)
        mean += 1e-3 * (q_values.mean().item() - mean)
        std += 1e-3 * (q_values.std(correction=0).item() - std)
        assert update.q_statistics.mean.item() == pytest.approx(mean, rel=1e-4)
        assert update.q_statistics.std.item() == pytest.approx(std, rel=1e-6)


@pytest.mark.parametrize("name", [field.name for field in dataclasses.fields(MirrorDescentOptions)])
def test_options(name: str) -> None:
    """What DPMD uses changes its update, and what it does not use does not."""
    others: dict[str, Any] = {
        "gamma": 0.9,
        "tau": 0.5,
        "clip_target_actions": False,
        "reward_scale": 0.7,
        "mixed_precision": True,
    }
    others |= {"n_reverse_samples": 4, "score_matching": "reverse_sampling", "proposal": "clipped_normal"}
    others |= {"noised_actions": "current", "target_ess": 0.6, "temperature_rate": 0.1, "critic_steps": 1}
    results = []
    for chosen in (options(), dataclasses.replace(options(), **{name: others[name]})):
        update = make_update(exploration_noise=1.0)
        th.manual_seed(0)
        for _ in range(2):
            update(batch(), chosen, step_actor=True, step_targets=True)
        results.append(update.policy.state_dict())
    equal = all(th.equal(value, results[1][key]) for key, value in results[0].items())
    assert equal == (name in (*UNUSED, "temperature_rate"))


# The algorithm


@pytest.mark.parametrize("name", UNUSED)
def test_what_is_refused(name: str) -> None:
    with pytest.raises(TypeError, match=f"DPMD has no {name} .*SDAC does"):
        make_model(algorithm=DPMD, **{name: 4})
    model = make_model(algorithm=DPMD)
    with pytest.raises(AttributeError, match=f"{name} of DPMD cannot be set.*SDAC does"):
        setattr(model, name, 4)


@pytest.mark.parametrize("ent_coef", ["auto", "auto_0.3"])
def test_no_temperature_from_data(ent_coef: str) -> None:
    """There are no candidates whose weights could say how warm it is."""
    with pytest.raises(ValueError, match=r"ent_coef must be a positive number, 'paper'.*mirror descent has no candidates"):
        make_model(algorithm=DPMD, ent_coef=ent_coef)
    model = make_model(algorithm=DPMD)
    with pytest.raises(ValueError, match="no candidates"):
        model.ent_coef = ent_coef
    assert model.ent_coef == "paper"


def test_statistics_are_saved_and_loaded(tmp_path: Path) -> None:
    """And learning goes on with them, bit by bit."""
    model = fill(make_model(algorithm=DPMD, policy_kwargs=PLAIN))
    model.train(5)
    model.save(tmp_path / "model.zip")
    loaded: Any = DPMD.load(tmp_path / "model.zip", env=model.get_env())
    statistics, others = model.update.q_statistics, loaded.update.q_statistics
    assert statistics.mean.item() == others.mean.item() != 0 and statistics.std.item() == others.std.item() != 1
    loaded.set_logger(model.logger)
    loaded.replay_buffer = model.replay_buffer
    for each in (model, loaded):
        each.set_random_seed(1)
        each.train(5)
    for name, value in model.policy.state_dict().items():
        assert th.equal(value, loaded.policy.state_dict()[name]), name
    assert others.mean.item() == statistics.mean.item()


def test_another_algorithms_file_is_refused(tmp_path: Path) -> None:
    make_model(algorithm=DPMD).save(tmp_path / "dpmd.zip")
    make_model().save(tmp_path / "sdac.zip")
    with pytest.raises(ValueError):
        SDAC.load(tmp_path / "dpmd.zip")
    with pytest.raises(ValueError):
        DPMD.load(tmp_path / "sdac.zip")


def test_it_logs_what_it_does() -> None:
    model = fill(make_model(algorithm=DPMD, ent_coef=0.5))
    model.train(3)
    log = logged(model)
    assert log.keys() >= {"critic_loss", "actor_loss", "reverse_ess", "ent_coef", "q_value"}
    assert 1 <= log["reverse_ess"] <= 64 and log["ent_coef"] == pytest.approx(0.5)
    assert isinstance(model.update_options(), MirrorDescentOptions) and isinstance(model.update_options(), UpdateOptions)


def test_the_papers_configuration() -> None:
    small = {"n_particles": 2, "n_sampling_steps": 2, "net_arch": [16]}
    policy_kwargs = {**PAPER_DPMD["policy_kwargs"], **small}
    model = DPMD("MlpPolicy", "Pendulum-v1", **{**PAPER_DPMD, "policy_kwargs": policy_kwargs, "learning_starts": 20})
    assert model.critic_steps == 2 and model.ent_coef == "paper" and model.actor_target is not None
    start = snapshot(model.policy)
    model.learn(30)
    assert changed(start, model.policy) and model._n_updates == 10


def test_another_algorithm_loads_it(tmp_path: Path) -> None:
    make_model(algorithm=DPMD, ent_coef=0.5).save(tmp_path / "dpmd.zip")
    with pytest.raises(ValueError, match=r"saved by DPMD: load it with sb3_sdac\.DPMD\.load"):
        SDAC.load(tmp_path / "dpmd.zip")
