// Gradients of several micro-batches, added up in float32.
#include "vector.h"

using namespace upslope;

namespace {

template <typename T>
void accumulate(float* total, const T* part, int64_t count) {
  constexpr int64_t block = 1 << 16;
#pragma omp parallel for if (count > block)
  for (int64_t begin = 0; begin < count; begin += block) {
    int64_t end = begin + block < count ? begin + block : count;
    for (int64_t i = begin; i < end; i += LANES)
      store_some(total + i, load_some(total + i, end - i) + load_some(part + i, end - i), end - i);
  }
}

}  // namespace

extern "C" {

void upslope_accumulate(int kind, float* total, const void* part, int64_t count) {
  if (kind)
    accumulate(total, (const bfloat16*)part, count);
  else
    accumulate(total, (const float*)part, count);
}
}
