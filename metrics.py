"""What each number means (the metrics), and forecasts without a network (the baselines).

Frames are (B, T, C, H, W) floats in [0, 1]: B sequences, T frames, C channels, H height, W width. Below, x is
the prediction and y the truth. A metric gives a value for each sequence and frame, (B, T). A curve is their
mean over the sequences. The number in a table is the mean of the curve. Metrics compute in float64. Where
the truth is NaN, a pixel is missing, and does not count. Only of your own data, truth and baselines may leave
[0, 1].
"""

import functools
import math

import cv2
import torch
import torch.nn.functional as F

METRICS = {  # in the order of the tables: heading and unit
    "mse_per_frame": ("MSE", "squared grey level (0-1), sum over a frame's pixels, mean over sequences"),
    "mae_per_frame": ("MAE", "grey level (0-1), sum over a frame's pixels, mean over sequences"),
    "ssim": ("SSIM", "1 is identical; Gaussian 11x11 window, sigma 1.5, data range 1, mean over sequences"),
    "ssim_openstl": ("SSIM*", "1 is identical; uniform 7x7 window, data range 2, mean over sequences"),
    "psnr": ("PSNR", "dB, of each frame on a 0-1 scale, mean over sequences"),
    "cross_entropy_per_sequence": ("cross-entropy", "nats, sum over a sequence, mean over sequences"),
}
GAUSSIAN = torch.exp(torch.arange(-5, 6, dtype=torch.float64).square() / (-2 * 1.5**2))
GAUSSIAN /= GAUSSIAN.sum()
UNIFORM = torch.full((7,), 1 / 7, dtype=torch.float64)


def mse_per_frame(prediction, truth):
    """Σ (x − y)² over the C·H·W pixels of a frame → (B, T). Unit: squared grey level, 0–1.

    What every Moving MNIST table calls MSE. For 64 × 64 pixels it is 4,096 times the mean over pixels, and a
    black forecast scores about 175. PredRNN's code first clips the forecast to 0–1.
    """
    return _per_sequence(lambda x, y: _sum((x - y).square()), prediction, truth)


def mae_per_frame(prediction, truth):
    """Σ |x − y| over the pixels of a frame → (B, T), in grey levels, 0–1. The MAE of Moving MNIST tables."""
    return _per_sequence(lambda x, y: _sum((x - y).abs()), prediction, truth)


def psnr(prediction, truth):
    """10·log10(1 / mean of (x − y)² over a frame's pixels) → (B, T). Unit: dB.

    One frame without any error makes the mean infinite. SimVP's 37.97 and 38.35 are not comparable: uint8
    overflows there, so that the square of 20 is 144 instead of 400. Integers are refused here.
    """
    decibels = lambda x, y: -10 * (x - y).square().nanmean((2, 3, 4)).log10()
    return _per_sequence(decibels, prediction, truth)


def ssim(prediction, truth):
    """Structural similarity, Wang et al. (2004), data range 1, mean over pixels and channels → (B, T).

    Equal to scikit-image's structural_similarity(gaussian_weights=True, sigma=1.5, data_range=1,
    use_sample_covariance=False), which leaves out 5 pixels at each border. The published tables differ: see
    `ssim_openstl`.
    """
    return _per_sequence(_mean_similarity, prediction, truth)


def ssim_openstl(prediction, truth):
    """The SSIM of the OpenSTL and SimVP tables, for comparison with them only → (B, T).

    scikit-image's old default for floats: uniform 7×7 window, sample covariance, and data range 2, as if grey
    levels went from −1 to 1. Other tables differ: PredRNN's range is 255, Earthformer's depends on the batch.
    """
    options = {"window": UNIFORM, "data_range": 2, "norm": 49 / 48}
    return _per_sequence(lambda x, y: _mean_similarity(x, y, **options), prediction, truth)


def _mean_similarity(x, y, window=GAUSSIAN, **options):
    """The mean SSIM of the windows without a missing pixel → (B, T)."""
    missing = y.isnan()
    if not missing.any():
        return similarity(x, y, window, **options).mean((2, 3, 4))
    maps = similarity(x.masked_fill(missing, 0), y.masked_fill(missing, 0), window, **options)
    touched = F.max_pool3d(missing.double(), (1, len(window), len(window)), 1) > 0
    return maps.masked_fill(touched, torch.nan).nanmean((2, 3, 4))


def similarity(x, y, window=GAUSSIAN, data_range=1, norm=1):
    """SSIM of every window: x and y (…, H, W) → (…, H − k + 1, W − k + 1), in the dtype of x.

    window: k weights. norm: N / (N − 1) for the sample covariance of N = k² pixels, or 1. Do not call it in
    bf16 or TF32: rounding spoils the variances. The window is separable, so two products with matrices
    (n − k + 1, n) slide it along both axes. On a CPU this is a few times as fast as a convolution.
    """
    down, right = (sliding(n, window, x.dtype, x.device) for n in y.shape[-2:])
    maps = torch.stack([x, y, x * x + y * y, x * y])
    mx, my, squares, product = down @ maps @ right.T  # local means
    c1, c2 = (0.01 * data_range) ** 2, (0.03 * data_range) ** 2
    mxx_myy, mxy = mx * mx + my * my, mx * my
    variances, covariance = norm * (squares - mxx_myy), norm * (product - mxy)
    return (2 * mxy + c1) * (2 * covariance + c2) / ((mxx_myy + c1) * (variances + c2))


@functools.lru_cache(100)  # a copy to a GPU waits for all queued work
@torch.inference_mode(False)  # training cannot use a tensor that was made in inference mode
def sliding(n, window, dtype, device):
    """The matrix (n - k + 1, n) that slides a window of k numbers along n pixels."""
    return (torch.eye(n, dtype=window.dtype).unfold(0, len(window), 1) @ window).to(dtype).to(device)


def cross_entropy_per_sequence(logits, truth):
    """−Σ [y·ln σ(z) + (1 − y)·ln(1 − σ(z))] over T·C·H·W pixels → (B, 1). Unit: nats.

    z: logits. As in Table 1 of the ConvLSTM paper, whose best network has 3670.85 on the paper's data. y is
    clipped to [0, 1].
    """
    per_pixel = functools.partial(F.binary_cross_entropy_with_logits, reduction="none")
    nats = lambda z, y: per_pixel(z, y.clamp(0, 1)).flatten(1).nansum(1, True)
    return _per_sequence(nats, logits, truth, is_logits=True)


def mean_squares(prediction, truth):
    """Mean of (x − y)² over frames and pixels → (B, C), for the RMSE of each channel."""
    return _per_sequence(lambda x, y: (x - y).square().nanmean((1, 3, 4)), prediction, truth)


class Baseline(torch.Tensor):
    """A forecast that may leave [0, 1], as numbers of your own data may."""


def black(past, n_future):
    """(B, T, C, H, W) → (B, n_future, C, H, W): nothing but background, as a failed network draws."""
    return past.new_zeros(len(past), n_future, *past.shape[2:])


def copy_last(past, n_future):
    """(B, T, C, H, W) → (B, n_future, C, H, W): the last frame stands still."""
    return past[:, -1:].repeat(1, n_future, 1, 1, 1).as_subclass(Baseline)


@torch.no_grad()
def optical_flow(past, n_future):
    """(B, T, C, H, W) → (B, n_future, C, H, W): the motion between the last two frames goes on.

    OpenCV's dense flow (DIS, https://arxiv.org/abs/1603.03590) on the mean of the channels, then backward
    warping once per frame. The flow is warped with the frame: a fixed flow would stop at the object's edge.
    """
    C, H, W = past.shape[2:]
    last_two = past[:, -2:].float().cpu()  # OpenCV computes on the CPU
    grey = (last_two.mean(2).clamp(0, 1) * 255).round().byte().numpy()
    dis = cv2.DISOpticalFlow_create(cv2.DISOPTICAL_FLOW_PRESET_MEDIUM)
    flow = torch.stack([torch.from_numpy(dis.calc(last, before, None)) for before, last in grey])
    flow = flow.movedim(-1, 1)  # (B, 2, H, W): offset, in x and y, to where a pixel came from
    moving = torch.cat([last_two[:, -1], flow], 1)  # (B, C + 2, H, W)
    pixel = torch.stack(torch.meshgrid(torch.arange(W), torch.arange(H), indexing="xy"), -1)
    size = torch.tensor([W, H])
    frames = []
    for _ in range(n_future):
        origin = pixel + moving[:, C:].movedim(1, -1)
        origin = (2 * origin + 1) / size - 1  # grid_sample's frame spans −1 to 1
        moving = F.grid_sample(moving, origin, padding_mode="border", align_corners=False)
        frames.append(moving[:, :C])
    return torch.stack(frames, 1).to(past).as_subclass(Baseline)


def _sum(errors):
    """Over the pixels of a frame, without missing ones. NaN where all are missing."""
    return errors.nansum((2, 3, 4)).masked_fill(errors.isnan().flatten(2).all(2), torch.nan)


def _check(name, frames):
    if frames.ndim != 5 or frames.numel() == 0:
        raise ValueError(f"{name} has shape {tuple(frames.shape)}, not a filled (B, T, C, H, W)")
    if not frames.is_floating_point():
        raise TypeError(f"{name} is {frames.dtype}; give floats in [0, 1] (uint8 frames: .float() / 255)")
    known = frames.detach().nan_to_num(0.0, math.inf, -math.inf) if name == "truth" else frames.detach()
    low, high = (v.item() for v in known.aminmax())
    if not (math.isfinite(low) and math.isfinite(high)):
        raise FloatingPointError(f"{name} holds NaN or infinite values")
    if name == "prediction" and (low < -1e-6 or high > 1 + 1e-6) and not isinstance(frames, Baseline):
        raise ValueError(f"{name} goes from {low:g} to {high:g}, not 0 to 1: divide by 255, or use a sigmoid")


@torch.no_grad()
def _per_sequence(value, prediction, truth, is_logits=False):
    """value(x, y), (B, …), in float64. A few sequences at a time, to stay in the cache."""
    _check("logits" if is_logits else "prediction", prediction)
    _check("truth", truth)
    if prediction.shape != truth.shape:
        raise ValueError(f"shapes differ: prediction {tuple(prediction.shape)}, truth {tuple(truth.shape)}")
    if truth.device.type == "mps":  # Apple's GPU has no float64
        prediction, truth = prediction.cpu(), truth.cpu()
    prediction = prediction.as_subclass(torch.Tensor)
    step = max(1, 2**17 // truth[0].numel())
    pairs = zip(prediction.split(step), truth.split(step), strict=True)
    return torch.cat([value(x.double(), y.double()) for x, y in pairs])
