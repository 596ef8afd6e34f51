// The scalar functions of generated kernels, on vectors and scalars alike (included by vec.h).
//
// float: within 2 ulp over the whole range, IEEE special values and subnormals included; polynomials are minimax fits of our own.
// double and the rare functions: libm, lane by lane (through double where float libm is not within 2 ulp).
#pragma once

namespace tile {

// Lane by lane through a scalar function.
template <class F, class V, class... W> INLINE auto map(F f, V v, W... w) {
  constexpr int L = max_of(lanes<V>, lanes<W>...);
  auto out = splat<L>(v);
  if constexpr (L == 1) return f(v, w...);
  else {
    for (int i = 0; i < L; i++) out[i] = f(splat<L>(v)[i], splat<L>(w)[i]...);
    return out;
  }
}

template <class V> constexpr bool is_single = __is_same(elem<V>, float);

// c[0] + x * (c[1] + x * (...)), from the highest coefficient down.
template <class V> INLINE V horner(V, elem<V> c) { return splat<lanes<V>>(c); }
template <class V, class... C> INLINE V horner(V x, elem<V> c, C... more) { return c + x * horner(x, more...); }

// ---- basics

template <class A, class B> INLINE auto max(A a, B b) {  // NaN if either is
  if constexpr (!is_float<elem<A>>) return select(mask(a > b), a, b);
  else return select(mask(a == a), select(mask(a > b), a, b), a);
}
template <class A, class B> INLINE auto min(A a, B b) {
  if constexpr (!is_float<elem<A>>) return select(mask(a < b), a, b);
  else return select(mask(a == a), select(mask(a < b), a, b), a);
}
template <class A, class B> INLINE auto fmax(A a, B b) {  // the other if one is NaN
  return select(mask(b == b), select(mask(a < b), b, select(mask(a == a), a, b)), a);
}
template <class A, class B> INLINE auto fmin(A a, B b) {
  return select(mask(b == b), select(mask(a > b), b, select(mask(a == a), a, b)), a);
}

template <class V> constexpr auto sign_bit = elem<int_of<V>>(1) << (8 * sizeof(elem<V>) - 1);
template <class V> INLINE V abs(V x) {
  if constexpr (is_float<elem<V>>) return bits<V>(bits<int_of<V>>(x) & ~sign_bit<V>);
  else return V(select(mask(x < 0), V(-x), x));
}
template <class A, class B> INLINE auto copysign(A a, B b) {
  constexpr int L = max_of(lanes<A>, lanes<B>);
  auto m = splat<L>(a);
  auto s = splat<L>(b);
  typedef int_of<decltype(m)> I;
  return bits<decltype(m)>((bits<I>(m) & ~sign_bit<decltype(m)>) | (bits<I>(s) & sign_bit<decltype(m)>));
}
template <class V> INLINE auto isnan(V x) { return mask(x != x); }
template <class V> INLINE auto isinf(V x) { return mask(abs(x) == inf<elem<V>>); }
template <class V> INLINE auto signbit(V x) {
  if constexpr (is_float<elem<V>>) return mask(bits<int_of<V>>(x) < 0);
  else return mask(x < 0);
}

// Rounding to an integral value: through the integer type of the same width where |x| is small enough to have a fraction.
template <class V> INLINE V round(V x) {  // ties to even
  constexpr auto big = elem<V>(is_single<V> ? 0x1p23 : 0x1p52);
  V a = abs(x);
  return copysign(select(mask(a < big), (a + big) - big, a), x);
}
template <class V> INLINE V floor(V x) {
  V r = round(x);
  return copysign(select(mask(r > x), r - 1, r), x);
}
template <class V> INLINE V ceil(V x) {
  V r = round(x);
  return copysign(select(mask(r < x), r + 1, r), x);
}
template <class V> INLINE V trunc(V x) { return copysign(floor(abs(x)), x); }

template <class V> INLINE V sqrt(V x) {
  if constexpr (is_single<V>) return map([](float a) { return __builtin_sqrtf(a); }, x);
  else return map([](double a) { return __builtin_sqrt(a); }, x);
}
template <class V> INLINE V rsqrt(V x) { return 1 / sqrt(x); }
template <class A, class B, class C> INLINE auto fma(A a, B b, C c) { return a * b + c; }

// Integer division and remainders; b is not zero. b = -1 is apart because least / -1 traps.
template <class A, class B> INLINE auto truncdiv(A a, B b) {
  return map([](auto x, auto y) { return decltype(x)(y == decltype(y)(-1) && y < 0 ? -x : x / y); }, a, b);
}
template <class A, class B> INLINE auto fmod(A a, B b) {
  if constexpr (is_single<A>) return map([](float x, float y) { return __builtin_fmodf(x, y); }, a, b);
  else if constexpr (is_float<elem<A>>) return map([](double x, double y) { return __builtin_fmod(x, y); }, a, b);
  else return map([](auto x, auto y) { return decltype(x)(y == decltype(y)(-1) && y < 0 ? 0 : x % y); }, a, b);
}
template <class R, class B> INLINE auto signs_differ(R r, B b) { return mask(r != 0) & (signbit(r) ^ signbit(splat<lanes<R>>(b))); }
template <class A, class B> INLINE auto mod(A a, B b) {  // sign of b
  auto r = fmod(a, b);
  return select(signs_differ(r, b), as<elem<A>>(r + b), r);
}
template <class A, class B> INLINE auto floordiv(A a, B b) {
  auto q = truncdiv(a, b);
  return select(signs_differ(fmod(a, b), b), as<elem<A>>(q - elem<A>(1)), q);
}
template <class A, class B> INLINE auto ipow(A a, B b) {
  return map([](auto x, auto n) {
    decltype(x) r = 1;
    for (; n > 0; n = decltype(n)(n >> 1), x = decltype(x)(x * x))
      if (n & 1) r = decltype(x)(r * x);
    return r;
  }, a, b);
}

// ---- exponentials in float

constexpr float ln2_high = 0.693145751953125f, ln2_low = 1.42860682e-6f;  // 15 bits, so that n * ln2_high is exact

constexpr float integral = 0x1.8p23f;  // x + integral rounds x to an integer and leaves it in the low mantissa bits

// e^r - 1 and e^r for |r| <= ln2 / 2
template <class V> INLINE V expm1_reduced(V r) {
  return r + r * r * horner(r, 0.5f, 0.166665181517601f, 0.04166620597243309f, 0.008368954062461853f, 0.0013950599823147058f);
}
template <class V> INLINE V exp_reduced(V r) { return 1 + expm1_reduced(r); }

// p * 2^n where n = bits(shifted) - bits(integral), -151 <= n <= 129 and p is near 1; what lies below 2^-126 is rounded once.
template <class V> INLINE V scaled(V p, V shifted) {
#if defined(__AVX512F__) && !defined(__clang__)
  if constexpr (lanes<V> == 16) return __builtin_ia32_scalefps512_mask(p, shifted - integral, p, -1, 4);
  else
#endif
  {
    auto n = bits<int_of<V>>(shifted) - 0x4b400000;
    auto half = n >> 1;
    return p * bits<V>((half + 127) << 23) * bits<V>((n - half + 127) << 23);
  }
}

template <class M, class V> INLINE V pick(M m, V a, V b) { return m ? a : b; }  // m as wide as a
// x between two bounds; NaN stays
template <class V> INLINE V clamp(V x, float low, float high) {
  V l = splat<lanes<V>>(low), h = splat<lanes<V>>(high);
  x = pick(h < x, h, x);
  return pick(l > x, l, x);
}

// 1 / x within 2^-14, the same in vectors of any width
#if defined(__AVX512F__) && defined(__AVX512VL__) && !defined(__clang__)
constexpr bool FAST_INVERSE = true;
INLINE vec<float, 16> near_inverse(vec<float, 16> x) { return __builtin_ia32_rcp14ps512_mask(x, x, -1); }
INLINE vec<float, 8> near_inverse(vec<float, 8> x) { return __builtin_ia32_rcp14ps256_mask(x, x, -1); }
INLINE vec<float, 4> near_inverse(vec<float, 4> x) { return __builtin_ia32_rcp14ps128_mask(x, x, -1); }
INLINE float near_inverse(float x) { return near_inverse(vec<float, 4>{x})[0]; }
#else
constexpr bool FAST_INVERSE = false;
#endif

template <class V> INLINE V exp(V x) {
  if constexpr (!is_single<V>) return map([](double a) { return __builtin_exp(a); }, x);
  else {
    V c = clamp(x, -104.0f, 89.0f);  // beyond: 0 and inf
    V shifted = c * 1.44269504f + integral;
    V n = shifted - integral;
    return scaled(exp_reduced((c - n * ln2_high) - n * ln2_low), shifted);
  }
}
// e^x for |x| < 80; a NaN may become any number
template <class V> INLINE V exp_moderate(V x) {
  V shifted = x * 1.44269504f + integral;
  V n = shifted - integral;
  V p = exp_reduced((x - n * ln2_high) - n * ln2_low);
  return bits<V>(bits<int_of<V>>(p) + (bits<int_of<V>>(shifted) << 23));
}
template <class V> INLINE V exp2(V x) {
  if constexpr (!is_single<V>) return map([](double a) { return __builtin_exp2(a); }, x);
  else {
    V c = clamp(x, -151.0f, 129.0f);
    V shifted = c + integral;
    return scaled(exp_reduced((c - (shifted - integral)) * 0.693147181f), shifted);
  }
}
template <class V> INLINE V expm1(V x) {
  if constexpr (!is_single<V>) return map([](double a) { return __builtin_expm1(a); }, x);
  else {
    V small = x + x * x * horner(x, 0.5f, 0.1666666716337204f, 0.041666679084300995f, 0.008333327248692513f, 0.0013887808891013265f,
                                 0.0001984279224416241f, 2.5102204745053314e-05f, 2.7566804874368245e-06f);
    return select(mask(abs(x) < 0.7f), select(mask(x == 0), x, small), exp(x) - 1);
  }
}
// 1 / b for any b >= 1, and NaN; where a division takes long within 0.6 ulp, and less than 2^-125 is 0
template <class V> INLINE V inverse(V b) {
  if constexpr (!is_single<V> || !FAST_INVERSE) return 1 / b;
  else {
    V near = near_inverse(b);
    return pick(b > 0x1p125f, V{}, near + near * (1 - b * near));
  }
}
template <class V> INLINE V tanh(V x) {
  if constexpr (!is_single<V>) return map([](double a) { return __builtin_tanh(a); }, x);
  else if constexpr (FAST_INVERSE) {
    // d / (d + 2), what rounding took from the quotient added, for d = e^2a - 1 = 2^n (e^r - 1) + (2^n - 1), a = |x|
    V a = abs(x), bound = splat<lanes<V>>(10.0f);
    a = pick(bound < a, bound, a);
    V shifted = a * 2.88539008f + integral;
    V n = shifted - integral;
    V power = bits<V>((bits<int_of<V>>(shifted) << 23) + 0x3f800000);
    V d = power * expm1_reduced((2 * a - n * ln2_high) - n * ln2_low) + (power - 1);
    V near = near_inverse(d + 2), q = d * near;
    return copysign(q + near * ((d - 2 * q) - d * q), x);
  } else {
    V a = abs(x);
    V s = x * x;
    V small = x + x * s * horner(s, -0.3333333134651184f, 0.13333210349082947f, -0.05394720286130905f, 0.021702967584133148f,
                                 -0.008182673715054989f, 0.0021475369576364756f);
    V large = 1 - 2 / (exp_moderate(clamp(a, 0.0f, 10.0f) * 2) + 1);
    return copysign(select(mask(a > 0.625f), large, small), x);  // NaN takes the polynomial
  }
}
template <class V> INLINE V erf(V x) {
  if constexpr (!is_single<V>) return map([](double a) { return __builtin_erf(a); }, x);
  else {
    V a = abs(x);
    V s = x * x;
    V small = x + x * horner(s, 0.12837915122509003f, -0.37612462043762207f, 0.11281466484069824f, -0.02675333432853222f,
                             0.004973116796463728f, -0.0005886773578822613f);
    V t = clamp(a, 0.0f, 3.95f);
    // log(erfc(t)), so that erf = 1 - e^that keeps the precision of 1 for t > 0.9
    V large = 1 - exp_moderate(t * horner(t, -1.1286370754241943f, -0.6351980566978455f, -0.10615904629230499f, 0.023694565519690514f,
                                          -0.0036103420425206423f, 0.000314858159981668f, -1.0433119314257056e-05f));
    return select(mask(a > 0.9f), copysign(large, x), small);  // NaN takes the polynomial
  }
}

// ---- logarithms in float

// x = m * 2^e with m in [sqrt(1/2), sqrt(2)); returns log(m) and e. x is positive and finite.
template <class V> struct Split { V log, exponent; };
template <class V> INLINE Split<V> split_log(V x) {
  auto tiny = mask(x < 0x1p-126f);
  auto u = bits<int_of<V>>(select(tiny, x * 0x1p23f, x)) - 0x3f3504f3;  // bits of sqrt(1/2)
  V e = as<float>(u >> 23) - select(tiny, 23.0f, 0.0f);
  V f = bits<V>((u & 0x7fffff) + 0x3f3504f3) - 1;
  V p = horner(f, 0.3333331346511841f, -0.25000008940696716f, 0.20002132654190063f, -0.1666802316904068f, 0.1421925276517868f,
               -0.12404844909906387f, 0.11889782547950745f, -0.1168123260140419f, 0.06749860942363739f);
  V s = f * f;
  return {f + (f * s * p - 0.5f * s), e};
}
// What a logarithm is outside the positive finite numbers.
template <class V> INLINE V log_edges(V x, V value) {
  V edge = select(mask(x == 0), -inf<float>, select(mask(x < 0), nan<float>, x));
  return select(mask(x > 0) & mask(x < inf<float>), value, edge);
}
template <class V> INLINE V log(V x) {
  if constexpr (!is_single<V>) return map([](double a) { return __builtin_log(a); }, x);
  else {
    auto [log, e] = split_log(x);
    return log_edges<V>(x, e * ln2_high + (log + e * ln2_low));
  }
}
template <class V> INLINE V log2(V x) {
  if constexpr (!is_single<V>) return map([](double a) { return __builtin_log2(a); }, x);
  else {
    auto [log, e] = split_log(x);
    return log_edges<V>(x, e + (log * 1.44269502f + log * 1.92596299e-8f));
  }
}
template <class V> INLINE V log10(V x) {
  if constexpr (!is_single<V>) return map([](double a) { return __builtin_log10(a); }, x);
  else {
    auto [log, e] = split_log(x);
    return log_edges<V>(x, e * 0.301025390625f + (log * 0.434294492f - log * 1.01020e-8f + e * 4.60503898e-6f));
  }
}
template <class V> INLINE V log1p(V x) {
  if constexpr (!is_single<V>) return map([](double a) { return __builtin_log1p(a); }, x);
  else {
    V u = x + 1;
    auto [log, e] = split_log(u);
    V lost = (x - (u - 1)) / u;  // what rounding took from 1 + x
    return select(mask(x == 0), x, log_edges<V>(u, e * ln2_high + (log + (lost + e * ln2_low))));
  }
}

// ---- functions of float computed in double

#if defined(__AVX512F__)
constexpr int vector_bytes = 64;
#elif defined(__AVX__)
constexpr int vector_bytes = 32;
#else
constexpr int vector_bytes = 16;
#endif

// f in double on vectors that fit a register.
template <class F, class... V> INLINE auto in_double(F f, V... v) {
  constexpr int L = max_of(lanes<V>...);
  if constexpr (L > 1 && L * 8 > vector_bytes) return join(in_double(f, low(v)...), in_double(f, high(v)...));
  else return as<float>(f(as<double>(v)...));
}
template <class D> INLINE D nearest_double(D x) { return (x + 0x1.8p52) - 0x1.8p52; }

// sin (Shift 0) or cos (Shift 1) of x by quadrants of pi / 2, |x| < 2^20: n * pi_2_high is exact.
template <class D> struct Quadrant { D sin, cos; int_of<D> number; };
template <class D> INLINE Quadrant<D> quadrant(D x) {
  D n = nearest_double(x * 0.63661977236758134308);
  D r = (x - n * 1.57079632673412561417) - n * 6.07710050650619224932e-11;
  D s = r * r;
  D sin = r + r * s * horner(s, -0.1666666664077568, 0.008333329302370745, -0.00019839311473764343, 2.718114027449362e-06);
  D cos = 1 - 0.5 * s + s * s * horner(s, 0.04166666661945269, -0.0013888883496796594, 2.4799459297776736e-05, -2.7205683876368256e-07);
  return {sin, cos, bits<int_of<D>>(n + 0x1.8p52)};
}
template <int Shift, class V> INLINE V circular(V x) {
  V y = in_double([](auto d) {
    auto q = quadrant(d);
    auto number = q.number + Shift;
    auto value = pick((number & 1) != 0, q.cos, q.sin);
    return pick((number & 2) != 0, -value, value);
  }, x);
  return Shift == 0 ? select(mask(x == 0), x, y) : y;
}
template <class V> INLINE V sin(V x) {
  if constexpr (!is_single<V>) return map([](double a) { return __builtin_sin(a); }, x);
  else if (all(mask(abs(x) < 0x1p20f))) [[likely]] return circular<0>(x);
  else return map([](float a) { return float(__builtin_sin(double(a))); }, x);
}
template <class V> INLINE V cos(V x) {
  if constexpr (!is_single<V>) return map([](double a) { return __builtin_cos(a); }, x);
  else if (all(mask(abs(x) < 0x1p20f))) [[likely]] return circular<1>(x);
  else return map([](float a) { return float(__builtin_cos(double(a))); }, x);
}
template <class V> INLINE V tan(V x) {
  if constexpr (!is_single<V>) return map([](double a) { return __builtin_tan(a); }, x);
  else if (all(mask(abs(x) < 0x1p20f))) [[likely]] {
    V y = in_double([](auto d) {
      auto q = quadrant(d);
      auto odd = (q.number & 1) != 0;
      return pick(odd, -q.cos, q.sin) / pick(odd, q.sin, q.cos);
    }, x);
    return select(mask(x == 0), x, y);
  } else return map([](float a) { return float(__builtin_tan(double(a))); }, x);
}

// a^y for a >= 0 and y of any sign, without the cases where either is 0, infinite or NaN.
template <class D> INLINE D positive_pow(D a, D y) {
  typedef int_of<D> I;
  I u = bits<I>(a) - 0x3fe6a09e667f3bcd;  // bits of sqrt(1/2)
  D e = as<double>(as<int32_t>(u >> 52));
  D m = bits<D>((u & 0xfffffffffffff) + 0x3fe6a09e667f3bcd);
  D s = (m - 1) / (m + 1);
  D z = s * s;
  D log = s * (2 + z * horner(z, 0.6666666666658648, 0.40000000052663226, 0.28571417061607157, 0.22223376826727656, 0.18123468089405922,
                              0.1682200863917315));
  D t = y * (e + log * 1.44269504088896340736);
  t = pick(t > 300.0, splat<lanes<D>>(300.0), pick(t < -300.0, splat<lanes<D>>(-300.0), t));
  D n = nearest_double(t);
  D r = t - n;
  D p = 1 + r * horner(r, 0.6931471805416257, 0.24022651076310536, 0.055504109626853405, 0.009618036836905293, 0.0013333430686879243,
                       0.00015467135845491456, 1.531497130032527e-05);
  return p * bits<D>((bits<I>(n + 0x1.8p52) + 1023) << 52);
}
template <class A, class B> INLINE auto pow(A base, B exponent) {
  constexpr int L = max_of(lanes<A>, lanes<B>);
  auto x = splat<L>(base);
  auto y = splat<L>(exponent);
  typedef decltype(x) V;
  if constexpr (!is_single<V>) return map([](double a, double b) { return __builtin_pow(a, b); }, x, y);
  else if (all(mask(x > 0) & mask(x < inf<float>) & mask(abs(y) < inf<float>))) [[likely]]
    return V(in_double([](auto a, auto b) { return positive_pow(a, b); }, x, y));
  else return V(map([](float a, float b) { return __builtin_powf(a, b); }, x, y));
}

// ---- rare functions

#define TILE_LIBM(name)                                                                                    \
  template <class V> INLINE V name(V x) {                                                                  \
    if constexpr (is_single<V>) return map([](float a) { return float(__builtin_##name(double(a))); }, x); \
    else return map([](double a) { return __builtin_##name(a); }, x);                                      \
  }
TILE_LIBM(asin)
TILE_LIBM(acos)
TILE_LIBM(atan)
TILE_LIBM(sinh)
TILE_LIBM(cosh)
TILE_LIBM(asinh)
TILE_LIBM(acosh)
TILE_LIBM(atanh)
TILE_LIBM(erfc)
TILE_LIBM(lgamma)
#undef TILE_LIBM

template <class A, class B> INLINE auto atan2(A a, B b) {
  return map([](auto x, auto y) { return decltype(x)(__builtin_atan2(double(x), double(y))); }, a, b);
}
template <class A, class B> INLINE auto hypot(A a, B b) {
  return map([](auto x, auto y) { return decltype(x)(__builtin_hypot(double(x), double(y))); }, a, b);
}
template <class A, class B> INLINE auto nextafter(A a, B b) {
  if constexpr (is_single<A>) return map([](float x, float y) { return __builtin_nextafterf(x, y); }, a, b);
  else return map([](double x, double y) { return __builtin_nextafter(x, y); }, a, b);
}

}  // namespace tile
