// The kernels, written once with the compilers' vector extension and compiled once per instruction
// set. The including file has included the system's headers, chosen the instructions, and set
// XIELU_LANES (floats in a register) and XIELU_KERNELS (the table to define). Work is cut into
// blocks of 32 elements whatever the register, so that sums are taken in the same order everywhere.

#define XIELU_INLINE static inline __attribute__((always_inline))

namespace megatron_xielu {
namespace {

constexpr int64_t LANES = XIELU_LANES;
constexpr int64_t BLOCK = 32;
constexpr int64_t VECTORS = BLOCK / LANES;
// more would not fit the registers
constexpr int VECTORS_AT_ONCE = LANES == 16 ? 2 : 1;
// blocks that are summed in float32 before the sums become float64
constexpr int64_t BLOCKS_PER_SUM = 64;
// How far ahead of the loads: with the arithmetic between them, too few loads are in flight. Tables
// leave more time to a line of 16-bit elements than the formula to one of float32.
template <class Element>
constexpr int64_t PREFETCH_BYTES = sizeof(Element) == 2 ? 4096 : 2048;

typedef float f32v __attribute__((vector_size(4 * LANES)));
typedef int32_t i32v __attribute__((vector_size(4 * LANES)));
typedef uint32_t u32v __attribute__((vector_size(4 * LANES)));
typedef float f32half __attribute__((vector_size(2 * LANES)));
typedef double f64v __attribute__((vector_size(4 * LANES)));
typedef int64_t i64v __attribute__((vector_size(4 * LANES)));

template <class V, class S>
XIELU_INLINE V all(S value) {
  return V{} + value;
}

// A NaN in x stays one: the x86 instructions return their second operand then.
#if XIELU_LANES == 16
XIELU_INLINE f32v at_least(float low, f32v x) {
  return _mm512_maskz_max_ps(-1, all<f32v>(low), x);
}
XIELU_INLINE f32v at_most(float high, f32v x) {
  return _mm512_maskz_min_ps(-1, all<f32v>(high), x);
}
#elif XIELU_LANES == 8
XIELU_INLINE f32v at_least(float low, f32v x) { return _mm256_max_ps(all<f32v>(low), x); }
XIELU_INLINE f32v at_most(float high, f32v x) { return _mm256_min_ps(all<f32v>(high), x); }
#else
XIELU_INLINE f32v at_least(float low, f32v x) { return x < low ? all<f32v>(low) : x; }
XIELU_INLINE f32v at_most(float high, f32v x) { return high < x ? all<f32v>(high) : x; }
#endif
XIELU_INLINE f64v at_least(double low, f64v x) { return x < low ? all<f64v>(low) : x; }
XIELU_INLINE f64v at_most(double high, f64v x) { return high < x ? all<f64v>(high) : x; }

// `to` is aligned to the register where STREAM is set. A line is written with nothing between its
// parts, or its buffer would be flushed half filled.
template <bool STREAM, class V>
XIELU_INLINE void store(const V& v, void* to) {
#if XIELU_LANES == 16
  if (STREAM) return _mm512_stream_si512((__m512i*)to, (__m512i)v);
#elif XIELU_LANES == 8
  if (STREAM) return _mm256_stream_si256((__m256i*)to, (__m256i)v);
#elif defined(__x86_64__)
  if (STREAM) return _mm_stream_si128((__m128i*)to, (__m128i)v);
#endif
  std::memcpy(to, &v, sizeof v);
}

XIELU_INLINE void finish_streaming(bool stream) {
#if defined(__x86_64__)
  if (stream) _mm_sfence();
#else
  (void)stream;
#endif
}

template <class Element>
XIELU_INLINE void prefetch(const Element* from, int64_t count) {
  for (int64_t byte = 0; byte < count * (int64_t)sizeof(Element); byte += 64)
    // which may lie behind the end of the tensor
    __builtin_prefetch((const void*)((uintptr_t)from + PREFETCH_BYTES<Element> + byte), 0, 3);
}

// storage types

struct Block {
  f32v v[VECTORS];
};

struct Float32 {
  typedef float type;
  XIELU_INLINE Block load(const float* from) {
    Block block;
    for (int64_t k = 0; k < VECTORS; ++k) std::memcpy(&block.v[k], from + k * LANES, sizeof(f32v));
    return block;
  }
  template <bool STREAM>
  XIELU_INLINE void store_block(const Block& block, float* to) {
    for (int64_t k = 0; k < VECTORS; ++k) store<STREAM>(block.v[k], to + k * LANES);
  }
};

// 16-bit elements in pairs: vectors 2k and 2k + 1 of a block hold the even and the odd elements of
// one register, which costs a shift and a mask where widening in order would cost permutations.
struct Pairs {
  u32v even, odd;  // 16 bits each
};

XIELU_INLINE Pairs load_pairs(const uint16_t* from) {
  u32v both;
  std::memcpy(&both, from, sizeof both);
  return {both & 0xffff, both >> 16};
}

template <class Format>
struct Half {
  typedef uint16_t type;
  XIELU_INLINE Block load(const uint16_t* from) {
    Block block;
    for (int64_t k = 0; k < VECTORS; k += 2) {
      u32v both;
      std::memcpy(&both, from + k * LANES, sizeof both);
      block.v[k] = Format::decode(both << 16);
      block.v[k + 1] = Format::decode(both & 0xffff0000);
    }
    return block;
  }
  template <bool STREAM>
  XIELU_INLINE void store_block(const Block& block, uint16_t* to) {
    for (int64_t k = 0; k < VECTORS; k += 2)
      store<STREAM>(Format::encode(block.v[k]) >> 16 | (Format::encode(block.v[k + 1]) & 0xffff0000),
                    to + k * LANES);
  }
};

// Both functions have the 16 bits in the upper half; encode rounds to the nearest value, to even.
struct BFloat16 : Half<BFloat16> {
  XIELU_INLINE f32v decode(u32v bits) { return (f32v)bits; }
  // A NaN here is one that was loaded, or the default one, so its lower half is zero and the carry
  // cannot reach its upper half.
  XIELU_INLINE u32v encode(f32v v) {
    const u32v bits = (u32v)v;
    return bits + ((bits & 0x10000) != 0 ? all<u32v>(0x8000u) : all<u32v>(0x7fffu));
  }
};

struct Float16 : Half<Float16> {
  XIELU_INLINE f32v decode(u32v bits) {
    // the exponent is rebased by a product, which is exact for subnormal numbers too
    const f32v magnitude = (f32v)((bits & 0x7fff0000) >> 3) * 0x1p112f;
    const u32v special = (bits & 0x7c000000) == 0x7c000000 ? all<u32v>(0x7f800000u) : u32v{};
    return (f32v)((u32v)magnitude | special | (bits & 0x80000000));
  }
  XIELU_INLINE u32v encode(f32v v) {
    const u32v sign = (u32v)v & 0x80000000, bits = (u32v)v & 0x7fffffff;
    const u32v normal = (bits - (112u << 23) + 0xfff + ((bits >> 13) & 1)) >> 13;
    // below 2^-14 adding 0.5 leaves the rounded multiple of 2^-24 in the low bits
    const u32v small = (u32v)((f32v)bits + 0.5f) - 0x3f000000;
    u32v half = bits < (113u << 23) ? small : normal;
    half = bits >= 0x477ff000 ? all<u32v>(0x7c00u) : half;  // 65520 and above round to infinity
    half = bits > 0x7f800000 ? all<u32v>(0x7e00u) : half;
    return half << 16 | sign;
  }
};

template <class T>
XIELU_INLINE Block load(const void* from, int64_t i) {
  typedef typename T::type type;
  prefetch((const type*)from + i, BLOCK);
  return T::load((const type*)from + i);
}

struct Inputs {
  Block x, bias;
};

// Of float32 the bias is added here, of a 16-bit type in float64 later.
template <class T>
XIELU_INLINE Inputs load_inputs(const void* x, const void* bias, int64_t i) {
  Inputs in{load<T>(x, i), {}};
  if (bias) {
    in.bias = T::load((const typename T::type*)bias + i);
    if (sizeof(typename T::type) == 4)
      for (int64_t k = 0; k < VECTORS; ++k) in.x.v[k] += in.bias.v[k];
  }
  return in;
}

// formulas

// Constants of e^x; tail(r) is (e^r - 1 - r) / r^2 for |r| <= ln 2 / 2.
template <class V>
struct Math;

template <>
struct Math<f32v> {
  typedef float scalar;
  // adding 1.5 * 2^23 leaves the rounded sum in the low bits
  static constexpr float log2e = 1.44269504f, shifter = 0x1.8p23f;
#if defined(__x86_64__) && XIELU_LANES == 4
  // no fused multiply-add: a multiple of the upper bits must be exact
  static constexpr float ln2_high = 0x1.62e4p-1f, ln2_low = 0x1.7f7d1cp-20f;
#else
  // what this lacks is below 1e-8 where e^x is not negligible
  static constexpr float ln2_high = 0x1.62e43p-1f, ln2_low = 0;
#endif
  // below, the scale would be subnormal, and e^x - 1 rounds to -1 anyway
  static constexpr float lowest = -87;
  XIELU_INLINE f32v power_of_two(f32v shifted) {
    return (f32v)(((i32v)shifted << 23) + 0x3f800000);
  }
  // minimax of degree 5, relative error below 2e-9
  static constexpr float tail[] = {5.0000001201e-1f, 1.6666665459e-1f, 4.1665795894e-2f,
                                   8.3334519073e-3f, 1.3981999507e-3f, 1.9875691500e-4f};
};

template <>
struct Math<f64v> {
  typedef double scalar;
  static constexpr double log2e = 0x1.71547652b82fep0, shifter = 0x1.8p52;
  static constexpr double ln2_high = 0x1.62e42feep-1, ln2_low = 0x1.a39ef35793c76p-33;
  static constexpr double lowest = -700;
  XIELU_INLINE f64v power_of_two(f64v shifted) {
    return (f64v)(((i64v)shifted << 52) + 0x3ff0000000000000);
  }
  // Taylor: the first term left out is below 1e-14 of the sum
  static constexpr double tail[] = {1.0 / 2,    1.0 / 6,     1.0 / 24,     1.0 / 120,
                                    1.0 / 720,  1.0 / 5040,  1.0 / 40320,  1.0 / 362880,
                                    1.0 / 3628800, 1.0 / 39916800};
};

// e^x for x <= 0 in parts: scale (1 + r + tail)
template <class V>
struct Exponential {
  V scale, r, tail;
};

template <class V>
XIELU_INLINE Exponential<V> exponential(V x) {
  typedef Math<V> M;
  x = at_least(M::lowest, x);
  const V shifted = x * M::log2e + M::shifter;
  const V k = shifted - M::shifter;
  Exponential<V> e;
  e.r = x - k * M::ln2_high;
  if (M::ln2_low != 0) e.r = e.r - k * M::ln2_low;
  e.scale = M::power_of_two(shifted);
  constexpr int last = sizeof(M::tail) / sizeof(M::tail[0]) - 1;
  V q = e.r * M::tail[last] + M::tail[last - 1];
#pragma GCC unroll 16
  for (int i = last - 2; i >= 0; --i) q = q * e.r + M::tail[i];
  e.tail = e.r * e.r * q;
  return e;
}

// e^x - 1 - shift, without cancellation where shift is x or 0
template <class V>
XIELU_INLINE V expm1_minus(const Exponential<V>& e, V shift) {
  return e.scale * e.tail + (e.scale * e.r + ((e.scale - 1) - shift));
}

template <class V>
XIELU_INLINE V expm1(const Exponential<V>& e) {
  return e.scale * (e.r + e.tail) + (e.scale - 1);
}

template <class S>
struct Rounded {
  S beta, p2, p3, n, n_minus_beta;
  explicit Rounded(const Coefficients& c)
      : beta(c.beta), p2(c.p2), p3(c.p3), n(c.n), n_minus_beta(c.n_minus_beta) {}
};

// GENTLE holds where n is at most MOST_GENTLE beta: n (e^x - 1) and (n - beta) x may then be
// subtracted near zero too, where they are up to 2 MOST_GENTLE - 1 times as large as the result.
#if defined(__x86_64__) && XIELU_LANES == 4
constexpr double MOST_GENTLE = 1.3;  // each product is rounded
#else
constexpr double MOST_GENTLE = 1.7;
#endif

template <bool CUBIC, Negative NEGATIVE, bool GENTLE, class V, class S>
XIELU_INLINE V activation(const Rounded<S>& c, V x) {
  // each half of x adds exactly nothing to the other half's term
  const V zero{}, above = at_least(S(0), x), below = at_most(S(0), x);
  V negative = NEGATIVE == Negative::quadratic ? below * (below * c.n + c.beta) : zero;
  if (NEGATIVE == Negative::exponential) {
    const Exponential<V> e = exponential(below);
    if (GENTLE) {
      negative = expm1(e) * c.n - below * c.n_minus_beta;
    } else {
      // near zero n (e^x - 1 - x) + beta x, far from it n (e^x - 1) - (n - beta) x: each where the
      // other one cancels; the second one also has the right limit at -inf
      const auto far = below < S(-2);
      const V shift = far ? zero : below;
      const V linear = far ? all<V>(-c.n_minus_beta) : all<V>(c.beta);
      negative = expm1_minus(e, shift) * c.n + below * linear;
    }
  }
  V slope = all<V>(c.p2);
  if (CUBIC) slope = above * c.p3 + slope;
  return above * (above * slope + c.beta) + negative;
}

// dy/dx and the derivatives by the coefficients. Each half of x adds exactly nothing to the other
// half's terms, so nothing has to be selected.
template <class V>
struct Gradient {
  V x, p2, p3, n;
};

template <Negative NEGATIVE, class V, class S>
XIELU_INLINE void add_below(const Rounded<S>& c, V below, Gradient<V>& d) {
  if (NEGATIVE == Negative::quadratic) {
    d.n = below * below;
    d.x = below * (2 * c.n) + d.x;
  }
  if (NEGATIVE == Negative::exponential) {
    const Exponential<V> e = exponential(below);
    d.n = expm1_minus(e, below);
    // n (e^x - 1) + beta near zero, n e^x - (n - beta) far from it, where the slope's limit
    // beta - n may be small beside beta; both ways cancel alike where e^x is 1/2
    const auto far = below < S(-0.69314718);
    const V one = far ? V{} : all<V>(S(1));
    d.x = far ? all<V>(-c.n_minus_beta) : d.x;
    d.x = (e.scale * (e.r + e.tail) + (e.scale - one)) * c.n + d.x;
  }
}

template <bool CUBIC, class V, class S>
XIELU_INLINE void add_above(const Rounded<S>& c, V above, Gradient<V>& d) {
  d.p2 = above * above;
  V slope = all<V>(2 * c.p2);
  if (CUBIC) {
    d.p3 = d.p2 * above;
    // not 3 p3 x^2, whose x^2 overflows before the product does
    slope = above * (3 * c.p3) + slope;
  }
  d.x = above * slope + d.x;
}

template <bool CUBIC, Negative NEGATIVE, class V, class S>
XIELU_INLINE Gradient<V> gradient(const Rounded<S>& c, V x) {
  Gradient<V> d{all<V>(c.beta), V{}, V{}, V{}};
  add_above<CUBIC>(c, at_least(S(0), x), d);
  add_below<NEGATIVE>(c, at_most(S(0), x), d);
  return d;
}

// float64 arithmetic for the 16-bit types

XIELU_INLINE void to_double(f32v v, f64v* two) {
  f32half halves[2];
  std::memcpy(halves, &v, sizeof v);
  for (int k = 0; k < 2; ++k) two[k] = __builtin_convertvector(halves[k], f64v);
}

XIELU_INLINE void to_double_sum(f32v a, f32v b, f64v* two) {
  f64v second[2];
  to_double(a, two);
  to_double(b, second);
  for (int k = 0; k < 2; ++k) two[k] += second[k];
}

// A float32 number whose last bit stands for those that were dropped. Rounding it to 16 bits gives
// the nearest number, as if that were the only rounding.
XIELU_INLINE f64v rounded_to_odd(f64v v) {
  constexpr int64_t dropped = 0x1fffffff;
  const i64v bits = (i64v)v;
  return (f64v)((bits | ((bits & dropped) + dropped)) & ~dropped);
}

XIELU_INLINE f32v to_float(const f64v* two) {
  const f32half halves[2] = {__builtin_convertvector(two[0], f32half),
                             __builtin_convertvector(two[1], f32half)};
  f32v v;
  std::memcpy(&v, halves, sizeof v);
  return v;
}

template <bool CUBIC, Negative NEGATIVE>
XIELU_INLINE f32v exact_activation(const Rounded<double>& c, f32v x, f32v bias) {
  f64v v[2];
  to_double_sum(x, bias, v);
  for (f64v& half : v) half = rounded_to_odd(activation<CUBIC, NEGATIVE, false>(c, half));
  return to_float(v);
}

template <bool CUBIC, Negative NEGATIVE>
XIELU_INLINE Gradient<f32v> exact_gradient(const Rounded<double>& c, f32v x, f32v bias) {
  f64v v[2], dx[2], p2[2], p3[2], n[2];
  to_double_sum(x, bias, v);
  for (int k = 0; k < 2; ++k) {
    const Gradient<f64v> d = gradient<CUBIC, NEGATIVE>(c, v[k]);
    dx[k] = rounded_to_odd(d.x), p2[k] = d.p2, p3[k] = d.p3, n[k] = d.n;
  }
  return {to_float(dx), to_float(p2), to_float(p3), to_float(n)};
}

// tables

// entries [begin, end) of a table; NEGATIVE may be zero for patterns without a sign
template <class T, bool CUBIC, Negative NEGATIVE>
void fill_y(const Rounded<double>& c, uint16_t* table, int64_t begin, int64_t end) {
  for (int64_t i = begin; i < end; i += BLOCK) {
    for (int64_t lane = 0; lane < BLOCK; ++lane) table[i + lane] = (uint16_t)(i + lane);
    Block block = T::load(table + i);
    for (f32v& v : block.v) v = exact_activation<CUBIC, NEGATIVE>(c, v, f32v{});
    T::template store_block<false>(block, table + i);
  }
}

template <class T, bool CUBIC, Negative NEGATIVE>
void fill_derivatives(const Rounded<double>& c, Derivatives* table, int64_t begin, int64_t end) {
  for (int64_t i = begin; i < end; i += LANES) {
    u32v bits;
    for (int64_t lane = 0; lane < LANES; ++lane) bits[lane] = (uint32_t)(i + lane) << 16;
    const Gradient<f32v> d = exact_gradient<CUBIC, NEGATIVE>(c, T::decode(bits), f32v{});
    for (int64_t lane = 0; lane < LANES; ++lane) table[i + lane] = {d.x[lane], d.n[lane]};
  }
}

// with whatever follows the entry in the upper half
XIELU_INLINE u32v look_up(const uint16_t* table, u32v bits) {
#if XIELU_LANES == 16
  return (u32v)_mm512_mask_i32gather_epi32(__m512i{}, -1, (__m512i)bits, table, 2);
#elif XIELU_LANES == 8
  return (u32v)_mm256_i32gather_epi32((const int*)table, (__m256i)bits, 2);
#else
  u32v y;
  for (int64_t lane = 0; lane < LANES; ++lane) y[lane] = table[bits[lane]];
  return y;
#endif
}

XIELU_INLINE void look_up(const Derivatives* table, u32v bits, f32v& slope, f32v& n) {
#if XIELU_LANES == 16
  const __m512i index = (__m512i)bits;
  const __m256i halves[2] = {_mm512_castsi512_si256(index),
                             _mm512_maskz_extracti64x4_epi64(-1, index, 1)};
  const __m512 low = (__m512)_mm512_mask_i32gather_pd(__m512d{}, -1, halves[0], table, 8);
  const __m512 high = (__m512)_mm512_mask_i32gather_pd(__m512d{}, -1, halves[1], table, 8);
  const __m512i even = _mm512_set_epi32(30, 28, 26, 24, 22, 20, 18, 16, 14, 12, 10, 8, 6, 4, 2, 0);
  const __m512i odd = _mm512_set_epi32(31, 29, 27, 25, 23, 21, 19, 17, 15, 13, 11, 9, 7, 5, 3, 1);
  slope = _mm512_permutex2var_ps(low, even, high);
  n = _mm512_permutex2var_ps(low, odd, high);
#elif XIELU_LANES == 8
  const __m256i index = (__m256i)bits, order = _mm256_set_epi32(7, 6, 3, 2, 5, 4, 1, 0);
  const double* pairs = (const double*)table;
  const __m256 low = (__m256)_mm256_i32gather_pd(pairs, _mm256_castsi256_si128(index), 8);
  const __m256 high = (__m256)_mm256_i32gather_pd(pairs, _mm256_extracti128_si256(index, 1), 8);
  slope = _mm256_permutevar8x32_ps(_mm256_shuffle_ps(low, high, 0x88), order);
  n = _mm256_permutevar8x32_ps(_mm256_shuffle_ps(low, high, 0xdd), order);
#else
  slope = n = f32v{};
  for (int64_t lane = 0; lane < LANES; ++lane) {
    slope[lane] = table[bits[lane]].slope;
    n[lane] = table[bits[lane]].n;
  }
#endif
}

// one block, `i` elements from the start

// How a value is computed: float32 as it is (gentle or not); 16-bit types in float64, each value
// once (a table) or each element.
enum class Method { gentle, single, exact, table };

template <class T, Method METHOD, bool CUBIC, Negative NEGATIVE, bool STREAM>
XIELU_INLINE void forward_block(const Task& task, const void* x, const void* bias, void* y,
                                int64_t i) {
  typedef typename T::type type;
  if constexpr (METHOD == Method::table) {
    const uint16_t* from = (const uint16_t*)x + i;
    prefetch(from, BLOCK);
    for (int64_t k = 0; k < BLOCK; k += 2 * LANES) {
      const Pairs x = load_pairs(from + k);
      store<STREAM>((look_up(task.y_table, x.even) & 0xffff) | look_up(task.y_table, x.odd) << 16,
                    (uint16_t*)y + i + k);
    }
  } else {
    Inputs in = load_inputs<T>(x, bias, i);
#pragma GCC unroll VECTORS_AT_ONCE
    for (int64_t k = 0; k < VECTORS; ++k) {
      f32v& v = in.x.v[k];
      if (sizeof(type) == 4)
        v = activation<CUBIC, NEGATIVE, METHOD == Method::gentle>(
            Rounded<float>(task.coefficients), v);
      else
        v = exact_activation<CUBIC, NEGATIVE>(Rounded<double>(task.coefficients), v, in.bias.v[k]);
    }
    T::template store_block<STREAM>(in.x, (type*)y + i);
  }
}

// Sums of every lane of a block: in float32 for a while, then in float64.
struct LaneSums {
  f32v p2[VECTORS], p3[VECTORS], n[VECTORS];
};

struct LaneTotals {
  f64v lanes[2 * VECTORS];
  XIELU_INLINE void add(LaneTotals& totals, const f32v* sums) {
    for (int64_t k = 0; k < VECTORS; ++k) {
      f64v two[2];
      to_double(sums[k], two);
      totals.lanes[2 * k] += two[0];
      totals.lanes[2 * k + 1] += two[1];
    }
  }
  XIELU_INLINE double sum(const LaneTotals& totals) {
    double sum = 0;
    for (const f64v& vector : totals.lanes)
      for (int64_t lane = 0; lane < LANES / 2; ++lane) sum += vector[lane];
    return sum;
  }
};

template <class T, Method METHOD, bool CUBIC, Negative NEGATIVE, bool STREAM>
XIELU_INLINE void backward_block(const Task& task, const void* grad_y, const void* x,
                                 const void* bias, void* grad_x, int64_t i, LaneSums& sums) {
  typedef typename T::type type;
  Block grad = load<T>(grad_y, i);
  const Inputs in = load_inputs<T>(x, bias, i);
#pragma GCC unroll VECTORS_AT_ONCE
  for (int64_t k = 0; k < VECTORS; ++k) {
    Gradient<f32v> d{f32v{}, f32v{}, f32v{}, f32v{}};
    if constexpr (sizeof(type) == 4) {
      d = gradient<CUBIC, NEGATIVE>(Rounded<float>(task.coefficients), in.x.v[k]);
    } else if constexpr (METHOD == Method::exact) {
      d = exact_gradient<CUBIC, NEGATIVE>(Rounded<double>(task.coefficients), in.x.v[k],
                                          in.bias.v[k]);
    } else {
      const Pairs pairs = load_pairs((const uint16_t*)x + i + k / 2 * 2 * LANES);
      look_up(task.derivatives, k % 2 ? pairs.odd : pairs.even, d.x, d.n);
      const f32v above = at_least(0.0f, in.x.v[k]);
      d.p2 = above * above;
      d.p3 = d.p2 * above;
    }
    if (NEGATIVE != Negative::zero) {
      sums.p2[k] = grad.v[k] * d.p2 + sums.p2[k];
      sums.n[k] = grad.v[k] * d.n + sums.n[k];
    }
    if (CUBIC) sums.p3[k] = grad.v[k] * d.p3 + sums.p3[k];
    grad.v[k] *= d.x;
  }
  T::template store_block<STREAM>(grad, (type*)grad_x + i);
}

// runs of any length; the rest that fills no block is computed in one padded with zeros

template <class T, Method METHOD, bool CUBIC, Negative NEGATIVE, bool STREAM>
__attribute__((noinline)) void forward_run(const Task& shared, const void* x, const void* bias,
                                           void* y, int64_t count) {
  typedef typename T::type type;
  const Task task = shared;  // which the stores cannot change
  int64_t i = 0;
  for (; i + BLOCK <= count; i += BLOCK)
    forward_block<T, METHOD, CUBIC, NEGATIVE, STREAM>(task, x, bias, y, i);
  if (i < count) {
    type block[3][BLOCK] = {};
    const int64_t bytes = (count - i) * sizeof(type);
    std::memcpy(block[0], (const type*)x + i, bytes);
    if (bias) std::memcpy(block[1], (const type*)bias + i, bytes);
    forward_block<T, METHOD, CUBIC, NEGATIVE, false>(task, block[0], bias ? block[1] : nullptr,
                                                     block[2], 0);
    std::memcpy((type*)y + i, block[2], bytes);
  }
  finish_streaming(STREAM);
}

template <class T, Method METHOD, bool CUBIC, Negative NEGATIVE, bool STREAM>
__attribute__((noinline)) void backward_run(const Task& shared, const void* grad_y, const void* x,
                                            const void* bias, void* grad_x, int64_t count,
                                            Sums& sums) {
  typedef typename T::type type;
  const Task task = shared;
  LaneTotals p2{}, p3{}, n{};
  const auto add = [&](const LaneSums& lanes) {
    LaneTotals::add(p2, lanes.p2);
    LaneTotals::add(p3, lanes.p3);
    LaneTotals::add(n, lanes.n);
  };
  int64_t i = 0;
  while (i + BLOCK <= count) {
    LaneSums lanes{};
    const int64_t left = count - BLOCK + 1, next = i + BLOCK * BLOCKS_PER_SUM;
    for (const int64_t stop = left < next ? left : next; i < stop; i += BLOCK)
      backward_block<T, METHOD, CUBIC, NEGATIVE, STREAM>(task, grad_y, x, bias, grad_x, i, lanes);
    add(lanes);
  }
  if (i < count) {
    LaneSums lanes{};
    type block[4][BLOCK] = {};
    const int64_t bytes = (count - i) * sizeof(type);
    std::memcpy(block[0], (const type*)grad_y + i, bytes);
    std::memcpy(block[1], (const type*)x + i, bytes);
    if (bias) std::memcpy(block[2], (const type*)bias + i, bytes);
    backward_block<T, METHOD, CUBIC, NEGATIVE, false>(
        task, block[0], block[1], bias ? block[2] : nullptr, block[3], 0, lanes);
    std::memcpy((type*)grad_x + i, block[3], bytes);
    add(lanes);
  }
  sums.p2 += LaneTotals::sum(p2);
  sums.p3 += LaneTotals::sum(p3);
  sums.n += LaneTotals::sum(n);
  finish_streaming(STREAM);
}

template <bool STREAM, bool TWO>
void move(const void* x, const void* z, void* y, int64_t bytes) {
  for (int64_t i = 0; i < bytes; i += 64) {
    prefetch((const float*)((const char*)x + i), 16);
    if (TWO) prefetch((const float*)((const char*)z + i), 16);
    for (int64_t k = 0; k < 64; k += 4 * LANES) {
      u32v value, other;
      std::memcpy(&value, (const char*)x + i + k, sizeof value);
      if (TWO) {
        std::memcpy(&other, (const char*)z + i + k, sizeof other);
        value ^= other;
      }
      store<STREAM>(value, (char*)y + i + k);
    }
  }
  finish_streaming(STREAM);
}

// the table of functions

template <class F>
void with_shape(Shape shape, F f) {
  if (shape.negative == Negative::zero) f.template operator()<false, Negative::zero>();
  else if (shape.negative == Negative::quadratic) f.template operator()<false, Negative::quadratic>();
  else if (!shape.cubic) f.template operator()<false, Negative::exponential>();
  else f.template operator()<true, Negative::exponential>();
}

template <class F>
void with_storage(Storage storage, F f) {
  if (storage == Storage::float32) f(Float32{});
  if (storage == Storage::bfloat16) f(BFloat16{});
  if (storage == Storage::float16) f(Float16{});
}

template <bool GRADIENT, class F>
void with_variant(const Task& task, bool table, const void* to, F f) {
  // streaming stores need whole lines
  const bool stream = task.stream && (uintptr_t)to % 64 == 0;
  with_storage(task.storage, [&]<class T>(T) {
    with_shape(task.shape, [&]<bool CUBIC, Negative NEGATIVE>() {
      auto with_method = [&]<Method METHOD>() {
        if (stream) f.template operator()<T, METHOD, CUBIC, NEGATIVE, true>();
        else f.template operator()<T, METHOD, CUBIC, NEGATIVE, false>();
      };
      const Coefficients& c = task.coefficients;
      if constexpr (sizeof(typename T::type) == 4) {
        const bool gentle = !GRADIENT && c.n <= MOST_GENTLE * c.beta;
        if (gentle) with_method.template operator()<Method::gentle>();
        else with_method.template operator()<Method::single>();
      } else if (table) with_method.template operator()<Method::table>();
      else with_method.template operator()<Method::exact>();
    });
  });
}

void forward(const Task& task, const void* x, const void* bias, void* y, int64_t count) {
  with_variant<false>(task, task.y_table, y,
               [&]<class T, Method METHOD, bool CUBIC, Negative NEGATIVE, bool STREAM>() {
                 forward_run<T, METHOD, CUBIC, NEGATIVE, STREAM>(task, x, bias, y, count);
               });
}

void backward(const Task& task, const void* grad_y, const void* x, const void* bias, void* grad_x,
              int64_t count, Sums* sums) {
  with_variant<true>(task, task.derivatives, grad_x,
               [&]<class T, Method METHOD, bool CUBIC, Negative NEGATIVE, bool STREAM>() {
                 backward_run<T, METHOD, CUBIC, NEGATIVE, STREAM>(task, grad_y, x, bias, grad_x,
                                                                  count, *sums);
               });
}

// Patterns without a sign are not below zero, but those that end their half are nans, which are
// neither below nor above.
template <class F>
void with_half(const Task& task, int64_t end, F f) {
  with_storage(task.storage, [&]<class T>(T) {
    if constexpr (sizeof(typename T::type) == 2)
      with_shape(task.shape, [&]<bool CUBIC, Negative NEGATIVE>() {
        if (end < PATTERNS / 2) f.template operator()<T, CUBIC, Negative::zero>();
        else f.template operator()<T, CUBIC, NEGATIVE>();
      });
  });
}

void fill_y_table(const Task& task, uint16_t* table, int64_t begin, int64_t end) {
  with_half(task, end, [&]<class T, bool CUBIC, Negative NEGATIVE>() {
    fill_y<T, CUBIC, NEGATIVE>(Rounded<double>(task.coefficients), table, begin, end);
  });
}

void fill_derivatives_table(const Task& task, Derivatives* table, int64_t begin, int64_t end) {
  with_half(task, end, [&]<class T, bool CUBIC, Negative NEGATIVE>() {
    fill_derivatives<T, CUBIC, NEGATIVE>(Rounded<double>(task.coefficients), table, begin, end);
  });
}

void copy(const void* x, void* y, int64_t bytes, bool stream) {
  stream ? move<true, false>(x, x, y, bytes) : move<false, false>(x, x, y, bytes);
}

void read_two_write_one(const void* x, const void* z, void* y, int64_t bytes, bool stream) {
  stream ? move<true, true>(x, z, y, bytes) : move<false, true>(x, z, y, bytes);
}

}  // namespace

extern const Kernels XIELU_KERNELS;
const Kernels XIELU_KERNELS{forward,          backward, fill_y_table,
                            fill_derivatives_table, copy,     read_two_write_one};

}  // namespace megatron_xielu
