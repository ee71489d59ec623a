"""A request is refused in one clear line before any work, or becomes a plan in frames and samples."""

from __future__ import annotations

import dataclasses
import inspect
import json
import re
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from numpy.typing import NDArray
from safetensors.numpy import load_file

from sa3_mlx.common.generation.checks import validate
from sa3_mlx.common.generation.events import AudioChunk, Conditioned, Generation
from sa3_mlx.common.generation.plan import plan
from sa3_mlx.common.generation.regions import Region, Seam
from sa3_mlx.common.generation.request import InitAudio, Inpaint, Item, Request, extend
from sa3_mlx.common.model.presets import PRESETS
from sa3_mlx.common.model.sampling import Guidance, Sampling
from sa3_mlx.common.schema import ConfigError
from tests.support.requests import sampled
from tests.support.tiny import TINY

CONFIG = TINY["tiny-s"]  # 8000 Hz, 512 samples per latent
ITEM = Item(prompt="w3", seconds=2.0, seed=7)


def _audio(samples: int = 16_000) -> NDArray[np.float32]:
    return np.random.default_rng(samples).normal(0, 0.1, (samples, 2)).astype(np.float32)


REQUEST = Request(items=(ITEM,), sampling=Sampling(sampler="pingpong", steps=8))
INPAINT = Inpaint(audio=_audio(), regions=((0.5, 1.0),))
INIT = InitAudio(audio=_audio(), noise_level=0.6)


def test_spec_imports_without_mlx_and_torch():
    code = (
        "import sys, pkgutil, importlib\n"
        "sys.modules.update(dict.fromkeys(['mlx', 'mlx.core', 'torch'], None))\n"
        "import sa3_mlx.common as spec\n"
        "for module in pkgutil.iter_modules(spec.__path__): importlib.import_module('sa3_mlx.common.' + module.name)\n"
    )
    subprocess.run([sys.executable, "-c", code], check=True, cwd=Path(__file__).resolve().parents[3])


def test_plan_of_a_plain_clip():
    ours = plan(REQUEST, CONFIG)
    assert ours.frames == 126 and ours.head_room_seconds == 6.0
    assert ours.lengths.output_samples == (16_000,) and ours.lengths.effective == (32,)
    assert ours.padding_mask.shape == (1, 126) and ours.padding_mask.sum() == 125
    assert ours.sigmas.shape == (1, 9) and ours.sigmas[0, 0] == 1
    assert ours.init is None and ours.inpaint is None and ours.regions == ((),)
    assert not ours.keep_frames.any()


def test_items_of_a_batch_keep_what_they_have_alone():
    items = (ITEM, dataclasses.replace(ITEM, seconds=5.5), dataclasses.replace(ITEM, seconds=0.1))
    together = plan(dataclasses.replace(REQUEST, items=items), CONFIG)
    for row, item in enumerate(items):
        alone = plan(dataclasses.replace(REQUEST, items=(item,)), CONFIG)
        assert together.lengths.valid[row] == min(alone.lengths.valid[0], together.frames)
        assert together.lengths.output_samples[row] == alone.lengths.output_samples[0]
        np.testing.assert_array_equal(together.sigmas[row], alone.sigmas[0])


@pytest.mark.parametrize("name", ["tiny-s", "tiny-l"])
def test_plan_matches_whole_official_runs(golden: Path, name: str):
    tensors = load_file(golden / name / "e2e.safetensors")
    items = (ITEM, dataclasses.replace(ITEM, seconds=5.5))
    ours = plan(dataclasses.replace(REQUEST, items=items, sampling=Sampling(sampler="pingpong", steps=3)), TINY[name])
    np.testing.assert_array_equal(ours.padding_mask, tensors["t2a_batch2.padding_mask"].astype(bool))
    np.testing.assert_allclose(ours.sigmas, tensors["t2a_batch2.sigmas"], rtol=0, atol=1e-6)
    both = dataclasses.replace(
        REQUEST,
        items=(dataclasses.replace(ITEM, seconds=3.0),),
        sampling=Sampling(sampler="pingpong", steps=2),
        init=InitAudio(audio=_audio(24_000), noise_level=0.8),
        inpaint=Inpaint(audio=_audio(24_000), regions=((1.0, 2.0),)),
    )
    ours = plan(both, TINY[name])
    np.testing.assert_array_equal(ours.keep_frames, tensors["inpaint_plus_init.in_local_add_cond"][:, 0])
    np.testing.assert_allclose(ours.sigmas, tensors["inpaint_plus_init.sigmas"], rtol=0, atol=1e-6)


def test_sources_are_shared_or_given_per_item():
    items = (ITEM, dataclasses.replace(ITEM, seed=8))
    shared = plan(dataclasses.replace(REQUEST, items=items, inpaint=INPAINT, init=INIT), CONFIG)
    assert shared.inpaint == (INPAINT, INPAINT) and shared.init == (INIT, INIT)
    np.testing.assert_array_equal(shared.keep_frames[0], shared.keep_frames[1])
    assert shared.regions == ((Region(4000, 8000),),) * 2
    other = Inpaint(audio=_audio(), regions=((0.0, 0.5), (1.5, 2.0)))
    louder = InitAudio(audio=_audio(), noise_level=0.9)
    own = plan(dataclasses.replace(REQUEST, items=items, inpaint=(INPAINT, other), init=(INIT, louder)), CONFIG)
    assert own.regions[1] == (Region(0, 4000), Region(12_000, 16_000))
    np.testing.assert_array_equal(own.keep_frames[0], shared.keep_frames[0])
    np.testing.assert_allclose(own.sigmas[:, 0], [0.6, 0.9])


def test_the_switch_of_earlier_files_is_read():
    stored = {name: value for name, value in REQUEST.to_dict().items() if name != "schedule"}
    stored |= {"init": {"noise_level": 0.5}}
    for monotone, schedule in ((True, "monotone"), (False, "official")):
        assert Request.from_dict(stored | {"monotone": monotone}, audio=INIT.audio).schedule == schedule
    with pytest.raises(ConfigError, match="unknown field"):
        Request.from_dict(stored | {"monotone": "yes"}, audio=INIT.audio)


def test_monotone_descends_where_the_default_rises():
    official = plan(dataclasses.replace(REQUEST, init=INIT), CONFIG).sigmas[0]
    ours = plan(dataclasses.replace(REQUEST, init=INIT, schedule="monotone"), CONFIG).sigmas[0]
    assert official.max() > 0.9 and ours.max() == np.float32(0.6) and (np.diff(ours) < 0).all()


@pytest.mark.parametrize("samples", [1, 511, 512, 7003, 15_999])
def test_extend_keeps_every_sample_of_the_source(samples: int):
    inpaint = extend(_audio(samples), 3.0, CONFIG)
    request = dataclasses.replace(REQUEST, items=(dataclasses.replace(ITEM, seconds=3.0),), inpaint=inpaint)
    assert plan(request, CONFIG).regions == ((Region(samples, 24_000),),)


def test_head_room_can_be_set_to_nothing():
    ours = plan(dataclasses.replace(REQUEST, head_room_seconds=0), CONFIG)
    assert ours.frames == 32 and ours.lengths.valid == (32,)


def test_defaults_follow_the_objective():
    assert PRESETS["small-music"].usual_sampling == Sampling(sampler="pingpong", steps=8)
    guided = Sampling(sampler="euler", steps=50, guidance=Guidance(scale=7.0))
    assert PRESETS["medium-base"].usual_sampling == guided
    own = Sampling(sampler="dpmpp", steps=3)
    assert dataclasses.replace(PRESETS["medium-base"], sampling=own).usual_sampling == own


def test_the_longest_clip_is_allowed():
    for preset, seconds in (("small-music", 120.0), ("medium", 380.0), ("first", PRESETS["first"].max_seconds)):
        item = dataclasses.replace(ITEM, seconds=seconds)
        assert plan(dataclasses.replace(REQUEST, items=(item,)), PRESETS[preset]).frames


def _with_item(**changes: object) -> Request:
    return dataclasses.replace(REQUEST, items=(dataclasses.replace(ITEM, **changes),))  # type: ignore[arg-type]


def _with(**changes: object) -> Request:
    return dataclasses.replace(REQUEST, **changes)  # type: ignore[arg-type]


def _guided(**changes: object) -> Request:
    return sampled(REQUEST, guidance=dataclasses.replace(Guidance(), **changes))  # type: ignore[arg-type]


def _inpainted(*regions: tuple[float, float], samples: int = 16_000) -> Request:
    return _with(inpaint=Inpaint(audio=_audio(samples), regions=regions))


NAN, INF = float("nan"), float("inf")
BAD = {
    "no items": (_with(items=()), "items is empty"),
    "items of text": (_with(items="rain"), "items is 'rain': expected Item(prompt=..., seconds=..., seed=...)"),
    "item of text": (_with(items=["rain"]), "items[0] is 'rain': expected Item(prompt=..., seconds=..., seed=...)"),
    "too many items": (_with(items=(ITEM,) * 257), "items has 257 entries: allowed are up to 256"),
    "prompt too long": (_with_item(prompt="rain " * 2001), "prompt has 10,005 characters: allowed are up to 10,000"),
    "negative too long": (_with_item(negative_prompt="a" * 10_001), "negative prompt has 10,001 characters"),
    "sampling of a wrong type": (_with(sampling=8), "sampling is 8: expected Sampling(sampler="),
    "region of a number": (_inpainted(0.5), "region 0.5: expected (start, end) in seconds"),  # type: ignore[arg-type]
    "regions no list": (_with(inpaint=dataclasses.replace(INPAINT, regions=0.5)), "inpaint regions is 0.5: expected"),
    "region beyond all audio": (_inpainted((0.0, 1e308)), "region 0:1e+308: 1e+308 s: no audio has this length"),
    "prompt none": (_with_item(prompt=None), "prompt is NoneType: expected text"),
    "negative without guidance": (_with_item(negative_prompt="w1"), "no effect at guidance scale 1"),
    "negative of a wrong type": (_with_item(negative_prompt=3), "negative prompt is int"),
    "seconds zero": (_with_item(seconds=0.0), "seconds is 0: tiny-s makes above 0 to 65.53 s"),
    "seconds negative": (_with_item(seconds=-1.0), "seconds is -1"),
    "seconds too long": (_with_item(seconds=65.6), "seconds is 65.6"),
    "seconds nan": (_with_item(seconds=NAN), "seconds is nan: expected a finite number"),
    "seconds infinite": (_with_item(seconds=INF), "seconds is inf: expected a finite number"),
    "seconds as text": (_with_item(seconds="2"), "seconds is '2': expected a finite number"),
    "seconds under a sample": (_with_item(seconds=1e-5), "less than one sample at 8000 Hz"),
    "seed negative": (_with_item(seed=-1), "seed is -1: allowed are the integers 0 to"),
    "seed too large": (_with_item(seed=2**63), "seed is 9223372036854775808"),
    "seed float": (_with_item(seed=1.5), "seed is 1.5"),
    "steps zero": (sampled(REQUEST, steps=0), "steps is 0: allowed are the integers 1 to 1000"),
    "steps too many": (sampled(REQUEST, steps=1001), "steps is 1001"),
    "steps float": (sampled(REQUEST, steps=8.0), "steps is 8.0"),
    "sampler unknown": (sampled(REQUEST, sampler="ddim"), "sampler is 'ddim': allowed are euler, pingpong, dpmpp, rk4"),
    "head room negative": (_with(head_room_seconds=-1), "head room is -1 s: allowed are 0 to 60 s"),
    "head room nan": (_with(head_room_seconds=NAN), "head room is nan"),
    "schedule of words": (_with(schedule="no", init=INIT), "schedule is 'no': allowed are official"),
    "decoder noise of words": (_with(decode_noise="no"), "decode_noise is 'no': expected True or False"),
    "crossfade negative": (_with(crossfade_ms=-5.0), "crossfade is -5 ms: allowed are 0 to 1000 ms"),
    "monotone without init": (_with(schedule="monotone"), "monotone schedule is for init audio"),
    "scale negative": (_guided(scale=-1.0), "guidance scale is -1"),
    "scale nan": (_guided(scale=NAN), "guidance scale is nan"),
    "apg above one": (_guided(apg=1.5), "guidance apg is 1.5: allowed are 0 to 1"),
    "rescale above one": (_guided(rescale=2.0), "guidance rescale is 2"),
    "threshold negative": (_guided(norm_threshold=-1.0), "guidance norm threshold is -1"),
    "interval reversed": (_guided(interval=(0.8, 0.2)), "guidance interval is 0.8..0.2"),
    "interval of three": (_guided(interval=(0.1, 0.2, 0.3)), "guidance interval is (0.1, 0.2, 0.3)"),
    "noise level zero": (_with(init=dataclasses.replace(INIT, noise_level=0.0)), "init noise level is 0"),
    "noise level above one": (_with(init=dataclasses.replace(INIT, noise_level=1.1)), "init noise level is 1.1"),
    "init mono": (_with(init=dataclasses.replace(INIT, audio=_audio()[:, :1])), "init audio: expected shape"),
    "init empty": (_with(init=dataclasses.replace(INIT, audio=_audio()[:0])), "at least 1 sample, got (0, 2)"),
    "init nan": (_with(init=dataclasses.replace(INIT, audio=_audio() * np.float32(NAN))), "sample 0 is not a finite"),
    "init of a wrong type": (_with(init=INPAINT), "init is Inpaint: expected InitAudio"),
    "two inits for one item": (_with(init=(INIT, INIT)), "init has 2 entries for 1 items"),
    "no region": (_inpainted(), "inpaint: no region to generate"),
    "region reversed": (_inpainted((1.0, 0.5)), "region 1:0.5: is empty"),
    "region before the clip": (_inpainted((-1.0, 0.5)), "starts before the clip"),
    "region outside the clip": (_inpainted((1.5, 2.5)), "inpaint region 1.500:2.500: ends outside the clip of 2 s"),
    "regions overlap": (_inpainted((0.1, 1.0), (0.9, 1.5)), "overlaps"),
    "region without a frame": (_inpainted((0.001, 0.02)), "no latent frame begins in it; use at least 0.064 s"),
    "region nan": (_inpainted((0.5, NAN)), "must be finite"),
    "tail not generated": (_inpainted((0.5, 1.0), samples=12_000), "the audio ends at 1.500 s and the clip at 2 s"),
    "chunk too small": (_with(chunk_frames=4), "chunk_frames is 4: to decode exactly"),
    "chunk odd": (_with(chunk_frames=33), "a multiple of 2"),
    "chunk float": (_with(chunk_frames=64.0), "chunk_frames is 64.0"),
}


def test_what_programs_pass_is_taken_as_it_is_meant():
    """Lists, one item, numpy's scalars, other floats, a number as guidance, a text as sampling."""
    item = Item(prompt=np.str_("w3"), seconds=np.float32(2), seed=np.int64(7))
    assert item == ITEM and type(item.seed) is int and type(item.seconds) is float
    given = Request(items=[item], sampling="pingpong:8:1", head_room_seconds=np.float64(0.5), decode_noise=np.True_)
    assert given == dataclasses.replace(REQUEST, head_room_seconds=0.5, decode_noise=True)
    assert Request(items=ITEM, sampling=Sampling(sampler="pingpong", steps=np.int32(8))) == REQUEST
    assert Sampling(sampler="euler", steps=8, guidance=4.0).guidance == Guidance(scale=4.0)
    assert Guidance(scale=np.float64(4), interval=[0.1, np.float32(0.5)]).interval == (0.1, 0.5)
    inpaint = Inpaint(audio=_audio().astype(np.float64), regions=[[0.5, np.float64(1)]])
    assert inpaint.regions == INPAINT.regions and inpaint.audio.dtype == np.float32
    validate(dataclasses.replace(given, inpaint=[inpaint]), CONFIG)
    np.testing.assert_array_equal(InitAudio(audio=inpaint.audio.astype(np.float64), noise_level=1).audio, _audio())
    with pytest.raises(ConfigError, match="guidance: expected an object, got str"):
        Sampling(sampler="euler", steps=8, guidance="strong")  # type: ignore[arg-type]


def test_every_field_of_what_users_pass_and_get_is_documented():
    """By a comment on its line, as in all dataclasses here."""
    for kind in (Item, InitAudio, Inpaint, Request, Sampling, Guidance, Generation, AudioChunk, Conditioned, Seam):
        lines = inspect.getsource(kind).splitlines()
        for field in dataclasses.fields(kind):
            line = next(line for line in lines if re.match(rf"\s+{field.name}:", line))
            assert "  # " in line, f"{kind.__name__}.{field.name}"


@pytest.mark.parametrize("case", BAD)
def test_bad_requests_are_one_clear_line(case: str):
    request, message = BAD[case]
    with pytest.raises(ValueError) as caught:
        validate(request, CONFIG)
    assert message in str(caught.value) and "\n" not in str(caught.value)


def test_the_item_at_fault_is_named():
    with pytest.raises(ValueError, match="item 1: seconds is -2"):
        validate(_with(items=(ITEM, dataclasses.replace(ITEM, seconds=-2.0))), CONFIG)
    other = dataclasses.replace(INPAINT, regions=((1.0, 3.0),))
    with pytest.raises(ValueError, match=r"inpaint 1 region 1\.000:3\.000"):
        validate(_with(items=(ITEM, ITEM), inpaint=(INPAINT, other)), CONFIG)


def test_an_autoencoder_cannot_generate_and_a_clip_cannot_be_extended_backwards():
    with pytest.raises(ValueError, match="same-l is an autoencoder alone"):
        validate(REQUEST, PRESETS["same-l"])
    with pytest.raises(ValueError, match=r"extend to 2 s: the audio has 2\.000 s already"):
        extend(_audio(), 2.0, CONFIG)
    with pytest.raises(ValueError, match="seconds is nan"):
        extend(_audio(), NAN, CONFIG)
    with pytest.raises(ValueError, match=r"1e\+308 s: no audio has this length"):
        extend(_audio(), 1e308, CONFIG)


TWO = (ITEM, Item(prompt="w4 \u00e9", seconds=1, seed=2**63 - 1, negative_prompt="w1"))
STORED = {
    "plain": Request(items=(ITEM,)),
    "sampled": _with(items=TWO, sampling=Sampling(sampler="euler", steps=3, guidance=Guidance(scale=3, apg=0.5))),
    "init": _with(init=INIT, schedule="monotone", head_room_seconds=0.5, chunk_frames=64),
    "inpaint": _with(inpaint=dataclasses.replace(INPAINT, audio=INIT.audio), crossfade_ms=None, decode_noise=True),
    "both": _with(init=INIT, inpaint=dataclasses.replace(INPAINT, audio=INIT.audio), encode_chunk_frames=32),
    "one each": _with(items=TWO, init=(INIT, dataclasses.replace(INIT, noise_level=1))),
}


@pytest.mark.parametrize("case", STORED)
def test_a_request_survives_json_without_its_audio(case: str):
    request = STORED[case]
    data = json.loads(request.to_json())
    assert data == request.to_dict() and "audio" not in request.to_json()
    assert Request.from_json(request.to_json(), audio=INIT.audio) == request
    assert Request.from_dict({"items": data["items"], **data}, audio=INIT.audio) == request


def test_each_item_may_get_audio_of_its_own():
    audios = (INIT.audio, _audio(900))
    request = _with(items=TWO, init=tuple(dataclasses.replace(INIT, audio=audio) for audio in audios))
    assert Request.from_dict(request.to_dict(), audio=audios) == request
    shared = _with(items=TWO, init=INIT).to_dict()
    assert Request.from_dict(shared, audio=audios) == request


def test_fields_with_defaults_may_be_missing():
    assert Request.from_dict({"items": [{"prompt": "w3", "seconds": 2, "seed": 7}]}) == Request(items=(ITEM,))


BAD_DATA = {
    "not an object": ([], "request: expected an object, got list"),
    "unknown": ({"items": [], "prompt": ""}, "request: unknown field(s) prompt"),
    "no items": ({}, "request: missing field(s) items"),
    "item without a seed": ({"items": [{"prompt": "w3", "seconds": 2.0}]}, "request.items[0]: missing field(s) seed"),
    "seed as text": ({"items": [{"prompt": "", "seconds": 2, "seed": "7"}]}, "request.items[0].seed: expected int"),
    "steps": ({"items": [], "sampling": {"sampler": "euler", "steps": 0}}, "request.sampling: steps is 0"),
    "sampling of a number": ({"items": [], "sampling": 3}, "request.sampling: expected an object"),
    "init of a number": ({"items": [], "init": 0.5}, "request.init: expected an object"),
    "init unknown": ({"items": [], "init": {"noise_level": 0.5, "start": 1}}, "request.init: unknown field(s) start"),
    "inits unknown": ({"items": [], "init": [{"level": 1}]}, "request.init[0]: unknown field(s) level"),
    "audio in the data": (
        {"items": [], "init": {"noise_level": 1, "audio": []}},
        "request.init: unknown field(s) audio",
    ),
    "a region of one": ({"items": [], "inpaint": {"regions": [[1]]}}, "request.inpaint.regions[0]: expected 2 values"),
    "a region of text": ({"items": [], "inpaint": {"regions": [[0, "1"]]}}, "request.inpaint.regions[0][1]: expected"),
    "crossfade": ({"items": [], "crossfade_ms": NAN}, "request.crossfade_ms: must be finite"),
}


@pytest.mark.parametrize("case", BAD_DATA)
def test_bad_data_is_one_line_that_names_the_field(case: str):
    data, message = BAD_DATA[case]
    with pytest.raises(ConfigError) as caught:
        Request.from_dict(data, audio=INIT.audio)
    assert message in str(caught.value) and "\n" not in str(caught.value)


def test_stored_sources_need_their_audio():
    stored = _with(items=TWO, init=(INIT, INIT)).to_dict()
    with pytest.raises(ConfigError, match=r"request\.init: its audio is missing"):
        Request.from_dict(stored)
    with pytest.raises(ConfigError, match=r"request\.init: has 2 entries, 3 audios are given"):
        Request.from_dict(stored, audio=[INIT.audio] * 3)
    with pytest.raises(ConfigError, match="request: not valid JSON"):
        Request.from_json("{")
