"""Everything about the package is in setup.cfg, except for the files that setuptools has no keyword for."""

import os
from pathlib import Path

from setuptools import setup
from setuptools.command.build_py import build_py


class BuildPyWithExtras(build_py):
    """
    Puts the ``.pth`` file beside the packages, where Python reads it at start-up, and ``hyperparams/`` into the package.

    An editable install has no such place, and reads ``hyperparams/`` where it lies.
    """

    def extra_files(self) -> dict[str, str]:
        """:return: where each file goes, relative to the packages, and where it comes from"""
        files = {"sb3_sdac_zoo_hook.pth": "sb3_sdac_zoo_hook.pth"}
        files |= {f"sb3_sdac/hyperparams/{path.name}": str(path) for path in sorted(Path("hyperparams").glob("*.yml"))}
        return files

    def run(self) -> None:
        super().run()
        if not self.editable_mode:
            for target, source in self.extra_files().items():
                self.mkpath(os.path.dirname(os.path.join(self.build_lib, target)))
                self.copy_file(source, os.path.join(self.build_lib, target))

    def get_outputs(self, include_bytecode: bool = True) -> list[str]:
        extra = [] if self.editable_mode else [os.path.join(self.build_lib, target) for target in self.extra_files()]
        return super().get_outputs(include_bytecode) + extra

    def get_source_files(self) -> list[str]:
        return [*super().get_source_files(), *self.extra_files().values()]


setup(cmdclass={"build_py": BuildPyWithExtras})
