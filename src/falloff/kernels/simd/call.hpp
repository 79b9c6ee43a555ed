// What a call of the library is told, as simd_call.py writes it, and where its tokens lie.

#pragma once

#include <cstdint>

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
  int64_t protect, summary;  // summary: blocks of columns that a row does not see answer it by their means
  int64_t parts;             // of bfloat16 that a number is, where products are AMX's
  Tensor q, k, v, d_out, lse, shift, out, d_q, d_k, d_v;
};
}

namespace {

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

}  // namespace
