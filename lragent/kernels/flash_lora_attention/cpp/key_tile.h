// Keys of one page and head as float rows: in place where nothing has to be done, else rebuilt in a tile.
#pragma once

#include "call.h"

namespace lragent {

// Scratch of one thread for the tiles of one page. Rows are padded to W, tiles to a multiple of W rows.
struct TileScratch {
  Aligned<float> key, delta, cos, sin, columns, value;
  Aligned<at::BFloat16> rounded_key;
  Aligned<Pair> column_pairs;

  void reserve(const Call& call) {
    const int64_t rows = padded(call.page_size);
    key.resize(rows * call.k_pad);
    delta.resize(rows * call.k_pad);
    cos.resize(rows * call.k_pad);
    sin.resize(rows * call.k_pad);
    columns.resize(rows * std::max(call.k_low.widest, call.v_low.widest));
    value.resize(rows * call.v_pad);
    rounded_key.resize(call.in_pairs ? rows * call.k_pad : 0);
  }
};

// cos and sin of a page's positions.
struct Rotation {
  const float* cos = nullptr;
  const float* sin = nullptr;
  // The tables' next rows lie so many floats further on, and are asked for; 0: they are not.
  int64_t further = 0;
};

inline Rotation rotation_of(const Call& call, int64_t first_position, int64_t count, TileScratch& scratch) {
  Rotation rotation;
  if (!call.rotates) return rotation;
  const int64_t element = first_position * call.k_dim;
  rotation.cos = call.cos.floats(element, call.k_dim);
  rotation.sin = call.sin.floats(element, call.k_dim);
  if (rotation.cos != nullptr) {
    rotation.further = call.page_size * call.k_dim;
  } else {
    to_floats(call.cos, element, count, call.k_dim, call.k_dim, scratch.cos.data(), call.k_pad);
    to_floats(call.sin, element, count, call.k_dim, call.k_dim, scratch.sin.data(), call.k_pad);
    rotation.cos = scratch.cos.data();
    rotation.sin = scratch.sin.data();
  }
  return rotation;
}

// to[d] (+)= cos[d] * x[d] + sin[d] * x[partner[d]]; `to` and `x` differ.
template <bool kAccumulate>
inline void rotate_row(const Call& call, const float* x, const float* cos, const float* sin, float* to) {
  for (int64_t d = 0; d < call.k_pad; d += W) {
    const int64_t first = call.partner_vector[d / W];
    Vec other;
    if (first >= 0) {
      other = Vec::loadu(x + first);
    } else {
      alignas(64) float gathered[W] = {};
      for (int64_t i = 0; i < W && d + i < call.k_dim; ++i) gathered[i] = x[call.partner[d + i]];
      other = Vec::loadu(gathered);
    }
    Vec sum = kAccumulate ? Vec::loadu(to + d) : Vec(0.f);
    sum = at::vec::fmadd(Vec::loadu(cos + d), Vec::loadu(x + d), sum);
    at::vec::fmadd(Vec::loadu(sin + d), other, sum).store(to + d);
  }
}

// LR columns of a page and the up-projection of one head: rows of floats, or of pairs of bfloat16 numbers.
template <typename N>
struct LowRankRows {
  const N *columns, *up;
  int64_t apart, rank;  // of a row of columns; in `N`
};

// key[j] = base[j] + rotation of (columns[j] up), for MR keys and one pair of vectors that are each other's partner.
template <int MR, bool kAhead, typename N, typename T, typename Out>
[[gnu::always_inline]] inline void rotated_sum_block(
    const LowRankRows<N>& low, const T* base, const Rotation& rotation, int64_t dim, VectorPair pair, Out* key,
    const char*& ahead) {
  constexpr int lines = std::max<int>(1, 2 * MR * W * sizeof(T) / 64);
  Vec x[MR], y[MR];
#pragma GCC unroll 4
  for (int m = 0; m < MR; ++m) x[m] = y[m] = Vec(0.f);
  const N *up_x = low.up + pair.first, *up_y = low.up + pair.second;
  for (int64_t c = 0; c < low.rank; ++c, up_x += dim, up_y += dim) {
    const auto left = load_chunk(up_x), right = load_chunk(up_y);
#pragma GCC unroll 4
    for (int m = 0; m < MR; ++m) {
      const auto factor = spread(low.columns[m * low.apart + c]);
      x[m] = multiply_add(factor, left, x[m]);
      y[m] = multiply_add(factor, right, y[m]);
    }
  }
  if constexpr (kAhead) ask<lines>(ahead);
  auto finish = [&](int64_t at, const Vec& own, const Vec& partner) {
    if (rotation.further > 0) {
      __builtin_prefetch(rotation.cos + at + rotation.further, 0, 2);
      __builtin_prefetch(rotation.sin + at + rotation.further, 0, 2);
    }
    const Vec sum = at::vec::fmadd(Vec::loadu(rotation.cos + at), own, load_floats(base + at));
    store_numbers(at::vec::fmadd(Vec::loadu(rotation.sin + at), partner, sum), key + at);
  };
#pragma GCC unroll 4
  for (int m = 0; m < MR; ++m) {
    finish(m * dim + pair.first, x[m], y[m]);
    if (pair.second != pair.first) finish(m * dim + pair.second, y[m], x[m]);
  }
}

// The same for all keys of a page, in blocks. As many bytes as the bases have are asked for from `ahead` on.
template <typename N, typename T, typename Out>
inline void rotated_sum(
    const Call& call, LowRankRows<N> low, const T* base, Rotation rotation, int64_t count, Out* key,
    const char* ahead) {
  const int64_t dim = call.k_pad;
  auto blocks = [&]<int kKeys>(int64_t end) {
    for (; end > 0; end -= kKeys) {
      for (const VectorPair pair : call.partner_pairs) {
        rotated_sum_block<kKeys, kKeys == 4>(low, base, rotation, dim, pair, key, ahead);
      }
      low.columns += kKeys * low.apart;
      base += kKeys * dim;
      key += kKeys * dim;
      rotation.cos += kKeys * dim;
      rotation.sin += kKeys * dim;
    }
  };
  blocks.template operator()<4>(count / 4 * 4);
  blocks.template operator()<1>(count % 4);
}

inline void normalize_row(const Call& call, float* row) {
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

// Keys of a page as floats in `scratch.key`, step by step. For `ahead` see `key_tile`.
inline void build_keys(
    const Call& call, int64_t element, int64_t head, int64_t agent, int64_t count, const float* columns,
    const Rotation& rotation, TileScratch& scratch, const char* ahead) {
  const int64_t ld = call.k_pad;
  float* key = scratch.key.data();
  float* delta = scratch.delta.data();
  const bool rotates_after_sum = call.rotates && !call.key_is_final;
  float* base = rotates_after_sum ? delta : key;
  to_floats(call.k_cache, element, count, call.k_dim, call.k_dim, base, ld, ahead);
  if (columns != nullptr) {
    const int64_t rank = call.k_low.ranks[agent];
    const Rows up{call.k_low.up_of(agent, head, ld), ld};
    if (call.key_is_final && call.rotates) {
      product<false>(columns, padded(rank), up, delta, ld, count, ld, rank);
      for (int64_t j = 0; j < count; ++j) {
        rotate_row<true>(call, delta + j * ld, rotation.cos + j * ld, rotation.sin + j * ld, key + j * ld);
      }
    } else {
      product<true>(columns, padded(rank), up, base, ld, count, ld, rank);
    }
  }
  if (call.normalizes) {
    for (int64_t j = 0; j < count; ++j) normalize_row(call, base + j * ld);
  }
  if (rotates_after_sum) {
    for (int64_t j = 0; j < count; ++j) {
      rotate_row<false>(call, delta + j * ld, rotation.cos + j * ld, rotation.sin + j * ld, key + j * ld);
    }
  }
}

// LR columns of a page as an agent's keys take them; both are null if its rank is 0.
struct KeyColumns {
  const float* floats = nullptr;  // [count][padded(rank)]
  const Pair* pairs = nullptr;    // [count][rank / 2 rounded up], if the sum of base and rotation is all there is to do
};

inline KeyColumns key_columns(const Call& call, int64_t page, int64_t agent, int64_t count, TileScratch& scratch) {
  if (!call.key_by_agent() || call.k_low.ranks[agent] == 0) return {};
  if (call.adds_pairs_to_keys()) {
    return {nullptr, call.k_low.page_in_pairs(agent, page, call.page_size, count, scratch.column_pairs)};
  }
  return {call.k_low.page(agent, page, call.page_size, count, scratch.columns.data()), nullptr};
}

// Keys `[count, k_pad]` of a page as `agent` reads them, in place where they can be, in the cache's dtype then; built
// ones are floats, or bfloat16 numbers where these are multiplied in pairs. `ahead` (see `ask`) is used up if keys have
// to be built: it then points at them, so that asking for it does nothing.
inline Numbers key_tile(
    const Call& call, int64_t page, int64_t head, int64_t agent, int64_t count, const KeyColumns& columns,
    const Rotation& rotation, TileScratch& scratch, const char*& ahead) {
  const int64_t element = (page * call.heads + head) * call.page_size * call.k_dim;
  const bool is_base = columns.floats == nullptr && columns.pairs == nullptr;
  if (is_base && call.key_is_final && call.keys_lie_well()) return call.k_cache.from(element);
  const Numbers built(scratch.key.data());
  const char* next = std::exchange(ahead, built.data);
  if constexpr (kMultipliesPairs) {
    if (call.in_pairs) {
      at::BFloat16* key = scratch.rounded_key.data();
      if (columns.pairs != nullptr) {
        const int64_t rank = LowRank::pairs_of(call.k_low.ranks[agent]);
        const LowRankRows<Pair> low{columns.pairs, call.k_low.up_pairs_of(agent, head), rank, rank};
        rotated_sum(call, low, call.k_cache.from(element).bfloats(), rotation, count, key, next);
      } else {
        build_keys(call, element, head, agent, count, columns.floats, rotation, scratch, next);
        for (int64_t i = 0; i < count * call.k_pad; i += W) store_numbers(Vec::loadu(scratch.key.data() + i), key + i);
      }
      return Numbers(key);
    }
  }
  if (!is_base && call.rotates_in_sum()) {
    const int64_t rank = call.k_low.ranks[agent];
    const LowRankRows<float> low{columns.floats, call.k_low.up_of(agent, head, call.k_pad), padded(rank), rank};
    call.k_cache.typed(element, [&](const auto* base) {
      rotated_sum(call, low, base, rotation, count, scratch.key.data(), next);
    });
  } else {
    build_keys(call, element, head, agent, count, columns.floats, rotation, scratch, next);
  }
  return built;
}

// Values `[count, v_pad]` of a page, in place where they can be, in the cache's dtype then.
inline Numbers value_tile(const Call& call, int64_t page, int64_t head, int64_t count, TileScratch& scratch) {
  const int64_t element = (page * call.heads + head) * call.page_size * call.v_dim;
  if (call.v_dim % W == 0) return call.v_cache.from(element);
  to_floats(call.v_cache, element, count, call.v_dim, call.v_dim, scratch.value.data(), call.v_pad);
  return Numbers(scratch.value.data());
}

}  // namespace lragent
