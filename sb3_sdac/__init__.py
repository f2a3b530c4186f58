"""SDAC: online reinforcement learning with a diffusion policy, for Stable-Baselines3."""

from pathlib import Path

from sb3_sdac.policies import CnnPolicy, DiffusionPolicy, MlpPolicy, MultiInputPolicy
from sb3_sdac.sdac import PAPER_DPMD, PAPER_SDAC, SDAC

__version__ = Path(__file__).with_name("version.txt").read_text(encoding="utf-8").strip()

__all__ = [
    "PAPER_DPMD",
    "PAPER_SDAC",
    "SDAC",
    "CnnPolicy",
    "DiffusionPolicy",
    "MlpPolicy",
    "MultiInputPolicy",
    "__version__",
]
