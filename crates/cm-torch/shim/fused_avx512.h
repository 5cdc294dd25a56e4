// The loops over pairs of bfloat16 channels of `fused_loops.h` for processors that have AVX-512 with bfloat16: the same
// numbers to well within the digits of bfloat16, in about half the time. The compiler's own vectors lack three things:
// the fused product and sum (it is off, so that all processors give the same bits in float32), the estimate of a
// reciprocal in place of a division, and the instruction that rounds two registers to bfloat16.
#pragma once

#include "fused_loops.h"

#if defined(__x86_64__) && defined(__linux__) && defined(__GNUC__) && !defined(__clang__) && __GNUC__ >= 11
#define CM_HAS_AVX512_LOOPS 1
#include <immintrin.h>
// The compiler's own header of AVX-512 warns of itself (its bug 105593).
#pragma GCC diagnostic ignored "-Wmaybe-uninitialized"
#pragma GCC diagnostic ignored "-Wuninitialized"
#define CM_AVX512 __attribute__((target("avx512f,avx512bw,avx512vl,avx512bf16")))
#endif

namespace {

#ifdef CM_HAS_AVX512_LOOPS

// Whether the loops can do images of so many channels here.
inline bool has_avx512_loops(int64_t channels) {
  static const bool has = __builtin_cpu_supports("avx512bw") && __builtin_cpu_supports("avx512vl") &&
      __builtin_cpu_supports("avx512bf16");
  return has && channels % 32 == 0;
}

// Numbers of 16 even channels, and of the 16 odd ones beside them.
struct Wide {
  __m512 even, odd;
};

CM_AVX512 inline Wide load_wide(const Bf16* x) {
  const __m512i u = _mm512_loadu_si512(x);
  const __m512i odd = _mm512_and_si512(u, _mm512_set1_epi32(static_cast<int>(0xffff0000u)));
  return {_mm512_castsi512_ps(_mm512_slli_epi32(u, 16)), _mm512_castsi512_ps(odd)};
}

CM_AVX512 inline Wide load_wide(const float* values, int64_t half) {
  return {_mm512_loadu_ps(values), _mm512_loadu_ps(values + half)};
}

CM_AVX512 inline void store_wide(Bf16* y, const Wide& value) {
  // Even channels in the lower half; then one after the other.
  const auto packed = (__m512i)_mm512_cvtne2ps_pbh(value.odd, value.even);
  alignas(64) static const uint16_t kOrder[32] = {0, 16, 1, 17, 2,  18, 3,  19, 4,  20, 5,  21, 6,  22, 7,  23,
                                                  8, 24, 9, 25, 10, 26, 11, 27, 12, 28, 13, 29, 14, 30, 15, 31};
  _mm512_storeu_si512(y, _mm512_permutexvar_epi16(_mm512_load_si512(kOrder), packed));
}

// 1/(1 + e^-z) within 4e-6 of itself; NaN stays NaN. See `sigmoid` for the limits.
CM_AVX512 inline __m512 sigmoid_wide(__m512 z) {
  const __m512 one = _mm512_set1_ps(1.0f);
  // Of two operands of which one is NaN the second is taken.
  const __m512 most = _mm512_set1_ps(60.0f), least = _mm512_set1_ps(-60.0f);
  const __m512 t = _mm512_max_ps(least, _mm512_min_ps(most, _mm512_sub_ps(_mm512_setzero_ps(), z)));
  const __m512 n = _mm512_roundscale_ps(_mm512_mul_ps(t, _mm512_set1_ps(1.44269504088896341f)), 8);
  const __m512 r = _mm512_fnmadd_ps(n, _mm512_set1_ps(0.693147180559945309f), t);
  __m512 p = _mm512_set1_ps(1.0f / 120.0f);
  p = _mm512_fmadd_ps(p, r, _mm512_set1_ps(1.0f / 24.0f));
  p = _mm512_fmadd_ps(p, r, _mm512_set1_ps(1.0f / 6.0f));
  p = _mm512_fmadd_ps(p, r, _mm512_set1_ps(0.5f));
  p = _mm512_fmadd_ps(p, r, one);
  p = _mm512_fmadd_ps(p, r, one);
  const __m512 below = _mm512_add_ps(one, _mm512_scalef_ps(p, n));
  const __m512 q = _mm512_rcp14_ps(below);
  return _mm512_mul_ps(q, _mm512_fnmadd_ps(below, q, _mm512_set1_ps(2.0f)));
}

template <bool silu>
CM_AVX512 inline __m512 forward_wide(__m512 x, __m512 a, __m512 b) {
  const __m512 z = _mm512_fmadd_ps(a, x, b);
  return silu ? _mm512_mul_ps(z, sigmoid_wide(z)) : z;
}

// See `dz_of`.
template <bool silu>
CM_AVX512 inline __m512 dz_wide(__m512 x, __m512 dy, __m512 a, __m512 b) {
  if (!silu) {
    return dy;
  }
  const __m512 one = _mm512_set1_ps(1.0f);
  const __m512 z = _mm512_fmadd_ps(a, x, b);
  const __m512 s = sigmoid_wide(z);
  const __m512 slope = _mm512_mul_ps(s, _mm512_fmadd_ps(z, _mm512_sub_ps(one, s), one));
  return _mm512_mul_ps(dy, slope);
}

template <bool silu>
CM_AVX512 void apply_forward_wide(const Bf16* x, Bf16* y, const Affine& affine, int64_t channels, int64_t pixels) {
  const int64_t half = channels / 2;
  for (int64_t p = 0; p < pixels; ++p) {
    for (int64_t c = 0; c < half; c += 16) {
      const int64_t i = p * channels + 2 * c;
      const Wide value = load_wide(x + i), a = load_wide(affine.a + c, half), b = load_wide(affine.b + c, half);
      store_wide(
          y + i, {forward_wide<silu>(value.even, a.even, b.even), forward_wide<silu>(value.odd, a.odd, b.odd)});
    }
  }
}

template <bool silu>
CM_AVX512 void apply_backward_wide(
    const Bf16* x,
    const Bf16* dy,
    Bf16* dx,
    const Affine& affine,
    int64_t channels,
    int64_t pixels) {
  const int64_t half = channels / 2;
  for (int64_t p = 0; p < pixels; ++p) {
    for (int64_t c = 0; c < half; c += 16) {
      const int64_t i = p * channels + 2 * c;
      const Wide value = load_wide(x + i), grad = load_wide(dy + i);
      const Wide a = load_wide(affine.a + c, half), b = load_wide(affine.b + c, half);
      const Wide e = load_wide(affine.e + c, half), f = load_wide(affine.f + c, half);
      const __m512 even = dz_wide<silu>(value.even, grad.even, a.even, b.even);
      const __m512 odd = dz_wide<silu>(value.odd, grad.odd, a.odd, b.odd);
      store_wide(
          dx + i, {_mm512_fmadd_ps(a.even, even, _mm512_fmadd_ps(e.even, value.even, f.even)),
                   _mm512_fmadd_ps(a.odd, odd, _mm512_fmadd_ps(e.odd, value.odd, f.odd))});
    }
  }
}

CM_AVX512 inline void add_wide(float* sums, __m512 value) {
  _mm512_storeu_ps(sums, _mm512_add_ps(_mm512_loadu_ps(sums), value));
}

// The sums of the backward pass: of dz and of dz * (x - k).
template <bool silu>
CM_AVX512 void sums_backward_wide(
    const Bf16* x,
    const Bf16* dy,
    const float* k,
    const float* a,
    const float* b,
    float* first,
    float* second,
    int64_t channels,
    int64_t pixels) {
  const int64_t half = channels / 2;
  for (int64_t p = 0; p < pixels; ++p) {
    for (int64_t c = 0; c < half; c += 16) {
      const int64_t i = p * channels + 2 * c, odd = half + c;
      const Wide value = load_wide(x + i), grad = load_wide(dy + i), own = load_wide(k + c, half);
      const Wide as = load_wide(a + c, half), bs = load_wide(b + c, half);
      const __m512 d_even = dz_wide<silu>(value.even, grad.even, as.even, bs.even);
      const __m512 d_odd = dz_wide<silu>(value.odd, grad.odd, as.odd, bs.odd);
      add_wide(first + c, d_even);
      add_wide(first + odd, d_odd);
      add_wide(second + c, _mm512_mul_ps(d_even, _mm512_sub_ps(value.even, own.even)));
      add_wide(second + odd, _mm512_mul_ps(d_odd, _mm512_sub_ps(value.odd, own.odd)));
    }
  }
}

#endif

// `apply_pairs`, in the processor's own way where it has one.
template <bool backward, bool silu>
void apply_pairs_best(
    const Bf16* x,
    const Bf16* dy,
    Bf16* y,
    const Affine& affine,
    int64_t channels,
    int64_t pixels) {
#ifdef CM_HAS_AVX512_LOOPS
  if (has_avx512_loops(channels)) {
    if constexpr (backward) {
      apply_backward_wide<silu>(x, dy, y, affine, channels, pixels);
    } else {
      apply_forward_wide<silu>(x, y, affine, channels, pixels);
    }
    return;
  }
#endif
  apply_pairs<backward, silu>(x, dy, y, affine, channels, pixels);
}

// `sums_pairs`, likewise. Moments, an eighth of the cost of the backward sums, are left to the compiler.
template <Sums kind, bool silu>
void sums_pairs_best(
    const Bf16* x,
    const Bf16* dy,
    const float* k,
    const float* a,
    const float* b,
    float* first,
    float* second,
    int64_t channels,
    int64_t pixels) {
#ifdef CM_HAS_AVX512_LOOPS
  if constexpr (kind == kBackward) {
    if (has_avx512_loops(channels)) {
      sums_backward_wide<silu>(x, dy, k, a, b, first, second, channels, pixels);
      return;
    }
  }
#endif
  sums_pairs<kind, silu>(x, dy, k, a, b, first, second, channels, pixels);
}

} // namespace
