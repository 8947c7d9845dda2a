// Iterates over the pages of a work item, and gives each page the address to prefetch while that page is computed.
//
// An item is processed by key tiles (several pages). Per tile the kernel reads all keys, then all values, then goes on
// to the keys of the next tile or of the next item. Legend: see call.h.
#pragma once

#include "flash_lora_attention/cpp/call.h"
#include "flash_lora_attention/cpp/work_plan.h"

namespace lragent {

// Address of the keys or values of one page in the cache.
struct PageAddress {
  const TypedPointer* cache;  // [pages][H][P][dim]
  int64_t dim, page;

  // The rows [P][dim] of one KV head.
  const char* of_head(const AttentionCall& call, int64_t head) const {
    return cache->address((page * call.heads + head) * call.page_size * dim);
  }
};

struct Page {
  int64_t id, next_id;      // page ids in the cache; next_id is the item's next page, or `id` if there is none
  int64_t first_key, keys;  // position of the first key, number of keys
  int64_t tile_offset;      // index of the first key in its key tile
  PageAddress prefetch;     // read after this page
};

class PageWalk {
 public:
  // `next_item`: the item that the thread probably runs after this one; may be null.
  PageWalk(const AttentionCall& call, const WorkItem& item, const WorkItem* next_item)
      : call_(call),
        item_(item),
        page_after_item_(
            next_item == nullptr ? page_of(item, item.last_key - 1) : page_of(*next_item, next_item->first_key)) {}

  // Calls f(page) for each page of the tile of keys [begin, end). f reads keys.
  template <typename F>
  void for_keys(int64_t begin, int64_t end, const F& f) const {
    walk(begin, end, keys_of(0), values_of(page_of(item_, begin)), f);
  }

  // Calls f(page) for each page of the tile of keys [begin, end). f reads values.
  template <typename F>
  void for_values(int64_t begin, int64_t end, const F& f) const {
    walk(begin, end, values_of(0), keys_of(end < item_.last_key ? page_of(item_, end) : page_after_item_), f);
  }

 private:
  int64_t page_of(const WorkItem& item, int64_t key) const { return item.pages[key / call_.page_size]; }
  PageAddress keys_of(int64_t page) const { return {&call_.k_cache, call_.k_dim, page}; }
  PageAddress values_of(int64_t page) const { return {&call_.v_cache, call_.v_dim, page}; }

  // `address` names the stream (K or V) that f reads, `after_tile` what is read after the last page of the tile.
  template <typename F>
  void walk(int64_t begin, int64_t end, PageAddress address, const PageAddress& after_tile, const F& f) const {
    const int64_t size = call_.page_size;
    const int64_t* id = item_.pages + begin / size;
    for (int64_t first = begin; first < end; first += size, ++id) {
      const int64_t left = item_.last_key - first, next_id = left > size ? id[1] : *id;
      address.page = next_id;
      f(Page{*id, next_id, first, std::min(size, left), first - begin, first + size < end ? address : after_tile});
    }
  }

  const AttentionCall& call_;
  const WorkItem& item_;
  const int64_t page_after_item_;
};

}  // namespace lragent
