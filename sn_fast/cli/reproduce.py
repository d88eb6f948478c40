"""``sn-fast reproduce``."""

from __future__ import annotations

import argparse
import json
from pathlib import Path
from typing import Any

from ..errors import OptionError
from ..experiments.reports import PARTS, STORE, html_page, reproduce
from ..experiments.reproduction import PUBLISHED, Grid, Outcome, Store, describe
from ..running import notice
from .output import write
from .parser import names_in, numbers_in, options_for

_DESCRIPTION = """\
Train a grid of networks, with and without spectral normalisation, as the paper's published
code did, and report what it reports, beside the published values: as text, JSON, figures
and one HTML page. Runs are kept: the same command continues after Ctrl-C or a crash, and
several processes, also of machines that share the folder, compute one grid.

  table           accuracy over beta, the best one by validation
  curves          accuracy over the attack's strength in l2 and l_inf, and training curves
  margins         margins, gradient norms, norm gain, perturbed images
  random-labels   how well random labels are fitted (trains more networks)
  norms           spectral norms of the layers after training
  bounds          the theory's capacities beside the measured gaps
  all             all of these
"""
_EXAMPLE = """\
example:
  sn-fast reproduce table --set mnist --data DIR --arch mlp1_relu --scheme erm,fgm --betas published
  sn-fast reproduce all --set mnist --data DIR --arch mlp1_relu --scheme pgm --betas inf,4,2,1 --seeds 0,1,2 --jobs 2
  sn-fast reproduce table --set digits --arch mlp1_elu --scheme fgm --betas inf,2,1 --epochs 20
"""


# Options that each run has.
_OF_RUNS = (
    *("epochs", "train_size", "test_size", "validation_size", "split"),
    *("steps", "batch_size", "device", "threads"),
)
# Options of the grid and of its runs by other names.
_OPTIONS = {
    "parts": "WHAT",
    "root": "--data",
    "folder": "--out",
    "data": "--set",
    "data_dir": "--data",
    "archs": "--arch",
    "schemes": "--scheme",
    "beta": "--betas",
    "seed": "--seeds",
}


def add_command(commands: Any) -> None:
    parser = commands.add_parser(
        "reproduce",
        help="the paper's tables and figures",
        description=_DESCRIPTION,
        epilog=_EXAMPLE,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("what", nargs="+", metavar="WHAT", help=f"{', '.join(PARTS)}, or all")
    grid = parser.add_argument_group("grid")
    grid.add_argument("--set", default="mnist", metavar="NAME", help="data set (default: mnist)")
    grid.add_argument("--data", metavar="DIR", help="folder of the data set's official files")
    grid.add_argument("--allow-partial", action="store_true", help="accept a reduced or rebuilt version of these files")
    grid.add_argument("--arch", default="mlp1_relu", metavar="NAMES", help="networks, without _sn (default: mlp1_relu)")
    grid.add_argument("--scheme", default="erm,fgm,pgm,wrm", metavar="NAMES", help="attacks (default: erm,fgm,pgm,wrm)")
    grid.add_argument("--norm", default="2", metavar="{2,inf,1}", help="norm of FGM's and PGM's eps (default: 2)")
    grid.add_argument("--eps", type=float, help="radius of FGM and PGM (default: the published one of the norm)")
    grid.add_argument(
        "--betas",
        default="inf,4,2,1",
        metavar="NUMBERS",
        help=f"caps; inf is no normalisation (default: inf,4,2,1); {PUBLISHED}: inf and the published best one",
    )
    grid.add_argument("--seeds", default="0", metavar="NUMBERS", help="random seeds (default: 0)")
    runs = parser.add_argument_group("runs (the published values unless given; a table of other runs is labelled)")
    runs.add_argument("--epochs", type=int, metavar="N", help="largest number of epochs")
    runs.add_argument("--train-size", type=int, metavar="N", help="number of training images")
    runs.add_argument("--test-size", type=int, metavar="N", help="number of test images")
    runs.add_argument("--classes", metavar="NUMBERS", help="only these classes, e.g. 3,5")
    runs.add_argument(
        "--split", metavar="{published,all,held_out}", help="images for training, validation and test, see docs/data.md"
    )
    runs.add_argument("--validation-size", type=int, metavar="N", help="number of images for the choice of beta")
    runs.add_argument("--steps", type=int, metavar="N", help="steps of PGM and WRM")
    runs.add_argument("--batch-size", type=int, metavar="N", help="images per step")
    runs.add_argument(
        "--reference",
        action="store_true",
        help="published arithmetic of FGM and weight decay",
    )
    runs.add_argument("--device", metavar="{auto,cpu,cuda}", help="device (default: auto)")
    runs.add_argument("--threads", type=int, metavar="N", help="number of CPU threads of each process (default: 1)")
    output = parser.add_argument_group("output")
    output.add_argument("--out", type=Path, metavar="DIR", help="folder (default: reproduction/SET)")
    output.add_argument("--jobs", type=int, default=1, metavar="N", help="number of processes (default: 1)")
    output.add_argument("--only-report", action="store_true", help="compute nothing; report what the folder holds")
    output.add_argument("--retry-failed", action="store_true", help="compute runs again that failed")
    output.add_argument(
        "--export",
        type=Path,
        metavar="DIR",
        help="folder for a copy of the runs' numbers, without networks",
    )
    output.add_argument("--json", action="store_true", help="print one JSON document in place of the table")
    output.add_argument("--quiet", action="store_true", help="no progress bar")
    parser.set_defaults(run=options_for(parser, **_OPTIONS)(_run))


def _run(options: argparse.Namespace) -> None:
    parts = PARTS if "all" in options.what else tuple(dict.fromkeys(options.what))
    if options.jobs < 1:
        raise OptionError("jobs", options.jobs, "must be an integer >= 1")
    if options.export is not None and options.export.exists() and not options.export.is_dir():
        raise OptionError("export", options.export, "is a file; give a folder")  # now, not after the runs
    extra = {name: value for name in _OF_RUNS if (value := getattr(options, name)) is not None}
    if options.classes is not None:
        extra["classes"] = numbers_in("classes", options.classes, int)
    if options.data is not None:
        extra["data_dir"] = options.data
    for name in ("allow_partial", "reference"):
        if getattr(options, name):
            extra[name] = True
    grid = Grid(
        data=options.set,
        norm=options.norm.lower().removeprefix("l"),
        eps=options.eps,
        archs=names_in(options.arch),
        schemes=names_in(options.scheme),
        betas=PUBLISHED if options.betas == PUBLISHED else numbers_in("betas", options.betas, float),
        seeds=numbers_in("seeds", options.seeds, int),
        options=extra,
    )
    folder = options.out or Path("reproduction", options.set)

    def ended(outcome: Outcome) -> None:
        if not options.quiet:
            notice(describe(outcome))

    try:
        report = reproduce(
            parts,
            grid,
            folder,
            jobs=options.jobs,
            progress=not options.quiet,
            only_report=options.only_report,
            retry_failed=options.retry_failed,
            report=ended,
        )
    except KeyboardInterrupt:
        raise KeyboardInterrupt(f"interrupted; the same command continues (runs are kept in {folder})") from None
    report.write(folder, html_page)
    if options.export is not None:
        for outcome in report.outcomes:
            Store(folder / STORE).export(outcome.config, Store(options.export / STORE))
    if options.json:
        write(json.dumps(report.document(), allow_nan=False))
    else:
        write(f"{report.text()}\n\nreport, figures and runs: {folder}")
