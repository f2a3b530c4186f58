"""SDAC: online reinforcement learning with a diffusion policy, for Stable-Baselines3."""

from pathlib import Path

from sb3_sdac.dpmd import DPMD
from sb3_sdac.policies import CnnPolicy, DiffusionPolicy, MlpPolicy, MultiInputPolicy
from sb3_sdac.presets import PAPER_DPMD, PAPER_SDAC
from sb3_sdac.sdac import SDAC

__version__ = Path(__file__).with_name("version.txt").read_text(encoding="utf-8").strip()

__all__ = [
    "DPMD",
    "PAPER_DPMD",
    "PAPER_SDAC",
    "SDAC",
    "CnnPolicy",
    "DiffusionPolicy",
    "MlpPolicy",
    "MultiInputPolicy",
    "__version__",
]
