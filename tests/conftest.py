"""
Tests run on one torch thread: with two, small networks are ten to fifty times slower on a busy machine.

And they are the same on every machine: ``pytest`` sees no GPU, ``pytest -m cuda`` runs the tests that need one, and no others.
"""

import os

import pytest
import torch as th

th.set_num_threads(1)


def pytest_configure(config: pytest.Config) -> None:
    """Before anything of CUDA is set up."""
    if "cuda" not in config.getoption("markexpr"):
        os.environ["CUDA_VISIBLE_DEVICES"] = ""


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """On a GPU, PyTorch warns of what it does itself: of old functions, of what would be faster, of a debugging aid."""
    for item in items:
        if item.get_closest_marker("cuda"):
            for message in (".*torch.jit.script_method", "TensorFloat32 tensor cores", "Synchronization debug mode"):
                item.add_marker(pytest.mark.filterwarnings(f"ignore:{message}"))


def pytest_runtest_setup(item: pytest.Item) -> None:
    if item.get_closest_marker("cuda") and not th.cuda.is_available():
        pytest.skip("needs a GPU, and pytest -m cuda")
