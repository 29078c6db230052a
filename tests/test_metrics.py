"""The ruler against scikit-image and numbers worked out by hand; the baselines against known motion."""

import math

import pytest
import torch

import metrics

PAIRS = [metrics.mse_per_frame, metrics.mae_per_frame, metrics.psnr, metrics.ssim, metrics.ssim_openstl]
ALL = [*PAIRS, metrics.cross_entropy_per_sequence]


def random_pair(shape=(2, 3, 1, 24, 17), dtype=torch.float64, seed=0):
    """A truth with black, white and smooth parts, and a noisy prediction that is better in later frames."""
    g = torch.Generator().manual_seed(seed)
    truth = torch.rand(shape, generator=g, dtype=torch.float64)
    truth = (torch.nn.functional.avg_pool2d(truth.flatten(0, 1), 5, 1, 2).view(shape) * 6 - 2.5).clamp(0, 1)
    noise = torch.randn(shape, generator=g, dtype=torch.float64)
    noise = noise * torch.linspace(0.4, 0.1, shape[1], dtype=torch.float64).view(-1, 1, 1, 1)
    return (truth + noise).clamp(0, 1).to(dtype), truth.to(dtype)


def close(value, expected, tolerance=1e-9):
    torch.testing.assert_close(value, torch.as_tensor(expected, dtype=torch.float64), rtol=0, atol=tolerance)


# Two sequences of two frames of two pixels.    sum of squares   sum of absolutes   10·log10(2 / sum squares)
#   sequence 0: frame 0 is off by  0.5,  0.25   0.3125           0.75               10·log10(6.4) =  8.061800
#               frame 1            0,   −1      1                1                  10·log10(2)   =  3.010300
#   sequence 1: frame 0           −0.25, 0      0.0625           0.25               10·log10(32)  = 15.051500
#               frame 1            0.5,  0.5    0.5              1                  10·log10(4)   =  6.020600
#   mean over sequences, frames 0 and 1:        0.1875, 0.75     0.5, 1             11.556650, 4.515450
@pytest.mark.parametrize("pixels", [(1, 1, 2), (1, 2, 1), (2, 1, 1)])
def test_errors_by_hand(pixels):
    prediction = torch.tensor([[[0.5, 1.0], [0.25, 0.0]], [[0.0, 0.5], [1.0, 0.5]]]).view(2, 2, *pixels)
    truth = torch.tensor([[[0.0, 0.75], [0.25, 1.0]], [[0.25, 0.5], [0.5, 0.0]]]).view(2, 2, *pixels)
    close(metrics.mse_per_frame(prediction, truth), [0.1875, 0.75])
    close(metrics.mae_per_frame(prediction, truth), [0.5, 1.0])
    close(metrics.psnr(prediction, truth), [11.556650, 4.515450], 1e-6)
    close(metrics.mse_per_sequence(prediction, truth), [(0.3125 + 1) / 2, (0.0625 + 0.5) / 2])


def test_psnr_without_error_is_infinite():
    _, truth = random_pair()
    assert metrics.psnr(truth, truth).tolist() == [math.inf] * 3


# −ln σ(0) = ln 2 = 0.693147, whatever the truth. σ(ln 3) = 0.75: with truth 1, −ln 0.75 = 0.287682; with
# truth 0, −ln 0.25 = 1.386294; with truth 0.5, their mean, 0.836988. A logit of 1000 with truth 0: 1000 nats.
@pytest.mark.parametrize("pixels", [(2, 1, 1, 2), (1, 2, 2, 1), (4, 1, 1, 1)])
def test_cross_entropy_by_hand(pixels):
    z = math.log(3)
    logits = torch.tensor([[0, 0, z, z], [z, 1000, -1000, 0]], dtype=torch.float64).view(2, *pixels)
    truth = torch.tensor([[0, 0.3, 1, 0], [0.5, 0, 0, 1]], dtype=torch.float64).view(2, *pixels)
    by_hand = (2 * 0.693147 + 0.287682 + 1.386294 + 0.836988 + 1000 + 0 + 0.693147) / 2
    close(metrics.cross_entropy_per_sequence(logits, truth), by_hand, 2e-6)


@pytest.mark.parametrize("channels", [1, 3])
@pytest.mark.parametrize(
    "ours, theirs",
    [
        (metrics.ssim, dict(gaussian_weights=True, sigma=1.5, use_sample_covariance=False, data_range=1)),
        (metrics.ssim_openstl, dict(data_range=2)),  # scikit-image's default: uniform 7×7, sample covariance
    ],
)
def test_ssim_is_that_of_scikit_image(ours, theirs, channels):
    structural_similarity = pytest.importorskip("skimage.metrics").structural_similarity
    prediction, truth = random_pair((2, 3, channels, 24, 17))
    expected = [
        [structural_similarity(x.numpy(), y.numpy(), channel_axis=0, **theirs) for x, y in zip(p, t, strict=True)]
        for p, t in zip(prediction, truth, strict=True)
    ]
    assert 0.1 < expected[0][0] < expected[0][2] < 0.95  # neither trivial nor the same in every frame
    close(ours(prediction, truth), torch.tensor(expected).mean(0))


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32])  # float32: in training
def test_the_gradient_of_ssim_is_that_of_scikit_image(dtype):
    """But near the border, where theirs counts windows that reach beyond the frame."""
    structural_similarity = pytest.importorskip("skimage.metrics").structural_similarity
    (prediction, *_), (truth, *_) = (frames[0, :, 0] for frames in random_pair((1, 1, 1, 40, 36)))
    options = dict(gaussian_weights=True, sigma=1.5, use_sample_covariance=False, data_range=1)
    # of the mean over all windows, by the second image
    _, theirs = structural_similarity(truth.numpy(), prediction.numpy(), gradient=True, **options)
    ours, truth = prediction.to(dtype).requires_grad_(), truth.to(dtype)
    metrics.similarity(ours, truth).sum().backward()
    inside = slice(10, -10)
    expected = torch.from_numpy(theirs)[inside, inside] * prediction.numel()
    assert expected.abs().max() > 0.1
    close(ours.grad[inside, inside].double(), expected, 1e-9 if dtype == torch.float64 else 1e-4)


def test_ssim_of_flat_windows_has_a_gradient_in_float32():
    """Where both are black, or white, as most of a frame is, nothing but rounding is left of variances."""
    for x, y, expected in (0, 0, 1), (1, 1, 1), (0, 1, 1e-4 / (1 + 1e-4)), (1, 0, 1e-4 / (1 + 1e-4)):
        flat = torch.full((2, 1, 16, 16), float(x), requires_grad=True)
        found = metrics.similarity(flat, torch.full_like(flat, y).detach())
        found.mean().backward()
        assert (found - expected).abs().max() < 2e-3
        assert flat.grad.isfinite().all() and flat.grad.abs().max() < (1e-3 if x == y else 0.05)


def test_many_sequences_are_averaged_one_by_one():
    prediction, truth = random_pair((7, 4, 1, 128, 128))  # more than are worked on at a time, with a rest
    for metric in ALL:
        one_by_one = [metric(prediction[b : b + 1], truth[b : b + 1]) for b in range(7)]
        assert one_by_one[0].sum() != one_by_one[1].sum()
        close(metric(prediction, truth), torch.stack(one_by_one).mean(0), 1e-7)


def test_layout_in_memory_does_not_matter():
    prediction, truth = random_pair()
    turned = prediction.transpose(0, 1).contiguous().transpose(0, 1)
    assert not turned.is_contiguous()
    for metric in ALL:
        close(metric(turned, truth), metric(prediction, truth))


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32])
def test_low_precision_inputs_are_taken_exactly(dtype):
    prediction, truth = random_pair(dtype=dtype)
    for metric in ALL:
        close(metric(prediction, truth), metric(prediction.double(), truth.double()), 0)
    assert metrics.ssim(prediction, truth.double()).dtype == torch.float64


def test_float64_inputs_keep_their_precision():
    truth = torch.full((1, 1, 1, 2, 2), 0.5, dtype=torch.float64)
    # 1e-9 is lost in float32: 10·log10(1 / 1e-18) = 180 dB; four pixels of 1e-18 and of 1e-9
    close(metrics.psnr(truth + 1e-9, truth), [180.0], 1e-5)
    assert metrics.mse_per_frame(truth + 1e-9, truth).item() == pytest.approx(4e-18, rel=1e-6)
    assert metrics.mae_per_frame(truth + 1e-9, truth).item() == pytest.approx(4e-9, rel=1e-6)


def test_autocast_does_not_touch_the_ruler():
    prediction, truth = random_pair(dtype=torch.float32)
    with torch.autocast("cpu", torch.bfloat16):
        a = torch.ones(2, 2)
        assert (a @ a).dtype == torch.bfloat16  # autocast is on
        inside = [metric(prediction, truth) for metric in ALL]
    for metric, value in zip(ALL, inside, strict=True):
        close(value, metric(prediction, truth), 0)


def test_no_graph_is_kept():
    prediction, truth = random_pair()
    prediction.requires_grad_()
    for metric in ALL:
        assert not metric(prediction, truth).requires_grad


def test_uint8_would_wrap_around_and_is_refused():
    a, b = (torch.full((1, 1, 1, 16, 16), v, dtype=torch.uint8) for v in (200, 220))
    assert (a - b).square().unique().tolist() == [144]  # the mistake: (−20)² is 400
    for metric in ALL:
        with pytest.raises(TypeError, match="uint8"):
            metric(a, b.float() / 255)
        with pytest.raises(TypeError, match="uint8"):
            metric(a.float() / 255, b)
    # 10·log10(255² / 400) = 10·log10(162.5625) = 22.110204
    close(metrics.psnr(a.double() / 255, b.double() / 255), [22.110204], 1e-6)


@pytest.mark.parametrize("shape", [(2, 3, 1, 24, 16), (2, 1, 1, 24, 17), (1, 3, 1, 24, 17), (2, 3, 3, 24, 17)])
def test_shapes_that_differ_are_refused(shape):
    _, truth = random_pair()
    for metric in ALL:
        with pytest.raises(ValueError, match="shapes differ"):
            metric(torch.zeros(shape), truth)


def test_other_than_five_filled_dimensions_are_refused():
    for x in (torch.zeros(3, 1, 24, 17), torch.zeros(0, 3, 1, 24, 17), torch.zeros(2, 0, 1, 24, 17)):
        for metric in ALL:
            with pytest.raises(ValueError, match="shape"):
                metric(x, x)


@pytest.mark.parametrize(
    "bad, match",
    [(1.1, "outside"), (-0.1, "outside"), (math.nan, "NaN"), (math.inf, "infin"), (-math.inf, "infin")],
)
def test_bad_values_are_refused_in_either_place(bad, match):
    fine, spoilt = random_pair(dtype=torch.float32)
    spoilt[1, 2, 0, 3, 4] = bad
    refusal = ValueError if math.isfinite(bad) else FloatingPointError
    for metric in ALL:
        with pytest.raises(refusal, match=f"truth.*{match}"):
            metric(fine, spoilt)
    for metric in PAIRS:
        with pytest.raises(refusal, match=f"prediction.*{match}"):
            metric(spoilt, fine)
    if not math.isfinite(bad):
        with pytest.raises(refusal, match=f"logits.*{match}"):
            metrics.cross_entropy_per_sequence(spoilt, fine)


def test_rounding_just_outside_the_range_is_accepted():
    prediction, truth = random_pair()
    prediction[0, 0, 0, 0, :2] = torch.tensor([-5e-7, 1 + 5e-7])
    for metric in PAIRS:
        assert metric(prediction, truth).isfinite().all()


def test_frames_smaller_than_the_window_are_refused():
    x = torch.zeros(1, 1, 1, 10, 20)
    close(metrics.ssim_openstl(x, x), [1.0])
    with pytest.raises(ValueError, match="11 × 11"):
        metrics.ssim(x, x)
    with pytest.raises(ValueError, match="7 × 7"):
        metrics.ssim_openstl(x[..., :6], x[..., :6])


def test_a_flat_grey_forecast_by_hand():
    """0.8 everywhere against black, in 2 frames of 11 × 11 = 121 pixels."""
    prediction, truth = torch.full((3, 2, 1, 11, 11), 0.8, dtype=torch.float64), torch.zeros(3, 2, 1, 11, 11)
    by_hand = {
        "mse_per_frame": [77.44] * 2,  # 121 · 0.8²
        "mae_per_frame": [96.8] * 2,  # 121 · 0.8
        "psnr": [1.938200] * 2,  # 10·log10(1 / 0.64)
        "ssim": [1.562256e-4] * 2,  # flat frames leave c1 / (0.64 + c1), c1 = 0.01²
        "ssim_openstl": [6.246096e-4] * 2,  # c1 = 0.02²
    }
    assert by_hand.keys() | {"cross_entropy_per_sequence"} == metrics.METRICS.keys()
    for name, expected in by_hand.items():
        close(getattr(metrics, name)(prediction, truth), expected, 1e-9 if "ssim" in name else 1e-6)


def test_black_and_copy_last_by_hand():
    past = torch.tensor([[[0.1, 0.2], [0.3, 0.4]], [[0.5, 0.6], [0.7, 0.8]]], dtype=torch.float64)
    past = past.view(2, 2, 2, 1, 1)  # two sequences of two frames of two channels of one pixel
    black, copy = metrics.black(past, 3), metrics.copy_last(past, 3)
    assert black.dtype == copy.dtype == past.dtype
    assert black.shape == (2, 3, 2, 1, 1) and not black.any()
    assert copy.flatten(2).tolist() == [[[0.3, 0.4]] * 3, [[0.7, 0.8]] * 3]
    copy[:, 0] = 0  # the frames are the caller's own
    assert copy[:, 1].all() and past.all()


def moving_blob(start, velocity, n_frames=8, size=(48, 64)):
    """(n_frames, 1, H, W): a smooth blob of 4 px deviation at start + t·velocity, both (row, column)."""
    rows, columns = torch.meshgrid(*(torch.arange(float(n)) for n in size), indexing="ij")
    centres = torch.tensor([start]) + torch.arange(float(n_frames))[:, None] * torch.tensor([velocity])
    distance = (rows - centres[:, :1, None]).square() + (columns - centres[:, 1:, None]).square()
    return torch.exp(-distance / (2 * 4**2))[:, None]


def centre(frames):
    """(..., H, W) → centre of mass (..., 2) as (row, column)."""
    total = frames.sum((-2, -1))
    rows, columns = (torch.arange(float(n)) for n in frames.shape[-2:])
    return torch.stack([(frames.sum(-1) * rows).sum(-1) / total, (frames.sum(-2) * columns).sum(-1) / total], -1)


def test_optical_flow_follows_each_blob():
    blobs = torch.stack([moving_blob((16.0, 18.0), (1.0, 3.0)), moving_blob((30.0, 40.0), (-1.0, -2.0))])
    past, truth = blobs[:, :3], blobs[:, 3:]
    forecast = metrics.optical_flow(past, 5)
    assert forecast.shape == truth.shape
    moved = centre(forecast) - centre(past[:, -1:])  # (2, 5, 1, 2): 1 and 3 px a frame; −1 and −2
    expected = centre(truth) - centre(past[:, -1:])
    torch.testing.assert_close(moved, expected, rtol=0.1, atol=0.2)
    errors = metrics.mse_per_frame(forecast, truth) / metrics.mse_per_frame(metrics.copy_last(past, 5), truth)
    assert errors.max() < 0.1


def test_optical_flow_beats_copying_on_a_square():
    square = torch.zeros(1, 10, 1, 64, 64)
    for t in range(10):
        square[0, t, 0, 20 + t : 32 + t, 10 + 3 * t : 22 + 3 * t] = 1  # 1 px down and 3 px right a frame
    past, truth = square[:, :5], square[:, 5:]
    forecast = metrics.mse_per_frame(metrics.optical_flow(past, 5), truth)
    copied = metrics.mse_per_frame(metrics.copy_last(past, 5), truth)
    assert copied[0].item() == 2 * (12 * 12 - 11 * 9)  # what the square leaves and what it enters
    assert (forecast < copied / 3).all()


def test_optical_flow_uses_the_last_two_frames_and_every_channel():
    blob = moving_blob((20.0, 20.0), (1.0, 3.0))
    past, truth = blob[None, :3], blob[None, 3:]
    noisy = past.clone()
    noisy[:, 0] = torch.rand(48, 64)
    assert metrics.optical_flow(noisy, 5).equal(metrics.optical_flow(past, 5))
    colours = torch.tensor([0.0, 0.5, 1.0]).view(3, 1, 1)  # nothing moves in the first channel
    forecast = metrics.optical_flow(past * colours, 5)
    torch.testing.assert_close(forecast, forecast[:, :, 2:] * colours)
    assert (metrics.mse_per_frame(forecast[:, :, 2:], truth) < 0.15 * 50).all()


def test_optical_flow_of_what_stands_still_is_the_last_frame():
    past = moving_blob((20.0, 20.0), (0.0, 0.0))[None]
    torch.testing.assert_close(metrics.optical_flow(past, 2), metrics.copy_last(past, 2), rtol=0, atol=1e-3)


def test_optical_flow_stays_in_range_and_keeps_the_type():
    past = torch.rand(2, 2, 2, 65, 65, generator=torch.Generator().manual_seed(2))
    past[:, :, 1] = 1  # white however much the first channel moves, in from the border too
    for dtype in (torch.float64, torch.bfloat16):
        forecast = metrics.optical_flow(past.to(dtype), 50)
        assert forecast.dtype == dtype and forecast.min() >= 0 and forecast.max() <= 1
        assert forecast[:, :, 1].min() > 0.99
        assert (forecast[:, 0, 0] - past[:, -1, 0]).abs().max() > 0.5


def test_optical_flow_refuses_what_it_cannot_use():
    past = moving_blob((20.0, 20.0), (1.0, 1.0))[None]
    with pytest.raises(ValueError, match="2 past frames"):
        metrics.optical_flow(past[:, :1], 5)
    with pytest.raises(ValueError, match="12 × 12"):
        metrics.optical_flow(past[..., :11], 5)
    with pytest.raises(TypeError, match="uint8"):
        metrics.optical_flow((past * 255).byte(), 5)
    with pytest.raises(ValueError, match="outside"):
        metrics.optical_flow(past * 255, 5)
