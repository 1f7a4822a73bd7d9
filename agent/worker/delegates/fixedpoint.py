"""The integer arithmetic that quantized TFLite models are defined by: scaling by a 31-bit fraction, exponentials.

A real factor is a fraction of 31 bits and a shift; products are rounded in the two steps that TFLite's portable kernels
use: to nearest when the high half is taken, then to nearest with ties away from zero when it is shifted (gemmlowp's
`SaturatingRoundingDoublingHighMul` and `RoundingDivideByPOT`; Jacob et al., arXiv:1712.05877, 2.2 and A.4).
Invariant: values are int64 arrays that hold int32 numbers; what would overflow 32 bits wraps or saturates as there.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from agent.errors import ModelError, Reason

Ints = NDArray[np.int64]

INT32_MIN, INT32_MAX = -(1 << 31), (1 << 31) - 1
_ONE = INT32_MAX
"""1.0 with no integer bits."""
_LARGEST_SHIFT = 30


@dataclass(frozen=True)
class Scaler:
    """A real factor, or one per channel: value * fraction / 2^31 * 2^shift."""

    fraction: Any
    shift: Any

    def apply(self, values: Ints) -> Ints:
        """`values` times the factor, rounded twice."""
        left, right = np.maximum(self.shift, 0), np.maximum(-self.shift, 0)
        return shift_right(high_product(wrapped(values << left), self.fraction), right)

    def apply_once(self, values: Ints) -> Ints:
        """`values` times the factor, rounded once, ties upwards."""
        down = 31 - self.shift
        return np.asarray((values * self.fraction + (np.int64(1) << (down - 1))) >> down, np.int64)


def scaler(factor: Any) -> Scaler:
    """The nearest fraction and shift of a positive factor, or of an array of them.

    Raises:
        ModelError: `model_unloadable` for factors beyond 2^30, which no kernel of TFLite takes.
    """
    fractions, shifts = np.frexp(np.asarray(factor, np.float64))
    fixed = rounded(fractions * (1 << 31)).astype(np.int64)
    full = fixed == 1 << 31
    fixed, shifts = np.where(full, fixed >> 1, fixed), np.where(full, shifts + 1, shifts)
    tiny = shifts < -31
    fixed, shifts = np.where(tiny, 0, fixed), np.where(tiny, 0, shifts)
    if not np.isfinite(factor).all() or (shifts > _LARGEST_SHIFT).any():
        raise ModelError(
            Reason.MODEL_UNLOADABLE,
            f"the model scales a tensor by {float(np.max(factor)):g}",
            hint="quantize the model again",
        )
    return Scaler(fixed.astype(np.int64), shifts.astype(np.int64))


def wrapped(values: Any) -> Ints:
    """The low 32 bits, as a signed number."""
    return np.asarray(values).astype(np.int32).astype(np.int64)


def high_product(a: Any, b: Any) -> Ints:
    """Twice the product's high 32 bits, rounded; only the smallest number squared would overflow and saturates."""
    product = np.asarray(a, np.int64) * np.asarray(b, np.int64)
    product = product + np.where(product >= 0, 1 << 30, 1 - (1 << 30))
    return np.minimum(_toward_zero(product, 31), INT32_MAX)


def shift_right(values: Any, bits: Any) -> Ints:
    """Divide by 2^bits, to nearest, ties away from zero."""
    values = np.asarray(values, np.int64)
    mask = (np.int64(1) << np.asarray(bits, np.int64)) - 1
    threshold = (mask >> 1) + (values < 0)
    return np.asarray((values >> bits) + ((values & mask) > threshold), np.int64)


def shift_left(values: Any, bits: int) -> Ints:
    """Multiply by 2^bits; what does not fit saturates."""
    return np.asarray(np.clip(np.asarray(values, np.int64) << bits, INT32_MIN, INT32_MAX), np.int64)


def divide(values: Ints, by: Any) -> Ints:
    """Integer division, to nearest, ties away from zero; `by` is positive."""
    half = np.asarray(by, np.int64) // 2
    return np.asarray(np.where(values > 0, (values + half) // by, -((half - values) // by)), np.int64)


def _toward_zero(values: Ints, bits: int) -> Ints:
    return np.where(values >= 0, values >> bits, -(-values >> bits))


def rounded(values: NDArray[Any]) -> NDArray[Any]:
    """To nearest, ties away from zero, exactly; C's `round` (adding a half first would round twice)."""
    whole = np.trunc(values)
    return np.asarray(whole + np.where(np.abs(values - whole) >= 0.5, np.copysign(1.0, values), 0.0), values.dtype)


# --- softmax: gemmlowp's exponential and reciprocal ------------------------------------------------------------------

# exp(-2^k) for k = -2 … 4, as fractions of 31 bits
_EXPONENTIALS = tuple(math.floor(math.exp(-(2.0**k)) * (1 << 31) + 0.5) for k in range(-2, 5))
_EXP_EIGHTH = math.floor(math.exp(-0.125) * (1 << 31) + 0.5)
_THIRD = math.floor((1 << 31) / 3 + 0.5)
# With two integer bits. Newton's first guess at 1/d on [0.5, 1] is 48/17 - 32/17 d; products of negative numbers round
# their ties otherwise, so the sign stays with the factor.
_48_17 = math.floor(48 / 17 * (1 << 29) + 0.5)
_MINUS_32_17 = -math.floor(32 / 17 * (1 << 29) + 0.5)


def exp_of_negative(values: Ints, integer_bits: int) -> Ints:
    """exp of numbers ≤ 0 with `integer_bits` integer bits, as fractions of 31 bits."""
    fraction_bits = 31 - integer_bits
    quarter = 1 << (fraction_bits - 2)
    within = (values & (quarter - 1)) - quarter
    result = _exp_near_zero(shift_left(within, integer_bits))
    rest = within - values
    for exponent, factor in zip(range(-2, 5), _EXPONENTIALS, strict=True):
        if integer_bits > exponent:
            bit = 1 << (fraction_bits + exponent)
            result = np.where(rest & bit, high_product(result, factor), result)
    return np.where(values == 0, _ONE, result)


def _exp_near_zero(values: Ints) -> Ints:
    """exp on [-1/4, 0), both as fractions of 31 bits: four terms of its series around -1/8."""
    x = values + (1 << 28)
    x2 = high_product(x, x)
    x3, x4 = high_product(x2, x), high_product(x2, x2)
    tail = shift_right(high_product(shift_right(x4, 2) + x3, _THIRD) + x2, 1)
    return _EXP_EIGHTH + high_product(_EXP_EIGHTH, x + tail)


def reciprocal(values: Ints, integer_bits: int) -> tuple[Ints, Ints]:
    """1/value of positive numbers with `integer_bits` integer bits.

    Returns:
        A fraction of 31 bits, and by how many more bits it is to be shifted to the right.
    """
    headroom = 32 - np.frexp(values.astype(np.float64))[1].astype(np.int64)
    return _one_over_one_plus((values << headroom) - (1 << 31)), integer_bits - headroom


def _one_over_one_plus(values: Ints) -> Ints:
    """1/(1 + x) on [0, 1], by three steps of Newton's method."""
    half = (values + _ONE + 1) >> 1
    x = _48_17 + high_product(half, _MINUS_32_17)
    for _ in range(3):
        x = x + shift_left(high_product(x, (1 << 29) - high_product(half, x)), 2)
    return shift_left(x, 1)
