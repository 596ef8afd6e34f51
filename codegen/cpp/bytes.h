// Products of bytes, exact in int32 (included by vec.h): rows of int8 times panels of int8.
//
// A word of 32 bits holds four neighbouring terms of a column, the first in its lowest bits; a row of a panel is a word of each column.
// Three vocabularies: a register's sum of four products of unsigned and signed bytes (VNNI), that of two products of 16 bits, and plain
// vectors.
#pragma once

namespace tile {

#ifdef __clang__
#define BYTES_16(s, u, v) __builtin_ia32_vpdpbusd512(s, u, v)
#define BYTES_8(s, u, v) __builtin_ia32_vpdpbusd256(s, u, v)
#define PAIRS_16(a, b) __builtin_ia32_pmaddwd512(a, b)
#else
#define BYTES_16(s, u, v) __builtin_ia32_vpdpbusd_v16si(s, u, v)
#define BYTES_8(s, u, v) __builtin_ia32_vpdpbusd_v8si(s, u, v)
#define PAIRS_16(a, b) __builtin_ia32_pmaddwd512_mask(a, b, vec<int32_t, 16>{}, -1)
#endif

// Does the machine add four products of bytes to each of L sums at once?
template <int L> constexpr bool multiplies_bytes = false;
#ifdef __AVX512VNNI__
template <> inline constexpr bool multiplies_bytes<16> = true;
#endif
#if defined(__AVX512VNNI__) && defined(__AVX512VL__) || defined(__AVXVNNI__)
template <> inline constexpr bool multiplies_bytes<8> = true;
#endif

// sum + u[0] * v[0] + ... + u[3] * v[3] of the bytes of each lane, unsigned ones of u and signed ones of v.
template <class V> INLINE V add_bytes(V sum, V u, V v) {
#ifdef __AVX512VNNI__
  if constexpr (lanes<V> == 16) return bits<V>(BYTES_16(sum, u, v));
#endif
#if defined(__AVX512VNNI__) && defined(__AVX512VL__) || defined(__AVXVNNI__)
  if constexpr (lanes<V> == 8) return bits<V>(BYTES_8(sum, u, v));
#endif
  return sum;
}

// a[0] * b[0] + a[1] * b[1] of the two signed halves of each lane.
template <class V> INLINE V pairs(V a, V b) {
  typedef vec<int16_t, 2 * lanes<V>> Halves;
#ifdef __AVX512BW__
  if constexpr (lanes<V> == 16) return bits<V>(PAIRS_16(bits<Halves>(a), bits<Halves>(b)));
#endif
#ifdef __AVX2__
  if constexpr (lanes<V> == 8) return bits<V>(__builtin_ia32_pmaddwd256(bits<Halves>(a), bits<Halves>(b)));
#endif
#ifdef __SSE2__
  if constexpr (lanes<V> == 4) return bits<V>(__builtin_ia32_pmaddwd128(bits<Halves>(a), bits<Halves>(b)));
#endif
  return (a << 16 >> 16) * (b << 16 >> 16) + (a >> 16) * (b >> 16);
}

// A row of the left operand as words. With VNNI four terms are one, as unsigned bytes x + 128; what a row of zeros gives is taken off the
// sums. Else they are two: terms 0 and 2, and 1 and 3, in 16 bits.
template <int L> constexpr int words_of_four = multiplies_bytes<L> ? 1 : 2;
template <int L> INLINE void row_of_words(const int8_t* from, int64_t depth, int32_t* to) {
  for (int64_t k = 0; k < depth; k += 4) {
    vec<int8_t, 4> x{};
    if (k + 4 <= depth) __builtin_memcpy(&x, from + k, 4);
    else
      for (int i = 0; i < depth - k; i++) x[i] = from[k + i];
    if constexpr (multiplies_bytes<L>) *to++ = bits<int32_t>(x) ^ 0x80808080;
    else {
      *to++ = (x[0] & 0xffff) | x[2] << 16;
      *to++ = (x[1] & 0xffff) | x[3] << 16;
    }
  }
}

// tile[i][j] = sum over words w of a[i][w] * b[w][j], or is added to what the tile holds if `more`. ahead(w) as in `micro`.
template <int R, int N, int L, class Ahead>
ONCE void micro_bytes(const int32_t* a, int64_t lda, const int32_t* b, int64_t ldb, int64_t words, int32_t* tile, int64_t ldt, bool more,
                      Ahead ahead) {
  typedef vec<int32_t, L> V;
  V sum[R][N] = {};
  for (int64_t w = 0; w < words; w++) {
    ahead(w);
    V right[N];
    UNROLL for (int j = 0; j < N; j++) right[j] = load<L>(b + w * ldb + j * L);
    if constexpr (multiplies_bytes<L>) {
      UNROLL for (int i = 0; i < R; i++) {
        const V left = splat<L>(a[i * lda + w]);
        UNROLL for (int j = 0; j < N; j++) sum[i][j] = add_bytes(sum[i][j], left, right[j]);
      }
    } else {
      UNROLL for (int half = 0; half < 2; half++) {
        V part[N];
        UNROLL for (int j = 0; j < N; j++) {
          const auto shorts = bits<vec<int16_t, 2 * L>>(right[j]);
          part[j] = bits<V>(half ? shorts >> 8 : shorts << 8 >> 8);
        }
        UNROLL for (int i = 0; i < R; i++) {
          const V left = splat<L>(a[i * lda + 2 * w + half]);
          UNROLL for (int j = 0; j < N; j++) sum[i][j] += pairs(part[j], left);
        }
      }
    }
  }
  UNROLL for (int i = 0; i < R; i++)
    UNROLL for (int j = 0; j < N; j++) {
      int32_t* const at = tile + i * ldt + j * L;
      store<L>(at, more ? load<L>(at) + sum[i][j] : sum[i][j]);
    }
}

constexpr int64_t BYTE_WORDS = 384;  // words of one run of the micro-kernel
constexpr int64_t BYTE_ROWS = 192;   // rows of the left operand that meet a panel while it is near

// Panels of words: panel(n) is where column n begins, rows of words are ld apart.
template <int N, int L, class At> struct BytePanels {
  static constexpr int vectors = N, lanes = L;
  static constexpr int64_t width = N * L;
  int64_t ld;
  At panel;
};
template <int N, int L, class At> BytePanels<N, L, At> byte_panels(int64_t ld, At panel) { return {ld, panel}; }

// Rows m .. m + rows of the product, which are a block of words, times the panel at column n; then finish.
template <int R, int N, int L, class At, class Finish>
INLINE void panel_of_bytes(const int32_t* block, int64_t lda, int64_t m, int64_t rows, int64_t n, int64_t end, int64_t words,
                           const BytePanels<N, L, At>& right, const Finish& finish) {
  constexpr int64_t width = N * L, each = words_of_four<L>;
  constexpr bool offset = multiplies_bytes<L>;
  alignas(64) int32_t tile[(BYTE_ROWS + R) * width];
  const int64_t groups = ceil_div(rows, R);
  const bool spare = offset && groups * R == rows;  // the row of zeros behind the last has no place in the groups
  const int32_t* const data = (const int32_t*)right.panel(n);
  for (int64_t w = 0; w < words; w += BYTE_WORDS) {
    const int64_t count = least_of(BYTE_WORDS, words - w);
    const int32_t* const part = data + w * right.ld;
    const char* const next = (const char*)(part + count * right.ld);
    for (int64_t g = 0; g < groups; g++) {
      const char* const mine = next + g % (N + 1) * count * LINE;
      const auto ahead = [=](int64_t k) LANES { fetch(mine + k * LINE); };
      const auto stream = [=](int64_t k) LANES {
        UNROLL for (int64_t i = 0; i < N * L * 4; i += LINE) fetch((const char*)(part + k * right.ld) + NEAR + i);
      };
      const int32_t* const a = block + g * R * lda + w * each;
      if constexpr (R <= 4) micro_bytes<R, N, L>(a, lda, part, right.ld, count, tile + g * R * width, width, w > 0, stream);
      else micro_bytes<R, N, L>(a, lda, part, right.ld, count, tile + g * R * width, width, w > 0, ahead);
    }
    if (spare) micro_bytes<1, N, L>(block + rows * lda + w * each, lda, part, right.ld, count, tile + rows * width, width, w > 0, Nothing{});
  }
  for (int64_t r = 0; r < rows; r++) {
    int32_t* const sums = tile + r * width;
    if constexpr (offset)
      for (int64_t j = 0; j < width; j += L) store<L>(sums + j, load<L>(sums + j) - load<L>(tile + rows * width + j));
    finish((const int32_t*)sums, m + r, n, end);
  }
}

// The product of `rows` x `depth` and `depth` x `columns` bytes; left(to, m) writes row m.
template <int R, int N, int L, class At, class Left, class Finish>
void product_of_bytes(int64_t rows, int64_t columns, int64_t depth, int threads, const Left& left, const BytePanels<N, L, At>& right,
                      const Finish& finish) {
  constexpr int64_t width = N * L, each = words_of_four<L>;
  const int64_t words = ceil_div(depth, 4), lda = ceil_div(words * each, 16) * 16 + 16;
  const int64_t panels_count = ceil_div(columns, width), groups = ceil_div(rows, R);
  const Shares shares = share_tiles(groups, panels_count, useful_threads(groups * R * panels_count * width * (words + 1), threads));
  const int64_t fitting = least_of(BLOCK_BYTES / (4 * lda), BYTE_ROWS) / R * R, most = fitting < R ? R : fitting;
  parallel(shares.down * shares.across, 1, threads, [&](int64_t begin, int64_t end) {
    for (int64_t s = begin; s < end; s++) {
      const int64_t i = s / shares.across, j = s % shares.across;
      const int64_t m0 = groups * i / shares.down * R, m1 = least_of(groups * (i + 1) / shares.down * R, rows);
      const int64_t n0 = panels_count * j / shares.across * width, n1 = least_of(panels_count * (j + 1) / shares.across * width, columns);
      if (m0 >= m1 || n0 >= n1) continue;
      const int64_t block_rows = ceil_div(ceil_div(m1 - m0, ceil_div(m1 - m0, most)), R) * R;
      Row<int8_t> row(depth);
      Row<int32_t> block((block_rows + R) * lda);
      for (int64_t m = m0; m < m1; m += block_rows) {
        const int64_t count = least_of(block_rows, m1 - m);
        for (int64_t r = 0; r < count; r++) {
          left((int8_t*)row, m + r);
          row_of_words<L>(row, depth, block + r * lda);
        }
        for (int64_t r = count; r < ceil_div(count + 1, R) * R; r++)
          for (int64_t w = 0; w < words * each; w++) block[r * lda + w] = multiplies_bytes<L> ? 0x80808080 : 0;
        for (int64_t n = n0; n < n1; n += width)
          panel_of_bytes<R>((const int32_t*)block, lda, m, count, n, least_of(n + width, n1), words, right, finish);
      }
    }
  });
}

}  // namespace tile
