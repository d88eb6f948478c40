"""A small GPT whose every linear map has a spectral norm of at most beta, on one process or many.

    python examples/train_gpt.py --steps 200
    torchrun --nproc-per-node 8 --max-restarts 3 examples/train_gpt.py --data book.txt --out runs/gpt --width 768

Under torchrun the model is sharded by fully_shard (FSDP2), block by block, with activation checkpointing; NCCL on
GPUs, gloo on CPUs. Every ``--save-every`` steps a checkpoint (torch.distributed.checkpoint) goes to ``--out``; the same
command continues from the last one, on any number of processes, so torchrun's restarts lose at most one interval. On
several nodes set TORCH_DISABLE_SHARE_RDZV_TCP_STORE=1 for restarts: without it the processes that torchrun starts anew
can find the addresses of the old ones in its store, and fail to connect (PyTorch 2.14).

``--normalize projection`` scales the plain weights back after each step (``sn_fast.SpectralProjection``),
``parametrization`` divides them in the forward (``sn_fast.apply_spectral_norm``), ``none`` leaves them alone.
"""

from __future__ import annotations

import argparse
import json
import os
import shutil
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
import torch.distributed.checkpoint as dcp
import torch.nn.functional as F
from torch import Tensor, nn
from torch.distributed.checkpoint.state_dict import get_state_dict, set_state_dict
from torch.nn.utils import parametrize
from torch.utils.checkpoint import checkpoint

import sn_fast

VOCABULARY = 256  # bytes


class Block(nn.Module):
    def __init__(self, width: int, heads: int) -> None:
        super().__init__()
        self.heads = heads
        self.norm1, self.norm2 = nn.LayerNorm(width), nn.LayerNorm(width)
        self.qkv, self.out = nn.Linear(width, 3 * width), nn.Linear(width, width)
        self.up, self.down = nn.Linear(width, 4 * width), nn.Linear(4 * width, width)

    def forward(self, x: Tensor) -> Tensor:
        q, k, v = self.qkv(self.norm1(x)).unflatten(-1, (3, self.heads, -1)).movedim(-3, 0).transpose(-2, -3)
        x = x + self.out(F.scaled_dot_product_attention(q, k, v, is_causal=True).transpose(-2, -3).flatten(-2))
        return x + self.down(F.gelu(self.up(self.norm2(x))))


class GPT(nn.Module):
    def __init__(self, width: int, heads: int, layers: int, context: int, recompute: bool) -> None:
        super().__init__()
        self.token, self.place = nn.Embedding(VOCABULARY, width), nn.Embedding(context, width)
        self.blocks = nn.ModuleList([Block(width, heads) for _ in range(layers)])
        self.norm, self.head = nn.LayerNorm(width), nn.Linear(width, VOCABULARY)
        self.recompute = recompute

    def forward(self, tokens: Tensor) -> Tensor:
        """Logits (B, T, 256) for tokens (B, T)."""
        x = self.token(tokens) + self.place.weight[: tokens.shape[1]]
        for block in self.blocks:
            x = checkpoint(block, x, use_reentrant=False) if self.recompute and self.training else block(x)
        return self.head(self.norm(x))


class Corpus:
    """Bytes of a file, or of a random walk over words; the batch of a step follows from its number alone."""

    def __init__(self, path: str | None, context: int) -> None:
        if path is None:
            generator = torch.Generator().manual_seed(0)
            words = torch.randint(97, 123, (50, 6), generator=generator, dtype=torch.uint8)
            words[:, -1] = 32
            self.bytes = words[torch.randint(50, (20_000,), generator=generator)].flatten()
        else:
            self.bytes = torch.frombuffer(bytearray(Path(path).read_bytes()), dtype=torch.uint8)
        if len(self.bytes) <= context + 1:
            raise SystemExit(f"train_gpt: --data {path} has {len(self.bytes)} bytes; --context {context} needs more")
        self.context = context

    def batch(self, step: int, size: int, rank: int, world: int) -> tuple[Tensor, Tensor]:
        """Inputs and targets, (B / world, T), of this process's part of the step's batch of B."""
        starts = torch.randint(len(self.bytes) - self.context, (size,), generator=torch.Generator().manual_seed(step))
        rows = torch.stack([self.bytes[s : s + self.context + 1] for s in starts[rank::world].tolist()]).long()
        return rows[:, :-1], rows[:, 1:]


class Training:
    """Model, optimizer, normalisation, and their checkpoints."""

    def __init__(self, options: argparse.Namespace) -> None:
        self.options = options
        self.rank, self.world = (dist.get_rank(), dist.get_world_size()) if dist.is_initialized() else (0, 1)
        cuda = torch.cuda.is_available()
        self.device = torch.device("cuda", int(os.environ.get("LOCAL_RANK", 0))) if cuda else torch.device("cpu")
        torch.manual_seed(options.seed)  # equal weights on all ranks
        model = GPT(options.width, options.heads, options.layers, options.context, self.world > 1).to(self.device)
        example = torch.zeros(1, options.context, dtype=torch.long, device=self.device)
        if options.normalize == "parametrization":
            sn_fast.apply_spectral_norm(model, example, beta=options.beta)
        if self.world > 1:
            from torch.distributed.fsdp import fully_shard

            mesh = dist.init_device_mesh(self.device.type, (self.world,))
            for block in model.blocks:
                fully_shard(block, mesh=mesh)
            fully_shard(model, mesh=mesh)
        self.model = model
        self.optimizer = torch.optim.AdamW(model.parameters(), lr=options.lr)
        self.projection: sn_fast.SpectralProjection | None = None
        if options.normalize == "projection":
            self.projection = sn_fast.SpectralProjection(
                model, example, beta=options.beta, cap_singular_values=options.cap_singular_values
            )
            self.projection.attach(self.optimizer)
        self.corpus = Corpus(options.data, options.context)
        self.step = 0

    def run(self) -> float:
        """Train to the last step; returns its loss, the mean over all processes."""
        options, value = self.options, float("nan")
        self.load()
        while self.step < options.steps:
            x, y = (t.to(self.device) for t in self.corpus.batch(self.step, options.batch_size, self.rank, self.world))
            loss = F.cross_entropy(self.model(x).flatten(0, 1), y.flatten())
            loss.backward()
            self.optimizer.step()  # and, attached to it, the projection
            self.optimizer.zero_grad()
            self.step += 1
            total = loss.detach().clone()
            if self.world > 1:
                dist.all_reduce(total)
            value = total.item() / self.world
            self.log({"step": self.step, "loss": value})
            if options.out and (self.step % options.save_every == 0 or self.step == options.steps):
                self.save()
        self.log({"largest norm": self.largest_norm()})
        return value

    def log(self, record: dict[str, Any]) -> None:
        if self.rank == 0:
            print(json.dumps(record), flush=True)

    @torch.no_grad()
    def largest_norm(self) -> float:
        """The largest spectral norm of the linear maps in use, from dense decompositions; on all ranks together."""
        norms = [0.0]
        for module in self.model.modules():
            if not isinstance(module, nn.Linear):
                continue
            normalised = parametrize.is_parametrized(module, "weight")
            weight: Any = module.parametrizations.weight.original if normalised else module.weight
            weight = weight.full_tensor() if hasattr(weight, "full_tensor") else weight
            norm = torch.linalg.matrix_norm(weight.float(), 2).item()
            sigma = module.parametrizations.weight[0].sigma.item() if normalised else 0.0
            norms.append(norm / max(1.0, sigma / self.options.beta))
        return max(norms)

    # -- checkpoints --------------------------------------------------------------------------------------------------

    def state(self) -> dict[str, Any]:
        model, optimizer = get_state_dict(self.model, self.optimizer)
        state: dict[str, Any] = {"model": model, "optimizer": optimizer, "step": torch.tensor(self.step)}
        return state if self.projection is None else {**state, "projection": self.projection.state_dict()}

    def save(self) -> None:
        """Under a temporary name first: a folder with its final name is whole."""
        folder = Path(self.options.out)
        begun, done = folder / ".begun", folder / f"step-{self.step:06d}"
        if self.rank == 0:
            shutil.rmtree(begun, ignore_errors=True)
            folder.mkdir(parents=True, exist_ok=True)
        self.wait()
        dcp.save(self.state(), checkpoint_id=begun)
        if self.rank == 0:
            shutil.rmtree(done, ignore_errors=True)
            begun.rename(done)
            for old in self.saved()[:-2]:
                shutil.rmtree(old)
        self.wait()

    def saved(self) -> list[Path]:
        """The folders of checkpoints, the last step's last."""
        found = Path(self.options.out).glob("step-*") if self.options.out else []
        return sorted(found, key=lambda folder: int(folder.name.removeprefix("step-")))

    def load(self) -> None:
        found = self.saved()
        if not found:
            return
        state = self.state()
        dcp.load(state, checkpoint_id=found[-1])
        set_state_dict(self.model, self.optimizer, model_state_dict=state["model"], optim_state_dict=state["optimizer"])
        if self.projection is not None:
            self.projection.load_state_dict(state["projection"])
        self.step = int(state["step"])
        self.log({"continued from": str(found[-1])})

    def wait(self) -> None:
        if self.world > 1:
            dist.barrier()


def main(arguments: Sequence[str] | None = None) -> float:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--normalize", choices=("projection", "parametrization", "none"), default="projection")
    parser.add_argument("--beta", type=float, default=2.0, help="largest norm of every Linear")
    parser.add_argument("--cap-singular-values", action="store_true", help="clip whole spectra (projection)")
    parser.add_argument("--data", metavar="FILE", help="text to learn; without it random words")
    parser.add_argument("--out", metavar="DIR", help="checkpoints; those that are there are continued from")
    parser.add_argument("--save-every", type=int, default=100, metavar="N", help="steps between checkpoints")
    parser.add_argument("--steps", type=int, default=200)
    parser.add_argument("--batch-size", type=int, default=16, help="sequences per step, of all processes together")
    parser.add_argument("--lr", type=float, default=3e-3)
    parser.add_argument("--seed", type=int, default=0)
    for name, value in (("width", 64), ("heads", 4), ("layers", 2), ("context", 64)):
        parser.add_argument(f"--{name}", type=int, default=value)
    options = parser.parse_args(arguments)
    world = int(os.environ.get("WORLD_SIZE", 1))
    if options.batch_size % world:
        parser.error(f"--batch-size {options.batch_size} must be divisible by the {world} processes")
    if options.width % options.heads:
        parser.error(f"--width {options.width} must be divisible by --heads {options.heads}")
    if world > 1:
        cuda = torch.cuda.is_available()
        if cuda:
            torch.cuda.set_device(int(os.environ["LOCAL_RANK"]))
        # With keys of their own for each restart: torchrun can keep the store, and in it the addresses of the dead.
        # Not on several nodes, whose counts of restarts can differ: see the docstring.
        store, rank, size = next(dist.rendezvous("env://"))
        if os.environ.get("GROUP_WORLD_SIZE") == "1":
            store = dist.PrefixStore(f"attempt {os.environ.get('TORCHELASTIC_RESTART_COUNT', 0)}", store)
        dist.init_process_group("nccl" if cuda else "gloo", store=store, rank=rank, world_size=size)
    try:
        return Training(options).run()
    finally:
        if world > 1:
            dist.destroy_process_group()


if __name__ == "__main__":
    main()
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(0)  # at once: while Python ends, a thread of gloo can abort the process (CPython before 3.14)
