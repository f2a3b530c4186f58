"""
What costs less than PyTorch's eager mode: a compiled function, and whole updates and predictions replayed as CUDA graphs.

Neither knows what it speeds up, and neither is ever part of a saved model.
"""

import warnings
from collections.abc import Callable, Hashable, Sequence
from typing import Any

import torch as th
from torch.utils import _pytree as pytree

#: Calls made as they are before one is recorded, so that optimizers, libraries and the compiler have set themselves up
WARM_UP = 3
#: What comes in more shapes than this is not worth the memory
MAX_GRAPHS = 32


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
    :param optimizer: its learning rate may be a tensor, as :class:`Graphed` needs it
    :param learning_rate: what to set it to
    """
    for group in optimizer.param_groups:
        if isinstance(group["lr"], th.Tensor):
            group["lr"].fill_(learning_rate)
        else:
            group["lr"] = learning_rate


class Graphed:
    """
    A function of tensors, recorded once as a CUDA graph and replayed from then on: one launch instead of hundreds.

    The function must do all its work on the device, read no number back, and change nothing but tensors in place. What else it
    depends on, it is called with as ``flags``, or it comes from ``depends_on``; each combination is recorded when it has come
    a few times. A function that cannot be recorded runs as it is from then on, after a warning. After PyTorch's notes on CUDA
    semantics, "Whole-network capture".

    Copied or pickled it has no recordings: they are of one process and of the tensors they were made with.

    :param function: called with a batch (tensors in tuples and dicts) and the flags, returns tensors
    :param optimizers: all that step inside it, made capturable here; their saved state is that of ordinary ones
    :param depends_on: numbers and the like that a recording holds as they were
    """

    def __init__(
        self,
        function: Callable[..., Any],
        optimizers: Sequence[th.optim.Optimizer] = (),
        depends_on: Callable[[], Hashable] = tuple,
    ):
        self.function = function
        self.optimizers = optimizers
        self.depends_on = depends_on
        self._graphs: dict[Hashable, tuple[Any, list[Any], Any]] = {}
        self._n_calls: dict[Hashable, int] = {}
        self._pool: Any = None
        self._fails = False
        for optimizer in optimizers:
            # A saved model may be loaded on a machine without CUDA
            optimizer.register_state_dict_post_hook(lambda _, state_dict: _make_ordinary(state_dict["param_groups"]))

    def __reduce__(self) -> Any:
        return Graphed, (self.function, self.optimizers, self.depends_on)

    def __call__(self, batch: Any, *flags: Hashable) -> Any:
        """
        :param batch: what is in it besides tensors counts as flags
        :param flags: further arguments of the function
        :return: what the function returns; valid until the next call
        """
        leaves, structure = pytree.tree_flatten(batch)
        with th.cuda.device(next(leaf.device for leaf in leaves if isinstance(leaf, th.Tensor))):
            return self._replay(leaves, structure, flags)

    def _replay(self, leaves: list[Any], structure: Any, flags: tuple[Hashable, ...]) -> Any:
        shapes = ((leaf.shape, leaf.dtype) if isinstance(leaf, th.Tensor) else leaf for leaf in leaves)
        key = (flags, self.depends_on(), *shapes)
        if key not in self._graphs:
            batch = pytree.tree_unflatten(leaves, structure)
            if not self._is_worth_recording(key):
                return self._on_side_stream(batch, *flags)
            try:
                self._graphs[key] = self._record(leaves, structure, flags)
            except Exception as error:  # of CUDA, of an optimizer that cannot be captured, of whatever the function calls
                self._fails = True
                for optimizer in self.optimizers:
                    _make_ordinary(optimizer.param_groups)
                warnings.warn(
                    "compile='auto' or True: CUDA cannot record this model as a graph, so it runs as it is, and slower; "
                    f"compile=False does not try: {error}",
                    stacklevel=2,
                )
                return self._on_side_stream(batch, *flags)
        graph, static, output = self._graphs[key]
        for mine, given in zip(static, leaves, strict=True):
            if isinstance(given, th.Tensor):
                mine.copy_(given)
        graph.replay()
        return output

    def _is_worth_recording(self, key: Hashable) -> bool:
        """When it has come before, and there is room."""
        if len(self._n_calls) > 100 * MAX_GRAPHS:  # of a number that is another one each time
            self._n_calls.clear()
        self._n_calls[key] = self._n_calls.get(key, 0) + 1
        return self._n_calls[key] > WARM_UP and len(self._graphs) < MAX_GRAPHS and not self._fails

    def _on_side_stream(self, batch: Any, *flags: Hashable) -> Any:
        # Recording happens on another stream than the default one, so what is set up lazily has to be set up for that
        current, side = th.cuda.current_stream(), th.cuda.Stream()
        side.wait_stream(current)
        with th.cuda.stream(side):
            output = _detached(self.function(batch, *flags))
        current.wait_stream(side)
        return output

    def _record(self, leaves: list[Any], structure: Any, flags: tuple[Hashable, ...]) -> tuple[Any, list[Any], Any]:
        for optimizer in self.optimizers:
            _make_capturable(optimizer)
        static = [leaf.clone() if isinstance(leaf, th.Tensor) else leaf for leaf in leaves]
        for optimizer in self.optimizers:
            optimizer.zero_grad(set_to_none=True)  # the gradients are to be in the graph's own memory
        th.cuda.synchronize()
        graph, current = th.cuda.CUDAGraph(), th.cuda.current_stream()
        try:
            with th.cuda.graph(graph, pool=self._pool):
                output = self.function(pytree.tree_unflatten(static, structure), *flags)
        except Exception:
            # What PyTorch leaves behind: another stream, and a generator that counts for the graph that there is none of
            th.cuda.set_stream(current)
            generator = th.cuda.default_generators[current.device_index]
            generator.graphsafe_set_state(generator.clone_state())
            raise
        self._pool = graph.pool()
        return graph, static, _detached(output)


def _detached(output: Any) -> Any:
    """Else it would keep what gradients are accumulated in, and with that the stream of this call."""
    return pytree.tree_map_only(th.Tensor, th.Tensor.detach, output)


def _make_capturable(optimizer: th.optim.Optimizer) -> None:
    """Numbers that change between updates become tensors on the device, which a graph reads anew each time."""
    for group in optimizer.param_groups:
        group["capturable"] = True
        if not isinstance(group["lr"], th.Tensor):
            group["lr"] = th.tensor(group["lr"], device=group["params"][0].device)
    for parameter, state in optimizer.state.items():
        if "step" in state:
            state["step"] = th.as_tensor(state["step"], dtype=th.float32, device=parameter.device)


def _make_ordinary(param_groups: list[dict[str, Any]]) -> None:
    """The other way round, but for the steps, whose device optimizers choose when they load them."""
    for group in param_groups:
        if isinstance(group["lr"], th.Tensor):
            group.update(lr=group["lr"].item(), capturable=False)
