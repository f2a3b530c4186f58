"""The authors' configurations, point by point; with five environments and one update per vector step."""

from typing import Any

from torch import nn

#: Official SDAC: ``SDAC("MlpPolicy", env, **PAPER_SDAC)``
PAPER_SDAC: dict[str, Any] = {
    "learning_rate": 3e-4,
    "learning_starts": 30_000,
    "batch_size": 256,
    "tau": 0.005,
    "gamma": 0.99,
    "train_freq": 1,
    "gradient_steps": 1,
    "n_steps": 1,
    "replay_recency": 1.0,
    "n_reverse_samples": 64,
    "score_matching": "reverse_sampling",
    "proposal": "clipped_normal",
    "noised_actions": "current",
    "ent_coef": "paper",
    "clip_target_actions": False,
    "policy_delay": 2,
    "target_update_interval": 2,
    "reward_scale": 0.2,
    "qf_learning_rate": None,
    "actor_lr_decay": (3e-5, 25_000, 75_000),
    "policy_kwargs": {
        "activation_fn": nn.Mish,
        "n_diffusion_steps": 20,
        "n_sampling_steps": 20,
        "eta": 1.0,
        "init_noise_scale": 0.5,
        "beta_schedule": "linear",
        "n_particles": 32,
        "n_train_particles": None,
        "exploration_noise": 0.1,
        "scale_noise_by_ent_coef": True,
        "average_actor": True,
        "batch_norm": False,
        "n_bins": 1,
        "pessimism": 1.0,
    },
}

_SCORE_MATCHING = ("n_reverse_samples", "score_matching", "proposal", "noised_actions")

#: Official DPMD: ``DPMD("MlpPolicy", env, **PAPER_DPMD)``. The first version of the paper called it SDAC, with
#: ``policy_kwargs={**PAPER_DPMD["policy_kwargs"], "beta_schedule": "cosine"}`` and ``ent_coef="paper_1.5"``.
PAPER_DPMD: dict[str, Any] = {
    **{name: value for name, value in PAPER_SDAC.items() if name not in _SCORE_MATCHING},
    "critic_steps": 2,
}
