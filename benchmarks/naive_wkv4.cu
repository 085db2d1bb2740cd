// WKV-4 as the published CUDA kernels compute it: one thread per (row of the batch, channel) walks all T steps.
//
// A baseline for wkv.py, which compiles it with ELEMENT defined as float or bfloat16. Its parallelism is B C and
// nothing else, and every step waits for the one before. The backward pass walks forwards, for the gradients of w and u
// and what the denominators need, then backwards, for those of k and v; what the published kernels keep in arrays of a
// fixed longest T is in `scratch` here, (3, B, T, C).
//
// Arithmetic in float32. Every sum has a scale e^p, so that no exponential overflows; p = EMPTY stands for no terms.

typedef unsigned short bfloat16;

constexpr float EMPTY = -1e38f;

__device__ float load(const float* x) { return *x; }
__device__ float load(const bfloat16* x) { return __uint_as_float((unsigned)*x << 16); }
__device__ void store(float* x, float value) { *x = value; }
__device__ void store(bfloat16* x, float value) {  // to nearest, ties to even; no value here is NaN
    const unsigned bits = __float_as_uint(value);
    *x = (bfloat16)((bits + 0x7fff + ((bits >> 16) & 1)) >> 16);
}

extern "C" __global__ void wkv4_forward(int B, int T, int C, const float* ws, const float* us, const ELEMENT* ks,
                                        const ELEMENT* vs, ELEMENT* ys) {
    const int thread = blockIdx.x * blockDim.x + threadIdx.x;
    if (thread >= B * C) return;
    const int c = thread % C;
    size_t i = (size_t)(thread / C) * T * C + c;
    const float w = ws[c], u = us[c];
    float a = 0, b = 0, p = EMPTY;
    for (int t = 0; t < T; t++, i += C) {
        const float k = load(ks + i), v = load(vs + i);
        float scale = fmaxf(p, u + k);
        float past = __expf(p - scale), now = __expf(u + k - scale);
        store(ys + i, __fdividef(past * a + now * v, past * b + now));

        scale = fmaxf(p + w, k);
        past = __expf(p + w - scale), now = __expf(k - scale);
        a = past * a + now * v;
        b = past * b + now;
        p = scale;
    }
}

// gws and gus are (B, C); gws is the gradient of w, not of time_decay.
extern "C" __global__ void wkv4_backward(int B, int T, int C, const float* ws, const float* us, const ELEMENT* ks,
                                         const ELEMENT* vs, const ELEMENT* gys, float* scratch, float* gws, float* gus,
                                         ELEMENT* gks, ELEMENT* gvs) {
    const int thread = blockIdx.x * blockDim.x + threadIdx.x;
    if (thread >= B * C) return;
    const int c = thread % C;
    const size_t total = (size_t)B * T * C;
    float *ys = scratch, *gnumerators = scratch + total, *scales = scratch + 2 * total;
    size_t i = (size_t)(thread / C) * T * C + c;
    const float w = ws[c], u = us[c];

    float a = 0, b = 0, p = EMPTY, da = 0, db = 0, gw = 0, gu = 0;  // da, db: derivatives of a, b in w
    for (int t = 0; t < T; t++, i += C) {
        const float k = load(ks + i), v = load(vs + i);
        float scale = fmaxf(p, u + k);
        float past = __expf(p - scale), now = __expf(u + k - scale);
        const float denominator = past * b + now;
        const float y = __fdividef(past * a + now * v, denominator);
        const float gnumerator = __fdividef(load(gys + i), denominator);
        gw += gnumerator * past * (da - db * y);
        gu += gnumerator * now * (v - y);
        ys[i] = y, gnumerators[i] = gnumerator, scales[i] = scale;

        scale = fmaxf(p + w, k);
        past = __expf(p + w - scale), now = __expf(k - scale);
        da = past * (da + a);
        db = past * (db + b);
        a = past * a + now * v;
        b = past * b + now;
        p = scale;
    }
    gws[thread] = gw;
    gus[thread] = gu;

    a = 0, b = 0, p = EMPTY;  // from here on the adjoints of numerator and denominator
    for (int t = T - 1; t >= 0; t--) {
        i -= C;
        const float k = load(ks + i), v = load(vs + i);
        const float y = ys[i], gnumerator = gnumerators[i], scale = scales[i];
        const float now = gnumerator * __expf(u + k - scale), later = __expf(k + p);
        store(gks + i, now * (v - y) + later * (a * v + b));
        store(gvs + i, now + later * a);

        const float next = fmaxf(p + w, -scale);
        const float kept = __expf(p + w - next), added = gnumerator * __expf(-scale - next);
        a = kept * a + added;
        b = kept * b - added * y;
        p = next;
    }
}
