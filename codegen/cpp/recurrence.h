// Recurrences of generated kernels (included by vec.h): steps that follow each other, with the weights of the state kept in cache.
//
// A state is a row of `units` numbers for each row of the batch. Units are handled in blocks of L: the N products of a block's units with
// the state before are computed together, into a tile, so that all of them are at hand where the next state is computed.
#pragma once

extern "C" int omp_get_thread_num();
extern "C" int omp_get_num_threads();

namespace tile::recurrent {

#if defined(__AVX512F__) || defined(__aarch64__)
constexpr int VECTOR_REGISTERS = 32;
#else
constexpr int VECTOR_REGISTERS = 16;
#endif
constexpr int64_t TERMS = 128;                 // of a sum that are added one by one: rounding grows slowly
constexpr int64_t STEP_WORK = 1 << 16;         // multiplications of one step that are worth a thread, and waiting for it
constexpr int64_t ROWS_WORK = 1 << 18;         // of all steps, where threads need not wait for each other
constexpr int64_t WEIGHTS_IN_CACHE = 3 << 19;  // bytes of weights that every core can keep for itself
constexpr int64_t AHEAD = 16;                  // terms between those summed and those whose weights are fetched
constexpr int64_t ROWS_ALONE = 4;              // with fewer rows a thread waits for the weights, even from its cache

// How many of N vectors R rows can sum at a time: a divisor of N.
template <int N> constexpr int together(int rows) {
  for (int n = N; n > 1; n--)
    if (N % n == 0 && rows * n + n + 1 <= VECTOR_REGISTERS) return n;
  return 1;
}
// As many rows as keep the loads of a step behind its multiplications.
template <int N> constexpr int tile_rows = N == 1 ? 4 : VECTOR_REGISTERS == 32 ? 8 : N % 2 ? 4 : 6;
// How many terms are added at once. Threads share rows, and so decide what tiles have: this is the same for all of two rows or more.
template <int R, int N> constexpr int terms_at_once = R == 1 || N == 1 ? 4 : 1;

// tile[i][n * L + l] = sum over k < depth of state[i][k] * weights[k][n * L + l] for `rows` <= R rows.
template <int R, int N, int L, class T>
INLINE void products(const T* state, int64_t ld, int64_t rows, const T* weights, int64_t depth, T* tile) {
  if constexpr (R > 0) {
    if (rows < R) return products<R - 1, N, L>(state, ld, rows, weights, depth, tile);
    constexpr int n = together<N>(R);
    for (int j = 0; j < N; j += n)
      for (int64_t k = 0; k < depth; k += TERMS) {
        const T* const part = weights + k * N * L + j * L;
        micro<R, n, L, terms_at_once<R, N>>(state + k, ld, part, N * L, least_of(TERMS, depth - k), tile + j * L, N * L, k > 0, [=](int64_t term) LANES {
          for (int i = 0; i < n * L; i += LINE / sizeof(T)) __builtin_prefetch(part + (term + AHEAD) * N * L + i);
        });
      }
  }
}

// What one of the threads computes: rows and blocks of units, from .. to.
struct Part {
  int64_t row, rows_end, block, blocks_end;
};

// How threads share the work: in parts of the rows, which know nothing of each other, and parts of the units, which wait for each
// other after every step.
struct Parts {
  int64_t rows, units;
  Parts(int64_t row_count, int64_t blocks, int64_t steps, int64_t row_work, int64_t weight_bytes, int threads) {
    const int64_t useful = steps * row_count * row_work / ROWS_WORK + 1, full = row_count / ROWS_ALONE;
    const int64_t most = threads < useful ? threads : useful;
    rows = weight_bytes > WEIGHTS_IN_CACHE ? 1 : most < full ? most : full > 0 ? full : 1;
    units = row_count * row_work / STEP_WORK + 1;
    if (units > most / rows) units = most / rows;
    if (units > blocks) units = blocks;
    if (units < 1) units = 1;
  }
  Part part(int64_t number, int64_t row_count, int64_t blocks) const {
    const int64_t i = number / units, j = number % units;
    if (i >= rows) return {0, 0, 0, 0};
    return {row_count * i / rows, row_count * (i + 1) / rows, blocks * j / units, blocks * (j + 1) / units};
  }
};

// S states of type T, of which the first is multiplied with the weights.
//   pack(to, begin, end): the weights of units begin .. end as to[source][n * L + unit - begin]
//   start(row, begin, end, state): state[s][unit] before the first step
//   next(step, row, begin, end, sums, before, after): after[s][unit] from before[s][unit] and the products sums[n * L + unit - begin]
//   finish(row, begin, end, state): stores state[s][unit] after the last step
template <int N, int S, int L, class T, class Pack, class Start, class Next, class Finish>
void recurrence(int64_t rows, int64_t units, int64_t steps, bool reverse, int threads, const Pack& pack, const Start& start,
                const Next& next, const Finish& finish) {
  if (rows <= 0) return;
  constexpr int R = tile_rows<N>;
  const int64_t blocks = ceil_div(units, L), ld = blocks * L + 16, size = rows * ld, panel = units * N * L;
  const Parts parts(rows, blocks, steps, N * units * units, blocks * panel * sizeof(T), threads);
  Row<T> packed(blocks * panel), memory((S + 1) * size);  // the first state twice: the one before and the one after a step

  const auto work = [&](int64_t me, int64_t team, auto wait) LANES {
    for (int64_t b = blocks * me / team; b < blocks * (me + 1) / team; b++) {
      if ((b + 1) * L > units) __builtin_memset((T*)packed + b * panel, 0, sizeof(T) * panel);
      pack((T*)packed + b * panel, b * L, b * L + L < units ? b * L + L : units);
    }
    // fewer threads than asked for share what there is
    Parts mine = parts;
    if (mine.rows > team) mine.rows = team;
    if (mine.rows * mine.units > team) mine.units = team / mine.rows;
    const Part part = mine.part(me, rows, blocks);
    const int64_t begin = part.block * L, end = part.blocks_end * L < units ? part.blocks_end * L : units;
    const auto at = [&](int64_t row, int64_t turn, T** state) LANES {
      state[0] = (T*)memory + turn * size + row * ld;
      for (int s = 1; s < S; s++) state[s] = (T*)memory + (s + 1) * size + row * ld;
    };
    T *before[S], *after[S];
    for (int64_t row = part.row; row < part.rows_end; row++) {
      at(row, 0, before);
      start(row, begin, end, before);
    }
    wait(true);
    alignas(64) T tile[R * N * L];
    const int64_t count = part.rows_end - part.row, groups = ceil_div(count, R);
    for (int64_t n = 0; n < steps; n++) {
      for (int64_t b = part.block; b < part.blocks_end; b++)
        for (int64_t g = 0; g < groups; g++) {
          const int64_t first = part.row + count * g / groups, last = part.row + count * (g + 1) / groups;
          at(first, n % 2, before);
          products<R, N, L>((const T*)before[0], ld, last - first, (const T*)packed + b * panel, units, tile);
          for (int64_t row = first; row < last; row++) {
            at(row, n % 2, before);
            at(row, (n + 1) % 2, after);
            next(reverse ? steps - 1 - n : n, row, b * L, b * L + L < units ? b * L + L : units, (const T*)tile + (row - first) * N * L,
                 before, after);
          }
        }
      wait(mine.units > 1);
    }
    for (int64_t row = part.row; row < part.rows_end; row++) {
      at(row, steps % 2, before);
      finish(row, begin, end, before);
    }
  };

  const int64_t team = parts.rows * parts.units;
  if (team == 1) return work(0, 1, [](bool) {});
#pragma omp parallel num_threads(int(team))
  work(omp_get_thread_num(), omp_get_num_threads(), [](bool needed) {
    if (needed) {
#pragma omp barrier
    }
  });
}

}  // namespace tile::recurrent

namespace tile {
using recurrent::recurrence;
}  // namespace tile
