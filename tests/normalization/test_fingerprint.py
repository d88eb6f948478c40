"""What tells that a weight has moved: fingerprints, kept copies, and how far is too far."""

from __future__ import annotations

import math
import struct

import hypothesis
import hypothesis.strategies as st
import pytest
import torch
from torch import Tensor, nn

from sn_fast.ops import fingerprint as module
from sn_fast.ops.fingerprint import fingerprint, is_replaced, record_of, same_content, update_record

DTYPES = (torch.float16, torch.bfloat16, torch.float32, torch.float64)
INTEGERS = {2: torch.int16, 4: torch.int32, 8: torch.int64}
MASK = (1 << 64) - 1


def splitmix64(z: int) -> int:
    """Steele, Lea, Flood (2014): the output function, of unsigned integers."""
    z = ((z ^ (z >> 30)) * 0xBF58476D1CE4E5B9) & MASK
    z = ((z ^ (z >> 27)) * 0x94D049BB133111EB) & MASK
    return z ^ (z >> 31)


def by_hand(weight: Tensor) -> list[int]:
    """The same hash in Python's integers; words are sign-extended to 64 bits."""
    code = {2: "h", 4: "i", 8: "q"}[weight.element_size()]
    raw = weight.detach().contiguous().reshape(-1).view(torch.uint8).numpy().tobytes()
    words = [w for (w,) in struct.iter_unpack(f"={code}", raw)]
    total = sum(splitmix64((w + (i + 1) * 0x9E3779B97F4A7C15) & MASK) for i, w in enumerate(words)) & MASK
    signed = total - (1 << 64) if total >> 63 else total
    step = max(1, math.ceil(len(words) / module.SAMPLE))
    places = (start + (i * module.SPREAD % step) for i, start in enumerate(range(0, len(words), step)))
    return [signed, *(words[min(place, len(words) - 1)] for place in places)]


def next_up(weight: Tensor, index: int) -> None:
    """One unit in the last place, of the bits as integers."""
    weight.view(-1).view(INTEGERS[weight.element_size()])[index] += 1


def differ(weight: Tensor, other: Tensor) -> None:
    """By the hash alone, whatever is sampled; and by the copy."""
    assert int(fingerprint(weight)[0]) != int(fingerprint(other)[0])
    assert not same_content(weight, record_of(other, hashed=True))
    assert not same_content(weight, record_of(other, hashed=False))


def agree(weight: Tensor, other: Tensor) -> None:
    assert torch.equal(fingerprint(weight), fingerprint(other))
    assert same_content(weight, record_of(other, hashed=True))
    assert same_content(weight, record_of(other, hashed=False))


# -- the hash ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("shape", [(), (1,), (0,), (0, 3), (7,), (3, 5), (2, 3, 3, 3), (1025,), (41, 50)])
@pytest.mark.parametrize("dtype", DTYPES)
def test_equals_the_published_mixing(dtype: torch.dtype, shape: tuple[int, ...]) -> None:
    weight = torch.randn(shape).to(dtype)
    assert fingerprint(weight).tolist() == by_hand(weight)


@hypothesis.given(st.lists(st.integers(-(2**31), 2**31 - 1), max_size=40), st.integers(1, 9))
def test_equals_the_published_mixing_whatever_the_bits_and_chunks(words: list[int], chunk: int) -> None:
    weight = torch.tensor(words, dtype=torch.int32).view(torch.float32)
    before, module._HOST_CHUNK = module._HOST_CHUNK, chunk
    try:
        assert fingerprint(weight).tolist() == by_hand(weight)
    finally:
        module._HOST_CHUNK = before


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("off", [-1, 0, 1])
@pytest.mark.parametrize("chunks", [1, 2])
def test_sizes_around_the_chunks(chunks: int, off: int, dtype: torch.dtype) -> None:
    n = chunks * module._HOST_CHUNK + off
    weight = torch.randn(n).to(dtype)
    (wanted,) = by_hand(weight)[:1]
    assert int(fingerprint(weight)[0]) == wanted
    for i in (0, module._HOST_CHUNK - 2, n - 1):
        other = weight.clone()
        next_up(other, i)
        differ(other, weight)


def test_one_ulp_in_any_element() -> None:
    for dtype in DTYPES:
        weight = torch.randn(4, 3, 3).to(dtype)
        found = {int(fingerprint(weight)[0])}
        for i in range(weight.numel()):
            other = weight.clone()
            next_up(other, i)
            differ(other, weight)
            found.add(int(fingerprint(other)[0]))
        assert len(found) == weight.numel() + 1


def test_flips_of_pairs_of_signs() -> None:
    weight = torch.randn(6, 7)
    found = {int(fingerprint(weight)[0])}
    for i in range(42):
        for j in range(i):
            other = weight.clone()
            other.view(-1)[[i, j]] *= -1
            found.add(int(fingerprint(other)[0]))
    assert len(found) == 1 + 42 * 41 // 2


@pytest.mark.parametrize("dtype", DTYPES)
def test_the_same_values_in_another_order(dtype: torch.dtype) -> None:
    weight = torch.randn(8, 8).to(dtype)
    differ(weight.T.contiguous(), weight)
    differ(weight.T, weight)
    differ(weight.flip(0), weight)
    differ(weight.roll(1, 1), weight)
    blocks = torch.cat([weight[4:], weight[:4]])
    differ(blocks, weight)
    for i in range(8):
        for j in range(i):
            rows = weight.clone()
            rows[[i, j]] = rows[[j, i]]
            differ(rows, weight)
    for _ in range(100):
        order = torch.randperm(64)
        if not torch.equal(order, torch.arange(64)):
            differ(weight.view(-1)[order].view(8, 8), weight)


def test_blocks_as_long_as_a_chunk_in_another_order() -> None:
    n = module._HOST_CHUNK
    weight = torch.randn(3 * n)
    a, b, c = weight.split(n)
    for parts in ([b, a, c], [a, c, b], [c, b, a], [b, c, a]):
        differ(torch.cat(parts), weight)


def test_a_thousand_weights_that_are_scaled_a_little() -> None:
    found = set()
    for _ in range(1000):
        weight = torch.randn(5, 5)
        scaled = weight * (1 + 1e-6)
        differ(scaled, weight)
        found |= {int(fingerprint(w)[0]) for w in (weight, scaled)}
    assert len(found) == 2000


def test_zeros_of_either_sign_and_nans() -> None:
    for dtype in DTYPES:
        zeros = torch.zeros(9, dtype=dtype)
        differ(-zeros, zeros)
        one = zeros.clone()
        one[4] = -0.0
        differ(one, zeros)
        nan = torch.full((9,), math.nan, dtype=dtype)
        agree(nan, nan.clone())
        other = nan.clone()
        next_up(other, 3)
        assert other.isnan().all()  # another payload
        differ(other, nan)


def test_lengths_of_zeros() -> None:
    assert len({int(fingerprint(torch.zeros(n))[0]) for n in range(200)}) == 200


@pytest.mark.parametrize("dtype", DTYPES)
def test_a_memory_format_is_no_content(dtype: torch.dtype) -> None:
    weight = torch.randn(4, 6, 3, 5).to(dtype)
    same = [
        weight.contiguous(memory_format=torch.channels_last),
        weight.permute(3, 1, 0, 2).contiguous().permute(2, 1, 3, 0),
        torch.stack([weight, -weight], -1)[..., 0],
        torch.cat([weight, weight], 1)[:, 6:],
        torch.cat([torch.zeros(1, dtype=dtype), weight.flatten()])[1:].view(4, 6, 3, 5),
        weight.clone().requires_grad_(),
        nn.Parameter(weight.clone()),
    ]
    for other in same:
        agree(other, weight)
        agree(weight, other)
    row = torch.randn(1, 5).to(dtype)
    agree(row.expand(3, 5), row.repeat(3, 1))


@hypothesis.given(st.data())
def test_drawn_edits(data: st.DataObject) -> None:
    """Any assignment of elements: the fingerprint and the copy see whether a bit differs, and nothing else."""
    dtype = data.draw(st.sampled_from(DTYPES))
    shape = data.draw(st.lists(st.integers(1, 5), min_size=1, max_size=4))
    generator = torch.Generator().manual_seed(data.draw(st.integers(0, 2**31)))
    weight = torch.randn(shape, generator=generator).to(dtype)
    other = weight.clone()
    words = other.view(-1).view(INTEGERS[dtype.itemsize])
    indices = st.integers(0, words.numel() - 1)
    for _ in range(data.draw(st.integers(0, 4))):
        i, j = data.draw(indices), data.draw(indices)
        kind = data.draw(st.sampled_from(["swap", "sign", "bit", "copy"]))
        if kind == "swap":
            words[[i, j]] = words[[j, i]]
        elif kind == "sign":
            words[[i, j]] ^= torch.iinfo(words.dtype).min
        elif kind == "bit":
            words[i] ^= 1 << data.draw(st.integers(0, 8 * dtype.itemsize - 2))
        else:
            words[i] = words[j]
    (agree if _bits(weight) == _bits(other) else differ)(other, weight)


def _bits(t: Tensor) -> bytes:
    return t.contiguous().view(torch.uint8).numpy().tobytes()


# -- kept copies ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("n", [0, 1, 2, 3, 4, 5, 7, 8, 9, 31])
@pytest.mark.parametrize("offset", [0, 1, 2, 3])
def test_same_content_of_odd_lengths_and_places(n: int, offset: int, dtype: torch.dtype) -> None:
    """Words of eight bytes are compared where they fit; every byte counts where they do not."""
    memory = torch.randn(n + offset + 3).to(dtype)
    weight = memory[offset : offset + n]
    record = record_of(weight, hashed=False)
    assert same_content(weight, record)
    memory[:offset] += 1
    memory[offset + n :] += 1
    assert same_content(weight, record)
    for i in range(n):
        before = weight[i].clone()
        weight[i] = before * 2 + 1
        assert not same_content(weight, record)
        weight[i] = before
    assert same_content(weight, record)


def test_same_content_of_other_shapes_and_dtypes() -> None:
    weight = torch.zeros(4, 6)
    record = record_of(weight, hashed=False)
    assert not same_content(weight.view(6, 4), record)
    assert not same_content(weight.double(), record)
    assert not same_content(weight.half(), record)


@pytest.mark.parametrize("hashed", [False, True])
@pytest.mark.parametrize("dtype", DTYPES)
def test_an_updated_record_is_that_of_the_new_weight(dtype: torch.dtype, hashed: bool) -> None:
    weight = torch.randn(5, 3).to(dtype)
    record = record_of(weight, hashed=hashed)
    weight[2, 1] += 1
    assert not same_content(weight, record)
    updated = update_record(record, weight)
    assert updated is record  # in its place
    assert same_content(weight, record)
    for other in (torch.randn(4, 4).to(dtype), torch.randn(5, 3).to(torch.float64)):
        record = update_record(record, other)
        assert same_content(other, record)
    assert not record.requires_grad


# -- how far ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("hashed", [False, True])
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("shape", [(1, 1), (3, 4), (64, 3, 3, 3), (60, 50)])
def test_replaced_or_trained(shape: tuple[int, ...], dtype: torch.dtype, hashed: bool) -> None:
    weight = (0.05 * torch.randn(shape)).to(dtype)
    record = record_of(weight, hashed=hashed)
    assert not is_replaced(weight, record)
    norm = weight.float().norm()
    for scale in (1e-3, 0.5, -1.0, 2.0, 100.0):
        assert not is_replaced((scale * weight.double()).to(dtype), record)
    direction = torch.randn(shape)
    for share in (1e-4, 0.01, 0.1, 0.2, *((0.6, 1.0) if weight.numel() > 100 else ())):
        moved = weight.float() + share * norm * direction / direction.norm()
        assert is_replaced(moved.to(dtype), record) == (share > 0.4)
    if weight.numel() > 4:
        replaced = [is_replaced((0.05 * torch.randn(shape)).to(dtype), record) for _ in range(20)]
        assert sum(replaced) >= 19
    bad = weight.clone()
    bad.view(-1)[0] = math.nan
    assert not is_replaced(bad, record)


def test_a_weight_that_was_zero_is_replaced_by_any_other() -> None:
    zeros = torch.zeros(4, 5)
    for hashed in (False, True):
        record = record_of(zeros, hashed=hashed)
        assert is_replaced(torch.randn(4, 5), record)
        assert not is_replaced(zeros, record)
        assert not is_replaced(zeros, record_of(torch.randn(4, 5), hashed=hashed))
    assert is_replaced(torch.randn(30, 50), record_of(torch.randn(4, 5), hashed=True))
