// Keys of one page and head as float rows: in place where nothing has to be done, else rebuilt in a tile.
#pragma once

#include "call.h"

namespace lragent {

// Scratch of one thread for the tiles of one page. Rows are padded to W, tiles to a multiple of W rows.
struct TileScratch {
  std::vector<float> key, delta, cos, sin, columns, value;

  void reserve(const Call& call) {
    const int64_t rows = padded(call.page_size);
    key.resize(rows * call.k_pad);
    delta.resize(rows * call.k_pad);
    cos.resize(rows * call.k_pad);
    sin.resize(rows * call.k_pad);
    columns.resize(rows * std::max(call.k_low.widest, call.v_low.widest));
    value.resize(rows * call.v_pad);
  }
};

// cos and sin of a page's positions.
struct Rotation {
  const float* cos = nullptr;
  const float* sin = nullptr;
};

inline Rotation rotation_of(const Call& call, int64_t first_position, int64_t count, TileScratch& scratch) {
  Rotation rotation;
  if (!call.rotates) return rotation;
  const int64_t element = first_position * call.k_dim;
  rotation.cos = call.cos.floats(element, call.k_dim);
  rotation.sin = call.sin.floats(element, call.k_dim);
  if (rotation.cos == nullptr) {
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

// key[j] = base[j] + rotation of (columns[j] up), for MR keys and one pair of vectors that are each other's partner.
template <int MR, int kLines, typename T>
inline void rotated_sum_block(
    const float* columns, int64_t ld_columns, const float* up, int64_t rank, const T* base,
    const Rotation& rotation, int64_t dim, int64_t d, int64_t other, float* key, const char*& ahead) {
  Vec x[MR], y[MR];
#pragma GCC unroll 4
  for (int m = 0; m < MR; ++m) x[m] = y[m] = Vec(0.f);
  for (int64_t c = 0; c < rank; ++c) {
    const Vec up_x = Vec::loadu(up + c * dim + d), up_y = Vec::loadu(up + c * dim + other);
#pragma GCC unroll 4
    for (int m = 0; m < MR; ++m) {
      const Vec factor(columns[m * ld_columns + c]);
      x[m] = at::vec::fmadd(factor, up_x, x[m]);
      y[m] = at::vec::fmadd(factor, up_y, y[m]);
    }
  }
  ask<kLines>(ahead);
  auto finish = [&](int64_t at, const Vec& own, const Vec& partner) {
    Vec sum = at::vec::fmadd(Vec::loadu(rotation.cos + at), own, load_floats(base + at));
    at::vec::fmadd(Vec::loadu(rotation.sin + at), partner, sum).store(key + at);
  };
#pragma GCC unroll 4
  for (int m = 0; m < MR; ++m) {
    finish(m * dim + d, x[m], y[m]);
    if (other != d) finish(m * dim + other, y[m], x[m]);
  }
}

// The same for all keys of a page, in blocks. As many bytes as the bases have are asked for from `ahead` on.
template <typename T>
inline void rotated_sum(
    const Call& call, const float* columns, int64_t rank, const float* up, const T* base, const Rotation& rotation,
    int64_t count, float* key, const char* ahead) {
  constexpr int lines = 2 * 4 * W * sizeof(T) / 64;  // two vectors of four keys
  const int64_t dim = call.k_pad, ld = padded(rank);
  auto block = [&]<int kKeys>(int64_t j) {
    const Rotation here{rotation.cos + j * dim, rotation.sin + j * dim};
    for (auto [d, other] : call.partner_pairs) {
      rotated_sum_block<kKeys, kKeys == 4 ? lines : 0>(
          columns + j * ld, ld, up, rank, base + j * dim, here, dim, d, other, key + j * dim, ahead);
    }
  };
  int64_t j = 0;
  for (; j + 4 <= count; j += 4) block.template operator()<4>(j);
  for (; j < count; ++j) block.template operator()<1>(j);
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

// Keys `[count, k_pad]` of a page as `agent` reads them, in place where they can be, in the cache's dtype then.
// `columns` are its LR columns there (null if its rank is 0). `ahead` (see `ask`) is used up if keys have to be built:
// it then points at them, so that asking for it does nothing.
inline Numbers key_tile(
    const Call& call, int64_t page, int64_t head, int64_t agent, int64_t count, const float* columns,
    const Rotation& rotation, TileScratch& scratch, const char*& ahead) {
  const int64_t element = (page * call.heads + head) * call.page_size * call.k_dim, ld = call.k_pad;
  // Keys in place are read in groups of W.
  const bool in_place = call.page_size % W == 0 && call.k_dim % W == 0;
  if (columns == nullptr && call.key_is_final && in_place) return call.k_cache.from(element);
  float* key = scratch.key.data();
  float* delta = scratch.delta.data();
  const Numbers result(key);
  if (columns != nullptr && call.key_is_final && !call.partner_pairs.empty() && in_place) {
    const float* up = call.k_low.up_of(agent, head, ld);
    call.k_cache.typed(element, [&](const auto* base) {
      rotated_sum(call, columns, call.k_low.ranks[agent], up, base, rotation, count, key, ahead);
    });
    ahead = result.data;
    return result;
  }
  const bool rotates_after_sum = call.rotates && !call.key_is_final;
  float* base = rotates_after_sum ? delta : key;
  to_floats(call.k_cache, element, count, call.k_dim, call.k_dim, base, ld, std::exchange(ahead, result.data));
  if (columns != nullptr) {
    const int64_t rank = call.k_low.ranks[agent];
    const float* up = call.k_low.up_of(agent, head, ld);
    if (call.key_is_final && call.rotates) {
      product<false>(columns, padded(rank), up, ld, delta, ld, count, ld, rank);
      for (int64_t j = 0; j < count; ++j) {
        rotate_row<true>(call, delta + j * ld, rotation.cos + j * ld, rotation.sin + j * ld, key + j * ld);
      }
    } else {
      product<true>(columns, padded(rank), up, ld, base, ld, count, ld, rank);
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
  return result;
}

// Values `[count, v_pad]` of a page, in place where they can be, in the cache's dtype then.
inline Numbers value_tile(const Call& call, int64_t page, int64_t head, int64_t count, TileScratch& scratch) {
  const int64_t element = (page * call.heads + head) * call.page_size * call.v_dim;
  if (call.v_dim % W == 0) return call.v_cache.from(element);
  to_floats(call.v_cache, element, count, call.v_dim, call.v_dim, scratch.value.data(), call.v_pad);
  return Numbers(scratch.value.data());
}

}  // namespace lragent
