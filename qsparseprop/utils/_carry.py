"""What users hang on a layer goes along when the layer is replaced: hooks and attributes of modules and parameters."""

from __future__ import annotations

from torch import nn

from qsparseprop.nn.blocks.start import is_start

#: Of nn.Module: what it calls by itself, and flags of these.
_HOOKS = tuple(name for name in vars(nn.Module()) if "hook" in name)
_OTHER = ("_forward_hooks", "_backward_hooks", "_backward_pre_hooks", "_state_dict_hooks", "_state_dict_pre_hooks",
          "_load_state_dict_pre_hooks", "_load_state_dict_post_hooks")  # fmt: skip


def own_hooks(module: nn.Module) -> bool:
    """Whether a module has hooks other than ours and those of torch.nn.utils.prune, which belong to its weight."""
    pre = [h for h in module._forward_pre_hooks.values() if not isinstance(h, nn.utils.prune.BasePruningMethod)]
    return bool(pre or any(not is_start(h) for hooks in _OTHER for h in getattr(module, hooks).values()))


def gradient_hooks(module: nn.Module) -> bool:
    """Whether somebody changes the gradients of a module's own parameters, or does something when they are there."""
    return any(p._backward_hooks or getattr(p, "_post_accumulate_grad_hooks", None)
               for p in module.parameters(recurse=False))  # fmt: skip


def carry_hooks(old: nn.Module, new: nn.Module) -> None:
    """Give a module the hooks of the one that it replaces, so that their handles still remove them."""
    for name in _HOOKS:
        setattr(new, name, getattr(old, name))


def carry_attributes(old: nn.Module, new: nn.Module, plain: nn.Module) -> None:
    """Give a module what users have set on the one that it replaces, and its parameters what they have set on these.

    Parameters
    ----------
    old, new : nn.Module
    plain : nn.Module
        A layer like `old` that nobody has touched: what it has is no user's.
    """
    # weight and bias: torch.nn.utils.prune keeps them there
    known = {*vars(plain), *vars(new), "weight", "bias"}
    for name, value in vars(old).items():
        if name not in known and not isinstance(getattr(type(new), name, None), property):
            setattr(new, name, value)
    mine = dict(new.named_parameters(recurse=False))
    for name, parameter in old.named_parameters(recurse=False):
        target = mine.get(name.removesuffix("_orig"))
        for key, value in vars(parameter).items():
            if target is not None and key not in vars(target):
                setattr(target, key, value)
