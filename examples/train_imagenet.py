"""PGD adversarial training of a ResNet whose layers have true spectral norms of at most beta, under torchrun.

    torchrun --nproc-per-node 8 --max-restarts 3 examples/train_imagenet.py --data IMAGENET --arch resnet50 --bf16
    torchrun --nproc-per-node 2 examples/train_imagenet.py --data CIFAR --parallel fsdp
    torchrun --nproc-per-node 2 examples/train_imagenet.py --data synthetic --max-steps 20   # does it run here?

IMAGENET holds train/CLASS/*.JPEG and val/CLASS/*.JPEG, CIFAR holds cifar-10-batches-py. Run the same command again, or
let torchrun restart it after a fault: training goes on from the last checkpoint in --out, which is written every
--save-every steps, as a whole or not at all. The number of processes, and --parallel, may then be others. On several
nodes set TORCH_DISABLE_SHARE_RDZV_TCP_STORE=1 for restarts: without it the processes that torchrun starts anew can find
the addresses of the old ones in its store, and fail to connect (PyTorch 2.14).
"""

from __future__ import annotations

import argparse
import io
import math
import os
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor, nn
from torch.distributed.checkpoint.state_dict import (
    StateDictOptions,
    get_state_dict,
    set_model_state_dict,
    set_optimizer_state_dict,
)
from torch.nn.parallel import DistributedDataParallel
from torch.utils.data import DataLoader, Dataset, TensorDataset

import sn_fast
from sn_fast.attacks import pgd
from sn_fast.errors import UserError, first_line
from sn_fast.experiments import build_network, load_data
from sn_fast.experiments.training.ranks import Ranks, ranks_of_torchrun
from sn_fast.files import replace_file

MEAN, STD = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)
MOST_SKIPPED = 10  # steps one after the other whose loss is not finite, before training ends


class Standardise(nn.Module):
    """The network takes pixels in [0, 1], so that attacks are clipped to them."""

    def __init__(self) -> None:
        super().__init__()
        self.register_buffer("mean", torch.tensor(MEAN).view(3, 1, 1))
        self.register_buffer("std", torch.tensor(STD).view(3, 1, 1))

    def forward(self, x: Tensor) -> Tensor:
        return (x - self.mean) / self.std


def data_of(options: argparse.Namespace) -> tuple[Dataset[Any], Dataset[Any], int, int]:
    """Training and test images, number of classes, and the images' size."""
    if options.data == "synthetic":
        generator = torch.Generator().manual_seed(options.seed)
        size = options.image_size or 32
        x = torch.rand(options.images or 512, 3, size, size, generator=generator)
        y = (x[:, :, : size // 2].mean(dim=(1, 2, 3)) > x[:, :, size // 2 :].mean(dim=(1, 2, 3))).long()
        return TensorDataset(x, y), TensorDataset(x[:64], y[:64]), 2, size
    if (Path(options.data) / "train").is_dir():
        try:
            from torchvision import datasets, transforms
        except ModuleNotFoundError:
            raise UserError("image folders need torchvision; run: pip install torchvision") from None
        size = options.image_size or 224
        crop = [transforms.RandomResizedCrop(size), transforms.RandomHorizontalFlip(), transforms.ToTensor()]
        whole = [transforms.Resize(size * 8 // 7), transforms.CenterCrop(size), transforms.ToTensor()]
        train = datasets.ImageFolder(os.path.join(options.data, "train"), transforms.Compose(crop))
        test = datasets.ImageFolder(os.path.join(options.data, "val"), transforms.Compose(whole))
        return train, test, len(train.classes), size
    split = load_data("cifar10", options.data, train_size=options.images, allow_partial=options.allow_partial)
    train, test = split.train, split.test
    return TensorDataset(train.x, train.y), TensorDataset(test.x, test.y), split.num_classes, train.x.shape[-1]


def network_of(options: argparse.Namespace, classes: int, size: int) -> nn.Module:
    """torchvision's ResNet where that is installed; else, or by its name, one of the package's networks."""
    torch.manual_seed(options.seed)
    name = options.arch
    if name in ("resnet18", "resnet50"):
        try:
            from torchvision import models

            return nn.Sequential(Standardise(), getattr(models, name)(num_classes=classes))
        except ModuleNotFoundError:
            name = "resnet"
    network = build_network(name, in_channels=3, num_classes=classes, image_size=size, seed=options.seed)
    return nn.Sequential(Standardise(), network)


def parallel(network: nn.Module, options: argparse.Namespace) -> nn.Module:
    """The network as each process trains it. It is normalised before it is wrapped or sharded."""
    if options.parallel == "ddp":
        if options.compile:
            network.compile()
        return DistributedDataParallel(network)
    from torch.distributed.fsdp import fully_shard

    for module in network.modules():
        if type(module).__name__ in ("BasicBlock", "Bottleneck"):
            fully_shard(module)
    fully_shard(network)
    if options.compile:
        network.compile()
    return network


def batches(data: Dataset[Any], epoch: int, first: int, options: argparse.Namespace, ranks: Ranks) -> Iterator[Any]:
    """This process's part of each batch of an epoch, from batch number ``first`` on; short last ones are left out."""
    order = torch.randperm(len(data), generator=torch.Generator().manual_seed(options.seed + epoch))  # type: ignore[arg-type]
    whole = len(order) // options.batch_size * options.batch_size
    parts = [ranks.part(part).tolist() for part in order[:whole].split(options.batch_size)]
    return iter(DataLoader(data, batch_sampler=parts[first:], num_workers=options.workers))


def saved(network: nn.Module, optimizer: torch.optim.Optimizer, step: int, path: Path, ranks: Ranks) -> None:
    """Write the checkpoint: gathered by all processes, written by the first; the file is the old or the new one."""
    whole = StateDictOptions(full_state_dict=True, cpu_offload=True)
    model, state = get_state_dict(network, optimizer, options=whole)
    if ranks.leads:
        buffer = io.BytesIO()
        torch.save({"step": step, "model": model, "optimizer": state}, buffer)
        replace_file(path, buffer.getvalue())
        print(f"step {step}: checkpoint written", flush=True)
    dist.barrier()


def restored(network: nn.Module, optimizer: torch.optim.Optimizer, path: Path, ranks: Ranks) -> int:
    """Load the checkpoint, if there is one, and return the step that it was written after."""
    content: dict[str, Any] = {"step": 0, "model": {}, "optimizer": {}}
    problem = None
    if ranks.leads and path.exists():
        try:
            content = torch.load(path, map_location="cpu", weights_only=True)
        except Exception as error:  # a damaged file can fail in any way
            problem = f"{path} is damaged ({first_line(error)}); restore a copy, or move it away to start anew"
    told = [content["step"], problem]
    dist.broadcast_object_list(told, src=0)
    if told[1] is not None:
        raise UserError(told[1])
    if told[0]:
        whole = StateDictOptions(full_state_dict=True, broadcast_from_rank0=True)
        set_model_state_dict(network, content["model"], options=whole)
        set_optimizer_state_dict(network, optimizer, content["optimizer"], options=whole)
    return int(told[0])


def train_step(
    network: nn.Module,
    optimizer: torch.optim.Optimizer,
    x: Tensor,
    y: Tensor,
    options: argparse.Namespace,
    ranks: Ranks,
) -> tuple[float, float] | None:
    """Loss and accuracy of the whole batch, attacked; None: the loss was not finite, and no weight moved."""
    dtype = torch.bfloat16 if options.bf16 else None
    x_adv = pgd(network, x, y, norm=torch.inf, eps=options.eps, steps=options.steps, clip=(0, 1), autocast_dtype=dtype)
    with torch.autocast(x.device.type, torch.bfloat16, enabled=options.bf16):
        logits = network(x_adv)
        loss = F.cross_entropy(logits.float(), y, reduction="sum") * ranks.size / options.batch_size
    right = float((logits.argmax(dim=1) == y).sum())
    total, correct = ranks.summed([float(loss.detach()), right], x.device)
    if not math.isfinite(total):  # the same in all processes, so all leave the step out
        optimizer.zero_grad()
        return None
    optimizer.zero_grad()
    loss.backward()
    optimizer.step()
    return total / ranks.size, correct / options.batch_size


def evaluated(network: nn.Module, data: Dataset[Any], options: argparse.Namespace, ranks: Ranks, device: str) -> str:
    """Accuracies on the first test images, clean and attacked, each process on its part."""
    network.eval()
    counts = torch.zeros(3, dtype=torch.float64, device=device)
    indices = ranks.part(torch.arange(min(options.test_images, len(data)) // ranks.size * ranks.size)).tolist()  # type: ignore[arg-type]
    part = max(1, options.batch_size // ranks.size)
    order = [indices[i : i + part] for i in range(0, len(indices), part)]
    for x, y in DataLoader(data, batch_sampler=order, num_workers=options.workers):
        x, y = x.to(device), y.to(device)
        x_adv = pgd(network, x, y, norm=torch.inf, eps=options.eps, steps=options.steps, clip=(0, 1))
        with torch.no_grad():
            clean, attacked = ((network(z).argmax(dim=1) == y).sum() for z in (x, x_adv))
        counts += torch.stack([clean, attacked, torch.tensor(len(y), device=device)])
    dist.all_reduce(counts)
    network.train()
    clean, attacked, n = counts.tolist()
    return f"test accuracy {clean / n:.1%}, under attack {attacked / n:.1%} ({n:.0f} images)"


def learning_rate(step: int, steps: int, options: argparse.Namespace) -> float:
    """Rises for the first twentieth of the steps, then falls as a cosine."""
    warm_up = max(1, steps // 20)
    return options.lr * min((step + 1) / warm_up, 0.5 + 0.5 * math.cos(math.pi * step / steps))


def run(options: argparse.Namespace, ranks: Ranks, device: str) -> None:
    """Train to the last step."""
    train, test, classes, size = data_of(options)
    per_epoch = len(train) // options.batch_size  # type: ignore[arg-type]
    if options.batch_size % ranks.size or not per_epoch:
        raise UserError(
            f"argument --batch-size: invalid value {options.batch_size}: must be a multiple of the {ranks.size} "
            f"processes, and at most the {len(train)} images"  # type: ignore[arg-type]
        )
    steps = min(options.epochs * per_epoch, options.max_steps or sys.maxsize)
    plain = network_of(options, classes, size).to(device)
    sn_fast.apply_spectral_norm(plain, torch.rand(1, 3, size, size, device=device), beta=options.beta)
    network = parallel(plain, options)
    optimizer = torch.optim.SGD(network.parameters(), options.lr, momentum=0.9, weight_decay=1e-4)
    checkpoint = options.out / "checkpoint.pt"
    step = restored(network, optimizer, checkpoint, ranks)
    print(f"rank {ranks.rank} of {ranks.size}, process {os.getpid()}: starts after step {step} of {steps}", flush=True)
    skipped, began, seen = 0, time.monotonic(), 0
    while step < steps:
        epoch, first = divmod(step, per_epoch)
        for x, y in batches(train, epoch, first, options, ranks):
            for group in optimizer.param_groups:
                group["lr"] = learning_rate(step, steps, options)
            result = train_step(network, optimizer, x.to(device), y.to(device), options, ranks)
            step, seen = step + 1, seen + options.batch_size
            skipped = 0 if result is not None else skipped + 1
            if skipped == MOST_SKIPPED:
                raise UserError(f"the loss of {skipped} steps was not finite; start again with a smaller --lr")
            if ranks.leads and (step % options.log_every == 0 or result is None):
                found = (
                    "loss not finite, left out"
                    if result is None
                    else f"loss {result[0]:.4f}, adv. acc. {result[1]:.1%}"
                )
                print(f"step {step}: {found}, {seen / (time.monotonic() - began):.1f} images/s", flush=True)
            if step % options.save_every == 0 or step == steps:
                saved(network, optimizer, step, checkpoint, ranks)
            if step == steps:
                break
        if step % per_epoch == 0 or step == steps:
            text = evaluated(network, test, options, ranks, device)
            if ranks.leads:
                print(f"step {step}: {text}", flush=True)


def main() -> int:
    """Parse and run; one line on stderr and exit code 2 for what the user can put right."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", required=True, metavar="DIR", help="image folders, CIFAR-10's files, or: synthetic")
    parser.add_argument("--allow-partial", action="store_true", help="accept a part of CIFAR-10's files")
    parser.add_argument(
        "--images", type=int, help="number of training images of CIFAR-10 or synthetic (default: all, 512)"
    )
    parser.add_argument(
        "--image-size", type=int, help="of image folders (default: 224) or synthetic images (default: 32)"
    )
    parser.add_argument("--arch", default="resnet18", help="resnet18, resnet50, or a network of sn_fast.experiments")
    parser.add_argument("--beta", type=float, default=1.0, help="largest norm of a layer (default: 1)")
    parser.add_argument("--eps", type=float, default=4 / 255, help="radius of the attack in l_inf (default: 4/255)")
    parser.add_argument("--steps", type=int, default=3, help="steps of the attack (default: 3)")
    parser.add_argument("--parallel", choices=("ddp", "fsdp"), default="ddp", help="default: ddp")
    parser.add_argument("--epochs", type=int, default=90)
    parser.add_argument("--max-steps", type=int, help="end earlier")
    parser.add_argument("--batch-size", type=int, default=256, help="of all processes together (default: 256)")
    parser.add_argument("--lr", type=float, default=0.1)
    parser.add_argument("--bf16", action="store_true", help="forwards and attacks under autocast")
    parser.add_argument("--compile", action="store_true", help="torch.compile")
    parser.add_argument("--workers", type=int, default=0, help="processes that load images, of each rank (default: 0)")
    parser.add_argument("--out", type=Path, default=Path("runs/imagenet"), help="folder of the checkpoint")
    parser.add_argument("--save-every", type=int, default=500, metavar="STEPS")
    parser.add_argument("--log-every", type=int, default=50, metavar="STEPS")
    parser.add_argument("--test-images", type=int, default=5000)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--device", choices=("auto", "cpu", "cuda"), default="auto")
    options = parser.parse_args()
    device = "cuda" if options.device != "cpu" and torch.cuda.is_available() else "cpu"
    try:
        with ranks_of_torchrun(device) as ranks:
            options.out.mkdir(parents=True, exist_ok=True)
            run(options, ranks, device)
    except UserError as error:
        print(f"train_imagenet: error: {error}", file=sys.stderr, flush=True)
        return 2
    return 0


if __name__ == "__main__":
    code = main()
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(code)  # at once: while Python ends, a thread of gloo can abort the process (CPython before 3.14)
