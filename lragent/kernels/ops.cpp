// Registers the C++ kernels for the CPU; the ops' schemas are defined in `ops.py`.
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
