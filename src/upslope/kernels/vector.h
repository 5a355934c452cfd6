// Sixteen float32 lanes on any CPU that the compiler knows, and the storage types of tensors.
//
// Every function here gives an element the same bits wherever it lies in memory: a tail is computed in the same
// vectors as the body, padded, and sums run lane by lane and are folded in one fixed order.
#pragma once

#include <cstdint>
#include <cstring>

#if defined(__AVX512F__) || (defined(__AVX2__) && defined(__FMA__))
#include <immintrin.h>
#elif defined(__ARM_NEON)
#include <arm_neon.h>
#endif

namespace upslope {

typedef float floats __attribute__((vector_size(64)));
typedef int32_t ints __attribute__((vector_size(64)));
typedef uint32_t words __attribute__((vector_size(64)));
typedef uint16_t halves __attribute__((vector_size(32)));

constexpr int LANES = 16;

struct bfloat16 {
  uint16_t bits;
};

inline floats broadcast(float x) { return x - floats{}; }

// a * b + c in one rounding where the processor has it. The sources are compiled without contraction of their own.
inline floats fma(floats a, floats b, floats c) {
#if defined(__AVX512F__)
  return (floats)_mm512_fmadd_ps((__m512)a, (__m512)b, (__m512)c);
#elif defined(__AVX2__) && defined(__FMA__)
  __m256 x[2], y[2], z[2];
  std::memcpy(x, &a, sizeof a), std::memcpy(y, &b, sizeof b), std::memcpy(z, &c, sizeof c);
  for (int i = 0; i < 2; i++) z[i] = _mm256_fmadd_ps(x[i], y[i], z[i]);
  std::memcpy(&c, z, sizeof c);
  return c;
#elif defined(__ARM_NEON)
  float32x4_t x[4], y[4], z[4];
  std::memcpy(x, &a, sizeof a), std::memcpy(y, &b, sizeof b), std::memcpy(z, &c, sizeof c);
  for (int i = 0; i < 4; i++) z[i] = vfmaq_f32(z[i], x[i], y[i]);
  std::memcpy(&c, z, sizeof c);
  return c;
#else
  return a * b + c;
#endif
}

inline floats as_floats(words w) {
  floats f;
  std::memcpy(&f, &w, sizeof f);
  return f;
}

inline words as_words(floats f) {
  words w;
  std::memcpy(&w, &f, sizeof w);
  return w;
}

inline floats load(const float* p) {
  floats f;
  std::memcpy(&f, p, sizeof f);
  return f;
}

inline floats load(const bfloat16* p) {
#if defined(__AVX512F__)  // the compiler makes four instructions of the conversion below
  return as_floats((words)_mm512_cvtepu16_epi32(_mm256_loadu_si256((const __m256i*)p)) << 16);
#else
  halves h;
  std::memcpy(&h, p, sizeof h);
  return as_floats(__builtin_convertvector(h, words) << 16);
#endif
}

// The first `count` elements, `rest` in the lanes behind them.
template <typename T>
inline floats load_some(const T* p, int64_t count, float rest = 0.0f) {
  if (count >= LANES) return load(p);
  T buffer[LANES] = {};
  std::memcpy(buffer, p, count * sizeof(T));
  floats f = load(buffer);
  for (int64_t i = count; i < LANES; i++) f[i] = rest;
  return f;
}

inline void store(float* p, floats f) { std::memcpy(p, &f, sizeof f); }

// Round to nearest, ties to even, as torch does; NaN stays NaN.
inline void store(bfloat16* p, floats f) {
  words w = as_words(f);
  words rounded = (w + 0x7fff + ((w >> 16) & 1)) >> 16;
  words is_nan = (words)(f != f);
  words chosen = (is_nan & 0x7fc0) | (~is_nan & rounded);
  halves h = __builtin_convertvector(chosen, halves);
  std::memcpy(p, &h, sizeof h);
}

template <typename T>
inline void store_some(T* p, floats f, int64_t count) {
  if (count >= LANES) return store(p, f);
  T buffer[LANES];
  store(buffer, f);
  std::memcpy(p, buffer, count * sizeof(T));
}

inline float get(const float* p) { return *p; }

inline float get(const bfloat16* p) {
  uint32_t w = (uint32_t)p->bits << 16;
  float f;
  std::memcpy(&f, &w, sizeof f);
  return f;
}

// What a float32 becomes when it is stored as T and read again.
inline floats rounded_as(floats f, const float*) { return f; }

inline floats rounded_as(floats f, const bfloat16*) {
  bfloat16 buffer[LANES];
  store(buffer, f);
  return load(buffer);
}

inline floats choose(ints condition, floats yes, floats no) {
  return as_floats(((words)condition & as_words(yes)) | (~(words)condition & as_words(no)));
}

inline floats max(floats a, floats b) { return choose((a > b) | (a != a), a, b); }

inline float sum_of(floats f) {
  float part[8];
  for (int i = 0; i < 8; i++) part[i] = f[i] + f[i + 8];
  for (int i = 0; i < 4; i++) part[i] += part[i + 4];
  return (part[0] + part[2]) + (part[1] + part[3]);
}

inline float max_of(floats f) {
  float best = f[0];
  for (int i = 1; i < LANES; i++) best = (f[i] > best || f[i] != f[i]) ? f[i] : best;
  return best;
}

constexpr float ROUNDER = 12582912.0f;  // 1.5 * 2^23: a sum with it rounds to an integer, held in the low bits

// x = n ln 2 + r: e^r by a polynomial (Cephes' expf), and n + ROUNDER in `shifted`.
inline floats exp_fraction(floats x, floats* shifted) {
  const float ln2_high = 0.693359375f, ln2_low = -2.12194440e-4f;
  *shifted = fma(x, broadcast(1.44269504088896341f), broadcast(ROUNDER));
  floats n = *shifted - ROUNDER;
  floats r = fma(n, broadcast(-ln2_low), fma(n, broadcast(-ln2_high), x));
  floats p = broadcast(1.9875691500e-4f);
  p = fma(p, r, broadcast(1.3981999507e-3f));
  p = fma(p, r, broadcast(8.3334519073e-3f));
  p = fma(p, r, broadcast(4.1665795894e-2f));
  p = fma(p, r, broadcast(1.6666665459e-1f));
  p = fma(p, r, broadcast(5.0000001201e-1f));
  p = fma(p, r * r, r) + 1.0f;
  return p;
}

// e^x to within 2 units in the last place.
// Below -87.3 it is 0, above 88.7 infinity; NaN stays NaN.
inline floats exp(floats x) {
  floats bounded = choose(x > -87.3f, x, broadcast(-87.3f));
  bounded = choose(bounded < 88.7f, bounded, broadcast(88.7f));
  floats shifted;
  floats p = exp_fraction(bounded, &shifted), n = shifted - ROUNDER;
  ints k = __builtin_convertvector(n, ints);
  floats half = as_floats((words)((k >> 1) + 127) << 23), rest = as_floats((words)(k - (k >> 1) + 127) << 23);
  floats y = p * half * rest;
  y = choose(x > -87.3f, y, floats{});
  y = choose(x >= 88.7f, broadcast(__builtin_inff()), y);
  return choose(x == x, y, x);
}

}  // namespace upslope
