// Adapters of a call: the LR rows of private down-projections, and the product LR row times lora_b that is added to a
// strip. Legend: see linear_call.h.
#pragma once

#include <ATen/Parallel.h>

#include "routed_linear/cpp/linear_call.h"
#include "routed_linear/cpp/weight_strip.h"

namespace lragent {

// Up to kStrip features of one agent in a private down-projection, for the tokens by_agent[begin, end) of that agent.
struct PrivateStrip {
  int64_t adapters, begin, end;  // index in `LinearCall::adapters`, range of `by_agent`
  int64_t down_row, count;       // rows [down_row, down_row + count) of the down-projection
  int64_t lr_channel;            // first channel of the result in the LR stream
};

// Prefetches what `add_lora` reads of lora_b. Rows are far apart, so hardware prefetchers can't predict them.
inline void prefetch_lora_b(const LinearCall& call, const Adapters& adapters, int64_t first) {
  for (int64_t agent : call.present) {
    const Route route = adapters.of_agent(agent);
    for (int64_t row = route.lora_b_first; row < route.lora_b_first + route.rank; ++row) {
      __builtin_prefetch(adapters.lora_b.address(row * adapters.features + first));
    }
  }
}

// sums[t] += lr[t] lora_b for tokens [token0, token0 + tokens) and features [first, first + count) of a projection,
// each token with the LR channels and the lora_b of its agent. sums [tokens][ld], with room for kStrip features.
inline void add_lora(
    const LinearCall& call, const Adapters& adapters, int64_t first, int64_t count, int64_t token0, int64_t tokens,
    StripSpace& space, float* sums, int64_t ld) {
  const float* lr = call.lr.const_data_ptr<float>();
  for (int64_t agent : call.present) {
    const Route route = adapters.of_agent(agent);
    const int64_t *end = call.by_agent.data() + call.starts[agent + 1],
                  *token = std::lower_bound(call.by_agent.data() + call.starts[agent], end, token0);
    if (route.rank == 0 || token == end || *token >= token0 + tokens) continue;
    const int64_t offset = route.lora_b_first * adapters.features + first;
    const float* rows = count == kStrip ? adapters.lora_b.padded_floats(offset, kStrip) : nullptr;
    const int64_t rows_ld = rows == nullptr ? kStrip : adapters.features;
    if (rows == nullptr) {
      float* upcast = ensure_size(space.lora_b, route.rank * kStrip);
      upcast_rows(adapters.lora_b, offset, route.rank, count, adapters.features, upcast, kStrip);
      rows = upcast;
    }
    // One product per run of consecutive tokens.
    while (token != end && *token < token0 + tokens) {
      const int64_t begin = *token++;
      while (token != end && *token == token[-1] + 1 && *token < token0 + tokens) ++token;
      product<true>(
          lr + begin * call.lr_width + adapters.lr_channel(route), call.lr_width, Rows{rows, rows_ld},
          sums + (begin - token0) * ld, ld, token[-1] + 1 - begin, kStrip, route.rank);
    }
  }
}

// Inputs [tokens][x_ld] of the tokens [begin, end): a pointer into x if the tokens are consecutive, else a copy.
inline TypedPointer gather_inputs(const LinearCall& call, const int64_t* begin, const int64_t* end, StripSpace& space) {
  const int64_t tokens = end - begin;
  if (end[-1] - *begin == tokens - 1) return call.x.shifted(*begin * call.x_ld);
  TypedPointer rows(ensure_size(space.inputs, tokens * call.x_ld));
  rows.type = call.x.type;
  const int64_t bytes = rows.bytes(call.x_ld);
  auto* to = reinterpret_cast<char*>(space.inputs.data());
  for (int64_t i = 0; i < tokens; ++i) std::copy_n(call.x.address(begin[i] * call.x_ld), bytes, to + i * bytes);
  return rows;
}

// Computes the LR channels of a private strip and writes them into the LR stream. Prefetches `next`.
inline void run_private_strip(
    const LinearCall& call, const PrivateStrip& strip, const PrefetchRange& next, StripSpace& space) {
  const int64_t tokens = strip.end - strip.begin, *token = call.by_agent.data() + strip.begin;
  float* sums = ensure_size(space.sums, tokens * kStrip);
  strip_products(
      gather_inputs(call, token, token + tokens, space), tokens, call.adapters[strip.adapters].down_rows,
      strip.down_row, strip.count, call.k, next, space, sums);
  float* lr = call.lr.mutable_data_ptr<float>() + strip.lr_channel;
  for (int64_t i = 0; i < tokens; ++i) {
    store_rows(sums + i * kStrip, kStrip, 1, strip.count, nullptr, lr + token[i] * call.lr_width, call.lr_width);
  }
}

inline std::vector<PrivateStrip> private_strips(const LinearCall& call) {
  std::vector<PrivateStrip> strips;
  const int64_t block = tokens_of_block(call);
  for (int64_t i = 0; i < static_cast<int64_t>(call.adapters.size()); ++i) {
    const Adapters& adapters = call.adapters[i];
    if (!adapters.down_is_private) continue;
    for (int64_t agent : call.present) {
      const Route route = adapters.of_agent(agent);
      for (int64_t begin = call.starts[agent]; begin < call.starts[agent + 1]; begin += block) {
        const int64_t end = std::min(begin + block, call.starts[agent + 1]);
        for (int64_t c = 0; c < route.rank; c += kStrip) {
          strips.push_back(
              {i, begin, end, route.down_first + c, std::min(kStrip, route.rank - c), adapters.lr_first + c});
        }
      }
    }
  }
  return strips;
}

// Computes all private strips on all threads. `after` is read after the last strip of each thread.
inline void run_private_strips(const LinearCall& call, const PrefetchRange& after) {
  const std::vector<PrivateStrip> strips = private_strips(call);
  const int64_t count = static_cast<int64_t>(strips.size());
  if (count == 0) return;
  int64_t work = 0;
  for (const PrivateStrip& strip : strips) work += (strip.end - strip.begin) * call.k;
  const int64_t grain = std::max<int64_t>(1, (1 << 15) * count / std::max<int64_t>(work, 1));
  at::parallel_for(0, count, grain, [&](int64_t begin, int64_t end) {
    static thread_local StripSpace space;
    for (int64_t i = begin; i < end; ++i) {
      const PrivateStrip& next_strip = strips[std::min(i + 1, count - 1)];
      const PrefetchRange next =
          memory_of_rows(call.adapters[next_strip.adapters].down_rows, next_strip.down_row, next_strip.count, call.k);
      run_private_strip(call, strips[i], i + 1 < end ? next : after, space);
    }
  });
}

}  // namespace lragent
