// Keys and values of one page and one KV head as the queries of an agent see them: a pointer into the cache if nothing
// has to be computed or padded, else rows in scratch memory. Legend: see call.h.
//
// A key is f(base + LR row lora_b). If the cache holds f(base), f is a rotation and the key is
// f(base) + f(LR row lora_b). Else f is an optional RMSNorm followed by an optional rotation.
#pragma once

#include "flash_lora_attention/cpp/call.h"

namespace lragent {

// Scratch memory of one thread for one page. Row widths are padded to W, row counts too.
struct PageScratch {
  Aligned<float> key, delta, rope_cos, rope_sin;  // [padded(P)][k_pad]; delta: LR row lora_b before the rotation
  Aligned<float> lr;                              // [padded(P)][largest padded rank of K and V]
  Aligned<float> value;                           // [padded(P)][v_pad]
  Aligned<at::BFloat16> bf16_key;                 // [padded(P)][k_pad], for the bf16 dot product
  Aligned<Bf16Pair> lr_pairs;                     // [P][rank_pairs(rank)]

  void reserve(const AttentionCall& call) {
    const int64_t rows = padded(call.page_size);
    key.resize(rows * call.k_pad);
    delta.resize(rows * call.k_pad);
    rope_cos.resize(rows * call.k_pad);
    rope_sin.resize(rows * call.k_pad);
    lr.resize(rows * std::max(call.k_lr.max_padded_rank, call.v_lr.max_padded_rank));
    value.resize(rows * call.v_pad);
    bf16_key.resize(call.uses_bf16_dot ? rows * call.k_pad : 0);
  }
};

// Rows of rope_cos and rope_sin for the positions of a page, [keys][k_pad]; null without rotation.
struct RopeRows {
  const float* cos = nullptr;
  const float* sin = nullptr;
  // Floats from a row to the row of the next page that is prefetched; 0: no prefetch.
  int64_t prefetch_offset = 0;
};

inline RopeRows rope_rows(const AttentionCall& call, int64_t first_position, int64_t count, PageScratch& scratch) {
  RopeRows rope;
  if (!call.has_rope) return rope;
  const int64_t offset = first_position * call.k_dim;
  rope.cos = call.rope_cos.padded_floats(offset, call.k_dim);
  rope.sin = call.rope_sin.padded_floats(offset, call.k_dim);
  if (rope.cos != nullptr) {
    rope.prefetch_offset = call.page_size * call.k_dim;
  } else {
    upcast_rows(call.rope_cos, offset, count, call.k_dim, call.k_dim, scratch.rope_cos.data(), call.k_pad);
    upcast_rows(call.rope_sin, offset, count, call.k_dim, call.k_dim, scratch.rope_sin.data(), call.k_pad);
    rope.cos = scratch.rope_cos.data();
    rope.sin = scratch.rope_sin.data();
  }
  return rope;
}

// to[d] (+)= cos[d] * x[d] + sin[d] * x[rope_partner[d]]. All rows are [k_pad]; `to` and `x` must not overlap.
template <bool kAccumulate>
inline void rotate_row(const AttentionCall& call, const float* x, const float* cos, const float* sin, float* to) {
  for (int64_t d = 0; d < call.k_pad; d += W) {
    const int64_t first = call.rope_partner_vector[d / W];
    Vec partner;
    if (first >= 0) {
      partner = Vec::loadu(x + first);
    } else {
      alignas(64) float gathered[W] = {};
      for (int64_t i = 0; i < W && d + i < call.k_dim; ++i) gathered[i] = x[call.rope_partner[d + i]];
      partner = Vec::loadu(gathered);
    }
    Vec sum = kAccumulate ? Vec::loadu(to + d) : Vec(0.f);
    sum = at::vec::fmadd(Vec::loadu(cos + d), Vec::loadu(x + d), sum);
    at::vec::fmadd(Vec::loadu(sin + d), partner, sum).store(to + d);
  }
}

// LR rows `lr` [keys][ld] of a page and `lora_b` [rank][k_pad] of one head. N is float or Bf16Pair; `ld` and `rank`
// count elements of N, so the rank of pairs is rank_pairs(rank).
template <typename N>
struct LoraFactors {
  const N *lr, *lora_b;
  int64_t ld, rank;
};

// key[j] = base[j] + rope(lr[j] lora_b) for MR keys, for the channels of one pair of vectors. base, key [MR][dim].
template <int MR, bool kPrefetch, typename N, typename T, typename Out>
[[gnu::always_inline]] inline void add_rotated_lora_block(
    const LoraFactors<N>& lora, const T* base, const RopeRows& rope, int64_t dim, VectorPair pair, Out* key,
    const char*& prefetch_at) {
  constexpr int lines = std::max<int>(1, 2 * MR * W * sizeof(T) / kLineBytes);
  Vec x[MR], y[MR];
#pragma GCC unroll 4
  for (int m = 0; m < MR; ++m) x[m] = y[m] = Vec(0.f);
  const N *b_x = lora.lora_b + pair.first, *b_y = lora.lora_b + pair.second;
  for (int64_t c = 0; c < lora.rank; ++c, b_x += dim, b_y += dim) {
    const auto chunk_x = load_chunk(b_x), chunk_y = load_chunk(b_y);
#pragma GCC unroll 4
    for (int m = 0; m < MR; ++m) {
      const auto factor = broadcast(lora.lr[m * lora.ld + c]);
      x[m] = multiply_add(factor, chunk_x, x[m]);
      y[m] = multiply_add(factor, chunk_y, y[m]);
    }
  }
  if constexpr (kPrefetch) prefetch_lines<lines>(prefetch_at);
  auto rotate_and_store = [&](int64_t at, const Vec& vector, const Vec& partner) {
    if (rope.prefetch_offset > 0) {
      __builtin_prefetch(rope.cos + at + rope.prefetch_offset, 0, 2);
      __builtin_prefetch(rope.sin + at + rope.prefetch_offset, 0, 2);
    }
    const Vec sum = at::vec::fmadd(Vec::loadu(rope.cos + at), vector, load_floats(base + at));
    store_vec(at::vec::fmadd(Vec::loadu(rope.sin + at), partner, sum), key + at);
  };
#pragma GCC unroll 4
  for (int m = 0; m < MR; ++m) {
    rotate_and_store(m * dim + pair.first, x[m], y[m]);
    if (pair.second != pair.first) rotate_and_store(m * dim + pair.second, y[m], x[m]);
  }
}

// key[j] = base[j] + rope(lr[j] lora_b) for the keys of a page. base, key [count][k_pad]. Prefetches as many bytes as
// it reads of `base` from `prefetch_at` on.
template <typename N, typename T, typename Out>
inline void add_rotated_lora(
    const AttentionCall& call, LoraFactors<N> lora, const T* base, RopeRows rope, int64_t count, Out* key,
    const char* prefetch_at) {
  const int64_t dim = call.k_pad;
  auto blocks = [&]<int kKeys>(int64_t end) {
    for (; end > 0; end -= kKeys) {
      for (const VectorPair pair : call.rope_vector_pairs) {
        add_rotated_lora_block<kKeys, kKeys == 4>(lora, base, rope, dim, pair, key, prefetch_at);
      }
      lora.lr += kKeys * lora.ld;
      base += kKeys * dim;
      key += kKeys * dim;
      rope.cos += kKeys * dim;
      rope.sin += kKeys * dim;
    }
  };
  blocks.template operator()<4>(count / 4 * 4);
  blocks.template operator()<1>(count % 4);
}

// RMSNorm of a key [k_pad], in place.
inline void normalize_row(const AttentionCall& call, float* row) {
  Vec squares(0.f);
  for (int64_t d = 0; d < call.k_pad; d += W) {
    const Vec x = Vec::loadu(row + d);
    squares = at::vec::fmadd(x, x, squares);
  }
  const Vec factor(1.f / std::sqrt(sum_of(squares) / static_cast<float>(call.k_dim) + call.norm_eps));
  for (int64_t d = 0; d < call.k_pad; d += W) {
    (Vec::loadu(row + d) * factor * Vec::loadu(call.norm_weight.data() + d)).store(row + d);
  }
}

// Rebuilds the keys of a page in `scratch.key` [count][k_pad], one operation at a time. `offset` = first base key in
// the cache; lr [count][padded(rank)], null if the agent has no LR block. For `prefetch_at` see `page_keys`.
inline void rebuild_keys(
    const AttentionCall& call, int64_t offset, int64_t head, int64_t agent, int64_t count, const float* lr,
    const RopeRows& rope, PageScratch& scratch, const char* prefetch_at) {
  const int64_t ld = call.k_pad;
  float* key = scratch.key.data();
  float* delta = scratch.delta.data();
  const bool rotates_sum = call.has_rope && !call.key_is_final;
  // A rotation can't run in place: the sum is then built in `delta` and rotated into `key`.
  float* base = rotates_sum ? delta : key;
  upcast_rows(call.k_cache, offset, count, call.k_dim, call.k_dim, base, ld, prefetch_at);
  if (lr != nullptr) {
    const int64_t rank = call.k_lr.ranks[agent];
    const Rows lora_b{call.k_lr.lora_b_of(agent, head, ld), ld};
    if (call.key_is_final && call.has_rope) {
      product<false>(lr, padded(rank), lora_b, delta, ld, count, ld, rank);
      for (int64_t j = 0; j < count; ++j) {
        rotate_row<true>(call, delta + j * ld, rope.cos + j * ld, rope.sin + j * ld, key + j * ld);
      }
    } else {
      product<true>(lr, padded(rank), lora_b, base, ld, count, ld, rank);
    }
  }
  if (call.has_norm) {
    for (int64_t j = 0; j < count; ++j) normalize_row(call, base + j * ld);
  }
  if (rotates_sum) {
    for (int64_t j = 0; j < count; ++j) {
      rotate_row<false>(call, delta + j * ld, rope.cos + j * ld, rope.sin + j * ld, key + j * ld);
    }
  }
}

// An agent's LR rows of the keys of a page. At most one pointer is set, none if the agent has no LR block.
struct LrKeyRows {
  const float* floats = nullptr;    // [count][padded(rank)]
  const Bf16Pair* pairs = nullptr;  // [count][rank_pairs(rank)], if `fuses_lora_pairs`
};

inline LrKeyRows lr_key_rows(
    const AttentionCall& call, int64_t page, int64_t agent, int64_t count, PageScratch& scratch) {
  if (!call.key_depends_on_agent() || call.k_lr.ranks[agent] == 0) return {};
  if (call.fuses_lora_pairs()) {
    return {nullptr, call.k_lr.row_pairs(agent, page, call.page_size, count, scratch.lr_pairs)};
  }
  return {call.k_lr.rows(agent, page, call.page_size, count, scratch.lr.data()), nullptr};
}

// Keys [count][k_pad] of a page and KV head as `agent` sees them. Points into the cache, in its dtype, if the cache
// holds these keys unpadded. Else the keys are rebuilt: as bf16 for the bf16 dot product, otherwise as floats.
//
// Rebuilding prefetches from `prefetch_at` on, as many bytes as the keys have in the cache. It then points
// `prefetch_at` at the rebuilt keys, which are in the L1 cache, so that later prefetches have no effect.
inline TypedPointer page_keys(
    const AttentionCall& call, int64_t page, int64_t head, int64_t agent, int64_t count, const LrKeyRows& lr,
    const RopeRows& rope, PageScratch& scratch, const char*& prefetch_at) {
  const int64_t offset = (page * call.heads + head) * call.page_size * call.k_dim;
  const bool is_base = lr.floats == nullptr && lr.pairs == nullptr;
  if (is_base && call.key_is_final && call.keys_need_no_padding()) return call.k_cache.shifted(offset);
  const TypedPointer rebuilt(scratch.key.data());
  const char* next = std::exchange(prefetch_at, rebuilt.data);
  if constexpr (kHasBf16Dot) {
    if (call.uses_bf16_dot) {
      at::BFloat16* key = scratch.bf16_key.data();
      if (lr.pairs != nullptr) {
        const int64_t rank = LrStream::rank_pairs(call.k_lr.ranks[agent]);
        const LoraFactors<Bf16Pair> lora{lr.pairs, call.k_lr.lora_b_pairs_of(agent, head), rank, rank};
        add_rotated_lora(call, lora, call.k_cache.shifted(offset).bf16(), rope, count, key, next);
      } else {
        rebuild_keys(call, offset, head, agent, count, lr.floats, rope, scratch, next);
        for (int64_t i = 0; i < count * call.k_pad; i += W) store_vec(Vec::loadu(scratch.key.data() + i), key + i);
      }
      return TypedPointer(key);
    }
  }
  if (!is_base && call.fuses_lora_and_rope()) {
    const int64_t rank = call.k_lr.ranks[agent];
    const LoraFactors<float> lora{lr.floats, call.k_lr.lora_b_of(agent, head, call.k_pad), padded(rank), rank};
    call.k_cache.visit(
        offset, [&](const auto* base) { add_rotated_lora(call, lora, base, rope, count, scratch.key.data(), next); });
  } else {
    rebuild_keys(call, offset, head, agent, count, lr.floats, rope, scratch, next);
  }
  return rebuilt;
}

// Values [count][v_pad] of a page and KV head. Points into the cache, in its dtype, if no padding is needed. Else the
// values are upcast to floats.
inline TypedPointer page_values(
    const AttentionCall& call, int64_t page, int64_t head, int64_t count, PageScratch& scratch) {
  const int64_t offset = (page * call.heads + head) * call.page_size * call.v_dim;
  if (call.v_dim % W == 0) return call.v_cache.shifted(offset);
  upcast_rows(call.v_cache, offset, count, call.v_dim, call.v_dim, scratch.value.data(), call.v_pad);
  return TypedPointer(scratch.value.data());
}

}  // namespace lragent
