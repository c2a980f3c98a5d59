"""What freezing uses of torch.export beyond its documented interface, and trainings of several processes of torch's."""

import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
import torch.distributed as dist
from torch import nn

import qsparseprop
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


@pytest.mark.skipif(not dist.is_available() or not dist.is_gloo_available(), reason="needs gloo")
def test_a_wrapped_model_says_how_it_was_wrapped(tmp_path):
    """In a process of its own, which has a group."""
    lines = ("import torch.distributed as dist, torch.distributed.nn", "from torch import nn",
             "from torch.nn.parallel import DistributedDataParallel as Wrapped",
             "from qsparseprop._torch_compat import options_of_parallel",
             "dist.init_process_group('gloo', store=dist.HashStore(), rank=0, world_size=1)",
             "hook = lambda state, bucket: None", "hook.__annotations__ = {}",
             "one = Wrapped(nn.Linear(2, 2), find_unused_parameters=True, bucket_cap_mb=2)",
             "one._comm_hooks.append((hook, 7))", "options, hooks = options_of_parallel(one)",
             "assert hooks == [(hook, 7)]", "names = 'find_unused_parameters', 'bucket_cap_mb', 'static_graph'",
             "assert [options[name] for name in names] == [True, 2, False]",
             "assert options.get('forward_sync_buffers', options.get('broadcast_buffers')) is True",
             "assert options['process_group'] is dist.group.WORLD", "assert 'module' not in options",
             "assert 'bucket_cap_mb' not in options_of_parallel(Wrapped(nn.Linear(2, 2)))[0]",
             "assert vars(Wrapped(nn.Linear(2, 2), **options)).keys() == vars(one).keys()",
             "del one", "dist.destroy_process_group()")  # fmt: skip
    (tmp_path / "wrapped.py").write_text("\n".join(lines))
    package = os.pathsep.join([str(Path(qsparseprop.__file__).parents[1]), os.environ.get("PYTHONPATH", "")])
    done = subprocess.run([sys.executable, "-W", "error", str(tmp_path / "wrapped.py")], capture_output=True, text=True,
                          check=False, timeout=300, env={**os.environ, "PYTHONPATH": package})  # fmt: skip
    assert done.returncode == 0, done.stderr
