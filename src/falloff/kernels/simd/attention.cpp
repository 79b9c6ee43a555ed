// Block-sparse attention and its gradients on CPUs, float32. cpu_simd.py compiles it and says what it computes.
//
// One operand of a product is read by rows, the other is packed beforehand into panels of W columns, so that the inner
// loop is a broadcast and fused multiply-adds on registers alone. "Rows" and "columns" are those of the map in use:
// queries and keys, but keys and queries where the gradients of keys and values are computed.

#include <algorithm>
#include <cmath>
#include <cstdint>
#include <vector>

#include "products.hpp"
#include "threads.hpp"

namespace {

constexpr int ROWS = 128;        // of a tile: larger blocks are cut
constexpr int COLUMNS = 64;      // of a tile: its operands stay in the first-level cache
constexpr float LOG2_E = 1.4426950408889634f, LN_2 = 0.6931471805599453f;

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
  int64_t batch, heads, channels, threads, tasks, panels;  // tasks: of the forward
  Side rows, columns;
  const int64_t *start, *task, *at;
  const int32_t *list;
  int64_t map_batch, map_head;
  float scale, skip;  // skip below 0: leave out nothing
  int64_t protect;
  Tensor q, k, v, d_out, lse, shift, out, d_q, d_k, d_v;
};
}

namespace {

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

const int64_t *panels_of(const Call &c, int64_t batch, int64_t head) {
  return c.at + batch * c.columns.first_batch + head * c.columns.first_head;
}

void pack(const Call &c, Packed &into, const Tensor *const (&panels)[2], const Tensor *const (&rows)[2],
          const Tensor *const (&numbers)[2], int64_t item, std::vector<int64_t> &token) {
  const int64_t block = item % c.columns.blocks, unit = item / c.columns.blocks;
  const int64_t batch = unit / c.heads, head = unit % c.heads, width = wide(c);
  const int64_t *bounds = first(c.columns, batch, head);
  token.resize(std::max<int64_t>(1, bounds[block + 1] - bounds[block]));
  const int64_t count = tokens(c.columns, batch, head, bounds[block], bounds[block + 1], token.data());
  const int64_t *at = panels_of(c, batch, head);
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

// What a thread computes with: a tile's rows (operands, sums), scores of a strip, and gradients of a tile's scores.
struct Scratch {
  std::vector<int64_t> token;
  Buffer left[2], sum[2], top, keys, held;
  std::vector<Vec> total;
  alignas(64) float scores[2][STRIP * COLUMNS], slopes[ROWS * COLUMNS];
};

void zeros(Buffer &x, int64_t count) { std::fill_n(x.need(count), count, 0.f); }

// Rows of `width` numbers, at least as many as there are channels, up to a whole number of strips.
void gather(const Call &c, const Tensor &from, int64_t batch, int64_t head, const std::vector<int64_t> &token,
            int64_t count, int64_t width, float factor, Buffer &into) {
  zeros(into, up(count, PART) * width);
  for (int64_t r = 0; r < count; r++) {
    const float *x = row(from, batch, head, token[r]);
    for (int64_t d = 0; d < c.channels; d++) into[r * width + d] = x[d] * factor;
  }
}

void scatter(const Call &c, const Tensor &to, int64_t batch, int64_t head, const std::vector<int64_t> &token,
             int64_t count, float factor, const float *sum) {
  for (int64_t r = 0; r < count; r++) {
    float *x = const_cast<float *>(row(to, batch, head, token[r]));
    for (int64_t d = 0; d < c.channels; d++) x[d] = sum[r * wide(c) + d] * factor;
  }
}

// Blocks of columns that block `block` of a head's rows sees: `body(first slot, how many, blocks that follow)`.
template <class Body>
void listed(const Call &c, const Packed &packed, int64_t unit, int64_t block, Body body) {
  const int64_t batch = unit / c.heads, head = unit % c.heads;
  const int64_t *bounds = c.start + (batch * c.map_batch + head * c.map_head) * c.rows.blocks + block;
  const int64_t *at = panels_of(c, batch, head);
  for (int64_t i = bounds[0]; i < bounds[1]; i++) {
    const int64_t other = c.list[i], count = packed.count[unit * c.columns.blocks + other];
    body((unit * c.panels + at[other]) * W, count, bounds[1] - i - 1);
  }
}

// Tiles of a block: `body(offset, how many)`.
template <class Body>
void parts(int64_t count, Body body) {
  for (int64_t from = 0; from < count; from += COLUMNS) body(from, std::min<int64_t>(COLUMNS, count - from));
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

// Whether no weight of a block would exceed 2^-skip of the largest so far; `scores` of its tiles, one after the other.
bool too_late(const Call &c, const Scratch &x, const float *scores, int64_t count, int64_t seen) {
  for (int64_t r = 0; r < count; r++) {
    float most = -INF;
    bool nan = false;
    parts(seen, [&](int64_t from, int64_t n) {
      const float *s = scores + from * ROWS + r * COLUMNS;
      for (int64_t i = 0; i < n; i++) nan |= s[i] != s[i], most = s[i] > most ? s[i] : most;
    });
    if (nan || (most > -INF && !(most - x.top[r] + c.skip <= 0))) return false;
  }
  return true;
}

// Output and LSE of a tile of queries; see the Python side for the formulas.
void attend(const Call &c, const Packed &keys, Scratch &x, int64_t unit, int64_t block, int64_t count) {
  const int64_t batch = unit / c.heads, head = unit % c.heads, width = wide(c), D = c.channels;
  gather(c, c.q, batch, head, x.token, count, D, c.scale * LOG2_E, x.left[0]);
  zeros(x.sum[0], up(count, PART) * width);
  std::fill_n(x.top.need(up(count, PART)), up(count, PART), -INF);
  x.total.assign(up(count, PART), Vec{});
  const auto score = [&](auto size, int64_t r, int64_t slot, int64_t seen, float *into) {
    const Right k{keys.panels[0] + slot * D, W, W * D};
    product<decltype(size)::value, false>({x.left[0] + r * D, D, 1}, k, D, into, COLUMNS, over(seen, W));
  };
  const auto take = [&](auto size, int64_t r, int64_t slot, int64_t seen, float *scores) {
    constexpr int R = decltype(size)::value;
    float *sum = x.sum[0] + r * width;
    weigh<R>(scores, seen, x.top + r, &x.total[r], sum, width);
    product<R, true>({scores, COLUMNS, 1}, {keys.rows[0] + slot * width, width, W}, seen, sum, width, width / W);
  };
  listed(c, keys, unit, block, [&](int64_t slot, int64_t all, int64_t later) {
    float *held = nullptr;  // scores of a whole block that may be left out
    if (c.skip >= 0 && later >= c.protect) {
      held = x.held.need(up(all, COLUMNS) * ROWS);
      parts(all, [&](int64_t from, int64_t seen) {
        strips(count, [&](auto size, int64_t r) { score(size, r, slot + from, seen, held + from * ROWS + r * COLUMNS); });
      });
      if (too_late(c, x, held, count, all)) return;
    }
    parts(all, [&](int64_t from, int64_t seen) {
      strips(count, [&](auto size, int64_t r) {
        float *scores = held ? held + from * ROWS + r * COLUMNS : x.scores[0];
        if (!held) score(size, r, slot + from, seen, scores);
        take(size, r, slot + from, seen, scores);
      });
    });
  });
  for (int64_t r = 0; r < count; r++) {
    float total = 0;
    for (int w = 0; w < W; w++) total += x.total[r][w];
    const float factor = total == 0 ? 0 : 1 / total;  // 0: it sees nothing
    for (int64_t d = 0; d < width; d++) x.sum[0][r * width + d] *= factor;
    *const_cast<float *>(row(c.lse, batch, head, x.token[r])) =
        total == 0 ? -INF : (x.top[r] + std::log2(total)) * LN_2;
  }
  scatter(c, c.out, batch, head, x.token, count, 1, x.sum[0] + 0);
}

// p = 2^s / 2^lse and dS = p (dP - shift) of a strip of keys, p in place of s.
template <int R>
void differentiate(float *s, const float *dp, int64_t count, const float *lse, const float *shift, float *ds) {
  for (int r = 0; r < R; r++)
    for (int64_t n = 0; n < up(count, W); n += W) {
      const int64_t at = r * COLUMNS + n;
      const Vec p = exp2(load(s + at) - LOG2_E * load(lse + n));
      store(s + at, p);
      store(ds + at, p * (load(dp + at) - load(shift + n)));
    }
}

// Gradients of a tile of keys and values; what it adds to those of its queries goes to `d_q`, by slot.
void differentiate_tile(const Call &c, const Packed &queries, const Buffer &d_q, Scratch &x, int64_t unit, int64_t block,
                        int64_t count) {
  const int64_t batch = unit / c.heads, head = unit % c.heads, width = wide(c), D = c.channels;
  gather(c, c.k, batch, head, x.token, count, D, c.scale * LOG2_E, x.left[0]);
  gather(c, c.v, batch, head, x.token, count, D, 1, x.left[1]);
  gather(c, c.k, batch, head, x.token, count, width, 1, x.keys);
  for (Buffer &sum : x.sum) zeros(sum, up(count, PART) * width);
  const auto tile = [&](int64_t slot, int64_t seen) {
    strips(count, [&](auto size, int64_t r) {
      constexpr int R = decltype(size)::value;
      float *s = x.scores[0], *dp = x.scores[1], *ds = x.slopes + r * COLUMNS;
      for (int n = 0; n < 2; n++)
        product<R, false>({x.left[n] + r * D, D, 1}, {queries.panels[n] + slot * D, W, W * D}, D, x.scores[n], COLUMNS,
                          over(seen, W));
      differentiate<R>(s, dp, seen, queries.numbers[0] + slot, queries.numbers[1] + slot, ds);
      const float *by[2] = {ds, s};
      for (int n = 0; n < 2; n++)
        product<R, true>({by[n], COLUMNS, 1}, {queries.rows[n] + slot * width, width, W}, seen, x.sum[n] + r * width,
                         width, width / W);
    });
    strips(seen, [&](auto size, int64_t r) {
      constexpr int R = decltype(size)::value;
      product<R, true>({x.slopes + r, 1, COLUMNS}, {x.keys + 0, width, W}, count, d_q + (slot + r) * width, width,
                       width / W);
    });
  };
  listed(c, queries, unit, block, [&](int64_t slot, int64_t all, int64_t) {
    parts(all, [&](int64_t from, int64_t seen) { tile(slot + from, seen); });
  });
  scatter(c, c.d_k, batch, head, x.token, count, c.scale, x.sum[0] + 0);
  scatter(c, c.d_v, batch, head, x.token, count, 1, x.sum[1] + 0);
}

// Every tile of a block of rows: `body(how many)`, with its tokens in `x`.
template <class Body>
void tiles(const Call &c, Scratch &x, int64_t unit, int64_t block, Body body) {
  const int64_t batch = unit / c.heads, head = unit % c.heads, *bounds = first(c.rows, batch, head);
  x.token.resize(ROWS);
  for (int64_t from = bounds[block]; from < bounds[block + 1]; from += ROWS) {
    const int64_t to = std::min(from + ROWS, bounds[block + 1]);
    if (const int64_t count = tokens(c.rows, batch, head, from, to, x.token.data())) body(count);
  }
}

// All gradients of one head: by one thread, so that sums have one order.
void differentiate_head(const Call &c, const Packed &queries, Buffer &d_q, Scratch &x, int64_t unit) {
  const int64_t batch = unit / c.heads, head = unit % c.heads, width = wide(c), slots = c.panels * W;
  float *sums = d_q + unit * slots * width;
  std::fill_n(sums, slots * width, 0.f);
  for (int64_t block = 0; block < c.rows.blocks; block++)
    tiles(c, x, unit, block, [&](int64_t n) { differentiate_tile(c, queries, d_q, x, unit, block, n); });
  const int64_t *bounds = first(c.columns, batch, head), *at = panels_of(c, batch, head);
  for (int64_t block = 0; block < c.columns.blocks; block++) {
    x.token.resize(std::max<int64_t>(1, bounds[block + 1] - bounds[block]));
    const int64_t count = tokens(c.columns, batch, head, bounds[block], bounds[block + 1], x.token.data());
    scatter(c, c.d_q, batch, head, x.token, count, c.scale, sums + at[block] * W * width);
  }
}

// Pack the columns, then run `body(packed, scratch, shared)` on every thread.
template <class Body>
void run(const Call &c, const Tensor *const (&panels)[2], const Tensor *const (&rows)[2],
         const Tensor *const (&numbers)[2], Body body) {
  const int64_t slots = c.batch * c.heads * c.panels * W, items = c.batch * c.heads * c.columns.blocks;
  Packed packed;
  packed.count.resize(items);
  for (int n = 0; n < 2; n++) {
    if (panels[n]) packed.panels[n].need(slots * c.channels);
    if (rows[n]) packed.rows[n].need(slots * wide(c));
    if (numbers[n]) packed.numbers[n].need(slots);
  }
  Shared packing, computing;
  together(c.threads, [&] {
    Scratch x;
    packing.each(items, [&](int64_t item) { pack(c, packed, panels, rows, numbers, item, x.token); });
    body(packed, x, computing);
  });
}

}  // namespace

extern "C" {

int64_t falloff_width() { return W; }

void falloff_forward(const Call *call) {
  const Call &c = *call;
  run(c, {&c.k, nullptr}, {&c.v, nullptr}, {nullptr, nullptr}, [&](const Packed &keys, Scratch &x, Shared &shared) {
    shared.each(c.tasks, [&](int64_t i) {
      const int64_t block = c.task[i] % c.rows.blocks, unit = c.task[i] / c.rows.blocks;
      tiles(c, x, unit, block, [&](int64_t count) { attend(c, keys, x, unit, block, count); });
    });
  });
}

// Rows are keys, columns queries.
void falloff_backward(const Call *call) {
  const Call &c = *call;
  Buffer d_q;
  d_q.need(c.batch * c.heads * c.panels * W * wide(c));
  run(c, {&c.q, &c.d_out}, {&c.q, &c.d_out}, {&c.lse, &c.shift},
      [&](const Packed &queries, Scratch &x, Shared &shared) {
        shared.each(c.batch * c.heads, [&](int64_t unit) { differentiate_head(c, queries, d_q, x, unit); });
      });
}
}
