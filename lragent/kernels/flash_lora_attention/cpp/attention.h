// The op: checks its arguments, plans, runs the items on all threads, and joins the parts of split rows.
#pragma once

#include <ATen/Parallel.h>
#include <ATen/ops/empty.h>

#include <atomic>

#include "bounds.h"
#include "run_item.h"

namespace lragent {

// One head's finished row in the output's dtype: sum / total, the sink taking part in the total.
inline void write_row(
    const Call& call, int64_t token, int64_t query_head, const float* sum, float maximum, float total) {
  float factor = 1.f;
  if (!call.sinks.empty()) {
    const float sink = call.sinks[query_head], top = std::max(maximum, sink);
    factor = maximum == kMinusInfinity ? 0.f : std::exp(maximum - top);
    total = total * factor + std::exp(sink - top);
  }
  factor = total > 0.f ? factor / total : 0.f;
  const int64_t element = (token * call.query_heads + query_head) * call.v_dim;
  auto write = [&](auto* to) {
    using T = std::remove_pointer_t<decltype(to)>;
    for (int64_t d = 0; d < call.v_dim; ++d) to[element + d] = static_cast<T>(sum[d] * factor);
  };
  void* data = call.out.mutable_data_ptr();
  switch (call.queries.type) {
    case at::kFloat: return write(static_cast<float*>(data));
    case at::kBFloat16: return write(static_cast<at::BFloat16*>(data));
    default: return write(static_cast<at::Half*>(data));
  }
}

// Results of items that hold only a part of the keys of their rows.
class Parts {
 public:
  Parts(const Call& call, const Plan& plan) : call_(call), by_token_(plan.parts > 0 ? call.tokens : 0) {
    int64_t numbers = 0;
    for (const Item& item : plan.items) {
      if (!item.partial) continue;
      for (size_t row = 0; row < item.rows.size(); ++row) {
        for (int64_t head = item.first_head; head < item.last_head; ++head) {
          auto& list = by_token_[item.rows[row].token];
          if (list.empty()) tokens_.push_back(item.rows[row].token);
          list.push_back({head, numbers + row_start(item, head, row)});
        }
      }
      offsets_.resize(plan.parts);
      offsets_[item.part] = numbers;
      numbers += (item.last_head - item.first_head) * static_cast<int64_t>(item.rows.size()) * call.group * width();
    }
    numbers_.resize(numbers);
  }

  void keep(const Item& item, const Workspace& space) {
    const int64_t rows = static_cast<int64_t>(item.rows.size()) * call_.group;
    float* to = numbers_.data() + offsets_[item.part];
    for (int64_t at = 0; at < (item.last_head - item.first_head) * rows; ++at, to += width()) {
      std::copy_n(space.out.data() + at * call_.v_pad, call_.v_pad, to);
      to[call_.v_pad] = space.maximum[at];
      to[call_.v_pad + 1] = space.total[at];
    }
  }

  int64_t tokens() const { return static_cast<int64_t>(tokens_.size()); }

  // Joins all parts of one token; `sum` is scratch.
  void join(int64_t index, std::vector<float>& sum) const {
    const int64_t token = tokens_[index];
    sum.resize(call_.v_pad);
    for (int64_t head = 0; head < call_.heads; ++head) {
      for (int64_t g = 0; g < call_.group; ++g) {
        float maximum = kMinusInfinity, total = 0.f;
        for_parts(token, head, g, [&](const float* part) { maximum = std::max(maximum, part[call_.v_pad]); });
        std::fill(sum.begin(), sum.end(), 0.f);
        for_parts(token, head, g, [&](const float* part) {
          if (part[call_.v_pad] == kMinusInfinity) return;
          const float factor = std::exp(part[call_.v_pad] - maximum);
          total += part[call_.v_pad + 1] * factor;
          for (int64_t d = 0; d < call_.v_pad; ++d) sum[d] += part[d] * factor;
        });
        write_row(call_, token, head * call_.group + g, sum.data(), maximum, total);
      }
    }
  }

 private:
  struct Place {
    int64_t head, start;
  };

  // A row of a part: sums, maximum, total.
  int64_t width() const { return call_.v_pad + 2; }
  int64_t row_start(const Item& item, int64_t head, size_t row) const {
    const int64_t rows = static_cast<int64_t>(item.rows.size());
    return ((head - item.first_head) * rows + static_cast<int64_t>(row)) * call_.group * width();
  }
  template <typename F>
  void for_parts(int64_t token, int64_t head, int64_t g, const F& f) const {
    for (const Place& place : by_token_[token]) {
      if (place.head == head) f(numbers_.data() + place.start + g * width());
    }
  }

  const Call& call_;
  std::vector<std::vector<Place>> by_token_;
  std::vector<int64_t> tokens_, offsets_;
  std::vector<float> numbers_;
};

// Whether queries, cache and LR columns are bfloat16 numbers in rows that can be multiplied in pairs.
inline bool multiplies_in_pairs(const Call& call) {
  auto is_bfloat16 = [](const Numbers& numbers) { return numbers.type == at::kBFloat16; };
  return kMultipliesPairs && is_bfloat16(call.queries) && is_bfloat16(call.k_cache) && is_bfloat16(call.v_cache) &&
      call.k_low.is_bfloat16() && call.v_low.is_bfloat16() && call.k_dim % (2 * W) == 0 && call.v_dim % (2 * W) == 0 &&
      call.keys_lie_well();
}

inline void run_and_write(const Call& call, const Item& item, const Item* next, Parts& parts, Workspace& space) {
  ItemRun(call, item, next, space).run();
  if (item.partial) {
    parts.keep(item, space);
    return;
  }
  const int64_t rows = static_cast<int64_t>(item.rows.size()) * call.group;
  for (int64_t head = item.first_head; head < item.last_head; ++head) {
    for (int64_t row = 0; row < rows; ++row) {
      const int64_t at = (head - item.first_head) * rows + row;
      write_row(
          call, item.rows[row / call.group].token, head * call.group + row % call.group,
          space.out.data() + at * call.v_pad, space.maximum[at], space.total[at]);
    }
  }
}

inline at::Tensor flash_lora_attention(
    const at::Tensor& query, const at::Tensor& k_cache, const at::Tensor& v_cache, const at::Tensor& agent_ids,
    const at::Tensor& seq_starts, const at::Tensor& context_lens, const at::Tensor& page_table,
    const OptionalTensor& lr_k, const OptionalTensor& lr_k_table, const OptionalTensor& b_k, const OptionalTensor& lr_v,
    const OptionalTensor& lr_v_table, const OptionalTensor& b_v, const OptionalTensor& rope_cos,
    const OptionalTensor& rope_sin, const OptionalTensor& rope_partner, const OptionalTensor& norm_weight,
    double norm_eps, bool key_is_final, const OptionalTensor& sinks, double scale, int64_t window, double softcap) {
  for (const at::Tensor& t : {query, k_cache, v_cache}) {
    TORCH_CHECK(is_supported(t.scalar_type()), "unsupported dtype ", t.scalar_type(), " of query or cache");
  }
  TORCH_CHECK(k_cache.is_contiguous() && v_cache.is_contiguous(), "cache tensors must be contiguous");
  TORCH_CHECK(query.dim() == 3 && k_cache.dim() == 4 && v_cache.dim() == 4,
      "query must be [T, Hq, Dk], caches [pages, H, P, D]");
  TORCH_CHECK(k_cache.size(3) == query.size(2) && k_cache.sizes().slice(0, 3) == v_cache.sizes().slice(0, 3),
      "query ", query.sizes(), ", K cache ", k_cache.sizes(), " and V cache ", v_cache.sizes(), " do not fit");
  TORCH_CHECK(!key_is_final || !norm_weight.has_value(), "a final key has no norm");
  Call call;
  call.query = query.contiguous();
  call.tokens = query.size(0);
  call.query_heads = query.size(1);
  call.heads = k_cache.size(1);
  call.group = call.query_heads / call.heads;
  TORCH_CHECK(call.group * call.heads == call.query_heads, "query heads must be a multiple of KV heads");
  call.k_dim = query.size(2);
  call.v_dim = v_cache.size(3);
  call.k_pad = padded(call.k_dim);
  call.v_pad = padded(call.v_dim);
  call.page_size = k_cache.size(2);
  call.k_cache = Numbers(k_cache);
  call.v_cache = Numbers(v_cache);
  call.queries = Numbers(call.query);
  call.key_is_final = key_is_final;
  call.norm_eps = static_cast<float>(norm_eps);
  TORCH_CHECK(scale > 0, "scale must be positive, got ", scale);
  call.score_scale = {static_cast<float>(scale), static_cast<float>(softcap)};
  call.window = window;
  if (norm_weight) {
    call.normalizes = true;
    call.norm_weight = float_vector(*norm_weight, call.k_pad);
  }
  if (sinks) call.sinks = float_vector(*sinks, call.query_heads);
  if (rope_cos && rope_sin && rope_partner) read_rotation(call, *rope_cos, *rope_sin, *rope_partner);
  const int64_t slots = k_cache.size(0) * call.page_size;
  call.k_low.read(lr_k, lr_k_table, b_k, call.heads, call.k_dim, slots);
  call.v_low.read(lr_v, lr_v_table, b_v, call.heads, call.v_dim, slots);
  call.in_pairs = multiplies_in_pairs(call);
  call.out = at::empty({call.tokens, call.query_heads, call.v_dim}, query.options());

  const int64_t sequences = context_lens.size(0);
  const Step step{
      call.page_size, page_table.size(1), call.heads, call.group, window, at::get_num_threads(),
      integers(seq_starts, "seq_starts"), integers(context_lens, "context_lens"), integers(page_table, "page_table"),
      integers(agent_ids, "agent_ids")};
  TORCH_CHECK(
      agent_ids.numel() == call.tokens && seq_starts.numel() == sequences + 1 && page_table.size(0) == sequences,
      "sizes of query, agent_ids, seq_starts, context_lens and page_table differ");
  check_bounds(step, sequences, call.tokens, k_cache.size(0), call.agents(), call.rotates ? call.positions : -1);
  for (int64_t token = 0; token < call.tokens; ++token) {
    const int64_t agent = step.agent_ids[token];
    call.v_low.use(agent);
    if constexpr (kMultipliesPairs) {
      if (call.adds_pairs_to_keys()) {
        call.k_low.use_in_pairs(agent);
        continue;
      }
    }
    call.k_low.use(agent);
  }
  const Plan plan(step, sequences);
  Parts parts(call, plan);
  std::atomic<size_t> next{0};
  at::parallel_for(0, step.threads, 1, [&](int64_t, int64_t) {
    static thread_local Workspace space;  // kept between calls: fresh memory costs a page fault every 4 KiB
    const size_t count = plan.items.size(), threads = static_cast<size_t>(step.threads);
    for (size_t i = next++; i < count; i = next++) {
      // Threads take items in turn, most of the time.
      const Item* likely_next = i + threads < count ? &plan.items[i + threads] : nullptr;
      run_and_write(call, plan.items[i], likely_next, parts, space);
    }
  });
  at::parallel_for(0, parts.tokens(), 8, [&](int64_t begin, int64_t end) {
    std::vector<float> sum;
    for (int64_t i = begin; i < end; ++i) parts.join(i, sum);
  });
  return call.out;
}

}  // namespace lragent
