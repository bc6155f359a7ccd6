#include "encoder.h"

#include <algorithm>
#include <cstring>
#include <string_view>
#include <utility>

#include "utf8.h"

namespace bpe {
namespace {

constexpr size_t kKeptBytes = size_t{1} << 24;  // of buffers, for the next document

// In the vocabulary a space is written as U+2581. Here both are a space, in the vocabulary and in the text.
constexpr std::string_view kMetaspace = "\xE2\x96\x81";

}  // namespace

Encoder::Encoder(Vocabulary vocabulary, Prefix prefix)
    : vocabulary_(std::move(vocabulary)), merger_(vocabulary_), prefix_(prefix), cache_(size_t{1} << kCacheBits) {
    static_assert(sizeof(Slot) == 64, "a slot is one cache line");
}

// Copies a document to `text_` as the tokenizer's normalizer would leave it.
void Encoder::prepare(const char* text, size_t length) {
    std::string_view rest(text, length);
    const bool has_space = length > 0 && (text[0] == ' ' || rest.substr(0, kMetaspace.size()) == kMetaspace);
    const bool prefixed = length > 0 && (prefix_ == Prefix::kAlways || (prefix_ == Prefix::kUnlessSpace && !has_space));
    if (text_.capacity() > kKeptBytes) std::vector<uint8_t>().swap(text_);
    text_.clear();
    text_.reserve(length + 1);
    if (prefixed) text_.push_back(' ');
    for (size_t found; (found = rest.find(kMetaspace)) != std::string_view::npos;) {
        text_.insert(text_.end(), rest.begin(), rest.begin() + found);
        text_.push_back(' ');
        rest.remove_prefix(found + kMetaspace.size());
    }
    text_.insert(text_.end(), rest.begin(), rest.end());
}

const uint8_t* Encoder::end_of_word(const uint8_t* at, const uint8_t* end) const {
    uint32_t left = next_code_point(at, end);
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
    out = std::transform(ids_.begin(), ids_.end(), out, [](uint32_t id) { return static_cast<Id>(id); });
    if (ids_.capacity() * sizeof ids_[0] > kKeptBytes) std::vector<uint32_t>().swap(ids_);
    return out;
}

template <class Id>
size_t Encoder::encode(const char* text, size_t length, Id* out) {
    prepare(text, length);
    const uint8_t* at = text_.data();
    const uint8_t* const end = at + text_.size();
    Id* const first = out;
    while (at < end) {
        const uint8_t* const word = at;
        at = end_of_word(at, end);
        out = append_word(word, static_cast<size_t>(at - word), out);
    }
    return static_cast<size_t>(out - first);
}

template size_t Encoder::encode(const char*, size_t, uint16_t*);
template size_t Encoder::encode(const char*, size_t, int32_t*);

}  // namespace bpe
