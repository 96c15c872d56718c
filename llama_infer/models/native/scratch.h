// Memory that a thread keeps from call to call. Included by the kernels beside it.

#pragma once

#include <cstddef>
#include <cstdlib>

namespace {

// One piece of each type; null: there is none.
template <typename T>
T* scratch(size_t count) {
    static thread_local struct Buffer {
        T* at = nullptr;
        size_t count = 0;
        ~Buffer() { std::free(at); }
    } buffer;
    if (buffer.count < count) {
        std::free(buffer.at);
        buffer.at = (T*)std::aligned_alloc(64, (count * sizeof(T) + 63) / 64 * 64);
        buffer.count = buffer.at ? count : 0;
    }
    return buffer.at;
}

}  // namespace
