"""What training never showed: three digits, more frames, a larger canvas, with the baselines beside.

The sequences are generated from the digits of raw/digits_test.png, by the law of the training data.
"""

import download
import figures
from evaluate import BASELINES, curve, cut
from machine import RANK, WORLD, say
from moving_mnist import Sequences, generate


def beyond(folder, name, forecast, frames_in, frames_out, device, patch=1, n_sequences=100):
    """Case → the named forecast and each baseline → MSE per frame; beyond.png, and a picture of each case."""
    try:
        digits, results = download.digit_sheet(download.RAW / "digits_test.png"), {}
    except download.DownloadError as error:  # no reason to lose the scores of the test split
        say(f"beyond    not possible: {error}")
        return {}
    large = max(96, 64 + patch)  # which can be cut into patches where 64 can
    double, triple = f"{2 * frames_out} frames", f"{3 * frames_out} frames"
    cases = {
        triple: {"n_frames": frames_in + 3 * frames_out},
        "three digits": {"n_digits": 3},
        # on the larger canvas a digit moves as many pixels a frame as on 64×64
        f"{large}×{large} pixels": {"size": large, "step": 0.1 * (64 - 28) / (large - 28)},
    }
    for case, changes in cases.items():
        law = {"n_frames": frames_in + frames_out, **changes}
        dataset, n = Sequences(generate(digits, n_sequences, seed=0, **law).swapaxes(0, 1)), law["n_frames"] - frames_in
        forecasts = {name: forecast, **BASELINES}
        try:
            curves = {who: curve(f, dataset, frames_in, n, device) for who, f in forecasts.items()}
        except (RuntimeError, ValueError, ArithmeticError) as error:  # an edited network, or too little memory
            if WORLD > 1:
                raise  # or the others, which wait to add up this case, would add this process's next one
            why = str(error).partition("\n")[0]
            say(f"beyond    {case}: not possible ({why})")
            continue
        lengths = {"as in training": frames_out, double: 2 * frames_out} if case == triple else {}
        for part, frames in {**lengths, case: n}.items():  # the first frames of the long forecasts are the short ones
            results[part] = {who: values[:frames] for who, values in curves.items()}
            if RANK == 0 and part != "as in training":
                draw(folder, name, part, forecast, dataset, frames_in, frames, device)
    if RANK == 0 and results:
        figures.per_frame(folder / "beyond.png", {case: results[case] for case in cases if case in results})
    return results


def draw(folder, name, case, forecast, dataset, frames_in, n, device):
    """beyond_<case>.png of the first sequence: as good or bad as it happens to be."""
    past, truth = cut(dataset[:1], frames_in, n)
    rows = {"input": (1, past[0]), "truth": (frames_in + 1, truth[0])}
    for who, function in {"forecast": forecast, **BASELINES}.items():
        if who != "black":
            rows[figures.LABELS.get(who, who)] = frames_in + 1, function(past.to(device), n)[0][0].cpu()
    file = f"beyond_{case.replace(' ', '_').replace('×', 'x')}.png"
    figures.grid(folder / file, rows, f"{name}: {case}, never trained on, generated from MNIST's test digits")


def table(results):
    """As lines for people."""
    names = list(next(iter(results.values()), ()))
    lines = ["beyond training: MSE per frame, generated sequences of test digits"]
    lines.append(" " * 18 + "".join(f"{figures.LABELS.get(name, name):>20}" for name in names))
    for case, curves in results.items():
        cells = (sum(curves[name]) / len(curves[name]) for name in names)
        lines.append(f"{case:18}" + "".join(f"{cell:>20.1f}" for cell in cells))
    return "\n".join(lines)
