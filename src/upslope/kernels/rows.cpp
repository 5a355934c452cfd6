// Row-wise parts of a Transformer block: RMSNorm with the residual sum, SwiGLU, splitting and rotating q, k, v.
#include "vector.h"

using namespace upslope;

namespace {

constexpr int64_t SLABS = 16;       // rows are summed in so many parts, whatever the number of threads
constexpr int64_t WORTH_IT = 8192;  // elements from which a second thread pays

template <typename T>
void norm_forward(const T* x, const T* delta, const T* weight, T* sum, T* out, float* scales, int64_t rows, int64_t width,
                  float eps) {
#pragma omp parallel for if (rows * width > WORTH_IT)
  for (int64_t i = 0; i < rows; i++) {
    const T* from = x + i * width;
    if (delta) {
      T* to = sum + i * width;
      const T* add = delta + i * width;
      for (int64_t c = 0; c < width; c += LANES)
        store_some(to + c, load_some(from + c, width - c) + load_some(add + c, width - c), width - c);
      from = to;
    }
    floats squares = {};
    for (int64_t c = 0; c < width; c += LANES) {
      floats v = load_some(from + c, width - c);
      squares = fma(v, v, squares);
    }
    float scale = 1.0f / __builtin_sqrtf(sum_of(squares) / (float)width + eps);
    scales[i] = scale;
    for (int64_t c = 0; c < width; c += LANES) {
      floats normed = rounded_as(load_some(from + c, width - c) * scale, weight);
      store_some(out + i * width + c, normed * load_some(weight + c, width - c), width - c);
    }
  }
}

// d_sum = d_through + d(norm); weight's gradient summed over slabs of rows.
template <typename T>
void norm_backward(const T* x, const T* weight, const float* scales, const T* grad, const T* through, T* d_sum, float* slabs,
                   int64_t rows, int64_t width) {
#pragma omp parallel for if (rows * width > WORTH_IT)
  for (int64_t slab = 0; slab < SLABS; slab++) {
    float* d_weight = slabs + slab * width;
    std::memset(d_weight, 0, width * sizeof(float));
    for (int64_t i = rows * slab / SLABS; i < rows * (slab + 1) / SLABS; i++) {
      const T *from = x + i * width, *g = grad + i * width;
      float scale = scales[i];
      floats dots = {};
      for (int64_t c = 0; c < width; c += LANES) {
        floats v = load_some(from + c, width - c), d = load_some(g + c, width - c);
        floats w = load_some(weight + c, width - c);
        dots = fma(d * w, v, dots);
        store_some(d_weight + c, fma(d, v * scale, load_some(d_weight + c, width - c)), width - c);
      }
      float pull = sum_of(dots) * scale * scale / (float)width;
      for (int64_t c = 0; c < width; c += LANES) {
        floats v = load_some(from + c, width - c), d = load_some(g + c, width - c);
        floats w = load_some(weight + c, width - c);
        floats r = (d * w - v * pull) * scale;
        if (through) r += load_some(through + i * width + c, width - c);
        store_some(d_sum + i * width + c, r, width - c);
      }
    }
  }
}

template <typename T>
void swiglu_forward(const T* both, T* out, int64_t rows, int64_t width) {
#pragma omp parallel for if (rows * width > WORTH_IT)
  for (int64_t i = 0; i < rows; i++) {
    const T *gate = both + 2 * i * width, *up = gate + width;
    for (int64_t c = 0; c < width; c += LANES) {
      floats g = load_some(gate + c, width - c);
      floats silu = rounded_as(g / (exp(-g) + 1.0f), out);
      store_some(out + i * width + c, silu * load_some(up + c, width - c), width - c);
    }
  }
}

template <typename T>
void swiglu_backward(const T* both, const T* grad, T* d_both, int64_t rows, int64_t width) {
#pragma omp parallel for if (rows * width > WORTH_IT)
  for (int64_t i = 0; i < rows; i++) {
    const T *gate = both + 2 * i * width, *up = gate + width;
    T *d_gate = d_both + 2 * i * width, *d_up = d_gate + width;
    for (int64_t c = 0; c < width; c += LANES) {
      floats g = load_some(gate + c, width - c), u = load_some(up + c, width - c);
      floats d = load_some(grad + i * width + c, width - c);
      floats sigmoid = 1.0f / (exp(-g) + 1.0f);
      floats silu = g * sigmoid;
      store_some(d_gate + c, d * u * fma(silu, 1.0f - sigmoid, sigmoid), width - c);
      store_some(d_up + c, d * silu, width - c);
    }
  }
}

template <typename T>
void turn(const T* from, T* to, const float* cosine, const float* sine, float sign, int64_t half) {
  for (int64_t c = 0; c < half; c += LANES) {
    int64_t left = half - c;
    floats a = load_some(from + c, left), b = load_some(from + half + c, left);
    floats co = load_some(cosine + c, left), si = load_some(sine + c, left) * sign;
    store_some(to + c, fma(a, co, -(b * si)), left);
    store_some(to + half + c, fma(b, co, a * si), left);
  }
}

// all [T, (H + 2K) d]; q [T, H, d], k and v [T, K, d]; cosine and sine [T, d / 2].
template <typename T>
void split_rotate(const T* all, T* q, T* k, T* v, const float* cosine, const float* sine, int64_t rows, int64_t heads,
                  int64_t kv_heads, int64_t d) {
#pragma omp parallel for if (rows * (heads + 2 * kv_heads) * d > WORTH_IT)
  for (int64_t i = 0; i < rows; i++) {
    const T* from = all + i * (heads + 2 * kv_heads) * d;
    const float *co = cosine + i * d / 2, *si = sine + i * d / 2;
    for (int64_t h = 0; h < heads; h++) turn(from + h * d, q + (i * heads + h) * d, co, si, 1.0f, d / 2);
    from += heads * d;
    for (int64_t h = 0; h < kv_heads; h++) turn(from + h * d, k + (i * kv_heads + h) * d, co, si, 1.0f, d / 2);
    std::memcpy(v + i * kv_heads * d, from + kv_heads * d, kv_heads * d * sizeof(T));
  }
}

// The inverse: gradients of q, k, v into that of the product.
template <typename T>
void join_rotate(T* all, const T* q, const T* k, const T* v, const float* cosine, const float* sine, int64_t rows,
                 int64_t heads, int64_t kv_heads, int64_t d) {
#pragma omp parallel for if (rows * (heads + 2 * kv_heads) * d > WORTH_IT)
  for (int64_t i = 0; i < rows; i++) {
    T* to = all + i * (heads + 2 * kv_heads) * d;
    const float *co = cosine + i * d / 2, *si = sine + i * d / 2;
    for (int64_t h = 0; h < heads; h++) turn(q + (i * heads + h) * d, to + h * d, co, si, -1.0f, d / 2);
    to += heads * d;
    for (int64_t h = 0; h < kv_heads; h++) turn(k + (i * kv_heads + h) * d, to + h * d, co, si, -1.0f, d / 2);
    std::memcpy(to + kv_heads * d, v + i * kv_heads * d, kv_heads * d * sizeof(T));
  }
}

}  // namespace

#define BY_KIND(kind, call)   \
  if (kind == 0) {            \
    typedef float T;          \
    call;                     \
  } else {                    \
    typedef bfloat16 T;       \
    call;                     \
  }

extern "C" {

void upslope_norm_forward(int kind, const void* x, const void* delta, const void* weight, void* sum, void* out,
                          float* scales, int64_t rows, int64_t width, float eps) {
  BY_KIND(kind, norm_forward((const T*)x, (const T*)delta, (const T*)weight, (T*)sum, (T*)out, scales, rows, width, eps))
}

void upslope_norm_backward(int kind, const void* x, const void* weight, const float* scales, const void* grad,
                           const void* through, void* d_sum, float* slabs, int64_t rows, int64_t width) {
  BY_KIND(kind, norm_backward((const T*)x, (const T*)weight, scales, (const T*)grad, (const T*)through, (T*)d_sum, slabs,
                              rows, width))
}

void upslope_swiglu_forward(int kind, const void* both, void* out, int64_t rows, int64_t width) {
  BY_KIND(kind, swiglu_forward((const T*)both, (T*)out, rows, width))
}

void upslope_swiglu_backward(int kind, const void* both, const void* grad, void* d_both, int64_t rows, int64_t width) {
  BY_KIND(kind, swiglu_backward((const T*)both, (const T*)grad, (T*)d_both, rows, width))
}

void upslope_split_rotate(int kind, const void* all, void* q, void* k, void* v, const float* cosine, const float* sine,
                          int64_t rows, int64_t heads, int64_t kv_heads, int64_t d) {
  BY_KIND(kind, split_rotate((const T*)all, (T*)q, (T*)k, (T*)v, cosine, sine, rows, heads, kv_heads, d))
}

void upslope_join_rotate(int kind, void* all, const void* q, const void* k, const void* v, const float* cosine,
                         const float* sine, int64_t rows, int64_t heads, int64_t kv_heads, int64_t d) {
  BY_KIND(kind, join_rotate((T*)all, (const T*)q, (const T*)k, (const T*)v, cosine, sine, rows, heads, kv_heads, d))
}
}
