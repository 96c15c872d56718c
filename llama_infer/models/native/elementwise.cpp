// What lies between a model's products in bfloat16, in one pass each. Every intermediate result is rounded where
// transformers' modules round it.

#include "numbers.h"

namespace {

constexpr int64_t WORTH = 1 << 14;  // numbers from which on a second thread pays

// One token's heads, each half turned into the other.
inline void turn(const Half* x, const Half* cos, const Half* sin, Half* y, int64_t heads, int64_t dim) {
    const int64_t half = dim / 2;
    for (int64_t h = 0; h < heads; h++, x += dim, y += dim) {
#pragma omp simd
        for (int64_t d = 0; d < half; d++)
            y[d] = narrow(rounded(widen(x[d]) * widen(cos[d])) - rounded(widen(x[d + half]) * widen(sin[d])));
#pragma omp simd
        for (int64_t d = half; d < dim; d++)
            y[d] = narrow(rounded(widen(x[d]) * widen(cos[d])) + rounded(widen(x[d - half]) * widen(sin[d])));
    }
}

}  // namespace

// y = weight * x / sqrt(mean(x^2) + eps), a row of [rows, size] at a time.
extern "C" void rms_norm(const Half* x, const Half* weight, Half* y, int64_t rows, int64_t size, float eps) {
#pragma omp parallel for schedule(static) if (rows > 1 && rows * size >= WORTH)
    for (int64_t r = 0; r < rows; r++) {
        const Half* from = x + r * size;
        Half* to = y + r * size;
        float sum = 0;
        for (int64_t i = 0; i < size; i++) sum += widen(from[i]) * widen(from[i]);
        const float scale = 1.f / std::sqrt(sum / float(size) + eps);
        for (int64_t i = 0; i < size; i++) to[i] = narrow(widen(weight[i]) * rounded(widen(from[i]) * scale));
    }
}

// Queries and keys [tokens, heads, dim] turned by their positions: x * cos + (-second half, first half) * sin.
extern "C" void rotate(const Half* q, const Half* k, const Half* cos, const Half* sin, Half* q_out, Half* k_out,
                       int64_t tokens, int64_t q_heads, int64_t k_heads, int64_t dim) {
#pragma omp parallel for schedule(static) if (tokens > 1 && tokens * (q_heads + k_heads) * dim >= WORTH)
    for (int64_t t = 0; t < tokens; t++) {
        const int64_t at = t * dim;
        turn(q + at * q_heads, cos + at, sin + at, q_out + at * q_heads, q_heads, dim);
        turn(k + at * k_heads, cos + at, sin + at, k_out + at * k_heads, k_heads, dim);
    }
}
