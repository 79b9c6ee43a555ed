// The nearest center of every token, and what k-means needs of it, float32. nearest.py says what it computes.

#include <algorithm>
#include <cstdint>
#include <limits>

#include "products.hpp"
#include "threads.hpp"

namespace {

constexpr int COLUMNS = 64;   // centers at once
constexpr float FAR = 3e38f;  // the bias of centers that are none

struct Best {
  Vec score;
  Ints place;

  // Of all lanes; among equals the lowest.
  int32_t first() const {
    alignas(64) int32_t lane[W];
    const Ints none = Ints{} + std::numeric_limits<int32_t>::max();
    *(Ints *)lane = score == largest(score) ? place : none;
    UNROLL for (int half = W / 2; half; half /= 2)
      UNROLL for (int i = 0; i < half; i++) lane[i] = lane[i + half] < lane[i] ? lane[i + half] : lane[i];
    return lane[0];
  }
};

template <int R>
void compare(const float *scores, const float *bias, int64_t first, int64_t vectors, Best *best, Vec &zero) {
  Ints lane;
  for (int i = 0; i < W; i++) lane[i] = i;
  for (int r = 0; r < R; r++)
    for (int64_t n = 0; n < vectors; n++) {
      const Vec score = load(scores + r * COLUMNS + n * W) - load(bias + first + n * W);
      const Ints higher = score > best[r].score;
      best[r].score = higher ? score : best[r].score;
      best[r].place = higher ? lane + (int32_t)(first + n * W) : best[r].place;
      zero += score * 0.f;  // NaN if the score is not finite
    }
}

}  // namespace

extern "C" {

// Tokens [heads, tokens, channels] by strides; `offset` [heads, centers, channels] and `bias` [heads, centers]: a token
// belongs where token . offset - bias is highest. `sums` and `sizes` [heads, centers, (channels)] start at 0.
struct Clustering {
  const float *tokens;
  int64_t head, token;
  int64_t heads, count, channels, centers, threads;
  const float *offset, *bias;
  int32_t *label;
  float *sums;
  int64_t *sizes;
  uint8_t *finite;  // [heads]
};

void falloff_nearest(const Clustering *given) {
  const Clustering &c = *given;
  const int64_t D = c.channels, padded = up(c.centers, W);
  Shared shared;
  together(c.threads, [&] {
    Buffer panels, bias, rows;
    alignas(64) float scores[STRIP * COLUMNS];
    shared.each(c.heads, [&](int64_t head) {
      std::fill_n(panels.need(padded * D), padded * D, 0.f);
      std::fill_n(bias.need(padded), padded, FAR);
      for (int64_t j = 0; j < c.centers; j++) {
        bias[j] = c.bias[head * c.centers + j];
        for (int64_t d = 0; d < D; d++) panels[j / W * W * D + d * W + j % W] = c.offset[(head * c.centers + j) * D + d];
      }
      Vec zero{};
      for (int64_t from = 0; from < c.count; from += STRIP) {
        const int64_t count = std::min<int64_t>(STRIP, c.count - from);
        std::fill_n(rows.need(STRIP * D), STRIP * D, 0.f);
        for (int64_t r = 0; r < count; r++)
          std::copy_n(c.tokens + head * c.head + (from + r) * c.token, D, rows + r * D);
        Best best[STRIP];
        std::fill_n(best, STRIP, Best{all(-INF), Ints{}});
        for (int64_t first = 0; first < padded; first += COLUMNS) {
          const int64_t vectors = std::min<int64_t>(COLUMNS, padded - first) / W;
          product<STRIP, false>({rows + 0, D, 1}, {panels + first * D, W, W * D}, D, scores, COLUMNS, vectors);
          compare<STRIP>(scores, bias + 0, first, vectors, best, zero);
        }
        for (int64_t r = 0; r < count; r++) {
          const int32_t label = std::min<int32_t>(best[r].first(), c.centers - 1);
          c.label[head * c.count + from + r] = label;
          c.sizes[head * c.centers + label]++;
          float *sum = c.sums + (head * c.centers + label) * D;
          for (int64_t d = 0; d < D; d++) sum[d] += rows[r * D + d];
        }
      }
      c.finite[head] = true;
      for (int w = 0; w < W; w++) c.finite[head] &= zero[w] == 0;
    });
  });
}
}
