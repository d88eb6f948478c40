"""``sn-fast train``."""

from __future__ import annotations

import argparse
import json
from typing import Any

from ..experiments.training import TrainConfig, resume, table, train
from ..experiments.training.config import DEFAULTS
from .output import write

_DESCRIPTION = """\
Train a small convolutional network twice on attacked images, without normalisation
(beta = inf) and with every layer's spectral norm capped at --beta, from equal weights
and on equal batches. Compare their accuracies on training and test images, clean and
under attack with the true labels.
"""
_EXAMPLE = """\
example:
  sn-fast train                                    the default: PGM on the digits, about a minute and a half
  sn-fast train --data mnist5k --scheme fgm --norm inf --eps 0.1 --beta 2 --out runs/mine
  sn-fast train --resume runs/mine                 after Ctrl-C or a crash
"""


def add_command(commands: Any) -> None:
    parser = commands.add_parser(
        "train",
        help="adversarial training with and without spectral normalisation",
        description=_DESCRIPTION,
        epilog=_EXAMPLE,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    radii = ", ".join(f"{name} {default.radius['2']:g}" for name, default in DEFAULTS.items())
    eps = f"radius of the attack, pixels in [0, 1]; with wrm 1 / (2 gamma) (default for pgm in l2: {radii})"
    task = parser.add_argument_group("task")
    task.add_argument("--data", metavar="{digits,mnist5k}", help="8x8 digits (default) or 5,000 MNIST images")
    task.add_argument(
        "--train-size",
        type=int,
        metavar="N",
        help=f"images to train on; the test has all others ({_by_data('train_size')})",
    )
    task.add_argument("--scheme", metavar="{erm,fgm,pgm,wrm}", help="attack to train against (default: pgm)")
    task.add_argument("--norm", metavar="{2,inf,1}", help="norm of FGM's and PGM's eps (default: 2)")
    task.add_argument("--eps", type=float, help=eps)
    task.add_argument("--steps", type=int, metavar="N", help="steps of PGM and WRM (default: 15)")
    task.add_argument(
        "--attack-labels",
        metavar="{true,predicted}",
        help="labels that training's attack moves away from: the true ones (default), or as in the published code the "
        "network's own prediction",
    )
    training = parser.add_argument_group("training")
    training.add_argument("--beta", type=float, help=f"cap on every layer's spectral norm ({_by_data('beta')})")
    training.add_argument("--single", action="store_true", default=None, help="train only the network with --beta")
    training.add_argument(
        "--epochs", type=int, metavar="N", help=f"passes over the training images ({_by_data('epochs')})"
    )
    training.add_argument("--batch-size", type=int, metavar="N", help="images per step (default: 50)")
    training.add_argument("--lr", type=float, help="step size of SGD with momentum 0.9 (default: 0.05)")
    training.add_argument("--seed", type=int, metavar="N", help="of split, weights and batches (default: 0)")
    training.add_argument("--device", metavar="{auto,cpu,cuda}", help="auto (default) takes CUDA where there is one")
    training.add_argument(
        "--threads", type=int, metavar="N", help="of PyTorch on the CPU (default: 1, the fastest on a busy machine)"
    )
    output = parser.add_argument_group("output")
    place = output.add_mutually_exclusive_group()
    place.add_argument("--out", metavar="DIR", help="new folder of this run (default: an unused name in runs/)")
    place.add_argument("--resume", metavar="DIR", help="continue the run in this folder, with the options it has")
    output.add_argument("--json", action="store_true", help="print one JSON document in place of the table")
    output.add_argument("--quiet", action="store_true", help="no progress bar")
    parser.set_defaults(run=_run)


def _by_data(name: str) -> str:
    return "default: " + ", ".join(f"{data} {getattr(default, name):g}" for data, default in DEFAULTS.items())


def _run(options: argparse.Namespace) -> None:
    chosen = vars(options).copy()
    for name in ("run", "json", "quiet", "out", "resume"):
        del chosen[name]
    progress = not options.quiet
    if options.resume is not None:
        result = resume(options.resume, chosen, progress=progress)
    else:
        result = train(TrainConfig.create(**chosen), options.out, progress=progress)
    if options.json:
        write(json.dumps(result.document(), allow_nan=False))
    else:
        write(f"{table(result.config, result.metrics)}\n\nmetrics, checkpoint and plots: {result.path}")
