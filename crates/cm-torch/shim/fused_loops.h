// The loops of `fused.cpp` over one piece of one image, on float32 and bfloat16. The compiler fills vector registers.
#pragma once

#include "chunks.h"

#include <cstdint>
#include <cstring>
#include <type_traits>

namespace {

// ---- numbers ----

template <typename To, typename From>
inline To bits_of(From from) {
  static_assert(sizeof(To) == sizeof(From), "as many bits");
  To to;
  std::memcpy(&to, &from, sizeof(To));
  return to;
}

// bfloat16 as its bits: loops over these fill vector registers, loops over c10::BFloat16 do not.
struct Bf16 {
  uint16_t bits;
};

inline float load(const float* x) {
  return *x;
}

inline float load(const Bf16* x) {
  return bits_of<float>(static_cast<uint32_t>(x->bits) << 16);
}

inline void store(float* y, float value) {
  *y = value;
}

// The bits of the nearest bfloat16 (even ones, where two are as near) in the upper half of the result.
inline uint32_t rounded(float value) {
  const uint32_t u = bits_of<uint32_t>(value);
  const uint32_t nearest_even = u + 0x7fffu + ((u >> 16) & 1u);
  return value == value ? nearest_even : 0x7fc00000u;
}

inline void store(Bf16* y, float value) {
  y->bits = static_cast<uint16_t>(rounded(value) >> 16);
}

// Two bfloat16 side by side, the first in the lower half: registers are twice as wide for numbers of 32 bits.
struct Pair {
  float first, second;
};

inline Pair load_pair(const Bf16* x) {
  uint32_t u;
  std::memcpy(&u, x, sizeof(u));
  return {bits_of<float>(u << 16), bits_of<float>(u & 0xffff0000u)};
}

inline void store_pair(Bf16* y, const Pair& pair) {
  const uint32_t u = (rounded(pair.first) >> 16) | (rounded(pair.second) & 0xffff0000u);
  std::memcpy(y, &u, sizeof(u));
}

// 1/(1 + e^-z) within two units in the last place; NaN stays NaN.
inline float sigmoid(float z) {
  float t = -z;
  // Behind e^60, 1e-26, nothing is left of it in any dtype. (Nearer to the least float, products with it would be
  // denormal, which costs a hundred times as much, and a vector loop computes them for all lanes.)
  t = t > 60.0f ? 60.0f : t;
  t = t < -60.0f ? -60.0f : t;
  // Adding 1.5 * 2^23 leaves the nearest integer in the low bits.
  const float shifted = t * 1.44269504088896341f + 12582912.0f;
  const float n = shifted - 12582912.0f;
  const float r = (t - n * 0.693359375f) - n * -2.12194440e-4f;
  float p = 1.0f / 5040.0f;
  p = p * r + 1.0f / 720.0f;
  p = p * r + 1.0f / 120.0f;
  p = p * r + 1.0f / 24.0f;
  p = p * r + 1.0f / 6.0f;
  p = p * r + 0.5f;
  p = p * r + 1.0f;
  p = p * r + 1.0f;
  const float exp = bits_of<float>(bits_of<uint32_t>(p) + (bits_of<uint32_t>(shifted) << 23));
  return 1.0f / (1.0f + exp);
}

// ---- an image in memory ----

// N images of C channels and P pixels. Channels last: pixel by pixel, else plane by plane. In pairs: numbers of channels
// (sums, slopes and so on) lie with those of even channels first, and then those of odd ones.
struct ImageOrder {
  int64_t n, c, p;
  bool last, pairs;

  // Where the number of a channel lies among those of its image, and of all.
  int64_t within(int64_t channel) const {
    return pairs ? (channel & 1) * (c / 2) + channel / 2 : channel;
  }
  int64_t at(int64_t image, int64_t channel) const {
    return image * c + within(channel);
  }
};

// Pixels of one piece of work. Fixed, so that sums are the same bits for any number of threads.
constexpr int64_t kPixels = 64;

// What every row of one channel is turned into: z = a * x + b, and, backward, dx = a * dz + e * x + f.
struct Affine {
  const float* a;
  const float* b;
  const float* e;
  const float* f;
};

// Two sums over the pixels of a piece, for each channel.
enum Sums { kMoments, kBackward };

// The gradient in front of the activation: d silu(z)/dz = s(1 + z(1 - s)) with s = sigmoid(z).
template <bool silu>
inline float dz_of(float x, float dy, float a, float b) {
  if (!silu) {
    return dy;
  }
  const float z = a * x + b;
  const float s = sigmoid(z);
  return dy * (s * (1.0f + z * (1.0f - s)));
}

// Moments: sum(x - k) and sum((x - k)^2). Backward: sum(dz) and sum(dz * (x - k)).
template <Sums kind, bool silu>
inline void add_to(float x, float dy, float k, float a, float b, float& first, float& second) {
  const float centred = x - k;
  if (kind == kMoments) {
    first += centred;
    second += centred * centred;
    return;
  }
  const float dz = dz_of<silu>(x, dy, a, b);
  first += dz;
  second += dz * centred;
}

// Channels last: `first` and `second` hold C sums, for `pixels` pixels from `x` on.
template <typename T, Sums kind, bool silu>
CM_CLONES void sums_last(
    const T* __restrict x,
    const T* __restrict dy,
    const float* __restrict k,
    const float* __restrict a,
    const float* __restrict b,
    float* __restrict first,
    float* __restrict second,
    int64_t channels,
    int64_t pixels) {
  for (int64_t p = 0; p < pixels; ++p) {
    for (int64_t c = 0; c < channels; ++c) {
      const int64_t i = p * channels + c;
      const float value = load(x + i);
      const float grad = kind == kBackward ? load(dy + i) : 0.0f;
      const float ac = kind == kBackward ? a[c] : 0.0f;
      const float bc = kind == kBackward ? b[c] : 0.0f;
      add_to<kind, silu>(value, grad, k[c], ac, bc, first[c], second[c]);
    }
  }
}

// The same for pairs of channels.
template <Sums kind, bool silu>
CM_CLONES void sums_pairs(
    const Bf16* __restrict x,
    const Bf16* __restrict dy,
    const float* __restrict k,
    const float* __restrict a,
    const float* __restrict b,
    float* __restrict first,
    float* __restrict second,
    int64_t channels,
    int64_t pixels) {
  const int64_t half = channels / 2;
  for (int64_t p = 0; p < pixels; ++p) {
    for (int64_t c = 0; c < half; ++c) {
      const int64_t i = p * channels + 2 * c, odd = half + c;
      const Pair value = load_pair(x + i);
      const Pair grad = kind == kBackward ? load_pair(dy + i) : Pair{0.0f, 0.0f};
      const float ae = kind == kBackward ? a[c] : 0.0f, ao = kind == kBackward ? a[odd] : 0.0f;
      const float be = kind == kBackward ? b[c] : 0.0f, bo = kind == kBackward ? b[odd] : 0.0f;
      add_to<kind, silu>(value.first, grad.first, k[c], ae, be, first[c], second[c]);
      add_to<kind, silu>(value.second, grad.second, k[odd], ao, bo, first[odd], second[odd]);
    }
  }
}

// Channels last: adds `each` times one pixel to a number of each channel.
template <typename T>
CM_CLONES void mean_last(const T* __restrict x, float* __restrict mean, float each, int64_t channels, bool pairs) {
  if constexpr (std::is_same_v<T, Bf16>) {
    if (pairs) {
      const int64_t half = channels / 2;
      for (int64_t c = 0; c < half; ++c) {
        const Pair value = load_pair(x + 2 * c);
        mean[c] += each * value.first;
        mean[half + c] += each * value.second;
      }
      return;
    }
  }
  for (int64_t c = 0; c < channels; ++c) {
    mean[c] += each * load(x + c);
  }
}

// Planes: the sums of `pixels` pixels of one channel, in 16 lanes that fill a vector register.
template <typename T, Sums kind, bool silu>
CM_CLONES void sums_plane(
    const T* __restrict x,
    const T* __restrict dy,
    float k,
    float a,
    float b,
    float* __restrict first,
    float* __restrict second,
    int64_t pixels) {
  float lanes[2][16] = {};
  int64_t p = 0;
  for (; p + 16 <= pixels; p += 16) {
    for (int64_t j = 0; j < 16; ++j) {
      const float grad = kind == kBackward ? load(dy + p + j) : 0.0f;
      add_to<kind, silu>(load(x + p + j), grad, k, a, b, lanes[0][j], lanes[1][j]);
    }
  }
  for (int64_t j = 0; p + j < pixels; ++j) {
    const float grad = kind == kBackward ? load(dy + p + j) : 0.0f;
    add_to<kind, silu>(load(x + p + j), grad, k, a, b, lanes[0][j], lanes[1][j]);
  }
  for (int64_t j = 0; j < 16; ++j) {
    *first += lanes[0][j];
    *second += lanes[1][j];
  }
}

template <bool silu>
inline float forward_of(float x, float a, float b) {
  const float z = a * x + b;
  return silu ? z * sigmoid(z) : z;
}

template <bool silu>
inline float backward_of(float x, float dy, float a, float b, float e, float f) {
  return a * dz_of<silu>(x, dy, a, b) + (e * x + f);
}

template <typename T, bool backward, bool silu>
CM_CLONES void apply_last(
    const T* __restrict x,
    const T* __restrict dy,
    T* __restrict y,
    const Affine& affine,
    int64_t channels,
    int64_t pixels) {
  const float* __restrict a = affine.a;
  const float* __restrict b = affine.b;
  const float* __restrict e = affine.e;
  const float* __restrict f = affine.f;
  for (int64_t p = 0; p < pixels; ++p) {
    for (int64_t c = 0; c < channels; ++c) {
      const int64_t i = p * channels + c;
      if (backward) {
        store(y + i, backward_of<silu>(load(x + i), load(dy + i), a[c], b[c], e[c], f[c]));
      } else {
        store(y + i, forward_of<silu>(load(x + i), a[c], b[c]));
      }
    }
  }
}

template <bool backward, bool silu>
CM_CLONES void apply_pairs(
    const Bf16* __restrict x,
    const Bf16* __restrict dy,
    Bf16* __restrict y,
    const Affine& affine,
    int64_t channels,
    int64_t pixels) {
  const float* __restrict a = affine.a;
  const float* __restrict b = affine.b;
  const float* __restrict e = affine.e;
  const float* __restrict f = affine.f;
  const int64_t half = channels / 2;
  for (int64_t p = 0; p < pixels; ++p) {
    for (int64_t c = 0; c < half; ++c) {
      const int64_t i = p * channels + 2 * c, odd = half + c;
      const Pair value = load_pair(x + i);
      Pair result;
      if (backward) {
        const Pair grad = load_pair(dy + i);
        result.first = backward_of<silu>(value.first, grad.first, a[c], b[c], e[c], f[c]);
        result.second = backward_of<silu>(value.second, grad.second, a[odd], b[odd], e[odd], f[odd]);
      } else {
        result.first = forward_of<silu>(value.first, a[c], b[c]);
        result.second = forward_of<silu>(value.second, a[odd], b[odd]);
      }
      store_pair(y + i, result);
    }
  }
}

template <typename T, bool backward, bool silu>
CM_CLONES void apply_plane(
    const T* __restrict x,
    const T* __restrict dy,
    T* __restrict y,
    const Affine& affine,
    int64_t pixels) {
  const float a = *affine.a, b = *affine.b;
  const float e = backward ? *affine.e : 0.0f, f = backward ? *affine.f : 0.0f;
  for (int64_t p = 0; p < pixels; ++p) {
    if (backward) {
      store(y + p, backward_of<silu>(load(x + p), load(dy + p), a, b, e, f));
    } else {
      store(y + p, forward_of<silu>(load(x + p), a, b));
    }
  }
}

} // namespace
