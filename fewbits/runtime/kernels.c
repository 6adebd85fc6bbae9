/* Packed linear layers on the CPU: the layer's description, activation quantization, dispatch and entry points.
 *
 * The weight stays in the dense layout of fewbits/packing.py (least significant bit first, rows on bytes); the
 * activations are permuted instead, once per call. The vector kernels read a row of codes as blocks of V dwords
 * ("lanes", V = 8 with AVX2 and 16 with AVX-512); a lane is LW consecutive codes:
 *
 *   bits               1    2    3    4
 *   LW                32   16    8    8     codes in a lane (3 bits: 24 of the dword's 32 bits)
 *   bytes of 8 lanes  32   32   24   32
 *
 * Weights that share a scale come in multiples of 32, so that a lane has one scale. Products are summed per lane
 * within a block, then multiplied by the lane's fp32 scale.
 */
#include <pthread.h>
#include <stdint.h>
#include <stdlib.h>
#include <string.h>

#if defined(__x86_64__) && defined(__GNUC__) && (defined(__clang__) || __GNUC__ >= 9)
#define FB_X86 1
#include <cpuid.h>
#include <immintrin.h>
#else
#define FB_X86 0
#endif

#define INLINE static inline __attribute__((always_inline))

enum { SCALE_FP16 = 0, SCALE_BF16 = 1, SCALE_FP32 = 2 };
enum { PORTABLE = 0, AVX2 = 1, AVX512 = 2 };

typedef struct {
    const uint8_t *codes;       /* rows * stride bytes and 64 more that may be read */
    const void *scales;         /* (scale_rows, scale_cols) of scale_kind; super scales if multipliers is set */
    const uint8_t *multipliers; /* (rows, num_groups) or NULL */
    const float *levels;        /* 256 entries: code (counted from 0) -> level in steps; short tables repeat */
    const int32_t *first;       /* per block: first group that it touches */
    const int32_t *lane;        /* per block: V group indices relative to first */
    int64_t rows, width, stride;
    int64_t group;      /* codes that share an (activation and weight) scale */
    int64_t num_groups; /* ceil(width / group) */
    int64_t scale_cols; /* stored scales of a row: num_groups, 1, or the number of super scales */
    int64_t per_super;  /* groups per super scale */
    int32_t scale_rows; /* rows, or 1 for a scale of the whole tensor */
    int32_t scale_kind;
    int32_t bits;
    int32_t twice_zero; /* uniform grids: level = half_step * (2 code - twice_zero) */
    float half_step;
    int32_t variant;
} fb_layer;

/* What one call works on; rows are handed out in chunks, each row is computed alone: threads change no bit. */
typedef struct {
    const fb_layer *L;
    const float *x;      /* fp32: (n, padded), permuted for the vector kernels */
    const int8_t *q;     /* int8: (n, padded), permuted for the vector kernels */
    const float *xscale; /* int8: (n, num_groups) */
    const int32_t *zero; /* int8, vector kernels: per token, block and lane, twice_zero * sum of q */
    float *y;            /* (n, rows) */
    int64_t padded, n;
    int int8;
} job;

INLINE int lane_width(int bits) { return bits == 1 ? 32 : bits == 2 ? 16 : 8; }

INLINE int64_t block_size(const fb_layer *L) {
    return L->variant == PORTABLE ? 1 : (L->variant == AVX512 ? 16 : 8) * lane_width(L->bits);
}

INLINE float bits_to_float(uint32_t u) {
    float f;
    memcpy(&f, &u, 4);
    return f;
}

#define NOT_A_NUMBER bits_to_float(0x7fc00000u)
#define SMALLEST_NORMAL bits_to_float(0x00800000u)

/* Stored scales are positive normal numbers: no sign, no subnormals, no infinities. */
INLINE float load_scale(const fb_layer *L, int64_t i) {
    if (L->scale_kind == SCALE_FP32) return ((const float *)L->scales)[i];
    uint32_t h = ((const uint16_t *)L->scales)[i];
    return bits_to_float(L->scale_kind == SCALE_BF16 ? h << 16 : (h << 13) + (112u << 23));
}

/* fp32 scales of `count` consecutive rows, one per group: out (count, num_groups). */
INLINE void row_scales(const fb_layer *L, int64_t row, int64_t count, float *out) {
    const int64_t n = L->num_groups, total = count * n;
    if (L->multipliers || L->scale_cols == 1) {
        for (int64_t r = row; r < row + count; r++, out += n) {
            const uint8_t *m = L->multipliers ? L->multipliers + r * n : NULL;
            int64_t base = L->scale_rows == 1 ? 0 : r * L->scale_cols;
            for (int64_t g = 0; g < n; g++)
                out[g] = m ? load_scale(L, base + g / L->per_super) * (float)m[g] : load_scale(L, base);
        }
    } else if (L->scale_kind == SCALE_FP32) {
        memcpy(out, (const float *)L->scales + row * n, (size_t)total * sizeof(float));
    } else {
        const uint16_t *h = (const uint16_t *)L->scales + row * n;
        int shift = L->scale_kind == SCALE_BF16 ? 16 : 13;
        uint32_t add = L->scale_kind == SCALE_BF16 ? 0 : 112u << 23;
        for (int64_t g = 0; g < total; g++) out[g] = bits_to_float(((uint32_t)h[g] << shift) + add);
    }
}

/* Symmetric int8 of one token, one scale per group: q = round_half_even(x / s), s = max|x| / 127 (codes in -127..127).
 * A group whose scale would be subnormal becomes zero; a group that is not finite gets the scale NaN. The steps are
 * single IEEE operations, so that the torch emulation in activations.py gives the same bits. */
INLINE void quantize_token(const float *x, int64_t width, int64_t group, int8_t *q, float *scale) {
    const float magic = 12582912.0f; /* 1.5 * 2^23: adding it rounds to an integer, half to even */
    for (int64_t k = 0, g = 0; k < width; k += group, g++) {
        int64_t n = width - k < group ? width - k : group;
        int32_t top = 0;
        for (int64_t i = 0; i < n; i++) {
            int32_t u;
            memcpy(&u, x + k + i, 4);
            u &= 0x7fffffff;
            top = u > top ? u : top; /* as integers, so that NaN is larger than everything */
        }
        float s = top >= 0x7f800000 ? NOT_A_NUMBER : bits_to_float((uint32_t)top) / 127.0f;
        scale[g] = s < SMALLEST_NORMAL ? 0.0f : s;
        if (s >= SMALLEST_NORMAL)
            for (int64_t i = 0; i < n; i++) q[k + i] = (int8_t)(int32_t)((x[k + i] / s + magic) - magic);
        else
            memset(q + k, 0, (size_t)n);
    }
}

#include "pool.c"
#include "portable.c"
#if FB_X86
#include "avx2.c"
#include "avx512.c"
#endif

int fb_abi(void) { return (int)sizeof(fb_layer); }

/* 1 where the CPU, the operating system and this build can run the variant. CPUID is read here because the runtime
 * of some compilers (zig cc) answers __builtin_cpu_supports with no. */
int fb_supports(int variant) {
#if FB_X86
    unsigned a, b, c, d, saved, high;
    if (variant == AVX2 || variant == AVX512) {
        const unsigned fma_osxsave = 1u << 12 | 1u << 27, avx2 = 1u << 5;
        const unsigned f_dq_bw_vl = 1u << 16 | 1u << 17 | 1u << 30 | 1u << 31, vbmi_vnni = 1u << 1 | 1u << 11;
        if (!__get_cpuid(1, &a, &b, &c, &d) || (c & fma_osxsave) != fma_osxsave) return 0;
        __asm__ volatile("xgetbv" : "=a"(saved), "=d"(high) : "c"(0)); /* registers that the system saves */
        if (!__get_cpuid_count(7, 0, &a, &b, &c, &d) || !(b & avx2) || (saved & 0x06) != 0x06) return 0;
        if (variant == AVX2) return 1;
        return (b & f_dq_bw_vl) == f_dq_bw_vl && (c & vbmi_vnni) == vbmi_vnni && (saved & 0xe6) == 0xe6;
    }
#endif
    return variant == PORTABLE;
}

static void linear_rows(void *arg, int64_t begin, int64_t end) {
    const job *J = arg;
    switch (J->L->variant) {
#if FB_X86
    case AVX2: avx2_rows(J, begin, end); break;
    case AVX512: avx512_rows(J, begin, end); break;
#endif
    default: portable_rows(J, begin, end);
    }
}

static void prepare(job *J, const float *x, int8_t *scratch) {
    const fb_layer *L = J->L;
    (void)scratch; /* of the vector kernels */
    switch (L->variant) {
#if FB_X86
    case AVX2: avx2_prepare(J, x, scratch); break;
    case AVX512: avx512_prepare(J, x, scratch); break;
#endif
    default:
        for (int64_t i = 0; i < J->n; i++)
            quantize_token(x + i * L->width, L->width, L->group, (int8_t *)J->q + i * J->padded,
                           (float *)J->xscale + i * L->num_groups);
    }
}

/* Width of a row as the vector kernels see it: whole blocks. */
int64_t fb_padded_width(const fb_layer *L) {
    int64_t block = block_size(L);
    return (L->width + block - 1) / block * block;
}

/* Bytes that the prepared activations of n tokens take, and where their four parts begin; 0 if none are needed. */
static size_t job_sizes(const fb_layer *L, int64_t n, int int8, size_t starts[5]) {
    int64_t padded = fb_padded_width(L), lanes = L->variant == PORTABLE ? 0 : padded / lane_width(L->bits);
    size_t sizes[4] = {(size_t)(n * padded) * (int8 ? 1 : 4), int8 ? (size_t)(n * L->num_groups) * 4 : 0,
                       int8 ? (size_t)(n * lanes) * 4 : 0, int8 ? (size_t)padded : 0};
    starts[0] = 0;
    for (int i = 0; i < 4; i++) starts[i + 1] = starts[i] + (sizes[i] + 63) / 64 * 64;
    return L->variant != PORTABLE || int8 ? starts[4] : 0;
}

static void job_prepare(job *J, const float *x, uint8_t *memory, const size_t starts[5]) {
    J->x = (const float *)memory, J->q = (const int8_t *)memory;
    J->xscale = (const float *)(memory + starts[1]), J->zero = (const int32_t *)(memory + starts[2]);
    prepare(J, x, (int8_t *)(memory + starts[3]));
}

/* y (n, rows) = x (n, width) times the weight. Returns 0, or 1 when memory ran out. */
int fb_linear(const fb_layer *L, const float *x, float *y, int64_t n, int int8, int threads) {
    job J = {.L = L, .y = y, .x = x, .padded = fb_padded_width(L), .n = n, .int8 = int8};
    uint8_t *memory = NULL;
    size_t starts[5], size = job_sizes(L, n, int8, starts);
    if (size) {
        memory = aligned_alloc(64, size);
        if (!memory) return 1;
        job_prepare(&J, x, memory, starts);
    }
    pool_run(linear_rows, &J, L->rows, n * L->width, UNIT_ROWS, threads);
    free(memory);
    return 0;
}

/* x (n, width) in the order that fb_tile writes its columns: out (n, fb_padded_width). */
void fb_permute(const fb_layer *L, const float *x, float *out, int64_t n) {
    int64_t padded = fb_padded_width(L);
    for (int64_t i = 0; i < n; i++)
        switch (L->variant) {
#if FB_X86
        case AVX2: avx2_permute(x + i * L->width, L->width, L->bits, out + i * padded); break;
        case AVX512: avx512_permute(x + i * L->width, L->width, L->bits, out + i * padded); break;
#endif
        default: memcpy(out + i * padded, x + i * L->width, (size_t)L->width * 4);
        }
}

typedef struct {
    const fb_layer *L;
    const int64_t *ids;
    int64_t begin, padded;
    float *out;
} tile;

static void tile_rows(void *arg, int64_t begin, int64_t end) {
    const tile *T = arg;
#if FB_X86
    if (!T->ids && T->L->variant != PORTABLE) {
        for (int64_t i = begin; i < end; i++) {
            if (T->L->variant == AVX2) avx2_dequantize(T->L, T->begin + i, T->out + i * T->padded);
            else avx512_dequantize(T->L, T->begin + i, T->out + i * T->padded);
        }
        return;
    }
#endif
    portable_dequantize(T->L, T->ids, T->begin, begin, end, T->padded, T->out);
}

/* Rows of the weight, fp32(scale) * level: rows begin .. begin + count, columns in the order of fb_permute. */
void fb_tile(const fb_layer *L, int64_t begin, int64_t count, float *out, int threads) {
    tile T = {L, NULL, begin, fb_padded_width(L), out};
    pool_run(tile_rows, &T, count, L->width, 1, threads);
}

/* The rows with these ids, columns in their own order. */
void fb_lookup(const fb_layer *L, const int64_t *ids, int64_t count, float *out, int threads) {
    tile T = {L, ids, 0, L->width, out};
    pool_run(tile_rows, &T, count, L->width, 1, threads);
}

#include "decode.c"
