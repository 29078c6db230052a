"""The metrics against scikit-image and numbers worked out by hand; the baselines against known motion."""

import math

import pytest
import torch

import metrics

PAIRS = [metrics.mse_per_frame, metrics.mae_per_frame, metrics.psnr, metrics.ssim, metrics.ssim_openstl]
ALL = [*PAIRS, metrics.cross_entropy_per_sequence]


def random_pair(shape=(2, 3, 1, 24, 17), dtype=torch.float64):
    """A truth with black, white and smooth parts, and a noisy prediction that is better in later frames."""
    g = torch.Generator().manual_seed(0)
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
@pytest.mark.parametrize("pixels", [(1, 1, 2), (1, 2, 1), (2, 1, 1)])
def test_errors_by_hand(pixels):
    prediction = torch.tensor([[[0.5, 1.0], [0.25, 0.0]], [[0.0, 0.5], [1.0, 0.5]]]).view(2, 2, *pixels)
    truth = torch.tensor([[[0.0, 0.75], [0.25, 1.0]], [[0.25, 0.5], [0.5, 0.0]]]).view(2, 2, *pixels)
    close(metrics.mse_per_frame(prediction, truth), [[0.3125, 1], [0.0625, 0.5]])
    close(metrics.mae_per_frame(prediction, truth), [[0.75, 1], [0.25, 1]])
    close(metrics.psnr(prediction, truth), [[8.061800, 3.010300], [15.051500, 6.020600]], 1e-6)
    assert metrics.psnr(truth, truth).unique().tolist() == [math.inf]


# −ln σ(0) = ln 2 = 0.693147, whatever the truth. σ(ln 3) = 0.75: with truth 1, −ln 0.75 = 0.287682; with
# truth 0, −ln 0.25 = 1.386294; with truth 0.5, their mean, 0.836988. A logit of 1000 with truth 0: 1000 nats.
@pytest.mark.parametrize("pixels", [(2, 1, 1, 2), (1, 2, 2, 1), (4, 1, 1, 1)])
def test_cross_entropy_by_hand(pixels):
    z = math.log(3)
    logits = torch.tensor([[0, 0, z, z], [z, 1000, -1000, 0]], dtype=torch.float64).view(2, *pixels)
    truth = torch.tensor([[0, 0.3, 1, 0], [0.5, 0, 0, 1]], dtype=torch.float64).view(2, *pixels)
    by_hand = [[2 * 0.693147 + 0.287682 + 1.386294], [0.836988 + 1000 + 0 + 0.693147]]
    close(metrics.cross_entropy_per_sequence(logits, truth), by_hand, 2e-6)


GAUSSIAN = {"gaussian_weights": True, "sigma": 1.5, "use_sample_covariance": False, "data_range": 1}
UNIFORM = {"data_range": 2}  # scikit-image's default: uniform 7×7, sample covariance


@pytest.mark.parametrize("channels", [1, 3])
@pytest.mark.parametrize("ours, theirs", [(metrics.ssim, GAUSSIAN), (metrics.ssim_openstl, UNIFORM)])
def test_ssim_is_that_of_scikit_image(ours, theirs, channels):
    structural_similarity = pytest.importorskip("skimage.metrics").structural_similarity
    prediction, truth = random_pair((2, 3, channels, 24, 17))
    expected = [
        [structural_similarity(x, y, channel_axis=0, **theirs) for x, y in zip(*sequences, strict=True)]
        for sequences in zip(prediction.numpy(), truth.numpy(), strict=True)
    ]
    assert 0.1 < expected[0][0] < expected[0][2] < 0.95  # neither trivial nor the same in every frame
    close(ours(prediction, truth), expected)


def test_ssim_of_flat_windows_has_a_gradient_in_float32():
    """Most of a frame is black. There, only rounding is left of the variances."""
    metrics.sliding.cache_clear()
    with torch.inference_mode():  # what is kept from it serves training, too
        metrics.similarity(*torch.zeros(2, 1, 16, 16))
    for x, y, expected in (0, 0, 1), (1, 1, 1), (0, 1, 1e-4 / (1 + 1e-4)), (1, 0, 1e-4 / (1 + 1e-4)):
        flat = torch.full((2, 1, 16, 16), float(x), requires_grad=True)
        found = metrics.similarity(flat, torch.full_like(flat, y).detach())
        found.mean().backward()
        assert (found - expected).abs().max() < 2e-3 and flat.grad.abs().max() < (1e-3 if x == y else 0.05)


def test_many_sequences_are_scored_one_by_one():
    """More than are worked on at a time, with a rest. In float64 without a graph, also in autocast."""
    prediction, truth = random_pair((7, 4, 1, 128, 128), torch.bfloat16)
    for metric in ALL:
        pairs = zip(prediction.double().split(1), truth.double().split(1), strict=True)
        one_by_one = torch.cat([metric(*pair) for pair in pairs])
        with torch.autocast("cpu", torch.bfloat16):
            found = metric(prediction.requires_grad_(), truth)
        close(found, one_by_one, 1e-7)
        assert not found.requires_grad


def test_uint8_would_wrap_around_and_is_refused():
    a, b = (torch.full((1, 1, 1, 16, 16), v, dtype=torch.uint8) for v in (200, 220))
    assert (a - b).square().unique().tolist() == [144]  # the mistake: (−20)² is 400
    for metric in ALL:
        for pair in (a, b.float() / 255), (a.float() / 255, b):
            with pytest.raises(TypeError, match="uint8"):
                metric(*pair)


def test_shapes_that_are_wrong_or_differ_are_refused():
    truth = torch.zeros(2, 3, 1, 24, 17)
    others = truth[..., :16], truth[:, :1], truth[:1], truth.repeat(1, 1, 3, 1, 1)
    pairs = [(x, truth) for x in others] + [(x, x) for x in (truth[0], truth[:0], truth[:, :0])]
    for prediction, truth in pairs:
        for metric in ALL:
            with pytest.raises(ValueError, match="shape"):
                metric(prediction, truth)


@pytest.mark.parametrize("bad", [1.1, -0.1, math.nan, math.inf])
def test_bad_values_are_refused(bad):
    fine, spoilt = random_pair(dtype=torch.float32)
    spoilt[1, 2, 0, 3, 4] = bad
    refusal = ValueError if math.isfinite(bad) else FloatingPointError
    for metric in ALL if math.isinf(bad) else ():  # there, NaN is a missing pixel
        with pytest.raises(refusal, match="truth"):
            metric(fine, spoilt)
    for metric in PAIRS if math.isfinite(bad) else ALL:  # logits may be of any finite size
        with pytest.raises(refusal, match=r"prediction|logits"):
            metric(spoilt, fine)
    spoilt[1, 2, 0, 3, 4] = 1 + 5e-7  # rounding
    assert all(metric(spoilt, fine).isfinite().all() for metric in ALL)


def test_a_truth_beyond_the_scale_is_not_clipped():
    """Errors of 0.5 and 1.5: squares of 0.25 and 2.25. The cross-entropy clips: ln 2 twice."""
    prediction = torch.tensor([1.0, 1.0]).view(1, 1, 1, 1, 2)
    truth = torch.tensor([1.5, -0.5]).view(1, 1, 1, 1, 2)
    close(metrics.mse_per_frame(prediction, truth), [[2.5]])
    close(metrics.mae_per_frame(prediction, truth), [[2.0]])
    close(metrics.psnr(prediction, truth), [[-0.969100]], 1e-6)  # 10·log10(2 / 2.5)
    close(metrics.mean_squares(prediction, truth), [[1.25]])
    close(metrics.cross_entropy_per_sequence(0 * prediction, truth), [[2 * 0.693147]], 2e-6)


def test_missing_pixels_do_not_count():
    """Where the truth is missing, the forecast does not matter. The rest is scored as if alone."""
    x, y = random_pair((2, 3, 2, 30, 28))
    y[:, :, :, :12] = math.nan
    y[0, 1] = math.nan  # a whole frame
    other = torch.where(y.isnan(), 1 - x, x)
    cropped = x[:, :, :, 12:], y[:, :, :, 12:]
    for metric in ALL:
        found = metric(x, y)
        torch.testing.assert_close(found, metric(other, y), equal_nan=True)
        expected = metric(*(part[1:] for part in cropped))
        torch.testing.assert_close(found[1:], expected)
    assert metrics.mean_squares(x, y)[1].tolist() == pytest.approx(
        (cropped[0][1] - cropped[1][1]).square().mean((0, 2, 3)).tolist()
    )


def moving_blob(start, velocity, n_frames=8, size=(48, 64)):
    """(n_frames, 1, H, W): a smooth blob of 4 px deviation at start + t·velocity, both (row, column)."""
    rows, columns = torch.meshgrid(*(torch.arange(float(n)) for n in size), indexing="ij")
    centers = torch.tensor([start]) + torch.arange(float(n_frames))[:, None] * torch.tensor([velocity])
    distance = (rows - centers[:, :1, None]).square() + (columns - centers[:, 1:, None]).square()
    return torch.exp(-distance / (2 * 4**2))[:, None]


def test_optical_flow_follows_each_blob():
    blobs = torch.stack([moving_blob((16.0, 18.0), (1.0, 3.0)), moving_blob((30.0, 40.0), (-1.0, -2.0))])
    past, truth = blobs[:, :3], blobs[:, 3:]
    forecast = metrics.optical_flow(past, 5)
    error = lambda forecast: metrics.mse_per_frame(forecast, truth).mean(0)
    assert (error(forecast) / error(metrics.copy_last(past, 5))).max() < 0.02

    metrics.mse_per_frame(metrics.optical_flow(1.5 * past - 0.1, 5), truth)  # may leave [0, 1], as own data
    assert metrics.optical_flow(1.5 * past, 5).max() > 1.3

    noisy = past.clone()
    noisy[:, 0] = torch.rand(48, 64)
    assert metrics.optical_flow(noisy, 5).equal(forecast)  # the last two frames count
    colors = torch.tensor([0.0, 1.0]).view(2, 1, 1)  # nothing moves in the first channel
    colored = metrics.optical_flow(past * colors, 5)
    assert not colored[:, :, 0].any() and (metrics.mse_per_frame(colored[:, :, 1:], truth) < 0.15 * 50).all()
