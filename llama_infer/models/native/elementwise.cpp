// What lies between a model's products in bfloat16, in one pass each. Every intermediate result is rounded where
// transformers' modules round it.

#include <algorithm>
#include <cmath>
#include <cstddef>
#include <cstdint>
#include <cstring>

namespace {

typedef uint16_t Half;  // the upper half of a float32

constexpr int64_t WORTH = 1 << 14;  // numbers from which on a second thread pays

inline float widen(Half x) {
    uint32_t bits = uint32_t(x) << 16;
    float wide;
    std::memcpy(&wide, &bits, 4);
    return wide;
}

inline Half narrow(float x) {  // to the nearest, ties to even
    uint32_t bits;
    std::memcpy(&bits, &x, 4);
    const uint32_t rounded = (bits + 0x7fff + ((bits >> 16) & 1)) >> 16;
    return x != x ? 0x7fc0 : Half(rounded);
}

inline float rounded(float x) { return widen(narrow(x)); }

typedef float Lanes __attribute__((vector_size(64)));
typedef int32_t Whole __attribute__((vector_size(64)));
typedef uint32_t Words __attribute__((vector_size(64)));
typedef Half Halves __attribute__((vector_size(32)));
constexpr int LANES = 16;

inline Lanes widen(Halves x) { return (Lanes)(__builtin_convertvector(x, Words) << 16); }

inline Halves narrow(Lanes x) {
    const Words bits = (Words)x;
    const Words rounded = (bits + 0x7fff + ((bits >> 16) & 1)) >> 16;
    return __builtin_convertvector(x == x ? rounded : Words{} + 0x7fc0, Halves);
}

// e^x within 2e-7 of it, for |x| <= 87.
inline Lanes exponential(Lanes x) {
    const Lanes least = Lanes{} - 87.f, most = Lanes{} + 87.f;
    x = x < least ? least : x;  // NaN stays
    x = x > most ? most : x;
    const Whole power = __builtin_convertvector(x * 1.44269504f + 128.5f, Whole) - 128;
    const Lanes whole = __builtin_convertvector(power, Lanes);
    const Lanes rest = x - whole * 0.693359375f + whole * 2.12194440e-4f;  // ln 2 in two parts
    Lanes sum = Lanes{} + 1.9875691500e-4f;
    sum = sum * rest + 1.3981999507e-3f;
    sum = sum * rest + 8.3334519073e-3f;
    sum = sum * rest + 4.1665795894e-2f;
    sum = sum * rest + 1.6666665459e-1f;
    sum = sum * rest + 5.0000001201e-1f;
    sum = sum * rest * rest + rest + 1.f;
    return sum * (Lanes)((power + 127) << 23);
}

inline Halves silu_times(Halves gate, Halves up) {
    const Lanes x = widen(gate);
    return narrow(widen(narrow(x / (1.f + exponential(-x)))) * widen(up));
}

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

// y = gate / (1 + e^-gate) * up.
extern "C" void silu_times(const Half* gate, const Half* up, Half* y, int64_t count) {
    const int64_t whole = count / LANES * LANES;
    const auto some = [=](int64_t at, size_t bytes) {
        Halves a = {}, b = {};
        std::memcpy(&a, gate + at, bytes);
        std::memcpy(&b, up + at, bytes);
        a = silu_times(a, b);
        std::memcpy(y + at, &a, bytes);
    };
#pragma omp parallel for schedule(static) if (count >= WORTH)
    for (int64_t i = 0; i < whole; i += LANES) some(i, sizeof(Halves));
    if (whole < count) some(whole, (count - whole) * sizeof(Half));
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
