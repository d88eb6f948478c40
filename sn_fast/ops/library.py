"""The ``sn_fast`` operator library: one place where a schema, its reference, its fake and its kernel meet."""

from __future__ import annotations

import functools
import warnings
from collections.abc import Callable
from types import ModuleType
from typing import Any

import torch
from torch import Tensor

from ..reference.eager import is_watched as is_watched
from .compiled import covers, driver_version, too_old

LIBRARY = torch.library.Library("sn_fast", "DEF")
_KERNELS: dict[str, tuple[Callable[..., Any], Callable[..., Any]]] = {}  # name -> (kernel, reference)
_SERVED: dict[str, UseKernels] = {}  # by device type
_DTYPE_CODES = {torch.float32: 0, torch.float16: 1, torch.bfloat16: 2}  # csrc/core/numeric.cuh: Dtype


def define(
    schema: str,
    reference: Callable[..., Any],
    fake: Callable[..., Any],
    kernel: Callable[..., Any] | None = None,
) -> Any:
    """Define the operator ``sn_fast::<schema>`` and return its overload, ready to be called.

    ``reference`` (plain PyTorch) is registered as CompositeExplicitAutograd: the dispatcher uses it on every device
    that has no kernel of its own, so it is the fallback as well as the oracle. ``fake`` gives the output's shapes.
    ``kernel`` takes the compiled module and then the operator's arguments; it checks, allocates, and hands addresses
    over. It calls ``reference`` itself for what the kernels do not take (float64).
    """
    name = schema.split("(", 1)[0]
    LIBRARY.define(schema, tags=(torch.Tag.pt2_compliant_tag,))
    LIBRARY.impl(name, reference, "CompositeExplicitAutograd")
    torch.library.register_fake(f"sn_fast::{name}", fake, lib=LIBRARY)
    if kernel is not None:
        _KERNELS[name] = kernel, reference
    return getattr(torch.ops.sn_fast, name).default


class UseKernels:
    """Serves every operator on tensors of one device type from a compiled module, until ``stop`` or its own end.

    On GPUs and drivers that the module was not built for, the reference stays in place, with one warning.
    """

    def __init__(self, module: ModuleType, device_type: str) -> None:
        self._module = module
        self._device_type = device_type
        self._runs: bool | None = None if device_type == "cuda" else True  # asked at the first call: it starts CUDA
        self._library = torch.library.Library("sn_fast", "IMPL")
        for name, (kernel, reference) in _KERNELS.items():
            self._library.impl(name, functools.partial(self._serve, kernel, reference), device_type.upper())
        _SERVED[device_type] = self

    def _serve(self, kernel: Callable[..., Any], reference: Callable[..., Any], *args: Any) -> Any:
        return kernel(self._module, *args) if self.runs() else reference(*args)

    def runs(self) -> bool:
        """Whether the module's code runs on the devices that are there."""
        if self._runs is None:
            why = self._obstacle()
            self._runs = why is None
            if why:
                warnings.warn(f"sn_fast's kernels were built for {why}. Plain PyTorch is used", stacklevel=2)
        return self._runs

    def _obstacle(self) -> str | None:
        driver = driver_version()
        capabilities = [torch.cuda.get_device_capability(i) for i in range(torch.cuda.device_count())]
        if driver is not None and too_old(driver, self._module, capabilities):
            cuda = self._module.cuda_version
            remedy = f"update the driver, or reinstall with a toolkit of CUDA {driver[0]}.{driver[1]}"
            return f"CUDA {cuda}, but the driver here supports {driver[0]}.{driver[1]} at most. Remedy: {remedy}"
        for capability in capabilities:
            if not covers(self._module.archs, capability):
                found = "{}.{}".format(*capability)
                remedy = f"reinstall with SN_FAST_CUDA_ARCHS={found}"
                return f"{self._module.archs}, but a GPU here is {found}. Remedy: {remedy}"
        return None

    def stop(self) -> None:
        self._library._destroy()
        _SERVED.pop(self._device_type, None)


def has_kernels(device: torch.device) -> bool:
    """Whether operators on this device run compiled kernels."""
    return kernels_of(device) is not None


def kernels_of(device: torch.device) -> ModuleType | None:
    """The compiled module that serves this device, for what is no operator: work in place on a model's own state."""
    served = _SERVED.get(device.type)
    return served._module if served is not None and served.runs() else None


def dtype_code(t: Tensor) -> int | None:
    """The kernels' code of a tensor's dtype; None where they do not take it."""
    return _DTYPE_CODES.get(t.dtype)


def stream_of(device: torch.device) -> tuple[int, int]:
    """The current stream of a device, as the compiled module takes it: handle and device index."""
    if device.type != "cuda" or not torch.cuda.is_initialized():  # no CUDA yet: a fake tensor's
        return 0, 0
    index = torch.cuda.current_device() if device.index is None else device.index
    return torch._C._cuda_getCurrentRawStream(index), index


def is_capturing(device: torch.device) -> bool:
    """Whether a CUDA graph is under capture on this device's current stream."""
    return device.type == "cuda" and torch.cuda.is_current_stream_capturing()
