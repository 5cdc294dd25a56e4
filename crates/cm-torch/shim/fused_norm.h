// Group normalisation with its neighbours over a whole batch, forward and backward.
//
// An image of few pixels is done from its first sum to its last number while it lies in the cache; a larger one in pieces,
// between which the sums of all of them are put together. Either way images and pieces are shared out over all threads,
// and what is computed does not depend on their number.
#pragma once

#include "fused_avx512.h"
#include "fused_loops.h"

#include <algorithm>
#include <cmath>
#include <cstdint>
#include <memory>
#include <type_traits>
#include <vector>

namespace {

struct Norm {
  ImageOrder layout;
  int64_t groups;
  double eps;
  bool silu;
  // [C], [C], and for each image [N, C]: what is added in front, and scale (of 1 + scale) and shift behind.
  const float *weight, *bias, *add, *scale, *shift;

  int64_t per_group() const {
    return layout.c / groups;
  }
  double scaling(int64_t n, int64_t c) const {
    return scale == nullptr ? 1.0 : 1.0 + scale[n * layout.c + c];
  }
  double gain(int64_t n, int64_t c) const {
    return weight[c] * scaling(n, c);
  }
  double offset(int64_t n, int64_t c) const {
    return bias[c] * scaling(n, c) + (shift == nullptr ? 0.0 : shift[n * layout.c + c]);
  }
  double added(int64_t n, int64_t c) const {
    return add == nullptr ? 0.0 : add[n * layout.c + c];
  }
};

// Means and 1/standard deviations of groups `[N, G]`, means of channels `[N, C]` (without what is added).
struct Moments {
  float *mean, *rstd, *channel;
};

// Where gradients go; those of absent inputs are null.
struct Grads {
  float *weight, *bias, *add, *scale, *shift;
};

using Numbers = std::unique_ptr<float[]>;

// Not set to anything.
inline Numbers numbers(int64_t count) {
  return Numbers(new float[static_cast<size_t>(count)]);
}

// ---- sums and passes over pieces of an image ----

inline int64_t pieces_of(const ImageOrder& l) {
  return (l.p + kPixels - 1) / kPixels;
}

// Calls f(i) for 0 <= i < count, in parallel, each of which is `pixels` pixels of work.
template <typename F>
void in_parallel(const ImageOrder& l, int64_t count, int64_t pixels, const F& f) {
  // Waking the other thread costs as much as some ten thousand numbers.
  const int64_t grain = std::max<int64_t>(1, 16384 / std::max<int64_t>(1, l.c * pixels));
  at::parallel_for(0, count, grain, [&](int64_t begin, int64_t end) {
    for (int64_t i = begin; i < end; ++i) {
      f(i);
    }
  });
}

// Two sums of every channel for every piece `[N, pieces, 2, C]`: in float within a piece, in double over pieces, in their
// order.
class PieceSums {
 public:
  explicit PieceSums(const ImageOrder& l) : l_(l), pieces_(pieces_of(l)), sums_(numbers(l.n * pieces_ * l.c * 2)) {}

  // Those of one piece; k, a and b are numbers of channels `[N, C]`.
  template <typename T, Sums kind, bool silu>
  void add(const T* x, const T* dy, const float* k, const float* a, const float* b, int64_t n, int64_t piece) {
    const int64_t start = piece * kPixels, pixels = std::min(kPixels, l_.p - start);
    float* first = sums_.get() + (n * pieces_ + piece) * l_.c * 2;
    float* second = first + l_.c;
    std::fill(first, second + l_.c, 0.0f);
    if (!l_.last) {
      for (int64_t c = 0; c < l_.c; ++c) {
        const int64_t from = (n * l_.c + c) * l_.p + start, i = n * l_.c + c;
        sums_plane<T, kind, silu>(
            x + from, dy == nullptr ? nullptr : dy + from, k[i], a == nullptr ? 0.0f : a[i],
            b == nullptr ? 0.0f : b[i], first + c, second + c, pixels);
      }
      return;
    }
    const int64_t from = (n * l_.p + start) * l_.c;
    const T* grad = dy == nullptr ? nullptr : dy + from;
    const auto at = [&](const float* values) { return values == nullptr ? nullptr : values + n * l_.c; };
    if constexpr (std::is_same_v<T, Bf16>) {
      if (l_.pairs) {
        sums_pairs_best<kind, silu>(x + from, grad, at(k), at(a), at(b), first, second, l_.c, pixels);
        return;
      }
    }
    sums_last<T, kind, silu>(x + from, grad, at(k), at(a), at(b), first, second, l_.c, pixels);
  }

  // Of one image and the channel that lies at `i` in it.
  double first(int64_t n, int64_t i) const {
    return over_pieces(n, i);
  }
  double second(int64_t n, int64_t i) const {
    return over_pieces(n, l_.c + i);
  }

 private:
  double over_pieces(int64_t n, int64_t i) const {
    const float* from = sums_.get() + n * pieces_ * l_.c * 2 + i;
    double sum = 0.0;
    for (int64_t piece = 0; piece < pieces_; ++piece) {
      sum += from[piece * l_.c * 2];
    }
    return sum;
  }

  ImageOrder l_;
  int64_t pieces_;
  Numbers sums_;
};

// Turns one piece of x (and dy) into y.
template <typename T, bool backward, bool silu>
void apply(const ImageOrder& l, const T* x, const T* dy, T* y, const Affine& affine, int64_t n, int64_t piece) {
  const int64_t start = piece * kPixels, pixels = std::min(kPixels, l.p - start);
  const auto at = [&](int64_t i) {
    const auto from = [&](const float* values) { return values == nullptr ? nullptr : values + i; };
    return Affine{from(affine.a), from(affine.b), from(affine.e), from(affine.f)};
  };
  if (!l.last) {
    for (int64_t c = 0; c < l.c; ++c) {
      const int64_t from = (n * l.c + c) * l.p + start;
      apply_plane<T, backward, silu>(x + from, backward ? dy + from : nullptr, y + from, at(n * l.c + c), pixels);
    }
    return;
  }
  const int64_t from = (n * l.p + start) * l.c;
  const T* grad = backward ? dy + from : nullptr;
  if constexpr (std::is_same_v<T, Bf16>) {
    if (l.pairs) {
      apply_pairs_best<backward, silu>(x + from, grad, y + from, at(n * l.c), l.c, pixels);
      return;
    }
  }
  apply_last<T, backward, silu>(x + from, grad, y + from, at(n * l.c), l.c, pixels);
}

// ---- forward ----

// For each channel of an image, the mean of a few pixels: sums of differences to it lose no digits where the mean is far
// from 0.
template <typename T>
void guess(const ImageOrder& l, const T* x, float* k, int64_t n) {
  const int64_t few = std::min<int64_t>(l.p, 8);
  const float each = 1.0f / static_cast<float>(few);
  float* own = k + n * l.c;
  std::fill(own, own + l.c, 0.0f);
  for (int64_t i = 0; i < few; ++i) {
    const int64_t p = (2 * i + 1) * l.p / (2 * few);
    const T* from = x + n * l.c * l.p + (l.last ? p * l.c : p);
    if (l.last) {
      mean_last(from, own, each, l.c, l.pairs);
      continue;
    }
    for (int64_t c = 0; c < l.c; ++c) {
      own[c] += each * load(from + c * l.p);
    }
  }
}

// Moments of one image, and z = a * x + b for each of its channels.
inline void moments_of(const Norm& norm, const PieceSums& sums, const float* k, const Moments& out, int64_t n) {
  const ImageOrder& l = norm.layout;
  const int64_t d = norm.per_group();
  const double pixels = static_cast<double>(l.p), each = 1.0 / pixels, count = pixels * static_cast<double>(d);
  for (int64_t g = 0; g < norm.groups; ++g) {
    double mean = 0.0, square = 0.0, within = 0.0;
    for (int64_t c = g * d; c < (g + 1) * d; ++c) {
      const int64_t i = l.within(c);
      const double first = sums.first(n, i), own = k[n * l.c + i] + first * each;
      out.channel[n * l.c + c] = static_cast<float>(own);
      mean += own + norm.added(n, c);
      within += sums.second(n, i) - first * first * each;
    }
    mean /= static_cast<double>(d);
    for (int64_t c = g * d; c < (g + 1) * d; ++c) {
      const int64_t i = l.within(c);
      const double apart = k[n * l.c + i] + sums.first(n, i) * each + norm.added(n, c) - mean;
      square += apart * apart;
    }
    square = square * pixels + within;
    // Rounding can leave a little less than 0; NaN is no less, and stays.
    const double variance = (square < 0.0 ? 0.0 : square) / count;
    out.mean[n * norm.groups + g] = static_cast<float>(mean);
    out.rstd[n * norm.groups + g] = static_cast<float>(1.0 / std::sqrt(variance + norm.eps));
  }
}

// z = a * x + b for each channel of an image.
inline void affine_of(const Norm& norm, const Moments& m, float* a, float* b, int64_t n) {
  const ImageOrder& l = norm.layout;
  const int64_t d = norm.per_group();
  for (int64_t g = 0; g < norm.groups; ++g) {
    const double mean = m.mean[n * norm.groups + g], rstd = m.rstd[n * norm.groups + g];
    for (int64_t c = g * d; c < (g + 1) * d; ++c) {
      const int64_t i = l.at(n, c);
      const double slope = rstd * norm.gain(n, c);
      a[i] = static_cast<float>(slope);
      b[i] = static_cast<float>(norm.offset(n, c) + (norm.added(n, c) - mean) * slope);
    }
  }
}

template <typename T, bool silu>
void norm_forward_as(const Norm& norm, const T* x, T* y, const Moments& m) {
  const ImageOrder& l = norm.layout;
  const int64_t pieces = pieces_of(l);
  PieceSums sums(l);
  const Numbers k = numbers(l.n * l.c), a = numbers(l.n * l.c), b = numbers(l.n * l.c);
  const Affine affine{a.get(), b.get(), nullptr, nullptr};
  const auto add = [&](int64_t n, int64_t piece) {
    sums.add<T, kMoments, false>(x, nullptr, k.get(), nullptr, nullptr, n, piece);
  };
  const auto finish = [&](int64_t n) {
    moments_of(norm, sums, k.get(), m, n);
    affine_of(norm, m, a.get(), b.get(), n);
  };
  if (pieces == 1) {
    in_parallel(l, l.n, l.p, [&](int64_t n) {
      guess(l, x, k.get(), n);
      add(n, 0);
      finish(n);
      apply<T, false, silu>(l, x, nullptr, y, affine, n, 0);
    });
    return;
  }
  in_parallel(l, l.n, 8, [&](int64_t n) { guess(l, x, k.get(), n); });
  in_parallel(l, l.n * pieces, kPixels, [&](int64_t i) { add(i / pieces, i % pieces); });
  in_parallel(l, l.n, 8, finish);
  in_parallel(l, l.n * pieces, kPixels, [&](int64_t i) {
    apply<T, false, silu>(l, x, nullptr, y, affine, i / pieces, i % pieces);
  });
}

template <typename T>
void norm_forward(const Norm& norm, const T* x, T* y, const Moments& m) {
  norm.silu ? norm_forward_as<T, true>(norm, x, y, m) : norm_forward_as<T, false>(norm, x, y, m);
}

// ---- backward ----

// Of one image: dx = a * dz + e * x + f for each channel, the gradients of what belongs to the image, and what the image
// adds to those of weight and bias `[N, C]`.
inline void gradients_of(
    const Norm& norm,
    const PieceSums& sums,
    const Moments& m,
    float* e,
    float* f,
    float* weight,
    float* bias,
    const Grads& grads,
    int64_t n) {
  const ImageOrder& l = norm.layout;
  const int64_t d = norm.per_group();
  const double pixels = static_cast<double>(l.p), each = 1.0 / (pixels * static_cast<double>(d));
  for (int64_t g = 0; g < norm.groups; ++g) {
    const double mean = m.mean[n * norm.groups + g], rstd = m.rstd[n * norm.groups + g];
    double all = 0.0, along = 0.0;
    for (int64_t c = g * d; c < (g + 1) * d; ++c) {
      const double gain = norm.gain(n, c);
      all += gain * sums.first(n, l.within(c));
      along += gain * sums.second(n, l.within(c)) * rstd;
    }
    const double slope = -rstd * rstd * along * each;
    for (int64_t c = g * d; c < (g + 1) * d; ++c) {
      const int64_t i = n * l.c + c, at = l.at(n, c);
      const double rest = -rstd * all * each - slope * (mean - norm.added(n, c));
      e[at] = static_cast<float>(slope);
      f[at] = static_cast<float>(rest);
      const double by_gain = rstd * sums.second(n, l.within(c)), by_offset = sums.first(n, l.within(c));
      weight[i] = static_cast<float>(by_gain * norm.scaling(n, c));
      bias[i] = static_cast<float>(by_offset * norm.scaling(n, c));
      if (grads.add != nullptr) {
        grads.add[i] = static_cast<float>(
            rstd * norm.gain(n, c) * by_offset + pixels * (slope * m.channel[i] + rest));
      }
      if (grads.scale != nullptr) {
        grads.scale[i] = static_cast<float>(by_gain * norm.weight[c] + by_offset * norm.bias[c]);
      }
      if (grads.shift != nullptr) {
        grads.shift[i] = static_cast<float>(by_offset);
      }
    }
  }
}

// Adds `[N, C]` up over N, in double.
inline void over_images(const ImageOrder& l, const float* of, float* sum) {
  std::vector<double> sums(l.c, 0.0);
  for (int64_t n = 0; n < l.n; ++n) {
    for (int64_t c = 0; c < l.c; ++c) {
      sums[c] += of[n * l.c + c];
    }
  }
  for (int64_t c = 0; c < l.c; ++c) {
    sum[c] = static_cast<float>(sums[c]);
  }
}

template <typename T, bool silu>
void norm_backward_as(const Norm& norm, const T* x, const T* dy, T* dx, const Moments& m, const Grads& grads) {
  const ImageOrder& l = norm.layout;
  const int64_t pieces = pieces_of(l), all = l.n * l.c, d = norm.per_group();
  PieceSums sums(l);
  const Numbers k = numbers(all), a = numbers(all), b = numbers(all), e = numbers(all), f = numbers(all);
  const Numbers weight = numbers(all), bias = numbers(all);
  const Affine affine{a.get(), b.get(), e.get(), f.get()};
  const auto begin = [&](int64_t n) {
    affine_of(norm, m, a.get(), b.get(), n);
    for (int64_t c = 0; c < l.c; ++c) {
      k[l.at(n, c)] = static_cast<float>(m.mean[n * norm.groups + c / d] - norm.added(n, c));
    }
  };
  const auto add = [&](int64_t n, int64_t piece) {
    sums.add<T, kBackward, silu>(x, dy, k.get(), a.get(), b.get(), n, piece);
  };
  const auto finish = [&](int64_t n) {
    gradients_of(norm, sums, m, e.get(), f.get(), weight.get(), bias.get(), grads, n);
  };
  if (pieces == 1) {
    in_parallel(l, l.n, l.p, [&](int64_t n) {
      begin(n);
      add(n, 0);
      finish(n);
      apply<T, true, silu>(l, x, dy, dx, affine, n, 0);
    });
  } else {
    in_parallel(l, l.n, 8, begin);
    in_parallel(l, l.n * pieces, kPixels, [&](int64_t i) { add(i / pieces, i % pieces); });
    in_parallel(l, l.n, 8, finish);
    in_parallel(l, l.n * pieces, kPixels, [&](int64_t i) {
      apply<T, true, silu>(l, x, dy, dx, affine, i / pieces, i % pieces);
    });
  }
  over_images(l, weight.get(), grads.weight);
  over_images(l, bias.get(), grads.bias);
}

template <typename T>
void norm_backward(const Norm& norm, const T* x, const T* dy, T* dx, const Moments& m, const Grads& grads) {
  norm.silu ? norm_backward_as<T, true>(norm, x, dy, dx, m, grads)
            : norm_backward_as<T, false>(norm, x, dy, dx, m, grads);
}

} // namespace
