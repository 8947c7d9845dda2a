// Arguments of one attention call, checked, and what all its work items share.
//
// Legend: T = packed query tokens, S = sequences, M = page table columns, P = tokens a page, N = agents, Hq = query
// heads, H = KV heads, G = Hq / H, Dk / Dv = head dims, r = rank. A padded size is a multiple of W (floats a register).
#pragma once

#include <c10/util/Exception.h>

#include <optional>
#include <utility>
#include <vector>

#include "../../vector/float_rows.h"

namespace lragent {

using OptionalTensor = std::optional<at::Tensor>;

inline const int64_t* integers(const at::Tensor& t, const char* name) {
  TORCH_CHECK(t.scalar_type() == at::kLong && t.is_contiguous(), name, " must be contiguous int64");
  return t.const_data_ptr<int64_t>();
}

// LR columns of K or V for all agents: flat numbers, table rows (offset, rank, source, writes), up-projections.
struct LowRank {
  bool present = false;
  Numbers columns;
  const int64_t* table = nullptr;
  std::vector<int64_t> ranks;            // [N + 1]; 0 where the agent has no columns or has no part in the call
  std::vector<const float*> up;          // [N + 1], each [H][r][padded D]; filled by `use`, null where the rank is 0
  std::vector<Aligned<float>> held;      // [N + 1], numbers of `up` that had to be converted or padded
  int64_t widest = 0;                    // padded largest of these ranks
  std::vector<Aligned<Pair>> up_pairs;  // [N + 1], each [H][r / 2 rounded up][D]: as `up`; filled by `use_in_pairs`

  void read(
      const OptionalTensor& lr, const OptionalTensor& lr_table, const OptionalTensor& b, int64_t heads, int64_t dim,
      int64_t slots) {
    if (!lr || !lr_table || !b) return;
    TORCH_CHECK(lr->is_contiguous() && b->is_contiguous(), "LR columns and up-projections must be contiguous");
    TORCH_CHECK(is_supported(lr->scalar_type()) && is_supported(b->scalar_type()), "unsupported dtype of LR columns");
    TORCH_CHECK(b->dim() == 4 && b->size(0) == lr_table->size(0) && b->size(1) == heads && b->size(3) == dim,
        "up-projections must be [N + 1, H, r, D], got ", b->sizes());
    present = true;
    columns = Numbers(*lr);
    table = integers(*lr_table, "LR table");
    TORCH_CHECK(lr_table->dim() == 2 && lr_table->size(1) == 4, "LR table must be [N + 1, 4]");
    for (int64_t agent = 0; agent < b->size(0); ++agent) {
      const int64_t offset = table[agent * 4], rank = table[agent * 4 + 1];
      TORCH_CHECK(offset >= 0 && rank >= 0 && rank <= b->size(2) && offset + slots * rank <= lr->numel(),
          "LR block of agent ", agent, " does not fit: offset ", offset, ", rank ", rank);
    }
    const size_t agents = static_cast<size_t>(b->size(0));
    ranks.assign(agents, 0);
    up.assign(agents, nullptr);
    held.resize(agents);
    up_pairs.resize(agents);
    up_source = *b;
  }

  // Makes the columns of one agent ready for use.
  void use(int64_t agent) {
    if (!is_new(agent)) return;
    const int64_t heads = up_source.size(1), rows = up_source.size(2), dim = up_source.size(3);
    const Numbers source(up_source);
    const int64_t element = agent * heads * rows * dim;
    up[agent] = source.floats(element, dim);
    if (up[agent] == nullptr) {
      held[agent].resize(heads * rows * padded(dim));
      to_floats(source, element, heads * rows, dim, dim, held[agent].data(), padded(dim));
      up[agent] = held[agent].data();
    }
  }

  // The same for columns that are multiplied in pairs, two rows of an up-projection at a time.
  void use_in_pairs(int64_t agent) {
    if (!is_new(agent)) return;
    const int64_t heads = up_source.size(1), rows = up_source.size(2), dim = up_source.size(3), rank = ranks[agent];
    up_pairs[agent].resize(heads * pairs_of(rank) * dim);
    Pair* to = up_pairs[agent].data();
    const auto* from = Numbers(up_source).from(agent * heads * rows * dim).bfloats();
    for (int64_t head = 0; head < heads; ++head) {
      for (int64_t c = 0; c < rank; c += 2, to += dim) {
        const at::BFloat16* upper = from + (head * rows + c) * dim;
        interleave(upper, c + 1 < rank ? upper + dim : nullptr, dim, to);
      }
    }
  }

  const float* up_of(int64_t agent, int64_t head, int64_t padded_dim) const {
    return up[agent] + head * up_source.size(2) * padded_dim;
  }

  const Pair* up_pairs_of(int64_t agent, int64_t head) const {
    return up_pairs[agent].data() + head * pairs_of(ranks[agent]) * up_source.size(3);
  }

  // Asks for an agent's columns of a page, which lie where no page before them tells.
  void ask_for(int64_t agent, int64_t page, int64_t page_size) const {
    const int64_t bytes = columns.bytes(page_size * ranks[agent]);
    const char* at = columns.at(table[agent * 4]) + page * bytes;
    for (int64_t i = 0; i < bytes; i += 64) __builtin_prefetch(at + i, 0, 2);
  }

  // Columns of one page: in place if they are padded floats, else in `scratch`. Row length is padded(rank).
  const float* page(int64_t agent, int64_t page, int64_t page_size, int64_t count, float* scratch) const {
    const int64_t rank = ranks[agent], element = table[agent * 4] + page * page_size * rank;
    if (const float* in_place = columns.floats(element, rank)) return in_place;
    to_floats(columns, element, count, rank, rank, scratch, padded(rank));
    return scratch;
  }

  // The same for columns of bfloat16, in pairs; a last column that has no other is joined by zero.
  const Pair* page_in_pairs(
      int64_t agent, int64_t page, int64_t page_size, int64_t count, Aligned<Pair>& held) const {
    const int64_t rank = ranks[agent], columns_of_row = pairs_of(rank);
    const at::BFloat16* from = columns.from(table[agent * 4] + page * page_size * rank).bfloats();
    if (rank % 2 == 0) return pairs(from);
    held.resize(count * columns_of_row);
    for (int64_t j = 0; j < count; ++j) {
      for (int64_t c = 0; c < columns_of_row; ++c) {
        const at::BFloat16* pair = from + j * rank + 2 * c;
        held[j * columns_of_row + c] = {pair[0], 2 * c + 1 < rank ? pair[1] : at::BFloat16(0.f)};
      }
    }
    return held.data();
  }

  // The same, two keys at a time, column by column, in rows of padded(rank); a last key alone is joined by zeros.
  void page_by_keys(int64_t agent, int64_t page, int64_t page_size, int64_t count, Pair* to) const {
    const int64_t rank = ranks[agent];
    const at::BFloat16* from = columns.from(table[agent * 4] + page * page_size * rank).bfloats();
    for (int64_t j = 0; j < count; j += 2, to += padded(rank)) {
      interleave(from + j * rank, j + 1 < count ? from + (j + 1) * rank : nullptr, rank, to);
    }
  }

  static int64_t pairs_of(int64_t rank) { return (rank + 1) / 2; }

  bool is_bfloat16() const {
    return !present || (columns.type == at::kBFloat16 && up_source.scalar_type() == at::kBFloat16);
  }

 private:
  // Whether the agent has columns that were not in use yet; they are now.
  bool is_new(int64_t agent) {
    if (!present || ranks[agent] != 0 || table[agent * 4 + 1] == 0) return false;
    ranks[agent] = table[agent * 4 + 1];
    widest = std::max(widest, padded(ranks[agent]));
    return true;
  }

  at::Tensor up_source;
};

// First channels of two vectors that are each other's partner, or twice the same one.
struct VectorPair {
  int64_t first, second;
};

struct Call {
  at::Tensor query, out;
  int64_t tokens, query_heads, heads, group, k_dim, v_dim, k_pad, v_pad, page_size;
  Numbers k_cache, v_cache, queries;
  LowRank k_low, v_low;
  bool rotates = false, normalizes = false, key_is_final;
  Numbers cos, sin;
  int64_t positions = 0;
  std::vector<int64_t> partner;         // [k_dim]
  std::vector<int64_t> partner_vector;  // per W channels: first partner if the partners are consecutive, else -1
  // All vectors; empty if some have no partner.
  std::vector<VectorPair> partner_pairs;
  std::vector<float> norm_weight;       // [k_pad]
  std::vector<float> sinks;             // [Hq]
  float norm_eps;
  ScoreScale score_scale;
  int64_t window;
  bool in_pairs = false;  // whether bfloat16 numbers are multiplied in pairs

  // Whether the key of a token depends on the agent that reads it.
  bool key_by_agent() const { return k_low.present; }
  // Agent ids are below this; -1: nothing depends on them.
  int64_t agents() const {
    if (k_low.present) return static_cast<int64_t>(k_low.ranks.size());
    return v_low.present ? static_cast<int64_t>(v_low.ranks.size()) : -1;
  }
  // Whether keys in the cache can be read where they lie: in groups of W.
  bool keys_lie_well() const { return page_size % W == 0 && k_dim % W == 0; }
  // Whether a key is its base plus the rotation of its LR part, in whole vectors.
  bool rotates_in_sum() const { return key_is_final && !partner_pairs.empty() && keys_lie_well(); }
  // Whether that LR part is multiplied in pairs.
  bool adds_pairs_to_keys() const { return in_pairs && rotates_in_sum(); }
  // Whether keys are built in a tile instead of being read in place.
  bool builds_keys() const { return k_low.present || !key_is_final; }
};

inline std::vector<float> float_vector(const at::Tensor& t, int64_t size) {
  TORCH_CHECK(t.is_contiguous() && is_supported(t.scalar_type()), "unsupported dtype or layout of a constant");
  TORCH_CHECK(t.numel() <= size, "a constant has ", t.numel(), " numbers, at most ", size, " are used");
  std::vector<float> result(static_cast<size_t>(size), 0.f);
  to_floats(Numbers(t), 0, 1, t.numel(), t.numel(), result.data(), size);
  return result;
}

inline void read_rotation(Call& call, const at::Tensor& cos, const at::Tensor& sin, const at::Tensor& partner) {
  TORCH_CHECK(cos.is_contiguous() && sin.is_contiguous() && cos.sizes() == sin.sizes() && cos.size(1) == call.k_dim,
      "rotation tables must be contiguous [positions, Dk]");
  TORCH_CHECK(is_supported(cos.scalar_type()) && cos.scalar_type() == sin.scalar_type(), "unsupported rotation dtype");
  call.rotates = true;
  call.cos = Numbers(cos);
  call.sin = Numbers(sin);
  call.positions = cos.size(0);
  const int64_t* channel = integers(partner, "rope_partner");
  TORCH_CHECK(partner.numel() == call.k_dim, "rope_partner must be [Dk], got ", partner.sizes());
  for (int64_t d = 0; d < call.k_dim; ++d) {
    TORCH_CHECK(channel[d] >= 0 && channel[d] < call.k_dim, "rope_partner names channel ", channel[d]);
  }
  call.partner.assign(channel, channel + call.k_dim);
  for (int64_t d = 0; d < call.k_pad; d += W) {
    bool consecutive = d + W <= call.k_dim;
    for (int64_t i = 1; consecutive && i < W; ++i) consecutive = channel[d + i] == channel[d] + i;
    call.partner_vector.push_back(consecutive ? channel[d] : -1);
  }
  for (int64_t d = 0; d < call.k_pad; d += W) {
    const int64_t other = call.partner_vector[d / W];
    if (other < 0 || other % W != 0 || call.partner_vector[other / W] != d) return call.partner_pairs.clear();
    if (d <= other) call.partner_pairs.push_back({d, other});
  }
}

}  // namespace lragent
