// Products whose left operand is read where it lies (included by vec.h): each of its rows is a few runs of neighbouring elements.
//
// A row of a matrix is one run. The window of a convolution with its channels last is one run for each of its points, or, where channels
// are few, one for each of its lines. Nothing is copied but runs that are partly outside of the image.
#pragma once

namespace tile {

constexpr int64_t RUN_TERMS = 768;    // are summed up in registers before they are added to the others
constexpr int64_t RUN_TILE = 15360;   // sums of a block of rows
constexpr int64_t SOON = 8;           // rows of a panel between what is read and what is fetched

// tile[i][j] = sum over t < count and k < length of runs[t][i][from + k] * b[t * length + k][j], or is added to what the tile holds if
// `more`. Runs of R rows stand together. The tile has R rows of N vectors; rows of b are ldb apart. What is at `next` is fetched meanwhile.
template <int R, int N, int L, class B, class T>
ONCE void micro_runs(const T* const* runs, int64_t count, int64_t from, int64_t length, const B* b, int64_t ldb, const char* next, T* tile,
                     bool more) {
  vec<T, L> sum[R][N] = {};
  for (int64_t t = 0; t < count; t++, runs += R) {
    const T* a[R];
    UNROLL for (int i = 0; i < R; i++) a[i] = runs[i] + from;
    for (int64_t k = 0; k < length; k++, b += ldb, next += LINE) {
      fetch(next);
      UNROLL for (int64_t i = 0; i < int64_t(sizeof(B)) * N * L; i += LINE) __builtin_prefetch((const char*)(b + SOON * ldb) + i);
      vec<T, L> right[N];
      UNROLL for (int j = 0; j < N; j++) right[j] = as<T>(load<L>(b + j * L));
      UNROLL for (int i = 0; i < R; i++) {
        const auto left = splat<L>(a[i][k]);
        UNROLL for (int j = 0; j < N; j++) sum[i][j] += left * right[j];
      }
    }
  }
  UNROLL for (int i = 0; i < R; i++)
    UNROLL for (int j = 0; j < N; j++) {
      T* const at = tile + (i * N + j) * L;
      store<L>(at, more ? load<L>(at) + sum[i][j] : sum[i][j]);
    }
}

// Takes the runs of one row, in order, and says where each can be read. A run is S pieces of `size` elements.
template <int R, int S, class T> struct RowOfRuns {
  const T** to;
  const T *data, *zeros;
  T* copy;
  int64_t size;

  // The next run begins at data + at. Its pieces for which `inside` holds, which are neighbours, exist; the others are zeros.
  template <class F> INLINE void run(int64_t at, F inside) {
    if constexpr (S == 1) *to = inside(0) ? data + at : zeros;
    else {
      const Span there = span(S, inside);
      if (there.begin == 0 && there.end == S) *to = data + at;
      else if (there.begin == there.end) *to = zeros;
      else *to = part(at, there.begin * size, there.end * size);
    }
    to += R;
  }

  INLINE const T* part(int64_t at, int64_t begin, int64_t end) {
    T* const room = copy;
    copy += S * size;
    for (int64_t k = 0; k < begin; k++) room[k] = T(0);
    for (int64_t k = begin; k < end; k++) room[k] = data[at + k];
    for (int64_t k = end; k < S * size; k++) room[k] = T(0);
    return room;
  }
};

// `rows` rows, from row m on, times the panel at column n, then finish.
template <int R, int N, int L, class T, class At, class Finish>
INLINE void panel_of_runs(const T* const* runs, int64_t count, int64_t length, int64_t m, int64_t rows, int64_t n, int64_t end,
                          const Panels<N, L, At>& right, const Finish& finish) {
  constexpr int64_t width = N * L;
  alignas(64) T tile[RUN_TILE];
  const bool once = count * length <= RUN_TERMS;
  const int64_t several = once ? count : ceil_div(count, ceil_div(count, length < RUN_TERMS ? RUN_TERMS / length : 1));
  const int64_t piece = once ? length : ceil_div(ceil_div(length, ceil_div(length, RUN_TERMS)), L) * L;
  for (int64_t t = 0; t < count; t += several)
    for (int64_t k = 0; k < length; k += piece) {
      const int64_t taken = least_of(several, count - t), terms = least_of(piece, length - k);
      const auto data = right.panel(n) + (t * length + k) * right.ld;
      constexpr int64_t shares = sizeof(*data) * width / LINE + 1;
      const bool last = t + taken == count && k + terms == length;
      for (int64_t i = 0; i < rows; i += R) {
        T* const sums = tile + (once ? 0 : i * width);
        const char* const next = (const char*)(data + taken * terms * right.ld) + i / R % shares * taken * terms * LINE;
        micro_runs<R, N, L>(runs + i * count + t * R, taken, k, terms, data, right.ld, next, sums, t + k > 0);
        if (last)
          for (int64_t r = 0; r < least_of(R, rows - i); r++) finish((const T*)sums + r * width, m + i + r, n, end);
      }
    }
}

// The product of `rows` x `count` runs of S * `size` elements and a right operand in panels. left(row, m) hands the runs of row m to `row`.
template <int R, int S, class T, int N, int L, class At, class Left, class Finish>
void product_of_runs(int64_t rows, int64_t columns, int64_t count, int64_t size, int threads, const T* data, const Left& left,
                     const Panels<N, L, At>& right, const Finish& finish) {
  constexpr int64_t width = N * L, most = RUN_TILE / width / R;
  const int64_t length = S * size, groups = ceil_div(rows, R), panels = ceil_div(columns, width);
  const Shares shares = share_tiles(groups, panels, useful_threads(groups * R * panels * width * count * length, threads));
  const int64_t fitting = BLOCK_BYTES / (int64_t(sizeof(T)) * R * length * least_of(count, 2)) + 1;  // windows overlap
  parallel(shares.down * shares.across, 1, threads, [&](int64_t begin, int64_t end) {
    Row<T> zeros(length);
    for (int64_t k = 0; k < length; k++) zeros[k] = T(0);
    for (int64_t s = begin; s < end; s++) {
      const int64_t i = s / shares.across, j = s % shares.across;
      const int64_t g0 = groups * i / shares.down, g1 = groups * (i + 1) / shares.down;
      const int64_t n0 = panels * j / shares.across * width, n1 = least_of(panels * (j + 1) / shares.across * width, columns);
      if (g0 >= g1 || n0 >= n1) continue;
      const int64_t block = ceil_div(g1 - g0, ceil_div(g1 - g0, least_of(fitting, most)));
      Row<const T*> runs(block * R * count);
      Row<T> copies(S > 1 ? block * R * count * length : 0);
      for (int64_t g = g0; g < g1; g += block) {
        const int64_t m = g * R, there = least_of(block, g1 - g) * R;
        for (int64_t r = 0; r < there; r++) {  // the last row again where there are no more
          RowOfRuns<R, S, T> row{(const T**)runs + r / R * R * count + r % R, data, zeros, (T*)copies + r * count * length, size};
          left(row, least_of(m + r, rows - 1));
        }
        for (int64_t n = n0; n < n1; n += width)
          panel_of_runs<R>((const T* const*)runs, count, length, m, least_of(there, rows - m), n, least_of(n + width, n1), right, finish);
      }
    }
  });
}

// The same, of a right operand that is copied into panels, as many at a time as stay near.
template <int R, int S, class T, class Left, class From, class Finish>
void product_of_runs_packed(int64_t rows, int64_t columns, int64_t count, int64_t size, int threads, const T* data, const Left& left,
                            const From& from, const Finish& finish) {
  constexpr int64_t width = From::vectors * From::lanes;
  const int64_t depth = count * S * size, panel = width * depth, fitting = BLOCK_BYTES / (int64_t(sizeof(T)) * panel) + 1;
  const int64_t most = least_of(fitting, ceil_div(columns, width));
  Row<T> memory(most * panel);
  T* const packed = memory;
  for (int64_t first = 0; first < columns; first += most * width) {
    const int64_t there = least_of(most * width, columns - first);
    parallel(ceil_div(there, width), 1, int(useful_threads(rows * there * depth, threads)), [=](int64_t begin, int64_t end) {
      for (int64_t p = begin; p < end; p++) from.pack(packed + p * panel, first + p * width);
    });
    const auto right = panels<From::vectors, From::lanes>(width, [=](int64_t n) { return (const T*)packed + n * depth; });
    product_of_runs<R, S>(rows, there, count, size, threads, data, left, right,
                          [=](const T* sums, int64_t m, int64_t begin, int64_t end) LANES { finish(sums, m, first + begin, first + end); });
  }
}

}  // namespace tile
