// One work item: queries of a few rows against a range of pages, with a running softmax over tiles of keys.
//
// Per tile: scores of all its pages, softmax, then values of all its pages. The value LR columns are reduced with the
// weights first and multiplied by B_v once at the end: `out = sum p v + (sum p a_v) B_v`.
#pragma once

#include "key_tile.h"
#include "page_walk.h"

namespace lragent {

// Numbers of scores held at once (they should stay in a core's cache).
constexpr int64_t kScoreNumbers = 48 * 1024;
// Up to so many rows, dot products over the keys in place beat transposing them.
constexpr int64_t kRowsForDotProducts = 12;

// Running state and scratch of one thread. Arrays are indexed [head of the item][row * G + g].
struct Workspace {
  Aligned<float> query, scores, out, reduced, maximum, total, packed;
  Aligned<at::BFloat16> rounded_weights;  // as `scores`, where weights are multiplied in pairs
  Aligned<Pair> value_columns;            // LR columns of a page's values, two keys at a time
  TileScratch tile;
};

class ItemRun {
 public:
  // For `next` see `PageWalk`.
  ItemRun(const Call& call, const Item& item, const Item* next, Workspace& space)
      : call_(call), item_(item), space_(space),
        heads_(item.last_head - item.first_head), rows_(static_cast<int64_t>(item.rows.size()) * call.group),
        reduced_ld_(call.v_low.widest), walk_(call, item, next) {
    const int64_t all = heads_ * rows_;
    tile_keys_ = std::clamp<int64_t>(kScoreNumbers / all, 1, 512) / call.page_size * call.page_size;
    tile_keys_ = std::max(tile_keys_, call.page_size);
    scores_ld_ = tile_keys_ + 2 * W;  // rows of bfloat16 numbers begin a cache line, too
    space.query.resize(all * call.k_pad);
    space.scores.resize(all * scores_ld_);
    space.rounded_weights.resize(call.in_pairs ? all * scores_ld_ : 0);
    space.value_columns.resize(call.in_pairs ? (call.page_size + 1) / 2 * reduced_ld_ : 0);
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
      walk_.keys(key, end, [&](const Page& page) { score_page(page); });
      weigh(key, end - key);
      walk_.values(key, end, [&](const Page& page) { add_values(page); });
    }
    expand_reduced();
  }

 private:
  void load_queries() {
    for (int64_t h = 0; h < heads_; ++h) {
      for (size_t row = 0; row < item_.rows.size(); ++row) {
        const int64_t head = (item_.first_head + h) * call_.group;
        const int64_t element = (item_.rows[row].token * call_.query_heads + head) * call_.k_dim;
        const int64_t at = (h * rows_ + static_cast<int64_t>(row) * call_.group) * call_.k_pad;
        if (call_.in_pairs) {
          std::copy_n(call_.queries.from(element).bfloats(), call_.group * call_.k_dim, rounded_query() + at);
        } else {
          float* to = space_.query.data() + at;
          to_floats(call_.queries, element, call_.group, call_.k_dim, call_.k_dim, to, call_.k_pad);
        }
      }
    }
  }

  // Queries in pairs take the same place, half of it.
  at::BFloat16* rounded_query() const { return reinterpret_cast<at::BFloat16*>(space_.query.data()); }

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

  void score_page(const Page& page) {
    Rotation rotation;
    if (call_.builds_keys()) rotation = rotation_of(call_, page.first, page.count, space_.tile);
    if (!call_.key_by_agent()) {
      const int64_t row = first_seeing(page.first) * call_.group;
      score_rows(page, row, rows_ - row, 0, {}, rotation);
      return;
    }
    for_agents(page.first, [&](int64_t row, int64_t rows, int64_t agent) {
      if (few_rows()) call_.k_low.ask_for(agent, page.next, call_.page_size);
      const KeyColumns columns = key_columns(call_, page.id, agent, page.count, space_.tile);
      score_rows(page, row, rows, agent, columns, rotation);
    });
  }

  void score_rows(
      const Page& page, int64_t row, int64_t rows, int64_t agent, const KeyColumns& columns, Rotation rotation) {
    const int64_t dim = call_.k_pad, count = page.count;
    for (int64_t h = 0; h < heads_; ++h, rotation.further = 0) {
      const char* ahead = page.ahead.of(call_, item_.first_head + h);
      const Numbers keys =
          key_tile(call_, page.id, item_.first_head + h, agent, count, columns, rotation, space_.tile, ahead);
      const int64_t at = h * rows_ + row;
      float* scores = space_.scores.data() + at * scores_ld_ + page.place;
      if constexpr (kMultipliesPairs) {
        if (call_.in_pairs) {
          const at::BFloat16 *query = rounded_query() + at * dim, *key = keys.bfloats();
          if (few_rows()) {
            score_keys(query, rows, key, count, scores, ahead);
          } else {
            multiply_transposed(pairs(query), rows, pairs(key), dim / 2, count, scores);
          }
          continue;
        }
      }
      const float* query = space_.query.data() + at * dim;
      if (few_rows()) {
        keys.typed(0, [&](const auto* key) { score_keys(query, rows, key, count, scores, ahead); });
      } else {
        multiply_transposed(query, rows, floats(keys, count, dim, space_.tile.key), dim, count, scores);
      }
    }
  }

  template <typename Q, typename T>
  void score_keys(const Q* query, int64_t rows, const T* keys, int64_t count, float* scores, const char* ahead) const {
    const int64_t dim = call_.k_pad, as_many = 4 * kChunk<kInPairs<Q, T>> * sizeof(T);  // bytes as each step reads
    dot_products(query, dim, rows, keys, dim, count, dim, scores, scores_ld_, ahead, as_many);
  }

  // Rows are of `dim` floats, or of `dim` pairs, which are as wide.
  template <typename N>
  void multiply_transposed(
      const N* query, int64_t rows, const N* keys, int64_t dim, int64_t count, float* scores) {
    static_assert(sizeof(N) == sizeof(float));
    const int64_t columns = padded(count);
    transpose(reinterpret_cast<const float*>(keys), columns, dim, space_.packed.data(), columns);
    const Rows packed{reinterpret_cast<const N*>(space_.packed.data()), columns};
    product<false>(query, dim, packed, scores, scores_ld_, rows, columns, dim);
  }

  bool few_rows() const { return rows_ <= kRowsForDotProducts; }

  // The same rows as floats, in `scratch` if they have another dtype.
  const float* floats(const Numbers& rows, int64_t count, int64_t columns, Aligned<float>& scratch) const {
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
        if constexpr (kMultipliesPairs) {
          if (call_.in_pairs) round_weights(at, count);
        }
        if (correction != 1.f) {
          scale_row(space_.out.data() + at * call_.v_pad, call_.v_pad, correction);
          scale_row(space_.reduced.data() + at * reduced_ld_, reduced_ld_, correction);
        }
      }
    }
  }

  // Weights of a row as bfloat16 numbers, and a zero that makes a pair of the last one.
  void round_weights(int64_t at, int64_t count) {
    const float* weights = space_.scores.data() + at * scores_ld_;
    at::BFloat16* rounded = space_.rounded_weights.data() + at * scores_ld_;
    for (int64_t j = 0; j < count; j += W) store_numbers(Vec::loadu(weights + j), rounded + j);
    rounded[count] = 0.f;
  }

  void add_values(const Page& page) {
    const int64_t row = first_seeing(page.first) * call_.group, count = page.count;
    for (int64_t h = 0; h < heads_; ++h) {
      const Numbers values = value_tile(call_, page.id, item_.first_head + h, count, space_.tile);
      const int64_t at = h * rows_ + row, ld = call_.v_pad, place = at * scores_ld_ + page.place;
      const float* weights = space_.scores.data() + place;
      const char* ahead = page.ahead.of(call_, item_.first_head + h);
      if constexpr (kMultipliesPairs) {
        if (call_.in_pairs) {
          const at::BFloat16* value = values.bfloats();
          const Pair* weight_pairs = pairs(space_.rounded_weights.data() + place);
          weigh_rows(weight_pairs, scores_ld_ / 2, RowPairs{value, ld}, count / 2, at, row, ahead);
          if (count % 2 == 1) {
            const Rows last{value + (count - 1) * ld, ld};
            weigh_rows(weights + count - 1, scores_ld_, last, 1, at, row, ahead);
          }
          continue;
        }
      }
      if (few_rows()) {
        values.typed(0, [&](const auto* value) {
          weigh_rows(weights, scores_ld_, Rows{value, ld}, count, at, row, ahead);
        });
      } else {
        const Rows extended{floats(values, count, ld, space_.tile.value), ld};
        weigh_rows(weights, scores_ld_, extended, count, at, row, ahead);
      }
    }
    if (call_.v_low.present) reduce_columns(page);
  }

  // out += weights values, for a head's rows from `row` on, which are `at` and following.
  template <typename A, typename B>
  void weigh_rows(
      const A* weights, int64_t apart, const B& values, int64_t keys, int64_t at, int64_t row, const char* ahead) {
    const int64_t ld = call_.v_pad, rows = rows_ - row;
    float* out = space_.out.data() + at * ld;
    if (few_rows()) {
      product<true, true>(weights, apart, values, out, ld, rows, ld, keys, ahead);
    } else {
      product<true>(weights, apart, values, out, ld, rows, ld, keys);
    }
  }

  // reduced += weights times LR columns of a page's values.
  void reduce_columns(const Page& page) {
    for_agents(page.first, [&](int64_t begin, int64_t rows, int64_t agent) {
      const int64_t rank = call_.v_low.ranks[agent], width = padded(rank);
      if (rank == 0) return;
      if (few_rows()) call_.v_low.ask_for(agent, page.next, call_.page_size);
      // Rows of all heads follow each other if all are this agent's.
      const bool all = rows == rows_;
      auto reduce = [&](const auto* weights, int64_t apart, const auto& columns, int64_t keys) {
        for (int64_t h = 0; h < (all ? 1 : heads_); ++h) {
          const int64_t at = h * rows_ + begin;
          product<true>(
              weights + at * apart, apart, columns, space_.reduced.data() + at * reduced_ld_, reduced_ld_,
              all ? heads_ * rows_ : rows, width, keys);
        }
      };
      if constexpr (kMultipliesPairs) {
        if (call_.in_pairs) {
          call_.v_low.page_by_keys(agent, page.id, call_.page_size, page.count, space_.value_columns.data());
          const Rows columns{static_cast<const Pair*>(space_.value_columns.data()), width};
          reduce(pairs(space_.rounded_weights.data() + page.place), scores_ld_ / 2, columns, (page.count + 1) / 2);
          return;
        }
      }
      const float* columns = call_.v_low.page(agent, page.id, call_.page_size, page.count, space_.tile.columns.data());
      reduce(space_.scores.data() + page.place, scores_ld_, Rows{columns, width}, page.count);
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
            space_.reduced.data() + at * reduced_ld_, reduced_ld_, Rows{up, call_.v_pad},
            space_.out.data() + at * call_.v_pad, call_.v_pad, rows, call_.v_pad, rank);
      }
    });
  }

  const Call& call_;
  const Item& item_;
  Workspace& space_;
  const int64_t heads_, rows_, reduced_ld_;
  const PageWalk walk_;
  int64_t tile_keys_, scores_ld_;
};

}  // namespace lragent
