// Vectors of L lanes for generated kernels: types, loads and stores, selection, reductions, loops.
//
// vec<T, L> is a GCC/Clang vector (T itself when L is 1), so arithmetic is written with operators and the same text serves the main
// loop (L lanes) and its tail (1 lane). All values of a kernel have the same number of lanes. A vector of bools is a vec<int32_t, L> of
// 0 and -1 (bool when L is 1). No torch header, no intrinsics, nothing of the standard library but fixed-width integers.
#pragma once
#include <stdint.h>

namespace tile {

#define INLINE inline __attribute__((always_inline))
#define LANES __attribute__((always_inline))  // after the parameters of a lambda that `each` calls

// Points that use one buffer follow each other: GCC 12 joins short loops of several points to vectors, and reads what the last one wrote.
#define IN_TURN __asm__ volatile("" ::: "memory")

// ---- types

template <class T, int L> struct Lanes { typedef T type __attribute__((vector_size(sizeof(T) * L))); };
template <class T> struct Lanes<T, 1> { typedef T type; };
template <int L> struct Lanes<bool, L> { typedef int32_t type __attribute__((vector_size(4 * L))); };
template <> struct Lanes<bool, 1> { typedef bool type; };
template <class T, int L> using vec = typename Lanes<T, L>::type;

struct bf16 { uint16_t bits; };  // upper half of a float
struct half { uint16_t bits; };  // IEEE binary16

template <class V> constexpr bool is_vector = requires(V v) { v[0]; };
template <class V> INLINE auto first(V v) {
  if constexpr (is_vector<V>) return v[0];
  else return v;
}
template <class V> using elem = decltype(first(V{}));
template <class V> constexpr int lanes = is_vector<V> ? sizeof(V) / sizeof(elem<V>) : 1;
template <int Bytes> struct IntOf;
template <> struct IntOf<1> { typedef int8_t type; };
template <> struct IntOf<2> { typedef int16_t type; };
template <> struct IntOf<4> { typedef int32_t type; };
template <> struct IntOf<8> { typedef int64_t type; };
template <class T> constexpr bool is_float = false;
template <> inline constexpr bool is_float<float> = true;
template <> inline constexpr bool is_float<double> = true;
template <class V> using int_of = vec<typename IntOf<sizeof(elem<V>)>::type, lanes<V>>;  // same shape, signed integers
template <class... I> constexpr int max_of(I... i) {
  int best = 1;
  return ((best = i > best ? i : best), ...);
}

template <class T> constexpr T inf = T(__builtin_inf());
template <class T> constexpr T nan = T(__builtin_nan(""));
template <class T> constexpr T least() {  // the identity of max
  if constexpr (is_float<T>) return -inf<T>;
  else if constexpr (T(-1) > T(0)) return 0;
  else return T(T(1) << (8 * sizeof(T) - 1));
}
template <class T> constexpr T greatest() {  // the identity of min
  if constexpr (is_float<T>) return inf<T>;
  else return T(~least<T>());
}

template <class To, class V> INLINE To bits(V v) { return __builtin_bit_cast(To, v); }

// A scalar in every lane (vectors pass through).
template <int L, class T> INLINE auto splat(T s) {
  if constexpr (L == 1 || is_vector<T>) return s;
  else if constexpr (__is_same(T, bool)) return vec<bool, L>{} - int32_t(s);
  else if constexpr (is_float<T>) return s - vec<T, L>{};  // keeps -0.0
  else return vec<T, L>{} + s;
}

// 0, 1, 2, ...
template <class T, int L> INLINE vec<T, L> iota() {
  vec<T, L> v{};
  if constexpr (L > 1)
    for (int i = 0; i < L; i++) v[i] = T(i);
  return v;
}

// f(i), f(i + 1), ...
template <int L, class F> INLINE auto sequence(F f, int64_t i) {
  if constexpr (L == 1) return f(i);
  else {
    vec<int64_t, L> v{};
    for (int l = 0; l < L; l++) v[l] = f(i + l);
    return v;
  }
}

#if defined(__SSE4_1__) && !defined(__clang__)
#define WIDEN(v, name) (elem<V>(-1) < elem<V>(0) ? __builtin_ia32_pmovsx##name(v) : __builtin_ia32_pmovzx##name(v))
#define WIDEN_ALL(v, name) \
  (elem<V>(-1) < elem<V>(0) ? __builtin_ia32_pmovsx##name(v, W{}, -1) : __builtin_ia32_pmovzx##name(v, W{}, -1))
#endif

// Integers of 8 or 16 bits as int32. GCC 12 widens bytes lane by lane, and to 64 bytes by halves, unless it is told the instruction.
template <class V> INLINE auto widened(V v) {
  constexpr int L = lanes<V>;
  constexpr bool bytes = sizeof(elem<V>) == 1;
#ifdef WIDEN
  typedef vec<char, 16> Bytes;
  typedef vec<int32_t, L> W;
  if constexpr (bytes && L == 4) return WIDEN(bits<Bytes>(vec<int32_t, 4>{bits<int32_t>(v), 0, 0, 0}), bd128);
  else
#ifdef __AVX2__
    if constexpr (bytes && L == 8) return WIDEN(bits<Bytes>(vec<int64_t, 2>{bits<int64_t>(v), 0}), bd256);
  else if constexpr (L == 8) return WIDEN((bits<vec<int16_t, 8>>(v)), wd256);
  else
#endif
#ifdef __AVX512F__
    if constexpr (bytes && L == 16) return WIDEN_ALL(bits<Bytes>(v), bd512_mask);
  else if constexpr (L == 16) return WIDEN_ALL((bits<vec<int16_t, 16>>(v)), wd512_mask);
  else
#endif
#endif
    if constexpr (bytes) return __builtin_convertvector(__builtin_convertvector(v, vec<int16_t, L>), vec<int32_t, L>);
  else return __builtin_convertvector(v, vec<int32_t, L>);
}

// Static cast lane by lane; narrow integers go through int32, which compilers vectorise.
template <class T, class V> INLINE auto as(V v) {
  if constexpr (!is_vector<V>) return T(v);
  else if constexpr (__is_same(T, elem<V>)) return v;
  else if constexpr (sizeof(elem<V>) <= 2 && sizeof(T) == 4) return __builtin_convertvector(widened(v), vec<T, lanes<V>>);
  else if constexpr (is_float<T> && sizeof(elem<V>) < 4 || is_float<elem<V>> && sizeof(T) < 4)
    return __builtin_convertvector(__builtin_convertvector(v, vec<int32_t, lanes<V>>), vec<T, lanes<V>>);
  else return __builtin_convertvector(v, vec<T, lanes<V>>);
}

// The result of a comparison as a vector of bools.
template <class M> INLINE auto mask(M m) {
  if constexpr (is_vector<M>) return __builtin_convertvector(m, vec<int32_t, lanes<M>>);
  else return bool(m);
}

// m ? a : b, lane by lane; any of the three may be a scalar.
template <class M, class A, class B> INLINE auto select(M m, A a, B b) {
  constexpr int L = max_of(lanes<M>, max_of(lanes<A>, lanes<B>));
  auto wa = splat<L>(a);
  auto wb = splat<L>(b);
  if constexpr (is_vector<M>) return __builtin_convertvector(m, int_of<decltype(wa)>) ? wa : wb;
  else return m ? wa : wb;
}

// a << b and a >> b for any b: outside of 0 .. width-1 nothing is left but, of a >> b, the sign.
template <class A, class B> INLINE auto shl(A a, B b) {
  typedef elem<A> T;
  constexpr int L = max_of(lanes<A>, lanes<B>);
  auto x = splat<L>(a), n = splat<L>(as<T>(b)), zero = splat<L>(T(0));
  auto fits = mask((n >= T(0)) & (n < T(8 * sizeof(T))));
  return as<T>(select(fits, as<T>(x << select(fits, n, zero)), zero));
}
template <class A, class B> INLINE auto shr(A a, B b) {
  typedef elem<A> T;
  constexpr int L = max_of(lanes<A>, lanes<B>);
  auto x = splat<L>(a), n = splat<L>(as<T>(b)), last = splat<L>(T(8 * sizeof(T) - 1));
  auto fits = mask((n >= T(0)) & (n <= last));
  return as<T>(select(fits, as<T>(x >> select(fits, n, last)), T(-1) < T(0) ? as<T>(x >> last) : splat<L>(T(0))));
}

// ---- storage: bf16, half and bool are stored in other types than they are computed in

template <class T> struct Raw { typedef T type; };
template <> struct Raw<bool> { typedef uint8_t type; };
template <> struct Raw<bf16> { typedef uint16_t type; };
template <> struct Raw<half> { typedef uint16_t type; };

template <class R> INLINE auto widen_half(R h) {
  constexpr int L = lanes<R>;
#if defined(__F16C__) && !defined(__clang__)
  if constexpr (L == 8) return __builtin_ia32_vcvtph2ps256(bits<vec<int16_t, 8>>(h));
#if defined(__AVX512F__)
  else if constexpr (L == 16) return __builtin_ia32_vcvtph2ps512_mask(bits<vec<int16_t, 16>>(h), vec<float, 16>{}, -1, 4);
#endif
  else if constexpr (L == 16) {
    vec<uint16_t, 8> part[2];
    vec<float, 8> wide[2];
    __builtin_memcpy(part, &h, sizeof h);
    wide[0] = widen_half(part[0]);
    wide[1] = widen_half(part[1]);
    vec<float, 16> v;
    __builtin_memcpy(&v, wide, sizeof v);
    return v;
  } else
#endif
  {
    // Shift the exponent into place, scale by 2^112; infinities and NaNs get the exponent they lost.
    auto u = as<uint32_t>(h);
    auto magnitude = (u & 0x7fffu) << 13;
    auto scaled = bits<vec<float, L>>(magnitude) * 0x1p112f;
    auto special = mask((u & 0x7c00u) == 0x7c00u);
    auto out = select(special, magnitude | 0x7f800000u, bits<vec<uint32_t, L>>(scaled)) | (u & 0x8000u) << 16;
    return bits<vec<float, L>>(out);
  }
}

template <class V> INLINE auto narrow_half(V v) {
  constexpr int L = lanes<V>;
#if defined(__F16C__) && !defined(__clang__)
  if constexpr (L == 8) return bits<vec<uint16_t, 8>>(__builtin_ia32_vcvtps2ph256(v, 0));
#if defined(__AVX512F__)
  else if constexpr (L == 16) return bits<vec<uint16_t, 16>>(__builtin_ia32_vcvtps2ph512_mask(v, 0, vec<int16_t, 16>{}, -1));
#endif
  else if constexpr (L == 16) {
    vec<float, 8> part[2];
    vec<uint16_t, 8> thin[2];
    __builtin_memcpy(part, &v, sizeof v);
    thin[0] = narrow_half(part[0]);
    thin[1] = narrow_half(part[1]);
    vec<uint16_t, 16> h;
    __builtin_memcpy(&h, thin, sizeof h);
    return h;
  } else
#endif
  {
    auto u = bits<vec<uint32_t, L>>(v);
    auto sign = (u >> 16) & 0x8000u;
    auto magnitude = u & 0x7fffffffu;
    auto odd = (magnitude >> 13) & 1u;
    auto normal = (magnitude - 0x38000000u + 0xfffu + odd) >> 13;
    // Below 2^-14: adding 0.5 leaves the rounded subnormal in the low mantissa bits.
    auto small = bits<vec<uint32_t, L>>(bits<vec<float, L>>(magnitude) + 0.5f) - 0x3f000000u;
    auto out = select(mask(magnitude < 0x38800000u), small, normal);
    out = select(mask(magnitude >= 0x477ff000u), splat<L>(0x7c00u), out);
    out = select(mask(magnitude > 0x7f800000u), splat<L>(0x7e00u), out);
    return as<uint16_t>(out | sign);
  }
}

template <class T, class R> INLINE auto decode(R r) {
  constexpr int L = lanes<R>;
  if constexpr (__is_same(T, bool)) return mask(as<int32_t>(r) != 0);
  else if constexpr (__is_same(T, bf16)) return bits<vec<float, L>>(as<uint32_t>(r) << 16);
  else if constexpr (__is_same(T, half)) return widen_half(r);
  else return r;
}

template <class T, class V> INLINE auto encode(V v) {
  constexpr int L = lanes<V>;
  if constexpr (__is_same(T, bool)) return as<uint8_t>(select(v, splat<L>(int32_t(1)), splat<L>(int32_t(0))));
  else if constexpr (__is_same(T, bf16)) {
    auto u = bits<vec<uint32_t, L>>(v);
    auto rounded = (u + 0x7fffu + ((u >> 16) & 1u)) >> 16;
    return as<uint16_t>(select(mask(v == v), rounded, (u >> 16) | 0x40u));
  } else if constexpr (__is_same(T, half)) return narrow_half(v);
  else return as<T>(v);
}

template <int L, class T> INLINE auto load(const T* p) {
  vec<typename Raw<T>::type, L> r;
  __builtin_memcpy(&r, p, sizeof r);
  return decode<T>(r);
}

// Elements p[0], p[stride], p[2 * stride], ...
template <int L, class T> INLINE auto load(const T* p, int64_t stride) {
  typedef typename Raw<T>::type R;
  if constexpr (L == 1) return load<1>(p);
  else {
    vec<R, L> r;
    for (int i = 0; i < L; i++) r[i] = ((const R*)p)[i * stride];
    return decode<T>(r);
  }
}

// Elements p[at[0]], p[at[1]], ...
template <int L, class T, class I> INLINE auto gather(const T* p, I at) {
  typedef typename Raw<T>::type R;
  if constexpr (!is_vector<I>) return splat<L>(load<1>(p + at));
  else {
    vec<R, L> r;
    for (int i = 0; i < L; i++) r[i] = ((const R*)p)[at[i]];
    return decode<T>(r);
  }
}

// Positions that must lie in [0, extent): clamped, so that memory stays safe; *fault = number where one that is read does not.
template <class V, class M> INLINE auto inside(V at, int64_t extent, int64_t number, M read, int64_t* fault) {
  constexpr int L = max_of(lanes<V>, lanes<M>);
  if constexpr (L == 1) {
    bool outside = uint64_t(at) >= uint64_t(extent);
    if (__builtin_expect(outside, 0)) {
      if (read) __atomic_store_n(fault, number, __ATOMIC_RELAXED);
      return at < 0 || extent <= 0 ? int64_t(0) : extent - 1;
    }
    return int64_t(at);
  } else {
    auto wide = splat<L>(at);
    auto outside = (wide < 0) | (wide >= extent);
    auto bad = select(read, outside, outside ^ outside);
    int64_t any = 0;
    for (int l = 0; l < L; l++) any |= bad[l];
    if (__builtin_expect(any != 0, 0)) __atomic_store_n(fault, number, __ATOMIC_RELAXED);
    int64_t last = extent > 0 ? extent - 1 : 0;
    return select(wide < 0, int64_t(0), select(wide > last, last, wide));
  }
}
template <class V> INLINE auto inside(V at, int64_t extent, int64_t number, int64_t* fault) { return inside(at, extent, number, true, fault); }

template <int L, class T, class V> INLINE void store(T* p, V v) {
  auto r = encode<T>(splat<L>(v));
  __builtin_memcpy((void*)p, &r, sizeof r);
}

template <int L, class T, class V> INLINE void store(T* p, int64_t stride, V v) {
  typedef typename Raw<T>::type R;
  auto r = encode<T>(splat<L>(v));
  if constexpr (L == 1) *(R*)p = r;
  else
    for (int i = 0; i < L; i++) ((R*)p)[i * stride] = r[i];
}

template <int L, class T, class I, class V> INLINE void scatter(T* p, I at, V v) {
  typedef typename Raw<T>::type R;
  auto r = encode<T>(splat<L>(v));
  if constexpr (L == 1) ((R*)p)[at] = r;
  else
    for (int i = 0; i < L; i++) ((R*)p)[at[i]] = r[i];
}

// ---- horizontal: two halves at a time

template <class V> INLINE auto low(V v) {
  vec<elem<V>, lanes<V> / 2> h;
  __builtin_memcpy(&h, &v, sizeof h);
  return h;
}
template <class V> INLINE auto high(V v) {
  vec<elem<V>, lanes<V> / 2> h;
  __builtin_memcpy(&h, (const char*)&v + sizeof h, sizeof h);
  return h;
}
template <class H> INLINE auto join(H a, H b) {
  struct { H a, b; } both = {a, b};
  return bits<vec<elem<H>, 2 * lanes<H>>>(both);
}

template <class F, class V> INLINE auto fold(F f, V v) {
  if constexpr (!is_vector<V>) return v;
  else if constexpr (lanes<V> == 2) return f(elem<V>(v[0]), elem<V>(v[1]));
  else return fold(f, f(low(v), high(v)));
}

template <class M> INLINE bool any(M m) {
  if constexpr (is_vector<M>) return fold([](auto a, auto b) { return a | b; }, m) != 0;
  else return m;
}
template <class M> INLINE bool all(M m) {
  if constexpr (is_vector<M>) return fold([](auto a, auto b) { return a & b; }, m) != 0;
  else return m;
}

// Loads that touch memory only where the mask is true; the value elsewhere is `other`.
template <int L, class M, class T, class I, class O> INLINE auto gather_if(M m, const T* p, I at, O other) {
  if constexpr (L == 1) return m ? load<1>(p + at) : other;
  else {
    auto v = splat<L>(other);
    auto on = splat<L>(m);
    auto index = splat<L>(at);
    for (int i = 0; i < L; i++)
      if (on[i]) v[i] = __is_same(T, bool) ? -elem<decltype(v)>(load<1>(p + index[i])) : load<1>(p + index[i]);
    return v;
  }
}
template <int L, class M, class T, class O> INLINE auto load_if(M m, const T* p, O other) {
  if constexpr (!is_vector<M>) {
    if (m) return load<L>(p);
    return splat<L>(other);
  } else {
    if (all(m)) return load<L>(p);
    if (!any(m)) return splat<L>(other);
    return gather_if<L>(m, p, iota<int64_t, L>(), other);
  }
}
template <int L, class M, class T, class O> INLINE auto load_if(M m, const T* p, int64_t stride, O other) {
  return gather_if<L>(m, p, iota<int64_t, L>() * stride, other);
}

// The value a store to T would keep; the bits of v as T.
template <class T, class V> INLINE auto rounded(V v) { return decode<T>(encode<T>(v)); }
template <class T, class V> INLINE auto recast(V v) { return bits<vec<T, lanes<V>>>(v); }

// ---- loops

// f<L>(i) for i = begin, begin + L, ... and what is left with the narrower lane counts that follow.
template <int L, int... Narrower, class F> INLINE void each(int64_t begin, int64_t end, F&& f) {
  int64_t i = begin;
  for (; i + L <= end; i += L) f.template operator()<L>(i);
  if constexpr (sizeof...(Narrower) > 0) each<Narrower...>(i, end, f);
}

// The same, four steps at a time; f<L>(i, u) is told which of four accumulators to use.
template <int L, int... Narrower, class F> INLINE void each4(int64_t begin, int64_t end, F&& f) {
  int64_t i = begin;
  for (; i + 4 * L <= end; i += 4 * L) {
    f.template operator()<L>(i, 0);
    f.template operator()<L>(i + L, 1);
    f.template operator()<L>(i + 2 * L, 2);
    f.template operator()<L>(i + 3 * L, 3);
  }
  for (; i + L <= end; i += L) f.template operator()<L>(i, 0);
  if constexpr (sizeof...(Narrower) > 0) each4<Narrower...>(i, end, f);
}

// f(begin, end) over 0 .. n in as many threads as have at least `grain` items each.
template <class F> INLINE void parallel(int64_t n, int64_t grain, int threads, F&& f) {
  if (n <= 0) return;
  int64_t useful = n / (grain > 0 ? grain : 1);
  if (threads > useful) threads = int(useful);
  if (threads <= 1) {
    f(int64_t(0), n);
    return;
  }
#pragma omp parallel for num_threads(threads) schedule(static, 1)
  for (int t = 0; t < threads; t++) f(n * t / threads, n * (t + 1) / threads);
}

// Where part `k` of `parts` of 0 .. n begins, at a multiple of `lanes`; the part after the last begins at n.
INLINE int64_t share(int64_t n, int64_t k, int64_t parts, int64_t lanes) { return k == parts ? n : n * k / parts / lanes * lanes; }

// Row-major steps of a multi-index: next(j, J, i) is j++ with carry into i.
INLINE void next(int64_t& j, int64_t extent, int64_t& i) {
  if (++j == extent) j = 0, i++;
}
template <class... More> INLINE void next(int64_t& k, int64_t extent, int64_t& j, int64_t outer, More&&... more) {
  if (++k == extent) k = 0, next(j, outer, more...);
}

INLINE int64_t floordiv(int64_t a, int64_t b) { return a / b - (a % b != 0 && (a < 0) != (b < 0)); }

// base, base + step, ... as 32-bit numbers; only signs and zeros of them are right beyond 2^30.
template <int L> INLINE auto offsets(int64_t base, int32_t step) {
  constexpr int64_t limit = int64_t(1) << 30;
  return iota<int32_t, L>() * step + int32_t(base > limit ? limit : base < -limit ? -limit : base);
}

// n elements of scratch memory, 64-byte aligned.
template <class T> struct Row {
  T* data;
  explicit Row(int64_t n) : data((T*)__builtin_malloc(sizeof(T) * n + 64)) {}
  Row(const Row&) = delete;
  ~Row() { __builtin_free(data); }
  operator T*() const { return (T*)(((intptr_t)data + 63) & ~intptr_t(63)); }
};

}  // namespace tile

#include "math.h"
#include "reduce.h"
#include "dot.h"
#include "bytes.h"
#include "words.h"
#include "windows.h"
#include "runs.h"
#include "winograd.h"
#include "recurrence.h"
#include "attention.h"
#include "cache.h"
#include "call.h"
