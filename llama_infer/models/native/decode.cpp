// Attention of single new tokens by tiles, on keys and values in bfloat16.

#include "decode.h"

#ifdef LLAMA_INFER_TILES
namespace {

// Lays a head's query out. Returns what scores are to be multiplied with.
template <int DIM, int HEADS>
float lay(const Half* q, int64_t h, Work<Half, DIM, HEADS>& work) {
    for (int d = 0; d < DIM; d += 2) std::memcpy(&work.query[0][d / 2][h], q + d, 4);
    return 1;
}

// The products of sixteen keys, or twice as many: tiles 0 and 1, 16 keys times HEADS, of 2, which is queries, and 3 and 4,
// keys.
template <int DIM, int HEADS, typename Line>
void multiply(const Line& line, int64_t t, bool both, Work<Half, DIM, HEADS>& work) {
    _tile_zero(0);
    _tile_zero(1);
    for (int d = 0; d < DIM; d += 32) {
        _tile_loadd(2, work.query[0][d / 2], HEADS * 4);
        _tile_loadd(3, line(t) + d, DIM * sizeof(Half));
        _tile_dpbf16ps(0, 3, 2);
        if (both) {
            _tile_loadd(4, line(t + SIDE) + d, DIM * sizeof(Half));
            _tile_dpbf16ps(1, 4, 2);
        }
    }
    _tile_stored(0, work.weight[t], HEADS * 4);
    if (both) _tile_stored(1, work.weight[t + SIDE], HEADS * 4);
}

// Sixteen scores, from key `t` on, before what is the same for all keys.
template <int DIM, int HEADS>
Lanes score(int64_t t, const Work<Half, DIM, HEADS>& work) {
    return load(work.weight[t]);
}

// The values of `count` keys, each times its weight, are added to what has been gathered. Keys that will be needed are
// asked for.
template <int DIM, int HEADS>
void gather(const Half* values, int64_t count, int64_t heads, const Half* soon, Work<Half, DIM, HEADS>& work) {
    gather<DIM>(values, count, heads, work.weight[0], 1, HEADS, work.sum, soon);
}

template <int DIM, int HEADS>
float scales(const Call<Half>&, int64_t, int64_t, Work<Half, DIM, HEADS>&) {
    return 0;
}

}  // namespace

DECODE(uint16_t, 32) DECODE(uint16_t, 64) DECODE(uint16_t, 96) DECODE(uint16_t, 128) DECODE(uint16_t, 256)
#endif
