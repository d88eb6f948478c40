"""One projected weight: whose it is, its operator, and the state of its power iteration."""

from __future__ import annotations

import math
from collections.abc import Mapping

import torch
from torch import Tensor, nn

from ...ops import refresh
from ...ops.library import is_capturing
from ...ops.project_weights import as_matrix, iterate
from ...ops.singular_vectors import POWER_STEPS
from ...reference.geometry import Geometry
from ...reference.linear_map import compute_dtype


class Projected:
    """Beside the settings: ``v`` and ``sigma``, the state, and ``u``, which stands in where A v is zero.

    Of a weight that is sharded all three are those of the whole weight, and equal on all ranks.
    """

    u: Tensor
    v: Tensor
    sigma: Tensor

    def __init__(
        self,
        name: str,
        module: nn.Module,
        shape: torch.Size,
        geometry: Geometry,
        rows: int,
        beta: float,
        cap: bool,
        clips: bool,
    ) -> None:
        self.name = name
        self.module = module
        self.shape = shape
        self.geometry = geometry
        self.code = geometry.encode()
        self.rows = (1 if geometry.transposed else 0) if geometry.axes else rows
        """The dimension of the weight that belongs to the output."""
        self.beta = beta
        self.cap = cap
        self.clips = clips
        """Whether all its singular values are clipped, not the largest alone."""
        self.is_started = False
        self.is_void = False
        """Whether the state comes from a weight without a norm to start from, of zeros or not finite."""
        self.tied: list[tuple[str, nn.Module]] = []
        """Other layers with this weight."""

    @property
    def is_matrix(self) -> bool:
        return not self.geometry.axes

    @property
    def u_shape(self) -> tuple[int, ...]:
        return (self.shape[self.rows],) if self.is_matrix else self.geometry.out_shape(self.shape)

    @property
    def v_shape(self) -> tuple[int, ...]:
        return (self.shape.numel() // self.shape[self.rows],) if self.is_matrix else self.geometry.in_shape(self.shape)

    def weight(self) -> Tensor | None:
        """The parameter as it is now: it may have been replaced since."""
        return self.module._parameters.get("weight")

    def needs_start(self, device: torch.device) -> bool:
        """Whether v has to be found anew; compiled and captured code, which cannot do that, go on from a void state."""
        return not self.is_started or (self.is_void and not (torch.compiler.is_compiling() or is_capturing(device)))

    def start(self, weight: Tensor) -> None:
        """Find u, v and sigma of this whole weight by Lanczos, on its device."""
        self.refuse_capture(weight)
        weight = weight.detach()
        operand = as_matrix(weight, self.rows).T if self.is_matrix else weight
        u, v = self._allocated(compute_dtype(weight), weight.device)
        us, vs = ([v], [u]) if self.is_matrix else ([u], [v])
        refresh.restart([operand], us, vs, self.code)
        sigma = torch.zeros((), dtype=u.dtype, device=weight.device)
        found = iterate([weight], ([u], [v], [sigma]), [self.rows], self.code, POWER_STEPS, None, "fp32")
        self._set(found[0][0], found[1][0], found[2][0])
        self._note_void()

    def refuse_capture(self, weight: Tensor) -> None:
        if torch.compiler.is_compiling() or is_capturing(weight.device):
            raise RuntimeError(
                f"SpectralProjection: v and sigma of layer {self.name!r} are not on {weight.device} yet, and compiled "
                "or captured code cannot bring them there; call step() once before"
            )

    def move_to(self, weight: Tensor) -> None:
        """Bring the state to the weight's device, in its precision."""
        dtype = compute_dtype(weight)
        if self.v.device == weight.device and self.v.dtype == dtype:
            return
        self.refuse_capture(weight)
        with torch.inference_mode(False):  # a tensor made in inference mode cannot be written outside
            self.u, self.v, self.sigma = (t.to(weight.device, dtype) for t in (self.u, self.v, self.sigma))

    def state(self) -> dict[str, Tensor]:
        return {"v": self.v, "sigma": self.sigma}

    def state_shapes(self) -> dict[str, tuple[int, ...]]:
        return {"v": self.v_shape, "sigma": ()}

    def load(self, state: Mapping[str, Tensor]) -> None:
        """Take over a state: in place where there is one, for graphs and compiled code keep its addresses."""
        if not self.is_started:
            u, v = self._allocated(state["v"].dtype, state["v"].device)
            self._set(u, v, torch.zeros((), dtype=u.dtype, device=u.device))
        with torch.no_grad():
            self.v.copy_(state["v"])
            self.sigma.copy_(state["sigma"])
        self._note_void()

    def _note_void(self) -> None:
        self.is_void = not (self.sigma.is_meta or 0 < float(self.sigma) < math.inf)

    def _allocated(self, dtype: torch.dtype, device: torch.device) -> tuple[Tensor, Tensor]:
        return torch.zeros(self.u_shape, dtype=dtype, device=device), torch.zeros(
            self.v_shape, dtype=dtype, device=device
        )

    def _set(self, *state: Tensor) -> None:
        if self.is_started and self.v.device == state[1].device and self.v.dtype == state[1].dtype:
            refresh.copy([self.u, self.v, self.sigma], state)
        else:
            with torch.inference_mode(False):
                self.u, self.v, self.sigma = (t.clone() for t in state)  # of their own, not views of one result
        self.is_started = True
