// Accumulators of generated kernels (included by vec.h).
//
// An accumulator of T with L lanes takes vectors of L values (add(v)) and, in the tail of a loop, narrower ones; `u` names one of Ways
// independent chains, so that a loop need not wait for the previous addition. value() is the reduction over everything, lanewise() keeps
// the lanes apart (each lane is a point of its own).
#pragma once

namespace tile {

// Sums of more than 128 terms a chain go to a second level, so that rounding errors grow slowly.
template <class T, int L, int Ways = 1> struct Sum {
  vec<T, L> near[Ways] = {}, far = {};
  T tail = 0;
  int count = 0;
  template <class V> INLINE void add(V v, int u = 0) {
    if constexpr (lanes<V> != L) {
      tail += fold([](auto a, auto b) { return a + b; }, v);
    } else {
      near[u] += v;
      if (u == 0 && ++count == 128) flush();
    }
  }
  INLINE void merge(Sum& other) { far += other.lanewise(), tail += other.tail; }
  INLINE void flush() {
    for (int u = 0; u < Ways; u++) far += near[u], near[u] = vec<T, L>{};
    count = 0;
  }
  INLINE vec<T, L> lanewise() { return flush(), far; }
  INLINE T value() { return fold([](auto a, auto b) { return a + b; }, lanewise()) + tail; }
};

// Reductions by a function that may be applied in any order: Identity() is its neutral element.
template <class F, class T, int L, int Ways = 1> struct Fold {
  vec<T, L> best[Ways];
  T tail = F::template identity<T>();
  INLINE Fold() {
    for (int u = 0; u < Ways; u++) best[u] = splat<L>(tail);
  }
  template <class V> INLINE void add(V v, int u = 0) {
    if constexpr (lanes<V> != L) tail = F::combine(tail, T(fold([](auto a, auto b) { return F::combine(a, b); }, v)));
    else best[u] = F::combine(best[u], v);
  }
  INLINE void merge(Fold& other) { best[0] = F::combine(best[0], other.lanewise()), tail = F::combine(tail, other.tail); }
  INLINE auto lanewise() {
    auto v = best[0];
    for (int u = 1; u < Ways; u++) v = F::combine(v, best[u]);
    return v;
  }
  INLINE T value() {
    auto whole = fold([](auto a, auto b) { return F::combine(a, b); }, lanewise());
    if constexpr (__is_same(T, bool)) return F::combine(bool(whole), tail);
    else return F::combine(whole, tail);
  }
};
struct ProdOf {
  template <class T> static constexpr T identity() { return 1; }
  template <class V> static INLINE V combine(V a, V b) { return a * b; }
};
struct MaxOf {
  template <class T> static constexpr T identity() { return least<T>(); }
  template <class V> static INLINE V combine(V a, V b) { return max(a, b); }
};
struct MinOf {
  template <class T> static constexpr T identity() { return greatest<T>(); }
  template <class V> static INLINE V combine(V a, V b) { return min(a, b); }
};
struct AnyOf {
  template <class T> static constexpr T identity() { return false; }
  template <class V> static INLINE V combine(V a, V b) { return a | b; }
};
struct AllOf {
  template <class T> static constexpr T identity() { return true; }
  template <class V> static INLINE V combine(V a, V b) { return a & b; }
};
template <class T, int L, int Ways = 1> using Prod = Fold<ProdOf, T, L, Ways>;
template <class T, int L, int Ways = 1> using Max = Fold<MaxOf, T, L, Ways>;
template <class T, int L, int Ways = 1> using Min = Fold<MinOf, T, L, Ways>;
template <class T, int L, int Ways = 1> using Any = Fold<AnyOf, bool, L, Ways>;
template <class T, int L, int Ways = 1> using All = Fold<AllOf, bool, L, Ways>;

// Position of the first largest (Sign > 0) or smallest value; the first NaN wins. Positions are given with the values.
template <int Sign, class T, int L> struct ArgBest {
  vec<T, L> best = splat<L>(T(0));
  vec<int64_t, L> at = splat<L>(int64_t(-1));  // -1: none yet
  T tail_best = 0;
  int64_t tail_at = -1;
  // Is (a, i) to be preferred to (b, j)?
  template <class V, class I> static INLINE auto better(V a, I i, V b, I j) {
    auto wins = Sign > 0 ? mask(a > b) : mask(a < b);
    auto ties = mask(a == b);
    if constexpr (is_float<elem<V>>) {
      wins = wins | (mask(a != a) & mask(b == b));
      ties = ties | (mask(a != a) & mask(b != b));
      wins = wins & (mask(a != a) | mask(b == b));
    }
    return mask(i >= 0) & (mask(j < 0) | wins | (ties & mask(i < j)));
  }
  template <class V> INLINE void add(V v, vec<int64_t, lanes<V>> i) {
    if constexpr (lanes<V> == L) take(v, i, best, at);
    else if constexpr (lanes<V> == 1) take(T(v), i, tail_best, tail_at);
    else
      for (int l = 0; l < lanes<V>; l++) take(T(v[l]), int64_t(i[l]), tail_best, tail_at);
  }
  template <class V, class I> static INLINE void take(V v, I i, V& b, I& j) {
    auto m = better(v, i, b, j);
    b = select(m, v, b);
    j = select(m, i, j);
  }
  INLINE void merge(ArgBest& other) { take(other.best, other.at, best, at), take(other.tail_best, other.tail_at, tail_best, tail_at); }
  INLINE auto lanewise() { return at; }
  INLINE int64_t value() {
    if constexpr (L == 1) take(best, at, tail_best, tail_at);
    else
      for (int l = 0; l < L; l++) take(T(best[l]), int64_t(at[l]), tail_best, tail_at);
    return tail_at;
  }
};
template <class T, int L, int Ways = 1> using ArgMax = ArgBest<1, T, L>;
template <class T, int L, int Ways = 1> using ArgMin = ArgBest<-1, T, L>;

}  // namespace tile
