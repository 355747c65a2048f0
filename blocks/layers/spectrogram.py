"""Log-mel spectrograms and cepstra of samples, in frames that stream."""

from __future__ import annotations

import warnings
from typing import Any

import torch
from torch import Tensor

from ..registry import did_you_mean
from .feature_norm import FeatureNorm
from .front_end import FrontEnd

COMPRESSIONS = ("log", "db", "none")
MEL_SCALES = ("htk", "slaney")


def _transforms() -> Any:
    try:
        import torchaudio.transforms as transforms
    except ImportError as error:
        raise ImportError("spectrograms need torchaudio: pip install 'seqzoo[audio]'") from error
    return transforms


class LogMel(FrontEnd):
    """Energies of mel bands, compressed: X_im = c(sum_f M_mf |STFT_if|^power), as torchaudio with center=False.

    Davis and Mermelstein 1980, doi:10.1109/TASSP.1980.1163420. sample_rate: in Hz. num_mels: bands, the D of the
    features. win_length: samples of the Hann window, n_fft: of the frame in the middle of which it stands, hop_length:
    from frame to frame; the defaults are 25 ms, the next power of two (with n_fft given win_length is n_fft, as in
    torchaudio), and 10 ms. f_min, f_max: in Hz, default 0 and half the sample rate.
    power: 2 for energies, 1 for magnitudes. mel_scale: "htk" or "slaney"; mel_norm: "slaney" divides a band by its
    width. compression: "log" is ln(x + floor), "db" is 10 log10(max(x, floor)), "none". floor: default 1e-6 for "log",
    1e-10 for "db", those of torchaudio. A floor relative to the loudest frame (top_db, Whisper's log-mel) would need
    the whole recording; there is none. tail, norm: see `FrontEnd` and `FeatureNorm`.

    Computed in the precision of the module, float32 or float64, outside autocast. Raises ValueError for values outside
    these and for bands so narrow that no bin of the spectrum falls into them, ImportError without torchaudio.
    """

    def __init__(
        self,
        sample_rate: int,
        *,
        num_mels: int = 80,
        n_fft: int | None = None,
        win_length: int | None = None,
        hop_length: int | None = None,
        f_min: float = 0.0,
        f_max: float | None = None,
        power: float = 2.0,
        mel_scale: str = "htk",
        mel_norm: str | None = None,
        compression: str = "log",
        floor: float | None = None,
        tail: str = "drop",
        norm: FeatureNorm | None = None,
    ) -> None:
        n_fft, win_length, hop_length = frame_sizes(sample_rate, n_fft, win_length, hop_length)
        super().__init__(
            self._width(num_mels),
            frame_length=n_fft,
            hop_length=hop_length,
            sample_rate=sample_rate,
            tail=tail,
            norm=norm,
        )
        if compression not in COMPRESSIONS:
            raise ValueError(f"compression={compression!r} is unknown.{did_you_mean(compression, COMPRESSIONS)}")
        if mel_scale not in MEL_SCALES:
            raise ValueError(f"mel_scale={mel_scale!r} is unknown.{did_you_mean(mel_scale, MEL_SCALES)}")
        if mel_norm not in (None, "slaney"):
            raise ValueError(f"mel_norm={mel_norm!r} is unknown. Known: None, slaney.")
        if not 1 <= win_length <= n_fft:
            raise ValueError(f"win_length={win_length} must be between 1 and n_fft={n_fft}")
        top = sample_rate / 2 if f_max is None else f_max
        if not 0 <= f_min < top <= sample_rate / 2:
            raise ValueError(f"f_min={f_min} and f_max={top} must satisfy 0 <= f_min < f_max <= {sample_rate / 2} Hz")
        if power <= 0:
            raise ValueError(f"power={power} must be above 0")
        self.floor = {"log": 1e-6, "db": 1e-10, "none": 0.0}[compression] if floor is None else floor
        if self.floor < 0 or (self.floor == 0 and compression != "none"):
            raise ValueError(f"floor={floor} must be above 0")
        self.compression, self.num_mels = compression, num_mels
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # of empty bands, for which there is an error below
            self.mel = _transforms().MelSpectrogram(
                sample_rate,
                n_fft=n_fft,
                win_length=win_length,
                hop_length=hop_length,
                f_min=f_min,
                f_max=f_max,
                n_mels=num_mels,
                power=power,
                center=False,
                norm=mel_norm,
                mel_scale=mel_scale,
            )
        if self._empty_bands(num_mels):
            most = next((n for n in range(num_mels - 1, 0, -1) if not self._empty_bands(n)), None)
            raise ValueError(
                f"num_mels={num_mels}: {self._empty_bands(num_mels)} bands hold no bin of a spectrum of n_fft={n_fft} "
                f"at {sample_rate} Hz; the most that do: {most}, or more with a larger n_fft"
            )

    def _empty_bands(self, num_mels: int) -> int:
        mel = self.mel.mel_scale
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            same = type(mel)(num_mels, mel.sample_rate, mel.f_min, mel.f_max, mel.fb.shape[0], mel.norm, mel.mel_scale)
        return int((same.fb.amax(0) == 0).sum())

    def _width(self, num_mels: int) -> int:
        return num_mels

    def frames(self, samples: Tensor) -> Tensor:
        window = self.mel.spectrogram.window
        if window.dtype not in (torch.float32, torch.float64):
            raise ValueError(
                f"{type(self).__name__} computes in float32 or float64, but the module is {window.dtype}: call its "
                "float()"
            )
        with torch.autocast(samples.device.type, enabled=False):
            return self._cepstra(self._compress(self.mel(samples.to(window.dtype)).transpose(1, 2)))

    def _compress(self, x: Tensor) -> Tensor:
        if self.compression == "log":
            return torch.log(x + self.floor)
        return 10 * torch.log10(x.clamp_min(self.floor)) if self.compression == "db" else x

    def _cepstra(self, x: Tensor) -> Tensor:
        return x


class MFCC(LogMel):
    """Mel-frequency cepstral coefficients: the orthonormal DCT-II of the compressed mel energies, the first num_mfcc.

    Davis and Mermelstein 1980, doi:10.1109/TASSP.1980.1163420: y_ik = a_k sum_m X_im cos(pi k (m + 1/2) / num_mels),
    a_0 = num_mels^-1/2 and a_k = (num_mels / 2)^-1/2 (dct_norm "ortho"); with None all a_k are 2.
    The options are those of `LogMel`. torchaudio's default, dB with its floor 80 dB below the loudest frame, needs the
    whole recording; "log" is its log_mels=True. Raises what `LogMel` does, and ValueError for num_mfcc above num_mels.
    """

    dct: Tensor

    def __init__(
        self,
        sample_rate: int,
        *,
        num_mfcc: int = 13,
        num_mels: int = 40,
        n_fft: int | None = None,
        win_length: int | None = None,
        hop_length: int | None = None,
        f_min: float = 0.0,
        f_max: float | None = None,
        power: float = 2.0,
        mel_scale: str = "htk",
        mel_norm: str | None = None,
        compression: str = "log",
        floor: float | None = None,
        dct_norm: str | None = "ortho",
        tail: str = "drop",
        norm: FeatureNorm | None = None,
    ) -> None:
        if not isinstance(num_mfcc, int) or not 1 <= num_mfcc <= num_mels:
            raise ValueError(f"num_mfcc={num_mfcc!r} must be between 1 and num_mels={num_mels}")
        if dct_norm not in (None, "ortho"):
            raise ValueError(f"dct_norm={dct_norm!r} is unknown. Known: None, ortho.")
        self._num_mfcc = num_mfcc  # before the module is one: `_width` asks for it
        super().__init__(
            sample_rate,
            num_mels=num_mels,
            n_fft=n_fft,
            win_length=win_length,
            hop_length=hop_length,
            f_min=f_min,
            f_max=f_max,
            power=power,
            mel_scale=mel_scale,
            mel_norm=mel_norm,
            compression=compression,
            floor=floor,
            tail=tail,
            norm=norm,
        )
        import torchaudio.functional as functional

        self.register_buffer("dct", functional.create_dct(num_mfcc, num_mels, dct_norm))

    def _width(self, num_mels: int) -> int:
        return self._num_mfcc

    def _cepstra(self, x: Tensor) -> Tensor:
        return x @ self.dct


def frame_sizes(
    sample_rate: int, n_fft: int | None = None, win_length: int | None = None, hop_length: int | None = None
) -> tuple[int, int, int]:
    """n_fft, win_length and hop_length of `LogMel`, with its defaults where they are None."""
    if isinstance(sample_rate, bool) or not isinstance(sample_rate, int) or sample_rate < 1:
        raise ValueError(f"sample_rate={sample_rate!r} must be a positive integer, in Hz")
    if win_length is None:
        win_length = max(sample_rate * 25 // 1000, 1) if n_fft is None else n_fft
    if n_fft is None:
        n_fft = 1 << max(win_length - 1, 0).bit_length()
    return n_fft, win_length, max(sample_rate // 100, 1) if hop_length is None else hop_length
