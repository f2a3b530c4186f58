"""
The authors' checkpoints as models of SDAC.

Their code (https://github.com/mahaitongdae/diffusion_policy_online_rl) writes ``policy-<step>-<update>.pkl``, a pickle of
(actor, log_alpha, q1, q2), where a network is a dict of Haiku, from a module's name to ``{"w": (in, out), "b": (out,)}``.
It is read without JAX, and without running what a pickle may run: only containers, numbers and arrays of numbers are made,
and whatever name the file asks for is refused or answered by a class of this module.
"""

import io
import pickle
import re
from itertools import pairwise
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch as th
from gymnasium import spaces
from stable_baselines3.common.type_aliases import GymEnv
from torch import nn

from sb3_sdac.dpmd import DPMD
from sb3_sdac.layers import EnsembleLinear
from sb3_sdac.networks import TIME_DIM, CriticEnsemble, NoisePredictor
from sb3_sdac.presets import PAPER_DPMD, PAPER_SDAC
from sb3_sdac.sdac import SDAC
from sb3_sdac.spaces import check_action_space

#: A network's layers in order: weight (in, out) and bias (out,)
Layers = list[tuple[np.ndarray, np.ndarray]]


class OfficialParams(NamedTuple):
    """
    Contents of an authors' checkpoint.

    :param actor: the noise predictor's layers: two of the time embedding, then the trunk on concat(obs, x_t, time)
    :param log_alpha: logarithm of the temperature
    :param q1: the first critic's layers, on concat(obs, action)
    :param q2: the second critic's
    """

    actor: Layers
    log_alpha: float
    q1: Layers
    q2: Layers

    @property
    def action_dim(self) -> int:
        """Number of actions."""
        return len(self.actor[-1][1])

    @property
    def obs_dim(self) -> int:
        """Number of observations."""
        return len(self.q1[0][0]) - self.action_dim


class _DType:
    """Stands for ``numpy.dtype``: numbers only."""

    def __init__(self, code: str, *_: Any):
        if not (isinstance(code, str) and re.fullmatch(r"[fiu][248]|[iu]1|b1", code)):
            raise ValueError(f"it holds an array of type {code!r}, not of numbers")
        self.code, self.order = code, "<"

    def __setstate__(self, state: tuple[Any, ...]) -> None:
        self.order = ">" if state[1] == ">" else "<"


class _Array:
    """Stands for an array of NumPy, which its pickle makes empty and then fills."""

    value: np.ndarray

    def __init__(self, *_: Any):
        pass

    def __setstate__(self, state: tuple[Any, ...]) -> None:
        _, shape, dtype, is_fortran, data = state
        self._fill(data, dtype, shape, "F" if is_fortran else "C")

    def _fill(self, data: Any, dtype: Any, shape: Any, order: str) -> None:
        if not isinstance(dtype, _DType):
            raise ValueError("it holds an array without a type")
        flat = np.frombuffer(data, np.dtype(dtype.order + dtype.code))
        self.value = flat.reshape(shape, order="F" if order == "F" else "C")


class _Scalar(_Array):
    """Stands for a NumPy scalar."""

    def __init__(self, dtype: Any, data: Any):
        self._fill(data, dtype, (), "C")


class _ArrayOfBuffer(_Array):
    """Stands for an array of NumPy in pickle protocol 5."""

    def __init__(self, data: Any, dtype: Any, shape: Any, order: Any):
        self._fill(data, dtype, shape, order)


class _JaxArray(_Array):
    """Stands for an array of JAX, which is one of NumPy with a note beside it."""

    def __init__(self, _make: Any, _arguments: Any, state: tuple[Any, ...], _note: Any):
        self.__setstate__(state)


#: Every name that a checkpoint may use, and what stands for it here. Classes with a ``__setstate__`` of their own, since a
#: pickle can set attributes of anything else that it is handed.
_NAMES: dict[tuple[str, str], type] = {
    ("numpy", "dtype"): _DType,
    ("numpy", "ndarray"): _Array,
    ("jax._src.array", "_reconstruct_array"): _JaxArray,
}
for _core in ("numpy.core", "numpy._core"):  # NumPy 1 and 2
    _NAMES[f"{_core}.multiarray", "_reconstruct"] = _Array
    _NAMES[f"{_core}.multiarray", "scalar"] = _Scalar
    _NAMES[f"{_core}.numeric", "_frombuffer"] = _ArrayOfBuffer


class _NumbersOnly(pickle.Unpickler):
    """Makes containers, numbers and arrays of numbers; refuses whatever else a pickle can ask for."""

    def find_class(self, module: str, name: str) -> Any:
        try:
            return _NAMES[module, name]
        except KeyError:
            raise ValueError(
                f"it asks for {module}.{name}, which plain arrays do not need; nothing of it was run. If you trust it, "
                "convert it where JAX is: pickle.dump(jax.tree.map(np.asarray, pickle.load(old)), new)"
            ) from None


def read_official(path: str | Path) -> OfficialParams:
    """
    Read an authors' checkpoint, without running anything in it.

    :param path: the file
    :return: its parameters, of float32
    :raises ValueError: if the file asks for code to be run, is damaged, or holds something else
    """
    path = Path(path)
    content = path.read_bytes()
    try:
        loaded = _NumbersOnly(io.BytesIO(content)).load()
        if not (isinstance(loaded, tuple) and len(loaded) == 4):
            raise ValueError(f"it holds a {type(loaded).__name__}, not the tuple (actor, log_alpha, q1, q2)")
        actor, log_alpha, q1, q2 = loaded
        params = OfficialParams(_layers("actor", actor), _number(log_alpha), _layers("q1", q1), _layers("q2", q2))
        _check_widths(params)
    except Exception as error:  # a damaged pickle speaks through any type
        reason = error if isinstance(error, ValueError) else repr(error)
        raise ValueError(f"{path} is not a checkpoint of official SDAC: {reason}") from error
    return params


def _floats(value: Any) -> np.ndarray:
    array = np.asarray(value.value if isinstance(value, _Array) else value)
    if array.dtype.kind != "f" or not np.isfinite(array).all():
        raise ValueError(f"it holds {type(value).__name__} of {array.dtype} where finite floats should be")
    return array.astype(np.float32)


def _number(value: Any) -> float:
    array = _floats(value)
    if array.size != 1:
        raise ValueError(f"log_alpha should be a number, but has the shape {array.shape}")
    return float(array.item())


def _layers(network: str, params: Any) -> Layers:
    """Linear layers in the order of the numbers in their names: linear, linear_1, linear_2, ..."""
    if not isinstance(params, dict):
        raise ValueError(f"{network} should be a dict of layers, but is a {type(params).__name__}")
    numbered: dict[int, tuple[np.ndarray, np.ndarray]] = {}
    for name, layer in params.items():
        match = re.fullmatch(r"(?:.*/)?linear(?:_(\d+))?", name) if isinstance(name, str) else None
        if match is None or not isinstance(layer, dict) or layer.keys() != {"w", "b"}:
            raise ValueError(f"{network} has a part {name!r} that is not a linear layer with w and b")
        numbered[int(match[1] or 0)] = _floats(layer["w"]), _floats(layer["b"])
    if sorted(numbered) != list(range(len(params))):
        raise ValueError(f"{network} has the layers {sorted(params)}, which are not numbered one by one")
    return [numbered[index] for index in range(len(params))]


def _check_widths(params: OfficialParams) -> None:
    """
    :raises ValueError: if the networks are not those of :class:`OfficialParams`
    """
    for network in ("actor", "q1", "q2"):
        layers: Layers = getattr(params, network)
        shapes = [weight.shape for weight, _ in layers]
        # Of the actor's, the first two layers embed the time
        hidden = 4 if network == "actor" else 2
        chained = pairwise(shapes[2:] if network == "actor" else shapes)
        if (
            len(layers) < hidden
            or any(weight.ndim != 2 or bias.shape != weight.shape[1:] for weight, bias in layers)
            or any(first[1] != second[0] for first, second in chained)
        ):
            raise ValueError(f"{network} is no network of linear layers with a hidden one: its weights are of {shapes}")
    time, trunk = [weight.shape for weight, _ in params.actor[:2]], params.actor[2:]
    inputs = params.obs_dim + params.action_dim
    if (
        time != [(TIME_DIM, 2 * TIME_DIM), (2 * TIME_DIM, TIME_DIM)]
        or len(trunk[0][0]) != inputs + TIME_DIM
        or any(len(layers[0][0]) != inputs or len(layers[-1][1]) != 1 for layers in (params.q1, params.q2))
        or [weight.shape for weight, _ in params.q1] != [weight.shape for weight, _ in params.q2]
    ):
        raise ValueError("its networks do not fit each other, or the time's embedding is not that of official SDAC")


def set_noise_predictor(net: NoisePredictor, layers: Layers) -> None:
    """
    Give a noise predictor the authors' weights.

    :param net: of the same widths
    :param layers: time embedding, then trunk
    """
    modules = [module for module in [*net.time_mlp, net.first, *net.rest] if isinstance(module, nn.Linear)]
    for module, (weight, bias) in zip(modules, layers, strict=True):
        module.weight.data.copy_(th.as_tensor(weight).T)
        module.bias.data.copy_(th.as_tensor(bias))


def set_critics(critics: CriticEnsemble, members: list[Layers]) -> None:
    """
    Give an ensemble of critics the authors' weights.

    :param critics: of the same widths, without batch normalisation
    :param members: the layers of each critic
    """
    modules = [module for module in [critics.first, *critics.rest] if isinstance(module, EnsembleLinear)]
    for module, member_layers in zip(modules, zip(*members, strict=True), strict=True):
        module.weight.data.copy_(th.stack([th.as_tensor(weight) for weight, _ in member_layers]))
        module.bias.data.copy_(th.stack([th.as_tensor(bias) for _, bias in member_layers]).unsqueeze(1))


def load_official(
    path: str | Path,
    env: GymEnv | str | tuple[spaces.Space, spaces.Box],
    algorithm: type[SDAC] = SDAC,
    **kwargs: Any,
) -> SDAC:
    """
    An authors' checkpoint as a model with their settings (``PAPER_SDAC`` or ``PAPER_DPMD``), which acts as theirs does and can
    be evaluated, saved, and trained on.

    The file holds the averaged actor, the temperature and the two critics. The actor that its average follows, the target
    critics, the optimizers, the counters and the replay buffer are not in it: for training on, actor and target critics
    start as copies, the rest anew. Nor are the settings: if the run's differed from the paper's, say so in ``kwargs``.

    :param path: the file, see :func:`read_official`
    :param env: the environment, its id, or (observation space, action space) for a model that acts until ``set_env``
    :param algorithm: whose checkpoint it is: :class:`~sb3_sdac.SDAC`, or :class:`~sb3_sdac.DPMD`
    :param kwargs: arguments of the algorithm that replace the authors', for instance
        ``policy_kwargs=dict(beta_schedule="cosine")`` for checkpoints of the paper's first version
    :return: the model
    :raises ValueError: if the file is not such a checkpoint, does not fit the environment, or an argument contradicts it
    """
    params = read_official(path)
    preset = PAPER_DPMD if issubclass(algorithm, DPMD) else PAPER_SDAC
    given = kwargs.pop("policy_kwargs", None) or {}
    policy_kwargs = {**preset["policy_kwargs"], **given}
    arguments: dict[str, Any] = {**preset, **kwargs}
    own = {"net_arch", "n_critics", "features_extractor_class"} & given.keys()
    own |= {name for name in ("batch_norm", "n_bins") if policy_kwargs[name] != preset["policy_kwargs"][name]}
    if own:
        raise ValueError(f"The file says what the networks are: leave {', '.join(sorted(own))} out")
    policy_kwargs["net_arch"] = {
        "pi": [len(bias) for _, bias in params.actor[2:-1]],
        "qf": [len(bias) for _, bias in params.q1[:-1]],
    }
    arguments["policy_kwargs"] = policy_kwargs

    space_pair = env if isinstance(env, tuple) else None
    model = algorithm("MlpPolicy", None if space_pair else env, **arguments, _init_setup_model=False)  # type: ignore[arg-type]
    if space_pair is not None:
        # As SB3's load() does it without an environment
        model.observation_space, model.action_space = space_pair
        model.n_envs = 1
    for name, space, size in (
        ("observation", model.observation_space, params.obs_dim),
        ("action", model.action_space, params.action_dim),
    ):
        if not isinstance(space, spaces.Box) or space.shape != (size,):
            raise ValueError(f"{path} was made with {name}s of shape ({size},), but the {name} space is {space}")
    check_action_space(model.action_space)
    model._setup_model()

    for actor in (model.actor, model.actor_target):
        if actor is not None:
            set_noise_predictor(actor.noise_predictor, params.actor)
    assert model.critic_target is not None  # there is one without batch_norm
    for critic in (model.critic, model.critic_target):
        set_critics(critic.q_networks, [params.q1, params.q2])
    if isinstance(model.ent_coef, str):
        model.policy.log_ent_coef.data.fill_(params.log_alpha)
    return model
