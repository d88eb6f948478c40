"""``sn-fast train``."""

from __future__ import annotations

import argparse
import json
from contextlib import nullcontext
from typing import Any

from .. import _interrupts
from ..errors import UserError
from ..experiments.data import data_set_names
from ..experiments.training import Interrupted, TrainConfig, resume, table, train
from ..experiments.training.defaults import DataDefaults, defaults_of
from ..experiments.training.ranks import ALONE, is_of_torchrun, ranks_of_torchrun
from .output import write
from .parser import numbers_in, options_for

_DESCRIPTION = """\
Train a network twice on attacked images, without normalisation (beta = inf) and with every
layer's spectral norm capped at --beta, from equal weights and on equal batches. Compare
their accuracies on training and test images, clean and under attack. The defaults for
mnist, cifar10, cifar100 and svhn are those of the paper's published runs; fashion and
images (a folder of your own, of one size) have those of mnist.
"""
_EXAMPLE = """\
example:
  sn-fast train                                    the default: PGM on the digits, about two minutes on two cores
  sn-fast train --data mnist5k --scheme fgm --norm inf --eps 0.1 --beta 2 --out runs/mine
  sn-fast train --data mnist --data-dir DIR --arch mlp2_elu_sn --scheme fgm
  sn-fast train --resume runs/mine                 after Ctrl-C or a crash
  torchrun --nproc-per-node 2 -m sn_fast train --ddp --data mnist --data-dir DIR
"""


def add_command(commands: Any) -> None:
    parser = commands.add_parser(
        "train",
        help="adversarial training with and without spectral normalisation",
        description=_DESCRIPTION,
        epilog=_EXAMPLE,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    task = parser.add_argument_group("task")
    task.add_argument(
        "--data",
        metavar="NAME",
        help=f"data set: {', '.join(data_set_names())} (default: digits, of 8x8 pixels; only the first two need no "
        "--data-dir)",
    )
    task.add_argument("--data-dir", metavar="DIR", help="folder of the data set's official files")
    task.add_argument(
        "--allow-partial", action="store_true", default=None, help="accept a reduced or rebuilt version of these files"
    )
    task.add_argument(
        "--train-size", type=int, metavar="N", help=f"number of training images ({_by_data('train_size')})"
    )
    task.add_argument("--test-size", type=int, metavar="N", help="number of test images (default: all)")
    task.add_argument(
        "--split",
        metavar="{published,all,held_out}",
        help="images for training, validation and test, see docs/data.md (default: published)",
    )
    task.add_argument("--classes", metavar="NUMBERS", help="only images of these classes, e.g. 3,5 (default: all)")
    task.add_argument("--coarse", action="store_true", default=None, help="the 20 coarse classes of cifar100")
    task.add_argument(
        "--random-labels", type=float, metavar="SHARE", help="share of training labels drawn at random (default: 0)"
    )
    task.add_argument("--arch", metavar="NAME", help=f"network ({_by_data('arch')}); an unknown name lists all")
    task.add_argument(
        "--scheme", metavar="{erm,fgm,pgm,wrm}", help="attack to train against; pgd is pgm (default: pgm)"
    )
    task.add_argument("--norm", metavar="{2,inf,1}", help="norm of FGM's and PGM's eps (default: 2)")
    task.add_argument(
        "--eps",
        type=float,
        help=f"radius of the attack, in pixels in [0, 1]; with wrm 1 / (2 gamma) (default for pgm in l2: {_radii()})",
    )
    task.add_argument("--steps", type=int, metavar="N", help="steps of PGM and WRM (default: 15)")
    task.add_argument(
        "--attack-labels",
        metavar="{true,predicted}",
        help="labels that training's attack moves away from: true, or as in the published code the network's own "
        f"predictions ({_by_data('attack_labels')})",
    )
    training = parser.add_argument_group("training")
    training.add_argument("--beta", type=float, help=f"cap on every layer's spectral norm ({_by_data('beta')})")
    training.add_argument("--single", action="store_true", default=None, help="only the network with --beta")
    training.add_argument(
        "--gradient",
        metavar="{detached,full}",
        help="gradient of the normalisation: with u and v constant (default), or as published through the iteration",
    )
    training.add_argument(
        "--normalization",
        metavar="{parametrization,projection}",
        help="divide the weights in the forward, as published (default), or scale them back after each step",
    )
    training.add_argument(
        "--epochs", type=int, metavar="N", help=f"largest number of passes over the images ({_by_data('epochs')})"
    )
    training.add_argument(
        "--stop-accuracy",
        type=float,
        metavar="SHARE",
        help=f"training accuracy, mean over five epochs, that ends training ({_by_data('stop_accuracy')}; 0: none)",
    )
    training.add_argument("--batch-size", type=int, metavar="N", help=f"images per step ({_by_data('batch_size')})")
    training.add_argument(
        "--drop-last",
        action=argparse.BooleanOptionalAction,
        default=None,
        help=f"leave out the short last batch of an epoch ({_by_data('drop_last')})",
    )
    training.add_argument(
        "--optimizer", metavar="{sgd,adam}", help=f"sgd with momentum 0.9, or adam ({_by_data('optimizer')})"
    )
    training.add_argument(
        "--lr",
        type=float,
        help=f"step size ({_by_data('lr')}; of another --optimizer than the default: adam 0.001, sgd 0.01)",
    )
    training.add_argument(
        "--lr-decay",
        metavar="{none,epoch,step}",
        help="factor 0.95^(t/390) on the step size, t in epochs as published, or in steps as was meant "
        f"({_by_data('lr_decay')})",
    )
    training.add_argument(
        "--weight-decay",
        type=float,
        metavar="W",
        help="factor of all squared weights (default: 0, or of some networks the published one)",
    )
    training.add_argument(
        "--reference",
        action="store_true",
        default=None,
        help="the published arithmetic where it is less exact: FGM's norm underflows, weight decay counts twice",
    )
    training.add_argument(
        "--seed", type=int, metavar="N", help="random seed for split, weights and batches (default: 0)"
    )
    machine = parser.add_argument_group("machine")
    machine.add_argument("--device", metavar="{auto,cpu,cuda}", help="device; auto (default): CUDA if there is one")
    machine.add_argument(
        "--threads", type=int, metavar="N", help="number of CPU threads (default: 1, the fastest on a busy machine)"
    )
    machine.add_argument(
        "--precision",
        metavar="{float32,bfloat16}",
        help="of forwards and attacks (default: float32)",
    )
    machine.add_argument(
        "--ddp", action="store_true", help="share every batch between the processes that torchrun has started"
    )
    machine.add_argument("--compile", action="store_true", default=None, help="torch.compile for steps and attacks")
    output = parser.add_argument_group("output")
    output.add_argument(
        "--evaluation",
        metavar="{curves,published}",
        help="at the end: curves: every attack with the true labels, and a robustness curve; published: the training's "
        f"attack with predicted labels ({_by_data('evaluation')})",
    )
    place = output.add_mutually_exclusive_group()
    place.add_argument("--out", metavar="DIR", help="new folder of this run (default: an unused name in runs/)")
    place.add_argument("--resume", metavar="DIR", help="continue the run in this folder, with the options it has")
    output.add_argument("--tensorboard", action="store_true", default=None, help="write scalars for TensorBoard")
    output.add_argument(
        "--keep-every", type=int, metavar="N", help="keep the weights of every N-th epoch (default: only the last)"
    )
    output.add_argument("--json", action="store_true", help="print one JSON document in place of the table")
    output.add_argument("--quiet", action="store_true", help="no progress bar")
    parser.set_defaults(run=options_for(parser, path="--resume", root="--data-dir")(_run))


def _by_data(name: str) -> str:
    """The defaults of an option: one, or that of each data set."""
    values = {data: _default(name, defaults_of(data)) for data in data_set_names()}
    shown = {value: ", ".join(data for data, other in values.items() if other == value) for value in values.values()}
    return "default: " + (next(iter(shown)) if len(shown) == 1 else "; ".join(f"{d} {v}" for v, d in shown.items()))


def _default(name: str, default: DataDefaults) -> str:
    value = getattr(default, name, None)
    if not hasattr(default, name):
        value = default.options.get(name, TrainConfig.__dataclass_fields__[name].default)
    if value is None or isinstance(value, bool):
        return {None: "all", False: "no", True: "yes"}[value]
    return f"{value:g}" if isinstance(value, float) else str(value)


def _radii() -> str:
    strengths = {data: defaults_of(data).strength for data in data_set_names()}
    absolute = [f"{data} {strength.radius['2']:g}" for data, strength in strengths.items() if not strength.relative]
    return ", ".join(absolute) + ", else 0.05 times the mean norm of the images"


def _run(options: argparse.Namespace) -> None:
    chosen = vars(options).copy()
    for name in ("run", "json", "quiet", "out", "resume", "ddp"):
        del chosen[name]
    if options.classes is not None:
        chosen["classes"] = numbers_in("classes", options.classes, int)
    if options.ddp and not is_of_torchrun():
        raise UserError("argument --ddp: start with torchrun, e.g. torchrun --nproc-per-node 2 -m sn_fast train --ddp")
    with ranks_of_torchrun(options.device or "auto") if options.ddp else nullcontext(ALONE) as ranks:
        progress = not options.quiet and ranks.leads
        try:
            if options.resume is not None:
                result = resume(options.resume, chosen, progress=progress, ranks=ranks)
            else:
                result = train(TrainConfig.create(**chosen), options.out, progress=progress, ranks=ranks)
        except Interrupted as error:
            raise KeyboardInterrupt(_interrupts.how_to_continue(error.folder)) from None
    if not ranks.leads:
        return
    if options.json:
        write(json.dumps(result.document(), allow_nan=False))
    else:
        write(f"{table(result.config, result.metrics)}\n\nmetrics, checkpoint and plots: {result.path}")
