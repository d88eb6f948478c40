"""What single images say of networks: margins, loss gradients, and how much the norm of an image grows."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence

from torch import Tensor, nn

from ...errors import OptionError, UserError
from ...theory import OutsideSetting, gradient_norms, margins, norm_gain, normalized_margins
from ..data import Samples
from ..training.adversary import Adversary
from ..training.config import ATTACK_LABELS
from ..training.errors import Diverged
from ..training.evaluate import attacked
from .distributions import Distributions, Panel, check_scale, panel_of
from .results import check_networks, check_samples

_CLEAN = Adversary("erm", "2", 0.0, 1)
_BATCH_SIZE = 250
MODES = (0, 1, 2)
_APART = 20.0  # ratio of the widest distribution to the narrowest from which each has a panel of its own
_MODE_NAMES = {0: "margins", 1: "normalised margins, mode 1", 2: "normalised margins, mode 2"}
_FACTORS = {1: "∏σ", 2: "∏σ (1 + L)"}  # eps/kappa = 1, as published
_PUBLISHED_FACTORS = {1: "∏σ", 2: "∏σ (1 + Σ∏σ)"}
_CORRECTION = " √Σ(‖W‖F/σ)²"


def margin_distributions(
    networks: Mapping[str, Mapping[str, tuple[nn.Module, Samples]]],
    adversary: Adversary | Mapping[str, Adversary] | None = None,
    *,
    modes: Sequence[int] | Mapping[str, Sequence[int]] = (0, 1),
    extra_correction: bool = True,
    reference: bool = False,
    labels: str = "predicted",
) -> Distributions:
    """Margins of networks on their own samples, as they are and divided by the network's norms.

    In the paper's figures a panel shows a network trained with true labels and one trained with random labels, each on
    its training images; mode 1 is for ERM, mode 2 for FGM and PGM.

    Args:
        networks: {panel: {name: (network, samples)}}.
        adversary: margins are taken on images that it has moved; one for all, or {panel: adversary}. None: clean.
        modes: of ``sn_fast.theory.normalized_margins``: 0 (the margin itself), 1, 2 (with eps/kappa = 1); one choice
            for all, or {panel: modes}.
        extra_correction, reference: as there, for the modes 1 and 2.
        labels: what the attack moves away from, "predicted" or "true" labels.

    Returns:
        A panel for each of ``networks`` and modes; of normalised margins one for each network where their widths differ
        by more than a factor of 20. Networks that the theorems do not cover (AlexNet's normalisation of
        responses, branches) have a note there instead of normalised margins; with ``reference`` they have both.

    Raises:
        OptionError: an argument is empty or out of range. UserError: a network's logits are not finite.
    """
    check_networks(networks)
    of_panel = modes if isinstance(modes, Mapping) else dict.fromkeys(networks, modes)
    if missing := [panel for panel in networks if panel not in of_panel]:
        raise OptionError("modes", list(of_panel), f"there are none for {missing[0]!r}")
    for chosen in of_panel.values():
        if not chosen or (unknown := set(chosen) - set(MODES)):
            raise OptionError("modes", unknown if chosen else chosen, "choose of 0, 1, 2")
    if labels not in ATTACK_LABELS:
        raise OptionError("labels", labels, f"choose {' or '.join(ATTACK_LABELS)}")
    adversaries = adversary if isinstance(adversary, Mapping) else dict.fromkeys(networks, adversary or _CLEAN)
    if missing := [panel for panel in networks if panel not in adversaries]:
        raise OptionError("adversary", list(adversaries), f"there is none for {missing[0]!r}")
    panels = []
    for group, members in networks.items():
        raw = {name: _margins(f"{group}, {name}", *m, adversaries[group], labels) for name, m in members.items()}
        for mode in of_panel[group]:
            panels += _margin_panels(group, mode, members, raw, extra_correction, reference)
    kinds = {str(adversaries[group]) for group in networks}
    where = f" ({kinds.pop()})" if len(kinds) == 1 else ""
    regular = len(panels) == sum(len(of_panel[group]) for group in networks)
    row_length = max(map(len, of_panel.values())) if len(networks) > 1 and regular else None
    return Distributions(f"Margins of the true class{where}", tuple(panels), row_length)


def _margins(name: str, model: nn.Module, samples: Samples, adversary: Adversary, labels: str) -> Tensor:
    check_samples(samples)
    try:
        return margins(attacked(model, samples, adversary, labels=labels).logits, samples.y)
    except Diverged as error:
        raise UserError(f"networks: {name}: {error}; leave the network out") from None


def _margin_panels(
    group: str,
    mode: int,
    members: Mapping[str, tuple[nn.Module, Samples]],
    raw: Mapping[str, Tensor],
    extra_correction: bool,
    reference: bool,
) -> list[Panel]:
    """One; or one for each network where common bins would hide the narrower distributions."""
    title = f"{group}: {_MODE_NAMES[mode]}"
    if mode == 0:
        return [panel_of(title, "margin (logits)", raw)]
    factor = (_PUBLISHED_FACTORS if reference else _FACTORS)[mode]
    xlabel = f"margin / [{factor}{_CORRECTION if extra_correction else ''}]"
    try:
        values = {
            name: normalized_margins(
                raw[name],
                model,
                mode,
                example_input=samples.x[:1],
                extra_correction=extra_correction,
                reference=reference,
            )
            for name, (model, samples) in members.items()
        }
    except OutsideSetting as error:
        return [Panel(title, xlabel, "linear", (), note=f"{error}; reference=True takes the published norms")]
    if not _far_apart(values.values()):
        return [panel_of(title, xlabel, values)]
    return [panel_of(f"{group}, {name}: {_MODE_NAMES[mode]}", xlabel, {name: v}) for name, v in values.items()]


def _far_apart(values: Iterable[Tensor]) -> bool:
    """Whether some distribution is so much narrower than another that it would be one bin."""
    widths = [float(v.double().quantile(0.95) - v.double().quantile(0.05)) for v in values]
    return min(widths) * _APART < max(widths)


def gradient_norm_distributions(
    networks: Mapping[str, Mapping[str, nn.Module]],
    samples: Samples,
    *,
    labels: str = "true",
    scale: str = "log",
) -> Distributions:
    """The l2 norm of the loss gradient in the image, whose least value is the kappa of the theorems.

    In float32 the probability of a sure class is rounded by 6e-8: gradients that are smaller than that times the
    network's slope are right in their order of magnitude only.

    Args:
        networks: {panel: {name: network}}, as ``by_defence`` gives.
        labels: of the loss: "true", as published, or "predicted".
        scale: "log", where gradients that vanish lie left of the axis, or "linear", as published.

    Raises:
        OptionError: an argument is empty or out of range. UserError: a gradient is not finite.
    """
    if labels not in ATTACK_LABELS:
        raise OptionError("labels", labels, f"choose {' or '.join(ATTACK_LABELS)}")
    y = samples.y if labels == "true" else None
    return _distributions(
        networks,
        samples,
        lambda model: gradient_norms(model, samples.x, y, batch_size=_BATCH_SIZE),
        "Norm of the loss gradient in the image",
        "‖∇x loss‖₂ (nats per unit of the input)",
        scale,
    )


def norm_gain_distributions(
    networks: Mapping[str, Mapping[str, nn.Module]], samples: Samples, *, scale: str = "linear"
) -> Distributions:
    """How much a network enlarges the norm of an image: ||f(x)||_2 / ||x||_2.

    Args:
        networks, scale: as in ``gradient_norm_distributions``.

    Raises:
        OptionError: an argument is empty or out of range. UserError: a gain is not finite; an image of zeros has none.
    """
    return _distributions(
        networks,
        samples,
        lambda model: norm_gain(model, samples.x, batch_size=_BATCH_SIZE),
        "Gain of norm from image to logits",
        "‖f(x)‖₂ / ‖x‖₂ (logits per unit of the input)",
        scale,
    )


def _distributions(
    networks: Mapping[str, Mapping[str, nn.Module]],
    samples: Samples,
    measure: Callable[[nn.Module], Tensor],
    title: str,
    xlabel: str,
    scale: str,
) -> Distributions:
    check_networks(networks)
    check_samples(samples)
    check_scale(scale)
    panels = []
    for group, members in networks.items():
        values = {}
        for name, model in members.items():
            values[name] = measure(model)
            if not bool(values[name].isfinite().all()):
                raise UserError(f"networks: {group}, {name}: a value is infinite or nan; leave the network out")
        panels.append(panel_of(group, xlabel, values, scale))
    return Distributions(f"{title}, {len(samples):,} images", tuple(panels))
