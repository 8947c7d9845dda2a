// Registers the C++ kernels for the CPU. `ops.py` defines the schemas of the ops.
//
// This is the only translation unit. The kernels are headers of templates and inline functions, so that the compiler
// inlines the vector code into each loop, and so that all code is compiled with the same instruction set flags. Any
// change therefore rebuilds everything (about half a minute).
#include <torch/library.h>

#include "flash_lora_attention/cpp/attention.h"
#include "routed_linear/cpp/routed_linear.h"
#include "write_cache/scatter.h"

TORCH_LIBRARY_IMPL(lragent, CPU, m) {
  m.impl("flash_lora_attention_cpp", &lragent::flash_lora_attention);
  m.impl("routed_linears", &lragent::routed_linears);
  m.impl("write_kv", &lragent::write_kv);
  m.impl("write_lr", &lragent::write_lr);
}
