#include "merger.h"

#include <algorithm>
#include <functional>

#include "trim.h"
#include "utf8.h"

namespace bpe {
namespace {

constexpr uint32_t kNone = ~uint32_t{0};

}  // namespace

void Merger::encode(const uint8_t* word, size_t length, std::vector<uint32_t>& ids) {
    const uint8_t* const end = word + length;
    symbols_.clear();
    while (word < end) {
        const uint32_t code_point = next_code_point(word, end);
        const Symbol symbol = vocabulary_.character(code_point);
        if (symbol == kNoSymbol) {  // then it is the only character
            vocabulary_.append_bytes(code_point, ids);
            return;
        }
        symbols_.push_back(symbol);
    }
    if (symbols_.size() <= kShort) {
        merge_short();
    } else {
        merge_long();
    }
    for (Symbol symbol : symbols_) vocabulary_.append_ids(symbol, ids);
    trim(symbols_);
}

void Merger::merge_short() {
    const auto merge_at = [this](size_t left) { return vocabulary_.merge_of(symbols_[left], symbols_[left + 1]); };
    merges_.clear();
    for (size_t i = 0; i + 1 < symbols_.size(); ++i) merges_.push_back(merge_at(i));
    while (!merges_.empty()) {
        const auto best = std::min_element(merges_.begin(), merges_.end(),
                                           [](const Merge& a, const Merge& b) { return a.rank < b.rank; });
        if (best->rank == kNoMerge.rank) return;
        const size_t at = static_cast<size_t>(best - merges_.begin());
        symbols_[at] = best->result;
        symbols_.erase(symbols_.begin() + at + 1);
        merges_.erase(best);
        if (at > 0) merges_[at - 1] = merge_at(at - 1);
        if (at < merges_.size()) merges_[at] = merge_at(at);
    }
}

// Puts the merge of the neighbours at `left` and `right` on the heap, if there is one: its rank above the position, so
// that the smallest number is the merge to do first.
void Merger::push(uint32_t left, uint32_t right) {
    const Merge merge = vocabulary_.merge_of(symbols_[left], symbols_[right]);
    if (merge.rank == kNoMerge.rank) return;
    heap_.push_back(pair_key(merge.rank, left));
    std::push_heap(heap_.begin(), heap_.end(), std::greater<>());
}

// A heap of merges, and the symbols as a linked list over their first positions: n log n for n characters. An entry
// whose neighbours have changed since is passed over: now no merge of them has its rank, or one that was pushed as well.
void Merger::merge_long() {
    const uint32_t count = static_cast<uint32_t>(symbols_.size());
    previous_.resize(count);
    next_.resize(count);
    heap_.clear();
    for (uint32_t i = 0; i < count; ++i) {
        previous_[i] = i == 0 ? kNone : i - 1;
        next_[i] = i + 1 == count ? kNone : i + 1;
        if (next_[i] != kNone) push(i, i + 1);
    }
    while (!heap_.empty()) {
        const uint64_t entry = heap_.front();
        std::pop_heap(heap_.begin(), heap_.end(), std::greater<>());
        heap_.pop_back();
        const uint32_t left = static_cast<uint32_t>(entry), right = next_[left];
        if (symbols_[left] == kNoSymbol || right == kNone) continue;
        const Merge merge = vocabulary_.merge_of(symbols_[left], symbols_[right]);
        if (merge.rank != entry >> 32) continue;
        symbols_[left] = merge.result;
        symbols_[right] = kNoSymbol;  // swallowed
        next_[left] = next_[right];
        if (next_[left] != kNone) {
            previous_[next_[left]] = left;
            push(left, next_[left]);
        }
        if (previous_[left] != kNone) push(previous_[left], left);
    }
    symbols_.erase(std::remove(symbols_.begin(), symbols_.end(), kNoSymbol), symbols_.end());
    trim(previous_);
    trim(next_);
    trim(heap_);
}

}  // namespace bpe
