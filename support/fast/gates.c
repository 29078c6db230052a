/* gates_forward and gates_backward of layer.py, each one pass over memory. n rows (pixels) of C channels;
   z holds i, f, o, g side by side in a row. Built with -DBF16 or without. NaN passes through every line. */
#include <stdint.h>

#ifdef BF16 /* the upper half of a float32, rounded to nearest even */
typedef uint16_t real;
typedef union { float number; uint32_t bits; } word;
static inline float load(real x) { return (word){.bits = (uint32_t)x << 16}.number; }
static inline real store(float x) {
    uint32_t bits = (word){.number = x}.bits;
    return x != x ? 0x7fc0 : (real)((bits + 0x7fff + ((bits >> 16) & 1)) >> 16);
}
#else
typedef float real;
static inline float load(real x) { return x; }
static inline real store(float x) { return x; }
#endif

/* Lambert's continued fraction of tanh, eleven terms deep: within 2e-6, and several times faster than exp */
static inline float tanh_(float x) {
    x = x > 8 ? 8 : x;
    x = x < -8 ? -8 : x;
    float y = x * x;
    float p = 13749310575.f + y * (1964187225.f + y * (64324260.f + y * (675675.f + y * (2145.f + y))));
    float q = y * (413513100.f + y * (7567560.f + y * (45045.f + y * 66.f)));
    q = 13749310575.f + y * (6547290750.f + q);
    return x * p / q;
}
static inline float sigmoid(float x) { return 0.5f + 0.5f * tanh_(0.5f * x); }

void gates_forward(long n, long C, long threads, const real *z, const float *peephole, float *restrict c,
                   real *restrict c_before, real *restrict h) {
    const float *wi = peephole, *wf = peephole + C, *wo = peephole + 2 * C;
#pragma omp parallel for num_threads(threads)
    for (long row = 0; row < n; row++) {
        const real *zi = z + row * 4 * C, *zf = zi + C, *zo = zf + C, *zg = zo + C;
#pragma omp simd
        for (long k = 0; k < C; k++) {
            float c0 = c[row * C + k];
            float i = sigmoid(load(zi[k]) + wi[k] * c0), f = sigmoid(load(zf[k]) + wf[k] * c0);
            float c1 = f * c0 + i * tanh_(load(zg[k])), o = sigmoid(load(zo[k]) + wo[k] * c1);
            c_before[row * C + k] = store(c0);
            c[row * C + k] = c1;
            h[row * C + k] = store(o * tanh_(c1));
        }
    }
}

void gates_backward(long n, long C, long threads, real *z, const float *peephole, const real *c,
                    const real *dh, const real *dh_next, float *restrict dc, float *sums) {
    const float *wi = peephole, *wf = peephole + C, *wo = peephole + 2 * C;
#pragma omp parallel for num_threads(threads) schedule(static, 1)
    for (long part = 0; part < threads; part++) { /* a part of the rows, and sums (7, C), for each thread */
        float *restrict si = sums + part * 7 * C, *restrict sf = si + C, *restrict so = sf + C;
        float *restrict sg = so + C, *restrict pi = sg + C, *restrict pf = pi + C, *restrict po = pf + C;
        for (long row = n * part / threads; row < n * (part + 1) / threads; row++) {
            real *restrict zi = z + row * 4 * C, *restrict zf = zi + C;
            real *restrict zo = zf + C, *restrict zg = zo + C;
#pragma omp simd
            for (long k = 0; k < C; k++) {
                float c0 = load(c[row * C + k]);
                float i = sigmoid(load(zi[k]) + wi[k] * c0), f = sigmoid(load(zf[k]) + wf[k] * c0);
                float g = tanh_(load(zg[k])), c1 = f * c0 + i * g;
                float o = sigmoid(load(zo[k]) + wo[k] * c1), tanh_c = tanh_(c1);
                float dh_ = load(dh[row * C + k]) + load(dh_next[row * C + k]);
                float do_ = dh_ * tanh_c * o * (1 - o);
                float dc1 = dc[row * C + k] + dh_ * o * (1 - tanh_c * tanh_c) + wo[k] * do_;
                float di = dc1 * g * i * (1 - i), df = dc1 * c0 * f * (1 - f), dg = dc1 * i * (1 - g * g);
                zi[k] = store(di), zf[k] = store(df), zo[k] = store(do_), zg[k] = store(dg);
                dc[row * C + k] = dc1 * f + wi[k] * di + wf[k] * df;
                si[k] += di, sf[k] += df, so[k] += do_, sg[k] += dg;
                pi[k] += di * c0, pf[k] += df * c0, po[k] += do_ * c1;
            }
        }
    }
}
