"""The products of a function: forward by the function, adjoint by autograd."""

from __future__ import annotations

import warnings
from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager, nullcontext

import torch
from torch import Tensor, nn

from .applying import maps_batches, probe, visible
from .protocol import OwnProducts, as_batch, checked_shape

_SCALES = (1.0, 1e3, 1e-3)  # of the inputs that show whether a function is linear


class FunctionProducts(OwnProducts):
    """The products of x -> f(x) - f(0); see ``LinearOperator.from_function``.

    Attributes:
        known_linear: whether every operation of f is known to be linear or affine; else random inputs show no other.
    """

    _OWN = ("matvec", "rmatvec")

    def __init__(
        self,
        f: Callable[[Tensor], Tensor],
        in_shape: int | Sequence[int],
        *,
        dtype: torch.dtype | None = None,
        device: torch.device | str | None = None,
        batched: bool | None = None,
        known_linear: bool = False,
        around: Callable[[], AbstractContextManager[object]] = nullcontext,
    ) -> None:
        if not callable(f):
            raise TypeError(f"f is a {type(f).__name__}; give a function, such as a layer")
        tensors = (
            [t for t in (*f.parameters(), *f.buffers()) if t.is_floating_point()] if isinstance(f, nn.Module) else []
        )
        dtype = dtype or (tensors[0].dtype if tensors else torch.get_default_dtype())
        if not isinstance(dtype, torch.dtype) or not dtype.is_floating_point:
            raise TypeError(f"dtype={dtype!r}: real floating-point operators are supported")
        device = torch.device(device or (tensors[0].device if tensors else "cpu"))
        shape = checked_shape("in_shape", in_shape)
        self._function = f
        self._around = around
        self.known_linear = known_linear
        with torch.no_grad():
            self._batches = maps_batches(self._run, shape, dtype, device) if batched is None else bool(batched)
            if (
                batched is None
                and not isinstance(f, nn.Module)
                and self._batches
                and self._differs_alone(shape, dtype, device)
            ):
                warnings.warn(
                    f"from_function: f takes a batch of tensors of shape {shape}, and also one such tensor, with "
                    "another result; it is taken as a map of batches. Give batched=True or False",
                    stacklevel=3,
                )
            zero = torch.zeros(1, *shape, dtype=dtype, device=device)
            try:
                self._offset = self._run(zero) if self._batches else self._run(zero[0])[None]
            except Exception as error:  # a user's function can fail in any way
                reason = f"{type(error).__name__}: {error}".splitlines()[0]
                raise ValueError(
                    f"f does not take inputs of shape {shape} ({reason}); in_shape= is without a batch"
                ) from error
            if self._offset.numel() == 0:
                raise ValueError(f"f returns an empty tensor for inputs of shape {shape}")
            super().__init__(shape, tuple(self._offset.shape[1:]), dtype=dtype, device=device)
            self._check()
            if self._batches and not maps_batches(self._run, shape, dtype, device):
                raise ValueError("f maps a sample of a batch to something else than the same sample alone")

    def matvec(self, x: Tensor) -> Tensor:
        batch, lead = as_batch(x, "x", self.in_shape)
        image = self._forward(batch.to(self.dtype)) - self._offset
        return image.reshape(*lead, *self.out_shape).to(torch.promote_types(x.dtype, self.dtype))

    def rmatvec(self, y: Tensor) -> Tensor:
        batch, lead = as_batch(y, "y", self.out_shape)
        with torch.inference_mode(False), torch.enable_grad():
            x = torch.zeros(len(batch), *self.in_shape, dtype=self.dtype, device=self.device, requires_grad=True)
            image = self._forward(x)
            if not image.requires_grad:  # a constant function
                back = torch.zeros_like(x)
            else:
                (found,) = torch.autograd.grad(image, x, batch.detach().clone().to(image), allow_unused=True)
                back = torch.zeros_like(x) if found is None else found
        return back.detach().reshape(*lead, *self.in_shape).to(torch.promote_types(y.dtype, self.dtype))

    def is_known(self) -> bool:
        """Whether this is a function all of whose operations are known to be linear or affine, in float64."""
        return self.known_linear and self.has_own_products()

    def _forward(self, batch: Tensor) -> Tensor:
        if self._batches and len(batch):
            return self._run(batch)
        if len(batch):
            return torch.stack([self._run(one) for one in batch])
        return batch.new_empty(0, *self.out_shape)

    def _run(self, x: Tensor) -> Tensor:
        with self._around(), torch.autocast(x.device.type, enabled=False):
            image = self._function(x)
        if not isinstance(image, Tensor):
            raise TypeError(f"f returned a {type(image).__name__}; a tensor is needed")
        if not image.is_floating_point():
            raise TypeError(
                f"f returned dtype {image.dtype}; a real one is needed (torch.view_as_real of complex values)"
            )
        return image

    def _one_by_one(self, batch: Tensor) -> Tensor:
        return torch.cat([self._forward(one) for one in batch.split(1)])

    def _differs_alone(self, shape: tuple[int, ...], dtype: torch.dtype, device: torch.device) -> bool:
        x = probe(2, shape, dtype, device, seed=1)
        try:
            alone = self._run(x[0])
        except Exception:  # it takes batches alone
            return False
        of_batch = self._run(x)[0]
        if alone.numel() != of_batch.numel() or not alone.numel():
            return bool(alone.numel())
        return bool((alone.flatten() - of_batch.flatten()).abs().max() > visible(dtype, device) * of_batch.abs().max())

    def _check(self) -> None:
        """Raise where random inputs show that f is not affine, or not the same at every call."""
        tolerance = visible(self.dtype, self.device)
        if not bool(torch.isfinite(self._offset).all()):
            raise ValueError("f(0) has NaN or infinite elements; the norm is not defined")
        for scale in _SCALES if self.dtype.itemsize >= 4 else _SCALES[:1]:
            x = scale * probe(3, self.in_shape, self.dtype, self.device, seed=2)
            x[2] = -2 * (x[0] + x[1])
            image = self._one_by_one(x)  # apart: what looks at the whole batch would see one sign
            rounding = tolerance * image.abs().max()
            if not bool(torch.isfinite(image).all()):
                raise ValueError("f of a random vector has NaN or infinite elements; the norm is not defined")
            if bool((self._one_by_one(x) - image).abs().max() > rounding):
                raise ValueError("f changes from call to call; give one that is the same map each time (module.eval())")
            image = image - self._offset
            if bool((image[2] + 2 * (image[0] + image[1])).abs().max() > rounding):
                raise ValueError(
                    "f is not linear: f(-2 (x + y)) - f(0) differs from -2 (f(x) + f(y) - 2 f(0)) for random x and y"
                )
        y = probe(3, self.out_shape, self.dtype, self.device, seed=3)
        x = probe(3, self.in_shape, self.dtype, self.device, seed=2)
        image, back = self.matvec(x), self.rmatvec(y)
        there = image.double().flatten(1) @ y.double().flatten(1).T
        here = x.double().flatten(1) @ back.double().flatten(1).T
        size = max(float(there.abs().max()), float(here.abs().max()))
        if bool((there - here).abs().max() > tolerance * size):
            raise ValueError(
                "f's derivative by autograd is not f's own linear part (a detached or custom gradient): give a "
                "LinearOperator with its own rmatvec"
            )
