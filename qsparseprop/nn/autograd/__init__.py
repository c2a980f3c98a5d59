"""Every function of the package that has a backward pass of its own, as torch.autograd.Function wants them.

What each of them computes is said elsewhere; here is what it saves, and which gradients it gives. Whether a node is
needed at all is decided by those who call them: `functional`, `blocks`, and the modules.
"""
