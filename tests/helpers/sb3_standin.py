"""
Runs Stable-Baselines3's own published tests with SDAC standing in for SAC: ``python tests/helpers/sb3_standin.py``.

The tests come from the source distribution of the installed version of SB3 (pip downloads it). ``--algo
sb3_contrib:TQC`` runs the same selection with TQC, to compare. The twelve of :data:`EXPECTED` fail with SDAC, and must.
"""

import argparse
import importlib
import os
import subprocess
import sys
import tarfile
import tempfile
from pathlib import Path

import pytest
import stable_baselines3
from stable_baselines3.common.base_class import BaseAlgorithm

FILES = (
    "run save_load predict deterministic spaces dict_env train_eval_mode n_step_replay callbacks vec_normalize her identity "
    "cnn custom_policy tensorboard"
).split()

#: Tests that fail with SDAC, by a part of their name, and why
EXPECTED = {
    **dict.fromkeys(
        (
            *(
                "test_run.py::test_offpolicy_multi_env",
                "test_spaces.py::test_sde_multi_dim",
                "test_her.py::test_save_load[T",
            ),
            *("test_save_load_policy[True-MlpPolicy", "test_save_load_policy[True-CnnPolicy"),
        ),
        "it uses gSDE, which SDAC refuses",
    ),
    **dict.fromkeys(
        (
            *("test_sac_train_with_batch_norm", "test_offpolicy_collect_rollout_batch_norm"),
            *("test_predict_with_dropout_batch_norm[Pendulum-v1", "test_cnn.py::test_features_extractor_target_net"),
        ),
        "it looks into target critics, of which there are none by default",
    ),
    "test_n_steps_with_dict_obs[None": "it expects an AssertionError where SDAC raises a ValueError",
    "test_tensorboard.py::test_tensorboard[": "it expects SAC's name in the log's folder",
}

if "SB3_STANDIN" in os.environ:  # as a plugin of pytest, before the tests import SAC
    import torch as th

    th.set_num_threads(1)
    _module, _name = os.environ["SB3_STANDIN"].split(":")
    STANDIN: type[BaseAlgorithm] = getattr(importlib.import_module(_module), _name)
    stable_baselines3.SAC = STANDIN  # type: ignore[misc, assignment]


def concerns_sac(item: pytest.Function) -> bool:
    """Whether a test is parametrised with SAC, or names it without being parametrised with an algorithm."""
    values = list(getattr(getattr(item, "callspec", None), "params", {}).values())
    if any(value is STANDIN or (isinstance(value, str) and value == "sac") for value in values):
        return True
    other_algorithm = any(isinstance(value, type) and issubclass(value, BaseAlgorithm) for value in values)
    return not other_algorithm and "SAC" in item.function.__code__.co_names


def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Function]) -> None:
    """Keep the tests that concern SAC, and mark those that fail with SDAC."""
    kept = [item for item in items if concerns_sac(item)]
    config.hook.pytest_deselected(items=[item for item in items if item not in kept])
    items[:] = kept
    if STANDIN.__name__ == "SDAC":
        for item in items:
            reasons = [reason for part, reason in EXPECTED.items() if part in item.nodeid]
            if reasons:
                item.add_marker(pytest.mark.xfail(reason=reasons[0], strict=True))


def main() -> int:
    """Download, unpack, run."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--algo", default="sb3_sdac:SDAC", help="module:class that stands in for SAC")
    arguments, pytest_arguments = parser.parse_known_args()
    requirement = f"stable-baselines3=={stable_baselines3.__version__}"
    with tempfile.TemporaryDirectory() as folder:
        pip = [sys.executable, "-m", "pip", "download", "-q", "--no-deps", "--no-binary", "stable-baselines3", "-d", folder]
        subprocess.run([*pip, requirement], check=True)
        (archive,) = Path(folder).glob("*.tar.gz")
        with tarfile.open(archive) as tar:
            tar.extractall(folder, filter="data")
        (tests,) = Path(folder).glob("*/tests")
        environment = {
            **os.environ,
            "SB3_STANDIN": arguments.algo,
            "PYTHONPATH": os.pathsep.join([str(Path(__file__).parent), os.environ.get("PYTHONPATH", "")]),
        }
        command = [sys.executable, "-m", "pytest", "-q", "-rfEx", "-p", "sb3_standin", *pytest_arguments]
        return subprocess.run(
            [*command, *(f"tests/test_{name}.py" for name in FILES)], cwd=tests.parent, env=environment
        ).returncode


if __name__ == "__main__":
    sys.exit(main())
