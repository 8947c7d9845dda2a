// The pages of an item in the order in which they are read, each with what is read after it, which is asked for then.
//
// Of some pages first all keys are read, then all values, then the keys of the pages after them, or of the next item.
#pragma once

#include "call.h"
#include "plan.h"

namespace lragent {

// Keys or values of a page: a tile for each head.
struct PageTiles {
  const Numbers* cache;
  int64_t dim, page;

  const char* of(const Call& call, int64_t head) const {
    return cache->at((page * call.heads + head) * call.page_size * dim);
  }
};

// A page of some that are read together.
struct Page {
  int64_t id, next;      // in the cache: its own, and that of the page after it, or its own if it is the item's last
  int64_t first, count;  // keys
  int64_t place;         // of the first key among those of all these pages
  PageTiles ahead;       // what is read after it
};

class PageWalk {
 public:
  // `next`: the item that the thread is likely to run after this one, if any.
  PageWalk(const Call& call, const Item& item, const Item* next)
      : call_(call), item_(item), page_after_(next == nullptr ? page_of(item, item.last_key - 1)
                                                              : page_of(*next, next->first_key)) {}

  // Calls f(page) for the pages of keys [begin, end), whose keys are read.
  template <typename F>
  void keys(int64_t begin, int64_t end, const F& f) const {
    walk(begin, end, keys_of(0), values_of(page_of(item_, begin)), f);
  }

  // The same where values are read.
  template <typename F>
  void values(int64_t begin, int64_t end, const F& f) const {
    walk(begin, end, values_of(0), keys_of(end < item_.last_key ? page_of(item_, end) : page_after_), f);
  }

 private:
  int64_t page_of(const Item& item, int64_t key) const { return item.pages[key / call_.page_size]; }
  PageTiles keys_of(int64_t page) const { return {&call_.k_cache, call_.k_dim, page}; }
  PageTiles values_of(int64_t page) const { return {&call_.v_cache, call_.v_dim, page}; }

  template <typename F>
  void walk(int64_t begin, int64_t end, PageTiles tiles, const PageTiles& after, const F& f) const {
    const int64_t size = call_.page_size;
    const int64_t* id = item_.pages + begin / size;
    for (int64_t first = begin; first < end; first += size, ++id) {
      const int64_t left = item_.last_key - first, next = left > size ? id[1] : *id;
      tiles.page = next;
      f(Page{*id, next, first, std::min(size, left), first - begin, first + size < end ? tiles : after});
    }
  }

  const Call& call_;
  const Item& item_;
  const int64_t page_after_;
};

}  // namespace lragent
