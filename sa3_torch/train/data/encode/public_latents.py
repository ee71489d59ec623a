"""The public layout of pre-encoded latents, for exchange with other programs [T3].

A folder of ``NNN.npy``, float32 (C, T), with ``NNN.json``: prompt, seconds_start, seconds_total, padding_mask (0/1 per
frame), sample_rate; and one ``silence.npy`` (1, C, T).
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from sa3_mlx.common.files.arrays import map_array, save_array
from sa3_mlx.common.files.atomic import new_folder, write_json
from sa3_mlx.common.files.objects import read_object
from sa3_mlx.common.schema import listed, reason
from sa3_torch.train.data.entries import parse_entry
from sa3_torch.train.data.latents import LatentItem, LatentSet, write_latents
from sa3_torch.train.data.recordings import ATTRIBUTION, Credit, check_empty, parse_sidecar, write_attribution
from sa3_torch.train.data.user_folder import split_of

SILENCE_FRAMES = 64


def export_public(
    latents: LatentSet,
    out: Path,
    sample_rate: int,
    *,
    progress: Callable[[list[LatentItem]], Iterable[LatentItem]] = iter,
) -> int:
    """Write every item -> how many. The padded tail is not stored, so every mask is ones.

    ``progress`` goes through the items, with a bar for example.
    """
    check_empty(out)
    with new_folder(out) as partial:
        for number, item in enumerate(progress(latents.items)):
            name = f"{number:010d}"
            save_array(partial / f"{name}.npy", latents.read(item).numpy().T)
            write_json(partial / f"{name}.json", _described(item, sample_rate, latents.autoencoder))
        silence = latents.silence.numpy()[None, :, None]
        save_array(partial / "silence.npy", np.repeat(silence, SILENCE_FRAMES, axis=2))
        credits = [
            Credit(id=item.id, licence=item.licence, source=item.source, fields=item.fields) for item in latents.items
        ]
        write_attribution(partial / ATTRIBUTION, credits)
    return len(latents.items)


def _described(item: LatentItem, sample_rate: int, autoencoder: str) -> dict[str, Any]:
    """Return what the JSON beside the latents of an item says."""
    return {
        **item.fields,
        "prompt": item.captions[0] if item.captions else "",
        "prompts": list(item.captions),
        "seconds_start": item.fields.get("seconds_start", 0),
        "seconds_total": item.seconds,
        "padding_mask": [1] * item.frames,
        "sample_rate": sample_rate,
        "licence": item.licence,
        "id": item.id,
        "source": item.source,
        "split": item.split,
        "kind": item.kind,
        "label": item.label,
        "midi": item.midi,
        "autoencoder": autoencoder,
    }


def import_public(
    folder: Path,
    out: Path,
    *,
    autoencoder: str,
    progress: Callable[[list[Path]], Iterable[Path]] = iter,
) -> LatentSet:
    """Read such a folder into the native layout. ``autoencoder`` is the hash of the weights that made it.

    ``progress`` goes through the files, with a bar for example.
    Frames after the last valid one are cut. Raises ValueError when the folder says that another autoencoder made it,
    or for a file that is not valid, naming it.
    """
    files = sorted(path for path in folder.rglob("*.npy") if path.name != "silence.npy")
    quiet = folder / "silence.npy"
    if not files or not quiet.is_file():
        raise ValueError(f"{folder}: expected NNN.npy with NNN.json, and silence.npy")
    silence = map_array(quiet, "damaged, truncated or no array")
    if silence.ndim != 3 or not silence.size or silence.dtype.kind not in "fiu":
        raise ValueError(f"{quiet}: expected numbers of shape (1, C, T), got {silence.dtype} {silence.shape}")
    if not np.isfinite(silence).all():
        raise ValueError(f"{quiet}: the latent of silence is not finite")
    middle = torch.from_numpy(silence[0, :, silence.shape[2] // 2].astype(np.float32))
    return write_latents(out, _items(folder, progress(files), autoencoder), silence=middle, autoencoder=autoencoder)


def _items(folder: Path, files: Iterable[Path], autoencoder: str) -> Iterator[tuple[LatentItem, Tensor]]:
    for path in files:
        try:
            about = read_object(path.with_suffix(".json"))
            latents = map_array(path, "damaged, truncated or no array")
            item, frames = _item(path.relative_to(folder).as_posix(), about, latents)
        except (ValueError, OSError) as error:
            raise ValueError(f"{path}: not a pair of the public layout ({reason(error)})") from error
        made = about.get("autoencoder", autoencoder)
        if made != autoencoder:
            raise ValueError(
                f"{path} was encoded by autoencoder {listed([made])}, not by {autoencoder}; encode it again"
            )
        yield item, torch.from_numpy(np.ascontiguousarray(latents[:, :frames].T.astype(np.float32)))


def _item(name: str, about: dict[str, Any], latents: np.ndarray) -> tuple[LatentItem, int]:
    """Return the item and its valid frames."""
    if not {"padding_mask", "prompt"} <= about.keys():
        raise ValueError("its JSON has no padding_mask or no prompt")
    mask = about["padding_mask"]
    if not isinstance(mask, list) or not all(value in (0, 1) for value in mask) or 1 not in mask:
        raise ValueError("padding_mask is no list of 0 and 1 with a 1")
    if latents.ndim != 2 or len(mask) != latents.shape[1]:
        raise ValueError(f"latents {latents.shape} and padding_mask ({len(mask)},) do not belong together")
    known = ("padding_mask", "sample_rate", "prompts", "id", "source", "split", "kind", "label", "midi", "autoencoder")
    fields = {key: value for key, value in about.items() if key not in known}
    sidecar = parse_sidecar({**fields, "prompt": about.get("prompts", about["prompt"])})
    if sidecar.seconds_total is None:
        raise ValueError("seconds_total is missing")
    if not sidecar.captions:
        raise ValueError("its prompt is empty, and a diffusion model is trained on prompts")
    source = about.get("source") or ""
    frames = len(mask) - mask[::-1].index(1)
    entry = {
        "id": about.get("id", name),
        "captions": sidecar.captions,
        "seconds": sidecar.seconds_total,
        "shard": 0,
        "offset": 0,
        "frames": frames,
        "kind": about.get("kind", "user"),
        "label": about.get("label", "user"),
        "midi": about.get("midi"),
        "split": about.get("split") or split_of(str(source)),
        "source": source,
        "licence": sidecar.licence,
        "fields": sidecar.fields,
    }
    return parse_entry(LatentItem, entry, "its JSON"), frames
