// Arguments of one attention call, checked and in the form that all its work items share.
//
// Legend of the attention kernel: T = packed query tokens, S = sequences, M = pages of a page table row, P = tokens per
// page, N = agents, Hq = query heads, H = KV heads, G = Hq / H, the heads of a GQA group, Dk / Dv = head dims, r =
// rank. W = floats per vector register; padded(n) rounds n up to a multiple of W; ld = elements from one row to the
// next.
#pragma once

#include <c10/util/Exception.h>

#include <optional>
#include <utility>
#include <vector>

#include "vector/float_rows.h"

namespace lragent {

using OptionalTensor = std::optional<at::Tensor>;

inline const int64_t* integers(const at::Tensor& t, const char* name) {
  TORCH_CHECK(t.scalar_type() == at::kLong && t.is_contiguous(), name, " must be contiguous int64");
  return t.const_data_ptr<int64_t>();
}

// The low-rank (LR) stream of K or V for all agents, and the lora_b that expands it. Each agent has one LR block
// [pages][P][r] in the flat stream. The directory has one row per agent: offset of the block, rank, and two fields for
// cache writes that attention does not read.
struct LrStream {
  bool present = false;
  TypedPointer blocks;                         // the flat stream
  const int64_t* directory = nullptr;          // [N + 1][4]
  std::vector<int64_t> ranks;                  // [N + 1]; 0 if the agent has no LR block or no token in the call
  std::vector<const float*> lora_b;            // [N + 1], each [H][r][padded(D)]; set by `prepare`, null if rank is 0
  std::vector<Aligned<float>> lora_b_storage;  // [N + 1]; elements of `lora_b` that were upcast or padded
  int64_t max_padded_rank = 0;                 // of `ranks`
  // [N + 1], each [H][rank_pairs(rank)][D]; set by `prepare_pairs`. Pairs of rows of `lora_b`.
  std::vector<Aligned<Bf16Pair>> lora_b_pairs;

  // Shapes: lr flat, lr_directory [N + 1, 4], lora_b_NHrD [N + 1, H, r, D]. `slots` = pages * P.
  void read(
      const OptionalTensor& lr, const OptionalTensor& lr_directory, const OptionalTensor& lora_b_NHrD, int64_t heads,
      int64_t dim, int64_t slots) {
    if (!lr || !lr_directory || !lora_b_NHrD) return;
    TORCH_CHECK(lr->is_contiguous() && lora_b_NHrD->is_contiguous(), "LR stream and lora_b must be contiguous");
    TORCH_CHECK(
        is_supported(lr->scalar_type()) && is_supported(lora_b_NHrD->scalar_type()),
        "unsupported dtype of LR stream or lora_b");
    TORCH_CHECK(
        lora_b_NHrD->dim() == 4 && lora_b_NHrD->size(0) == lr_directory->size(0) && lora_b_NHrD->size(1) == heads &&
            lora_b_NHrD->size(3) == dim,
        "lora_b must be [N + 1, H, r, D], got ", lora_b_NHrD->sizes());
    present = true;
    blocks = TypedPointer(*lr);
    directory = integers(*lr_directory, "LR directory");
    TORCH_CHECK(lr_directory->dim() == 2 && lr_directory->size(1) == 4, "LR directory must be [N + 1, 4]");
    for (int64_t agent = 0; agent < lora_b_NHrD->size(0); ++agent) {
      const int64_t offset = directory[agent * 4], rank = directory[agent * 4 + 1];
      TORCH_CHECK(
          offset >= 0 && rank >= 0 && rank <= lora_b_NHrD->size(2) && offset + slots * rank <= lr->numel(),
          "LR block of agent ", agent, " does not fit: offset ", offset, ", rank ", rank);
    }
    const size_t agents = static_cast<size_t>(lora_b_NHrD->size(0));
    ranks.assign(agents, 0);
    lora_b.assign(agents, nullptr);
    lora_b_storage.resize(agents);
    lora_b_pairs.resize(agents);
    lora_b_source = *lora_b_NHrD;
  }

  // Prepares `lora_b` of one agent that has a token in the call.
  void prepare(int64_t agent) {
    if (!add_agent(agent)) return;
    const int64_t heads = lora_b_source.size(1), rows = lora_b_source.size(2), dim = lora_b_source.size(3);
    const TypedPointer source(lora_b_source);
    const int64_t offset = agent * heads * rows * dim;
    lora_b[agent] = source.padded_floats(offset, dim);
    if (lora_b[agent] == nullptr) {
      lora_b_storage[agent].resize(heads * rows * padded(dim));
      upcast_rows(source, offset, heads * rows, dim, dim, lora_b_storage[agent].data(), padded(dim));
      lora_b[agent] = lora_b_storage[agent].data();
    }
  }

  // Prepares `lora_b_pairs` instead, for the bf16 dot product over the rank.
  void prepare_pairs(int64_t agent) {
    if (!add_agent(agent)) return;
    const int64_t heads = lora_b_source.size(1), rows = lora_b_source.size(2), dim = lora_b_source.size(3);
    const int64_t rank = ranks[agent];
    lora_b_pairs[agent].resize(heads * rank_pairs(rank) * dim);
    Bf16Pair* to = lora_b_pairs[agent].data();
    const auto* from = TypedPointer(lora_b_source).shifted(agent * heads * rows * dim).bf16();
    for (int64_t head = 0; head < heads; ++head) {
      for (int64_t c = 0; c < rank; c += 2, to += dim) {
        const at::BFloat16* upper = from + (head * rows + c) * dim;
        interleave(upper, c + 1 < rank ? upper + dim : nullptr, dim, to);
      }
    }
  }

  // lora_b of one head: [r][padded_dim].
  const float* lora_b_of(int64_t agent, int64_t head, int64_t padded_dim) const {
    return lora_b[agent] + head * lora_b_source.size(2) * padded_dim;
  }

  // lora_b of one head: [rank_pairs(rank)][D].
  const Bf16Pair* lora_b_pairs_of(int64_t agent, int64_t head) const {
    return lora_b_pairs[agent].data() + head * rank_pairs(ranks[agent]) * lora_b_source.size(3);
  }

  // Prefetches an agent's LR rows of a page. Hardware prefetchers can't predict their address.
  void prefetch_rows(int64_t agent, int64_t page, int64_t page_size) const {
    const int64_t bytes = blocks.bytes(page_size * ranks[agent]);
    const char* at = blocks.address(directory[agent * 4]) + page * bytes;
    for (int64_t i = 0; i < bytes; i += kLineBytes) __builtin_prefetch(at + i, 0, 2);
  }

  // An agent's LR rows of the first `count` tokens of a page, as floats [count][padded(rank)]. Points into the stream
  // if no upcast or padding is needed, else into `scratch`, of the same shape.
  const float* rows(int64_t agent, int64_t page, int64_t page_size, int64_t count, float* scratch) const {
    const int64_t rank = ranks[agent], offset = directory[agent * 4] + page * page_size * rank;
    if (const float* in_place = blocks.padded_floats(offset, rank)) return in_place;
    upcast_rows(blocks, offset, count, rank, rank, scratch, padded(rank));
    return scratch;
  }

  // The same rows of a bf16 stream as pairs [count][rank_pairs(rank)], which pair neighbours in a row. The last number
  // of an odd rank is paired with zero.
  const Bf16Pair* row_pairs(
      int64_t agent, int64_t page, int64_t page_size, int64_t count, Aligned<Bf16Pair>& scratch) const {
    const int64_t rank = ranks[agent], width = rank_pairs(rank);
    const at::BFloat16* from = blocks.shifted(directory[agent * 4] + page * page_size * rank).bf16();
    if (rank % 2 == 0) return as_pairs(from);
    scratch.resize(count * width);
    for (int64_t j = 0; j < count; ++j) {
      for (int64_t c = 0; c < width; ++c) {
        const at::BFloat16* pair = from + j * rank + 2 * c;
        scratch[j * width + c] = {pair[0], 2 * c + 1 < rank ? pair[1] : at::BFloat16(0.f)};
      }
    }
    return scratch.data();
  }

  // The same rows of a bf16 stream as pairs `to` [(count + 1) / 2][padded(rank)], which pair two tokens. The last token
  // of an odd count is paired with zeros.
  void token_pairs(int64_t agent, int64_t page, int64_t page_size, int64_t count, Bf16Pair* to) const {
    const int64_t rank = ranks[agent];
    const at::BFloat16* from = blocks.shifted(directory[agent * 4] + page * page_size * rank).bf16();
    for (int64_t j = 0; j < count; j += 2, to += padded(rank)) {
      interleave(from + j * rank, j + 1 < count ? from + (j + 1) * rank : nullptr, rank, to);
    }
  }

  static int64_t rank_pairs(int64_t rank) { return (rank + 1) / 2; }

  bool is_bf16() const {
    return !present || (blocks.type == at::kBFloat16 && lora_b_source.scalar_type() == at::kBFloat16);
  }

 private:
  // Sets the agent's rank. Returns false if it has no LR block or was added before.
  bool add_agent(int64_t agent) {
    if (!present || ranks[agent] != 0 || directory[agent * 4 + 1] == 0) return false;
    ranks[agent] = directory[agent * 4 + 1];
    max_padded_rank = std::max(max_padded_rank, padded(ranks[agent]));
    return true;
  }

  at::Tensor lora_b_source;  // [N + 1, H, r, D]
};

// First channels of two vectors of a key that the rotation combines. Equal if a vector is combined with itself.
struct VectorPair {
  int64_t first, second;
};

struct AttentionCall {
  at::Tensor query, out;  // [T, Hq, Dk], [T, Hq, Dv]
  int64_t tokens, query_heads, heads, gqa_group, k_dim, v_dim, k_pad, v_pad, page_size;
  TypedPointer k_cache, v_cache, queries;  // [pages][H][P][Dk], [pages][H][P][Dv], [T][Hq][Dk]
  LrStream k_lr, v_lr;
  bool has_rope = false, has_norm = false, key_is_final;
  TypedPointer rope_cos, rope_sin;  // [positions][Dk]
  int64_t rope_positions = 0;
  std::vector<int64_t> rope_partner;  // [Dk]
  // [k_pad / W]: partner of a vector's first channel if the partners of its channels are consecutive, else -1.
  std::vector<int64_t> rope_partner_vector;
  // Covers every vector, or is empty if the partners of some vector are not the channels of one vector.
  std::vector<VectorPair> rope_vector_pairs;
  std::vector<float> norm_weight;  // [k_pad]
  std::vector<float> sinks;        // [Hq]
  float norm_eps;
  ScoreScale score_scale;
  int64_t window;              // visible keys per query, itself included; 0: all
  bool uses_bf16_dot = false;  // for scores, for weighted values and for rebuilt keys

  // True if the key of a token depends on the agent that reads it.
  bool key_depends_on_agent() const { return k_lr.present; }
  // Agent ids must be less than this; -1: the call does not read them.
  int64_t agents() const {
    if (k_lr.present) return static_cast<int64_t>(k_lr.ranks.size());
    return v_lr.present ? static_cast<int64_t>(v_lr.ranks.size()) : -1;
  }
  // True if the keys of a page are whole vectors in rows and in columns, so that they can be read without padding.
  bool keys_need_no_padding() const { return page_size % W == 0 && k_dim % W == 0; }
  // True if base key + rope(LR row lora_b) can be computed in one loop over whole vectors.
  bool fuses_lora_and_rope() const { return key_is_final && !rope_vector_pairs.empty() && keys_need_no_padding(); }
  // True if that loop uses the bf16 dot product over the rank.
  bool fuses_lora_pairs() const { return uses_bf16_dot && fuses_lora_and_rope(); }
  // True if some key differs from the key in the cache.
  bool rebuilds_keys() const { return k_lr.present || !key_is_final; }
};

// A constant of at most `size` elements as floats, padded with zeros to `size`.
inline std::vector<float> float_vector(const at::Tensor& t, int64_t size) {
  TORCH_CHECK(t.is_contiguous() && is_supported(t.scalar_type()), "unsupported dtype or layout of a constant");
  TORCH_CHECK(t.numel() <= size, "a constant has ", t.numel(), " numbers, at most ", size, " are used");
  std::vector<float> result(static_cast<size_t>(size), 0.f);
  upcast_rows(TypedPointer(t), 0, 1, t.numel(), t.numel(), result.data(), size);
  return result;
}

// Reads rope_cos, rope_sin [positions, Dk] and rope_partner [Dk] into the call.
inline void read_rope(
    AttentionCall& call, const at::Tensor& rope_cos, const at::Tensor& rope_sin, const at::Tensor& rope_partner) {
  TORCH_CHECK(
      rope_cos.is_contiguous() && rope_sin.is_contiguous() && rope_cos.sizes() == rope_sin.sizes() &&
          rope_cos.size(1) == call.k_dim,
      "rope_cos and rope_sin must be contiguous [positions, Dk]");
  TORCH_CHECK(
      is_supported(rope_cos.scalar_type()) && rope_cos.scalar_type() == rope_sin.scalar_type(),
      "unsupported dtype of rope_cos or rope_sin");
  call.has_rope = true;
  call.rope_cos = TypedPointer(rope_cos);
  call.rope_sin = TypedPointer(rope_sin);
  call.rope_positions = rope_cos.size(0);
  const int64_t* partner = integers(rope_partner, "rope_partner");
  TORCH_CHECK(rope_partner.numel() == call.k_dim, "rope_partner must be [Dk], got ", rope_partner.sizes());
  for (int64_t d = 0; d < call.k_dim; ++d) {
    TORCH_CHECK(partner[d] >= 0 && partner[d] < call.k_dim, "rope_partner names channel ", partner[d]);
  }
  call.rope_partner.assign(partner, partner + call.k_dim);
  for (int64_t d = 0; d < call.k_pad; d += W) {
    bool consecutive = d + W <= call.k_dim;
    for (int64_t i = 1; consecutive && i < W; ++i) consecutive = partner[d + i] == partner[d] + i;
    call.rope_partner_vector.push_back(consecutive ? partner[d] : -1);
  }
  for (int64_t d = 0; d < call.k_pad; d += W) {
    const int64_t other = call.rope_partner_vector[d / W];
    if (other < 0 || other % W != 0 || call.rope_partner_vector[other / W] != d) return call.rope_vector_pairs.clear();
    if (d <= other) call.rope_vector_pairs.push_back({d, other});
  }
}

}  // namespace lragent
