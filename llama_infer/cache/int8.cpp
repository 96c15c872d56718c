// Keys and values in 8 bits, found as int8.py's `encode_plainly` finds them, operation by operation, in one pass.

#include <algorithm>
#include <cfloat>

#include "../models/native/numbers.h"

namespace {

constexpr int64_t ALONE = 1 << 14;  // numbers that are not worth a second thread

template <typename T>
void encode(const T* from, int8_t* steps, T* scales, int64_t tokens, int64_t heads, int64_t dim, int64_t token_stride,
            int64_t head_stride) {
#pragma omp parallel for schedule(static) if (tokens * heads * dim > ALONE)
    for (int64_t i = 0; i < tokens * heads; i++) {
        const T* x = from + i / heads * token_stride + i % heads * head_stride;
        int32_t most = 0;  // bits of numbers without a sign are in the order of the numbers, NaN the largest
        for (int64_t d = 0; d < dim; d++) {
            const float wide = widen(x[d]);
            int32_t bits;
            std::memcpy(&bits, &wide, sizeof bits);
            most = std::max(most, bits & 0x7fffffff);
        }
        float largest;
        std::memcpy(&largest, &most, sizeof largest);
        narrow(largest / 127, scales[i]);
        const float scale = widen(scales[i]), step = scale < FLT_MIN ? FLT_MIN : scale;
        for (int64_t d = 0; d < dim; d++) {
            const float whole = std::nearbyint(widen(x[d]) / step);
            steps[i * dim + d] = int8_t(int32_t(whole > 127 ? 127.f : whole > -127 ? whole : -127.f));
        }
    }
}

}  // namespace

// from [tokens, heads, dim], with strides in numbers -> steps [tokens, heads, dim], scales [tokens, heads].
#define ENCODE(NAME, TYPE)                                                                                            \
    extern "C" void NAME(const void* from, void* steps, void* scales, int64_t tokens, int64_t heads, int64_t dim,      \
                         int64_t token_stride, int64_t head_stride) {                                                  \
        encode((const TYPE*)from, (int8_t*)steps, (TYPE*)scales, tokens, heads, dim, token_stride, head_stride);       \
    }

ENCODE(bfloat16, Half)
ENCODE(float32, float)
