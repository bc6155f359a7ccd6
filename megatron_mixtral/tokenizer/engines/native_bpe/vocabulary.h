// What the tokenizer file says, in the form in which encoding asks for it.
//
// A *symbol* is what byte-pair encoding joins: at first the characters of a text, then ever longer pieces. Symbols below
// `vocab_size` are the ids of the tokenizer. Symbols from there on are characters that take part in merges without being
// pieces themselves; what is left of them at the end is written as bytes, as is every character that is no symbol.
#pragma once

#include <cstddef>
#include <cstdint>
#include <vector>

#include "flat_map.h"

namespace bpe {

using Symbol = uint32_t;

constexpr Symbol kNoSymbol = ~Symbol{0};
constexpr uint32_t kLastCodePoint = 0x10FFFF;

struct CharacterEntry {
    uint32_t code_point;
    Symbol symbol;
};

struct MergeEntry {
    Symbol left, right;
    uint32_t rank;  // the lowest of all possible merges is done first; of equal ones, the leftmost
    Symbol result;
};

// Two characters that a merge may bring together: the last of its left symbol, the first of its right one.
struct JoinEntry {
    uint32_t left, right;
};

struct Merge {
    uint32_t rank;
    Symbol result;
};

constexpr Merge kNoMerge{~uint32_t{0}, kNoSymbol};  // after all others

class Vocabulary {
public:
    // `byte_ids`: the ids of the 256 byte pieces. Throws std::invalid_argument for numbers outside their ranges, so that
    // no table given from outside can make encoding read or write where it must not.
    Vocabulary(uint32_t vocab_size, const std::vector<CharacterEntry>& characters,
               const std::vector<MergeEntry>& merges, const std::vector<JoinEntry>& joins,
               const std::vector<uint32_t>& byte_ids);

    uint32_t size() const { return vocab_size_; }

    Symbol character(uint32_t code_point) const {
        return code_point < symbols_.size() ? symbols_[code_point] : kNoSymbol;
    }

    // How `left` and `right` are merged, or kNoMerge.
    Merge merge_of(Symbol left, Symbol right) const {
        const uint64_t* value = merges_.find(pair_key(left, right));
        return value ? Merge{static_cast<uint32_t>(*value >> 32), static_cast<Symbol>(*value)} : kNoMerge;
    }

    // Whether any merge can bring the neighbours `left` and `right` into one piece. Where none can, what is left and
    // right of this place is encoded independently.
    bool can_join(uint32_t left, uint32_t right) const {
        if ((left | right) < kAscii) return ascii_joins_[left * kAscii + right];
        return joins_.find(pair_key(left, right)) != nullptr;
    }

    // Appends the ids of what encoding left of a text: a piece is one id, a character that is no piece several.
    void append_ids(Symbol symbol, std::vector<uint32_t>& ids) const {
        if (symbol < vocab_size_) {
            ids.push_back(symbol);
        } else {
            append_bytes(virtual_characters_[symbol - vocab_size_], ids);
        }
    }

    // Appends the byte pieces of the UTF-8 form of a character.
    void append_bytes(uint32_t code_point, std::vector<uint32_t>& ids) const;

private:
    static constexpr uint32_t kAscii = 128;

    uint32_t vocab_size_;
    std::vector<Symbol> symbols_;               // by code point
    std::vector<uint32_t> virtual_characters_;  // code points of the symbols from vocab_size_ on
    std::vector<uint32_t> byte_ids_;
    std::vector<uint8_t> ascii_joins_;
    FlatMap merges_, joins_;
};

}  // namespace bpe
