// Block-sparse attention and its gradients on CPUs, float32. cpu_simd.py compiles it and says what it computes.
//
// One operand of a product is read by rows, the other is packed beforehand into panels of W columns, so that the inner
// loop is a broadcast and fused multiply-adds on registers alone. "Rows" and "columns" are those of the map in use:
// queries and keys, but keys and queries where the gradients of keys and values are computed.

#include <algorithm>
#include <atomic>
#include <cmath>
#include <cstdint>
#include <cstdlib>
#include <limits>
#include <thread>
#include <type_traits>
#include <vector>

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
constexpr int ROWS = 128;        // of a tile: larger blocks are cut
constexpr int COLUMNS = 64;      // of a tile: its operands stay in the first-level cache
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

}  // namespace

extern "C" {

// Strides are counted in elements; a stride of 0 shares what lies there. Channels lie one after the other.
struct Tensor {
  float *data;
  int64_t batch, head, token;
};

// `first`: where each block of a head starts, and the end, in the order `order` (null: as given).
struct Side {
  const int64_t *order, *first;
  int64_t order_batch, order_head, first_batch, first_head, blocks, tokens;
  const uint8_t *valid;  // [batch, tokens]; null: all
};

// `at`: the first panel of every block of columns in its head's `panels`, by the strides of columns.first.
// `q` to `d_out`, `lse` and `shift` [batch, head, token]: inputs. The others: outputs; `d_q`, `d_k`, `d_v` start at 0.
struct Call {
  int64_t batch, heads, channels, threads, tasks, panels;
  Side rows, columns;
  const int64_t *start, *task, *at;
  const int32_t *list;
  int64_t map_batch, map_head;
  float scale;
  Tensor q, k, v, d_out, lse, shift, out, d_q, d_k, d_v;
};
}

namespace {

Vec exp2(Vec x) {
  // 2^(n + f): the low bits of x + 1.5 * 2^23 are n; below 2^-127 it is 0, NaN stays NaN.
  const Vec magic = all(12582912.f);
  x = x < -127.f ? all(-127.f) : x;
  const Vec whole = x + magic, f = x - (whole - magic);
  Vec p = f * 1.5403530e-4f + 1.3333558e-3f;
  p = p * f + 9.6181291e-3f;
  p = p * f + 5.5504109e-2f;
  p = p * f + 2.4022651e-1f;
  p = p * f + 6.9314718e-1f;
  p = p * f + 1.0f;
  return (Vec)((Ints)p + ((Ints)whole << 23));
}

float largest(Vec x) {
  alignas(64) float lane[W];
  *(Vec *)lane = x;
  UNROLL for (int half = W / 2; half; half /= 2)
    UNROLL for (int i = 0; i < half; i++) lane[i] = lane[i + half] > lane[i] ? lane[i + half] : lane[i];
  return lane[0];
}

// c [R, N vectors] = or += a [R, depth] b; row d of vector n of b lies at b + d * b_row + n * b_next.
template <int R, int N, bool ADD>
inline void multiply(const float *a, int64_t a_row, const float *b, int64_t b_row, int64_t b_next, int64_t depth,
                     float *c, int64_t c_row) {
  Vec sum[R][N];
  UNROLL for (int r = 0; r < R; r++)
    UNROLL for (int n = 0; n < N; n++) sum[r][n] = ADD ? load(c + r * c_row + n * W) : Vec{};
  for (int64_t d = 0; d < depth; d++) {
    Vec right[N];
    UNROLL for (int n = 0; n < N; n++) right[n] = load(b + d * b_row + n * b_next);
    UNROLL for (int r = 0; r < R; r++) {
      const Vec left = all(a[r * a_row + d]);
      UNROLL for (int n = 0; n < N; n++) sum[r][n] += left * right[n];
    }
  }
  UNROLL for (int r = 0; r < R; r++) UNROLL for (int n = 0; n < N; n++) store(c + r * c_row + n * W, sum[r][n]);
}

template <int R, bool ADD>
void product(const float *a, int64_t a_row, const float *b, int64_t b_row, int64_t b_next, int64_t depth, float *c,
             int64_t c_row, int64_t vectors) {
  int64_t n = 0;
  for (; n + 2 <= vectors; n += 2)
    multiply<R, 2, ADD>(a, a_row, b + n * b_next, b_row, b_next, depth, c + n * W, c_row);
  if (n < vectors) multiply<R, 1, ADD>(a, a_row, b + n * b_next, b_row, b_next, depth, c + n * W, c_row);
}

// Numbers that nothing has been written to. Vectors that cross a cache line take twice as long to read.
class Buffer {
 public:
  Buffer() = default;
  Buffer(const Buffer &) = delete;
  ~Buffer() { std::free(data_); }
  float *need(int64_t count) {
    if (count > held_) {
      std::free(data_);
      data_ = static_cast<float *>(std::aligned_alloc(64, up(count * sizeof(float), 64)));
      held_ = data_ ? count : 0;
      if (!data_) std::abort();
    }
    return data_;
  }
  float *operator+(int64_t at) const { return data_ + at; }
  float &operator[](int64_t at) const { return data_[at]; }

 private:
  float *data_ = nullptr;
  int64_t held_ = 0;
};

// The columns of all heads: `panels` [panel, channel, W] and `rows` [token, wide] of up to two tensors, vectors of
// numbers per token, and how many tokens each block has. What a call does not use stays empty.
struct Packed {
  Buffer panels[2], rows[2], numbers[2];
  std::vector<int64_t> count;
};

int64_t wide(const Call &c) { return up(c.channels, W); }

const float *row(const Tensor &x, int64_t batch, int64_t head, int64_t token) {
  return x.data + batch * x.batch + head * x.head + token * x.token;
}

// The tokens of positions `from` to `to` of a head's side, those that are not valid left out.
int64_t tokens(const Side &s, int64_t batch, int64_t head, int64_t from, int64_t to, int64_t *into) {
  const int64_t *order = s.order ? s.order + batch * s.order_batch + head * s.order_head : nullptr;
  int64_t count = 0;
  for (int64_t i = from; i < to; i++) {
    const int64_t token = order ? order[i] : i;
    if (!s.valid || s.valid[batch * s.tokens + token]) into[count++] = token;
  }
  return count;
}

const int64_t *first(const Side &s, int64_t batch, int64_t head) {
  return s.first + batch * s.first_batch + head * s.first_head;
}

void pack(const Call &c, Packed &into, const Tensor *const (&panels)[2], const Tensor *const (&rows)[2],
          const Tensor *const (&numbers)[2], int64_t item, std::vector<int64_t> &token) {
  const int64_t block = item % c.columns.blocks, unit = item / c.columns.blocks;
  const int64_t batch = unit / c.heads, head = unit % c.heads, width = wide(c);
  const int64_t *bounds = first(c.columns, batch, head);
  token.resize(std::max<int64_t>(1, bounds[block + 1] - bounds[block]));
  const int64_t count = tokens(c.columns, batch, head, bounds[block], bounds[block + 1], token.data());
  const int64_t *at = c.at + batch * c.columns.first_batch + head * c.columns.first_head;
  const int64_t slot = (unit * c.panels + at[block]) * W;
  into.count[item] = count;
  for (int64_t i = 0; i < up(count, W); i++) {
    for (int n = 0; n < 2; n++) {
      if (panels[n]) {
        const float *from = i < count ? row(*panels[n], batch, head, token[i]) : nullptr;
        float *to = into.panels[n] + ((slot + i) / W * W * c.channels + i % W);
        for (int64_t d = 0; d < c.channels; d++) to[d * W] = from ? from[d] : 0;
      }
      if (rows[n] && i < count) {
        const float *from = row(*rows[n], batch, head, token[i]);
        float *to = into.rows[n] + (slot + i) * width;
        std::fill(std::copy(from, from + c.channels, to), to + width, 0.f);
      }
      if (numbers[n]) into.numbers[n][slot + i] = i < count ? *row(*numbers[n], batch, head, token[i]) : 0;
    }
  }
}

// What a thread computes with: a tile's rows (two operands, two results), numbers per row, scores of a strip.
struct Scratch {
  std::vector<int64_t> token;
  Buffer left[2], sum[2], number[2];
  std::vector<Vec> total;
  alignas(64) float scores[2][STRIP * COLUMNS];
};

void zeros(Buffer &x, int64_t count) { std::fill_n(x.need(count), count, 0.f); }

void gather(const Call &c, const Tensor &from, int64_t batch, int64_t head, const std::vector<int64_t> &token,
            int64_t count, float factor, Buffer &into) {
  zeros(into, up(count, PART) * c.channels);
  for (int64_t r = 0; r < count; r++) {
    const float *x = row(from, batch, head, token[r]);
    for (int64_t d = 0; d < c.channels; d++) into[r * c.channels + d] = x[d] * factor;
  }
}

void scatter(const Call &c, const Tensor &to, int64_t batch, int64_t head, const std::vector<int64_t> &token,
             int64_t count, float factor, const Buffer &sum) {
  for (int64_t r = 0; r < count; r++) {
    float *x = const_cast<float *>(row(to, batch, head, token[r]));
    for (int64_t d = 0; d < c.channels; d++) x[d] = sum[r * wide(c) + d] * factor;
  }
}

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

// Tiles of the columns that block `block` of a head's rows sees: `body(first slot, how many)`.
template <class Body>
void columns(const Call &c, const Packed &packed, int64_t unit, int64_t block, Body body) {
  const int64_t batch = unit / c.heads, head = unit % c.heads;
  const int64_t *bounds = c.start + (batch * c.map_batch + head * c.map_head) * c.rows.blocks + block;
  const int64_t *at = c.at + batch * c.columns.first_batch + head * c.columns.first_head;
  for (int64_t i = bounds[0]; i < bounds[1]; i++) {
    const int64_t other = c.list[i], count = packed.count[unit * c.columns.blocks + other];
    for (int64_t from = 0; from < count; from += COLUMNS)
      body((unit * c.panels + at[other]) * W + from, std::min<int64_t>(COLUMNS, count - from));
  }
}

// Scores of a strip to weights, by the largest score of each row so far; sums so far are shrunk where that grows.
template <int R>
void weigh(float *scores, int64_t count, float *top, Vec *total, float *sum, int64_t width) {
  const int64_t vectors = over(count, W);
  for (int r = 0; r < R; r++) {
    float *s = scores + r * COLUMNS;
    std::fill(s + count, s + vectors * W, -INF);
    Vec most = load(s);
    for (int64_t n = 1; n < vectors; n++) most = load(s + n * W) > most ? load(s + n * W) : most;
    const float now = largest(most);
    if (now > top[r]) {
      const float shrink = std::exp2(top[r] - now);
      for (int64_t d = 0; d < width; d += W) store(sum + r * width + d, load(sum + r * width + d) * shrink);
      total[r] *= shrink;
      top[r] = now;
    }
    Vec added = total[r];
    for (int64_t n = 0; n < vectors; n++) {
      const Vec p = exp2(load(s + n * W) - top[r]);
      store(s + n * W, p);
      added += p;
    }
    total[r] = added;
  }
}

// Output and LSE of a tile of queries; see the file's Python side for the formulas.
void attend(const Call &c, const Packed &keys, Scratch &x, int64_t unit, int64_t block, int64_t count) {
  const int64_t batch = unit / c.heads, head = unit % c.heads, width = wide(c), D = c.channels;
  gather(c, c.q, batch, head, x.token, count, c.scale * LOG2_E, x.left[0]);
  zeros(x.sum[0], up(count, PART) * width);
  std::fill_n(x.number[0].need(up(count, PART)), up(count, PART), -INF);
  x.total.assign(up(count, PART), Vec{});
  columns(c, keys, unit, block, [&](int64_t slot, int64_t seen) {
    strips(count, [&](auto size, int64_t r) {
      constexpr int R = decltype(size)::value;
      float *scores = x.scores[0], *sum = x.sum[0] + r * width;
      product<R, false>(x.left[0] + r * D, D, keys.panels[0] + slot * D, W, W * D, D, scores, COLUMNS, over(seen, W));
      weigh<R>(scores, seen, x.number[0] + r, &x.total[r], sum, width);
      product<R, true>(scores, COLUMNS, keys.rows[0] + slot * width, width, W, seen, sum, width, width / W);
    });
  });
  for (int64_t r = 0; r < count; r++) {
    float total = 0;
    for (int w = 0; w < W; w++) total += x.total[r][w];
    const float factor = total == 0 ? 0 : 1 / total;  // 0: it sees nothing
    for (int64_t d = 0; d < width; d++) x.sum[0][r * width + d] *= factor;
    *const_cast<float *>(row(c.lse, batch, head, x.token[r])) =
        total == 0 ? -INF : (x.number[0][r] + std::log2(total)) * LN_2;
  }
  scatter(c, c.out, batch, head, x.token, count, 1, x.sum[0]);
}

// p = 2^(s - lse) and dS = p (dP - shift) of a strip, in place of s and dP; lse and shift by row or by column.
template <int R, bool BY_COLUMN>
void differentiate(float *s, float *dp, int64_t count, const float *lse, const float *shift) {
  for (int r = 0; r < R; r++)
    for (int64_t n = 0; n < over(count, W); n++) {
      float *at = s + r * COLUMNS + n * W, *d_at = dp + r * COLUMNS + n * W;
      const Vec p = exp2(load(at) - LOG2_E * (BY_COLUMN ? load(lse + n * W) : all(lse[r])));
      store(at, p);
      store(d_at, p * (load(d_at) - (BY_COLUMN ? load(shift + n * W) : all(shift[r]))));
    }
}

// Gradients of a tile: of queries (rows are queries), or of keys and values (rows are keys).
template <bool KEYS>
void gradients(const Call &c, const Packed &other, Scratch &x, int64_t unit, int64_t block, int64_t count) {
  const int64_t batch = unit / c.heads, head = unit % c.heads, width = wide(c), D = c.channels;
  gather(c, KEYS ? c.k : c.q, batch, head, x.token, count, c.scale * LOG2_E, x.left[0]);
  gather(c, KEYS ? c.v : c.d_out, batch, head, x.token, count, 1, x.left[1]);
  for (int n = 0; n < 2; n++) {
    zeros(x.sum[n], up(count, PART) * width);
    zeros(x.number[n], up(count, PART));
    for (int64_t r = 0; r < count && !KEYS; r++) x.number[n][r] = *row(n ? c.shift : c.lse, batch, head, x.token[r]);
  }
  columns(c, other, unit, block, [&](int64_t slot, int64_t seen) {
    strips(count, [&](auto size, int64_t r) {
      constexpr int R = decltype(size)::value;
      const int64_t vectors = over(seen, W);
      for (int n = 0; n < 2; n++)
        product<R, false>(x.left[n] + r * D, D, other.panels[n] + slot * D, W, W * D, D, x.scores[n], COLUMNS, vectors);
      const float *lse = KEYS ? other.numbers[0] + slot : x.number[0] + r;
      const float *shift = KEYS ? other.numbers[1] + slot : x.number[1] + r;
      differentiate<R, KEYS>(x.scores[0], x.scores[1], seen, lse, shift);
      for (int n = 0; n < 1 + KEYS; n++)
        product<R, true>(x.scores[1 - n], COLUMNS, other.rows[n] + slot * width, width, W, seen, x.sum[n] + r * width,
                         width, width / W);
    });
  });
  scatter(c, KEYS ? c.d_k : c.d_q, batch, head, x.token, count, c.scale, x.sum[0]);
  if (KEYS) scatter(c, c.d_v, batch, head, x.token, count, 1, x.sum[1]);
}

// Each of `count` items once, by whichever thread comes first; all are done when this returns on any thread.
struct Shared {
  std::atomic<int64_t> next{0}, done{0};
  template <class Body>
  void each(int64_t count, Body body) {
    for (int64_t i; (i = next++) < count; done++) body(i);
    while (done < count) std::this_thread::yield();
  }
};

using Tile = void (*)(const Call &, const Packed &, Scratch &, int64_t unit, int64_t block, int64_t count);

// Pack the columns, then run `tile` on every tile of rows, the longest lists first.
void run(const Call &c, Tile tile, const Tensor *const (&panels)[2], const Tensor *const (&rows)[2],
         const Tensor *const (&numbers)[2]) {
  const int64_t slots = c.batch * c.heads * c.panels * W, items = c.batch * c.heads * c.columns.blocks;
  Packed packed;
  packed.count.resize(items);
  for (int n = 0; n < 2; n++) {
    if (panels[n]) packed.panels[n].need(slots * c.channels);
    if (rows[n]) packed.rows[n].need(slots * wide(c));
    if (numbers[n]) packed.numbers[n].need(slots);
  }
  Shared packing, computing;
  auto work = [&] {
    Scratch x;
    packing.each(items, [&](int64_t item) { pack(c, packed, panels, rows, numbers, item, x.token); });
    computing.each(c.tasks, [&](int64_t i) {
      const int64_t block = c.task[i] % c.rows.blocks, unit = c.task[i] / c.rows.blocks;
      const int64_t batch = unit / c.heads, head = unit % c.heads;
      const int64_t *bounds = first(c.rows, batch, head);
      x.token.resize(ROWS);
      for (int64_t from = bounds[block]; from < bounds[block + 1]; from += ROWS) {
        const int64_t to = std::min(from + ROWS, bounds[block + 1]);
        if (const int64_t count = tokens(c.rows, batch, head, from, to, x.token.data()))
          tile(c, packed, x, unit, block, count);
      }
    });
  };
  std::vector<std::thread> others;
  for (int64_t t = 1; t < c.threads; t++) others.emplace_back(work);
  work();
  for (auto &other : others) other.join();
}

}  // namespace

extern "C" {

int64_t falloff_width() { return W; }

void falloff_forward(const Call *c) { run(*c, attend, {&c->k, nullptr}, {&c->v, nullptr}, {nullptr, nullptr}); }

void falloff_d_queries(const Call *c) {
  run(*c, gradients<false>, {&c->k, &c->v}, {&c->k, nullptr}, {nullptr, nullptr});
}

void falloff_d_keys_values(const Call *c) {
  run(*c, gradients<true>, {&c->q, &c->d_out}, {&c->q, &c->d_out}, {&c->lse, &c->shift});
}
}
