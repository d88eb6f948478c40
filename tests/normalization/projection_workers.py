"""What the processes of the projection's distributed tests run; in a module of its own, for they import it by name."""

from __future__ import annotations

import contextlib
import copy
import warnings
from collections.abc import Callable, Iterator
from pathlib import Path

import torch
import torch.distributed as dist
from torch import Tensor, nn

from sn_fast import SpectralProjection

from .workers import fsdp1

EXAMPLE = torch.randn(1, 3, 8, 8, generator=torch.Generator().manual_seed(1))
BETA = 0.6


def network() -> nn.Sequential:
    """Layers whose parts are rows, blocks, and gathered."""
    torch.manual_seed(0)
    return nn.Sequential(
        nn.Conv2d(3, 10, 3, stride=2, padding=1),
        nn.Conv2d(10, 40, 3, padding=1),
        nn.Conv2d(40, 40, 3, padding=1, groups=4),
        nn.ReLU(),
        nn.ConvTranspose2d(40, 7, 3, stride=2),
        nn.Flatten(),
        nn.Linear(7 * 81, 31),
        nn.ReLU(),
        nn.Linear(31, 5),
    )


def mlp() -> nn.Sequential:
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(24, 50), nn.GELU(), nn.Linear(50, 24), nn.GELU(), nn.Linear(24, 7))


def mesh(*sizes: int, names: tuple[str, ...] | None = None) -> dist.DeviceMesh:
    return dist.init_device_mesh("cpu", sizes, mesh_dim_names=names)


def fsdp2(model: nn.Sequential, **options: object) -> nn.Module:
    from torch.distributed.fsdp import fully_shard

    for layer in model:
        if isinstance(layer, (nn.Linear, nn.Conv2d, nn.ConvTranspose2d)):
            fully_shard(layer, **options)  # type: ignore[call-overload]
    return fully_shard(model, **options)  # type: ignore[call-overload]


def tensor_parallel(model: nn.Sequential, on: dist.DeviceMesh) -> nn.Sequential:
    from torch.distributed.tensor.parallel import ColwiseParallel, RowwiseParallel, parallelize_module

    parallelize_module(model, on, {"0": ColwiseParallel(), "2": RowwiseParallel()})
    return model


def sharded(how: str) -> tuple[nn.Module, Callable[[], nn.Sequential]]:
    """A sharded model, and what makes the same one whole."""
    world = dist.get_world_size()
    if how == "FSDP2":
        return fsdp2(network(), mesh=mesh(world)), network
    if how == "FSDP2, root":
        from torch.distributed.fsdp import fully_shard

        return fully_shard(network(), mesh=mesh(world)), network
    if how == "FSDP2, offloaded, bfloat16":
        from torch.distributed.fsdp import CPUOffloadPolicy, MixedPrecisionPolicy

        policies = {
            "offload_policy": CPUOffloadPolicy(pin_memory=False),
            "mp_policy": MixedPrecisionPolicy(torch.bfloat16),
        }
        return fsdp2(network(), mesh=mesh(world), **policies), network
    if how == "FSDP1":
        return fsdp1(network(), "original parameters"), network
    if how == "TP":
        return tensor_parallel(mlp(), mesh(world)), mlp
    if how == "HSDP":
        return fsdp2(network(), mesh=mesh(2, world // 2, names=("copies", "shards"))), network
    grid = mesh(2, world // 2, names=("dp", "tp"))
    return fsdp2(tensor_parallel(mlp(), grid["tp"]), mesh=grid["dp"]), mlp


@contextlib.contextmanager
def whole(model: nn.Module) -> Iterator[list[Tensor]]:
    """The whole parameters; of FSDP1 written back."""
    from torch.distributed.fsdp import FullyShardedDataParallel

    if isinstance(model, FullyShardedDataParallel):
        with FullyShardedDataParallel.summon_full_params(model):
            yield list(model.parameters())
    else:
        yield [p.detach().full_tensor() if hasattr(p, "full_tensor") else p.detach() for p in model.parameters()]


def move(model: nn.Module, seed: int) -> None:
    """A step of training, as far as the projection sees: every weight moves by what its own value decides."""
    from torch.distributed.fsdp import FullyShardedDataParallel

    in_place = isinstance(model, FullyShardedDataParallel)
    with torch.no_grad(), whole(model) if in_place else contextlib.nullcontext(list(model.parameters())) as parameters:
        for p in parameters:
            p += 0.3 * p.numel() ** -0.5 * torch.sin(40 * seed * p + seed)


class Collectives:
    """Bytes of every collective while it lasts."""

    def __enter__(self) -> list[int]:
        self.sizes: list[int] = []
        self._real = dist.all_reduce

        def counted(tensor: Tensor, *args: object, **kwargs: object) -> object:
            self.sizes.append(tensor.nbytes)
            return self._real(tensor, *args, **kwargs)

        dist.all_reduce = counted  # type: ignore[assignment]
        return self.sizes

    def __exit__(self, *_: object) -> None:
        dist.all_reduce = self._real


def equal_to_one_process(rank: int, cases: list[str]) -> None:
    """Weights and states of a sharded model are those of one process, step by step, and equal in bits on all ranks."""
    warnings.simplefilter("ignore")
    for how in cases:
        model, make = sharded(how)
        alone = make()
        example = EXAMPLE if make is network else torch.randn(1, 24, generator=torch.Generator().manual_seed(2))
        options: dict = {"beta": BETA, "n_power_iterations": 2 if how == "FSDP2, root" else 1}
        if how in ("FSDP2", "TP"):
            options |= {"tol": 1e-3}
        one, ours = (SpectralProjection(m, example, **options) for m in (alone, model))
        for step in range(4):
            if step:
                move(alone, step)
                move(model, step)
                one.step()
                ours.step()
            if step == 2:  # a forward without backward leaves weights gathered
                with torch.no_grad():
                    model(example.expand(2, *example.shape[1:]))
                one.step()
                ours.step()
            with whole(model) as parameters:
                for p, wanted in zip(parameters, alone.parameters(), strict=True):
                    distance = torch.linalg.vector_norm(p - wanted) / torch.linalg.vector_norm(wanted)
                    assert distance <= 5e-7 * (step + 1), f"{how}, step {step}: weights differ by {distance:.1e}"
            state, truth = ours.state_dict(), one.state_dict()
            assert state.keys() == truth.keys()
            for key, value in truth.items():
                torch.testing.assert_close(state[key], value, rtol=2e-6, atol=2e-6)
            copies: list[object] = [None] * dist.get_world_size()
            dist.all_gather_object(copies, [t.numpy().tobytes() for t in state.values()])
            assert all(c == copies[0] for c in copies), f"{how}: states differ between ranks"


def clipped_as_one(rank: int) -> None:
    warnings.simplefilter("ignore")
    for how in ("FSDP2", "TP"):
        model, make = sharded(how)
        alone = make()
        example = EXAMPLE if make is network else torch.randn(1, 24)
        for m in (alone, model):
            projection = SpectralProjection(m, example, beta=0.3, cap_singular_values=True)
            move(m, 5)
            projection.step()
        with whole(model) as parameters:
            for p, wanted in zip(parameters, alone.parameters(), strict=True):
                torch.testing.assert_close(p, wanted, rtol=1e-5, atol=1e-6)
        for p in alone.parameters():
            if p.ndim == 2:
                assert torch.linalg.matrix_norm(p, 2) <= 0.3 * (1 + 1e-3)


def followed_over_the_range(rank: int) -> None:
    """Weights that a step makes larger or smaller by any power of ten come back to beta, as in one process."""
    warnings.simplefilter("ignore")
    exponents = [-30, -24, 21, 30, *torch.randint(-32, 33, (4,), generator=torch.Generator().manual_seed(7)).tolist()]
    for make in (lambda: fsdp2(mlp(), mesh=mesh(dist.get_world_size())), lambda: fsdp1(mlp(), "original parameters")):
        model = make()
        projection = SpectralProjection(model, torch.randn(1, 24), beta=BETA, mode="scale")
        for exponent in exponents:
            with torch.no_grad():
                for p in model.parameters():
                    (p.to_local() if hasattr(p, "to_local") else p).mul_(10.0**exponent)
            for _ in range(4):
                projection.step()
            assert all(abs(sigma - BETA) < 1e-5 for sigma in projection.sigmas().values()), projection.sigmas()
            with whole(model) as parameters:
                for w in (p for p in parameters if p.ndim == 2):
                    norm = float(torch.linalg.matrix_norm(w.double(), 2))
                    assert abs(norm - BETA) < 1e-3, f"1e{exponent}: norm {norm:.3g}"


def begun_without_norms(rank: int) -> None:
    """Weights of zeros get v from the first values that they have, on all ranks together."""
    for make in (lambda m: fsdp2(m, mesh=mesh(dist.get_world_size())), lambda m: fsdp1(m, "original parameters")):
        empty = mlp()
        nn.init.zeros_(empty[2].weight)
        model = make(empty)
        projection = SpectralProjection(model, torch.randn(1, 24), beta=BETA, mode="scale")
        projection.step()
        generator = torch.Generator().manual_seed(rank)
        with torch.no_grad():
            p = list(model.parameters())[2]
            (p.to_local() if hasattr(p, "to_local") else p).normal_(generator=generator)
        projection.step()
        with whole(model) as parameters:
            norm = float(torch.linalg.matrix_norm(parameters[2].double(), 2))
            assert abs(norm - BETA) < 1e-3, f"norm {norm:.4g}"


def trained_with_a_hook(rank: int, folder: Path) -> None:
    """Attached after sharding, trained, saved with DCP; the norms are within beta, and a second run goes on equally."""
    import torch.distributed.checkpoint as dcp
    from torch.distributed.checkpoint.state_dict import get_state_dict, set_state_dict

    def start(shard_first: bool) -> tuple[nn.Module, torch.optim.Optimizer, SpectralProjection]:
        model: nn.Module = network()
        if shard_first:
            model = fsdp2(model, mesh=mesh(dist.get_world_size()))  # type: ignore[arg-type]
        projection = SpectralProjection(model, EXAMPLE, beta=BETA, tol=1e-3)
        if not shard_first:
            model = fsdp2(model, mesh=mesh(dist.get_world_size()))  # type: ignore[arg-type]
        optimizer = torch.optim.SGD(model.parameters(), 0.05, momentum=0.9)
        projection.attach(optimizer)
        return model, optimizer, projection

    def train(model: nn.Module, optimizer: torch.optim.Optimizer, first: int, last: int) -> list[float]:
        losses = []
        for step in range(first, last):
            generator = torch.Generator().manual_seed(100 * step + rank)
            x, y = torch.randn(4, 3, 8, 8, generator=generator), torch.randint(5, (4,), generator=generator)
            loss = nn.functional.cross_entropy(9 * model(x), y)
            loss.backward()
            optimizer.step()
            optimizer.zero_grad()
            losses.append(loss.item())
        return losses

    runs = [start(shard_first) for shard_first in (True, False)]
    losses = [train(*run[:2], 0, 4) for run in runs]
    torch.testing.assert_close(*losses, rtol=1e-5, atol=0)
    model, optimizer, projection = runs[0]
    weights, moments = get_state_dict(model, optimizer)
    dcp.save({"model": weights, "optimizer": moments, "projection": projection}, checkpoint_id=folder / "dcp")
    later = train(model, optimizer, 4, 7)
    model, optimizer, projection = start(True)
    weights, moments = get_state_dict(model, optimizer)
    dcp.load({"model": weights, "optimizer": moments, "projection": projection}, checkpoint_id=folder / "dcp")
    set_state_dict(model, optimizer, model_state_dict=weights, optim_state_dict=moments)
    assert train(model, optimizer, 4, 7) == later
    with whole(model) as parameters:
        matrices = [p for p in parameters if p.ndim == 2]
        assert len(matrices) == 2
        assert all(torch.linalg.matrix_norm(m, 2) <= BETA * 1.05 for m in matrices)


def loaded_on_one(folder: Path) -> None:
    """What two ranks saved, in one process."""
    import torch.distributed.checkpoint as dcp

    projection = SpectralProjection(network(), EXAMPLE, beta=BETA)
    before = copy.deepcopy(projection.state_dict())
    dcp.load({"projection": projection}, checkpoint_id=folder / "dcp", no_dist=True)
    after = projection.state_dict()
    assert before.keys() == after.keys()
    assert any(not torch.equal(before[key], after[key]) for key in before)


def refused(rank: int) -> None:
    """What cannot be done is one clear error on every rank."""
    import pytest
    from torch.distributed.fsdp import FullyShardedDataParallel

    warnings.simplefilter("ignore")
    model = FullyShardedDataParallel(network(), device_id=torch.device("cpu"))
    with pytest.raises(ValueError, match="use_orig_params=True"):
        SpectralProjection(model, EXAMPLE)
    plain = network()
    projection = SpectralProjection(plain, EXAMPLE)
    FullyShardedDataParallel(plain, device_id=torch.device("cpu"), use_orig_params=True)
    with pytest.raises(RuntimeError, match="make a new SpectralProjection"):
        projection.step()
    model = network()
    optimizer = torch.optim.SGD(model.parameters(), 0.1)
    fsdp2(model, mesh=mesh(dist.get_world_size()))
    with pytest.raises(ValueError, match=r"trains none of the 6 projected weights; .*after sharding"):
        SpectralProjection(model, EXAMPLE).attach(optimizer)


def on_two(rank: int, folder: Path) -> None:
    """All that two processes do, in one start."""
    equal_to_one_process(rank, ["FSDP2, root", "FSDP2, offloaded, bfloat16", "FSDP1", "TP"])
    clipped_as_one(rank)
    followed_over_the_range(rank)
    begun_without_norms(rank)
    trained_with_a_hook(rank, folder)
    refused(rank)
    traffic(rank, folder)


# -- traffic ----------------------------------------------------------------------------------------------------------


class Bottleneck(nn.Module):
    def __init__(self, channels: int, width: int, stride: int) -> None:
        super().__init__()
        self.convs = nn.Sequential(
            nn.Conv2d(channels, width, 1, bias=False),
            nn.Conv2d(width, width, 3, stride, 1, bias=False),
            nn.Conv2d(width, 4 * width, 1, bias=False),
        )
        same = stride == 1 and channels == 4 * width
        self.shortcut = nn.Identity() if same else nn.Conv2d(channels, 4 * width, 1, stride, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        return self.convs(x) + self.shortcut(x)


def resnet50() -> nn.Sequential:
    """The linear layers of ResNet-50."""
    blocks: list[nn.Module] = [nn.Conv2d(3, 64, 7, 2, 3, bias=False), nn.MaxPool2d(3, 2, 1)]
    channels = 64
    for stage, (depth, width) in enumerate(zip((3, 4, 6, 3), (64, 128, 256, 512))):
        for i in range(depth):
            blocks.append(Bottleneck(channels, width, 2 if stage and not i else 1))
            channels = 4 * width
    return nn.Sequential(*blocks, nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(channels, 1000))


def transformer(width: int = 256, layers: int = 2) -> nn.Sequential:
    block = [(width, 3 * width), (width, width), (width, 4 * width), (4 * width, width)]
    return nn.Sequential(*(nn.Linear(a, b) for _ in range(layers) for a, b in block))


def traffic(rank: int, folder: Path) -> None:
    """Bytes of the collectives of one step, as counted; rank 0 writes them down."""
    warnings.simplefilter("ignore")
    from torch.distributed.fsdp import fully_shard

    for name, make, example in (
        ("resnet50", resnet50, torch.empty(1, 3, 224, 224, device="meta")),
        ("transformer", transformer, None),
    ):
        with torch.device("meta"):
            model = make()
            if example is None:  # the layers are not a chain
                model.forward = lambda x: x  # type: ignore[method-assign]
            projection = SpectralProjection(model, torch.empty(1) if example is None else example)
        fully_shard(model, mesh=mesh(dist.get_world_size()))
        model.to_empty(device="cpu")
        with torch.no_grad():
            for p in model.parameters():
                p.fill_(0.01)
        shapes = {f"{m.name}.{key}": shape for m in projection._members for key, shape in m.state_shapes().items()}
        projection.load_state_dict({key: torch.ones(shape) for key, shape in shapes.items()})
        with Collectives() as sizes:
            projection.step()
        if rank == 0:
            weights = sum(m.shape.numel() for m in projection._members)
            (folder / name).write_text(f"{len(sizes)} {sum(sizes)} {4 * weights}")
