// Vectors of the instruction set being compiled (no include guard: each_isa.h includes this once per set).
//
// GCC's vector extensions give arithmetic, comparison and selection; this file adds what they lack: unaligned and
// partial loads, conversions from and to 16-bit floats, reductions and exp.
namespace pyvtk::cpu::PYVTK_ISA {

using vfloat = float __attribute__((vector_size(PYVTK_VECTOR_BYTES)));
using vint = int32_t __attribute__((vector_size(PYVTK_VECTOR_BYTES)));
using vuint = uint32_t __attribute__((vector_size(PYVTK_VECTOR_BYTES)));
using vhalf = uint16_t __attribute__((vector_size(PYVTK_VECTOR_BYTES / 2)));

// Lanes of 32 bits in a vector.
inline constexpr int64_t kLanes = PYVTK_VECTOR_BYTES / 4;

#define PYVTK_INLINE inline __attribute__((always_inline))

// Scratch memory whose vectors do not straddle cache lines; uninitialised.
struct FreeFloats {
  void operator()(float* p) const { ::operator delete[](p, std::align_val_t{64}); }
};
using Scratch = std::unique_ptr<float[], FreeFloats>;
inline Scratch scratch(int64_t count) {
  return Scratch(
      static_cast<float*>(::operator new[](static_cast<size_t>(count) * sizeof(float), std::align_val_t{64})));
}

// x - 0 is x for every x, so that only the broadcast is left of it; 0 + x is not, for -0.
PYVTK_INLINE vfloat splat(float x) { return x - vfloat{}; }
PYVTK_INLINE vint splat(int32_t x) { return vint{} + x; }

PYVTK_INLINE vfloat as_float(vint x) { return reinterpret_cast<vfloat>(x); }
PYVTK_INLINE vfloat as_float(vuint x) { return reinterpret_cast<vfloat>(x); }
PYVTK_INLINE vint as_int(vfloat x) { return reinterpret_cast<vint>(x); }

// mask lanes are 0 or -1
PYVTK_INLINE vfloat blend(vint mask, vfloat yes, vfloat no) { return mask ? yes : no; }
PYVTK_INLINE vint blend(vint mask, vint yes, vint no) { return mask ? yes : no; }

// By the sign bit of each lane, which saves the comparison where the bit is at hand.
PYVTK_INLINE vfloat blend_sign(vint sign, vfloat yes, vfloat no) {
#if PYVTK_VECTOR_BYTES == 64
  return reinterpret_cast<vfloat>(_mm512_mask_blend_ps(_mm512_movepi32_mask(reinterpret_cast<__m512i>(sign)),
                                                       reinterpret_cast<__m512>(no), reinterpret_cast<__m512>(yes)));
#elif PYVTK_VECTOR_BYTES == 32
  return reinterpret_cast<vfloat>(
      _mm256_blendv_ps(reinterpret_cast<__m256>(no), reinterpret_cast<__m256>(yes), reinterpret_cast<__m256>(sign)));
#else
  return sign < 0 ? yes : no;
#endif
}

// Two products of 16-bit numbers, added, in each lane of 32 bits.
PYVTK_INLINE vint multiply_add_pairs(vint a, vint b) {
#if PYVTK_VECTOR_BYTES == 64
  return reinterpret_cast<vint>(_mm512_madd_epi16(reinterpret_cast<__m512i>(a), reinterpret_cast<__m512i>(b)));
#elif PYVTK_VECTOR_BYTES == 32
  return reinterpret_cast<vint>(_mm256_madd_epi16(reinterpret_cast<__m256i>(a), reinterpret_cast<__m256i>(b)));
#else
  return (a << 16 >> 16) * (b << 16 >> 16) + (a >> 16) * (b >> 16);
#endif
}

// NaN in either operand gives the second one, as x86's own max and min do.
PYVTK_INLINE vfloat vmax(vfloat a, vfloat b) { return a > b ? a : b; }

PYVTK_INLINE vfloat load(const float* p) {
  vfloat x;
  __builtin_memcpy(&x, p, sizeof(x));
  return x;
}
PYVTK_INLINE vint load(const int32_t* p) {
  vint x;
  __builtin_memcpy(&x, p, sizeof(x));
  return x;
}
PYVTK_INLINE vfloat load(const bfloat16* p) {
  // GCC 12 widens vectors of 16 bits in two halves unless told otherwise.
#if PYVTK_VECTOR_BYTES == 64
  return as_float(
      reinterpret_cast<vuint>(_mm512_cvtepu16_epi32(_mm256_loadu_si256(reinterpret_cast<const __m256i*>(p)))) << 16);
#elif PYVTK_VECTOR_BYTES == 32
  return as_float(reinterpret_cast<vuint>(_mm256_cvtepu16_epi32(_mm_loadu_si128(reinterpret_cast<const __m128i*>(p))))
                  << 16);
#else
  vhalf x;
  __builtin_memcpy(&x, p, sizeof(x));
  return as_float(__builtin_convertvector(x, vuint) << 16);
#endif
}
PYVTK_INLINE vfloat load(const float16* p) {
#if PYVTK_VECTOR_BYTES == 64
  // maskz: GCC 12 warns about the undefined lanes of the plain form, which has none.
  return reinterpret_cast<vfloat>(
      _mm512_maskz_cvtph_ps(0xffff, _mm256_loadu_si256(reinterpret_cast<const __m256i*>(p))));
#elif PYVTK_VECTOR_BYTES == 32
  return reinterpret_cast<vfloat>(_mm256_cvtph_ps(_mm_loadu_si128(reinterpret_cast<const __m128i*>(p))));
#else
  vfloat x;
  for (int64_t lane = 0; lane < kLanes; ++lane) x[lane] = to_float(p[lane]);
  return x;
#endif
}

PYVTK_INLINE vfloat load(const int8_t* p) {
#if PYVTK_VECTOR_BYTES == 64
  return __builtin_convertvector(
      reinterpret_cast<vint>(_mm512_cvtepi8_epi32(_mm_loadu_si128(reinterpret_cast<const __m128i*>(p)))), vfloat);
#elif PYVTK_VECTOR_BYTES == 32
  return __builtin_convertvector(
      reinterpret_cast<vint>(_mm256_cvtepi8_epi32(_mm_loadl_epi64(reinterpret_cast<const __m128i*>(p)))), vfloat);
#else
  vfloat x;
  for (int64_t lane = 0; lane < kLanes; ++lane) x[lane] = p[lane];
  return x;
#endif
}

PYVTK_INLINE void store(float* p, vfloat x) { __builtin_memcpy(p, &x, sizeof(x)); }
PYVTK_INLINE void store(int32_t* p, vint x) { __builtin_memcpy(p, &x, sizeof(x)); }

// Rounded to the nearest, ties to even.
PYVTK_INLINE void store(bfloat16* p, vfloat x) {
  const vuint bits = reinterpret_cast<vuint>(x);
  const vuint rounded = bits + 0x7fffu + ((bits >> 16) & 1u);
  const vuint result = (x != x ? bits | 0x400000u : rounded) >> 16;
  const vhalf half = __builtin_convertvector(result, vhalf);
  __builtin_memcpy(p, &half, sizeof(half));
}
PYVTK_INLINE void store(float16* p, vfloat x) {
#if PYVTK_VECTOR_BYTES == 64
  const __m256i half = _mm512_cvtps_ph(reinterpret_cast<__m512>(x), _MM_FROUND_TO_NEAREST_INT);
  __builtin_memcpy(p, &half, sizeof(half));
#elif PYVTK_VECTOR_BYTES == 32
  const __m128i half = _mm256_cvtps_ph(reinterpret_cast<__m256>(x), _MM_FROUND_TO_NEAREST_INT);
  __builtin_memcpy(p, &half, sizeof(half));
#else
  for (int64_t lane = 0; lane < kLanes; ++lane) p[lane] = from_float<float16>(x[lane]);
#endif
}

// The first `count` lanes (the rest 0), reading nothing beyond them.
template <class T>
PYVTK_INLINE vfloat load_partial(const T* p, int64_t count) {
  T lanes[kLanes] = {};
  __builtin_memcpy(lanes, p, static_cast<size_t>(count) * sizeof(T));
  return load(lanes);
}
PYVTK_INLINE void store_partial(float* p, vfloat x, int64_t count) {
  __builtin_memcpy(p, &x, static_cast<size_t>(count) * sizeof(float));
}

PYVTK_INLINE float reduce_add(vfloat x) {
  // A tree, so that the order of additions does not depend on the compiler.
  float lanes[kLanes];
  store(lanes, x);
  for (int64_t width = kLanes / 2; width > 0; width /= 2) {
    for (int64_t lane = 0; lane < width; ++lane) lanes[lane] += lanes[lane + width];
  }
  return lanes[0];
}

PYVTK_INLINE float reduce_max(vfloat x) {
  float lanes[kLanes];
  store(lanes, x);
  float result = lanes[0];
  for (int64_t lane = 1; lane < kLanes; ++lane) result = lanes[lane] > result ? lanes[lane] : result;
  return result;
}

// exp for x <= ~88; below -87.3 the result is 0 (denormals are not produced). NaN stays NaN. About 1 ulp:
// x = n ln2 + r with |r| <= ln2 / 2, a degree-7 polynomial for e^r, and 2^n through the exponent bits.
PYVTK_INLINE vfloat vexp(vfloat x) {
  const vfloat magic = splat(0x1.8p23f);
  const vfloat shifted = x * 0x1.715476p+0f + magic;  // n lies in the low mantissa bits
  const vfloat n = shifted - magic;
  vfloat r = n * -0x1.62e4p-1f + x;
  r = n * -0x1.7f7d1cp-20f + r;
  vfloat p = r * 1.9841270e-4f + 1.3888889e-3f;
  p = p * r + 8.3333333e-3f;
  p = p * r + 4.1666667e-2f;
  p = p * r + 1.6666667e-1f;
  p = p * r + 0.5f;
  p = p * r * r + r + 1.0f;
  // unsigned, since it overflows for x that the last lines turn into 0 or infinity
  const vfloat result = as_float(reinterpret_cast<vuint>(p) + (reinterpret_cast<vuint>(shifted) << 23));
  // A comparison with NaN is false, so NaN takes the first branch and stays.
  return blend(x < splat(-87.3f), splat(0.0f),
               blend(x > splat(88.7f), splat(std::numeric_limits<float>::infinity()), blend(x != x, x, result)));
}

}  // namespace pyvtk::cpu::PYVTK_ISA
