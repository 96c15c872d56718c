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

inline float widen(float x) { return x; }

inline Half narrow(float x) {  // to the nearest, ties to even
    uint32_t bits;
    std::memcpy(&bits, &x, 4);
    const uint32_t rounded = (bits + 0x7fff + ((bits >> 16) & 1)) >> 16;
    return x != x ? 0x7fc0 : Half(rounded);
}

inline void narrow(float x, Half& to) { to = narrow(x); }

inline void narrow(float x, float& to) { to = x; }

inline Words upper(Lanes x) {  // the same in the upper half of each; what is in the lower one does not count
    const Words bits = (Words)x;
    return x != x ? Words{} + 0x7fc00000u : bits + 0x7fff + ((bits >> 16) & 1);
}

inline Halves narrow(Lanes x) { return __builtin_convertvector(upper(x) >> 16, Halves); }

// 2^x for x of -0.5 to 0.5, within 4e-6 of it, a thousandth of what rounding to bfloat16 loses.
inline Lanes part_of_power(Lanes x) {
    Lanes sum = x * 9.676037e-3f + 5.5922036e-2f;
    sum = sum * x + 2.4022107e-1f;
    sum = sum * x + 6.9312103e-1f;
    return sum * x + 1.f;
}

inline float rounded(float x) { return widen(narrow(x)); }

}  // namespace
