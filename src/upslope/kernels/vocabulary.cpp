// Everything over the vocabulary: log-softmax, its gradient, and drawing a token from it.
//
// With z = logit / temperature and m = max z, a row is summed once, chunk by chunk: S = sum_v e^(z_v - m). Inside a
// chunk four vectors are summed in float32, the chunks in double. Every log-prob is (z - m) - log S, whoever asks.
#include <cmath>
#include <vector>

#include "vector.h"

using namespace upslope;

namespace {

constexpr int64_t CHUNK = 2048;
constexpr int64_t STREAMS = 4;
constexpr float LOWEST = -87.0f;  // e^x is 0 below: the smallest normal number is e^-87.3

const floats FIRST = {0, 1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 11, 12, 13, 14, 15};

// e^x for x <= 0 to within 2 units in the last place (Cephes' expf), without exp's care for large x and NaN.
inline floats falling_exp(floats x) {
  floats shifted;
  floats p = exp_fraction(x, &shifted);
  words y = as_words(p) + (as_words(shifted) << 23);  // the low bits of `shifted` are n
  return as_floats(y & (words)(x > LOWEST));
}

template <typename T>
struct Row {
  const T* logits;
  int64_t vocabulary;
  float temperature, maximum, log_sum;  // the maximum of z; NaN where z holds NaN or infinity, or only -infinity
};

template <bool divide, typename T>
inline floats distance(const Row<T>& row, floats logits) {
  return (divide ? logits / row.temperature : logits) - row.maximum;
}

template <typename T>
float maximum_of(const Row<T>& row) {
  floats best[STREAMS];
  for (auto& b : best) b = broadcast(-__builtin_inff());
  int64_t v = 0;
  for (; v + STREAMS * LANES <= row.vocabulary; v += STREAMS * LANES)
    for (int64_t s = 0; s < STREAMS; s++) best[s] = max(best[s], load(row.logits + v + s * LANES));
  for (; v < row.vocabulary; v += LANES)
    best[0] = max(best[0], load_some(row.logits + v, row.vocabulary - v, -__builtin_inff()));
  float found = max_of(max(max(best[0], best[1]), max(best[2], best[3]))) / row.temperature;
  return std::fabs(found) <= __FLT_MAX__ ? found : __builtin_nanf("");
}

struct Sums {
  double exponentials = 0, weighted = 0, distances = 0;  // of e^d, e^d d and d, where d = z - m
};

// Also the sum of e^d of every chunk, for drawing. Sums of the others are zero unless `further`.
template <bool divide, bool further, typename T>
Sums sums_of(const Row<T>& row, double* chunks) {
  Sums sums;
  for (int64_t begin = 0; begin < row.vocabulary; begin += CHUNK) {
    const T* logits = row.logits + begin;
    int64_t count = row.vocabulary - begin < CHUNK ? row.vocabulary - begin : CHUNK;
    floats part[STREAMS] = {}, weighted[STREAMS] = {}, distances[STREAMS] = {};
    auto add = [&](int64_t s, floats d, ints real) {
      floats e = falling_exp(d);
      part[s] += e;
      if (further) {
        weighted[s] = fma(e, max(d, broadcast(LOWEST)), weighted[s]);
        distances[s] += choose(real, d, floats{});
      }
    };
    int64_t v = 0;
    for (; v + STREAMS * LANES <= count; v += STREAMS * LANES)
      for (int64_t s = 0; s < STREAMS; s++) add(s, distance<divide>(row, load(logits + v + s * LANES)), ~ints{});
    for (int64_t s = 0; v < count; v += LANES, s++)
      add(s, distance<divide>(row, load_some(logits + v, count - v, -__builtin_inff())), FIRST < (float)(count - v));
    auto fold = [](floats* p) { return (double)sum_of((p[0] + p[1]) + (p[2] + p[3])); };
    double here = fold(part);
    if (chunks) chunks[begin / CHUNK] = here;
    sums.exponentials += here;
    if (further) sums.weighted += fold(weighted), sums.distances += fold(distances);
  }
  return sums;
}

template <bool further, typename T>
Sums normalize(Row<T>& row, double* chunks = nullptr) {
  row.maximum = maximum_of(row);
  bool whole = row.temperature == 1.0f;
  Sums sums = whole ? sums_of<false, further>(row, chunks) : sums_of<true, further>(row, chunks);
  row.log_sum = row.maximum == row.maximum ? (float)std::log(sums.exponentials) : row.maximum;
  return sums;
}

template <typename T>
float logprob(const Row<T>& row, int64_t token) {
  return get(row.logits + token) / row.temperature - row.maximum - row.log_sum;
}

template <typename T>
void log_softmax(const T* logits, float* out, int64_t rows, int64_t vocabulary, int64_t stride, float temperature) {
#pragma omp parallel for if (rows > 1)
  for (int64_t i = 0; i < rows; i++) {
    Row<T> row = {logits + i * stride, vocabulary, temperature};
    normalize<false>(row);
    for (int64_t v = 0; v < vocabulary; v += LANES) {
      floats d = distance<true>(row, load_some(row.logits + v, vocabulary - v));
      store_some(out + i * vocabulary + v, d - row.log_sum, vocabulary - v);
    }
  }
}

template <typename T>
void logprobs(const T* logits, const int64_t* tokens, float* logp, float* maximum, float* log_sum, float* entropy,
              float* mean, int64_t rows, int64_t vocabulary, int64_t stride, float temperature) {
#pragma omp parallel for if (rows > 1)
  for (int64_t i = 0; i < rows; i++) {
    Row<T> row = {logits + i * stride, vocabulary, temperature};
    Sums sums = entropy || mean ? normalize<true>(row) : normalize<false>(row);
    if (logp) logp[i] = logprob(row, tokens[i]);
    if (maximum) maximum[i] = row.maximum;
    if (log_sum) log_sum[i] = row.log_sum;
    if (entropy) entropy[i] = row.log_sum - (float)(sums.weighted / sums.exponentials);
    if (mean) mean[i] = (float)(sums.distances / (double)vocabulary) - row.log_sum;
  }
}

// d_z = 1[token] g - p (g + g_mean + g_entropy (log p + H)) + g_mean / V, and d_logit = d_z / temperature.
template <bool divide, bool further, typename T>
void row_gradient(const Row<T> row, T* out, int64_t token, float grad, float entropy, float grad_entropy, float grad_mean) {
  float both = grad + grad_mean, everywhere = grad_mean / (float)row.vocabulary;
  auto gradient = [&](floats logits) {
    floats logp = distance<divide>(row, logits) - row.log_sum;
    floats p = falling_exp(logp);
    if (!further) return p * -both;
    floats pull = fma(max(logp, broadcast(LOWEST)) + entropy, broadcast(grad_entropy), broadcast(both));
    return fma(p, -pull, broadcast(everywhere));
  };
  float chosen = gradient(broadcast(get(row.logits + token)))[0] + grad;
  int64_t v = 0;
  for (; v + LANES <= row.vocabulary; v += LANES) store(out + v, gradient(load(row.logits + v)));
  if (v < row.vocabulary) store_some(out + v, gradient(load_some(row.logits + v, row.vocabulary - v)), row.vocabulary - v);
  store_some(out + token, broadcast(chosen), 1);
}

template <typename T>
void logits_gradient(T* logits, const int64_t* tokens, const float* maximum, const float* log_sum, const float* grad_logp,
                     const float* entropy, const float* grad_entropy, const float* grad_mean, int64_t rows,
                     int64_t vocabulary, int64_t stride, float temperature) {
  bool further = grad_entropy || grad_mean, divide = temperature != 1.0f;
  auto gradient = further ? (divide ? row_gradient<true, true, T> : row_gradient<false, true, T>)
                          : (divide ? row_gradient<true, false, T> : row_gradient<false, false, T>);
#pragma omp parallel for if (rows > 1)
  for (int64_t i = 0; i < rows; i++) {
    T* at = logits + i * stride;
    if (log_sum[i] != log_sum[i]) {
      for (int64_t v = 0; v < vocabulary; v++) store_some(at + v, broadcast(log_sum[i]), 1);
      continue;
    }
    gradient({at, vocabulary, temperature, maximum[i], log_sum[i]}, at, tokens[i], grad_logp[i] / temperature,
             grad_entropy ? entropy[i] : 0.0f, grad_entropy ? grad_entropy[i] / temperature : 0.0f,
             grad_mean ? grad_mean[i] / temperature : 0.0f);
  }
}

// The first of n steps whose running sum exceeds the target, else the last that is not 0; `before` is the sum up to it.
template <typename Step>
int64_t first_above(const Step* steps, int64_t n, double target, double& before) {
  double running = 0;
  int64_t last = 0;
  for (int64_t i = 0; i < n; i++) {
    if (steps[i] > 0) last = i, before = running;
    running += steps[i];
    if (running > target) break;
  }
  return last;
}

// Inverse CDF in token order: the chunk first, then the token in it.
template <typename T>
int64_t inverse_cdf(const Row<T>& row, const double* chunks, double total, double uniform) {
  double before = 0, inside = 0, target = uniform * total;
  int64_t chunk = first_above(chunks, (row.vocabulary + CHUNK - 1) / CHUNK, target, before);
  int64_t begin = chunk * CHUNK, count = row.vocabulary - begin < CHUNK ? row.vocabulary - begin : CHUNK;
  float weights[CHUNK];
  for (int64_t v = 0; v < count; v += LANES)
    store(weights + v, falling_exp(distance<true>(row, load_some(row.logits + begin + v, count - v, -__builtin_inff()))));
  for (int64_t v = 0; v < count; v++) inside += weights[v];
  return begin + first_above(weights, count, (target - before) / chunks[chunk] * inside, before);
}

template <typename T>
void sample(const T* logits, const double* uniform, int64_t* tokens, float* logp, int64_t rows, int64_t vocabulary,
            int64_t stride, float temperature) {
#pragma omp parallel for if (rows > 1)
  for (int64_t i = 0; i < rows; i++) {
    static thread_local std::vector<double> chunks;
    chunks.resize((vocabulary + CHUNK - 1) / CHUNK);
    Row<T> row = {logits + i * stride, vocabulary, temperature};
    Sums sums = normalize<false>(row, chunks.data());
    bool sound = row.log_sum == row.log_sum;
    tokens[i] = sound ? inverse_cdf(row, chunks.data(), sums.exponentials, uniform[i]) : 0;
    logp[i] = logprob(row, tokens[i]);
  }
}

}  // namespace

extern "C" {

void upslope_log_softmax(int kind, const void* logits, float* out, int64_t rows, int64_t vocabulary, int64_t stride,
                         float temperature) {
  if (kind)
    log_softmax((const bfloat16*)logits, out, rows, vocabulary, stride, temperature);
  else
    log_softmax((const float*)logits, out, rows, vocabulary, stride, temperature);
}

void upslope_logprobs(int kind, const void* logits, const int64_t* tokens, float* logp, float* maximum, float* log_sum,
                      float* entropy, float* mean, int64_t rows, int64_t vocabulary, int64_t stride, float temperature) {
  if (kind)
    logprobs((const bfloat16*)logits, tokens, logp, maximum, log_sum, entropy, mean, rows, vocabulary, stride, temperature);
  else
    logprobs((const float*)logits, tokens, logp, maximum, log_sum, entropy, mean, rows, vocabulary, stride, temperature);
}

void upslope_logits_gradient(int kind, void* logits, const int64_t* tokens, const float* maximum, const float* log_sum,
                             const float* grad_logp, const float* entropy, const float* grad_entropy,
                             const float* grad_mean, int64_t rows, int64_t vocabulary, int64_t stride, float temperature) {
  if (kind)
    logits_gradient((bfloat16*)logits, tokens, maximum, log_sum, grad_logp, entropy, grad_entropy, grad_mean, rows,
                    vocabulary, stride, temperature);
  else
    logits_gradient((float*)logits, tokens, maximum, log_sum, grad_logp, entropy, grad_entropy, grad_mean, rows,
                    vocabulary, stride, temperature);
}

void upslope_sample(int kind, const void* logits, const double* uniform, int64_t* tokens, float* logp, int64_t rows,
                    int64_t vocabulary, int64_t stride, float temperature) {
  if (kind)
    sample((const bfloat16*)logits, uniform, tokens, logp, rows, vocabulary, stride, temperature);
  else
    sample((const float*)logits, uniform, tokens, logp, rows, vocabulary, stride, temperature);
}
}
