"""From the numbers of the data to [0, 1], where networks and metrics work, and back.

Frames are (…, C, H, W). NaN is a missing pixel.
"""

import functools
from dataclasses import dataclass

import torch


@dataclass(frozen=True)
class Scale:
    """The values that become 0 and 1, of each channel. What lies outside is clipped."""

    low: tuple[float, ...] = (0.0,)
    high: tuple[float, ...] = (255.0,)
    is_grey: bool = True  # uint8 from 0 to 255: grey levels or colors, not a field with units

    @classmethod
    def of(cls, saved):
        """From a checkpoint or metrics.json."""
        return cls(tuple(saved["low"]), tuple(saved["high"]), saved["is_grey"]) if saved else cls()

    def to_unit(self, frames):
        """Numbers of the data → float32 in [0, 1], or NaN."""
        low, width = bounds(self, frames.device)
        return ((frames.float() - low) / width).clamp(0, 1)

    def to_data(self, frames):
        """[0, 1] → a NumPy array in the units of the data: float32, or uint8 where the data have it."""
        low, width = bounds(self, frames.device)
        values = frames * width + low
        is_whole = self.is_grey and not values.isnan().any()
        return (values.round().byte() if is_whole else values).cpu().numpy()

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
    """(B, T, C, H, W) with NaN → the same without: a missing pixel keeps its last value, or is 0.5 before."""
    missing = frames.isnan()
    if frames.device.type == "cpu" and not missing.any():  # a GPU would have to wait for the answer
        return frames
    filled = [torch.where(missing[:, 0], 0.5, frames[:, 0])]
    for t in range(1, frames.shape[1]):
        filled.append(torch.where(missing[:, t], filled[-1], frames[:, t]))
    return torch.stack(filled, 1)
