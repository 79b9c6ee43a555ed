// What leaving a block of keys to its mean costs some queries, float32. look.py compiles it and says what it computes.

#include "packed.hpp"
#include "threads.hpp"

namespace {

struct Scratch {
  std::vector<int64_t> token;
  Buffer queries, scores, at_means, error, sum;
};

float added(Vec x) {
  alignas(64) float lane[W];
  *(Vec *)lane = x;
  UNROLL for (int half = W / 2; half; half /= 2) UNROLL for (int i = 0; i < half; i++) lane[i] += lane[i + half];
  return lane[0];
}

// The largest of a query's scores; columns beyond a block's keys, where a panel has room, become -inf.
float top_of(const Call &c, const Packed &keys, const int64_t *at, int64_t unit, float *scores) {
  Vec most = all(-INF);
  for (int64_t block = 0; block < c.columns.blocks; block++) {
    float *s = scores + at[block] * W;
    const int64_t count = keys.count[unit * c.columns.blocks + block];
    std::fill(s + count, s + up(count, W), -INF);
    for (int64_t n = 0; n < count; n += W) most = load(s + n) > most ? load(s + n) : most;
  }
  return largest(most);
}

// Mean squares of what a query's weights are off by, were they those of their block's mean, added to `sum`.
void add_errors(const Call &c, const Packed &keys, const int64_t *at, int64_t unit, const float *scores,
                const float *at_means, float top, float *error, float *sum) {
  float total = 0;
  for (int64_t block = 0; block < c.columns.blocks; block++) {
    const int64_t count = keys.count[unit * c.columns.blocks + block];
    error[block] = 0;
    if (!count) continue;
    Vec weight{}, square{};
    for (int64_t n = 0; n < count; n += W) {
      const Vec w = exp2(load(scores + at[block] * W + n) - top);
      weight += w;
      square += w * w;
    }
    const float weights = added(weight), of_mean = exp2(all(at_means[block] - top))[0];
    total += weights;
    error[block] = std::max(0.f, (added(square) - 2 * of_mean * weights) / count + of_mean * of_mean);
  }
  for (int64_t block = 0; block < c.columns.blocks; block++) sum[block] += error[block] / total / total;
}

// Rows are queries, as many of every block of theirs; their scores lie row by row.
void look(const Call &c, const Packed &keys, const Means &means, Scratch &x, int64_t unit, int64_t block) {
  const int64_t batch = unit / c.heads, head = unit % c.heads, D = c.channels;
  const int64_t each = c.rows.tokens / c.rows.blocks, wide_scores = c.panels * W, blocks = c.columns.blocks;
  const int64_t *at = panels_of(c, batch, head);
  zeros(x.queries, up(each, PART) * D);
  for (int64_t r = 0; r < each; r++) {
    const float *from = row(c.q, batch, head, block * each + r);
    for (int64_t d = 0; d < D; d++) x.queries[r * D + d] = from[d] * c.scale * LOG2_E;
  }
  zeros(x.sum, blocks);
  x.scores.need(STRIP * wide_scores);
  x.at_means.need(STRIP * mean_slots(c));
  x.error.need(blocks);
  strips(each, [&](auto size, int64_t first_row) {
    constexpr int R = decltype(size)::value;
    const Left queries{x.queries + first_row * D, D, 1};
    product<R, false>(queries, {keys.panels[0] + unit * wide_scores * D, W, W * D}, D, x.scores + 0, wide_scores,
                      at[blocks]);
    product<R, false>(queries, {means.panels + unit * mean_slots(c) * D, W, W * D}, D, x.at_means + 0, mean_slots(c),
                      mean_slots(c) / W);
    for (int64_t r = 0; r < R && first_row + r < each; r++) {
      float *scores = x.scores + r * wide_scores;
      const float top = top_of(c, keys, at, unit, scores);
      add_errors(c, keys, at, unit, scores, x.at_means + r * mean_slots(c), top, x.error + 0, x.sum + 0);
    }
  });
  float *out = const_cast<float *>(row(c.out, batch, head, block));
  for (int64_t other = 0; other < blocks; other++) out[other] = x.sum[other] / each;
}

}  // namespace

extern "C" {

int64_t falloff_width() { return W; }

void falloff_look(const Call *call) {
  const Call &c = *call;
  const int64_t units = c.batch * c.heads, items = units * c.columns.blocks, slots = units * c.panels * W;
  Packed keys;
  Means means;
  keys.count.resize(items);
  keys.panels[0].need(slots * c.channels);
  zeros(means.panels, units * mean_slots(c) * c.channels);
  zeros(means.rows, units * mean_slots(c) * wide(c));
  means.bias.need(units * mean_slots(c));
  Shared packing, looking;
  together(c.threads, [&] {
    Scratch x;
    packing.each(items, [&](int64_t item) {
      pack(c, keys, {&c.k, nullptr}, {nullptr, nullptr}, {nullptr, nullptr}, item, x.token);
      pack_mean(c, keys, means, item, x.token);
    });
    looking.each(units * c.rows.blocks,
                 [&](int64_t i) { look(c, keys, means, x, i / c.rows.blocks, i % c.rows.blocks); });
  });
}
}
