/* advect, forward and backward, and matching_costs of motion.py, which says what the arguments are.
   n frames of c channels, H×W. Built with -DP and -DK: every patch of P×P has K×K weights or costs. */
#include <string.h>

#define R (K / 2)
#define LANES ((K + P + 14) / 16 * 16) /* the reach of a row of weights, in whole registers */

/* A frame in a black border: R lines above and below, R pixels to the left. Each line has `line` pixels. */
static void pad(const float *frame, long H, long W, long line, float *restrict F) {
    memset(F, 0, (H + 2 * R) * line * sizeof(float));
    for (long y = 0; y < H; y++) memcpy(F + (y + R) * line + R, frame + y * W, W * sizeof(float));
}

/* scratch (threads, (W + 2R)·(H + 2R)·P): a padded frame as Q[column][row][P], the P pixels to the right.
   So the P×P pixels that one weight multiplies are one run of memory. */
void advect_forward(long n, long c, long H, long W, long threads, const float *frames, const float *weights,
                    float *restrict moved, float *scratch) {
    long rows = H + 2 * R, size = (W + 2 * R) * rows * P;
#pragma omp parallel for num_threads(threads) schedule(static, 1)
    for (long part = 0; part < threads; part++)
        for (long image = n * c * part / threads; image < n * c * (part + 1) / threads; image++) {
            float *restrict Q = scratch + part * size;
            const float *frame = frames + image * H * W, *w = weights + image / c * (H / P) * (W / P) * K * K;
            memset(Q, 0, size * sizeof(float));
            for (long column = 0; column < W + 2 * R; column++)
                for (long row = 0; row < H; row++)
                    for (long j = 0; j < P; j++) {
                        long x = column + j - R;
                        if (x >= 0 && x < W) Q[(column * rows + row + R) * P + j] = frame[row * W + x];
                    }
            for (long y = 0; y < H; y += P)
                for (long x = 0; x < W; x += P, w += K * K) {
                    float sum[P * P] = {0};
                    for (long b = 0; b < K; b++)
                        for (long a = 0; a < K; a++) {
                            const float *q = Q + ((x + b) * rows + y + a) * P, weight = w[a * K + b];
#pragma omp simd
                            for (long p = 0; p < P * P; p++) sum[p] += weight * q[p];
                        }
                    for (long i = 0; i < P; i++)
                        memcpy(moved + (image * H + y + i) * W + x, sum + i * P, P * sizeof(float));
                }
        }
}

/* scratch (threads, 2, H + 2R, W + 2R + LANES): a padded frame, and its gradient. d_frames may be null */
void advect_backward(long n, long c, long H, long W, long threads, const float *frames, const float *weights,
                     const float *d_moved, float *restrict d_weights, float *restrict d_frames,
                     float *scratch) {
    long line = W + 2 * R + LANES, size = (H + 2 * R) * line;
#pragma omp parallel for num_threads(threads) schedule(static, 1)
    for (long part = 0; part < threads; part++)
        for (long image = n * part / threads * c; image < n * (part + 1) / threads * c; image++) {
            float *restrict F = scratch + part * 2 * size, *restrict dF = F + size;
            long offset = image / c * (H / P) * (W / P) * K * K;
            const float *w = weights + offset;
            float *restrict dw = d_weights + offset;
            pad(frames + image * H * W, H, W, line, F);
            memset(dF, 0, size * sizeof(float));
            for (long y = 0; y < H; y += P)
                for (long x = 0; x < W; x += P, w += K * K, dw += K * K)
                    for (long a = 0; a < K; a++) { /* a row of weights at once */
                        float sum[LANES] = {0}, row[LANES + P] = {0};
                        memcpy(row + P - 1, w + a * K, K * sizeof(float));
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
                        for (long b = 0; b < K; b++) dw[a * K + b] = sum[b] + (image % c ? dw[a * K + b] : 0);
                    }
            if (d_frames)
                for (long y = 0; y < H; y++)
                    memcpy(d_frames + (image * H + y) * W, dF + (y + R) * line + R, W * sizeof(float));
        }
}

/* costs (n, H/P, W/P, K·K): the result. scratch (threads, H + 2R, W + 2R + LANES): a padded frame */
void match(long n, long c, long H, long W, long threads, const float *before, float *restrict costs,
           const float *frames, float *scratch) {
    long line = W + 2 * R + LANES, size = (H + 2 * R) * line;
#pragma omp parallel for num_threads(threads) schedule(static, 1)
    for (long part = 0; part < threads; part++)
        for (long image = n * part / threads * c; image < n * (part + 1) / threads * c; image++) {
            float *restrict F = scratch + part * size;
            float *restrict cost = costs + image / c * (H / P) * (W / P) * K * K;
            pad(before + image * H * W, H, W, line, F);
            for (long y = 0; y < H; y += P)
                for (long x = 0; x < W; x += P, cost += K * K)
                    for (long a = 0; a < K; a++) { /* a row of moves at once */
                        float sum[LANES] = {0};
                        for (long i = 0; i < P; i++)
                            for (long j = 0; j < P; j++) {
                                const float *moved = F + (y + a + i) * line + x + j;
                                float pixel = frames[(image * H + y + i) * W + x + j];
#pragma omp simd
                                for (long b = 0; b < LANES; b++)
                                    sum[b] += (pixel - moved[b]) * (pixel - moved[b]);
                            }
                        for (long b = 0; b < K; b++)
                            cost[a * K + b] = sum[b] + (image % c ? cost[a * K + b] : 0);
                    }
        }
}
