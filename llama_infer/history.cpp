// What is read and written at the tokens of a row's history: places that are scattered over the vocabulary, each a miss
// of the caches. They are asked for ahead, and a row is done with before the next one is begun: of 2,048 tokens it stays
// in the second cache. Every number is rounded as by torch's operators.

#include <cstdint>
#include <vector>

namespace {

constexpr int64_t AHEAD = 48;          // places
constexpr int64_t ALONE = 1 << 13;     // tokens that are not worth a second thread
enum Kind : int64_t { SCALE, LOWER, LOWER_EACH };

struct Change {
    int64_t kind;
    const void* by;        // [rows], of the logits' type
    const int64_t* first;  // [rows], the first token that counts; null: all do
};

template <typename T>
struct Rows {
    T* logits;
    int64_t count, vocabulary, stride;
    const int64_t *tokens, *length;
};

// Calls change(score, number) at each of the tokens, in order; false where the vocabulary does not have one.
template <typename T, typename F>
inline bool each(T* row, int64_t vocabulary, const int64_t* ids, int64_t count, F change) {
    for (int64_t at = 0; at < count; at++) {
        if (at + AHEAD < count) __builtin_prefetch(row + ids[at + AHEAD], 1);
        if (uint64_t(ids[at]) >= uint64_t(vocabulary)) return false;
        change(row[ids[at]], at);
    }
    return true;
}

// Calls work(row of logits, ids, how many, row number) for each row; false where it is false for any.
template <typename T, typename F>
bool by_row(const Rows<T>& rows, F work) {
    bool all = true;
    int64_t tokens = 0;
    for (int64_t row = 0; row < rows.count; row++) tokens += rows.length[row];
#pragma omp parallel for schedule(dynamic, 4) reduction(&& : all) if (tokens > ALONE)
    for (int64_t row = 0; row < rows.count; row++)
        all = work(rows.logits + row * rows.vocabulary, rows.tokens + row * rows.stride, rows.length[row], row) && all;
    return all;
}

template <typename T>
bool apply(T* row, int64_t vocabulary, const int64_t* ids, int64_t count, Kind kind, T by) {
    if (by == T(kind == SCALE)) return true;  // neutral
    if (kind == LOWER_EACH) return each(row, vocabulary, ids, count, [&](T& score, int64_t) { score -= by; });
    // A token counts once: all are read before any is written.
    static thread_local std::vector<T> found;
    found.resize(count);
    T* to = found.data();
    bool known = kind == SCALE
                     ? each(row, vocabulary, ids, count, [&](T& x, int64_t at) { to[at] = x < 0 ? x * by : x / by; })
                     : each(row, vocabulary, ids, count, [&](T& x, int64_t at) { to[at] = x - by; });
    return known && each(row, vocabulary, ids, count, [&](T& score, int64_t at) { score = to[at]; });
}

template <typename T>
bool change(const Rows<T>& rows, const Change* changes, int64_t count) {
    return by_row(rows, [&](T* scores, const int64_t* ids, int64_t length, int64_t row) {
        bool known = true;
        for (const Change* one = changes; one < changes + count; one++) {
            int64_t first = one->first ? one->first[row] : 0;
            T by = static_cast<const T*>(one->by)[row];
            if (first < length)
                known = apply(scores, rows.vocabulary, ids + first, length - first, Kind(one->kind), by) && known;
        }
        return known;
    });
}

template <typename T>
bool keep(const Rows<T>& rows, T* kept, int64_t width) {
    return by_row(rows, [&](T* scores, const int64_t* ids, int64_t length, int64_t row) {
        T* to = kept + row * width;
        return each(scores, rows.vocabulary, ids, length, [&](T& score, int64_t at) { to[at] = score; });
    });
}

template <typename T>
bool restore(const Rows<T>& rows, const T* kept, int64_t width) {
    return by_row(rows, [&](T* scores, const int64_t* ids, int64_t length, int64_t row) {
        const T* from = kept + row * width;
        return each(scores, rows.vocabulary, ids, length, [&](T& score, int64_t at) { score = from[at]; });
    });
}

}  // namespace

#define KERNEL(name, T, Given)                                                                                        \
    extern "C" bool name##_##T(T* logits, int64_t count, int64_t vocabulary, int64_t stride, const int64_t* tokens,   \
                               const int64_t* length, Given given, int64_t size) {                                    \
        return name(Rows<T>{logits, count, vocabulary, stride, tokens, length}, given, size);                         \
    }

KERNEL(change, float, const Change*)
KERNEL(change, double, const Change*)
KERNEL(keep, float, float*)
KERNEL(keep, double, double*)
KERNEL(restore, float, const float*)
KERNEL(restore, double, const double*)
