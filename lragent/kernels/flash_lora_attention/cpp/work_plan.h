// Splits a call into work items for the threads: query tokens, a range of keys, and a range of KV heads.
//
// A decode is a sequence with one query token. It is one item over all heads, or several items over ranges of its
// context if there are too few sequences for the threads. Decodes whose page tables begin with the same pages (forks,
// agents of one trajectory, a common prompt) share one item over these pages, so that the pages are read once. So do
// the two rows of a token under `neutral_shared`, over all their keys. A prefill is a sequence with more query tokens.
// It is split into token blocks, and large blocks also by head. Legend: see call.h.
#pragma once

#include <algorithm>
#include <cstdint>
#include <utility>
#include <vector>

namespace lragent {

struct QueryToken {
  int64_t token;     // index in the packed queries
  int64_t position;  // in its sequence; also the last key that the token sees
  int64_t agent;
};

struct WorkItem {
  std::vector<QueryToken> tokens;  // in order of position, or decodes that share the keys
  const int64_t* pages;            // page table row [M]
  int64_t first_key, last_key;     // keys [first_key, last_key); first_key is the first key of a page
  int64_t first_head, last_head;   // KV heads [first_head, last_head)
  bool is_partial;                 // other items hold other keys of the same tokens
  int64_t partial_index = -1;      // index among the partial items

  int64_t cost() const {
    return static_cast<int64_t>(tokens.size()) * (last_key - first_key) * (last_head - first_head);
  }
};

// Read-only view of the inputs of one model step.
struct StepView {
  int64_t page_size, pages_per_seq, heads, gqa_group, window, threads;
  const int64_t *seq_starts, *context_lens, *page_table, *agent_ids;  // [S + 1], [S], [S][M], [T]

  int64_t queries(int64_t s) const { return seq_starts[s + 1] - seq_starts[s]; }
  const int64_t* pages(int64_t s) const { return page_table + s * pages_per_seq; }
  // Query token i of sequence s.
  QueryToken query_token(int64_t s, int64_t i) const {
    const int64_t token = seq_starts[s] + i;
    return {token, context_lens[s] - queries(s) + i, agent_ids[token]};
  }
  // Oldest key that a query at `position` sees, rounded down to the first key of its page.
  int64_t oldest_key(int64_t position) const {
    return window > 0 ? std::max<int64_t>(0, position - window + 1) / page_size * page_size : 0;
  }
};

// Query rows (tokens x G) per head in a token block of a prefill. Keys are rebuilt and transposed once per block.
constexpr int64_t kBlockRows = 192;
// An item with at least so many query rows per head takes one head only.
constexpr int64_t kRowsForOneHead = 32;
// Fewest keys of an item that is split off along the context.
constexpr int64_t kMinSplitKeys = 256;
// Fewest common keys that decodes share in an item.
constexpr int64_t kMinSharedKeys = 128;

class WorkPlan {
 public:
  WorkPlan(const StepView& step, int64_t sequences) : step_(step) {
    std::vector<int64_t> decodes;
    for (int64_t s = 0; s < sequences; ++s) {
      if (step.queries(s) == 1) {
        decodes.push_back(s);
      } else if (step.queries(s) > 1) {
        add_prefill(s);
      }
    }
    const size_t prefill_items = items.size();
    add_decodes(decodes, 0);
    split_decodes(prefill_items);
    for (WorkItem& item : items) {
      if (item.is_partial) item.partial_index = partial_items++;
    }
    // Longest first, so that the threads finish at about the same time.
    std::stable_sort(
        items.begin(), items.end(), [](const WorkItem& a, const WorkItem& b) { return a.cost() > b.cost(); });
  }

  std::vector<WorkItem> items;
  int64_t partial_items = 0;

 private:
  // Adds one item, or one per head if it has many query rows.
  void add(const WorkItem& item) {
    if (static_cast<int64_t>(item.tokens.size()) * step_.gqa_group < kRowsForOneHead) {
      items.push_back(item);
      return;
    }
    for (int64_t head = 0; head < step_.heads; ++head) {
      items.push_back(item);
      items.back().first_head = head;
      items.back().last_head = head + 1;
    }
  }

  void add_prefill(int64_t s) {
    const int64_t block = std::max<int64_t>(1, kBlockRows / step_.gqa_group), count = step_.queries(s);
    for (int64_t first = 0; first < count; first += block) {
      WorkItem item{{}, step_.pages(s), 0, 0, 0, step_.heads, false};
      for (int64_t i = first; i < std::min(first + block, count); ++i) item.tokens.push_back(step_.query_token(s, i));
      item.first_key = step_.oldest_key(item.tokens.front().position);
      item.last_key = item.tokens.back().position + 1;
      add(item);
    }
  }

  // Adds items for decodes `members`, whose first `depth` pages are the same and already have an item.
  void add_decodes(const std::vector<int64_t>& members, int64_t depth) {
    if (step_.window > 0) return add_rest(members, 0);
    std::vector<int64_t> sorted = members, rest;
    auto next_page = [&](int64_t s) { return full_pages(s) > depth ? step_.pages(s)[depth] : -1; };
    std::stable_sort(sorted.begin(), sorted.end(), [&](int64_t a, int64_t b) { return next_page(a) < next_page(b); });
    for (size_t begin = 0, end = 0; begin < sorted.size(); begin = end) {
      const int64_t page = next_page(sorted[begin]);
      for (end = begin + 1; end < sorted.size() && page >= 0 && next_page(sorted[end]) == page;) ++end;
      const std::vector<int64_t> alike(sorted.begin() + begin, sorted.begin() + end);
      const int64_t common = alike.size() > 1 ? common_pages(alike, depth) : depth;
      if (alike.size() > 1 && (common - depth) * step_.page_size >= kMinSharedKeys) {
        add(decode_item(alike, depth * step_.page_size, common * step_.page_size, true));
        add_decodes(alike, common);
      } else {
        rest.insert(rest.end(), alike.begin(), alike.end());
      }
    }
    add_rest(rest, depth);
  }

  // Adds items for decodes whose first `depth` pages already have an item. Decodes with the same keys share one: the
  // adapter-free and the acting row of a token.
  void add_rest(std::vector<int64_t> members, int64_t depth) {
    auto last_page = [&](int64_t s) { return step_.pages(s)[(step_.context_lens[s] - 1) / step_.page_size]; };
    std::stable_sort(members.begin(), members.end(), [&](int64_t a, int64_t b) {
      return std::make_pair(step_.context_lens[a], last_page(a)) < std::make_pair(step_.context_lens[b], last_page(b));
    });
    for (size_t begin = 0, end = 0; begin < members.size(); begin = end) {
      const int64_t s = members[begin], length = step_.context_lens[s];
      const int64_t first_key = std::max(depth * step_.page_size, step_.oldest_key(length - 1));
      for (end = begin + 1; end < members.size() && have_same_keys(s, members[end], first_key);) ++end;
      if (first_key >= length) continue;
      add(decode_item({members.begin() + begin, members.begin() + end}, first_key, length, depth > 0));
    }
  }

  // An item of decodes over keys that all of them see, in the same pages.
  WorkItem decode_item(
      const std::vector<int64_t>& members, int64_t first_key, int64_t last_key, bool is_partial) const {
    WorkItem item{{}, step_.pages(members[0]), first_key, last_key, 0, step_.heads, is_partial};
    for (int64_t s : members) item.tokens.push_back(step_.query_token(s, 0));
    // Tokens of one agent must be consecutive: the keys of an agent are then rebuilt once.
    std::stable_sort(item.tokens.begin(), item.tokens.end(), [](const QueryToken& a, const QueryToken& b) {
      return a.agent < b.agent;
    });
    return item;
  }

  // True if two decodes see keys up to the same position, in the same pages from `first_key` on.
  bool have_same_keys(int64_t a, int64_t b, int64_t first_key) const {
    const int64_t length = step_.context_lens[a], size = step_.page_size;
    if (step_.context_lens[b] != length) return false;
    return std::equal(
        step_.pages(a) + first_key / size, step_.pages(a) + (length + size - 1) / size,
        step_.pages(b) + first_key / size);
  }

  int64_t full_pages(int64_t s) const { return step_.context_lens[s] / step_.page_size; }

  // Number of leading full pages that all members have in common, given that the first `depth` are.
  int64_t common_pages(const std::vector<int64_t>& members, int64_t depth) const {
    int64_t common = full_pages(members[0]);
    for (int64_t s : members) {
      common = std::min(common, full_pages(s));
      for (int64_t m = depth; m < common; ++m) {
        if (step_.pages(s)[m] != step_.pages(members[0])[m]) common = m;
      }
    }
    return common;
  }

  // Splits decode items, which start at index `first`, along the context until there is work for every thread.
  void split_decodes(size_t first) {
    if (step_.threads == 1) return;
    int64_t total = 0;
    for (const WorkItem& item : items) total += item.cost();
    const int64_t share = total / (2 * step_.threads) + 1;
    const size_t count = items.size();
    for (size_t i = first; i < count; ++i) {
      const int64_t keys = items[i].last_key - items[i].first_key;
      const int64_t pieces = std::min(items[i].cost() / share + 1, keys / kMinSplitKeys);
      if (pieces < 2) continue;
      const int64_t length = ((keys + pieces - 1) / pieces + step_.page_size - 1) / step_.page_size * step_.page_size;
      items[i].is_partial = true;
      WorkItem rest = items[i];
      items[i].last_key = items[i].first_key + length;
      for (int64_t key = items[i].last_key; key < rest.last_key; key += length) {
        items.push_back(rest);
        items.back().first_key = key;
        items.back().last_key = std::min(key + length, rest.last_key);
      }
    }
  }

  StepView step_;
};

}  // namespace lragent
