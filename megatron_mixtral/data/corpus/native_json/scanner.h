// Reads a line that is one JSON object (RFC 8259) and takes the texts of some of its keys.
//
// It accepts only what is certain: whatever is unusual (a key that occurs twice, half of a surrogate pair, deep nesting)
// or wrong makes it decline the line, which then goes another, slower way. So it needs no words for errors.
#pragma once

#include <cstddef>
#include <cstdint>
#include <string>
#include <string_view>
#include <vector>

namespace json {

class Scanner {
public:
    explicit Scanner(std::vector<std::string> keys);

    // Scans `line`, without its end. False: declined. The texts are then undefined.
    bool scan(std::string_view line);

    // The text of the k-th key in the line last scanned, escapes resolved; its bytes are UTF-8 if those of the line are.
    std::string_view text(size_t k) const {
        return {reinterpret_cast<const char*>(buffer_.data()) + texts_[k].start, texts_[k].length};
    }

    // The strings of that line with bytes above 127 that are not in `text`: whether these are UTF-8 is left to the caller.
    const std::vector<std::string_view>& unchecked() const { return unchecked_; }

private:
    struct Text {
        size_t start, length;  // in buffer_
        bool found;
    };

    bool skip_space();
    bool take(char character);
    bool scan_member();
    bool read_text(Text& text);
    bool read_escape(uint8_t*& out);
    bool read_code_unit(uint32_t& unit);
    bool skip_string(std::string_view& content);
    bool skip_value(int depth);
    bool skip_container(int depth, bool is_object);
    bool skip_number();
    bool skip_digits();
    bool skip_word(std::string_view word);

    std::vector<std::string> keys_;
    std::vector<Text> texts_;
    std::vector<std::string_view> unchecked_;
    std::vector<uint8_t> buffer_;
    size_t used_ = 0;  // of buffer_
    const uint8_t* at_ = nullptr;
    const uint8_t* end_ = nullptr;
};

}  // namespace json
