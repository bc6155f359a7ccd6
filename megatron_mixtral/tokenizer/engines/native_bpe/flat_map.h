// A hash table of 64-bit keys and values that is filled once and then only read: one array, linear probing, no erasing.
// std::unordered_map costs two dependent cache misses per look-up, and look-ups are most of what a cache miss costs here.
#pragma once

#include <cstddef>
#include <cstdint>
#include <vector>

namespace bpe {

inline uint64_t pair_key(uint32_t first, uint32_t second) { return uint64_t{first} << 32 | second; }

// Spreads all bits of `key` over the upper bits of the result (a multiplication by 2^64 / golden ratio, twice).
inline uint64_t mixed(uint64_t key) {
    key *= 0x9E3779B97F4A7C15u;
    key ^= key >> 32;
    return key * 0x9E3779B97F4A7C15u;
}

class FlatMap {
public:
    // Room for `count` keys at a load of at most one half.
    explicit FlatMap(size_t count) {
        int bits = 4;
        while ((size_t{1} << bits) < 2 * count) ++bits;
        shift_ = 64 - bits;
        mask_ = (size_t{1} << bits) - 1;
        slots_.assign(mask_ + 1, Slot{kEmpty, 0});
    }

    // A key that is there already gets the new value. The key 2^64 - 1 cannot be stored.
    void set(uint64_t key, uint64_t value) {
        Slot& slot = slots_[index_of(key)];
        slot = Slot{key, value};
    }

    // The value of `key`, or null.
    const uint64_t* find(uint64_t key) const {
        const Slot& slot = slots_[index_of(key)];
        return slot.key == key ? &slot.value : nullptr;
    }

private:
    struct Slot {
        uint64_t key, value;
    };
    static constexpr uint64_t kEmpty = ~uint64_t{0};

    // Where `key` is, or the empty slot where it would go.
    size_t index_of(uint64_t key) const {
        size_t index = mixed(key) >> shift_;
        while (slots_[index].key != key && slots_[index].key != kEmpty) index = (index + 1) & mask_;
        return index;
    }

    int shift_;
    size_t mask_;
    std::vector<Slot> slots_;
};

}  // namespace bpe
