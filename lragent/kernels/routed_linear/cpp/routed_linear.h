// The op `routed_linears`: several projections of one input, each with the adapters of all agents.
//
// Down-projections run first, since they compute the LR stream that the adapters of the other projections read. Each
// projection is cut into strips, which the threads share. Legend: see linear_call.h.
#pragma once

#include <ATen/Parallel.h>
#include <ATen/core/Tensor.h>
#include <ATen/ops/empty.h>
#include <c10/util/Exception.h>

#include "routed_linear/cpp/adapters.h"

namespace lragent {

// Weight rows of one projection that are computed together: [first, first + count), and the same rows of the three
// following sections if the weight is read in sections.
struct Strip {
  int64_t projection, first, count;
  int64_t section = 0;  // rows per section; 0: the weight is not read in sections

  int64_t sections() const { return section > 0 ? kSections : 1; }
};

inline PrefetchRange memory_of_strip(const LinearCall& call, const Strip& strip) {
  return memory_of_rows(call.projections[strip.projection].weight, strip.first, strip.count, call.k);
}

// Cuts projection `index` into strips.
inline void add_strips(const LinearCall& call, int64_t index, std::vector<Strip>& strips) {
  const Projection& projection = call.projections[index];
  const int64_t features = projection.features, section = features / kSections, threads = at::get_num_threads();
  if (section < W || features % kSections != 0 || !reads_sections(call.x, call.tokens, call.k)) {
    for (int64_t first = 0; first < features; first += kStrip) {
      strips.push_back({index, first, std::min(kStrip, features - first)});
    }
    return;
  }
  // A multiple of the number of threads, of nearly equal size, so that the threads finish together.
  const int64_t min_count = (section + kStrip - 1) / kStrip;
  const int64_t count = std::min(section, (min_count + threads - 1) / threads * threads);
  for (int64_t i = 0; i < count; ++i) {
    const int64_t first = i * section / count;
    strips.push_back({index, first, (i + 1) * section / count - first, section});
  }
}

// Adds adapters and bias to the sums of features [first, first + count) of a projection, for tokens
// [token0, token0 + tokens), and writes them to the output; those of a down-projection also to the LR stream. sums
// [tokens][ld], with room for kStrip features.
inline void finish_strip(
    const LinearCall& call, const Projection& projection, int64_t first, int64_t count, int64_t token0, int64_t tokens,
    StripSpace& space, float* sums, int64_t ld) {
  const int64_t at = token0 * call.features + projection.first + first;
  const float* bias = projection.bias.empty() ? nullptr : projection.bias.data() + first;
  if (projection.lr_first >= 0) {
    float* lr = call.lr.mutable_data_ptr<float>() + token0 * call.lr_width + projection.lr_first + first;
    store_rows(sums, ld, tokens, count, bias, lr, call.lr_width);
  }
  if (projection.adapters >= 0) {
    add_lora(call, call.adapters[projection.adapters], first, count, token0, tokens, space, sums, ld);
  }
  auto store = [&](auto* out) { store_rows(sums, ld, tokens, count, bias, out + at, call.features); };
  switch (call.out.scalar_type()) {
    case at::kFloat: return store(call.out.mutable_data_ptr<float>());
    case at::kBFloat16: return store(call.out.mutable_data_ptr<at::BFloat16>());
    default: return store(call.out.mutable_data_ptr<at::Half>());
  }
}

// Computes and writes a strip for tokens [token0, token0 + tokens). Prefetches `next`.
inline void run_strip(
    const LinearCall& call, const Strip& strip, int64_t token0, int64_t tokens, const PrefetchRange& next,
    StripSpace& space) {
  const Projection& projection = call.projections[strip.projection];
  const int64_t sections = strip.sections(), ld = sections * kStrip;
  const TypedPointer x = call.x.shifted(token0 * call.x_ld);
  float* sums = ensure_size(space.sums, tokens * ld);
  for (int64_t i = 0; projection.adapters >= 0 && i < sections; ++i) {
    prefetch_lora_b(call, call.adapters[projection.adapters], strip.first + i * strip.section);
  }
  if (strip.section > 0) {
    section_products(x, tokens, projection.weight, strip.first, strip.section, strip.count, call.k, sums);
  } else {
    strip_products(x, tokens, projection.weight, strip.first, strip.count, call.k, next, space, sums);
  }
  for (int64_t i = 0; i < sections; ++i) {
    const int64_t first = strip.first + i * strip.section;
    finish_strip(call, projection, first, strip.count, token0, tokens, space, sums + i * kStrip, ld);
  }
}

inline void run_strips(const LinearCall& call, const std::vector<Strip>& strips) {
  const int64_t block = tokens_of_block(call), count = static_cast<int64_t>(strips.size());
  int64_t rows = 0;
  for (const Strip& strip : strips) rows += strip.sections() * strip.count;
  const int64_t grain = (int64_t{1} << 20) * count / std::max<int64_t>(call.tokens * call.k * rows, 1);
  at::parallel_for(0, count, std::max<int64_t>(1, grain), [&](int64_t begin, int64_t end) {
    static thread_local StripSpace space;
    for (int64_t token = 0; token < call.tokens; token += block) {
      const int64_t tokens = std::min(block, call.tokens - token);
      for (int64_t i = begin; i < end; ++i) {
        // After the last strip, the thread's first strip is read again for the next token block.
        const PrefetchRange next = memory_of_strip(call, strips[i + 1 < end ? i + 1 : begin]);
        run_strip(call, strips[i], token, tokens, next, space);
      }
    }
  });
}

// True if all weights that are multiplied with the inputs can use the bf16 dot product.
inline bool can_use_bf16_dot(const LinearCall& call, const at::Tensor& x) {
  auto fits = [&](const TypedPointer& rows) { return can_use_bf16_dot(TypedPointer(x), rows, call.k); };
  auto projection_fits = [&](const Projection& projection) { return fits(projection.weight); };
  auto down_fits = [&](const Adapters& adapters) { return !adapters.down_is_private || fits(adapters.down_rows); };
  return std::all_of(call.projections.begin(), call.projections.end(), projection_fits) &&
      std::all_of(call.adapters.begin(), call.adapters.end(), down_fits);
}

// Sets the inputs of the call: x [..., K] itself, or an upcast and padded copy [T, padded(K)], which `storage` owns.
inline void read_inputs(LinearCall& call, const at::Tensor& x, at::Tensor& storage) {
  call.x = TypedPointer(x);
  call.x_ld = call.k;
  if (can_use_bf16_dot(call, x) || call.x.padded_floats(0, call.k) != nullptr) return;
  const TypedPointer source = call.x;
  call.x_ld = padded(call.k);
  storage = at::empty({call.tokens, call.x_ld}, x.options().dtype(at::kFloat));
  call.x = TypedPointer(storage);
  float* to = storage.mutable_data_ptr<float>();
  at::parallel_for(0, call.tokens, std::max<int64_t>(1, (1 << 15) / call.x_ld), [&](int64_t begin, int64_t end) {
    upcast_rows(source, begin * call.k, end - begin, call.k, call.k, to + begin * call.x_ld, call.x_ld);
  });
}

// Projections of x [..., K], next to each other: [..., N] in the dtype of x. agent_ids [T]. The schema, and the format
// of the lists, are those of `lragent.kernels.ops.routed_linears`.
inline at::Tensor routed_linears(
    const at::Tensor& x, const at::Tensor& agent_ids, at::TensorList tensors, at::IntArrayRef bias_of,
    at::IntArrayRef up_of, at::IntArrayRef down_of, at::IntArrayRef routes) {
  TORCH_CHECK(x.dim() >= 1 && is_supported(x.scalar_type()), "the input must be floats [..., K]");
  LinearCall call;
  call.k = x.size(-1);
  call.tokens = call.k == 0 ? 0 : x.numel() / call.k;
  read_projections(call, tensors, bias_of, up_of, down_of, routes);
  const at::Tensor inputs = x.contiguous();
  std::vector<int64_t> sizes = x.sizes().vec();
  sizes.back() = call.features;
  call.out = at::empty(sizes, x.options());
  if (call.tokens == 0) return call.out;
  if (!call.adapters.empty()) {
    read_agents(call, agent_ids);
    call.lr = at::empty({call.tokens, call.lr_width}, x.options().dtype(at::kFloat));
  }
  at::Tensor storage;
  read_inputs(call, inputs, storage);
  std::vector<Strip> downs, others;
  for (size_t i = 0; i < call.projections.size(); ++i) {
    add_strips(call, static_cast<int64_t>(i), call.projections[i].lr_first >= 0 ? downs : others);
  }
  run_strips(call, downs);
  run_private_strips(call, memory_of_strip(call, others.empty() ? downs.front() : others.front()));
  run_strips(call, others);
  return call.out;
}

}  // namespace lragent
