// bfloat16 as the upper half of a float32, and vectors of sixteen numbers. Included by the kernels beside it.

#pragma once

#include <cmath>
#include <cstddef>
#include <cstdint>
#include <cstring>

namespace {

typedef uint16_t Half;
typedef float Lanes __attribute__((vector_size(64)));
typedef uint32_t Words __attribute__((vector_size(64)));
typedef int32_t Places __attribute__((vector_size(64)));
typedef Half Halves __attribute__((vector_size(32)));

inline Lanes load(const float* at) {
    Lanes lanes;
    std::memcpy(&lanes, at, sizeof lanes);
    return lanes;
}

inline void store(Lanes lanes, float* at) { std::memcpy(at, &lanes, sizeof lanes); }

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

inline Halves narrow(Lanes x) {
    const Words bits = (Words)x, rounded = (bits + 0x7fff + ((bits >> 16) & 1)) >> 16;
    return __builtin_convertvector(x != x ? Words{} + 0x7fc0 : rounded, Halves);
}

inline float rounded(float x) { return widen(narrow(x)); }

}  // namespace
