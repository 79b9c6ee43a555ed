// Block-sparse attention and its gradients by the tiles of AMX. cpu_amx.py compiles it and says what it computes.
//
// As attention.cpp, with other products: the columns of a map are packed as right operands of tiles once a call, and
// what is read by rows is made into left operands as it is needed. P is how many bfloat16 a number is (tiles.hpp).

#include <algorithm>
#include <cmath>
#include <cstdint>
#include <vector>

#include <cpuid.h>
#include <sys/syscall.h>
#include <unistd.h>

#include "panels.hpp"
#include "threads.hpp"
#include "walk.hpp"

namespace {

constexpr int COLUMNS = 128;          // of a tile of the map
constexpr int STRIP_ROWS = 2 * SIDE;  // of it at a time
constexpr int PANELS = COLUMNS / PANEL, CHUNKS = ROWS / DEEP;

// Columns of a tile: runs of panels that lie one after the other.
struct Columns {
  struct Run {
    int64_t panel, count;  // of columns: none but the last panel has fewer than it holds
  } run[PANELS];
  int64_t runs = 0, panels = 0;
  void add(int64_t panel, int64_t count) {
    Run *last = runs ? &run[runs - 1] : nullptr;
    if (last && last->count % PANEL == 0 && last->panel + last->count / PANEL == panel) last->count += count;
    else run[runs++] = {panel, count};
    panels += over(count, PANEL);
  }
};

// What a thread computes with.
struct Scratch {
  std::vector<int64_t> token;
  std::vector<Columns> tiles;
  Numbers<Part> left[2], turned, weights[2], slopes, mixed;
  Buffer sum[2], top;
  std::vector<Vec> total;
  alignas(64) float scores[2][STRIP_ROWS * COLUMNS];
};

// Rows of tokens, `sign` times, as a left operand: [tile of rows, chunk of channels, part]; zeros up to whole strips.
template <int P>
void gather(const Call &c, const Tensor &from, int64_t batch, int64_t head, const std::vector<int64_t> &token,
            int64_t count, float sign, Numbers<Part> &into) {
  const int64_t K = chunks(c), size = up(count, STRIP_ROWS) * K * DEEP * P;
  std::fill_n(into.need(size), size, Part(0));
  for (int64_t r = 0; r < count; r++) {
    const float *x = row(from, batch, head, token[r]);
    for (int64_t k = 0; k < K; k++, x += DEEP)
      put_left<P>(sign * some(x, c.channels - k * DEEP), sign * some(x + SIDE, c.channels - k * DEEP - SIDE),
                  into + ((r / SIDE * K + k) * P * TILE + r % SIDE * DEEP), TILE);
  }
}

template <int P>
Tiles left_of(const Call &c, const Numbers<Part> &left, int64_t r) {
  const int64_t K = chunks(c);
  return {left + r / SIDE * K * P * TILE, K * P * TILE, TILE, P * TILE};
}

// Scores of a strip's rows by the columns of one panel.
template <int P, int M>
void score(const Call &c, Tiles left, const Numbers<Part> &across, int64_t panel, float *scores) {
  const Tiles right{across + panel * across_size<P>(c), chunks(c) * P * TILE, TILE, P * TILE};
  multiply<P, M, 2>(left, right, chunks(c), scores, COLUMNS, SIDE * COLUMNS, SIDE, false);
}

// Where the numbers of row `r` and panel `n` lie in a left operand [tile of rows, panel, part].
template <int P>
int64_t line(int64_t r, int64_t n) { return (r / SIDE * PANELS + n) * P * TILE + r % SIDE * DEEP; }

template <int P>
Tiles strip_of(const Numbers<Part> &x, int64_t panel) {
  return {x + panel * P * TILE, PANELS * P * TILE, TILE, P * TILE};
}

// Scores of a strip's rows by N panels of columns to weights, by the largest score of each row so far.
template <int P, int N>
void weigh(const Call &c, Scratch &x, const float *scores, Part *weights, int64_t r, int64_t rows) {
  const int64_t width = wide(c);
  // Its sign is in the queries. Above 0, so that a score of -inf, where there is no column, stays one.
  const float factor = std::max(std::fabs(c.scale) * LOG2_E, std::numeric_limits<float>::min());
  for (int64_t i = 0; i < rows; i++) {
    Vec s[2 * N];
    UNROLL for (int n = 0; n < 2 * N; n++) s[n] = load(scores + i * COLUMNS + n * W);
    Vec most = s[0];
    UNROLL for (int n = 1; n < 2 * N; n++) most = larger(most, s[n]);
    most *= factor;
    float &top = x.top[r + i];
    Vec &total = x.total[r + i];
    if (any_above(most, top)) raise(most, top, total, x.sum[0] + (r + i) * width, width);
    Vec added = total;
    UNROLL for (int n = 0; n < N; n++) {
      const Vec low = power<P>(s[2 * n] * factor - top), high = power<P>(s[2 * n + 1] * factor - top);
      put_left<P>((__m512)low, (__m512)high, weights + line<P>(i, n), TILE);
      added += low + high;
    }
    total = added;
  }
}

// Scores of a strip's rows by the columns of a tile.
template <int P, int M>
void score_tile(const Call &c, const Packed &keys, const Columns &columns, Scratch &x, int64_t r, float *scores) {
  const Tiles left = left_of<P>(c, x.left[0], r);
  int64_t at = 0;
  for (int64_t i = 0; i < columns.runs; i++) {
    const auto [panel, count] = columns.run[i];
    const int64_t end = at + over(count, PANEL);
    for (int64_t n = at; n < end; n++) score<P, M>(c, left, keys.across[0], panel + n - at, scores + n * PANEL);
    if (count % PANEL)
      for (int64_t m = 0; m < M * SIDE; m++)
        std::fill(scores + m * COLUMNS + at * PANEL + count, scores + m * COLUMNS + end * PANEL, -INF);
    at = end;
  }
}

// What a tile's columns add to the sums of a strip's rows, from their weights.
template <int P, int M>
void add_tile(const Call &c, const Packed &keys, const Columns &columns, Scratch &x, int64_t r,
              const Numbers<Part> &weights) {
  const int64_t width = wide(c);
  int64_t at = 0;
  for (int64_t i = 0; i < columns.runs; i++) {
    const auto [panel, count] = columns.run[i];
    const Tiles right{keys.along[0] + panel * along_size<P>(c), P * TILE, TILE, along_size<P>(c)};
    product<P, M>(strip_of<P>(weights, at), right, over(count, PANEL), x.sum[0] + r * width, width, SIDE * width, SIDE,
                  groups(c), true);
    at += over(count, PANEL);
  }
}

// `body(count)` with a count from 1 to N that the compiler knows.
template <int N, class Body>
void counted(int64_t count, Body body) {
  if constexpr (N > 1)
    if (count < N) return counted<N - 1>(count, body);
  body(std::integral_constant<int, N>{});
}

// The tiles of columns that a block of rows sees.
void list_tiles(const Call &c, const Packed &keys, int64_t unit, int64_t block, std::vector<Columns> &into) {
  into.assign(1, {});
  listed(c, keys.count, unit, block, [&](int64_t, int64_t panel, int64_t seen, int64_t) {
    for (int64_t from = 0, some; from < seen; from += some) {
      if (into.back().panels == PANELS) into.emplace_back();
      some = std::min<int64_t>(seen - from, COLUMNS - into.back().panels * PANEL);
      into.back().add(panel + from / PANEL, some);
    }
  });
  if (!into.back().panels) into.pop_back();
}

// Output and LSE of a tile of queries; see the Python side for the formulas.
template <int P>
void attend(const Call &c, const Packed &keys, Scratch &x, int64_t unit, int64_t block, int64_t count) {
  const int64_t batch = unit / c.heads, head = unit % c.heads, width = wide(c), rows = up(count, STRIP_ROWS);
  gather<P>(c, c.q, batch, head, x.token, count, c.scale < 0 ? -1 : 1, x.left[0]);
  for (auto &weights : x.weights) weights.need(STRIP_ROWS * COLUMNS * P);
  std::fill_n(x.sum[0].need(rows * width), rows * width, 0.f);
  std::fill_n(x.top.need(rows), rows, -INF);
  x.total.assign(rows, Vec{});
  list_tiles(c, keys, unit, block, x.tiles);
  // The next strip's scores are begun before this one's are weighed: tiles and vectors are computed side by side.
  const int64_t strips = rows / STRIP_ROWS, steps = strips * int64_t(x.tiles.size());
  const auto strip = [&](int64_t step, auto body) {
    const int64_t r = step % strips * STRIP_ROWS;
    if (count - r > SIDE) body(std::integral_constant<int, 2>{}, x.tiles[step / strips], r);
    else body(std::integral_constant<int, 1>{}, x.tiles[step / strips], r);
  };
  for (int64_t step = -1; step < steps; step++) {
    if (step + 1 < steps)
      strip(step + 1, [&](auto m, const Columns &columns, int64_t r) {
        score_tile<P, decltype(m)::value>(c, keys, columns, x, r, x.scores[(step + 1) % 2]);
      });
    if (step >= 0)
      strip(step, [&](auto m, const Columns &columns, int64_t r) {
        constexpr int M = decltype(m)::value;
        const Numbers<Part> &weights = x.weights[step % 2];
        counted<PANELS>(columns.panels, [&](auto n) {
          weigh<P, decltype(n)::value>(c, x, x.scores[step % 2], weights + 0, r, M * SIDE);
        });
        add_tile<P, M>(c, keys, columns, x, r, weights);
      });
  }
  finish(c, unit, x.token, count, x.sum[0] + 0, width, x.top + 0, x.total);
}

// p = 2^s / 2^lse and dS = p (dP - shift) of a strip of `rows` keys, as left operands, and dS as a right one whose tile
// of the first 16 queries is `mixed`.
template <int P>
void differentiate(const Call &c, Scratch &x, int64_t rows, int64_t panels, const float *lse, const float *shift,
                   Part *mixed) {
  const float factor = c.scale * LOG2_E;
  for (int64_t r = 0; r < STRIP_ROWS; r += 2)
    for (int64_t n = 0; n < panels; n++) {
      Vec ds[2][2], p[2][2];
      for (int i = 0; i < 2; i++)
        for (int half = 0; half < 2; half++) {
          const int64_t column = n * PANEL + half * W, at = (r + i) * COLUMNS + column;
          p[i][half] = power<P>(load(x.scores[0] + at) * factor - LOG2_E * load(lse + column));
          ds[i][half] = p[i][half] * (load(x.scores[1] + at) - load(shift + column));
          if (r + i >= rows) p[i][half] = ds[i][half] = Vec{};
        }
      for (int i = 0; i < 2; i++) {
        put_left<P>((__m512)p[i][0], (__m512)p[i][1], x.weights[0] + line<P>(r + i, n), TILE);
        put_left<P>((__m512)ds[i][0], (__m512)ds[i][1], x.slopes + line<P>(r + i, n), TILE);
      }
      for (int half = 0; half < 2; half++)
        put_right<P>((__m512)ds[0][half], (__m512)ds[1][half], mixed + (2 * n + half) * P * TILE + r / 2 * DEEP, TILE);
    }
}

// The keys of a tile as a left operand whose rows are channels: [group of channels, chunk of keys, part].
template <int P>
void turn_keys(const Call &c, Scratch &x, int64_t count) {
  const int64_t K = chunks(c), size = groups(c) * CHUNKS * P * TILE;
  std::fill_n(x.turned.need(size), size, Part(0));
  for (int64_t r = 0; r < count; r++)
    for (int64_t d = 0; d < c.channels; d++)
      for (int p = 0; p < P; p++)
        x.turned[((d / SIDE * CHUNKS + r / DEEP) * P + p) * TILE + d % SIDE * DEEP + r % DEEP] =
            x.left[0][((r / SIDE * K + d / DEEP) * P + p) * TILE + r % SIDE * DEEP + place<P>(d % DEEP)];
}

// Gradients of a tile of keys and values; what it adds to those of its queries goes to `d_q`: [16 slots, channel, slot].
template <int P>
void differentiate_tile(const Call &c, const Packed &queries, const Buffer &d_q, Scratch &x, int64_t unit, int64_t block,
                        int64_t count) {
  const int64_t batch = unit / c.heads, head = unit % c.heads, width = wide(c), rows = up(count, STRIP_ROWS);
  const int64_t G = groups(c), apart = 2 * PANELS * P * TILE;
  gather<P>(c, c.k, batch, head, x.token, count, 1, x.left[0]);
  gather<P>(c, c.v, batch, head, x.token, count, 1, x.left[1]);
  turn_keys<P>(c, x, count);
  x.mixed.need(CHUNKS * apart);
  for (auto *operand : {&x.weights[0], &x.slopes}) operand->need(STRIP_ROWS * COLUMNS * P);
  for (Buffer &sum : x.sum) std::fill_n(sum.need(rows * width), rows * width, 0.f);
  const auto tile = [&](int64_t panel, int64_t panels) {
    for (int64_t r = 0; r < rows; r += STRIP_ROWS) {
      for (int n = 0; n < 2; n++)
        for (int64_t i = 0; i < panels; i++)
          score<P, 2>(c, left_of<P>(c, x.left[n], r), queries.across[n], panel + i, x.scores[n] + i * PANEL);
      differentiate<P>(c, x, count - r, panels, queries.numbers[0] + panel * PANEL, queries.numbers[1] + panel * PANEL,
                       x.mixed + r / DEEP * apart);
      const Numbers<Part> *by[2] = {&x.slopes, &x.weights[0]};
      for (int n = 0; n < 2; n++)
        product<P, 2>(strip_of<P>(*by[n], 0),
                      {queries.along[n] + panel * along_size<P>(c), P * TILE, TILE, along_size<P>(c)}, panels,
                      x.sum[n] + r * width, width, SIDE * width, SIDE, G, true);
    }
    for (int64_t g = 0; g < G; g += 2) {
      const Tiles left{x.turned + g * CHUNKS * P * TILE, CHUNKS * P * TILE, TILE, P * TILE};
      const Tiles right{x.mixed + 0, P * TILE, TILE, apart};
      float *to = d_q + (panel * PANEL * width + g * SIDE * SIDE);
      if (g + 1 < G) product<P, 2>(left, right, rows / DEEP, to, SIDE, SIDE * SIDE, SIDE * width, 2 * panels, true);
      else product<P, 1>(left, right, rows / DEEP, to, SIDE, 0, SIDE * width, 2 * panels, true);
    }
  };
  listed(c, queries.count, unit, block, [&](int64_t, int64_t panel, int64_t seen, int64_t) {
    for (int64_t i = 0; i < over(seen, PANEL); i += PANELS) tile(panel + i, std::min<int64_t>(PANELS, over(seen, PANEL) - i));
  });
  scatter(c, c.d_k, unit, x.token, count, c.scale, x.sum[0] + 0, width);
  scatter(c, c.d_v, unit, x.token, count, 1, x.sum[1] + 0, width);
}

// All gradients of one head: by one thread, so that sums have one order.
template <int P>
void differentiate_head(const Call &c, const Packed &queries, Buffer &d_q, Scratch &x, int64_t unit) {
  const int64_t batch = unit / c.heads, head = unit % c.heads, width = wide(c), slots = c.panels * PANEL;
  float *sums = d_q + unit * slots * width;
  std::fill_n(sums, slots * width, 0.f);
  for (int64_t block = 0; block < c.rows.blocks; block++)
    tiles(c, x.token, unit, block, SIDE, [&](int64_t n) { differentiate_tile<P>(c, queries, d_q, x, unit, block, n); });
  const int64_t *bounds = first(c.columns, batch, head), *at = panels_of(c, batch, head);
  for (int64_t block = 0; block < c.columns.blocks; block++) {
    x.token.resize(std::max<int64_t>(1, bounds[block + 1] - bounds[block]));
    const int64_t count = tokens(c.columns, batch, head, bounds[block], bounds[block + 1], x.token.data());
    for (int64_t i = 0; i < count; i++) {
      const int64_t slot = at[block] * PANEL + i;
      float *to = const_cast<float *>(row(c.d_q, batch, head, x.token[i]));
      for (int64_t d = 0; d < c.channels; d++)
        to[d] = sums[(slot / SIDE * width + d) * SIDE + slot % SIDE] * c.scale;
    }
  }
}

// Pack the columns, then run `body(packed, scratch, shared)` on every thread.
template <int P, class Body>
void run(const Call &c, const Tensor *const (&across)[2], const Tensor *const (&along)[2],
         const Tensor *const (&numbers)[2], Body body) {
  const int64_t panels = c.batch * c.heads * c.panels, items = c.batch * c.heads * c.columns.blocks;
  Packed packed;
  packed.count.resize(items);
  for (int n = 0; n < 2; n++) {
    if (across[n]) packed.across[n].need(panels * across_size<P>(c));
    if (along[n]) packed.along[n].need(panels * along_size<P>(c));
    if (numbers[n]) packed.numbers[n].need(panels * PANEL);
  }
  Shared packing, computing;
  together(c.threads, [&] {
    const Shaped shaped;
    Scratch x;
    packing.each(items, [&](int64_t item) { pack<P>(c, packed, across, along, numbers, item, x.token); });
    body(packed, x, computing);
  });
}

template <int P>
void forward(const Call &c) {
  run<P>(c, {&c.k, nullptr}, {&c.v, nullptr}, {nullptr, nullptr}, [&](const Packed &keys, Scratch &x, Shared &shared) {
    shared.each(c.tasks, [&](int64_t i) {
      const int64_t block = c.task[i] % c.rows.blocks, unit = c.task[i] / c.rows.blocks;
      tiles(c, x.token, unit, block, SIDE, [&](int64_t count) { attend<P>(c, keys, x, unit, block, count); });
    });
  });
}

// Rows are keys, columns queries.
template <int P>
void backward(const Call &c) {
  Buffer d_q;
  d_q.need(c.batch * c.heads * c.panels * PANEL * wide(c));
  run<P>(c, {&c.q, &c.d_out}, {&c.q, &c.d_out}, {&c.lse, &c.shift},
         [&](const Packed &queries, Scratch &x, Shared &shared) {
           shared.each(c.batch * c.heads, [&](int64_t unit) { differentiate_head<P>(c, queries, d_q, x, unit); });
         });
}

}  // namespace

extern "C" {

int64_t falloff_width() { return PANEL; }

// Whether this CPU and this system let a process use the tiles.
int64_t falloff_able() {
  unsigned a, b, c, d;
  if (!__get_cpuid_count(7, 0, &a, &b, &c, &d) || !(d >> 22 & 1) || !(d >> 24 & 1)) return 0;
  if (!__get_cpuid_count(7, 1, &a, &b, &c, &d) || !(a >> 5 & 1)) return 0;
  return syscall(SYS_arch_prctl, 0x1023 /* ARCH_REQ_XCOMP_PERM */, 18 /* XTILEDATA */) == 0;
}

void falloff_forward(const Call *call) {
  if (call->parts == 1) forward<1>(*call);
  else forward<2>(*call);
}

void falloff_backward(const Call *call) {
  if (call->parts == 1) backward<1>(*call);
  else backward<2>(*call);
}
}
