"""
Acting without Stable-Baselines3: a model's deterministic policy as one module, and as one ONNX file.

The module takes observations as the environment gives them and returns actions as the environment takes them. In between is
all that ``predict(obs, deterministic=True)`` does, and VecNormalize before it: normalisation, SB3's preprocessing, features,
denoising, the critics' choice among N particles, scaling and clipping to the action space.
"""

import copy
import logging
import warnings
from pathlib import Path
from typing import Any

import numpy as np
import torch as th
from gymnasium import spaces
from stable_baselines3.common.running_mean_std import RunningMeanStd
from stable_baselines3.common.type_aliases import PyTorchObs
from stable_baselines3.common.vec_env import (
    VecCheckNan,
    VecEnv,
    VecEnvWrapper,
    VecMonitor,
    VecNormalize,
    VecTransposeImage,
    VecVideoRecorder,
)
from torch import nn

from sb3_sdac.arguments import require
from sb3_sdac.files import replaced_in_one_step
from sb3_sdac.layers import EnsembleLinear
from sb3_sdac.sdac import SDAC

#: Name of the output, and of the input unless observations are a Dict
ACTIONS, OBS = "actions", "obs"
#: What runtimes can be given
_DTYPES = ("bool", "uint8", "int8", "int16", "int32", "int64", "float16", "float32", "float64")


class _Input(nn.Module):
    """
    One observation on its way from the environment to the policy: normalised, and an image's channels put first.

    :param name: its key in a Dict, or ``"obs"``
    :param given: space of what the environment gives
    :param wanted: space of what the policy takes
    :param normalize: VecNormalize, for its constants
    :param statistics: mean and variance with which to normalise, or None
    """

    mean: th.Tensor | None
    std: th.Tensor | None

    def __init__(
        self,
        name: str,
        given: spaces.Space,
        wanted: spaces.Space,
        normalize: VecNormalize | None,
        statistics: RunningMeanStd | None,
    ):
        super().__init__()
        known = isinstance(given, (spaces.Box, spaces.Discrete, spaces.MultiDiscrete, spaces.MultiBinary))
        if not known or str(given.dtype) not in _DTYPES:
            raise ValueError(
                f"The observation {name!r} is of {given}, dtype {given.dtype}, which has no form in ONNX. It must be a Box, "
                f"Discrete, MultiDiscrete or MultiBinary, or a Dict of these, with a dtype among {', '.join(_DTYPES)}; "
                "wrap the environment, for instance with gymnasium.wrappers.TransformObservation, and train on that."
            )
        assert given.shape is not None and wanted.shape is not None
        self.channels_last = given.shape != wanted.shape and (*given.shape[-1:], *given.shape[:-1]) == wanted.shape
        if given.shape != wanted.shape and not self.channels_last:
            raise ValueError(
                f"VecNormalize has observations {name!r} of shape {given.shape}, the policy takes {wanted.shape}. Is it "
                "the one of the training? If a wrapper outside it changes them (VecFrameStack), train with it outermost."
            )
        self.space = copy.deepcopy(given)  # drawing from it seeds it
        mean = std = None
        if normalize is not None and statistics is not None:
            self.clip_obs = normalize.clip_obs
            mean, std = th.as_tensor(statistics.mean), th.as_tensor(np.sqrt(statistics.var + normalize.epsilon))
        # In float64, as VecNormalize does it: means may be large beside the deviations
        self.register_buffer("mean", mean)
        self.register_buffer("std", std)

    def forward(self, obs: th.Tensor) -> th.Tensor:
        """
        :param obs: as the environment gives it, with the batch as first axis
        :return: as the policy takes it
        """
        if self.mean is not None and self.std is not None:
            obs = ((obs.double() - self.mean) / self.std).clamp(-self.clip_obs, self.clip_obs).float()
        return obs.permute(0, 3, 1, 2) if self.channels_last else obs

    def sample(self, batch_size: int, random_state: np.random.RandomState) -> th.Tensor:
        """
        :param batch_size: B
        :param random_state: where random numbers come from
        :return: observations to try the module with
        """
        self.space.seed(int(random_state.randint(2**31)))
        drawn = np.stack([np.asarray(self.space.sample()) for _ in range(batch_size)])
        if np.issubdtype(drawn.dtype, np.floating):
            # A bounded box may be as wide as the largest float; of it the part near 0
            box: Any = self.space
            centre = np.clip(0, box.low, box.high)
            low, high = np.maximum(box.low, centre - 10), np.minimum(box.high, centre + 10)
            far = (drawn < low) | (drawn > high)
            drawn = np.where(far, random_state.uniform(low, high, drawn.shape), drawn).astype(drawn.dtype)
            if self.mean is not None and self.std is not None:
                normal = random_state.standard_normal(drawn.shape)
                drawn = (self.mean.cpu().numpy() + self.std.cpu().numpy() * normal).astype(drawn.dtype)
        return th.as_tensor(drawn)


def _check_wrappers(env: VecEnv | None, normalize: VecNormalize) -> None:
    """
    :param env: the model's environment
    :param normalize: the VecNormalize in it
    :raises ValueError: if something around that may change what the policy gets
    """
    while env is not normalize and isinstance(env, VecEnvWrapper):
        if not isinstance(env, (VecCheckNan, VecMonitor, VecTransposeImage, VecVideoRecorder)):
            raise ValueError(
                f"{type(env).__name__} stands outside VecNormalize and may change the observations that it gives, which would "
                "not be in the file: train with VecNormalize outermost. If it leaves them alone, say so with "
                "vec_normalize=model.get_vec_normalize_env()"
            )
        env = env.venv


def _check_normalisation(kind: type[VecNormalize]) -> None:
    """
    :param kind: what normalises the model's observations
    :raises ValueError: if it is a subclass that does so in a way of its own
    """
    if (kind.normalize_obs, kind._normalize_obs) != (VecNormalize.normalize_obs, VecNormalize._normalize_obs):
        raise ValueError(
            f"{kind.__name__} normalises in a way of its own, which would not be in the file: only VecNormalize's is. Train "
            "with that, or normalise in a wrapper of the environment"
        )


class DeterministicActor(nn.Module):
    """
    ``model.predict(obs, deterministic=True)`` and what surrounds it, as a module: raw observations in, actions out.

    A copy on the CPU in evaluation mode, without what acting does not need: the model may go on learning. It works with
    ``torch.export.export`` and a dynamic batch axis (``docs/export.md``), and like any module it can be moved to a device.

    The observations are those that VecNormalize was given, or else those that the model's environment gives (images as that
    has them). A model loaded without environment takes images as ``model.observation_space`` has them, with channels first.

    :param model: trained SDAC; acts with the averaged actor if it has one
    :param vec_normalize: statistics to normalise with; None for those of the model's environment, if it has any
    :raises ValueError: if the model is of another algorithm, its observations have no form in ONNX, its environment has a
        wrapper outside VecNormalize that may change them, or that is a subclass with a normalisation of its own
    """

    low: th.Tensor
    high: th.Tensor

    def __init__(self, model: SDAC, vec_normalize: VecNormalize | None = None):
        super().__init__()
        if not isinstance(model, SDAC):
            raise ValueError(f"Only a model of SDAC can be exported here, got {type(model).__name__}")
        normalize = vec_normalize
        if normalize is None:
            normalize = model.get_vec_normalize_env()
            if normalize is not None:
                _check_wrappers(model.env, normalize)
        if normalize is not None and not normalize.norm_obs:
            normalize = None
        if normalize is not None:
            _check_normalisation(type(normalize))
            given = (normalize.venv or normalize).observation_space  # no `venv` if it comes from a pickle
        elif isinstance(model.env, VecTransposeImage):
            given = model.env.venv.observation_space
        else:
            given = model.observation_space
        # One input, or one per key
        spaces_given = dict(given.spaces) if isinstance(given, spaces.Dict) else {OBS: given}
        wanted = model.observation_space
        spaces_wanted = dict(wanted.spaces) if isinstance(wanted, spaces.Dict) else {OBS: wanted}
        if spaces_given.keys() != spaces_wanted.keys():
            raise ValueError(
                f"VecNormalize has the observations {list(spaces_given)}, the policy takes {list(spaces_wanted)}: "
                "give the one that the model was trained with"
            )
        if ACTIONS in spaces_given:
            raise ValueError(f"The observation {ACTIONS!r} has the name of the output: rename that key of the Dict")
        statistics: Any = {} if normalize is None else normalize.obs_rms
        if isinstance(statistics, RunningMeanStd):
            statistics = {OBS: statistics}
        self.input_names = list(spaces_given)
        self.inputs = nn.ModuleList(
            _Input(name, spaces_given[name], spaces_wanted[name], normalize, statistics.get(name)) for name in self.input_names
        )

        self.policy = copy.deepcopy(model.policy).cpu()
        if self.policy.actor_target is not None:
            self.policy.actor, self.policy.actor_target = self.policy.actor_target, None
        self.policy.critic_target = None
        for network in (self.policy.actor, self.policy.critic):
            network.optimizer = None  # type: ignore[assignment]
        if self.policy.n_particles == 1:
            del self.policy.critic
        for layer in self.policy.modules():
            if isinstance(layer, EnsembleLinear):  # its forward() branches on the size of the batch
                weight, bias = layer.folded()
                layer.weight, layer.bias, layer.norm = nn.Parameter(weight), nn.Parameter(bias), None
        self.register_buffer("low", th.as_tensor(model.policy.action_space.low))
        self.register_buffer("high", th.as_tensor(model.policy.action_space.high))
        self.requires_grad_(False).eval()

    def forward(self, obs: PyTorchObs) -> th.Tensor:
        """
        :param obs: as the environment gives them, in its dtype, with the batch as first axis; a dict of such if the
            observations are a Dict
        :return: actions in the action space, shape (B, *action_space.shape)
        """
        return self._unscale(self.policy.act(self._prepare(obs), deterministic=True))

    def candidates(self, obs: PyTorchObs) -> tuple[th.Tensor, th.Tensor]:
        """
        The particles among which the critics choose, for whoever wants to see by how much.

        :param obs: as for :meth:`forward`
        :return: actions, shape (B, N, *action_space.shape), and their Q, shape (B, N), which is 0 if N is 1
        """
        obs, actor = self._prepare(obs), self.policy.actor
        particles = actor.sample(actor.encode(obs), *actor.sampler.fixed_noise(self.policy.n_particles))
        batch_size, n_particles, _ = particles.shape
        q_values = particles.new_zeros(batch_size, 1)
        if n_particles > 1:
            q_values = self.policy.q(self.policy.critic.encode(obs), particles)
        return self._unscale(particles.flatten(end_dim=1)).unflatten(0, (batch_size, n_particles)), q_values

    def sample_observations(self, batch_size: int, seed: int = 0) -> PyTorchObs:
        """
        Random observations of the right names, shapes and dtypes, to trace or to try the module with.

        :param batch_size: B
        :param seed: of the random numbers
        :return: a tensor, or a dict of them; where VecNormalize normalises, distributed as its statistics say
        """
        random_state = np.random.RandomState(seed)
        drawn = {name: prepare.sample(batch_size, random_state) for name, prepare in self._named_inputs()}
        return drawn if isinstance(self.policy.observation_space, spaces.Dict) else drawn[OBS]

    def _named_inputs(self) -> list[tuple[str, _Input]]:
        return list(zip(self.input_names, self.inputs, strict=True))  # type: ignore[arg-type]

    def _prepare(self, obs: PyTorchObs) -> PyTorchObs:
        if isinstance(obs, dict):
            return {name: prepare(obs[name]) for name, prepare in self._named_inputs()}
        [(_, prepare)] = self._named_inputs()
        return prepare(obs)

    def _unscale(self, scaled: th.Tensor) -> th.Tensor:
        """[-1, 1] to the action space as SB3's ``unscale_action`` does it; clipped, because rounding may leave the box."""
        scaled = scaled.reshape(-1, *self.low.shape)
        return (self.low + 0.5 * (scaled + 1) * (self.high - self.low)).clamp(self.low, self.high)


def export_onnx(model: SDAC, path: str | Path, vec_normalize: VecNormalize | None = None) -> None:
    """
    Write the deterministic policy of a model as one ONNX file, compared with PyTorch by ONNX Runtime before it is in place.

    The input is called ``"obs"``, or as the keys of a Dict, with the environment's dtype (float64 observations stay float64);
    the output ``"actions"`` has the action space's shape. The first axis of all is the batch, of any size.

    Where two particles are of the same value up to float32 rounding, the two runtimes may choose differently, as PyTorch
    itself may with another batch size (``docs/export.md`` has figures).

    :param model: trained SDAC
    :param path: the file; what is there is replaced once the new one is complete
    :param vec_normalize: see :class:`DeterministicActor`
    :raises ValueError: if the model is of another algorithm, its observations have no form in ONNX, PyTorch cannot export
        its features extractor, or the result differs from PyTorch by more than rounding; the file is left as it was
    :raises OSError: if the disk is full, for instance: names the file, which is as it was
    :raises ModuleNotFoundError: if the packages of the extra ``export`` are missing
    """
    for package in ("onnx", "onnxscript", "onnxruntime"):
        require(package, "export", "export_onnx")
    import onnxruntime

    actor = DeterministicActor(model, vec_normalize)
    content = _to_onnx(actor)
    session = onnxruntime.InferenceSession(content, providers=["CPUExecutionProvider"])
    for batch_size in (1, 64):
        _compare(actor, session, batch_size)

    with replaced_in_one_step(path) as file:
        file.write(content)


def _to_onnx(actor: DeterministicActor) -> bytes:
    """PyTorch's translation, without what it notes beside the graph: names of modules and files of this machine."""
    obs = actor.sample_observations(3)
    batch = {0: th.export.Dim("batch")}
    shapes = {name: batch for name in obs} if isinstance(obs, dict) else batch
    log = logging.getLogger("torch.onnx")
    level = log.level
    log.setLevel(logging.ERROR)  # it lists the packages for which it has no rules here
    try:
        with warnings.catch_warnings():
            warnings.filterwarnings("ignore", ".*LeafSpec", FutureWarning)  # from within torch
            exported = th.export.export(actor, (obs,), dynamic_shapes={"obs": shapes})
            program = th.onnx.export(
                exported,
                dynamo=True,
                verbose=False,
                external_data=False,
                input_names=actor.input_names,
                output_names=[ACTIONS],
            )
    except Exception as error:
        extractor, reason = actor.policy.features_extractor_class.__name__, str(error).partition("\n")[0]
        raise ValueError(f"PyTorch cannot export this policy with its features extractor {extractor}: {reason}") from error
    finally:
        log.setLevel(level)
    assert program is not None
    graph = program.model.graph
    for value in [*graph.initializers.values(), *(output for node in graph for output in node.outputs)]:
        if value not in graph.outputs:
            value.name = f"sdac/{value.name}"  # a key of the Dict may be called as one of these
    proto = program.model_proto
    del proto.graph.value_info[:]
    for part in (proto.graph, *proto.graph.node, *proto.graph.input, *proto.graph.output):
        part.ClearField("metadata_props")
    for tensor in (*proto.graph.input, *proto.graph.output):
        tensor.type.tensor_type.shape.dim[0].dim_param = "batch"
    return proto.SerializeToString()


def _compare(actor: DeterministicActor, session: Any, batch_size: int) -> None:
    """
    :raises ValueError: if an action is not, up to rounding, that of the best particle, or of one as good up to rounding
    """
    obs = actor.sample_observations(batch_size, seed=batch_size)
    inputs = obs if isinstance(obs, dict) else {OBS: obs}
    [found] = session.run([ACTIONS], {name: value.numpy() for name, value in inputs.items()})
    particles, q_values = actor.candidates(obs)
    differences = (th.as_tensor(found).unsqueeze(1) - particles).abs() / (0.5 * (actor.high - actor.low))
    differences = differences.flatten(2).amax(2)  # (B, N, ...) -> (B, N)
    # The first denoising step multiplies the rounding of the predicted noise by 1 / sqrt(abar) (DDPM, below
    # equation 15): 12 with the default betas, 436 with linear ones, where one observation in fifty may notice
    gain = actor.policy.actor.sampler.diffusion.sqrt_recip_alphas_cumprod[-1].item()
    rounding = 1e-5 + 10 * gain * th.finfo(th.float32).eps
    as_good = q_values >= q_values.amax(1, keepdim=True) - rounding * (1 + q_values.abs().amax(1, keepdim=True))
    worst = differences.masked_fill(~as_good, th.inf).amin(1).amax().item()
    if not worst <= rounding:
        raise ValueError(
            f"ONNX Runtime's actions differ from PyTorch's by up to {worst:.1e} half widths of the action space, more than "
            f"{rounding:.1e} for rounding. If the policy's numbers are finite, please report this with the versions in use"
        )
