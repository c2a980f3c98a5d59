"""What freezing uses of torch.export beyond its documented interface."""

import torch
from torch import nn

from qsparseprop import _torch_compat as compat


def test_export_tells_what_it_took_for_granted():
    class Model(nn.Module):
        def forward(self, x):
            return x + 1 if x.shape[0] % 3 else x

    dynamic = ({0: torch.export.Dim.AUTO},)
    exported = torch.export.export(Model(), (torch.ones(4, 2),), dynamic_shapes=dynamic, strict=False)
    # versions of torch that keep no guards check nothing by themselves
    assert compat.size_guards(exported) == ["(L['x'].size()[0] % 3) != 0"]


def test_operators_of_graphs():
    class Model(nn.Module):
        def forward(self, x):
            return x.relu()

    exported = torch.export.export(Model(), (torch.ones(4, 2),), strict=False)
    found = [node.target for node in exported.graph.nodes if node.op == "call_function"]
    assert [(str(target), isinstance(target, compat.Overload)) for target in found] == [("aten.relu.default", True)]
    assert found[0].namespace == "aten"
    assert [argument.name for argument in found[0]._schema.arguments] == ["self"]
