// Passes over whole rows of logits, one for each result; rows are shared among threads.

#include <algorithm>
#include <cmath>
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
constexpr float LOWEST = std::numeric_limits<float>::lowest();

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

// The largest number, NaN before all else.
float most(const float* row, int64_t vocabulary) {
    auto order = key(bits(row)[0]);
    for (int64_t start = 0; start < vocabulary; start += CHUNK)
        order = std::max(order, largest(bits(row) + start, std::min(CHUNK, vocabulary - start)));
    const int32_t number = order < 0 ? ~order ^ std::numeric_limits<int32_t>::min() : order;
    float found;
    std::memcpy(&found, &number, sizeof found);
    return found;
}

// Sums over a row, in floats by chunks and these in doubles: of the first term that `terms` makes of a number, and of its
// product with the second one. The terms are written out first: a product with one that the compiler knows in a case that
// never comes is made in every case, and where it is too small for a float it takes a hundred times as long.
template <typename Terms>
void add(const float* row, int64_t vocabulary, double* sums, Terms terms) {
    sums[0] = sums[1] = 0;
    float first[CHUNK], second[CHUNK];
    for (int64_t start = 0; start < vocabulary; start += CHUNK) {
        auto chunk = [&](int64_t size) {
            float sum = 0, product = 0;
            for (int64_t at = 0; at < size; at++) terms(row[start + at], first[at], second[at]);
            for (int64_t at = 0; at < size; at++) sum += first[at], product += first[at] * second[at];
            sums[0] += sum, sums[1] += product;
        };
        const int64_t size = std::min(CHUNK, vocabulary - start);
        size == CHUNK ? chunk(CHUNK) : chunk(size);
    }
}

// Of each number less the largest one, x: the sums of e^x and of x e^x. Of a row without a finite largest one, the first
// is 0, infinite or NaN, as that of the powers of the numbers themselves would be.
void weigh(const float* row, int64_t vocabulary, float& base, double* sums) {
    base = most(row, vocabulary);
    if (!std::isfinite(base)) {
        sums[0] = sums[1] = base < 0 ? 0 : base;
        return;
    }
    add(row, vocabulary, sums, [base](float number, float& power, float& x) {
        x = std::max(number - base, -1000.f), power = exponential(x);
    });
}

// The largest number, and the standard deviation of the finite ones; NaN where the largest is not finite.
void spread(const float* row, int64_t vocabulary, float& base, double& deviation) {
    base = most(row, vocabulary);
    deviation = std::numeric_limits<double>::quiet_NaN();
    if (!std::isfinite(base)) return;
    double sums[2], squares[2];
    add(row, vocabulary, sums, [base](float number, float& counts, float& x) {
        counts = number >= LOWEST, x = number >= LOWEST ? number - base : 0.f;
    });
    const float mean = float(sums[1] / sums[0]);
    add(row, vocabulary, squares, [base, mean](float number, float& x, float& again) {
        x = again = number >= LOWEST ? number - base - mean : 0.f;
    });
    deviation = std::sqrt(squares[1] / sums[0]);
}

// 32 random bits of a stream, those that noise.py draws: SplitMix64.
inline uint64_t drawn(uint64_t key, int64_t index) {
    uint64_t x = key + uint64_t(index + 1) * 0x9E3779B97F4A7C15u;
    x = (x ^ x >> 30) * 0xBF58476D1CE4E5B9u;
    x = (x ^ x >> 27) * 0x94D049BB133111EBu;
    return (x ^ x >> 31) >> 32;
}

// Such bits as Gumbel noise, within 1e-6 of what numpy makes of the same float.
inline double gumbel(uint64_t bits) {
    float fraction = std::min((float(bits) + 0.5f) * 0x1p-32f, 1.f - 0x1p-24f);
    return -std::log(-std::log1p(-double(fraction)));
}

// Where the largest of logits plus noise may be: `room` ids at most, ascending, behind the last one repeated. False where
// that cannot be told, because the logits are not finite or the ids are more. As samplers.py's _draw, which says why.
bool contenders(const float* row, int64_t vocabulary, uint64_t stream, int64_t room, int64_t* ids) {
    static thread_local std::vector<int32_t> maxima;
    static thread_local std::vector<uint64_t> least;
    const int64_t chunks = (vocabulary + CHUNK - 1) / CHUNK;
    maxima.resize(chunks), least.resize(chunks);
    const auto* numbers = bits(row);
    for (int64_t chunk = 0; chunk < chunks; chunk++) {
        const int64_t start = chunk * CHUNK, size = std::min(CHUNK, vocabulary - start);
        auto look = [&](int64_t size) {
            uint64_t lowest = ~uint64_t(0);
            for (int64_t id = start; id < start + size; id++) lowest = std::min(lowest, drawn(stream, id));
            maxima[chunk] = largest(numbers + start, size), least[chunk] = lowest;
        };
        size == CHUNK ? look(CHUNK) : look(size);
    }
    const int64_t first = std::max_element(maxima.begin(), maxima.end()) - maxima.begin();
    const int64_t lucky = std::min_element(least.begin(), least.end()) - least.begin();
    if (maxima[first] >= infinity(maxima[first])) return false;
    int64_t likeliest = first * CHUNK, luckiest = lucky * CHUNK;
    while (key(numbers[likeliest]) != maxima[first]) likeliest++;
    while (drawn(stream, luckiest) != least[lucky]) luckiest++;
    const double peak = row[likeliest], most = gumbel(least[lucky]);
    if (!std::isfinite(peak)) return false;
    auto marked = [&](double score) { return score - 1e-3 - 1e-6 * (std::abs(score) + std::abs(peak)); };
    double mark = marked(std::max(peak + gumbel(drawn(stream, likeliest)), row[luckiest] + most));
    const double fraction = -std::expm1(-std::exp(std::min(peak - mark, 700.)));
    const uint64_t limit = uint64_t(std::min(fraction * (1 + 0x1p-22), 1.) * 0x1p32);
    const float low = float(mark - most);
    const int32_t bound = key(*bits(&low));
    int64_t count = 0;
    for (int64_t chunk = 0; chunk < chunks; chunk++) {
        if (maxima[chunk] < bound || least[chunk] > limit) continue;
        for (int64_t id = chunk * CHUNK; id < std::min((chunk + 1) * CHUNK, vocabulary); id++) {
            if (row[id] < low) continue;
            const uint64_t noise = drawn(stream, id);
            if (noise > limit) continue;
            const double score = row[id] + gumbel(noise);
            if (score < mark) continue;
            if (count == room) return false;
            ids[count++] = id;
            mark = std::max(mark, marked(score));
        }
    }
    for (int64_t at = count; at < room; at++) ids[at] = ids[count - 1];
    return true;
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

extern "C" void weights(const float* logits, int64_t rows, int64_t vocabulary, float* largest, double* sums) {
#pragma omp parallel for if (rows * vocabulary > ALONE)
    for (int64_t row = 0; row < rows; row++)
        weigh(logits + row * vocabulary, vocabulary, largest[row], sums + 2 * row);
}

extern "C" void spreads(const float* logits, int64_t rows, int64_t vocabulary, float* largest, double* deviations) {
#pragma omp parallel for if (rows * vocabulary > ALONE)
    for (int64_t row = 0; row < rows; row++)
        spread(logits + row * vocabulary, vocabulary, largest[row], deviations[row]);
}

extern "C" void widen(const uint16_t* logits, int64_t rows, int64_t vocabulary, float* sums, float* to) {
#pragma omp parallel for if (rows * vocabulary > ALONE)
    for (int64_t row = 0; row < rows; row++)
        sums[row] = total(logits + row * vocabulary, to + row * vocabulary, vocabulary);
}

// A row of -1 where the contenders cannot be told.
extern "C" void contenders(const float* logits, int64_t rows, int64_t vocabulary, int64_t room, const uint64_t* keys,
                           int64_t* ids) {
#pragma omp parallel for if (rows * vocabulary > ALONE)
    for (int64_t row = 0; row < rows; row++)
        if (!contenders(logits + row * vocabulary, vocabulary, keys[row], room, ids + row * room))
            std::fill_n(ids + row * room, room, -1);
}
