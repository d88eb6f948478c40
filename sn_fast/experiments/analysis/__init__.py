"""The analyses of the paper: each a function from runs or networks to plain numbers, rows, and a figure.

>>> table = accuracy_table(store.outcomes(grid))
>>> print(table.text())
>>> write_analysis(table, "figures", "accuracy")  # accuracy.png, accuracy.svg, accuracy.csv, accuracy-betas.csv

From the outcomes of runs:

- ``accuracy_table``: the best beta by validation beside no normalisation, and the published row.
- ``training_curves``: loss and accuracy per epoch.
- ``random_label_fitting``: training accuracy with true and random labels.
- ``trained_norms``: spectral norms of the layers after training.
- ``sample_size_sweep``: accuracy over the number of training images.

From networks ({panel: {name: network}}, as ``by_defence`` makes of ``trained_networks``) and samples:

- ``robustness_curves``: accuracy against the strength of attacks.
- ``margin_distributions``: margins, and margins divided by the network's norms.
- ``gradient_norm_distributions``, ``norm_gain_distributions``: ||d loss / d x||, and ||f(x)|| / ||x||.
- ``network_norms``: as ``trained_norms``, measured anew.
- ``perturbed_images``: images, perturbations and predictions.
- ``capacities``: the theory's capacities beside the measured generalisation gaps (of outcomes with their networks).
"""

from .betas import BetaResult
from .capacities import Capacities, NetworkCapacity, capacities
from .distributions import Distribution, Distributions, Panel
from .perturbed_images import AttackedImage, PerturbedImages, perturbed_images
from .results import Analysis, Table, write_analysis
from .robustness import RobustnessCurve, RobustnessCurves, by_defence, robustness_curves
from .sample_sizes import SampleSizeSweep, SizePoint, sample_size_sweep
from .sample_statistics import gradient_norm_distributions, margin_distributions, norm_gain_distributions
from .table import AccuracyTable, TableRow, accuracy_table
from .trained_norms import NetworkNorms, TrainedNorms, network_norms, trained_norms
from .training_curves import Curve, RandomLabelFitting, TrainingCurves, random_label_fitting, training_curves

__all__ = [
    "AccuracyTable",
    "Analysis",
    "AttackedImage",
    "BetaResult",
    "Capacities",
    "Curve",
    "Distribution",
    "Distributions",
    "NetworkCapacity",
    "NetworkNorms",
    "Panel",
    "PerturbedImages",
    "RandomLabelFitting",
    "RobustnessCurve",
    "RobustnessCurves",
    "SampleSizeSweep",
    "SizePoint",
    "Table",
    "TableRow",
    "TrainedNorms",
    "TrainingCurves",
    "accuracy_table",
    "by_defence",
    "capacities",
    "gradient_norm_distributions",
    "margin_distributions",
    "network_norms",
    "norm_gain_distributions",
    "perturbed_images",
    "random_label_fitting",
    "robustness_curves",
    "sample_size_sweep",
    "trained_norms",
    "training_curves",
    "write_analysis",
]
