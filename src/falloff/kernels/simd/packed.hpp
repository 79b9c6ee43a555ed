// Blocks of columns packed for products, with their means, and scores of rows against them.

#pragma once

#include <algorithm>
#include <cmath>
#include <cstdint>
#include <vector>

#include "call.hpp"
#include "products.hpp"

namespace {

constexpr int COLUMNS = 64;  // of a tile: its operands stay in the first-level cache

// The columns of all heads: `panels` [panel, channel, W] and `rows` [token, wide] of up to two tensors, vectors of
// numbers per token, and how many tokens each block has. What a call does not use stays empty.
struct Packed {
  Buffer panels[2], rows[2], numbers[2];
  std::vector<int64_t> count;
};

// The means of blocks of keys, packed as keys are, and log2 of how many keys each stands for.
struct Means {
  Buffer panels, rows, bias;
};

int64_t wide(const Call &c) { return up(c.channels, W); }
int64_t mean_slots(const Call &c) { return up(c.columns.blocks, W); }

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

// The mean of a block of keys, and of its values where a call has them; zeros where it has no key.
void pack_mean(const Call &c, const Packed &keys, Means &into, int64_t item, const std::vector<int64_t> &token) {
  const int64_t block = item % c.columns.blocks, unit = item / c.columns.blocks, count = keys.count[item];
  const int64_t batch = unit / c.heads, head = unit % c.heads, slot = unit * mean_slots(c) + block;
  float *mean = into.rows + slot * wide(c), *panel = into.panels + (slot / W * W * c.channels + slot % W);
  const auto sum_up = [&](const Tensor &x) {
    std::fill_n(mean, wide(c), 0.f);
    for (int64_t i = 0; i < count; i++) {
      const float *from = row(x, batch, head, token[i]);
      for (int64_t d = 0; d < c.channels; d++) mean[d] += from[d];
    }
    for (int64_t d = 0; count && d < c.channels; d++) mean[d] /= count;
  };
  sum_up(c.k);
  for (int64_t d = 0; d < c.channels; d++) panel[d * W] = mean[d];
  if (c.v.data) sum_up(c.v);
  into.bias[slot] = count ? std::log2(float(count)) : -INF;
}

// Columns of a tile: runs of consecutive slots, each from a panel of its own on.
struct Columns {
  struct Run {
    int64_t slot, count;
  } run[COLUMNS / W];
  int64_t runs = 0, vectors = 0;
  void add(int64_t slot, int64_t count) {
    Run *last = runs ? &run[runs - 1] : nullptr;
    if (last && last->count % W == 0 && last->slot + last->count == slot) last->count += count;
    else run[runs++] = {slot, count};
    vectors += over(count, W);
  }
  // Whether every number of its vectors is a column's.
  bool full() const {
    return std::all_of(run, run + runs, [](const Run &r) { return r.count % W == 0; });
  }
  // Where its vectors lie.
  void find(const Buffer &panels, int64_t channels, const float *(&panel)[COLUMNS / W]) const {
    int64_t n = 0;
    for (int64_t i = 0; i < runs; i++)
      for (int64_t from = 0; from < run[i].count; from += W) panel[n++] = panels + (run[i].slot + from) * channels;
  }
};

void zeros(Buffer &x, int64_t count) { std::fill_n(x.need(count), count, 0.f); }

// Tiles of a block: `body(offset, how many)`.
template <class Body>
void parts(int64_t count, Body body) {
  for (int64_t from = 0; from < count; from += COLUMNS) body(from, std::min<int64_t>(COLUMNS, count - from));
}

// Scores of a strip, [R, COLUMNS]; -inf where a panel has no more columns.
template <int R>
void score(const float *left, int64_t channels, const Buffer &panels, const Columns &columns, float *scores) {
  const float *panel[COLUMNS / W];
  columns.find(panels, channels, panel);
  const Left a{left, channels, 1};
  int64_t n = 0;
  for (; n + 2 <= columns.vectors; n += 2)
    multiply<R, 2, false>(a, {panel[n], W, panel[n + 1] - panel[n]}, channels, scores + n * W, COLUMNS);
  if (n < columns.vectors) multiply<R, 1, false>(a, {panel[n], W, 0}, channels, scores + n * W, COLUMNS);
  int64_t at = 0;
  for (int64_t i = 0; i < columns.runs; i++) {
    const int64_t count = columns.run[i].count, next = at + up(count, W);
    if (count % W)
      for (int r = 0; r < R; r++) std::fill(scores + r * COLUMNS + at + count, scores + r * COLUMNS + next, -INF);
    at = next;
  }
}

}  // namespace
