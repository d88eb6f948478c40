"""Which operations of PyTorch are linear or affine in which of their arguments."""

from __future__ import annotations

from dataclasses import dataclass

# Of these only shapes, dtypes and devices of the arguments are used.
FRESH = frozenset(
    (
        *("zeros_like", "empty_like", "ones_like", "full_like", "rand_like", "randn_like"),
        *("new_zeros", "new_empty", "new_ones", "new_full", "new_empty_strided"),
        *("size", "stride", "sym_size", "sym_numel", "sym_stride", "sym_storage_offset", "is_same_size"),
    )
)
# These hand values over to Python, or depend on them in their shapes.
LEAKS = frozenset(("_local_scalar_dense", "item", "equal", "is_nonzero", "allclose"))


@dataclass(frozen=True)
class Rule:
    """A linear operation.

    Attributes:
        linear: positions of the arguments that it is jointly linear (or affine) in; None: all.
        products: pairs of which it is bilinear: only one of the two may depend on the input.
    """

    linear: tuple[int, ...] | None = None
    products: tuple[tuple[int, int], ...] = ()

    def why_not(self, name: str, depending: set[int]) -> str | None:
        """Why a call with these arguments depending on the input is not linear; None if it is."""
        if self.linear is not None and not depending <= set(self.linear):
            return f"another argument of {name} than its input depends on the input"
        if any(a in depending and b in depending for a, b in self.products):
            return f"{name} multiplies two tensors that depend on its input"
        return None


_FIRST = Rule(linear=(0,))
_RULES: dict[str, Rule] = {}


def _add(rule: Rule, names: str) -> None:
    _RULES.update(dict.fromkeys(names.split(), rule))


# Sums, copies and views.
_add(Rule(), "add sub subtract rsub neg negative clone copy cat concat stack hstack vstack dstack block_diag")
_add(Rule(linear=(1, 2)), "where")
_add(
    _FIRST,
    "alias detach lift lift_fresh contiguous _to_copy to view _unsafe_view _reshape_alias reshape permute transpose t "
    "expand squeeze unsqueeze slice select unbind split split_with_sizes unsafe_split unsafe_chunk chunk tensor_split "
    "as_strided flatten unflatten unfold diagonal movedim narrow view_as_real view_as_complex _conj _conj_physical "
    "conj _neg_view real imag repeat repeat_interleave tile roll flip fliplr flipud rot90 constant_pad_nd "
    "pixel_shuffle pixel_unshuffle channel_shuffle native_channel_shuffle im2col col2im index index_select gather take "
    "masked_select tril triu trace diag diag_embed sum mean cumsum positive resolve_conj resolve_neg "
    "slice_backward select_backward _pad_circular pad expand_copy view_copy permute_copy",
)
_add(
    _FIRST,
    " ".join(
        f"{stem}{n}d"
        for stem in ("reflection_pad", "replication_pad", "avg_pool", "_adaptive_avg_pool")
        for n in (1, 2, 3)
    ),
)
_add(_FIRST, " ".join(f"adaptive_avg_pool{n}d" for n in (1, 2, 3)))
_add(
    _FIRST,
    "upsample_nearest1d upsample_nearest2d upsample_nearest3d _upsample_nearest_exact1d _upsample_nearest_exact2d "
    "_upsample_nearest_exact3d upsample_linear1d upsample_bilinear2d upsample_trilinear3d upsample_bicubic2d "
    "_upsample_bilinear2d_aa _upsample_bicubic2d_aa",
)
_add(_FIRST, "_fft_r2c _fft_c2r _fft_c2c fft_fftshift fft_ifftshift")
_add(_FIRST, "native_batch_norm _native_batch_norm_legit_no_training _native_batch_norm_legit cudnn_batch_norm")
_add(_FIRST, "zero_ fill_ masked_fill")
# Writes at fixed places.
_add(Rule(linear=(0, 2)), "index_put")
_add(Rule(linear=(0, 3)), "index_add index_copy scatter scatter_add")
_add(Rule(linear=(0, 1)), "select_scatter slice_scatter diagonal_scatter as_strided_scatter copy_")
_add(Rule(linear=(0, 2)), "masked_scatter")
# Products.
_add(
    Rule(linear=(0, 1), products=((0, 1),)), "mul multiply mm bmm mv dot vdot matmul inner outer ger kron linalg_vecdot"
)
_add(_FIRST, "div divide true_divide")
_add(Rule(linear=(0, 1, 2), products=((1, 2),)), "addmm baddbmm addmv addr addbmm addcmul")
_add(Rule(linear=(0, 1)), "addcdiv lerp")
_add(
    Rule(linear=(0, 1, 2), products=((0, 1),)),
    "linear convolution _convolution conv1d conv2d conv3d conv_transpose1d conv_transpose2d conv_transpose3d "
    "mkldnn_convolution cudnn_convolution _conv_depthwise2d",
)
_add(Rule(linear=(0, 1), products=((0, 1),)), "cudnn_convolution cudnn_convolution_transpose")


def rule_of(name: str) -> Rule | None:
    """The rule of an operator of the aten library, in place or not, by its name without overload."""
    return _RULES.get(name) or _RULES.get(name.rstrip("_"))
