"""``sn-fast norms``."""

from __future__ import annotations

import argparse
import json
import os
import re
import sys
from pathlib import Path
from typing import Any

import torch

from ..errors import UserError, failures_explained
from ..inspection import LoadedModel, inspect_model, load_checkpoint, load_model, plot, table
from ..inspection.plot import check_plot
from ..inspection.table import document
from ..inspection.weights import check_values
from ..layers.describe import times
from ..running import MOST_THREADS, memory_limited, torch_threads
from .output import others_on_stderr, write
from .parser import options_for
from .runs import CHECKPOINT, load_run, run_folder

_DEFAULT_SIZE = "3x224x224"
_DEFAULT_TOL = 3e-3
_MOST_AXES, _MOST_DIGITS = 63, 18  # of an axis, to be below 2**63; one axis is the batch's

_OPTION_OF = {  # argument of a library function: how it is given here
    "model": "MODEL",
    "checkpoint": "--checkpoint",
    "pretrained": "--pretrained",
    "allow_classes": "--allow-class",
    "input_size": "--input-size",
    "include": "--include",
    "exclude": "--exclude",
    "path": "--plot",
}

_DESCRIPTION = """\
Print a certified interval [at least, at most] of the spectral norm of every Linear,
Embedding and (transposed) convolution layer: of the layer's true linear map at the
input size that the network gives it, for the weights in use. Beside it, for
convolutions, the norm of the kernel reshaped to a matrix, which
torch.nn.utils.parametrizations.spectral_norm divides by, and how far that is off.
"""
_EXAMPLE = """\
example:
  sn-fast norms torchvision:resnet50 --pretrained --plot resnet50.png
  sn-fast norms nets:make --checkpoint best.pt --input-size 1x28x28      def make() in nets.py returns the model
  sn-fast norms resnet18 --include 'layer4.*conv' --json
  sn-fast norms runs/digits-pgm-beta1.6-seed0                            the network that sn-fast train made
"""


def add_command(commands: Any) -> None:
    parser = commands.add_parser(
        "norms",
        help="certified spectral norms of a model's layers",
        description=_DESCRIPTION,
        epilog=_EXAMPLE,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    model = parser.add_argument_group("model")
    model.add_argument(
        "model",
        metavar="MODEL",
        nargs="?",
        help="factory module:function (importable from here, called without arguments), or name of a torchvision or "
        "timm model: torchvision:NAME, timm:NAME, or NAME for the first that has it; or "
        "folder of a run of sn-fast train",
    )
    weights = model.add_mutually_exclusive_group()
    weights.add_argument(
        "--checkpoint",
        type=Path,
        metavar="FILE",
        help="state dict to load, plain or under a key such as state_dict or model, from torch.save or .safetensors",
    )
    model.add_argument(
        "--allow-class",
        dest="allow_classes",
        action="append",
        default=[],
        metavar="MODULE.CLASS",
        help="class of other objects that the checkpoint may hold, e.g. argparse.Namespace; repeat for several; "
        "only for a file that you trust",
    )
    weights.add_argument("--pretrained", action="store_true", help="published weights of torchvision or timm")
    model.add_argument("--network", metavar="NAME", help="network of a run, e.g. beta=inf (default: its last)")
    model.add_argument(
        "--input-size",
        metavar="CxHxW",
        help=f"size of one input of the network, without the batch (default: {_DEFAULT_SIZE}, or the run's)",
    )
    measuring = parser.add_argument_group("measuring")
    measuring.add_argument("--include", metavar="REGEX", help="only layers whose name matches (re.search)")
    measuring.add_argument("--exclude", metavar="REGEX", help="no layers whose name matches")
    measuring.add_argument(
        "--tol",
        type=float,
        default=_DEFAULT_TOL,
        help=f"tolerance of the iteration for the lower ends (default: {_DEFAULT_TOL:g}); a smaller one is slower",
    )
    measuring.add_argument(
        "--device",
        default="auto",
        metavar="{auto,cpu,cuda}",
        help="device; auto (default) is CUDA if present",
    )
    measuring.add_argument("--threads", type=int, metavar="N", help="number of CPU threads (default: all cores)")
    output = parser.add_argument_group("output")
    output.add_argument("--json", action="store_true", help="print one JSON document in place of the table")
    output.add_argument("--plot", type=Path, metavar="FILE", help="bar chart of the norms: .png, .pdf or .svg")
    output.add_argument("--quiet", action="store_true", help="no progress bar")
    parser.set_defaults(run=_run)


def _run(options: argparse.Namespace) -> None:
    with options_for(_OPTION_OF):
        _measure(options)


def _measure(options: argparse.Namespace) -> None:
    device = _device(options.device)
    threads = _threads(options.threads)
    if not 0 < options.tol < 1:
        raise UserError(f"argument --tol: invalid value {options.tol:g}: must be a number between 0 and 1")
    if options.plot is not None:
        check_plot(options.plot)
    folder = _run_of(options)
    if options.network is not None and folder is None:
        raise UserError("argument --network: needs the folder of a run of sn-fast train as MODEL")
    input_size = _size(_DEFAULT_SIZE if options.input_size is None else options.input_size)
    if options.allow_classes and options.checkpoint is None:
        raise UserError("argument --allow-class: needs --checkpoint FILE")
    here = _working_folder()
    if here not in sys.path:  # as with python -m
        sys.path.insert(0, here)
    with torch_threads(threads), memory_limited(device), others_on_stderr():
        if folder is not None:
            trained = load_run(folder, options.network)
            loaded, checkpoint = LoadedModel(trained.title, trained.module), folder / CHECKPOINT
            input_size = trained.input_size if options.input_size is None else input_size
        else:
            loaded, checkpoint = load_model(options.model, pretrained=options.pretrained), options.checkpoint
        os.chdir(here)  # a factory may have left it, and paths are those of the command line
        torch.set_default_device(None)
        if checkpoint is not None and folder is None:
            load_checkpoint(loaded.module, checkpoint, options.allow_classes)
        check_values(loaded.module)
        with failures_explained(f"argument --device: moving the model to {device} failed"):
            module = loaded.module.to(device)
        inspection = inspect_model(
            module,
            input_size,
            tol=options.tol,
            include=options.include,
            exclude=options.exclude,
            progress=not options.quiet,
        )
    source = {
        "model": loaded.name,
        "checkpoint": None if checkpoint is None else str(checkpoint),
        "pretrained": options.pretrained,
        "input_size": list(input_size),
        "tol": options.tol,
        "device": str(device),
        "threads": threads,
    }
    weights = options.checkpoint or ("pretrained" if options.pretrained else "weights as made")
    parts = [loaded.name, *([] if folder else [str(weights)]), f"input {times(input_size)}"]
    title = ", ".join(parts)
    if options.json:
        write(json.dumps({**source, **document(inspection)}, allow_nan=False))
    else:
        write(f"{title}\n\n{table(inspection)}")
    if options.plot is not None:
        plot(inspection, options.plot, title)


def _run_of(options: argparse.Namespace) -> Path | None:
    """The run that MODEL names, or where there is none --checkpoint."""
    if options.model is None:
        folder = None if options.checkpoint is None else run_folder(options.checkpoint)
        if folder is None:
            raise UserError("the following arguments are required: MODEL; see sn-fast norms --help")
        return folder
    folder = run_folder(options.model)
    if folder is None and Path(options.model).name != options.model and os.path.isdir(options.model):
        raise UserError(f"argument MODEL: the folder {options.model} holds no run of sn-fast train")
    for option in ("checkpoint", "pretrained"):
        if folder is not None and getattr(options, option):
            raise UserError(f"argument --{option}: {options.model} is a run with weights of its own; leave this out")
    return folder


def _size(text: str) -> tuple[int, ...]:
    if not re.fullmatch(r"[1-9][0-9]*([x×,][1-9][0-9]*)*", text):
        raise UserError(f"argument --input-size: invalid value {text}: give numbers such as {_DEFAULT_SIZE}, or 784")
    sizes = re.split("[x×,]", text)
    if len(sizes) > _MOST_AXES or any(len(size) > _MOST_DIGITS for size in sizes):
        raise UserError(f"argument --input-size: {text} is too large: no tensor has such a shape")
    return tuple(map(int, sizes))


def _device(name: str) -> torch.device:
    if name not in ("auto", "cpu", "cuda"):
        raise UserError(f"argument --device: invalid value {name}: choose auto, cpu or cuda")
    if name == "cuda" and not torch.cuda.is_available():
        raise UserError("argument --device: invalid value cuda: this PyTorch sees no CUDA device; give --device cpu")
    return torch.device("cuda" if name != "cpu" and torch.cuda.is_available() else "cpu")


def _threads(number: int | None) -> int:
    if number is None:
        return torch.get_num_threads()  # all cores, or OMP_NUM_THREADS
    if number < 1:
        raise UserError(f"argument --threads: invalid value {number}: must be an integer >= 1")
    if number > MOST_THREADS:
        raise UserError(f"argument --threads: invalid value {number}: must be an integer <= {MOST_THREADS}")
    return number


def _working_folder() -> str:
    try:
        return os.getcwd()
    except OSError as error:
        raise UserError(f"the working folder cannot be read ({error.strerror}): change to another") from None
