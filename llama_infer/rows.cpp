// Passes over whole rows of logits, one for each result; rows are shared among threads.

#include <algorithm>
#include <cstdint>
#include <cstring>
#include <functional>
#include <limits>
#include <utility>
#include <vector>

#include "exponential.h"

namespace {

constexpr int64_t CHUNK = 64;
constexpr int64_t ALONE = 1 << 16;  // logits that are not worth a second thread

// The bits of numbers, as integers of their size.
typedef int32_t __attribute__((may_alias)) Bits32;
typedef int64_t __attribute__((may_alias)) Bits64;
inline const Bits32* bits(const float* at) { return reinterpret_cast<const Bits32*>(at); }
inline const Bits64* bits(const double* at) { return reinterpret_cast<const Bits64*>(at); }
inline int32_t infinity(int32_t) { return 0x7f800000; }
inline int64_t infinity(int64_t) { return 0x7ff0000000000000; }

// An integer of the order of the numbers that have such bits, NaN before all else.
template <typename Bits>
inline Bits key(Bits number) {
    constexpr Bits MOST = std::numeric_limits<Bits>::max();
    Bits size = number & MOST;
    return size > infinity(number) ? MOST : number < 0 ? ~size : size;
}

// The largest key of some.
template <typename Bits>
inline Bits largest(const Bits* numbers, int64_t count) {
    constexpr Bits MOST = std::numeric_limits<Bits>::max();
    Bits most = std::numeric_limits<Bits>::min(), far = 0;
    for (int64_t at = 0; at < count; at++) {
        Bits size = numbers[at] & MOST, order = numbers[at] < 0 ? ~size : size;
        most = order > most ? order : most;
        far = size > far ? size : far;
    }
    return far > infinity(far) ? MOST : most;
}

// Those tokens are in the chunks of the best maxima, and there not below the least of these.
template <typename T>
void likeliest(const T* row, int64_t vocabulary, int64_t count, T* values, int64_t* ids) {
    const auto* numbers = bits(row);
    using Key = decltype(key(*numbers));
    static thread_local std::vector<Key> maxima, best;
    static thread_local std::vector<std::pair<Key, int64_t>> found;
    maxima.resize((vocabulary + CHUNK - 1) / CHUNK);
    for (int64_t start = 0; start < vocabulary; start += CHUNK) {
        int64_t size = std::min(CHUNK, vocabulary - start);
        maxima[start / CHUNK] = size == CHUNK ? largest(numbers + start, CHUNK) : largest(numbers + start, size);
    }
    best = maxima;
    std::nth_element(best.begin(), best.begin() + count - 1, best.end(), std::greater<Key>());
    Key least = best[count - 1];
    int64_t ties = std::count(best.begin(), best.begin() + count, least);
    found.clear();
    for (int64_t start = 0; start < vocabulary; start += CHUNK) {
        Key best_here = maxima[start / CHUNK];
        if (best_here < least || (best_here == least && ties-- <= 0)) continue;
        for (int64_t id = start; id < std::min(start + CHUNK, vocabulary); id++) {
            Key here = key(numbers[id]);
            if (here >= least) found.emplace_back(~here, id);  // the best one has the least
        }
    }
    std::partial_sort(found.begin(), found.begin() + count, found.end());
    for (int64_t at = 0; at < count; at++) {
        ids[at] = found[at].second;
        values[at] = row[ids[at]];
    }
}

inline float read(const float* from, float*) { return *from; }
inline float read(const uint16_t* from, float* to) {  // bfloat16, the upper half of a float
    uint32_t bits = uint32_t(*from) << 16;
    std::memcpy(to, &bits, sizeof bits);
    return *to;
}

// The sum of e to the power of each number; meaningless beyond what a float holds, and then large or small. Numbers of
// half the size are written to ``to`` as floats.
template <typename T>
float total(const T* row, float* to, int64_t vocabulary) {
    double sum = 0;
    for (int64_t start = 0; start < vocabulary; start += CHUNK) {
        float part = 0;
        auto add = [&](int64_t size) {
            for (int64_t at = start; at < start + size; at++) {
                float x = read(row + at, to + at);
                part += exponential(x > 88.f ? 88.f : x);
            }
        };
        if (start + CHUNK <= vocabulary)
            add(CHUNK);  // of a length that the compiler knows
        else
            add(vocabulary - start);
        sum += part;
    }
    return float(sum);
}

}  // namespace

#define KERNEL(T)                                                                                                    \
    extern "C" void likeliest_##T(const T* logits, int64_t rows, int64_t vocabulary, int64_t count, T* values,       \
                                  int64_t* ids) {                                                                    \
        _Pragma("omp parallel for if (rows * vocabulary > ALONE)") for (int64_t row = 0; row < rows; row++)          \
            likeliest(logits + row * vocabulary, vocabulary, count, values + row * count, ids + row * count);        \
    }

KERNEL(float)
KERNEL(double)

extern "C" void totals(float* logits, int64_t rows, int64_t vocabulary, float* sums) {
#pragma omp parallel for if (rows * vocabulary > ALONE)
    for (int64_t row = 0; row < rows; row++)
        sums[row] = total(logits + row * vocabulary, logits + row * vocabulary, vocabulary);
}

extern "C" void widen(const uint16_t* logits, int64_t rows, int64_t vocabulary, float* sums, float* to) {
#pragma omp parallel for if (rows * vocabulary > ALONE)
    for (int64_t row = 0; row < rows; row++)
        sums[row] = total(logits + row * vocabulary, to + row * vocabulary, vocabulary);
}
