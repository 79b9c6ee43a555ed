// The columns of a map packed as right operands of tiles.

#pragma once

#include <algorithm>
#include <cstdint>
#include <vector>

#include "call.hpp"
#include "tiles.hpp"

namespace {

constexpr int PANEL = DEEP;  // columns that are packed together

int64_t groups(const Call &c) { return over(c.channels, SIDE); }
int64_t chunks(const Call &c) { return over(c.channels, DEEP); }
int64_t wide(const Call &c) { return groups(c) * SIDE; }

// The columns of all heads by panels: `across` for products over channels, [half of a panel, chunk of channels, part],
// and `along` for products over columns, [group of channels, part]; numbers per token, and how many tokens a block has.
struct Packed {
  Numbers<Part> across[2], along[2];
  Buffer numbers[2];
  std::vector<int64_t> count;
};

template <int P>
int64_t across_size(const Call &c) { return 2 * chunks(c) * P * TILE; }
template <int P>
int64_t along_size(const Call &c) { return groups(c) * P * TILE; }

// A panel of up to 32 tokens, the tensor's numbers for products over channels.
template <int P>
void pack_across(const Call &c, const Tensor &from, int64_t batch, int64_t head, const int64_t *token, int64_t count,
                 Part *to) {
  alignas(64) Part rows[P * TILE];
  for (int64_t half = 0; half < 2; half++)
    for (int64_t k = 0; k < chunks(c); k++) {
      std::fill_n(rows, P * TILE, Part(0));
      for (int64_t i = 0; i < SIDE && half * SIDE + i < count; i++) {
        const float *y = row(from, batch, head, token[half * SIDE + i]) + k * DEEP;
        put_left<P>(some(y, c.channels - k * DEEP), some(y + SIDE, c.channels - k * DEEP - SIDE),
                    rows + i * DEEP, TILE);
      }
      for (int p = 0; p < P; p++) turn(rows + p * TILE, to + ((half * chunks(c) + k) * P + p) * TILE);
    }
}

// The same for products over columns.
template <int P>
void pack_along(const Call &c, const Tensor &from, int64_t batch, int64_t head, const int64_t *token, int64_t count,
                Part *to) {
  for (int64_t i = 0; i < PANEL; i++) {
    const int64_t at = place<P>(i);
    if (at % 2) continue;  // the second of a pair
    const int64_t pair[2] = {i, P == 1 ? i + 1 : i + SIDE};
    for (int64_t g = 0; g < groups(c); g++) {
      __m512 x[2];
      for (int n = 0; n < 2; n++)
        x[n] = pair[n] < count ? some(row(from, batch, head, token[pair[n]]) + g * SIDE, c.channels - g * SIDE)
                               : _mm512_setzero_ps();
      put_right<P>(x[0], x[1], to + g * P * TILE + at / 2 * DEEP, TILE);
    }
  }
}

template <int P>
void pack(const Call &c, Packed &into, const Tensor *const (&across)[2], const Tensor *const (&along)[2],
          const Tensor *const (&numbers)[2], int64_t item, std::vector<int64_t> &token) {
  const int64_t block = item % c.columns.blocks, unit = item / c.columns.blocks;
  const int64_t batch = unit / c.heads, head = unit % c.heads, *bounds = first(c.columns, batch, head);
  token.resize(std::max<int64_t>(1, bounds[block + 1] - bounds[block]));
  const int64_t count = tokens(c.columns, batch, head, bounds[block], bounds[block + 1], token.data());
  const int64_t panel = unit * c.panels + panels_of(c, batch, head)[block];
  into.count[item] = count;
  for (int64_t i = 0; i < count; i += PANEL) {
    const int64_t at = panel + i / PANEL, *here = token.data() + i, some = std::min<int64_t>(PANEL, count - i);
    for (int n = 0; n < 2; n++) {
      if (across[n]) pack_across<P>(c, *across[n], batch, head, here, some, into.across[n] + at * across_size<P>(c));
      if (along[n]) pack_along<P>(c, *along[n], batch, head, here, some, into.along[n] + at * along_size<P>(c));
      if (numbers[n])
        for (int64_t j = 0; j < PANEL; j++)
          into.numbers[n][at * PANEL + j] = j < some ? *row(*numbers[n], batch, head, here[j]) : 0;
    }
  }
}

}  // namespace
