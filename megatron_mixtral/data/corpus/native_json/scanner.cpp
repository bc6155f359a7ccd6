#include "scanner.h"

#include <cstring>
#include <utility>

namespace json {
namespace {

constexpr int kDeepest = 64;
constexpr size_t kStride = 8;

constexpr uint64_t repeated(uint8_t byte) { return 0x0101010101010101u * byte; }

// Eight bytes -> 0 where all of them are plain characters of a string, else a word whose lowest bit that is set lies in
// the first byte that is not: a quote, a backslash, a control character. (x - 1) & ~x has the high bit of a byte set where
// the byte is 0, and perhaps in bytes above such a one, which do not matter.
inline uint64_t specials(uint64_t bytes) {
    const uint64_t quote = bytes ^ repeated('"'), backslash = bytes ^ repeated('\\');
    const uint64_t found = ((quote - repeated(1)) & ~quote) | ((backslash - repeated(1)) & ~backslash) |
                           ((bytes - repeated(0x20)) & ~bytes);
    return found & repeated(0x80);
}

inline bool is_special(uint8_t byte) { return byte == '"' || byte == '\\' || byte < 0x20; }

// The first byte as the lowest one, on every machine; compilers make one load of it.
inline uint64_t eight_bytes(const uint8_t* at) {
    uint64_t bytes = 0;
    for (size_t i = 0; i < kStride; ++i) bytes |= uint64_t{at[i]} << (8 * i);
    return bytes;
}

// How many bytes lie below the lowest bit that is set.
inline size_t bytes_below(uint64_t mask) {
#if defined(__GNUC__)
    return static_cast<size_t>(__builtin_ctzll(mask)) / 8;
#else
    size_t count = 0;
    for (; !(mask & 0xFF); mask >>= 8) ++count;
    return count;
#endif
}

inline bool is_digit(uint8_t byte) { return byte >= '0' && byte <= '9'; }

void append_utf8(uint32_t code_point, uint8_t*& out) {
    if (code_point < 0x80) {
        *out++ = static_cast<uint8_t>(code_point);
        return;
    }
    const int more = code_point < 0x800 ? 1 : code_point < 0x10000 ? 2 : 3;
    *out++ = static_cast<uint8_t>((0xF0u << (3 - more) & 0xFF) | code_point >> (6 * more));
    for (int i = more - 1; i >= 0; --i) *out++ = static_cast<uint8_t>(0x80 | (code_point >> (6 * i) & 0x3F));
}

}  // namespace

Scanner::Scanner(std::vector<std::string> keys) : keys_(std::move(keys)), texts_(keys_.size()) {}

bool Scanner::scan(std::string_view line) {
    at_ = reinterpret_cast<const uint8_t*>(line.data());
    end_ = at_ + line.size();
    // Texts are not longer than the line; eight bytes are copied at a time.
    if (buffer_.size() < line.size() + kStride) buffer_.resize(line.size() + kStride);
    used_ = 0;
    unchecked_.clear();
    for (Text& text : texts_) text.found = false;
    skip_space();
    if (!take('{')) return false;
    do {
        if (!scan_member()) return false;
    } while (take(','));
    if (!take('}') || at_ < end_) return false;
    for (const Text& text : texts_) {
        if (!text.found) return false;
    }
    return true;
}

// Always true, for use in conditions.
bool Scanner::skip_space() {
    while (at_ < end_ && (*at_ == ' ' || *at_ == '\t' || *at_ == '\r' || *at_ == '\n')) ++at_;
    return true;
}

// Takes a character and the white space behind it.
bool Scanner::take(char character) {
    if (at_ == end_ || *at_ != static_cast<uint8_t>(character)) return false;
    ++at_;
    return skip_space();
}

bool Scanner::scan_member() {
    const uint8_t* const start = at_;
    std::string_view key;
    if (!skip_string(key)) return false;
    if (key.find('\\') != key.npos) {  // once more, to resolve the escapes; the buffer is free from here on
        at_ = start;
        Text resolved;
        if (!read_text(resolved)) return false;
        used_ = resolved.start;
        key = {reinterpret_cast<const char*>(buffer_.data()) + resolved.start, resolved.length};
    }
    if (!skip_space() || !take(':')) return false;
    for (size_t k = 0; k < keys_.size(); ++k) {
        if (key == keys_[k]) return !texts_[k].found && read_text(texts_[k]) && skip_space();
    }
    return skip_value(0);
}

// A string whose content is copied to the buffer.
bool Scanner::read_text(Text& text) {
    if (at_ == end_ || *at_++ != '"') return false;
    uint8_t* const start = buffer_.data() + used_;
    uint8_t* out = start;
    for (;;) {
        while (end_ - at_ >= static_cast<ptrdiff_t>(kStride)) {
            const uint64_t found = specials(eight_bytes(at_));
            std::memcpy(out, at_, kStride);
            const size_t plain = found ? bytes_below(found) : kStride;
            at_ += plain;
            out += plain;
            if (found) break;
        }
        while (at_ < end_ && !is_special(*at_)) *out++ = *at_++;
        if (at_ == end_) return false;
        const uint8_t special = *at_++;
        if (special == '"') break;
        if (special != '\\' || !read_escape(out)) return false;
    }
    text = Text{used_, static_cast<size_t>(out - start), true};
    used_ += text.length;
    return true;
}

// What follows a backslash.
bool Scanner::read_escape(uint8_t*& out) {
    if (at_ == end_) return false;
    switch (*at_++) {
        case '"': *out++ = '"'; return true;
        case '\\': *out++ = '\\'; return true;
        case '/': *out++ = '/'; return true;
        case 'b': *out++ = '\b'; return true;
        case 'f': *out++ = '\f'; return true;
        case 'n': *out++ = '\n'; return true;
        case 'r': *out++ = '\r'; return true;
        case 't': *out++ = '\t'; return true;
        case 'u': break;
        default: return false;
    }
    uint32_t unit, low;
    if (!read_code_unit(unit)) return false;
    if (unit >= 0xD800 && unit < 0xE000) {  // the first half of a pair: the second must follow
        if (unit >= 0xDC00 || end_ - at_ < 2 || at_[0] != '\\' || at_[1] != 'u') return false;
        at_ += 2;
        if (!read_code_unit(low) || low < 0xDC00 || low >= 0xE000) return false;
        unit = 0x10000 + ((unit - 0xD800) << 10) + (low - 0xDC00);
    }
    append_utf8(unit, out);
    return true;
}

// Four hexadecimal digits.
bool Scanner::read_code_unit(uint32_t& unit) {
    if (end_ - at_ < 4) return false;
    unit = 0;
    for (int i = 0; i < 4; ++i) {
        const uint8_t digit = *at_++, letter = digit | 0x20;
        if (is_digit(digit)) {
            unit = unit << 4 | (digit - '0');
        } else if (letter >= 'a' && letter <= 'f') {
            unit = unit << 4 | (letter - 'a' + 10);
        } else {
            return false;
        }
    }
    return true;
}

// A string that is not copied; `content` is what lies between its quotes.
bool Scanner::skip_string(std::string_view& content) {
    if (at_ == end_ || *at_++ != '"') return false;
    const uint8_t* const start = at_;
    uint64_t all = 0;  // also of some bytes behind the string, which does no harm
    for (;;) {
        while (end_ - at_ >= static_cast<ptrdiff_t>(kStride)) {
            const uint64_t bytes = eight_bytes(at_), found = specials(bytes);
            all |= bytes;
            at_ += found ? bytes_below(found) : kStride;
            if (found) break;
        }
        while (at_ < end_ && !is_special(*at_)) all |= *at_++;
        if (at_ == end_) return false;
        const uint8_t special = *at_++;
        if (special == '"') break;
        if (special != '\\' || at_ == end_) return false;
        const uint8_t escaped = *at_++;
        uint32_t unit;
        if (escaped == 'u' ? !read_code_unit(unit) : !std::strchr("\"\\/bfnrt", escaped) || !escaped) return false;
    }
    content = {reinterpret_cast<const char*>(start), static_cast<size_t>(at_ - 1 - start)};
    if (all & repeated(0x80)) unchecked_.push_back(content);
    return true;
}

// Any value, and the white space behind it.
bool Scanner::skip_value(int depth) {
    if (at_ == end_ || depth > kDeepest) return false;
    std::string_view content;
    switch (*at_) {
        case '"': return skip_string(content) && skip_space();
        case '{': return skip_container(depth, true);
        case '[': return skip_container(depth, false);
        case 't': return skip_word("true");
        case 'f': return skip_word("false");
        case 'n': return skip_word("null");
        default: return skip_number();
    }
}

bool Scanner::skip_container(int depth, bool is_object) {
    const char close = is_object ? '}' : ']';
    std::string_view key;
    take(is_object ? '{' : '[');
    if (take(close)) return true;
    do {
        if (is_object && !(skip_string(key) && skip_space() && take(':'))) return false;
        if (!skip_value(depth + 1)) return false;
    } while (take(','));
    return take(close);
}

bool Scanner::skip_digits() {
    const uint8_t* const start = at_;
    while (at_ < end_ && is_digit(*at_)) ++at_;
    return at_ > start;
}

bool Scanner::skip_number() {
    if (at_ < end_ && *at_ == '-') ++at_;
    if (at_ < end_ && *at_ == '0') {
        ++at_;
    } else if (!skip_digits()) {
        return false;
    }
    if (at_ < end_ && *at_ == '.') {
        ++at_;
        if (!skip_digits()) return false;
    }
    if (at_ < end_ && (*at_ == 'e' || *at_ == 'E')) {
        ++at_;
        if (at_ < end_ && (*at_ == '+' || *at_ == '-')) ++at_;
        if (!skip_digits()) return false;
    }
    return skip_space();
}

bool Scanner::skip_word(std::string_view word) {
    if (static_cast<size_t>(end_ - at_) < word.size() || std::memcmp(at_, word.data(), word.size()) != 0) return false;
    at_ += word.size();
    return skip_space();
}

}  // namespace json
