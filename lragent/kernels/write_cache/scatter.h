// The ops `write_kv` and `write_lr`: cache writes of one step. K and V go into pages, LR rows into the agents' LR
// blocks.
//
// The schemas are those of `lragent.kernels.ops`. Legend: T = tokens, H = KV heads, D = head dim, P = tokens per page,
// N = agents, R = width of the LR stream of all agents, r = rank of an agent. A slot is page * P + offset. Slots of the
// scratch page may repeat; what is written there is never read.
#pragma once

#include <ATen/Parallel.h>
#include <ATen/core/Tensor.h>
#include <ATen/cpu/vec/vec.h>
#include <c10/util/Exception.h>

namespace lragent {

// Fewest tokens that one thread writes.
constexpr int64_t kTokensPerThread = 128;

// Calls f(zero of the C++ type of `type`).
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

// Calls f(zero of the source's C++ type, zero of the target's C++ type).
template <typename F>
inline void with_types(const at::Tensor& from, const at::Tensor& to, const F& f) {
  with_type(
      from.scalar_type(), [&](auto source) { with_type(to.scalar_type(), [&](auto target) { f(source, target); }); });
}

// The tensor itself if the elements of its rows are contiguous, else a contiguous copy.
inline at::Tensor dense_rows(const at::Tensor& t) { return t.stride(-1) == 1 || t.size(-1) == 1 ? t : t.contiguous(); }

// slots [..., T].
inline void check_slots(const at::Tensor& slots, int64_t tokens) {
  TORCH_CHECK(slots.scalar_type() == at::kLong && slots.size(-1) == tokens, "slots must be one int64 per token");
}

// Writes rows [T, H, D] into cache [pages, H, P, D] at slots [T].
inline void write_pages(const at::Tensor& rows_THD, const at::Tensor& cache, const at::Tensor& slots_T) {
  TORCH_CHECK(cache.is_contiguous() && cache.dim() == 4, "a cache must be contiguous [pages, H, P, D]");
  const int64_t tokens = rows_THD.size(0), heads = cache.size(1), page_size = cache.size(2), dim = cache.size(3);
  TORCH_CHECK(
      rows_THD.dim() == 3 && rows_THD.size(1) == heads && rows_THD.size(2) == dim, "rows ", rows_THD.sizes(),
      " do not fit into a cache ", cache.sizes());
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

// Writes key [T, H, Dk] and value [T, H, Dv] into k_cache [pages, H, P, Dk] and v_cache [pages, H, P, Dv] at slots [T].
inline void write_kv(
    const at::Tensor& key, const at::Tensor& value, const at::Tensor& k_cache, const at::Tensor& v_cache,
    const at::Tensor& slots) {
  write_pages(key, k_cache, slots);
  write_pages(value, v_cache, slots);
}

// Writes channels [first_channel, first_channel + rank) of lr [T, R] into the LR block [pages * P][rank] of one agent,
// elements [offset, end) of the flat cache, at slots [T].
inline void write_block(
    const at::Tensor& lr, const at::Tensor& cache, int64_t offset, int64_t end, int64_t rank, int64_t first_channel,
    const at::Tensor& slots) {
  TORCH_CHECK(
      rank > 0 && offset >= 0 && end <= cache.numel() && first_channel >= 0 && first_channel + rank <= lr.size(1),
      "LR directory names channel ", first_channel, " and rank ", rank, " of ", lr.size(1), " channels");
  const int64_t tokens = lr.size(0), last = (end - offset) / rank;
  const int64_t* slot = slots.const_data_ptr<int64_t>();
  with_types(lr, cache, [&](auto source, auto target) {
    using From = decltype(source);
    using To = decltype(target);
    const From* from = static_cast<const From*>(lr.const_data_ptr()) + first_channel;
    To* to = static_cast<To*>(cache.mutable_data_ptr()) + offset;
    for (int64_t t = 0; t < tokens; ++t) {
      TORCH_CHECK_INDEX(slot[t] >= 0 && slot[t] < last, "slot ", slot[t], " is outside of its block");
      at::vec::convert(from + t * lr.stride(0), to + slot[t] * rank, rank);
    }
  });
}

// Writes the LR stream lr [T, R] into the LR blocks of a flat cache: for agent a, its channels at slots[a - 1]. A row
// of the directory [N + 1, 4] is offset of the block, rank, first channel in the stream, and 1 if the agent writes its
// block; row 0 is the base model and writes nothing. slots [N, T].
inline void write_lr(
    const at::Tensor& lr_TR, const at::Tensor& cache, const at::Tensor& lr_directory, const at::Tensor& slots_NT) {
  TORCH_CHECK(
      cache.is_contiguous() && cache.dim() == 1 && lr_TR.dim() == 2, "an LR stream must be [T, R], an LR cache flat");
  TORCH_CHECK(
      lr_directory.scalar_type() == at::kLong && lr_directory.is_contiguous() && lr_directory.dim() == 2 &&
          lr_directory.size(1) == 4,
      "an LR directory must be contiguous int64 [N + 1, 4]");
  TORCH_CHECK(slots_NT.dim() == 2 && slots_NT.size(0) + 1 == lr_directory.size(0), "slots must have one row per agent");
  check_slots(slots_NT, lr_TR.size(0));
  const at::Tensor lr = dense_rows(lr_TR);
  const int64_t* directory = lr_directory.const_data_ptr<int64_t>();
  for (int64_t id = 1; id < lr_directory.size(0); ++id) {
    const int64_t *row = directory + id * 4, offset = row[0], rank = row[1], first_channel = row[2], writes = row[3];
    if (!writes) continue;
    // A block ends where the next block starts. A slot past the end is an error and never overwrites another agent's
    // rows.
    int64_t end = cache.numel();
    for (int64_t other = 1; other < lr_directory.size(0); ++other) {
      if (directory[other * 4 + 3] && directory[other * 4] > offset) end = std::min(end, directory[other * 4]);
    }
    write_block(lr, cache, offset, end, rank, first_channel, slots_NT.select(0, id - 1).contiguous());
  }
}

}  // namespace lragent
