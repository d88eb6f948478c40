from __future__ import annotations

import math
import statistics

import pytest

from sn_fast.errors import OptionError
from sn_fast.experiments.analysis import accuracy_table
from sn_fast.experiments.reproduction import published_row

from .figure_checks import check_figure, check_files
from .outcomes import lost, outcome

INF = math.inf


def best(*validations: tuple[float, float], **options: object) -> float | None:
    runs = [outcome(validation=value, beta=beta) for beta, value in validations]
    return accuracy_table(runs, **options).table[0].best  # type: ignore[arg-type]


def test_validation_chooses_beta():
    assert best((INF, 0.7), (1.0, 0.9), (2.0, 0.8)) == 1.0
    assert best((INF, 0.95), (1.0, 0.9)) == INF


def test_of_equal_validation_accuracies_the_later_beta_is_chosen():
    assert best((2.0, 0.9), (1.0, 0.9), (INF, 0.9)) == 2.0  # inf, 1, 2 as published, however the runs are listed
    assert best((INF, 0.9), (1.0, 0.9), (2.0, 0.9), betas=(2.0, INF, 1.0)) == 1.0
    assert best((INF, 0.9), (1.0, 0.9), betas=(1.0, INF)) == INF


def test_test_accuracies_have_no_say():
    runs = [outcome(0.9, 0.8, 0.99, beta=1.0), outcome(0.9, 0.81, 0.10, beta=2.0)]
    (row,) = accuracy_table(runs).table
    assert row.best == 2.0


def test_means_spreads_and_gains_over_seeds():
    plain, capped = (0.80, 0.82, 0.87), (0.90, 0.95, 0.91)
    runs = [outcome(0.99, 0.5, test, seed=seed) for seed, test in enumerate(plain)]
    runs += [outcome(0.98, 0.6, test, seed=seed, beta=4.0) for seed, test in enumerate(capped)]
    table = accuracy_table(reversed(runs))
    (row,) = [dict(zip(table.columns, row)) for row in table.rows()]
    assert row["seeds"] == "0 1 2"
    assert row["no SN test"] == pytest.approx(statistics.mean(plain), abs=1e-15)
    assert row["no SN test spread"] == pytest.approx(statistics.stdev(plain), abs=1e-15)
    assert row["best gap"] == pytest.approx(0.98 - statistics.mean(capped), abs=1e-15)
    gains = [b - a for a, b in zip(plain, capped)]
    assert row["test gain"] == pytest.approx(statistics.mean(gains), abs=1e-15)
    assert row["test gain spread"] == pytest.approx(statistics.stdev(gains), abs=1e-15)
    assert row["notes"] == ""


def test_the_published_row_and_its_difference():
    published = published_row("mnist", "mlp1_relu", "fgm")
    assert published is not None
    table = accuracy_table([outcome(test=0.9), outcome(validation=0.9, test=0.95, beta=2.0)])
    (row,) = [dict(zip(table.columns, row)) for row in table.rows()]
    assert (row["published no SN test"], row["published best beta"]) == (0.8907, 4.0)
    assert row["no SN test difference"] == pytest.approx(0.9 - 0.8907, abs=1e-15)
    assert row["best test difference"] == pytest.approx(0.95 - 0.9606, abs=1e-15)
    assert row["test gain difference"] == pytest.approx(0.05 - published.gain, abs=1e-15)
    assert "+0.93" in table.text()


@pytest.mark.parametrize(
    ("options", "named"),
    [
        ({"epochs": 3}, "epochs=3"),
        ({"train_size": 1000}, "train_size=1000"),
        ({"random_labels": 1.0}, "random_labels=1"),
        ({"eps": 0.3}, "eps=0.3"),
        ({"scheme": "wrm", "eps": 2.0}, "eps=2"),
        ({"allow_partial": True}, "allow_partial=True"),
    ],
)
def test_other_runs_are_not_compared_with_the_published_row(options, named):
    table = accuracy_table([outcome(**options)])
    row = table.table[0]
    assert row.published is not None
    assert row.compared is None
    assert row.differences == (None, None, None)
    assert f"not compared with the published row: {named}" in row.notes


@pytest.mark.parametrize("options", [{"scheme": "erm", "eps": 3.0}, {"threads": 2}, {"other_eps": 1.0, "eps": 0.46}])
def test_what_changes_no_published_number_does_not_hinder_a_comparison(options):
    assert accuracy_table([outcome(**options)]).table[0].compared is not None


def test_rows_in_the_maximum_norm_are_found_by_their_radius():
    runs = [outcome(data="cifar10", arch="alexnet_sn", norm="inf", eps=eps) for eps in (0.1, 0.3, 0.2, None)]
    rows = accuracy_table(runs).table
    assert [row.published and row.published.eps for row in rows] == [0.1, 0.3, None, 0.1]
    assert all(row.compared is row.published for row in rows)


def test_runs_without_a_result_are_named_and_never_averaged():
    runs = [
        outcome(test=0.8, seed=0),
        lost("diverged", "the loss became nan", seed=1, trained=2),
        outcome(test=0.9, seed=0, beta=4.0, validation=0.9),
        lost("failed", "disk full", seed=1, beta=4.0),
        lost("absent", seed=0, beta=2.0),
        lost("training", seed=1, beta=2.0, trained=3),
    ]
    table = accuracy_table(runs)
    row = table.table[0]
    assert row.best == 4.0
    assert row.plain is not None
    assert row.plain.mean("test") == 0.8
    assert row.notes == [
        "no SN (β = ∞), seed 1: diverged: the loss became nan",
        "β = 2, seed 0: missing",
        "β = 2, seed 1: training (3 epochs)",
        "β = 4, seed 1: failed: disk full",
    ]
    states = [dict(zip(table.tables()["betas"].columns, run)) for run in table.tables()["betas"].rows]
    assert [run["status"].partition(":")[0] for run in states] == [
        *("finished", "diverged", "missing", "training (3 epochs)", "finished", "failed"),
    ]
    assert [run["test"] for run in states] == [0.8, None, None, None, 0.9, None]
    assert "80.00 (1 lost)" in table.text()


def test_betas_are_compared_on_the_seeds_that_all_have():
    runs = [outcome(validation=v, seed=s) for s, v in enumerate((0.70, 0.99))]
    runs += [outcome(validation=0.80, beta=4.0, seed=0), lost("diverged", beta=4.0, seed=1)]
    assert accuracy_table(runs).table[0].best == 4.0  # on seed 0; the mean of inf, 0.845, is of other seeds
    apart = accuracy_table([outcome(seed=0), outcome(seed=1, beta=2.0)]).table[0]
    assert apart.best is None
    assert "no beta is chosen: the betas share no finished seed, and every one is shown" in apart.notes


def test_without_validation_images_no_beta_is_chosen_and_every_one_is_shown(tmp_path):
    runs = [outcome(validation=None, test=test, beta=beta) for beta, test in ((INF, 0.5), (1.0, 0.625), (2.0, 0.875))]
    table = accuracy_table([*runs, outcome(scheme="erm"), outcome(scheme="erm", beta=2.0)])
    row = table.table[0]
    assert row.best is None
    note = "mnist mlp1_relu FGM: no beta is chosen: there are no validation images, and every one is shown"
    assert table.notes() == [note]
    text = table.text()
    assert text.splitlines()[-1] == note
    of_beta = {line.split("  ")[1].strip(): line for line in text.splitlines() if line.startswith("  with")}
    assert list(of_beta) == ["with β = 1", "with β = 2"]
    assert "62.50" in of_beta["with β = 1"]
    assert "+12.50" in of_beta["with β = 1"]
    assert "87.50" in of_beta["with β = 2"]
    figure = table.figure()
    assert {t.get_text() for t in figure.legends[0].get_texts()} >= {"no SN", "best β", "β = 1", "β = 2"}
    drawn = {line.get_label(): float(line.get_xdata()[0]) for line in figure.axes[0].lines}
    assert (drawn["β = 1"], drawn["β = 2"]) == (62.5, 87.5)
    assert "every β where there is no choice" in figure._suptitle.get_text().replace("\n", " ")
    check_figure(table)
    check_files(table, tmp_path / "new" / "folder")


def test_figures_show_the_cap_that_validation_chooses_over_all_seeds():
    """Never by the test images, and by no seed alone: seed 0 by itself would have 1."""
    runs = [outcome(validation=v, test=0.1, beta=2.0, seed=s) for s, v in enumerate((0.7, 0.9))]
    runs += [outcome(validation=v, test=0.9, beta=1.0, seed=s) for s, v in enumerate((0.8, 0.6))]
    runs += [outcome(validation=0.99, seed=s) for s in (0, 1)]
    row = accuracy_table(runs).table[0]
    assert (row.best, row.shown_caps) == (INF, (2.0,))
    blind = [outcome(validation=None, beta=beta) for beta in (INF, 1.0, 2.0)]
    assert accuracy_table(blind).table[0].shown_caps == (1.0, 2.0)
    assert accuracy_table(blind[:2]).table[0].shown_caps == (1.0,)  # nothing to choose between
    assert accuracy_table(blind[:1]).table[0].shown_caps == ()


def test_combinations_make_rows_of_their_own():
    runs = [
        outcome(scheme=scheme, arch=arch, beta=beta, test=0.5 + beta_gain)
        for scheme in ("erm", "fgm", "pgm")
        for arch in ("mlp1_relu_sn", "mlp2_elu_sn")
        for beta, beta_gain in ((INF, 0.0), (2.0, 0.1))
    ]
    table = accuracy_table([*runs, *runs, lost("absent", scheme="wrm")])
    assert len(table.table) == 7
    assert [len(row.results) for row in table.table] == [2] * 6 + [1]
    assert "no run has finished" in table.table[-1].notes
    check_figure(table)


def test_arguments():
    with pytest.raises(OptionError, match=r"outcomes=\[\]: give at least one run"):
        accuracy_table([])
    with pytest.raises(OptionError, match=r"betas=.*there is a run with beta=2; add it"):
        accuracy_table([outcome(beta=2.0)], betas=(INF, 1.0))
