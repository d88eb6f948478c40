"""The linear map of a layer with a forward of its own: every operation that its input goes through is followed."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode

from .applying import probe, visible
from .linear_ops import FRESH, LEAKS, rule_of
from .operators import FunctionOperator, LinearOperator
from .undisturbed import undisturbed
from .weighted import ConvOperator, MatrixOperator, layer_operator

_PADDINGS = {"reflection_pad": "reflect", "replication_pad": "replicate"}


class NotLinear(ValueError):
    """A layer's map is not linear, or cannot be followed; the message says why."""


@dataclass(frozen=True)
class _Input:
    """The layer's input: as it is, or padded by (before, after) per spatial axis."""

    pads: tuple[tuple[int, int], ...] = ()
    mode: str = "zeros"


@dataclass(frozen=True)
class _Image:
    """The image of the input under an operator, plus a constant."""

    op: LinearOperator


def traced_operator(
    module: nn.Module, in_shape: Sequence[int], dtype: torch.dtype, device: torch.device
) -> LinearOperator:
    """The linear map of ``module`` at inputs of this shape, bias aside, as its forward and its hooks compute it.

    Where its input goes through one convolution or matrix alone, with a weight that does not depend on it (as in
    weight standardisation, masks, quantisation of weights), the operator is that of this weight. Otherwise it is that
    of the function, by products (``LinearOperator.from_function``).

    On meta there are no values: the operations alone are followed, and the operator has the parameter itself for its
    weight.

    Raises:
        NotLinear: an operation is not linear in the input, or the forward fails; on meta, the weight is another one.
    """
    shape = tuple(in_shape)
    x = probe(1, shape, dtype, device, seed=5)
    tracker = _Tracker(x)
    with undisturbed(module), torch.no_grad():
        try:
            with tracker, _PadWatcher(tracker):
                out = module(x)
        except Exception as error:  # a forward that is not ours can fail in any way
            raise NotLinear(f"its forward fails on an input of shape {(1, *shape)} ({_first_line(error)})") from error
        if not isinstance(out, Tensor):
            raise NotLinear(f"its forward returns a {type(out).__name__}")
        reason = tracker.reason(out)
        if reason is not None:
            raise NotLinear(reason)
        state = tracker.state(out)
        if device.type == "meta":
            if isinstance(state, _Image) and tracker.applies_a_parameter(state.op, module):
                return state.op
            raise NotLinear(
                "on the meta device its map is known only where it is one convolution or matrix of a parameter itself; "
                "load or initialise the weights first"
            )
        fresh = probe(2, shape, dtype, device, seed=6)
        first, again = module(fresh[:1]), module(fresh[:1])
        if bool((first - again).abs().max() > visible(dtype, device) * first.abs().max()):
            raise NotLinear("its map changes from call to call; use eval()")
        if isinstance(state, _Image) and not tracker.leak and _fits(state.op, module, fresh):
            return state.op
    try:
        return FunctionOperator(
            module,
            shape,
            dtype=dtype,
            device=device,
            batched=True,
            known_linear=not tracker.leak and not tracker.rounded,
            around=lambda: undisturbed(module),
        )
    except ValueError as error:
        raise NotLinear(str(error)) from error


def table_operator(module: nn.Module, rows: int, device: torch.device) -> LinearOperator:
    """The map from one-hot vectors to what a lookup layer returns for their index, offset included.

    Raises:
        NotLinear: an index's row depends on the other indices, or there is no row.
    """
    indices = torch.arange(rows, device=device)
    with undisturbed(module), torch.no_grad():
        try:
            table, backwards = module(indices), module(indices.flip(0))
            alone = module(indices[:1])
        except Exception as error:  # a forward that is not ours can fail in any way
            raise NotLinear(f"its forward fails on all indices ({_first_line(error)})") from error
    for found, wanted in ((backwards, table), (alone, table)):
        if not isinstance(found, Tensor) or not isinstance(wanted, Tensor) or wanted.ndim != 2:
            raise NotLinear("its forward does not return one row for each index")
    same = torch.equal(backwards.flip(0), table) and torch.equal(alone, table[:1])
    if not same or not table.is_floating_point():
        raise NotLinear("its rows depend on the other indices, or change from call to call")
    return MatrixOperator(table.T)


def _fits(op: LinearOperator, module: nn.Module, x: Tensor) -> bool:
    """Whether ``op`` is what the module computes for other inputs than the one that was followed."""
    images = torch.cat([module(one) for one in x.split(1)])
    wanted = images - module(torch.zeros_like(x[:1]))
    error = (op.matvec(x) - wanted).abs().max()
    return bool(error <= visible(x.dtype, x.device) * images.abs().max())


class _Tracker(TorchDispatchMode):
    """Follows the input: which tensors depend on it, whether linearly, and which are the image under an operator.

    What depends on the input is known by storage, so that views and writes in place are followed.

    Attributes:
        leak: why Python code may have seen values that depend on the input.
        rounded: whether what depends on the input went through a lower precision.
        written: storages that were written to.
    """

    def __init__(self, x: Tensor) -> None:
        super().__init__()
        self.leak: str | None = None
        self.rounded = False
        self.written: set[int] = set()
        self._kept: list[Tensor] = []  # a storage that is alive keeps its address
        self._reasons: dict[int, str | None] = {}  # by storage: why it is not linear, None if it is
        self._states: dict[Any, _Input | _Image] = {}
        self._mark(x, None)
        self._states[_place(x)] = _Input()

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        flat = list(_tensors((args, kwargs)))
        depends = [t for t in flat if self._depends(t)]
        known = [self.state(a) if isinstance(a, Tensor) else None for a in args]
        out = func(*args, **kwargs)
        written = list(_written(func, args, kwargs))
        self.written.update(map(_storage, written))
        if not depends:
            return out
        name = func._schema.name.partition("::")[2]
        reason = next((r for r in map(self.reason, depends) if r is not None), None)
        if name in LEAKS:
            self.leak = self.leak or f"its code reads values that depend on its input ({name})"
            return out
        if name in FRESH:
            return out
        if reason is None:
            reason = self._why_not_linear(name, args, kwargs)
        for t in written:
            self._mark(t, reason)
            self._forget(_storage(t))
        for t in _tensors(out):
            self._mark(t, reason)
        if reason is None and isinstance(out, Tensor) and not any(t is out for t in written):
            state = self._new_state(name, args, kwargs, known, out)
            if state is not None:
                self._states[_place(out)] = state
        return out

    def reason(self, t: Tensor) -> str | None:
        """Why a tensor does not depend linearly on the input; None if it does, or does not depend on it."""
        return self._reasons.get(_storage(t))

    def state(self, t: Tensor) -> _Input | _Image | None:
        return self._states.get(_place(t))

    def applies_a_parameter(self, op: LinearOperator, module: nn.Module) -> bool:
        """Whether the weight of an operator is, in place and form, a parameter of the module that nothing wrote to."""
        layer = layer_operator(op)
        if layer is None or _storage(layer.weight) in self.written:
            return False
        return any(is_same_memory(layer.weight, p) for p in module._parameters.values() if p is not None)

    def padded(self, x: Tensor, out: Tensor, pads: Sequence[int], mode: str) -> None:
        """Note that ``out`` is ``x`` padded, as F.pad takes the pads."""
        if self.state(x) == _Input() and self.reason(out) is None:
            pairs = _pairs(pads, x.ndim - 2)
            if pairs is not None:
                self._states[_place(out)] = _Input(pairs, mode)

    def _depends(self, t: Tensor) -> bool:
        return _storage(t) in self._reasons

    def _mark(self, t: Tensor, reason: str | None) -> None:
        """Note that a tensor holds what depends on the input."""
        self._kept.append(t)
        key = _storage(t)
        self._reasons[key] = self._reasons.get(key) or reason

    def _forget(self, storage: int) -> None:
        for place in [p for p in self._states if p[0] == storage]:
            del self._states[place]

    def _why_not_linear(self, name: str, args: Sequence[Any], kwargs: dict[str, Any]) -> str | None:
        rule = rule_of(name)
        if rule is None:
            return f"{name} of its input is not known to be linear"
        depending = {i for i, a in enumerate(args) if any(self._depends(t) for t in _tensors(a))}
        if any(self._depends(t) for t in _tensors(kwargs)):
            depending.add(-1)
        if name == "_to_copy" or name == "to":
            dtype, was = kwargs.get("dtype"), args[0].dtype
            if dtype is not None and not (dtype.is_floating_point or dtype.is_complex):
                return f"its input is converted to {dtype}"
            if dtype is not None and dtype.itemsize < was.itemsize:
                self.rounded = True
        if name.rstrip("_") in ("div", "divide") and (kwargs.get("rounding_mode") or len(args) > 2):
            return "division with rounding of its input is not linear"
        by_statistics = "batch_norm" in name and "no_training" not in name
        if by_statistics and (args[5] if len(args) > 5 else kwargs.get("training", True)):
            return "it normalises by the statistics of its input"
        return rule.why_not(name, depending)

    def _new_state(
        self, name: str, args: Sequence[Any], kwargs: dict[str, Any], known: list[Any], out: Tensor
    ) -> _Input | _Image | None:
        """What is known of the result of a linear operation."""
        first = known[0] if known else None
        if name in ("clone", "_to_copy", "contiguous", "alias", "detach") and isinstance(first, (_Input, _Image)):
            return first if out.dtype == args[0].dtype else None
        if name == "constant_pad_nd" and first == _Input():
            pairs = _pairs(args[1], args[0].ndim - 2)
            return None if pairs is None else _Input(pairs, "zeros")
        for stem, mode in _PADDINGS.items():
            if name.startswith(stem) and first == _Input():
                pairs = _pairs(args[1], args[0].ndim - 2)
                return None if pairs is None else _Input(pairs, mode)
        if name in ("convolution", "_convolution") and isinstance(first, _Input):
            return _convolved(first, args, kwargs)
        if name == "linear" and first == _Input() and args[0].ndim == 2:
            return _Image(MatrixOperator(args[1].detach()))
        if name == "mm" and first == _Input() and args[0].ndim == 2:
            return _Image(MatrixOperator(args[1].detach().T))
        if name == "addmm" and known[1] == _Input() and args[1].ndim == 2 and first is None:
            if not self._depends(args[0]) and kwargs.get("alpha", 1) == 1:
                return _Image(MatrixOperator(args[2].detach().T))
            return None
        image = next((k for k in known if isinstance(k, _Image)), None)
        if image is None or out.shape != next(a for a, k in zip(args, known) if k is image).shape:
            return None
        others = [a for a, k in zip(args, known) if k is not image]
        if any(isinstance(a, Tensor) and self._depends(a) for a in others):
            return None
        if name in ("add", "sub") and (image is first or kwargs.get("alpha", 1) == 1):
            return image if name == "add" or image is first else _Image(-image.op)
        if name == "mul" and len(others) == 1 and not (isinstance(others[0], Tensor) and others[0].numel() > 1):
            return _Image(float(others[0]) * image.op)
        if name == "div" and image is first and not (isinstance(others[0], Tensor) and others[0].numel() > 1):
            return None  # 1 / c is rounded: by products
        return _Image(-image.op) if name == "neg" else None


class _PadWatcher(TorchFunctionMode):
    """Circular padding, which is made of many copies, seen as one."""

    def __init__(self, tracker: _Tracker) -> None:
        super().__init__()
        self._tracker = tracker

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        out = func(*args, **kwargs)
        if func in (F.pad, torch._C._nn.pad):
            given = dict(zip(("input", "pad", "mode"), args), **kwargs)
            if given.get("mode") == "circular":
                self._tracker.padded(given["input"], out, given["pad"], "circular")
        return out


def _convolved(state: _Input, args: Sequence[Any], kwargs: dict[str, Any]) -> _Image | None:
    x, weight = args[0], args[1]
    n = weight.ndim - 2
    names = ("stride", "padding", "dilation", "transposed", "output_padding", "groups")
    given = dict(zip(names, args[3:9]), **{k: v for k, v in kwargs.items() if k in names})
    settings = {k: tuple(v) * n if isinstance(v, (list, tuple)) and len(v) == 1 else v for k, v in given.items()}
    transposed = bool(settings.pop("transposed", False))
    if x.ndim != n + 2 or (state.pads and transposed):
        return None
    size = [s - before - after for s, (before, after) in zip(x.shape[2:], state.pads or ((0, 0),) * n)]
    own = tuple(settings.pop("padding"))
    if state.pads and state.mode != "zeros" and any(own):
        return None
    pads = [(b + p, a + p) for (b, a), p in zip(state.pads or ((0, 0),) * n, own)]
    if not transposed:
        settings.pop("output_padding", None)
    try:
        op = ConvOperator(
            weight.detach(),
            size,
            padding=pads,
            padding_mode=state.mode if state.pads else "zeros",
            transposed=transposed,
            **settings,
        )
    except (ValueError, TypeError):
        return None
    return _Image(op)


def _pairs(pads: Sequence[int], n: int) -> tuple[tuple[int, int], ...] | None:
    """Pads as F.pad takes them, last axis first, as (before, after) per spatial axis; None if they are others."""
    if len(pads) > 2 * n or min(pads, default=0) < 0:
        return None
    pairs = [(int(pads[2 * i]), int(pads[2 * i + 1])) for i in range(len(pads) // 2)]
    return tuple(reversed([*pairs, *[(0, 0)] * (n - len(pairs))]))


def _tensors(nested: Any) -> Iterator[Tensor]:
    if isinstance(nested, Tensor):
        yield nested
    elif isinstance(nested, dict):
        for value in nested.values():
            yield from _tensors(value)
    elif isinstance(nested, (list, tuple)):
        for value in nested:
            yield from _tensors(value)


def _written(func: Any, args: Sequence[Any], kwargs: dict[str, Any]) -> Iterator[Tensor]:
    """The arguments that an operation writes to."""
    for i, argument in enumerate(func._schema.arguments):
        if argument.alias_info is not None and argument.alias_info.is_write:
            yield from _tensors(args[i] if i < len(args) else kwargs.get(argument.name))


def _storage(t: Tensor) -> int:
    return t.untyped_storage()._cdata


def is_same_memory(t: Tensor, other: Tensor) -> bool:
    """Whether two tensors are the same elements of memory, in the same order."""
    return _place(t) == _place(other)


def _place(t: Tensor) -> Any:
    return _storage(t), t.storage_offset(), tuple(t.shape), t.stride(), t.dtype


def _first_line(error: BaseException) -> str:
    return f"{type(error).__name__}: {error}".splitlines()[0][:200]
