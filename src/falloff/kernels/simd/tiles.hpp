// Products of tiles by AMX, whose operands are bfloat16 and whose sums are float32.
//
// A number is the sum of P bfloat16 parts of falling size, and a product leaves out that of the two smallest (Henry, Tang
// and Heinecke, 2019, "Leveraging the bfloat16 artificial intelligence datatype for higher-precision computations"): one
// part is a bfloat16 itself, two hold any float16. Three, which hold a float32, were no faster than vectors of float32.

#pragma once

#include <immintrin.h>

#include <cstdint>
#include <cstring>

#include "products.hpp"

namespace {

using Part = uint16_t;        // a bfloat16
constexpr int SIDE = 16;      // rows of a tile, and float32 columns of one that is summed up
constexpr int DEEP = 32;      // what a product of two tiles sums over
constexpr int TILE = 512;     // bfloat16 numbers of a tile, which lie together

// Where the tiles of an operand lie, in bfloat16 numbers: `next` those beside it, `part` those of the smaller parts,
// `deep` those that are summed over. A left operand's tile holds 16 rows of 32 numbers, a right one's 16 pairs of rows,
// their numbers in turns.
struct Tiles {
  const Part *data;
  int64_t next, part, deep;
};

// A palette's number, 15 bytes of nothing, the bytes in a row of every tile, and its rows.
alignas(64) const struct {
  uint8_t palette = 1, kept[15] = {};
  uint16_t bytes[16] = {64, 64, 64, 64, 64, 64, 64, 64};
  uint8_t rows[16] = {16, 16, 16, 16, 16, 16, 16, 16};
} PALETTE;

// The tiles of this thread in this shape while it lives, then as others left it. The compiler takes what is loaded and
// stored for eight bytes, so that neither may be set just before.
class Shaped {
 public:
  Shaped() {
    _tile_storeconfig(before_);
    _tile_loadconfig(&PALETTE);
  }
  ~Shaped() {
    if (before_[0]) _tile_loadconfig(before_);
    else _tile_release();
  }
  Shaped(const Shaped &) = delete;

 private:
  alignas(64) uint8_t before_[64];
};

// c [M, N tiles] = or += a b over `depth` tiles. `c` is float32: its lines, tiles below and tiles to the right lie
// `line`, `down` and `right` apart.
template <int P, int M, int N>
inline void multiply(Tiles a, Tiles b, int64_t depth, float *c, int64_t line, int64_t down, int64_t right, bool add) {
  const int64_t bytes = line * sizeof(float);
  if (add) {
    _tile_loadd(0, c, bytes);
    if constexpr (N > 1) _tile_loadd(1, c + right, bytes);
    if constexpr (M > 1) _tile_loadd(2, c + down, bytes);
    if constexpr (M > 1 && N > 1) _tile_loadd(3, c + down + right, bytes);
  } else {
    _tile_zero(0);
    if constexpr (N > 1) _tile_zero(1);
    if constexpr (M > 1) _tile_zero(2);
    if constexpr (M > 1 && N > 1) _tile_zero(3);
  }
  for (int64_t k = 0; k < depth; k++) {
    UNROLL for (int i = 0; i < P; i++) {
      const Part *left = a.data + k * a.deep + i * a.part;
      _tile_loadd(4, left, 64);
      if constexpr (M > 1) _tile_loadd(5, left + a.next, 64);
      UNROLL for (int j = 0; j < P - i; j++) {
        const Part *other = b.data + k * b.deep + j * b.part;
        _tile_loadd(6, other, 64);
        if constexpr (N > 1) _tile_loadd(7, other + b.next, 64);
        _tile_dpbf16ps(0, 4, 6);
        if constexpr (M > 1) _tile_dpbf16ps(2, 5, 6);
        if constexpr (N > 1) _tile_dpbf16ps(1, 4, 7);
        if constexpr (M > 1 && N > 1) _tile_dpbf16ps(3, 5, 7);
      }
    }
  }
  _tile_stored(0, c, bytes);
  if constexpr (N > 1) _tile_stored(1, c + right, bytes);
  if constexpr (M > 1) _tile_stored(2, c + down, bytes);
  if constexpr (M > 1 && N > 1) _tile_stored(3, c + down + right, bytes);
}

// The same with `columns` tiles to the right.
template <int P, int M>
inline void product(Tiles a, Tiles b, int64_t depth, float *c, int64_t line, int64_t down, int64_t right,
                    int64_t columns, bool add) {
  for (int64_t n = 0; n < columns; n += 2, b.data += 2 * b.next, c += 2 * right) {
    if (n + 1 < columns) multiply<P, M, 2>(a, b, depth, c, line, down, right, add);
    else multiply<P, M, 1>(a, b, depth, c, line, down, right, add);
  }
}

// Where number `n` of 32 lies in the row of a left operand, in which a right operand's pairs of rows must match it.
template <int P>
constexpr int64_t place(int64_t n) { return P == 1 ? n : n % SIDE * 2 + n / SIDE; }

// Sixteen numbers as P parts: of each its first bits, of which a bfloat16 has eight. One part alone is rounded.
template <int P>
inline void split(__m512 x, __m512i (&part)[P]) {
  const __m512i high = _mm512_set1_epi32(int32_t(0xffff0000));
  if constexpr (P == 1) {
    part[0] = _mm512_slli_epi32(_mm512_cvtepu16_epi32((__m256i)_mm512_cvtneps_pbh(x)), 16);
    return;
  }
  UNROLL for (int p = 0; p < P; p++) {
    part[p] = _mm512_and_si512((__m512i)x, high);
    x = _mm512_sub_ps(x, (__m512)part[p]);
  }
}

// A right operand's pair of rows of 16 numbers, to every part's tile; parts lie `apart`.
template <int P>
inline void put_right(__m512 even, __m512 odd, Part *to, int64_t apart) {
  __m512i a[P], b[P];
  split<P>(even, a), split<P>(odd, b);
  UNROLL for (int p = 0; p < P; p++) _mm512_storeu_si512(to + p * apart, _mm512_or_si512(_mm512_srli_epi32(a[p], 16), b[p]));
}

// A left operand's row of 32 numbers.
template <int P>
inline void put_left(__m512 low, __m512 high, Part *to, int64_t apart) {
  if constexpr (P == 1) _mm512_storeu_si512(to, (__m512i)_mm512_cvtne2ps_pbh(high, low));
  else put_right<P>(low, high, to, apart);
}

// The left operand's tile `from`, rows as columns: the right operand's.
inline void turn(const Part *from, Part *to) {
  const int32_t *x = reinterpret_cast<const int32_t *>(from);
  int32_t *y = reinterpret_cast<int32_t *>(to);
  for (int i = 0; i < SIDE; i++)
    for (int j = 0; j < SIDE; j++) y[i * SIDE + j] = x[j * SIDE + i];
}

// 2^x, as exact as numbers of P parts can tell.
template <int P>
inline Vec power(Vec x) {
  if constexpr (P > 1) return exp2(x);
  const Vec magic = all(12582912.f);  // as in exp2
  x = larger(all(-127.f), x);
  const Vec whole = x + magic, f = x - (whole - magic);
  Vec p = f * 9.5828529e-3f + 5.5906426e-2f;
  p = p * f + 2.4024099e-1f;
  p = p * f + 6.9312418e-1f;
  p = p * f + 1.0f;
  return (Vec)((Ints)p + ((Ints)whole << 23));
}

// Sixteen numbers of a row of `count`, zeros behind its end.
inline __m512 some(const float *from, int64_t count) {
  if (count >= SIDE) return _mm512_loadu_ps(from);
  return _mm512_maskz_loadu_ps(count > 0 ? __mmask16((1u << count) - 1) : __mmask16(0), from);
}

}  // namespace
