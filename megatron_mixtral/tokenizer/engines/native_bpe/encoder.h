// Documents to ids. A document is cut into words, between characters that no merge can bring together; words are
// encoded independently of each other, and most of them are found in a cache.
#pragma once

#include <cstddef>
#include <cstdint>
#include <string>
#include <string_view>
#include <vector>

#include "merger.h"
#include "vocabulary.h"

namespace bpe {

// What is put before a document that is not empty: nothing, a space, or a space unless there is one already.
enum class Prefix : int { kNone = 0, kAlways = 1, kUnlessSpace = 2 };

class Encoder {
public:
    Encoder(Vocabulary vocabulary, Prefix prefix);
    Encoder(const Encoder&) = delete;  // merger_ refers to vocabulary_

    // How many ids `out` of `encode` must have room for: one for each byte and the prefix, and what is written in excess.
    static size_t capacity(size_t text_bytes) { return text_bytes + 1 + kCachedIds; }

    // Writes the ids of a text (UTF-8, fewer than 2^31 bytes) to `out`; returns their number. `Id` is uint16_t, for
    // vocabularies of at most 65,536, or int32_t. What lies behind the ids in `out` up to `capacity` is overwritten.
    template <class Id>
    size_t encode(const char* bytes, size_t length, Id* out);

    const Vocabulary& vocabulary() const { return vocabulary_; }

private:
    static constexpr size_t kCachedBytes = 32;  // longest word in the cache
    static constexpr size_t kCachedIds = 7;
    static constexpr int kCacheBits = 16;

    using Word = uint64_t[kCachedBytes / 8];  // bytes of a word, zero behind its end

    // One line of the processor's cache.
    struct alignas(64) Slot {
        Word word;
        uint32_t ids[kCachedIds];
        uint8_t length;  // of the word; 0: the slot is free
        uint8_t count;   // of the ids
    };

    std::string_view with_spaces(std::string_view text);
    const uint8_t* end_of_word(uint32_t left, const uint8_t* at, const uint8_t* end) const;
    Slot& slot_of(const Word& word, size_t length);
    template <class Id>
    Id* append_word(const uint8_t* word, size_t length, Id* out);

    Vocabulary vocabulary_;
    Merger merger_;
    Prefix prefix_;
    std::vector<Slot> cache_;          // 4 MiB; a word takes the place of the one before it in its slot
    std::string text_;                 // a document that had to be copied
    std::vector<uint8_t> first_word_;  // of a document, with the prefix
    std::vector<uint32_t> ids_;        // of a word that was not in the cache
};

}  // namespace bpe
