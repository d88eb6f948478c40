"""``sn-fast bench``."""

from __future__ import annotations

import argparse
import json
from dataclasses import asdict
from typing import Any

from ..errors import UserError
from ..inspection.cost import cost_table, measure_cost
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

_MOST_BATCH, _MOST_STEPS, _MOST_TURNS = 1 << 20, 10_000, 10_000
_DESCRIPTION = """\
Measure what spectral normalisation costs a model on this machine: whole training
steps of copies of it, without normalisation, with apply_spectral_norm, with
SpectralProjection and with torch.nn.utils.parametrizations.spectral_norm, and the
refresh of all norms alone. The copies take turns; times are medians and quartiles.
"""
_EXAMPLE = """\
example:
  sn-fast bench torchvision:resnet18 --batch-size 8
  sn-fast bench nets:make --input-size 1x28x28 --attack-steps 10 --json    steps of PGD-10 training
"""


def add_command(commands: Any) -> None:
    parser = commands.add_parser(
        "bench",
        help="what normalising a model costs on this machine",
        description=_DESCRIPTION,
        epilog=_EXAMPLE,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    add_input_size(add_model_arguments(parser))
    measuring = parser.add_argument_group("measuring")
    measuring.add_argument("--batch-size", type=int, default=8, metavar="N", help="samples of a step (default: 8)")
    measuring.add_argument(
        "--attack-steps", type=int, default=0, metavar="N", help="steps of PGD before each training step (default: 0)"
    )
    measuring.add_argument(
        "--turns", type=int, default=5, metavar="N", help="turns of each way, at least 3 (default: 5)"
    )
    measuring.add_argument(
        "--device", default="auto", metavar="{auto,cpu,cuda}", help="device; auto (default) is CUDA if present"
    )
    measuring.add_argument("--threads", type=int, metavar="N", help="number of CPU threads (default: all cores)")
    output = parser.add_argument_group("output")
    output.add_argument("--json", action="store_true", help="print one JSON document in place of the table")
    parser.set_defaults(run=options_for(parser, batch="--batch-size")(_run))


def _run(options: argparse.Namespace) -> None:
    device = device_of(options.device)
    threads = threads_of(options.threads)
    for name, least, most in (
        ("batch_size", 1, _MOST_BATCH),
        ("attack_steps", 0, _MOST_STEPS),
        ("turns", 3, _MOST_TURNS),
    ):
        value = getattr(options, name)
        if not least <= value <= most:
            option = name.replace("_", "-")
            raise UserError(f"argument --{option}: invalid value {value}: must be an integer from {least} to {most}")
    with model_to_measure(options, device, threads) as (model, input_size):
        costs = measure_cost(
            model.module,
            input_size,
            batch=options.batch_size,
            attack_steps=options.attack_steps,
            turns=options.turns,
        )
    if options.json:
        facts = {"model": model.name, "input_size": list(input_size), "batch_size": options.batch_size}
        facts |= {"attack_steps": options.attack_steps, "device": str(device), "threads": threads}
        write(json.dumps(facts | {"ways": [asdict(cost) for cost in costs]}, allow_nan=False))
        return
    attack = f", PGD-{options.attack_steps}" if options.attack_steps else ""
    where = f"{threads} CPU thread{'s' * (threads > 1)}" if device.type == "cpu" else str(device)
    title = f"{model.name}, input {times(input_size)}, batch {options.batch_size}{attack}, {where}"
    write(f"{title}\n\n{cost_table(costs)}")
