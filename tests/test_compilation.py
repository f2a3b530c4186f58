"""
Compiled and recorded updates: the same learning, no trace in what is saved, and a way out where there is no compiler.

CUDA graphs need a GPU. What can go wrong with them is mostly not CUDA's, though: a number of Python's that was frozen, a
tensor that was replaced instead of changed. That is tested everywhere, with a recorder of PyTorch's operations in the place
of the graph; the tests with ``cuda`` in their names do it with real graphs, where there are any.
"""

import copy
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
from helpers.logged import logged
from stable_baselines3.common.logger import configure
from stable_baselines3.common.torch_layers import FlattenExtractor
from stable_baselines3.common.utils import update_learning_rate
from torch.utils import _pytree as pytree
from torch.utils._python_dispatch import TorchDispatchMode

from sb3_sdac import PAPER_DPMD, PAPER_SDAC, SDAC, compilation
from sb3_sdac.buffers import ARRAYS, DeviceReplayBuffer
from sb3_sdac.compilation import MAX_GRAPHS, WARM_UP, Compiled, Graphed, set_learning_rate

#: Of its own doing, when the compiler is imported
torch_warns = pytest.mark.filterwarnings("ignore:.*torch.jit.script_method.*:DeprecationWarning")
CONFIGURATIONS = pytest.mark.parametrize(
    "kwargs",
    [
        {},
        {"batch_norm": False, "score_matching": "reverse_sampling", "target_update_interval": 2, "average_actor": True},
        {"learning_rate": lambda progress: 1e-2 * progress, "eta": 1.0, "n_target_particles": 2},
        {**PAPER_SDAC, "n_particles": 2, "n_reverse_samples": 4},
        {**PAPER_DPMD, "n_particles": 2},
    ],
    ids=["default", "target critics", "schedule", "SDAC", "DPMD"],
)


def make_model(device: str = "cpu", **kwargs: Any) -> SDAC:
    defaults: dict[str, Any] = {"buffer_size": 500, "seed": 0, "mixed_precision": False}
    policy_kwargs = {**kwargs.pop("policy_kwargs", {}), "net_arch": [16, 16]}
    model = SDAC("MlpPolicy", "Pendulum-v1", **{**defaults, **kwargs}, policy_kwargs=policy_kwargs, device=device)
    random_state = np.random.RandomState(0)
    assert model.replay_buffer is not None
    for _ in range(500):
        obs, next_obs = random_state.standard_normal((2, 1, 3))
        action, reward = random_state.uniform(-1, 1, (2, 1, 1))
        # What there is to learn: opposite signs are good
        model.replay_buffer.add(obs, next_obs, action, -10 * (action + np.sign(obs[:, :1])) ** 2 + reward, np.ones(1), [{}])
    model.set_logger(configure(None, []))
    return model


def train(model: SDAC, n_updates: int) -> None:
    """Learning rates go down while it lasts."""
    model.set_random_seed(1)
    for i in range(n_updates):
        model._current_progress_remaining = 1 - i / n_updates
        model.train(1, 32)


def numbers(model: SDAC) -> list[th.Tensor]:
    """All that learning changes, but for counters."""
    return [value for value in model.policy.state_dict().values() if value.is_floating_point()]


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


def pretend_cuda(monkeypatch: pytest.MonkeyPatch, model: SDAC) -> None:
    """Graphs that are recorders. Recording a real one does nothing, so here its effects are undone."""

    @contextmanager
    def graph(recorder: Any, pool: Any, stream: Any) -> Iterator[None]:
        states = [*numbers(model), model.q_running_mean, model.q_running_std, model.reward_statistics]
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
    optimizers = [model.actor.optimizer, model.critic.optimizer]
    model._run_update = Graphed(model._gather_and_update, optimizers, model._graph_key)


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
    captured = model.policy.captured_act
    assert captured is not None
    obs = np.random.RandomState(1).standard_normal((7, 3)).astype(np.float32)
    for i in range(8):
        model.train(3, 32)
        for deterministic in (True, False):
            for batch in (obs, obs[:2]):
                actions = []
                for act in (captured, None):
                    model.policy.captured_act = act
                    th.manual_seed(i)
                    actions.append(model.predict(batch, deterministic=deterministic)[0])
                np.testing.assert_allclose(actions[0], actions[1], rtol=1e-4, atol=1e-4)
                model.policy.captured_act = captured
    assert len(captured.__self__._graphs) == 4  # type: ignore[attr-defined]
    assert not np.array_equal(model.predict(obs)[0], model.predict(obs)[0])  # explores anew each time


@pytest.mark.cuda
def test_cuda_graphs_notice_what_changes_by_hand() -> None:
    """A detour to the CPU, which moves the weights, and exploration that is switched off."""
    model = make_model("cuda", n_particles=1, eta=0.0)
    obs = np.zeros((2, 3), np.float32)
    for _ in range(5):
        model.predict(obs, deterministic=True)
    model.policy.to("cpu")
    with th.no_grad():
        model.policy.actor.noise_predictor.rest[-1].bias.add_(0.3)  # type: ignore[operator]
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
    assert len(record) == 1 and not model._run_update._graphs  # type: ignore[attr-defined]
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
    assert graphed._run_update._graphs  # type: ignore[attr-defined]
    moved = sum((value - old).square().sum().item() for value, old in zip(numbers(eager), start, strict=True))
    apart = sum((value - other).square().sum().item() for value, other in zip(numbers(eager), numbers(graphed), strict=True))
    assert moved > 1e-2 and apart < 1e-2 * moved


def test_copies_record_anew() -> None:
    """Themselves, and not what they are copies of."""
    policy = make_model().policy
    graphed = Graphed(policy.act, key=policy.graph_key)
    graphed._graphs[()] = (None, [], None)
    policy.captured_act = graphed.copied
    twins: list[Any] = [copy.deepcopy(policy), pickle.loads(pickle.dumps(policy))]
    for twin in twins:
        own = twin.captured_act.__self__
        assert own.function.__self__ is own.key.__self__ is twin and not own._graphs
    model = make_model()
    model._run_update = Graphed(model._gather_and_update, [model.actor.optimizer], model._graph_key)
    other: Any = copy.deepcopy(model)
    assert other._run_update.function.__self__ is other and other._run_update.optimizers == [other.actor.optimizer]


def test_copies_of_recorded_optimizers_are_ordinary(monkeypatch: pytest.MonkeyPatch) -> None:
    """PyTorch warns of capturable ones that step without a graph, as a copy does at first."""
    model = make_model()
    pretend_cuda(monkeypatch, model)
    train(model, 10)
    twin, recorded = copy.deepcopy(model), model.critic.optimizer.param_groups[0]
    assert recorded["capturable"] and isinstance(recorded["lr"], th.Tensor)
    for optimizer in (twin.actor.optimizer, twin.critic.optimizer):
        assert not optimizer.param_groups[0]["capturable"] and not isinstance(optimizer.param_groups[0]["lr"], th.Tensor)


def test_copies_compile_their_own_networks() -> None:
    model = make_model(compile=True)
    twin = copy.deepcopy(model)
    assert twin._noise_predictor.function is twin.actor.noise_predictor  # type: ignore[attr-defined]


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
    kept = [graphed.copied(th.tensor(float(i))) for i in range(8)]
    assert kept == list(range(1, 9))


def test_what_is_moved_or_loaded_is_captured_anew(monkeypatch: pytest.MonkeyPatch) -> None:
    """Weights that went elsewhere and came back, and another state of the optimizers."""
    model = make_model(policy_delay=1)
    pretend_cuda(monkeypatch, model)
    graphed: Any = model._run_update
    train(model, 10)
    model.policy.to("cpu")
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
    assert len(model._run_update._graphs) == 2  # type: ignore[attr-defined]
    eager = make_model(policy_delay=1)
    train(eager, 10)
    eager.gamma, eager.policy.exploration_noise = 0.5, 0.3
    train(eager, 10)
    for value, expected in zip(numbers(model), numbers(eager), strict=True):
        th.testing.assert_close(value, expected, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize(
    ("name", "value"),
    [
        *[("tau", 0.1), ("target_ess", 0.5), ("reward_scale", 0.3), ("ent_coef", 0.3), ("clip_target_actions", False)],
        *[("n_reverse_samples", 7), ("policy.n_target_particles", 3), ("critic_steps", 2)],
        *[("score_matching", "reverse_sampling"), ("proposal", "clipped_normal"), ("anchor", "current")],
        *[("critic.pessimism", 0.3), ("policy.scale_noise_by_ent_coef", True), ("actor.init_noise_scale", 0.7)],
    ],
)
def test_every_argument_of_a_recording_is_in_its_key(name: str, value: Any) -> None:
    model = make_model()
    key, (*path, attribute) = model._graph_key(), name.split(".")
    holder = getattr(model, path[0]) if path else model
    assert getattr(holder, attribute) != value
    setattr(holder, attribute, value)
    assert model._graph_key() != key


def test_options_of_optimizers_changed_by_hand_are_noticed(monkeypatch: pytest.MonkeyPatch) -> None:
    model, eager = make_model(policy_delay=1), make_model(policy_delay=1)
    pretend_cuda(monkeypatch, model)
    for each in (model, eager):
        train(each, 10)
        each.critic.optimizer.param_groups[0]["weight_decay"] = 0.1
        each.actor.noise_predictor.first.requires_grad_(False)
        train(each, 10)
    assert len(model._run_update._graphs) == 2  # type: ignore[attr-defined]
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
    assert model._run_update._graphs  # type: ignore[attr-defined]
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
    assert model._run_update._graphs  # type: ignore[attr-defined]
    assert {int(state["step"]) for state in model.critic.optimizer.state.values()} == {10}
    for value, expected in zip(numbers(model), numbers(eager), strict=True):
        th.testing.assert_close(value, expected, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("part", ["policy", "actor", "critic"])
def test_parameters_that_move_are_noticed(part: str) -> None:
    """SB3's ``load_from_vector`` gives them other memory."""
    model = make_model()
    key, module = model.policy.graph_key(), getattr(model, part)
    assert key == model.policy.graph_key()
    module.load_from_vector(module.parameters_to_vector())
    assert model.policy.graph_key() != key


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
        eager.replay_buffer.rewards[:] *= -1  # type: ignore[union-attr]
        model.replay_buffer = on_device(eager)
    assert len(model._run_update._graphs) == 4  # type: ignore[attr-defined]  # with the actor's step and without


def on_device(model: SDAC) -> DeviceReplayBuffer:
    """A buffer with what the model's has, on the device."""
    theirs = model.replay_buffer
    assert theirs is not None
    buffer = DeviceReplayBuffer(500, theirs.observation_space, theirs.action_space, "cpu", n_steps=2, gamma=model.gamma)
    for row in zip(*(getattr(theirs, name) for name in ARRAYS[:5]), strict=True):
        buffer.add(*row, [{}])  # type: ignore[call-arg]
    return buffer


def test_saved_models_know_nothing_of_it(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Neither the graph nor its tensors in the place of numbers; the loaded model is not compiled until it learns."""
    model = make_model(learning_rate=1e-2, compile=True)
    model._noise_predictor = model.actor.noise_predictor
    pretend_cuda(monkeypatch, model)
    train(model, 12)
    assert isinstance(model.actor.optimizer.param_groups[0]["lr"], th.Tensor)
    model.save(tmp_path / "model.zip")
    train(model, 4)  # goes on as it was

    def refuse(*args: Any, **kwargs: Any) -> Any:
        return lambda *args: pytest.fail("compiled although nothing was learned")

    monkeypatch.setattr(th, "compile", refuse)
    loaded = SDAC.load(tmp_path / "model.zip", env=model.get_env(), device="cpu")
    assert loaded.compile and loaded._n_updates == 12
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
    model.set_parameters(copy.deepcopy(other.get_parameters()))  # type: ignore[arg-type]
    for each in (model, other):
        train(each, 10)
    assert model._run_update is recorded and recorded._graphs  # type: ignore[attr-defined]
    for value, expected in zip(numbers(model), numbers(other), strict=True):
        th.testing.assert_close(value, expected, rtol=1e-4, atol=1e-5)


def test_another_batch_size_is_recorded_anew(monkeypatch: pytest.MonkeyPatch) -> None:
    model = make_model(policy_delay=1)
    pretend_cuda(monkeypatch, model)
    for batch_size in (8, 16, 8):
        model.train(WARM_UP + 1, batch_size)
    assert len(model._run_update._graphs) == 2  # type: ignore[attr-defined]


def test_learning_rate_of_a_recorded_optimizer_is_changed_in_place() -> None:
    optimizer = th.optim.Adam([th.nn.Parameter(th.zeros(1))], lr=1e-3)
    set_learning_rate(optimizer, 0.5)
    assert optimizer.param_groups[0]["lr"] == 0.5
    rate = optimizer.param_groups[0]["lr"] = th.tensor(0.5)
    set_learning_rate(optimizer, 0.25)
    assert optimizer.param_groups[0]["lr"] is rate and rate.item() == 0.25


@pytest.mark.slow
@torch_warns
@pytest.mark.parametrize("mixed_precision", [False, True])
def test_compiled_updates_learn_as_others_do(mixed_precision: bool) -> None:
    """Hundreds of updates of the paper's configuration, whose denoising step is worth compiling."""
    kwargs: dict[str, Any] = {**PAPER_SDAC, "n_particles": 2, "n_reverse_samples": 4, "mixed_precision": mixed_precision}
    eager, fast = make_model(**kwargs), make_model(**kwargs, compile=True)
    start = [value.clone() for value in numbers(eager)]
    train(fast, 200)  # had it fallen back, its warning would be an error
    train(eager, 200)
    moved = sum((value - old).square().sum().item() for value, old in zip(numbers(eager), start, strict=True))
    apart = sum((value - other).square().sum().item() for value, other in zip(numbers(eager), numbers(fast), strict=True))
    assert moved > 0.1 and apart < 1e-2 * moved


def test_without_a_compiler_there_is_one_warning(monkeypatch: pytest.MonkeyPatch) -> None:
    def broken(function: Callable[..., Any], **kwargs: Any) -> Callable[..., Any]:
        def call(*args: Any) -> Any:
            raise RuntimeError("no C++ compiler")

        return call

    monkeypatch.setattr(th, "compile", broken)
    model, eager = make_model(compile=True), make_model()
    with pytest.warns(UserWarning, match=r"torch.compile fails.*no C\+\+ compiler") as record:
        train(model, 3)
    assert len(record) == 1
    train(eager, 3)
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
