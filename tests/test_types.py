"""What mypy and pyright say of a user's program: nothing of a right one, and something of each wrong line."""

from __future__ import annotations

import importlib.util
import inspect
import json
import os
import re
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import get_type_hints

import pytest

import sn_fast
from sn_fast.attacks import fgm, options, pgd, wrm

README = (Path(__file__).parents[1] / "README.md").read_text()
SOURCES = Path(sn_fast.__file__).parents[1]

HEAD = """\
import math

import torch
from torch import Tensor, nn

import sn_fast
from sn_fast.attacks import FGM, PGD, WRM, AttackInfo, fgm, pgd, pgd_step, project, random_start, wrm, wrm_step

model = nn.Sequential(nn.Conv2d(3, 8, 3, padding=1), nn.ELU(), nn.Flatten(), nn.Linear(8 * 8 * 8, 10))
conv = nn.Conv2d(3, 8, 3, padding=1)
x, y = torch.rand(4, 3, 8, 8), torch.tensor([0, 1, 2, 3])
op = sn_fast.operator_of(conv, input_size=(8, 8))
"""

RIGHT = """
def train(network: nn.Module, images: Tensor, labels: Tensor, radius: float) -> Tensor:
    same: nn.Sequential = sn_fast.apply_spectral_norm(model, x, beta={"0": 1.0, ".*": 2.0}, mode="scale")
    attacked: Tensor = pgd(network, images, labels, norm=2, eps=radius, steps=10, clip=(0, 1))
    logits: Tensor = same(attacked)
    return nn.functional.cross_entropy(logits, labels)


norm: Tensor = sn_fast.operator_norm(op)
sigma, u, v = sn_fast.operator_norm(op, method="lanczos", tol=1e-4, return_vectors=True)
number: float = float(sn_fast.operator_norm(op)) + float(sigma) + float(u.sum() + v.sum())
bound: Tensor = sn_fast.operator_norm_bound(op)
value, how = sn_fast.operator_norm_bound(op, method="fft", return_info=True)
method: str = how.method
lower, upper = sn_fast.operator_norm_interval(op)
low, high, info = sn_fast.operator_norm_interval(op, return_info=True)
proven: bool = info.certified
several: Tensor = sn_fast.singular_values(op, k=3)
twice: sn_fast.LinearOperator = 2 * op
layer: nn.Conv2d = sn_fast.spectral_norm(conv, input_size="any", gradient="detached", precision=None)
plain: nn.Conv2d = sn_fast.remove_spectral_norm(layer)
clipped: float = sn_fast.clip_spectrum(nn.Linear(20, 10), beta=0.1).bound
norms: dict[str, float] = sn_fast.sigmas(model)
with sn_fast.frozen_sigma(model):
    sn_fast.update_spectral_norm(model)
summary: str = sn_fast.spectral_norm_summary(model)
report: sn_fast.LipschitzReport = sn_fast.lipschitz_bound(model, x[:1])
radii: Tensor = report.certified_radius(model(x), y)
rows: list[tuple[str, float]] = [(row.name, row.bound) for row in report.layers]

adversarial: Tensor = fgm(model, x, y, norm=math.inf, eps=0.1, loss="ce", model_mode="eval")
moved, reached = wrm(model, x, y, gamma=0.5, return_info=True)
loss: Tensor = reached.loss
success: Tensor | None = reached.success
gradients: int = reached.gradients
per_sample: Tensor = pgd(model, x, norm="L1-exact", eps=torch.ones(4), loss=lambda logits, labels: logits[:, 0])
attack: PGD = PGD(model, eps=0.1, steps=3, random_start=True)
again: Tensor = attack.perturb(x, y)
attacks: list[FGM | PGD | WRM] = [FGM(model, eps=0.1), attack, WRM(model, gamma=1.0)]
all_attacked: list[Tensor] = [a(x, y) for a in attacks]
told: tuple[Tensor, AttackInfo] = PGD(model, eps=0.1, return_info=True)(x, y)
named: Tensor = sn_fast.attacks.pgd(model, x, y, eps=0.1)
distances: Tensor = sn_fast.theory.margins(model(x), y)
step: Tensor = pgd_step(x, x, x, norm="inf", eps=0.1, alpha=0.05, clip=(0.0, None))
pulled: Tensor = project(wrm_step(x, x, x, eps=0.1, step=1.0), random_start(x, norm=2, eps=1), norm=2, eps=1.0)
"""

WRONG = (
    "PGD(model, eps=0.1, stepps=3)",
    "PGD(model, steps=3)",  # eps is missing
    "FGM(model, eps=0.1, steps=3)",
    "WRM(model, gamma=1.0, norm=2)",
    'PGD(model, eps=0.1, norm="l3")',
    'PGD(model, eps="0.1")',
    "pgd(model, x, y, eps=0.1, random_strat=True)",
    "fgm(model, x, y)",
    'fgm(model, x, y, eps=0.1, model_mode="test")',
    'wrm(model, x, y, gamma=1.0, loss="mse")',
    'pgd_step(x, x, x, norm="l4", eps=0.1, alpha=0.1)',
    "shape: int = pgd(model, x, y, eps=0.1)",
    "alone: Tensor = pgd(model, x, y, eps=0.1, return_info=True)",
    "lost: str = PGD(model, eps=0.1, return_info=True)(x)",
    "reached = pgd(model, x, y, eps=0.1, return_info=True)[1].sucess",
    'sn_fast.operator_norm(op, method="fft")',
    "one: Tensor = sn_fast.operator_norm(op, return_vectors=True)",
    'sn_fast.operator_norm_bound(op, method="power")',
    "a, b, c = sn_fast.operator_norm_interval(op)",
    'sn_fast.spectral_norm(conv, mode="capped")',
    'sn_fast.spectral_norm(conv, input_size="all")',
    'sn_fast.apply_spectral_norm(model, x, gradient="half")',
    'sn_fast.apply_spectral_norm(model, x, precision="fp8")',
    "linear: nn.Linear = sn_fast.spectral_norm(conv)",
    "sn_fast.apply_spectralnorm(model, x)",
    "sn_fast.attacks.pdg(model, x, y, eps=0.1)",
    "sn_fast.lipschitz_bound(model, x).bond",
)

PROGRAMS = {
    "right.py": HEAD + RIGHT,
    "wrong.py": HEAD + "\n".join(WRONG) + "\n",
    "readme.py": "".join(re.findall(r"```python\n(.*?)```", README, re.DOTALL)),
}
Messages = dict[tuple[str, int], str]
"""What a checker says, by file and line."""


def mypy(folder: Path, programs: list[str]) -> Messages:
    # Tensor.backward of PyTorch has no types.
    options = ["--strict", "--allow-untyped-calls", "--config-file=", "--no-error-summary", "--cache-dir", os.devnull]
    # An editable install is found by an import hook, which mypy does not run.
    environment = os.environ | ({} if "site-packages" in SOURCES.parts else {"MYPYPATH": str(SOURCES)})
    command = [sys.executable, "-m", "mypy", *options, *programs]
    done = subprocess.run(command, cwd=folder, env=environment, capture_output=True, text=True)
    assert done.returncode in (0, 1), done.stdout + done.stderr
    found = re.findall(r"^(\S+?):(\d+): error: (.*)", done.stdout, re.MULTILINE)
    assert bool(found) == bool(done.returncode), done.stdout
    return {(name, int(line)): message for name, line, message in found}


def pyright(folder: Path, programs: list[str]) -> Messages:
    (folder / "pyrightconfig.json").write_text(json.dumps({"extraPaths": [str(SOURCES)]}))
    command = [str(shutil.which("pyright")), "--outputjson", "--pythonpath", sys.executable, *programs]
    done = subprocess.run(command, cwd=folder, capture_output=True, text=True)
    if not done.stdout.startswith("{"):  # the package fetches the checker itself at its first call
        pytest.skip(f"pyright does not run: {(done.stderr or done.stdout).strip()[-200:]}")
    found = [d for d in json.loads(done.stdout)["generalDiagnostics"] if d["severity"] == "error"]
    return {(Path(d["file"]).name, d["range"]["start"]["line"] + 1): d["message"] for d in found}


@pytest.fixture(scope="module", params=[mypy, pyright])
def messages(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Messages:
    """Of one run over all programs: most of its seconds go into PyTorch's own types."""
    if request.param is mypy and importlib.util.find_spec("mypy") is None:
        pytest.skip("mypy is not installed: pip install '.[dev]'")
    if request.param is pyright and shutil.which("pyright") is None:
        pytest.skip("pyright is not installed: pip install '.[dev]'")
    folder = tmp_path_factory.mktemp("programs")
    for name, program in PROGRAMS.items():
        (folder / name).write_text(program)
    found: Messages = request.param(folder, list(PROGRAMS))
    return found


@pytest.mark.parametrize("name", ["right.py", "readme.py"])
def test_nothing_is_said_of_right_lines(messages: Messages, name: str) -> None:
    assert {place: message for place, message in messages.items() if place[0] == name} == {}


@pytest.mark.parametrize("line", range(len(WRONG)))
def test_something_is_said_of_each_wrong_line(messages: Messages, line: int) -> None:
    assert ("wrong.py", HEAD.count("\n") + 1 + line) in messages, WRONG[line]


@pytest.mark.parametrize("attack", [fgm, pgd, wrm])
def test_the_options_of_an_attack_are_its_keywords(attack: Callable[..., object]) -> None:
    keywords = [p for p in inspect.signature(attack).parameters.values() if p.kind is p.KEYWORD_ONLY]
    types = getattr(options, f"{attack.__name__.upper()}Options")
    assert set(get_type_hints(types)) == {p.name for p in keywords} - {"return_info"}
    assert types.__required_keys__ == {p.name for p in keywords if p.default is p.empty}


def test_the_right_lines_run(tmp_path: Path) -> None:
    program = tmp_path / "right.py"
    program.write_text(PROGRAMS["right.py"])
    environment = os.environ | {"PYTHONPATH": str(SOURCES), "OMP_NUM_THREADS": "1"}
    done = subprocess.run([sys.executable, program], env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
