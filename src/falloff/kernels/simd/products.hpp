// Vectors and products of float32 on any CPU, by the vector types of GCC and Clang.

#pragma once

#include <algorithm>
#include <cstdint>
#include <cstdlib>
#include <limits>
#include <type_traits>

#if defined(__AVX512F__)
#include <immintrin.h>
#endif

namespace {

// W floats in a vector. A strip is as many rows as have their sums in registers, two vectors each.
#if defined(__AVX512F__)
constexpr int W = 16, STRIP = 12;
#elif defined(__AVX2__)
constexpr int W = 8, STRIP = 6;
#elif defined(__aarch64__)
constexpr int W = 4, STRIP = 12;
#else
constexpr int W = 4, STRIP = 6;
#endif
constexpr int PART = STRIP / 3;  // rows are padded to a multiple of this
constexpr float INF = std::numeric_limits<float>::infinity();
constexpr float LOG2_E = 1.4426950408889634f, LN_2 = 0.6931471805599453f;

typedef float Vec __attribute__((vector_size(W * sizeof(float))));
typedef int32_t Ints __attribute__((vector_size(W * sizeof(float))));
typedef float Loose __attribute__((vector_size(W * sizeof(float)), aligned(sizeof(float))));

#define UNROLL _Pragma("GCC unroll 16")

inline Vec load(const float *p) { return *(const Loose *)p; }
inline void store(float *p, Vec x) { *(Loose *)p = x; }
inline Vec all(float x) { return x - Vec{}; }
inline int64_t over(int64_t x, int64_t unit) { return (x + unit - 1) / unit; }
inline int64_t up(int64_t x, int64_t unit) { return over(x, unit) * unit; }

// Of each two numbers the larger; NaN where `b` is NaN.
inline Vec larger(Vec a, Vec b) {
#if defined(__AVX512F__)
  return (Vec)_mm512_max_ps((__m512)a, (__m512)b);
#else
  return a > b ? a : b;
#endif
}

inline float largest(Vec x) {
  alignas(64) float lane[W];
  *(Vec *)lane = x;
  UNROLL for (int half = W / 2; half; half /= 2)
    UNROLL for (int i = 0; i < half; i++) lane[i] = lane[i + half] > lane[i] ? lane[i + half] : lane[i];
  return lane[0];
}

inline bool any_above(Vec a, float bound) {
#if defined(__AVX512F__)
  return _mm512_cmp_ps_mask((__m512)a, (__m512)all(bound), _CMP_GT_OQ);
#else
  return largest(a) > bound;
#endif
}

inline Vec exp2(Vec x) {
  // 2^(n + f): the low bits of x + 1.5 * 2^23 are n; below 2^-127 it is 0, NaN stays NaN.
  const Vec magic = all(12582912.f);
  x = larger(all(-127.f), x);
  const Vec whole = x + magic, f = x - (whole - magic);
  Vec p = f * 1.5403530e-4f + 1.3333558e-3f;
  p = p * f + 9.6181291e-3f;
  p = p * f + 5.5504109e-2f;
  p = p * f + 2.4022651e-1f;
  p = p * f + 6.9314718e-1f;
  p = p * f + 1.0f;
  return (Vec)((Ints)p + ((Ints)whole << 23));
}

// An operand that is read number by number, and one read by vectors: row d of vector n lies at d * row + n * next.
struct Left {
  const float *data;
  int64_t row, step;
};
struct Right {
  const float *data;
  int64_t row, next;
};

// sum [R, N vectors] += a [R, depth] b, whose vectors lie at `right`, their rows `row` apart.
template <int R, int N>
inline void add_products(Left a, const float *const (&right)[N], int64_t row, int64_t depth, Vec (&sum)[R][N]) {
  for (int64_t d = 0; d < depth; d++) {
    Vec b[N];
    UNROLL for (int n = 0; n < N; n++) b[n] = load(right[n] + d * row);
    UNROLL for (int r = 0; r < R; r++) {
      const Vec left = all(a.data[r * a.row + d * a.step]);
      UNROLL for (int n = 0; n < N; n++) sum[r][n] += left * b[n];
    }
  }
}

// c [R, N vectors] = or += a [R, depth] b.
template <int R, int N, bool ADD>
inline void multiply(Left a, Right b, int64_t depth, float *c, int64_t c_row) {
  Vec sum[R][N];
  const float *right[N];
  UNROLL for (int n = 0; n < N; n++) right[n] = b.data + n * b.next;
  UNROLL for (int r = 0; r < R; r++)
    UNROLL for (int n = 0; n < N; n++) sum[r][n] = ADD ? load(c + r * c_row + n * W) : Vec{};
  add_products(a, right, b.row, depth, sum);
  UNROLL for (int r = 0; r < R; r++) UNROLL for (int n = 0; n < N; n++) store(c + r * c_row + n * W, sum[r][n]);
}

template <int R, bool ADD>
void product(Left a, Right b, int64_t depth, float *c, int64_t c_row, int64_t vectors) {
  int64_t n = 0;
  for (; n + 2 <= vectors; n += 2) multiply<R, 2, ADD>(a, {b.data + n * b.next, b.row, b.next}, depth, c + n * W, c_row);
  if (n < vectors) multiply<R, 1, ADD>(a, {b.data + n * b.next, b.row, b.next}, depth, c + n * W, c_row);
}

// Numbers that nothing has been written to. Vectors that cross a cache line take twice as long to read.
template <class T>
class Numbers {
 public:
  Numbers() = default;
  Numbers(const Numbers &) = delete;
  ~Numbers() { std::free(data_); }
  T *need(int64_t count) {
    if (count > held_) {
      std::free(data_);
      data_ = static_cast<T *>(std::aligned_alloc(64, up(count * sizeof(T), 64)));
      held_ = data_ ? count : 0;
      if (!data_) std::abort();
    }
    return data_;
  }
  T *operator+(int64_t at) const { return data_ + at; }
  T &operator[](int64_t at) const { return data_[at]; }

 private:
  T *data_ = nullptr;
  int64_t held_ = 0;
};
using Buffer = Numbers<float>;

// Strips of a tile's rows: `body(strip size, first row)`.
template <class Body>
void strips(int64_t count, Body body) {
  const int64_t padded = up(count, PART);
  for (int64_t r = 0; r < padded;) {
    const int64_t left = padded - r;
    if (left >= STRIP) body(std::integral_constant<int, STRIP>{}, r), r += STRIP;
    else if (left >= 2 * PART) body(std::integral_constant<int, 2 * PART>{}, r), r += 2 * PART;
    else body(std::integral_constant<int, PART>{}, r), r += PART;
  }
}

}  // namespace
