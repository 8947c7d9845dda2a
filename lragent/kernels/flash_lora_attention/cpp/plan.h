// Cuts a call into work items: rows of queries over a range of keys that all of them see the pages of.
//
// A sequence with one query token (a decode) is one item over all heads, or several over parts of its context where
// there are fewer sequences than threads can share. Decodes whose first pages are the same pages (forks, agents of one
// trajectory, a common prompt) become one item over those pages, so that these are read once, and items for the rest.
// A sequence with more query tokens (a prefill chunk) is cut into blocks of tokens, and by head once a block is large.
#pragma once

#include <algorithm>
#include <cstdint>
#include <vector>

namespace lragent {

struct Row {
  int64_t token;     // row of the packed queries
  int64_t position;  // of that token in its sequence: the last key that it sees
  int64_t agent;
};

struct Item {
  std::vector<Row> rows;
  const int64_t* pages;  // page table row
  int64_t first_key, last_key;
  int64_t first_head, last_head;
  bool partial;           // its result is one part of its rows' results
  int64_t part = -1;      // index of that part

  int64_t cost() const { return static_cast<int64_t>(rows.size()) * (last_key - first_key) * (last_head - first_head); }
};

struct Step {
  int64_t page_size, columns, heads, group, window, threads;
  const int64_t *seq_starts, *context_lens, *page_table, *agent_ids;

  int64_t queries(int64_t s) const { return seq_starts[s + 1] - seq_starts[s]; }
  const int64_t* pages(int64_t s) const { return page_table + s * columns; }
  Row row(int64_t s, int64_t i) const {
    const int64_t token = seq_starts[s] + i;
    return {token, context_lens[s] - queries(s) + i, agent_ids[token]};
  }
  // First key of the page that holds the oldest key that a query at `position` sees.
  int64_t oldest_key(int64_t position) const {
    return window > 0 ? std::max<int64_t>(0, position - window + 1) / page_size * page_size : 0;
  }
};

// Query rows (tokens x group) of one head in a block of a prefill chunk: keys are built and transposed once a block.
constexpr int64_t kBlockRows = 192;
// From so many query rows a head on, an item takes one head only.
constexpr int64_t kRowsForOneHead = 32;
// Shortest part of a context that is worth an item of its own, in keys.
constexpr int64_t kSmallestPart = 256;
// Shortest common beginning that is worth reading apart, in keys.
constexpr int64_t kSmallestShared = 128;

class Plan {
 public:
  Plan(const Step& step, int64_t sequences) : step_(step) {
    std::vector<int64_t> decodes;
    for (int64_t s = 0; s < sequences; ++s) {
      if (step.queries(s) == 1) {
        decodes.push_back(s);
      } else if (step.queries(s) > 1) {
        add_chunk(s);
      }
    }
    const size_t chunks = items.size();
    add_decodes(decodes, 0);
    split(chunks);
    for (Item& item : items) {
      if (item.partial) item.part = parts++;
    }
    // Longest first, so that no thread ends with a long one alone.
    std::stable_sort(items.begin(), items.end(), [](const Item& a, const Item& b) { return a.cost() > b.cost(); });
  }

  std::vector<Item> items;
  int64_t parts = 0;

 private:
  // One item, or one a head where it has many rows.
  void add(const Item& item) {
    if (static_cast<int64_t>(item.rows.size()) * step_.group < kRowsForOneHead) {
      items.push_back(item);
      return;
    }
    for (int64_t head = 0; head < step_.heads; ++head) {
      items.push_back(item);
      items.back().first_head = head;
      items.back().last_head = head + 1;
    }
  }

  void add_chunk(int64_t s) {
    const int64_t block = std::max<int64_t>(1, kBlockRows / step_.group), count = step_.queries(s);
    for (int64_t first = 0; first < count; first += block) {
      Item item{{}, step_.pages(s), 0, 0, 0, step_.heads, false};
      for (int64_t i = first; i < std::min(first + block, count); ++i) item.rows.push_back(step_.row(s, i));
      item.first_key = step_.oldest_key(item.rows.front().position);
      item.last_key = item.rows.back().position + 1;
      add(item);
    }
  }

  // Decodes whose pages before `depth` are the same; keys before `page_size * depth` are done.
  void add_decodes(const std::vector<int64_t>& members, int64_t depth) {
    if (step_.window > 0) {
      for (int64_t s : members) add_decode(s, step_.oldest_key(step_.context_lens[s] - 1), false);
      return;
    }
    std::vector<int64_t> sorted = members;
    auto next_page = [&](int64_t s) { return full_pages(s) > depth ? step_.pages(s)[depth] : -1; };
    std::stable_sort(sorted.begin(), sorted.end(), [&](int64_t a, int64_t b) { return next_page(a) < next_page(b); });
    for (size_t begin = 0, end = 0; begin < sorted.size(); begin = end) {
      const int64_t page = next_page(sorted[begin]);
      for (end = begin + 1; end < sorted.size() && page >= 0 && next_page(sorted[end]) == page;) ++end;
      const std::vector<int64_t> alike(sorted.begin() + begin, sorted.begin() + end);
      const int64_t common = alike.size() > 1 ? common_pages(alike, depth) : depth;
      if (alike.size() > 1 && (common - depth) * step_.page_size >= kSmallestShared) {
        Item item{{}, step_.pages(alike[0]), depth * step_.page_size, common * step_.page_size, 0, step_.heads, true};
        for (int64_t s : alike) item.rows.push_back(step_.row(s, 0));
        // Rows of one agent follow each other: its keys are built once.
        std::stable_sort(
            item.rows.begin(), item.rows.end(), [](const Row& a, const Row& b) { return a.agent < b.agent; });
        add(item);
        add_decodes(alike, common);
      } else {
        for (int64_t s : alike) add_decode(s, depth * step_.page_size, depth > 0);
      }
    }
  }

  void add_decode(int64_t s, int64_t first_key, bool partial) {
    if (step_.context_lens[s] <= first_key) return;
    add({{step_.row(s, 0)}, step_.pages(s), first_key, step_.context_lens[s], 0, step_.heads, partial});
  }

  int64_t full_pages(int64_t s) const { return step_.context_lens[s] / step_.page_size; }

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

  // Cuts decodes along the context until every thread has its share; `first` is the first decode.
  void split(size_t first) {
    if (step_.threads == 1) return;
    int64_t total = 0;
    for (const Item& item : items) total += item.cost();
    const int64_t share = total / (2 * step_.threads) + 1;
    const size_t count = items.size();
    for (size_t i = first; i < count; ++i) {
      const int64_t keys = items[i].last_key - items[i].first_key;
      const int64_t pieces = std::min(items[i].cost() / share + 1, keys / kSmallestPart);
      if (pieces < 2) continue;
      const int64_t length = ((keys + pieces - 1) / pieces + step_.page_size - 1) / step_.page_size * step_.page_size;
      items[i].partial = true;
      Item rest = items[i];
      items[i].last_key = items[i].first_key + length;
      for (int64_t key = items[i].last_key; key < rest.last_key; key += length) {
        items.push_back(rest);
        items.back().first_key = key;
        items.back().last_key = std::min(key + length, rest.last_key);
      }
    }
  }

  Step step_;
};

}  // namespace lragent
