/* The gradient of a convolution's weight in bf16, where the CPU has AMX: the compiled twin of plain_weight_gradient in
   fast_convlstm.py, in about three quarters of the time that oneDNN takes.

   AMX multiplies tiles: c (16, 16) += a (16, 32) · b (32, 16), with c in float32. Here a is 16 output channels of dy by
   32 pixels, b the same pixels of x, moved by a tap of the kernel, by 16 input channels, and c their part of that tap's
   gradient. The hardware wants pixels in pairs, side by side in memory: a as [channel][pair], b as [pair][channel].
   To lie so, x is copied once for each column of the kernel, with zeros where that reaches beyond the image; the rows
   of the kernel then read the same copy, so many rows further down. (Zeros around x and after dy are multiplied, too: an
   infinite pixel makes a NaN of more taps than it has to.)

   B images of H by W pixels, W even; K input and N output channels, multiples of 32; k kernel size. So that copies stay
   in the cache, an image is done in bands of `rows` rows, a band in `steps` steps of 32 pixels. A copy of x has `pairs`
   pairs: those of a band, and of the rows that the kernel reaches above and below it. */
#include <immintrin.h>
#include <stdint.h>
#include <sys/syscall.h>
#include <unistd.h>

#define PIXELS 32 /* of a tile */
typedef uint16_t bf16;
typedef uint32_t vector __attribute__((vector_size(64)));
static const bf16 zeros[32];

/* Linux lends AMX's registers on request only; 0: granted */
long request(void) { return syscall(SYS_arch_prctl, 0x1023 /* ARCH_REQ_XCOMP_PERM */, 18 /* tile data */); }

static uint32_t pair(bf16 first, bf16 second) { return first | (uint32_t)second << 16; }

/* 16 rows of 16, transposed: the two blocks of 8 off the diagonal change places; then, in each block, those of 4, 2, 1 */
static inline __attribute__((always_inline)) void transpose(vector *rows) {
#pragma GCC unroll 4
    for (unsigned s = 8; s; s /= 2) {
        vector upper, lower; /* where what the two rows come to hold is found in both, one after the other */
        for (unsigned j = 0; j < 16; j++) upper[j] = j & s ? 16 + j - s : j, lower[j] = j & s ? 16 + j : j + s;
#pragma GCC unroll 16
        for (unsigned i = 0; i < 16; i++)
            if (!(i & s)) {
                vector one = rows[i], other = rows[i + s];
                rows[i] = __builtin_shuffle(one, other, upper);
                rows[i + s] = __builtin_shuffle(one, other, lower);
            }
    }
}

/* Some channels of dy (pixels, N) as [32 channels][step][16 channels][channel][pair], with zeros after the last pixel */
static void lay_out_dy(long pixels, long N, long channels, long steps, const bf16 *dy, uint32_t *a) {
    for (long step = 0; step < steps; step++)
        for (long n = 0; n < channels; n += 16) {
            vector m[16], *to = (vector *)(a + ((n / 32 * steps + step) * 2 + n / 16 % 2) * 256);
#pragma GCC unroll 16
            for (long q = 0; q < 16; q++) {
                const long p = step * PIXELS + 2 * q;
                const bf16 *first = p < pixels ? dy + p * N + n : zeros, *second = p < pixels ? first + N : zeros;
                for (long j = 0; j < 16; j++) m[q][j] = pair(first[j], second[j]);
            }
            transpose(m);
            for (long i = 0; i < 16; i++) to[i] = m[i];
        }
}

/* x (H, W, K) from row y on as [column of the kernel][32 channels][pair][channel] */
static void lay_out_x(long H, long W, long K, long k, long dilation, long y, long pairs, const bf16 *x, uint32_t *b) {
    for (long kx = 0; kx < k; kx++)
        for (long c = 0; c < K; c += 32)
            for (long q = 0; q < pairs; q++, b += 32) {
                long row = y + 2 * q / W, column = 2 * q % W + (kx - k / 2) * dilation, at = (row * W + column) * K + c;
                const bf16 *first = row >= 0 && row < H && column >= 0 && column < W ? x + at : zeros;
                const bf16 *second = row >= 0 && row < H && column >= -1 && column < W - 1 ? x + at + K : zeros;
                for (long j = 0; j < 32; j++) b[j] = pair(first[j], second[j]);
            }
}

/* Increases gradient (N, k, k, K). Each thread has a part of the output channels, and `words` words of memory. */
void weight_gradient(long B, long H, long W, long K, long N, long k, long dilation, long rows, long steps, long pairs,
                     long threads, long words, const bf16 *x, const bf16 *dy, float *gradient, uint32_t *memory) {
    struct {
        uint8_t palette, start, zero[14];
        uint16_t bytes[16]; /* of a row of each tile */
        uint8_t rows[16];
    } shape = {1, 0, {0}, {64, 64, 64, 64, 64, 64, 64, 64}, {16, 16, 16, 16, 16, 16, 16, 16}};
    const long bands = (H + rows - 1) / rows, down = 4 * k * k * K; /* bytes */
#pragma omp parallel for num_threads(threads) schedule(static, 1)
    for (long part = 0; part < threads; part++) {
        const long from = N / 32 * part / threads * 32, to = N / 32 * (part + 1) / threads * 32;
        uint32_t *b = memory + part * words, *a = b + k * K * pairs;
        _tile_loadconfig(&shape);
        for (long band = 0; band < B * bands; band++) {
            const long image = band / bands, y = band % bands * rows, pixels = (y + rows < H ? rows : H - y) * W;
            lay_out_x(H, W, K, k, dilation, y - dilation * (k / 2), pairs, x + image * H * W * K, b);
            lay_out_dy(pixels, N, to - from, steps, dy + (image * H + y) * W * N + from, a);
            __asm__ volatile("" ::: "memory"); /* gcc does not know that tiles are loaded from there */
            for (long n = from; n < to; n += 32) {
                for (long c = 0; c < K; c += 32)
                    for (long kx = 0; kx < k; kx++)
                        for (long ky = 0; ky < k; ky++) {
                            const uint32_t *as = a + (n - from) / 32 * steps * 512;
                            const uint32_t *bs = b + (kx * K + c) * pairs + ky * dilation * W * 16;
                            float *g = gradient + ((n * k + ky) * k + kx) * K + c, *h = g + 16 * k * k * K;
                            _tile_loadd(0, g, down);
                            _tile_loadd(1, g + 16, down);
                            _tile_loadd(2, h, down);
                            _tile_loadd(3, h + 16, down);
                            for (long step = 0; step < steps; step++, as += 512, bs += 512) {
                                _tile_loadd(4, as, 64);
                                _tile_loadd(5, as + 256, 64);
                                _tile_loadd(6, bs, 128);
                                _tile_loadd(7, bs + 16, 128);
                                _tile_dpbf16ps(0, 4, 6);
                                _tile_dpbf16ps(1, 4, 7);
                                _tile_dpbf16ps(2, 5, 6);
                                _tile_dpbf16ps(3, 5, 7);
                            }
                            _tile_stored(0, g, down);
                            _tile_stored(1, g + 16, down);
                            _tile_stored(2, h, down);
                            _tile_stored(3, h + 16, down);
                        }
            }
        }
        _tile_release();
    }
}
