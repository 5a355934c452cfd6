// Attention over blocks of 64 keys: packed segments, forward and backward, and sequences in a block cache, forward.
//
// A query row (one head of one token) meets the key blocks of its sequence in their order, with a running maximum,
// normaliser and accumulator in float32 (Milakov & Gimelshein 2018, arXiv 1805.02867). All that it does depends on its
// own position and keys alone: the blocks stand at multiples of 64 positions of the sequence, a product adds up in the
// order of its terms, and a key that the row must not see enters no sum. So its output is the same bits in decoding,
// in a chunk of a prompt and in a packed batch. Backward pass: FlashAttention's (Dao et al. 2022, arXiv 2205.14135,
// appendix B).
//
// Shapes: T rows of tokens, H query heads, K key heads, g = H / K, d head width, w = d rounded up to whole vectors.
#include "vector.h"

#include <algorithm>
#include <cmath>
#include <vector>

using namespace upslope;

namespace {

constexpr int64_t BLOCK = 64;
constexpr int64_t FORWARD_ROWS = 256;  // query rows of one task
constexpr int64_t BACKWARD_ROWS = 64;  // query rows whose probabilities are held at a time
constexpr double WORTH_IT = 2e5;       // multiply-adds from which a second thread pays

// What one register of the processor holds of a vector. A product keeps TALL x WIDE of them as sums.
#if defined(__AVX512F__)
constexpr int PIECE = 16, TALL = 6, WIDE = 4;
#elif defined(__AVX2__) && defined(__FMA__)
constexpr int PIECE = 8, TALL = 6, WIDE = 2;
#elif defined(__ARM_NEON)
constexpr int PIECE = 4, TALL = 6, WIDE = 4;
#else
constexpr int PIECE = 4, TALL = 4, WIDE = 2;
#endif
typedef float piece __attribute__((vector_size(4 * PIECE)));
typedef uint32_t piece_words __attribute__((vector_size(4 * PIECE)));
typedef int32_t piece_ints __attribute__((vector_size(4 * PIECE)));
typedef uint16_t piece_halves __attribute__((vector_size(2 * PIECE)));

inline piece spread(float x) { return x - piece{}; }

inline piece fma_piece(piece a, piece b, piece c) {
#if defined(__AVX512F__)
  return (piece)_mm512_fmadd_ps((__m512)a, (__m512)b, (__m512)c);
#elif defined(__AVX2__) && defined(__FMA__)
  return (piece)_mm256_fmadd_ps((__m256)a, (__m256)b, (__m256)c);
#elif defined(__ARM_NEON)
  return (piece)vfmaq_f32((float32x4_t)c, (float32x4_t)a, (float32x4_t)b);
#else
  return a * b + c;
#endif
}

inline piece load_piece(const float* p) {
  piece f;
  std::memcpy(&f, p, sizeof f);
  return f;
}

inline piece load_piece(const bfloat16* p) {
#if defined(__AVX512F__)
  return (piece)_mm512_slli_epi32(_mm512_cvtepu16_epi32(_mm256_loadu_si256((const __m256i*)p)), 16);
#else
  piece_halves h;
  std::memcpy(&h, p, sizeof h);
  piece_words w = __builtin_convertvector(h, piece_words) << 16;
  return (piece)w;
#endif
}

#if defined(__clang__)
#define UPSLOPE_SHUFFLE(a, b, ...) __builtin_shufflevector(a, b, __VA_ARGS__)
#else
#define UPSLOPE_SHUFFLE(a, b, ...) __builtin_shuffle(a, b, ints{__VA_ARGS__})
#endif

inline void store_piece(float* p, piece f) { std::memcpy(p, &f, sizeof f); }

// Which of the elements from number `first` on come before `limit`.
inline piece_ints before(int64_t first, int64_t limit) {
  static const int32_t lane[LANES] = {0, 1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 11, 12, 13, 14, 15};
  piece_ints number;
  std::memcpy(&number, lane, sizeof number);
  return number < (int32_t)(limit - first);
}

// What the Python side describes: `count` rows from `row` on, at positions from `start` of their sequence. link: of a
// packed segment the one it continues, or -1; of a cached sequence its first entry in the list of blocks.
struct Segment {
  int64_t row, count, start, link;
};

int64_t whole_vectors(int64_t n) { return (n + LANES - 1) / LANES; }

// Memory of this thread, cut into aligned pieces; what the last Scratch held is gone.
class Scratch {
 public:
  explicit Scratch(int64_t floats_needed) {
    static thread_local std::vector<float> room;
    if ((int64_t)room.size() < floats_needed + LANES) room.resize(floats_needed + LANES);
    next_ = (float*)(((uintptr_t)room.data() + 63) & ~(uintptr_t)63);
  }
  float* take(int64_t size) {  // a multiple of LANES
    float* piece = next_;
    next_ += size;
    return piece;
  }

 private:
  float* next_;
};

void clear(float* p, int64_t size) { std::memset(p, 0, size * sizeof(float)); }

// e^x for x <= 0 (and a rounding error above), to within 2 units in the last place; 0 below -87.3, NaN stays NaN.
inline piece exp_falling(piece x) {
  piece bounded = x < -87.3f ? spread(-87.3f) : x;
  piece shifted = fma_piece(bounded, spread(1.44269504088896341f), spread(12582912.0f));
  piece n = shifted - 12582912.0f;
  piece r = fma_piece(n, spread(2.12194440e-4f), fma_piece(n, spread(-0.693359375f), bounded));
  piece p = spread(1.9875691500e-4f);
  p = fma_piece(p, r, spread(1.3981999507e-3f));
  p = fma_piece(p, r, spread(8.3334519073e-3f));
  p = fma_piece(p, r, spread(4.1665795894e-2f));
  p = fma_piece(p, r, spread(1.6666665459e-1f));
  p = fma_piece(p, r, spread(5.0000001201e-1f));
  p = fma_piece(p, r * r, r) + 1.0f;
  piece y = (piece)((piece_words)p + ((piece_words)shifted << 23));
  return x < -87.3f ? piece{} : y;
}

inline piece larger(piece a, piece b) { return a > b ? a : b; }

inline float largest(piece x) {
#if defined(__AVX512F__)
  x = larger(x, UPSLOPE_SHUFFLE(x, x, 8, 9, 10, 11, 12, 13, 14, 15, 0, 1, 2, 3, 4, 5, 6, 7));
  x = larger(x, UPSLOPE_SHUFFLE(x, x, 4, 5, 6, 7, 0, 1, 2, 3, 12, 13, 14, 15, 8, 9, 10, 11));
  x = larger(x, UPSLOPE_SHUFFLE(x, x, 2, 3, 0, 1, 6, 7, 4, 5, 10, 11, 8, 9, 14, 15, 12, 13));
  x = larger(x, UPSLOPE_SHUFFLE(x, x, 1, 0, 3, 2, 5, 4, 7, 6, 9, 8, 11, 10, 13, 12, 15, 14));
  return x[0];
#else
  float best = x[0];
  for (int i = 1; i < PIECE; i++) best = x[i] > best ? x[i] : best;
  return best;
#endif
}

// A matrix by its first element and the distances of its rows and columns.
struct Matrix {
  const float* data;
  int64_t row, column;
};

// Memory that will be wanted next, asked for piece by piece while something else is computed; null for none. It goes to
// the second-level cache: the first holds what is computed with.
struct Next {
  const char* from = nullptr;
  int64_t bytes = 0;  // per term of a product
};

template <int R, int N, typename T>
void tile_product(Matrix a, const T* b, int64_t b_row, int64_t terms, float* out, int64_t out_row, Next next = {}) {
  piece sum[R][N];
#pragma GCC unroll 8
  for (int r = 0; r < R; r++)
#pragma GCC unroll 8
    for (int v = 0; v < N; v++) sum[r][v] = load_piece(out + r * out_row + v * PIECE);
  const float* from = a.data;
  for (int64_t i = 0; i < terms; i++, from += a.column, b += b_row) {
    for (int64_t byte = 0; byte < next.bytes; byte += 64) __builtin_prefetch(next.from + i * next.bytes + byte, 0, 2);
    piece right[N];
#pragma GCC unroll 8
    for (int v = 0; v < N; v++) right[v] = load_piece(b + v * PIECE);
#pragma GCC unroll 8
    for (int r = 0; r < R; r++) {
      piece left = spread(from[r * a.row]);
#pragma GCC unroll 8
      for (int v = 0; v < N; v++) sum[r][v] = fma_piece(left, right[v], sum[r][v]);
    }
  }
#pragma GCC unroll 8
  for (int r = 0; r < R; r++)
#pragma GCC unroll 8
    for (int v = 0; v < N; v++) store_piece(out + r * out_row + v * PIECE, sum[r][v]);
}

template <int R, typename T>
void band_product(Matrix a, const T* b, int64_t b_row, int64_t terms, float* out, int64_t out_row, int64_t vectors,
                  Next next = {}) {
  int64_t pieces = vectors * (LANES / PIECE);
  for (; pieces >= WIDE; pieces -= WIDE, b += WIDE * PIECE, out += WIDE * PIECE, next = {})
    tile_product<R, WIDE>(a, b, b_row, terms, out, out_row, next);
  if constexpr (LANES / PIECE % WIDE != 0) {
    if (pieces == 1) tile_product<R, 1>(a, b, b_row, terms, out, out_row);
    if (pieces == 2) tile_product<R, 2>(a, b, b_row, terms, out, out_row);
    if (pieces == 3) tile_product<R, 3>(a, b, b_row, terms, out, out_row);
  }
}

// out [rows, vectors * 16] += a [rows, terms] b [terms, vectors * 16], every element in the order of the terms.
template <typename T>
void add_product(int64_t rows, int64_t vectors, int64_t terms, Matrix a, const T* b, int64_t b_row, float* out,
                 int64_t out_row, Next next = {}) {
  for (; rows >= TALL; rows -= TALL, a.data += TALL * a.row, out += TALL * out_row, next = {})
    band_product<TALL>(a, b, b_row, terms, out, out_row, vectors, next);
  if (rows == 1) band_product<1>(a, b, b_row, terms, out, out_row, vectors, next);
  if (rows == 2) band_product<2>(a, b, b_row, terms, out, out_row, vectors, next);
  if (rows == 3) band_product<3>(a, b, b_row, terms, out, out_row, vectors, next);
  if constexpr (TALL > 4) {
    if (rows == 4) band_product<4>(a, b, b_row, terms, out, out_row, vectors, next);
    if (rows == 5) band_product<5>(a, b, b_row, terms, out, out_row, vectors, next);
  }
}

// The transpose of a square, in place: neighbours, pairs, then quarters of the vectors are exchanged.
inline void transpose(floats (&x)[LANES]) {
  floats y[LANES];
#pragma GCC unroll 8
  for (int i = 0; i < LANES; i += 2) {
    floats a = x[i], b = x[i + 1];
    y[i] = UPSLOPE_SHUFFLE(a, b, 0, 16, 1, 17, 4, 20, 5, 21, 8, 24, 9, 25, 12, 28, 13, 29);
    y[i + 1] = UPSLOPE_SHUFFLE(a, b, 2, 18, 3, 19, 6, 22, 7, 23, 10, 26, 11, 27, 14, 30, 15, 31);
  }
#pragma GCC unroll 8
  for (int i = 0; i < LANES; i += 2) {
    floats a = y[i / 4 * 4 + i % 4 / 2], b = y[i / 4 * 4 + i % 4 / 2 + 2];
    x[i] = UPSLOPE_SHUFFLE(a, b, 0, 1, 16, 17, 4, 5, 20, 21, 8, 9, 24, 25, 12, 13, 28, 29);
    x[i + 1] = UPSLOPE_SHUFFLE(a, b, 2, 3, 18, 19, 6, 7, 22, 23, 10, 11, 26, 27, 14, 15, 30, 31);
  }
#define UPSLOPE_EVEN(a, b) UPSLOPE_SHUFFLE(a, b, 0, 1, 2, 3, 8, 9, 10, 11, 16, 17, 18, 19, 24, 25, 26, 27)
#define UPSLOPE_ODD(a, b) UPSLOPE_SHUFFLE(a, b, 4, 5, 6, 7, 12, 13, 14, 15, 20, 21, 22, 23, 28, 29, 30, 31)
#pragma GCC unroll 4
  for (int i = 0; i < 4; i++) {
    floats even = UPSLOPE_EVEN(x[i], x[i + 4]), odd = UPSLOPE_ODD(x[i], x[i + 4]);
    floats even_2 = UPSLOPE_EVEN(x[i + 8], x[i + 12]), odd_2 = UPSLOPE_ODD(x[i + 8], x[i + 12]);
    x[i] = UPSLOPE_EVEN(even, even_2);
    x[i + 8] = UPSLOPE_ODD(even, even_2);
    x[i + 4] = UPSLOPE_EVEN(odd, odd_2);
    x[i + 12] = UPSLOPE_ODD(odd, odd_2);
  }
}

// Sixteen rows of float32 as columns: out [w, .] with `out_row` between its rows.
inline void transpose_rows(const float* const* rows, int64_t d, float* out, int64_t out_row) {
  for (int64_t c = 0; c < d; c += LANES) {
    floats x[LANES] = {};
    if (d - c >= LANES) {
#pragma GCC unroll 16
      for (int i = 0; i < LANES; i++) x[i] = load(rows[i] + c);
    } else {
      for (int i = 0; i < LANES; i++) std::memcpy(&x[i], rows[i] + c, (d - c) * sizeof(float));
    }
    transpose(x);
#pragma GCC unroll 16
    for (int i = 0; i < LANES; i++) store(out + (c + i) * out_row, x[i]);
  }
}

// The same of bfloat16: two neighbours of a row travel as one word.
inline void transpose_rows(const bfloat16* const* rows, int64_t d, float* out, int64_t out_row) {
  for (int64_t c = 0; c < d; c += 2 * LANES) {
    floats x[LANES] = {};
    const bool whole = d - c >= 2 * LANES;
    if (whole) {
#pragma GCC unroll 16
      for (int i = 0; i < LANES; i++) std::memcpy(&x[i], rows[i] + c, sizeof x[i]);
    } else {
      for (int i = 0; i < LANES; i++) std::memcpy(&x[i], rows[i] + c, (d - c) * sizeof(bfloat16));
    }
    transpose(x);
    auto put = [&](int i) {
      store(out + (c + 2 * i) * out_row, as_floats(as_words(x[i]) << 16));
      store(out + (c + 2 * i + 1) * out_row, as_floats(as_words(x[i]) & 0xffff0000u));
    };
    if (whole) {
#pragma GCC unroll 16
      for (int i = 0; i < LANES; i++) put(i);
    } else {
      for (int i = 0; 2 * i < d - c; i++) put(i);
    }
  }
}

// As float32, zeros up to a whole vector.
template <typename T>
void widen(const T* from, int64_t d, float* to) {
  int64_t c = 0;
  for (; c + PIECE <= d; c += PIECE) store_piece(to + c, load_piece(from + c));
  for (; c < d; c++) to[c] = get(from + c);
  for (; c % LANES; c++) to[c] = 0.0f;
}

template <typename T>
void narrow(const float* from, int64_t d, T* to) {
  for (int64_t c = 0; c < d; c += LANES) store_some(to + c, load(from + c), d - c);
}

// The rows of one block of keys or values, wherever they lie; those behind the last one are zeros.
template <typename T>
struct BlockRows {
  const T* at[BLOCK];

  // As float32 columns: out [w, BLOCK], as far as a row's vector reaches.
  void transposed(int64_t count, int64_t d, float* out) const {
    for (int64_t j = 0; j < count; j += LANES) transpose_rows(at + j, d, out + j, BLOCK);
  }

  // As float32 rows: out [count, w].
  void straight(int64_t count, int64_t d, int64_t w, float* out) const {
    for (int64_t j = 0; j < count; j++) widen(at[j], d, out + j * w);
  }

  void fill(int64_t count, const T* zeros) {
    for (int64_t j = count; j < whole_vectors(count) * LANES; j++) at[j] = zeros;
  }
};

// The keys or values of a packed segment: its own rows, and its parent's for the positions before it.
template <typename T>
struct PackedRows {
  static constexpr bool cached = false;
  const T* own;
  const T* before;
  int64_t start, stride;
  void block(int64_t first, int64_t count, BlockRows<T>& rows) const {
    for (int64_t i = 0; i < count; i++) {
      const int64_t position = first + i;
      rows.at[i] = position < start ? before + position * stride : own + (position - start) * stride;
    }
  }
};

// Those of a cached sequence: a block of keys is [K, d, BLOCK], one of values [K, BLOCK, d].
template <typename T>
struct CachedRows {
  static constexpr bool cached = true;
  const T* head;
  const int64_t* blocks;
  int64_t block_size, d;
  const T* at(int64_t position) const { return head + blocks[position / BLOCK] * block_size; }
};

// What a call attends with. Query (i, h) of a key head lies at q + i * heads * d + h * d, its statistic at i * heads + h.
struct Shape {
  int64_t heads, kv_heads, d;
  bool causal;
  float scale;
  int64_t group() const { return heads / kv_heads; }
  int64_t width() const { return whole_vectors(d) * LANES; }
};

// One online-softmax step of a row: the scores of the keys before `limit` become e^(score - top), those up to the next
// whole vector 0. totals [16]: the normaliser's lanes. Returns by how much what was summed before shrinks.
inline float soften(float* scores, int64_t limit, float scale, float& top, float* totals) {
  piece s[BLOCK / PIECE], best = spread(top);
  const int64_t pieces = whole_vectors(limit) * (LANES / PIECE);
  for (int64_t v = 0; v < pieces; v++) {
    s[v] = load_piece(scores + v * PIECE) * scale;
    if ((v + 1) * PIECE > limit) s[v] = before(v * PIECE, limit) ? s[v] : spread(-__builtin_inff());
    best = larger(best, s[v]);
  }
  const float new_top = largest(best), shrink = exp_falling(spread(top - new_top))[0];
  top = new_top;
  for (int64_t v = 0; v < LANES; v += PIECE) store_piece(totals + v, load_piece(totals + v) * shrink);
  for (int64_t v = 0; v < pieces; v++) {
    const piece p = exp_falling(s[v] - new_top);
    float* total = totals + v * PIECE % LANES;
    store_piece(total, load_piece(total) + p);
    store_piece(scores + v * PIECE, p);
  }
  return shrink;
}

// Where the next task's first keys and values lie, if that is known.
template <typename T>
struct Ahead {
  const T *keys = nullptr, *values = nullptr;
};

// `count` positions from `first` on, all heads of one key head, over the first `seen` keys of the sequence.
template <typename T, typename Rows>
void attend(const Shape& shape, const T* q, T* out, float* lse, int64_t first, int64_t count, int64_t seen, Rows keys,
            Rows values, Ahead<T> ahead = {}) {
  const int64_t group = shape.group(), d = shape.d, w = shape.width(), rows = count * group, stride = shape.heads * d;
  Scratch scratch(rows * (2 * w + LANES) + whole_vectors(rows) * LANES + 2 * BLOCK * w + TALL * BLOCK + w);
  float *queries = scratch.take(rows * w), *sums = scratch.take(rows * w);
  float *tops = scratch.take(whole_vectors(rows) * LANES), *totals = scratch.take(rows * LANES);
  float *key_tile = scratch.take(w * BLOCK), *value_tile = scratch.take(BLOCK * w), *scores = scratch.take(TALL * BLOCK);
  const T* zeros = (const T*)scratch.take(w);
  clear((float*)zeros, w);
  for (int64_t r = 0; r < rows; r++) {
    widen(q + r / group * stride + r % group * d, d, queries + r * w);
    tops[r] = -__builtin_inff();
  }
  clear(sums, rows * w);
  clear(totals, rows * LANES);

  // The rows that see some of the block at position j, with its keys [d, BLOCK] and values [BLOCK, w].
  // Decoding waits for memory more than it computes, so each product asks for a part of what the next block's needs.
  auto meet = [&](int64_t j, auto key_columns, auto value_rows, Next next_keys, Next next_values) {
    const int64_t here = std::min(BLOCK, seen - j);
    auto limit_of = [&](int64_t r) { return shape.causal ? std::min(here, first + r / group - j + 1) : here; };
    for (int64_t r = shape.causal ? std::max<int64_t>(0, j - first) * group : 0; r < rows; r += TALL) {
      const int64_t some = std::min<int64_t>(TALL, rows - r), least = limit_of(r), most = limit_of(r + some - 1);
      clear(scores, some * BLOCK);
      add_product(some, whole_vectors(most), d, {queries + r * w, w, 1}, key_columns, BLOCK, scores, BLOCK, next_keys);
      for (int64_t i = 0; i < some; i++) {
        const int64_t limit = least == most ? most : limit_of(r + i);
        const float shrink = soften(scores + i * BLOCK, limit, shape.scale, tops[r + i], totals + (r + i) * LANES);
        for (float *p = sums + (r + i) * w, *end = p + w; p < end; p += PIECE) store_piece(p, load_piece(p) * shrink);
      }
      add_product(some, w / LANES, least, {scores, BLOCK, 1}, value_rows, w, sums + r * w, w, next_values);
      next_keys = next_values = {};
      for (int64_t i = 0; least < most && i < some; i++)
        add_product(1, w / LANES, limit_of(r + i) - least, {scores + i * BLOCK + least, BLOCK, 1}, value_rows + least * w, w,
                    sums + (r + i) * w, w);
    }
  };

  for (int64_t j = 0; j < seen; j += BLOCK) {
    const int64_t here = std::min(BLOCK, seen - j);
    if constexpr (Rows::cached) {
      const T *key_columns = keys.at(j), *value_rows = values.at(j);
      const bool more = j + BLOCK < seen;
      const Next next_keys = {(const char*)(more ? keys.at(j + BLOCK) : ahead.keys), BLOCK * (int64_t)sizeof(T)};
      const Next next_values = {(const char*)(more ? values.at(j + BLOCK) : ahead.values), d * (int64_t)sizeof(T)};
      if (w == d && (sizeof(T) == sizeof(float) || rows <= TALL)) {  // read where they lie
        if (more || ahead.keys)
          meet(j, key_columns, value_rows, next_keys, next_values);
        else
          meet(j, key_columns, value_rows, {}, {});
        continue;
      }
      widen(key_columns, d * BLOCK, key_tile);
      for (int64_t i = 0; i < here; i++) widen(value_rows + i * d, d, value_tile + i * w);
    } else {
      BlockRows<T> block;
      keys.block(j, here, block);
      block.fill(here, zeros);
      block.transposed(here, d, key_tile);
      values.block(j, here, block);
      block.straight(here, d, w, value_tile);
    }
    meet(j, key_tile, value_tile, {}, {});
  }

  for (int64_t r = 0; r < rows; r++) {
    const float total = sum_of(load(totals + r * LANES));
    float* sum = sums + r * w;
    for (int64_t c = 0; c < w; c += PIECE) store_piece(sum + c, load_piece(sum + c) / total);
    narrow(sum, d, out + r / group * stride + r % group * d);
    if (lse) lse[r / group * shape.heads + r % group] = tops[r] + std::log(total);
  }
}

// A part of a segment's queries: what one thread does at a time.
struct Part {
  int64_t segment, offset, count;
};

std::vector<Part> parts_of(const Segment* segments, int64_t size, int64_t group) {
  const int64_t most = std::max<int64_t>(1, FORWARD_ROWS / group);
  std::vector<Part> parts;
  for (int64_t s = 0; s < size; s++)
    for (int64_t i = 0; i < segments[s].count; i += most)
      parts.push_back({s, i, std::min(most, segments[s].count - i)});
  return parts;
}

bool worth_threads(const Shape& shape, const Segment* segments, int64_t size) {
  double work = 0;
  for (int64_t s = 0; s < size; s++) work += (double)segments[s].count * (segments[s].start + segments[s].count);
  return work * shape.heads * shape.d > WORTH_IT;
}

template <typename T>
PackedRows<T> rows_of(const T* x, const Segment* segments, const Segment& segment, const Shape& shape, int64_t head) {
  const int64_t stride = shape.kv_heads * shape.d;
  const T* before = segment.link < 0 ? nullptr : x + segments[segment.link].row * stride + head * shape.d;
  return {x + segment.row * stride + head * shape.d, before, segment.start, stride};
}

template <typename T>
void packed(const Shape& shape, const T* q, const T* k, const T* v, T* out, float* lse, const Segment* segments, int64_t size) {
  const std::vector<Part> parts = parts_of(segments, size, shape.group());
  const int64_t tasks = (int64_t)parts.size() * shape.kv_heads;
#pragma omp parallel for schedule(dynamic) if (tasks > 1 && worth_threads(shape, segments, size))
  for (int64_t task = 0; task < tasks; task++) {
    const Part& part = parts[task / shape.kv_heads];
    const Segment& own = segments[part.segment];
    const int64_t head = task % shape.kv_heads, row = own.row + part.offset, at = row * shape.heads + head * shape.group();
    const int64_t first = own.start + part.offset, seen = shape.causal ? first + part.count : own.start + own.count;
    attend(shape, q + at * shape.d, out + at * shape.d, lse ? lse + at : nullptr, first, part.count, seen,
           rows_of(k, segments, own, shape, head), rows_of(v, segments, own, shape, head));
  }
}

// `by_column`: keys as `paged` reads them, [K, d, BLOCK]; else as values are, [K, BLOCK, d].
template <typename T>
void write_cache(const Shape& shape, const T* k, const T* v, T* keys, T* values, const Segment* segments, int64_t size,
                 const int64_t* blocks, bool by_column) {
  const int64_t d = shape.d, heads = shape.kv_heads;
#pragma omp parallel for if (size > 16)
  for (int64_t s = 0; s < size; s++)
    for (int64_t i = 0; i < segments[s].count; i++) {
      const int64_t position = segments[s].start + i, offset = position % BLOCK;
      const int64_t to = blocks[segments[s].link + position / BLOCK] * heads * BLOCK * d, from = (segments[s].row + i) * heads * d;
      if (by_column && (i == 0 || offset % (64 / sizeof(T)) == 0))  // ask for all lines before the first one is waited for
        for (int64_t c = 0; c < heads * d; c++) __builtin_prefetch(keys + to + c * BLOCK + offset, 1);
      for (int64_t h = 0; h < heads; h++)
        std::memcpy(values + to + (h * BLOCK + offset) * d, v + from + h * d, d * sizeof(T));
      for (int64_t h = 0; !by_column && h < heads; h++)
        std::memcpy(keys + to + (h * BLOCK + offset) * d, k + from + h * d, d * sizeof(T));
      for (int64_t c = 0; by_column && c < heads * d; c++) keys[to + c * BLOCK + offset] = k[from + c];
    }
}

template <typename T>
void paged(const Shape& shape, const T* q, const T* keys, const T* values, T* out, float* lse, const Segment* segments,
           int64_t size, const int64_t* blocks) {
  const std::vector<Part> parts = parts_of(segments, size, shape.group());
  const int64_t tasks = (int64_t)parts.size() * shape.kv_heads, block_size = shape.kv_heads * BLOCK * shape.d;
  auto rows_at = [&](const T* x, int64_t task) {
    const int64_t link = segments[parts[task / shape.kv_heads].segment].link;
    return CachedRows<T>{x + task % shape.kv_heads * BLOCK * shape.d, blocks + link, block_size, shape.d};
  };
#pragma omp parallel for schedule(dynamic, 4) if (tasks > 1 && worth_threads(shape, segments, size))
  for (int64_t task = 0; task < tasks; task++) {
    const Part& part = parts[task / shape.kv_heads];
    const Segment& own = segments[part.segment];
    const int64_t at = (own.row + part.offset) * shape.heads + task % shape.kv_heads * shape.group();
    const int64_t first = own.start + part.offset;
    Ahead<T> ahead;
    if (task + 1 < tasks) ahead = {rows_at(keys, task + 1).at(0), rows_at(values, task + 1).at(0)};
    attend(shape, q + at * shape.d, out + at * shape.d, lse ? lse + at : nullptr, first, part.count, first + part.count,
           rows_at(keys, task), rows_at(values, task), ahead);
  }
}

// Scratch of one backward task.
struct Workspace {
  float *keys_T, *values_T, *keys, *d_keys, *d_values, *queries, *grads, *p, *ds, *delta, *d_queries, *zeros;
};

// Gradients of one segment and key head. Those of its own keys are stored, those of its root's are added to root_dk,
// root_dv [., w]; the root itself adds all.
template <typename T>
void segment_backward(const Shape& shape, const Workspace& work, const Segment* segments, const Segment& own, int64_t head,
                      const T* q, const T* k, const T* v, const T* out, const float* lse, const T* grad, T* dq, T* dk, T* dv,
                      float* root_dk, float* root_dv) {
  const int64_t group = shape.group(), d = shape.d, w = shape.width(), rows = own.count * group, stride = shape.heads * d;
  const int64_t seen = own.start + own.count, at = own.row * shape.heads + head * group, vectors = w / LANES;
  const int64_t root_keys = own.link < 0 ? seen : own.start, kv_stride = shape.kv_heads * d;
  q += at * d, out += at * d, grad += at * d, dq += at * d, lse += at;
  dk += own.row * kv_stride + head * d, dv += own.row * kv_stride + head * d;
  const PackedRows<T> keys = rows_of(k, segments, own, shape, head), values = rows_of(v, segments, own, shape, head);
  auto element = [&](int64_t r) { return r / group * stride + r % group * d; };

  for (int64_t r = 0; r < rows; r++) {
    floats dots = {};
    for (int64_t c = 0; c < d; c += LANES)
      dots = fma(load_some(grad + element(r) + c, d - c), load_some(out + element(r) + c, d - c), dots);
    work.delta[r] = sum_of(dots);
  }
  clear(work.d_queries, rows * w);
  BlockRows<T> block;

  for (int64_t j = 0; j < seen; j += BLOCK) {
    const int64_t here = std::min(BLOCK, seen - j);
    keys.block(j, here, block);
    block.straight(here, d, w, work.keys);
    block.fill(here, (const T*)work.zeros);
    block.transposed(here, d, work.keys_T);
    values.block(j, here, block);
    block.fill(here, (const T*)work.zeros);
    block.transposed(here, d, work.values_T);
    clear(work.d_keys, here * w);
    clear(work.d_values, here * w);
    auto limit_of = [&](int64_t r) { return shape.causal ? std::min(here, own.start + r / group - j + 1) : here; };
    for (int64_t r = shape.causal ? std::max<int64_t>(0, j - own.start) * group : 0; r < rows; r += BACKWARD_ROWS) {
      const int64_t some = std::min(BACKWARD_ROWS, rows - r), most = limit_of(r + some - 1), wide = whole_vectors(most);
      for (int64_t i = 0; i < some; i++) {
        widen(q + element(r + i), d, work.queries + i * w);
        widen(grad + element(r + i), d, work.grads + i * w);
      }
      clear(work.p, some * BLOCK);
      clear(work.ds, some * BLOCK);
      add_product(some, wide, d, {work.queries, w, 1}, work.keys_T, BLOCK, work.p, BLOCK);
      add_product(some, wide, d, {work.grads, w, 1}, work.values_T, BLOCK, work.ds, BLOCK);
      for (int64_t i = 0; i < some; i++) {
        const float normaliser = lse[(r + i) / group * shape.heads + (r + i) % group], mean = work.delta[r + i];
        const int64_t limit = limit_of(r + i);
        for (int64_t c = 0; c < wide * LANES; c += PIECE) {
          float *at_p = work.p + i * BLOCK + c, *at_ds = work.ds + i * BLOCK + c;
          const piece p = exp_falling(load_piece(at_p) * shape.scale - normaliser);
          const piece ds = p * (load_piece(at_ds) - mean) * shape.scale;
          store_piece(at_p, before(c, limit) ? p : piece{});
          store_piece(at_ds, before(c, limit) ? ds : piece{});
        }
      }
      add_product(most, vectors, some, {work.p, 1, BLOCK}, work.grads, w, work.d_values, w);
      add_product(most, vectors, some, {work.ds, 1, BLOCK}, work.queries, w, work.d_keys, w);
      add_product(some, vectors, most, {work.ds, BLOCK, 1}, work.keys, w, work.d_queries + r * w, w);
    }
    for (int64_t i = 0; i < here; i++) {
      const int64_t position = j + i;
      const float *from_k = work.d_keys + i * w, *from_v = work.d_values + i * w;
      if (position >= root_keys) {
        narrow(from_k, d, dk + (position - own.start) * kv_stride);
        narrow(from_v, d, dv + (position - own.start) * kv_stride);
        continue;
      }
      for (int64_t c = 0; c < w; c += PIECE) {
        float *to_k = root_dk + position * w + c, *to_v = root_dv + position * w + c;
        store_piece(to_k, load_piece(to_k) + load_piece(from_k + c));
        store_piece(to_v, load_piece(to_v) + load_piece(from_v + c));
      }
    }
  }
  for (int64_t r = 0; r < rows; r++) narrow(work.d_queries + r * w, d, dq + element(r));
}

// One task is a root (a segment that continues none) with all that continue it, in their order, and one key head.
template <typename T>
void packed_backward(const Shape& shape, const T* q, const T* k, const T* v, const T* out, const float* lse, const T* grad,
                     T* dq, T* dk, T* dv, const Segment* segments, int64_t size) {
  std::vector<std::vector<int64_t>> families(size);
  std::vector<int64_t> roots;
  for (int64_t s = 0; s < size; s++) {
    if (segments[s].link < 0) roots.push_back(s);
    families[segments[s].link < 0 ? s : segments[s].link].push_back(s);
  }
  const int64_t tasks = (int64_t)roots.size() * shape.kv_heads, w = shape.width();
#pragma omp parallel for schedule(dynamic) if (tasks > 1 && worth_threads(shape, segments, size))
  for (int64_t task = 0; task < tasks; task++) {
    const int64_t root = roots[task / shape.kv_heads], head = task % shape.kv_heads, keys = segments[root].count;
    int64_t rows = 0;
    for (int64_t s : families[root]) rows = std::max(rows, segments[s].count * shape.group());
    const int64_t spare = whole_vectors(rows) * LANES;
    Scratch scratch(2 * keys * w + 5 * BLOCK * w + 2 * BACKWARD_ROWS * (w + BLOCK) + spare + rows * w + w);
    float *root_dk = scratch.take(keys * w), *root_dv = scratch.take(keys * w);
    Workspace work;
    for (float** tile : {&work.keys_T, &work.values_T, &work.keys, &work.d_keys, &work.d_values}) *tile = scratch.take(BLOCK * w);
    work.queries = scratch.take(BACKWARD_ROWS * w), work.grads = scratch.take(BACKWARD_ROWS * w);
    work.p = scratch.take(BACKWARD_ROWS * BLOCK), work.ds = scratch.take(BACKWARD_ROWS * BLOCK);
    work.delta = scratch.take(spare), work.d_queries = scratch.take(rows * w);
    work.zeros = scratch.take(w);
    clear(work.zeros, w);
    clear(root_dk, 2 * keys * w);
    for (int64_t s : families[root])
      segment_backward(shape, work, segments, segments[s], head, q, k, v, out, lse, grad, dq, dk, dv, root_dk, root_dv);
    for (int64_t i = 0; i < keys; i++) {
      const int64_t to = (segments[root].row + i) * shape.kv_heads * shape.d + head * shape.d;
      narrow(root_dk + i * w, shape.d, dk + to);
      narrow(root_dv + i * w, shape.d, dv + to);
    }
  }
}

}  // namespace

extern "C" {

// q, out [T, H, d]; k, v [T, K, d]; lse [T, H] or null. Rows that belong to no segment are left as they are.
void upslope_attention_packed(int kind, const void* q, const void* k, const void* v, void* out, float* lse,
                              const int64_t* segments, int64_t size, int64_t heads, int64_t kv_heads, int64_t d, int causal,
                              float scale) {
  const Shape shape{heads, kv_heads, d, causal != 0, scale};
  const Segment* parts = (const Segment*)segments;
  if (kind)
    packed(shape, (const bfloat16*)q, (const bfloat16*)k, (const bfloat16*)v, (bfloat16*)out, lse, parts, size);
  else
    packed(shape, (const float*)q, (const float*)k, (const float*)v, (float*)out, lse, parts, size);
}

// The gradients dq [T, H, d], dk and dv [T, K, d] from `grad` [T, H, d] and what the forward pass gave.
void upslope_attention_packed_backward(int kind, const void* q, const void* k, const void* v, const void* out,
                                       const float* lse, const void* grad, void* dq, void* dk, void* dv,
                                       const int64_t* segments, int64_t size, int64_t heads, int64_t kv_heads, int64_t d,
                                       int causal, float scale) {
  const Shape shape{heads, kv_heads, d, causal != 0, scale};
  const Segment* parts = (const Segment*)segments;
  if (kind)
    packed_backward(shape, (const bfloat16*)q, (const bfloat16*)k, (const bfloat16*)v, (const bfloat16*)out, lse,
                    (const bfloat16*)grad, (bfloat16*)dq, (bfloat16*)dk, (bfloat16*)dv, parts, size);
  else
    packed_backward(shape, (const float*)q, (const float*)k, (const float*)v, (const float*)out, lse, (const float*)grad,
                    (float*)dq, (float*)dk, (float*)dv, parts, size);
}

// k, v [T, K, d] into the blocks [., K, 64, d] of each sequence.
void upslope_cache_write(int kind, const void* k, const void* v, void* keys, void* values, const int64_t* segments,
                         int64_t size, const int64_t* blocks, int64_t kv_heads, int64_t d, int by_column) {
  const Shape shape{kv_heads, kv_heads, d, true, 1.0f};
  const Segment* parts = (const Segment*)segments;
  if (kind)
    write_cache(shape, (const bfloat16*)k, (const bfloat16*)v, (bfloat16*)keys, (bfloat16*)values, parts, size, blocks, by_column);
  else
    write_cache(shape, (const float*)k, (const float*)v, (float*)keys, (float*)values, parts, size, blocks, by_column);
}

// q, out [T, H, d], lse [T, H] or null over blocks [., K, 64, d] that hold the call's own keys and values already.
void upslope_attention_paged(int kind, const void* q, const void* keys, const void* values, void* out, float* lse,
                             const int64_t* segments, int64_t size, const int64_t* blocks, int64_t heads, int64_t kv_heads,
                             int64_t d, float scale) {
  const Shape shape{heads, kv_heads, d, true, scale};
  const Segment* parts = (const Segment*)segments;
  if (kind)
    paged(shape, (const bfloat16*)q, (const bfloat16*)keys, (const bfloat16*)values, (bfloat16*)out, lse, parts, size, blocks);
  else
    paged(shape, (const float*)q, (const float*)keys, (const float*)values, (float*)out, lse, parts, size, blocks);
}

void upslope_norm_forward(int kind, const void* x, const void* delta, const void* weight, void* sum, void* out,
                          float* scales, int64_t rows, int64_t width, float eps);
void upslope_split_rotate(int kind, const void* all, void* q, void* k, void* v, const float* cosine, const float* sine,
                          int64_t rows, int64_t heads, int64_t kv_heads, int64_t d);

// Norms of queries and keys where there are any (in `all` itself; scales [H] is room), split_rotate, cache_write and
// attention_paged in one call: with few rows the calls cost more than the work.
void upslope_attention_step(int kind, void* all, const void* q_norm, const void* k_norm, float eps, float* scales, void* q,
                            void* k, void* v, const float* cosine, const float* sine, int64_t rows, void* keys, void* values,
                            void* out, float* lse, const int64_t* segments, int64_t size, const int64_t* blocks, int64_t heads,
                            int64_t kv_heads, int64_t d, float scale) {
  const int64_t bytes = d * (kind ? sizeof(bfloat16) : sizeof(float));
  for (int64_t i = 0; q_norm && i < rows; i++) {
    char *queries = (char*)all + i * (heads + 2 * kv_heads) * bytes, *own_keys = queries + heads * bytes;
    upslope_norm_forward(kind, queries, nullptr, q_norm, nullptr, queries, scales, heads, d, eps);
    upslope_norm_forward(kind, own_keys, nullptr, k_norm, nullptr, own_keys, scales, kv_heads, d, eps);
  }
  upslope_split_rotate(kind, all, q, k, v, cosine, sine, rows, heads, kv_heads, d);
  upslope_cache_write(kind, k, v, keys, values, segments, size, blocks, kv_heads, d, 1);
  upslope_attention_paged(kind, q, keys, values, out, lse, segments, size, blocks, heads, kv_heads, d, scale);
}

}  // extern "C"
