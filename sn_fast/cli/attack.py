"""``sn-fast attack``."""

from __future__ import annotations

import argparse
import io
import json
from pathlib import Path
from typing import Any

import numpy as np

from ..errors import OptionError, UserError
from ..experiments import figures
from ..experiments.data import Samples, data_set_names, load_data
from ..experiments.reports.attack import AttackReport, attack_network
from ..experiments.training import TrainConfig
from ..experiments.training.adversary import Adversary
from ..experiments.training.config import SCHEMES, json_number
from ..files import replace_file
from ..inspection.plot import TITLE_OF_ATTACKS, check_plot
from ..running import memory_limited, torch_threads
from .model import Model, add_model_arguments, check_model_arguments, device_of, loaded_model, threads_of
from .output import others_on_stderr, write
from .parser import options_for

_IMAGES = 1000
_DESCRIPTION = """\
Attack a network on the images of a data set, at several strengths: the share of images
that it still classifies right, and beside it the share that no perturbation of that size
can change, certified by a bound of the network's Lipschitz constant.
"""
_EXAMPLE = """\
example:
  sn-fast attack runs/digits-pgm-beta1.6-seed0                 a run of sn-fast train, on its own data
  sn-fast attack nets:make --checkpoint best.pt --data cifar10 --data-dir DIR --norm inf --eps 2/255,4/255,8/255
  sn-fast attack runs/mine --attack pgm --eps 0.5,1,2 --plot curve.png --save adversarial.npz
"""


def add_command(commands: Any) -> None:
    parser = commands.add_parser(
        "attack",
        help="accuracy under attack and certified accuracy of a network",
        description=_DESCRIPTION,
        epilog=_EXAMPLE,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    add_model_arguments(parser)
    data = parser.add_argument_group("data")
    data.add_argument("--data", metavar="NAME", help="data set (default: the run's)")
    data.add_argument("--data-dir", metavar="DIR", help="folder of the data set's official files (default: the run's)")
    data.add_argument("--allow-partial", action="store_true", help="accept a reduced or rebuilt version of these files")
    data.add_argument("--whiten", action="store_true", help="each image less its mean, over its standard deviation")
    data.add_argument("--crop", type=int, metavar="N", help="side of the centre crop, in pixels")
    data.add_argument(
        "--part", default="test", metavar="{train,validation,test}", help="part of the data (default: test)"
    )
    data.add_argument(
        "--images", type=int, default=_IMAGES, metavar="N", help=f"the first N images (default: {_IMAGES})"
    )
    attacks = parser.add_argument_group("attacks")
    attacks.add_argument("--attack", default="fgm,pgm,wrm", metavar="NAMES", help="attacks (default: fgm,pgm,wrm)")
    attacks.add_argument("--norm", metavar="{2,inf,1}", help="norm of FGM's and PGM's eps (default: 2, or the run's)")
    attacks.add_argument(
        "--eps",
        metavar="NUMBERS",
        help="strengths, e.g. 0.5,1 or 2/255,8/255; of wrm 1 / (2 gamma) (default: 1/2, 1 and 2 times the run's)",
    )
    attacks.add_argument("--steps", type=int, metavar="N", help="steps of PGM and WRM (default: 15, or the run's)")
    attacks.add_argument(
        "--labels",
        default="true",
        metavar="{true,predicted}",
        help="labels to move away from (default: true)",
    )
    attacks.add_argument("--no-certify", action="store_true", help="no certified accuracy")
    machine = parser.add_argument_group("machine")
    machine.add_argument("--device", default="auto", metavar="{auto,cpu,cuda}", help="device (default: auto)")
    machine.add_argument("--threads", type=int, metavar="N", help="number of CPU threads (default: all cores)")
    output = parser.add_argument_group("output")
    output.add_argument("--json", action="store_true", help="print one JSON document in place of the table")
    output.add_argument("--plot", type=Path, metavar="FILE", help="accuracy over eps: .png, .pdf or .svg")
    output.add_argument("--save", type=Path, metavar="FILE", help="adversarial examples: .npz")
    output.add_argument("--quiet", action="store_true", help="no progress bar")
    parser.set_defaults(run=options_for(parser, path="--plot", root="--data-dir", scheme="--attack")(_run))


def _run(options: argparse.Namespace) -> None:
    device, threads = device_of(options.device), threads_of(options.threads)
    for name in ("images", "crop", "steps"):
        value = getattr(options, name)
        if value is not None and value < 1:
            raise OptionError(name, value, "must be an integer >= 1")
    if options.part not in ("train", "validation", "test"):
        raise OptionError("part", options.part, "choose train, validation or test")
    if options.plot is not None:
        check_plot(options.plot)
    if options.save is not None:
        if options.save.suffix != ".npz":
            raise OptionError("save", options.save, "give a file name that ends in .npz")
        if not options.save.parent.is_dir():  # now, not after the attacks
            raise OptionError("save", options.save, f"there is no folder {options.save.parent}")
    if check_model_arguments(options) is None and options.data is None:
        raise UserError(f"argument --data: is required for this MODEL: give one of {', '.join(data_set_names())}")
    with torch_threads(threads), memory_limited(device), others_on_stderr():
        model = loaded_model(options, device)
        samples = _samples(options, model).to(device)
        report = attack_network(
            model.module,
            samples,
            _attacks(options, model),
            labels=options.labels,
            certify=not options.no_certify,
            keep_examples=options.save is not None,
            progress=not options.quiet,
        )
    _write(options, model, report)


def _samples(options: argparse.Namespace, model: Model) -> Samples:
    run = None if model.run is None else model.run.config
    own = run is not None and options.data in (None, run.data)
    name = options.data or (run.data if run is not None else "")
    if own and run is not None:
        prepared: dict[str, Any] = run.data_options()
    else:
        prepared = {"whiten": options.whiten, "crop": options.crop}
    if options.data_dir is not None or not own:
        prepared["root"] = options.data_dir
    if options.allow_partial:
        prepared["allow_partial"] = True
    split = load_data(name, **prepared)
    samples: Samples = getattr(split, options.part)
    if not len(samples):
        parts = " or ".join(part for part, _ in split.items())
        raise OptionError("part", options.part, f"{name} has no such images with these options; choose {parts}")
    return Samples(samples.x[: options.images], samples.y[: options.images])


def _attacks(options: argparse.Namespace, model: Model) -> list[Adversary]:
    """Each attack at each strength: that of a training that would use it, so that the same rules check both."""
    run = None if model.run is None else model.run.config
    found = []
    for scheme in (name.strip() for name in options.attack.lower().split(",")):
        if scheme not in (*SCHEMES[1:], "pgd"):  # the first attacks nothing
            raise OptionError("attack", scheme, "choose fgm, pgm or wrm")
        base = run or TrainConfig.create(data="digits")
        norm = options.norm or base.norm
        steps = options.steps or base.steps
        if options.eps is not None:
            strengths = [_number(part) for part in options.eps.split(",")]
        elif run is not None:
            strengths = [factor * run.adversary("pgm" if scheme == "pgd" else scheme).eps for factor in (0.5, 1.0, 2.0)]
        else:
            raise UserError("argument --eps: is required for this MODEL: give strengths, e.g. 0.5,1")
        found += [TrainConfig.create(scheme=scheme, norm=norm, steps=steps, eps=eps) for eps in strengths]
    return [config.adversary(config.scheme) for config in found]


def _number(text: str) -> float:
    """A number, or a quotient such as 8/255."""
    try:
        above, _, below = text.partition("/")
        return float(above) / float(below or 1)
    except (ValueError, ZeroDivisionError):
        raise OptionError("eps", text, "give numbers, e.g. 0.5,1 or 2/255,8/255") from None


def _write(options: argparse.Namespace, model: Model, report: AttackReport) -> None:
    if options.save is not None:
        buffer = io.BytesIO()
        np.savez_compressed(buffer, **report.examples)  # type: ignore[arg-type]
        _replace(options.save, buffer.getvalue())
    if options.plot is not None:
        image = figures.encoded(report.figure(), options.plot.suffix[1:].lower(), TITLE_OF_ATTACKS)
        _replace(options.plot, image)
    if options.json:
        table = report.tables()[""]
        document = {
            "model": model.name,
            "images": report.images,
            "labels": report.labels,
            "lipschitz": json_number(report.lipschitz),
            "reason": report.reason,
            "columns": list(table.columns),
            "rows": [list(row) for row in table.rows],
        }
        write(json.dumps(document, allow_nan=False))
    else:
        title = f"{model.name}, {report.images} {options.part} images, attacks from the {report.labels} labels"
        write(f"{title}\n\n{report.text()}")


def _replace(path: Path, content: bytes) -> None:
    try:
        replace_file(path, content)
    except OSError as error:
        raise UserError(f"cannot write {path}: {error.strerror or error}; give another place") from None
