"""
Updates that cost less than PyTorch's eager mode: a compiled function, and whole updates replayed as CUDA graphs.

Neither knows what it speeds up. Both are only used with ``compile=True``, and neither is ever part of a saved model.
"""

import warnings
from collections.abc import Callable, Hashable
from typing import Any

import torch as th
from torch.utils import _pytree as pytree

#: Updates made as they are before the first is recorded, so that optimizers, libraries and the compiler have set themselves up
WARM_UP = 3


def compiled(function: Callable[..., th.Tensor]) -> Callable[..., th.Tensor]:
    """
    ``torch.compile`` at the first call; where that fails (no C++ compiler) one warning, and the function as it is.

    :param function: of tensors whose shapes hardly ever change, as each new one is compiled anew
    :return: the same, faster
    """
    active: Callable[..., th.Tensor] | None = None

    def call(*args: th.Tensor) -> th.Tensor:
        nonlocal active
        if active is not None:
            return active(*args)
        try:
            fast = th.compile(function, dynamic=False)  # not before: this alone imports for seconds
            result = fast(*args)
            active = fast
        except Exception as error:  # of many types; one of the function itself comes again in the next line
            result = function(*args)
            active = function
            warnings.warn(f"compile=True: torch.compile fails here, the function runs as it is: {error!r}", stacklevel=2)
        return result

    return call


def set_learning_rate(optimizer: th.optim.Optimizer, learning_rate: float) -> None:
    """
    :param optimizer: its learning rate may be a tensor, as :class:`GraphedUpdate` needs it
    :param learning_rate: what to set it to
    """
    for group in optimizer.param_groups:
        if isinstance(group["lr"], th.Tensor):
            group["lr"].fill_(learning_rate)
        else:
            group["lr"] = learning_rate


class GraphedUpdate:
    """
    An update recorded once as a CUDA graph and replayed from then on: one launch instead of thousands.

    The update must do all its work on the device, read no number back, and change nothing but tensors in place. What it
    branches on is passed as ``flags``; every combination of them is recorded when it first comes. After PyTorch's notes on
    CUDA semantics, "Whole-network capture".

    :param update: called with a batch (tensors in tuples and dicts) and the flags, returns tensors in a dict
    :param optimizers: all that step inside it, made capturable here; their saved state is that of ordinary ones
    """

    def __init__(self, update: Callable[..., dict[str, th.Tensor]], optimizers: list[th.optim.Optimizer]):
        self.update = update
        self.optimizers = optimizers
        self._graphs: dict[Hashable, tuple[Any, list[th.Tensor], dict[str, th.Tensor]]] = {}
        self._n_calls: dict[Hashable, int] = {}
        self._pool: Any = None
        for optimizer in optimizers:
            optimizer.register_state_dict_post_hook(_make_ordinary)

    def __call__(self, batch: Any, *flags: bool) -> dict[str, th.Tensor]:
        """
        :param batch: of the same shapes as ever, or it is recorded anew
        :param flags: what the update branches on
        :return: what the update returns; valid until the next call
        """
        tensors, structure = pytree.tree_flatten(batch)
        constants = tuple(value for value in tensors if not isinstance(value, th.Tensor))
        shapes = tuple((value.shape, value.dtype) for value in tensors if isinstance(value, th.Tensor))
        key = (flags, constants, shapes)
        n_calls = self._n_calls.get(key, 0)
        self._n_calls[key] = n_calls + 1
        if n_calls < WARM_UP:
            return self._on_side_stream(batch, *flags)
        if key not in self._graphs:
            self._graphs[key] = self._record(tensors, structure, flags)
        graph, static, metrics = self._graphs[key]
        for mine, given in zip(static, tensors, strict=True):
            if isinstance(given, th.Tensor):
                mine.copy_(given)
        graph.replay()
        return metrics

    def _on_side_stream(self, batch: Any, *flags: bool) -> dict[str, th.Tensor]:
        # Recording happens on another stream than the default one, so what is set up lazily has to be set up for that
        current, side = th.cuda.current_stream(), th.cuda.Stream()
        side.wait_stream(current)
        with th.cuda.stream(side):
            metrics = self.update(batch, *flags)
        current.wait_stream(side)
        return metrics

    def _record(self, tensors: list[Any], structure: Any, flags: tuple[bool, ...]) -> Any:
        for optimizer in self.optimizers:
            _make_capturable(optimizer)
        static = [value.clone() if isinstance(value, th.Tensor) else value for value in tensors]
        for optimizer in self.optimizers:
            optimizer.zero_grad(set_to_none=True)  # the gradients are to be in the graph's own memory
        th.cuda.synchronize()
        graph = th.cuda.CUDAGraph()
        with th.cuda.graph(graph, pool=self._pool):
            metrics = self.update(pytree.tree_unflatten(static, structure), *flags)
        self._pool = graph.pool()
        return graph, static, {name: value.detach() for name, value in metrics.items()}


def _make_capturable(optimizer: th.optim.Optimizer) -> None:
    """Numbers that change between updates become tensors, which a graph reads anew each time."""
    for group in optimizer.param_groups:
        group["capturable"] = True
        if not isinstance(group["lr"], th.Tensor):
            group["lr"] = th.tensor(group["lr"], device=group["params"][0].device)


def _make_ordinary(optimizer: th.optim.Optimizer, state_dict: dict[str, Any]) -> None:
    """For a saved model, which may be loaded on a machine without CUDA."""
    for group in state_dict["param_groups"]:
        if isinstance(group["lr"], th.Tensor):
            group.update(lr=group["lr"].item(), capturable=False)
