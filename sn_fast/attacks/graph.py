"""An attack's whole loop as one CUDA graph: captured at the first call, replayed at the next ones.

A graph repeats the same kernels on the same memory. So the tensors of a call are copied into those of the capture, and
a graph is used again only while everything that went into it stays: shapes, options, training flags, and the addresses
of the model's parameters and buffers. Their values may change, as they do in training.
"""

from __future__ import annotations

import weakref
from collections import OrderedDict
from collections.abc import Callable, Hashable, Sequence
from contextlib import nullcontext
from itertools import chain

import torch
from torch import Tensor, nn

from ..normalization.options import matmul_precision
from ..ops.library import stream_of

Tensors = Sequence[Tensor | None]
Notes = dict[str, int]
_MOST_GRAPHS = 4  # of one model: each keeps the memory of a whole forward and backward

_graphs: weakref.WeakKeyDictionary[nn.Module, OrderedDict[Hashable, LoopGraph]] = weakref.WeakKeyDictionary()


def run(
    model: nn.Module,
    options: Hashable,
    loop: Callable[[Tensors, Notes], Tensors],
    tensors: Tensors,
    check: Callable[[Notes], None],
) -> Tensors:
    """``loop(tensors, notes)``, by a graph where one was captured for this; the results are the caller's own.

    ``options`` stands for all that makes ``loop`` what it is, apart from model and tensors. What ``loop`` left in the
    notes when it was captured goes to ``check`` before a replay, in which Python checks nothing.
    """
    device = next(t.device for t in tensors if t is not None)
    with torch.cuda.device(device) if device.type == "cuda" else nullcontext():  # streams are of the current device
        graphs = _graphs.setdefault(model, OrderedDict())
        # Two streams must not share a graph: its memory is written by both.
        key = options, _model_key(model), tuple(map(_tensor_key, tensors)), stream_of(device)
        graph = graphs.get(key)
        if graph is not None:
            graphs.move_to_end(key)
            check(graph.notes)
            return graph.replay(tensors)
        graph = LoopGraph(loop, tensors)
        graphs[key] = graph
        while len(graphs) > _MOST_GRAPHS:
            graphs.popitem(last=False)
        return graph.first


class LoopGraph:
    """One captured loop. ``first`` is the result of the run that preceded the capture, for the same tensors."""

    def __init__(self, loop: Callable[[Tensors, Notes], Tensors], tensors: Tensors) -> None:
        self.notes: Notes = {}
        self._inputs = [None if t is None else t.clone() for t in tensors]
        # An ordinary run first: libraries initialise and plans are made in it, which a capture does not allow.
        self.first = on_side_stream(lambda: _copies(loop(self._inputs, self.notes)))
        self._replay, self._outputs = capture(lambda: loop(self._inputs, self.notes))

    def replay(self, tensors: Tensors) -> Tensors:
        for mine, theirs in zip(self._inputs, tensors, strict=True):
            if mine is not None and theirs is not None:
                mine.copy_(theirs)
        self._replay()
        return _copies(self._outputs)


def on_side_stream(function: Callable[[], Tensors]) -> Tensors:
    """Runs ``function`` on another stream than the current one, as what precedes a capture must."""
    stream, current = torch.cuda.Stream(), torch.cuda.current_stream()
    stream.wait_stream(current)
    with torch.cuda.stream(stream):
        results = function()
    current.wait_stream(stream)
    for result in results:
        if result is not None:
            result.record_stream(current)
    return results


def capture(function: Callable[[], Tensors]) -> tuple[Callable[[], None], Tensors]:
    """What repeats the kernels of ``function``, and the results that it then writes anew."""
    graph = torch.cuda.CUDAGraph()
    try:
        # Other threads (data loaders) may go on with what a capture forbids to this one.
        # A stream of our own: torch's own one for captures is of the device where it was first used.
        with torch.cuda.graph(graph, stream=torch.cuda.Stream(), capture_error_mode="thread_local"):
            results = function()
    except RuntimeError as error:
        raise RuntimeError(
            f"cuda_graph=True: the model or loss cannot be captured in a CUDA graph ({error}); it must not wait for "
            "the device (.item(), prints, masks of unknown size) nor copy from the CPU. Remedy: use cuda_graph=False"
        ) from error
    return graph.replay, results


def _copies(tensors: Tensors) -> Tensors:
    return [None if t is None else t.clone() for t in tensors]


def _tensor_key(t: Tensor | None) -> Hashable:
    return None if t is None else (tuple(t.shape), t.stride(), t.dtype, t.device)


def _model_key(model: nn.Module) -> Hashable:
    addresses = tuple(t.data_ptr() for t in chain(model.parameters(), model.buffers()))
    flags = tuple(m.training for m in model.modules())
    autocast = torch.is_autocast_enabled("cuda"), torch.get_autocast_dtype("cuda")
    return addresses, flags, autocast, matmul_precision()
