"""The authors' checkpoints: numerically theirs, read without running anything, refused with a reason if they do not fit."""

import builtins
import copyreg
import os
import pickle
import sys
import types
from collections.abc import Callable
from pathlib import Path
from typing import Any, cast

import gymnasium as gym
import numpy as np
import pytest
import torch as th
from gymnasium import spaces
from stable_baselines3.common.evaluation import evaluate_policy
from torch import nn

from sb3_sdac import DPMD, PAPER_DPMD, SDAC
from sb3_sdac.official import load_official, read_official

ARRAYS = np.load(Path(__file__).parent / "data" / "official_sdac.npz")
OBS_DIM, ACTION_DIM, WIDTH, BATCH, N, K, T = ARRAYS["meta/obs_dim_act_dim_hidden_B_P_K_T"].tolist()
SPACES = spaces.Box(-np.inf, np.inf, (OBS_DIM,)), spaces.Box(-1, 1, (ACTION_DIM,))
MARKER = "code was run"


def network(prefix: str) -> dict[str, dict[str, np.ndarray]]:
    """A network of the reference as Haiku has it: its modules by name, in no particular order."""
    layers: dict[str, dict[str, np.ndarray]] = {}
    for name in sorted(ARRAYS, reverse=True):
        if name.startswith(f"{prefix}/"):
            module, _, kind = name.removeprefix(f"{prefix}/").rpartition("/")
            layers.setdefault(module, {})[kind] = ARRAYS[name]
    return layers


def official_params() -> tuple[Any, ...]:
    """What the authors' ``save_policy`` pickles."""
    return network("actor"), np.log(ARRAYS["critic/alpha"]), network("q1"), network("q2")


def write(path: Path, content: Any, protocol: int = pickle.DEFAULT_PROTOCOL) -> Path:
    path.write_bytes(pickle.dumps(content, protocol=protocol))
    return path


@pytest.fixture
def checkpoint(tmp_path: Path) -> Path:
    return write(tmp_path / "policy-5000000-1000000.pkl", official_params())


class ReferenceEnv(gym.Env[np.ndarray, np.ndarray]):
    """Random observations of the reference's size."""

    observation_space, action_space = SPACES

    def reset(self, *, seed: int | None = None, options: dict[str, Any] | None = None) -> tuple[np.ndarray, dict[str, Any]]:
        super().reset(seed=seed)
        self.steps = 0
        return self.observation_space.sample(), {}

    def step(self, action: np.ndarray) -> tuple[np.ndarray, float, bool, bool, dict[str, Any]]:
        self.steps += 1
        return self.observation_space.sample(), -float(np.square(action).sum()), False, self.steps == 10, {}


def array(name: str) -> th.Tensor:
    return th.as_tensor(ARRAYS[name])


@th.no_grad()
def test_particles_best_action_and_q_are_the_authors(checkpoint: Path) -> None:
    model = load_official(checkpoint, SPACES, device="cpu")
    assert model.actor_target is not None and model.critic_target is not None
    x_T, step_noise = array("sample/x_T").transpose(0, 1), array("sample/step_noise").transpose(1, 2)
    # What acts, and what would learn
    for actor, critic in ((model.actor_target, model.critic), (model.actor, model.critic_target)):
        particles = actor.sample(actor.encode(array("next_obs")), x_T, step_noise)
        np.testing.assert_allclose(particles.transpose(0, 1), ARRAYS["sample/particles"], atol=2e-5, rtol=2e-5)
        q_values = model.policy.pessimistic(critic.q_values(critic.encode(array("next_obs")), particles))
        np.testing.assert_allclose(q_values.T, ARRAYS["sample/particle_q"], atol=2e-5, rtol=2e-5)
    best = model.policy.best_of(lambda: model.critic.encode(array("next_obs")), particles)
    np.testing.assert_allclose(best, ARRAYS["sample/best_action"], atol=2e-5, rtol=2e-5)
    q1, q2 = model.critic(array("obs"), array("actions"))
    np.testing.assert_allclose(q1.squeeze(1), ARRAYS["net/q1"], atol=2e-6, rtol=2e-5)
    np.testing.assert_allclose(q2.squeeze(1), ARRAYS["net/q2"], atol=2e-6, rtol=2e-5)
    assert model.ent_coef_tensor.item() == pytest.approx(ARRAYS["critic/alpha"], rel=1e-6)
    policy = model.policy
    assert (policy.n_particles, policy.n_sampling_steps, policy.eta, policy.activation_fn) == (32, 20, 1.0, nn.Mish)


@pytest.mark.parametrize("protocol", [3, 4, 5])
@pytest.mark.parametrize("dtype", ["<f4", ">f4", "<f8"])
def test_every_form_of_numpy_pickle(tmp_path: Path, protocol: int, dtype: str) -> None:
    """Among them Fortran order, scalars, and the module names of NumPy 1."""
    actor, log_alpha, q1, q2 = official_params()
    q1 = {name: {kind: np.asfortranarray(value, dtype) for kind, value in layer.items()} for name, layer in q1.items()}
    forms = [pickle.dumps((actor, np.float64(log_alpha), q1, q2), protocol=protocol)]
    if protocol == 3:  # whose names are plain text
        forms += [forms[0].replace(b"numpy._core.", b"numpy.core."), forms[0].replace(b"numpy.core.", b"numpy._core.")]
    for content in forms:
        path = tmp_path / "policy.pkl"
        path.write_bytes(content)
        params = read_official(path)
        assert params.log_alpha == pytest.approx(np.log(ARRAYS["critic/alpha"]))
        assert (params.obs_dim, params.action_dim) == (OBS_DIM, ACTION_DIM)
        for index, (weight, bias) in enumerate(params.q1):
            name = "q1/q_net/linear" + (f"_{index}" if index else "")
            assert (weight == ARRAYS[f"{name}/w"]).all() and (bias == ARRAYS[f"{name}/b"]).all()


class _JaxArray:
    """Pickles as ``jaxlib``'s arrays do (``jax._src.array.ArrayImpl.__reduce__``)."""

    def __init__(self, value: np.ndarray):
        self.value = np.asarray(value)

    def __reduce__(self) -> Any:
        make, arguments, state = cast(tuple[Any, ...], self.value.__reduce__())
        return sys.modules["jax._src.array"]._reconstruct_array, (make, arguments, state, {"weak_type": False})


def test_arrays_of_jax(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Read without JAX, should a checkpoint hold them."""

    def _reconstruct_array(*args: Any) -> None:
        raise AssertionError("reading must not call what the file names")

    module = types.ModuleType("jax._src.array")
    _reconstruct_array.__module__, _reconstruct_array.__qualname__ = module.__name__, "_reconstruct_array"
    module._reconstruct_array = _reconstruct_array  # type: ignore[attr-defined]
    for name in ("jax", "jax._src"):
        monkeypatch.setitem(sys.modules, name, types.ModuleType(name))
    monkeypatch.setitem(sys.modules, module.__name__, module)
    actor, log_alpha, q1, q2 = official_params()
    q2 = {name: {kind: _JaxArray(value) for kind, value in layer.items()} for name, layer in q2.items()}
    path = write(tmp_path / "jax.pkl", (actor, _JaxArray(log_alpha), q1, q2))
    assert b"jax._src.array" in path.read_bytes()
    params = read_official(path)
    assert params.log_alpha == pytest.approx(np.log(ARRAYS["critic/alpha"]))
    assert (params.q2[1][0] == ARRAYS["q2/q_net/linear_1/w"]).all()


class Calls:
    """Its pickle calls a function with arguments."""

    def __init__(self, function: Any, *arguments: Any, state: Any = None):
        self.call = (function, arguments) if state is None else (function, arguments, state)

    def __reduce__(self) -> Any:
        return self.call


def nested_call() -> Any:
    """Code where an array's data should be."""
    return Calls(np.ndarray, (2,), np.dtype("f4"), state=Calls(os.system, f"echo {MARKER}"))


HOSTILE = {
    "os.system": lambda: Calls(os.system, f"echo {MARKER}"),
    "eval": lambda: Calls(builtins.eval, f"print({MARKER!r})"),
    "getattr": lambda: Calls(builtins.getattr, "text", "format"),
    "numpy function": lambda: Calls(np.save, "written.npy", np.ones(2)),
    "numpy that imports": lambda: Calls(np.testing.runstring, f"print({MARKER!r})", {}),
    "in an array's state": nested_call,
    "object array": lambda: np.array([Calls(os.system, f"echo {MARKER}")], dtype=object),
    "objects without code": lambda: np.array([{}, "text"], dtype=object),
    "torch": lambda: th.ones(2),
    "copyreg": lambda: Calls(copyreg._reconstructor, SDAC, object, None),  # type: ignore[attr-defined]
    "another class": lambda: ReferenceEnv(),
}


@pytest.mark.parametrize("where", ["whole file", "weight"])
@pytest.mark.parametrize("attack", HOSTILE)
def test_nothing_in_the_file_is_run(
    tmp_path: Path, attack: str, where: str, capfd: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    if attack == "numpy that imports" and not hasattr(np.testing, "runstring"):
        pytest.skip("this NumPy has no runstring")
    monkeypatch.chdir(tmp_path)
    params = official_params()
    hostile = HOSTILE[attack]()
    if where == "weight":
        params[0]["dacer_policy_net/linear"]["w"] = hostile
    path = write(tmp_path / "policy.pkl", params if where == "weight" else hostile)
    with pytest.raises(ValueError, match=r"policy\.pkl is not a checkpoint of official SDAC"):
        read_official(path)
    assert MARKER not in capfd.readouterr().out and os.listdir(tmp_path) == ["policy.pkl"]


def test_refusal_names_what_was_asked_for(tmp_path: Path) -> None:
    path = write(tmp_path / "policy.pkl", Calls(builtins.eval, "1"))
    with pytest.raises(ValueError, match=r"builtins\.eval.*nothing of it was run.*jax\.tree\.map"):
        read_official(path)


@pytest.mark.parametrize("name", ["numpy ndarray", "numpy dtype", "numpy._core.multiarray _reconstruct"])
def test_a_pickle_cannot_change_the_reader(tmp_path: Path, checkpoint: Path, name: str) -> None:
    """BUILD sets attributes of what it finds, also of a class or a function."""
    (tmp_path / "build.pkl").write_bytes(b"c" + name.replace(" ", "\n").encode() + b"\n(N}S'_fill'\nI1\nstb.")
    with pytest.raises(ValueError, match="not a checkpoint"):
        read_official(tmp_path / "build.pkl")
    read_official(checkpoint)


def linear(n_inputs: int, n_outputs: int) -> dict[str, np.ndarray]:
    return {"w": np.zeros((n_inputs, n_outputs)), "b": np.zeros(n_outputs)}


#: Parts of a checkpoint with something wrong about them, and what is said of it
TIME, FIRST, LAST = "dacer_policy_net/linear", "q_net/linear", "q_net/linear_3"
INPUTS = OBS_DIM + ACTION_DIM
FOREIGN: dict[str, tuple[str, Callable[..., Any]]] = {
    "three parts": ("a tuple, not the tuple", lambda actor, alpha, q1, q2: (actor, alpha, q1)),
    "a dict": ("a dict, not the tuple", lambda actor, alpha, q1, q2: {"actor": actor}),
    "not finite": ("finite floats", lambda actor, alpha, q1, q2: (actor, np.nan, q1, q2)),
    "integers": ("finite floats", lambda actor, alpha, q1, q2: (actor, np.int64(1), q1, q2)),
    "text": ("finite floats", lambda actor, alpha, q1, q2: (actor, "1.6", q1, q2)),
    "alphas": ("log_alpha should be a number", lambda actor, alpha, q1, q2: (actor, np.zeros(2), q1, q2)),
    "an array": ("q1 should be a dict", lambda actor, alpha, q1, q2: (actor, alpha, np.zeros(3), q2)),
    "another layer": ("q_net/norm", lambda actor, alpha, q1, q2: (actor, alpha, q1 | {"q_net/norm": linear(3, 3)}, q2)),
    "layer without name": ("part 3", lambda actor, alpha, q1, q2: (actor, alpha, q1 | {3: linear(3, 3)}, q2)),
    "no first layer": ("one by one", lambda actor, alpha, q1, q2: (actor, alpha, {LAST: q1[LAST]}, q2)),
    "no bias": ("with w and b", lambda actor, alpha, q1, q2: (actor, alpha, q1 | {LAST: {"w": q1[LAST]["w"]}}, q2)),
    "wrong bias": ("q1 is no", lambda actor, alpha, q1, q2: (actor, alpha, q1 | {LAST: q1[LAST] | {"b": np.ones(7)}}, q2)),
    "flat": ("q1 is no", lambda actor, alpha, q1, q2: (actor, alpha, q1 | {LAST: {"w": np.ones(7), "b": np.ones(7)}}, q2)),
    "no chain": ("q1 is no", lambda actor, alpha, q1, q2: (actor, alpha, q1 | {LAST: linear(WIDTH + 1, 1)}, q2)),
    "no hidden layer": ("q1 is no", lambda actor, alpha, q1, q2: (actor, alpha, {FIRST: linear(INPUTS, 1)}, q2)),
    "two outputs": ("each other", lambda actor, alpha, q1, q2: (actor, alpha, q1 | {LAST: linear(WIDTH, 2)}, q2)),
    "unlike critics": (
        "each other",
        lambda actor, alpha, q1, q2: (actor, alpha, q1, {FIRST: linear(INPUTS, 7), "q_net/linear_1": linear(7, 1)}),
    ),
    "critic as actor": ("each other", lambda actor, alpha, q1, q2: (q1, alpha, q1, q2)),
    "another time": ("time's embedding", lambda actor, alpha, q1, q2: (actor | {TIME: linear(8, 32)}, alpha, q1, q2)),
}


@pytest.mark.parametrize("edit", FOREIGN)
def test_foreign_contents(tmp_path: Path, edit: str) -> None:
    reason, change = FOREIGN[edit]
    path = write(tmp_path / "policy.pkl", change(*official_params()))
    with pytest.raises(ValueError, match=rf"policy\.pkl is not a checkpoint of official SDAC: .*{reason}"):
        read_official(path)


def test_damaged_and_missing_files(tmp_path: Path, checkpoint: Path) -> None:
    content = checkpoint.read_bytes()
    damaged = tmp_path / "damaged.pkl"
    untyped = b"cnumpy\nndarray\n)R(I1\n(I1\ntI7\nI00\nS''\ntb."
    for part in (b"", untyped, b"PK\x03\x04zip", content[: len(content) // 2], content[:-1], content[1:]):
        damaged.write_bytes(part)
        with pytest.raises(ValueError, match=r"damaged\.pkl is not a checkpoint"):
            read_official(damaged)
    with pytest.raises(FileNotFoundError):
        read_official(tmp_path / "nowhere.pkl")


def test_wrong_spaces_and_arguments(checkpoint: Path) -> None:
    obs_space, _ = SPACES
    with pytest.raises(ValueError, match=rf"observations of shape \({OBS_DIM},\).*Box"):
        load_official(checkpoint, "Pendulum-v1")
    with pytest.raises(ValueError, match=rf"actions of shape \({ACTION_DIM},\)"):
        load_official(checkpoint, (obs_space, spaces.Box(-1, 1, (2,))))
    with pytest.raises(ValueError, match="finite bounds"):
        load_official(checkpoint, (obs_space, spaces.Box(-np.inf, np.inf, (ACTION_DIM,))))
    with pytest.raises(ValueError, match="leave net_arch out"):
        load_official(checkpoint, SPACES, policy_kwargs={"net_arch": [64]})
    with pytest.raises(ValueError, match="leave batch_norm out"):
        load_official(checkpoint, SPACES, policy_kwargs={"batch_norm": True})
    with pytest.raises(ValueError, match="leave n_bins out"):  # the authors' last layer would go into every bin
        load_official(checkpoint, SPACES, policy_kwargs={"n_bins": 101})
    with pytest.raises(ValueError, match="beta_schedule must be one of"):
        load_official(checkpoint, SPACES, policy_kwargs={"beta_schedule": "quadratic"})
    with pytest.raises(TypeError, match=r"n_particles.*it is the policy's"):
        load_official(checkpoint, SPACES, n_particles=4)


@pytest.mark.parametrize("widths", [([8], [9]), ([7, 8, 9, 10], [6, 5])])
def test_any_width_and_depth(tmp_path: Path, widths: tuple[list[int], list[int]]) -> None:
    """A checkpoint written from a model of ours is that model; the time embedding's layers are counted first."""
    env = ReferenceEnv()
    own = {"activation_fn": nn.SiLU, "beta_schedule": "cosine"}  # unlike the preset's
    policy_kwargs = {**PAPER_DPMD["policy_kwargs"], **own, "net_arch": {"pi": widths[0], "qf": widths[1]}}
    model = DPMD("MlpPolicy", env, **{**PAPER_DPMD, "policy_kwargs": policy_kwargs, "buffer_size": 10})
    net, critics = model.actor.noise_predictor, model.critic.q_networks
    linear = [layer for layer in [*net.time_mlp, net.first, *net.rest] if isinstance(layer, nn.Linear)]
    actor = {
        f"a/linear{f'_{i}' if i else ''}": {"w": layer.weight.detach().numpy().T, "b": layer.bias.detach().numpy()}
        for i, layer in enumerate(linear)
    }
    ensemble = [critics.first, *(layer for layer in critics.rest if hasattr(layer, "weight"))]
    q1, q2 = (
        {
            f"q/linear{f'_{i}' if i else ''}": {
                "w": layer.weight[c].detach().numpy(),  # type: ignore[index]
                "b": layer.bias[c, 0].detach().numpy(),  # type: ignore[index]
            }
            for i, layer in enumerate(ensemble)
        }
        for c in range(2)
    )
    path = write(tmp_path / "policy.pkl", (actor, np.float32(0.5), q1, q2))
    loaded = load_official(path, env, DPMD, policy_kwargs=own)
    obs = np.random.default_rng(0).standard_normal((20, OBS_DIM)).astype(np.float32)
    expected, _ = model.predict(obs, deterministic=True)
    found, _ = loaded.predict(obs, deterministic=True)
    assert (found == expected).all() and isinstance(loaded, DPMD)


def test_saved_evaluated_and_trained_on(checkpoint: Path, tmp_path: Path) -> None:
    env = ReferenceEnv()
    small: dict[str, Any] = {"learning_starts": 10, "batch_size": 8, "buffer_size": 100, "policy_kwargs": {"n_particles": 4}}
    model = load_official(checkpoint, env, **small)
    obs = np.zeros(OBS_DIM, dtype=np.float32)
    before, _ = model.predict(obs, deterministic=True)
    model.save(tmp_path / "model")
    for loaded in (SDAC.load(tmp_path / "model"), SDAC.load(tmp_path / "model", env=env)):
        assert (loaded.predict(obs, deterministic=True)[0] == before).all()
    assert np.isfinite(evaluate_policy(loaded, loaded.env, n_eval_episodes=1)[0])  # type: ignore[arg-type]
    loaded.learn(20)
    assert loaded._n_updates > 0 and (loaded.predict(obs, deterministic=True)[0] != before).any()

    without_env = load_official(checkpoint, SPACES, **small)
    assert (without_env.predict(obs, deterministic=True)[0] == before).all()
    without_env.set_env(env)
    assert without_env.learn(20)._n_updates > 0


def test_fixed_temperature_stays(checkpoint: Path) -> None:
    assert load_official(checkpoint, SPACES, ent_coef=0.25).ent_coef_tensor.item() == pytest.approx(0.25)


def test_without_averaged_actor(checkpoint: Path) -> None:
    assert load_official(checkpoint, SPACES, policy_kwargs={"average_actor": False}).actor_target is None
