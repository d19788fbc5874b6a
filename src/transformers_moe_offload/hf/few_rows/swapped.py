"""The class of a module while kernels compute its few rows.

A module keeps its place, weights and hooks; a subclass of its class, with our `forward`, replaces the class, as for
experts (`hf/model/experts_module.py`). Prompts, autocast, other devices and compiled code take the module's own
forward; so does training, where a forward that is repeated for gradients must give the same bits.
"""

from __future__ import annotations

from functools import cache
from inspect import unwrap
from typing import Any

from torch import Tensor, nn


class FewRows:
    """Mixed into the class of a module whose few rows our kernels compute.

    Numbers that a module computes with, such as how many experts a router takes, are found when the class is swapped.
    One that is changed later gives the module its own class back.
    """

    plain_class: type[nn.Module]
    """The class without it."""

    def __setattr__(self, name: str, value: Any) -> None:
        super().__setattr__(name, value)
        if changes_result(name, value):
            swap_back(self)


def swap_back(module: Any) -> None:
    """Give a module its own class back, unless another one was made of ours, as `torch.nn.utils.parametrize` does."""
    if "plain_class" in vars(type(module)):
        module.__class__ = module.plain_class


def changes_result(name: str, value: Any) -> bool:
    """Whether an attribute of a module that is set may change what it computes, its tensors apart."""
    return not (name == "training" or name.startswith("_") or isinstance(value, Tensor))


def reads_config(module: nn.Module) -> bool:
    """Whether a module's forward may look something up in a config, where a change would not be noticed."""
    return "config" in getattr(unwrap(type(module).forward), "__code__", _NO_CODE).co_names


_NO_CODE = (lambda self: self.config).__code__
"""What is assumed of a forward that is not written in Python."""


@cache
def swapped(mixed_in: Any, plain_class: Any, how: Any) -> Any:
    """A subclass of `plain_class` with the forward of `mixed_in`, which finds `how` under that name."""
    contents = {"plain_class": plain_class, "how": how, "__module__": plain_class.__module__}
    return type(plain_class.__name__, (mixed_in, plain_class), contents)
