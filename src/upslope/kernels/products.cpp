// Products of few rows with a bfloat16 weight, as decoding asks for them: x [M, K] times W [N, K] transposed.
//
// The pairs of a row are added in order, by VDPBF16PS, in blocks; the sums of the blocks are added in order. That holds for
// every M, N and number of threads, and with the right size of a block it is what oneDNN does: the same bits.
#include "vector.h"

using namespace upslope;

#if defined(__AVX512BF16__)
namespace {

constexpr int64_t WIDE = 32;             // columns of a group: two vectors
constexpr int64_t MOST_ROWS = 14;        // times one group: sums, columns and a row fill the registers
constexpr int64_t MOST_ROWS_OF_TWO = 6;  // times two groups

// W's pairs of a group's columns lie side by side: [N / 32][K / 2][32][2], zeros where N ends.
void reorder(const bfloat16* w, bfloat16* out, int64_t columns, int64_t width) {
#pragma omp parallel for
  for (int64_t g = 0; g < (columns + WIDE - 1) / WIDE; g++)
    for (int64_t k = 0; k < width / 2; k++)
      for (int64_t c = 0; c < WIDE; c++) {
        bfloat16* to = out + ((g * (width / 2) + k) * WIDE + c) * 2;
        if (g * WIDE + c < columns)
          std::memcpy(to, w + (g * WIDE + c) * width + 2 * k, 4);
        else
          std::memset(to, 0, 4);
      }
}

inline __m512bh pair_of(const bfloat16* x) {
  int32_t both;
  std::memcpy(&both, x, 4);
  return (__m512bh)_mm512_set1_epi32(both);
}

inline void put(bfloat16* out, __m512 sum, const bfloat16* bias, int64_t count) {
  if (count <= 0) return;
  if (bias) sum = (__m512)((floats)sum + load_some(bias, count));
  __m256bh half = _mm512_cvtneps_pbh(sum);
  std::memcpy(out, &half, (count < LANES ? count : LANES) * sizeof(bfloat16));
}

struct Sizes {
  int64_t columns, width, block;  // of the output, of the sum, and of a part of the sum
};

// ROWS rows times GROUPS groups of columns, of which `left` are there. `ahead`: the weights to be wanted next, or null.
template <int ROWS, int GROUPS>
void tile(const bfloat16* x, const bfloat16* w, const bfloat16* ahead, const bfloat16* bias, bfloat16* out, Sizes of,
          int64_t left) {
  constexpr int VECTORS = 2 * GROUPS;
  const int64_t group = of.width * WIDE;
  __m512 total[ROWS][VECTORS];
  for (int64_t begin = 0; begin < of.width; begin += of.block) {
    const int64_t end = (begin + of.block < of.width ? begin + of.block : of.width) / 2;
    __m512 sums[ROWS][VECTORS];
#pragma GCC unroll 16
    for (int m = 0; m < ROWS; m++)
#pragma GCC unroll 4
      for (int j = 0; j < VECTORS; j++) sums[m][j] = _mm512_setzero_ps();
    for (int64_t k = begin / 2; k < end; k++) {
      __m512bh column[VECTORS];
#pragma GCC unroll 4
      for (int j = 0; j < VECTORS; j++)
        column[j] = (__m512bh)_mm512_loadu_si512(w + (j / 2) * group + k * 2 * WIDE + (j % 2) * WIDE);
      if (ahead) {
#pragma GCC unroll 4
        for (int j = 0; j < VECTORS; j++)
          _mm_prefetch((const char*)(ahead + (j / 2) * group + k * 2 * WIDE + (j % 2) * WIDE), _MM_HINT_T1);
      }
#pragma GCC unroll 16
      for (int m = 0; m < ROWS; m++) {
        __m512bh row = pair_of(x + m * of.width + 2 * k);
#pragma GCC unroll 4
        for (int j = 0; j < VECTORS; j++) sums[m][j] = _mm512_dpbf16_ps(sums[m][j], row, column[j]);
      }
    }
#pragma GCC unroll 16
    for (int m = 0; m < ROWS; m++)
#pragma GCC unroll 4
      for (int j = 0; j < VECTORS; j++) total[m][j] = begin ? _mm512_add_ps(total[m][j], sums[m][j]) : sums[m][j];
  }
  for (int m = 0; m < ROWS; m++)
    for (int j = 0; j < VECTORS; j++)
      put(out + m * of.columns + j * LANES, total[m][j], bias ? bias + j * LANES : nullptr, left - j * LANES);
}

template <int GROUPS>
void rows_of(int64_t rows, const bfloat16* x, const bfloat16* w, const bfloat16* ahead, const bfloat16* bias, bfloat16* out,
             Sizes of, int64_t left) {
#define TILE(n) \
  case n: return tile<n, GROUPS>(x, w, ahead, bias, out, of, left);
  switch (rows) {
    TILE(1) TILE(2) TILE(3) TILE(4) TILE(5) TILE(6)
  }
  if constexpr (GROUPS == 1) switch (rows) {
      TILE(7) TILE(8) TILE(9) TILE(10) TILE(11) TILE(12) TILE(13) TILE(14)
    }
#undef TILE
}

void product(const bfloat16* x, const bfloat16* w, const bfloat16* bias, bfloat16* out, int64_t rows, Sizes of) {
  const int64_t groups = (of.columns + WIDE - 1) / WIDE, group = of.width * WIDE;
  const int64_t parts = (rows + MOST_ROWS - 1) / MOST_ROWS;  // of rows, as equal as can be
  const int64_t step = rows <= MOST_ROWS_OF_TWO ? 2 : 1;     // groups at a time
#pragma omp parallel for schedule(static)
  for (int64_t g = 0; g < groups; g += step) {
    const int64_t now = groups - g < step ? groups - g : step, left = of.columns - g * WIDE;
    for (int64_t part = 0; part < parts; part++) {
      const int64_t first = rows * part / parts, count = rows * (part + 1) / parts - first;
      const bfloat16* ahead = part == 0 && g + step < groups ? w + (g + step) * group : nullptr;
      const bfloat16* offset = bias ? bias + g * WIDE : nullptr;
      auto some = now == 2 ? rows_of<2> : rows_of<1>;
      some(count, x + first * of.width, w + g * group, ahead, offset, out + first * of.columns + g * WIDE, of, left);
    }
  }
}

}  // namespace
#endif

extern "C" {

// Whether the functions below do anything: 1 where the processor has VDPBF16PS.
void upslope_product_usable(int64_t* answer) {
#if defined(__AVX512BF16__)
  *answer = 1;
#else
  *answer = 0;
#endif
}

void upslope_product_reorder(const void* w, void* out, int64_t columns, int64_t width) {
#if defined(__AVX512BF16__)
  reorder((const bfloat16*)w, (bfloat16*)out, columns, width);
#endif
}

void upslope_product(const void* x, const void* w, const void* bias, void* out, int64_t rows, int64_t columns, int64_t width,
                     int64_t block) {
#if defined(__AVX512BF16__)
  product((const bfloat16*)x, (const bfloat16*)w, (const bfloat16*)bias, (bfloat16*)out, rows, {columns, width, block});
#endif
}
}
