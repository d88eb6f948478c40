"""What is installed, for bug reports and ``sn-fast info``."""

from __future__ import annotations

import platform

import torch

from ._version import __version__
from .ops import compiled
from .ops.library import has_kernels


def info() -> dict[str, str]:
    """Versions of sn_fast, Python and torch, the kernels (or why there are none), what is in use, and the GPU."""
    in_use = "CUDA kernels on CUDA devices, plain PyTorch elsewhere"
    return {
        "sn_fast": __version__,
        "python": platform.python_version(),
        "torch": torch.__version__,
        "kernels": compiled.STATUS,
        "backend": in_use if has_kernels(torch.device("cuda")) else "plain PyTorch on every device",
        "gpu": _gpu(),
        "driver": _driver(),
    }


def _gpu() -> str:
    if not torch.cuda.is_available():
        return "none (torch sees no CUDA device)"
    capability = torch.cuda.get_device_capability()
    text = f"{torch.cuda.get_device_name()}, compute capability {capability[0]}.{capability[1]}"
    if compiled.MODULE is not None and not compiled.covers(compiled.MODULE.archs, capability):
        text += f": the kernels are not for it (built for {compiled.MODULE.archs})"
    return text


def _driver() -> str:
    version = compiled.driver_version()
    if version is None:
        return "none"
    text = f"up to CUDA {version[0]}.{version[1]}"
    gpus = [torch.cuda.get_device_capability()] if torch.cuda.is_available() else []
    if compiled.MODULE is not None and compiled.too_old(version, compiled.MODULE, gpus):
        text += f": too old for kernels built with CUDA {compiled.MODULE.cuda_version}"
    return text
