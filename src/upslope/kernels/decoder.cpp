// All blocks of a decoder for new tokens of cached sequences in one call: the other files' kernels in the order of
// models/decoder/network.py. With a few rows the way through Python between them costs as much as the arithmetic. bfloat16.
#include "vector.h"

using namespace upslope;

extern "C" {

void upslope_norm_forward(int kind, const void* x, const void* delta, const void* weight, void* sum, void* out,
                          float* scales, int64_t rows, int64_t width, float eps);
void upslope_swiglu_forward(int kind, const void* both, void* out, int64_t rows, int64_t width);
void upslope_product(const void* x, const void* w, const void* bias, void* out, int64_t rows, int64_t columns, int64_t width,
                     int64_t block);
void upslope_attention_step(int kind, void* all, const void* q_norm, const void* k_norm, float eps, float* scales, void* q,
                            void* k, void* v, const float* cosine, const float* sine, int64_t rows, void* keys, void* values,
                            void* out, float* lse, const int64_t* segments, int64_t size, const int64_t* blocks, int64_t heads,
                            int64_t kv_heads, int64_t d, float scale);
}

namespace {

// A reordered weight, its bias or null, and the part of a sum (products.cpp).
struct Product {
  const void *weight, *bias;
  int64_t block;
};

// The field names and their order are kernels/attention.py's, here and below.
struct Block {
  const void *first_norm, *second_norm, *q_norm, *k_norm;
  Product attend, out, widen, narrow;
};

struct Shape {
  int64_t layers, width, intermediate, heads, kv_heads, d;
  float eps, scale;
};

// Rows of the call, and room for what lies between two kernels.
struct Call {
  int64_t rows;
  bfloat16 *x, *normed, *delta, *gated, *q, *k, *v;
  float* scales;
  const float *cosine, *sine;
  bfloat16 *keys, *values;  // of the first layer
  int64_t cache_stride;     // elements from one layer's blocks to the next
  const int64_t *segments, size, *tables;
};

// Where a layer's results go: room that all share (stride 0), or what is kept of each (elements from one to the next).
struct Results {
  bfloat16 *products, *attended, *middle, *gates, *ends;
  float* lse;  // or null
  int64_t products_stride, attended_stride, middle_stride, gates_stride, ends_stride, lse_stride;
};

void multiply(const Product& by, const bfloat16* x, bfloat16* out, int64_t rows, int64_t columns, int64_t width) {
  upslope_product(x, by.weight, by.bias, out, rows, columns, width, by.block);
}

}  // namespace

extern "C" {

// x [T, D] embedded tokens (overwritten where nothing is kept), normed [T, D] after the last norm.
void upslope_decode(const void* blocks, const void* last_norm, const void* shape_at, const void* call_at, const void* results) {
  const Shape& s = *(const Shape*)shape_at;
  const Call& c = *(const Call*)call_at;
  const Results& r = *(const Results*)results;
  const int64_t attended_width = s.heads * s.d, products_width = attended_width + 2 * s.kv_heads * s.d;
  const bfloat16 *x = c.x, *delta = nullptr;
  auto add_norm = [&](const void* weight, bfloat16* sum) {
    upslope_norm_forward(1, x, delta, weight, sum, c.normed, c.scales, c.rows, s.width, s.eps);
    if (delta) x = sum;
    delta = c.delta;
  };
  for (int64_t i = 0; i < s.layers; i++) {
    const Block& block = ((const Block*)blocks)[i];
    bfloat16 *products = r.products + i * r.products_stride, *attended = r.attended + i * r.attended_stride;
    bfloat16* gates = r.gates + i * r.gates_stride;
    add_norm(block.first_norm, i ? r.ends + (i - 1) * r.ends_stride : nullptr);
    multiply(block.attend, c.normed, products, c.rows, products_width, s.width);
    upslope_attention_step(1, products, block.q_norm, block.k_norm, s.eps, c.scales, c.q, c.k, c.v, c.cosine, c.sine, c.rows,
                           c.keys + i * c.cache_stride, c.values + i * c.cache_stride, attended,
                           r.lse ? r.lse + i * r.lse_stride : nullptr, c.segments, c.size, c.tables, s.heads, s.kv_heads, s.d,
                           s.scale);
    multiply(block.out, attended, c.delta, c.rows, s.width, attended_width);
    add_norm(block.second_norm, r.middle + i * r.middle_stride);
    multiply(block.widen, c.normed, gates, c.rows, 2 * s.intermediate, s.width);
    upslope_swiglu_forward(1, gates, c.gated, c.rows, s.intermediate);
    multiply(block.narrow, c.gated, c.delta, c.rows, s.width, s.intermediate);
  }
  add_norm(last_norm, r.ends + (s.layers - 1) * r.ends_stride);
}
}
