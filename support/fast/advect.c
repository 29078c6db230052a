/* advect, forward and backward, and matching_costs of motion.py, which says what the arguments are.
   n frames of c channels, H×W. Built with -DP and -DK: every patch of P×P has K×K weights or costs.
   scratch (threads, 2, H + 2R, W + 2R + LANES): a frame F in a black border, and its gradient dF */
#include <string.h>

#define R (K / 2)
#define LANES ((K + P + 14) / 16 * 16) /* the reach of a row of weights, in whole registers */

#define EACH_FRAME                                                                                  \
    const long line = W + 2 * R + LANES, size = (H + 2 * R) * line;                                 \
    _Pragma("omp parallel for num_threads(threads) schedule(static, 1)")                            \
    for (long part = 0; part < threads; part++)                                                     \
        for (long image = n * part / threads * c; image < n * (part + 1) / threads * c; image++)

/* at: where the K×K weights or costs of the patch begin */
#define EACH_PATCH                                                                                  \
    for (long y = 0, at = image / c * (H / P) * (W / P) * K * K; y < H; y += P)                     \
        for (long x = 0; x < W; x += P, at += K * K)

/* R lines above and below, R pixels to the left. Each line has `line` pixels. */
static void pad(const float *frame, long H, long W, long line, float *restrict F) {
    memset(F, 0, (H + 2 * R) * line * sizeof(float));
    for (long y = 0; y < H; y++) memcpy(F + (y + R) * line + R, frame + y * W, W * sizeof(float));
}

void advect_forward(long n, long c, long H, long W, long threads, const float *frames, const float *weights,
                    float *restrict moved, float *scratch) {
    EACH_FRAME {
        float *restrict F = scratch + part * 2 * size;
        pad(frames + image * H * W, H, W, line, F);
        EACH_PATCH {
            float sum[P][P] = {0};
            for (long b = 0; b < K; b++)
                for (long a = 0; a < K; a++)
                    for (long i = 0; i < P; i++)
#pragma omp simd
                        for (long j = 0; j < P; j++)
                            sum[i][j] += weights[at + a * K + b] * F[(y + a + i) * line + x + b + j];
            for (long i = 0; i < P; i++)
                memcpy(moved + (image * H + y + i) * W + x, sum[i], P * sizeof(float));
        }
    }
}

/* d_frames may be null */
void advect_backward(long n, long c, long H, long W, long threads, const float *frames, const float *weights,
                     const float *d_moved, float *restrict d_weights, float *restrict d_frames,
                     float *scratch) {
    EACH_FRAME {
        float *restrict F = scratch + part * 2 * size, *restrict dF = F + size;
        pad(frames + image * H * W, H, W, line, F);
        memset(dF, 0, size * sizeof(float));
        EACH_PATCH
            for (long a = 0; a < K; a++) { /* a row of weights at once */
                float sum[LANES] = {0}, row[LANES + P] = {0}, *dw = d_weights + at + a * K;
                memcpy(row + P - 1, weights + at + a * K, K * sizeof(float));
                for (long i = 0; i < P; i++) {
                    const float *d = d_moved + (image * H + y + i) * W + x;
                    long here = (y + a + i) * line + x;
                    for (long j = 0; j < P; j++)
#pragma omp simd
                        for (long b = 0; b < LANES; b++) sum[b] += d[j] * F[here + j + b];
                    if (d_frames)
#pragma omp simd
                        for (long b = 0; b < LANES; b++) {
                            float reached = 0;
                            for (long j = 0; j < P; j++) reached += d[j] * row[b + P - 1 - j];
                            dF[here + b] += reached;
                        }
                }
                for (long b = 0; b < K; b++) dw[b] = sum[b] + (image % c ? dw[b] : 0);
            }
        if (d_frames)
            for (long y = 0; y < H; y++)
                memcpy(d_frames + (image * H + y) * W, dF + (y + R) * line + R, W * sizeof(float));
    }
}

void match(long n, long c, long H, long W, long threads, const float *before, float *restrict costs,
           const float *frames, float *scratch) {
    EACH_FRAME {
        float *restrict F = scratch + part * 2 * size;
        pad(before + image * H * W, H, W, line, F);
        EACH_PATCH
            for (long a = 0; a < K; a++) { /* a row of moves at once */
                float sum[LANES] = {0}, *cost = costs + at + a * K;
                for (long i = 0; i < P; i++)
                    for (long j = 0; j < P; j++) {
                        const float *moved = F + (y + a + i) * line + x + j;
                        float pixel = frames[(image * H + y + i) * W + x + j];
#pragma omp simd
                        for (long b = 0; b < LANES; b++) sum[b] += (pixel - moved[b]) * (pixel - moved[b]);
                    }
                for (long b = 0; b < K; b++) cost[b] = sum[b] + (image % c ? cost[b] : 0);
            }
    }
}
