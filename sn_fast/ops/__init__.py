"""The operators: schema, fake, reference, kernel and autograd. The only package that calls the compiled module."""

from . import (  # noqa: F401 - importing them defines the operators
    fingerprint,
    half_step,
    lanczos,
    normalize,
    pgd_step,
    power_step,
    project_weights,
    random_start,
    refresh,
    singular_vectors,
    wrm_step,
)
from .compiled import MODULE
from .library import UseKernels

# Kept: the registration ends with the object.
_SERVING = None if MODULE is None else UseKernels(MODULE, "cuda")
