// What lies between a model's products in bfloat16, in one pass each. Every intermediate result is rounded where
// transformers' modules round it.

#include "numbers.h"

#include <algorithm>

namespace {

constexpr int64_t WORTH = 1 << 14;  // numbers from which on a second thread pays
constexpr uint32_t UPPER = 0xffff0000;

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

// x / (1 + e^-x), the power by its whole part, which is an exponent, and the rest.
inline Lanes silu(Lanes x) {
    Lanes t = x * -1.44269504f;
    t = t < 128.f ? t : Lanes{} + 128.f;  // infinity
    t = t > -126.f ? t : Lanes{} - 126.f;
    const Places exponent = __builtin_convertvector(t + 127.5f, Places);
    const Lanes rest = t - __builtin_convertvector(exponent - 127, Lanes);
    return x / (part_of_power(rest) * (Lanes)(exponent << 23) + 1.f);
}

// SiLU of a gate times x, in the upper half of each, both rounded; what is in the lower half does not count.
inline Words gated(Words gate, Words x) {
    const Lanes opened = (Lanes)(upper(silu((Lanes)(gate & UPPER))) & UPPER);
    return upper(opened * (Lanes)(x & UPPER));
}

// The same for 32 numbers, of which two share a word.
inline void gated(const Half* gate, const Half* x, Half* y) {
    Words a, b;
    std::memcpy(&a, gate, sizeof a);
    std::memcpy(&b, x, sizeof b);
    const Words both = gated(a << 16, b << 16) >> 16 | (gated(a, b) & UPPER);
    std::memcpy(y, &both, sizeof both);
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

// y = gate / (1 + e^-gate) * x, SiLU and the product of a gated layer.
extern "C" void gated(const Half* gate, const Half* x, Half* y, int64_t size) {
    const int64_t whole = size / 32 * 32;
#pragma omp parallel for schedule(static) if (size >= WORTH)
    for (int64_t i = 0; i < whole; i += 32) gated(gate + i, x + i, y + i);
    if (whole == size) return;
    Half rest[3][32] = {};
    std::copy(gate + whole, gate + size, rest[0]);
    std::copy(x + whole, x + size, rest[1]);
    gated(rest[0], rest[1], rest[2]);
    std::copy_n(rest[2], size - whole, y + whole);
}
