// bfloat16 as the upper half of a float32, and vectors of sixteen numbers. Included by the kernels beside it.

#pragma once

#include <cmath>
#include <cstddef>
#include <cstdint>
#include <cstring>

namespace {

typedef uint16_t Half;
typedef float Lanes __attribute__((vector_size(64)));
typedef int32_t Whole __attribute__((vector_size(64)));
typedef uint32_t Words __attribute__((vector_size(64)));
typedef Half Halves __attribute__((vector_size(32)));
constexpr int LANES = 16;

inline float widen(Half x) {
    const uint32_t bits = uint32_t(x) << 16;
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

}  // namespace
