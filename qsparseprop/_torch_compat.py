"""What depends on torch beyond its documented interface, each piece with a test that says what broke.

``tests/test_torch_compat.py``.
"""

from __future__ import annotations

import functools
from collections.abc import Callable

from torch import nn
from torch.optim.swa_utils import AveragedModel


def before_averaging(check: Callable[[nn.Module, nn.Module], None]) -> None:
    """Have `check(average, model)` called before a model's weights go into an average of torch.optim.swa_utils.

    An average is taken element by element, and torch calls nothing of the modules that it averages.
    """
    update = AveragedModel.update_parameters

    @functools.wraps(update)
    def checked(self: AveragedModel, model: nn.Module) -> None:
        check(self.module, model)
        update(self, model)

    AveragedModel.update_parameters = checked
