/* Winograd's convolution of channels-last images (Lavin & Gray, arxiv.org/abs/1509.09308), over pixels.
   winograd.py has the idea and the maps. It sets the sizes (-DKERNEL, -DTILE, …).

   K channels in, N out; memory is scratch space. The points of kernels lie as (N / WIDTH, POINTS, K, WIDTH).
   Those of a BLOCK of tiles lie as (POINTS, BLOCK, channels), with a GAP after each point. */
enum { SIDE = TILE + KERNEL - 1, POINTS = SIDE * SIDE };
#ifdef __AVX512F__
enum { LANES = 16, ROWS = 8 };
#else
enum { LANES = 8, ROWS = 6 }; /* with 4 rows, gcc loads b again for each */
#endif

typedef float vector __attribute__((vector_size(4 * LANES), aligned(4), may_alias));
#define INLINE static inline __attribute__((always_inline))

/* Tiles that cover so many pixels. With a dilation of D, a tile has every D-th pixel. */
#define TILES(size, D) (((size) + TILE * D - 1) / (TILE * D))

/* The offset of each pixel of a tile, from `margin` pixels above and to the left; -1: outside the image. */
INLINE void pixels(long H, long W, long D, long tile, long side, long margin, long channels,
                   long at[SIDE][SIDE]) {
    long down = TILES(H, D), across = TILES(W, D), part = tile / (down * across), image = part / (D * D);
    long top = tile / across % down * TILE - margin, left = tile % across * TILE - margin;
    for (long i = 0; i < side; i++)
        for (long j = 0; j < side; j++) {
            long y = (top + i) * D + part / D % D, x = (left + j) * D + part % D;
            int inside = y >= 0 && y < H && x >= 0 && x < W;
            at[i][j] = inside ? ((image * H + y) * W + x) * channels : -1;
        }
}

/* y (n, m): the transpose of map (m, k) · x (k, n) */
INLINE void one_side(int m, int k, int n, const float *map, vector x[SIDE][SIDE], vector y[SIDE][SIDE]) {
    for (int j = 0; j < n; j++)
#pragma GCC unroll 8
        for (int i = 0; i < m; i++) {
            vector sum = map[i * k] * x[0][j];
#pragma GCC unroll 8
            for (int l = 1; l < k; l++) sum += map[i * k + l] * x[l][j];
            y[j][i] = sum;
        }
}

/* Transform `channels` channels of a tile to points, which are `stride` apart: map · tile · map'. */
INLINE void to_points(int side, const float *map, const long at[SIDE][SIDE], long channels,
                      const float *image, float *points, long stride) {
    for (long c = 0; c < channels; c += LANES) {
        vector x[SIDE][SIDE], half[SIDE][SIDE], y[SIDE][SIDE];
        for (int i = 0; i < side; i++)
            for (int j = 0; j < side; j++)
                x[i][j] = at[i][j] < 0 ? (vector){0} : *(const vector *)(image + at[i][j] + c);
        one_side(SIDE, side, side, map, x, half);
        one_side(SIDE, side, SIDE, map, half, y);
        for (int p = 0; p < POINTS; p++) *(vector *)(points + p * stride + c) = y[p / SIDE][p % SIDE];
    }
}

/* Transform WIDTH channels of points back to a tile. */
INLINE void from_points(const float *map, const long at[SIDE][SIDE], const float *points, long stride,
                        const float *bias, float *image, long add) {
    for (long c = 0; c < WIDTH; c += LANES) {
        vector x[SIDE][SIDE], half[SIDE][SIDE], y[SIDE][SIDE];
        for (int p = 0; p < POINTS; p++) x[p / SIDE][p % SIDE] = *(const vector *)(points + p * stride + c);
        one_side(TILE, SIDE, SIDE, map, x, half);
        one_side(TILE, SIDE, TILE, map, half, y);
        for (int i = 0; i < TILE; i++)
            for (int j = 0; j < TILE; j++)
                if (at[i][j] >= 0) {
                    float *here = image + at[i][j] + c;
                    *(vector *)here = y[i][j] + *(const vector *)(add ? here : bias + c);
                }
    }
}

/* y (m, 2 · LANES) = a (m, n) · b (n, 2 · LANES), or adds it. Element (i, k) of a is a[i * down + k * across];
   rows of b and y are WIDTH apart. */
INLINE void multiply_rows(int m, long n, const float *a, long down, long across, const float *b, float *y,
                          int add) {
    vector sum[ROWS][2];
    for (int i = 0; i < m; i++)
        for (int j = 0; j < 2; j++) sum[i][j] = add ? *(vector *)(y + i * WIDTH + j * LANES) : (vector){0};
    for (long k = 0; k < n; k++)
        for (int i = 0; i < m; i++)
            for (int j = 0; j < 2; j++)
                sum[i][j] += a[i * down + k * across] * *(vector *)(b + k * WIDTH + j * LANES);
    for (int i = 0; i < m; i++)
        for (int j = 0; j < 2; j++) *(vector *)(y + i * WIDTH + j * LANES) = sum[i][j];
}

/* The same with m rows, of which an odd number counts as the next even one, and WIDTH columns. */
INLINE void multiply(long m, long n, const float *a, long down, long across, const float *b, float *y,
                     int add) {
    for (long c = 0, row; c < WIDTH; c += 2 * LANES) {
        for (row = 0; row + ROWS <= m; row += ROWS)
            multiply_rows(ROWS, n, a + row * down, down, across, b + c, y + row * WIDTH + c, add);
        for (; row < m; row += 2)
            multiply_rows(2, n, a + row * down, down, across, b + c, y + row * WIDTH + c, add);
    }
}

/* y (B, H, W, N): the convolution of x (B, H, W, K), plus the bias or, with add, plus what y holds.
   memory: POINTS · (BLOCK · (K + WIDTH) + 2 · GAP) for each thread */
void convolve(long B, long H, long W, long K, long D, long N, long threads, long add, const float *map_in,
              const float *map_out, const float *x, const float *kernel, const float *bias, float *y,
              float *memory) {
    const long all = B * D * D * TILES(H, D) * TILES(W, D);
    const long stride_in = BLOCK * K + GAP, stride_out = BLOCK * WIDTH + GAP;
#pragma omp parallel for num_threads(threads) schedule(static, 1)
    for (long part = 0; part < threads; part++) {
        float *in = memory + part * POINTS * (stride_in + stride_out), *out = in + POINTS * stride_in;
        long end = all * (part + 1) / threads, at[SIDE][SIDE];
        for (long first = all * part / threads; first < end; first += BLOCK) {
            long tiles = end - first < BLOCK ? end - first : BLOCK;
            for (long t = 0; t < tiles; t++) {
                pixels(H, W, D, first + t, SIDE, KERNEL / 2, K, at);
                to_points(SIDE, map_in, at, K, x, in + t * K, stride_in);
            }
            for (long n = 0; n < N; n += WIDTH) {
                for (long p = 0; p < POINTS; p++)
                    multiply(tiles, K, in + p * stride_in, K, 1, kernel + (n * POINTS + p * WIDTH) * K,
                             out + p * stride_out, 0);
                for (long t = 0; t < tiles; t++) {
                    pixels(H, W, D, first + t, TILE, 0, N, at);
                    from_points(map_out, at, out + t * WIDTH, stride_out, bias + n, y + n, add);
                }
            }
        }
    }
}

/* The gradient of the kernel's points. memory: POINTS · (BLOCK · (K + N) + (1 + N / WIDTH) · GAP) */
void kernel_gradient(long B, long H, long W, long K, long D, long N, long threads, const float *map_in,
                     const float *map_dy, const float *x, const float *dy, float *d_kernel, float *memory) {
    const long all = B * D * D * TILES(H, D) * TILES(W, D);
    const long stride_in = BLOCK * K + GAP, stride_dy = BLOCK * WIDTH + GAP;
    float *in = memory, *out = in + POINTS * stride_in;
#pragma omp parallel num_threads(threads)
    for (long first = 0; first < all; first += BLOCK) {
        long tiles = all - first < BLOCK ? all - first : BLOCK, at[SIDE][SIDE];
#pragma omp for
        for (long t = 0; t < tiles; t++) {
            pixels(H, W, D, first + t, SIDE, KERNEL / 2, K, at);
            to_points(SIDE, map_in, at, K, x, in + t * K, stride_in);
            pixels(H, W, D, first + t, TILE, 0, N, at);
            for (long n = 0; n < N; n += WIDTH)
                to_points(TILE, map_dy, at, WIDTH, dy + n, out + n / WIDTH * POINTS * stride_dy + t * WIDTH,
                          stride_dy);
        }
#pragma omp for collapse(2)
        for (long n = 0; n < N; n += WIDTH)
            for (long p = 0; p < POINTS; p++)
                multiply(K, tiles, in + p * stride_in, 1, K, out + (n / WIDTH * POINTS + p) * stride_dy,
                         d_kernel + (n * POINTS + p * WIDTH) * K, first > 0);
    }
}
