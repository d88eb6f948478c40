from __future__ import annotations

import pytest
import torch
from torch import nn

from sn_fast.experiments.data.samples import Samples, load_split
from sn_fast.experiments.networks.demo import demo_network
from sn_fast.experiments.training import TrainConfig
from sn_fast.experiments.training.errors import Diverged
from sn_fast.experiments.training.evaluate import CURVE_FACTORS, accuracy, attacked, evaluate, margins

IMAGE = torch.Size((1, 8, 8))


@pytest.fixture
def evaluation(few_digits):
    config = TrainConfig.create(train_size=60, steps=3, eps=0.3)
    split = load_split("digits", 60, seed=0)
    calls = []
    result = evaluate(demo_network(IMAGE, 2.0, seed=0), split, config, lambda: calls.append(1))
    return split, result, calls


def test_margin_is_the_lead_of_the_true_class():
    logits, y = torch.tensor([[3.0, 1.0, 2.0], [0.0, 5.0, 4.0], [-1.0, -1.0, -3.0]]), torch.tensor([0, 2, 1])
    assert margins(logits, y).tolist() == [1.0, -1.0, 0.0]


def test_accuracy_counts_true_labels_of_all_samples():
    logits = torch.eye(4)[[0, 1, 2, 0, 0]]
    assert accuracy(logits, torch.tensor([0, 1, 2, 3, 1])) == pytest.approx(0.6)


def test_attacks_of_the_evaluation_know_the_true_labels():
    """A net that is wrong everywhere: moving away from its own prediction would make it right, true labels do not."""
    torch.manual_seed(0)
    model = nn.Sequential(nn.Flatten(), nn.Linear(64, 2))
    x = torch.rand(50, *IMAGE)
    wrong = 1 - model(x).argmax(dim=1)
    adversary = TrainConfig.create(eps=50.0, steps=2).adversary("pgm")
    assert accuracy(attacked(model, Samples(x, wrong), adversary).logits, wrong) == 0


def test_logits_that_overflow_are_no_result():
    model = nn.Sequential(nn.Flatten(), nn.Linear(64, 2))
    nn.init.constant_(model[1].weight, 1e38)
    samples = Samples(torch.ones(3, *IMAGE), torch.zeros(3, dtype=torch.int64))
    with pytest.raises(Diverged, match="a logit became infinite or nan"):
        attacked(model, samples, TrainConfig.create().adversary("erm"))


def test_table_and_curve_agree(evaluation):
    _, result, _ = evaluation
    at_training_eps = CURVE_FACTORS.index(1.0)
    for part in ("train", "test"):
        assert result["curve"][part][0] == result["accuracy"][part]["clean"]
        assert result["curve"][part][at_training_eps] == result["accuracy"][part]["pgm"]
    assert result["curve"]["eps"] == pytest.approx([0.3 * factor for factor in CURVE_FACTORS])


def test_distances_are_those_of_the_attacks(evaluation):
    _, result, _ = evaluation
    for distance in result["mean_distance"].values():
        assert distance["clean"] == 0
        assert distance["fgm"] == pytest.approx(0.3, rel=1e-5)
        assert 0.9 * 0.3 < distance["pgm"] <= 0.3 * (1 + 1e-6)
        assert distance["wrm"] > 0


def test_gap_is_training_minus_test(evaluation):
    _, result, _ = evaluation
    by_part = result["accuracy"]
    for column in ("clean", "fgm", "pgm", "wrm"):
        assert by_part["gap"][column] == by_part["train"][column] - by_part["test"][column]


def test_margins_count_every_sample_and_agree_with_the_accuracy(evaluation):
    split, result, _ = evaluation
    edges = torch.tensor(result["margins"]["edges"])
    for part, samples in split.items():
        counts = torch.tensor(result["margins"][part])
        assert counts.sum() == len(samples)
        surely_right = counts[edges[:-1] > 0].sum() / len(samples)
        possibly_right = counts[edges[1:] >= 0].sum() / len(samples)
        assert surely_right <= result["accuracy"][part]["pgm"] <= possibly_right


def test_progress_is_told_of_every_attack(evaluation):
    # clean, FGM, PGM, WRM and the curve, whose training eps is the PGM of the table; on two parts
    assert len(evaluation[2]) == 2 * (4 + len(CURVE_FACTORS) - 2)
