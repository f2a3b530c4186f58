"""What the log says of the training, and whether anything is read back from the device."""

from collections import deque
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any
from unittest.mock import patch

import torch as th
from torch.utils._python_dispatch import TorchDispatchMode

from sb3_sdac import SDAC


def logged(model: SDAC) -> dict[str, float]:
    """
    Write the log now.

    :param model: has a logger; it need not have learned in an environment
    :return: what was written by the names after ``train/``, where metrics are means since the log before
    """
    if model.ep_info_buffer is None:  # SB3 makes both when `learn` begins
        model.ep_info_buffer, model.ep_success_buffer = deque(), deque()
    written: dict[str, float] = {}
    dump = model.logger.dump

    def keep(step: int = 0) -> None:
        written.update(model.logger.name_to_value)
        dump(step)

    with patch.object(model.logger, "dump", keep):
        model.dump_logs()
    return {name.removeprefix("train/"): value for name, value in written.items() if name.startswith("train/")}


#: Their result, or its shape, depends on numbers: PyTorch's item(), masks
READING = {th.ops.aten._local_scalar_dense, th.ops.aten.nonzero, th.ops.aten.masked_select, th.ops.aten.is_nonzero}


class _Refuse(TorchDispatchMode):
    def __init__(self, is_exempt: Callable[[th.Tensor], bool]):
        super().__init__()
        self.is_exempt = is_exempt

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        by_mask = func.overloadpacket in (th.ops.aten.index, th.ops.aten.index_put, th.ops.aten.index_put_) and any(
            index is not None and index.dtype == th.bool for index in args[1]
        )
        if by_mask or (func.overloadpacket in READING and not self.is_exempt(args[0])):
            raise AssertionError(f"{func.overloadpacket} was called")
        return func(*args, **(kwargs or {}))


@contextmanager
def nothing_read_back(is_exempt: Callable[[th.Tensor], bool] = lambda tensor: False) -> Iterator[None]:
    """
    :param is_exempt: of tensors whose numbers may be read, as they are on the CPU whatever the device
    :raises AssertionError: where a number is read, a mask is an index, or a tensor goes to the host
    """

    def refuse(name: str) -> Callable[..., Any]:
        def read(*args: Any, **kwargs: Any) -> Any:
            raise AssertionError(f"{name} was called")

        return read

    host: dict[str, Any] = {name: refuse(name) for name in ("tolist", "numpy", "cpu", "__array__")}
    with patch.multiple(th.Tensor, **host), _Refuse(is_exempt):
        yield
