"""Custom ops and their kernels: attention over the cache, cache writes, projections with routed adapters.

- `ops.py`: the ops, with schemas and fake kernels. `define_op.py` defines them. `attention_call.py` documents the
  arguments of attention.
- `implementations.py`: the table of attention implementations; `dispatch.py` chooses one for a device.
- `flash_lora_attention/`, `routed_linear/`, `write_cache/`: one folder per op, with a definition in plain PyTorch
  (`reference.py`, `torch_scatter.py`) and faster kernels.
- `cpp_library.py`, `ops.cpp`, `triton_library.py`: build the compiled kernels and register them with PyTorch.
- `vector/`: vector arithmetic that the C++ kernels share.
"""
