// New tokens written to the slots where they belong.

#include <cstdint>
#include <cstring>

namespace {

constexpr int64_t ALONE = 1 << 18;  // bytes that are not worth a second thread

}  // namespace

// from [tokens, heads, size] to slots [slots, heads, capacity, size]; size and strides in bytes.
extern "C" void place(const char* from, char* to, const int64_t* slots, const int64_t* positions, int64_t tokens,
                      int64_t heads, int64_t size, int64_t token_stride, int64_t head_stride, int64_t slot_stride,
                      int64_t room_stride) {
#pragma omp parallel for schedule(static) if (tokens * heads * size > ALONE)
    for (int64_t t = 0; t < tokens; t++) {
        char* slot = to + slots[t] * slot_stride + positions[t] * size;
        for (int64_t h = 0; h < heads; h++)
            std::memcpy(slot + h * room_stride, from + t * token_stride + h * head_stride, size);
    }
}
