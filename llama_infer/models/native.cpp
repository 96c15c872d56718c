// Attention of single new tokens. Every row reads its own keys and values once and nothing else: rows of any lengths
// share a call without padding, and the query heads of a group share what is read. Sums are in float32.

#include <algorithm>
#include <cmath>
#include <cstdint>
#include <cstring>

namespace {

struct BFloat16 {
    uint16_t bits;
};

inline float widen(float x) { return x; }

inline float widen(BFloat16 x) {
    uint32_t bits = uint32_t(x.bits) << 16;
    float wide;
    std::memcpy(&wide, &bits, 4);
    return wide;
}

inline void narrow(float x, float& to) { to = x; }

inline void narrow(float x, BFloat16& to) {  // to the nearest, ties to even
    uint32_t bits;
    std::memcpy(&bits, &x, 4);
    to.bits = std::isnan(x) ? 0x7fc0 : uint16_t((bits + 0x7fff + ((bits >> 16) & 1)) >> 16);
}

// e^x for x <= 0, within 2e-7 of it: the compiler makes vectors of it, which it does not of std::exp.
inline float exponential(float x) {
    x = x < -87.f ? -87.f : x;  // NaN stays
    float whole = std::floor(x * 1.44269504f + 0.5f);
    float rest = x - whole * 0.693359375f + whole * 2.12194440e-4f;  // ln 2 in two parts
    float sum = 1.9875691500e-4f;
    sum = sum * rest + 1.3981999507e-3f;
    sum = sum * rest + 8.3334519073e-3f;
    sum = sum * rest + 4.1665795894e-2f;
    sum = sum * rest + 1.6666665459e-1f;
    sum = sum * rest + 5.0000001201e-1f;
    sum = sum * rest * rest + rest + 1.f;
    uint32_t bits = uint32_t(int32_t(whole) + 127) << 23;
    float power;
    std::memcpy(&power, &bits, 4);
    return sum * power;
}

// One KV head of one row: a tile of tokens at a time, with a running maximum (Milakov and Gimelshein 2018).
template <typename T, int DIM>
void attend(const T* q, const T* k, const T* v, T* out, int64_t first, int64_t end, int64_t group, float scale) {
    constexpr int TILE = 4096 / DIM;
    alignas(64) float keys[TILE * DIM], values[TILE * DIM], weights[TILE];
    for (int64_t g0 = 0; g0 < group; g0 += 8) {
        const int heads = int(std::min<int64_t>(8, group - g0));
        alignas(64) float query[8][DIM], sum[8][DIM], most[8], total[8];
        for (int g = 0; g < heads; g++) {
            most[g] = -INFINITY, total[g] = 0;
            for (int d = 0; d < DIM; d++) query[g][d] = widen(q[(g0 + g) * DIM + d]) * scale, sum[g][d] = 0;
        }
        for (int64_t start = first; start < end; start += TILE) {
            const int count = int(std::min<int64_t>(TILE, end - start));
            for (int i = 0; i < count * DIM; i++) keys[i] = widen(k[start * DIM + i]);
            for (int i = 0; i < count * DIM; i++) values[i] = widen(v[start * DIM + i]);
            for (int g = 0; g < heads; g++) {
                float top = most[g];
                for (int t = 0; t < count; t++) {
                    float score = 0;
                    for (int d = 0; d < DIM; d++) score += query[g][d] * keys[t * DIM + d];
                    weights[t] = score;
                }
                for (int t = 0; t < count; t++) top = top < weights[t] ? weights[t] : top;
                const float shrink = top == most[g] ? 1.f : most[g] == -INFINITY ? 0.f : exponential(most[g] - top);
                float added = 0;
                for (int t = 0; t < count; t++) weights[t] = exponential(weights[t] - top), added += weights[t];
                most[g] = top, total[g] = total[g] * shrink + added;
                float local[DIM];
                for (int d = 0; d < DIM; d++) local[d] = sum[g][d] * shrink;
                for (int t = 0; t < count; t++)
                    for (int d = 0; d < DIM; d++) local[d] += weights[t] * values[t * DIM + d];
                std::memcpy(sum[g], local, sizeof local);
            }
        }
        for (int g = 0; g < heads; g++)
            for (int d = 0; d < DIM; d++) narrow(sum[g][d] / total[g], out[(g0 + g) * DIM + d]);
    }
}

template <typename T, int DIM>
void all(const T* q, const T* k, const T* v, T* out, const int64_t* where, int64_t rows, int64_t heads, int64_t group,
         int64_t row_stride, int64_t head_stride, int64_t window, float scale) {
#pragma omp parallel for schedule(dynamic)
    for (int64_t i = 0; i < rows * heads; i++) {
        const int64_t row = where[i / heads], token = where[rows + i / heads], end = where[2 * rows + i / heads];
        const int64_t held = row * row_stride + i % heads * head_stride, asked = (token * heads + i % heads) * group * DIM;
        attend<T, DIM>(q + asked, k + held, v + held, out + asked, std::max<int64_t>(0, end - window), end, group, scale);
    }
}

}  // namespace

#define ATTEND(NAME, TYPE, DIM)                                                                                        \
    extern "C" void NAME##_##DIM(const void* q, const void* k, const void* v, void* out, const int64_t* where,         \
                                 int64_t rows, int64_t heads, int64_t group, int64_t row_stride, int64_t head_stride,  \
                                 int64_t window, float scale) {                                                        \
        all<TYPE, DIM>((const TYPE*)q, (const TYPE*)k, (const TYPE*)v, (TYPE*)out, where, rows, heads, group,          \
                       row_stride, head_stride, window, scale);                                                        \
    }
#define BOTH(DIM) ATTEND(bfloat16, BFloat16, DIM) ATTEND(float32, float, DIM)

BOTH(8) BOTH(16) BOTH(32) BOTH(64) BOTH(96) BOTH(128) BOTH(256)
