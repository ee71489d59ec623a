"""The two twins mirror each other: parameter trees, public names and signatures."""

from __future__ import annotations

import ast
import importlib
import inspect
from types import ModuleType
from typing import Any

import pytest

from sa3_mlx.common.model.checkpoint import all_parts, expected_tensors
from sa3_mlx.common.model.config import ModelConfig
from sa3_mlx.common.model.presets import PRESETS
from tests.support.foreign.official_checkpoint import TINY_VARIED
from tests.support.tiny import TINY, with_clap

torch = pytest.importorskip("torch")
mlx_utils = pytest.importorskip("mlx.utils")

FILES = (
    "choices",
    "layers",
    "attention",
    "t5gemma",
    "conditioner",
    "dit",
    "clap.network",
    "same",
    "guidance",
    "lora",
    "samplers",
    "weights",
    "pipeline",
    "trajectory",
)
CONFIGS = {**PRESETS, **TINY, TINY_VARIED.name: TINY_VARIED, "clap": with_clap(TINY["tiny-s"])}
# What one twin has and the other has no use for.
TORCH_ONLY = {
    "attention": {"attend_to"},  # no kernel of MLX attends in sequences of different lengths
    "dit": {"LocalInput"},  # training
    "weights": {"StableAudio", "save_checkpoint", "load_model"},  # training holds and writes whole models
    "choices": {"WHOLE", "on_a_cpu"},
    "layers": {
        "compiled_block",
        "graphed",
        "HalfLinear",
        "halve_products",  # of SAME on CUDA; an Apple GPU is not faster in 16 bits
        "split_modulation",  # fewer launches in eager mode
    },
    "pipeline": {"choose_device", "device_name"},
    "lora": {"TrainedAdapter", "add_adapter"},  # training
}
MLX_ONLY = {
    "attention": {"Near"},  # asks for own kernels
    "layers": {
        "compiled",
        "silu",
        "pointwise",  # those of mlx.nn are always compiled: on Linux that needs g++
        *("PackedLinear", "TILE", "FEW_TILES"),  # the torch twin unpacks what it loads
    },
    "guidance": {"ModulatedVelocity"},  # of a compiled step
    "t5gemma": {"gelu_tanh"},
    "weights": {"read_weights"},  # arrays are lazy
}
DEVICE = "device"  # MLX has one memory for all devices


def _mlx_shapes(config: ModelConfig, part: str) -> dict[str, tuple[int, ...]]:
    """Arrays are lazy: the largest model costs nothing before it is evaluated."""
    module = importlib.import_module("sa3_mlx.weights").build_part(config, part)
    return {f"{part}.{name}": tuple(array.shape) for name, array in mlx_utils.tree_flatten(module.parameters())}


def _torch_shapes(config: ModelConfig, part: str) -> dict[str, tuple[int, ...]]:
    with torch.device("meta"):
        module = importlib.import_module("sa3_torch.weights").build_part(config, part)
    return {f"{part}.{name}": tuple(tensor.shape) for name, tensor in module.state_dict().items()}


@pytest.mark.parametrize("name", CONFIGS)
def test_parameter_trees_are_those_of_the_checkpoint(name: str) -> None:
    """Names and shapes of both twins, for every preset in full size."""
    config = CONFIGS[name]
    for part in all_parts(config):
        expected = expected_tensors(config, [part])
        assert _mlx_shapes(config, part) == expected
        assert _torch_shapes(config, part) == expected


def test_parts_without_diffusion_are_refused() -> None:
    for twin in ("mlx", "torch"):
        weights = importlib.import_module(f"sa3_{twin}.weights")
        with pytest.raises(ValueError, match="same-s is an autoencoder alone; it has no dit"):
            weights.build_part(PRESETS["same-s"], "dit")


def test_running_std_is_loaded_but_not_trained() -> None:
    """[B46]: an average, in the parameter tree of neither twin's optimizer."""
    config = TINY["tiny-s"]
    mlx_same = importlib.import_module("sa3_mlx.weights").build_part(config, "same")
    trained = {name for name, _ in mlx_utils.tree_flatten(mlx_same.trainable_parameters())}
    torch_same = importlib.import_module("sa3_torch.weights").build_part(config, "same")
    assert trained == {name for name, _ in torch_same.named_parameters()}
    assert "bottleneck.running_std" not in trained


def _tree(module: ModuleType) -> ast.Module:
    return ast.parse(inspect.getsource(module))


def _own(module: ModuleType) -> dict[str, Any]:
    """Public classes, functions, constants and type names that the module itself defines, imports left out."""
    names: list[str] = []
    for node in _tree(module).body:
        if isinstance(node, ast.ClassDef | ast.FunctionDef):
            names.append(node.name)
        elif isinstance(node, ast.Assign | ast.AnnAssign):
            targets = node.targets if isinstance(node, ast.Assign) else [node.target]
            names += [target.id for target in targets if isinstance(target, ast.Name)]
    return {name: getattr(module, name) for name in names if not name.startswith("_")}


def _constructed(module: ModuleType) -> dict[str, list[str]]:
    """What every constructor sets on self, in order; a torch buffer counts as an attribute."""
    found: dict[str, list[str]] = {}
    for cls in (node for node in _tree(module).body if isinstance(node, ast.ClassDef)):
        for init in (node for node in cls.body if isinstance(node, ast.FunctionDef) and node.name == "__init__"):
            found[cls.name] = [name for line in init.body for name in _set_by(line) if name.lstrip("_") != DEVICE]
    return {name: attributes for name, attributes in found.items() if attributes}


def _set_by(line: ast.stmt) -> list[str]:
    if isinstance(line, ast.Assign) and isinstance(line.targets[0], ast.Attribute):
        return [line.targets[0].attr]
    call = line.value if isinstance(line, ast.Expr) else None
    if isinstance(call, ast.Call) and isinstance(call.func, ast.Attribute) and call.func.attr == "register_buffer":
        return [call.args[0].value] if isinstance(call.args[0], ast.Constant) else []
    return []


def _parameters(function: Any) -> list[tuple[str, Any, Any]]:
    """Names, kinds and defaults; annotations name each framework's array type."""
    parameters = inspect.signature(function).parameters.values()
    return [(p.name, p.kind, p.default) for p in parameters if p.name != DEVICE]


def _methods(cls: type) -> dict[str, Any]:
    """Public methods, constructor and call, those of a base class of ours included."""
    ours = [base for base in reversed(cls.__mro__) if base.__module__.startswith("sa3_")]
    methods = {name: value for base in ours for name, value in vars(base).items() if inspect.isfunction(value)}
    if "forward" in methods:
        methods["__call__"] = methods.pop("forward")
    public = {name: value for name, value in methods.items() if not name.startswith("_")}
    return public | {name: methods[name] for name in ("__init__", "__call__") if name in methods}


@pytest.mark.parametrize("file", FILES)
def test_public_names_and_signatures_are_equal(file: str) -> None:
    mlx_names = _own(importlib.import_module(f"sa3_mlx.{file}"))
    torch_names = _own(importlib.import_module(f"sa3_torch.{file}"))
    shared = set(mlx_names) - MLX_ONLY.get(file, set())
    assert shared == set(torch_names) - TORCH_ONLY.get(file, set())
    for name in sorted(shared):
        ours, theirs = mlx_names[name], torch_names[name]
        if inspect.isclass(ours):
            assert set(_methods(ours)) == set(_methods(theirs)), name
            for method in _methods(ours):
                pair = [_parameters(_methods(cls)[method]) for cls in (ours, theirs)]
                assert pair[0] == pair[1], f"{name}.{method}"
        elif inspect.isfunction(ours):
            assert _parameters(ours) == _parameters(theirs), name
        elif isinstance(ours, int | float):
            assert ours == theirs, name


@pytest.mark.parametrize("file", FILES)
def test_constructors_set_the_same_things_in_the_same_order(file: str) -> None:
    ours, theirs = (_constructed(importlib.import_module(f"sa3_{twin}.{file}")) for twin in ("mlx", "torch"))
    assert ours == {name: value for name, value in theirs.items() if name not in TORCH_ONLY.get(file, set())}
