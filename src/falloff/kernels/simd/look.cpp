// What leaving a block of keys to its mean costs some queries, float32. look.py compiles it and says what it computes.
//
// Queries lie side by side in vectors and keys come one by one, so that sums over a block's keys are additions of
// vectors.

#include <cfloat>

#include "packed.hpp"
#include "threads.hpp"

namespace {

constexpr int64_t LANES = 96;  // queries looked at together, or one block of more
constexpr int64_t KEYS = 60;   // whose scores are held: whole strips

// Of every block of keys and every query: the largest score so far, sums of weights relative to that, of their squares,
// and the score of the block's mean.
struct Seen {
  Buffer top, weight, square, at_mean;
};

struct Scratch {
  std::vector<int64_t> token;
  Buffer queries, scores, top, total, error;
  Seen seen;
};

// Where a block's keys start among those of all blocks, each followed by its mean.
int64_t place_of(const int64_t *bounds, int64_t block) { return bounds[block] + block; }

int64_t places(const Call &c) { return c.columns.tokens + c.columns.blocks; }

// A block's keys, then their mean.
void pack_keys(const Call &c, Buffer &keys, int64_t item, std::vector<int64_t> &token) {
  const int64_t block = item % c.columns.blocks, unit = item / c.columns.blocks, D = c.channels;
  const int64_t batch = unit / c.heads, head = unit % c.heads, *bounds = first(c.columns, batch, head);
  token.resize(std::max<int64_t>(1, bounds[block + 1] - bounds[block]));
  const int64_t count = tokens(c.columns, batch, head, bounds[block], bounds[block + 1], token.data());
  float *to = keys + (unit * places(c) + place_of(bounds, block)) * D, *mean = to + count * D;
  std::fill_n(mean, D, 0.f);
  for (int64_t i = 0; i < count; i++) {
    const float *from = row(c.k, batch, head, token[i]);
    std::copy_n(from, D, to + i * D);
    for (int64_t d = 0; d < D; d++) mean[d] += from[d];
  }
  for (int64_t d = 0; count && d < D; d++) mean[d] /= count;
}

// Scores of some keys, a vector of queries each `row` apart, added to what their block has so far.
void take(const float *scores, int64_t count, int64_t row, float *top, float *weight, float *square) {
  Vec most = load(top);
  for (int64_t k = 0; k < count; k++) most = load(scores + k * row) > most ? load(scores + k * row) : most;
  const Vec shrink = exp2(load(top) - most);
  Vec first = load(weight) * shrink, second = load(square) * shrink * shrink;
  for (int64_t k = 0; k < count; k++) {
    const Vec w = exp2(load(scores + k * row) - most);
    first += w;
    second += w * w;
  }
  store(top, most);
  store(weight, first);
  store(square, second);
}

// Scores of all keys and means for `lanes` queries, taken together block by block.
void see(const Call &c, const float *keys, const int64_t *bounds, int64_t lanes, Scratch &x) {
  const int64_t D = c.channels;
  for (int64_t block = 0; block < c.columns.blocks; block++) {
    const int64_t at = block * lanes, count = bounds[block + 1] - bounds[block];
    const float *own = keys + place_of(bounds, block) * D;
    std::fill_n(x.seen.top + at, lanes, -FLT_MAX);
    for (Buffer *sum : {&x.seen.weight, &x.seen.square}) std::fill_n(*sum + at, lanes, 0.f);
    for (int64_t from = 0; from <= count; from += KEYS) {
      const int64_t held = std::min(KEYS, count + 1 - from), real = std::min(held, count - from);
      strips(held, [&](auto size, int64_t r) {
        product<decltype(size)::value, false>({own + (from + r) * D, D, 1}, {x.queries + 0, lanes, W}, D,
                                              x.scores + r * lanes, lanes, lanes / W);
      });
      for (int64_t n = 0; n < lanes; n += W)
        take(x.scores + n, real, lanes, x.seen.top + at + n, x.seen.weight + at + n, x.seen.square + at + n);
      if (held > real) std::copy_n(x.scores + real * lanes, lanes, x.seen.at_mean + at);
    }
  }
}

// The largest score of every query, and the sum of its weights relative to that.
void add_up(const Call &c, int64_t lanes, Scratch &x) {
  for (int64_t n = 0; n < lanes; n += W) {
    Vec top = all(-FLT_MAX), total{};
    for (int64_t at = n; at < c.columns.blocks * lanes; at += lanes) {
      const Vec own = load(x.seen.top + at);
      top = own > top ? own : top;
    }
    for (int64_t at = n; at < c.columns.blocks * lanes; at += lanes)
      total += load(x.seen.weight + at) * exp2(load(x.seen.top + at) - top);
    store(x.top + n, top);
    store(x.total + n, total);
  }
}

// Mean squares of what shares of queries are off by, were they those of a block's mean; `count` keys.
void errors(const Scratch &x, int64_t at, int64_t lanes, int64_t count, float *error) {
  for (int64_t n = 0; n < lanes; n += W) {
    const Vec top = load(x.top + n), total = load(x.total + n);
    const Vec shrink = exp2(load(x.seen.top + at + n) - top), of_mean = exp2(load(x.seen.at_mean + at + n) - top);
    const Vec weight = load(x.seen.weight + at + n) * shrink, square = load(x.seen.square + at + n) * shrink * shrink;
    const Vec off = (square - 2 * of_mean * weight) / float(count) + of_mean * of_mean;
    store(error + n, (off > 0 ? off : Vec{}) / total / total);
  }
}

// Rows are queries, as many of every block of theirs.
void look(const Call &c, const Buffer &keys, Scratch &x, int64_t unit, int64_t from, int64_t to) {
  const int64_t batch = unit / c.heads, head = unit % c.heads, D = c.channels, *bounds = first(c.columns, batch, head);
  const int64_t each = c.rows.tokens / c.rows.blocks, lanes = up((to - from) * each, W), blocks = c.columns.blocks;
  zeros(x.queries, lanes * D);
  for (int64_t i = 0; i < (to - from) * each; i++) {
    const float *query = row(c.q, batch, head, from * each + i);
    for (int64_t d = 0; d < D; d++) x.queries[d * lanes + i] = query[d] * c.scale * LOG2_E;
  }
  x.scores.need((KEYS + PART) * lanes);
  for (Buffer *part : {&x.seen.top, &x.seen.weight, &x.seen.square, &x.seen.at_mean}) part->need(blocks * lanes);
  for (Buffer *part : {&x.top, &x.total, &x.error}) part->need(lanes);
  see(c, keys + unit * places(c) * D, bounds, lanes, x);
  add_up(c, lanes, x);
  for (int64_t block = 0; block < blocks; block++) {
    const int64_t count = bounds[block + 1] - bounds[block];
    if (count) errors(x, block * lanes, lanes, count, x.error + 0);
    for (int64_t own = from; own < to; own++) {
      float sum = 0;
      for (int64_t i = (own - from) * each; count && i < (own - from + 1) * each; i++) sum += x.error[i];
      const_cast<float *>(row(c.out, batch, head, own))[block] = sum / each;
    }
  }
}

}  // namespace

extern "C" {

void falloff_look(const Call *call) {
  const Call &c = *call;
  const int64_t units = c.batch * c.heads, items = units * c.columns.blocks;
  const int64_t together_blocks = std::max<int64_t>(1, LANES * c.rows.blocks / c.rows.tokens);
  const int64_t groups = over(c.rows.blocks, together_blocks);
  Buffer keys;
  keys.need((units * places(c) + PART) * c.channels);
  std::fill_n(keys + units * places(c) * c.channels, PART * c.channels, 0.f);  // strips read whole ones
  Shared packing, looking;
  together(c.threads, [&] {
    Scratch x;
    packing.each(items, [&](int64_t item) { pack_keys(c, keys, item, x.token); });
    looking.each(units * groups, [&](int64_t i) {
      const int64_t from = i % groups * together_blocks;
      look(c, keys, x, i / groups, from, std::min(from + together_blocks, c.rows.blocks));
    });
  });
}
}
