// Products with weights of few bits (included by vec.h).
//
// A word of 32 bits holds the next 32 / Bits terms of a column, the first in its lowest bits; a row of a panel is a word of each of its
// columns. A weight is (level - zero) * scale, where a group of terms of a column shares scale and zero.
//
// Many rows: panels become floats as they are needed. Few rows: memory sets the time, and levels stay in registers. Where the machine
// multiplies bytes, a group of a row becomes integers of four digits, base 256, of a common unit, and all sums within the group are exact;
// elsewhere levels become floats. A result that is infinite or NaN is summed up from floats, term by term.
#pragma once

namespace tile {

constexpr int64_t FEW_WORD_ROWS = 20;  // rows up to which panels are not turned into floats
constexpr int64_t WORD_AHEAD = 6144;   // bytes of a panel between what is read and what is fetched
constexpr int DIGITS = 4;

// Term t of each word. A sign that is there extends.
template <int Bits, bool Signed, class V> INLINE V level(V word, int t) {
  typedef vec<uint32_t, lanes<V>> U;
  if constexpr (Signed) return word << (32 - Bits * (t + 1)) >> (32 - Bits);
  else {
    const U moved = bits<U>(word) >> (Bits * t);
    return bits<V>(t == 32 / Bits - 1 ? moved : moved & ((1u << Bits) - 1));
  }
}

// to[k][j] = (level k of column j - zeros[j]) * scales[j]
template <int N, int L, int Bits, bool Signed, bool Zeros>
ONCE void floats_of_words(const int32_t* words, int64_t ld, int64_t depth, const float* scales, const float* zeros, float* to) {
  constexpr int64_t terms = 32 / Bits, width = N * L;
  for (int64_t k = 0; k < depth; k += terms, words += ld)
    for (int j = 0; j < width; j += L) {
      const auto word = load<L>(words + j);
      const auto scale = load<L>(scales + j);
      UNROLL for (int t = 0; t < terms; t++) {
        auto value = as<float>(level<Bits, Signed>(word, t));
        if constexpr (Zeros) value -= load<L>(zeros + j);
        if (k + t < depth) store<L>(to + (k + t) * width + j, value * scale);
      }
    }
}

// tile[i][j] += scales[j] * sum over k of a[i][k] * (level k of column j - zeros[j]).
template <int R, int N, int L, int Bits, bool Signed, bool Zeros>
ONCE void micro_words(const float* a, int64_t lda, const int32_t* words, int64_t ld, int64_t count, const float* scales,
                      const float* zeros, float* tile, int64_t ldt) {
  constexpr int terms = 32 / Bits, U = R * N * 4 <= 16 ? 4 : R * N * 2 <= 16 ? 2 : 1;
  vec<float, L> sums[U][R][N] = {};
  for (int64_t w = 0; w < count; w++, words += ld, a += terms) {
    UNROLL for (int64_t i = 0; i < 4 * N * L; i += LINE) fetch((const char*)words + WORD_AHEAD + i);
    UNROLL for (int j = 0; j < N; j++) {
      const auto word = load<L>(words + j * L);
      UNROLL for (int t = 0; t < terms; t++) {
        auto value = as<float>(level<Bits, Signed>(word, t));
        if constexpr (Zeros) value -= load<L>(zeros + j * L);
        UNROLL for (int i = 0; i < R; i++) sums[t % U][i][j] += splat<L>(a[i * lda + t]) * value;
      }
    }
  }
  UNROLL for (int i = 0; i < R; i++)
    UNROLL for (int j = 0; j < N; j++) {
      UNROLL for (int u = 1; u < U; u++) sums[0][i][j] += sums[u][i][j];
      float* const at = tile + i * ldt + j * L;
      store<L>(at, load<L>(at) + sums[0][i][j] * load<L>(scales + j * L));
    }
}

// What digits of a block of terms of a row count: unit * sum over d of 256^d * digit d; totals: sums of the digits.
struct Unit {
  float unit, totals[DIGITS];
};

// `count` terms of a row as digits: those that meet the bytes of `(word >> j * Bits) & mask` stand together, least digit first. False where
// the numbers are not finite, or near the ends of what floats can be.
template <int Bits> inline bool digits_of(const float* a, int64_t count, int32_t* to, Unit& unit) {
  constexpr int64_t terms = 32 / Bits, each = 8 / Bits;
  int32_t most = 0, totals[DIGITS] = {};
  for (int64_t k = 0; k < count; k++) {
    const int32_t magnitude = bits<int32_t>(a[k]) & 0x7fffffff;
    most = magnitude > most ? magnitude : most;
  }
  const int32_t exponent = most >> 23;  // magnitudes are less than 2^(exponent - 126)
  const bool ordinary = most == 0 || (exponent >= 30 && exponent <= 253);
  const float factor = ordinary && most ? bits<float>((283 - exponent) << 23) : 0;  // makes them less than 2^30
  int8_t* const bytes = (int8_t*)to;
  for (int64_t k = 0; k < count; k++) {
    int32_t x = int32_t(a[k] * factor);
    int8_t* const at = bytes + ((k / terms * each + k % each) * DIGITS) * 4 + k % terms / each;
    UNROLL for (int d = 0; d < DIGITS; d++) {
      const int8_t digit = int8_t(x);
      at[4 * d] = digit;
      totals[d] += digit;
      x = (x - digit) >> 8;
    }
  }
  unit.unit = ordinary && most ? bits<float>((exponent - 29) << 23) : 0;
  for (int d = 0; d < DIGITS; d++) unit.totals[d] = float(totals[d]);
  return ordinary;
}

// tile[i][j] += scales[j] * unit[i] * sum over k of digits[i][k] * (level k of column j - zeros[j])
template <int R, int N, int L, int Bits, bool Signed, bool Zeros>
ONCE void micro_digits(const int32_t* digits, int64_t lda, const int32_t* words, int64_t ld, int64_t count, const Unit* units,
                       int64_t units_ld, const float* scales, const float* zeros, float* tile, int64_t ldt) {
  static_assert(!Signed || Bits == 8);
  constexpr int each = 8 / Bits;
  constexpr uint32_t mask = ((1u << Bits) - 1) * 0x01010101u;
  typedef vec<int32_t, L> V;
  V sums[R][DIGITS][N] = {};
  const int32_t* row[R];
  UNROLL for (int i = 0; i < R; i++) row[i] = digits + i * lda;
  for (int64_t w = 0; w < count; w++, words += ld) {
    UNROLL for (int64_t i = 0; i < 4 * N * L; i += LINE) fetch((const char*)words + WORD_AHEAD + i);
    UNROLL for (int t = 0; t < each; t++) {
      V part[N];
      UNROLL for (int j = 0; j < N; j++) {
        const V word = load<L>(words + j * L);
        part[j] = Signed ? word ^ int32_t(0x80808080) : each == 1 ? word : word >> (t * Bits) & int32_t(mask);
      }
      UNROLL for (int i = 0; i < R; i++)
        UNROLL for (int d = 0; d < DIGITS; d++) {
          const V left = splat<L>(row[i][(w * each + t) * DIGITS + d]);
          UNROLL for (int j = 0; j < N; j++) sums[i][d][j] = add_bytes(sums[i][d][j], part[j], left);
        }
    }
  }
  UNROLL for (int i = 0; i < R; i++) {
    const Unit& unit = units[i * units_ld];
    UNROLL for (int j = 0; j < N; j++) {
      vec<float, L> zero = splat<L>(Signed ? 128.0f : 0.0f), total{};
      if constexpr (Zeros) zero += load<L>(zeros + j * L);
      UNROLL for (int d = DIGITS - 1; d >= 0; d--) {
        auto digit = as<float>(sums[i][d][j]);
        if constexpr (Signed || Zeros) digit -= zero * unit.totals[d];
        total = d == DIGITS - 1 ? digit : total * 256.0f + digit;
      }
      float* const at = tile + i * ldt + j * L;
      store<L>(at, load<L>(at) + total * unit.unit * load<L>(scales + j * L));
    }
  }
}

// ---- the right operand

// panel(n) is where the words of column n begin, their rows are ld apart; scale(to, g, begin, end) writes those of columns begin .. end in
// group g, and so does `zero`, which may be Nothing.
template <int N, int L, int Bits, bool Signed, class At, class Scale, class Zero> struct Words {
  static constexpr int vectors = N, lanes = L, size = Bits;
  static constexpr int64_t width = N * L, terms = 32 / Bits;
  static constexpr bool is_signed = Signed, zeros = !__is_same(Zero, Nothing);
  // so many digits times levels add up to what a float holds
  static constexpr int64_t exact = (int64_t(1) << 24) / (128 * ((1 << Bits) - 1)) / terms * terms;
  int64_t columns, depth, group, ld;
  At panel;
  Scale scale;
  Zero zero;

  INLINE void read_group(int64_t g, int64_t n, float* scale_to, float* zero_to) const {
    const int64_t end = least_of(n + width, columns);
    scale(scale_to, g, n, end);
    if constexpr (zeros) zero(zero_to, g, n, end);
    for (int64_t j = end - n; j < width; j++) scale_to[j] = zero_to[j] = 0;
  }

  // As other panels that are made: see Turned.
  const void* source(int64_t, const void* other) const { return other; }
  void pack(float* to, int64_t n) const {
    alignas(64) float scales[width], offsets[width];
    for (int64_t k = 0; k < depth; k += group) {
      read_group(k / group, n, scales, offsets);
      const int32_t* const words = (const int32_t*)panel(n) + k / terms * ld;
      floats_of_words<N, L, Bits, Signed, zeros>(words, ld, least_of(group, depth - k), scales, offsets, to + k * width);
    }
  }
};
template <int N, int L, int Bits, bool Signed, class At, class Scale, class Zero>
Words<N, L, Bits, Signed, At, Scale, Zero> words(int64_t columns, int64_t depth, int64_t group, int64_t ld, At panel, Scale scale,
                                                 Zero zero) {
  return {columns, depth, group, ld, panel, scale, zero};
}

// ---- few rows

INLINE bool all_finite(const float* values, int64_t count) {
  float sum = 0;
  for (int64_t j = 0; j < count; j++) sum += values[j] * 0.0f;
  return sum == 0;
}

// Those of `rows` rows whose sums are not finite, or not known, term by term.
template <class Right>
__attribute__((noinline, cold)) void add_up_again(const float* block, int64_t ld, const char* known, int64_t rows, int64_t n,
                                                  const Right& right, float* tile) {
  constexpr int64_t width = Right::width;
  Row<float> panel(right.depth * width);
  right.pack((float*)panel, n);
  for (int64_t r = 0; r < rows; r++)
    if (!known[r] || !all_finite(tile + r * width, width))
      micro<1, Right::vectors, Right::lanes>(block + r * ld, ld, (const float*)panel, width, right.depth, tile + r * width, width, false);
}

// The product of at most FEW_WORD_ROWS rows, at most `Rows` at a time. What is behind the last row, and behind the last term, is zeros.
template <int Rows, class Left, class Right, class Finish>
void product_of_few(int64_t rows, int64_t columns, int64_t depth, int threads, const Left& left, const Right& right, const Finish& finish) {
  constexpr int N = Right::vectors, L = Right::lanes, Bits = Right::size;
  constexpr bool Signed = Right::is_signed, zeros = Right::zeros, bytes = multiplies_bytes<L>;
  constexpr int R = !bytes ? Rows : L == 16 && Rows > 1 ? 2 : 1;  // DIGITS * R * N sums are in registers
  constexpr int64_t width = Right::width, terms = Right::terms, exact = Right::exact;
  const int64_t padded = ceil_div(rows, R) * R, ld = row_length<float>(depth), panels_count = ceil_div(columns, width);
  const int64_t group = right.group, blocks = ceil_div(depth, group) * ceil_div(group, exact);
  Row<float> block(padded * ld);
  Row<int32_t> digits(bytes ? padded * ld : 0);
  Row<Unit> units(bytes ? padded * blocks : 0);
  char known[FEW_WORD_ROWS + R];
  __builtin_memset((float*)block, 0, sizeof(float) * padded * ld);
  if (bytes) __builtin_memset((int32_t*)digits, 0, sizeof(int32_t) * padded * ld);
  for (int64_t r = 0; r < padded; r++) {
    if (r < rows) left((float*)block + r * ld, r);
    known[r] = true;
    int64_t b = r * blocks;
    if constexpr (bytes)
      for (int64_t k = 0; k < depth; k += group)
        for (int64_t i = k, end = least_of(k + group, depth); i < end; i += exact)
          known[r] &= digits_of<Bits>(block + r * ld + i, least_of(exact, end - i), digits + r * ld + i, units[b++]);
  }
  parallel(panels_count, 1, int(useful_threads(padded * panels_count * width * (depth + 1), threads)), [&](int64_t begin, int64_t end) {
    alignas(64) float tile[(FEW_WORD_ROWS + R) * width], scales[width], offsets[width];
    for (int64_t n = begin * width; n < least_of(end * width, columns); n += width) {
      const int32_t* const words = (const int32_t*)right.panel(n);
      __builtin_memset(tile, 0, sizeof(float) * padded * width);
      for (int64_t k = 0, b = 0; k < depth; k += group) {
        right.read_group(k / group, n, scales, offsets);
        for (int64_t i = k, last = least_of(k + group, depth); i < last; i += exact, b++) {
          const int64_t count = ceil_div(least_of(exact, last - i), terms);
          const int32_t* const part = words + i / terms * right.ld;
          for (int64_t r = 0; r < padded; r += R) {
            float* const sums = tile + r * width;
            if constexpr (bytes)
              micro_digits<R, N, L, Bits, Signed, zeros>(digits + r * ld + i, ld, part, right.ld, count, units + r * blocks + b, blocks,
                                                         scales, offsets, sums, width);
            else micro_words<R, N, L, Bits, Signed, zeros>(block + r * ld + i, ld, part, right.ld, count, scales, offsets, sums, width);
          }
        }
      }
      bool usual = true;
      for (int64_t r = 0; r < rows; r++) usual &= known[r] && all_finite(tile + r * width, width);
      if (__builtin_expect(!usual, 0)) add_up_again((const float*)block, ld, known, rows, n, right, tile);
      for (int64_t r = 0; r < rows; r++) finish((const float*)tile + r * width, r, n, least_of(n + width, columns));
    }
  });
}

// The product of a number of rows that may be small: F rows at a time if so, else R.
template <int F, int R, class Left, class Right, class Finish>
void product_of_words(int64_t rows, int64_t columns, int64_t depth, int threads, const Left& left, const Right& right,
                      const Finish& finish) {
  if (rows > FEW_WORD_ROWS) product_packed<R, float>(rows, columns, depth, threads, left, right, finish);
  else if (F > 1 && rows == 1) product_of_few<1>(rows, columns, depth, threads, left, right, finish);
  else product_of_few<F>(rows, columns, depth, threads, left, right, finish);
}

}  // namespace tile
