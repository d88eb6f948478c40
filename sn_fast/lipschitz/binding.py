"""Which argument of a call is which: by the operator's schema, never by its place alone.

Builtin functions and methods of PyTorch are bound by the schemas of the operator of that name, functions in Python by
their signature, those of ``operator`` by place (they take nothing else). A call that fits no signature, or fits two
that disagree, is not bound.
"""

from __future__ import annotations

import builtins
import functools
import inspect
import operator
import sys
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch._jit_internal import boolean_dispatched

# Where an argument is in a call: a position, a keyword, or all positions from one on.
Slot = int | str | slice

# PyTorch's own names of the first argument, and NumPy's names that its functions take as well.
_CANONICAL = {"self": "input", "x": "input", "a": "input", "x1": "input", "x2": "other"}
_CANONICAL |= {"axis": "dim", "keepdims": "keepdim", "A": "input"}
_UNARY = {"neg", "pos", "abs", "invert"}
_BINARY = {"add", "sub", "mul", "truediv", "matmul", "pow", "floordiv", "mod", "lt", "le", "gt", "ge", "eq", "ne"}
_BINARY |= {"iadd", "isub", "imul", "itruediv", "imatmul", "ipow", "ifloordiv", "imod"}
# Their other arguments choose a dtype, a device or a memory format, or are sizes: the rules look at the result.
_FREE_FORM = {
    *("to", "type", "cpu", "cuda", "float", "double", "half", "bfloat16", "bool", "long", "int", "short", "size"),
    *("dim", "ndimension", "numel", "element_size", "get_device", "is_floating_point", "stride", "requires_grad"),
}
_METHODS: dict[str, tuple[str, ...]] = {
    "new_tensor": ("input", "data"),
    "new_zeros": ("input", "size"),
    "new_ones": ("input", "size"),
}
_METHODS |= {"new_full": ("input", "size", "fill_value")}
_PUBLIC = {"_threshold": "threshold"}  # functions that PyTorch publishes under another name
_PACKAGES = ("torch", "_operator", "builtins")


@dataclass(frozen=True)
class _Parameter:
    name: str
    by_place: bool
    required: bool
    kind: str | None = None  # its type in a schema
    first: bool = False

    @property
    def canonical(self) -> str:
        """Its name in the rules: "input" for the first, whatever the function calls it."""
        return "input" if self.first and self.name == "tensor" else _CANONICAL.get(self.name, self.name)


def name_of(target: Any) -> str | None:
    """The name under which the rules know a function or method; None for one that is not PyTorch's own.

    That of a function in place is the name without its "_", and one of ``torch.special`` starts with "special_".
    """
    if isinstance(target, str):
        method = getattr(Tensor, target, None)
        replaced = inspect.isfunction(method) and not method.__code__.co_filename.startswith(torch.__path__[0])
        return None if method is None or replaced else _out_of_place(target)
    name = getattr(target, "__name__", None)
    if not isinstance(name, str):
        return None
    package = (getattr(target, "__module__", None) or "torch").partition(".")[0]
    if package == "torchvision":
        return f"torchvision.{name}"
    if package not in _PACKAGES or not _is_original(target, name):
        return None
    return _out_of_place(_PUBLIC.get(name, name))


def bind(target: Any, args: Sequence[Any], kwargs: dict[str, Any]) -> dict[str, Slot] | None:
    """Where each argument is, by its name in PyTorch ("input" for the first); None if no signature fits."""
    if isinstance(target, str) and (target in _FREE_FORM or target in _METHODS):
        names = _METHODS.get(target, ("input",))
        rest = [f"argument {i}" for i in range(len(names), len(args))]
        return {**dict(zip((*names, *rest), range(len(args)))), **{k: k for k in kwargs}}
    for loosely in (False, True):  # at first without one number that stands for a list of them
        fits = (_fit(signature, args, kwargs, len(args), loosely) for signature in _signatures(target))
        bound = [b for b in fits if b is not None]
        if bound:
            return bound[0] if all(b == bound[0] for b in bound) else None
    return None


def value_at(slot: Slot, args: Sequence[Any], kwargs: dict[str, Any]) -> Any:
    """The argument at this place."""
    return kwargs[slot] if isinstance(slot, str) else args[slot]


def replaced(slot: Slot, value: Any, args: Sequence[Any], kwargs: dict[str, Any]) -> tuple[list[Any], dict[str, Any]]:
    """The call's arguments with another one at this place."""
    args, kwargs = list(args), dict(kwargs)
    if isinstance(slot, str):
        kwargs[slot] = value
    else:
        args[slot] = value
    return args, kwargs


def _out_of_place(name: str) -> str:
    return name[:-1] if name.endswith("_") and not name.endswith("__") else name


def _is_original(target: Any, name: str) -> bool:
    """Whether a function is the one that PyTorch (or Python) has under its name, not one that was put there."""
    if inspect.isbuiltin(target):
        return True
    home = sys.modules.get(getattr(target, "__module__", ""), None)
    code = inspect.unwrap(target)
    source = getattr(getattr(code, "__code__", None), "co_filename", "")
    return getattr(home, name, None) is target and source.startswith(torch.__path__[0])


def _signatures(target: Any) -> tuple[tuple[_Parameter, ...], ...]:
    if isinstance(target, nn.Module):
        first, *rest = _of_python(type(target).forward)[1:]
        return ((_Parameter("input", first.by_place, first.required), *rest),)
    return _signatures_of_function(target)


@functools.lru_cache(maxsize=1024)
def _signatures_of_function(target: Any) -> tuple[tuple[_Parameter, ...], ...]:
    if target is builtins.getattr:
        return (tuple(_Parameter(n, True, True) for n in ("input", "name")),)
    if isinstance(target, str):
        method = getattr(Tensor, target, None)
        if inspect.isfunction(method):
            return (_of_python(method),)
        return tuple(_of_schemas(target, method=True))
    name = target.__name__
    if getattr(operator, name, None) is target:
        if name == "getitem":
            return (tuple(_Parameter(n, True, True) for n in ("input", "index")),)
        names = ("input",) if name in _UNARY else ("input", "other") if name in _BINARY else ()
        return (tuple(_Parameter(n, True, True) for n in names),) if names else ()
    if target in boolean_dispatched:
        return (_of_python(boolean_dispatched[target]["if_true"]),)
    if inspect.isbuiltin(target):
        return tuple(_of_schemas(name))
    return (_of_python(target),)


def _of_python(function: Any) -> tuple[_Parameter, ...]:
    kinds = inspect.Parameter
    return tuple(
        _Parameter(
            p.name,
            p.kind is not kinds.KEYWORD_ONLY,
            p.default is kinds.empty and p.kind is not kinds.VAR_POSITIONAL,
            "*" if p.kind is kinds.VAR_POSITIONAL else None,
            first=i == 0,
        )
        for i, p in enumerate(inspect.signature(function).parameters.values())
        if p.kind is not kinds.VAR_KEYWORD
    )


def _of_schemas(name: str, method: bool = False) -> Iterator[tuple[_Parameter, ...]]:
    for schema in torch._C._jit_get_schemas_for_operator(f"aten::{name}"):
        arguments = list(schema.arguments)
        if any(str(a.type) == "t" or str(a.type).startswith("List[t") for a in arguments):
            continue  # of lists in scripts
        if method:
            own = next((a for a in arguments if a.name == "self"), None)
            if own is None:
                continue
            # The tensor comes first, wherever the function takes it: x.where(condition, other).
            arguments.remove(own)
            arguments.insert(0, own)
        yield tuple(
            _Parameter(a.name, not a.kwarg_only, not a.has_default_value(), str(a.real_type)) for a in arguments
        )


def _fit(
    signature: Sequence[_Parameter], args: Sequence[Any], kwargs: dict[str, Any], given: int, loosely: bool
) -> dict[str, Slot] | None:
    """The arguments by name if they fit this signature."""
    by_place = [p for p in signature if p.by_place]
    slots: dict[str, Slot] = {}
    if by_place and by_place[-1].kind == "*":
        by_place, variadic = by_place[:-1], by_place[-1].canonical
        if given > len(by_place):
            slots[variadic], given = slice(len(by_place), given), len(by_place)
    elif given > len(by_place) == 2 and _fits_list_of_int(by_place[1].kind, args[1:]):
        slots[by_place[1].canonical], given = slice(1, given), 1  # x.view(2, 3)
    if given > len(by_place):
        return None
    for i, parameter in enumerate(by_place[:given]):
        if not _fits(parameter.kind, args[i], loosely):
            return None
        slots[parameter.canonical] = i
    known = {p.canonical: p for p in signature if p.kind != "*"}
    own = {p.name: p.canonical for p in signature}
    for keyword, value in kwargs.items():
        name = own.get(keyword, _CANONICAL.get(keyword, keyword))
        if name in slots or name not in known or not _fits(known[name].kind, value, loosely):
            return None
        slots[name] = keyword
    missing = any(p.required and p.canonical not in slots for p in signature)
    return None if missing else slots


def _fits_list_of_int(kind: str | None, values: Sequence[Any]) -> bool:
    return kind in ("List[int]", "List[SymInt]") and all(isinstance(v, int) for v in values)


def _fits(kind: str | None, value: Any, loosely: bool) -> bool:
    """Whether a value may be an argument of this type in a schema; of a signature in Python anything may."""
    if kind is None:
        return True
    if kind.startswith("Optional["):
        kind = kind[len("Optional[") : -1]
        if value is None:
            return True
    if kind.startswith("List["):
        inner = kind[len("List[") : -1]
        if isinstance(value, (tuple, list)):
            return all(_fits(inner, v, loosely) for v in value)
        return loosely and inner in ("int", "SymInt", "float") and _fits(inner, value, loosely)
    if kind == "Tensor":
        return isinstance(value, Tensor)
    if kind in ("int", "SymInt"):
        return isinstance(value, int) and not isinstance(value, bool)
    if kind == "float":
        return isinstance(value, (int, float))
    if kind in ("number", "Scalar"):
        # A tensor with one element passes for a number, and not only one without dimensions.
        return isinstance(value, (int, float, complex)) or (isinstance(value, Tensor) and value.numel() == 1)
    plain: dict[str, Any] = {"bool": bool, "str": str, "ScalarType": torch.dtype, "Device": (str, int, torch.device)}
    plain |= {"Layout": torch.layout, "MemoryFormat": torch.memory_format, "Generator": torch.Generator}
    return kind in plain and isinstance(value, plain[kind])
