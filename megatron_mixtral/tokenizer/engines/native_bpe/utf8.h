// UTF-8, one character at a time. The text comes from Python strings and is valid; what is not would give wrong
// characters, but is never read beyond its end.
#pragma once

#include <cstddef>
#include <cstdint>

namespace bpe {

// The code point at `text` < `end`; moves `text` behind it.
inline uint32_t next_code_point(const uint8_t*& text, const uint8_t* end) {
    const uint32_t lead = *text++;
    if (lead < 0x80) return lead;
    const int more = lead < 0xE0 ? 1 : lead < 0xF0 ? 2 : 3;
    uint32_t code_point = lead & (0x3Fu >> more);
    for (int i = 0; i < more && text < end; ++i) code_point = code_point << 6 | (*text++ & 0x3Fu);
    return code_point;
}

// Writes the UTF-8 form of a code point; returns its length, 1 to 4.
inline size_t encode_utf8(uint32_t code_point, uint8_t bytes[4]) {
    if (code_point < 0x80) {
        bytes[0] = static_cast<uint8_t>(code_point);
        return 1;
    }
    const size_t length = code_point < 0x800 ? 2 : code_point < 0x10000 ? 3 : 4;
    for (size_t i = length - 1; i > 0; --i) {
        bytes[i] = static_cast<uint8_t>(0x80 | (code_point & 0x3F));
        code_point >>= 6;
    }
    bytes[0] = static_cast<uint8_t>((0xF00u >> length & 0xFF) | code_point);
    return length;
}

}  // namespace bpe
