// Buffers are kept from one use to the next, but not at the size that one huge document or word gave them.
#pragma once

#include <cstddef>

namespace bpe {

constexpr size_t kKeptBytes = size_t{1} << 22;

template <class Buffer>
void trim(Buffer& buffer) {
    if (buffer.capacity() * sizeof buffer[0] > kKeptBytes) Buffer().swap(buffer);
}

}  // namespace bpe
