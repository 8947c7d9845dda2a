// Cache writes of a step: K and V into pages, LR columns into the agents' blocks.
//
// Semantics: `lragent.kernels.ops`. Legend: T = tokens, H = KV heads, D = head dim, P = tokens a page, N = agents,
// R = columns of `x @ A_cat.T`. Slots are `page * P + offset`; those of the scratch page may repeat.
#pragma once

#include <ATen/Parallel.h>
#include <ATen/core/Tensor.h>
#include <ATen/cpu/vec/vec.h>
#include <c10/util/Exception.h>

namespace lragent {

// Tokens that are worth a thread.
constexpr int64_t kTokensPerThread = 128;

template <typename F>
inline void with_type(at::ScalarType type, const F& f) {
  switch (type) {
    case at::kFloat: return f(float());
    case at::kBFloat16: return f(at::BFloat16());
    case at::kHalf: return f(at::Half());
    case at::kDouble: return f(double());
    default: TORCH_CHECK(false, "cache writes take floating point numbers, got ", type);
  }
}

// Calls f(a number of the source's type, a number of the target's type).
template <typename F>
inline void with_types(const at::Tensor& from, const at::Tensor& to, const F& f) {
  with_type(from.scalar_type(), [&](auto source) {
    with_type(to.scalar_type(), [&](auto target) { f(source, target); });
  });
}

inline at::Tensor dense_rows(const at::Tensor& t) { return t.stride(-1) == 1 || t.size(-1) == 1 ? t : t.contiguous(); }

inline void check_slots(const at::Tensor& slots, int64_t tokens) {
  TORCH_CHECK(slots.scalar_type() == at::kLong && slots.size(-1) == tokens, "slots must be one int64 a token");
}

// rows [T, H, D] -> cache [pages, H, P, D].
inline void write_pages(const at::Tensor& rows_THD, const at::Tensor& cache, const at::Tensor& slots_T) {
  TORCH_CHECK(cache.is_contiguous() && cache.dim() == 4, "a cache must be contiguous [pages, H, P, D]");
  const int64_t tokens = rows_THD.size(0), heads = cache.size(1), page_size = cache.size(2), dim = cache.size(3);
  TORCH_CHECK(rows_THD.dim() == 3 && rows_THD.size(1) == heads && rows_THD.size(2) == dim,
      "rows ", rows_THD.sizes(), " do not fit into a cache ", cache.sizes());
  const at::Tensor rows = dense_rows(rows_THD), slots = slots_T.contiguous();
  check_slots(slots, tokens);
  const int64_t token_stride = rows.stride(0), head_stride = rows.stride(1), last = cache.size(0) * page_size;
  const int64_t* slot = slots.const_data_ptr<int64_t>();
  with_types(rows, cache, [&](auto source, auto target) {
    using From = decltype(source);
    using To = decltype(target);
    const From* from = static_cast<const From*>(rows.const_data_ptr());
    To* to = static_cast<To*>(cache.mutable_data_ptr());
    at::parallel_for(0, tokens, kTokensPerThread, [&](int64_t begin, int64_t end) {
      for (int64_t t = begin; t < end; ++t) {
        TORCH_CHECK_INDEX(slot[t] >= 0 && slot[t] < last, "slot ", slot[t], " is outside of the cache");
        const int64_t page = slot[t] / page_size, offset = slot[t] % page_size;
        for (int64_t h = 0; h < heads; ++h) {
          at::vec::convert(
              from + t * token_stride + h * head_stride, to + ((page * heads + h) * page_size + offset) * dim, dim);
        }
      }
    });
  });
}

inline void write_kv(
    const at::Tensor& key, const at::Tensor& value, const at::Tensor& k_cache, const at::Tensor& v_cache,
    const at::Tensor& slots) {
  write_pages(key, k_cache, slots);
  write_pages(value, v_cache, slots);
}

// Columns of one agent -> its block `[slots, rank]`, which ends at element `end` of the cache.
inline void write_block(
    const at::Tensor& lr, const at::Tensor& cache, int64_t offset, int64_t end, int64_t rank, int64_t source_column,
    const at::Tensor& slots) {
  TORCH_CHECK(
      rank > 0 && offset >= 0 && end <= cache.numel() && source_column >= 0 && source_column + rank <= lr.size(1),
      "LR table names column ", source_column, " and rank ", rank, " of ", lr.size(1), " columns");
  const int64_t tokens = lr.size(0), last = (end - offset) / rank;
  const int64_t* slot = slots.const_data_ptr<int64_t>();
  with_types(lr, cache, [&](auto source, auto target) {
    using From = decltype(source);
    using To = decltype(target);
    const From* from = static_cast<const From*>(lr.const_data_ptr()) + source_column;
    To* to = static_cast<To*>(cache.mutable_data_ptr()) + offset;
    for (int64_t t = 0; t < tokens; ++t) {
      TORCH_CHECK_INDEX(slot[t] >= 0 && slot[t] < last, "slot ", slot[t], " is outside of its block");
      at::vec::convert(from + t * lr.stride(0), to + slot[t] * rank, rank);
    }
  });
}

inline void write_lr(
    const at::Tensor& lr_TR, const at::Tensor& cache, const at::Tensor& table, const at::Tensor& slots_NT) {
  TORCH_CHECK(cache.is_contiguous() && cache.dim() == 1 && lr_TR.dim() == 2, "LR columns must be [T, R], a cache flat");
  TORCH_CHECK(table.scalar_type() == at::kLong && table.is_contiguous() && table.dim() == 2 && table.size(1) == 4,
      "an LR table must be contiguous int64 [N + 1, 4]");
  TORCH_CHECK(slots_NT.dim() == 2 && slots_NT.size(0) + 1 == table.size(0), "slots must have one row an agent");
  check_slots(slots_NT, lr_TR.size(0));
  const at::Tensor lr = dense_rows(lr_TR);
  const int64_t* rows = table.const_data_ptr<int64_t>();
  for (int64_t id = 1; id < table.size(0); ++id) {
    const int64_t offset = rows[id * 4], rank = rows[id * 4 + 1], source = rows[id * 4 + 2], writes = rows[id * 4 + 3];
    if (!writes) continue;
    // A block reaches to the next owner's: a slot outside is an error, not another agent's number.
    int64_t end = cache.numel();
    for (int64_t other = 1; other < table.size(0); ++other) {
      if (rows[other * 4 + 3] && rows[other * 4] > offset) end = std::min(end, rows[other * 4]);
    }
    write_block(lr, cache, offset, end, rank, source, slots_NT.select(0, id - 1).contiguous());
  }
}

}  // namespace lragent
