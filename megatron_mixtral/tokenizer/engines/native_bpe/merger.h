// Byte-pair encoding of one word, as the tokenizer's file defines it: of all neighbours that can be merged, those with
// the lowest rank are, the leftmost first, until none can.
#pragma once

#include <cstddef>
#include <cstdint>
#include <vector>

#include "vocabulary.h"

namespace bpe {

class Merger {
public:
    explicit Merger(const Vocabulary& vocabulary) : vocabulary_(vocabulary) {}

    // Appends the ids of a word, of `length` > 0 bytes below 2^31. Of a word with several characters, every character
    // must be a symbol: words that are cut where nothing can join are such.
    void encode(const uint8_t* word, size_t length, std::vector<uint32_t>& ids);

private:
    // Up to here, looking at all neighbours for every merge is faster than a heap.
    static constexpr size_t kShort = 40;

    void merge_short();
    void merge_long();
    void push(uint32_t left, uint32_t right);

    const Vocabulary& vocabulary_;
    std::vector<Symbol> symbols_;
    std::vector<Merge> merges_;              // of a short word: that of symbols i and i + 1
    std::vector<uint32_t> previous_, next_;  // of a long word: the neighbours of symbol i
    std::vector<uint64_t> heap_;
};

}  // namespace bpe
