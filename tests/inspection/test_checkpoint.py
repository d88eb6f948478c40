from __future__ import annotations

import copy
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

import sn_fast
from sn_fast.errors import UserError
from sn_fast.inspection import load_checkpoint


def small() -> nn.Sequential:
    return nn.Sequential(nn.Conv2d(1, 2, 3), nn.BatchNorm2d(2), nn.Flatten(), nn.Linear(8, 3))


def prefixed(prefix: str, state: dict[str, Any]) -> dict[str, Any]:
    return {prefix + name: value for name, value in state.items()}


FORMS = {
    "plain": lambda s: s,
    "nested": lambda s: {"epoch": 3, "state_dict": s, "optimizer": {"state": {}}},
    "model": lambda s: {"model": s, "ema": {"0.weight": torch.zeros(1)}, "step": torch.tensor(3)},
    "ema alone": lambda s: {"ema": s},
    "twice nested": lambda s: {"model": {"state_dict": s}},
    "DataParallel": lambda s: prefixed("module.", s),
    "compiled": lambda s: {"state_dict": prefixed("_orig_mod.", s)},
    "both": lambda s: prefixed("module._orig_mod.", s),
    "Lightning": lambda s: {"state_dict": prefixed("model.", s), "pytorch-lightning_version": "2"},
    "averaged": lambda s: {"n_averaged": torch.tensor(7), **prefixed("module.", s)},
    "half compiled": lambda s: {k.replace("3.", "3._orig_mod."): v for k, v in s.items()},
}


@pytest.mark.parametrize("form", FORMS)
def test_state_dicts_as_people_save_them(tmp_path, form):
    saved, model = small(), small()
    torch.save(FORMS[form](saved.state_dict()), tmp_path / "c.pt")
    load_checkpoint(model, tmp_path / "c.pt")
    assert all(torch.equal(a, b) for a, b in zip(saved.state_dict().values(), model.state_dict().values(), strict=True))


def test_names_that_begin_like_a_prefix_stay(tmp_path):
    saved, model = nn.ModuleDict({"model": nn.Linear(2, 2)}), nn.ModuleDict({"model": nn.Linear(2, 2)})
    torch.save(saved.state_dict(), tmp_path / "c.pt")
    load_checkpoint(model, tmp_path / "c.pt")
    assert torch.equal(saved["model"].weight, model["model"].weight)


def test_a_normalised_model(tmp_path):
    saved = sn_fast.apply_spectral_norm(small(), torch.zeros(1, 1, 4, 4), beta=0.1)
    model = copy.deepcopy(saved)
    with torch.no_grad():
        saved[0].parametrizations.weight.original.mul_(3)
    torch.save(saved.state_dict(), tmp_path / "c.pt")
    load_checkpoint(model, tmp_path / "c.pt")
    assert torch.equal(saved[0].weight, model[0].weight)


def test_other_models(tmp_path):
    def message(state: dict[str, Any]) -> str:
        torch.save(state, tmp_path / "c.pt")
        with pytest.raises(UserError) as caught:
            load_checkpoint(small(), tmp_path / "c.pt")
        assert "\n" not in str(caught.value)
        return str(caught.value)

    state = small().state_dict()
    assert "not of this model: 1 missing (3.bias)" in message({k: v for k, v in state.items() if k != "3.bias"})
    assert "5 not in the model (a, b, c, ...)" in message({**state, **dict.fromkeys("abcde", torch.zeros(1))})
    wrong = message({**state, "3.weight": torch.zeros(4, 8)})
    assert "1 other shape (size mismatch for 3.weight" in wrong
    assert "[4, 8]" in wrong


def test_files_that_are_no_checkpoint(tmp_path, uninstalled):
    def message(path: Path) -> str:
        with pytest.raises(UserError, match=r"^(argument `checkpoint`|the package)") as caught:
            load_checkpoint(small(), path)
        assert "\n" not in str(caught.value)
        return str(caught.value)

    assert "there is no file" in message(tmp_path / "absent.pt")
    (tmp_path / "damaged.pt").write_bytes(b"PK\x03\x04 cut short")
    assert "damaged.pt cannot be read (" in message(tmp_path / "damaged.pt")
    torch.save(small(), tmp_path / "whole.pt")
    assert "save model.state_dict() in place of the model" in message(tmp_path / "whole.pt")
    torch.save({"epoch": 3, "names": ["a"]}, tmp_path / "other.pt")
    assert "holds no state dict, neither plain nor under state_dict" in message(tmp_path / "other.pt")
    torch.save([torch.zeros(3)], tmp_path / "list.pt")
    assert "(list)" in message(tmp_path / "list.pt")
    (tmp_path / "c.safetensors").write_bytes(b"")
    uninstalled("safetensors")
    assert message(tmp_path / "c.safetensors").endswith("run: pip install safetensors")
