"""From the numbers of the data to [0, 1], where networks and metrics work, and back.

Frames are (…, C, H, W). NaN is a missing pixel.
"""

import functools
from dataclasses import dataclass

import numpy as np
import torch

from support import UserError
from support.devices import print0

FARTHEST = 1e6  # widths of the scale; what lies so far outside is no measurement


@dataclass(frozen=True)
class Scale:
    """The values that become 0 and 1, of each channel. What lies outside is clipped, except in scores."""

    low: tuple[float, ...] = (0.0,)
    high: tuple[float, ...] = (255.0,)
    is_grey: bool = True  # uint8 from 0 to 255: grey levels or colors, not a field with units

    @classmethod
    def of(cls, saved):
        """From a checkpoint or metrics.json."""
        return cls(tuple(saved["low"]), tuple(saved["high"]), saved["is_grey"]) if saved else cls()

    def __str__(self):
        return "; ".join(f"{low:.6g} to {high:.6g}" for low, high in zip(self.low, self.high, strict=True))

    def to_unit(self, frames, clip=True):
        """Numbers of the data → float32 in [0, 1], or NaN. Without clip, values outside stay outside."""
        low, width = bounds(self, frames.device)
        values = (frames.float() - low) / width
        return values.clamp(0, 1) if clip else values

    def to_data(self, frames, as_bytes=True):
        """[0, 1] → a NumPy array in the units of the data: float32; uint8 for grey levels without gaps."""
        low, width = bounds(self, frames.device)
        values = frames * width + low
        as_bytes = as_bytes and self.is_grey and not values.isnan().any()
        return (values.round().byte() if as_bytes else values).cpu().numpy()

    def describe_error(self, prediction, truth):
        """Of frames (T, C, H, W), in words: the MSE of a frame; of fields the RMSE in their units."""
        squares = (prediction - truth).square()
        if self.is_grey:
            mse = squares.nansum() / len(truth)
            return f"MSE {mse:.0f}" if mse >= 10 else f"MSE {mse:.2g}"
        widths = np.subtract(self.high, self.low)
        errors = squares.nanmean((0, 2, 3)).sqrt().cpu().numpy() * widths
        return f"RMSE {', '.join(f'{error:.3g}' for error in errors)}"

    def pictures(self):
        """(end of the file's name, channels, values of 0 and 1) of each picture: one for each field."""
        if self.is_grey:
            return [("", slice(None), None)]
        ends = ("" if k == 0 else f"_channel_{k + 1}" for k in range(len(self.low)))
        return [(end, [k], (self.low[k], self.high[k])) for k, end in enumerate(ends)]


@functools.cache  # a copy to a GPU waits for all queued work
@torch.inference_mode(False)  # training cannot use a tensor that was made in inference mode
def bounds(scale, device):
    """(low, high − low), each (C, 1, 1), on a device."""
    low, high = (torch.tensor(values, device=device).view(-1, 1, 1) for values in (scale.low, scale.high))
    return low, high - low


def fill(frames):
    """(B, T, C, H, W) with NaN → the same without: a missing pixel keeps its last value.

    Before it has one, it is the mean of those pixels of its channel that have one, or 0.5.
    """
    if frames.device.type == "cpu" and not frames.isnan().any():  # a GPU would have to wait for the answer
        return frames
    known = [frames[:, 0]]
    for frame in frames[:, 1:].unbind(1):
        known.append(torch.where(frame.isnan(), known[-1], frame))
    known = torch.stack(known, 1)
    mean = known.nanmean((3, 4), keepdim=True).nan_to_num(0.5)
    return torch.where(known.isnan(), mean, known)


def limits(series, name):
    """The lowest and the highest value of each channel, (C,). Raises UserError where there is none."""
    low = np.fmin.reduce([np.fmin.reduce(one, (0, 2, 3)) for one in series]).astype(float)
    high = np.fmax.reduce([np.fmax.reduce(one, (0, 2, 3)) for one in series]).astype(float)
    if np.isnan(low).any():
        raise UserError(f"all values of {name}, or of one of its channels, are missing (NaN)")
    with np.errstate(over="ignore"):
        is_infinite = np.isinf(np.float32([low, high])).any()  # networks compute in float32
    if is_infinite:
        raise UserError(f"{name} has infinite values; write NaN where a pixel is missing")
    return low, high


def is_constant(low, high):
    """Of each channel: whether all its values are the same, in float32."""
    return np.float32(low) == np.float32(high)


def choose_scale(training, value_range):
    """That of the knob; 0 to 255 for uint8; else the range of the training split."""
    C, low, high = training[0].shape[1], *value_range
    if low < high:
        return Scale((float(low),) * C, (float(high),) * C, is_grey=False)
    if training[0].dtype == np.uint8:
        return Scale()
    low, high = limits(training, "the training split")
    high = np.where(is_constant(low, high), low + np.maximum(1, 1e-6 * np.abs(low)), high)
    return Scale(tuple(low.tolist()), tuple(high.tolist()), is_grey=False)


def report_scale(scale, series, low, high):
    """Print which values become 0 and 1, and whether the data fit. low, high: limits of the data.

    Raises UserError where values are so far outside that scores would mean nothing, or overflow.
    """
    bottom, top = (np.reshape(values, (-1, 1, 1)) for values in (scale.low, scale.high))
    beyond = np.maximum(high - scale.high, scale.low - low) / np.subtract(scale.high, scale.low)
    if beyond.max() > FARTHEST:
        found = f"values go from {low.min():.6g} to {high.max():.6g}, far beyond the scale, {scale}"
        raise UserError(f"{found}; write NaN where a pixel is missing")
    pairs = (((frame < bottom) | (frame > top), frame == frame) for one in series for frame in one)
    n_outside, n_known = sum(np.sum(pair, (2, 3)) for pair in pairs)
    outside = n_outside / n_known
    shares = ", ".join(f"{share:.2%}" for share in outside)
    print0(f"scale     {scale}; outside, and clipped: {shares}")
    if outside.max() > 0.2 or (high - low).max() < 0.02 * (top - bottom).max():
        texts = f"{low.min():.6g} to {high.max():.6g}"
        print0(f"warning   the scale hardly fits these values: they go from {texts}")
