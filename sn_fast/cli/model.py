"""The model that a command works on, from its arguments: a factory, a name, or the folder of a run."""

from __future__ import annotations

import argparse
import os
import re
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import nn

from ..errors import UserError, failures_explained
from ..inspection import load_checkpoint, load_model
from ..inspection.weights import check_values
from ..running import MOST_THREADS, memory_limited, torch_threads
from .output import others_on_stderr
from .runs import CHECKPOINT, RunNetwork, load_run, run_folder

_DEFAULT_SIZE = "3x224x224"
_MOST_AXES, _MOST_DIGITS = 63, 18  # of an axis, to be below 2**63; one axis is the batch's


class Model(NamedTuple):
    """A model with its weights.

    Attributes:
        name: for people.
        checkpoint: the file of its weights; None if it has none.
        run: what is known of it where it comes from the folder of a run.
    """

    name: str
    checkpoint: Path | None
    module: nn.Module
    run: RunNetwork | None


def add_model_arguments(parser: argparse.ArgumentParser) -> Any:
    """Add MODEL and the options that go with it; returns their group."""
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
    return model


def add_input_size(model: Any) -> None:
    """Add --input-size to the group of MODEL."""
    model.add_argument(
        "--input-size",
        metavar="CxHxW",
        help=f"size of one input of the network, without the batch (default: {_DEFAULT_SIZE}, or the run's)",
    )


def input_size_of(text: str | None) -> tuple[int, ...]:
    """--input-size as numbers; its default for None."""
    text = _DEFAULT_SIZE if text is None else text
    if not re.fullmatch(r"[1-9][0-9]*([x×,][1-9][0-9]*)*", text):
        raise UserError(f"argument --input-size: invalid value {text}: give numbers such as {_DEFAULT_SIZE}, or 784")
    sizes = re.split("[x×,]", text)
    if len(sizes) > _MOST_AXES or any(len(size) > _MOST_DIGITS for size in sizes):
        raise UserError(f"argument --input-size: {text} is too large: no tensor has such a shape")
    return tuple(map(int, sizes))


def check_model_arguments(options: argparse.Namespace) -> Path | None:
    """Raise UserError if the options contradict each other; the folder of the run, if MODEL is one."""
    folder = _run_of(options)
    if options.network is not None and folder is None:
        raise UserError("argument --network: needs the folder of a run of sn-fast train as MODEL")
    if options.allow_classes and options.checkpoint is None:
        raise UserError("argument --allow-class: needs --checkpoint FILE")
    return folder


def loaded_model(options: argparse.Namespace, device: torch.device) -> Model:
    """The model on ``device``; others' code, which making it may run, sees the working folder as with python -m."""
    folder = check_model_arguments(options)
    here = _working_folder()
    if here not in sys.path:
        sys.path.insert(0, here)
    if folder is not None:
        trained = load_run(folder, options.network)
        model = Model(trained.title, folder / CHECKPOINT, trained.module, trained)
    else:
        made = load_model(options.model, pretrained=options.pretrained)
        model = Model(made.name, options.checkpoint, made.module, None)
    os.chdir(here)  # a factory may have left it, and paths are those of the command line
    torch.set_default_device(None)
    if folder is None and options.checkpoint is not None:
        load_checkpoint(model.module, options.checkpoint, options.allow_classes)
    check_values(model.module)
    with failures_explained(f"argument --device: moving the model to {device} failed"):
        return model._replace(module=model.module.to(device))


@contextmanager
def model_to_measure(
    options: argparse.Namespace, device: torch.device, threads: int
) -> Iterator[tuple[Model, tuple[int, ...]]]:
    """The model and the size of its inputs, where it may be run: what others' code prints goes to stderr."""
    check_model_arguments(options)
    input_size = input_size_of(options.input_size)
    with torch_threads(threads), memory_limited(device), others_on_stderr():
        model = loaded_model(options, device)
        if model.run is not None and options.input_size is None:
            input_size = model.run.input_size
        yield model, input_size


def _run_of(options: argparse.Namespace) -> Path | None:
    """The run that MODEL names, or where there is none --checkpoint."""
    if options.model is None:
        folder = None if options.checkpoint is None else run_folder(options.checkpoint)
        if folder is None:
            raise UserError("the following arguments are required: MODEL")
        return folder
    folder = run_folder(options.model)
    if folder is None and Path(options.model).name != options.model and os.path.isdir(options.model):
        raise UserError(f"argument MODEL: the folder {options.model} holds no run of sn-fast train")
    for option in ("checkpoint", "pretrained"):
        if folder is not None and getattr(options, option):
            raise UserError(f"argument --{option}: {options.model} is a run with weights of its own; leave this out")
    return folder


def device_of(name: str) -> torch.device:
    if name not in ("auto", "cpu", "cuda"):
        raise UserError(f"argument --device: invalid value {name}: choose auto, cpu or cuda")
    if name == "cuda" and not torch.cuda.is_available():
        raise UserError("argument --device: invalid value cuda: this PyTorch sees no CUDA device; give --device cpu")
    return torch.device("cuda" if name != "cpu" and torch.cuda.is_available() else "cpu")


def threads_of(number: int | None) -> int:
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
