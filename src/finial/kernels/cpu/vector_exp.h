// exp of a vector of floats, within 1.1 ulp over the whole range (tests/test_cpu_native.py measures it).
//
// x = n ln 2 + r with |r| <= ln(2)/2, the constant split in two so that n * LN2_HIGH is exact (Cody and Waite, Software
// Manual for the Elementary Functions, 1980, chapter 6); exp(r) by a polynomial; then times 2^n. Subnormal results are
// rounded, overflow gives infinity, NaN stays NaN.
#pragma once

#include "simd.h"

namespace finial::FINIAL_ISA {

FINIAL_INLINE V exp(V x) {
  // Beyond these the result is 0 or infinity anyway; the order of the operands lets NaN through.
  x = min(set1(89.0f), max(set1(-104.0f), x));
  const V n = round(mul(x, set1(1.44269504f)));
  V r = fma(n, set1(-0.693145751953125f), x);
  r = fma(n, set1(-1.42860682e-6f), r);
  // exp(r) = 1 + r + r^2 q(r), q of least maximum relative error on |r| <= 0.3468 (Lawson's reweighted least squares).
  V q = set1(1.9790298e-4f);
  q = fma(q, r, set1(1.3944703e-3f));
  q = fma(q, r, set1(8.333498e-3f));
  q = fma(q, r, set1(4.1666295e-2f));
  q = fma(q, r, set1(1.6666666e-1f));
  q = fma(q, r, set1(0.5f));
  const V y = add(fma(mul(r, r), q, r), set1(1.0f));
  return scale_by_power(y, n);
}

#if defined(FINIAL_PACKS_F32)
// 2^x within 2^-23, for x <= 0: 2^(x - floor x) by a polynomial of least maximum relative error (2^-29; Lawson's
// reweighted least squares), times 2^floor(x). 0 where that is below all floats, infinity too; NaN stays NaN.
FINIAL_INLINE V power_of_two(V x) {
  V whole, r;
  split_whole(x, whole, r);
  V y = set1(2.17022549e-4f);
  y = fma(y, r, set1(1.24396884e-3f));
  y = fma(y, r, set1(9.67884064e-3f));
  y = fma(y, r, set1(5.54833412e-2f));
  y = fma(y, r, set1(2.4022983e-1f));
  y = fma(y, r, set1(6.93147004e-1f));
  y = fma(y, r, set1(1.0f));
  return scale_by_power(y, whole);
}
#endif

// silu(gate) * up = gate / (1 + exp(-gate)) * up
FINIAL_INLINE V gated(V gate, V up) { return mul(div(gate, add(set1(1), exp(sub(zero(), gate)))), up); }

}  // namespace finial::FINIAL_ISA
