"""Decaying two-dimensional turbulence, a data set of fields: writes turbulence.npy.

python records/own_data/turbulence.py

400 sequences of 20 frames of 64×64, float32: the vorticity of a periodic box with sides of 2π, in 1/s. The
Navier–Stokes equations are solved by a pseudo-spectral method, with 2/3 dealiasing and Runge-Kutta steps of
fourth order. The flow has a typical speed of 1, and the viscosity below: a Reynolds number of about 300.
"""

import numpy as np

N_SEQUENCES, N_FRAMES, SIZE = 400, 20, 64
VISCOSITY = 3e-3
STEP, STEPS_PER_FRAME = 0.02, 3  # seconds
WARMUP = 100  # steps from random waves to a flow of vortices

ky, kx = np.meshgrid(np.fft.fftfreq(SIZE, 1 / SIZE), np.fft.rfftfreq(SIZE, 1 / SIZE), indexing="ij")
k_squared = kx**2 + ky**2
inverse = 1 / np.where(k_squared == 0, 1, k_squared)
kept = (abs(kx) < SIZE / 3) & (abs(ky) < SIZE / 3)


def tendency(vorticity):
    """d/dt of the Fourier coefficients of the vorticity: advection and diffusion."""
    stream = vorticity * inverse
    parts = 1j * ky * stream, -1j * kx * stream, 1j * kx * vorticity, 1j * ky * vorticity
    u, v, along_x, along_y = np.fft.irfft2(np.stack(parts))
    advection = u * along_x + v * along_y
    return -np.fft.rfft2(advection) * kept - VISCOSITY * k_squared * vorticity


def advance(vorticity):
    """One Runge-Kutta step."""
    a = tendency(vorticity)
    b = tendency(vorticity + STEP / 2 * a)
    c = tendency(vorticity + STEP / 2 * b)
    d = tendency(vorticity + STEP * c)
    return vorticity + STEP / 6 * (a + 2 * b + 2 * c + d)


def sequences(n, seed):
    """(n, N_FRAMES, SIZE, SIZE), float32."""
    rng = np.random.default_rng(seed)
    noise = np.fft.rfft2(rng.standard_normal((n, SIZE, SIZE)))
    vorticity = noise * k_squared * np.exp(-k_squared / 18) * kept  # waves about 3 to 5 to a side
    speed = np.sqrt((abs(np.fft.irfft2(1j * np.stack((ky, -kx))[:, None] * vorticity * inverse)) ** 2).sum(0))
    vorticity /= speed.mean((1, 2))[:, None, None]
    frames = []
    for step in range(WARMUP + N_FRAMES * STEPS_PER_FRAME):
        if step >= WARMUP and (step - WARMUP) % STEPS_PER_FRAME == 0:
            frames.append(np.fft.irfft2(vorticity))
        vorticity = advance(vorticity)
    return np.stack(frames, 1).astype(np.float32)


if __name__ == "__main__":
    parts = [sequences(40, seed) for seed in range(N_SEQUENCES // 40)]
    np.save("turbulence.npy", np.concatenate(parts))
