"""Local response normalisation (Krizhevsky, Sutskever, Hinton 2012): its Lipschitz constant at any input.

y_i = x_i s_i^-beta,  s_i = k + c sum of x_j^2 over j in N(i), the channels around i (with any other cut at the ends).
The Jacobian is D - M with D = diag(s_i^-beta), of norm at most k^-beta, and M_ij = 2 beta c x_i x_j s_i^(-beta - 1) for
j in N(i), else 0. Row i of M has norm sqrt(w_i), w_i = (2 beta)^2 c x_i^2 t_i s_i^(-2 beta - 2), t_i = s_i - k.

1. In a run B of channels that all lie in each other's N, c sum of x_i^2 over B is at most T = min of t_i over B, so the
   sum of w_i over B is at most (2 beta)^2 T max over B of t / (k + t)^(2 beta + 2). With T <= t this is at most
   q^2 = (2 beta)^2 max over t of (t / (k + t)^(beta + 1))^2; the maximum is at t = k / beta,
   q = 2 k^-beta beta^(beta + 1) / (beta + 1)^(beta + 1).
2. |M z|^2 <= sum_i w_i |z_N(i)|^2 = sum_j z_j^2 (sum of w_i over those i whose N holds j), and these i are two runs as
   in 1. (before j and after it), so |M|^2 <= 2 q^2.

The constant is k^-beta + sqrt(2) q, whatever c is: with k = 1, beta = 3/4 it is 1.642.
"""

from __future__ import annotations

from torch import nn

from .rounding import loosened
from .rules import Call, Constant, no_bound, rule


def response_norm_constant(bias: float, alpha: float, beta: float) -> float | Constant:
    """Constant of x / (bias + alpha * sum of x^2 over channels around)^beta."""
    if not (bias > 0 and alpha >= 0 and beta >= 0):
        return no_bound(f"local response normalisation with k={bias:g}, alpha={alpha:g}, beta={beta:g}: no bound")
    slope = bias**-beta
    if alpha == 0:
        return loosened(slope)
    return loosened(slope * (1 + 2 * 2**0.5 * (beta / (beta + 1)) ** (beta + 1)))


@rule("local_response_norm", nn.LocalResponseNorm)
def _local_response_norm(call: Call) -> float | Constant:
    call.allows("size")
    return response_norm_constant(call.get("k", 1.0), call.get("alpha", 1e-4), call.get("beta", 0.75))
