"""Judge by models and methods of others, on which no recipe is chosen: basic-pitch for notes, librosa for tempo, key.

Optional: pip install 'sa3[judges]', and pip install --no-deps basic-pitch, of which only the model's file is read.
"""

from __future__ import annotations

from importlib.util import find_spec
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from sa3_mlx.common.measures.spectra import Float, mono
from sa3_torch.evaluate.judge.music.tonality import best_key

RATE = 22_050
WINDOW, HOP_FRAMES, HOP = 2 * RATE - 256, 142, 256  # of basic-pitch: 172 frames a window, 30 shared by two
_EDGE = 15  # frames at both ends of a window that its neighbours know better
LOWEST = 21  # MIDI number of the first of its 88 notes
_SURE = 0.3


def _resampled(audio: NDArray[np.floating]) -> NDArray[np.float32]:
    import soxr

    return np.asarray(soxr.resample(mono(audio).astype(np.float32), 44_100, RATE), dtype=np.float32)


class BasicPitch:
    """Run basic-pitch [Bittner 2022] by onnxruntime alone.

    Raises ImportError without onnxruntime, FileNotFoundError without the package's model.
    """

    def __init__(self) -> None:
        try:
            import onnxruntime
        except ImportError as error:
            raise ImportError("basic-pitch needs onnxruntime: pip install 'sa3[judges]'") from error
        found = find_spec("basic_pitch")
        place = Path(next(iter(found.submodule_search_locations or ()))) if found is not None else Path()
        model = place / "saved_models" / "icassp_2022" / "nmp.onnx"
        if not model.is_file():
            raise FileNotFoundError("the model of basic-pitch is missing: pip install --no-deps basic-pitch")
        options = onnxruntime.SessionOptions()
        options.intra_op_num_threads = 1
        self._session: Any = onnxruntime.InferenceSession(
            str(model), sess_options=options, providers=["CPUExecutionProvider"]
        )
        self._input = self._session.get_inputs()[0].name

    def notes(self, audio: NDArray[np.floating]) -> Float:
        """Return how sure the model is of each of 88 notes from A0 up: (frames, 88), 86 frames a second."""
        signal = _resampled(audio)
        frames = max(1, len(signal) // HOP)
        signal = np.pad(signal, (_EDGE * HOP, WINDOW))
        kept = []
        for start in range(0, frames, HOP_FRAMES):
            window = signal[start * HOP : start * HOP + WINDOW]
            outputs = self._session.run(None, {self._input: window[None, :, None]})
            note = next(each for each in outputs[1:] if each.shape[2] == 88)[0]
            kept.append(note[_EDGE : _EDGE + HOP_FRAMES])
        return np.concatenate(kept)[:frames].astype(np.float64)

    def note(self, audio: NDArray[np.floating]) -> int | None:
        """Return the MIDI number of the note that is heard best, None when none is."""
        strength = np.sort(self.notes(audio), axis=0)[-20:].mean(axis=0)  # its best quarter of a second
        return LOWEST + int(strength.argmax()) if strength.max() >= _SURE else None

    def key(self, audio: NDArray[np.floating]) -> str:
        """Return the key whose profile fits the pitch classes of the notes best."""
        heard = self.notes(audio).sum(axis=0)
        classes = np.bincount((np.arange(88) + LOWEST) % 12, weights=heard, minlength=12).astype(np.float64)
        return best_key(classes)


def librosa_tempo(audio: NDArray[np.floating], bpm: float) -> float:
    """Return the tempo in bpm that librosa finds with its expectation at ``bpm``. Raises ImportError without it."""
    import librosa

    envelope = librosa.onset.onset_strength(y=_resampled(audio), sr=RATE, hop_length=HOP)
    found = librosa.beat.beat_track(onset_envelope=envelope, sr=RATE, hop_length=HOP, start_bpm=bpm, units="time")
    beats = np.asarray(found[1])
    if len(beats) < 3:
        return 0.0
    slope = np.polyfit(np.arange(len(beats)), beats, 1)[0]  # finer than its grid of frames
    return float(60 / slope)


def librosa_key(audio: NDArray[np.floating]) -> str:
    """Return the key that fits librosa's chroma best. Raises ImportError without librosa."""
    import librosa

    return best_key(librosa.feature.chroma_cqt(y=_resampled(audio), sr=RATE).mean(axis=1).astype(np.float64))
