"""Predicates and checks of arguments, and objects whose arguments are checked whenever they are set."""

import importlib
from collections.abc import Callable
from typing import Any, ClassVar

import numpy as np

#: What SAC or TQC has and SDAC has not, and what takes its place
ELSEWHERE = {
    "target_entropy": "there is no entropy to aim at. ent_coef='auto' of SDAC aims at an effective sample size, target_ess, "
    "and ent_coef='paper_<number>' at an entropy per action dimension of minus that number",
    "use_sde": "a diffusion policy has no Gaussian whose noise could depend on the state: "
    "policy_kwargs=dict(exploration_noise=...) and action_noise set how SDAC explores",
    "sde_sample_freq": "there is no use_sde: policy_kwargs=dict(exploration_noise=...) and action_noise set how SDAC explores",
    "use_sde_at_warmup": "there is no use_sde: the first learning_starts actions are random",
    "top_quantiles_to_drop_per_net": "policy_kwargs=dict(pessimism=...) sets how far Q is below the mean of the critics",
    "n_quantiles": "policy_kwargs=dict(n_bins=...) sets how finely the critics resolve values",
    **dict.fromkeys(
        ("log_std_init", "use_expln", "clip_mean"),
        "a diffusion policy has no Gaussian: policy_kwargs=dict(exploration_noise=...) sets how much SDAC explores",
    ),
    **dict.fromkeys(
        ("batch_norm_momentum", "batch_norm_eps", "renorm_warmup_steps"),
        "policy_kwargs=dict(batch_norm=...) only says whether the critics' layers are normalised",
    ),
    "target_policy_noise": "policy_kwargs=dict(exploration_noise=...) is the noise of the actions in the TD target, too",
    "target_noise_clip": "clip_target_actions=True keeps noisy actions in the box",
    "actor_learning_rate": "learning_rate is the actor's, qf_learning_rate the critics'",
    "anchor": "it is called noised_actions",
    "n_target_particles": "it is called n_train_particles: policy_kwargs=dict(n_train_particles=...)",
    "critic_steps": "it is an argument of DPMD",
}


def is_number(value: Any) -> bool:
    """
    :param value: anything
    :return: whether it is a finite number (Python's or NumPy's)
    """
    return isinstance(value, (int, float, np.number)) and not isinstance(value, bool) and bool(np.isfinite(value))


def is_count(value: Any) -> bool:
    """
    :param value: anything
    :return: whether it is an integer (Python's or NumPy's) of at least 1
    """
    return isinstance(value, (int, np.integer)) and not isinstance(value, bool) and bool(value >= 1)


def is_positive(value: Any) -> bool:
    """
    :param value: anything
    :return: whether it is a finite number above 0
    """
    return is_number(value) and bool(value > 0)


def is_fraction(value: Any) -> bool:
    """
    :param value: anything
    :return: whether it is a number between 0 and 1, both included
    """
    return is_number(value) and bool(0 <= value <= 1)


def is_rate(value: Any) -> bool:
    """
    :param value: anything
    :return: whether it is a learning rate: a number of at least 0 or a schedule
    """
    return callable(value) or (is_number(value) and bool(value >= 0))


def is_train_freq(value: Any) -> bool:
    """
    :param value: anything
    :return: whether it is a count of steps, or a tuple of a count and its unit
    """
    if not isinstance(value, tuple):
        return is_count(value)
    return len(value) == 2 and is_count(value[0]) and getattr(value[1], "value", value[1]) in ("step", "episode")


def is_lr_decay(value: Any) -> bool:
    """
    :param value: anything
    :return: whether it is (final learning rate, first, last actor update)
    """
    if not isinstance(value, (tuple, list)) or len(value) != 3 or not all(map(is_number, value)):
        return False
    final, first, last = value
    return bool(final >= 0 and 0 <= first < last)


def check(owner: Any, is_valid: Callable[[Any], bool], allowed: str, *names: str) -> None:
    """
    :param owner: has the arguments as attributes
    :param is_valid: of a value
    :param allowed: which values are
    :param names: of the arguments
    :raises ValueError: says what was given and what is allowed
    """
    for name in names:
        value = getattr(owner, name)
        if not is_valid(value):
            raise ValueError(f"{name} must be {allowed}, got {value!r}")


def check_choice(owner: Any, **choices: Any) -> None:
    """
    :param owner: has the arguments as attributes
    :param choices: for each argument the names to choose from
    :raises ValueError: says what was given and what is allowed
    """
    for name, known in choices.items():
        check(owner, [*known].__contains__, f"one of {list(known)}", name)


def check_finite(name: str, values: Any, where: str) -> None:
    """
    Stop before something that is not a number gets into the replay buffer or the networks.

    :param name: what the values are
    :param values: an array, or a dict of arrays, with the batch (or the environments) as first axis
    :param where: when this is, and what to do
    :raises ValueError: if any entry is NaN or infinite; names the key of a dict and the index in the batch
    """
    for key, value in values.items() if isinstance(values, dict) else [(None, values)]:
        value = np.asarray(value)
        if value.dtype.kind != "f":
            continue
        with np.errstate(over="ignore"):
            is_finite = np.isfinite(value.astype(np.float32, copy=False))  # in which networks compute: 1e300 is infinite, too
        if is_finite.all():
            continue
        label = name if key is None else f"{name} '{key}'"
        index = ""
        if value.ndim > 1 and len(value) > 1:
            rows = ~is_finite.reshape(len(value), -1).all(axis=1)
            index, value = f" (number {', '.join(map(str, np.flatnonzero(rows)))} of {len(value)})", value[rows]
        raise ValueError(f"The {label}{index} {where.format(value=value)}")


def refuse_unknown(arguments: dict[str, Any], policy_arguments: set[str], live: frozenset[str]) -> None:
    """
    :param arguments: that were given and are none of the algorithm's
    :param policy_arguments: names of those that the policy takes
    :param live: those that may be set on a policy in use
    :raises TypeError: says where each belongs or what takes its place
    """
    for name, value in arguments.items():
        if (name == "use_sde" and value is False) or (name == "sde_sample_freq" and value == -1):
            continue  # SAC's defaults: a shared dictionary of arguments asks for nothing
        if name in ELSEWHERE:
            advice = ELSEWHERE[name]
        elif name in policy_arguments:
            advice = f"it is the policy's: policy_kwargs=dict({name}={value!r})"
            advice += f", or model.policy.{name} = {value!r} of a live model" if name in live else " of a new model"
        else:
            advice = "see the list of arguments in help(SDAC)"
        raise TypeError(f"unexpected keyword argument {name}={value!r}: {advice}")


def require(package: str, extra: str, what: str) -> None:
    """
    Import a package of an extra, so that a missing one is an error that says what to install.

    :param package: as it is imported, for instance ``"tensorboard"``
    :param extra: of setup.cfg, for instance ``"plots"``
    :param what: needs it, for instance ``"tensorboard_log"``
    :raises ModuleNotFoundError: with the command that installs it. If something else is missing, on which the package depends,
        its own error
    """
    try:
        importlib.import_module(package)
    except ModuleNotFoundError as error:
        if (error.name or "").partition(".")[0] != package.partition(".")[0]:
            raise
        raise ModuleNotFoundError(
            f'{what} needs {package.partition(".")[0]}, which is not installed: pip install "sb3_sdac[{extra}]"',
            name=error.name,
        ) from error


class LiveArguments:
    """
    An object whose arguments may be set while it is in use: each works at once or is refused, never without effect.

    ``LIVE`` names what may be set, ``FIXED`` what may not and what to do instead. What a check refuses stays as it was.
    """

    LIVE: ClassVar[frozenset[str]] = frozenset()
    FIXED: ClassVar[dict[str, str]] = {}

    def _check_arguments(self) -> None:
        """:raises ValueError: if an argument, or two together, are not allowed"""

    def _apply_argument(self, name: str) -> None:
        """Bring everything that follows from an argument in line with it."""

    def _go_live(self) -> None:
        """From here on arguments are checked when they are set."""
        vars(self)["_is_live"] = True

    def __setattr__(self, name: str, value: Any) -> None:
        if "_is_live" not in vars(self) or (name not in self.LIVE and name not in self.FIXED):
            super().__setattr__(name, value)
            return
        if name in self.FIXED:
            raise AttributeError(f"{name} of {type(self).__name__} cannot be set to {value!r} here: {self.FIXED[name]}")
        before = getattr(self, name)
        super().__setattr__(name, value)
        try:
            self._check_arguments()
        except ValueError:
            super().__setattr__(name, before)
            raise
        self._apply_argument(name)
