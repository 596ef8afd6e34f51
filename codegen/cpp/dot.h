// Contractions of generated kernels (included by vec.h): sums of products in tiles that live in registers.
#pragma once

namespace tile {

#define UNROLL _Pragma("GCC unroll 32")

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

}  // namespace tile
