#include "vocabulary.h"

#include <algorithm>
#include <stdexcept>

#include "utf8.h"

namespace bpe {
namespace {

void require(bool condition, const char* message) {
    if (!condition) throw std::invalid_argument(message);
}

}  // namespace

Vocabulary::Vocabulary(uint32_t vocab_size, const std::vector<CharacterEntry>& characters,
                       const std::vector<MergeEntry>& merges, const std::vector<JoinEntry>& joins,
                       const std::vector<uint32_t>& byte_ids)
    : vocab_size_(vocab_size),
      byte_ids_(byte_ids),
      ascii_joins_(kAscii * kAscii, 0),
      merges_(merges.size()),
      joins_(joins.size()) {
    require(vocab_size > 0 && vocab_size < (1u << 31), "vocab_size must be from 1 to 2^31 - 1");
    require(byte_ids.size() == 256, "there must be 256 byte ids");
    for (uint32_t id : byte_ids) require(id < vocab_size, "a byte id is outside the vocabulary");

    uint32_t last_code_point = 0;
    for (const CharacterEntry& entry : characters) {
        require(entry.code_point <= kLastCodePoint, "a character is no code point");
        last_code_point = std::max(last_code_point, entry.code_point);
    }
    symbols_.assign(size_t{last_code_point} + 1, kNoSymbol);
    for (const CharacterEntry& entry : characters) {
        symbols_[entry.code_point] = entry.symbol;
        if (entry.symbol < vocab_size) continue;
        require(entry.symbol - vocab_size == virtual_characters_.size(),
                "characters that are no pieces must be numbered from vocab_size on, in their order");
        virtual_characters_.push_back(entry.code_point);
    }
    const size_t symbol_count = size_t{vocab_size} + virtual_characters_.size();
    for (const MergeEntry& merge : merges) {
        require(merge.left < symbol_count && merge.right < symbol_count, "a merge joins an unknown symbol");
        require(merge.result < vocab_size, "a merge gives an id outside the vocabulary");
        require(merge.rank != kNoMerge.rank, "a rank must be below 2^32 - 1");
        merges_.set(pair_key(merge.left, merge.right), pair_key(merge.rank, merge.result));
    }
    for (const JoinEntry& join : joins) {
        require(character(join.left) != kNoSymbol && character(join.right) != kNoSymbol,
                "a join is of a character that is no symbol");
        joins_.set(pair_key(join.left, join.right), 1);
        if ((join.left | join.right) < kAscii) ascii_joins_[join.left * kAscii + join.right] = 1;
    }
}

void Vocabulary::append_bytes(uint32_t code_point, std::vector<uint32_t>& ids) const {
    uint8_t bytes[4];
    const size_t length = encode_utf8(code_point, bytes);
    for (size_t i = 0; i < length; ++i) ids.push_back(byte_ids_[bytes[i]]);
}

}  // namespace bpe
