"""Importing sn_fast changes nothing of the process, and normalising a model next to nothing."""

import subprocess
import sys

_IMPORT = """
import sys

import torch
from torch import nn
from torch.nn.modules import module as hooks
from torch.optim import optimizer

before = set(sys.modules)


def registered():
    tables = [optimizer._global_optimizer_pre_hooks, optimizer._global_optimizer_post_hooks]
    tables += [value for name, value in vars(hooks).items() if name.startswith("_global_") and isinstance(value, dict)]
    return [dict(table) for table in tables]


methods = [nn.Module.__call__, nn.Module._call_impl, nn.Module.__setattr__, torch.optim.Optimizer.step]
methods += [torch.optim.SGD.step, torch.Tensor.__torch_function__, torch.load, torch.save]
start = registered()
assert len(start) >= 6, start
import sn_fast

assert registered() == start, registered()
sn_fast.apply_spectral_norm(nn.Sequential(nn.Linear(3, 3)), torch.randn(1, 3))
# One hook tells the first normalised model when DistributedDataParallel wraps it.
more = [hook.__module__ for now, then in zip(registered(), start) for key, hook in now.items() if key not in then]
assert more == ["sn_fast.normalization.data_parallel"], more
assert methods == [
    nn.Module.__call__, nn.Module._call_impl, nn.Module.__setattr__, torch.optim.Optimizer.step,
    torch.optim.SGD.step, torch.Tensor.__torch_function__, torch.load, torch.save,
]
assert not torch.optim.SGD.step.__dict__.get("hooked")
heavy = {"torch._dynamo", "torch._inductor", "torchvision", "sklearn", "matplotlib"} & (set(sys.modules) - before)
assert not heavy, heavy
"""


def test_importing_registers_nothing_for_the_whole_process() -> None:
    done = subprocess.run([sys.executable, "-c", _IMPORT], capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr


_ROOMS = """
import sys

import sn_fast

assert "sn_fast.attacks" not in sys.modules
assert "sn_fast.experiments" not in sys.modules
assert "sn_fast.theory" not in sys.modules
assert {"attacks", "experiments", "theory", "operator_norm"} <= set(dir(sn_fast))
assert callable(sn_fast.attacks.pgd)
assert callable(sn_fast.theory.capacity)
assert sn_fast.attacks is sys.modules["sn_fast.attacks"]
assert sn_fast.experiments.__name__ == "sn_fast.experiments"
try:
    sn_fast.atacks
except AttributeError as error:
    assert str(error) == "module 'sn_fast' has no attribute 'atacks'", error
else:
    raise AssertionError("atacks exists")
assert not hasattr(sn_fast, "no_such_name")
"""


def test_rooms_are_imported_at_their_first_use() -> None:
    done = subprocess.run([sys.executable, "-c", _ROOMS], capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr
