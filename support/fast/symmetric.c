/* Features of symmetric.py, their adjoint, and the change between channels and parities.

   A pixel has channels (4 members, Q). All pixels have features (4 parities, pixels, 9, Q). A pixel has output
   channels (G, 4 members, Q). All pixels have parities of these (4, pixels, G, Q). V channels are computed at
   once. Built with -DBF16 or without. */
#include <stdint.h>
#include <string.h>
#ifdef __AVX512BF16__
#include <immintrin.h>
#endif

enum { V = 8 };
#define VECTOR(type, size) __attribute__((vector_size(V * size), aligned(size), may_alias)) type
typedef VECTOR(float, 4) vector;
#ifdef BF16 /* the upper half of a float32, rounded to nearest even */
typedef uint16_t real;
typedef VECTOR(uint32_t, 4) words;
typedef VECTOR(uint16_t, 2) halves;
static inline vector load(const real *p) {
    return (vector)(__builtin_convertvector(*(const halves *)p, words) << 16);
}
static inline void store(real *p, vector x) {
#ifdef __AVX512BF16__
    *(halves *)p = (halves)_mm256_cvtneps_pbh((__m256)x);
#else
    words bits = (words)x, nan = (words)(x != x);
    bits = (bits + 0x7fff + ((bits >> 16) & 1)) >> 16;
    *(halves *)p = __builtin_convertvector((bits & ~nan) | (nan & 0x7fc0), halves);
#endif
}
#else
typedef float real;
static inline vector load(const real *p) { return *(const vector *)p; }
static inline void store(real *p, vector x) { *(vector *)p = x; }
#endif

#define R 0.70710678f /* √½ */
#define PARITY(a, k) ((a == 2) << 1 | (k == 2)) /* of a feature; the third combination of taps is odd */

/* The four members of an orbit ↔ their parities: sums and differences, its own inverse */
static inline void butterfly(vector u[4]) {
    vector a = u[0] + u[1], b = u[0] - u[1], c = u[2] + u[3], d = u[2] - u[3];
    u[0] = .5f * (a + c), u[1] = .5f * (b + d), u[2] = .5f * (a - c), u[3] = .5f * (b - d);
}

/* Calls `one` for each image n; scratch: room for the parities of an image in a border of D pixels, for each
   thread. IMAGE: pixels in a row of it, numbers in one of its parities. */
#define EACH_IMAGE                                                                                  \
    const long P = N * H * W, WIDE = W + 2 * D, SIZE = (H + 2 * D) * WIDE * Q;                      \
    _Pragma("omp parallel for num_threads(threads) schedule(static, 1)")                            \
    for (long part = 0; part < threads; part++)                                                     \
        for (long n = N * part / threads; n < N * (part + 1) / threads; n++)

#define EACH_PIXEL                                                                                  \
    for (long y = 0; y < H; y++)                                                                    \
        for (long x = 0, p = (n * H + y) * W; x < W; x++, p++)

/* images (N, H, W, 4·Q) → out (4, N·H·W, 9, Q); at (4, Q / V): where in a pixel the channels begin.
   scratch (threads, 4, H + 2D, W + 2D, Q): zeros. One parity after the other: it stays in the first cache. */
void features(long N, long H, long W, long Q, long D, long threads, const real *images, const int *at,
              float *scratch, real *out) {
    EACH_IMAGE {
        float *u = scratch + part * 4 * SIZE;
        EACH_PIXEL for (long q = 0; q < Q; q += V) {
            vector parities[4];
            for (int m = 0; m < 4; m++) parities[m] = load(images + p * 4 * Q + at[(m * Q + q) / V]);
            butterfly(parities);
            for (int b = 0; b < 4; b++)
                *(vector *)(u + b * SIZE + ((y + D) * WIDE + x + D) * Q + q) = parities[b];
        }
        for (int b = 0; b < 4; b++) EACH_PIXEL for (long q = 0; q < Q; q += V) {
            vector g[3][3];
            for (int i = 0; i < 3; i++) {
                const float *l = u + b * SIZE + ((y + i * D) * WIDE + x) * Q + q, *r = l + 2 * D * Q;
                g[i][0] = *(const vector *)(l + D * Q);
                g[i][1] = R * (*(const vector *)l + *(const vector *)r);
                g[i][2] = R * (*(const vector *)r - *(const vector *)l);
            }
            for (int k = 0; k < 3; k++) {
                vector f[3] = {g[1][k], R * (g[0][k] + g[2][k]), R * (g[2][k] - g[0][k])};
                for (int a = 0; a < 3; a++)
                    store(out + (((b ^ PARITY(a, k)) * P + p) * 9 + 3 * a + k) * Q + q, f[a]);
            }
        }
    }
}

/* The gradient: d_out (4, N·H·W, 9, Q) → d_images (N, H, W, 4·Q) */
void features_backward(long N, long H, long W, long Q, long D, long threads, const real *d_out, const int *at,
                       float *scratch, real *d_images) {
    EACH_IMAGE {
        float *u = scratch + part * 4 * SIZE;
        memset(u, 0, 4 * SIZE * sizeof *u);
        for (int b = 0; b < 4; b++) EACH_PIXEL for (long q = 0; q < Q; q += V) {
            vector g[3][3];
            for (int k = 0; k < 3; k++) {
                vector f[3];
                for (int a = 0; a < 3; a++)
                    f[a] = load(d_out + (((b ^ PARITY(a, k)) * P + p) * 9 + 3 * a + k) * Q + q);
                g[0][k] = R * (f[1] - f[2]), g[1][k] = f[0], g[2][k] = R * (f[1] + f[2]);
            }
            for (int i = 0; i < 3; i++) {
                float *l = u + b * SIZE + ((y + i * D) * WIDE + x) * Q + q;
                *(vector *)l += R * (g[i][1] - g[i][2]);
                *(vector *)(l + D * Q) += g[i][0];
                *(vector *)(l + 2 * D * Q) += R * (g[i][1] + g[i][2]);
            }
        }
        EACH_PIXEL for (long q = 0; q < Q; q += V) {
            vector members[4];
            for (int b = 0; b < 4; b++)
                members[b] = *(vector *)(u + b * SIZE + ((y + D) * WIDE + x + D) * Q + q);
            butterfly(members);
            for (int m = 0; m < 4; m++) store(d_images + p * 4 * Q + at[(m * Q + q) / V], members[m]);
        }
    }
}

/* parities (4, n, G, Q) → z (n, G, 4 members, Q), plus the bias; or, without a bias, z → parities */
void exchange(long n, long G, long Q, long threads, const float *bias, real *parities, real *z) {
#pragma omp parallel for num_threads(threads)
    for (long p = 0; p < n; p++)
        for (long g = 0; g < G; g++)
            for (long q = 0; q < Q; q += V) {
                real *parity = parities + (p * G + g) * Q + q, *member = z + (p * G + g) * 4 * Q + q;
                vector u[4];
                for (int a = 0; a < 4; a++) u[a] = load(bias ? parity + a * n * G * Q : member + a * Q);
                butterfly(u);
                for (int a = 0; a < 4; a++)
                    if (bias)
                        store(member + a * Q, u[a] + *(const vector *)(bias + (g * 4 + a) * Q + q));
                    else
                        store(parity + a * n * G * Q, u[a]);
            }
}
