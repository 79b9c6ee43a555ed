// Block-sparse attention and its gradients on CPUs, float32. cpu_simd.py compiles it and says what it computes.
//
// One operand of a product is read by rows, the other is packed beforehand into panels of W columns, so that the inner
// loop is a broadcast and fused multiply-adds on registers alone. "Rows" and "columns" are those of the map in use:
// queries and keys, but keys and queries where the gradients of keys and values are computed.

#include <algorithm>
#include <cmath>
#include <cstdint>
#include <vector>

#include "packed.hpp"
#include "threads.hpp"
#include "walk.hpp"

namespace {

// What a thread computes with: a tile's rows (operands, sums), scores of a strip, and gradients of a tile's scores.
struct Scratch {
  std::vector<int64_t> token;
  Buffer left[2], sum[2], top, keys, held, bias;
  std::vector<Vec> total;
  alignas(64) float scores[2][STRIP * COLUMNS], slopes[ROWS * COLUMNS];
};

// Rows of `width` numbers, at least as many as there are channels, up to a whole number of strips.
void gather(const Call &c, const Tensor &from, int64_t batch, int64_t head, const std::vector<int64_t> &token,
            int64_t count, int64_t width, float factor, Buffer &into) {
  zeros(into, up(count, PART) * width);
  for (int64_t r = 0; r < count; r++) {
    const float *x = row(from, batch, head, token[r]);
    for (int64_t d = 0; d < c.channels; d++) into[r * width + d] = x[d] * factor;
  }
}

// Scores of a strip to weights, by the largest score of each row so far.
template <int R>
void weigh(float *scores, int64_t vectors, float *top, Vec *total, float *sum, int64_t width) {
  for (int r = 0; r < R; r++) {
    float *s = scores + r * COLUMNS;
    Vec most = load(s);
    for (int64_t n = 1; n < vectors; n++) most = larger(load(s + n * W), most);
    if (any_above(most, top[r])) raise(most, top[r], total[r], sum + r * width, width);
    Vec added = total[r];
    for (int64_t n = 0; n < vectors; n++) {
      const Vec p = exp2(load(s + n * W) - top[r]);
      store(s + n * W, p);
      added += p;
    }
    total[r] = added;
  }
}

// Weights of a few rows by a full tile of columns; their scores stay in registers.
template <int R>
void weigh_full(const float *left, int64_t channels, const float *const (&panel)[COLUMNS / W], float *weights,
                float *top, Vec *total, float *sum, int64_t width) {
  constexpr int N = COLUMNS / W;
  Vec s[R][N];
  UNROLL for (int r = 0; r < R; r++) UNROLL for (int n = 0; n < N; n++) s[r][n] = Vec{};
  add_products({left, channels, 1}, panel, W, channels, s);
  UNROLL for (int r = 0; r < R; r++) {
    Vec most = s[r][0];
    UNROLL for (int n = 1; n < N; n++) most = larger(most, s[r][n]);
    if (any_above(most, top[r])) raise(most, top[r], total[r], sum + r * width, width);
  }
  UNROLL for (int r = 0; r < R; r++) {
    Vec added = total[r];
    UNROLL for (int n = 0; n < N; n++) {
      const Vec p = exp2(s[r][n] - top[r]);
      store(weights + r * COLUMNS + n * W, p);
      added += p;
    }
    total[r] = added;
  }
}

// What a strip's columns add to its sums, from their weights.
template <int R>
void add(const Buffer &rows, int64_t width, const Columns &columns, const float *weights, float *sum) {
  for (int64_t i = 0, at = 0; i < columns.runs; at += up(columns.run[i].count, W), i++) {
    const auto [slot, count] = columns.run[i];
    product<R, true>({weights + at, COLUMNS, 1}, {rows + slot * width, width, W}, count, sum, width, width / W);
  }
}

// What a strip's columns add to its sums, from their scores.
template <int R>
void take(Scratch &x, int64_t r, const Buffer &rows, int64_t width, const Columns &columns, float *scores) {
  float *sum = x.sum[0] + r * width;
  weigh<R>(scores, columns.vectors, x.top + r, &x.total[r], sum, width);
  add<R>(rows, width, columns, scores, sum);
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

// A block whose scores may leave it out is looked at whole, before anything is added.
void attend_block(const Call &c, const Packed &keys, Scratch &x, int64_t count, int64_t slot, int64_t all) {
  float *held = x.held.need(up(all, COLUMNS) * ROWS);
  const auto each = [&](auto body) {
    parts(all, [&](int64_t from, int64_t seen) {
      Columns columns;
      columns.add(slot + from, seen);
      strips(count, [&](auto size, int64_t r) { body(size, r, columns, held + from * ROWS + r * COLUMNS); });
    });
  };
  each([&](auto size, int64_t r, const Columns &columns, float *scores) {
    score<decltype(size)::value>(x.left[0] + r * c.channels, c.channels, keys.panels[0], columns, scores);
  });
  if (too_late(c, x, held, count, all)) return;
  each([&](auto size, int64_t r, const Columns &columns, float *scores) {
    take<decltype(size)::value>(x, r, keys.rows[0], wide(c), columns, scores);
  });
}

// The means of blocks that a tile of queries does not see.
void attend_means(const Call &c, const Packed &keys, const Means &means, Scratch &x, int64_t unit, int64_t block,
                  int64_t count) {
  const int64_t blocks = c.columns.blocks, first_slot = unit * mean_slots(c);
  float *bias = x.bias.need(up(blocks, COLUMNS));
  std::fill(std::copy_n(means.bias + first_slot, blocks, bias), bias + up(blocks, COLUMNS), -INF);
  listed(c, keys.count, unit, block, [&](int64_t other, int64_t, int64_t, int64_t) { bias[other] = -INF; });
  parts(blocks, [&](int64_t from, int64_t seen) {
    if (std::all_of(bias + from, bias + from + seen, [](float b) { return b == -INF; })) return;
    Columns columns;
    columns.add(first_slot + from, seen);
    strips(count, [&](auto size, int64_t r) {
      constexpr int R = decltype(size)::value;
      float *scores = x.scores[0];
      score<R>(x.left[0] + r * c.channels, c.channels, means.panels, columns, scores);
      for (int64_t i = 0; i < R; i++)
        for (int64_t n = 0; n < columns.vectors * W; n += W) {
          float *s = scores + i * COLUMNS + n;
          store(s, load(s) + load(bias + from + n));
        }
      take<R>(x, r, means.rows, wide(c), columns, scores);
    });
  });
}

// Output and LSE of a tile of queries; see the Python side for the formulas.
void attend(const Call &c, const Packed &keys, const Means &means, Scratch &x, int64_t unit, int64_t block,
            int64_t count) {
  const int64_t batch = unit / c.heads, head = unit % c.heads, width = wide(c), D = c.channels;
  gather(c, c.q, batch, head, x.token, count, D, c.scale * LOG2_E, x.left[0]);
  zeros(x.sum[0], up(count, PART) * width);
  std::fill_n(x.top.need(up(count, PART)), up(count, PART), -INF);
  x.total.assign(up(count, PART), Vec{});
  Columns columns;
  const auto flush = [&] {
    const float *panel[COLUMNS / W];
    columns.find(keys.panels[0], D, panel);
    const bool full = columns.vectors == COLUMNS / W && columns.full();
    strips(count, [&](auto size, int64_t r) {
      constexpr int R = decltype(size)::value, FEW = R > PART ? R / 2 : R;
      float *scores = x.scores[0];
      if constexpr (FEW * COLUMNS / W <= 2 * STRIP)  // as many sums as other products have in registers
        if (full) {
          for (int i = 0; i < R; i += FEW)
            weigh_full<FEW>(x.left[0] + (r + i) * D, D, panel, scores + i * COLUMNS, x.top + r + i, &x.total[r + i],
                            x.sum[0] + (r + i) * width, width);
          return add<R>(keys.rows[0], width, columns, scores, x.sum[0] + r * width);
        }
      score<R>(x.left[0] + r * D, D, keys.panels[0], columns, scores);
      take<R>(x, r, keys.rows[0], width, columns, scores);
    });
    columns = {};
  };
  listed(c, keys.count, unit, block, [&](int64_t, int64_t panel, int64_t all, int64_t later) {
    const int64_t slot = panel * W;
    if (c.skip >= 0 && later >= c.protect) return attend_block(c, keys, x, count, slot, all);
    for (int64_t from = 0, some; from < all; from += some) {
      some = std::min(all - from, COLUMNS - columns.vectors * W);
      columns.add(slot + from, some);
      if (columns.vectors * W == COLUMNS) flush();
    }
  });
  if (columns.vectors) flush();
  if (c.summary) attend_means(c, keys, means, x, unit, block, count);
  finish(c, unit, x.token, count, x.sum[0] + 0, width, x.top + 0, x.total);
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
  listed(c, queries.count, unit, block, [&](int64_t, int64_t panel, int64_t all, int64_t) {
    parts(all, [&](int64_t from, int64_t seen) { tile(panel * W + from, seen); });
  });
  scatter(c, c.d_k, unit, x.token, count, c.scale, x.sum[0] + 0, width);
  scatter(c, c.d_v, unit, x.token, count, 1, x.sum[1] + 0, width);
}

// All gradients of one head: by one thread, so that sums have one order.
void differentiate_head(const Call &c, const Packed &queries, Buffer &d_q, Scratch &x, int64_t unit) {
  const int64_t batch = unit / c.heads, head = unit % c.heads, width = wide(c), slots = c.panels * W;
  float *sums = d_q + unit * slots * width;
  std::fill_n(sums, slots * width, 0.f);
  for (int64_t block = 0; block < c.rows.blocks; block++)
    tiles(c, x.token, unit, block, PART, [&](int64_t n) { differentiate_tile(c, queries, d_q, x, unit, block, n); });
  const int64_t *bounds = first(c.columns, batch, head), *at = panels_of(c, batch, head);
  for (int64_t block = 0; block < c.columns.blocks; block++) {
    x.token.resize(std::max<int64_t>(1, bounds[block + 1] - bounds[block]));
    const int64_t count = tokens(c.columns, batch, head, bounds[block], bounds[block + 1], x.token.data());
    scatter(c, c.d_q, unit, x.token, count, c.scale, sums + at[block] * W * width, width);
  }
}

// Pack the columns, `also(item, tokens)` after each block, then run `body(packed, scratch, shared)` on every thread.
template <class Also, class Body>
void run(const Call &c, const Tensor *const (&panels)[2], const Tensor *const (&rows)[2],
         const Tensor *const (&numbers)[2], Also also, Body body) {
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
    packing.each(items, [&](int64_t item) {
      pack(c, packed, panels, rows, numbers, item, x.token);
      also(packed, item, x.token);
    });
    body(packed, x, computing);
  });
}

}  // namespace

extern "C" {

int64_t falloff_width() { return W; }

void falloff_forward(const Call *call) {
  const Call &c = *call;
  Means means;
  if (c.summary) {
    const int64_t slots = c.batch * c.heads * mean_slots(c);
    zeros(means.panels, slots * c.channels);
    zeros(means.rows, slots * wide(c));
    means.bias.need(slots);
  }
  const auto summarise = [&](const Packed &keys, int64_t item, const std::vector<int64_t> &token) {
    if (c.summary) pack_mean(c, keys, means, item, token);
  };
  run(c, {&c.k, nullptr}, {&c.v, nullptr}, {nullptr, nullptr}, summarise,
      [&](const Packed &keys, Scratch &x, Shared &shared) {
        shared.each(c.tasks, [&](int64_t i) {
          const int64_t block = c.task[i] % c.rows.blocks, unit = c.task[i] / c.rows.blocks;
          tiles(c, x.token, unit, block, PART, [&](int64_t count) { attend(c, keys, means, x, unit, block, count); });
        });
      });
}

// Rows are keys, columns queries.
void falloff_backward(const Call *call) {
  const Call &c = *call;
  Buffer d_q;
  d_q.need(c.batch * c.heads * c.panels * W * wide(c));
  const auto nothing = [](const Packed &, int64_t, const std::vector<int64_t> &) {};
  run(c, {&c.q, &c.d_out}, {&c.q, &c.d_out}, {&c.lse, &c.shift}, nothing,
      [&](const Packed &queries, Scratch &x, Shared &shared) {
        shared.each(c.batch * c.heads, [&](int64_t unit) { differentiate_head(c, queries, d_q, x, unit); });
      });
}
}
