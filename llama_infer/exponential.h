#pragma once

#include <cmath>
#include <cstdint>
#include <cstring>

// e^x for x <= 88, within 2e-7 of it: the compiler makes vectors of it, which it does not of std::exp.
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
