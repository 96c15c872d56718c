// Attention of many new tokens of a row, in bfloat16, by the processor's tiles (AMX). Scores stand transposed, a key a
// line and sixteen queries side by side: maxima and sums are taken line by line, the weights are as the second product
// wants them, and keys are read as they lie. A query sees its keys 128 at a time, those of positions 0 to
// 127 first (Dao et al. 2022, arXiv 2205.14135), and nothing else: its result is the same whatever is fed with it. Keys and
// values in 8 bits become bfloat16, 128 at a time, for all queries that a thread has for them.

#include <algorithm>
#include <cstdlib>

#include "numbers.h"
#include "tiles.h"
#include "values.h"
#include "vectors.h"

#ifdef LLAMA_INFER_TILES
namespace {

constexpr int SIDE = 16, KEYS = 128, QUERIES = 32;  // of a tile; of a step
constexpr int64_t TOKENS = 128, MOST = 512;  // of a row that share the keys laid out for them; and their queries

// T: of keys and values, Half or int8_t.
template <typename T>
struct Call {
    const Half* q;
    const T *k, *v;
    const Half *k_scale, *v_scale;  // of 8 bits
    Half* out;
    int64_t heads, group, row_stride, head_stride, window;  // heads: of keys and values; strides: of the cache
    float scale;
};

// New tokens of one row and one KV head: `count` from position `at` on, `token` being the first's place in the call.
struct Block {
    int64_t row, head, token, at, count;
};

// Sixteen times sixteen numbers, line i to column i, from memory to memory. Strides in numbers.
inline void transpose(const uint32_t* from, int64_t from_stride, uint32_t* to, int64_t to_stride) {
    __m512i lines[16];
    for (int i = 0; i < 16; i++) lines[i] = _mm512_loadu_si512(from + i * from_stride);
    transpose(lines);
    for (int i = 0; i < 16; i++) _mm512_storeu_si512(to + i * to_stride, lines[i]);
}

// What a thread works with.
template <int DIM>
struct Work {
    alignas(64) Half query[MOST / SIDE][DIM / 2][SIDE][2];  // sixteen queries: pairs of dimensions
    alignas(64) float out[MOST / SIDE][DIM][SIDE];  // what they have gathered, before it is divided by `total`
    alignas(64) float most[MOST], total[MOST];
    alignas(64) Half block[2][KEYS][DIM];  // keys and values, where they are not taken as they lie
    alignas(64) Half value[DIM][KEYS];
    alignas(64) float score[KEYS][QUERIES];
    alignas(64) Half weight[QUERIES / SIDE][KEYS / 2][SIDE][2];  // pairs of keys
    alignas(64) uint32_t some[SIDE][SIDE];
    __m512i pairs;  // two lines of sixteen numbers: one of each in turn
};

// Lays out the block's queries; zeros behind them.
template <typename T, int DIM>
void take(const Call<T>& call, const Block& block, Work<DIM>& work) {
    const int64_t queries = block.count * call.group, size = call.heads * call.group * DIM;
    for (int64_t first = 0; first < queries; first += SIDE) {
        Half lines[SIDE][DIM] = {};
        for (int64_t i = 0; i < std::min<int64_t>(SIDE, queries - first); i++) {
            const int64_t token = (first + i) / call.group, member = (first + i) % call.group;
            std::memcpy(lines[i], call.q + (block.token + token) * size + (block.head * call.group + member) * DIM,
                        sizeof lines[i]);
        }
        for (int d = 0; d < DIM; d += 2 * SIDE)
            transpose((const uint32_t*)&lines[0][d], DIM / 2, (uint32_t*)work.query[first / SIDE][d / 2], SIDE);
        std::fill_n(&work.out[first / SIDE][0][0], DIM * SIDE, 0.f);
    }
    alignas(64) Half pairs[2 * SIDE];
    for (int i = 0; i < 2 * SIDE; i++) pairs[i] = Half(i / 2 + i % 2 * SIDE);
    work.pairs = _mm512_load_si512(pairs);
    std::fill_n(work.most, MOST, -INFINITY);
    std::fill_n(work.total, MOST, 0.f);
}

// The values of `count` keys, a dimension a line.
template <int DIM>
void turn(const Half* values, int64_t count, Work<DIM>& work) {
    const auto line = [](const Half* at) { return _mm512_cvtepu16_epi32(_mm256_loadu_si256((const __m256i*)at)); };
    for (int64_t t = 0; t < count; t += 2 * SIDE)
        for (int d = 0; d < DIM; d += SIDE) {
            for (int i = 0; i < SIDE; i++) {
                const Half* pair = values + (t + 2 * i) * DIM + d;
                const __m512i both = _mm512_or_si512(line(pair), _mm512_slli_epi32(line(pair + DIM), 16));
                _mm512_store_si512(work.some[i], both);
            }
            transpose(work.some[0], SIDE, (uint32_t*)&work.value[d][t], KEYS / 2);
        }
}

// The scores of QUERIES queries and `count` keys.
template <int DIM>
void compare(const Half* keys, int64_t count, const Half (*query)[DIM / 2][SIDE][2], Work<DIM>& work) {
    written();
    for (int64_t t = 0; t < count; t += 2 * SIDE) {
        _tile_zero(0);
        _tile_zero(1);
        _tile_zero(2);
        _tile_zero(3);
        for (int d = 0; d < DIM; d += 2 * SIDE) {
            _tile_loadd(4, keys + t * DIM + d, DIM * sizeof(Half));
            _tile_loadd(5, keys + (t + SIDE) * DIM + d, DIM * sizeof(Half));
            _tile_loadd(6, query[0][d / 2], 64);
            _tile_loadd(7, query[1][d / 2], 64);
            _tile_dpbf16ps(0, 4, 6);
            _tile_dpbf16ps(1, 4, 7);
            _tile_dpbf16ps(2, 5, 6);
            _tile_dpbf16ps(3, 5, 7);
        }
        _tile_stored(0, &work.score[t][0], QUERIES * 4);
        _tile_stored(1, &work.score[t][SIDE], QUERIES * 4);
        _tile_stored(2, &work.score[t + SIDE][0], QUERIES * 4);
        _tile_stored(3, &work.score[t + SIDE][SIDE], QUERIES * 4);
    }
}

// What each query sees: keys at positions from `first` on, before `end`.
struct Sight {
    Places first, end;
};

// The scores of `count` keys become weights, and what the queries have gathered so far shrinks to the new maximum.
template <typename T, int DIM>
void weigh(const Call<T>& call, int half, int32_t start, int64_t count, const Sight* sight, float* most, float* total,
           float* gathered, Work<DIM>& work) {
    float* column = &work.score[0][half * SIDE];
    const Lanes before = load(most);
    Lanes top = before, sum = {};
    for (int32_t t = 0; t < count; t++) {
        Lanes score = load(column + t * QUERIES);
        if (sight) {
            score = (start + t < sight->first) | (start + t >= sight->end) ? Lanes{} - INFINITY : score;
            store(score, column + t * QUERIES);
        }
        top = top < score ? score : top;
    }
    // In units of log 2. Who has seen nothing yet has nothing to shrink.
    const float scale = call.scale * 1.44269504f;
    const Lanes base = top == -INFINITY ? Lanes{} : top * scale;
    for (int64_t t = 0; t < count; t += 2) {
        const Lanes low = power(load(column + t * QUERIES) * scale - base);
        const Lanes high = power(load(column + (t + 1) * QUERIES) * scale - base);
        sum += low + high;
        const __m512i both = (__m512i)_mm512_cvtne2ps_pbh((__m512)high, (__m512)low);
        _mm512_store_si512(work.weight[half][t / 2], _mm512_permutexvar_epi16(work.pairs, both));
    }
    const Lanes shrink = before == top ? Lanes{} + 1.f : power(before * scale - base);
    store(load(total) * shrink + sum, total);
    store(top, most);
    if (_mm512_cmp_ps_mask((__m512)before, (__m512)top, _CMP_NEQ_UQ))
        for (int d = 0; d < DIM; d++) store(load(gathered + d * SIDE) * shrink, gathered + d * SIDE);
}

// What `count` keys' weights make of their values is added to what QUERIES queries have gathered.
template <int DIM>
void gather(float (*out)[DIM][SIDE], int64_t count, Work<DIM>& work) {
    written();
    for (int d = 0; d < DIM; d += 2 * SIDE) {
        _tile_loadd(0, out[0][d], 64);
        _tile_loadd(1, out[1][d], 64);
        _tile_loadd(2, out[0][d + SIDE], 64);
        _tile_loadd(3, out[1][d + SIDE], 64);
        for (int64_t t = 0; t < count; t += 2 * SIDE) {
            _tile_loadd(4, &work.value[d][t], KEYS * sizeof(Half));
            _tile_loadd(5, &work.value[d + SIDE][t], KEYS * sizeof(Half));
            _tile_loadd(6, work.weight[0][t / 2], 64);
            _tile_loadd(7, work.weight[1][t / 2], 64);
            _tile_dpbf16ps(0, 4, 6);
            _tile_dpbf16ps(1, 4, 7);
            _tile_dpbf16ps(2, 5, 6);
            _tile_dpbf16ps(3, 5, 7);
        }
        _tile_stored(0, out[0][d], 64);
        _tile_stored(1, out[1][d], 64);
        _tile_stored(2, out[0][d + SIDE], 64);
        _tile_stored(3, out[1][d + SIDE], 64);
    }
}

// What the queries have gathered, over the sum of their weights.
template <typename T, int DIM>
void give(const Call<T>& call, const Block& block, Work<DIM>& work) {
    const int64_t queries = block.count * call.group, size = call.heads * call.group * DIM;
    for (int64_t first = 0; first < queries; first += SIDE)
        for (int d = 0; d < DIM; d += SIDE) {
            transpose((const uint32_t*)work.out[first / SIDE][d], SIDE, work.some[0], SIDE);
            for (int64_t i = 0; i < std::min<int64_t>(SIDE, queries - first); i++) {
                const int64_t token = (first + i) / call.group, member = (first + i) % call.group;
                const Halves found = narrow(load((const float*)work.some[i]) / work.total[first + i]);
                std::memcpy(call.out + (block.token + token) * size + (block.head * call.group + member) * DIM + d, &found,
                            sizeof found);
            }
        }
}

// `count` keys or values, with zeros behind them: the cache may end there, and what lies behind the row may be NaN.
template <int DIM>
const Half* whole(const Half* from, const Half*, int64_t count, Half (*block)[DIM]) {
    if (count == KEYS) return from;
    std::memset(block, 0, KEYS * sizeof *block);
    std::memcpy(block, from, count * sizeof *block);
    return block[0];
}

template <int DIM>
const Half* whole(const int8_t* from, const Half* scales, int64_t count, Half (*block)[DIM]) {
    for (int64_t t = 0; t < count; t++)
        for (int d = 0; d < DIM; d += 2 * SIDE) {
            Lanes first, second;
            load(from + t * DIM + d, first, second);
            const Halves found[2] = {narrow(first * widen(scales[t])), narrow(second * widen(scales[t]))};
            std::memcpy(block[t] + d, found, sizeof found);
        }
    std::memset(block + count, 0, (KEYS - count) * sizeof *block);
    return block[0];
}

// A block's queries against the keys that they see, KEYS at a time.
template <typename T, int DIM>
void attend(const Call<T>& call, const Block& block, Work<DIM>& work) {
    take(call, block, work);
    const int64_t end = block.at + block.count, queries = block.count * call.group;
    const int64_t held = block.row * call.row_stride + block.head * call.head_stride;
    const int64_t least = std::max<int64_t>(0, block.at + 1 - call.window) / KEYS * KEYS;
    for (int64_t start = least; start < end; start += KEYS) {
        const int64_t count = std::min<int64_t>(KEYS, end - start);
        const int64_t at = held + start * DIM;
        const Half* keys = whole<DIM>(call.k + at, call.k_scale + at / DIM, count, work.block[0]);
        const Half* values = whole<DIM>(call.v + at, call.v_scale + at / DIM, count, work.block[1]);
        turn(values, count, work);
        for (int64_t first = 0; first < queries; first += QUERIES) {
            const int64_t from = block.at + first / call.group;  // the positions of these queries
            const int64_t to = block.at + (std::min(first + QUERIES, queries) - 1) / call.group;
            if (start > to || start + KEYS <= from + 1 - call.window) continue;
            const int64_t seen = std::min<int64_t>(KEYS, (to - start + 2 * SIDE) / (2 * SIDE) * 2 * SIDE);
            compare<DIM>(keys, seen, &work.query[first / SIDE], work);
            const bool all = start + seen <= from + 1 && start > to - call.window;
            for (int half = 0; half < 2; half++) {
                const int64_t here = first + half * SIDE;
                Sight sight;
                for (int64_t i = 0; i < SIDE && !all; i++) {
                    sight.end[i] = int32_t(block.at + std::min(here + i, queries - 1) / call.group + 1);
                    sight.first[i] = int32_t(std::max<int64_t>(0, sight.end[i] - call.window));
                }
                weigh(call, half, int32_t(start), seen, all ? nullptr : &sight, work.most + here, work.total + here,
                      &work.out[here / SIDE][0][0], work);
            }
            gather(&work.out[first / SIDE], seen, work);
        }
    }
    give(call, block, work);
}

// where [4, rows]: the rows, their first tokens' places in the call, how many they feed, and how many they then hold.
template <int DIM, typename T>
bool all(const Call<T>& call, const int64_t* where, int64_t rows) {
    const int64_t tokens = std::min(TOKENS, MOST / call.group);
    int64_t blocks = 0;
    for (int64_t r = 0; r < rows; r++) blocks += (where[2 * rows + r] + tokens - 1) / tokens;
    bool enough = true;
#pragma omp parallel
    {
        auto* work = (Work<DIM>*)std::aligned_alloc(64, sizeof(Work<DIM>));
        if (!work) {
#pragma omp atomic write
            enough = false;
        }
        Tiles own;
#pragma omp for schedule(dynamic)
        for (int64_t i = 0; i < blocks * call.heads; i++) {
            int64_t row = 0, first = (blocks - 1 - i / call.heads) * tokens;  // those with the most keys first
            for (; first >= (where[2 * rows + row] + tokens - 1) / tokens * tokens; row++)
                first -= (where[2 * rows + row] + tokens - 1) / tokens * tokens;
            const int64_t fed = where[2 * rows + row], old = where[3 * rows + row] - fed;
            if (work)
                attend(call, {where[row], i % call.heads, where[rows + row] + first, old + first,
                              std::min(tokens, fed - first)}, *work);
        }
        std::free(work);
    }
    return enough;
}

template <typename T>
bool all(const Call<T>& call, const int64_t* where, int64_t rows, int64_t dim) {
    if (dim == 32) return all<32>(call, where, rows);
    if (dim == 64) return all<64>(call, where, rows);
    if (dim == 96) return all<96>(call, where, rows);
    if (dim == 128) return all<128>(call, where, rows);
    if (dim == 256) return all<256>(call, where, rows);
    return false;
}

}  // namespace
#endif

// q and out [N, heads * group, dim]; k and v as they lie in the cache, with scales where they are of 8 bits, one where there
// are dim of the numbers. False: there is no memory, or no such kernel.
extern "C" bool prefill(const Half* q, const void* k, const void* v, const Half* k_scale, const Half* v_scale, Half* out,
                        const int64_t* where, int64_t rows, int64_t heads, int64_t group, int64_t dim, int64_t row_stride,
                        int64_t head_stride, int64_t window, float scale) {
#ifdef LLAMA_INFER_TILES
    const auto of = [&](auto number) {
        using T = decltype(number);
        const Call<T> call{q,   (const T*)k, (const T*)v, k_scale,     v_scale, out,
                           heads, group,     row_stride,  head_stride, window,  scale};
        return all(call, where, rows, dim);
    };
    return k_scale ? of(int8_t()) : of(Half());
#endif
    return false;
}
