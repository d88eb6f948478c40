"""What is installed, for bug reports and ``sn-fast info``."""

from __future__ import annotations

import platform

import torch

from ._version import __version__


def info() -> dict[str, str]:
    """Versions of sn_fast, Python and torch, the backend in use, and the GPU if torch sees one."""
    device = torch.cuda.get_device_name() if torch.cuda.is_available() else "none (torch sees no CUDA device)"
    return {
        "sn_fast": __version__,
        "python": platform.python_version(),
        "torch": torch.__version__,
        "backend": "plain PyTorch on every device (this version has no compiled kernels)",
        "gpu": device,
    }
