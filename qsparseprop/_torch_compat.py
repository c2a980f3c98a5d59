"""What depends on torch beyond its documented interface, each piece with a test that says what broke.

``tests/test_torch_compat.py``.
"""

from __future__ import annotations

import functools
import sys
from collections.abc import Callable

from torch import nn
from torch.optim.swa_utils import AveragedModel


def called_by_parameter() -> bool:
    """Whether the method of a tensor in whose ``__torch_function__`` this is called was called by nn.Parameter itself.

    That wants `detach` of a subclass to give the subclass; everybody else is to get a plain tensor.
    """
    return sys._getframe(2).f_code is nn.Parameter.__new__.__code__


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
