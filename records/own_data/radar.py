"""Rain over the Netherlands, a data set with missing pixels: writes radar.npy.

git clone https://github.com/pySTEPS/pysteps-data
pip install h5py
python records/own_data/radar.py pysteps-data

One series of 92 frames, five minutes apart, float32: rain by the radars of KNMI on 26 August 2010, as
reflectivity in dBZ. A pixel is the mean rain of 4×4 km, NaN out of the radars' reach.
"""

import sys
import warnings
from pathlib import Path

import h5py
import numpy as np

SIDE = 4  # kilometers, which are pixels of the file
MISSING = 65535
PER_HOUR = 0.01 * 12  # from hundredths of a millimeter in five minutes to millimeters in an hour


def reflectivity(rain):
    """mm/h → dBZ, by Z = 200 R^1.6 (Marshall, Palmer 1948); what is below 0 becomes 0."""
    return np.maximum(10 * np.log10(200 * np.maximum(rain, 1e-3) ** 1.6), 0)


if __name__ == "__main__":
    files = sorted(Path(sys.argv[1], "radar", "KNMI", "2010", "08").glob("*.h5"))
    counts = np.stack([h5py.File(file)["image1/image_data"][:] for file in files])
    rain = np.where(counts == MISSING, np.nan, PER_HOUR * counts)
    ys, xs = np.nonzero(np.isfinite(rain).any(0))
    rain = rain[:, ys.min() : ys.max() + 1, xs.min() : xs.max() + 1]
    T, H, W = len(rain), rain.shape[1] // SIDE, rain.shape[2] // SIDE
    blocks = rain[:, : H * SIDE, : W * SIDE].reshape(T, H, SIDE, W, SIDE)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # blocks without a value stay NaN
        rain = np.nanmean(blocks, (2, 4))
    np.save("radar.npy", reflectivity(rain).astype(np.float32))
