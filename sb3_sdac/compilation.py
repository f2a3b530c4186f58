"""
What costs less than PyTorch's eager mode: a compiled function, whole updates and predictions replayed as CUDA graphs, and
settings of the processor.

Nothing here knows what it speeds up, what it speeds up does not know of it, and none of it is ever part of a saved model.
"""

import gc
import os
import shutil
import sys
import threading
import warnings
import weakref
from collections.abc import Callable, Hashable, Iterator, Sequence
from contextlib import contextmanager, suppress
from typing import Any, ClassVar

import torch as th
from torch.utils import _pytree as pytree

#: Calls made as they are before one is captured, so that optimizers, libraries and the compiler have set themselves up
WARM_UP = 3
#: Graphs kept; when there is another one, the oldest goes
MAX_GRAPHS = 32


def has_compiler() -> bool:
    """:return: whether there is a C++ compiler for ``torch.compile`` on a CPU"""
    candidates = [os.environ.get("CXX"), "g++", "clang++", "c++", "cl"]
    return any(candidate and shutil.which(candidate) for candidate in candidates)


class Compiled:
    """
    ``torch.compile`` at the first call; where that fails (no C++ compiler) one warning, and the function as it is.

    :param function: of tensors whose shapes hardly ever change, as each new one is compiled anew. Its random numbers stay
        those of PyTorch's generator
    """

    def __init__(self, function: Callable[..., Any]):
        self.function = function
        self._active: Callable[..., Any] | None = None

    def __reduce__(self) -> Any:
        return Compiled, (self.function,)

    def __call__(self, *args: Any) -> Any:
        """
        :param args: the function's
        :return: what it returns
        """
        if self._active is not None:
            return self._active(*args)
        try:
            # Not before: this alone imports for seconds
            fast = th.compile(self.function, dynamic=False, options={"fallback_random": True})
            result = fast(*args)
            self._active = fast
        except Exception as error:  # of many types; one of the function itself comes again in the next line
            result = self.function(*args)
            self._active = self.function
            name = getattr(self.function, "__name__", type(self.function).__name__)
            warnings.warn(
                f"torch.compile fails here, so {name} runs as it is, and slower; compile=False does not try: {error!r}",
                stacklevel=2,
            )
        return result


@contextmanager
def denormals_flushed() -> Iterator[None]:
    """
    Numbers below float32's smallest normal one, 1.2e-38, count as 0. Processors are slow with them, and SiLU has such
    derivatives at inputs below -88: they made updates five times as long (docs/what_we_tried.md, "The order
    of normalisation and activation").
    """
    were_flushed = sys.float_info.min / 2 == 0
    th.set_flush_denormal(True)
    try:
        yield
    finally:
        th.set_flush_denormal(were_flushed)


@contextmanager
def rounded_products(enabled: bool) -> Iterator[None]:
    """
    Matrix products of float32 round their inputs to bfloat16 (on CUDA TF32), add up in float32 and give float32, so that
    nothing else is converted: ``torch.set_float32_matmul_precision("medium")``.

    :param enabled: or else nothing changes
    """
    before = th.get_float32_matmul_precision()
    th.set_float32_matmul_precision("medium" if enabled else before)
    try:
        yield
    finally:
        th.set_float32_matmul_precision(before)


def has_bfloat16(device: th.device) -> bool:
    """
    :param device: where the networks are
    :return: whether matrix products in bfloat16 are faster there than in float32
    """
    if device.type == "cuda":
        with th.cuda.device(device):  # it is asked of the current one
            return th.cuda.is_bf16_supported(including_emulation=False)
    if device.type != "cpu":
        return False
    # Not public, so they may go
    probes = [getattr(th.cpu, name, None) for name in ("_is_avx512_bf16_supported", "_is_amx_tile_supported")]
    return any(probe is not None and probe() for probe in probes)


def keep_freed_memory() -> None:
    """
    Make glibc keep large blocks instead of giving them back to the system at once: new pages cost more than the arithmetic
    on them. It does so from when it has seen one of nearly 32 MiB freed (mallopt(3), M_MMAP_THRESHOLD); 2,000 page faults
    per update less.
    """
    th.empty(2**25 - 2**16, dtype=th.uint8)


def addresses(module: th.nn.Module) -> tuple[int, ...]:
    """
    For the key of :class:`Graphed`: a graph reads where its tensors were when it was captured.

    :param module: a network
    :return: where its parameters and buffers are
    """
    tensors = (t for part in module.modules() for t in (*part._parameters.values(), *part._buffers.values()))
    return tuple(tensor.data_ptr() for tensor in tensors if tensor is not None)


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
    A function of tensors, captured once as a CUDA graph and replayed from then on: one launch instead of hundreds.

    The function must do all its work on the device, read no number back, and change nothing but tensors in place. What else it
    depends on, it is called with as ``flags``, or ``key`` tells; each combination is captured when it has come a few times. A
    function that cannot be captured runs as it is from then on, after a warning. After PyTorch's notes on CUDA semantics,
    "Whole-network capture".

    Copied or pickled it has no graphs: they are of one process and of the tensors they were captured with.

    :param function: called with a batch (tensors in tuples and dicts) and the flags, returns tensors
    :param optimizers: all that step inside it, made capturable here; their saved state is that of ordinary ones
    :param key: tells the numbers and the like that a graph holds as they were
    """

    #: All there are, for :meth:`_clean_up`
    _live: ClassVar["weakref.WeakSet[Graphed]"] = weakref.WeakSet()

    def __init__(
        self,
        function: Callable[..., Any],
        optimizers: Sequence[th.optim.Optimizer] = (),
        key: Callable[[], Hashable] = tuple,
    ):
        self.function = function
        self.optimizers = optimizers
        self.key = key
        self._graphs: dict[Hashable, tuple[Any, list[Any], Any]] = {}
        self._n_calls: dict[Hashable, int] = {}
        self._held: list[Any] = []
        self._pool: Any = None
        self._stream: Any = None
        self._failed: Any = None
        self._lock = threading.Lock()
        self._live.add(self)
        for optimizer in optimizers:
            _make_ordinary(optimizer.param_groups)  # the copy of a captured one
            # A saved model may be loaded on a machine without CUDA
            optimizer.register_state_dict_post_hook(lambda _, state_dict: _make_ordinary(state_dict["param_groups"]))

    def __reduce__(self) -> Any:
        return Graphed, (self.function, self.optimizers, self.key)

    def clear(self) -> None:
        """Forget all graphs; what comes again is captured anew, after calls in which optimizers may set themselves up anew."""
        self._graphs.clear()
        self._n_calls.clear()
        self._held = []
        self._pool = None

    def copied(self, batch: Any, *flags: Hashable) -> Any:
        """
        As a call, but from any thread, in any mode, and what it returns is the caller's for good.

        :param batch: see :meth:`__call__`
        :param flags: see :meth:`__call__`
        :return: what the function returns
        """
        # A graph holds the modes it was captured in
        if th.is_grad_enabled() or th.is_inference_mode_enabled() or th.is_autocast_enabled("cuda"):
            return self.function(batch, *flags)
        with self._lock:
            return pytree.tree_map_only(th.Tensor, th.Tensor.clone, self(batch, *flags))

    def __call__(self, batch: Any, *flags: Hashable) -> Any:
        """
        :param batch: what is in it besides tensors counts as flags
        :param flags: further arguments of the function
        :return: what the function returns; valid until the next call
        """
        leaves, structure = pytree.tree_flatten(batch)
        tensors = [leaf for leaf in leaves if isinstance(leaf, th.Tensor)]
        others = [leaf for leaf in leaves if not isinstance(leaf, th.Tensor)]
        if not tensors or not all(tensor.is_cuda for tensor in tensors):  # moved since, or a copy that was
            return self.function(batch, *flags)
        if self._failed or not all(isinstance(leaf, (int, float, str, type(None))) for leaf in others):
            return self.function(batch, *flags)
        # The structure for the order of the keys of a dict
        key = (flags, self.key(), repr(structure), *others, *((leaf.shape, leaf.dtype) for leaf in tensors))
        with th.cuda.device(tensors[0].device):
            if self._is_outdated(tensors[0].device):
                self.clear()
            if key not in self._graphs:
                self._stream = self._stream or th.cuda.Stream()
                if not self._has_come_before(key):
                    return self._warm_up(batch, flags)
                try:
                    self._capture(key, leaves, structure, flags)
                except Exception as error:  # of CUDA, of an optimizer that is not capturable, of whatever the function calls
                    warnings.warn(
                        "compile='auto' or True: CUDA cannot capture this model as a graph, so it runs as it is, and slower; "
                        f"compile=False does not try: {error}",
                        stacklevel=2,
                    )
            if self._failed:  # said here, where the error and what its traceback holds are gone
                return self.function(batch, *flags)
            graph, static, output = self._graphs[key]
            for mine, given in zip(static, leaves, strict=True):
                if isinstance(given, th.Tensor):
                    mine.copy_(given)
            graph.replay()
        return output

    def _is_outdated(self, device: th.device) -> bool:
        """Whether graphs are of another device, or of tensors that optimizers have replaced since."""
        if self._stream is not None and self._stream.device != device:
            self._stream = None
            return True
        now = self._optimizer_tensors() if self._graphs else []
        return len(now) != len(self._held) or any(mine is not held for mine, held in zip(now, self._held, strict=True))

    def _optimizer_tensors(self) -> list[Any]:
        """What a captured update reads and writes in its optimizers, at these addresses."""
        rates = [group["lr"] for optimizer in self.optimizers for group in optimizer.param_groups]
        states = [state for optimizer in self.optimizers for state in optimizer.state.values()]
        return [*rates, *(value for state in states for value in state.values())]

    def _has_come_before(self, key: Hashable) -> bool:
        if len(self._n_calls) > 100 * MAX_GRAPHS:  # of a number that is another one each time
            self._n_calls.clear()
        self._n_calls[key] = self._n_calls.get(key, 0) + 1
        return self._n_calls[key] > WARM_UP

    def _warm_up(self, batch: Any, flags: tuple[Hashable, ...]) -> Any:
        # On the stream that captures, so that what is set up lazily is set up for that
        current = th.cuda.current_stream()
        self._stream.wait_stream(current)
        with th.cuda.stream(self._stream):
            output = _detached(self.function(batch, *flags))
        current.wait_stream(self._stream)
        return output

    def _capture(self, key: Hashable, leaves: list[Any], structure: Any, flags: tuple[Hashable, ...]) -> None:
        if len(self._graphs) == MAX_GRAPHS:
            oldest = next(iter(self._graphs))
            del self._graphs[oldest]
            self._n_calls.pop(oldest, None)
        for optimizer in self.optimizers:
            _make_capturable(optimizer)
            optimizer.zero_grad(set_to_none=True)  # the gradients are to be in the graph's own memory
        static = [leaf.clone() if isinstance(leaf, th.Tensor) else leaf for leaf in leaves]
        self._pool = self._pool or th.cuda.graph_pool_handle()
        graph, current = th.cuda.CUDAGraph(), th.cuda.current_stream()
        try:
            with _no_garbage_collection(), th.cuda.graph(graph, pool=self._pool, stream=self._stream):
                output = self.function(pytree.tree_unflatten(static, structure), *flags)
        except Exception:
            self._clean_up(graph, current)
            raise
        self._graphs[key] = graph, static, _detached(output)
        self._held = self._optimizer_tensors()

    def _clean_up(self, graph: Any, current: Any) -> None:
        """What PyTorch leaves behind when a capture fails."""
        self._failed = graph  # kept, as the allocator may go on asking it
        with suppress(RuntimeError):  # from PyTorch 2.13 on it is done
            # Or the allocator would take this capture for one under way, and allow no other one in this process
            th._C._cuda_endAllocateToPool(current.device_index, self._pool)
        th.cuda.set_stream(current)
        # The generator counts for the graph that there is none of. Graphs captured before draw from the one replaced here
        generator = th.cuda.default_generators[current.device_index]
        generator.graphsafe_set_state(generator.clone_state())
        for graphed in self._live:
            graphed.clear()
        for optimizer in self.optimizers:
            _make_ordinary(optimizer.param_groups)


@contextmanager
def _no_garbage_collection() -> Iterator[None]:
    """A graph of another model that is destroyed within a capture makes it fail (PyTorch's issue 161037)."""
    gc.collect()
    was_enabled = gc.isenabled()
    gc.disable()
    try:
        yield
    finally:
        if was_enabled:
            gc.enable()


def _detached(output: Any) -> Any:
    """Else it would keep what gradients are accumulated in, and with that the stream of this call."""
    return pytree.tree_map_only(th.Tensor, th.Tensor.detach, output)


def _make_capturable(optimizer: th.optim.Optimizer) -> None:
    """Numbers that change between updates become tensors on the device, which a graph reads anew each time."""
    for group in optimizer.param_groups:
        group["capturable"] = True
        if not isinstance(group["lr"], th.Tensor):
            group["lr"] = th.tensor(group["lr"], dtype=th.float32, device=group["params"][0].device)
    for parameter, state in optimizer.state.items():
        if "step" in state:
            state["step"] = th.as_tensor(state["step"], dtype=th.float32, device=parameter.device)


def _make_ordinary(param_groups: list[dict[str, Any]]) -> None:
    """The other way round, but for the steps: those of optimizers that are not fused stay where they are, which costs time."""
    for group in param_groups:
        if isinstance(group["lr"], th.Tensor):
            group.update(lr=group["lr"].item(), capturable=False)
