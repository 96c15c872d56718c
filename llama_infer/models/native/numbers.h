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

inline Words upper(Lanes x) {  // the same in the upper half of each; what is in the lower one does not count
    const Words bits = (Words)x;
    return x != x ? Words{} + 0x7fc00000u : bits + 0x7fff + ((bits >> 16) & 1);
}

inline Halves narrow(Lanes x) { return __builtin_convertvector(upper(x) >> 16, Halves); }

inline float rounded(float x) { return widen(narrow(x)); }

}  // namespace
