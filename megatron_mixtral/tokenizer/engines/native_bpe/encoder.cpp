#include "encoder.h"

#include <algorithm>
#include <cstring>
#include <string_view>
#include <utility>

#include "trim.h"
#include "utf8.h"

namespace bpe {
namespace {

// In the vocabulary a space is written as U+2581. Here both are a space, in the vocabulary and in the text.
constexpr std::string_view kMetaspace = "\xE2\x96\x81";

}  // namespace

Encoder::Encoder(Vocabulary vocabulary, Prefix prefix)
    : vocabulary_(std::move(vocabulary)), merger_(vocabulary_), prefix_(prefix), cache_(size_t{1} << kCacheBits) {
    static_assert(sizeof(Slot) == 64, "a slot is one cache line");
}

// The text with a space for every U+2581: itself where it has none, as nearly all texts, else a copy.
std::string_view Encoder::with_spaces(std::string_view text) {
    size_t found = text.find(kMetaspace);
    if (found == std::string_view::npos) return text;
    text_.clear();
    for (; found != std::string_view::npos; found = text.find(kMetaspace)) {
        text_.append(text.substr(0, found)).push_back(' ');
        text.remove_prefix(found + kMetaspace.size());
    }
    return text_.append(text);
}

// The end of a word whose last character so far is `left`, before `at`.
const uint8_t* Encoder::end_of_word(uint32_t left, const uint8_t* at, const uint8_t* end) const {
    while (at < end) {
        const uint8_t* behind = at;
        const uint32_t right = next_code_point(behind, end);
        if (!vocabulary_.can_join(left, right)) break;
        at = behind;
        left = right;
    }
    return at;
}

Encoder::Slot& Encoder::slot_of(const Word& word, size_t length) {
    const uint64_t hash = word[0] * 0x9E3779B97F4A7C15u + word[1] * 0xC2B2AE3D27D4EB4Fu +
                          word[2] * 0x165667B19E3779F9u + word[3] * 0xD6E8FEB86659FD93u + length;
    return cache_[mixed(hash) >> (64 - kCacheBits)];
}

template <class Id>
Id* Encoder::append_word(const uint8_t* at, size_t length, Id* out) {
    Word word = {};
    Slot* slot = nullptr;
    if (length <= kCachedBytes) {
        std::memcpy(word, at, length);
        slot = &slot_of(word, length);
        if (slot->length == length && std::memcmp(slot->word, word, sizeof word) == 0) {
            // All of them: a loop of a fixed length is faster than one over `count`.
            for (size_t i = 0; i < kCachedIds; ++i) out[i] = static_cast<Id>(slot->ids[i]);
            return out + slot->count;
        }
    }
    ids_.clear();
    merger_.encode(at, length, ids_);
    if (slot && ids_.size() <= kCachedIds) {
        std::memcpy(slot->word, word, sizeof word);
        std::copy(ids_.begin(), ids_.end(), slot->ids);
        slot->length = static_cast<uint8_t>(length);
        slot->count = static_cast<uint8_t>(ids_.size());
    }
    return std::transform(ids_.begin(), ids_.end(), out, [](uint32_t id) { return static_cast<Id>(id); });
}

template <class Id>
size_t Encoder::encode(const char* bytes, size_t length, Id* out) {
    if (length == 0) return 0;
    const std::string_view text = with_spaces(std::string_view(bytes, length));
    const uint8_t* at = reinterpret_cast<const uint8_t*>(text.data());
    const uint8_t* const end = at + text.size();
    Id* const first = out;
    if (prefix_ == Prefix::kAlways || (prefix_ == Prefix::kUnlessSpace && *at != ' ')) {
        const uint8_t* const behind = end_of_word(' ', at, end);
        first_word_.assign(1, ' ');
        first_word_.insert(first_word_.end(), at, behind);
        out = append_word(first_word_.data(), first_word_.size(), out);
        at = behind;
    }
    while (at < end) {
        const uint8_t* const word = at;
        const uint32_t character = next_code_point(at, end);
        at = end_of_word(character, at, end);
        out = append_word(word, static_cast<size_t>(at - word), out);
    }
    trim(text_);
    trim(first_word_);
    trim(ids_);
    return static_cast<size_t>(out - first);
}

template size_t Encoder::encode(const char*, size_t, uint16_t*);
template size_t Encoder::encode(const char*, size_t, int32_t*);

}  // namespace bpe
