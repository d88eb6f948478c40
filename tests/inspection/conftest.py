"""A module of models to import, in a folder of the test's own."""

from __future__ import annotations

import sys
from pathlib import Path

import pytest

NETS = """
import torch
from torch import nn

class Small(nn.Module):
    def __init__(self):
        super().__init__()
        self.conv = nn.Conv2d(1, 4, 3, padding=1)
        self.head = nn.Linear(4 * 36, 3)

    def forward(self, x):
        return self.head(self.conv(x).relu().flatten(1))

def small():
    torch.manual_seed(3)
    return Small()

def nan():
    model = small()
    model.conv.weight.data[0, 0, 1, 1] = float("nan")
    return model

def failing():
    raise RuntimeError("the weights are on holiday")

def takes(width):
    return nn.Linear(width, width)

def no_model():
    return 3

def empty():
    return nn.ReLU()

model = nn.Linear(3, 2)
number = 3
"""


@pytest.fixture
def nets(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A working folder with nets.py in it."""
    (tmp_path / "nets.py").write_text(NETS)
    (tmp_path / "broken.py").write_text("def f(:\n")
    (tmp_path / "lacking.py").write_text("import something_it_needs\n")
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "path", [str(tmp_path), *sys.path])
    for name in ("nets", "broken", "lacking"):
        monkeypatch.delitem(sys.modules, name, raising=False)
    return tmp_path
