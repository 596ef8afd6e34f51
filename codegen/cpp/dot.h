// Contractions of generated kernels (included by vec.h): sums of products in tiles that live in registers.
//
// A kernel describes its product by `left(to, m)`, which writes row m of the left operand, by its right operand, one of the classes below,
// and by `finish(sums, m, begin, end)`, which stores columns begin .. end of row m: their sums are sums[0], sums[1], ...
// How the work is divided never changes how the terms of one element are added.
#pragma once

namespace tile {

#define UNROLL _Pragma("GCC unroll 32")
#define ONCE static __attribute__((noinline))  // one copy serves all kernels of a unit

constexpr int64_t DEPTH = 384;             // terms of one run of the micro-kernel: such a part of a panel stays near the core
constexpr int64_t BLOCK_ROWS = 128;        // rows of the left operand that meet it there
constexpr int64_t BLOCK_BYTES = 1 << 20;   // what operands that are read again and again may take of the second-level cache
constexpr int64_t THREAD_WORK = 1 << 18;   // multiplications that are worth a thread
constexpr int64_t NEAR = 3072;             // bytes of a panel between what few rows read and what they fetch
constexpr int64_t FEW_ROWS = 8;            // rows up to which sums along contiguous columns are no slower than turning them
constexpr int64_t LINE = 64;               // bytes of a cache line
constexpr int64_t FEW_TILES = 8, PARTS = 16;  // a product of so few tiles is divided along its depth

INLINE constexpr int64_t ceil_div(int64_t a, int64_t b) { return (a + b - 1) / b; }
INLINE int64_t least_of(int64_t a, int64_t b) { return a < b ? a : b; }
INLINE int64_t most_of(int64_t a, int64_t b) { return a > b ? a : b; }

// ---- micro-kernels

struct Nothing {
  INLINE void operator()(int64_t) const {}
};
INLINE void fetch(const void* p) { __builtin_prefetch(p, 0, 2); }

// tile[i][j] = sum over k < depth of a[i][k] * b[k][j], or is added to what the tile holds if `more`. The tile has R rows and N vectors of
// L columns; rows of a, b and tile are lda, ldb and ldt elements apart. a and b may be stored narrower than T: loading widens them.
// ahead(k) is called with each term, to fetch what is needed soon. Few sums add U terms at once, which rounds less too.
template <int R, int N, int L, int U = (R * N * 4 <= 16 ? 4 : R * N * 2 <= 16 ? 2 : 1), class A, class B, class T, class Ahead = Nothing>
ONCE void micro(const A* a, int64_t lda, const B* b, int64_t ldb, int64_t depth, T* tile, int64_t ldt, bool more, Ahead ahead = {}) {
  vec<T, L> sums[U][R][N] = {};
  const auto term = [&](int64_t k, auto& sum) LANES {
    ahead(k);
    vec<T, L> right[N];
    UNROLL for (int j = 0; j < N; j++) right[j] = as<T>(load<L>(b + k * ldb + j * L));
    UNROLL for (int i = 0; i < R; i++) {
      const auto left = splat<L>(T(load<1>(a + i * lda + k)));
      UNROLL for (int j = 0; j < N; j++) sum[i][j] += left * right[j];
    }
  };
  int64_t k = 0;
  for (; k + U <= depth; k += U)
    UNROLL for (int u = 0; u < U; u++) term(k + u, sums[u]);
  for (; U > 1 && k < depth; k++) term(k, sums[0]);
  auto& sum = sums[0];
  UNROLL for (int u = 1; u < U; u++)
    UNROLL for (int i = 0; i < R; i++)
      UNROLL for (int j = 0; j < N; j++) sum[i][j] += sums[u][i][j];
  UNROLL for (int i = 0; i < R; i++)
    UNROLL for (int j = 0; j < N; j++) {
      T* at = tile + i * ldt + j * L;
      store<L>(at, more ? load<L>(at) + sum[i][j] : sum[i][j]);
    }
}

// The same for a right operand whose columns are contiguous and ldb apart: C columns, each as U sums of L lanes. Columns from `columns` on
// do not exist.
template <int R, int C, int U, int L, class A, class B, class T>
ONCE void micro_columns(const A* a, int64_t lda, const B* b, int64_t ldb, int64_t columns, int64_t depth, T* tile, int64_t ldt,
                        bool more) {
  vec<T, L> sum[R][C][U] = {};
  T rest[R][C] = {};
  const B* column[C];
  UNROLL for (int j = 0; j < C; j++) column[j] = b + least_of(j, columns - 1) * ldb;
  const auto add = [&](int64_t k, int u) LANES {
    vec<T, L> left[R];
    UNROLL for (int i = 0; i < R; i++) left[i] = as<T>(load<L>(a + i * lda + k));
    UNROLL for (int j = 0; j < C; j++) {
      const auto right = as<T>(load<L>(column[j] + k));
      UNROLL for (int i = 0; i < R; i++) sum[i][j][u] += left[i] * right;
    }
  };
  int64_t k = 0;
  for (; k + U * L <= depth; k += U * L)
    UNROLL for (int u = 0; u < U; u++) add(k + u * L, u);
  for (; k + L <= depth; k += L) add(k, 0);
  for (; k < depth; k++)
    UNROLL for (int j = 0; j < C; j++)
      UNROLL for (int i = 0; i < R; i++) rest[i][j] += T(load<1>(a + i * lda + k)) * T(load<1>(column[j] + k));
  UNROLL for (int i = 0; i < R; i++)
    UNROLL for (int j = 0; j < C; j++) {
      UNROLL for (int u = 1; u < U; u++) sum[i][j][0] += sum[i][j][u];
      const T total = fold([](auto x, auto y) { return x + y; }, sum[i][j][0]) + rest[i][j];
      tile[i * ldt + j] = more ? tile[i * ldt + j] + total : total;
    }
}

// ---- right operands, in panels of `width` columns: add<R>(...) runs the micro-kernel on the panel at column n, from depth k on, for the
// given group of R rows

// Panels that are read as they lie: panel(n) is where the one at column n begins, its rows are ld apart. Meanwhile what follows is fetched,
// a share of it by each group of rows.
template <int N, int L, class At> struct Panels {
  static constexpr int64_t width = N * L, terms = DEPTH;
  int64_t ld;
  At panel;
  template <int R, class T>
  INLINE void add(const T* a, int64_t lda, int64_t group, int64_t n, int64_t k, int64_t depth, T* tile, bool more) const {
    const auto data = panel(n) + k * ld;
    constexpr int64_t lines = (sizeof(*data) * width + LINE - 1) / LINE, shares = lines + 1;
    if constexpr (R == 3 || R == 4) {  // one group, and memory sets the time
      micro<R, N, L>(a, lda, data, ld, depth, tile, width, more, [=](int64_t k) LANES {
        const char* const next = (const char*)(data + k * ld) + NEAR;
        UNROLL for (int64_t i = 0; i < lines; i++) fetch(next + i * LINE);
      });
    } else {
      const char* const next = (const char*)(data + depth * ld) + group % shares * depth * LINE;
      micro<R, N, L>(a, lda, data, ld, depth, tile, width, more, [=](int64_t k) LANES { fetch(next + k * LINE); });
    }
  }
};
template <int N, int L, class At> Panels<N, L, At> panels(int64_t ld, At panel) { return {ld, panel}; }

// Rows ld apart. What is left behind the last whole panel is copied, so that nothing beyond the operand is read.
template <class B, int N, int L> struct RowMajor {
  static constexpr int64_t width = N * L, terms = DEPTH;
  const B* data;
  int64_t ld, columns;
  Row<B> rest;
  RowMajor(const B* data, int64_t ld, int64_t columns, int64_t depth)
      : data(data), ld(ld), columns(columns), rest(columns % width ? depth * width : 0) {
    const int64_t left = columns % width;
    for (int64_t k = 0; k < (left ? depth : 0); k++) {
      __builtin_memcpy((B*)rest + k * width, data + k * ld + columns - left, sizeof(B) * left);
      __builtin_memset((B*)rest + k * width + left, 0, sizeof(B) * (width - left));
    }
  }
  template <int R, class T>
  INLINE void add(const T* a, int64_t lda, int64_t group, int64_t n, int64_t k, int64_t depth, T* tile, bool more) const {
    const bool whole = n + width <= columns;
    const int64_t step = whole ? ld : width;
    micro<R, N, L>(a, lda, (whole ? data + n : (const B*)rest) + k * step, step, depth, tile, width, more);
  }
};

// One panel that was copied; meanwhile what the next is made of is fetched.
template <int N, int L, class T> struct Copied {
  static constexpr int64_t width = N * L, terms = DEPTH;
  const T* data;
  const char* source;
  template <int R>
  INLINE void add(const T* a, int64_t lda, int64_t group, int64_t n, int64_t k, int64_t depth, T* tile, bool more) const {
    constexpr int64_t row = sizeof(T) * width, shares = row / LINE + 1;
    const char* const next = source + k * row + group % shares * depth * LINE;
    micro<R, N, L>(a, lda, data + k * width, width, depth, tile, width, more, [=](int64_t k) LANES { fetch(next + k * LINE); });
  }
};

// Contiguous columns ld apart, for few rows.
template <class B, int L> struct Columns {
  static constexpr int64_t width = 16, terms = 1 << 12;
  const B* data;
  int64_t ld, columns;
  template <int R, class T>
  INLINE void add(const T* a, int64_t lda, int64_t group, int64_t n, int64_t k, int64_t depth, T* tile, bool more) const {
    constexpr int sums = sizeof(T) * L == 64 ? 16 : 8;  // registers for them
    constexpr int C = R * 4 <= sums ? 4 : R * 2 <= sums ? 2 : 1, U = R * C * 4 <= sums ? 4 : R * C * 2 <= sums ? 2 : 1;
    for (int64_t j = 0; j < width && n + j < columns; j += C)
      micro_columns<R, C, U, L>(a, lda, data + (n + j) * ld + k, ld, columns - n - j, depth, tile + j, width, more);
  }
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
template <int L, class B, class T> INLINE void transpose(const B* in, int64_t from, T* out, int64_t to) {
  vec<T, L> rows[L], zipped[L];
  UNROLL for (int i = 0; i < L; i++) rows[i] = as<T>(load<L>(in + i * from));
  UNROLL for (int stage = 1; stage < L; stage *= 2) {
    UNROLL for (int i = 0; i < L / 2; i++) {
      zipped[2 * i] = zip<false>(rows[i], rows[i + L / 2]);
      zipped[2 * i + 1] = zip<true>(rows[i], rows[i + L / 2]);
    }
    UNROLL for (int i = 0; i < L; i++) rows[i] = zipped[i];
  }
  UNROLL for (int i = 0; i < L; i++) store<L>(out + i * to, rows[i]);
}

// How panels are made of an operand that cannot be read as it lies; source: where column n begins, if that is known.

// Contiguous columns that are ld apart.
template <int N, int L, class B> struct Turned {
  typedef B element;
  static constexpr int vectors = N, lanes = L;
  const B* data;
  int64_t ld, columns, depth;
  const void* source(int64_t n, const void*) const { return data + n * ld; }
  template <class T> void pack(T* to, int64_t n) const {
    for (int64_t j = 0; j < N * L; j += L, to += L) {
      const B* const from = data + (n + j) * ld;
      const int64_t there = n + j < columns ? least_of(L, columns - n - j) : 0;
      int64_t k = 0;
      if (there == L)
        for (; k + L <= depth; k += L) transpose<L>(from + k, ld, to + k * N * L, N * L);
      for (; k < depth; k++)
        for (int64_t l = 0; l < L; l++) to[k * N * L + l] = l < there ? T(load<1>(from + l * ld + k)) : T(0);
    }
  }
};
template <int N, int L, class B> Turned<N, L, B> turned(const B* data, int64_t ld, int64_t columns, int64_t depth) {
  return {data, ld, columns, depth};
}

// Panels of narrower elements: panel(n) is where the one at column n begins, its rows are ld apart.
template <int N, int L, class At> struct WidenedPanels {
  static constexpr int vectors = N, lanes = L;
  int64_t ld, depth;
  At panel;
  const void* source(int64_t, const void* other) const { return other; }
  template <class T> void pack(T* to, int64_t n) const {
    const auto from = panel(n);
    for (int64_t k = 0; k < depth; k++)
      UNROLL for (int j = 0; j < N * L; j += L) store<L>(to + k * N * L + j, as<T>(load<L>(from + k * ld + j)));
  }
};
template <int N, int L, class At> WidenedPanels<N, L, At> widened_panels(int64_t ld, int64_t depth, At panel) { return {ld, depth, panel}; }

// row(to, k, begin, end) writes columns begin .. end of row k.
template <int N, int L, class Write> struct FromRows {
  static constexpr int vectors = N, lanes = L;
  int64_t columns, depth;
  Write row;
  const void* source(int64_t, const void* other) const { return other; }
  template <class T> void pack(T* to, int64_t n) const {
    const int64_t end = least_of(n + N * L, columns);
    for (int64_t k = 0; k < depth; k++, to += N * L) {
      row(to, k, n, end);
      for (int64_t j = end - n; j < N * L; j++) to[j] = T(0);
    }
  }
};
template <int N, int L, class Write> FromRows<N, L, Write> from_rows(int64_t columns, int64_t depth, Write row) {
  return {columns, depth, row};
}

// The same, T rows at a time, which divides the depth: rows(to, k, begin, end) writes rows T * k, T * k + 1, ...
template <int N, int L, int T, class Write> struct FromWordRows {
  static constexpr int vectors = N, lanes = L;
  int64_t columns, depth;
  Write rows;
  const void* source(int64_t, const void* other) const { return other; }
  template <class E> void pack(E* to, int64_t n) const {
    const int64_t end = least_of(n + N * L, columns);
    for (int64_t k = 0; k < depth / T; k++) {
      rows(to, k, n, end);
      for (int64_t t = 0; t < T; t++, to += N * L)
        for (int64_t j = end - n; j < N * L; j++) to[j] = E(0);
    }
  }
};
template <int N, int L, int T, class Write> FromWordRows<N, L, T, Write> from_word_rows(int64_t columns, int64_t depth, Write rows) {
  return {columns, depth, rows};
}

// column(to, n) writes column n.
template <int N, int L, class Write> struct FromColumns {
  static constexpr int vectors = N, lanes = L;
  int64_t columns, depth;
  Write column;
  const void* source(int64_t, const void* other) const { return other; }
  template <class T> void pack(T* to, int64_t n) const {
    const int64_t ld = ceil_div(depth, L) * L + L;
    Row<T> wide(L * ld);
    T* const turned = wide;
    for (int64_t j = 0; j < N * L; j += L, to += L) {
      for (int64_t l = 0; l < L; l++) {
        if (n + j + l < columns) column(turned + l * ld, n + j + l);
        else __builtin_memset(turned + l * ld, 0, sizeof(T) * depth);
      }
      int64_t k = 0;
      for (; k + L <= depth; k += L) transpose<L>(turned + k, ld, to + k * N * L, N * L);
      for (; k < depth; k++)
        for (int64_t l = 0; l < L; l++) to[k * N * L + l] = turned[l * ld + k];
    }
  }
};
template <int N, int L, class Write> FromColumns<N, L, Write> from_columns(int64_t columns, int64_t depth, Write column) {
  return {columns, depth, column};
}

// ---- products

// Rows of the left operand, `ld` apart: they do not meet in the same sets of a cache.
template <class T> INLINE int64_t row_length(int64_t depth) { return ceil_div(depth, 16) * 16 + 16; }

// Rows of a block: a multiple of R, their sums in one panel stay near.
template <int R, class Right> constexpr int64_t tile_rows = (8192 / Right::width < BLOCK_ROWS ? 8192 / Right::width : BLOCK_ROWS) / R * R;

// Rows 0 .. rows of a block (m + 0 .. m + rows of the product) times the panel at column n, then finish.
template <int R, class T, class Right, class Finish>
INLINE void panel_product(const T* block, int64_t ld, int64_t m, int64_t rows, int64_t n, int64_t end, int64_t depth, const Right& right,
                          const Finish& finish) {
  alignas(64) T tile[tile_rows<R, Right> * Right::width];
  int64_t k = 0;
  do {
    const int64_t terms = least_of(Right::terms, depth - k);
    for (int64_t i = 0; i < rows; i += R) {
      right.template add<R>(block + i * ld + k, ld, i / R, n, k, terms, tile + i * Right::width, k > 0);
      if (k + terms == depth)
        for (int64_t r = i; r < least_of(i + R, rows); r++) finish((const T*)tile + r * Right::width, m + r, n, end);
    }
    k += Right::terms;
  } while (k < depth);
}

// Rows m .. m + rows of the left operand into a block, and zeros up to a multiple of R rows.
template <int R, class T, class Left> INLINE void fill_block(T* block, int64_t ld, int64_t m, int64_t rows, const Left& left) {
  for (int64_t i = 0; i < rows; i++) left(block + i * ld, m + i);
  __builtin_memset(block + rows * ld, 0, sizeof(T) * (ceil_div(rows, R) * R - rows) * ld);
}

// How threads share a grid of tiles: in `down` parts of the rows times `across` parts of the columns.
struct Shares {
  int64_t down, across;
};
INLINE Shares share_tiles(int64_t groups, int64_t panels, int64_t threads) {
  Shares best = {1, 1};
  double least_time = inf<double>;
  for (int64_t down = 1; down <= threads; down++) {
    const int64_t across = threads / down;
    // tiles of the longest share; each of the shares across copies the left operand again
    const double time = double(ceil_div(groups, down)) * (double(ceil_div(panels, across)) + 0.5);
    if (time < least_time) least_time = time, best = {down, across};
  }
  return best;
}

// Blocks of rows stay near the core while all panels pass.
template <int R, class T, class Left, class Right, class Finish>
void product_of_blocks(int64_t rows, int64_t columns, int64_t depth, int64_t threads, const Left& left, const Right& right,
                       const Finish& finish) {
  constexpr int64_t width = Right::width;
  const int64_t groups = ceil_div(rows, R), panels = ceil_div(columns, width), ld = row_length<T>(depth);
  const Shares shares = share_tiles(groups, panels, threads);
  const int64_t fitting = BLOCK_BYTES / (sizeof(T) * ld) / R * R;
  const int64_t block_rows = fitting < R ? R : least_of(fitting, tile_rows<R, Right>);
  parallel(shares.down * shares.across, 1, int(threads), [&](int64_t begin, int64_t end) {
    for (int64_t s = begin; s < end; s++) {
      const int64_t i = s / shares.across, j = s % shares.across;
      const int64_t m0 = groups * i / shares.down * R, m1 = least_of(groups * (i + 1) / shares.down * R, rows);
      const int64_t n0 = panels * j / shares.across * width, n1 = least_of(panels * (j + 1) / shares.across * width, columns);
      if (m0 >= m1 || n0 >= n1) continue;
      Row<T> block(least_of(ceil_div(m1 - m0, R) * R, block_rows) * ld);
      for (int64_t m = m0; m < m1; m += block_rows) {
        const int64_t count = least_of(block_rows, m1 - m);
        fill_block<R, T>(block, ld, m, count, left);
        for (int64_t n = n0; n < n1; n += width) panel_product<R, T>(block, ld, m, count, n, least_of(n + width, n1), depth, right, finish);
      }
    }
  });
}

// Few tiles and a long depth: threads share the depth, in parts that do not depend on their number.
template <int R, class T, class Left, class Right, class Finish>
void product_of_parts(int64_t rows, int64_t columns, int64_t depth, int64_t threads, const Left& left, const Right& right,
                      const Finish& finish) {
  constexpr int64_t width = Right::width;
  const int64_t padded = ceil_div(rows, R) * R, panels = ceil_div(columns, width), ld = row_length<T>(depth);
  const int64_t size = padded * panels * width;
  Row<T> block(padded * ld), sums(PARTS * size);
  fill_block<R, T>(block, ld, 0, rows, left);
  parallel(PARTS, 1, int(threads), [&](int64_t begin, int64_t end) {
    for (int64_t part = begin; part < end; part++) {
      const int64_t first = share(depth, part, PARTS, 16), last = share(depth, part + 1, PARTS, 16);
      for (int64_t p = 0; p < panels; p++)
        for (int64_t i = 0; i < padded; i += R)
          right.template add<R>((const T*)block + i * ld + first, ld, i / R, p * width, first, last - first,
                                (T*)sums + part * size + (p * padded + i) * width, false);
    }
  });
  for (int64_t part = 1; part < PARTS; part++)
    for (int64_t i = 0; i < size; i++) sums[i] += sums[part * size + i];
  for (int64_t m = 0; m < rows; m++)
    for (int64_t p = 0; p < panels; p++)
      finish((const T*)sums + (p * padded + m) * width, m, p * width, least_of((p + 1) * width, columns));
}

INLINE int64_t useful_threads(int64_t work, int threads) { return work < 2 * THREAD_WORK ? 1 : least_of(work / THREAD_WORK, threads); }

// The product of `rows` x `depth` and `depth` x `columns`, the right operand as it lies.
template <int R, class T, class Left, class Right, class Finish>
void product(int64_t rows, int64_t columns, int64_t depth, int threads, const Left& left, const Right& right, const Finish& finish) {
  const int64_t groups = ceil_div(rows, R), panels = ceil_div(columns, Right::width);
  const int64_t useful = useful_threads(groups * panels * R * Right::width * (depth + 1), threads);
  const bool deep = depth >= PARTS * DEPTH && groups * panels < FEW_TILES;
  if (deep) product_of_parts<R, T>(rows, columns, depth, useful, left, right, finish);
  else product_of_blocks<R, T>(rows, columns, depth, useful, left, right, finish);
}

// The same, of a right operand that is copied into panels: a small one before the product, else each panel where it is needed.
template <int R, class T, class Left, class From, class Finish>
void product_packed(int64_t rows, int64_t columns, int64_t depth, int threads, const Left& left, const From& from, const Finish& finish) {
  constexpr int64_t width = From::vectors * From::lanes;
  const int64_t panels_count = ceil_div(columns, width), size = width * depth, padded = ceil_div(rows, R) * R, ld = row_length<T>(depth);
  const int64_t useful = useful_threads(padded * panels_count * width * (depth + 1), threads);
  if (panels_count * size * int64_t(sizeof(T)) <= BLOCK_BYTES || panels_count < 4 * useful || rows > 2 * columns) {
    Row<T> memory(panels_count * size);
    parallel(panels_count, 1, int(useful), [&](int64_t begin, int64_t end) {
      for (int64_t p = begin; p < end; p++) from.pack((T*)memory + p * size, p * width);
    });
    const T* const data = memory;
    const auto right = panels<From::vectors, From::lanes>(width, [=](int64_t n) { return data + n * depth; });
    product_of_blocks<R, T>(rows, columns, depth, useful, left, right, finish);
    return;
  }
  Row<T> block(padded * ld);
  parallel(rows, 1, int(useful), [&](int64_t begin, int64_t end) {
    for (int64_t m = begin; m < end; m++) left((T*)block + m * ld, m);
  });
  __builtin_memset((T*)block + rows * ld, 0, sizeof(T) * (padded - rows) * ld);
  parallel(panels_count, 1, int(useful), [&](int64_t begin, int64_t end) {
    Row<T> panel(size);
    for (int64_t n = begin * width; n < least_of(end * width, columns); n += width) {
      from.pack((T*)panel, n);
      using Right = Copied<From::vectors, From::lanes, T>;
      const Right right{panel, (const char*)from.source(n + width, (T*)panel)};
      for (int64_t m = 0; m < rows; m += tile_rows<R, Right>) {
        const int64_t count = least_of(tile_rows<R, Right>, rows - m);
        panel_product<R, T>((const T*)block + m * ld, ld, m, count, n, least_of(n + width, columns), depth, right, finish);
      }
    }
  });
}

// The same, of contiguous columns and a number of rows that may be small.
template <int R, class T, class Left, class From, class Finish>
void product_turned(int64_t rows, int64_t columns, int64_t depth, int threads, const Left& left, const From& from, const Finish& finish) {
  if (rows > FEW_ROWS) return product_packed<R, T>(rows, columns, depth, threads, left, from, finish);
  using Right = Columns<typename From::element, From::lanes>;
  product<4, T>(rows, columns, depth, threads, left, Right{from.data, from.ld, columns}, finish);
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

// f(outer, begin, end, at) for each part of flat positions first .. last that lies within one row of `extent`; `at` counts from first.
template <class F> INLINE void segments(int64_t first, int64_t last, int64_t extent, F f) {
  for (int64_t flat = first; flat < last;) {
    const int64_t outer = flat / extent, begin = flat - outer * extent, end = least_of(extent, begin + last - flat);
    f(outer, begin, end, flat - first);
    flat += end - begin;
  }
}

}  // namespace tile
