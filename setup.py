"""Everything about the package is in setup.cfg, except for the one file that setuptools has no keyword for."""

import os

from setuptools import setup
from setuptools.command.build_py import build_py

HOOK = "sb3_sdac_zoo_hook.pth"


class BuildPyWithHook(build_py):
    """Puts the ``.pth`` file beside the packages, where Python reads it at start-up; an editable install has no such place."""

    def run(self) -> None:
        super().run()
        if not self.editable_mode:
            self.copy_file(HOOK, self.build_lib)

    def get_outputs(self, include_bytecode: bool = True) -> list[str]:
        hook = [] if self.editable_mode else [os.path.join(self.build_lib, HOOK)]
        return super().get_outputs(include_bytecode) + hook

    def get_source_files(self) -> list[str]:
        return [*super().get_source_files(), HOOK]


setup(cmdclass={"build_py": BuildPyWithHook})
