from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest

import sn_fast
from sn_fast.cli import main
from sn_fast.experiments.data import samples as data_module
from sn_fast.experiments.training import Interrupted

TINY = ["--train-size", "60", "--epochs", "2", "--batch-size", "30", "--steps", "2", "--eps", "0.3", "--quiet"]


@pytest.fixture(autouse=True)
def _few_digits_and_a_place_to_run(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    load = data_module.load
    monkeypatch.setattr(data_module, "load", lambda name: tuple(part[:240] for part in load(name)))
    monkeypatch.chdir(tmp_path)


def error_line(capsys: pytest.CaptureFixture[str], *argv: str) -> str:
    """The one line that a refused command leaves."""
    assert main(argv) == 2
    out, err = capsys.readouterr()
    assert out == ""
    assert err.startswith("sn-fast: error: ")
    assert err.count("\n") == 1
    assert "`" not in err  # every argument of a library function is worded as an option
    return err


@pytest.mark.parametrize(
    ("argv", "expected"),
    [
        (["fly"], "invalid choice: 'fly' (choose from"),
        (["train", "--colour", "red"], "unrecognized arguments: --colour red; see sn-fast train --help"),
        (
            ["train", "--epoch=3", "--batches", "2"],
            "unrecognized arguments: --batches 2 (similar: --batch-size); see sn-",
        ),
        (["norms", "a:b", "--ex", "c", "--in", "d"], "ambiguous option: --in could match --input-size, --include"),
        (["--colour"], "unrecognized arguments: --colour; see sn-fast --help"),
        (["train", "--eps"], "argument --eps: expected one argument"),
        (["train", "--eps", "big"], "argument --eps: invalid float value: 'big'"),
        (["train", "--epochs", "1.5"], "argument --epochs: invalid int value: '1.5'"),
        (["train", "--data", "cifar"], "argument --data: invalid value cifar: choose digits, mnist5k, "),
        (["train", "--scheme", "mim"], "argument --scheme: invalid value mim: choose erm, fgm, pgm or wrm"),
        (["train", "--scheme", "pgd", "--norm", "linf", "--eps", "0"], "argument --eps: invalid value 0.0"),
        (["train", "--norm", "3"], "argument --norm: invalid value 3: choose 2, inf or 1"),
        (["train", "--eps", "0"], "argument --eps: invalid value 0.0: must be a finite number > 0"),
        (["train", "--eps", "-1"], "argument --eps: invalid value -1.0: must be a finite number > 0"),
        (["train", "--beta", "-2"], "argument --beta: invalid value -2.0: must be a number > 0"),
        (["train", "--beta", "inf"], "argument --beta: invalid value inf:"),
        (["train", "--epochs", "0"], "argument --epochs: invalid value 0: must be an integer >= 1"),
        (["train", "--train-size", "99999"], "argument --train-size: invalid value 99999: must leave"),
        (["train", "--attack-labels", "none"], "argument --attack-labels: invalid value none"),
        (["train", "--ddp"], "argument --ddp: start with torchrun, e.g. torchrun --nproc-per-node 2 -m sn_fast train"),
        (["train", "--resume", "absent"], "argument --resume: there is no folder absent"),
        (["train", "--resume", "."], "argument --resume: . has no checkpoint.pt"),
        (["train", "--resume", "a", "--out", "b"], "not allowed with argument"),
    ],
)
def test_bad_input_is_one_line_and_exit_code_2(capsys, argv, expected):
    assert expected in error_line(capsys, *argv)
    assert not list(Path.cwd().iterdir())


def test_options_can_be_abbreviated(capsys):
    assert "argument --batch-size:" in error_line(capsys, "train", "--batch", "0")


def test_no_command_shows_the_help(capsys):
    assert main([]) == 2  # as argparse leaves where an argument is missing
    out, err = capsys.readouterr()
    assert out == ""
    assert err.startswith("usage: sn-fast [-h] [--version] COMMAND ...\n")
    for command in ("train", "norms", "info"):
        assert f"\n    {command} " in err


def test_version(capsys):
    with pytest.raises(SystemExit) as exit_:
        main(["--version"])
    assert exit_.value.code == 0
    assert capsys.readouterr() == (f"sn-fast {sn_fast.__version__}\n", "")


def test_cuda_without_cuda(capsys, monkeypatch):
    monkeypatch.setattr("torch.cuda.is_available", lambda: False)
    assert "argument --device: invalid value cuda" in error_line(capsys, "train", "--device", "cuda")


def test_a_folder_in_use_is_not_touched(capsys, tmp_path):
    (tmp_path / "notes").mkdir()
    (tmp_path / "notes" / "a.txt").write_text("mine")
    line = error_line(capsys, "train", *TINY, "--out", "notes")
    assert "argument --out: notes is not empty" in line
    assert "--resume notes" in line
    assert [p.name for p in (tmp_path / "notes").iterdir()] == ["a.txt"]


def test_a_damaged_checkpoint(capsys, tmp_path):
    (tmp_path / "run").mkdir()
    (tmp_path / "run" / "checkpoint.pt").write_bytes(b"PK\x03\x04 cut short")
    assert "checkpoint.pt is damaged" in error_line(capsys, "train", "--resume", "run")
    assert (tmp_path / "run" / "checkpoint.pt").read_bytes() == b"PK\x03\x04 cut short"


def test_a_loss_that_diverges_names_the_option_and_a_smaller_value(capsys):
    line = error_line(capsys, "train", *TINY, "--lr", "1e30", "--out", "run")
    assert "argument --lr: 1e+30 is too large" in line
    assert "--lr 2e+29 or smaller (run holds epoch 0)" in line


def test_train_resume_and_json(capsys, tmp_path):
    assert main(["train", *TINY]) == 0
    text = capsys.readouterr().out
    assert "PGM ℓ2 ε = 0.3 *" in text
    run = Path("runs", "digits-pgm-beta1.6-seed0")
    assert str(run) in text
    assert main(["train", "--resume", str(run), "--epochs", "2", "--json", "--quiet"]) == 0
    out, err = capsys.readouterr()
    document = json.loads(out)
    assert err == ""
    assert document["run"] == str(run)
    assert document["config"]["epochs"] == document["epochs_done"] == 2
    assert "argument --epochs: invalid value 3: the run to resume has 2" in error_line(
        capsys, "train", "--resume", str(run), "--epochs", "3"
    )


def test_progress_goes_to_stderr(capsys):
    assert main(["train", *TINY[:-1], "--json", "--single"]) == 0
    out, err = capsys.readouterr()
    assert len(json.loads(out)["networks"]) == 1
    assert out.count("\n") == 1
    for part in ("epoch 2/2: 100%", "evaluating: 100%", "adv. acc.", "loss", "<00:00"):
        assert part in err


def test_ctrl_c_says_how_to_continue(capsys, monkeypatch):
    def interrupted(*args, **kwargs):
        raise Interrupted(Path("runs/mine"))

    monkeypatch.setattr("sn_fast.cli.train.train", interrupted)
    assert main(["train"]) == 130
    assert capsys.readouterr() == ("", "sn-fast: interrupted; continue with: sn-fast train --resume runs/mine\n")
    monkeypatch.setattr("sn_fast.cli.train.train", lambda *a, **k: (_ for _ in ()).throw(KeyboardInterrupt))
    assert main(["train"]) == 130
    assert capsys.readouterr() == ("", "sn-fast: interrupted\n")


@pytest.mark.parametrize("command", ["train", "norms", "info"])
def test_help_shows_an_example(capsys, command):
    with pytest.raises(SystemExit) as exit_:
        main([command, "--help"])
    assert exit_.value.code == 0
    assert f"example:\n  sn-fast {command}" in capsys.readouterr().out


def test_info(capsys):
    assert main(["info"]) == 0
    text = capsys.readouterr().out
    assert main(["info", "--json"]) == 0
    facts = json.loads(capsys.readouterr().out)
    assert facts == sn_fast.info()
    assert facts["sn_fast"] == sn_fast.__version__
    assert facts["kernels"].startswith(("CUDA kernels for ", "not built: ", "built but will not load: "))
    assert [line.split(maxsplit=1) for line in text.splitlines()] == [list(fact) for fact in facts.items()]


def test_python_m_sn_fast_is_the_command():
    command = [sys.executable, "-m", "sn_fast", "train", "--eps", "0"]
    process = subprocess.run(command, cwd=Path(__file__).parents[1], capture_output=True, text=True)
    assert process.returncode == 2
    assert process.stderr == "sn-fast: error: argument --eps: invalid value 0.0: must be a finite number > 0\n"
