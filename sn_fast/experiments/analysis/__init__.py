"""The analyses of the paper: each a function from runs or networks to plain numbers, rows, and a figure.

>>> table = accuracy_table(store.outcomes(grid))
>>> print(table.text())
>>> write_analysis(table, "figures", "accuracy")  # accuracy.png, accuracy.svg, accuracy.csv, accuracy-betas.csv

From the outcomes of runs:

- ``accuracy_table``: the best beta by validation beside no normalisation, and the published row.
- ``training_curves``: loss and accuracy per epoch.
- ``random_label_fitting``: training accuracy with true and random labels.
"""

from .results import Analysis, Table, write_analysis
from .table import AccuracyTable, BetaResult, TableRow, accuracy_table
from .training_curves import Curve, RandomLabelFitting, TrainingCurves, random_label_fitting, training_curves

__all__ = [
    "AccuracyTable",
    "Analysis",
    "BetaResult",
    "Curve",
    "RandomLabelFitting",
    "Table",
    "TableRow",
    "TrainingCurves",
    "accuracy_table",
    "random_label_fitting",
    "training_curves",
    "write_analysis",
]
