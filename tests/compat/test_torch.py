"""One test per private API of torch; it fails by name if the API changes."""

from __future__ import annotations

import re
import sys
import zipfile
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from lragent.compat import torch as compat

OPS = torch.ops.aten


class Function(nn.Module):
    def __init__(self, function: Any) -> None:
        super().__init__()
        self.function = function

    def forward(self, x: Tensor) -> Tensor:
        result: Tensor = self.function(x)
        return result


def export(function: Any, fewest: int = 1, unproven: bool = False) -> torch.export.ExportedProgram:
    """Exports a function of `[1, T]` as the model is exported."""
    tokens = torch.export.Dim("T", min=fewest, max=1024)
    return torch.export.export(
        Function(function),
        (torch.ones(1, 7),),
        dynamic_shapes={"x": {1: tokens}},
        strict=False,
        prefer_deferred_runtime_asserts_over_guards=unproven,
    )


def export_error(function: Any) -> Exception:
    with pytest.raises(Exception) as caught:
        export(function)
    error = caught.value
    assert isinstance(error, Exception)
    return error


def branches_on_size(x: Tensor) -> Tensor:
    return x + 1 if x.shape[1] % 2 else x


def branches_on_value(x: Tensor) -> Tensor:
    return x + 1 if x.sum() > 5 else x


def test_ops_op_overload() -> None:
    """torch._ops.OpOverload"""
    program = export(lambda x: x + 1)
    called = [node.target for node in program.graph.nodes if node.op == "call_function"]
    assert called == [OPS.add.Tensor] and isinstance(called[0], compat.OpOverload)
    assert not isinstance(OPS.add, compat.OpOverload) and not isinstance(len, compat.OpOverload)


def test_schema() -> None:
    """OpOverload._schema"""
    assert compat.arguments_of(OPS.add_.Tensor) == (
        compat.OpArgument("self", None, True),
        compat.OpArgument("other", None, False),
        compat.OpArgument("alpha", 1, False),
    )
    # An argument that the output aliases is not written.
    assert not any(argument.is_written for argument in compat.arguments_of(OPS.view.default))


def test_dispatch_has_kernel_for_dispatch_key() -> None:
    """torch._C._dispatch_has_kernel_for_dispatch_key"""
    torch.library.define("lragent_canary::only_cpu", "(Tensor x) -> Tensor")
    op = torch.ops.lragent_canary.only_cpu.default
    assert not compat.has_kernel(op, "CPU")
    torch.library.impl("lragent_canary::only_cpu", "CPU", torch.clone)
    assert compat.has_kernel(op, "CPU") and not compat.has_kernel(op, "CUDA")


def test_check() -> None:
    """torch._check"""
    compat.require_in_graph(True)
    with pytest.raises(RuntimeError):
        compat.require_in_graph(False)

    def equal_sizes(x: Tensor) -> Tensor:
        known = torch.nonzero(x[0])[:, 0]
        compat.require_in_graph(known.shape[0] == x.shape[1])
        return x + known

    assert torch.equal(export(equal_sizes, 2).module()(torch.ones(1, 3)), torch.tensor([[1.0, 2.0, 3.0]]))


def test_pytree_tree_flatten() -> None:
    """torch.utils._pytree.tree_flatten"""
    assert compat.leaves(((1, {"a": 2, "b": [3]}), None)) == [1, 2, 3, None]


def test_pytree_tree_map() -> None:
    """torch.utils._pytree.tree_map"""
    assert compat.map_leaves(lambda leaf: leaf + 1, (1, {"a": 2, "b": [3]})) == (2, {"a": 3, "b": [4]})


def test_fake_tensor_mode() -> None:
    """torch._subclasses.fake_tensor.FakeTensorMode"""
    mode = compat.fake_mode()
    held = torch.ones(3, 4, dtype=torch.bfloat16)
    with mode:
        product = torch.empty(1 << 40, 3, dtype=torch.bfloat16) @ compat.as_fake(mode, held)
    assert product.shape == (1 << 40, 4) and product.dtype == torch.bfloat16
    assert all(type(size) is int for size in product.shape)


@pytest.mark.parametrize("op", [OPS.nonzero.default, OPS._local_scalar_dense.default])
def test_fake_tensor_exceptions(op: compat.OpOverload) -> None:
    """torch._subclasses.fake_tensor.DataDependentOutputException, DynamicOutputShapeException"""
    with compat.fake_mode(), pytest.raises(compat.SHAPE_DEPENDS_ON_VALUES):
        op(torch.ones(1))


def test_cpp_builder_get_cpp_compiler() -> None:
    """torch._inductor.cpp_builder.get_cpp_compiler"""
    from torch._inductor import config

    with config.patch({"cpp.cxx": (sys.executable,)}):  # a program that every machine has
        assert compat.find_cpp_compiler() == sys.executable


def test_exc_invalid_cxx_compiler() -> None:
    """torch._inductor.exc.InvalidCxxCompiler"""
    from torch._inductor import config

    with config.patch({"cpp.cxx": ("no-such-compiler",)}):
        assert compat.find_cpp_compiler() is None


def test_inductor_fresh_cache() -> None:
    """torch._inductor.utils.fresh_cache"""
    from torch._inductor.runtime.cache_dir_utils import cache_dir

    before = cache_dir()
    with compat.empty_inductor_cache():
        inside = Path(cache_dir())
        assert str(inside) != before and not [file for file in inside.rglob("*") if file.is_file()]
    assert cache_dir() == before


@pytest.fixture(scope="module")
def package(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """torch._inductor.aoti_compile_and_package: y = x W^T + b, `[T, 16]`."""
    path: Path = tmp_path_factory.mktemp("package") / "linear.pt2"
    torch.manual_seed(0)
    layer = nn.Linear(16, 16).requires_grad_(False)  # Inductor puts vectors of up to 8 elements into the code
    tokens = torch.export.Dim("T", min=2, max=64)
    compat.compile_package(torch.export.export(layer, (torch.ones(3, 16),), dynamic_shapes=({0: tokens},)), path)
    return path


def test_inductor_aoti_compile_and_package(package: Path) -> None:
    """torch._inductor.aoti_compile_and_package"""
    with zipfile.ZipFile(package) as archive:
        contents = [archive.read(name) for name in archive.namelist()]
    assert any(contents)
    torch.manual_seed(0)
    weights = nn.Linear(16, 16).weight.detach().numpy().tobytes()
    assert not any(weights in content for content in contents)


def test_aoti_load_package_get_constant_fqns(package: Path) -> None:
    """torch._inductor.aoti_load_package, AOTICompiledModel.get_constant_fqns"""
    assert sorted(compat.weight_names(compat.load_package(package, torch.device("cpu")))) == ["bias", "weight"]


def test_load_constants_boxed_run(package: Path) -> None:
    """AOTICompiledModel.load_constants, AOTICompiledModel.loader.boxed_run"""
    loaded = compat.load_package(package, torch.device("cpu"))
    weights = {"weight": torch.eye(16), "bias": torch.zeros(16)}
    compat.bind_weights(loaded, weights)
    run = compat.run_function(loaded)
    given = torch.arange(32.0).reshape(2, 16)
    inputs = [given]
    assert torch.equal(run(inputs)[0], given) and inputs == []
    weights["bias"] += 1  # the package reads the weights in place
    assert torch.equal(run([given])[0], given + 1)


def test_dynamo_exc_user_error() -> None:
    """torch._dynamo.exc.UserError"""
    assert isinstance(export_error(branches_on_size), compat.export_refused())


def test_text_of_constraint_violation_error() -> None:
    """text of torch.fx.experimental.symbolic_shapes.ConstraintViolationError"""
    error = export_error(branches_on_size)
    assert compat.is_constraint_violation(error) and not compat.branches_on_values(error)
    guard = compat.violated_guard(error)
    assert guard is not None and guard.rstrip(".") == "(L['x'].size()[1] % 2) != 0"
    assert not compat.is_constraint_violation(RuntimeError("")) and compat.violated_guard(RuntimeError("")) is None


def test_text_of_guard_on_data_dependent_sym_node() -> None:
    """text of torch.fx.experimental.symbolic_shapes.GuardOnDataDependentSymNode"""
    error = export_error(branches_on_value)
    assert compat.branches_on_values(error) and not compat.is_constraint_violation(error)
    assert compat.branching_line(error) == "return x + 1 if x.sum() > 5 else x"
    assert not compat.branches_on_values(RuntimeError("")) and compat.branching_line(RuntimeError("")) is None


def test_text_of_runtime_assert() -> None:
    """text of torch.fx.passes.runtime_assert"""
    program = export(branches_on_size, 2, unproven=True)
    asserts = list(program.graph.find_nodes(op="call_function", target=OPS._assert_scalar.default))
    conditions = [compat.asserted_condition(str(node.args[1])) for node in asserts]
    # The size's name is a number that torch chooses.
    assert len(conditions) == 1 and re.fullmatch(r"Ne\(Mod\(s\d+, 2\), 0\)", conditions[0])
