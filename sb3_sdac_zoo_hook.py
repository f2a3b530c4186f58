"""
Makes ``python -m rl_zoo3.train --algo sdac`` work: registers SDAC with rl_zoo3 whenever rl_zoo3 is imported.

rl_zoo3 has no plugin mechanism, so ``sb3_sdac_zoo_hook.pth`` beside this file imports this module at every start of Python.
It therefore imports nothing that Python has not loaded by then, and all it does is to wait for a few modules of rl_zoo3; what
happens to them is written in :mod:`sb3_sdac.zoo`. The environment variable ``SB3_SDAC_NO_ZOO_HOOK=1`` switches it off.
"""

import os
import sys

TYPE_CHECKING = False  # what typing.TYPE_CHECKING is, without the import
if TYPE_CHECKING:
    from collections.abc import Sequence
    from importlib.machinery import ModuleSpec
    from types import ModuleType

#: The keys of ``sb3_sdac.zoo.REGISTRATIONS``
WATCHED = ("rl_zoo3.utils", "rl_zoo3.hyperparams_opt", "rl_zoo3.exp_manager")


class ZooFinder:
    """Leaves finding to the other finders of ``sys.meta_path``, and registers SDAC in the watched modules it sees pass by."""

    @classmethod
    def find_spec(
        cls, name: str, path: "Sequence[str] | None" = None, target: "ModuleType | None" = None
    ) -> "ModuleSpec | None":
        if name not in WATCHED:
            return None
        for finder in sys.meta_path:
            spec = finder.find_spec(name, path, target) if finder is not cls else None
            if spec is not None:
                register_after_execution(spec)
                return spec
        return None


def register_after_execution(spec: "ModuleSpec") -> None:
    """Makes the loader of a module call :func:`register` at the end."""
    loader = spec.loader
    if loader is None:  # a namespace package: nothing is executed
        return
    exec_module = loader.exec_module

    def exec_module_and_register(module: "ModuleType") -> None:
        exec_module(module)
        register(module)

    loader.exec_module = exec_module_and_register  # type: ignore[method-assign]


def register(module: "ModuleType") -> None:
    """Registers SDAC in a module of rl_zoo3. Should that fail, it warns, since other algorithms must not suffer from it."""
    try:
        from sb3_sdac.zoo import REGISTRATIONS

        REGISTRATIONS[module.__name__](module)
    except Exception as error:
        if getattr(error, "name", None) == "sb3_sdac":  # not installed (any more): nothing to register
            return
        import warnings

        warnings.warn(f"SDAC could not be registered in {module.__name__}: {error!r}", stacklevel=2)


if not os.environ.get("SB3_SDAC_NO_ZOO_HOOK"):
    sys.meta_path.insert(0, ZooFinder)
