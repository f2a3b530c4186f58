"""Noise predictor and critics: parts computed once equal the whole, members stay apart, and what starts near zero does."""

import math
from typing import Any

import pytest
import torch as th
from torch import nn
from torch.nn import functional as F

from sb3_sdac.compilation import has_bfloat16, rounded_products
from sb3_sdac.layers import Mish, NormLimit
from sb3_sdac.networks import (
    TIME_DIM,
    CriticEnsemble,
    EnsembleLinear,
    NoisePredictor,
    last_in_float32,
    lecun_normal_,
    sinusoidal_embedding,
)

B, N, F_DIM, A = 6, 4, 5, 3
#: Distributions and plain values, with normalised inputs and without, several layers and none
ENSEMBLES: list[dict[str, Any]] = [
    {"net_arch": net_arch, "batch_norm": batch_norm, "n_bins": n_bins}
    for net_arch in ([16, 8], [16], [])
    for batch_norm in (True, False)
    for n_bins in (1, 11)
]


def make_ensemble(n_critics: int = 3, activation_fn: type[nn.Module] = nn.SiLU, **kwargs: Any) -> CriticEnsemble:
    th.manual_seed(0)
    ensemble = CriticEnsemble(
        n_critics, F_DIM, A, **{"net_arch": [16, 8], "activation_fn": activation_fn, "max_value": 20.0, **kwargs}
    )
    for name, value in ensemble.state_dict().items():  # as if it had learned
        if "bias" in name or "norm.weight" in name or "running_mean" in name:
            value.add_(0.3 * th.randn_like(value))
        if "running_var" in name:
            value.uniform_(0.5, 2)
    return ensemble


def inputs(n_actions: int | None = None) -> tuple[th.Tensor, th.Tensor]:
    th.manual_seed(1)
    return th.randn(B, F_DIM), 2 * th.rand(*((B, A) if n_actions is None else (B, n_actions, A))) - 1


def layers_of(ensemble: CriticEnsemble) -> list[nn.Module]:
    return [ensemble.first, *ensemble.rest]


def one_by_one(ensemble: CriticEnsemble, member: int, features: th.Tensor, actions: th.Tensor) -> th.Tensor:
    """Outputs of a single critic for (B, A) actions, layer by layer on the concatenated input, in float64."""
    hidden = th.cat([features, actions], dim=1).double()
    for layer in layers_of(ensemble):
        if not isinstance(layer, EnsembleLinear):
            hidden = layer(hidden)
            continue
        if layer.norm is not None:
            part = slice(member * hidden.shape[1], (member + 1) * hidden.shape[1])
            values = (layer.norm.running_mean, layer.norm.running_var, layer.norm.weight, layer.norm.bias)
            mean, var, weight, bias = (value[part].double() for value in values)
            hidden = (hidden - mean) / (var + 1e-3).sqrt() * weight + bias
        hidden = hidden @ layer.weight[member].double() + layer.bias[member].double()
    return hidden


@pytest.mark.parametrize("kwargs", ENSEMBLES, ids=str)
@th.no_grad()
def test_critics_are_mlps_side_by_side(kwargs: dict[str, Any]) -> None:
    """For one and for N actions per observation; each critic as it would be alone."""
    ensemble = make_ensemble(**kwargs)
    features, actions = inputs(N)
    outputs = ensemble.outputs(ensemble.encode(features), actions)
    assert outputs.shape == (3, B, N, kwargs["n_bins"])
    for i in range(N):
        single = ensemble.outputs(ensemble.encode(features), actions[:, i])
        assert single.shape == (3, B, kwargs["n_bins"])
        for member in range(3):
            expected = one_by_one(ensemble, member, features, actions[:, i]).float()
            th.testing.assert_close(single[member], expected, rtol=1e-4, atol=1e-5)
            th.testing.assert_close(outputs[member, :, i], expected, rtol=1e-4, atol=1e-5)
    values = ensemble(ensemble.encode(features), actions)
    assert values.shape == (3, B, N) and th.equal(values, ensemble.values(outputs))


@pytest.mark.parametrize("kwargs", [kwargs for kwargs in ENSEMBLES if kwargs["batch_norm"]], ids=str)
@th.no_grad()
def test_normalising_a_batch_moves_the_statistics_by_a_hundredth(kwargs: dict[str, Any]) -> None:
    """Its outputs do not depend on them, and the inputs of every layer and critic count on their own."""
    ensemble, features, actions = make_ensemble(**kwargs), *inputs()
    norm = ensemble.first.norm
    assert norm is not None
    before = norm.running_mean.clone()
    outputs = ensemble.normalise_batch(features, actions)
    batch_mean = th.cat([features, actions], dim=1).mean(dim=0).repeat(3)
    th.testing.assert_close(norm.running_mean, 0.99 * before + 0.01 * batch_mean)
    th.testing.assert_close(ensemble.normalise_batch(features, actions), outputs)
    shifted = 3 * features + 7  # what normalisation takes away
    th.testing.assert_close(ensemble.normalise_batch(shifted, actions), outputs, rtol=1e-2, atol=1e-2)


@th.no_grad()
def test_critics_learn_apart() -> None:
    """A change of one does not reach the others."""
    ensemble, (features, actions) = make_ensemble(batch_norm=True, n_bins=11), inputs()
    before = ensemble(ensemble.encode(features), actions)
    for parameter in ensemble.parameters():
        if parameter.shape[0] == 3:
            parameter[1] += 0.1
    after = ensemble(ensemble.encode(features), actions)
    assert [th.equal(*pair) for pair in zip(before, after, strict=True)] == [True, False, True]


@pytest.mark.parametrize("n_bins", [1, 11])
def test_loss_is_squared_error_or_cross_entropy(n_bins: int) -> None:
    ensemble = make_ensemble(n_bins=n_bins)
    outputs, targets = th.randn(3, B, n_bins), th.linspace(-5, 5, B)
    loss = ensemble.loss(outputs, targets)
    assert loss.shape == (3, B)
    if n_bins == 1:
        th.testing.assert_close(loss, (outputs[..., 0] - targets) ** 2)
    else:
        assert ensemble.bins is not None
        expected = F.cross_entropy(outputs.flatten(0, 1), ensemble.bins.project(targets).repeat(3, 1), reduction="none")
        th.testing.assert_close(loss.flatten(), expected)


@pytest.mark.parametrize("n_bins", [51, 101])
@th.no_grad()
def test_fresh_distributions_are_near_zero(n_bins: int) -> None:
    """And certain of it, where bins all alike would make values of the size of the largest."""
    th.manual_seed(0)
    ensemble = CriticEnsemble(2, F_DIM, A, [16], nn.SiLU, n_bins=n_bins, max_value=200.0)
    features, actions = inputs()
    assert ensemble(ensemble.encode(features), actions).abs().max() < 1


@pytest.mark.parametrize("net_arch", [[16, 8], [16], []], ids=str)
@pytest.mark.parametrize("limit", [False, True])
@th.no_grad()
def test_noise_predictor_is_an_mlp_on_the_concatenated_input(limit: bool, net_arch: list[int]) -> None:
    th.manual_seed(0)
    predictor = NoisePredictor(F_DIM, A, 7, net_arch, nn.SiLU, limit_features=limit)
    predictor.eval()
    assert isinstance(predictor.norm, NormLimit) == limit
    for name, value in predictor.state_dict().items():
        if "bias" in name or "running" in name:
            value.add_(0.3 * th.rand_like(value))
    features, x_t = inputs(N)
    t = th.randint(7, (B, N))
    rows = predictor.encode_time()
    assert rows.shape == (7, net_arch[0] if net_arch else A)
    found = predictor(predictor.encode(features).unsqueeze(1), x_t, rows[t])
    embedded = predictor.time_mlp(sinusoidal_embedding(7))[t]
    whole = th.cat([predictor.norm(features).unsqueeze(1).expand(-1, N, -1), x_t, embedded], dim=-1)
    th.testing.assert_close(found, predictor.rest(predictor.first(whole)), rtol=1e-4, atol=1e-5)
    th.testing.assert_close(predictor(predictor.encode(features), x_t[:, 0], rows[t[:, 0]]), found[:, 0])


def test_embedding_by_hand() -> None:
    """Sines and cosines, slower and slower, of a common length; no two steps alike."""
    table = sinusoidal_embedding(50)
    assert table.shape == (50, TIME_DIM)
    for t in (0, 1, 49):
        angles = [t / 10_000 ** (2 * i / TIME_DIM) for i in range(TIME_DIM // 2)]
        expected = [function(angle) / TIME_DIM**0.5 for function in (math.sin, math.cos) for angle in angles]
        th.testing.assert_close(table[t], th.tensor(expected), rtol=1e-5, atol=1e-6)
    assert (th.cdist(table, table) + th.eye(50)).min() > 1e-3
    th.testing.assert_close(table.norm(dim=1), th.full((50,), 0.5**0.5))


def test_weights_begin_as_haikus() -> None:
    """Truncated at two standard deviations of 1 / sqrt(inputs), and biases at zero."""
    weight = th.empty(400, 100)
    lecun_normal_(weight, 100)
    assert weight.abs().max() <= 0.2 and weight.std().item() == pytest.approx(0.088, rel=0.02)  # what truncation leaves
    for network in (NoisePredictor(F_DIM, A, 7, [16], nn.SiLU), CriticEnsemble(2, F_DIM, A, [16], nn.SiLU)):
        biases = [value for name, value in network.named_parameters() if name.endswith("bias")]
        assert biases and all((value == 0).all() for value in biases)


def test_last_layer_stays_float32_under_autocast() -> None:
    dtypes = []

    def layer(x: th.Tensor) -> th.Tensor:
        dtypes.append((x.dtype, th.is_autocast_enabled("cpu")))
        return x

    x = th.zeros(2, 3, dtype=th.bfloat16)
    with th.autocast("cpu", dtype=th.bfloat16):
        assert last_in_float32([layer, layer], x).dtype == th.float32
        assert last_in_float32([], x).dtype == th.float32
    assert dtypes == [(th.bfloat16, True), (th.float32, False)]
    last_in_float32([layer], x)
    assert dtypes[-1] == (th.bfloat16, False)


@pytest.mark.parametrize("given, used", [(nn.Mish, Mish), (nn.Tanh, nn.Tanh)])
def test_mish_is_ours(given: type[nn.Module], used: type[nn.Module]) -> None:
    predictor, ensemble = NoisePredictor(F_DIM, A, 7, [16], given), make_ensemble(activation_fn=given)
    modules = [*predictor.modules(), *ensemble.modules()]
    assert sum(type(module) is used for module in modules) == 4
    assert given is used or not any(type(module) is given for module in modules)


@pytest.mark.parametrize("n_actions", [None, 1, 4])
@th.no_grad()
def test_no_observation_at_all(n_actions: int | None) -> None:
    for kwargs in ENSEMBLES:
        ensemble = make_ensemble(**kwargs)
        shape = (0,) if n_actions is None else (0, n_actions)
        assert ensemble(ensemble.encode(th.zeros(0, F_DIM)), th.zeros(*shape, A)).shape == (3, *shape)


@pytest.mark.parametrize("n_bins", [1, 11])
@th.no_grad()
def test_running_statistics_approach_those_of_the_batch(n_bins: int) -> None:
    """Folded into the layers they give what normalising the batch itself gives, once they have seen enough of it."""
    ensemble = make_ensemble(batch_norm=True, n_bins=n_bins)
    features, actions = 3 * th.randn(4096, F_DIM) + 1, 2 * th.rand(4096, A) - 1
    before = ensemble(ensemble.encode(features), actions)
    for _ in range(1000):
        values = ensemble.values(ensemble.normalise_batch(features, actions))
    assert (before - values).abs().max() > 0.1
    th.testing.assert_close(ensemble(ensemble.encode(features), actions), values, rtol=1e-3, atol=2e-3)


@th.no_grad()
def test_few_rows_are_normalised_like_many() -> None:
    """Layers scale their inputs where these are fewer than the weights, and else their weights; the values are the same."""
    ensemble = make_ensemble(batch_norm=True)
    features, actions = 3 * th.randn(64, F_DIM) + 1, 2 * th.rand(64, A) - 1
    many = ensemble(ensemble.encode(features), actions)
    few = [ensemble(ensemble.encode(features[i : i + 2]), actions[i : i + 2]) for i in range(0, 64, 2)]
    th.testing.assert_close(th.cat(few, dim=1), many, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("kwargs", ENSEMBLES, ids=str)
def test_outputs_by_difference_are_the_outputs(kwargs: dict[str, Any]) -> None:
    """And so is the gradient of each with respect to its own action, among them the first, from which the others differ."""
    ensemble = make_ensemble(**kwargs)
    features, actions = inputs(N)
    results = []
    for outputs in (ensemble.outputs, ensemble.outputs_by_difference):
        x = actions.clone().requires_grad_()
        found = outputs(ensemble.encode(features), x)
        results.append((found, *th.autograd.grad(ensemble.values(found).sum(), x)))
    th.testing.assert_close(results[1], results[0], rtol=1e-4, atol=1e-5)


@pytest.mark.skipif(not has_bfloat16(th.device("cpu")), reason="products of float32 are not rounded on this processor")
@pytest.mark.parametrize("n_bins", [1, 101])
@th.no_grad()
def test_rounded_products_keep_differences(n_bins: int) -> None:
    """Of values that lie close together far from 0, where their distributions are worth hundreds."""
    ensemble = make_ensemble(batch_norm=True, n_bins=n_bins, max_value=200.0, net_arch=[64, 64])
    features, actions = inputs(N)
    results = []
    for rounded in (False, True):
        with rounded_products(rounded):
            encoded = ensemble.encode(features)
            results.append(ensemble.values(ensemble.outputs_by_difference(encoded, actions)))
    exact, found = ((values - values[..., :1])[..., 1:] for values in results)
    assert not th.equal(exact, found)
    assert (found - exact).square().mean() < 0.02**2 * exact.square().mean()
