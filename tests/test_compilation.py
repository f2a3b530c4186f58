"""
Compiled and recorded updates: the same learning, no trace in what is saved, and a way out where there is no compiler.

CUDA graphs need a GPU. What can go wrong with them is mostly not CUDA's, though: a number of Python's that was frozen, a
tensor that was replaced instead of changed. That is tested everywhere, with a recorder of PyTorch's operations in the place
of the graph; the tests with ``cuda`` in their names do it with real graphs, where there are any.
"""

import copy
import functools
import gc
import pickle
from collections.abc import Callable, Iterator
from contextlib import contextmanager, nullcontext
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch as th
from helpers.models import make_model as make_tiny
from helpers.watching import logged
from stable_baselines3.common.logger import configure
from stable_baselines3.common.torch_layers import FlattenExtractor
from stable_baselines3.common.utils import update_learning_rate
from torch.utils import _pytree as pytree
from torch.utils._python_dispatch import TorchDispatchMode

from sb3_sdac import DPMD, PAPER_DPMD, PAPER_SDAC, SDAC, compilation, sdac
from sb3_sdac.buffers import ARRAYS, DeviceReplayBuffer
from sb3_sdac.compilation import (
    MAX_GRAPHS,
    WARM_UP,
    Compiled,
    Graphed,
    denormals_flushed,
    has_bfloat16,
    has_compiler,
    rounded_products,
    set_learning_rate,
)

#: Of its own doing, when the compiler is imported
torch_warns = pytest.mark.filterwarnings("ignore:.*torch.jit.script_method.*:DeprecationWarning")
CONFIGURATIONS = pytest.mark.parametrize(
    "kwargs",
    [
        {},
        {
            "score_matching": "reverse_sampling",
            "target_update_interval": 2,
            "policy_kwargs": {"batch_norm": False, "average_actor": True},
        },
        {"learning_rate": lambda progress: 1e-2 * progress, "policy_kwargs": {"eta": 1.0, "n_train_particles": 2}},
        {**PAPER_SDAC, "n_reverse_samples": 4, "policy_kwargs": {**PAPER_SDAC["policy_kwargs"], "n_particles": 2}},
        {**PAPER_DPMD, "algorithm": DPMD, "policy_kwargs": {**PAPER_DPMD["policy_kwargs"], "n_particles": 2}},
    ],
    ids=["default", "target critics", "schedule", "SDAC", "DPMD"],
)


def make_model(device: str = "cpu", algorithm: type[SDAC] = SDAC, **kwargs: Any) -> Any:
    defaults: dict[str, Any] = {"buffer_size": 500, "seed": 0, "mixed_precision": False}
    policy_kwargs = {**kwargs.pop("policy_kwargs", {}), "net_arch": [16, 16]}
    model = algorithm("MlpPolicy", "Pendulum-v1", **{**defaults, **kwargs}, policy_kwargs=policy_kwargs, device=device)
    random_state = np.random.RandomState(0)
    assert model.replay_buffer is not None
    for _ in range(500):
        obs, next_obs = random_state.standard_normal((2, 1, 3))
        action, reward = random_state.uniform(-1, 1, (2, 1, 1))
        # What there is to learn: opposite signs are good
        model.replay_buffer.add(obs, next_obs, action, -10 * (action + np.sign(obs[:, :1])) ** 2 + reward, np.ones(1), [{}])
    model.set_logger(configure(None, []))
    return model


def train(model: Any, n_updates: int) -> None:
    """Learning rates go down while it lasts."""
    model.set_random_seed(1)
    for i in range(n_updates):
        model._current_progress_remaining = 1 - i / n_updates
        model.train(1, 32)


def numbers(model: Any) -> list[th.Tensor]:
    """All that learning changes, but for counters."""
    return [value for value in model.policy.state_dict().values() if value.is_floating_point()]


def statistics(model: Any) -> list[th.Tensor]:
    """What the update remembers."""
    parts = [part for part in vars(model.update).values() if isinstance(part, th.nn.Module) and part is not model.policy]
    return [value for part in parts for value in part.buffers()]


class Recorder(TorchDispatchMode):
    """Of operations on tensors, to do them again, on the same tensors."""

    def __init__(self) -> None:
        super().__init__()
        self.calls: list[tuple[Any, Any, Any, Any]] = []

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        out = func(*args, **(kwargs or {}))
        assert func is not th.ops.aten._local_scalar_dense.default, "a number was read back from the device"
        self.calls.append((func, args, kwargs or {}, out))
        return out

    def replay(self) -> None:
        for func, args, kwargs, out in self.calls:
            if func.is_view:
                continue
            again = func(*args, **kwargs)
            for old, new in zip(pytree.tree_leaves(out), pytree.tree_leaves(again), strict=True):
                if isinstance(old, th.Tensor) and old is not new:
                    old.copy_(new)


def pretend_cuda(monkeypatch: pytest.MonkeyPatch, model: Any) -> None:
    """Graphs that are recorders. Recording a real one does nothing, so here its effects are undone."""

    @contextmanager
    def graph(recorder: Any, pool: Any, stream: Any) -> Iterator[None]:
        states = [*numbers(model), *statistics(model)]
        states += [v for o in (model.actor.optimizer, model.critic.optimizer) for s in o.state.values() for v in s.values()]
        before = [value.clone() for value in states]
        random_state = th.get_rng_state()
        try:
            with recorder.recorder:
                yield
        finally:
            with th.no_grad():
                for value, old in zip(states, before, strict=True):
                    value.copy_(old)
            th.set_rng_state(random_state)

    class Graph:
        def __init__(self) -> None:
            self.recorder = Recorder()
            self.replay = th.no_grad()(self.recorder.replay)

    stream = SimpleNamespace(wait_stream=lambda other: None, device_index=0, device=th.device("cpu"))
    cuda = {"CUDAGraph": Graph, "graph": graph, "synchronize": lambda: None, "Stream": lambda: stream}
    cuda |= {"graph_pool_handle": lambda: (0, 1)}
    cuda |= {"current_stream": lambda: stream, "stream": lambda stream: nullcontext()}
    cuda |= {"device": lambda device: nullcontext()}
    for name, value in cuda.items():
        monkeypatch.setattr(compilation.th.cuda, name, value)
    monkeypatch.setattr(th.Tensor, "is_cuda", property(lambda tensor: True))
    optimizers = [model.actor.optimizer, model.critic.optimizer]
    model._run_update = Graphed(model._gather_and_update, optimizers, functools.partial(sdac._graph_key, model.policy))


@CONFIGURATIONS
def test_recorded_updates_learn_as_others_do(kwargs: dict[str, Any], monkeypatch: pytest.MonkeyPatch) -> None:
    """Over 60 updates, of which the first ones are not recorded, to the rounding of a learning rate that became a tensor."""
    eager, recorded = make_model(**kwargs), make_model(**kwargs)
    pretend_cuda(monkeypatch, recorded)
    start = [value.clone() for value in numbers(eager)]
    train(eager, 60)
    train(recorded, 60)
    assert isinstance(recorded._run_update, Graphed) and recorded._run_update._graphs
    assert any(not th.equal(value, old) for value, old in zip(numbers(eager), start, strict=True))
    for value, expected in zip(numbers(recorded), numbers(eager), strict=True):
        th.testing.assert_close(value, expected, rtol=1e-4, atol=1e-5)
    counts = [dict(model.logger.name_to_count) for model in (eager, recorded)]
    assert counts[0] == counts[1] and counts[0]["train/critic_loss"] == 60
    expected_log, log = logged(eager), logged(recorded)
    assert log.keys() == expected_log.keys() >= {"critic_loss", "actor_loss", "ent_coef", "q_value"}
    for name, expected_mean in expected_log.items():
        np.testing.assert_allclose(log[name], expected_mean, rtol=1e-4)


@CONFIGURATIONS
@pytest.mark.cuda
def test_cuda_graphs_learn_as_eager_mode_does(kwargs: dict[str, Any]) -> None:
    """Hundreds of updates. Graphs draw the same random numbers; sums may be taken in another order, hence the tolerance."""
    eager, graphed = make_model("cuda", compile=False, **kwargs), make_model("cuda", **kwargs)
    start = [value.clone() for value in numbers(eager)]
    train(eager, 300)
    train(graphed, 300)
    assert isinstance(graphed._run_update, Graphed) and graphed._run_update._graphs
    moved = sum((value - old).square().sum().item() for value, old in zip(numbers(eager), start, strict=True))
    apart = sum((value - other).square().sum().item() for value, other in zip(numbers(eager), numbers(graphed), strict=True))
    assert moved > 0.1 and apart < 1e-2 * moved


@pytest.mark.cuda
def test_cuda_learns_what_there_is_to_learn() -> None:
    """With everything compiled; compared with the same model before."""
    model = make_model("cuda", compile=True)
    obs = np.random.RandomState(1).standard_normal((100, 3)).astype(np.float32)

    def agreement() -> float:
        return float(np.mean(model.predict(obs, deterministic=True)[0][:, 0] * np.sign(obs[:, 0])))

    before = agreement()
    model.train(1500, 32)
    assert agreement() < before - 0.5 and agreement() < -1  # torques of 2 against the sign


@CONFIGURATIONS
@pytest.mark.cuda
def test_cuda_graphs_act_as_eager_mode_does(kwargs: dict[str, Any]) -> None:
    """Between updates, which change the weights under them; with the same random numbers, for two sizes in turn."""
    model = make_model("cuda", **kwargs)
    installed = vars(model.policy)
    captured = installed["_predict"]
    obs = np.random.RandomState(1).standard_normal((7, 3)).astype(np.float32)
    for i in range(8):
        model.train(3, 32)
        for deterministic in (True, False):
            for batch in (obs, obs[:2]):
                actions = []
                for act in (captured, model.policy.act):
                    installed["_predict"] = act
                    th.manual_seed(i)
                    actions.append(model.predict(batch, deterministic=deterministic)[0])
                np.testing.assert_allclose(actions[0], actions[1], rtol=1e-4, atol=1e-4)
                installed["_predict"] = captured
    assert len(captured.__self__._graphs) == 4
    assert not np.array_equal(model.predict(obs)[0], model.predict(obs)[0])  # explores anew each time


@pytest.mark.cuda
def test_cuda_graphs_notice_what_changes_by_hand() -> None:
    """A detour to the CPU, which moves the weights, and exploration that is switched off."""
    model = make_model("cuda", policy_kwargs={"n_particles": 1, "eta": 0.0})
    obs = np.zeros((2, 3), np.float32)
    for _ in range(5):
        model.predict(obs, deterministic=True)
    model.policy.to("cpu")
    with th.no_grad():
        model.policy.actor.noise_predictor.rest[-1].bias.add_(0.3)
    expected = model.predict(obs, deterministic=True)[0]
    model.policy.to("cuda")
    for _ in range(5):
        np.testing.assert_allclose(model.predict(obs, deterministic=True)[0], expected, rtol=1e-4, atol=1e-4)
    for _ in range(5):
        with th.inference_mode():
            model.predict(obs)
        model.predict(obs)
    model.policy.exploration_noise = 1e3
    assert (np.abs(model.predict(np.zeros((64, 3), np.float32))[0]) == 2).mean() > 0.9


class ReadsBack(FlattenExtractor):
    """No graph can be made of it: it asks the device for a number."""

    def forward(self, observations: th.Tensor) -> th.Tensor:
        features = super().forward(observations)
        return features if features.isfinite().all().item() else th.zeros_like(features)


@pytest.mark.cuda
def test_cuda_goes_on_without_graphs_where_there_can_be_none() -> None:
    """One warning for updates and one for acting; everything as with ``compile=False``, random numbers included."""
    kwargs: dict[str, Any] = {"policy_kwargs": {"features_extractor_class": ReadsBack}}
    model, eager = make_model("cuda", **kwargs), make_model("cuda", compile=False, **kwargs)
    with pytest.warns(UserWarning, match="CUDA cannot capture") as record:
        train(model, 20)
        actions = [model.predict(np.ones((2, 3), np.float32))[0] for _ in range(8)]
    assert len([warning for warning in record if "CUDA cannot capture" in str(warning.message)]) == 2
    train(eager, 20)
    for action in actions:
        np.testing.assert_allclose(action, eager.predict(np.ones((2, 3), np.float32))[0], rtol=1e-3, atol=1e-3)
    for value, expected in zip(numbers(model), numbers(eager), strict=True):
        th.testing.assert_close(value, expected, rtol=1e-3, atol=1e-4)


def test_what_cannot_be_recorded_runs_as_it_is(monkeypatch: pytest.MonkeyPatch) -> None:
    """With one warning, and nothing is tried again. AdamW, unless fused, refuses to be capturable where there is no CUDA."""
    kwargs: dict[str, Any] = {"policy_kwargs": {"optimizer_class": th.optim.AdamW}}
    model, eager = make_model(**kwargs), make_model(**kwargs)
    pretend_cuda(monkeypatch, model)
    monkeypatch.setattr(compilation.th.cuda, "set_stream", lambda stream: None)
    ended = []
    monkeypatch.setattr(compilation.th._C, "_cuda_endAllocateToPool", lambda *args: ended.append(args), raising=False)
    generator = SimpleNamespace(clone_state=lambda: None, graphsafe_set_state=lambda state: None)
    monkeypatch.setattr(compilation.th.cuda, "default_generators", {0: generator})
    with pytest.warns(UserWarning, match="runs as it is.*capturable") as record:
        train(model, 20)
    assert len(record) == 1 and not model._run_update._graphs
    assert ended == [(0, (0, 1))] and gc.isenabled()
    train(eager, 20)
    for value, expected in zip(numbers(model), numbers(eager), strict=True):
        assert th.equal(value, expected)


@pytest.mark.cuda
@pytest.mark.parametrize("optimizer_class", [th.optim.AdamW, th.optim.RMSprop])
def test_cuda_graphs_of_other_optimizers(optimizer_class: type[th.optim.Optimizer]) -> None:
    """Their steps were counted on the CPU; a warning would be an error."""
    kwargs: dict[str, Any] = {"policy_kwargs": {"optimizer_class": optimizer_class}, "learning_rate": 1e-3}
    eager, graphed = make_model("cuda", compile=False, **kwargs), make_model("cuda", **kwargs)
    start = [value.clone() for value in numbers(eager)]
    train(eager, 100)
    train(graphed, 100)
    assert graphed._run_update._graphs
    moved = sum((value - old).square().sum().item() for value, old in zip(numbers(eager), start, strict=True))
    apart = sum((value - other).square().sum().item() for value, other in zip(numbers(eager), numbers(graphed), strict=True))
    assert moved > 1e-2 and apart < 1e-2 * moved


def test_copies_record_anew() -> None:
    """Themselves, and not what they are copies of."""
    policy = make_model().policy
    graphed = Graphed(policy.act, key=functools.partial(sdac._graph_key, policy))
    graphed._graphs[()] = (None, [], None)
    vars(policy)["_predict"] = graphed.copied
    twins: list[Any] = [copy.deepcopy(policy), pickle.loads(pickle.dumps(policy))]
    for twin in twins:
        own = vars(twin)["_predict"].__self__
        assert own is not graphed and not own._graphs
        assert own.function.__self__ is own.key.args[0] is twin
    model = make_model()
    key = functools.partial(sdac._graph_key, model.policy)
    model._run_update = Graphed(model._gather_and_update, [model.actor.optimizer], key)
    other = copy.deepcopy(model)
    assert other._run_update.function.__self__ is other and other._run_update.key.args[0] is other.policy
    assert other._run_update.optimizers == [other.actor.optimizer]


def test_copies_of_recorded_optimizers_are_ordinary(monkeypatch: pytest.MonkeyPatch) -> None:
    """PyTorch warns of capturable ones that step without a graph, as a copy does at first."""
    model = make_model()
    pretend_cuda(monkeypatch, model)
    train(model, 10)
    twin, recorded = copy.deepcopy(model), model.critic.optimizer.param_groups[0]
    assert recorded["capturable"] and isinstance(recorded["lr"], th.Tensor)
    for optimizer in (twin.actor.optimizer, twin.critic.optimizer):
        assert not optimizer.param_groups[0]["capturable"] and not isinstance(optimizer.param_groups[0]["lr"], th.Tensor)


def functions_of(part: Any) -> list[Any]:
    """What is compiled in a part of an update, or runs in its place."""
    if isinstance(part, functools.partial):
        return [function for argument in part.args for function in (functions_of(argument) or [argument])]
    return [part.function] if isinstance(part, Compiled) else []


@pytest.mark.parametrize("n_sampling_steps", [2, 20], ids=["the loop", "one step"])
def test_copies_compile_their_own_networks(n_sampling_steps: int) -> None:
    model = make_model(compile=True, policy_kwargs={"n_sampling_steps": n_sampling_steps})
    twin = copy.deepcopy(model)
    compiled = {name: functions_of(part) for name, part in vars(twin.update).items()}
    found = {name for name, functions in compiled.items() if functions}
    one_step = {"noise_predictor"} if n_sampling_steps == 20 else {"draw_actions"}
    assert found == {"critic_loss", "score_matching_loss"} | one_step
    for name in found:
        owner = twin.actor.noise_predictor if name == "noise_predictor" else twin.update
        assert len(compiled[name]) == (2 if name == "score_matching_loss" else 1)
        for function in compiled[name]:
            assert getattr(function, "__self__", function) is owner, name


def test_what_is_compiled_follows_the_argument() -> None:
    """On a live model, and back."""
    model = make_model(compile=False)
    plain = dict(vars(model.update))
    model.compile = True
    assert vars(model.update).keys() - plain.keys() == {"critic_loss", "score_matching_loss", "draw_actions"}
    model.compile = "auto"
    assert vars(model.update).keys() == plain.keys() and model.update.noise_predictor is None


@pytest.mark.parametrize(
    "kwargs, n_steps, there_is_one, expected",
    [
        ({}, 50_000, True, True),
        ({}, 49_999, True, False),
        ({}, 50_000, False, False),
        ({"train_freq": 10}, 499_999, True, False),
        ({"train_freq": 10}, 500_000, True, True),
        ({"train_freq": 10, "gradient_steps": -1}, 50_000, True, True),
        ({"gradient_steps": 5}, 10_000, True, True),
        ({"compile": False}, 50_000, True, False),
        ({"compile": True}, 10, True, True),
    ],
)
def test_long_runs_are_compiled_on_a_cpu(
    kwargs: dict[str, Any], n_steps: int, there_is_one: bool, expected: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    """By the updates that learn() is to make, if there is a compiler; learning itself is cut short here."""
    monkeypatch.setattr(sdac, "has_compiler", lambda: there_is_one)
    model = make_tiny(**kwargs)
    model.learn(n_steps, callback=lambda variables, all_of_them: False)
    assert ("critic_loss" in vars(model.update)) == expected


def test_has_compiler(monkeypatch: pytest.MonkeyPatch) -> None:
    """``CXX`` or one of the usual names."""
    monkeypatch.delenv("CXX", raising=False)
    for there in ("g++", "clang++", "c++", "cl"):
        monkeypatch.setattr(compilation.shutil, "which", lambda name, there=there: name if name == there else None)
        assert has_compiler()
    monkeypatch.setattr(compilation.shutil, "which", lambda name: name if name == "my-compiler" else None)
    assert not has_compiler()
    monkeypatch.setenv("CXX", "my-compiler")
    assert has_compiler()


def test_what_is_not_on_cuda_runs_as_it_is() -> None:
    """A model whose policy went to the CPU; nothing is captured, and nothing of CUDA is asked."""
    graphed = Graphed(lambda batch, factor: factor * batch["a"])
    for _ in range(WARM_UP + 2):
        assert graphed({"a": th.ones(())}, 3) == graphed.copied({"a": th.ones(())}, 3) == 3
    assert not graphed._graphs and not graphed._n_calls


@pytest.mark.parametrize("mode", ["gradients", "inference", "autocast"])
def test_other_modes_run_as_they_are(mode: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """A graph holds the modes it was captured in, so that none is made, or replayed, in another one."""
    pretend_cuda(monkeypatch, make_model())
    monkeypatch.setattr(th, "is_autocast_enabled", lambda device: mode == "autocast")  # of CUDA there is none here
    calls: list[int] = []

    def add_one(x: th.Tensor) -> th.Tensor:
        calls.append(1)
        return x + 1

    graphed = Graphed(add_one)
    with th.inference_mode() if mode == "inference" else th.set_grad_enabled(mode == "gradients"):
        for _ in range(WARM_UP + 2):
            assert graphed.copied(th.ones(())) == 2
    assert len(calls) == WARM_UP + 2 and not graphed._graphs


def test_graphs_are_of_one_structure(monkeypatch: pytest.MonkeyPatch) -> None:
    """Equal shapes in another order, and what is no tensor, are something else; what has no tensors at all is not captured."""
    pretend_cuda(monkeypatch, make_model())
    graphed = Graphed(lambda batch: batch["a"] - batch["b"])
    a, b = th.tensor(5.0), th.tensor(3.0)
    batches: list[Any] = [{"a": a, "b": b}, {"b": b, "a": a}, {"a": a, "b": 3}, {"a": a, "b": 4}]
    for batch in batches:
        for _ in range(WARM_UP + 2):
            assert graphed(batch) == a - batch["b"]
    assert len(graphed._graphs) == 4
    assert graphed({"a": np.ones(2), "b": 0}).sum() == 2 and graphed({"a": a, "b": np.float64(2)}) == 3
    assert len(graphed._graphs) == 4


def test_the_oldest_graph_goes(monkeypatch: pytest.MonkeyPatch) -> None:
    pretend_cuda(monkeypatch, make_model())
    monkeypatch.setattr(compilation, "MAX_GRAPHS", 2)
    graphed = Graphed(lambda x: x + 1)
    for size in (1, 2, 3, 1):
        for _ in range(WARM_UP + 2):
            assert th.equal(graphed(th.zeros(size)), th.ones(size))
    assert [static[0].shape for _, static, _ in graphed._graphs.values()] == [(3,), (1,)]


def test_copies_for_keeps(monkeypatch: pytest.MonkeyPatch) -> None:
    pretend_cuda(monkeypatch, make_model())
    graphed = Graphed(lambda x: x + 1)
    with th.no_grad():
        kept = [graphed.copied(th.tensor(float(i))) for i in range(8)]
    assert kept == list(range(1, 9)) and graphed._graphs


def test_what_is_moved_or_loaded_is_captured_anew(monkeypatch: pytest.MonkeyPatch) -> None:
    """Weights that went elsewhere and came back, and another state of the optimizers."""
    model = make_model(policy_delay=1)
    pretend_cuda(monkeypatch, model)
    graphed: Any = model._run_update
    train(model, 10)
    for tensor in (*model.policy.parameters(), *model.policy.buffers()):
        tensor.data = tensor.data.clone()
    train(model, 10)
    assert len(graphed._graphs) == 2
    model.critic.optimizer.load_state_dict(model.critic.optimizer.state_dict())
    train(model, WARM_UP)
    assert not graphed._graphs
    train(model, 1)
    assert graphed._graphs


def test_what_never_comes_again_is_forgotten() -> None:
    graphed = Graphed(lambda: None)
    for i in range(100 * MAX_GRAPHS + 2):
        assert not graphed._has_come_before(i)
    assert len(graphed._n_calls) == 1


def test_arguments_changed_by_hand_are_noticed(monkeypatch: pytest.MonkeyPatch) -> None:
    """As by a callback: the recording holds them as they were."""
    model = make_model(policy_delay=1)
    pretend_cuda(monkeypatch, model)
    train(model, 10)
    model.gamma = 0.5
    model.policy.exploration_noise = 0.3
    train(model, 10)
    assert len(model._run_update._graphs) == 2
    eager = make_model(policy_delay=1)
    train(eager, 10)
    eager.gamma, eager.policy.exploration_noise = 0.5, 0.3
    train(eager, 10)
    for value, expected in zip(numbers(model), numbers(eager), strict=True):
        th.testing.assert_close(value, expected, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize(
    ("name", "value"),
    [
        *[("n_sampling_steps", 3), ("eta", 0.5), ("init_noise_scale", 0.7), ("n_particles", 3), ("n_train_particles", 3)],
        *[("exploration_noise", 0.3), ("scale_noise_by_ent_coef", True), ("pessimism", 0.3)],
    ],
)
def test_every_argument_of_the_policy_is_in_the_key(name: str, value: Any) -> None:
    """Those of the update come along with it: they are flags."""
    policy = make_model().policy
    key = sdac._graph_key(policy)
    assert getattr(policy, name) != value
    setattr(policy, name, value)
    assert sdac._graph_key(policy) != key
    policy.set_training_mode(not policy.training)
    assert sdac._graph_key(policy) != key


def test_the_key_knows_all_arguments_of_the_policy() -> None:
    (mark,) = test_every_argument_of_the_policy_is_in_the_key.pytestmark
    assert {name for name, _ in mark.args[1]} == make_model().policy.LIVE


def test_options_of_optimizers_changed_by_hand_are_noticed(monkeypatch: pytest.MonkeyPatch) -> None:
    model, eager = make_model(policy_delay=1), make_model(policy_delay=1)
    pretend_cuda(monkeypatch, model)
    for each in (model, eager):
        train(each, 10)
        each.critic.optimizer.param_groups[0]["weight_decay"] = 0.1
        each.actor.noise_predictor.first.requires_grad_(False)
        train(each, 10)
    assert len(model._run_update._graphs) == 2
    for value, expected in zip(numbers(model), numbers(eager), strict=True):
        th.testing.assert_close(value, expected, rtol=1e-4, atol=1e-5)


def test_what_optimizers_hold_is_noticed_when_replaced(monkeypatch: pytest.MonkeyPatch) -> None:
    """A recording writes to the old tensors: learning rates set as SB3 does it, moments begun anew."""
    model, eager = make_model(policy_delay=1), make_model(policy_delay=1)
    pretend_cuda(monkeypatch, model)
    for each in (model, eager):
        train(each, 10)
        update_learning_rate(each.actor.optimizer, 0.1)
        train(each, 10)
        each.critic.optimizer.state.clear()
        train(each, 10)
    assert model._run_update._graphs
    for value, expected in zip(numbers(model), numbers(eager), strict=True):
        th.testing.assert_close(value, expected, rtol=1e-4, atol=1e-5)


def test_an_optimizer_that_begins_anew(monkeypatch: pytest.MonkeyPatch) -> None:
    """A loaded state may be empty; what Adam makes at its next step must not be made again with every replay."""
    model, eager = make_model(policy_delay=1), make_model(policy_delay=1)
    empty = make_model().critic.optimizer.state_dict()
    pretend_cuda(monkeypatch, model)
    for each in (model, eager):
        train(each, 10)
        each.critic.optimizer.load_state_dict(copy.deepcopy(empty))
        train(each, 10)
    assert model._run_update._graphs
    assert {int(state["step"]) for state in model.critic.optimizer.state.values()} == {10}
    for value, expected in zip(numbers(model), numbers(eager), strict=True):
        th.testing.assert_close(value, expected, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("part", ["policy", "actor", "critic"])
def test_parameters_that_move_are_noticed(part: str) -> None:
    """SB3's ``load_from_vector`` gives them other memory."""
    model = make_model()
    key, module = sdac._graph_key(model.policy), getattr(model, part)
    assert key == sdac._graph_key(model.policy)
    module.load_from_vector(module.parameters_to_vector())
    assert sdac._graph_key(model.policy) != key


def test_batches_are_gathered_inside(monkeypatch: pytest.MonkeyPatch) -> None:
    """From a buffer on the device; another buffer is recorded anew."""
    model, eager = make_model(), make_model()
    model.replay_buffer = on_device(eager)
    pretend_cuda(monkeypatch, model)
    for _ in range(2):
        train(model, 30)
        train(eager, 30)
        for value, expected in zip(numbers(model), numbers(eager), strict=True):
            th.testing.assert_close(value, expected, rtol=1e-4, atol=1e-5)
        eager.replay_buffer.rewards[:] *= -1
        model.replay_buffer = on_device(eager)
    assert len(model._run_update._graphs) == 4  # with the actor's step and without


def on_device(model: Any) -> DeviceReplayBuffer:
    """A buffer with what the model's has, on the device."""
    theirs = model.replay_buffer
    assert theirs is not None
    buffer = DeviceReplayBuffer(500, theirs.observation_space, theirs.action_space, "cpu", n_steps=2, gamma=model.gamma)
    for row in zip(*(getattr(theirs, name) for name in ARRAYS[:5]), strict=True):
        buffer.add(*row, [{}])  # type: ignore[call-arg]
    return buffer


def test_saved_models_know_nothing_of_it(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Neither the graph nor its tensors in the place of numbers; the loaded model is not compiled until it learns."""
    model = make_model(learning_rate=1e-2, compile="auto")
    pretend_cuda(monkeypatch, model)
    train(model, 12)
    assert isinstance(model.actor.optimizer.param_groups[0]["lr"], th.Tensor)
    vars(model)["compile"] = True
    model.save(tmp_path / "model.zip")
    train(model, 4)  # goes on as it was

    def refuse(*args: Any, **kwargs: Any) -> Any:
        return lambda *args: pytest.fail("compiled although nothing was learned")

    monkeypatch.setattr(th, "compile", refuse)
    loaded = SDAC.load(tmp_path / "model.zip", env=model.get_env(), device="cpu")
    assert loaded.compile is True and loaded._n_updates == 12
    assert [group["lr"] for group in loaded.actor.optimizer.param_groups] == [pytest.approx(1e-2)]
    assert not loaded.actor.optimizer.param_groups[0]["capturable"]
    loaded.predict(np.zeros(3, np.float32))


def test_new_parameters_are_recorded_anew(monkeypatch: pytest.MonkeyPatch) -> None:
    """They bring other tensors for the optimizers, and a recording would go on with the old ones."""
    model, other = make_model(), make_model()
    pretend_cuda(monkeypatch, model)
    recorded = model._run_update
    train(other, 10)
    train(model, 10)
    model.set_parameters(copy.deepcopy(other.get_parameters()))
    for each in (model, other):
        train(each, 10)
    assert model._run_update is recorded and recorded._graphs
    for value, expected in zip(numbers(model), numbers(other), strict=True):
        th.testing.assert_close(value, expected, rtol=1e-4, atol=1e-5)


def test_another_batch_size_is_recorded_anew(monkeypatch: pytest.MonkeyPatch) -> None:
    model = make_model(policy_delay=1)
    pretend_cuda(monkeypatch, model)
    for batch_size in (8, 16, 8):
        model.train(WARM_UP + 1, batch_size)
    assert len(model._run_update._graphs) == 2


def test_learning_rate_of_a_recorded_optimizer_is_changed_in_place() -> None:
    optimizer = th.optim.Adam([th.nn.Parameter(th.zeros(1))], lr=1e-3)
    set_learning_rate(optimizer, 0.5)
    assert optimizer.param_groups[0]["lr"] == 0.5
    rate = optimizer.param_groups[0]["lr"] = th.tensor(0.5)
    set_learning_rate(optimizer, 0.25)
    assert optimizer.param_groups[0]["lr"] is rate and rate.item() == 0.25


COMPILED: dict[str, dict[str, Any]] = {
    "default": {},
    "mixed": {"mixed_precision": True},
    "plain": {"score_matching": "reverse_sampling", "policy_kwargs": {"batch_norm": False, "n_bins": 1}},
    "SDAC": {**PAPER_SDAC, "n_reverse_samples": 4, "policy_kwargs": {**PAPER_SDAC["policy_kwargs"], "n_particles": 2}},
    "DPMD": {**PAPER_DPMD, "algorithm": DPMD, "policy_kwargs": {**PAPER_DPMD["policy_kwargs"], "n_particles": 2}},
}


@pytest.mark.slow
@pytest.mark.skipif(not has_compiler(), reason="there is no C++ compiler")
@torch_warns
@pytest.mark.filterwarnings("ignore:The .grad attribute of a Tensor")  # which the compiler hides, and an error cannot be
@pytest.mark.parametrize("name", COMPILED)
def test_compiled_updates_learn_as_others_do(name: str) -> None:
    """Hundreds of updates, with the same random numbers: to the rounding of sums taken in another order."""
    eager, fast = make_model(**COMPILED[name], compile=False), make_model(**COMPILED[name], compile=True)
    start = [value.clone() for value in numbers(eager)]
    train(fast, 200)  # had it fallen back, its warning would be an error
    train(eager, 200)
    moved = sum((value - old).square().sum().item() for value, old in zip(numbers(eager), start, strict=True))
    apart = sum((value - other).square().sum().item() for value, other in zip(numbers(eager), numbers(fast), strict=True))
    assert moved > 0.1 and apart < 1e-2 * moved


def broken(function: Callable[..., Any], **kwargs: Any) -> Callable[..., Any]:
    """In the place of ``torch.compile``."""

    def call(*args: Any) -> Any:
        raise RuntimeError("no C++ compiler")

    return call


def test_without_a_compiler_there_are_warnings(monkeypatch: pytest.MonkeyPatch) -> None:
    """One for each part, and each runs as it is."""
    monkeypatch.setattr(th, "compile", broken)
    model, eager = make_model(compile=True), make_model(compile=False)
    with pytest.warns(UserWarning, match=r"torch.compile fails.*no C\+\+ compiler") as record:
        train(model, 5)
    said = sorted(str(warning.message).partition(" so ")[2].partition(" runs")[0] for warning in record)
    assert said == ["critic_loss", "draw_actions", "score_matching_loss"]
    train(eager, 5)
    for value, expected in zip(numbers(model), numbers(eager), strict=True):
        assert th.equal(value, expected)


@torch_warns
def test_an_error_of_the_function_itself_is_not_hidden() -> None:
    def function(x: th.Tensor) -> th.Tensor:
        raise KeyError("mine")

    call = Compiled(function)
    for _ in range(2):
        with pytest.raises(Exception, match="mine"):
            call(th.zeros(1))


# Settings of the processor


@pytest.mark.parametrize(
    "device, avx512_bf16, amx, cuda, expected",
    [
        ("cpu", True, False, False, True),
        ("cpu", False, True, False, True),
        ("cpu", False, False, True, False),
        ("cuda", False, False, True, True),
        ("cuda:1", False, False, True, True),
        ("cuda", True, True, False, False),
        ("mps", True, True, True, False),
    ],
)
def test_processors_with_bfloat16(
    device: str, avx512_bf16: bool, amx: bool, cuda: bool, expected: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(th.cpu, "_is_avx512_bf16_supported", lambda: avx512_bf16)
    monkeypatch.setattr(th.cpu, "_is_amx_tile_supported", lambda: amx)
    # Emulated by a device that is too old, it would be slower than float32
    monkeypatch.setattr(th.cuda, "is_bf16_supported", lambda including_emulation=True: cuda or including_emulation)
    current: list[th.device] = []  # that it is asked of

    def make_current(device: th.device) -> nullcontext:
        current.append(device)
        return nullcontext()

    monkeypatch.setattr(th.cuda, "device", make_current)
    assert has_bfloat16(th.device(device)) is expected
    assert current == ([th.device(device)] if device.startswith("cuda") else [])


@pytest.mark.parametrize("before", ["highest", "high", "medium"])
def test_rounded_products_come_and_go(before: str) -> None:
    """As they were, also where something raises, and where they are not asked for."""
    original = th.get_float32_matmul_precision()
    th.set_float32_matmul_precision(before)
    try:
        for enabled, expected in ((True, "medium"), (False, before)):
            with pytest.raises(KeyError), rounded_products(enabled):
                assert th.get_float32_matmul_precision() == expected
                raise KeyError
            assert th.get_float32_matmul_precision() == before
    finally:
        th.set_float32_matmul_precision(original)


@pytest.mark.parametrize("before", [False, True])
def test_denormals_come_and_go(before: bool) -> None:
    assert th.set_flush_denormal(before)
    try:
        with pytest.raises(KeyError), denormals_flushed():
            assert th.tensor(1e-39).mul(1).item() == 0
            raise KeyError
        assert (th.tensor(1e-39).mul(1).item() == 0) == before
    finally:
        th.set_flush_denormal(False)
