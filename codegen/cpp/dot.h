// Contractions of generated kernels (included by vec.h): sums of products in tiles that live in registers.
//
// A kernel describes its product by lambdas: `left(row, m)` writes row m of the left operand, `right(n)` is the panel of the right operand
// that begins at column n, `finish(tile, m, begin, end)` stores columns begin .. end of row m, whose sums are tile[0], tile[1], ...
// How the work is divided never changes how the terms of one element are added: in blocks of DEPTH, in order.
#pragma once

namespace tile {

#define UNROLL _Pragma("GCC unroll 32")

constexpr int64_t DEPTH = 384;                // terms of one run of the micro-kernel: a panel's part stays in the second-level cache
constexpr int64_t BLOCK_ROWS = 64;            // rows of the left operand that one panel meets while it is there
constexpr int64_t BLOCK_BYTES = 1 << 20;      // what these rows may take
constexpr int64_t THREAD_WORK = 1 << 18;      // multiplications that are worth a thread

INLINE int64_t ceil_div(int64_t a, int64_t b) { return (a + b - 1) / b; }
INLINE int64_t least_of(int64_t a, int64_t b) { return a < b ? a : b; }

// tile[i][j] = sum over k < depth of a[i][k] * b[k][j], or is added to what the tile holds if `more`. The tile has R rows and N vectors of
// L columns; rows of a, b and tile are lda, ldb and ldt elements apart. a and b may be stored narrower than T: they are widened when loaded.
template <int R, int N, int L, class A, class B, class T>
__attribute__((noinline)) static void micro(const A* a, int64_t lda, const B* b, int64_t ldb, int64_t depth, T* tile, int64_t ldt, bool more) {
  vec<T, L> sum[R][N] = {};
  for (int64_t k = 0; k < depth; k++) {
    vec<T, L> right[N];
    UNROLL for (int j = 0; j < N; j++) right[j] = as<T>(load<L>(b + k * ldb + j * L));
    UNROLL for (int i = 0; i < R; i++) {
      const auto left = splat<L>(T(load<1>(a + i * lda + k)));
      UNROLL for (int j = 0; j < N; j++) sum[i][j] += left * right[j];
    }
  }
  UNROLL for (int i = 0; i < R; i++)
    UNROLL for (int j = 0; j < N; j++) {
      T* at = tile + i * ldt + j * L;
      store<L>(at, more ? load<L>(at) + sum[i][j] : sum[i][j]);
    }
}

// ---- the right operand: panels of NR columns

// Row k of a panel is data[k * ld] ...
template <class B> struct Panel {
  const B* data;
  int64_t ld;
};

#if defined(__clang__)
#define SHUFFLE(a, b, ...) __builtin_shufflevector(a, b, __VA_ARGS__)
#else
#define SHUFFLE(a, b, ...) __builtin_shuffle(a, b, int_of<decltype(a)>{__VA_ARGS__})
#endif

// a[0], b[0], a[1], b[1], ... of the lower or upper halves.
template <bool Upper, class V> INLINE V zip(V a, V b) {
  if constexpr (lanes<V> == 2) return Upper ? SHUFFLE(a, b, 1, 3) : SHUFFLE(a, b, 0, 2);
  else if constexpr (lanes<V> == 4) return Upper ? SHUFFLE(a, b, 2, 6, 3, 7) : SHUFFLE(a, b, 0, 4, 1, 5);
  else if constexpr (lanes<V> == 8)
    return Upper ? SHUFFLE(a, b, 4, 12, 5, 13, 6, 14, 7, 15) : SHUFFLE(a, b, 0, 8, 1, 9, 2, 10, 3, 11);
  else
    return Upper ? SHUFFLE(a, b, 8, 24, 9, 25, 10, 26, 11, 27, 12, 28, 13, 29, 14, 30, 15, 31)
                 : SHUFFLE(a, b, 0, 16, 1, 17, 2, 18, 3, 19, 4, 20, 5, 21, 6, 22, 7, 23);
}

// Rows of L elements, `from` elements apart, become columns of rows that are `to` elements apart.
template <int L, class T> INLINE void transpose(const T* in, int64_t from, T* out, int64_t to) {
  vec<T, L> rows[L], zipped[L];
  UNROLL for (int i = 0; i < L; i++) rows[i] = load<L>(in + i * from);
  UNROLL for (int stage = 1; stage < L; stage *= 2) {
    UNROLL for (int i = 0; i < L / 2; i++) {
      zipped[2 * i] = zip<false>(rows[i], rows[i + L / 2]);
      zipped[2 * i + 1] = zip<true>(rows[i], rows[i + L / 2]);
    }
    UNROLL for (int i = 0; i < L; i++) rows[i] = zipped[i];
  }
  UNROLL for (int i = 0; i < L; i++) store<L>(out + i * to, rows[i]);
}

// A right operand as it lies: rows `ld` apart. What is left of the last panel is a copy, so that nothing beyond the operand is read.
template <class B, int NR> struct RowMajor {
  const B* data;
  int64_t ld, columns, depth;
  Row<B> tail;
  RowMajor(const B* data, int64_t ld, int64_t columns, int64_t depth)
      : data(data), ld(ld), columns(columns), depth(depth), tail(columns % NR ? depth * NR : 0) {
    const int64_t rest = columns % NR;
    if (rest == 0) return;
    for (int64_t k = 0; k < depth; k++) {
      __builtin_memcpy((B*)tail + k * NR, data + k * ld + columns - rest, sizeof(B) * rest);
      __builtin_memset((B*)tail + k * NR + rest, 0, sizeof(B) * (NR - rest));
    }
  }
  INLINE Panel<B> operator()(int64_t n) const {
    if (n + NR > columns) return {(const B*)tail, NR};
    return {data + n, ld};
  }
};

// A right operand copied into panels [columns / NR][depth][NR]; columns beyond the last are zero.
template <class T, int NR> struct Packed {
  int64_t columns, depth;
  Row<T> memory;
  Packed(int64_t columns, int64_t depth) : columns(columns), depth(depth), memory(ceil_div(columns, NR) * NR * depth) {}
  INLINE Panel<T> operator()(int64_t n) const { return {(const T*)memory + n * depth, NR}; }
  int64_t grain(int64_t items) const { return THREAD_WORK / 8 * items / (columns * depth + 1) + 1; }

  // row(to, k) writes row k.
  template <class Write> void rows(int threads, Write row) {
    const int64_t panels = ceil_div(columns, NR);
    parallel(depth, grain(depth), threads, [&](int64_t begin, int64_t end) {
      Row<T> wide(panels * NR);
      for (int64_t n = columns; n < panels * NR; n++) wide[n] = T(0);
      for (int64_t k = begin; k < end; k++) {
        row((T*)wide, k);
        for (int64_t p = 0; p < panels; p++) __builtin_memcpy((T*)memory + (p * depth + k) * NR, (T*)wide + p * NR, sizeof(T) * NR);
      }
    });
  }

  // column(to, n) writes column n. L columns at a time are turned.
  template <int L, class Write> void turned(int threads, Write column) {
    const int64_t groups = ceil_div(columns, NR) * (NR / L), ld = ceil_div(depth, L) * L + L;
    parallel(groups, grain(groups), threads, [&](int64_t begin, int64_t end) {
      Row<T> wide(L * ld);
      for (int64_t g = begin; g < end; g++) {
        for (int64_t l = 0; l < L; l++) {
          if (g * L + l < columns) column((T*)wide + l * ld, g * L + l);
          else __builtin_memset((T*)wide + l * ld, 0, sizeof(T) * depth);
        }
        T* to = (T*)memory + g * L / NR * NR * depth + g * L % NR;
        int64_t k = 0;
        for (; k + L <= depth; k += L) transpose<L>((T*)wide + k, ld, to + k * NR, NR);
        for (; k < depth; k++)
          for (int64_t l = 0; l < L; l++) to[k * NR + l] = wide[l * ld + k];
      }
    });
  }
};

// ---- products

// How threads share a grid of tiles: in `down` parts of the rows times `across` parts of the columns.
struct Shares {
  int64_t down, across;
};
INLINE Shares share_tiles(int64_t groups, int64_t panels, int threads) {
  Shares best = {1, 1};
  double least_time = inf<double>;
  for (int64_t down = 1; down <= threads; down++) {
    const int64_t across = threads / down;
    // the longest share, in tiles; every column of shares copies the left operand again
    const double time = double(ceil_div(groups, down)) * (double(ceil_div(panels, across)) + 0.5);
    if (time < least_time) least_time = time, best = {down, across};
  }
  return best;
}

// One share of a product: rows m0 .. m1 times columns n0 .. n1.
template <int R, int N, int L, class T, class Left, class Right, class Finish>
void product_part(int64_t m0, int64_t m1, int64_t n0, int64_t n1, int64_t depth, const Left& left, const Right& right, const Finish& finish) {
  constexpr int64_t NR = N * L;
  const int64_t ld = ceil_div(depth, 16) * 16 + 16;  // rows of the block do not meet in the same cache sets
  const int64_t fitting = BLOCK_BYTES / (sizeof(T) * ld) / R * R;
  const int64_t block_rows = fitting < R ? R : least_of(fitting, BLOCK_ROWS / R * R);
  Row<T> block(least_of(ceil_div(m1 - m0, R) * R, block_rows) * ld);
  alignas(64) T tile[BLOCK_ROWS * NR];
  for (int64_t m = m0; m < m1; m += block_rows) {
    const int64_t rows = least_of(block_rows, m1 - m), padded = ceil_div(rows, R) * R;
    for (int64_t i = 0; i < rows; i++) left((T*)block + i * ld, m + i);
    __builtin_memset((T*)block + rows * ld, 0, sizeof(T) * (padded - rows) * ld);
    for (int64_t n = n0; n < n1; n += NR) {
      const auto panel = right(n);
      int64_t k = 0;
      do {
        const int64_t terms = least_of(DEPTH, depth - k);
        for (int64_t i = 0; i < rows; i += R) {
          micro<R, N, L>((T*)block + i * ld + k, ld, panel.data + k * panel.ld, panel.ld, terms, tile + i * NR, NR, k > 0);
          if (k + terms == depth)
            for (int64_t r = i; r < least_of(i + R, rows); r++) finish((const T*)tile + r * NR, m + r, n, least_of(n + NR, n1));
        }
        k += DEPTH;
      } while (k < depth);
    }
  }
}

// The product of `rows` x `depth` and `depth` x `columns`.
template <int R, int N, int L, class T, class Left, class Right, class Finish>
void product(int64_t rows, int64_t columns, int64_t depth, int threads, const Left& left, const Right& right, const Finish& finish) {
  constexpr int64_t NR = N * L;
  const int64_t groups = ceil_div(rows, R), panels = ceil_div(columns, NR);
  const int64_t useful = groups * panels * (R * NR) * (depth + 1) / THREAD_WORK;
  const Shares shares = share_tiles(groups, panels, int(useful < 1 ? 1 : least_of(useful, threads)));
  parallel(shares.down * shares.across, 1, threads, [&](int64_t begin, int64_t end) {
    for (int64_t s = begin; s < end; s++) {
      const int64_t i = s / shares.across, j = s % shares.across;
      const int64_t m0 = groups * i / shares.down * R, m1 = least_of(groups * (i + 1) / shares.down * R, rows);
      const int64_t n0 = panels * j / shares.across * NR, n1 = least_of(panels * (j + 1) / shares.across * NR, columns);
      if (m0 < m1 && n0 < n1) product_part<R, N, L, T>(m0, m1, n0, n1, depth, left, right, finish);
    }
  });
}

// f(batch, threads) for each of `count` products of about `work` multiplications: threads share the products, or each in turn.
template <class F> void batches(int64_t count, int64_t work, int threads, F f) {
  if (count < threads) {
    for (int64_t batch = 0; batch < count; batch++) f(batch, threads);
    return;
  }
  parallel(count, THREAD_WORK / (work + 1) + 1, threads, [&](int64_t begin, int64_t end) {
    for (int64_t batch = begin; batch < end; batch++) f(batch, 1);
  });
}

}  // namespace tile
