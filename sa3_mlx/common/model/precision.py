"""Choose number types of the networks; the autoencoder and the sampler's state are always float32."""

from __future__ import annotations

from dataclasses import dataclass, replace

DTYPES = ("auto", "float32", "float16", "bfloat16")
TEXT_DTYPES = ("auto", "float32", "bfloat16")  # activations of T5Gemma overflow float16


@dataclass(frozen=True, kw_only=True)
class Precision:
    """Name the types of the DiT and the text encoder: "float32", "float16", "bfloat16"; text None is the file's own."""

    dtype: str
    text_dtype: str | None

    @property
    def bytes(self) -> int:
        """Return the bytes of one number of the DiT."""
        return 4 if self.dtype == "float32" else 2

    @property
    def text_bytes(self) -> int:
        """Return the bytes of one number of the text encoder."""
        return 4 if self.text_dtype == "float32" else 2


def choose_precision(dtype: str, text_dtype: str, *, on_gpu: bool) -> Precision:
    """Say what "auto" means: float32 on a CPU; on a GPU float16 for the DiT, the file's own for the text encoder [B3].

    Raises ValueError for a name that is not allowed.
    """
    for name, given, allowed in (("dtype", dtype, DTYPES), ("text_dtype", text_dtype, TEXT_DTYPES)):
        if given not in allowed:
            raise ValueError(f"{name} is {given!r}: allowed are {', '.join(allowed)}")
    if dtype == "auto":
        dtype = "float16" if on_gpu else "float32"
    if text_dtype == "auto":
        return Precision(dtype=dtype, text_dtype=None if on_gpu else "float32")
    return Precision(dtype=dtype, text_dtype=text_dtype)


def allowed_precisions(dtype: str, text_dtype: str, *, on_gpu: bool) -> tuple[Precision, ...]:
    """Return what ``choose_precision`` does, then what "auto" may become where memory is short.

    That is 16 bits, for the DiT before the text encoder.
    """
    found = [choose_precision(dtype, text_dtype, on_gpu=on_gpu)]
    if dtype == "auto" and found[-1].bytes > 2:
        found.append(replace(found[-1], dtype="float16"))
    if text_dtype == "auto" and found[-1].text_bytes > 2:
        found.append(replace(found[-1], text_dtype="bfloat16"))
    return tuple(found)
