// One work item: queries of a few rows against a range of pages, with a running softmax over tiles of keys.
//
// Per tile: scores of all its pages, softmax, then values of all its pages. The value LR columns are reduced with the
// weights first and multiplied by B_v once at the end: `out = sum p v + (sum p a_v) B_v`.
#pragma once

#include "key_tile.h"
#include "plan.h"

namespace lragent {

// Numbers of scores held at once (they should stay in a core's cache).
constexpr int64_t kScoreNumbers = 24 * 1024;
// Up to so many rows, dot products over the keys in place beat transposing them.
constexpr int64_t kRowsForDotProducts = 12;

// Running state and scratch of one thread. Arrays are indexed [head of the item][row * G + g].
struct Workspace {
  std::vector<float> query, scores, out, reduced, maximum, total, packed;
  TileScratch tile;
};

class ItemRun {
 public:
  ItemRun(const Call& call, const Item& item, Workspace& space)
      : call_(call), item_(item), space_(space),
        heads_(item.last_head - item.first_head), rows_(static_cast<int64_t>(item.rows.size()) * call.group),
        reduced_ld_(call.v_low.widest) {
    const int64_t all = heads_ * rows_;
    tile_keys_ = std::clamp<int64_t>(kScoreNumbers / all, 1, 512) / call.page_size * call.page_size;
    tile_keys_ = std::max(tile_keys_, call.page_size);
    scores_ld_ = tile_keys_ + W;
    space.query.resize(all * call.k_pad);
    space.scores.resize(all * scores_ld_);
    space.out.assign(all * call.v_pad, 0.f);
    space.reduced.assign(all * reduced_ld_, 0.f);
    space.maximum.assign(all, kMinusInfinity);
    space.total.assign(all, 0.f);
    space.packed.resize(call.k_pad * padded(call.page_size));
    space.tile.reserve(call);
  }

  void run() {
    load_queries();
    for (int64_t key = item_.first_key; key < item_.last_key; key += tile_keys_) {
      const int64_t end = std::min(key + tile_keys_, item_.last_key);
      for (int64_t first = key; first < end; first += call_.page_size) score_page(key, first, page_count(first));
      weigh(key, end - key);
      for (int64_t first = key; first < end; first += call_.page_size) add_values(key, first, page_count(first));
    }
    expand_reduced();
  }

 private:
  int64_t page_count(int64_t first) const { return std::min(call_.page_size, item_.last_key - first); }

  void load_queries() {
    for (int64_t h = 0; h < heads_; ++h) {
      for (size_t row = 0; row < item_.rows.size(); ++row) {
        const int64_t head = (item_.first_head + h) * call_.group;
        const int64_t element = (item_.rows[row].token * call_.query_heads + head) * call_.k_dim;
        float* to = space_.query.data() + (h * rows_ + static_cast<int64_t>(row) * call_.group) * call_.k_pad;
        to_floats(call_.queries, element, call_.group, call_.k_dim, call_.k_dim, to, call_.k_pad);
      }
    }
  }

  // Calls f(first row, row count, agent) for each run of rows that see key `first` and have one agent.
  template <typename F>
  void for_agents(int64_t first, const F& f) const {
    const int64_t count = static_cast<int64_t>(item_.rows.size());
    int64_t begin = first_seeing(first);
    while (begin < count) {
      int64_t end = begin + 1;
      while (end < count && item_.rows[end].agent == item_.rows[begin].agent) ++end;
      f(begin * call_.group, (end - begin) * call_.group, item_.rows[begin].agent);
      begin = end;
    }
  }

  // Leading rows whose token comes before key `first` have nothing to do with its page.
  int64_t first_seeing(int64_t first) const {
    int64_t row = 0;
    while (row < static_cast<int64_t>(item_.rows.size()) && item_.rows[row].position < first) ++row;
    return row;
  }

  void score_page(int64_t tile_first, int64_t first, int64_t count) {
    const int64_t page = item_.pages[first / call_.page_size];
    Rotation rotation;
    if (call_.builds_keys()) rotation = rotation_of(call_, first, count, space_.tile);
    if (!call_.key_by_agent()) {
      const int64_t row = first_seeing(first) * call_.group;
      score_rows(tile_first, first, count, page, row, rows_ - row, 0, nullptr, rotation);
      return;
    }
    for_agents(first, [&](int64_t row, int64_t rows, int64_t agent) {
      const float* columns = nullptr;
      if (call_.k_low.ranks[agent] > 0) {
        columns = call_.k_low.page(agent, page, call_.page_size, count, space_.tile.columns.data());
      }
      score_rows(tile_first, first, count, page, row, rows, agent, columns, rotation);
    });
  }

  void score_rows(
      int64_t tile_first, int64_t first, int64_t count, int64_t page, int64_t row, int64_t rows, int64_t agent,
      const float* columns, const Rotation& rotation) {
    for (int64_t h = 0; h < heads_; ++h) {
      const char* ahead = next_tile(call_.k_cache, call_.k_dim, first, h);
      const Numbers keys =
          key_tile(call_, page, item_.first_head + h, agent, count, columns, rotation, space_.tile, ahead);
      const float* query = space_.query.data() + (h * rows_ + row) * call_.k_pad;
      float* scores = space_.scores.data() + (h * rows_ + row) * scores_ld_ + first - tile_first;
      if (few_rows()) {
        keys.typed(0, [&](const auto* key) {
          const int64_t dim = call_.k_pad;
          dot_products(query, dim, rows, key, dim, count, dim, scores, scores_ld_, ahead, keys.bytes(count * dim));
        });
      } else {
        multiply_transposed(query, rows, floats(keys, count, call_.k_pad, space_.tile.key), count, scores);
      }
    }
  }

  void multiply_transposed(const float* query, int64_t rows, const float* keys, int64_t count, float* scores) {
    const int64_t columns = padded(count);
    transpose(keys, columns, call_.k_pad, space_.packed.data(), columns);
    product<false>(query, call_.k_pad, space_.packed.data(), columns, scores, scores_ld_, rows, columns, call_.k_pad);
  }

  bool few_rows() const { return rows_ <= kRowsForDotProducts; }

  // The same rows as floats, in `scratch` if they have another dtype.
  const float* floats(const Numbers& rows, int64_t count, int64_t columns, std::vector<float>& scratch) const {
    if (rows.type == at::kFloat) return reinterpret_cast<const float*>(rows.data);
    to_floats(rows, 0, count, columns, columns, scratch.data(), columns);
    return scratch.data();
  }

  // Scores of a tile become weights; what was summed so far is brought to the new maxima.
  void weigh(int64_t tile_first, int64_t count) {
    for (int64_t h = 0; h < heads_; ++h) {
      for (int64_t row = 0; row < rows_; ++row) {
        const int64_t position = item_.rows[row / call_.group].position;
        const int64_t oldest = call_.window > 0 ? position - call_.window + 1 : 0;
        const int64_t low = std::max<int64_t>(oldest - tile_first, 0);
        const int64_t high = std::min(position + 1 - tile_first, count);
        const int64_t at = h * rows_ + row;
        const float correction = softmax_row(
            space_.scores.data() + at * scores_ld_, low, high, count, call_.score_scale, space_.maximum[at],
            space_.total[at]);
        if (correction != 1.f) {
          scale_row(space_.out.data() + at * call_.v_pad, call_.v_pad, correction);
          scale_row(space_.reduced.data() + at * reduced_ld_, reduced_ld_, correction);
        }
      }
    }
  }

  // The page after that of key `first`, or that page if it is the last.
  int64_t next_page(int64_t first) const {
    const int64_t next = first + call_.page_size;
    return item_.pages[(next < item_.last_key ? next : first) / call_.page_size];
  }

  // Where the same head's tile lies in the next page.
  const char* next_tile(const Numbers& cache, int64_t dim, int64_t first, int64_t h) const {
    const int64_t page = next_page(first);
    return cache.at((page * call_.heads + item_.first_head + h) * call_.page_size * dim);
  }

  void add_values(int64_t tile_first, int64_t first, int64_t count) {
    const int64_t page = item_.pages[first / call_.page_size], row = first_seeing(first) * call_.group;
    for (int64_t h = 0; h < heads_; ++h) {
      const Numbers values = value_tile(call_, page, item_.first_head + h, count, space_.tile);
      const int64_t at = h * rows_ + row;
      const float* weights = space_.scores.data() + at * scores_ld_ + first - tile_first;
      float* out = space_.out.data() + at * call_.v_pad;
      auto add = [&]<bool kAhead>(const auto* value, const char* ahead) {
        product<true, kAhead>(
            weights, scores_ld_, value, call_.v_pad, out, call_.v_pad, rows_ - row, call_.v_pad, count, ahead);
      };
      if (few_rows()) {
        const char* ahead = next_tile(call_.v_cache, call_.v_dim, first, h);
        values.typed(0, [&](const auto* value) { add.template operator()<true>(value, ahead); });
      } else {
        add.template operator()<false>(floats(values, count, call_.v_pad, space_.tile.value), nullptr);
      }
    }
    if (!call_.v_low.present) return;
    for_agents(first, [&](int64_t begin, int64_t rows, int64_t agent) {
      const int64_t rank = call_.v_low.ranks[agent];
      if (rank == 0) return;
      const float* columns = call_.v_low.page(agent, page, call_.page_size, count, space_.tile.columns.data());
      for (int64_t h = 0; h < heads_; ++h) {
        const int64_t at = h * rows_ + begin;
        const float* weights = space_.scores.data() + at * scores_ld_ + first - tile_first;
        product<true>(
            weights, scores_ld_, columns, padded(rank), space_.reduced.data() + at * reduced_ld_,
            reduced_ld_, rows, padded(rank), count);
      }
    });
  }

  void expand_reduced() {
    if (!call_.v_low.present) return;
    for_agents(0, [&](int64_t begin, int64_t rows, int64_t agent) {
      const int64_t rank = call_.v_low.ranks[agent];
      if (rank == 0) return;
      for (int64_t h = 0; h < heads_; ++h) {
        const int64_t at = h * rows_ + begin;
        const float* up = call_.v_low.up_of(agent, item_.first_head + h, call_.v_pad);
        product<true>(
            space_.reduced.data() + at * reduced_ld_, reduced_ld_, up, call_.v_pad,
            space_.out.data() + at * call_.v_pad, call_.v_pad, rows, call_.v_pad, rank);
      }
    });
  }

  const Call& call_;
  const Item& item_;
  Workspace& space_;
  const int64_t heads_, rows_, reduced_ld_;
  int64_t tile_keys_, scores_ld_;
};

}  // namespace lragent
