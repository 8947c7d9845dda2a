// The op `flash_lora_attention`: checks its arguments, plans work items, runs them on all threads, and merges the
// partial results of tokens whose keys are spread over several items. Legend: see call.h.
#pragma once

#include <ATen/Parallel.h>
#include <ATen/ops/empty.h>

#include <atomic>

#include "flash_lora_attention/cpp/bounds.h"
#include "flash_lora_attention/cpp/run_item.h"

namespace lragent {

// Writes the output [Dv] of one token and query head: sum / total, in the output's dtype. The total includes the sink.
// `sum` is [v_pad].
inline void write_row(
    const AttentionCall& call, int64_t token, int64_t query_head, const float* sum, float maximum, float total) {
  float factor = 1.f;
  if (!call.sinks.empty()) {
    const float sink = call.sinks[query_head], top = std::max(maximum, sink);
    factor = maximum == kMinusInfinity ? 0.f : std::exp(maximum - top);
    total = total * factor + std::exp(sink - top);
  }
  factor = total > 0.f ? factor / total : 0.f;
  const int64_t offset = (token * call.query_heads + query_head) * call.v_dim;
  auto write = [&](auto* to) {
    using T = std::remove_pointer_t<decltype(to)>;
    for (int64_t d = 0; d < call.v_dim; ++d) to[offset + d] = static_cast<T>(sum[d] * factor);
  };
  void* data = call.out.mutable_data_ptr();
  switch (call.queries.type) {
    case at::kFloat: return write(static_cast<float*>(data));
    case at::kBFloat16: return write(static_cast<at::BFloat16*>(data));
    default: return write(static_cast<at::Half*>(data));
  }
}

// Results of the partial items: for each query row its sums [v_pad], its maximum and its total.
class PartialResults {
 public:
  PartialResults(const AttentionCall& call, const WorkPlan& plan)
      : call_(call), by_token_(plan.partial_items > 0 ? call.tokens : 0) {
    int64_t size = 0;
    for (const WorkItem& item : plan.items) {
      if (!item.is_partial) continue;
      for (size_t i = 0; i < item.tokens.size(); ++i) {
        for (int64_t head = item.first_head; head < item.last_head; ++head) {
          auto& list = by_token_[item.tokens[i].token];
          if (list.empty()) tokens_.push_back(item.tokens[i].token);
          list.push_back({head, size + group_start(item, head, i)});
        }
      }
      item_starts_.resize(plan.partial_items);
      item_starts_[item.partial_index] = size;
      size += (item.last_head - item.first_head) * static_cast<int64_t>(item.tokens.size()) * call.gqa_group * width();
    }
    results_.resize(size);
  }

  // Copies the result of a partial item. Items have disjoint memory, so threads may store at the same time.
  void store(const WorkItem& item, const Workspace& space) {
    const int64_t rows = static_cast<int64_t>(item.tokens.size()) * call_.gqa_group;
    float* to = results_.data() + item_starts_[item.partial_index];
    for (int64_t at = 0; at < (item.last_head - item.first_head) * rows; ++at, to += width()) {
      std::copy_n(space.out.data() + at * call_.v_pad, call_.v_pad, to);
      to[call_.v_pad] = space.maximum[at];
      to[call_.v_pad + 1] = space.total[at];
    }
  }

  // Number of tokens with partial results.
  int64_t tokens() const { return static_cast<int64_t>(tokens_.size()); }

  // Merges the partial results of token `index` and writes its output. `sum` is scratch memory.
  void merge(int64_t index, std::vector<float>& sum) const {
    const int64_t token = tokens_[index];
    sum.resize(call_.v_pad);
    for (int64_t head = 0; head < call_.heads; ++head) {
      for (int64_t g = 0; g < call_.gqa_group; ++g) {
        float maximum = kMinusInfinity, total = 0.f;
        for_results(token, head, g, [&](const float* row) { maximum = std::max(maximum, row[call_.v_pad]); });
        std::fill(sum.begin(), sum.end(), 0.f);
        for_results(token, head, g, [&](const float* row) {
          if (row[call_.v_pad] == kMinusInfinity) return;
          const float factor = std::exp(row[call_.v_pad] - maximum);
          total += row[call_.v_pad + 1] * factor;
          for (int64_t d = 0; d < call_.v_pad; ++d) sum[d] += row[d] * factor;
        });
        write_row(call_, token, head * call_.gqa_group + g, sum.data(), maximum, total);
      }
    }
  }

 private:
  // Result of one item for one token and KV head: G rows from `start` on.
  struct GroupResult {
    int64_t head, start;
  };

  // Floats per query row: sums, maximum, total.
  int64_t width() const { return call_.v_pad + 2; }
  // Start of the result of the item's token `i` and KV head `head`, relative to the start of the item.
  int64_t group_start(const WorkItem& item, int64_t head, size_t i) const {
    const int64_t tokens = static_cast<int64_t>(item.tokens.size());
    return ((head - item.first_head) * tokens + static_cast<int64_t>(i)) * call_.gqa_group * width();
  }
  // Calls f(row) for the partial results of one token and query head.
  template <typename F>
  void for_results(int64_t token, int64_t head, int64_t g, const F& f) const {
    for (const GroupResult& result : by_token_[token]) {
      if (result.head == head) f(results_.data() + result.start + g * width());
    }
  }

  const AttentionCall& call_;
  std::vector<std::vector<GroupResult>> by_token_;  // [T]
  std::vector<int64_t> tokens_, item_starts_;       // [tokens with partial results], [partial items]
  std::vector<float> results_;                      // flat
};

// True if queries, cache and LR streams are bf16 and their rows are whole chunks of pairs.
inline bool can_use_bf16_dot(const AttentionCall& call) {
  auto is_bf16 = [](const TypedPointer& data) { return data.type == at::kBFloat16; };
  return kHasBf16Dot && is_bf16(call.queries) && is_bf16(call.k_cache) && is_bf16(call.v_cache) &&
      call.k_lr.is_bf16() && call.v_lr.is_bf16() && call.k_dim % (2 * W) == 0 && call.v_dim % (2 * W) == 0 &&
      call.keys_need_no_padding();
}

inline void run_and_write(
    const AttentionCall& call, const WorkItem& item, const WorkItem* next_item, PartialResults& partial_results,
    Workspace& space) {
  ItemRun(call, item, next_item, space).run();
  if (item.is_partial) {
    partial_results.store(item, space);
    return;
  }
  const int64_t rows = static_cast<int64_t>(item.tokens.size()) * call.gqa_group;
  for (int64_t head = item.first_head; head < item.last_head; ++head) {
    for (int64_t row = 0; row < rows; ++row) {
      const int64_t at = (head - item.first_head) * rows + row;
      write_row(
          call, item.tokens[row / call.gqa_group].token, head * call.gqa_group + row % call.gqa_group,
          space.out.data() + at * call.v_pad, space.maximum[at], space.total[at]);
    }
  }
}

// Attention of packed queries over the paged cache: [T, Hq, Dv] in the query's dtype. The schema, and the meaning of
// the arguments, are those of `lragent.kernels.ops.flash_lora_attention`.
//
// Shapes: query [T, Hq, Dk], k_cache [pages, H, P, Dk], v_cache [pages, H, P, Dv], agent_ids [T], seq_starts [S + 1],
// context_lens [S], page_table [S, M]; lr_k and lr_v flat, their directories [N + 1, 4], lora_b_k [N + 1, H, r, Dk],
// lora_b_v [N + 1, H, r, Dv]; rope_cos and rope_sin [positions, Dk], rope_partner [Dk], norm_weight [Dk], sinks [Hq].
inline at::Tensor flash_lora_attention(
    const at::Tensor& query, const at::Tensor& k_cache, const at::Tensor& v_cache, const at::Tensor& agent_ids,
    const at::Tensor& seq_starts, const at::Tensor& context_lens, const at::Tensor& page_table,
    const OptionalTensor& lr_k, const OptionalTensor& lr_k_directory, const OptionalTensor& lora_b_k,
    const OptionalTensor& lr_v, const OptionalTensor& lr_v_directory, const OptionalTensor& lora_b_v,
    const OptionalTensor& rope_cos, const OptionalTensor& rope_sin, const OptionalTensor& rope_partner,
    const OptionalTensor& norm_weight, double norm_eps, bool key_is_final, const OptionalTensor& sinks, double scale,
    int64_t window, double softcap) {
  for (const at::Tensor& t : {query, k_cache, v_cache}) {
    TORCH_CHECK(is_supported(t.scalar_type()), "unsupported dtype ", t.scalar_type(), " of query or cache");
  }
  TORCH_CHECK(k_cache.is_contiguous() && v_cache.is_contiguous(), "cache tensors must be contiguous");
  TORCH_CHECK(
      query.dim() == 3 && k_cache.dim() == 4 && v_cache.dim() == 4,
      "query must be [T, Hq, Dk], caches [pages, H, P, D]");
  TORCH_CHECK(
      k_cache.size(3) == query.size(2) && k_cache.sizes().slice(0, 3) == v_cache.sizes().slice(0, 3), "query ",
      query.sizes(), ", K cache ", k_cache.sizes(), " and V cache ", v_cache.sizes(), " do not fit");
  TORCH_CHECK(!key_is_final || !norm_weight.has_value(), "a final key has no norm");
  AttentionCall call;
  call.query = query.contiguous();
  call.tokens = query.size(0);
  call.query_heads = query.size(1);
  call.heads = k_cache.size(1);
  call.gqa_group = call.query_heads / call.heads;
  TORCH_CHECK(call.gqa_group * call.heads == call.query_heads, "query heads must be a multiple of KV heads");
  call.k_dim = query.size(2);
  call.v_dim = v_cache.size(3);
  call.k_pad = padded(call.k_dim);
  call.v_pad = padded(call.v_dim);
  call.page_size = k_cache.size(2);
  call.k_cache = TypedPointer(k_cache);
  call.v_cache = TypedPointer(v_cache);
  call.queries = TypedPointer(call.query);
  call.key_is_final = key_is_final;
  call.norm_eps = static_cast<float>(norm_eps);
  TORCH_CHECK(scale > 0, "scale must be positive, got ", scale);
  call.score_scale = {static_cast<float>(scale), static_cast<float>(softcap)};
  call.window = window;
  if (norm_weight) {
    call.has_norm = true;
    call.norm_weight = float_vector(*norm_weight, call.k_pad);
  }
  if (sinks) call.sinks = float_vector(*sinks, call.query_heads);
  if (rope_cos && rope_sin && rope_partner) read_rope(call, *rope_cos, *rope_sin, *rope_partner);
  const int64_t slots = k_cache.size(0) * call.page_size;
  call.k_lr.read(lr_k, lr_k_directory, lora_b_k, call.heads, call.k_dim, slots);
  call.v_lr.read(lr_v, lr_v_directory, lora_b_v, call.heads, call.v_dim, slots);
  call.uses_bf16_dot = can_use_bf16_dot(call);
  call.out = at::empty({call.tokens, call.query_heads, call.v_dim}, query.options());

  const int64_t sequences = context_lens.size(0);
  const StepView step{
      call.page_size,
      page_table.size(1),
      call.heads,
      call.gqa_group,
      window,
      at::get_num_threads(),
      integers(seq_starts, "seq_starts"),
      integers(context_lens, "context_lens"),
      integers(page_table, "page_table"),
      integers(agent_ids, "agent_ids")};
  TORCH_CHECK(
      agent_ids.numel() == call.tokens && seq_starts.numel() == sequences + 1 && page_table.size(0) == sequences,
      "sizes of query, agent_ids, seq_starts, context_lens and page_table differ");
  check_bounds(step, sequences, call.tokens, k_cache.size(0), call.agents(), call.has_rope ? call.rope_positions : -1);
  for (int64_t token = 0; token < call.tokens; ++token) {
    const int64_t agent = step.agent_ids[token];
    call.v_lr.prepare(agent);
    if constexpr (kHasBf16Dot) {
      if (call.fuses_lora_pairs()) {
        call.k_lr.prepare_pairs(agent);
        continue;
      }
    }
    call.k_lr.prepare(agent);
  }
  const WorkPlan plan(step, sequences);
  PartialResults partial_results(call, plan);
  std::atomic<size_t> next{0};
  at::parallel_for(0, step.threads, 1, [&](int64_t, int64_t) {
    static thread_local Workspace space;  // reused by later calls: new memory costs a page fault per 4 KiB
    const size_t count = plan.items.size(), threads = static_cast<size_t>(step.threads);
    for (size_t i = next++; i < count; i = next++) {
      // Threads mostly take items in turn, so this thread probably continues with this item.
      const WorkItem* next_item = i + threads < count ? &plan.items[i + threads] : nullptr;
      run_and_write(call, plan.items[i], next_item, partial_results, space);
    }
  });
  at::parallel_for(0, partial_results.tokens(), 8, [&](int64_t begin, int64_t end) {
    std::vector<float> sum;
    for (int64_t i = begin; i < end; ++i) partial_results.merge(i, sum);
  });
  return call.out;
}

}  // namespace lragent
