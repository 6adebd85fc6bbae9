/* AVX-512 with VBMI and VNNI (Ice Lake, Zen 4 and later): 16 lanes (included by kernels.c; kernels in lanes.c). */

#define TARGET __attribute__((target("avx512f,avx512bw,avx512vl,avx512dq,avx512vbmi,avx512vnni,fma")))
#define NAME(x) avx512_##x
#define V 16
#define VF __m512
#define VI __m512i
#define ZERO_F _mm512_setzero_ps()
#define LOAD_F(p) _mm512_load_ps(p)
#define STORE_F(p, x) _mm512_storeu_ps(p, x)
#define MUL_F(a, b) _mm512_mul_ps(a, b)
#define FMA_F(a, b, c) _mm512_fmadd_ps(a, b, c)
#define LOAD_I(p) _mm512_load_si512(p)
#define SUB_I32(a, b) _mm512_sub_epi32(a, b)
#define TO_FLOAT(x) _mm512_cvtepi32_ps(x)

#define LEAF                                                                                                           \
    static inline                                                                                                      \
        __attribute__((always_inline, target("avx512f,avx512bw,avx512vl,avx512dq,avx512vbmi,avx512vnni,fma")))

/* 16 dwords of 4 bytes (3 bits: of 3 bytes; the fourth is the next lane's first, and is ignored). */
LEAF VI avx512_load(const uint8_t *p, int bits) {
    if (bits != 3) {
        VI v = _mm512_loadu_si512(p);
        __asm__("" : "+v"(v)); /* keep it in a register: folded into every shift, the load would be done 16 times */
        return v;
    }
    const VI spread = _mm512_set_epi32(0x302f2e2d, 0x2d2c2b2a, 0x2a292827, 0x27262524, 0x24232221, 0x21201f1e,
                                       0x1e1d1c1b, 0x1b1a1918, 0x18171615, 0x15141312, 0x1211100f, 0x0f0e0d0c,
                                       0x0c0b0a09, 0x09080706, 0x06050403, 0x03020100);
    return _mm512_permutexvar_epi8(spread, _mm512_loadu_si512(p));
}

LEAF VF avx512_table(const float *levels, int bits) {
    (void)bits; /* short tables repeat */
    return _mm512_loadu_ps(levels);
}

/* Levels of the codes in the low bits of v >> shift: vpermilps and vpermps ignore the higher bits. */
LEAF VF avx512_levels(VI v, int bits, int shift, VF low, VF high) {
    (void)high;
    VI index = shift ? _mm512_srli_epi32(v, shift) : v;
    return bits <= 2 ? _mm512_permutevar_ps(low, index) : _mm512_permutexvar_ps(index, low);
}

/* Step t of the bytes of a block, one code each. */
LEAF VI avx512_bytes(VI v, int bits, int t) {
    if (bits == 3) { /* byte k of each dword takes the 8 bits from 12 t + 3 k on, of the dword's own 32 bits */
        const VI at = _mm512_set1_epi64(t ? 0x35322f2c15120f0c : 0x2926232009060300);
        v = _mm512_multishift_epi64_epi8(at, v);
    } else if (t) {
        v = _mm512_srli_epi16(v, t * bits);
    }
    return _mm512_and_si512(v, _mm512_set1_epi8((char)((1 << bits) - 1)));
}

LEAF VI avx512_dot(VI sum, VI codes, VI q, int t) {
    return _mm512_dpbusd_epi32(t ? sum : _mm512_setzero_si512(), codes, q);
}

LEAF VI avx512_twice(VI sum) { return _mm512_slli_epi32(sum, 1); }

LEAF VF avx512_scales(const float *scale, const int32_t *lane) {
    return _mm512_permutexvar_ps(_mm512_loadu_si512(lane), _mm512_loadu_ps(scale));
}

LEAF float avx512_total(VF v) { return _mm512_reduce_add_ps(v); }

#include "lanes.c"
