// How the C++ kernels walk a map: blocks of rows tile by tile, the columns that each sees, and what becomes of its sums.

#pragma once

#include <algorithm>
#include <cmath>
#include <cstdint>
#include <vector>

#include "call.hpp"
#include "products.hpp"

namespace {

constexpr int ROWS = 128;  // of a tile: larger blocks are cut

// Blocks of columns that block `block` of a head's rows sees: `body(which, first panel, columns, blocks that follow)`.
// `counts`: the columns of every block of every head.
template <class Body>
void listed(const Call &c, const std::vector<int64_t> &counts, int64_t unit, int64_t block, Body body) {
  const int64_t batch = unit / c.heads, head = unit % c.heads;
  const int64_t *bounds = c.start + (batch * c.map_batch + head * c.map_head) * c.rows.blocks + block;
  const int64_t *at = panels_of(c, batch, head);
  for (int64_t i = bounds[0]; i < bounds[1]; i++) {
    const int64_t other = c.list[i];
    body(other, unit * c.panels + at[other], counts[unit * c.columns.blocks + other], bounds[1] - i - 1);
  }
}

// Every tile of a block of rows, all of about one size, a multiple of `part`: `body(how many)`, its tokens in `token`.
template <class Body>
void tiles(const Call &c, std::vector<int64_t> &token, int64_t unit, int64_t block, int64_t part, Body body) {
  const int64_t batch = unit / c.heads, head = unit % c.heads, *bounds = first(c.rows, batch, head);
  token.resize(ROWS);
  const int64_t all = bounds[block + 1] - bounds[block], size = all ? up(over(all, over(all, ROWS)), part) : 0;
  for (int64_t from = bounds[block]; from < bounds[block + 1]; from += size) {
    const int64_t to = std::min(from + size, bounds[block + 1]);
    if (const int64_t count = tokens(c.rows, batch, head, from, to, token.data())) body(count);
  }
}

// `factor` times the sums of a tile's rows, `width` numbers each, to its tokens.
void scatter(const Call &c, const Tensor &to, int64_t unit, const std::vector<int64_t> &token, int64_t count,
             float factor, const float *sum, int64_t width) {
  for (int64_t r = 0; r < count; r++) {
    float *x = const_cast<float *>(row(to, unit / c.heads, unit % c.heads, token[r]));
    for (int64_t d = 0; d < c.channels; d++) x[d] = sum[r * width + d] * factor;
  }
}

// A row's largest score grows to that of `most`: what is summed up by the old one is shrunk. Seldom, so kept apart.
__attribute__((noinline)) void raise(Vec most, float &top, Vec &total, float *sum, int64_t width) {
  const float now = largest(most);
  const float shrink = std::exp2(top - now);
  for (int64_t d = 0; d < width; d += W) store(sum + d, load(sum + d) * shrink);
  total *= shrink;
  top = now;
}

// Output and LSE of a tile's rows from sums of values, largest scores and sums of weights, in base 2.
void finish(const Call &c, int64_t unit, const std::vector<int64_t> &token, int64_t count, float *sum, int64_t width,
            const float *top, const std::vector<Vec> &totals) {
  for (int64_t r = 0; r < count; r++) {
    float total = 0;
    for (int w = 0; w < W; w++) total += totals[r][w];
    const float factor = total == 0 ? 0 : 1 / total;  // 0: it sees nothing
    for (int64_t d = 0; d < width; d++) sum[r * width + d] *= factor;
    *const_cast<float *>(row(c.lse, unit / c.heads, unit % c.heads, token[r])) =
        total == 0 ? -INF : (top[r] + std::log2(total)) * LN_2;
  }
  scatter(c, c.out, unit, token, count, 1, sum, width);
}

}  // namespace
