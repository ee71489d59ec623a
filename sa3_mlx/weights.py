"""Load checkpoint folders, strictly: missing, unexpected and mis-shaped tensors are errors."""

from __future__ import annotations

from functools import cache
from pathlib import Path
from typing import cast

from mlx.utils import tree_flatten, tree_unflatten

from sa3_mlx.common.files.safetensors import TensorFile
from sa3_mlx.common.model.checkpoint import WEIGHTS_FILE, Part, file_of
from sa3_mlx.common.model.config import ModelConfig
from sa3_mlx.common.quant.format import Grid, check_file
from sa3_mlx.runtime import mx, nn, on_gpu

from .clap.network import ClapTowers
from .conditioner import Conditioner
from .dit import DiT, DiTBlock
from .layers import PackedLinear
from .same import SAME
from .t5gemma import FileEmbedding, T5GemmaEncoder

EMBEDDING = "text_encoder.embed_tokens.weight"
BLOCKS = "dit.layers."
_TOGETHER = 2  # tensors
# Streams for any thread, one at a time; where MLX knows no such ones, a stream belongs to the thread that makes it.
_new_stream = getattr(mx, "new_thread_unsafe_stream", mx.new_stream)
_READER = _new_stream(mx.cpu)


def build_part(config: ModelConfig, part: Part) -> nn.Module:
    """Return one part with random weights, which cost nothing before they are used: arrays are lazy."""
    if part == "same":
        return SAME(config.same, config.audio_channels)
    if config.diffusion is None:
        raise ValueError(f"{config.name} is an autoencoder alone; it has no {part}")
    text = config.diffusion.text_encoder
    if part == "text_encoder":
        return T5GemmaEncoder(text)
    if part == "conditioner":
        return Conditioner(text.width, config.diffusion.seconds_max)
    if part == "clap":
        if config.clap is None:
            raise ValueError(f"{config.name} has no latent CLAP; 'sa3 add-clap' puts one into it")
        return ClapTowers(config.clap)
    return DiT(config.diffusion.dit, config.same.latent_channels, text.width)


def load_part(folder: str | Path, config: ModelConfig, part: Part, dtype: mx.Dtype | None) -> nn.Module:
    """Read one part of a checkpoint; ``dtype`` None keeps the file's. A tensor is read from disk when it is first used.

    Quantized layers become ``PackedLinear``: their weights stay packed. The table of token
    embeddings stays in the file. Reading has a stream of its own, beside what is computed meanwhile. Types are changed
    on the GPU, where there is one.

    Raises FileNotFoundError without the file of the part, ValueError for tensors that do not fit.
    """
    path = Path(folder) / file_of(part)
    module = build_part(config, part)
    with TensorFile.open(path) as file:
        grids = check_file(file, config, [part])
        names = [name for name in file.names() if name.startswith(part + ".")]
    if isinstance(module, T5GemmaEncoder):
        names.remove(EMBEDDING)
        module.embed_tokens = FileEmbedding(path, EMBEDDING, dtype)
    return _read_into(module, path, part + ".", names, grids, dtype)


def load_streamed_dit(folder: str | Path, config: ModelConfig, dtype: mx.Dtype | None) -> DiT:
    """Read the DiT without its blocks, which stay in the file: each is read whenever it computes something."""
    path = Path(folder) / WEIGHTS_FILE
    module = cast(DiT, build_part(config, "dit"))
    module.pop("layers")
    with TensorFile.open(path) as file:
        grids = check_file(file, config, ["dit"])
        names = [name for name in file.names() if name.startswith("dit.")]
    outside = [name for name in names if not name.startswith(BLOCKS)]
    _read_into(module, path, "dit.", outside, grids, dtype)
    blocks = _BlocksInFile(path, config, sorted(set(names) - set(outside)), grids, dtype)
    module.layers = cast(list[DiTBlock], blocks)
    return module


class _BlocksInFile:
    """Stand for ``DiT.layers``: every request reads a block again, and nothing keeps it.

    As arrays are lazy, a step holds the weights of no more than a few blocks at a time.
    """

    def __init__(
        self, path: Path, config: ModelConfig, names: list[str], grids: dict[str, Grid], dtype: mx.Dtype | None
    ) -> None:
        assert config.diffusion is not None
        self._path, self._names, self._grids, self._dtype = path, names, grids, dtype
        self._dit, self._latent_channels = config.diffusion.dit, config.same.latent_channels

    def __len__(self) -> int:
        return self._dit.depth

    def __getitem__(self, index: int) -> DiTBlock:
        if index >= len(self):
            raise IndexError(index)
        prefix = f"{BLOCKS}{index}."
        names = [name for name in self._names if name.startswith(prefix)]
        block = DiTBlock(self._dit, self._latent_channels)
        return cast(DiTBlock, _read_into(block, self._path, prefix, names, self._grids, self._dtype))


def _read_into(
    module: nn.Module, path: Path, prefix: str, names: list[str], grids: dict[str, Grid], dtype: mx.Dtype | None
) -> nn.Module:
    """Fill a module with those tensors of a file, lazily; they begin with ``prefix``."""
    arrays = cast(dict[str, mx.array], mx.load(str(path), stream=_READER))
    _pack_layers(module, {layer.removeprefix(prefix): grid for layer, grid in grids.items()})
    state = [(name.removeprefix(prefix), arrays[name]) for name in names]
    if dtype is not None:
        caster = _gpu_caster() if on_gpu() else _READER
        state = [(name, array if array.dtype == mx.uint32 else array.astype(dtype, caster)) for name, array in state]
    module.load_weights(state, strict=True)
    module.freeze()
    return module.eval()


def read_weights(module: nn.Module, folder: str | Path, prefix: str) -> None:
    """Bring weights of a checkpoint, whose names begin with ``prefix``, into memory: at once, which reads in parallel.

    Only those that change their type come a few at a time: beside such a one is its own old copy and no other.
    """
    stored = cast(dict[str, mx.array], mx.load(str(Path(folder) / file_of(prefix)), stream=_READER))
    arrays = dict(cast(list[tuple[str, mx.array]], tree_flatten(module.parameters())))
    changing = [array for name, array in arrays.items() if stored[prefix + name].dtype != array.dtype]
    mx.eval([array for name, array in arrays.items() if stored[prefix + name].dtype == array.dtype])
    for start in range(0, len(changing), _TOGETHER):
        mx.eval(*changing[start : start + _TOGETHER])


@cache
def _gpu_caster() -> mx.Stream:
    return cast(mx.Stream, _new_stream(mx.gpu))


def _pack_layers(module: nn.Module, grids: dict[str, Grid]) -> None:
    """Put a PackedLinear in the place of every Linear with a grid."""
    layers = dict(tree_flatten(module.leaf_modules(), is_leaf=nn.Module.is_module))
    packed = [
        (path, PackedLinear.from_linear(layers[path], grid.group, grid.bits))
        for path, grid in grids.items()
        if path in layers
    ]
    module.update_modules(tree_unflatten(packed))
