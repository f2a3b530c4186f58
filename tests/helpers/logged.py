"""What the log says of the training, for the tests that look at it."""

from collections import deque
from unittest.mock import patch

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
