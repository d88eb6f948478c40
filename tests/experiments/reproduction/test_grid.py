from __future__ import annotations

import json
import math

import pytest

from sn_fast.errors import OptionError, UserError
from sn_fast.experiments.reproduction import PUBLISHED, Grid, Store, published_row, published_rows

from .conftest import tiny


def test_all_published_rows_are_there() -> None:
    rows = published_rows()
    assert len(rows) == 62
    assert len({(r.data, r.arch, r.norm, r.eps, r.scheme) for r in rows}) == 62
    # Of the paper's abstract of results: AlexNet on CIFAR-10, PGM .50 -> .62.
    row = published_row("cifar10", "alexnet_sn", "pgm")
    assert row is not None
    assert (row.plain[2], row.beta, row.capped[2]) == (0.5043, 1.6, 0.6159)
    assert row.gain == pytest.approx(0.1116)
    assert published_row("cifar10", "alexnet", "pgm", "inf", 0.1) != row
    assert published_row("cifar10", "vgg", "pgm") is None
    assert all(0 <= value <= 1 for r in rows for value in (*r.plain, *r.capped))


def test_published_betas_are_inf_and_the_best() -> None:
    grid = Grid(archs=("mlp1_relu", "mlp2_elu"), schemes=("fgm",), betas=PUBLISHED)
    assert [(c.arch, c.beta) for c in grid.runs()] == [
        ("mlp1_relu_sn", math.inf),
        ("mlp1_relu_sn", 4.0),
        ("mlp2_elu_sn", math.inf),
        ("mlp2_elu_sn", 8.0),
    ]
    once = Grid(archs=("mlp1_elu",), schemes=("erm",), betas=PUBLISHED).runs()
    assert [c.beta for c in once] == [math.inf]  # that is the published best one


def test_every_published_row_has_its_own_beta() -> None:
    for row in published_rows():
        for eps in {row.eps, None} if row.eps in (None, 0.1) else {row.eps}:  # 0.1 is the default of l_inf
            grid = Grid(
                data=row.data, norm=row.norm, eps=eps, archs=(row.arch,), schemes=(row.scheme,), betas=PUBLISHED
            )
            assert {config.beta for config in grid.runs()} == {math.inf, row.beta}, row
    beside = Grid(norm="inf", eps=0.1, archs=("elunet",), schemes=("erm", "fgm", "wrm"), betas=PUBLISHED).runs()
    assert [(c.scheme, c.beta) for c in beside] == [
        ("erm", math.inf),
        ("fgm", math.inf),
        ("fgm", 8.0),
        ("wrm", math.inf),
        ("wrm", 4.0),
    ]
    with pytest.raises(OptionError, match=r"no published row of mnist, elunet, fgm, norm inf, eps 0\.2"):
        Grid(norm="inf", eps=0.2, archs=("elunet",), schemes=("fgm",), betas=PUBLISHED).runs()


def test_runs_have_the_published_options_and_keys_of_their_own() -> None:
    runs = Grid(schemes=("erm", "pgm", "wrm"), seeds=(0, 1)).runs()
    assert len(runs) == len({c.key() for c in runs}) == 2 * 3 * 4
    assert {(c.optimizer, c.batch_size, c.stop_accuracy, c.evaluation) for c in runs} == {
        ("adam", 128, 0.999, "published")
    }
    assert [c.seed for c in runs] == [0] * 12 + [1] * 12  # the first seed's results come first


def test_the_norm_is_of_the_schemes_that_have_a_radius() -> None:
    runs = Grid(schemes=("erm", "pgm", "wrm"), norm="inf", eps=0.1, betas=(2.0,)).runs()
    assert [(c.scheme, c.norm, c.eps) for c in runs] == [("erm", "2", None), ("pgm", "inf", 0.1), ("wrm", "2", None)]


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"archs": ()}, "archs=(): give at least one"),
        ({"betas": ()}, "betas=(): give at least one"),
        ({"betas": "best"}, "betas='best': give numbers, or published"),
        ({"betas": PUBLISHED}, "betas='published': there is no published row of digits, mlp1_elu, erm"),
        ({"betas": (0.0,)}, "beta=0.0: must be a number > 0"),
        ({"archs": ("mlp9",)}, "arch='mlp9': choose"),
        ({"schemes": ("pgx",)}, "scheme='pgx': choose"),
        ({"seeds": (-1,)}, "seed=-1: must be an integer"),
        ({"eps": -1.0, "schemes": ("erm",)}, "eps=-1.0: must be a finite number > 0"),
    ],
)
def test_impossible_grids_are_refused_by_name_and_remedy(changes, message) -> None:
    with pytest.raises(OptionError) as caught:
        tiny(**changes).runs()
    assert str(caught.value).startswith(message)


def test_a_store_says_what_it_holds(tmp_path) -> None:
    store = Store(tmp_path)
    config = tiny().runs()[0]
    assert store.outcome(config).status == "absent"
    folder = store.folder(config)
    folder.mkdir()
    (folder / "failed.json").write_text(json.dumps({"reason": "no disk"}))
    assert (store.outcome(config).status, store.outcome(config).reason) == ("failed", "no disk")
    (folder / "metrics.json").write_text("{")
    with pytest.raises(UserError, match=r"metrics\.json is damaged .* delete its folder"):
        store.outcome(config)


@pytest.mark.parametrize("norm", ["2", "inf"])
def test_a_run_found_in_the_store_is_the_one_asked_for(norm, tmp_path) -> None:
    """Its file holds the strength that its images gave, which runs on other numbers of images do not share."""
    store = Store(tmp_path)
    eps = None if norm == "2" else 0.2
    grid = Grid(schemes=("erm", "fgm", "wrm"), norm=norm, eps=eps, betas=(2.0,), options={"train_size": 500})
    asked = {config.key(): config for config in grid.runs()}
    for key, config in asked.items():
        folder = tmp_path / key
        folder.mkdir()
        (folder / "config.json").write_text(json.dumps(config.with_strength(9.2).to_json()))
    found = {outcome.config.key(): outcome.config for outcome in store.everything()}
    assert found == asked
    assert all(store.folder(config).is_dir() for config in found.values())

    (tmp_path / key).rename(tmp_path / "renamed")
    assert config.with_strength(9.2) in [outcome.config for outcome in store.everything()]
