// Attention of generated kernels (included by vec.h): softmax(q k^T) v in tiles, with a running maximum and sum: no matrix of scores exists.
// `Weights` are those of a softmax (Soften), or what `score` gives (Given).
//
// A kernel describes one head of keys and values by lambdas: `query(to, row)` writes the query of a row; `bounds(row)` are the keys it
// attends to; `score(tile, row, begin, end)` turns the products of a row with keys begin .. end, which are tile[0], tile[1], ..., into
// scores (scale, masks); `finish(tile, row)` stores the result of a row. Rows are all queries that meet these keys: of grouped heads too.
#pragma once

namespace tile {

// Rows and keys of one tile: its scores, and what they meet, stay in the nearest caches.
constexpr int64_t QUERIES = 48;
template <int64_t NR> constexpr int64_t KEYS = 128 / NR * NR;

struct Bounds {
  int64_t begin, end;
  INLINE void include(Bounds more) { begin = least_of(begin, more.begin), end = more.end > end ? more.end : end; }
  // Whether no key lies in both; neither is empty.
  INLINE bool apart(Bounds other) const {
    return begin < end && other.begin < other.end && (other.begin >= end || begin >= other.end);
  }
  // How many of the `count` keys from j on come before the end.
  INLINE int64_t before_end(int64_t j, int64_t count) const { return end - j < count ? (end < j ? 0 : end - j) : count; }
};

// Rows of a tile: as even as can be, in groups of R.
INLINE int64_t query_rows(int64_t rows, int64_t R) { return ceil_div(ceil_div(rows, ceil_div(rows, QUERIES)), R) * R; }

// f(head, part, parts) for each of `count` heads of about `work` multiplications, in parts where there are too few for the threads.
template <class F> void heads(int64_t count, int64_t rows, int64_t work, int threads, F f) {
  const int64_t tiles = ceil_div(rows, QUERIES), few = 4 * threads;
  const int64_t parts = count % threads == 0 || count >= few ? 1 : least_of(tiles, ceil_div(few, count));
  if (parts == 0) return;
  parallel(count * parts, THREAD_WORK / (work / parts + 1) + 1, threads, [&](int64_t begin, int64_t end) {
    for (int64_t item = begin; item < end; item++) f(item / parts, item % parts, parts);
  });
}

// Keys or values: row j begins at data + j * ld, its columns are contiguous.
template <class S> struct Rows {
  static constexpr bool scaled = false;
  const S* data;
  int64_t ld;
  INLINE Rows from(int64_t first) const { return {data + first * ld, ld}; }
  template <class T, int L> INLINE vec<T, L> get(int64_t j, int64_t c) const { return as<T>(load<L>(data + j * ld + c)); }
  template <class T, int L> INLINE vec<T, L> level(int64_t j, int64_t c) const { return get<T, L>(j, c); }
};

// The same of integers with a scale for each row: (level - ZERO) * scales[j * STEP]. Where HALF is not 0, levels have four bits: byte c of a
// row holds that of column c in its low bits, and that of column HALF + c in its high ones.
template <class S, class F, int ZERO, int STEP, int HALF> struct Levels {
  static constexpr bool scaled = true;
  const S* data;
  int64_t ld;
  const F* scales;
  INLINE Levels from(int64_t first) const { return {data + first * ld, ld, scales + first * STEP}; }
  template <class T, int L> INLINE vec<T, L> level(int64_t j, int64_t c) const {
    const S* const row = data + j * ld;
    if constexpr (HALF == 0) return as<T>(widened(load<L>(row + c)) - ZERO);
    else {
      const auto bytes = widened(load<L>(row + (c < HALF ? c : c - HALF)));
      return as<T>((c < HALF ? bytes & 15 : bytes >> 4) - ZERO);
    }
  }
  template <class T> INLINE T scale(int64_t j) const { return T(load<1>(scales + j * STEP)); }
  template <class T, int L> INLINE vec<T, L> get(int64_t j, int64_t c) const { return level<T, L>(j, c) * scale<T>(j); }
};

// How many of the `count` keys any row attends to at most.
template <class Limits> INLINE int64_t seen(int64_t rows, int64_t count, const Limits& bounds) {
  int64_t end = 0;
  for (int64_t r = 0; r < rows; r++) end = most_of(end, bounds(r).end);
  return least_of(end, count);
}

// Rows that must be copied first: `write(to, j)` writes the `Used` columns of row j, the others up to `Columns` are zero.
template <int Used, int Columns, class T, class Write> Rows<T> copied(Row<T>& memory, int64_t count, const Write& write) {
  for (int64_t j = 0; j < count; j++) {
    T* to = (T*)memory + j * Columns;
    write(to, j);
    for (int c = Used; c < Columns; c++) to[c] = T(0);
  }
  return {(const T*)memory, Columns};
}

// Panels [keys / NR][D][NR] of keys; what lies beyond the last key is zero.
template <int NR, int L, int D, class T, class KeyRows>
void pack_keys(const KeyRows& keys, int64_t begin, int64_t end, int64_t count, T* panels) {
  alignas(64) T wide[L * (D + L)];
  for (int64_t j = begin; j < end; j += L) {
    T* to = panels + j / NR * NR * D + j % NR;
    const bool whole = j + L <= count;
    if constexpr (__is_same(KeyRows, Rows<T>))
      if (whole) {
        for (int64_t c = 0; c < D; c += L) transpose<L>(keys.data + j * keys.ld + c, keys.ld, to + c * NR, NR);
        continue;
      }
    for (int64_t l = 0; l < L; l++)
      for (int64_t c = 0; c < D; c += L)
        store<L>(wide + l * (D + L) + c, j + l < count ? keys.template get<T, L>(j + l, c) : vec<T, L>{});
    for (int64_t c = 0; c < D; c += L) transpose<L>(wide + c, D + L, to + c * NR, NR);
  }
}

// Rows of values side by side: read again by every tile, they would meet in few cache sets where they lie.
template <int L, int E, class T, class ValueRows> void pack_values(const ValueRows& values, int64_t begin, int64_t end, T* packed) {
  for (int64_t j = begin; j < end; j++)
    UNROLL for (int64_t c = 0; c < E; c += L) store<L>(packed + j * E + c, values.template get<T, L>(j, c));
}

// 2^x for x <= 0 or NaN; 0 below -126, where subnormal numbers, which are slow, would begin.
template <class V> INLINE V weight_of(V x) {
  if constexpr (!is_single<V>) return exp2(x);
  else {
    const V low = splat<lanes<V>>(-126.0f), none = splat<lanes<V>>(0.0f);
    const V c = pick(x < low, low, x);
    const V shifted = c + integral;
    const V r = c - (shifted - integral);
    const V p = horner(r, 1.0000001192092896f, 0.6931469440460205f, 0.24022120237350464f, 0.05550713092088699f, 0.009675540961325169f,
                       0.001327647129073739f);
    return pick(x < low, none, V(p * bits<V>((bits<int_of<V>>(shifted) << 23) + 0x3f800000)));
  }
}

// Scores of a kernel whose products are scores already, to the base 2: `bounds` is all the mask there is.
struct Plain {};

// The running softmax of one row. Weights are 2^(score - most); those up to now have (by lanes) the sum `sum`.
template <class T, int L> struct Soften {
  vec<T, L> sum;
  T most;
  Bounds own;
  INLINE void begin(Bounds bounds) { sum = vec<T, L>{}, most = -inf<T>, own = bounds; }

  // Scores of keys j .. j + count become weights; returns by what earlier results are to be multiplied.
  template <class Score> INLINE T add(T* scores, int64_t row, int64_t j, int64_t count, const Score& score) {
    constexpr bool plain = __is_same(Score, Plain);
    constexpr T unit = plain ? T(1) : T(1.4426950408889634);
    const int64_t end = own.before_end(j, count), padded = (end + L - 1) / L * L;
    if constexpr (!plain) score(scores, row, j, j + end);
    for (int64_t c = end; c < padded; c++) scores[c] = -inf<T>;
    for (int64_t c = 0; c < least_of(own.begin - j, end); c++) scores[c] = -inf<T>;
    for (int64_t c = padded; c < count; c++) scores[c] = T(0);
    auto top = splat<L>(-inf<T>);
    for (int64_t c = 0; c < end; c += L) {
      const vec<T, L> s = load<L>(scores + c);
      top = s > top ? s : top;
    }
    const T largest = unit * fold([](auto a, auto b) { return select(mask(a > b), a, b); }, top);
    const T before = most;
    if (largest > most) most = largest;
    const T base = most == -inf<T> ? T(0) : most;  // nothing to attend to yet: all weights are 0
    vec<T, L> total{};
    for (int64_t c = 0; c < end; c += L) {
      const vec<T, L> e = weight_of(vec<T, L>(load<L>(scores + c) * unit - base));
      store<L>(scores + c, e);
      total += e;
    }
    const T factor = before == most ? T(1) : weight_of(T(before - base));
    sum = sum * factor + total;
    return factor;
  }

  // What the weighted sum is to be multiplied by.
  INLINE T scale() const {
    const T total = fold([](auto a, auto b) { return a + b; }, sum);
    return total == 0 ? T(0) : 1 / total;
  }
};

// Weights that the kernel computes by itself, in place of scores: they are added up as they are.
template <class T, int L> struct Given {
  Bounds own;
  INLINE void begin(Bounds bounds) { own = bounds; }

  template <class Score> INLINE T add(T* scores, int64_t row, int64_t j, int64_t count, const Score& score) {
    const int64_t end = own.before_end(j, count);
    score(scores, row, j, j + end);
    for (int64_t c = end; c < count; c++) scores[c] = T(0);
    for (int64_t c = 0; c < least_of(own.begin - j, end); c++) scores[c] = T(0);
    return T(1);
  }

  INLINE T scale() const { return T(1); }
};

// Queries times the first `vectors` vectors, at most N, of a panel of keys whose rows are `width` apart.
template <int R, int N, int L, int D, class T>
INLINE void multiply(const T* q, int64_t rows, const T* panel, int64_t width, int64_t vectors, T* scores, int64_t ld) {
  if constexpr (N > 1)
    if (vectors < N) return multiply<R, N - 1, L, D>(q, rows, panel, width, vectors, scores, ld);
  for (int64_t r = 0; r < rows; r += R) micro<R, N, L>(q + r * D, D, panel, width, D, scores + r * ld, ld, false);
}

// R rows of weights times `count` rows of values of V vectors.
template <int R, int N, int V, int L, class T, class S>
INLINE void weigh(const T* weights, int64_t ld, const Rows<S>& values, int64_t j, int64_t count, T* out, bool more) {
  constexpr int parts = (V + N - 1) / N, wide = (V + parts - 1) / parts, rest = V % wide;
  const S* from = values.data + j * values.ld;
  for (int c = 0; c + wide <= V; c += wide) micro<R, wide, L>(weights, ld, from + c * L, values.ld, count, out + c * L, V * L, more);
  if constexpr (rest > 0)
    micro<R, rest, L>(weights, ld, from + (V - rest) * L, values.ld, count, out + (V - rest) * L, V * L, more);
}

// The same of levels: weights take the scales, which are applied once for a row of values. Columns that share bytes are added together.
template <int R, int N, int V, int L, class T, class S, class F, int ZERO, int STEP, int HALF>
INLINE void weigh(T* weights, int64_t ld, const Levels<S, F, ZERO, STEP, HALF>& values, int64_t j, int64_t count, T* out, bool more) {
  for (int64_t r = 0; r < R; r++)
    for (int64_t k = 0; k < count; k++) weights[r * ld + k] *= values.template scale<T>(j + k);
  constexpr int parts = (V + N - 1) / N, wide = (V + parts - 1) / parts;
  const auto column = [](int v) { return HALF ? v / 2 * L + v % 2 * HALF : v * L; };
  UNROLL for (int first = 0; first < V; first += wide) {
    vec<T, L> sums[R][wide] = {};
    for (int64_t k = 0; k < count; k++)
      UNROLL for (int v = first; v < first + wide && v < V; v++) {
        const auto level = values.template level<T, L>(j + k, column(v));
        UNROLL for (int r = 0; r < R; r++) sums[r][v - first] += splat<L>(weights[r * ld + k]) * level;
      }
    UNROLL for (int v = first; v < first + wide && v < V; v++)
      UNROLL for (int r = 0; r < R; r++) {
        T* const at = out + r * V * L + column(v);
        store<L>(at, more ? load<L>(at) + sums[r][v - first] : sums[r][v - first]);
      }
  }
}

template <int L, class T> INLINE void scale_row(T* row, int64_t count, T factor) {
  for (int64_t c = 0; c < count; c += L) store<L>(row + c, load<L>(row + c) * factor);
}

// Queries first .. first + count that are walked together, and the keys `range` that they meet. Queries whose keys lie apart, as those of
// two sequences one after the other, are never walked together: no tile computes scores that no row asks for.
struct Walk {
  int64_t first, count;
  Bounds range;
  int64_t anchor;  // panels of keys begin here: where all of its rows do, or at key 0
};

template <class T, int L, int D, template <class, int> class Weights, class Query, class Limits>
Walk next_walk(int64_t first, int64_t end, int64_t keys, T* q, Weights<T, L>* rows_of, const Query& query, const Limits& bounds) {
  Walk walk = {first, 0, {keys, 0}, 0};
  bool together = true;
  for (; first + walk.count < end; walk.count++) {
    const Bounds own = bounds(first + walk.count);
    if (walk.count > 0 && walk.range.apart(own)) break;
    together = walk.count == 0 || (together && own.begin == walk.range.begin);
    rows_of[walk.count].begin(own);
    walk.range.include(own);
    query(q + walk.count * D, first + walk.count);
  }
  walk.range = {walk.range.begin < 0 ? 0 : walk.range.begin, least_of(walk.range.end, keys)};
  if (together) walk.anchor = walk.range.begin;
  return walk;
}

// Every `parts`-th tile of queries from `part` on, over all keys of one head. D and E: columns of keys and values, multiples of L.
template <int R, int N, int L, int D, int E, class T, template <class, int> class Weights, class KeyRows, class ValueRows, class Query,
          class Limits, class Score, class Finish>
void attend(int64_t rows, int64_t count, int64_t part, int64_t parts, const KeyRows& keys, const ValueRows& values, const Query& query,
            const Limits& bounds, const Score& score, const Finish& finish) {
  constexpr int64_t NR = N * L, KEYS = tile::KEYS<NR>;
  const int64_t size = query_rows(rows, R);
  Row<T> panels(ceil_div(count, NR) * NR * D), packed_values(count * E);
  alignas(64) T q[QUERIES * D] = {}, scores[QUERIES * KEYS], out[QUERIES * E];
  Weights<T, L> rows_of[QUERIES];
  const Rows<T> side_by_side = {(const T*)packed_values, E};
  int64_t anchor = 0;
  Bounds packed = {0, 0};  // keys that the panels hold, from the anchor on
  for (int64_t first = part * size, stop = first + size; first < rows;) {
    const Walk walk = next_walk<T, L, D, Weights>(first, least_of(stop, rows), count, q, rows_of, query, bounds);
    const int64_t n = walk.count, padded = ceil_div(n, R) * R;
    const Bounds range = {(walk.range.begin - walk.anchor) / NR * NR, walk.range.end - walk.anchor};
    if (range.begin < range.end) {
      if (walk.anchor != anchor || range.begin < packed.begin || range.begin > packed.end)
        anchor = walk.anchor, packed = {range.begin, range.begin};
      if (const int64_t until = ceil_div(range.end, NR) * NR; packed.end < until) {
        pack_keys<NR, L, D>(keys.from(anchor), packed.end, until, count - anchor, (T*)panels);
        pack_values<L, E>(values.from(anchor), packed.end, least_of(until, count - anchor), (T*)packed_values);
        packed.end = until;
      }
    }
    bool more = false;
    for (int64_t j = range.begin; j < range.end; j += KEYS, more = true) {
      const int64_t some = least_of(KEYS, range.end - j);
      for (int64_t c = 0; c < some; c += NR)
        multiply<R, N, L, D>(q, padded, (const T*)panels + (j + c) * D, NR, ceil_div(some - c, L), scores + c, KEYS);
      for (int64_t r = 0; r < n; r++) {
        const T factor = rows_of[r].add(scores + r * KEYS, first + r, anchor + j, some, score);
        if (more && factor != 1) scale_row<L>(out + r * E, E, factor);
      }
      for (int64_t r = 0; r < padded; r += R) weigh<R, N, E / L, L>(scores + r * KEYS, KEYS, side_by_side, j, some, out + r * E, more);
    }
    for (int64_t r = 0; r < n; r++) {
      if (more) scale_row<L>(out + r * E, E, rows_of[r].scale());
      else __builtin_memset(out + r * E, 0, sizeof(T) * E);
      finish(out + r * E, first + r);
    }
    first += n;
    if (first == stop) first += (parts - 1) * size, stop = first + size;
  }
}

// The same for rows of one tile: keys are packed block by block, in cache, and values are read where they lie, levels packed as keys are.
template <int R, int N, int L, int D, int E, class T, template <class, int> class Weights, class KeyRows, class ValueRows, class Query,
          class Limits, class Score, class Finish>
void attend_tile(int64_t rows, int64_t count, const KeyRows& keys, const ValueRows& values, const Query& query, const Limits& bounds,
                 const Score& score, const Finish& finish) {
  constexpr int64_t NR = N * L, KEYS = tile::KEYS<NR>;
  const int64_t padded = ceil_div(rows, R) * R;
  alignas(64) T q[QUERIES * D] = {}, scores[QUERIES * KEYS], out[QUERIES * E], panels[KEYS * D];
  alignas(64) T numbers[ValueRows::scaled ? KEYS * E : 1];
  Weights<T, L> rows_of[QUERIES];
  Bounds range = {count, 0};
  for (int64_t r = 0; r < rows; r++) {
    query(q + r * D, r);
    rows_of[r].begin(bounds(r));
    range.include(rows_of[r].own);
  }
  range = {range.begin < 0 ? 0 : range.begin / NR * NR, least_of(range.end, count)};
  bool more = false;
  for (int64_t j = range.begin; j < range.end; j += KEYS, more = true) {
    const int64_t some = least_of(KEYS, range.end - j);
    for (int64_t c = 0; c < some; c++)
      for (int64_t d = 0; d < E; d += 64 / sizeof(*values.data)) __builtin_prefetch(values.data + (j + c) * values.ld + d);  // soon read
    pack_keys<NR, L, D>(keys.from(j), 0, ceil_div(some, NR) * NR, count - j, panels);
    for (int64_t c = 0; c < some; c += NR) multiply<R, N, L, D>(q, padded, panels + c * D, NR, ceil_div(some - c, L), scores + c, KEYS);
    for (int64_t r = 0; r < rows; r++) {
      const T factor = rows_of[r].add(scores + r * KEYS, r, j, some, score);
      if (more && factor != 1) scale_row<L>(out + r * E, E, factor);
    }
    if constexpr (ValueRows::scaled) pack_values<L, E>(values.from(j), 0, some, numbers);
    for (int64_t r = 0; r < padded; r += R)
      if constexpr (ValueRows::scaled) weigh<R, N, E / L, L>(scores + r * KEYS, KEYS, Rows<T>{numbers, E}, 0, some, out + r * E, more);
      else weigh<R, N, E / L, L>(scores + r * KEYS, KEYS, values, j, some, out + r * E, more);
  }
  for (int64_t r = 0; r < rows; r++) {
    if (more) scale_row<L>(out + r * E, E, rows_of[r].scale());
    else __builtin_memset(out + r * E, 0, sizeof(T) * E);
    finish(out + r * E, r);
  }
}

// The same for so few rows that keys are not worth packing: each key and value is read once.
template <int R, int N, int L, int D, int E, class T, template <class, int> class Weights, class KeyRows, class ValueRows, class Query,
          class Limits, class Score, class Finish>
void attend_few(int64_t count, const KeyRows& keys, const ValueRows& values, const Query& query, const Limits& bounds, const Score& score,
                const Finish& finish) {
  constexpr int64_t KEYS = tile::KEYS<L>;
  alignas(64) T q[R * D] = {}, scores[R * KEYS], out[R * E];
  Weights<T, L> rows_of[R];
  Bounds range = {count, 0};
  for (int64_t r = 0; r < R; r++) {
    query(q + r * D, r);
    rows_of[r].begin(bounds(r));
    range.include(rows_of[r].own);
  }
  range = {range.begin < 0 ? 0 : range.begin / L * L, least_of(range.end, count)};
  bool more = false;
  for (int64_t j = range.begin; j < range.end; j += KEYS, more = true) {
    const int64_t some = least_of(KEYS, range.end - j);
    for (int64_t c = 0; c < some; c++) {
      for (int64_t d = 0; d < E; d += 64 / sizeof(*values.data)) __builtin_prefetch(values.data + (j + c) * values.ld + d);  // soon read
      vec<T, L> sum[R] = {};
      UNROLL for (int64_t d = 0; d < D; d += L) {
        const vec<T, L> k = keys.template level<T, L>(j + c, d);
        UNROLL for (int r = 0; r < R; r++) sum[r] += k * load<L>(q + r * D + d);
      }
      UNROLL for (int r = 0; r < R; r++) scores[r * KEYS + c] = fold([](auto a, auto b) { return a + b; }, sum[r]);
      if constexpr (KeyRows::scaled)
        UNROLL for (int r = 0; r < R; r++) scores[r * KEYS + c] *= keys.template scale<T>(j + c);
    }
    for (int64_t r = 0; r < R; r++) {
      const T factor = rows_of[r].add(scores + r * KEYS, r, j, some, score);
      if (more && factor != 1) scale_row<L>(out + r * E, E, factor);
    }
    weigh<R, N, E / L, L>(scores, KEYS, values, j, some, out, more);
  }
  for (int64_t r = 0; r < R; r++) {
    if (more) scale_row<L>(out + r * E, E, rows_of[r].scale());
    else __builtin_memset(out + r * E, 0, sizeof(T) * E);
    finish(out + r * E, r);
  }
}

}  // namespace tile
