// Memory that a thread keeps from call to call. Included by the kernels beside it.

#pragma once

#include <cstddef>
#include <cstdlib>
#include <memory>

namespace {

// To be declared `static thread_local`.
struct Scratch {
    std::unique_ptr<void, void (*)(void*)> held{nullptr, std::free};
    size_t size = 0;

    // Null where there is none to be had.
    template <typename T>
    T* at_least(size_t count) {
        const size_t bytes = count * sizeof(T);
        if (bytes > size) {
            size = (bytes + 4095) / 4096 * 4096;
            held.reset(std::aligned_alloc(4096, size));
            if (!held) size = 0;
        }
        return (T*)held.get();
    }
};

}  // namespace
