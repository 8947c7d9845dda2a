// Runs one work item: an online softmax of its queries over key tiles.
//
// A key tile is a range of keys of several pages. Per tile: scores of all its pages, softmax, then weighted values of
// all its pages. LR rows of the values are summed with the weights first, and lora_b is applied once at the end:
// out = sum p v + (sum p lr_v) lora_b_v. Legend: see call.h. A query row is one query token with one head of a GQA
// group; its index in an item is token * G + g.
#pragma once

#include "flash_lora_attention/cpp/page_keys.h"
#include "flash_lora_attention/cpp/page_walk.h"

namespace lragent {

// Scores of a key tile over all query rows. They should stay in the L2 cache of a core.
constexpr int64_t kTileScores = 48 * 1024;
// Up to so many query rows, dot products with the keys in place are faster than transposing the keys.
constexpr int64_t kRowsForDotProducts = 12;

// State and scratch memory of one thread. Arrays start with [heads of the item][query rows].
struct Workspace {
  Aligned<float> query, scores, out;   // [..][k_pad], [..][scores_ld], [..][v_pad]
  Aligned<float> lr_sums;              // [..][largest padded rank of V]: sum p lr_v
  Aligned<float> maximum, total;       // running maximum of scores, running sum of exp(score - maximum)
  Aligned<float> transposed_keys;      // [k_pad][padded(P)]
  Aligned<at::BFloat16> bf16_weights;  // [..][scores_ld], for the bf16 dot product
  Aligned<Bf16Pair> lr_v_pairs;        // [(P + 1) / 2][padded(rank)]: LR rows of a page's values, two tokens per pair
  PageScratch page;
};

class ItemRun {
 public:
  // For `next_item` see `PageWalk`.
  ItemRun(const AttentionCall& call, const WorkItem& item, const WorkItem* next_item, Workspace& space)
      : call_(call),
        item_(item),
        space_(space),
        heads_(item.last_head - item.first_head),
        rows_(static_cast<int64_t>(item.tokens.size()) * call.gqa_group),
        lr_sums_ld_(call.v_lr.max_padded_rank),
        walk_(call, item, next_item) {
    const int64_t all = heads_ * rows_;
    tile_keys_ = std::clamp<int64_t>(kTileScores / all, 1, 512) / call.page_size * call.page_size;
    tile_keys_ = std::max(tile_keys_, call.page_size);
    scores_ld_ = tile_keys_ + 2 * W;  // a row of bf16 weights then also starts at a cache line
    space.query.resize(all * call.k_pad);
    space.scores.resize(all * scores_ld_);
    space.bf16_weights.resize(call.uses_bf16_dot ? all * scores_ld_ : 0);
    space.lr_v_pairs.resize(call.uses_bf16_dot ? (call.page_size + 1) / 2 * lr_sums_ld_ : 0);
    space.out.assign(all * call.v_pad, 0.f);
    space.lr_sums.assign(all * lr_sums_ld_, 0.f);
    space.maximum.assign(all, kMinusInfinity);
    space.total.assign(all, 0.f);
    space.transposed_keys.resize(call.k_pad * padded(call.page_size));
    space.page.reserve(call);
  }

  void run() {
    load_queries();
    for (int64_t key = item_.first_key; key < item_.last_key; key += tile_keys_) {
      const int64_t end = std::min(key + tile_keys_, item_.last_key);
      walk_.for_keys(key, end, [&](const Page& page) { score_page(page); });
      softmax_tile(key, end - key);
      walk_.for_values(key, end, [&](const Page& page) { add_values(page); });
    }
    apply_lora_b();
  }

 private:
  void load_queries() {
    for (int64_t h = 0; h < heads_; ++h) {
      for (size_t token = 0; token < item_.tokens.size(); ++token) {
        const int64_t head = (item_.first_head + h) * call_.gqa_group;
        const int64_t offset = (item_.tokens[token].token * call_.query_heads + head) * call_.k_dim;
        const int64_t at = (h * rows_ + static_cast<int64_t>(token) * call_.gqa_group) * call_.k_pad;
        if (call_.uses_bf16_dot) {
          std::copy_n(call_.queries.shifted(offset).bf16(), call_.gqa_group * call_.k_dim, bf16_query() + at);
        } else {
          float* to = space_.query.data() + at;
          upcast_rows(call_.queries, offset, call_.gqa_group, call_.k_dim, call_.k_dim, to, call_.k_pad);
        }
      }
    }
  }

  // Queries for the bf16 dot product use the first half of the same memory.
  at::BFloat16* bf16_query() const { return reinterpret_cast<at::BFloat16*>(space_.query.data()); }

  // Calls f(first query row, query rows, agent) for each run of consecutive tokens of one agent, from the first token
  // that sees `key` on.
  template <typename F>
  void for_agents(int64_t key, const F& f) const {
    const int64_t count = static_cast<int64_t>(item_.tokens.size());
    int64_t begin = first_token_seeing(key);
    while (begin < count) {
      int64_t end = begin + 1;
      while (end < count && item_.tokens[end].agent == item_.tokens[begin].agent) ++end;
      f(begin * call_.gqa_group, (end - begin) * call_.gqa_group, item_.tokens[begin].agent);
      begin = end;
    }
  }

  // Leading tokens before position `key` don't see it, nor any later key of its page.
  int64_t first_token_seeing(int64_t key) const {
    int64_t token = 0;
    while (token < static_cast<int64_t>(item_.tokens.size()) && item_.tokens[token].position < key) ++token;
    return token;
  }

  void score_page(const Page& page) {
    RopeRows rope;
    if (call_.rebuilds_keys()) rope = rope_rows(call_, page.first_key, page.keys, space_.page);
    if (!call_.key_depends_on_agent()) {
      const int64_t row = first_token_seeing(page.first_key) * call_.gqa_group;
      score_rows(page, row, rows_ - row, 0, {}, rope);
      return;
    }
    for_agents(page.first_key, [&](int64_t row, int64_t rows, int64_t agent) {
      if (has_few_rows()) call_.k_lr.prefetch_rows(agent, page.next_id, call_.page_size);
      const LrKeyRows lr = lr_key_rows(call_, page.id, agent, page.keys, space_.page);
      score_rows(page, row, rows, agent, lr, rope);
    });
  }

  // Scores of query rows [row, row + rows) of one agent with the keys of a page, for all heads.
  void score_rows(const Page& page, int64_t row, int64_t rows, int64_t agent, const LrKeyRows& lr, RopeRows rope) {
    const int64_t dim = call_.k_pad, count = page.keys;
    // One prefetch of the next rope rows serves all heads.
    for (int64_t h = 0; h < heads_; ++h, rope.prefetch_offset = 0) {
      const char* prefetch_at = page.prefetch.of_head(call_, item_.first_head + h);
      const TypedPointer keys =
          page_keys(call_, page.id, item_.first_head + h, agent, count, lr, rope, space_.page, prefetch_at);
      const int64_t at = h * rows_ + row;
      float* scores = space_.scores.data() + at * scores_ld_ + page.tile_offset;
      if constexpr (kHasBf16Dot) {
        if (call_.uses_bf16_dot) {
          const at::BFloat16 *query = bf16_query() + at * dim, *key = keys.bf16();
          if (has_few_rows()) {
            score_in_place(query, rows, key, count, scores, prefetch_at);
          } else {
            score_transposed(as_pairs(query), rows, as_pairs(key), dim / 2, count, scores);
          }
          continue;
        }
      }
      const float* query = space_.query.data() + at * dim;
      if (has_few_rows()) {
        keys.visit(0, [&](const auto* key) { score_in_place(query, rows, key, count, scores, prefetch_at); });
      } else {
        score_transposed(query, rows, as_floats(keys, count, dim, space_.page.key), dim, count, scores);
      }
    }
  }

  // query [rows][k_pad], keys [count][k_pad], scores [rows][scores_ld].
  template <typename Q, typename T>
  void score_in_place(
      const Q* query, int64_t rows, const T* keys, int64_t count, float* scores, const char* prefetch_at) const {
    const int64_t dim = call_.k_pad;
    const int64_t step_bytes = 4 * kChunk<kUsesBf16Dot<Q, T>> * sizeof(T);  // prefetches as many bytes as are read
    dot_products(query, dim, rows, keys, dim, count, dim, scores, scores_ld_, prefetch_at, step_bytes);
  }

  // query [rows][dim], keys [padded(count)][dim], scores [rows][scores_ld]; elements are floats or pairs, which have
  // the same size.
  template <typename N>
  void score_transposed(const N* query, int64_t rows, const N* keys, int64_t dim, int64_t count, float* scores) {
    static_assert(sizeof(N) == sizeof(float));
    const int64_t width = padded(count);
    transpose(reinterpret_cast<const float*>(keys), width, dim, space_.transposed_keys.data(), width);
    const Rows transposed{reinterpret_cast<const N*>(space_.transposed_keys.data()), width};
    product<false>(query, dim, transposed, scores, scores_ld_, rows, width, dim);
  }

  bool has_few_rows() const { return rows_ <= kRowsForDotProducts; }

  // Rows [count][width] as floats: the rows themselves, or upcast in `scratch`.
  const float* as_floats(const TypedPointer& rows, int64_t count, int64_t width, Aligned<float>& scratch) const {
    if (rows.type == at::kFloat) return reinterpret_cast<const float*>(rows.data);
    upcast_rows(rows, 0, count, width, width, scratch.data(), width);
    return scratch.data();
  }

  // Turns the scores of a tile into weights and rescales all earlier sums to the new maxima.
  void softmax_tile(int64_t first_key, int64_t count) {
    for (int64_t h = 0; h < heads_; ++h) {
      for (int64_t row = 0; row < rows_; ++row) {
        const int64_t position = item_.tokens[row / call_.gqa_group].position;
        const int64_t oldest = call_.window > 0 ? position - call_.window + 1 : 0;
        const int64_t low = std::max<int64_t>(oldest - first_key, 0);
        const int64_t high = std::min(position + 1 - first_key, count);
        const int64_t at = h * rows_ + row;
        const float correction = softmax_row(
            space_.scores.data() + at * scores_ld_, low, high, count, call_.score_scale, space_.maximum[at],
            space_.total[at]);
        if constexpr (kHasBf16Dot) {
          if (call_.uses_bf16_dot) round_weights(at, count);
        }
        if (correction != 1.f) {
          scale_row(space_.out.data() + at * call_.v_pad, call_.v_pad, correction);
          scale_row(space_.lr_sums.data() + at * lr_sums_ld_, lr_sums_ld_, correction);
        }
      }
    }
  }

  // Rounds the weights of a row to bf16. A zero after the last weight completes the last pair of an odd count.
  void round_weights(int64_t at, int64_t count) {
    const float* weights = space_.scores.data() + at * scores_ld_;
    at::BFloat16* rounded = space_.bf16_weights.data() + at * scores_ld_;
    for (int64_t j = 0; j < count; j += W) store_vec(Vec::loadu(weights + j), rounded + j);
    rounded[count] = 0.f;
  }

  // Adds the weighted values of a page, and their weighted LR rows, to the sums of all query rows that see the page.
  void add_values(const Page& page) {
    const int64_t row = first_token_seeing(page.first_key) * call_.gqa_group, count = page.keys;
    for (int64_t h = 0; h < heads_; ++h) {
      const TypedPointer values = page_values(call_, page.id, item_.first_head + h, count, space_.page);
      const int64_t at = h * rows_ + row, ld = call_.v_pad, offset = at * scores_ld_ + page.tile_offset;
      const float* weights = space_.scores.data() + offset;
      const char* prefetch_at = page.prefetch.of_head(call_, item_.first_head + h);
      if constexpr (kHasBf16Dot) {
        if (call_.uses_bf16_dot) {
          const at::BFloat16* value = values.bf16();
          const Bf16Pair* weight_pairs = as_pairs(space_.bf16_weights.data() + offset);
          add_weighted_rows(weight_pairs, scores_ld_ / 2, RowPairs{value, ld}, count / 2, at, row, prefetch_at);
          if (count % 2 == 1) {
            const Rows last{value + (count - 1) * ld, ld};
            add_weighted_rows(weights + count - 1, scores_ld_, last, 1, at, row, prefetch_at);
          }
          continue;
        }
      }
      if (has_few_rows()) {
        values.visit(0, [&](const auto* value) {
          add_weighted_rows(weights, scores_ld_, Rows{value, ld}, count, at, row, prefetch_at);
        });
      } else {
        const Rows upcast{as_floats(values, count, ld, space_.page.value), ld};
        add_weighted_rows(weights, scores_ld_, upcast, count, at, row, prefetch_at);
      }
    }
    if (call_.v_lr.present) add_lr_sums(page);
  }

  // out += weights values, for the query rows of one head from `row` on. `at` is the index of the first one in the
  // workspace. weights [rows][ld_weights], values [keys][v_pad].
  template <typename A, typename B>
  void add_weighted_rows(
      const A* weights, int64_t ld_weights, const B& values, int64_t keys, int64_t at, int64_t row,
      const char* prefetch_at) {
    const int64_t ld = call_.v_pad, rows = rows_ - row;
    float* out = space_.out.data() + at * ld;
    if (has_few_rows()) {
      product<true, true>(weights, ld_weights, values, out, ld, rows, ld, keys, prefetch_at);
    } else {
      product<true>(weights, ld_weights, values, out, ld, rows, ld, keys);
    }
  }

  // lr_sums += weights times the LR rows of a page's values.
  void add_lr_sums(const Page& page) {
    for_agents(page.first_key, [&](int64_t begin, int64_t rows, int64_t agent) {
      const int64_t rank = call_.v_lr.ranks[agent], width = padded(rank);
      if (rank == 0) return;
      if (has_few_rows()) call_.v_lr.prefetch_rows(agent, page.next_id, call_.page_size);
      // If all query rows are of this agent, the rows of all heads are consecutive and one product takes them.
      const bool all = rows == rows_;
      auto add = [&](const auto* weights, int64_t ld_weights, const auto& lr, int64_t keys) {
        for (int64_t h = 0; h < (all ? 1 : heads_); ++h) {
          const int64_t at = h * rows_ + begin;
          product<true>(
              weights + at * ld_weights, ld_weights, lr, space_.lr_sums.data() + at * lr_sums_ld_, lr_sums_ld_,
              all ? heads_ * rows_ : rows, width, keys);
        }
      };
      if constexpr (kHasBf16Dot) {
        if (call_.uses_bf16_dot) {
          call_.v_lr.token_pairs(agent, page.id, call_.page_size, page.keys, space_.lr_v_pairs.data());
          const Rows lr{static_cast<const Bf16Pair*>(space_.lr_v_pairs.data()), width};
          add(as_pairs(space_.bf16_weights.data() + page.tile_offset), scores_ld_ / 2, lr, (page.keys + 1) / 2);
          return;
        }
      }
      const float* lr = call_.v_lr.rows(agent, page.id, call_.page_size, page.keys, space_.page.lr.data());
      add(space_.scores.data() + page.tile_offset, scores_ld_, Rows{lr, width}, page.keys);
    });
  }

  // out += lr_sums lora_b_v.
  void apply_lora_b() {
    if (!call_.v_lr.present) return;
    for_agents(0, [&](int64_t begin, int64_t rows, int64_t agent) {
      const int64_t rank = call_.v_lr.ranks[agent];
      if (rank == 0) return;
      for (int64_t h = 0; h < heads_; ++h) {
        const int64_t at = h * rows_ + begin;
        const float* lora_b = call_.v_lr.lora_b_of(agent, item_.first_head + h, call_.v_pad);
        product<true>(
            space_.lr_sums.data() + at * lr_sums_ld_, lr_sums_ld_, Rows{lora_b, call_.v_pad},
            space_.out.data() + at * call_.v_pad, call_.v_pad, rows, call_.v_pad, rank);
      }
    });
  }

  const AttentionCall& call_;
  const WorkItem& item_;
  Workspace& space_;
  const int64_t heads_, rows_, lr_sums_ld_;
  const PageWalk walk_;
  int64_t tile_keys_, scores_ld_;
};

}  // namespace lragent
