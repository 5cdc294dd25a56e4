#include "weight_grad.h"

#include <ATen/Parallel.h>
#include <ATen/ops/empty.h>

#include <algorithm>
#include <cstdint>
#include <numeric>
#include <vector>

#if defined(__x86_64__) && defined(__linux__) && defined(__GNUC__) && !defined(__clang__) && __GNUC__ >= 11
#define CM_TILES
#include <cpuid.h>
#include <immintrin.h>
#include <sys/syscall.h>
#include <unistd.h>
#endif

#ifdef CM_TILES

// The compiler's own header of AVX-512 warns of itself (its bug 105593).
#pragma GCC diagnostic ignored "-Wmaybe-uninitialized"
#pragma GCC diagnostic ignored "-Wuninitialized"

namespace {

#define CM_TILE_TARGET __attribute__((target("avx512f,avx512bw,avx512vl,amx-tile,amx-bf16")))

// A tile is 16 rows of 16 words of 32 bits.
constexpr int64_t kRows = 16;
constexpr int64_t kWords = kRows * kRows;
// Pixels in one product of tiles: two bfloat16 in each word.
constexpr int64_t kPixels = 2 * kRows;
// Bytes that are packed at a time, a half of a second-level cache.
constexpr int64_t kPacked = 1 << 20;
constexpr int64_t kMostPixels = 1024;

struct alignas(64) TileShapes {
  uint8_t palette = 1;
  uint8_t start_row = 0;
  uint8_t reserved[14] = {};
  uint16_t bytes[16] = {64, 64, 64, 64, 64, 64, 64, 64};
  uint8_t rows[16] = {16, 16, 16, 16, 16, 16, 16, 16};
};

// The tiles of this thread, for as long as it lives. oneDNN sets its own before each of its kernels.
class Tiles {
 public:
  CM_TILE_TARGET Tiles() {
    static const TileShapes shapes;
    _tile_loadconfig(&shapes);
  }
  CM_TILE_TARGET ~Tiles() {
    _tile_release();
  }
};

// A number of whole images on the flat grid.
struct Grid {
  int64_t images, height, width, k;

  int64_t row() const {
    return width + k / 2;
  }
  int64_t image() const {
    return (height + k / 2) * row();
  }
  // Pixels, filled up to whole tiles.
  int64_t pixels() const {
    return (images * image() + kPixels - 1) / kPixels * kPixels;
  }
  // Words of two pixels that shifts reach.
  int64_t words() const {
    return pixels() / 2 + (k - 1) * (row() + 1) / 2 + 1;
  }
  // How far the input lies ahead for a tap.
  int64_t shift(int64_t tap) const {
    return tap / k * row() + tap % k;
  }
  // How far the pixel under the middle tap lies ahead.
  int64_t lead() const {
    return k / 2 * (row() + 1);
  }
  // The pixel in memory at every place of the grid, from `lead` places in front of it on, or -1 for zeros.
  std::vector<int32_t> sources() const {
    std::vector<int32_t> all(lead() + 2 * words() + 1, -1);
    int32_t pixel = 0;
    for (int64_t y = 0; y < images * height; ++y) {
      int32_t* at = all.data() + lead() + y / height * image() + y % height * row();
      std::iota(at, at + width, pixel);
      pixel += static_cast<int32_t>(width);
    }
    return all;
  }
};

// 16 channels of one pixel, each in a word; a place without a pixel is 0.
CM_TILE_TARGET inline __m512i widened(const uint16_t* from, int32_t pixel, int64_t channels) {
  if (pixel < 0) {
    return _mm512_setzero_si512();
  }
  return _mm512_cvtepu16_epi32(_mm256_loadu_si256(reinterpret_cast<const __m256i*>(from + pixel * channels)));
}

// Those of two pixels, side by side in each word.
CM_TILE_TARGET inline __m512i word_of(const uint16_t* from, const int32_t* pixels, int64_t channels) {
  const __m512i second = widened(from, pixels[1], channels);
  return _mm512_or_si512(widened(from, pixels[0], channels), _mm512_slli_epi32(second, 16));
}

CM_TILE_TARGET inline void transpose(__m512i r[kRows]) {
  __m512i t[kRows];
  for (int i = 0; i < 8; ++i) {
    t[2 * i] = _mm512_unpacklo_epi32(r[2 * i], r[2 * i + 1]);
    t[2 * i + 1] = _mm512_unpackhi_epi32(r[2 * i], r[2 * i + 1]);
  }
  for (int i = 0; i < 4; ++i) {
    r[4 * i] = _mm512_unpacklo_epi64(t[4 * i], t[4 * i + 2]);
    r[4 * i + 1] = _mm512_unpackhi_epi64(t[4 * i], t[4 * i + 2]);
    r[4 * i + 2] = _mm512_unpacklo_epi64(t[4 * i + 1], t[4 * i + 3]);
    r[4 * i + 3] = _mm512_unpackhi_epi64(t[4 * i + 1], t[4 * i + 3]);
  }
  // Lane q of r[4 * i + j] holds column 4 * q + j of rows 4 * i to 4 * i + 3.
  for (int j = 0; j < 4; ++j) {
    const __m512i even_low = _mm512_shuffle_i32x4(r[j], r[4 + j], 0x88);
    const __m512i odd_low = _mm512_shuffle_i32x4(r[j], r[4 + j], 0xdd);
    const __m512i even_high = _mm512_shuffle_i32x4(r[8 + j], r[12 + j], 0x88);
    const __m512i odd_high = _mm512_shuffle_i32x4(r[8 + j], r[12 + j], 0xdd);
    t[j] = _mm512_shuffle_i32x4(even_low, even_high, 0x88);
    t[8 + j] = _mm512_shuffle_i32x4(even_low, even_high, 0xdd);
    t[4 + j] = _mm512_shuffle_i32x4(odd_low, odd_high, 0x88);
    t[12 + j] = _mm512_shuffle_i32x4(odd_low, odd_high, 0xdd);
  }
  std::copy(t, t + kRows, r);
}

// Two pixels of the input; 16 channels are `next` words behind those before.
CM_TILE_TARGET void pack_input(const uint16_t* x, const int32_t* pixels, uint32_t* to, int64_t next, int64_t channels) {
  for (int64_t c = 0; c < channels; c += kRows) {
    _mm512_store_si512(to + c / kRows * next, word_of(x + c, pixels, channels));
  }
}

// One tile of the output's gradient: 16 channels by 32 pixels.
CM_TILE_TARGET void pack_gradient(const uint16_t* dy, const int32_t* pixels, uint32_t* to, int64_t channels) {
  __m512i rows[kRows];
  for (int64_t i = 0; i < kRows; ++i) {
    rows[i] = word_of(dy, pixels + 2 * i, channels);
  }
  transpose(rows);
  for (int64_t i = 0; i < kRows; ++i) {
    _mm512_store_si512(to + i * kRows, rows[i]);
  }
}

// Where a tile of sums lies: its rows are `bytes` apart, the tile of the next 16 input channels is `next_b` numbers on, and
// that of the next 16 output channels `next_a`.
struct Place {
  float* at;
  int64_t bytes, next_a, next_b;
};

// Adds the products of one or two tiles of output channels and one or two of input channels to the sums at `from`, or to
// nothing, and writes them to `to`. `a` and `b`: tiles one behind the other, along the pixels, in `words` words; those of the
// second channels lie `next_a` and `next_b` words on.
template <bool two_a, bool two_b>
CM_TILE_TARGET void multiply(
    const uint32_t* a,
    int64_t next_a,
    const uint32_t* b,
    int64_t next_b,
    int64_t words,
    const Place& from,
    const Place& to) {
  // What the tiles read was written before, and is not among what the intrinsics say that they read.
  asm volatile("" ::: "memory");
  if (from.at == nullptr) {
    _tile_zero(0);
    _tile_zero(1);
    _tile_zero(2);
    _tile_zero(3);
  } else {
    _tile_loadd(0, from.at, from.bytes);
    if (two_b) {
      _tile_loadd(1, from.at + from.next_b, from.bytes);
    }
    if (two_a) {
      _tile_loadd(2, from.at + from.next_a, from.bytes);
    }
    if (two_a && two_b) {
      _tile_loadd(3, from.at + from.next_a + from.next_b, from.bytes);
    }
  }
  for (int64_t i = 0; i < words; i += kWords) {
    _tile_loadd(4, a + i, 64);
    _tile_loadd(6, b + i, 64);
    _tile_dpbf16ps(0, 4, 6);
    if (two_b) {
      _tile_loadd(7, b + next_b + i, 64);
      _tile_dpbf16ps(1, 4, 7);
    }
    if (two_a) {
      _tile_loadd(5, a + next_a + i, 64);
      _tile_dpbf16ps(2, 5, 6);
    }
    if (two_a && two_b) {
      _tile_dpbf16ps(3, 5, 7);
    }
  }
  _tile_stored(0, to.at, to.bytes);
  if (two_b) {
    _tile_stored(1, to.at + to.next_b, to.bytes);
  }
  if (two_a) {
    _tile_stored(2, to.at + to.next_a, to.bytes);
  }
  if (two_a && two_b) {
    _tile_stored(3, to.at + to.next_a + to.next_b, to.bytes);
  }
  asm volatile("" ::: "memory");
}

// Sums between parts, as tiles [C / 16, k * k, O / 16], which are near to one another while a part is worked on; and in the
// end [O, k * k, C].
struct Sums {
  float *tiles, *all;
  bool first, last;
};

// The packed pixels of some images, and what they add to the gradient.
struct Part {
  Grid grid;
  int64_t c, o;
  // Input in words whose first pixel is even, and odd; the output's gradient in tiles.
  uint32_t *even, *odd, *gradient;

  int64_t tiles() const {
    return grid.pixels() / kPixels;
  }

  void pack(const uint16_t* x, const uint16_t* dy) const {
    const auto sources = grid.sources();
    const int32_t *places = sources.data(), *own = places + grid.lead();
    const int64_t words = grid.words();
    at::parallel_for(0, words, 64, [&](int64_t begin, int64_t end) {
      for (int64_t i = begin; i < end; ++i) {
        pack_input(x, places + 2 * i, even + i * kRows, words * kRows, c);
        if (grid.k > 1) {
          pack_input(x, places + 2 * i + 1, odd + i * kRows, words * kRows, c);
        }
      }
    });
    at::parallel_for(0, tiles() * (o / kRows), 8, [&](int64_t begin, int64_t end) {
      for (int64_t i = begin; i < end; ++i) {
        const int64_t block = i / tiles(), tile = i % tiles();
        pack_gradient(dy + block * kRows, own + tile * kPixels, gradient + i * kWords, o);
      }
    });
  }

  // For all output channels, so that the packed input of a tap stays in the cache.
  void multiply_tap(int64_t block_c, int64_t tap, const Sums& sums) const {
    const int64_t shift = grid.shift(tap), next_b = grid.words() * kRows, taps = grid.k * grid.k;
    const uint32_t* b = (shift % 2 == 0 ? even : odd) + shift / 2 * kRows + block_c * next_b;
    const int64_t next_a = tiles() * kWords, blocks = o / kRows, stride = taps * c;
    const bool two_c = (block_c + 1) * kRows < c;
    for (int64_t block = 0; block < blocks; block += 2) {
      const bool two_o = block + 1 < blocks;
      const auto run = two_o ? (two_c ? multiply<true, true> : multiply<true, false>)
                             : (two_c ? multiply<false, true> : multiply<false, false>);
      float* tile = sums.tiles + ((block_c * taps + tap) * blocks + block) * kWords;
      const Place between{tile, 64, kWords, taps * blocks * kWords};
      float* in_all = sums.all + block * kRows * stride + tap * c + block_c * kRows;
      const Place end{in_all, stride * 4, kRows * stride, kRows};
      const Place from = sums.first ? Place{nullptr, 0, 0, 0} : between;
      run(gradient + block * next_a, next_a, b, next_b, next_a, from, sums.last ? end : between);
    }
  }

  void multiply_all(const Sums& sums) const {
    const int64_t pairs = (c / kRows + 1) / 2, taps = grid.k * grid.k;
    at::parallel_for(0, pairs * taps, 1, [&](int64_t begin, int64_t end) {
      const Tiles use;
      for (int64_t i = begin; i < end; ++i) {
        multiply_tap(i / taps * 2, i % taps, sums);
      }
    });
  }
};

bool find_tiles() {
  unsigned a = 0, b = 0, c = 0, d = 0;
  constexpr unsigned kAmxBf16 = 1u << 22, kAmxTile = 1u << 24;
  if (__get_cpuid_count(7, 0, &a, &b, &c, &d) == 0 || (d & kAmxBf16) == 0 || (d & kAmxTile) == 0) {
    return false;
  }
  if (!__builtin_cpu_supports("avx512bw") || !__builtin_cpu_supports("avx512vl")) {
    return false;
  }
  // ARCH_REQ_XCOMP_PERM for the state of the tiles: the system keeps it for those who asked.
  return syscall(SYS_arch_prctl, 0x1023, 18) == 0;
}

} // namespace

bool cm_has_tiles() {
  static const bool has = find_tiles();
  return has;
}

bool cm_fits_tiles(const at::Tensor& x, int64_t out_channels, int64_t k) {
  return cm_has_tiles() && (k == 1 || k == 3) && x.size(1) % kRows == 0 && out_channels % kRows == 0 &&
      x.size(2) * x.size(3) <= kMostPixels && x.is_contiguous(at::MemoryFormat::ChannelsLast);
}

at::Tensor cm_weight_grad(const at::Tensor& x, const at::Tensor& dy, int64_t k) {
  const int64_t n = x.size(0), c = x.size(1), o = dy.size(1), height = x.size(2), width = x.size(3);
  const auto flat = x.options().memory_format(at::MemoryFormat::Contiguous);
  const Grid one{1, height, width, k};
  const int64_t each = one.image() * (2 * c + o) * 2;
  const int64_t images = std::clamp<int64_t>(kPacked / each, 1, n);
  const Grid most{images, height, width, k};
  const int64_t input = most.words() * c, gradient = most.pixels() / kPixels * (o / kRows) * kWords;
  // Tensors begin where a register's worth of bytes does.
  const auto room = at::empty({2 * input + gradient}, flat.dtype(at::kInt));
  const auto tiles = at::empty({images < n ? k * k * o * c : 0}, flat.dtype(at::kFloat));
  auto sum = at::empty({o, k, k, c}, flat.dtype(at::kFloat));
  auto* at = static_cast<uint32_t*>(room.mutable_data_ptr());
  const auto *from = static_cast<const uint16_t*>(x.const_data_ptr()), *grad = static_cast<const uint16_t*>(dy.const_data_ptr());
  for (int64_t first = 0; first < n; first += images) {
    const Grid grid{std::min(images, n - first), height, width, k};
    const Part part{grid, c, o, at, at + input, at + 2 * input};
    part.pack(from + first * height * width * c, grad + first * height * width * o);
    part.multiply_all(
        {tiles.mutable_data_ptr<float>(), sum.mutable_data_ptr<float>(), first == 0, first + images >= n});
  }
  return sum.permute({0, 3, 1, 2});
}

#else

bool cm_has_tiles() {
  return false;
}

bool cm_fits_tiles(const at::Tensor&, int64_t, int64_t) {
  return false;
}

at::Tensor cm_weight_grad(const at::Tensor&, const at::Tensor&, int64_t) {
  TORCH_CHECK(false, "this program was built without the tiles of AMX");
}

#endif
