/* rows (count, inputs) in float32 times the turned weight (outputs, inputs) in float16: out (count, outputs) in float32.
   inputs is a multiple of 16. Each number is summed in one order, whatever the number of rows. */
#include <stdint.h>
#if defined(__AVX512F__)
#include <immintrin.h>
typedef __m512 vector;
enum { WIDTH = 16 };
#define ZERO _mm512_setzero_ps()
#define WIDE(p) _mm512_cvtph_ps(_mm256_loadu_si256((const __m256i *)(p)))
#define LOAD(p) _mm512_loadu_ps(p)
#define ADD(a, b, c) _mm512_fmadd_ps(a, b, c)
#define STORE(p, a) _mm512_storeu_ps(p, a)
#elif defined(__AVX2__) && defined(__FMA__) && defined(__F16C__)
#include <immintrin.h>
typedef __m256 vector;
enum { WIDTH = 8 };
#define ZERO _mm256_setzero_ps()
#define WIDE(p) _mm256_cvtph_ps(_mm_loadu_si128((const __m128i *)(p)))
#define LOAD(p) _mm256_loadu_ps(p)
#define ADD(a, b, c) _mm256_fmadd_ps(a, b, c)
#define STORE(p, a) _mm256_storeu_ps(p, a)
#else
#error "no instructions for float16"
#endif

static float sum(vector a) {
  float parts[WIDTH], all = 0;
  STORE(parts, a);
  for (int i = 0; i < WIDTH; i++) all += parts[i];
  return all;
}

enum { OUTPUTS = 4, ROWS = 4, NEAR = 64 }; /* products at once; rows that stay in the cache while the weight passes by */

static inline __attribute__((always_inline)) void block(const uint16_t *weight, const float *rows, float *out, long inputs,
                                                        long outputs, long some, const int count) {
  vector sums[ROWS][OUTPUTS], wide[OUTPUTS];
  for (int r = 0; r < count; r++)
    for (int i = 0; i < OUTPUTS; i++) sums[r][i] = ZERO;
  for (long k = 0; k < inputs; k += WIDTH) {
    for (int i = 0; i < OUTPUTS; i++) wide[i] = WIDE(weight + (i < some ? i : some - 1) * inputs + k);
    for (int r = 0; r < count; r++) {
      vector x = LOAD(rows + r * inputs + k);
      for (int i = 0; i < OUTPUTS; i++) sums[r][i] = ADD(wide[i], x, sums[r][i]);
    }
  }
  for (int r = 0; r < count; r++)
    for (int i = 0; i < some; i++) out[r * outputs + i] = sum(sums[r][i]);
}

void product(const uint16_t *weight, const float *rows, float *out, long count, long inputs, long outputs) {
  for (long near = 0; near < count; near += NEAR) {
    long end = near + NEAR < count ? near + NEAR : count;
#pragma omp parallel for
    for (long first = 0; first < outputs; first += OUTPUTS) {
      long some = outputs - first < OUTPUTS ? outputs - first : OUTPUTS, r = near;
      const uint16_t *from = weight + first * inputs;
      for (; r + ROWS <= end; r += ROWS) block(from, rows + r * inputs, out + r * outputs + first, inputs, outputs, some, ROWS);
      for (; r < end; r++) block(from, rows + r * inputs, out + r * outputs + first, inputs, outputs, some, 1);
    }
  }
}
