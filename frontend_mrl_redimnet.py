"""The mel front end: waveforms at 16 kHz to the log-mel features that the network sees.

Two kinds, as the published networks have them: "mel" as torchaudio computes it, and "tf_mel" as TensorFlow does.

This file travels beside the weights to the Hub, as `modeling_mrl_redimnet.py` does, which is the network itself.
"""

import torch
import torch.nn.functional as F
from torch import nn

# As in modeling_mrl_redimnet.py.
try:
    if not __package__:
        raise ImportError("not part of a package")
    from .configuration_mrl_redimnet import FFT_SIZE, SAMPLING_RATE, WINDOW_LENGTH, MRLReDimNetConfig
    from .masking_mrl_redimnet import BatchNorm, masked_mean, masked_variance, sample_mask
except ImportError:
    if __package__:
        raise
    from configuration_mrl_redimnet import FFT_SIZE, SAMPLING_RATE, WINDOW_LENGTH, MRLReDimNetConfig
    from masking_mrl_redimnet import BatchNorm, masked_mean, masked_variance, sample_mask

MEL_LOW_HZ, MEL_HIGH_HZ = 20.0, 7600.0  # ends of the lowest and of the highest filter
PREEMPHASIS = 0.97
LOG_FLOOR = 1e-6  # is added to the power of "mel" before its logarithm


def _mel_filters(config: MRLReDimNetConfig) -> torch.Tensor:
    """Triangular HTK-mel filters without area norm, [FFT_SIZE // 2 + 1, bins] float32."""

    def to_mel(hz: torch.Tensor) -> torch.Tensor:
        return 2595.0 * torch.log10(1.0 + hz / 700.0)

    edges_mel = torch.linspace(
        *to_mel(torch.tensor([MEL_LOW_HZ, MEL_HIGH_HZ], dtype=torch.float64)).tolist(),
        config.num_mel_bins + 2,
        dtype=torch.float64,
    )
    if config.front_end == "tf_mel":
        # Slopes on the mel axis, 256 bin centres spread over 0 .. 8000 Hz, bin 0 empty, no Nyquist bin.
        centres = to_mel(torch.linspace(0, SAMPLING_RATE / 2, FFT_SIZE // 2, dtype=torch.float64))
        edges = edges_mel
    else:
        centres = torch.linspace(0, SAMPLING_RATE / 2, FFT_SIZE // 2 + 1, dtype=torch.float64)
        edges = 700.0 * (10.0 ** (edges_mel / 2595.0) - 1.0)
    rising = (centres[:, None] - edges[:-2]) / (edges[1:-1] - edges[:-2])
    falling = (edges[2:] - centres[:, None]) / (edges[2:] - edges[1:-1])
    filters = torch.minimum(rising, falling).clamp(min=0.0)
    if config.front_end == "tf_mel":
        filters[0] = 0.0
        filters = F.pad(filters, (0, 0, 0, 1))  # the dropped Nyquist bin
    return filters.float()


def _analysis_window(config: MRLReDimNetConfig) -> torch.Tensor:
    """Hamming window of 400 samples in an FFT frame of 512, [512] float32: periodic and centred for "mel",
    symmetric and at the frame's start for "tf_mel".
    """
    tf_style = config.front_end == "tf_mel"
    window = torch.hamming_window(WINDOW_LENGTH, periodic=not tf_style, dtype=torch.float64)
    left = 0 if tf_style else (FFT_SIZE - WINDOW_LENGTH) // 2
    return F.pad(window, (left, FFT_SIZE - WINDOW_LENGTH - left)).float()


class MelFrontEnd(nn.Module):
    """Waveform [B, T] at 16 kHz to log-mel features [B, frames, bins], in float32 whatever the model's dtype."""

    def __init__(self, config: MRLReDimNetConfig) -> None:
        super().__init__()
        self.config = config
        # Constants. Built on the CPU even where the model is built on the meta device; `_init_weights` refills them
        # after loading, because from_pretrained leaves buffers that are not in the file uninitialised.
        for name, value in self.constants().items():
            self.register_buffer(name, value, persistent=False)
        self.norm = BatchNorm(config.num_mel_bins) if config.feature_norm == "batch" else None

    def constants(self) -> dict[str, torch.Tensor]:
        """The window [512] and the mel filters [257, bins], computed anew."""
        with torch.device("cpu"):
            return {"window": _analysis_window(self.config), "mel_filters": _mel_filters(self.config)}

    def num_frames(self, num_samples: int | torch.Tensor) -> int | torch.Tensor:
        """Frames of a waveform of `num_samples` (an int or an integer tensor)."""
        hop = self.config.hop_length
        if self.config.front_end == "tf_mel":
            return (num_samples + 2 * (hop // 2) - WINDOW_LENGTH) // hop + 1
        return 1 + num_samples // hop

    def frame_mask(self, lengths: torch.Tensor | None, num_frames: int) -> torch.Tensor | None:
        """lengths [B] in samples -> [B, num_frames, 1], true inside each utterance; None stays None."""
        return None if lengths is None else sample_mask(self.num_frames(lengths), num_frames)[..., None]

    def forward(self, waveform: torch.Tensor, lengths: torch.Tensor | None = None) -> torch.Tensor:
        """waveform [B, T], lengths [B] in samples or None -> features [B, frames, bins] float32."""
        with torch.no_grad(), torch.autocast(waveform.device.type, enabled=False):
            x = self._pad(self._condition(waveform.float(), lengths), lengths)
            features = self._log_mel(self.power_spectrum(x))
            mask = self.frame_mask(lengths, features.shape[1])
            if self.config.feature_norm in ("mean", "mean_variance"):
                mean = masked_mean(features, mask)
                if self.config.feature_norm == "mean_variance":
                    deviation = masked_variance(features, mean, mask).sqrt() + 1e-8
                    features = (features - mean) / deviation
                else:
                    features = features - mean
        if self.norm is not None:
            features = self.norm(features.to(self.norm.weight.dtype), mask).float()
        if self.training and self.config.spec_augment:
            for _ in range(self.config.spec_augment_repeats):
                features = self._spec_augment(features)
        return features

    def _condition(self, x: torch.Tensor, lengths: torch.Tensor | None) -> torch.Tensor:
        """Optional signal normalisation and pre-emphasis of x [B, T]."""
        if self.config.normalize_signal:
            mask = None if lengths is None else sample_mask(lengths, x.shape[1])[..., None]
            mean = masked_mean(x[..., None], mask)
            variance = masked_mean((x[..., None] - mean).square(), mask)
            eps = self.config.front_end_eps if self.config.front_end == "tf_mel" else 1e-6
            x = (x - mean[..., 0]) / (variance[..., 0].sqrt() + eps)
        if self.config.preemphasis:
            x = x - PREEMPHASIS * torch.cat([x[:, 1:2], x[:, :-1]], dim=1)  # x[-1] reflects to x[1]
        return x

    def _pad(self, x: torch.Tensor, lengths: torch.Tensor | None) -> torch.Tensor:
        """Room for the first and last frames: reflection at each utterance's own ends ("mel") or zeros ("tf_mel")."""
        if self.config.front_end == "tf_mel":
            half_hop = self.config.hop_length // 2
            if lengths is not None:
                x = x.masked_fill(~sample_mask(lengths, x.shape[1]), 0.0)
            return F.pad(x, (half_hop, half_hop + FFT_SIZE - WINDOW_LENGTH))
        half = FFT_SIZE // 2
        if lengths is None:
            return F.pad(x[:, None], (half, half), mode="reflect")[:, 0]
        # Position n + k behind an utterance of n samples holds sample n - 2 - k:  a b c d | c b a
        position = torch.arange(x.shape[1] + half, device=x.device)
        end = lengths[:, None]
        source = torch.where(position < end, position, 2 * (end - 1) - position).clamp(min=0)
        return torch.cat([x[:, 1 : half + 1].flip(1), x.gather(1, source)], dim=1)

    def power_spectrum(self, x: torch.Tensor) -> torch.Tensor:
        """Conditioned and padded signal [B, T] float32 -> power spectrum [B, frames, 257]."""
        spectrum = torch.stft(
            x, FFT_SIZE, self.config.hop_length, window=self.window.float(), center=False, return_complex=True
        )
        return torch.view_as_real(spectrum).square().sum(-1).transpose(1, 2)

    def _log_mel(self, power: torch.Tensor) -> torch.Tensor:
        """Power spectrum [B, frames, 257] -> log-mel [B, frames, bins]."""
        filters = self.mel_filters.float()
        if self.config.front_end == "tf_mel":
            eps = self.config.front_end_eps
            return ((power.clamp(eps, 1 / eps) @ filters).clamp(eps, 1 / eps) + eps).log()
        return (power @ filters + LOG_FLOOR).log()

    def _spec_augment(self, x: torch.Tensor) -> torch.Tensor:
        """One masked stretch of frames and one of bins per utterance (arXiv 1904.08779), x [B, frames, bins]."""
        for dim, widths, first in (
            (1, self.config.time_mask_width, 0),
            (2, self.config.freq_mask_width, self.config.freq_mask_start),
        ):
            size = x.shape[dim]
            width = torch.randint(widths[0], widths[1], (x.shape[0], 1), device=x.device)
            start = first + (torch.rand(width.shape, device=x.device) * (size - first - width).clamp(min=1)).long()
            position = torch.arange(size, device=x.device)
            hidden = (position >= start) & (position < start + width)  # [B, size]
            x = x.masked_fill(hidden[:, :, None] if dim == 1 else hidden[:, None, :], 0.0)
        return x
