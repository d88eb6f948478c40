"""Makes sure that what is measured are the kernels, and settles torch's own settings."""

from __future__ import annotations

import importlib.util
import shutil

import torch

import sn_fast
from sn_fast.ops.library import UseKernels, has_kernels

from .context import Context

_KEPT: list[UseKernels] = []


def serve(context: Context) -> None:
    """Kernels on the GPU, or an error; in a rehearsal those compiled for the CPU, or (without a compiler) none.

    Comparisons are to be exact in float32, so torch's convolutions must not use tf32 unasked; and cuDNN may choose its
    fastest algorithms, to the benefit of what the kernels are compared with.
    """
    torch.backends.cudnn.allow_tf32 = False
    torch.backends.cudnn.benchmark = True
    if not context.rehearse:
        if not has_kernels(torch.device("cuda")):
            raise RuntimeError(f"there are no kernels to measure: {sn_fast.info()['kernels']}")
        return
    torch.set_num_threads(1)
    if shutil.which("g++") and importlib.util.find_spec("pybind11"):
        from tests.kernels import emulator

        _KEPT.append(UseKernels(emulator.build(), "cpu"))
