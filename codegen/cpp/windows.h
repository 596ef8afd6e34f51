// Windows of generated kernels (included by vec.h): depthwise convolutions and pooling, strips of points that share what they read.
#pragma once

namespace tile {

struct Span { int64_t begin, end; };

// Those of 0 .. n-1 for which `holds`, which are neighbours.
template <class F> INLINE Span span(int64_t n, F&& holds) {
  Span s{0, n};
  while (s.begin < n && !holds(s.begin)) s.begin++;
  while (s.end > s.begin && !holds(s.end - 1)) s.end--;
  return s;
}

// f<P, Checked>(i) for strips of P points from begin to end, and for single points where less is left; `plain` are the points whose
// windows lie inside: strips of them need no checks. Whole: nothing is ever left.
template <int P, bool Whole, class F> INLINE void strips(int64_t begin, int64_t end, Span plain, F&& f) {
  int64_t i = begin;
  for (; i + P <= end; i += P) {
    if (i >= plain.begin && i + P <= plain.end) f.template operator()<P, false>(i);
    else f.template operator()<P, true>(i);
  }
  if constexpr (!Whole)
    for (; i < end; i++) f.template operator()<1, true>(i);
}

// sum[p] = add(sum[p], column(q), tap(b)) for the points p of a strip and the elements b of their windows: element b of point p is column
// q = S*p + D*b. Each column is read once, and only if it is inside; so is each tap.
template <int P, int S, int K, int D, bool Checked, class V, class Inside, class Column, class Tap, class Add>
INLINE void slide(V (&sum)[P], Inside inside, Column column, Tap tap, Add add) {
  decltype(tap(int64_t(0))) taps[K];
  UNROLL for (int b = 0; b < K; b++) taps[b] = tap(b);
  UNROLL for (int q = 0; q <= S * (P - 1) + D * (K - 1); q++) {
    if (Checked && !inside(q)) continue;
    const auto value = column(q);
    UNROLL for (int p = 0; p < P; p++) {
      const int b = q - S * p;
      if (b >= 0 && b % D == 0 && b / D < K) sum[p] = add(sum[p], value, taps[b / D]);
    }
  }
}

}  // namespace tile
