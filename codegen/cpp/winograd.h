// Convolutions with windows of 3 x 3 neighbouring points, with 16 products in place of 36 for each 2 x 2 results (included by vec.h).
//
// The algorithm F(2 x 2, 3 x 3) of Winograd, after Lavin and Gray, "Fast Algorithms for Convolutional Neural Networks" (2016):
//
//     results = A' [ (G w G') * (B' x B) ] A        w: 3 x 3 weights, x: a tile of 4 x 4 points, * point by point, summed over channels
//
// The sums over channels are 16 products of matrices: tiles x channels by channels x columns. Weights are turned once per call, tiles
// in blocks that stay in the second-level cache.
#pragma once

namespace tile {

constexpr int64_t SPOTS = 16;           // of a tile that was turned
constexpr int64_t TILE_SUMS = 3 << 16;  // of a block of tiles: what is multiplied and the products

// B' x B of a tile: channels of spot s to `to` + s * apart.
template <int L, class T> ONCE void turn_points(const T* const* points, int64_t channels, T* to, int64_t apart) {
  each<L, 1>(0, channels, [&]<int W>(int64_t c) LANES {
    vec<T, W> x[4][4], y[4][4];
    UNROLL for (int i = 0; i < 4; i++)
      UNROLL for (int j = 0; j < 4; j++) x[i][j] = load<W>(points[4 * i + j] + c);
    UNROLL for (int j = 0; j < 4; j++) {
      y[0][j] = x[0][j] - x[2][j], y[1][j] = x[1][j] + x[2][j];
      y[2][j] = x[2][j] - x[1][j], y[3][j] = x[1][j] - x[3][j];
    }
    UNROLL for (int i = 0; i < 4; i++) {
      T* const at = to + 4 * i * apart + c;
      store<W>(at, y[i][0] - y[i][2]), store<W>(at + apart, y[i][1] + y[i][2]);
      store<W>(at + 2 * apart, y[i][2] - y[i][1]), store<W>(at + 3 * apart, y[i][1] - y[i][3]);
    }
  });
}

// G w G' of a panel of `width` columns: w[3 x 3][channels], rows ld apart, to to[16][channels].
template <int L, class B, class T> ONCE void turn_weights(const B* w, int64_t ld, int64_t channels, int64_t width, T* to) {
  for (int64_t c = 0; c < channels; c++)
    for (int64_t n = 0; n < width; n += L) {
      vec<T, L> x[3][3], y[4][3];
      UNROLL for (int i = 0; i < 3; i++)
        UNROLL for (int j = 0; j < 3; j++) x[i][j] = as<T>(load<L>(w + ((3 * i + j) * channels + c) * ld + n));
      UNROLL for (int j = 0; j < 3; j++) {
        const auto outer = x[0][j] + x[2][j];
        y[0][j] = x[0][j], y[1][j] = (outer + x[1][j]) * T(0.5), y[2][j] = (outer - x[1][j]) * T(0.5), y[3][j] = x[2][j];
      }
      UNROLL for (int i = 0; i < 4; i++) {
        T* const at = to + (4 * i * channels + c) * width + n;
        const int64_t apart = channels * width;
        const auto outer = y[i][0] + y[i][2];
        store<L>(at, y[i][0]), store<L>(at + apart, (outer + y[i][1]) * T(0.5));
        store<L>(at + 2 * apart, (outer - y[i][1]) * T(0.5)), store<L>(at + 3 * apart, y[i][2]);
      }
    }
}

// A' m A of a tile: products of spot s at m + s * apart to the sums of 2 x 2 points, `width` each. Are all of them finite?
template <int L, class T> ONCE bool fold_spots(const T* m, int64_t apart, int64_t width, T* to) {
  vec<T, L> wrong{};
  for (int64_t n = 0; n < width; n += L) {
    vec<T, L> x[4][2];
    UNROLL for (int i = 0; i < 4; i++) {
      const T* const at = m + 4 * i * apart + n;
      const auto a = load<L>(at), b = load<L>(at + apart), c = load<L>(at + 2 * apart), d = load<L>(at + 3 * apart);
      x[i][0] = a + b + c, x[i][1] = b - c - d;
    }
    UNROLL for (int j = 0; j < 2; j++) {
      const auto upper = x[0][j] + x[1][j] + x[2][j], lower = x[1][j] - x[2][j] - x[3][j];
      wrong += upper * T(0), wrong += lower * T(0);
      store<L>(to + j * width + n, upper), store<L>(to + (2 + j) * width + n, lower);
    }
  }
  return !any(mask(wrong != T(0)));
}

// Results of one call: images of `height` x `across` points.
struct Images {
  int64_t count, height, across;
  INLINE int64_t tiles() const { return count * ceil_div(height, 2) * ceil_div(across, 2); }
  // f(p, m) for the points p of 2 x 2 of a tile that exist, m being the number of the point.
  template <class F> INLINE void points(int64_t tile, F f) const {
    const int64_t columns = ceil_div(across, 2), line = tile / columns, lines = ceil_div(height, 2);
    const int64_t x = tile % columns * 2, y = line % lines * 2, first = (line / lines * height + y) * across + x;
    for (int64_t p = 0; p < 4; p++)
      if (y + p / 2 < height && x + p % 2 < across) f(p, first + p / 2 * across + p % 2);
  }
};

// The convolution; left(row, m) hands the nine runs of the window at point m to `row`, the right operand is in panels. What comes out
// infinite or NaN is summed up term by term: it may be so in one point of a tile only.
template <int R, class T, int N, int L, class At, class Left, class Finish>
void winograd(Images images, int64_t columns, int64_t channels, int threads, const T* data, const Left& left,
              const Panels<N, L, At>& right, const Finish& finish) {
  constexpr int64_t width = N * L;
  const int64_t tiles = images.tiles(), panels_count = ceil_div(columns, width), size = SPOTS * channels * width, ld = channels + 16;
  Row<T> weights(panels_count * size);
  parallel(panels_count, 1, threads, [&](int64_t begin, int64_t end) {
    for (int64_t p = begin; p < end; p++) turn_weights<L>(right.panel(p * width), right.ld, channels, width, weights + p * size);
  });
  const T* const turned = weights;
  const auto spots = panels<N, L>(width, [=](int64_t n) { return turned + n * channels; });
  const auto place = [](int64_t p, int64_t t) { return 4 * (p / 2 + t / 3) + p % 2 + t % 3; };  // in a tile of what point p reads
  const int64_t groups = ceil_div(tiles, R), fitting = TILE_SUMS / (SPOTS * (ld + width) * R) + 1;
  parallel(groups, 1, threads, [&](int64_t begin, int64_t end) {
    const int64_t most = ceil_div(end - begin, ceil_div(end - begin, fitting)) * R;
    Row<T> block(SPOTS * most * ld), products(SPOTS * most * width), zeros(channels);
    Row<const T*> points(SPOTS * most);
    for (int64_t c = 0; c < channels; c++) zeros[c] = T(0);
    alignas(64) T sums[4 * width];
    for (int64_t first = begin * R; first < end * R; first += most) {
      const int64_t rows = least_of(most, end * R - first), there = least_of(rows, tiles - first);
      for (int64_t i = 0; i < rows; i++) {  // tiles that do not exist are zeros
        const T *window[9], **const tile = points + i * SPOTS;
        for (int64_t s = 0; s < SPOTS; s++) tile[s] = zeros;
        if (i < there) images.points(first + i, [&](int64_t p, int64_t m) {
          RowOfRuns<1, 1, T> row{window, data, zeros, nullptr, channels};
          left(row, m);
          for (int64_t t = 0; t < 9; t++) tile[place(p, t)] = window[t];
        });
        turn_points<L>(tile, channels, block + i * ld, most * ld);
      }
      for (int64_t n = 0; n < columns; n += width) {
        for (int64_t s = 0; s < SPOTS; s++)
          for (int64_t i = 0; i < rows; i += R)
            spots.template add<R>((const T*)block + (s * most + i) * ld, ld, i / R, n * SPOTS, s * channels, channels,
                                  (T*)products + (s * most + i) * width, false);
        for (int64_t i = 0; i < there; i++) {
          const bool finite = fold_spots<L>((const T*)products + i * width, most * width, width, sums);
          images.points(first + i, [&](int64_t p, int64_t m) {
            if (!finite) {
              const T* window[9];
              for (int64_t t = 0; t < 9; t++) window[t] = points[i * SPOTS + place(p, t)];
              const auto panel = right.panel(n);
              micro_runs<1, N, L>(window, 9, 0, channels, panel, right.ld, (const char*)panel, sums + p * width, false);
            }
            finish((const T*)sums + p * width, m, n, least_of(n + width, columns));
          });
        }
      }
    }
  });
}

}  // namespace tile
