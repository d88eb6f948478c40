"""Exact arithmetic on constant factors: polynomials in tensors and in sines and cosines of tensors.

Equality of two of them holds for all values of the tensors, so what follows from it is no matter of rounding.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from fractions import Fraction

# e^(i (k1 a1 + k2 a2 + ...)) b1 b2 ...: the frequencies k by the number of the tensor a, and the numbers of the b.
Monomial = tuple[tuple[tuple[int, Fraction], ...], tuple[int, ...]]
Complex = tuple[Fraction, Fraction]

_ONE: Monomial = ((), ())
_MOST_TERMS = 64


class TooLong(Exception):
    """A polynomial with more terms than it is worth to multiply."""


@dataclass(frozen=True)
class Coefficient:
    """A sum of monomials, each with its complex factor; real as a whole. None of the factors is zero."""

    terms: Mapping[Monomial, Complex]

    @staticmethod
    def number(x: float | Fraction) -> Coefficient:
        return _sum({_ONE: (Fraction(x), Fraction(0))})

    @staticmethod
    def tensor(i: int) -> Coefficient:
        return Coefficient({((), (i,)): (Fraction(1), Fraction(0))})

    @staticmethod
    def cosine(angle: Mapping[int, Fraction]) -> Coefficient:
        # (e^ia + e^-ia) / 2
        half = (Fraction(1, 2), Fraction(0))
        return Coefficient({_turn(angle): half}) + Coefficient({_turn(angle, -1): half})

    @staticmethod
    def sine(angle: Mapping[int, Fraction]) -> Coefficient:
        # (e^ia - e^-ia) / 2i
        half, zero = Fraction(1, 2), Fraction(0)
        return Coefficient({_turn(angle): (zero, -half)}) + Coefficient({_turn(angle, -1): (zero, half)})

    def __add__(self, other: Coefficient) -> Coefficient:
        total = dict(self.terms)
        for monomial, (re, im) in other.terms.items():
            a, b = total.get(monomial, (Fraction(0), Fraction(0)))
            total[monomial] = (a + re, b + im)
        return _sum(total)

    def __mul__(self, other: Coefficient) -> Coefficient:
        total = Coefficient({})
        for (turns, tensors), (a, b) in self.terms.items():
            part: dict[Monomial, Complex] = {}
            for (more, others), (c, d) in other.terms.items():
                angle = dict(turns)
                for i, k in more:
                    angle[i] = angle.get(i, Fraction(0)) + k
                part[_turn(angle)[0], tuple(sorted(tensors + others))] = (a * c - b * d, a * d + b * c)
            total = total + Coefficient(part)
        return total

    def __neg__(self) -> Coefficient:
        return self * Coefficient.number(-1)

    def __bool__(self) -> bool:
        return bool(self.terms)

    def size(self, largest: Callable[[int], Fraction]) -> Fraction:
        """At least its absolute value, where ``largest(i)`` is the largest absolute value of tensor i."""
        total = Fraction(0)
        for (_, tensors), (re, im) in self.terms.items():
            part = abs(re) + abs(im)
            for i in tensors:
                part *= largest(i)
            total += part
        return total

    def renamed(self, names: Mapping[int, int]) -> Coefficient:
        """The same of other tensors, by their numbers."""
        total = Coefficient({})
        for (turns, tensors), factor in self.terms.items():
            angle: dict[int, Fraction] = {}
            for i, k in turns:
                angle[names[i]] = angle.get(names[i], Fraction(0)) + k
            total = total + Coefficient({(_turn(angle)[0], tuple(sorted(names[i] for i in tensors))): factor})
        return total

    def tensors(self) -> set[int]:
        return {i for turns, tensors in self.terms for i in (*(i for i, _ in turns), *tensors)}

    def key(self) -> frozenset[tuple[Monomial, Complex]]:
        """The same for equal polynomials, to look them up."""
        return frozenset(self.terms.items())


def _turn(angle: Mapping[int, Fraction], sign: int = 1) -> Monomial:
    return tuple(sorted((i, sign * k) for i, k in angle.items() if k)), ()


def _sum(terms: dict[Monomial, Complex]) -> Coefficient:
    if len(terms) > _MOST_TERMS:
        raise TooLong
    return Coefficient({m: c for m, c in terms.items() if c != (0, 0)})
