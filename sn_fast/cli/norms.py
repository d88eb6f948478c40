"""``sn-fast norms``."""

from __future__ import annotations

import argparse
import json
from pathlib import Path
from typing import Any

from ..errors import UserError
from ..inspection import inspect_model, plot, table
from ..inspection.plot import check_plot
from ..inspection.table import document
from ..layers.describe import times
from .model import (
    add_input_size,
    add_model_arguments,
    device_of,
    model_to_measure,
    threads_of,
)
from .output import write
from .parser import options_for

_DEFAULT_TOL = 3e-3

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
    add_input_size(add_model_arguments(parser))
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
    parser.set_defaults(run=options_for(parser, path="--plot")(_run))


def _run(options: argparse.Namespace) -> None:
    device = device_of(options.device)
    threads = threads_of(options.threads)
    if not 0 < options.tol < 1:
        raise UserError(f"argument --tol: invalid value {options.tol:g}: must be a number between 0 and 1")
    if options.plot is not None:
        check_plot(options.plot)
    with model_to_measure(options, device, threads) as (model, input_size):
        inspection = inspect_model(
            model.module,
            input_size,
            tol=options.tol,
            include=options.include,
            exclude=options.exclude,
            progress=not options.quiet,
        )
    source = {
        "model": model.name,
        "checkpoint": None if model.checkpoint is None else str(model.checkpoint),
        "pretrained": options.pretrained,
        "input_size": list(input_size),
        "tol": options.tol,
        "device": str(device),
        "threads": threads,
    }
    weights = options.checkpoint or ("pretrained" if options.pretrained else "weights as made")
    parts = [model.name, *([] if model.run else [str(weights)]), f"input {times(input_size)}"]
    title = ", ".join(parts)
    if options.json:
        write(json.dumps({**source, **document(inspection)}, allow_nan=False))
    else:
        write(f"{title}\n\n{table(inspection)}")
    if options.plot is not None:
        plot(inspection, options.plot, title)
