"""Arguments: checked when given, at work once set on a live model, and shown their place if they come from SAC."""

import copy
import inspect
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch as th
from helpers.models import all_of, make_model, observations
from sb3_contrib import TQC, CrossQ
from stable_baselines3 import DDPG, SAC, TD3
from stable_baselines3.common.buffers import ReplayBuffer
from stable_baselines3.common.utils import LinearSchedule

from sb3_sdac import DPMD, PAPER_DPMD, PAPER_SDAC, SDAC, DiffusionPolicy
from sb3_sdac.arguments import (
    LiveArguments,
    is_count,
    is_fraction,
    is_lr_decay,
    is_number,
    is_positive,
    is_rate,
    is_train_freq,
    require,
)
from sb3_sdac.policies import Actor, Critic, Sampler

# Given to the constructor

COUNTS = ["policy_delay", "target_update_interval", "batch_size", "buffer_size", "n_steps"]
COUNTS_OF_THE_POLICY = ["n_diffusion_steps", "n_sampling_steps", "n_particles", "n_train_particles", "n_critics"]


def in_policy_kwargs(name: str, value: Any) -> dict[str, Any]:
    return {"policy_kwargs": {name: value}} if name in SDAC._policy_arguments() else {name: value}


@pytest.mark.parametrize("value", [0, -3, 2.5, "4", True, np.nan], ids=repr)
@pytest.mark.parametrize("name", COUNTS + COUNTS_OF_THE_POLICY)
def test_counts(name: str, value: Any) -> None:
    with pytest.raises(ValueError, match=all_of(name, f"got {value!r}", "integer of at least 1")):
        make_model(**in_policy_kwargs(name, value))


@pytest.mark.parametrize("value", [1, 0, -1, 3.0, "16"], ids=repr)
def test_reverse_samples(value: Any) -> None:
    with pytest.raises(ValueError, match=all_of("n_reverse_samples", f"got {value!r}", "at least 2")):
        make_model(n_reverse_samples=value)


def test_numpy_integers_are_integers() -> None:
    integers: dict[str, Any] = {"n_reverse_samples": np.int32(8), "train_freq": np.int64(1), "gradient_steps": np.int64(1)}
    assert make_model(**integers, policy_kwargs={"n_particles": np.int64(3)}).learn(12)._n_updates == 2


BAD_ARGUMENTS: list[tuple[dict[str, Any], tuple[Any, ...]]] = [
    ({"n_sampling_steps": 6}, ("n_sampling_steps", "got 6", "at most", "n_diffusion_steps=5")),
    ({"beta_schedule": "quadratic"}, ("beta_schedule", "'quadratic'", "linear", "cosine", "vp")),
    ({"score_matching": "mirror_descent"}, ("score_matching", "'mirror_descent'", "reverse_sampling", "gradient_assisted")),
    ({"proposal": "normal"}, ("proposal", "'normal'", "truncated_normal", "clipped_normal")),
    ({"noised_actions": None}, ("noised_actions", "None", "next", "current")),
    *[
        ({"ent_coef": value}, ("ent_coef", f"got {value!r}", "positive number", "auto", "paper"))
        for value in (-0.1, 0, np.nan, np.inf, None, "", "automatic", "auto_", "auto_-1", "auto_0", "auto_x", "paper_0", "0.1")
    ],
    (
        {"ent_coef": "paper", "policy_kwargs": {"exploration_noise": 0}},
        ("ent_coef='paper'", "exploration_noise", "positive"),
    ),
    *[
        ({"n_reverse_samples": 8, "target_ess": value}, ("target_ess", f"got {value!r}", "n_reverse_samples=8", "above 0.125"))
        for value in (0.125, 0.1, 1.0, 4, np.nan, "0.3")
    ],
    *[
        ({name: value}, (name, f"got {value!r}", "positive"))
        for name in ("init_noise_scale", "reward_scale", "max_value")
        for value in (0, -1.0, np.inf, "1")
    ],
    *[
        ({name: value}, (name, f"got {value!r}", "between 0 and 1"))
        for name in ("eta", "tau", "gamma", "pessimism")
        for value in (-0.1, 1.1, np.nan, "0.5")
    ],
    *[({"n_bins": value}, ("n_bins", f"got {value!r}", "odd integer of at least 1")) for value in (0, 2, -1, 2.5, None, True)],
    *[({"replay_recency": value}, ("replay_recency", f"got {value!r}", "at least 1")) for value in (0.9, np.inf, "auto")],
    *[({"exploration_noise": value}, ("exploration_noise", f"got {value!r}", "at least 0")) for value in (-0.1, np.nan, None)],
    *[
        ({"actor_lr_decay": value}, ("actor_lr_decay", value, "first < last"))
        for value in ((1e-5, 4, 2), (1e-5, -1, 2), (1e-5, 2), (-1e-5, 0, 2))
    ],
    *[
        ({name: value}, (name, f"got {value!r}", "True, False or 'auto'"))
        for name in ("mixed_precision", "compile")
        for value in (1, 0.0, None, "on")
    ],
    *[
        ({name: value}, (name, f"got {value!r}", "True or False"))
        for name in (
            *("clip_target_actions", "share_features_extractor", "scale_noise_by_ent_coef", "average_actor", "batch_norm"),
        )
        for value in (1, None, "True")
    ],
    *[
        ({name: value}, (name, f"got {value!r}", "at least 0", "LinearSchedule(start, end, 1)", "lin_<start>"))
        for name in ("learning_rate", "qf_learning_rate")
        for value in (-1e-3, np.nan, "lin_0.003", "0.003")
    ],
    *[({"net_arch": value}, ("net_arch", value, "at least 1")) for value in ([0], [8.0], {"pi": [8], "qf": ["8"]})],
    *[({"gradient_steps": value}, ("gradient_steps", f"got {value!r}", "at least -1")) for value in (-2, 1.5, "1", True)],
    *[
        ({"train_freq": value}, ("train_freq", f"got {value!r}", "at least 1", "'step' or 'episode'"))
        for value in (0, -1, 1.5, "1", (0, "episode"), (1.5, "step"), (1, "steps"), (1,), (), (1, "step", 2))
    ],
    *[({"replay_buffer_kwargs": {name: 0.5}}, (name, "0.5", "of SDAC itself")) for name in ("n_steps", "gamma")],
    *[({"policy_kwargs": {name: 0.5}}, (name, "0.5", "of SDAC itself")) for name in ("gamma", "ent_coef", "learning_rate")],
    (
        {"optimize_memory_usage": True, "n_steps": 3, "replay_buffer_kwargs": {"handle_timeout_termination": False}},
        ("n_steps", "1 or None", "got 3"),
    ),
]


@pytest.mark.parametrize("kwargs, words", BAD_ARGUMENTS, ids=[str(kwargs) for kwargs, _ in BAD_ARGUMENTS])
def test_bad_arguments(kwargs: dict[str, Any], words: tuple[Any, ...]) -> None:
    """Each is noticed at once, not when it is due; those of the policy as policy_kwargs."""
    policy_kwargs = {name: kwargs[name] for name in kwargs if name in SDAC._policy_arguments()}
    kwargs = {name: kwargs[name] for name in kwargs if name not in policy_kwargs}
    with pytest.raises(ValueError, match=all_of(*words)):
        make_model(**kwargs, **({"policy_kwargs": policy_kwargs} if policy_kwargs else {}))


def test_arguments_of_dpmd() -> None:
    for value in (0, 1.5, "2", None):
        with pytest.raises(ValueError, match=all_of("critic_steps", f"got {value!r}", "integer of at least 1")):
            make_model(algorithm=DPMD, critic_steps=value)
    for ent_coef in ("auto", "auto_0.1"):
        with pytest.raises(ValueError, match=all_of("ent_coef", f"got {ent_coef!r}", "positive number", "'paper'")):
            make_model(algorithm=DPMD, ent_coef=ent_coef)


@pytest.mark.parametrize("ent_coef", ["auto_1e-2", "auto_.5", 2, np.float32(0.5)], ids=repr)
def test_all_notations_of_numbers(ent_coef: Any) -> None:
    assert make_model(ent_coef=ent_coef).learn(12)._n_updates == 2


def test_arguments_are_checked_before_anything_is_built(monkeypatch: pytest.MonkeyPatch) -> None:
    """A buffer of a million transitions is not allocated to find out that a name was misspelt."""
    built = []
    monkeypatch.setattr(Actor, "__init__", lambda *_, **__: built.append("actor"))
    monkeypatch.setattr(ReplayBuffer, "__init__", lambda *_, **__: built.append("buffer"))
    with pytest.raises(ValueError, match="proposal"):
        SDAC("MlpPolicy", "Pendulum-v1", proposal="quadratic")
    assert not built
    with pytest.raises(AttributeError):  # that is where they would have been built
        SDAC("MlpPolicy", "Pendulum-v1")
    assert built


@pytest.mark.parametrize("policy", ["MlpPolicies", SAC.policy_aliases["MlpPolicy"]], ids=str)
def test_policy(policy: Any) -> None:
    words = ("MlpPolicies",) if isinstance(policy, str) else ("SACPolicy", "MlpPolicy", "CnnPolicy", "MultiInputPolicy")
    with pytest.raises(ValueError, match=all_of(*words)):
        SDAC(policy, "Pendulum-v1")


@pytest.mark.parametrize("device", ["cuda", "cuda:1", th.device("cuda")])
def test_cuda_without_cuda(device: Any) -> None:
    with pytest.raises(ValueError, match=all_of(f"device='{device}'", "no CUDA", "'cpu'", "'auto'")):
        make_model(device=device)


@pytest.mark.parametrize(
    "predicate, yes, no",
    [
        (is_number, [0, -1.5, np.float32(2), np.int64(3)], [np.nan, np.inf, True, "1", None, 1j, [1]]),
        (is_count, [1, np.int8(3)], [0, -1, 1.0, True, "1", None, np.float64(1)]),
        (is_positive, [1e-9, np.float32(1)], [0, -1, np.inf, True]),
        (is_fraction, [0, 1, 0.5, np.float64(1)], [-1e-9, 1.0001, np.nan, True]),
        (is_rate, [0, 1e-3, LinearSchedule(1, 0, 1), lambda progress: progress], [-1, np.nan, "1", None]),
        (is_lr_decay, [(0, 0, 1), [1e-5, 2, 30]], [(0, 1, 1), (0, 2, 1), (0, 1), "abc", None, (0, 0, np.inf)]),
        (is_train_freq, [1, np.int64(2), (3, "step"), (1, "episode")], [0, "1", [1, "step"], ("step", 1), (1, None)]),
    ],
)
def test_predicates(predicate: Any, yes: list[Any], no: list[Any]) -> None:
    assert [value for value in yes if not predicate(value)] == []
    assert [value for value in no if predicate(value)] == []


# Coming from SAC

COUNTERPARTS = {
    "target_entropy": "target_ess",
    "use_sde": "exploration_noise",
    "sde_sample_freq": "exploration_noise",
    "use_sde_at_warmup": "learning_starts",
    "target_policy_noise": "exploration_noise",
    "target_noise_clip": "clip_target_actions",
    "top_quantiles_to_drop_per_net": "pessimism",
}
#: Of the policies
COUNTERPARTS_OF_THE_POLICY = {
    "n_quantiles": "n_bins",
    "log_std_init": "exploration_noise",
    "clip_mean": "exploration_noise",
    "use_expln": "exploration_noise",
    "use_sde": "exploration_noise",
    "batch_norm_momentum": "batch_norm",
    "batch_norm_eps": "batch_norm",
    "renorm_warmup_steps": "batch_norm",
}
OTHERS: list[Any] = [SAC, TD3, DDPG, TQC, CrossQ]


def parameters(cls: Any) -> dict[str, inspect.Parameter]:
    return {name: value for name, value in inspect.signature(cls).parameters.items() if value.kind is not value.VAR_KEYWORD}


def test_every_argument_of_the_others_has_a_counterpart() -> None:
    """A new version of SB3 with another argument shows here."""
    lacking = {name for other in OTHERS for name in parameters(other)} - parameters(SDAC).keys()
    assert lacking == COUNTERPARTS.keys()
    policies = [other.policy_aliases["MlpPolicy"] for other in OTHERS]
    lacking = {name for policy in policies for name in parameters(policy)} - parameters(DiffusionPolicy).keys()
    assert lacking == COUNTERPARTS_OF_THE_POLICY.keys()


@pytest.mark.parametrize("algorithm", [SDAC, DPMD])
@pytest.mark.parametrize("name", COUNTERPARTS | COUNTERPARTS_OF_THE_POLICY)
def test_arguments_of_other_algorithms(name: str, algorithm: Any, tmp_path: Path) -> None:
    counterpart = (COUNTERPARTS | COUNTERPARTS_OF_THE_POLICY)[name]
    make_model(algorithm=algorithm).save(tmp_path / "model.zip")
    for call in (
        lambda: make_model(algorithm=algorithm, **{name: 3}),
        lambda: algorithm.load(tmp_path / "model.zip", **{name: 3}),
    ):
        with pytest.raises(TypeError, match=all_of(f"{name}=3", counterpart)) as error:
            call()
        assert "help(SDAC)" not in str(error.value)


@pytest.mark.parametrize("name", COUNTERPARTS_OF_THE_POLICY)
def test_policy_arguments_of_other_algorithms(name: str) -> None:
    with pytest.raises(TypeError, match=all_of(name, COUNTERPARTS_OF_THE_POLICY[name])):
        make_model(policy_kwargs={name: 3})


@pytest.mark.parametrize("algorithm", [SDAC, DPMD])
@pytest.mark.parametrize("name", sorted(SDAC._policy_arguments()))
def test_policy_arguments_given_to_the_algorithm(name: str, algorithm: Any, tmp_path: Path) -> None:
    place = f"model.policy.{name} = 3" if name in DiffusionPolicy.LIVE else "new model"
    with pytest.raises(TypeError, match=all_of(f"policy_kwargs=dict({name}=3)", place)):
        make_model(algorithm=algorithm, **{name: 3})
    make_model(algorithm=algorithm).save(tmp_path / "model.zip")
    with pytest.raises(TypeError, match=all_of(f"policy_kwargs=dict({name}=3)", place)):
        algorithm.load(tmp_path / "model.zip", **{name: 3})


def test_misspelt_arguments() -> None:
    for name in ("learning_rates", "nstep", "buffersize"):
        with pytest.raises(TypeError, match=all_of(f"{name}=3", "help(SDAC)")):
            make_model(**{name: 3})


@pytest.mark.parametrize("name, value", [("anchor", "next"), ("n_target_particles", 2), ("critic_steps", 2)])
def test_arguments_of_old_versions(name: str, value: Any) -> None:
    words = {"anchor": "noised_actions", "n_target_particles": "n_train_particles", "critic_steps": "DPMD"}
    with pytest.raises(TypeError, match=all_of(f"{name}={value!r}", words[name])):
        make_model(**{name: value})


def test_defaults_of_sac_pass() -> None:
    """A dictionary of arguments for several algorithms asks for nothing with these."""
    assert make_model(use_sde=False, sde_sample_freq=-1).learn(12)._n_updates == 2
    for kwargs in ({"use_sde": True}, {"use_sde": True, "sde_sample_freq": 4}, {"sde_sample_freq": 4}):
        with pytest.raises(TypeError, match=all_of("use_sde", "no Gaussian" if "use_sde" in kwargs else "exploration_noise")):
            make_model(**kwargs)


@pytest.mark.parametrize("name", ["n_reverse_samples", "score_matching", "proposal", "noised_actions", "target_ess"])
def test_dpmd_has_no_candidates(name: str, tmp_path: Path) -> None:
    value = parameters(SDAC)[name].default
    with pytest.raises(TypeError, match=all_of(f"DPMD has no {name}", repr(value), "SDAC")):
        make_model(algorithm=DPMD, **{name: value})
    make_model(algorithm=DPMD).save(tmp_path / "model.zip")
    with pytest.raises(TypeError, match=name):
        DPMD.load(tmp_path / "model.zip", **{name: value})


# Set on a live model

#: For every argument of SDAC and DPMD that may be set: another value, values that are wrong, and arguments with which the
#: other value makes a difference
LIVE: dict[str, tuple[Any, list[Any], dict[str, Any]]] = {
    "learning_rate": (3e-4, [-1, "lin_0.1", None], {}),
    "learning_starts": (3, [-1, "all", None], {}),
    "batch_size": (5, [0, 2.5], {}),
    "tau": (0.5, [2, "1"], {"policy_kwargs": {"batch_norm": False}}),
    "gamma": (0.9, [-0.1, 1.1], {}),
    "train_freq": ((3, "step"), [0, (1, "day"), (1, "step", 1)], {}),
    "gradient_steps": (2, [-2, 1.5], {}),
    "replay_recency": (1.0, [0.5, "all"], {}),
    "n_reverse_samples": (7, [1, 2], {}),  # two are too few for target_ess
    "score_matching": ("reverse_sampling", ["mirror_descent", None], {}),
    "proposal": ("clipped_normal", ["uniform"], {}),
    "noised_actions": ("current", ["both"], {}),
    "ent_coef": (0.02, [0, "automatic"], {}),
    "target_ess": (0.6, [0.1, 1.5], {}),
    "clip_target_actions": (False, [0, "no"], {"policy_kwargs": {"exploration_noise": 2.0}}),
    "policy_delay": (1, [0], {}),
    "target_update_interval": (4, [0], {"policy_kwargs": {"batch_norm": False}}),
    "reward_scale": (0.7, [0, "big"], {}),
    "qf_learning_rate": (1e-4, [-1], {}),
    "actor_lr_decay": ((1e-5, 0, 2), [(1e-5, 2, 0), 3], {}),
    "mixed_precision": (True, ["maybe", 1], {"mixed_precision": False}),
    "compile": (True, ["maybe", 1], {"compile": False}),
    "critic_steps": (1, [0], {"algorithm": DPMD}),
}
#: The same for the policy
LIVE_OF_THE_POLICY: dict[str, tuple[Any, list[Any], dict[str, Any]]] = {
    "n_sampling_steps": (4, [0, 6], {}),
    "eta": (0.8, [-1, "1"], {}),
    "init_noise_scale": (1.5, [0, None], {}),
    "n_particles": (6, [0, 2.5], {}),
    "n_train_particles": (None, [0, "all"], {}),
    "exploration_noise": (0.7, [-1, None], {}),
    "scale_noise_by_ent_coef": (True, [1, None], {}),
    "pessimism": (0.8, [2, "max"], {"policy_kwargs": {"n_critics": 3}}),
}


def state(model: Any) -> list[tuple[str, Any]]:
    """All numbers that a model has learned."""
    flat: list[tuple[str, Any]] = [("num_timesteps", model.num_timesteps)]

    def add(name: str, value: Any) -> None:
        items = value.items() if isinstance(value, dict) else enumerate(value) if isinstance(value, (list, tuple)) else None
        if items is None:
            flat.append((name, value.flatten().tolist() if isinstance(value, th.Tensor) else value))
        for key, part in items or ():
            add(f"{name}.{key}", part)

    parts = model.get_parameters()
    # Of an optimizer's options the learning rate only says which was the last
    add("", {name: part["state"] if "optimizer" in name else part for name, part in parts.items()})
    return flat


def act_and_learn(model: Any) -> list[Any]:
    """Actions and weights from now on, from equal random numbers."""
    model.set_random_seed(7)
    actions = [model.predict(observations(), deterministic=deterministic)[0].tolist() for deterministic in (True, False)]
    model.learn(16)  # two updates of the actor
    actions += [model.predict(observations(), deterministic=deterministic)[0].tolist() for deterministic in (True, False)]
    return [*actions, state(model)]


def in_the_state_of(model: Any, other: Any) -> Any:
    """:return: the model, having learned what the other one has"""
    model.set_parameters(copy.deepcopy(other.get_parameters()))  # PyTorch's optimizers would share their state
    model._n_updates, model._n_actor_updates = other._n_updates, other._n_actor_updates
    model.replay_buffer = copy.deepcopy(other.replay_buffer)
    return model


def test_the_tables_are_complete() -> None:
    assert LIVE.keys() == SDAC.LIVE | DPMD.LIVE
    assert LIVE_OF_THE_POLICY.keys() == DiffusionPolicy.LIVE


#: Arguments of the constructors that are neither live nor fixed, and why
NEITHER = {
    "policy": "the networks: SB3 sets it",
    "env": "model.set_env(env), which SB3 checks",
    "action_noise": "SB3 reads it when learn() begins, as it does in SAC",
    "tensorboard_log": "SB3 reads it when learn() begins",
    "verbose": "SB3 reads it wherever it prints",
    "device": "SB3's own tests set it: a replay buffer that is loaded goes there",
    "_init_setup_model": "no attribute",
    "observation_space": "of the policy: SB3 checks it in set_env",
    "action_space": "of the policy: SB3 checks it in set_env",
    "lr_schedule": "of the policy, which does not keep it",
}


@pytest.mark.parametrize("cls", [SDAC, DPMD, DiffusionPolicy])
def test_every_argument_is_live_or_fixed(cls: Any) -> None:
    names = cls._constructor_arguments() if cls is not DiffusionPolicy else parameters(cls).keys()
    assert names - cls.LIVE - cls.FIXED.keys() <= NEITHER.keys()
    assert not cls.LIVE & cls.FIXED.keys()
    # No name that is none, but for what DPMD has of SDAC
    assert cls.LIVE | cls.FIXED.keys() <= names | parameters(SDAC).keys()


@pytest.mark.parametrize("name", [*LIVE, *LIVE_OF_THE_POLICY])
def test_what_is_set_works_at_once_and_is_saved(name: str, tmp_path: Path) -> None:
    """As in a model made with it, bit by bit, in acting and learning; and so in one that is saved and loaded."""
    of_policy = name in LIVE_OF_THE_POLICY
    value, _, base = (LIVE | LIVE_OF_THE_POLICY)[name]
    learned = make_model(**base).learn(20)

    def copied(**kwargs: Any) -> Any:
        return in_the_state_of(make_model(**{**base, **kwargs}), learned)

    with_value = {"policy_kwargs": {**base.get("policy_kwargs", {}), name: value}} if of_policy else {name: value}
    live, made, other = copied(), copied(**with_value), copied()
    owner = live.policy if of_policy else live
    setattr(owner, name, value)
    live.save(tmp_path / "model.zip")
    loaded = type(live).load(tmp_path / "model.zip", env=make_model().get_env())
    loaded.replay_buffer = copy.deepcopy(learned.replay_buffer)
    for model in (live, loaded):
        found = getattr(model.policy if of_policy else model, name)
        assert (tuple(found) if isinstance(value, tuple) and name != "train_freq" else found) == getattr(
            made.policy if of_policy else made, name
        )
        assert not of_policy or (model.policy_kwargs[name] if name in model.policy_kwargs else None) == value
    if name == "compile":  # gives the same numbers, to rounding and after a minute
        assert ["critic_loss" in vars(model.update) for model in (live, made, loaded, other)] == [True, True, True, False]
        live.compile = False
        assert "critic_loss" not in vars(live.update)
        return
    results = [act_and_learn(model) for model in (live, made, loaded, other)]
    for result in results[1:3]:
        for first, second in zip(results[0], result, strict=True):
            assert first == second
    assert results[0] != results[3], "make it so that it makes a difference"


@pytest.mark.parametrize("name", [*LIVE, *LIVE_OF_THE_POLICY])
def test_wrong_values_are_refused_and_change_nothing(name: str) -> None:
    _, wrong, base = (LIVE | LIVE_OF_THE_POLICY)[name]
    model, untouched = make_model(**base), make_model(**base)
    owner = model.policy if name in LIVE_OF_THE_POLICY else model
    before = getattr(owner, name)
    for value in [*wrong, np.nan, []]:
        about = "target_ess" if (name, value) == ("n_reverse_samples", 2) else name
        with pytest.raises(ValueError, match=all_of(about, "must be", "got")):
            setattr(owner, name, value)
        assert getattr(owner, name) == before and type(getattr(owner, name)) is type(before)
    assert act_and_learn(model) == act_and_learn(untouched)


@pytest.mark.parametrize("cls", [SDAC, DPMD, DiffusionPolicy, Actor, Critic, Sampler])
def test_fixed_arguments(cls: type[LiveArguments]) -> None:
    """They raise, say what to do, and nothing has changed."""
    model = make_model(algorithm=cls if issubclass(cls, SDAC) else SDAC)
    owner = {SDAC: model, DPMD: model, DiffusionPolicy: model.policy, Actor: model.actor, Critic: model.critic}.get(
        cls, model.actor.sampler
    )
    assert type(owner) is cls and cls.FIXED
    missing = object()
    for name, advice in cls.FIXED.items():
        before = getattr(owner, name, missing)
        for value in (3, None, before):
            with pytest.raises(AttributeError, match=all_of(f"{name} of {cls.__name__}", repr(value), advice)):
                setattr(owner, name, value)
        assert getattr(owner, name, missing) is before
        assert len(advice.split()) > 1


@pytest.mark.parametrize("name", sorted(SDAC._policy_arguments()))
def test_arguments_of_the_policy_are_not_the_models(name: str) -> None:
    model = make_model()
    with pytest.raises(AttributeError, match=all_of(f"model.policy.{name} = 1.0")):
        setattr(model, name, 1.0)
    assert name not in vars(model)


@pytest.mark.parametrize("part", ["actor", "actor_target", "actor.sampler", "actor_target.sampler", "critic", "critic_target"])
def test_parts_name_the_owner(part: str) -> None:
    """Whatever the policy's parts know of its arguments is set on the policy."""
    policy = make_model(policy_kwargs={"average_actor": True, "batch_norm": False}).policy
    owner = policy.get_submodule(part)
    for name in DiffusionPolicy.LIVE & owner.FIXED.keys():
        with pytest.raises(AttributeError, match=all_of(f"model.policy.{name}")):
            setattr(owner, name, 1.0)
    assert set(Sampler.SETTINGS) <= owner.FIXED.keys() or "pessimism" in owner.FIXED


def test_a_change_reaches_the_averaged_actor() -> None:
    policy = make_model(policy_kwargs={"average_actor": True}).policy
    policy.n_sampling_steps = 4
    assert policy.actor_target.sampler is policy.actor.sampler and policy.actor.sampler.diffusion.n_sampling_steps == 4


def test_several_changes_and_back_again(tmp_path: Path) -> None:
    """What is saved is what is, also if it is what it was."""
    model = make_model()
    model.policy.n_particles, model.policy.eta, model.ent_coef = 16, 1.0, 0.02
    model.save(tmp_path / "model.zip")
    model.policy.n_particles, model.policy.eta = 2, 0.0
    model.save(tmp_path / "again.zip")
    first, second = (SDAC.load(tmp_path / f"{name}.zip") for name in ("model", "again"))
    assert (first.policy.n_particles, first.policy.eta, first.ent_coef) == (16, 1.0, 0.02)
    assert (second.policy.n_particles, second.policy.eta, second.ent_coef) == (2, 0.0, 0.02)
    assert first.policy_kwargs["n_particles"] == 16 and second.policy_kwargs["n_particles"] == 2


def test_temperature_of_a_live_model() -> None:
    """A number holds at once; "auto" goes on from the present value, the others start anew."""
    model = make_model(ent_coef=0.3).learn(14)
    for ent_coef, value in ((0.05, 0.05), ("auto", 0.05), ("auto_2", 2.0), ("paper", 5.0), (1, 1.0)):
        model.ent_coef = ent_coef
        assert model.ent_coef_tensor.item() == pytest.approx(value)
        assert (model.log_ent_coef is None) == (not isinstance(ent_coef, str))
        model._n_updates = 0  # of the actor, and on the paper's curve
        model.train(1, 8)
        assert (model.ent_coef_tensor.item() == pytest.approx(value)) == (not isinstance(ent_coef, str))


def test_exploration_noise_goes_with_the_papers_temperature() -> None:
    """Two owners, so that neither sees it when it is set; the next update says it."""
    model = make_model(ent_coef="paper").learn(14)
    model.policy.exploration_noise = 0
    with pytest.raises(ValueError, match=all_of("ent_coef='paper'", "exploration_noise", "positive")):
        model.learn(14)
    with pytest.raises(ValueError, match=all_of("ent_coef='paper'", "exploration_noise", "positive")):
        model.ent_coef = "paper_1.5"
    model.ent_coef = 0.1
    model.learn(14)


def test_a_larger_discount_factor_warns() -> None:
    """The values that the critics can give are in their weights."""
    model = make_model(gamma=0.9)
    with pytest.warns(UserWarning, match=r"values up to 20 .*gamma=0.99 "):
        model.gamma = 0.99
    assert model.gamma == 0.99
    model.gamma = 0.8


def test_a_setting_follows_the_schedule() -> None:
    model = make_model().learn(14)
    model.learning_rate, model.qf_learning_rate = LinearSchedule(1e-2, 0, 1.0), 2e-3
    model.learn(20, log_interval=10_000)
    assert model.logger.name_to_value["train/qf_learning_rate"] == 2e-3
    assert model.logger.name_to_value["train/learning_rate"] == pytest.approx(1e-2 * model._current_progress_remaining)


# Given to load


@pytest.mark.parametrize("kwargs", [{"policy_delay": 0}, {"ent_coef": -1.0}, {"score_matching": "x"}, {"gamma": 2}], ids=str)
def test_wrong_arguments_given_to_load(kwargs: dict[str, Any], tmp_path: Path) -> None:
    make_model().save(tmp_path / "model.zip")
    ((name, value),) = kwargs.items()
    with pytest.raises(ValueError, match=all_of(name, f"got {value!r}")):
        SDAC.load(tmp_path / "model.zip", **kwargs)


@pytest.mark.parametrize("name", [name for name in LIVE if name != "critic_steps"])
def test_arguments_given_to_load(name: str, tmp_path: Path) -> None:
    """The same as setting them afterwards."""
    value, _, base = LIVE[name]
    make_model(**base).save(tmp_path / "model.zip")
    loaded, changed = SDAC.load(tmp_path / "model.zip", **{name: value}), SDAC.load(tmp_path / "model.zip")
    setattr(changed, name, value)
    assert getattr(loaded, name) == getattr(changed, name)
    if name in ("ent_coef", "learning_rate", "qf_learning_rate"):
        assert loaded.ent_coef_tensor == changed.ent_coef_tensor
        assert (loaded._actor_learning_rate(), loaded._qf_learning_rate()) == (
            changed._actor_learning_rate(),
            changed._qf_learning_rate(),
        )


def test_other_arguments_of_load(tmp_path: Path) -> None:
    make_model().save(tmp_path / "model.zip")
    loaded: Any = SDAC.load(tmp_path / "model.zip", env=make_model().get_env(), stats_window_size=3, buffer_size=50, n_steps=3)
    assert loaded.stats_window_size == 3 and loaded.replay_buffer.n_steps == 3 and loaded.replay_buffer.buffer_size == 50
    loaded.learn(14)
    assert loaded.ep_info_buffer.maxlen == 3
    with pytest.raises(TypeError, match=r"policy='CnnPolicy'.*from the file"):
        SDAC.load(tmp_path / "model.zip", policy="CnnPolicy")
    with pytest.raises(ValueError, match="policy kwargs"):
        SDAC.load(tmp_path / "model.zip", policy_kwargs={"n_particles": 16})


# Presets


@pytest.mark.parametrize("algorithm, preset", [(SDAC, PAPER_SDAC), (DPMD, PAPER_DPMD)])
def test_presets_are_arguments(algorithm: Any, preset: dict[str, Any]) -> None:
    model = algorithm("MlpPolicy", "Pendulum-v1", **{**preset, "buffer_size": 10})
    for name, value in preset.items():
        if name not in ("policy_kwargs", "train_freq"):
            assert getattr(model, name) == value, name
    for name, value in preset["policy_kwargs"].items():
        assert getattr(model.policy, name) == value, name


@pytest.mark.parametrize("package", ["absent_package", "absent_package.part"])
def test_missing(package: str) -> None:
    message = r'tensorboard_log needs absent_package, which is not installed: pip install "sb3_sdac\[plots\]"'
    with pytest.raises(ModuleNotFoundError, match=message) as caught:
        require(package, "plots", "tensorboard_log")
    assert caught.value.name == "absent_package"


def test_installed() -> None:
    require("json.decoder", "plots", "anything")


def test_what_the_package_itself_is_missing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """To install it again would not help."""
    (tmp_path / "half_installed.py").write_text("import absent_package", encoding="utf-8")
    monkeypatch.syspath_prepend(tmp_path)
    with pytest.raises(ModuleNotFoundError, match=r"^No module named 'absent_package'$"):
        require("half_installed", "plots", "anything")
    assert "half_installed" not in sys.modules
