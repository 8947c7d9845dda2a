// Adapters of a call: an agent's own columns of a down-projection, and what its up-projection adds to a strip.
#pragma once

#include <ATen/Parallel.h>

#include "linear_call.h"
#include "weight_strip.h"

namespace lragent {

// A strip of one agent's columns of a down-projection, for tokens [begin, end) of `by_agent`.
struct OwnStrip {
  int64_t up, begin, end, row, count, column;
};

// Asks for what `add_routed` reads: it lies in as many places as there are ranks.
inline void ask_for_routed(const LinearCall& call, const Up& up, int64_t first) {
  for (int64_t agent : call.present) {
    const Route route = up.of(agent);
    for (int64_t row = route.target; row < route.target + route.rank; ++row) {
      __builtin_prefetch(up.numbers.at(row * up.features + first));
    }
  }
}

// sums[t] += low[t] B for `count` features from `first` on, for every token by its agent's columns; tokens' sums are
// `ld` apart.
inline void add_routed(const LinearCall& call, const Up& up, int64_t first, int64_t count, int64_t token0,
                       int64_t tokens, StripSpace& space, float* sums, int64_t ld) {
  const float* low = call.low.const_data_ptr<float>();
  for (int64_t agent : call.present) {
    const Route route = up.of(agent);
    const int64_t *end = call.by_agent.data() + call.starts[agent + 1],
                  *token = std::lower_bound(call.by_agent.data() + call.starts[agent], end, token0);
    if (route.rank == 0 || token == end || *token >= token0 + tokens) continue;
    const int64_t element = route.target * up.features + first;
    const float* rows = count == kStrip ? up.numbers.floats(element, kStrip) : nullptr;
    const int64_t apart = rows == nullptr ? kStrip : up.features;
    if (rows == nullptr) {
      float* extended = at_least(space.up, route.rank * kStrip);
      to_floats(up.numbers, element, route.rank, count, up.features, extended, kStrip);
      rows = extended;
    }
    while (token != end && *token < token0 + tokens) {
      const int64_t begin = *token++;  // of tokens that follow each other
      while (token != end && *token == token[-1] + 1 && *token < token0 + tokens) ++token;
      product<true>(
          low + begin * call.low_columns + up.low_column(route), call.low_columns, Rows{rows, apart},
          sums + (begin - token0) * ld, ld, token[-1] + 1 - begin, kStrip, route.rank);
    }
  }
}

// Inputs of tokens, side by side: where they lie if they follow each other, or copied.
inline Numbers gathered(const LinearCall& call, const int64_t* begin, const int64_t* end, StripSpace& space) {
  const int64_t tokens = end - begin;
  if (end[-1] - *begin == tokens - 1) return call.x.from(*begin * call.x_ld);
  Numbers rows(at_least(space.inputs, tokens * call.x_ld));
  rows.type = call.x.type;
  const int64_t bytes = rows.bytes(call.x_ld);
  auto* to = reinterpret_cast<char*>(space.inputs.data());
  for (int64_t i = 0; i < tokens; ++i) std::copy_n(call.x.at(begin[i] * call.x_ld), bytes, to + i * bytes);
  return rows;
}

// An own strip's columns of `low`.
inline void run_own_strip(const LinearCall& call, const OwnStrip& strip, const Next& next, StripSpace& space) {
  const int64_t tokens = strip.end - strip.begin, *token = call.by_agent.data() + strip.begin;
  float* sums = at_least(space.sums, tokens * kStrip);
  strip_products(
      gathered(call, token, token + tokens, space), tokens, call.ups[strip.up].down_rows, strip.row, strip.count,
      call.k, next, space, sums);
  float* low = call.low.mutable_data_ptr<float>() + strip.column;
  for (int64_t i = 0; i < tokens; ++i) {
    store_rows(sums + i * kStrip, kStrip, 1, strip.count, nullptr, low + token[i] * call.low_columns, call.low_columns);
  }
}

inline std::vector<OwnStrip> own_strips(const LinearCall& call) {
  std::vector<OwnStrip> strips;
  const int64_t block = tokens_of_block(call);
  for (int64_t i = 0; i < static_cast<int64_t>(call.ups.size()); ++i) {
    const Up& up = call.ups[i];
    if (!up.own) continue;
    for (int64_t agent : call.present) {
      const Route route = up.of(agent);
      for (int64_t begin = call.starts[agent]; begin < call.starts[agent + 1]; begin += block) {
        const int64_t end = std::min(begin + block, call.starts[agent + 1]);
        for (int64_t c = 0; c < route.rank; c += kStrip) {
          strips.push_back(
              {i, begin, end, route.source + c, std::min(kStrip, route.rank - c), up.low_first + c});
        }
      }
    }
  }
  return strips;
}

// Computes all own strips; `then` is read after them.
inline void run_own_strips(const LinearCall& call, const Next& then) {
  const std::vector<OwnStrip> strips = own_strips(call);
  const int64_t count = static_cast<int64_t>(strips.size());
  if (count == 0) return;
  int64_t work = 0;
  for (const OwnStrip& strip : strips) work += (strip.end - strip.begin) * call.k;
  at::parallel_for(0, count, std::max<int64_t>(1, (1 << 15) * count / std::max<int64_t>(work, 1)),
      [&](int64_t begin, int64_t end) {
        static thread_local StripSpace space;
        for (int64_t i = begin; i < end; ++i) {
          const OwnStrip& after = strips[std::min(i + 1, count - 1)];
          const Next next = rows_from(call.ups[after.up].down_rows, after.row, after.count, call.k);
          run_own_strip(call, strips[i], i + 1 < end ? next : then, space);
        }
      });
}

}  // namespace lragent
