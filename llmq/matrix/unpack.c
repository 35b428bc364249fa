/* Unpacks codes of 4 bits, as PyTorch's packed int4 product holds them, to a weight (inputs, outputs) in bfloat16.

   packed: for each tile of 64 outputs and each input 32 bytes, outputs 0 to 31 in the low halves and 32 to 63 in the high
   ones; an incomplete tile pair by pair. high: the upper 4 bits of codes of 8 bits, held alike, or NULL.
   scales: pairs (scale, shift) in bfloat16, (groups, outputs). weight = (code - zero) * scale, rounded once. */
#include <math.h>
#include <stdint.h>
#include <string.h>
#ifdef __AVX512BF16__
#include <immintrin.h>
#endif

enum { TILE = 64 };

static inline float widened(uint16_t x) {
  uint32_t bits = (uint32_t)x << 16;
  float wide;
  memcpy(&wide, &bits, 4);
  return wide;
}

static inline uint16_t rounded(float x) { /* to the nearest, of two the even one */
  uint32_t bits;
  memcpy(&bits, &x, 4);
  return (uint16_t)((bits + 0x7fff + ((bits >> 16) & 1)) >> 16);
}

/* The scales of some outputs, and the codes that stand for 0 there. */
static void grid(const uint16_t *restrict pairs, long outputs, float middle, float *restrict scale, float *restrict zero) {
  for (long j = 0; j < outputs; j++) {
    float shift = widened(pairs[2 * j + 1]);
    scale[j] = widened(pairs[2 * j]);
    zero[j] = middle - (shift == 0 ? 0 : rintf(shift / scale[j]));
  }
}

#ifdef __AVX512BF16__
static inline __m512i codes(const uint8_t *low, const uint8_t *high, int half) {
  __m512i made = _mm512_cvtepu8_epi32(_mm_loadu_si128((const __m128i *)low));
  made = half ? _mm512_srli_epi32(made, 4) : _mm512_and_si512(made, _mm512_set1_epi32(15));
  if (!high) return made;
  __m512i upper = _mm512_cvtepu8_epi32(_mm_loadu_si128((const __m128i *)high));
  upper = half ? _mm512_and_si512(upper, _mm512_set1_epi32(0xf0)) : _mm512_slli_epi32(_mm512_and_si512(upper, _mm512_set1_epi32(15)), 4);
  return _mm512_or_si512(made, upper);
}

static void tile(const uint8_t *restrict low, const uint8_t *restrict high, const float *restrict scale,
                 const float *restrict zero, uint16_t *restrict to, long inputs, long outputs) {
  __m512 s[4], z[4], value[4];
  for (int i = 0; i < 4; i++) s[i] = _mm512_loadu_ps(scale + 16 * i), z[i] = _mm512_loadu_ps(zero + 16 * i);
  for (long k = 0; k < inputs; k++, low += TILE / 2, high += high ? TILE / 2 : 0, to += outputs) {
    for (int i = 0; i < 4; i++) {
      __m512i code = codes(low + 16 * (i % 2), high ? high + 16 * (i % 2) : high, i / 2);
      value[i] = _mm512_mul_ps(_mm512_sub_ps(_mm512_cvtepi32_ps(code), z[i]), s[i]);
    }
    for (int half = 0; half < 2; half++)
      _mm512_storeu_si512(to + 32 * half, (__m512i)_mm512_cvtne2ps_pbh(value[2 * half + 1], value[2 * half]));
  }
}
#else
/* 32 outputs; a plain loop that compilers turn into vector instructions. */
static inline void half_tile(const uint8_t *restrict low, const uint8_t *restrict high, int shift, const float *restrict scale,
                             const float *restrict zero, uint16_t *restrict to) {
  if (high)
    for (int j = 0; j < TILE / 2; j++)
      to[j] = rounded(((float)(((low[j] >> shift) & 15) | ((high[j] >> shift) & 15) << 4) - zero[j]) * scale[j]);
  else
    for (int j = 0; j < TILE / 2; j++) to[j] = rounded(((float)((low[j] >> shift) & 15) - zero[j]) * scale[j]);
}

static void tile(const uint8_t *restrict low, const uint8_t *restrict high, const float *restrict scale,
                 const float *restrict zero, uint16_t *restrict to, long inputs, long outputs) {
  for (long k = 0; k < inputs; k++, low += TILE / 2, high += high ? TILE / 2 : 0, to += outputs) {
    half_tile(low, high, 0, scale, zero, to);
    half_tile(low, high, 4, scale + TILE / 2, zero + TILE / 2, to + TILE / 2);
  }
}
#endif

static void rest(const uint8_t *low, const uint8_t *high, const float *scale, const float *zero, uint16_t *to, long inputs,
                 long outputs, long some) {
  for (long k = 0; k < inputs; k++, low += some / 2, high += high ? some / 2 : 0, to += outputs)
    for (long j = 0; j < some; j++) {
      int shift = 4 * (j % 2), code = (low[j / 2] >> shift) & 15;
      if (high) code |= ((high[j / 2] >> shift) & 15) << 4;
      to[j] = rounded(((float)code - zero[j]) * scale[j]);
    }
}

void unpack(const uint8_t *packed, const uint8_t *high, const uint16_t *scales, uint16_t *weight, long inputs, long outputs,
            long group) {
  float middle = high ? 136 : 8;
#pragma omp parallel for collapse(2)
  for (long g = 0; g < inputs / group; g++)
    for (long first = 0; first < outputs; first += TILE) {
      float scale[TILE], zero[TILE];
      long some = outputs - first < TILE ? outputs - first : TILE;
      long from = first * inputs / 2 + g * group * some / 2;
      const uint8_t *upper = high ? high + from : 0;
      uint16_t *to = weight + g * group * outputs + first;
      grid(scales + 2 * (g * outputs + first), some, middle, scale, zero);
      if (some == TILE) tile(packed + from, upper, scale, zero, to, group, outputs);
      else rest(packed + from, upper, scale, zero, to, group, outputs, some);
    }
}
