"""Files of the official MLX port convert to ours and back without loss, and nothing unknown goes unnoticed."""

from __future__ import annotations

import json
import re
import zipfile
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from sa3_convert import export_port
from sa3_convert.keys import pairs
from sa3_convert.port.layout import PARTS, file_names
from sa3_convert.port.write import write_port

from sa3_mlx.common.files.safetensors import TensorFile
from sa3_mlx.common.model.config import ModelConfig
from sa3_mlx.common.model.features import FREQUENCIES, ROTARY_FREQUENCIES
from sa3_mlx.common.model.presets import PRESETS
from sa3_mlx.common.text.tokenizer import Tokenizer
from tests.support.command import ok
from tests.support.foreign.official_checkpoint import run
from tests.support.foreign.port_files import PORT, names_of, npy, port_arrays, text_blobs, write_port_files

S, L = PORT["tiny-s"], PORT["tiny-l"]


@pytest.mark.parametrize("config", PORT.values(), ids=list(PORT))
def test_port_files_survive_the_round_trip_bit_exactly(config, tmp_path):
    source = write_port_files(tmp_path / "port", config)
    report = run(source, tmp_path / "ours")
    assert (report.name, report.dropped, report.parts) == (config.name, (), PARTS)
    assert ModelConfig.load(tmp_path / "ours") == config
    write_port(tmp_path / "ours", tmp_path / "back", config, force=False, progress=None)
    for name in names_of(config).values():
        before, after = (dict(np.load(folder / name)) for folder in (source, tmp_path / "back"))
        assert before.keys() == after.keys()
        for key in before.keys() - {"META"}:
            wanted = before[key].astype(np.float32) if key.startswith("cond.") else before[key]
            assert wanted.dtype == after[key].dtype and wanted.shape == after[key].shape
            np.testing.assert_array_equal(wanted, after[key], err_msg=key)
    again = run(tmp_path / "back" / names_of(config)["dit"], tmp_path / "again")
    assert again.dtypes["F16"] < report.dtypes["F16"]  # the conditioner became fp32, nothing else changed
    tokens = Tokenizer(tmp_path / "again" / "tokenizer.json", 12).encode(["beat  sked"])[0]
    np.testing.assert_array_equal(tokens, Tokenizer(tmp_path / "ours" / "tokenizer.json", 12).encode(["beat  sked"])[0])


def test_values_come_out_where_the_networks_look_for_them(tmp_path):
    """The maps that are stored in another order, element by element."""
    arrays = port_arrays(S)
    run(write_port_files(tmp_path / "port", S, arrays), tmp_path / "ours")
    with TensorFile.open(tmp_path / "ours" / "model.safetensors") as file:
        kernel = arrays["decoder"]["mapping.weight"]  # (out, in, taps)
        found = file.raw("same.decoder.mapping.weight")
        np.testing.assert_array_equal(found[5, 2 * kernel.shape[1] + 7], kernel[5, 7, 2])
        np.testing.assert_array_equal(file.raw("dit.preprocess.weight"), arrays["dit"]["preprocess_conv.weight"][:, 0])
        np.testing.assert_array_equal(file.raw("same.bottleneck.scale"), arrays["encoder"]["scaling_factor"][0, :, 0])
        assert file.info("dit.preprocess.weight")[0] == "F16" and file.info("same.decoder.mapping.weight")[0] == "F32"


def test_other_orders_and_axes_of_length_one_are_understood(tmp_path):
    """A kernel in MLX's order, maps without their axis of one, norms by their other name, Fortran order."""
    arrays = port_arrays(S)
    run(write_port_files(tmp_path / "first", S, arrays), tmp_path / "ours")
    arrays["decoder"]["mapping.weight"] = arrays["decoder"]["mapping.weight"].transpose(0, 2, 1)
    arrays["encoder"]["mapping.weight"] = arrays["encoder"]["mapping.weight"][:, :, 0]
    arrays["dit"]["preprocess_conv.weight"] = arrays["dit"]["preprocess_conv.weight"].transpose(0, 2, 1)
    arrays["dit"]["to_cond_embed.0.weight"] = np.asfortranarray(arrays["dit"]["to_cond_embed.0.weight"])
    arrays["text"]["norm"] = arrays["text"].pop("norm.weight")
    run(write_port_files(tmp_path / "second", S, arrays), tmp_path / "other")
    first, second = ((tmp_path / name / "model.safetensors").read_bytes() for name in ("ours", "other"))
    assert first == second


def test_what_repeats_constants_is_dropped_and_named(tmp_path):
    arrays = port_arrays(S)
    arrays["dit"]["timestep_features.freqs"] = FREQUENCIES * np.float32(2 * np.pi)
    arrays["dit"]["transformer.rotary_pos_emb.inv_freq"] = np.array(ROTARY_FREQUENCIES, np.float16)
    arrays["encoder"]["noise_scaling_factor"] = np.zeros((1, 0, 1), np.float32)
    arrays["text"]["rope_inv_freq"] = (10_000.0 ** -(np.arange(0, 16, 2) / 16)).astype(np.float32)
    report = run(write_port_files(tmp_path / "port", S, arrays), tmp_path / "ours")
    assert report.dropped == (
        "dit: timestep_features.freqs",
        "dit: transformer.rotary_pos_emb.inv_freq",
        "encoder: noise_scaling_factor",
        "text: rope_inv_freq",
    )


def _set(role: str, name: str, value: np.ndarray):
    return lambda arrays: arrays[role].__setitem__(name, value)


QKV = "transformer.layers.1.self_attn.to_qkv.weight"
BROKEN = {
    "missing": (lambda a: a["dit"].pop(QKV), f"dit_tiny-s_f16.npz: 1 tensor.* missing: {re.escape(QKV)}"),
    "extra": (_set("decoder", "extra", np.ones(2, np.float32)), r"same_s_decoder_f32.npz: .*unexpected: extra \(2,\)"),
    "wrong_shape": (_set("dit", QKV, np.ones((3, 128), np.float16)), f"wrong shape: {re.escape(QKV)}"),
    "integers": (_set("dit", QKV, np.ones((384, 128), np.int8)), "has type int8; supported: F32, F16"),
    "doubles": (_set("encoder", "project_out.bias", np.ones(16)), "has type F64"),
    "objects": (_set("dit", QKV, np.array([None])), "Python objects"),
    "nan": (_set("encoder", "project_out.bias", np.full(16, np.nan, np.float32)), "project_out.bias has NaN"),
    "other_frequencies": (_set("text", "rope_inv_freq", np.ones(8, np.float32)), "other frequencies"),
    "two_scales": (_set("decoder", "running_std", np.ones(1, np.float32)), "not of one model"),
    "no_meta": (_set("text", "META", np.frombuffer(b"[]", np.uint8)), "META: expected a JSON object"),
    "meta_of_numbers": (_set("text", "META", np.ones(3, np.float32)), "META is float32"),
    "other_pad": (_set("text", "META", np.frombuffer(b'{"pad_token_id": 1}', np.uint8)), "pad_token_id: got 1"),
    "no_tokenizer": (_set("text", "TOKENIZER_MODEL", np.frombuffer(b"\xff\xff", np.uint8)), "SentencePiece model"),
}


@pytest.mark.parametrize("kind", BROKEN)
def test_what_does_not_fit_is_one_line_and_nothing_is_left(kind, tmp_path):
    change, words = BROKEN[kind]
    arrays = port_arrays(S)
    change(arrays)
    source = write_port_files(tmp_path / "port", S, arrays)
    with pytest.raises(ValueError, match=words) as error:
        run(source, tmp_path / "ours")
    assert len(str(error.value).splitlines()) == 1
    assert [path.name for path in tmp_path.iterdir()] == ["port"]


@pytest.mark.parametrize("role", ["encoder", "decoder", "text"])
def test_a_missing_file_is_named(role, tmp_path):
    source = write_port_files(tmp_path / "port", S)
    (source / names_of(S)[role]).unlink()
    with pytest.raises(FileNotFoundError, match=re.escape(names_of(S)[role])):
        run(source, tmp_path / "ours")


def test_a_member_that_is_cut_is_found_while_it_is_read(tmp_path):
    """Its header is whole, so it shows only then; the folder does not appear."""
    source = write_port_files(tmp_path / "port", S)
    path = source / names_of(S)["decoder"]
    arrays = dict(np.load(path))
    with zipfile.ZipFile(path, "w", zipfile.ZIP_DEFLATED) as archive:
        for name, array in arrays.items():
            archive.writestr(f"{name}.npy", npy(array))
    data = path.read_bytes()
    place = data.index(b"blocks.1.attn.to_qkv.weight.npy") + 500
    path.write_bytes(data[:place] + bytes(64) + data[place + 64 :])
    with pytest.raises(ValueError, match=r"array 'blocks.1.attn.to_qkv.weight' cannot be read"):
        run(source, tmp_path / "ours")
    assert not (tmp_path / "ours").exists()


def test_which_model_is_meant_must_be_clear(tmp_path):
    source = write_port_files(tmp_path / "port", S)
    (source / "dit_medium_f16.npz").write_bytes(b"")
    with pytest.raises(ValueError, match="several models"):
        run(source, tmp_path / "ours")
    with pytest.raises(ValueError, match="give the file of the DiT"):
        run(source / "t5gemma_f16.npz", tmp_path / "ours")
    (source / "model_config.json").unlink()
    with pytest.raises(ValueError, match="no released model is called 'tiny-s'"):
        run(source / names_of(S)["dit"], tmp_path / "ours")
    with pytest.raises(ValueError, match="other sizes than T5Gemma"):
        run(source / names_of(S)["dit"], tmp_path / "ours", name="small-music")


@pytest.mark.parametrize("name", ["small-music", "small-sfx", "small-music-base", "medium", "medium-base"])
def test_released_names_have_the_files_that_the_port_looks_for(name):
    kind = "l" if name.startswith("medium") else "s"
    assert file_names(PRESETS[name]) == {
        "dit": f"dit_{name.replace('small', 'sm')}_f16.npz",
        "encoder": f"same_{kind}_encoder_f32.npz",
        "decoder": f"same_{kind}_decoder_f32.npz",
        "text": "t5gemma_f16.npz",
    }


@pytest.mark.parametrize("name", ["small-music", "medium"])
def test_every_tensor_of_a_released_model_has_one_place(name):
    """The files together have as many elements as the model, and the scale of the latents once more."""
    config = PRESETS[name]
    small = replace(config, diffusion=replace(config.diffusion, text_encoder=S.diffusion.text_encoder))
    wanted = sum(np.prod(pair.shape) for pair in pairs(small, PARTS)) + 1
    with_vocabulary = {role: sum(a.size for a in found.values()) for role, found in port_shapes(small).items()}
    assert sum(with_vocabulary.values()) == wanted


def port_shapes(config: ModelConfig) -> dict[str, dict[str, np.ndarray]]:
    """``port_arrays`` without values."""
    import tests.support.foreign.port_files as files

    class Sized:
        def __init__(self, shape: tuple[int, ...]) -> None:
            self.size = int(np.prod(shape))

        def astype(self, _: object) -> Sized:
            return self

    original, files.weight = files.weight, lambda _, shape: Sized(shape)
    try:
        return files.port_arrays(config)
    finally:
        files.weight = original


def test_models_that_the_port_cannot_have_are_refused(tmp_path):
    run(write_port_files(tmp_path / "port", S), tmp_path / "ours")
    with pytest.raises(ValueError, match="modules for the sizes of small and medium only"):
        export_port(tmp_path / "ours", tmp_path / "out", force=False)
    (tmp_path / "ours" / "tokenizer.json").write_text(json.dumps({"model": {"type": "WordLevel"}}))
    with pytest.raises(ValueError, match="a WordLevel model"):
        write_port(tmp_path / "ours", tmp_path / "out", S, force=False, progress=None)
    assert not (tmp_path / "out").exists()


def test_a_value_beyond_half_precision_is_refused(tmp_path):
    arrays = port_arrays(S)
    arrays["dit"] = {name: array.astype(np.float32) for name, array in arrays["dit"].items()}
    arrays["dit"][QKV][3, 5] = 1e6
    run(write_port_files(tmp_path / "port", S, arrays), tmp_path / "ours")
    with pytest.raises(ValueError, match=r"dit.layers.1.self_attn.to_qkv.weight has values beyond half precision"):
        write_port(tmp_path / "ours", tmp_path / "out", S, force=False, progress=None)
    assert not (tmp_path / "out").exists()


def test_the_command_converts_a_folder_of_the_port(run, shared_home, tmp_path):
    source = write_port_files(tmp_path / "mlx", L)
    done = ok(run("convert", str(source), "--name", "from-the-port"))
    assert "from-the-port" in done.out and "sa3 generate" in done.out
    assert (shared_home / "models" / "from-the-port" / "tokenizer.json").is_file()
    refused = run("convert", "from-the-port", str(tmp_path / "out"), "--to-mlx-npz")
    assert refused.code == 2 and "sizes of small and medium only" in refused.err
    assert run("convert", "from-the-port", "--to-mlx-npz").code == 2
    assert Path(tmp_path / "out").exists() is False


def test_blobs_are_as_the_port_reads_them():
    assert json.loads(text_blobs(S)["META"].tobytes())["vocab_size"] == 320
