"""What a convolution really does to its input, and what the reshaped kernel says it does.

Prints, for a few layers with random weights, the largest singular value by dense SVD (the truth), by
``sn_fast.operator_norm``, and the value that ``torch.nn.utils.parametrizations.spectral_norm`` divides by.
"""

from __future__ import annotations

import torch
from torch import nn

import sn_fast

LAYERS = [
    ("Conv2d(8, 16, 3, padding=1)", nn.Conv2d(8, 16, 3, padding=1)),
    ("Conv2d(8, 16, 3, stride=2, padding=1)", nn.Conv2d(8, 16, 3, stride=2, padding=1)),
    ("Conv2d(8, 16, 5, padding=2, reflect)", nn.Conv2d(8, 16, 5, padding=2, padding_mode="reflect")),
    ("Conv2d(16, 16, 3, padding=1, groups=16)", nn.Conv2d(16, 16, 3, padding=1, groups=16)),
    ("ConvTranspose2d(16, 8, 4, stride=2, padding=1)", nn.ConvTranspose2d(16, 8, 4, stride=2, padding=1)),
]


def main() -> None:
    torch.manual_seed(0)
    size = (12, 12)
    print(f"{'layer, input 12 x 12':48} {'dense SVD':>10} {'sn_fast':>10} {'torch':>10}  torch / truth")
    for name, layer in LAYERS:
        nn.init.normal_(layer.weight, std=0.1)
        operator = sn_fast.operator_of(layer, size)
        truth = float(sn_fast.operator_norm(operator, method="dense"))
        ours = float(sn_fast.operator_norm(operator))
        raw = layer.weight.detach().clone()
        theirs = nn.utils.parametrizations.spectral_norm(layer, n_power_iterations=100)
        divisor = float((raw.norm() / theirs.weight.norm()).detach())
        print(f"{name:48} {truth:10.4f} {ours:10.4f} {divisor:10.4f}  {divisor / truth:8.2f}")


if __name__ == "__main__":
    main()
