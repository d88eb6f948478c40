"""``load_data``: the split, the sizes, the classes and the random labels of sets that are registered here."""

from __future__ import annotations

import functools
import itertools
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch

from sn_fast.errors import UserError
from sn_fast.experiments import Split, load_data
from sn_fast.experiments.data import data_set_names, load_split, published_options, registry
from sn_fast.experiments.data import samples as samples_module
from sn_fast.experiments.data.registry import DataSet, Images, register

from .written import cifar_files, idx_files

TRAIN, TEST = 6_000, 900
RNG = np.random.default_rng(0)
LABELS = RNG.integers(0, 10, TRAIN), RNG.integers(0, 10, TEST)


def numbered(count: int, first: int) -> np.ndarray:
    """Images (N, 1, 4, 4) whose pixels say their number."""
    numbers = np.arange(first, first + count)
    pixels = np.zeros((count, 1, 4, 4), np.uint8)
    for digit in range(4):
        pixels[:, 0, digit] = (numbers // 10**digit % 10)[:, None]
    return pixels


def numbers_of(samples) -> np.ndarray:
    digits = (samples.x[:, 0, :, 0] * 255).round().long().numpy()
    return digits @ 10 ** np.arange(4)


@pytest.fixture(autouse=True)
def drawn(monkeypatch):
    """A set of 6,000 and 900 numbered images, of which 5,000 are reserved."""
    data_set_names()
    monkeypatch.setattr(registry, "_SETS", dict(registry._SETS))
    parts = Images(numbered(TRAIN, 0), LABELS[0]), Images(numbered(TEST, TRAIN), LABELS[1])
    return register(DataSet("drawn", lambda request: parts, embedded=True, reserved=5_000))


@pytest.fixture
def folder_set(drawn, monkeypatch):
    """The same, as a set that is read from a folder."""
    register(DataSet("folder", drawn.read, reserved=5_000))
    return "folder"


@pytest.mark.parametrize(
    ("options", "train", "validation", "test"),
    [
        ({}, (5000, 6000), (6000, 6500), (6500, 6900)),
        ({"split": "all"}, (0, 6000), (6000, 6500), (6500, 6900)),
        ({"split": "held_out"}, (5000, 6000), (0, 5000), (6000, 6900)),
        ({"validation_size": 0}, (5000, 6000), (6000, 6000), (6000, 6900)),
        ({"validation_size": 899}, (5000, 6000), (6000, 6899), (6899, 6900)),
        ({"split": "held_out", "validation_size": 7}, (7, 6000), (0, 7), (6000, 6900)),
        ({"split": "held_out", "validation_size": 0}, (0, 6000), (0, 0), (6000, 6900)),
    ],
)
def test_parts(options, train, validation, test):
    split = load_data("drawn", **options)
    for samples, ends in ((split.train, train), (split.validation, validation), (split.test, test)):
        numbers = np.arange(*ends)
        np.testing.assert_array_equal(numbers_of(samples), numbers)
        np.testing.assert_array_equal(samples.y, np.concatenate(LABELS)[numbers])
        assert (samples.x.dtype, samples.y.dtype) == (torch.float32, torch.int64)
        assert samples.x.shape == (len(numbers), 1, 4, 4)
    assert (split.image_shape, split.num_classes, split.name) == ((1, 4, 4), 10, "drawn")


def test_subsets_hold_one_another_and_depend_on_the_seed(tmp_path, folder_set):
    def drawn(**options) -> tuple[np.ndarray, np.ndarray]:
        split = load_data(folder_set, tmp_path, **options)
        return numbers_of(split.train), numbers_of(split.test)

    whole = drawn()
    sizes = [1, 10, 333, 999, 1000]
    trains = [drawn(train_size=size)[0] for size in sizes]
    tests = [drawn(test_size=size)[1] for size in (1, 10, 333, 400)]
    for part, subsets in zip(whole, (trains, tests)):
        np.testing.assert_array_equal(subsets[-1], part)  # in the official order
        for smaller, larger in itertools.pairwise(subsets):
            assert len(smaller) < len(larger)
            assert set(smaller) < set(larger)
            assert sorted(set(smaller)) == smaller.tolist()
    np.testing.assert_array_equal(drawn(train_size=333, test_size=10)[0], trains[2])
    np.testing.assert_array_equal(drawn(train_size=333, test_size=10)[1], tests[1])
    other = drawn(train_size=333, seed=1)[0]
    assert 70 < len(set(other) & set(trains[2])) < 150  # 111 of independent draws
    assert abs(trains[2].mean() - 5500) < 60  # uniform: a deviation of 13


def test_classes_become_the_first_labels_in_their_order(tmp_path, folder_set):
    whole = load_data("drawn")
    part = load_data("drawn", classes=(7, 2, 4))
    assert part.num_classes == 3
    for name in ("train", "validation", "test"):
        before, after = getattr(whole, name), getattr(part, name)
        kept = np.isin(before.y, [7, 2, 4])
        np.testing.assert_array_equal(numbers_of(after), numbers_of(before)[kept])
        np.testing.assert_array_equal(np.array([7, 2, 4])[after.y], before.y[kept])
    sized = load_data(folder_set, tmp_path, classes=[2, 7], train_size=50, test_size=20)
    assert (len(sized.train), len(sized.test), sized.train.y.max()) == (50, 20, 1)


PARTS = {"train": ("train",), "test": ("validation", "test"), "both": ("train", "validation", "test")}


@pytest.mark.parametrize("part", PARTS)
@pytest.mark.parametrize("differ", [False, True])
def test_random_labels(part, differ):
    true = load_data("drawn", split="all")
    options = {"split": "all", "random_part": part, "random_differ": differ}
    splits = [load_data("drawn", **options, random_labels=share) for share in (0.0, 0.3, 1.0)]
    for name in ("train", "validation", "test"):
        labels = getattr(true, name).y
        none, some, every = (getattr(split, name).y for split in splits)
        assert torch.equal(none, labels)
        if name not in PARTS[part]:
            assert torch.equal(every, labels)
            continue
        changed = some != labels
        assert torch.equal(some[changed], every[changed])  # the same classes at every share
        share = 1 if differ else 0.9
        if differ:
            assert changed.sum() == round(0.3 * len(labels))
            assert (every != labels).all()
        deviation = 4 / len(labels) ** 0.5 / 2
        assert abs((every != labels).float().mean() - share) < deviation
        counts = torch.bincount(every[labels == 3], minlength=10) / (labels == 3).sum()
        expected = torch.full((10,), 1 / 9 if differ else 0.1)
        expected[3] = 0 if differ else 0.1
        torch.testing.assert_close(counts, expected, atol=0.15, rtol=0)


def test_random_labels_do_not_depend_on_other_options(tmp_path, folder_set):
    def labels(**options) -> dict[int, int]:
        train = load_data(folder_set, tmp_path, **{"split": "all", "random_labels": 1.0, **options}).train
        return dict(zip(numbers_of(train).tolist(), train.y.tolist()))

    whole = labels()
    for options in (
        {"train_size": 700},
        {"split": "published"},
        {"split": "held_out"},
        {"random_part": "both"},
        {"whiten": False, "test_size": 5},
    ):
        assert labels(**options).items() <= whole.items()
    assert 0.85 < np.mean([whole[number] != label for number, label in labels(seed=1).items()]) < 0.95
    with_test = load_data("drawn", split="all", random_labels=1.0, random_part="both")
    agreeing = (with_test.train.y[500:900] == with_test.test.y[:400]).float().mean()
    assert agreeing < 0.2  # streams of their own
    options = {"split": "all", "validation_size": 0, "random_part": "both", "random_differ": True}
    true, half = (load_data("drawn", **options, random_labels=share) for share in (0.0, 0.5))
    changed = [getattr(half, part).y[:900] != getattr(true, part).y[:900] for part in ("train", "test")]
    assert 0.4 < (changed[0] == changed[1]).float().mean() < 0.6


def test_the_drawn_bits_stay_what_they_are(tmp_path, folder_set):
    """Whoever repeats an experiment with another version of NumPy or of this package has the same samples."""
    split = load_data(folder_set, tmp_path, train_size=5, seed=3, random_labels=1.0)
    assert numbers_of(split.train).tolist() == [5007, 5280, 5458, 5502, 5515]
    assert split.train.y.tolist() == [2, 8, 8, 7, 8]


def test_equal_arguments_give_equal_bits_whatever_was_drawn_before(tmp_path, folder_set):
    options = {"train_size": 100, "test_size": 50, "random_labels": 0.5, "random_part": "both", "seed": 7}
    first = load_data(folder_set, tmp_path, **options)
    torch.rand(3)
    np.random.random(3)  # noqa: NPY002
    state = torch.get_rng_state()
    second = load_data(folder_set, tmp_path, **options)
    assert torch.equal(torch.get_rng_state(), state)
    for name in ("train", "validation", "test"):
        for tensor in "xy":
            assert torch.equal(getattr(getattr(first, name), tensor), getattr(getattr(second, name), tensor))


@pytest.mark.parametrize("name", ["digits", "mnist5k"])
def test_embedded_sets_are_split_as_for_training(name, monkeypatch):
    monkeypatch.setattr(samples_module, "load", functools.cache(samples_module.load))
    split = load_data(name, seed=4)
    present = load_split(name, {"digits": 200, "mnist5k": 500}[name], 4)
    for part, other in ((split.train, present.train), (split.test, present.test)):
        assert torch.equal(part.x, other.x)
        assert torch.equal(part.y, other.y)
    assert len(split.validation) == len(present.validation) == 0
    assert split.validation.x.shape[1:] == split.image_shape
    some = load_data(name, seed=4, validation_size=300)
    assert torch.equal(torch.cat([some.validation.x, some.test.x]), split.test.x)
    assert len(load_data(name, train_size=60).train) == 60


def test_the_mean_norm_is_that_of_the_training_images():
    split = load_data("digits", train_size=123)
    expected = np.sqrt((split.train.x.double().numpy() ** 2).sum((1, 2, 3))).mean()
    assert abs(split.mean_norm - expected) < 1e-12 * expected


def test_a_split_moves_as_a_whole():
    split = load_data("digits").to("meta")
    assert {part.x.device.type for part in (split.train, split.validation, split.test)} == {"meta"}
    assert isinstance(split, Split)
    assert split.num_classes == 10


def test_files_through_load_data(tmp_path, monkeypatch):
    mnist = idx_files(tmp_path / "drawn")
    mnist.write(".gz")
    cifar = cifar_files()
    cifar.archive(tmp_path / "cifar-10-python.tar.gz")
    register(DataSet("small_mnist", mnist.reader.read, validation=5))
    register(DataSet("small_cifar", cifar.reader.read, validation=5))
    first = load_data("small_mnist", tmp_path)
    np.testing.assert_array_equal((first.train.x[:, 0] * 255).round(), mnist.arrays["train-images"])
    second = load_data("small_cifar", str(tmp_path), **published_options("cifar10"))
    assert second.image_shape == (3, 28, 28)
    assert [len(part) for part in (second.train, second.validation, second.test)] == [65, 5, 11]


def test_published_preparations():
    assert {"digits", "mnist5k", "mnist", "cifar10", "cifar100", "svhn", "fashion"} <= set(data_set_names())
    assert published_options("cifar10") == published_options("svhn") == {"whiten": True, "crop": 28}
    assert published_options("mnist") == published_options("digits") == {}


BAD = {
    "a name": (("mnits",), {}, "data set 'mnits' is not known; there are digits, drawn, mnist5k, cifar10, "),
    "no root": (("mnist",), {}, "argument `root`: is required for mnist: give the folder of its"),
    "another root": (("mnist", "/no/such"), {}, "root='/no/such': is not there; give the folder"),
    "train_size 0": (("drawn",), {"train_size": 0}, "train_size=0: must be an integer >= 1"),
    "train_size text": (("drawn",), {"train_size": "5"}, "train_size='5'"),
    "train_size true": (("drawn",), {"train_size": True}, "train_size=True"),
    "train_size": (("folder", "."), {"train_size": 1001}, "train_size=1001: folder has 1000 such images"),
    "test_size": (("drawn",), {"test_size": 401}, "test_size=401: drawn has 400 such images"),
    "validation": (("drawn",), {"validation_size": 900}, "validation_size=900: must be less than the 900 test images"),
    "validation -1": (("drawn",), {"validation_size": -1}, "validation_size=-1"),
    "held out": (
        ("drawn",),
        {"split": "held_out", "validation_size": 6000},
        "split='held_out': it leaves the first 6000 training images out, and drawn has 6000",
    ),
    "split": (("drawn",), {"split": "half"}, "split='half': choose published, all or held_out"),
    "share": (("drawn",), {"random_labels": 1.01}, "random_labels=1.01: must be a number from 0 to 1"),
    "share nan": (("drawn",), {"random_labels": float("nan")}, "random_labels=nan"),
    "share true": (("drawn",), {"random_labels": True}, "random_labels=True"),
    "part": (("drawn",), {"random_part": "tr"}, "random_part='tr': choose train, test or both"),
    "seed": (("drawn",), {"seed": -1}, "seed=-1"),
    "crop": (("drawn",), {"crop": 5}, "crop=5: the images are 4x4 pixels"),
    "crop 0": (("drawn",), {"crop": 0}, "crop=0"),
    "coarse": (("drawn",), {"coarse": True}, "coarse=True: drawn has no coarse classes; cifar100 has"),
    **{
        f"classes {classes}": (("drawn",), {"classes": classes}, "classes=.* give two or more different classes from 0")
        for classes in ((), (1,), (1, 1), (1, 10), (-1, 2), ("a", "b"), (0.5, 1), "12", 3)
    },
}


@pytest.mark.parametrize("case", BAD)
def test_bad_arguments_give_one_line(folder_set, case):
    args, options, pattern = BAD[case]
    with pytest.raises(UserError, match=pattern) as caught:
        load_data(*args, **options)
    assert "\n" not in str(caught.value)


def test_too_few_images(drawn):
    few = Images(numbered(40, 0), np.arange(40) % 5), Images(numbered(20, 0), np.arange(20) % 5)
    none = Images(numbered(0, 0), np.arange(0))
    register(DataSet("few", lambda request: few, embedded=True, reserved=5000, validation=5))
    register(DataSet("none", lambda request: (none, few[1]), embedded=True))
    with pytest.raises(UserError, match=r"leaves the first 5000 training images out, and few has 40; choose all"):
        load_data("few")
    assert len(load_data("few", split="all").train) == 40
    with pytest.raises(UserError, match="argument `classes`: no training or no test image of few is of these classes"):
        load_data("few", split="all", classes=(5, 6))
    with pytest.raises(UserError, match=r"data set none: .* holds 0 training and 20 test images"):
        load_data("none")


def test_an_unreadable_root_gives_one_line(drawn):
    def read(request):
        raise PermissionError(13, "Permission denied")

    register(DataSet("locked", read))
    with pytest.raises(UserError, match=r"root='\.': it cannot be read \(Permission denied\)"):
        load_data("locked", ".")


def test_names_are_taken_once(drawn):
    with pytest.raises(ValueError, match="a data set 'drawn' is registered already"):
        register(DataSet("drawn", drawn.read))


def test_the_public_names_do_not_load_the_experiments():
    script = "import sys, sn_fast; sys.exit(any(m.startswith('sn_fast.experiments') for m in sys.modules))"
    assert subprocess.run([sys.executable, "-c", script], cwd=Path(__file__).parents[3]).returncode == 0


@pytest.mark.parametrize("labels", [(-1, 3), (0, 10)])
def test_labels_of_no_class_are_refused(drawn, labels):
    parts = Images(numbered(2, 0), np.array([0, 1])), Images(numbered(2, 0), np.array(labels))
    register(DataSet("other", lambda request: parts, embedded=True, validation=0))
    message = f"data set other: its labels are {labels[0]} to {labels[1]}, those of 10 classes are 0 to 9"
    with pytest.raises(UserError, match=message):
        load_data("other")


def test_a_reader_that_returns_something_else_is_told_what_to_return():
    with pytest.raises(ValueError, match="pixels of int64 and shape"):  # 0 to 255 would be taken for 0 to 1
        Images(numbered(2, 0).astype(np.int64), np.arange(2))
    with pytest.raises(ValueError, match=r"labels of int64 and shape \(3,\): give int64, \(2,\)"):
        Images(numbered(2, 0), np.arange(3))
    with pytest.raises(ValueError, match="labels of float64"):
        Images(numbered(2, 0), np.arange(2.0))
