"""Analyses of outcomes besides the table."""

from __future__ import annotations

import math
import statistics

import numpy as np
import pytest
from matplotlib.backends.backend_agg import FigureCanvasAgg

from sn_fast.errors import OptionError
from sn_fast.experiments.analysis import (
    accuracy_table,
    random_label_fitting,
    sample_size_sweep,
    trained_norms,
    training_curves,
    write_analysis,
)
from sn_fast.experiments.figures import series
from sn_fast.experiments.training import UserError

from .figure_checks import check_figure, check_files
from .outcomes import lost, outcome


def test_training_curves(tmp_path):
    curves = training_curves([outcome(beta=2.0), outcome(), lost("diverged", "nan", trained=2, beta=1.0)])
    assert [curve.name for curve in curves.curves] == ["β = 2", "no SN (β = ∞)", "β = 1"]
    assert curves.title == "mnist, mlp1_relu_sn, FGM"
    rows = [dict(zip(curves.columns, row)) for row in curves.rows()]
    assert [row["epoch"] for row in rows] == [1, 2, 3, 4, 1, 2, 3, 4, 1, 2]
    assert [row["test loss"] for row in rows[:4]] == [None, 1.0, None, 0.5]
    assert [row["train accuracy"] for row in rows[:4]] == pytest.approx([0.225, 0.45, 0.675, 0.9])
    assert rows[-1]["state"] == "diverged: nan"
    check_figure(curves)
    check_files(curves, tmp_path)


@pytest.mark.parametrize("scale", [1.0, 0.02, 1e3])
def test_losses_of_less_than_a_decade_have_plain_numbers(scale):
    """Not 2 x 10^0."""
    runs = [outcome(trained=epochs) for epochs in (3, 9)]
    curves = training_curves(runs)
    for curve in curves.curves:
        object.__setattr__(curve, "loss", tuple(scale * (1 + value) for value in curve.loss))
        object.__setattr__(curve, "test_loss", tuple(value and scale * value for value in curve.test_loss))
    figure = curves.figure()
    FigureCanvasAgg(figure).draw()
    axis = figure.axes[0].yaxis
    low, high = figure.axes[0].get_ylim()
    ticks = [*zip(axis.get_majorticklocs(), axis.get_majorticklabels())]
    ticks += [*zip(axis.get_minorticklocs(), axis.get_minorticklabels())]
    shown = {float(text): at for at, label in ticks if (text := label.get_text()) and low <= at <= high}
    assert len(shown) >= 2
    assert all(value == pytest.approx(at) for value, at in shown.items())


def test_no_two_of_many_runs_look_alike():
    """Four caps and three seeds: a colour for each cap, a marker for each seed. Without seeds, twelve of both."""
    for runs, colours in (
        ([outcome(beta=beta, seed=seed) for seed in range(3) for beta in (math.inf, 4.0, 2.0, 1.0)], 4),
        ([outcome(beta=0.5 * (i + 1)) for i in range(12)], 7),
    ):
        curves = training_curves(runs)
        handles = [line for line in curves.figure().axes[1].lines if not len(line.get_xdata())][:12]
        assert [line.get_label() for line in handles] == [curve.name for curve in curves.curves]
        assert len({line.get_color() for line in handles}) == colours
        assert len({(line.get_color(), line.get_marker()) for line in handles}) == 12
    check_figure(training_curves([outcome(trained=epochs) for epochs in (9, 12, 40)]))  # losses of several decades
    assert len({tuple(map(str, series(i).values())) for i in range(49)}) == 49


def test_names_of_runs_say_in_what_they_differ():
    runs = [outcome(seed=seed, scheme=scheme, train_size=10) for seed in (0, 1) for scheme in ("erm", "pgm")]
    found = [curve.name for curve in training_curves(runs).curves]
    assert found == ["ERM, seed 0", "PGM, seed 0", "ERM, seed 1", "PGM, seed 1"]
    by_rate = training_curves([outcome(), outcome(lr=0.5)])
    assert len({curve.name for curve in by_rate.curves}) == 2
    assert "lr=0.5" in by_rate.curves[1].name


def test_fitting_of_random_labels():
    runs = [
        outcome(train=1.0 if beta == math.inf or not share else 0.6, beta=beta, scheme=scheme, random_labels=share)
        for scheme in ("erm", "fgm", "pgm", "wrm")
        for share in (1.0, 0.0)
        for beta in (2.0, math.inf)
    ]
    fitting = random_label_fitting(runs)
    assert list(fitting.panels) == ["ERM", "FGM", "PGM", "WRM"]
    for curves in fitting.panels.values():
        assert [(c.name, c.train_accuracy[-1]) for c in curves] == [
            ("true labels, no SN (β = ∞)", 1.0),
            ("true labels, β = 2", 1.0),
            ("random labels, no SN (β = ∞)", 1.0),
            ("random labels, β = 2", 0.6),
        ]
    check_figure(fitting)


def test_how_the_fitting_of_random_labels_ended():
    short, long = (outcome(0.8, test=0.1, beta=b, random_labels=1.0, trained=n) for b, n in ((math.inf, 3), (2.0, 40)))
    fitting = random_label_fitting([short, long, lost("training", trained=2, beta=1.0, random_labels=1.0)])
    summary = fitting.tables()["summary"]
    panel = "mnist, mlp1_relu_sn, FGM"
    assert summary.rows == [
        ("random labels, no SN (β = ∞)", panel, "finished", 3, 0.8, 0.1),
        ("random labels, β = 1", panel, "training (2 epochs)", 2, None, None),
        ("random labels, β = 2", panel, "finished", 40, 0.8, 0.1),
    ]
    assert len(set(map(len, [summary.columns, *summary.rows]))) == 1
    (axes,) = fitting.figure().axes
    assert axes.get_xscale() == "log"  # 3 epochs beside 40
    assert len({line.get_color() for line in axes.lines}) == 3


def test_norms_after_training():
    runs = [outcome(beta=b, seed=s, scheme=k) for k in ("erm", "pgm") for b in (2.0, math.inf) for s in (0, 1)]
    norms = trained_norms([*runs, lost("absent", beta=1.0)])
    rows = [dict(zip(norms.columns, row)) for row in norms.rows()]
    assert len(rows) == 8
    assert list(norms.panels) == ["ERM", "PGM"]
    first = rows[:4]
    assert [(row["network"], row["layer"], row["norm"]) for row in first] == [
        ("no SN (β = ∞)", "hidden", 3.0),
        ("no SN (β = ∞)", "fc", 1.5),
        ("β = 2", "hidden", 2.0),
        ("β = 2", "fc", 1.5),
    ]
    assert [row["norm over cap"] for row in first] == [None, None, 1.0, 0.75]
    assert {row["runs"] for row in rows} == {2}
    check_figure(norms)


def test_norms_of_many_layers_are_shown_over_depth():
    run = outcome(beta=1.0)
    run.network["final"]["sigma"] = {f"block{i}.convolution": 1 + 0.01 * i for i in range(35)}  # type: ignore[index]
    check_figure(trained_norms([run]))


def test_sweep_of_sample_sizes():
    runs = [
        outcome(1.0, 0.5, 0.6 + 0.1 * seed + 0.01 * (beta == 2), train_size=size, beta=beta, seed=seed)
        for size in (4000, 1000, None)
        for beta in (2.0, math.inf)
        for seed in (0, 1)
    ]
    sweep = sample_size_sweep([*runs, lost("diverged", "nan", train_size=1000, seed=2)], full_size=55_000)
    assert list(sweep.curves) == ["no SN (β = ∞)", "β = 2"]
    rows = [dict(zip(sweep.columns, row)) for row in sweep.rows()]
    assert [row["training images"] for row in rows] == [1000, 4000, 55_000] * 2
    assert rows[0]["test accuracy"] == pytest.approx(0.65)
    assert rows[0]["test spread"] == pytest.approx(statistics.stdev((0.6, 0.7)))
    assert rows[0]["gap"] == pytest.approx(0.35)
    assert (rows[0]["runs"], rows[0]["notes"]) == (2, "seed 2: diverged: nan")
    check_figure(sweep)
    _, gap = sweep.figure().axes
    data, *_ = gap.containers[0].lines
    assert data.get_xydata() == pytest.approx(np.array([[1000, 35.0], [4000, 35.0], [55_000, 35.0]]))


def test_a_network_that_has_not_all_sizes_is_named_by_what_it_is():
    runs = [outcome(train_size=size, beta=b) for size, b in ((500, math.inf), (None, math.inf), (2000, 1.0))]
    assert list(sample_size_sweep(runs, full_size=55_000).curves) == ["no SN (β = ∞)", "β = 1"]
    runs = [outcome(beta=b, train_size=n, random_labels=r) for b, n, r in ((2.0, 500, 1.0), (math.inf, None, 0.0))]
    assert list(random_label_fitting(runs).panels) == ["all images", "500 images"]
    assert list(trained_norms([*runs[1:], outcome(beta=2.0, train_size=500)]).panels) == ["all images", "500 images"]


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: training_curves([]), "outcomes=.*give at least one run"),
        (lambda: training_curves([lost("absent")]), "none has an epoch yet"),
        (lambda: random_label_fitting([outcome()]), "none has random labels"),
        (lambda: trained_norms([lost("failed")]), "outcomes='0 finished runs'"),
        (lambda: sample_size_sweep([outcome()]), "full_size=None: there are runs on all images"),
        (lambda: sample_size_sweep([lost("absent")], full_size=3), "0 finished runs"),
    ],
)
def test_arguments(call, message):
    with pytest.raises(OptionError, match=message):
        call()


def test_equal_results_give_equal_files(tmp_path):
    contents = []
    for folder in (tmp_path / "a", tmp_path / "b"):
        paths = write_analysis(accuracy_table([outcome(), outcome(beta=2.0)]), folder, "table")
        contents.append([(path.name, path.read_bytes()) for path in paths])
    assert contents[0] == contents[1]
    assert [name for name, _ in contents[0]] == ["table.png", "table.svg", "table.csv", "table-betas.csv"]


def test_a_file_that_cannot_be_written(tmp_path):
    (tmp_path / "file").touch()
    with pytest.raises(UserError, match=r"cannot write .*file/it.png: .*give another folder"):
        write_analysis(accuracy_table([outcome()]), tmp_path / "file", "it")
    with pytest.raises(OptionError, match="name='a/b': give a file name without a folder"):
        write_analysis(accuracy_table([outcome()]), tmp_path, "a/b")
